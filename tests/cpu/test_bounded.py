"""Where the running maximum is skipped, and where it must not be."""

import numpy as np
import pytest
from oracle import assert_matches, assert_same_bits

import cupyattn
from cupyattn.cpu import bounded, flash

EDGES = {"float64": (59.9, 962, -997), "float32": (29.9, 99, -109)}
"""The largest score without a maximum; exponents of values near 1e290 and 1e-300, 1e30 and 1e-33."""
TIGHT = {"float64": 1e-12, "float32": 2e-5}


def draw(rng, dtype, rows, score, keys=300):
    """(batch, seqlen, heads, dim) operands whose scores are all `score`, nearly."""
    q, k, v = (np.zeros((1, n, 2, 4), dtype) for n in (rows, keys, keys))
    q[..., 0], k[..., 0] = score, 1.0
    k[..., 1] = rng.uniform(-0.05, 0.05, k.shape[:-1])
    q[..., 1] = rng.uniform(-1, 1, q.shape[:-1])
    v[...] = rng.uniform(1, 2, v.shape)
    return q, k, v


@pytest.fixture
def calls(monkeypatch):
    """How often tiles were computed, and how many rows of each needed no maximum."""
    found, original = [], flash.flash

    def watched(tile, head_dim_v):
        found.append(0 if tile.bounded is None else int(tile.bounded.sum()))
        return original(tile, head_dim_v)

    monkeypatch.setattr(flash, "flash", watched)
    return found


@pytest.mark.parametrize("size", ["large", "small"])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rows", [1, 63, 64, 300])
@pytest.mark.parametrize("dtype", EDGES)
def test_values_of_any_size_come_through_whatever_the_scores(rng, dtype, rows, causal, sign, size):
    score, large, small = EDGES[dtype]
    q, k, v = draw(rng, dtype, rows, sign * score)
    options = {"softmax_scale": 1.0, "causal": causal, "alignment": "bottom-right", "compute_dtype": dtype}
    expected = cupyattn.attention(*(x.astype(np.float64) for x in (q, k, v)), **{**options, "compute_dtype": "float64"})
    exponent = large if size == "large" else small
    out = cupyattn.attention(q, k, np.ldexp(v, exponent), **options)
    assert_matches(np.ldexp(out, -exponent), expected, rtol=TIGHT[dtype])


@pytest.mark.parametrize("size", ["large", "small"])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", EDGES)
def test_gradients_of_values_of_any_size_are_as_large(rng, dtype, sign, size):
    score, large, small = EDGES[dtype]
    q, k, v = draw(rng, dtype, 64, sign * score)
    dout = rng.uniform(1, 2, q.shape).astype(dtype)
    options = {"softmax_scale": 1.0, "compute_dtype": dtype}
    exponent = large if size == "large" else small
    expected = cupyattn.attention_backward(dout, q, k, v, **options)
    found = cupyattn.attention_backward(dout, q, k, np.ldexp(v, exponent), **options)
    for name, scale in (("dq", exponent), ("dk", exponent), ("dv", 0)):
        columns = slice(1, None) if name == "dq" else slice(None)  # in the first one keys are alike: it is 0, nearly
        there, here = getattr(expected, name)[..., columns], np.ldexp(getattr(found, name)[..., columns], -scale)
        assert_matches(here, there, rtol=10 * TIGHT[dtype], atol=TIGHT[dtype] * float(np.abs(there).max()))


def test_the_maximum_is_skipped_where_scores_are_small(rng, calls):
    q, k, v = draw(rng, "float64", 64, 59.9)
    cupyattn.attention(q, k, v, softmax_scale=1.0)
    assert sum(calls) == 2 * 64


@pytest.mark.parametrize(("exponent", "again"), [(0, False), (-850, False), (-997, True), (962, True)])
def test_values_at_the_edges_are_computed_with_it(rng, calls, exponent, again):
    q, k, v = draw(rng, "float64", 64, 59.9)
    v[..., 1:] = 0.0  # zeros are no products that vanished
    cupyattn.attention(q, k, np.ldexp(v, exponent), softmax_scale=1.0)
    assert (0 in calls) == again


def test_a_row_at_the_edge_changes_no_bit_of_the_others(rng):
    q, k, v = draw(rng, "float64", 64, 1.0)
    tiny = np.ldexp(v, -997)
    tiny[:, 1:] = v[:, 1:]
    options = {"softmax_scale": 1.0, "causal": True, "alignment": "top-left"}
    expected = cupyattn.attention(q, k, v, **options)
    found = cupyattn.attention(q, k, tiny, **options)
    assert_matches(np.ldexp(found[:, 0], 997), expected[:, 0], rtol=1e-12)
    nan = v.copy()
    nan[:, 40] = np.nan
    assert_same_bits(cupyattn.attention(q, k, nan, **options)[:, :40], expected[:, :40])


def test_rows_that_see_nothing_are_not_computed_twice(rng, calls):
    q, k, v = draw(rng, "float64", 400, 1.0)
    cupyattn.attention(q, k, v, softmax_scale=1.0, causal=True, alignment="bottom-right")
    assert all(calls)


def test_what_cannot_be_lost_is_as_small_as_said():
    """A product of the smallest weight and a value of that size is a normal number, to the last bit."""
    for dtype, least in bounded.LEAST_EXACT.items():
        info = np.finfo(dtype)
        assert least * np.exp(-bounded.SCORE_LIMIT[dtype]) * info.eps >= info.tiny * 0.999
