"""The conventions, one test each: what every library of attention decides, and most decide differently.

Each test is named after its convention.  The reference is `numpy_ref.attention`, the dense definition,
or a closed form small enough to be seen through.
"""

import ml_dtypes
import numpy as np
import pytest
from oracle import assert_correctly_rounded, assert_matches, assert_same_bits, to_numpy

import cupyattn
from cupyattn import numpy_ref

torch = pytest.importorskip("torch")

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SEED = 5


def draw(rng, seqlen_q=4, seqlen_k=4, batch=2, num_heads=2, num_heads_kv=None, head_dim=8, scale=1.0):
    num_heads_kv = num_heads_kv or num_heads
    shapes = [(seqlen_q, num_heads), (seqlen_k, num_heads_kv), (seqlen_k, num_heads_kv)]
    return [scale * rng.standard_normal((batch, *shape, head_dim)) for shape in shapes]


def heads_first(*arrays):
    return [x.swapaxes(1, 2) for x in arrays]


def definition(q, k, v, **options):
    """`numpy_ref.attention` for (batch, seqlen, heads, head_dim), key heads repeated for their groups."""
    num_heads = q.shape[2]
    k, v = (np.repeat(x, num_heads // x.shape[2], axis=2) for x in (k, v))
    options.setdefault("scale", q.shape[-1] ** -0.5)
    state = numpy_ref.attention(*heads_first(q, k, v), **options)
    return state.out.swapaxes(1, 2), state.lse


def band(seqlen_q, seqlen_k, left=None, right=None, offset=0):
    i, j = np.ogrid[:seqlen_q, :seqlen_k]
    seen = np.ones((seqlen_q, seqlen_k), bool)
    if left is not None:
        seen &= j >= i + offset - left
    if right is not None:
        seen &= j <= i + offset + right
    return seen


def assert_is_attention(actual, q, k, v, **options):
    out, lse = definition(q, k, v, **options)
    assert_matches(actual[0], out, rtol=1e-11, atol=1e-13)
    assert_matches(actual[1], lse, rtol=1e-12, atol=1e-13)


# ---------------------------------------------------------------------------------------------------
# float8
# ---------------------------------------------------------------------------------------------------

FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)


def draw_float8(rng, *lengths, heads=(4, 2, 2), batch=2, head_dim=16):
    """(q, k, v) in float8, and descales that no two heads share."""
    seqlens = (lengths[0], lengths[1], lengths[1])
    operands = [
        rng.standard_normal((batch, length, count, head_dim)).astype(FLOAT8)
        for length, count in zip(seqlens, heads, strict=True)
    ]
    shapes = dict(zip(("q_descale", "k_descale", "v_descale"), (heads[1], *heads[1:]), strict=True))
    return operands, {name: rng.uniform(0.3, 3.0, (batch, n)).astype("f4") for name, n in shapes.items()}


def dequantised(operands, descales):
    """What float8 operands and full descales stand for, in float64."""
    found = []
    for array, factors in zip(operands, descales.values(), strict=True):
        by_head = np.repeat(factors.astype(np.float64), array.shape[2] // factors.shape[1], axis=1)
        found.append(array.astype(np.float64) * by_head[:, None, :, None])
    return found


FLOAT8_CALLS = {
    "plain": {},
    "causal": {"causal": True, "alignment": "bottom-right"},
    "window": {"window_size": (3, 1), "alignment": "top-left"},
    "scale": {"softmax_scale": 0.5},
    "softcap": {"softcap": 2.0},
    "alibi and sinks": {
        "alignment": "top-left",
        "alibi_slopes": np.float32([1, 0.5, 0.2, 0]),
        "sinks": np.float32([0, 1, 2, 3]),
    },
    "float16 bias": {"bias": np.linspace(-3, 3, 7, dtype=np.float16)},
    "mask": {"mask": np.arange(7) % 3 > 0},
    "dropout": {"dropout_p": 0.4, "dropout_seed": 8},
}


@pytest.mark.parametrize("name", FLOAT8_CALLS)
def test_float8_means_its_numbers_times_their_descales_and_gives_bfloat16(rng, name):
    operands, descales = draw_float8(rng, 5, 7)
    options = FLOAT8_CALLS[name]
    out, lse = cupyattn.attention(*operands, **descales, **options, return_lse=True)
    expected, expected_lse = cupyattn.attention(*dequantised(operands, descales), **options, return_lse=True)
    assert (out.dtype, lse.dtype) == (BFLOAT16, np.float32)
    assert_correctly_rounded(out, expected, "bfloat16")
    assert_correctly_rounded(lse, expected_lse, "float32")


@pytest.mark.parametrize("heads", [(4, 4, 4), (6, 2, 2), (6, 2, 3), (6, 3, 1), (5, 1, 5)], ids=str)
@pytest.mark.parametrize("lengths", [(3, 5), (150, 600)], ids=str)
def test_each_head_has_its_own_descale_and_that_of_q_goes_by_the_key_head(rng, heads, lengths):
    operands, descales = draw_float8(rng, *lengths, heads=heads)
    expected, expected_lse = definition(*dequantised(operands, descales))
    out, lse = cupyattn.attention(*operands, **descales, return_lse=True)
    assert_correctly_rounded(out, expected, "bfloat16")
    assert_correctly_rounded(lse, expected_lse, "float32")


def test_descales_broadcast_and_default_to_one(rng):
    operands, _ = draw_float8(rng, 5, 7)
    for factors in (np.array(2, np.float32), np.float32([2, 3]), np.float32([[2], [3]]), np.float32([[1]])):
        for name in ("q_descale", "k_descale", "v_descale"):
            whole = np.broadcast_to(factors, (2, 2))
            found = cupyattn.attention(*operands, **{name: factors})
            assert_same_bits(found, cupyattn.attention(*operands, **{name: whole}))
            assert np.array_equal(found, cupyattn.attention(*operands)) == (factors == 1).all()


def test_float8_in_heads_first_layout_is_the_same(rng):
    operands, descales = draw_float8(rng, 5, 7)
    expected = cupyattn.attention(*operands, **descales)
    turned = cupyattn.attention(*heads_first(*operands), **descales, layout="bhsd")
    assert_same_bits(turned.swapaxes(1, 2), expected)


def test_one_batch_of_float8_keys_has_a_descale_for_each_batch_of_queries(rng):
    (q, k, v), descales = draw_float8(rng, 5, 7)
    out = cupyattn.attention(q, k[:1], v[:1], **descales)
    assert_same_bits(out, cupyattn.attention(q, k[[0, 0]], v[[0, 0]], **descales))


def test_float8_in_float32_arithmetic_is_off_by_float32s_rounding_only(rng):
    operands, descales = draw_float8(rng, 30, 70)
    exact, exact_lse = cupyattn.attention(*operands, **descales, return_lse=True)
    found, lse = cupyattn.attention(*operands, **descales, compute_dtype="float32", return_lse=True)
    assert found.dtype == BFLOAT16
    assert_matches(found, exact, rtol=2.0**-7)
    assert (found != exact).mean() < 0.01
    assert_matches(lse, exact_lse, rtol=1e-5, atol=1e-5)


def test_a_hidden_float8_nan_changes_no_bit_and_a_seen_one_does(rng):
    (q, k, v), descales = draw_float8(rng, 7, 7)
    expected = cupyattn.attention(q, k, v, causal=True, **descales)
    k[:, -1], v[:, -1] = np.nan, np.nan
    found = cupyattn.attention(q, k, v, causal=True, **descales)
    assert_same_bits(found[:, :-1], expected[:, :-1])
    assert np.isnan(to_numpy(found[:, -1])).all()


# ---------------------------------------------------------------------------------------------------
# Rows that see nothing, and nothing to see
# ---------------------------------------------------------------------------------------------------


def without_row_one(seqlen_q, seqlen_k, value):
    array = np.zeros((seqlen_q, seqlen_k))
    array[1] = value
    return array


EMPTY_ROWS = {
    "causal": ({"causal": True, "alignment": "bottom-right"}, (7, 4), [0, 1, 2]),
    "window": ({"window_size": (1, 0), "alignment": "top-left"}, (7, 3), [4, 5, 6]),
    "mask": ({"mask": without_row_one(4, 4, 1.0) == 0}, (4, 4), [1]),
    "bias": ({"bias": without_row_one(4, 4, -np.inf)}, (4, 4), [1]),
    "many rows": ({"causal": True, "alignment": "bottom-right"}, (90, 30), list(range(60))),
    "many masked rows": ({"mask": without_row_one(90, 90, 1.0) == 0}, (90, 90), [1]),
}


@pytest.fixture(params=EMPTY_ROWS)
def empty_rows(request, rng):
    options, lengths, rows = EMPTY_ROWS[request.param]
    return draw(rng, *lengths), options, rows


def test_a_query_that_sees_no_key_gives_zero_and_minus_infinity(empty_rows):
    arrays, options, rows = empty_rows
    out, lse = cupyattn.attention(*arrays, **options, return_lse=True)
    assert_same_bits(out[:, rows], np.zeros_like(out[:, rows]))
    assert np.isneginf(lse[:, :, rows]).all()
    others = [i for i in range(out.shape[1]) if i not in rows]
    assert np.abs(out[:, others]).min() > 0
    assert np.isfinite(lse[:, :, others]).all()


def test_a_query_that_sees_no_key_has_gradients_of_exactly_zero_and_gives_none(empty_rows, rng):
    arrays, options, rows = empty_rows
    dout = rng.standard_normal(arrays[0].shape)
    dlse = rng.standard_normal((2, 2, dout.shape[1]))
    found = cupyattn.attention_backward(dout, *arrays, dlse=dlse, **options)
    assert not found.dq[:, rows].any()
    dout[:, rows] = 1e30
    dlse[:, :, rows] = -1e30
    again = cupyattn.attention_backward(dout, *arrays, dlse=dlse, **options)
    for name in ("dq", "dk", "dv", "dbias"):
        if getattr(found, name) is not None:
            assert np.isfinite(getattr(found, name)).all()
            assert_same_bits(getattr(again, name), getattr(found, name))


def test_a_query_that_sees_no_key_but_has_a_sink_gives_zero_and_the_sink(rng):
    q, k, v = draw(rng, 5, 3)
    sinks = np.array([0.7, -2.0])
    out, lse = cupyattn.attention(q, k, v, causal=True, alignment="bottom-right", sinks=sinks, return_lse=True)
    assert not out[:, :2].any()
    assert_matches(lse[:, :, :2], np.broadcast_to(sinks[:, None], (2, 2, 2)), rtol=1e-15)


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_no_keys_at_all_give_zero_and_minus_infinity(rng, layout):
    q, k, v = draw(rng, 4, 0)
    if layout == "bhsd":
        q, k, v = heads_first(q, k, v)
    out, lse = cupyattn.attention(q, k, v, layout=layout, return_lse=True)
    assert_same_bits(out, np.zeros(q.shape))
    assert_matches(lse, np.full((2, 2, 4), -np.inf))
    _, lse = cupyattn.attention(q, k, v, layout=layout, sinks=np.array([0.5, -1.0]), return_lse=True)
    assert_matches(lse, np.broadcast_to([[0.5], [-1.0]], (2, 2, 4)))


def test_no_keys_at_all_give_gradients_of_zero(rng):
    q, k, v = draw(rng, 4, 0)
    sinks = np.array([0.5, -1.0])
    dlse = rng.standard_normal((2, 2, 4))
    found = cupyattn.attention_backward(np.ones_like(q), q, k, v, sinks=sinks, dlse=dlse)
    assert_same_bits(found.dq, np.zeros_like(q))
    assert found.dk.shape == found.dv.shape == k.shape
    assert_matches(found.dsinks, dlse.sum(axis=(0, 2)), rtol=1e-14)


def test_no_queries_give_an_empty_result_and_gradients_of_zero(rng):
    q, k, v = draw(rng, 0, 4)
    out, lse = cupyattn.attention(q, k, v, return_lse=True)
    assert out.shape == (2, 0, 2, 8)
    assert lse.shape == (2, 2, 0)
    found = cupyattn.attention_backward(np.ones_like(q), q, k, v)
    assert found.dq.shape == q.shape
    assert_same_bits(found.dk, np.zeros_like(k))
    assert_same_bits(found.dv, np.zeros_like(v))


def test_merging_two_states_that_saw_nothing_gives_nothing_and_no_nan():
    out, lse = np.full((1, 2, 3, 4), np.nan), np.full((1, 3, 2), -np.inf)
    merged, merged_lse = cupyattn.merge_states([out, out], [lse, lse])
    assert_same_bits(merged, np.zeros_like(out))
    assert_same_bits(merged_lse, lse)


# ---------------------------------------------------------------------------------------------------
# The log-sum-exp
# ---------------------------------------------------------------------------------------------------


def test_lse_is_the_natural_logarithm_of_the_denominator(rng):
    q, k, v = draw(rng)
    scores = np.einsum("bihd,bjhd->bhij", q, k) * 8**-0.5
    _, lse = cupyattn.attention(q, k, v, return_lse=True)
    assert_matches(lse, np.log(np.exp(scores).sum(axis=-1)), rtol=1e-13)


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_lse_is_batch_heads_rows_whatever_the_layout(rng, layout):
    q, k, v = draw(rng, 5, 5, batch=3, num_heads=2)
    given = (q, k, v) if layout == "bshd" else heads_first(q, k, v)
    _, lse = cupyattn.attention(*given, layout=layout, return_lse=True)
    assert_matches(lse, definition(q, k, v)[1], rtol=1e-13)
    assert lse.shape == (3, 2, 5)


def test_lse_of_packed_sequences_is_heads_tokens(rng):
    q, k, v = (x.reshape(12, 2, 8) for x in draw(rng, 6, 6))
    starts = np.array([0, 4, 12], np.int32)
    _, lse = cupyattn.flash_attn_varlen_func(q, k, v, starts, starts, 8, 8, return_lse=True)
    assert lse.shape == (2, 12)
    for start, stop in ((0, 4), (4, 12)):
        part = [x[None, start:stop] for x in (q, k, v)]
        assert_matches(lse[:, start:stop], definition(*part)[1][0], rtol=1e-13)


@pytest.mark.parametrize(
    ("dtype", "lse_dtype"),
    [(np.float16, np.float32), (BFLOAT16, np.float32), (np.float32, np.float32), (np.float64, np.float64)],
)
def test_lse_is_float32_or_float64_for_float64_and_out_has_the_dtype_of_q(rng, dtype, lse_dtype):
    out, lse = cupyattn.attention(*(x.astype(dtype) for x in draw(rng)), return_lse=True)
    assert out.dtype == dtype
    assert lse.dtype == lse_dtype


def test_lse_is_that_of_the_scores_with_alibi_and_bias(rng):
    """flash-attn 2 shifts a causal row's scores under ALiBi by a constant, and its lse with them."""
    q, k, v = draw(rng, 3, 5)
    slopes = np.array([0.5, 2.0])
    biased = -slopes[:, None, None] * np.abs(np.arange(3)[:, None] + 2 - np.arange(5))
    found = cupyattn.flash_attn_func(q, k, v, causal=True, alibi_slopes=slopes, return_lse=True)
    assert_is_attention(found, q, k, v, bias=biased, visible=band(3, 5, right=0, offset=2))


# ---------------------------------------------------------------------------------------------------
# Who sees what
# ---------------------------------------------------------------------------------------------------


def seen_keys(call, seqlen_q, seqlen_k):
    """Which keys each query sees: values are unit vectors, scores are equal."""
    q = np.zeros((1, seqlen_q, 1, seqlen_k))
    k = np.zeros((1, seqlen_k, 1, seqlen_k))
    v = np.eye(seqlen_k)[None, :, None, :]
    return call(q, k, v)[0, :, 0] > 0


@pytest.mark.parametrize("lengths", [(2, 5), (5, 2), (3, 3), (70, 90)], ids=str)
def test_torchs_function_aligns_causal_top_left(lengths):
    seen = seen_keys(
        lambda q, k, v: cupyattn.scaled_dot_product_attention(*heads_first(q, k, v), is_causal=True).swapaxes(1, 2),
        *lengths,
    )
    assert_matches(seen, band(*lengths, right=0))


@pytest.mark.parametrize("lengths", [(2, 5), (5, 2), (3, 3), (70, 90)], ids=str)
def test_flash_attns_functions_align_causal_bottom_right(lengths):
    expected = band(*lengths, right=0, offset=lengths[1] - lengths[0])
    assert_matches(seen_keys(lambda *x: cupyattn.flash_attn_func(*x, causal=True), *lengths), expected)
    packed = seen_keys(lambda q, k, v: cupyattn.flash_attn_kvpacked_func(q, np.stack([k, v], 2), causal=True), *lengths)
    assert_matches(packed, expected)

    def varlen(q, k, v):
        starts = [np.array([0, x.shape[1], x.shape[1]], np.int32) for x in (q, k)]
        return cupyattn.flash_attn_varlen_func(q[0], k[0], v[0], *starts, *lengths, causal=True)[None]

    assert_matches(seen_keys(varlen, *lengths), expected)


def test_each_packed_sequence_is_aligned_by_its_own_lengths():
    v = np.eye(9)[:, None, :]
    q, k = np.zeros((5, 1, 9)), np.zeros((9, 1, 9))
    starts = np.array([0, 2, 5], np.int32), np.array([0, 5, 9], np.int32)
    seen = cupyattn.flash_attn_varlen_func(q, k, v, *starts, 3, 5, causal=True)[:, 0] > 0
    expected = np.zeros((5, 9), bool)
    expected[:2, :5] = band(2, 5, right=0, offset=3)
    expected[2:, 5:] = band(3, 4, right=0, offset=1)
    assert_matches(seen, expected)


@pytest.mark.parametrize(("alignment", "offset"), [("top-left", 0), ("bottom-right", 3)])
def test_our_own_function_aligns_as_it_is_told(alignment, offset):
    seen = seen_keys(lambda *x: cupyattn.attention(*x, causal=True, alignment=alignment), 2, 5)
    assert_matches(seen, band(2, 5, right=0, offset=offset))


@pytest.mark.parametrize(
    "options", [{"causal": True}, {"window_size": (1, None)}, {"alibi_slopes": np.ones(2)}], ids=lambda x: next(iter(x))
)
def test_our_own_function_wants_to_be_told_where_lengths_differ(rng, options):
    with pytest.raises(ValueError, match="alignment has to be chosen"):
        cupyattn.attention(*draw(rng, 3, 5), **options)
    cupyattn.attention(*draw(rng, 4, 4), **options)


@pytest.mark.parametrize("alignment", ["top-left", "bottom-right"])
@pytest.mark.parametrize("lengths", [(3, 7), (7, 3), (80, 90)], ids=str)
@pytest.mark.parametrize("window", [(0, 0), (2, 0), (0, 2), (1, 2), (None, 1), (1, None), (100, 100)], ids=str)
def test_a_window_includes_both_its_ends_and_follows_the_alignment(window, lengths, alignment):
    seen = seen_keys(lambda *x: cupyattn.attention(*x, window_size=window, alignment=alignment), *lengths)
    offset = lengths[1] - lengths[0] if alignment == "bottom-right" else 0
    assert_matches(seen, band(*lengths, *window, offset=offset))


def test_minus_one_and_none_both_mean_an_unlimited_window():
    for window in ((-1, 1), (1, -1), (-1, -1)):
        seen = [
            seen_keys(lambda *x, w=w: cupyattn.flash_attn_func(*x, window_size=w), 4, 6)
            for w in (window, tuple(None if side == -1 else side for side in window))
        ]
        assert_matches(seen[0], seen[1])
    assert seen[0].all()


def test_a_window_of_w_minus_one_to_the_left_is_huggingfaces_sliding_window_of_w():
    seen = seen_keys(lambda *x: cupyattn.flash_attn_func(*x, window_size=(3 - 1, 0)), 8, 8)
    i, j = np.ogrid[:8, :8]
    assert_matches(seen, (j > i - 3) & (j <= i))


def test_causal_replaces_the_windows_right_side_by_zero():
    seen = seen_keys(lambda *x: cupyattn.flash_attn_func(*x, causal=True, window_size=(2, 5)), 6, 6)
    assert_matches(seen, band(6, 6, left=2, right=0))


def test_one_query_sees_all_keys_whether_causal_or_not(rng):
    q, k, v = draw(rng, 1, 9)
    assert_same_bits(cupyattn.flash_attn_func(q, k, v, causal=True), cupyattn.flash_attn_func(q, k, v))


def test_true_in_a_mask_means_seen_and_it_joins_causal_and_window(rng):
    mask = rng.random((6, 6)) < 0.6
    seen = seen_keys(lambda *x: cupyattn.attention(*x, mask=mask, causal=True, window_size=(3, 2)), 6, 6)
    assert_matches(seen, mask & band(6, 6, left=3, right=0))


@pytest.mark.parametrize("shape", [(6,), (6, 1), (4, 1, 6), (2, 1, 1, 1), (1, 4, 6, 1), (2, 4, 6, 6)], ids=str)
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_masks_and_biases_broadcast_to_batch_heads_rows_keys_in_either_layout(rng, shape, layout):
    q, k, v = draw(rng, 6, 6, num_heads=4, num_heads_kv=2)
    mask, bias = rng.random(shape) < 0.7, rng.standard_normal(shape)
    given = (q, k, v) if layout == "bshd" else heads_first(q, k, v)
    out, lse = cupyattn.attention(*given, layout=layout, mask=mask, bias=bias, return_lse=True)
    out = out if layout == "bshd" else out.swapaxes(1, 2)
    assert_is_attention((out, lse), q, k, v, visible=mask, bias=bias)


@pytest.mark.parametrize("counts", [(6, 1, 1), (6, 2, 2), (6, 3, 3), (6, 2, 6), (6, 3, 2), (6, 1, 3)], ids=str)
def test_query_head_h_uses_key_head_h_divided_by_the_group(rng, counts):
    num_heads, num_heads_k, num_heads_v = counts
    q, k, _ = draw(rng, 3, 5, num_heads=num_heads, num_heads_kv=num_heads_k)
    _, _, v = draw(rng, 3, 5, num_heads=num_heads, num_heads_kv=num_heads_v)
    out = cupyattn.attention(q, k, v)
    for head in range(num_heads):
        k_head, v_head = head // (num_heads // num_heads_k), head // (num_heads // num_heads_v)
        alone = q[:, :, head : head + 1], k[:, :, k_head : k_head + 1], v[:, :, v_head : v_head + 1]
        assert_matches(out[:, :, head : head + 1], definition(*alone)[0], rtol=1e-12, atol=1e-14)


def test_a_batch_of_one_of_keys_serves_all_of_the_queries(rng):
    q, k, v = draw(rng, 3, 5, batch=4)
    out = cupyattn.attention(q, k[:1], v[:1])
    repeated = [np.ascontiguousarray(np.broadcast_to(x[:1], x.shape)) for x in (k, v)]
    assert_matches(out, definition(q, *repeated)[0], rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------------------------------------------
# What happens to a score, in which order
# ---------------------------------------------------------------------------------------------------


def test_the_default_scale_is_one_over_the_root_of_head_dim(rng):
    q, k, v = draw(rng, head_dim=9)
    found = cupyattn.attention(q, k, v, return_lse=True)
    assert_is_attention(found, q, k, v, scale=1 / 3)


def test_a_scale_of_zero_gives_the_mean_of_the_visible_values(rng):
    q, k, v = draw(rng)
    out = cupyattn.attention(q, k, v, softmax_scale=0.0)
    assert_matches(out, np.broadcast_to(v.mean(axis=1, keepdims=True), out.shape), rtol=1e-13, atol=1e-15)


def test_a_negative_scale_prefers_the_keys_that_a_positive_one_avoids(rng):
    q, k, v = draw(rng, 5, 5)
    found = cupyattn.attention(q, k, v, softmax_scale=-3.0, causal=True, return_lse=True)
    assert_is_attention(found, q, k, v, scale=-3.0, visible=band(5, 5, right=0))
    assert_matches(found[0], cupyattn.attention(-q, k, v, softmax_scale=3.0, causal=True), rtol=1e-12, atol=1e-14)


EDITS = {
    "scale then softcap": {"softmax_scale": 3.0, "softcap": 0.7},
    "negative scale then softcap": {"softmax_scale": -3.0, "softcap": 0.7, "alibi_slopes": np.array([0.5, 3.0])},
    "softcap then alibi": {"softcap": 0.7, "alibi_slopes": np.array([0.5, 3.0])},
    "softcap then bias": {"softcap": 0.7, "bias": np.linspace(-4.0, 4.0, 25).reshape(5, 5)},
    "bias then mask": {"bias": np.full((5, 5), 1e6), "mask": np.eye(5, dtype=bool)},
    "all": {
        "softmax_scale": 3.0,
        "softcap": 2.0,
        "alibi_slopes": np.array([[0.5, 3.0], [0.1, 1.0]]),
        "bias": np.linspace(-4.0, 4.0, 25).reshape(5, 5),
        "mask": np.tri(5, dtype=bool),
    },
}


@pytest.mark.parametrize("name", EDITS)
def test_scores_are_scaled_capped_lowered_by_alibi_biased_and_masked_in_that_order(rng, name):
    options = EDITS[name]
    q, k, v = draw(rng, 5, 5)
    scores = np.einsum("bihd,bjhd->bhij", q, k) * options.get("softmax_scale", 8**-0.5)
    if "softcap" in options:
        scores = options["softcap"] * np.tanh(scores / options["softcap"])
    slopes = options.get("alibi_slopes", np.zeros(2))
    scores = scores - slopes[..., None, None] * np.abs(np.arange(5)[:, None] - np.arange(5))
    scores = scores + options.get("bias", 0.0)
    scores = np.where(options.get("mask", True), scores, -np.inf)
    highest = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - highest)
    out, lse = cupyattn.attention(q, k, v, **options, return_lse=True)
    expected = np.einsum("bhij,bjhd->bihd", weights / weights.sum(axis=-1, keepdims=True), v)
    assert_matches(out, expected, rtol=1e-11, atol=1e-13)
    assert_matches(lse, highest[..., 0] + np.log(weights.sum(axis=-1)), rtol=1e-12)


def test_alibi_counts_from_the_diagonal_of_the_alignment(rng):
    q, k, v = draw(rng, 3, 5)
    slopes = np.array([0.5, 3.0])
    for alignment, offset in (("top-left", 0), ("bottom-right", 2)):
        bias = -slopes[:, None, None] * np.abs(np.arange(3)[:, None] + offset - np.arange(5))
        found = cupyattn.attention(q, k, v, alibi_slopes=slopes, alignment=alignment, return_lse=True)
        assert_is_attention(found, q, k, v, bias=bias)


@pytest.mark.parametrize("lengths", [(3, 5), (90, 70)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_an_infinite_alibi_slope_leaves_the_key_on_the_diagonal_if_it_is_seen(rng, lengths, causal):
    q, k, v = draw(rng, *lengths, num_heads=4, num_heads_kv=2)
    slopes = np.array([[np.inf, 0.5, 0.0, np.inf], [2.0, np.inf, 1.0, 0.0]])
    mask = rng.random(lengths) < 0.7
    i, j = np.ogrid[: lengths[0], : lengths[1]]
    distance = np.abs(i + lengths[1] - lengths[0] - j)
    endless = np.isinf(slopes)[..., None, None]
    visible = mask & np.where(endless, distance == 0, True) & (j <= i + lengths[1] - lengths[0] if causal else True)
    bias = np.where(endless, 0.0, -np.nan_to_num(slopes, posinf=0.0)[..., None, None] * distance)
    options = {"causal": causal, "mask": mask, "alibi_slopes": slopes, "alignment": "bottom-right"}
    found = cupyattn.attention(q, k, v, return_lse=True, **options)
    assert_is_attention(found, q, k, v, visible=visible, bias=bias)
    dout = rng.standard_normal(q.shape)
    gradients = cupyattn.attention_backward(dout, q, k, v, **options)
    bias, visible = (np.broadcast_to(x, (2, 4, *lengths)) for x in (bias, visible))
    expected = cupyattn.attention_backward(dout, q, k, v, mask=visible, bias=bias)
    for name in ("dq", "dk", "dv"):
        assert_matches(getattr(gradients, name), getattr(expected, name), rtol=1e-11, atol=1e-12)
    assert_matches(gradients.dalibi_slopes, -np.sum(expected.dbias * distance, axis=(-2, -1)), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("lengths", [(4, 4), (80, 70)], ids=str)
def test_a_sink_joins_the_denominator_only_and_lse_includes_it(rng, lengths):
    q, k, v = draw(rng, *lengths)
    sinks = np.array([1.5, -0.5])
    plain_out, plain_lse = cupyattn.attention(q, k, v, return_lse=True)
    out, lse = cupyattn.attention(q, k, v, sinks=sinks, return_lse=True)
    exp_lse, exp_sink = np.exp(plain_lse), np.exp(sinks)[:, None]
    share = (exp_lse / (exp_lse + exp_sink)).swapaxes(1, 2)[..., None]
    assert_matches(out, plain_out * share, rtol=1e-12, atol=1e-14)
    assert_matches(lse, np.log(exp_lse + exp_sink), rtol=1e-13)


def test_a_sink_of_minus_infinity_is_no_sink(rng):
    q, k, v = draw(rng)
    found = cupyattn.attention(q, k, v, sinks=np.full(2, -np.inf), return_lse=True)
    assert_is_attention(found, q, k, v)


# ---------------------------------------------------------------------------------------------------
# Dropout
# ---------------------------------------------------------------------------------------------------


def keep_mask(p, seed, batch, num_heads, seqlen_q, seqlen_k):
    b, h, i = np.ogrid[:batch, :num_heads, :seqlen_q]
    return numpy_ref.dropout_keep(p, seed, b, h, i, range(seqlen_k))


@pytest.mark.parametrize(
    ("words", "key", "expected"),
    [
        ([0, 0, 0, 0], 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0_A4093822,
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_known_answers_of_random123(words, key, expected):
    assert [int(word) for word in numpy_ref.philox(tuple(np.array(words, np.uint64)), key)] == expected


def test_dropout_counts_by_key_row_head_and_batch_and_four_keys_of_sixteen_share_a_counter():
    """The same bits on every device: this is the contract that a kernel has to meet."""
    batch, head, row, seed, p = 3, 5, 70, 2**40 + 9, 0.37
    keep = numpy_ref.dropout_keep(p, seed, np.array(batch), np.array(head), np.array(row), range(40))
    for key in range(40):
        counter = key // 16 * 4 + key % 8 // 2, row, head, batch
        words = numpy_ref.philox(tuple(np.array(word, np.uint64) for word in counter), seed)
        assert keep[key] == (int(words[key % 2 + key % 16 // 8 * 2]) >= p * 2**32)


@pytest.mark.parametrize("lengths", [(5, 7), (90, 40), (2, 600), (1100, 700)], ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"sinks": np.array([0.3, 1.0])}], ids=str)
def test_dropout_comes_after_the_normalisation_and_leaves_lse_alone(rng, lengths, options):
    q, k, v = draw(rng, *lengths)
    options = {**options, "alignment": "top-left"}
    visible = band(*lengths, right=0) if "causal" in options else True
    sinks = options["sinks"][:, None] if "sinks" in options else None
    found = cupyattn.attention(q, k, v, **options, dropout_p=0.3, dropout_seed=SEED, return_lse=True)
    keep = keep_mask(0.3, SEED, 2, 2, *lengths)
    assert_is_attention(found, q, k, v, visible=visible, sinks=sinks, keep=keep, dropout_p=0.3)
    _, lse = cupyattn.attention(q, k, v, **options, return_lse=True)
    assert_matches(found[1], lse, rtol=1e-14)


def test_what_dropout_keeps_grows_by_the_exact_reciprocal(rng):
    q, k, v = draw(rng, 6, 6)
    _, _, signed = cupyattn.flash_attn_func(q, k, v, 0.25, dropout_seed=SEED, return_attn_probs=True)
    out = cupyattn.flash_attn_func(q, k, v, 0.25, dropout_seed=SEED)
    kept = np.maximum(signed, 0.0) / 0.75
    assert_matches(out, np.einsum("bhij,bjhd->bihd", kept, v), rtol=1e-12, atol=1e-14)


def test_dropout_of_one_gives_zeros_and_dropout_of_zero_changes_nothing(rng):
    q, k, v = draw(rng)
    plain, lse = cupyattn.attention(q, k, v, return_lse=True)
    out, same_lse = cupyattn.attention(q, k, v, dropout_p=1.0, return_lse=True)
    assert not out.any()
    assert_matches(same_lse, lse, rtol=1e-14)
    assert_same_bits(cupyattn.attention(q, k, v, dropout_p=0.0, dropout_seed=3), plain)


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9, 0.9999])
def test_dropout_drops_the_fraction_it_was_asked_to(p):
    """Also fractions that flash-attn's 8 bits cannot express."""
    keep = keep_mask(p, 2**63 + 12345, 4, 4, 250, 250)
    deviation = (1 - keep.mean() - p) / np.sqrt(p * (1 - p) / keep.size)
    assert abs(deviation) < 4
    for axis in range(4):  # and not all in one place
        others = tuple(i for i in range(4) if i != axis)
        spread = (1 - keep.mean(axis=others) - p) / np.sqrt(p * (1 - p) * keep.shape[axis] / keep.size)
        assert np.abs(spread).max() < 5


def test_dropouts_neighbours_are_independent():
    keep = keep_mask(0.5, 77, 2, 2, 256, 256) * 2.0 - 1.0
    for shifted in (keep[1:] * keep[:-1], keep[:, 1:] * keep[:, :-1], keep[:, :, 1:] * keep[:, :, :-1]):
        assert abs(shifted.mean()) < 5 / np.sqrt(shifted.size)
    for distance in (1, 2, 4, 8, 16):
        pairs = keep[..., distance:] * keep[..., :-distance]
        assert abs(pairs.mean()) < 5 / np.sqrt(pairs.size)


def test_all_64_bits_of_the_seed_count():
    keeps = [keep_mask(0.5, seed, 1, 1, 8, 64) for seed in (0, 1, 2**31, 2**32, 2**63, 2**64 - 1)]
    for i, one in enumerate(keeps):
        for other in keeps[:i]:
            assert 0.3 < (one == other).mean() < 0.7


def test_dropouts_bits_depend_on_batch_head_row_and_key_alone_not_on_the_block_of_keys():
    whole = keep_mask(0.5, SEED, 2, 3, 5, 100)
    for start, stop in ((0, 1), (7, 8), (13, 45), (16, 32), (99, 100), (31, 33)):
        b, h, i = np.ogrid[:2, :3, :5]
        assert_matches(numpy_ref.dropout_keep(0.5, SEED, b, h, i, range(start, stop)), whole[..., start:stop])


def test_dropout_of_a_sequence_does_not_change_when_the_batch_heads_rows_or_keys_grow(rng):
    q, k, v = draw(rng, 70, 70, batch=3, num_heads=3)
    options = {"causal": True, "alignment": "top-left", "dropout_p": 0.5, "dropout_seed": SEED}
    whole = cupyattn.attention(q, k, v, **options)
    for smaller in (np.s_[:1], np.s_[:2], np.s_[:, :40], np.s_[:, :, :2]):
        part = cupyattn.attention(q[smaller], k[smaller], v[smaller], **options)
        assert_matches(part, whole[smaller], rtol=1e-12, atol=1e-14)
    prefix = cupyattn.attention(q[:, :5], k, v, **options)
    assert_matches(prefix, whole[:, :5], rtol=1e-12, atol=1e-14)


def test_dropout_is_the_same_in_every_layout_and_packing(rng):
    q, k, v = draw(rng, 6, 6, batch=3, num_heads=4, num_heads_kv=2)
    options = {"dropout_p": 0.5, "dropout_seed": SEED}
    expected = cupyattn.attention(q, k, v, **options)
    keep = keep_mask(0.5, SEED, 3, 4, 6, 6)
    assert_matches(expected, definition(q, k, v, keep=keep, dropout_p=0.5)[0], rtol=1e-12, atol=1e-14)
    starts = np.array([0, 6, 12, 18], np.int32)
    pages = [x.reshape(9, 2, 2, 8) for x in (k, v)]
    table = np.arange(9, dtype=np.int32).reshape(3, 3)
    packed = [x.reshape(18, -1, 8) for x in (q, k, v)]
    heads = heads_first(q, k, v)
    others = {
        "bhsd": cupyattn.attention(*heads, layout="bhsd", **options).swapaxes(1, 2),
        "torch's": cupyattn.scaled_dot_product_attention(*heads, enable_gqa=True, **options).swapaxes(1, 2),
        "flash-attn's": cupyattn.flash_attn_func(q, k, v, **options),
        "kv packed": cupyattn.flash_attn_kvpacked_func(q, np.stack([k, v], 2), **options),
        "varlen": cupyattn.flash_attn_varlen_func(*packed, starts, starts, 6, 6, **options),
        "pages": cupyattn.flash_attn_varlen_func(packed[0], *pages, starts, starts, 6, 6, block_table=table, **options),
        "torch": cupyattn.attention(*(torch.from_numpy(x) for x in (q, k, v)), **options),
    }
    for name, other in others.items():
        assert_matches(np.reshape(to_numpy(other), q.shape), expected, rtol=1e-12, atol=1e-14), name


def test_a_seed_decides_and_no_seed_is_fresh_entropy(rng):
    q, k, v = draw(rng, 16, 16)
    same = [cupyattn.attention(q, k, v, dropout_p=0.5, dropout_seed=SEED) for _ in range(2)]
    assert_same_bits(*same)
    fresh = [cupyattn.attention(q, k, v, dropout_p=0.5) for _ in range(2)]
    assert not np.array_equal(*fresh)


# ---------------------------------------------------------------------------------------------------
# What is not seen does not matter
# ---------------------------------------------------------------------------------------------------


def hiding_the_last_two_keys(how, seqlen):
    """Options of `attention` under which no query sees the last two of `seqlen` keys."""
    keys = np.arange(seqlen) < seqlen - 2
    bias = np.where(keys, 0.25, -np.inf)
    return {
        "causal": {"causal": True, "alignment": "top-left"},
        "window": {"window_size": (None, 2), "alignment": "top-left"},
        "mask": {"mask": keys},
        "mask of pairs": {"mask": np.broadcast_to(keys, (seqlen - 2, seqlen)).copy()},
        "bias": {"bias": bias},
        "mask and bias": {"mask": keys, "bias": np.where(keys, 0.25, np.nan)},
        "softcap": {"mask": keys, "softcap": 1.5},
        "alibi": {"mask": keys, "alibi_slopes": np.array([0.1, 1.0]), "alignment": "bottom-right"},
        "sinks": {"mask": keys, "sinks": np.array([0.1, 1.0])},
        "dropout": {"mask": keys, "dropout_p": 0.5, "dropout_seed": SEED},
    }[how], (seqlen - 4 if how == "window" else seqlen - 2)


POISONS = {
    "nan in k and v": (np.nan, np.nan),
    "nan in k": (np.nan, None),
    "nan in v": (None, np.nan),
    "infinity": (np.inf, -np.inf),
    "infinity in k": (-np.inf, None),
    "huge": (1e200, -1e200),
}


HIDINGS = ("causal", "window", "mask", "mask of pairs", "bias", "mask and bias", "softcap", "alibi", "sinks", "dropout")
FEW, MANY, LARGE_SCORES, SEVERAL_BLOCKS = (12, 1.0), (100, 1.0), (100, 40.0), (700, 1.0)


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize(
    ("how", "size"),
    [
        *((how, size) for how in HIDINGS for size in (FEW, MANY, LARGE_SCORES)),
        ("causal", SEVERAL_BLOCKS),
        ("mask", SEVERAL_BLOCKS),
    ],
)
def test_what_hidden_keys_hold_changes_no_bit_of_the_results_or_the_gradients(rng, how, poison, size):
    seqlen_k, scale = size
    options, seqlen_q = hiding_the_last_two_keys(how, seqlen_k)
    q, k, v = draw(rng, seqlen_q, seqlen_k, batch=1, scale=scale)
    dout = rng.standard_normal(q.shape)
    dlse = rng.standard_normal((1, 2, seqlen_q))
    poisoned = [x.copy() for x in (k, v)]
    for array, value in zip(poisoned, POISONS[poison], strict=True):
        if value is not None:
            array[:, -2:] = value
    clean = cupyattn.attention(q, k, v, **options, return_lse=True)
    results = cupyattn.attention(q, *poisoned, **options, return_lse=True)
    assert np.isfinite(clean[0]).all()
    for name, ours, expected in zip(("out", "lse"), results, clean, strict=True):
        assert np.isfinite(ours).all(), name
        assert_same_bits(ours, expected)
    clean = cupyattn.attention_backward(dout, q, k, v, dlse=dlse, **options)
    gradients = cupyattn.attention_backward(dout, q, *poisoned, dlse=dlse, **options)
    for name, ours, expected in zip(clean._fields, gradients, clean, strict=True):
        if expected is not None:
            assert np.isfinite(ours).all(), name
            assert_same_bits(ours, expected)
    assert not gradients.dk[:, -2:].any()
    assert not gradients.dv[:, -2:].any()


@pytest.mark.parametrize("poison", ["nan in k and v", "nan in v", "infinity in k", "huge"])
@pytest.mark.parametrize("size", [FEW, MANY, LARGE_SCORES, SEVERAL_BLOCKS], ids=str)
@pytest.mark.parametrize(
    ("how", "key"), [("causal", -1), ("causal", 5), ("window", 3), ("window", -1), ("pairs", 4), ("bias", 4)], ids=str
)
def test_a_row_that_does_not_see_a_key_keeps_its_bits_beside_rows_that_do(rng, how, key, size, poison):
    seqlen, scale = size
    pairs = rng.random((seqlen, seqlen)) < 0.5
    options, seen = {
        "causal": ({"causal": True}, band(seqlen, seqlen, right=0)),
        "window": ({"window_size": (3, 2)}, band(seqlen, seqlen, 3, 2)),
        "pairs": ({"mask": pairs}, pairs),
        "bias": ({"bias": np.where(pairs, 0.5, -np.inf)}, pairs),
    }[how]
    q, k, v = draw(rng, seqlen, seqlen, batch=1, scale=scale)
    rows = ~seen[:, key]
    dout = np.where(rows[:, None, None], rng.standard_normal(q.shape), 0.0)
    poisoned = [x.copy() for x in (k, v)]
    for array, value in zip(poisoned, POISONS[poison], strict=True):
        if value is not None:
            array[:, key] = value
    clean = cupyattn.attention(q, k, v, **options, return_lse=True)
    results = cupyattn.attention(q, *poisoned, **options, return_lse=True)
    assert_same_bits(results[0][:, rows], clean[0][:, rows])
    assert_same_bits(results[1][..., rows], clean[1][..., rows])
    clean = cupyattn.attention_backward(dout, q, k, v, **options)
    gradients = cupyattn.attention_backward(dout, q, *poisoned, **options)
    assert_same_bits(gradients.dq[:, rows], clean.dq[:, rows])


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16, np.float32])
def test_what_hidden_keys_hold_changes_no_bit_in_low_precision(rng, dtype):
    q, k, v = (x.astype(dtype) for x in draw(rng, 100, 110))
    mask = np.arange(110) % 3 > 0
    poisoned = [np.where(mask[:, None, None], x, np.array(np.nan, dtype)) for x in (k, v)]
    assert_same_bits(cupyattn.attention(q, *poisoned, mask=mask), cupyattn.attention(q, k, v, mask=mask))


def test_what_one_sequence_holds_does_not_reach_another(rng):
    q, k, v = draw(rng, 80, 80, batch=3)
    clean = cupyattn.attention(q, k, v)
    for array in (q, k, v):
        array[1] = np.nan
    out = cupyattn.attention(q, k, v)
    assert_matches(out[[0, 2]], clean[[0, 2]], rtol=1e-13, atol=1e-14)
    assert np.isnan(out[1]).all()


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_pages_and_slots_that_are_not_used_change_no_bit_of_the_gradients(rng, page_size):
    length = 7
    used = -(-length // page_size)
    pages = rng.standard_normal((2, used + 2, page_size, 2, 8))
    table = np.arange(used, dtype=np.int32)[None] + 1
    q = rng.standard_normal((5, 2, 8))
    starts = np.array([0, 5], np.int32), np.array([0, length], np.int32)

    def everything():
        tensors = [torch.from_numpy(x.copy()).requires_grad_() for x in (q, *pages)]
        indices = [torch.from_numpy(x) for x in starts]
        out = cupyattn.flash_attn_varlen_func(*tensors, *indices, 5, length, block_table=torch.from_numpy(table))
        out.square().sum().backward()
        return [out, *(x.grad for x in tensors)]

    clean = everything()
    pages[:, 0] = pages[:, -1] = np.nan
    pages[:, used].reshape(2, page_size, -1)[:, length - (used - 1) * page_size :] = np.nan
    for ours, expected in zip(everything(), clean, strict=True):
        assert_same_bits(ours, expected)


@pytest.mark.parametrize("lengths", [(6, 8), (80, 90)], ids=str)
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf, 1e200])
@pytest.mark.parametrize("place", ["q", "k", "v", "bias", "sinks"])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_nan_and_infinities_that_are_seen_come_out_where_the_definition_has_them(rng, place, special, softcap, lengths):
    q, k, v = draw(rng, *lengths, batch=1)
    bias, sinks = rng.standard_normal(lengths), rng.standard_normal(2)
    if place in ("bias", "sinks"):
        {"bias": bias, "sinks": sinks}[place].flat[0] = special
    else:
        {"q": q, "k": k, "v": v}[place][0, 3, 0, 1] = special
    options = {
        "softcap": softcap,
        "bias": bias if place == "bias" else None,
        "sinks": sinks if place == "sinks" else None,
    }
    mask = np.tri(*lengths, k=2, dtype=bool)
    found = cupyattn.attention(q, k, v, mask=mask, **options, return_lse=True)
    with np.errstate(all="ignore"):
        out, lse = definition(
            q,
            k,
            v,
            visible=mask,
            softcap=softcap,
            bias=0.0 if options["bias"] is None else bias,
            sinks=None if options["sinks"] is None else sinks[:, None],
        )
    assert_matches(found[0], out, rtol=1e-11, atol=1e-13)
    assert_matches(found[1], lse, rtol=1e-12, atol=1e-13)


# ---------------------------------------------------------------------------------------------------
# What is given is left alone
# ---------------------------------------------------------------------------------------------------


def test_read_only_arrays_are_taken_and_never_written_to(rng):
    q, k, v = draw(rng, 70, 70, num_heads=4, num_heads_kv=2)
    arrays = {
        "q": q,
        "k": k,
        "v": v,
        "mask": rng.random((70, 70)) < 0.8,
        "bias": rng.standard_normal((4, 70, 70)),
        "alibi_slopes": rng.random(4),
        "sinks": rng.standard_normal(4),
    }
    for array in arrays.values():
        array.flags.writeable = False
    before = {name: array.copy() for name, array in arrays.items()}
    options = {"softcap": 2.0, "causal": True, "dropout_p": 0.2, "dropout_seed": SEED}
    out, lse = cupyattn.attention(**arrays, **options, return_lse=True)
    dout, dlse = rng.standard_normal(out.shape), rng.standard_normal(lse.shape)
    for array in (out, lse, dout, dlse):
        array.flags.writeable = False
    kept = [array.copy() for array in (out, lse, dout, dlse)]
    cupyattn.attention_backward(dout, **arrays, out=out, lse=lse, dlse=dlse, **options)
    cupyattn.merge_states([out, out], [lse, lse])
    for name, array in arrays.items():
        assert_same_bits(array, before[name])
    for array, copy in zip((out, lse, dout, dlse), kept, strict=True):
        assert_same_bits(array, copy)


def test_the_result_is_the_callers_own_and_shares_no_memory_with_an_argument(rng):
    q, k, v = draw(rng, 1, 1, num_heads=1)
    out = cupyattn.attention(q, k, v)
    assert out.flags.writeable
    for array in (q, k, v):
        assert not np.shares_memory(out, array)
    (merged, lse), one_lse = cupyattn.merge_states([q], [np.zeros((2, 1, 1))]), np.zeros((2, 1, 1))
    assert not np.shares_memory(merged, q)
    assert not np.shares_memory(lse, one_lse)


def test_a_thousand_runs_would_give_the_same_bits(rng):
    q, k, v = draw(rng, 600, 600, num_heads=4, num_heads_kv=2)
    results = [cupyattn.attention(q, k, v, causal=True, return_lse=True) for _ in range(3)]
    for again in results[1:]:
        for ours, expected in zip(again, results[0], strict=True):
            assert_same_bits(ours, expected)


def test_gradients_are_the_same_in_every_run(rng):
    q, k, v = draw(rng, 300, 300, num_heads=4, num_heads_kv=2)
    bias, sinks, slopes = rng.standard_normal((1, 300)), rng.standard_normal(4), rng.random(4)
    options = {"bias": bias, "sinks": sinks, "alibi_slopes": slopes}
    dout = rng.standard_normal(q.shape)
    results = [cupyattn.attention_backward(dout, q, k, v, **options) for _ in range(4)]
    for again in results[1:]:
        for ours, expected in zip(again, results[0], strict=True):
            assert_same_bits(ours, expected)
