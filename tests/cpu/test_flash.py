"""The algorithm against the definition: block by block, under every option and however it is cut."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_correctly_rounded, assert_matches, assert_same_bits

import cupyattn
from cupyattn import numpy_ref
from cupyattn.cpu import flash
from cupyattn.cpu.flash import OnlineSoftmax

seeds = st.integers(0, 2**32 - 1)
quick = settings(derandomize=True, deadline=None, max_examples=100)


# ---------------------------------------------------------------------------------------------------
# OnlineSoftmax
# ---------------------------------------------------------------------------------------------------


@quick
@given(
    seed=seeds,
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    spread=st.sampled_from([0.0, 1.0, 30.0, 1e4]),
    hidden=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    with_sinks=st.booleans(),
    dtype=st.sampled_from(["float64", "float32"]),
)
def test_folding_block_by_block_is_the_softmax_of_the_whole_row(seed, sizes, spread, hidden, with_sinks, dtype):
    rng = np.random.default_rng(seed)
    rows, keys = (2, 3), sum(sizes)
    scores = (spread * rng.standard_normal((*rows, keys))).astype(dtype)
    scores[rng.random(scores.shape) < hidden] = -np.inf
    values = rng.standard_normal((2, keys, 4)).astype(dtype)
    sinks = rng.standard_normal(rows).astype(dtype) if with_sinks else None
    softmax = OnlineSoftmax(rows, dtype, sinks)
    out = np.zeros((*rows, 4), dtype)
    start = 0
    for size in sizes:
        block = scores[..., start : start + size].copy()
        with np.errstate(all="ignore"):
            shrink = softmax.fold(block)
        if shrink is not None:
            out *= shrink[..., None]
        out += block @ values[:, start : start + size]
        start += size
    with np.errstate(all="ignore"):
        state = softmax.finish(out)

    eye = np.broadcast_to(np.eye(keys), (2, keys, keys))
    finite = np.where(np.isneginf(scores), 0.0, scores)  # -inf * 0 is nan in the product with the unit matrix
    expected = numpy_ref.attention(finite, eye, values, scale=1.0, visible=scores > -np.inf, sinks=sinks)
    tolerance = {"rtol": 1e-12, "atol": 1e-13} if dtype == "float64" else {"rtol": 2e-6, "atol": 2e-6}
    assert state.out.dtype == state.lse.dtype == dtype
    assert_matches(state.out, expected.out, **tolerance)
    assert_matches(state.lse, expected.lse, **tolerance)


@quick
@given(
    seed=seeds,
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    bounded=st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_rows_of_bounded_scores_need_no_maximum_and_are_never_rescaled(seed, sizes, bounded):
    rng = np.random.default_rng(seed)
    bounded = np.array(bounded)
    scores = rng.uniform(-60.0, 60.0, (4, sum(sizes)))
    scores[~bounded] *= 100.0
    scores[rng.random(scores.shape) < 0.3] = -np.inf
    softmax = OnlineSoftmax((4,), "float64", bounded=bounded)
    out, values = np.zeros((4, 2)), rng.standard_normal((sum(sizes), 2))
    with np.errstate(all="ignore"):
        for start, size in zip(np.cumsum([0, *sizes]), sizes, strict=False):
            block = scores[:, start : start + size].copy()
            shrink = softmax.fold(block)
            if shrink is not None:
                assert_matches(shrink[bounded], np.ones(bounded.sum()))
                out *= shrink[:, None]
            assert_matches(softmax.row_max[bounded], np.zeros(bounded.sum()))
            out += block @ values[start : start + size]
        state = softmax.finish(out)
    visible = scores > -np.inf
    expected = numpy_ref.attention(
        np.where(visible, scores, 0.0), np.eye(sum(sizes)), values, scale=1.0, visible=visible
    )
    assert_matches(state.out, expected.out, rtol=1e-11, atol=1e-12)
    assert_matches(state.lse, expected.lse, rtol=1e-12, atol=1e-12)


def test_folding_a_smaller_maximum_shrinks_nothing_and_a_larger_one_does():
    softmax = OnlineSoftmax((1,), "float64")
    with np.errstate(all="ignore"):
        softmax.fold(np.array([[2.0, 1.0]]))
        shrink = softmax.fold(np.array([[0.0]]))
        assert shrink is None or shrink[0] == 1.0
        assert_matches(softmax.fold(np.array([[5.0]])), [math.exp(2.0 - 5.0)], rtol=1e-15)
    assert_matches(softmax.row_max, [5.0])
    assert_matches(softmax.row_sum, [math.exp(-3) + math.exp(-4) + math.exp(-5) + 1.0], rtol=1e-15)


# ---------------------------------------------------------------------------------------------------
# Block by block against the definition
# ---------------------------------------------------------------------------------------------------


def band(seqlen_q, seqlen_k, left, right, offset):
    i, j = np.ogrid[:seqlen_q, :seqlen_k]
    seen = np.ones((seqlen_q, seqlen_k), bool)
    if left is not None:
        seen &= j >= i + offset - left
    if right is not None:
        seen &= j <= i + offset + right
    return seen


def assert_attention_is_its_definition(q, k, v, rtol=1e-11, atol=1e-12, **options):
    """`attention` of (batch, heads, seqlen, head_dim) arrays against the dense definition."""
    out, lse = cupyattn.attention(q, k, v, layout="bhsd", **options, return_lse=True)
    batch = np.broadcast_shapes(*(x.shape[:1] for x in (q, k, v)))
    (num_heads, seqlen_q, head_dim), seqlen_k = q.shape[1:], k.shape[2]
    k, v = (np.repeat(x, num_heads // x.shape[1], axis=1) for x in (k, v))
    q, k, v = (np.broadcast_to(x, (*batch, *x.shape[1:])) for x in (q, k, v))
    offset = seqlen_k - seqlen_q if options.get("alignment") == "bottom-right" else 0
    left, right = options.get("window_size", (None, None))
    visible = band(seqlen_q, seqlen_k, left, 0 if options.get("causal") else right, offset)
    bias = np.asarray(options.get("bias", 0.0), np.float64)
    if "alibi_slopes" in options:
        distance = np.abs(np.arange(seqlen_q)[:, None] + offset - np.arange(seqlen_k))
        bias = bias - options["alibi_slopes"][..., None, None] * distance
    scale = options.get("softmax_scale")
    p = options.get("dropout_p", 0.0)
    b, h, i = np.ogrid[: batch[0], :num_heads, :seqlen_q]
    expected = numpy_ref.attention(
        q,
        k,
        v,
        visible=visible & options.get("mask", True),
        scale=head_dim**-0.5 if scale is None else scale,
        softcap=options.get("softcap", 0.0),
        bias=bias,
        sinks=options["sinks"][:, None] if "sinks" in options else None,
        keep=numpy_ref.dropout_keep(p, options["dropout_seed"], b, h, i, range(seqlen_k)) if p else True,
        dropout_p=p,
    )
    assert_matches(out, expected.out, rtol=rtol, atol=atol)
    assert_matches(lse, expected.lse, rtol=rtol, atol=atol)


@st.composite
def calls(draw):
    rng = np.random.default_rng(draw(seeds))
    batch = draw(st.sampled_from([1, 3]))
    seqlen_q = draw(st.sampled_from([1, 2, 7, 65]))
    seqlen_k = draw(st.sampled_from([1, 2, 7, 65]))
    num_heads, num_heads_k, num_heads_v = draw(
        st.sampled_from([(1, 1, 1), (3, 3, 3), (4, 2, 2), (4, 1, 1), (4, 1, 2), (6, 3, 2), (2, 2, 1)])
    )
    batches = [draw(st.sampled_from([1, batch])) for _ in range(3)]
    spread = draw(st.sampled_from([1.0, 1.0, 100.0, 1e-3]))
    q = spread * rng.standard_normal((batches[0], num_heads, seqlen_q, 5))
    k = rng.standard_normal((batches[1], num_heads_k, seqlen_k, 5))
    v = rng.standard_normal((batches[2], num_heads_v, seqlen_k, 3))
    scores = max(batches), num_heads, seqlen_q, seqlen_k

    def broadcast_shape():
        return [draw(st.sampled_from([1, n])) for n in scores][draw(st.integers(0, 3)) :]

    sides = st.sampled_from([None, 0, 1, 3, 40])
    options = {
        "causal": draw(st.booleans()),
        "window_size": (draw(sides), draw(sides)),
        "alignment": draw(st.sampled_from(["top-left", "bottom-right"])),
        "softmax_scale": draw(st.sampled_from([None, 0.0, 3.0, -3.0])),
        "softcap": draw(st.sampled_from([0.0, 0.0, 2.0])),
    }
    if draw(st.booleans()):
        options["mask"] = rng.random(broadcast_shape()) < draw(st.sampled_from([0.1, 0.8]))
    if draw(st.booleans()):
        shape = broadcast_shape()
        options["bias"] = np.where(rng.random(shape) < 0.2, -np.inf, rng.standard_normal(shape))
    if draw(st.booleans()):
        options["alibi_slopes"] = rng.random(draw(st.sampled_from([(num_heads,), (max(batches), num_heads)])))
    if draw(st.booleans()):
        options["sinks"] = rng.standard_normal(num_heads)
    if draw(st.booleans()):
        options |= {"dropout_p": draw(st.sampled_from([0.2, 1.0])), "dropout_seed": draw(st.integers(0, 2**64 - 1))}
    return q, k, v, options


@settings(derandomize=True, deadline=None, max_examples=400)
@given(calls())
def test_attention_is_its_definition_under_every_combination_of_options(call):
    q, k, v, options = call
    assert_attention_is_its_definition(q, k, v, **options)


LENGTHS = [
    (1, 5000),
    (3, 1300),
    (63, 300),
    (64, 257),
    (511, 255),
    (512, 256),
    (513, 257),
    (700, 900),
    (1030, 520),
    (1600, 1100),
]
CUTS = {
    "full": {},
    "causal": {"causal": True, "alignment": "bottom-right"},
    "causal top-left": {"causal": True, "alignment": "top-left"},
    "window": {"window_size": (100, 17), "alignment": "bottom-right"},
    "narrow": {"window_size": (0, 1), "alignment": "top-left"},
}


NEGATIVE = {
    **CUTS,
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi_slopes": np.array([0.01, 0.3]), "alignment": "bottom-right"},
    "sinks": {"sinks": np.array([-0.3, 1.0])},
}


@pytest.mark.parametrize("name", NEGATIVE)
@pytest.mark.parametrize("spread", [1e-3, 1.0, 300.0])
@pytest.mark.parametrize("compute_dtype", ["float64", "float32"])
def test_a_negative_scale_is_one_whether_or_not_scores_are_bounded(rng, name, spread, compute_dtype):
    q = spread * rng.standard_normal((1, 2, 150, 4))
    k, v = rng.standard_normal((2, 1, 1, 170, 4))
    exact = compute_dtype == "float64" or spread > 1  # large scores of float32 are off by themselves
    options = NEGATIVE[name] | {"softmax_scale": -0.7, "compute_dtype": "float64" if exact else compute_dtype}
    assert_attention_is_its_definition(q, k, v, **({} if exact else {"rtol": 1e-4, "atol": 1e-4}), **options)


@pytest.mark.parametrize("compute_dtype", ["float64", "float32"])
@pytest.mark.parametrize("lengths", [(5, 3), (600, 500), (4, 0)], ids=str)
def test_a_sink_of_infinity_has_all_the_weight(rng, lengths, compute_dtype):
    """The limit of large ones, also of rows that see no key."""
    q = rng.standard_normal((1, 2, lengths[0], 3))
    k, v = rng.standard_normal((2, 1, 2, lengths[1], 3))
    options = {"layout": "bhsd", "causal": True, "alignment": "bottom-right", "compute_dtype": compute_dtype}
    out, lse = cupyattn.attention(q, k, v, sinks=np.array([np.inf, 0.5]), return_lse=True, **options)
    expected = cupyattn.attention(q, k, v, sinks=np.array([0.5, 0.5]), return_lse=True, **options)
    assert (out[0, 0] == 0).all()
    assert (lse[0, 0] == np.inf).all()
    assert_same_bits(out[0, 1], expected[0][0, 1])
    assert_same_bits(lse[0, 1], expected[1][0, 1])
    assert_attention_is_its_definition(q, k, v, sinks=np.array([np.inf, 0.5]), **CUTS["causal"])


def test_a_sink_of_nan_is_seen_by_rows_that_see_a_key():
    x, mask = np.ones((1, 3, 1, 2)), np.array([[0, 0, 0], [1, 1, 1], [1, 1, 1]], bool)
    out, lse = cupyattn.attention(x, x, x, mask=mask, sinks=np.array([np.nan]), return_lse=True)
    assert_matches(out[0, :, 0, 0], [0.0, np.nan, np.nan])
    assert np.isnan(lse).all()


def test_a_sink_of_infinity_takes_the_gradients(rng):
    q, k, v, dout = rng.standard_normal((4, 1, 5, 2, 3))
    dlse = rng.standard_normal((1, 2, 5))
    found = cupyattn.attention_backward(dout, q, k, v, dlse=dlse, sinks=np.array([np.inf, 0.5]))
    other = cupyattn.attention_backward(dout, q, k, v, dlse=dlse, sinks=np.array([0.5, 0.5]))
    assert_matches(found.dsinks, [dlse[0, 0].sum(), other.dsinks[1]], rtol=1e-13)
    for name in ("dq", "dk", "dv"):
        assert (getattr(found, name)[:, :, 0] == 0).all()
        assert_same_bits(getattr(found, name)[:, :, 1], getattr(other, name)[:, :, 1])


def test_what_is_not_finite_is_seen_beside_a_sink_of_infinity():
    q = k = np.ones((1, 1, 2, 1))
    v = np.array([1.0, np.nan]).reshape(1, 1, 2, 1)
    options = {"sinks": np.array([np.inf]), "layout": "bhsd", "alignment": "top-left"}
    out = cupyattn.attention(q, k, v, causal=True, **options)
    assert_matches(out[0, 0, :, 0], [0.0, np.nan])


@pytest.mark.parametrize(
    "option", [{"softmax_scale": 1e39}, {"softmax_scale": -1e300}, {"softcap": 1e39}, {"softcap": 1e-46}]
)
def test_numbers_beyond_float32_are_themselves_in_float32_arithmetic(rng, option):
    """They would be inf or 0 there, and 0 * inf is nan."""
    q, k, v = rng.standard_normal((3, 1, 70, 2, 4)).astype(np.float32)
    q[:, :2], k[:, 3] = 0.0, 0.0
    found = cupyattn.attention(q, k, v, compute_dtype="float32", **option)
    expected = cupyattn.attention(*(x.astype(np.float64) for x in (q, k, v)), **option)
    assert_correctly_rounded(found, expected, "float32")


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_attention_is_its_definition_however_it_is_cut_into_blocks(rng, lengths, cut):
    q = rng.standard_normal((1, 2, lengths[0], 3))
    k, v = rng.standard_normal((2, 1, 1, lengths[1], 3))
    assert_attention_is_its_definition(q, k, v, **CUTS[cut])


@pytest.mark.parametrize(
    "shapes",
    [
        ((40, 1, 3, 4), (40, 1, 5, 4)),
        ((7, 8, 1, 4), (7, 2, 3000, 4)),
        ((1, 64, 2, 4), (1, 8, 70, 4)),
        ((300, 2, 1, 4), (1, 2, 9, 4)),
        ((2, 16, 70, 4), (2, 16, 33, 4)),
        ((1, 600, 1, 4), (1, 1, 40, 4)),
        ((3, 1030, 2, 4), (3, 1030, 2, 4)),
    ],
    ids=str,
)
def test_attention_is_its_definition_whatever_shares_a_tile(rng, shapes):
    q = rng.standard_normal(shapes[0])
    k, v = rng.standard_normal((2, *shapes[1]))
    assert_attention_is_its_definition(q, k, v)
    mask = rng.random((shapes[0][2], shapes[1][2])) < 0.7
    slopes = rng.random((shapes[0][0], shapes[0][1]))
    assert_attention_is_its_definition(q, k, v, mask=mask, alibi_slopes=slopes, alignment="top-left")


@pytest.mark.parametrize("rows", [1, 2, 7, flash.FEW_ROWS, flash.FEW_ROWS + 1])
@pytest.mark.parametrize("keys", [0, 1, flash.MANY_KEYS - 1, flash.MANY_KEYS, 3001])
def test_products_with_few_rows_are_products_however_many_keys(rng, rows, keys):
    q, k, v = (rng.standard_normal((2, 3, count, dim)) for count, dim in ((rows, 72), (keys, 72), (keys, 200)))
    tile = flash.Tile(q, 1, lambda: iter(()))
    scores = tile.times_keys(q, k)
    assert_matches(scores, q @ k.swapaxes(-1, -2), rtol=1e-12, atol=1e-12)
    assert scores[0, 0].flags.c_contiguous
    product = q @ k.swapaxes(-1, -2) @ v
    assert_matches(tile.times_values(scores, v), product, rtol=1e-12, atol=1e-9)
    out = np.empty_like(product)
    assert tile.times_values(scores, v, out) is out
    assert_matches(out, product, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("rows", [1, 7, flash.FEW_ROWS])
def test_small_steps_cover_the_keys_and_are_small(rows):
    steps = list(flash.small_steps(rows, 40_000, 128))
    assert np.array_equal(np.concatenate([np.arange(40_000)[step] for step in steps]), np.arange(40_000))
    assert len(steps) > 1
    assert all(rows * (step.stop - step.start) * 128 <= flash.SMALL_PRODUCT for step in steps)


@pytest.mark.parametrize("spread", [1e-3, 1.0, 7.0, 20.0, 1e3, 1e150])
@pytest.mark.parametrize("lengths", [(5, 300), (100, 300)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_its_definition_whether_or_not_scores_are_bounded(rng, spread, lengths, causal):
    """Around the limit up to which no maximum is taken, and far beyond it on both sides."""
    q = spread * rng.standard_normal((1, 2, lengths[0], 4))
    k, v = rng.standard_normal((2, 1, 2, lengths[1], 4))
    assert_attention_is_its_definition(q, k, v, causal=causal, alignment="bottom-right", rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"causal": True, "alignment": "bottom-right"}, {"softcap": 50.0}], ids=str)
def test_rows_of_tiny_and_of_enormous_scores_may_be_neighbours(rng, options):
    q = rng.standard_normal((1, 4, 100, 4)) * 10.0 ** rng.integers(-3, 6, (1, 4, 100, 1))
    k = rng.standard_normal((1, 2, 300, 4)) * 10.0 ** rng.integers(-2, 3, (1, 2, 300, 1))
    assert_attention_is_its_definition(q, k, rng.standard_normal(k.shape), **options, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("place", [0, 150, 299])
@pytest.mark.parametrize("seqlen_q", [5, 100])
def test_one_enormous_score_among_small_ones_wins_wherever_it_comes(rng, place, seqlen_q):
    q = np.abs(rng.standard_normal((1, 1, seqlen_q, 4))) + 0.1
    k, v = rng.standard_normal((2, 1, 1, 300, 4))
    k[:, :, place] = 1e5
    out = cupyattn.attention(q, k, v, layout="bhsd")
    assert_matches(out, np.broadcast_to(v[:, :, place : place + 1], out.shape))


def test_weights_far_below_one_are_not_lost(rng):
    """All scores are about -800: exp of them is zero, their softmax is not."""
    for seqlen_q in (3, 100):
        q, k = np.full((1, 1, seqlen_q, 4), 20.0), -20.0 + 0.01 * rng.standard_normal((1, 1, 300, 4))
        v = rng.standard_normal((1, 1, 300, 4))
        assert_attention_is_its_definition(q, k, v)


@pytest.mark.parametrize("lengths", [(1, 5000), (64, 64), (130, 1000), (700, 900)], ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": True, "alignment": "bottom-right"}, {"softcap": 5.0}], ids=str)
@pytest.mark.parametrize("spread", [1.0, 5.0])
def test_float32_arithmetic_stays_within_a_millionth_times_the_root_of_the_keys(rng, lengths, options, spread):
    q = (spread * rng.standard_normal((1, 2, lengths[0], 8))).astype(np.float32)
    k, v = rng.standard_normal((2, 1, 1, lengths[1], 8)).astype(np.float32)
    bound = 1e-6 * math.sqrt(lengths[1])
    exact = cupyattn.attention(q, k, v, layout="bhsd", **options, return_lse=True)
    found = cupyattn.attention(q, k, v, layout="bhsd", **options, compute_dtype="float32", return_lse=True)
    assert not np.array_equal(found[0], exact[0]), "float32 was not used"
    assert_matches(found[0], exact[0], atol=bound)
    assert_matches(found[1], exact[1], atol=1e-5 if spread == 1.0 else 1e-4)


@pytest.mark.parametrize("spread", [1.0, 30.0, 1e4])
def test_float32_arithmetic_meets_the_definition_on_every_path(rng, spread):
    for seqlen_q in (5, 100):
        q = (spread * rng.standard_normal((1, 2, seqlen_q, 4))).astype(np.float32)
        k, v = rng.standard_normal((2, 1, 2, 300, 4)).astype(np.float32)
        out = cupyattn.attention(q, k, v, layout="bhsd", compute_dtype="float32")
        expected = numpy_ref.attention(q, k, v, scale=0.5).out
        close = np.abs(out - expected) <= 1e-5 * max(1.0, spread)
        assert close.mean() > 0.995, "ties between enormous scores may fall either way; nothing else may"
        assert np.isfinite(out).all()
