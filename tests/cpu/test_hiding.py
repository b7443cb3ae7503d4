"""Hidden scores are minus infinity, and the others stay what they are, however the hidden ones lie."""

import numpy as np
import pytest

from cupyattn.cpu.hiding import AT_ONCE, _is_scattered, exponentials, hide
from cupyattn.cpu.scratch import Scratch

SHAPE = (2, 3, 70, 50)
LIE = {
    "scattered": lambda rng: rng.random(SHAPE) < 0.3,
    "in stretches": lambda rng: np.broadcast_to(~np.tri(*SHAPE[2:], dtype=bool), SHAPE),
    "scattered, for all heads": lambda rng: rng.random((1, 1, *SHAPE[2:])) < 0.3,
    "keys of all rows": lambda rng: rng.random((2, 1, 1, SHAPE[3])) < 0.3,
    "all": lambda rng: np.ones(SHAPE, bool),
    "none": lambda rng: np.zeros(SHAPE, bool),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("lie", LIE)
def test_hidden_scores_alone_become_minus_infinity(rng, lie, dtype):
    scores = rng.standard_normal(SHAPE).astype(dtype)
    scores[..., ::7] = np.nan
    scores[..., 1::7] = np.inf
    scores[..., 2::7] = -0.0
    hidden = LIE[lie](rng)
    expected = np.where(hidden, scores.dtype.type(-np.inf), scores)
    hide(scores, hidden, Scratch())
    np.testing.assert_array_equal(scores, expected)
    is_number = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(scores[is_number]), np.signbit(expected[is_number]))


@pytest.mark.parametrize(("lie", "expected"), [("scattered", True), ("in stretches", False), ("all", False)])
def test_what_changes_from_key_to_key_is_scattered(rng, lie, expected):
    assert _is_scattered(LIE[lie](rng)) == expected


def test_keys_that_are_hidden_from_all_rows_take_no_memory_for_each_row(rng):
    scratch = Scratch()
    hide(rng.standard_normal(SHAPE), LIE["keys of all rows"](rng), scratch)
    assert scratch.nbytes < 8 * SHAPE[3] * 4


def test_many_hidden_scores_take_no_memory_for_each(rng):
    scratch, scores, hidden = Scratch(), rng.standard_normal((1, 2, 300, 700)), rng.random((1, 2, 300, 700)) < 0.5
    expected = np.where(hidden, -np.inf, scores)
    hide(scores, hidden, scratch)
    np.testing.assert_array_equal(scores, expected)
    assert scratch.nbytes <= 8 * AT_ONCE


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("lie", LIE)
def test_exponentials_are_numpys_to_the_last_bit(rng, lie, dtype):
    scores = 400.0 * rng.standard_normal(SHAPE).astype(dtype)
    scores[..., ::7] = np.nan
    scores[..., 1::7] = np.inf
    scores[..., 2::7] = -745.0
    scores[..., 3::7] = -np.inf  # of a key that is seen
    scratch, hidden = Scratch(), LIE[lie](rng)
    with np.errstate(all="ignore"):
        hide(scores, hidden, scratch)
        expected = np.exp(scores)
        exponentials(scores, hidden, scratch)
    np.testing.assert_array_equal(scores.view(f"u{scores.itemsize}"), expected.view(f"u{scores.itemsize}"))


def test_exp_is_not_asked_for_scattered_infinities(rng, monkeypatch):
    scores, hidden, seen = rng.standard_normal(SHAPE), LIE["scattered"](rng), []
    scores[hidden] = -np.inf
    real = np.exp
    monkeypatch.setattr(np, "exp", lambda x, out: (seen.append(np.isfinite(x).all()), real(x, out=out)))
    exponentials(scores, hidden, Scratch())
    assert seen == [True]


def test_many_exponentials_take_no_memory_for_each(rng):
    scratch, scores, hidden = Scratch(), rng.standard_normal((1, 2, 300, 700)), rng.random((1, 1, 300, 700)) < 0.5
    expected = np.exp(np.where(hidden, -np.inf, scores))
    scores[np.broadcast_to(hidden, scores.shape)] = -np.inf
    exponentials(scores, hidden, scratch)
    np.testing.assert_array_equal(scores, expected)
    assert scratch.nbytes <= 8 * AT_ONCE
