"""Gradients: torch's autograd through our functions against torch's autograd through a dense formula.

`dense` is that formula, written for nothing but being plain: float64, differentiable, one line per
convention.  Finite differences check both, and what torch does not have.
"""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_correctly_rounded, assert_matches, assert_same_bits

import cupyattn
from cupyattn import numpy_ref

torch = pytest.importorskip("torch")

SEED = 20261121
TIGHT = {"rtol": 1e-10, "atol": 1e-12}


def dense(
    q, k, v, visible=None, scale=None, softcap=0.0, slopes=None, offset=0, bias=None, sinks=None, keep=None, p=0.0
):
    """(out, lse) of (batch, heads, seqlen, head_dim) tensors; key heads are repeated for their groups.

    A row that sees nothing is computed from scores of zero and then thrown away, so that neither it nor
    its gradient is ever nan.
    """
    seqlen_q, seqlen_k = q.shape[-2], k.shape[-2]
    q = q.expand(*torch.broadcast_shapes(*(x.shape[:-3] for x in (q, k, v))), *q.shape[-3:])
    k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], dim=-3) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        distance = (torch.arange(seqlen_q)[:, None] + offset - torch.arange(seqlen_k)).abs()
        scores = scores - slopes[..., None, None] * distance
    if bias is not None:
        scores = scores + bias
    if visible is None:
        visible = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool)
    visible = visible.expand(scores.shape) & (scores.detach() != -torch.inf)
    if sinks is not None:  # one more key, whose value is zero
        sink = sinks[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], dim=-1)
        visible = torch.cat([visible, torch.ones_like(sink, dtype=torch.bool)], dim=-1)
        v = torch.cat([v, torch.zeros_like(v[..., :1, :])], dim=-2)
        keep = None if keep is None else torch.cat([keep, torch.ones_like(sink, dtype=torch.bool)], dim=-1)
    empty = ~visible.any(dim=-1, keepdim=True)
    scores = scores.masked_fill(~visible & ~empty, -torch.inf).masked_fill(empty, 0.0)
    weights = torch.softmax(scores, dim=-1).masked_fill(empty, 0.0)
    lse = torch.logsumexp(scores, dim=-1).masked_fill(empty[..., 0], -torch.inf)
    if keep is not None:
        weights = weights * keep / (1.0 - p) if p < 1.0 else weights * 0.0
    return weights @ v, lse


def band(seqlen_q, seqlen_k, left=None, right=None, offset=0):
    i, j = torch.arange(seqlen_q)[:, None] + offset, torch.arange(seqlen_k)
    seen = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool)
    if left is not None:
        seen &= j >= i - left
    if right is not None:
        seen &= j <= i + right
    return seen


def kept(p, seed, *shape):
    b, h, i = np.ogrid[: shape[0], : shape[1], : shape[2]]
    return torch.from_numpy(numpy_ref.dropout_keep(p, seed, b, h, i, range(shape[3])))


def leaves(rng, *shapes, dtype=torch.float64):
    return [torch.from_numpy(rng.standard_normal(shape)).to(dtype).requires_grad_() for shape in shapes]


def assert_same_gradients(ours, theirs, inputs, rng, **tolerance):
    """Pull one random gradient of (out, lse) back to `inputs` through both, and compare.

    Where lse is -inf the formula's gradient is zero by construction, and so has ours to be.
    """
    pulled = [torch.from_numpy(rng.standard_normal(x.shape)) for x in theirs]
    actual = torch.autograd.grad(ours, inputs, [g.to(x.dtype) for g, x in zip(pulled, ours, strict=True)])
    expected = torch.autograd.grad(theirs, inputs, pulled, allow_unused=True)
    for x, one, other in zip(inputs, actual, expected, strict=True):
        assert one.dtype == x.dtype
        assert_matches(one, torch.zeros_like(x) if other is None else other, **(tolerance or TIGHT))


# ---------------------------------------------------------------------------------------------------
# attention
# ---------------------------------------------------------------------------------------------------


@st.composite
def calls(draw):
    """(options of attention, options of dense, inputs that need a gradient), heads first."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batch = draw(st.sampled_from([1, 2, 3]))
    seqlen_q, seqlen_k = (draw(st.sampled_from([1, 2, 5, 9])) for _ in range(2))
    num_heads, num_heads_k, num_heads_v = draw(st.sampled_from([(1, 1, 1), (2, 2, 2), (4, 2, 2), (4, 1, 2), (6, 3, 2)]))
    batches = [draw(st.sampled_from([1, batch])) for _ in range(3)]
    heads, lengths, sizes = (num_heads, num_heads_k, num_heads_v), (seqlen_q, seqlen_k, seqlen_k), (4, 4, 3)
    inputs = dict(zip("qkv", leaves(rng, *zip(batches, heads, lengths, sizes, strict=True)), strict=True))
    batch = max(batches)
    scores = batch, num_heads, seqlen_q, seqlen_k
    left, right = (draw(st.sampled_from([None, 0, 1, 4])) for _ in range(2))
    causal = draw(st.booleans())
    alignment = draw(st.sampled_from(["top-left", "bottom-right"]))
    offset = seqlen_k - seqlen_q if alignment == "bottom-right" else 0
    options = {"causal": causal, "window_size": (left, right), "alignment": alignment}
    meaning = {"visible": band(seqlen_q, seqlen_k, left, 0 if causal else right, offset)}
    options["softmax_scale"] = meaning["scale"] = draw(st.sampled_from([None, 0.0, 2.0]))
    options["softcap"] = meaning["softcap"] = draw(st.sampled_from([0.0, 1.5]))
    if draw(st.booleans()):
        mask = torch.from_numpy(rng.random([draw(st.sampled_from([1, n])) for n in scores]) < 0.7)
        options["mask"] = mask
        meaning["visible"] = meaning["visible"] & mask
    if draw(st.booleans()):
        shape = [draw(st.sampled_from([1, n])) for n in scores][draw(st.integers(0, 3)) :]
        (inputs["bias"],) = leaves(rng, shape)
        options["bias"] = meaning["bias"] = inputs["bias"]
    if draw(st.booleans()):
        (inputs["slopes"],) = leaves(rng, draw(st.sampled_from([(num_heads,), (batch, num_heads)])))
        options["alibi_slopes"] = meaning["slopes"] = inputs["slopes"]
        meaning["offset"] = offset
    if draw(st.booleans()):
        (inputs["sinks"],) = leaves(rng, (num_heads,))
        options["sinks"] = meaning["sinks"] = inputs["sinks"]
    if draw(st.booleans()):
        p = draw(st.sampled_from([0.3, 1.0]))
        options |= {"dropout_p": p, "dropout_seed": SEED}
        meaning |= {"p": p, "keep": kept(p, SEED, *scores)}
    return options, meaning, inputs, draw(st.sampled_from(["bshd", "bhsd"])), rng


@settings(derandomize=True, deadline=None, max_examples=250)
@given(calls())
def test_autograd_through_attention_is_autograd_through_the_dense_formula(call):
    options, meaning, inputs, layout, rng = call
    q, k, v = (inputs[name] for name in "qkv")
    arrays = (q, k, v) if layout == "bhsd" else [x.transpose(1, 2) for x in (q, k, v)]
    out, lse = cupyattn.attention(*arrays, layout=layout, **options, return_lse=True)
    out = out if layout == "bhsd" else out.transpose(1, 2)
    expected = dense(q, k, v, **meaning)
    assert_matches(out, expected[0], **TIGHT)
    assert_matches(lse, expected[1], **TIGHT)
    assert_same_gradients((out, lse), expected, list(inputs.values()), rng)


@pytest.mark.parametrize("uses", [("out",), ("lse",), ("out", "lse")], ids=" and ".join)
def test_a_loss_may_use_out_or_lse_or_both(rng, uses):
    q, k, v = leaves(rng, (2, 5, 4, 4), (2, 6, 2, 4), (2, 6, 2, 4))
    ours = dict(zip(("out", "lse"), cupyattn.attention(q, k, v, return_lse=True), strict=True))
    theirs = dense(*(x.transpose(1, 2) for x in (q, k, v)))
    theirs = {"out": theirs[0].transpose(1, 2), "lse": theirs[1]}
    assert_same_gradients([ours[name] for name in uses], [theirs[name] for name in uses], [q, k], rng)


def test_gradients_hold_over_more_rows_and_keys_than_one_block(rng):
    q, k, v = leaves(rng, (1, 4, 530, 4), (1, 2, 600, 4), (1, 1, 600, 3))
    (slopes,) = leaves(rng, (4,))
    visible = band(530, 600, 310, 7, 70)
    ours = cupyattn.attention(
        q, k, v, layout="bhsd", window_size=(310, 7), alignment="bottom-right", alibi_slopes=slopes, return_lse=True
    )
    theirs = dense(q, k, v, visible=visible, slopes=slopes, offset=70)
    assert_same_gradients(ours, theirs, [q, k, v, slopes], rng, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("needed", ["q", "k", "v", "bias", "sinks", "slopes"])
def test_only_what_needs_a_gradient_gets_one(rng, needed):
    inputs = dict(
        zip(
            ("q", "k", "v", "bias", "sinks", "slopes"),
            leaves(rng, (1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4), (3, 3), (2,), (2,)),
            strict=True,
        )
    )
    for name, x in inputs.items():
        x.requires_grad_(name == needed)
    q, k, v, bias, sinks, slopes = inputs.values()

    def ours():
        return cupyattn.attention(q, k, v, layout="bhsd", bias=bias, sinks=sinks, alibi_slopes=slopes)

    theirs, _ = dense(q, k, v, bias=bias, sinks=sinks, slopes=slopes)
    assert_same_gradients([ours()], [theirs], [inputs[needed]], rng)
    ours().sum().backward()
    assert [name for name, x in inputs.items() if x.grad is not None] == [needed]


def test_without_a_need_for_gradients_none_are_recorded(rng):
    q, k, v = leaves(rng, *[(1, 3, 2, 4)] * 3)
    with torch.no_grad():
        assert not cupyattn.attention(q, k, v).requires_grad
    assert not cupyattn.attention(q.detach(), k.detach(), v.detach()).requires_grad


def test_a_bias_of_a_wider_dtype_gets_its_gradient_in_its_own(rng):
    q, k, v = leaves(rng, *[(1, 2, 6, 4)] * 3, dtype=torch.bfloat16)
    (bias,) = leaves(rng, (2, 1, 6), dtype=torch.float32)
    out = cupyattn.scaled_dot_product_attention(q, k, v, bias)
    out.backward(torch.ones_like(out))
    assert bias.grad.dtype == torch.float32
    doubles = [x.detach().double().requires_grad_() for x in (q, k, v, bias)]
    dense(*doubles[:3], bias=doubles[3])[0].sum().backward()
    assert_correctly_rounded(bias.grad, doubles[3].grad, "float32", share=0.9)


# ---------------------------------------------------------------------------------------------------
# The peers' functions
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        (((2, 3, 4, 5), (2, 3, 6, 5), (2, 3, 6, 7)), {}),
        (((2, 3, 6, 5), (2, 3, 4, 5), (2, 3, 4, 7)), {"scale": 0.3}),
        (((4, 5), (6, 5), (6, 7)), {}),
        (((3, 4, 5), (3, 6, 5), (3, 6, 7)), {}),
        (((2, 2, 3, 4, 5), (2, 1, 3, 6, 5), (2, 3, 6, 7)), {}),
        (((2, 3, 4, 5), (1, 3, 6, 5), (2, 1, 6, 7)), {}),
        (((1, 1, 4, 5), (2, 3, 6, 5), (6, 7)), {}),
        (((2, 6, 4, 5), (2, 2, 6, 5), (2, 3, 6, 7)), {"enable_gqa": True}),
    ],
    ids=str,
)
def test_autograd_through_sdpa_is_torchs_own(rng, shapes, options, is_causal):
    q, k, v = leaves(rng, *shapes)
    ours = cupyattn.scaled_dot_product_attention(q, k, v, is_causal=is_causal, **options)
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal, **options)
    assert_same_gradients([ours], [theirs], [q, k, v], rng)


@pytest.mark.parametrize("shape", [(4, 6), (4, 1), (1, 6), (3, 1, 6), (2, 1, 4, 1), (2, 3, 4, 6)], ids=str)
def test_the_gradient_of_an_attn_mask_is_summed_over_what_it_was_repeated_along(rng, shape):
    q, k, v, mask = leaves(rng, (2, 3, 4, 5), (2, 3, 6, 5), (2, 3, 6, 7), shape)
    ours = cupyattn.scaled_dot_product_attention(q, k, v, mask)
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
    assert_same_gradients([ours], [theirs], [q, k, v, mask], rng)


def test_gradients_flow_through_views_of_any_strides(rng):
    base_q, base_k = leaves(rng, (5, 2, 4, 3), (2, 3, 6, 10))
    q, k = base_q.permute(1, 3, 2, 0), base_k[..., ::2]
    v = base_k[:, :1, :, 3:4].expand(2, 3, 6, 8)
    ours = cupyattn.scaled_dot_product_attention(q, k, v)
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert_same_gradients([ours], [theirs], [base_q, base_k], rng)


FLASH_OPTIONS = [
    {},
    {"causal": True},
    {"window_size": (2, 1), "softcap": 1.5},
    {"window_size": (0, -1), "softmax_scale": 0.7},
    {"dropout_p": 0.4, "dropout_seed": SEED, "causal": True},
]


def dense_flash(q, k, v, slopes=None, batch_index=0, **options):
    """`dense` by flash-attn's arguments, for (batch, seqlen, heads, head_dim)."""
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    offset = seqlen_k - seqlen_q
    left, right = (None if side == -1 else side for side in options.get("window_size", (-1, -1)))
    p = options.get("dropout_p", 0.0)
    keep = kept(p, SEED, batch_index + q.shape[0], q.shape[2], seqlen_q, seqlen_k)[batch_index:] if p else None
    out, lse = dense(
        *(x.transpose(1, 2) for x in (q, k, v)),
        visible=band(seqlen_q, seqlen_k, left, 0 if options.get("causal") else right, offset),
        scale=options.get("softmax_scale"),
        softcap=options.get("softcap", 0.0),
        slopes=slopes,
        offset=offset,
        keep=keep,
        p=p,
    )
    return out.transpose(1, 2), lse


@pytest.mark.parametrize("options", FLASH_OPTIONS, ids=str)
@pytest.mark.parametrize("lengths", [(5, 7), (7, 5)], ids=str)
def test_autograd_through_flash_attn_func(rng, options, lengths):
    q, k, v = leaves(rng, (2, lengths[0], 4, 6), *[(2, lengths[1], 2, 6)] * 2)
    (slopes,) = leaves(rng, (2, 4))
    ours = cupyattn.flash_attn_func(q, k, v, alibi_slopes=slopes, return_lse=True, **options)
    assert_same_gradients(ours, dense_flash(q, k, v, slopes, **options), [q, k, v, slopes], rng)


@pytest.mark.parametrize("options", FLASH_OPTIONS, ids=str)
def test_autograd_through_the_packed_functions(rng, options):
    (qkv,) = leaves(rng, (2, 6, 3, 2, 4))
    ours = cupyattn.flash_attn_qkvpacked_func(qkv, return_lse=True, **options)
    assert_same_gradients(ours, dense_flash(*qkv.unbind(2), **options), [qkv], rng)
    q, kv = leaves(rng, (2, 5, 4, 4), (2, 7, 2, 2, 4))
    ours = cupyattn.flash_attn_kvpacked_func(q, kv, return_lse=True, **options)
    assert_same_gradients(ours, dense_flash(q, *kv.unbind(2), **options), [q, kv], rng)


def test_gradients_flow_beside_the_weights_that_return_attn_probs_gives(rng):
    q, k, v = leaves(rng, *[(1, 5, 2, 4)] * 3)
    options = {"dropout_p": 0.4, "dropout_seed": SEED}
    out, lse, weights = cupyattn.flash_attn_func(q, k, v, return_attn_probs=True, **options)
    assert not weights.requires_grad
    assert_same_gradients((out, lse), dense_flash(q, k, v, **options), [q, k, v], rng)


LENGTHS_Q, LENGTHS_K = [3, 0, 5, 3, 2, 3], [4, 3, 2, 4, 0, 4]
"""Of three sequences as long as each other, none lies right after another."""


def starts_of(lengths):
    return torch.tensor(np.concatenate([[0], np.cumsum(lengths)]), dtype=torch.int32)


def dense_varlen(q, k, v, slopes, **options):
    """(out, lse) sequence by sequence; rows after the last one have neither output nor gradient."""
    outs, lses = [], []
    starts_q, starts_k = starts_of(LENGTHS_Q), starts_of(LENGTHS_K)
    for b in range(len(LENGTHS_Q)):
        rows, keys = slice(*starts_q[b : b + 2]), slice(*starts_k[b : b + 2])
        out, lse = dense_flash(q[None, rows], k[None, keys], v[None, keys], slopes[b : b + 1], b, **options)
        outs.append(out[0])
        lses.append(lse[0])
    rest = q.shape[0] - sum(LENGTHS_Q)
    outs.append(torch.zeros(rest, q.shape[1], v.shape[2], dtype=torch.float64))
    lses.append(torch.full((q.shape[1], rest), -torch.inf, dtype=torch.float64))
    return torch.cat(outs), torch.cat(lses, dim=1)


@pytest.mark.parametrize("options", FLASH_OPTIONS, ids=str)
def test_autograd_through_flash_attn_varlen_func(rng, options):
    q, k, v, slopes = leaves(rng, (18, 4, 6), (19, 2, 6), (19, 1, 5), (6, 4))
    ours = cupyattn.flash_attn_varlen_func(
        q, k, v, starts_of(LENGTHS_Q), starts_of(LENGTHS_K), 5, 4, alibi_slopes=slopes, return_lse=True, **options
    )
    assert_same_gradients(ours, dense_varlen(q, k, v, slopes, **options), [q, k, v, slopes], rng)


@pytest.mark.parametrize("options", FLASH_OPTIONS, ids=str)
def test_autograd_through_the_packed_varlen_functions(rng, options):
    qkv, slopes = leaves(rng, (18, 3, 2, 4), (6, 2))
    starts = starts_of(LENGTHS_Q)
    ours = cupyattn.flash_attn_varlen_qkvpacked_func(qkv, starts, 5, alibi_slopes=slopes, return_lse=True, **options)
    same = cupyattn.flash_attn_varlen_func(
        *qkv.unbind(1), starts, starts, 5, 5, alibi_slopes=slopes, return_lse=True, **options
    )
    assert_same_gradients(ours, same, [qkv, slopes], rng)
    q, kv, slopes = leaves(rng, (18, 4, 6), (19, 2, 2, 6), (6, 4))
    ours = cupyattn.flash_attn_varlen_kvpacked_func(
        q, kv, starts, starts_of(LENGTHS_K), 5, 4, alibi_slopes=slopes, return_lse=True, **options
    )
    assert_same_gradients(ours, dense_varlen(q, *kv.unbind(1), slopes, **options), [q, kv, slopes], rng)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"softcap": 1.5}, {"window_size": (2, 1)}], ids=str)
@pytest.mark.parametrize("spread", [1.0, 200.0])
def test_gradients_of_a_negative_scale_are_those_of_the_dense_formula(rng, options, spread):
    q, k, v = leaves(rng, (2, 7, 4, 6), (2, 7, 2, 6), (2, 7, 2, 6))
    slopes, sinks = leaves(rng, (4,), (4,))
    left, right = options.get("window_size", (None, None))
    visible = band(7, 7, left, 0 if "causal" in options else right)
    ours = cupyattn.attention(
        q * spread, k, v, softmax_scale=-0.7, alibi_slopes=slopes, sinks=sinks, return_lse=True, **options
    )
    theirs = dense(
        *(x.transpose(1, 2) for x in (q * spread, k, v)),
        visible, -0.7, options.get("softcap", 0.0), slopes, sinks=sinks,
    )  # fmt: skip
    theirs = theirs[0].transpose(1, 2), theirs[1]
    assert_same_gradients(ours, theirs, [q, k, v, slopes, sinks], rng, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_gradients_flow_into_pages_and_sum_where_sequences_share_one(rng, page_size):
    used = [-(-length // page_size) for length in LENGTHS_K]
    q, pages_k, pages_v, slopes = leaves(rng, (16, 4, 6), *[(max(used) + 1, page_size, 2, 6)] * 2, (6, 4))
    table = torch.zeros(6, max(used), dtype=torch.int32)
    for b, count in enumerate(used):
        table[b, :count] = torch.arange(1, count + 1)  # every sequence starts with page 1
    ours = cupyattn.flash_attn_varlen_func(
        q, pages_k, pages_v, starts_of(LENGTHS_Q), starts_of(LENGTHS_K), 5, 4,
        causal=True, alibi_slopes=slopes, block_table=table, return_lse=True,
    )  # fmt: skip
    k, v = (
        torch.cat([x[table[b].long()].flatten(0, 1)[:length] for b, length in enumerate(LENGTHS_K)])
        for x in (pages_k, pages_v)
    )
    assert_same_gradients(ours, dense_varlen(q, k, v, slopes, causal=True), [q, pages_k, pages_v, slopes], rng)


# ---------------------------------------------------------------------------------------------------
# Precision
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_gradients_of_low_precision_are_those_of_float64_rounded_once(rng, dtype):
    q, k, v = leaves(rng, (2, 4, 40, 16), (2, 2, 50, 16), (2, 2, 50, 16), dtype=getattr(torch, dtype))
    dout = torch.from_numpy(rng.standard_normal((2, 4, 40, 16))).to(q.dtype)
    out = cupyattn.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    found = torch.autograd.grad(out, (q, k, v), dout)
    doubles = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(dense(*doubles)[0], doubles, dout.double())
    for x, one, other in zip((q, k, v), found, expected, strict=True):
        assert one.dtype == x.dtype
        assert_correctly_rounded(one, other, dtype)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32], ids=lambda x: x.__name__)
def test_attention_backward_of_numpy_arrays_is_rounded_once(rng, dtype):
    q, k, v = (rng.standard_normal((1, 30, 2, 8)).astype(dtype) for _ in range(3))
    dout = rng.standard_normal(q.shape).astype(dtype)
    found = cupyattn.attention_backward(dout, q, k, v, causal=True)
    doubles = [torch.from_numpy(x.astype(np.float64)).requires_grad_() for x in (q, k, v)]
    out, _ = dense_flash(*doubles, causal=True)
    expected = torch.autograd.grad(out, doubles, torch.from_numpy(dout.astype(np.float64)))
    for one, other in zip(found[:3], expected, strict=True):
        assert one.dtype == dtype
        assert_correctly_rounded(one, other, np.dtype(dtype).name)


def test_float32_arithmetic_gives_gradients_of_float32_accuracy(rng):
    q, k, v = leaves(rng, *[(1, 100, 2, 16)] * 3, dtype=torch.float32)
    out = cupyattn.attention(q, k, v, causal=True, compute_dtype="float32")
    dout = torch.from_numpy(rng.standard_normal(out.shape)).float()
    doubles = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(dense_flash(*doubles, causal=True)[0], doubles, dout.double())
    for one, other in zip(torch.autograd.grad(out, (q, k, v), dout), expected, strict=True):
        assert_matches(one, other, rtol=1e-5, atol=2e-5)


# ---------------------------------------------------------------------------------------------------
# attention_backward
# ---------------------------------------------------------------------------------------------------

NUMPY_CASES = {
    "plain": {},
    "softcap": {"softcap": 0.8},
    "alibi": {"alibi_slopes": (2, 4), "alignment": "bottom-right"},
    "alibi for all": {"alibi_slopes": (4,), "alignment": "top-left"},
    "sinks": {"sinks": (4,)},
    "bias": {"bias": (2, 4, 3, 5)},
    "bias of keys": {"bias": (5,)},
    "bias of rows": {"bias": (3, 1)},
    "bias of heads": {"bias": (4, 1, 1)},
    "bias of batches": {"bias": (2, 1, 1, 1)},
    "bias of none": {"bias": (1, 1)},
    "window": {"window_size": (1, 0), "alignment": "bottom-right"},
    "empty rows": {"window_size": (None, 0), "alignment": "top-left", "mask": np.arange(5) > 0},
    "dropout": {"dropout_p": 0.4, "dropout_seed": 3},
    "everything": {
        "softcap": 0.8,
        "alibi_slopes": (4,),
        "alignment": "bottom-right",
        "window_size": (2, 1),
        "bias": (4, 1, 5),
        "sinks": (4,),
        "dropout_p": 0.2,
        "dropout_seed": 3,
        "softmax_scale": 1.3,
    },
}


@pytest.mark.parametrize("counts", [(4, 2), (2, 4), (1, 1)], ids=str)
@pytest.mark.parametrize("name", NUMPY_CASES)
def test_attention_backward_is_the_slope_of_the_loss(rng, name, counts):
    """Central differences, entry by entry, of sum(dout * out) + sum(dlse * lse)."""
    options = dict(NUMPY_CASES[name])
    inputs = {
        "q": rng.standard_normal((2, 3, 4, 2)),
        "k": rng.standard_normal((1, 5, counts[0], 2)),
        "v": rng.standard_normal((2, 5, counts[1], 2)),
    }
    for extra in ("bias", "sinks", "alibi_slopes"):
        if extra in options:
            inputs[extra] = rng.standard_normal(options.pop(extra))
    dout, dlse = rng.standard_normal((2, 3, 4, 2)), rng.standard_normal((2, 4, 3))

    def loss():
        out, lse = cupyattn.attention(**inputs, **options, return_lse=True)
        return (dout * out).sum() + (dlse * np.where(np.isfinite(lse), lse, 0.0)).sum()

    found = cupyattn.attention_backward(dout, **inputs, **options, dlse=dlse)
    step = 1e-5
    for key, array in inputs.items():
        slopes = np.zeros(array.shape)
        for where in np.ndindex(array.shape):
            value = array[where]
            array[where] = value + step
            above = loss()
            array[where] = value - step
            slopes[where] = (above - loss()) / (2 * step)
            array[where] = value
        assert_matches(getattr(found, f"d{key}"), slopes, rtol=1e-7, atol=1e-8)
    for extra in {"bias", "sinks", "alibi_slopes"} - set(inputs):
        assert getattr(found, f"d{extra}") is None


@pytest.mark.parametrize("large", [np.nan, 1e200])
def test_a_row_of_nan_has_no_part_in_gradients_of_what_it_does_not_see(rng, large):
    """Also where all operands are finite, and products are not."""
    q, k, v, dout = rng.standard_normal((4, 1, 5, 1, 3))
    plain = cupyattn.attention_backward(dout[:, 1:], q[:, 1:], k, v, causal=True, alignment="bottom-right")
    q[0, 0], k[0, 0] = large, large if large < 1e300 else k[0, 0]
    found = cupyattn.attention_backward(dout, q, k, v, causal=True)
    assert np.isnan(found.dv[0, 0]).all()
    assert np.isfinite(found.dv[0, 1:]).all()
    if np.isnan(large):
        assert_matches(found.dv[0, 1:], plain.dv[0, 1:], rtol=1e-12)
        assert_matches(found.dk[0, 1:], plain.dk[0, 1:], rtol=1e-12, atol=1e-14)


def test_dsinks_is_minus_the_weight_of_the_sink_times_delta(rng):
    """A sink that grows takes weight from every value: with positive out and dout the loss falls."""
    q, k = rng.standard_normal((2, 1, 4, 2, 8))
    v = np.abs(rng.standard_normal((1, 4, 2, 8)))
    found = cupyattn.attention_backward(np.ones_like(q), q, k, v, sinks=np.zeros(2))
    assert (found.dsinks < 0).all()
    found = cupyattn.attention_backward(np.zeros_like(q), q, k, v, sinks=np.zeros(2), dlse=np.ones((1, 2, 4)))
    assert (found.dsinks > 0).all(), "and the denominator grows"


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("compute_dtype", ["float32", "float64"])
def test_gradients_do_not_depend_on_whether_out_and_lse_were_kept(rng, dtype, compute_dtype):
    q, k, v = (rng.standard_normal((2, 70, heads, 8)).astype(dtype) for heads in (4, 2, 2))
    options = {
        "causal": True,
        "sinks": rng.standard_normal(4).astype(dtype),
        "softcap": 3.0,
        "dropout_p": 0.2,
        "dropout_seed": 1,
        "compute_dtype": compute_dtype,
    }
    out, lse = cupyattn.attention(q, k, v, **options, return_lse=True)
    dout, dlse = rng.standard_normal(q.shape).astype(dtype), rng.standard_normal(lse.shape).astype(lse.dtype)
    alone = cupyattn.attention_backward(dout, q, k, v, dlse=dlse, **options)
    eps = np.finfo(np.float32 if "float32" in (compute_dtype, np.dtype(dtype).name) else np.float64).eps
    for kept_ones in ({"out": out, "lse": lse}, {"out": out}, {"lse": lse}):
        found = cupyattn.attention_backward(dout, q, k, v, dlse=dlse, **kept_ones, **options)
        for one, other in zip(found, alone, strict=True):
            if other is None:
                assert one is None
            elif dtype == np.float16 or compute_dtype != np.dtype(dtype).name:
                assert_same_bits(one, other)
            else:
                assert_matches(one, other, rtol=200 * eps, atol=200 * eps)


def test_without_dlse_the_gradient_of_lse_is_zero(rng):
    q, k, v = rng.standard_normal((3, 1, 5, 2, 4))
    dout = rng.standard_normal(q.shape)
    alone = cupyattn.attention_backward(dout, q, k, v)
    zero = cupyattn.attention_backward(dout, q, k, v, dlse=np.zeros((1, 2, 5)))
    for one, other in zip(alone[:3], zero[:3], strict=True):
        assert_matches(one, other, rtol=1e-14, atol=1e-16)


def test_the_gradients_know_their_names_and_shapes(rng):
    q, k, v = rng.standard_normal((2, 3, 4, 5)), rng.standard_normal((1, 6, 2, 5)), rng.standard_normal((2, 6, 1, 7))
    bias = rng.standard_normal((4, 1, 6)).astype(np.float32)
    found = cupyattn.attention_backward(rng.standard_normal((2, 3, 4, 7)), q, k, v, bias=bias)
    assert found._fields == ("dq", "dk", "dv", "dbias", "dsinks", "dalibi_slopes")
    assert [x.shape for x in found[:4]] == [q.shape, k.shape, v.shape, bias.shape]
    assert found.dbias.dtype == np.float32


def test_dropout_without_its_seed_has_no_gradient(rng):
    q, k, v = rng.standard_normal((3, 1, 5, 2, 4))
    with pytest.raises(ValueError, match="dropout_seed"):
        cupyattn.attention_backward(q, q, k, v, dropout_p=0.5)


def test_torchs_backward_drops_what_its_forward_dropped(rng):
    """Without a seed of ours: the one drawn from torch's generator has to be kept for the backward pass."""
    q, k, v = leaves(rng, *[(1, 6, 2, 8)] * 3)
    out = cupyattn.attention(q, k, v.detach(), dropout_p=0.5)
    (dv,) = torch.autograd.grad(cupyattn.attention(q, k, v, dropout_p=1.0).sum(), v)
    assert not dv.any()
    eye = torch.eye(6, dtype=torch.float64)[None, :, None, :].expand(1, 6, 2, 6).clone().requires_grad_()
    weights = cupyattn.attention(q, k, eye, dropout_p=0.5)  # (1, rows, heads, keys)
    (from_backward,) = torch.autograd.grad(weights, eye, torch.ones_like(weights))
    expected = weights.sum(dim=1).transpose(1, 2)[..., None].expand(from_backward.shape)
    assert (weights == 0).any()
    assert_matches(from_backward, expected, rtol=1e-12, atol=1e-15)
    assert out.requires_grad


# ---------------------------------------------------------------------------------------------------
# torch's own checks
# ---------------------------------------------------------------------------------------------------

GRADCHECKS = {
    "attention": lambda q, k, v: cupyattn.attention(q, k, v, layout="bhsd", return_lse=True),
    "attention with everything": lambda q, k, v: cupyattn.attention(
        q, k, v, layout="bhsd", window_size=(1, 1), alignment="top-left", softcap=1.0, dropout_p=0.3, dropout_seed=2
    ),
    "sdpa": lambda q, k, v: cupyattn.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    "flash": lambda q, k, v: cupyattn.flash_attn_func(q, k, v, causal=True),
}


@pytest.mark.parametrize("name", GRADCHECKS)
def test_gradcheck_agrees(rng, name):
    shapes = [(1, 3, 2, 2), (1, 3, 1, 2), (1, 3, 1, 2)]
    if name != "flash":
        shapes = [(b, h, n, d) for b, n, h, d in shapes]
    assert torch.autograd.gradcheck(GRADCHECKS[name], leaves(rng, *shapes))


def test_gradcheck_agrees_on_bias_sinks_and_slopes(rng):
    def call(bias, sinks, slopes):
        return cupyattn.attention(q, k, v, bias=bias, sinks=sinks, alibi_slopes=slopes, return_lse=True)

    q, k, v = (x.detach() for x in leaves(rng, *[(1, 3, 2, 2)] * 3))
    assert torch.autograd.gradcheck(call, leaves(rng, (3, 1), (2,), (2,)))


def test_gradcheck_agrees_on_merge_states(rng):
    def merged(layout):
        return lambda a, b, c, *lses: cupyattn.merge_states([a, b, c], lses, layout=layout)

    for layout, out, lse in (
        ("bshd", (2, 3, 2, 2), (2, 2, 3)),
        ("bhsd", (2, 3, 2), (2, 3)),
        ("thd", (3, 2, 2), (2, 3)),
    ):
        assert torch.autograd.gradcheck(merged(layout), leaves(rng, out, out, out, lse, lse, lse))


def test_a_state_that_saw_nothing_gets_a_gradient_of_zero_from_the_merge(rng):
    out, other, lse = leaves(rng, (1, 3, 2, 4), (1, 3, 2, 4), (1, 2, 3))
    nothing = torch.full((1, 2, 3), -torch.inf, dtype=torch.float64, requires_grad=True)
    merged, merged_lse = cupyattn.merge_states([out, other], [lse, nothing])
    dout, dlse = torch.ones_like(merged), torch.full_like(merged_lse, 2.0)
    found = torch.autograd.grad((merged, merged_lse), (out, other, lse, nothing), (dout, dlse))
    for one, other_one in zip(found, (dout, 0 * dout, dlse, 0 * dlse), strict=True):
        assert_matches(one, other_one, rtol=1e-14, atol=1e-14)


def test_gradients_through_attention_in_parts_and_a_merge_are_those_of_the_whole(rng):
    q, k, v = leaves(rng, (2, 5, 4, 6), (2, 9, 2, 6), (2, 9, 2, 6))
    parts = [cupyattn.attention(q, k[:, part], v[:, part], return_lse=True) for part in (slice(0, 4), slice(4, 9))]
    merged = cupyattn.merge_states(*zip(*parts, strict=True))
    assert_same_gradients(merged, dense_flash(q, k, v), [q, k, v], rng)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
def test_gradcheck_agrees_on_rotary_embedding(rng, interleaved):
    x, cos, sin = leaves(rng, (2, 3, 2, 6), (7, 2), (7, 2))
    offsets = torch.tensor([0, 4])
    packed_x = leaves(rng, (5, 2, 4))[0]
    starts = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    assert torch.autograd.gradcheck(
        lambda *o: cupyattn.apply_rotary_emb(*o, interleaved, seqlen_offsets=offsets), (x, cos, sin)
    )
    assert torch.autograd.gradcheck(
        lambda *o: cupyattn.apply_rotary_emb(*o, interleaved, seqlen_offsets=1, cu_seqlens=starts),
        (packed_x, cos, sin),
    )


@pytest.mark.parametrize("name", ["attention", "sdpa", "flash", "merge_states", "rotary"])
def test_a_second_derivative_is_refused_in_words(rng, name):
    q, k, v = leaves(rng, *[(1, 3, 2, 4)] * 3)
    lse, cos = leaves(rng, (1, 2, 3), (3, 2))
    out = {
        "attention": lambda: cupyattn.attention(q, k, v),
        "sdpa": lambda: cupyattn.scaled_dot_product_attention(q, k, v),
        "flash": lambda: cupyattn.flash_attn_func(q, k, v),
        "merge_states": lambda: cupyattn.merge_states([q, k], [lse, lse])[0],
        "rotary": lambda: cupyattn.apply_rotary_emb(q, cos, cos),
    }[name]()
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        dq.sum().backward()
