"""What is nan or inf, kept apart from sums."""

import tracemalloc

import numpy as np
import pytest

import cupyattn


@pytest.mark.parametrize("compute_dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("rows", "keys", "dim"),
    [(1, 9, 1), (1, 300, 2), (1, 300, 3), (1, 300, 16), (5, 300, 64), (7, 3000, 64), (40, 70, 1)],
)
def test_no_bit_depends_on_what_hidden_values_hold(rows, keys, dim, compute_dtype, rng):
    """By which sums are made anew, whatever shape the BLAS got their operands in."""
    q, k, v = (rng.standard_normal((2, n, 3, dim)) for n in (rows, keys, keys))
    seen = rng.random(keys) < 0.7
    ask = {"mask": seen, "compute_dtype": compute_dtype, "return_lse": True}
    expected = cupyattn.attention(q, k, v, **ask)
    v[0, ~seen], v[1, ~seen] = np.inf, np.nan
    for found, right in zip(cupyattn.attention(q, k, v, **ask), expected, strict=True):
        np.testing.assert_array_equal(found, right)


@pytest.mark.parametrize("compute_dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("rows", "keys", "dim"), [(1, 9, 1), (1, 300, 2), (1, 300, 3), (5, 300, 64), (40, 70, 1), (70, 300, 16)]
)
def test_no_bit_of_a_gradient_does(rows, keys, dim, compute_dtype, rng):
    q, dout = (rng.standard_normal((2, rows, 3, dim)) for _ in range(2))
    k, v = (rng.standard_normal((2, keys, 3, dim)) for _ in range(2))
    seen = rng.random(keys) < 0.7
    ask = {"mask": seen, "compute_dtype": compute_dtype}
    expected = cupyattn.attention_backward(dout, q, k, v, **ask)
    k[0, ~seen], v[0, ~seen], k[1, ~seen], v[1, ~seen] = np.inf, np.nan, np.nan, np.inf
    found = cupyattn.attention_backward(dout, q, k, v, **ask)
    for name in ("dq", "dk", "dv"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def test_no_more_memory_than_the_values_take(rng):
    """A single column of values that lie one sequence beside the other has large steps."""
    v = np.ones((512, 16, 8, 1)).transpose(1, 2, 0, 3)
    q, k = np.ones((16, 8, 1, 4)), np.ones((16, 8, 512, 4))
    seen = np.arange(512) > 0
    v[:, :, 0] = np.nan
    cupyattn.attention(q, k, v, layout="bhsd", mask=seen)
    tracemalloc.start()
    try:
        assert (cupyattn.attention(q, k, v, layout="bhsd", mask=seen) == 1.0).all()
        assert tracemalloc.get_traced_memory()[1] < 8e6
    finally:
        tracemalloc.stop()
