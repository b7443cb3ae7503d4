"""Every public function gives back what NumPy gives, at home in the caller's library, dtype and device."""

import gc
import inspect
import os
import re
import subprocess
import sys
import textwrap
import weakref
from dataclasses import replace
from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from homes import DTYPES, HOMES, BigEndian, Dask, Home, HostBackedCuPy, Jax, Strict, Torch, dtype_name, needs
from oracle import assert_matches, assert_same_bits, to_numpy

import cupyattn
from cupyattn import numpy_ref

# ---------------------------------------------------------------------------------------------------
# One call of every public function, on operands that are looked up by name
# ---------------------------------------------------------------------------------------------------


def attention(q, k, v, mask, bias, slopes, sinks):
    return cupyattn.attention(
        q, k, v, causal=True, alignment="bottom-right", window_size=(5, None), softcap=9.0, mask=mask, bias=bias,
        alibi_slopes=slopes, sinks=sinks, return_lse=True,
    )  # fmt: skip


def attention_backward(dout, q, k, v, dlse, mask, bias, slopes, sinks):
    return cupyattn.attention_backward(
        dout, q, k, v, dlse=dlse, causal=True, alignment="top-left", softcap=9.0, mask=mask, bias=bias,
        alibi_slopes=slopes, sinks=sinks,
    )  # fmt: skip


def scaled_dot_product_attention(query, key, value, bias):
    return cupyattn.scaled_dot_product_attention(query, key, value, attn_mask=bias, enable_gqa=True, return_lse=True)


def sdpa_without_heads(rows, keys, values):
    return (cupyattn.scaled_dot_product_attention(rows, keys, values, is_causal=True),)


def flash_attn_func(q, k, v, slopes):
    return cupyattn.flash_attn_func(
        q, k, v, 0.3, causal=True, alibi_slopes=slopes, return_attn_probs=True, dropout_seed=7
    )


def flash_attn_qkvpacked_func(qkv, slopes):
    return cupyattn.flash_attn_qkvpacked_func(qkv, window_size=(2, 1), alibi_slopes=slopes, return_lse=True)


def flash_attn_kvpacked_func(q, kv, slopes):
    return cupyattn.flash_attn_kvpacked_func(q, kv, softcap=5.0, alibi_slopes=slopes, return_lse=True)


def flash_attn_varlen_func(packed_q, packed_k, packed_v, cu_seqlens_q, cu_seqlens_k):
    return cupyattn.flash_attn_varlen_func(
        packed_q, packed_k, packed_v, cu_seqlens_q, cu_seqlens_k, 6, 9, causal=True, return_lse=True
    )


def flash_attn_varlen_func_of_pages(packed_q, pages_k, pages_v, cu_seqlens_q, cu_seqlens_k, block_table):
    return cupyattn.flash_attn_varlen_func(
        packed_q, pages_k, pages_v, cu_seqlens_q, cu_seqlens_k, 6, 9, causal=True, block_table=block_table,
        return_lse=True,
    )  # fmt: skip


def flash_attn_varlen_func_of_used_pages(packed_q, pages_k, pages_v, cu_seqlens_q, used_q, used_k, block_table):
    return cupyattn.flash_attn_varlen_func(
        packed_q, pages_k, pages_v, cu_seqlens_q, max_seqlen_q=6, max_seqlen_k=9, causal=True, block_table=block_table,
        seqused_q=used_q, seqused_k=used_k, return_softmax_lse=True,
    )  # fmt: skip


def flash_attn_varlen_func_of_used_keys(packed_q, packed_k, packed_v, cu_seqlens_q, cu_seqlens_k, used_k):
    return cupyattn.flash_attn_varlen_func(
        packed_q, packed_k, packed_v, cu_seqlens_q, cu_seqlens_k, 6, 9, causal=True, seqused_k=used_k, return_lse=True
    )


def merge_states(out_a, lse_a, out_b, lse_b):
    return cupyattn.merge_states([out_a, out_b], [lse_a, lse_b])


def apply_rotary_emb(x, cos, sin, offsets):
    return (cupyattn.apply_rotary_emb(x, cos, sin, seqlen_offsets=offsets),)


def apply_rotary_emb_packed(packed_q, cos, sin, offsets, cu_seqlens_q):
    return (
        cupyattn.apply_rotary_emb(
            packed_q, cos, sin, interleaved=True, seqlen_offsets=offsets, cu_seqlens=cu_seqlens_q, max_seqlen=6
        ),
    )


def unpad_input(x, attention_mask, unused_mask):
    return cupyattn.unpad_input(x, attention_mask, unused_mask)


def pad_input(packed_q, indices):
    return (cupyattn.pad_input(packed_q, indices, 2, 6),)


SMOOTH = [
    attention,
    scaled_dot_product_attention,
    sdpa_without_heads,
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_kvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_func_of_pages,
    flash_attn_varlen_func_of_used_pages,
    flash_attn_varlen_func_of_used_keys,
    merge_states,
    apply_rotary_emb,
    apply_rotary_emb_packed,
]
"""Those through which gradients flow, by way of NumPy."""
PADDING = [unpad_input, pad_input]
CALLS = [*SMOOTH, attention_backward, *PADDING]


def title_of(call):
    """The public function a call is of."""
    names = {"sdpa_without_heads": "scaled_dot_product_attention", "apply_rotary_emb_packed": "apply_rotary_emb"}
    return names.get(call.__name__, call.__name__.partition("_of_")[0])


def everything(dtype, seed=3):
    """NumPy operands of all calls; floating ones in `dtype` and off zero mean."""
    rng = np.random.default_rng(seed)

    def draw(*shape, kind=DTYPES[dtype]):
        return (rng.standard_normal(shape) + 0.3).astype(kind)

    wide = np.float64 if dtype == "float64" else np.float32
    q, k, v = draw(2, 6, 4, 8), draw(2, 7, 2, 8), draw(2, 7, 2, 8)
    angles = rng.uniform(-4, 4, (12, 3))
    return {
        "q": q,
        "k": k,
        "v": v,
        "mask": rng.random((2, 1, 6, 7)) < 0.8,
        "bias": draw(4, 6, 7),
        "slopes": np.array([0.1, 0.2, 0.4, 0.8], np.float32),
        "sinks": draw(4, kind=np.float32),
        "dout": draw(*q.shape),
        "dlse": draw(2, 4, 6, kind=wide),
        "query": np.ascontiguousarray(q.swapaxes(1, 2)),
        "key": np.ascontiguousarray(k.swapaxes(1, 2)),
        "value": np.ascontiguousarray(v.swapaxes(1, 2)),
        "rows": draw(5, 8),
        "keys": draw(7, 8),
        "values": draw(7, 3),
        "qkv": draw(2, 6, 3, 4, 8),
        "kv": draw(2, 7, 2, 2, 8),
        "packed_q": draw(9, 4, 8),
        "packed_k": draw(13, 2, 8),
        "packed_v": draw(13, 2, 8),
        "cu_seqlens_q": np.array([0, 3, 9], np.int32),
        "cu_seqlens_k": np.array([0, 9, 13], np.int32),
        "used_q": np.array([3, 4], np.int32),
        "used_k": np.array([7, 2], np.int32),
        "pages_k": draw(6, 4, 2, 8),
        "pages_v": draw(6, 4, 2, 8),
        "block_table": np.array([[5, 0, 2], [3, -1, -1]], np.int32),
        "out_a": draw(2, 6, 4, 8),
        "out_b": draw(2, 6, 4, 8),
        "lse_a": draw(2, 4, 6, kind=wide),
        "lse_b": draw(2, 4, 6, kind=wide),
        "x": draw(2, 6, 4, 8),
        "cos": np.cos(angles).astype(DTYPES[dtype]),
        "sin": np.sin(angles).astype(DTYPES[dtype]),
        "offsets": np.array([2, 5], np.int32),
        "attention_mask": np.array([[1, 1, 1, 0, 1, 0], [0, 1, 0, 0, 0, 0]], np.int64),
        "unused_mask": np.array([[0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0]], bool),
        "indices": np.array([0, 1, 3, 5, 6, 7, 8, 10, 11], np.int64),
    }


def operands_of(call, dtype="float32"):
    """The NumPy operands that a call takes, in its order."""
    drawn = everything(dtype)
    return {name: drawn[name] for name in inspect.signature(call).parameters}


def is_floating(array):
    return array.dtype.kind in "fV"  # ml_dtypes's bfloat16 is of kind V


def assert_same_results(found, expected, compare=assert_same_bits):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            compare(a, b)


calls = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
smooth_calls = pytest.mark.parametrize("call", SMOOTH, ids=lambda call: call.__name__)


# ---------------------------------------------------------------------------------------------------
# Every library
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy_gives_the_definition_rounded_once(dtype):
    q, k, v = (everything(dtype)[name] for name in ("q", "k", "v"))
    wide = [np.repeat(x.astype(np.float64).swapaxes(1, 2), 4 // x.shape[2], axis=1) for x in (q, k, v)]
    expected = numpy_ref.attention(*wide, scale=8**-0.5).out.swapaxes(1, 2)
    found = cupyattn.attention(q, k, v)
    assert found.dtype == q.dtype
    spacing = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-48}[dtype]
    assert_matches(found, expected, rtol=1.01 * spacing, atol=1e-15 if dtype == "float64" else 1e-8)


@pytest.mark.parametrize("home", HOMES, ids=str)
@calls
def test_every_function_gives_numpys_result_at_home(call, home):
    operands = operands_of(call, home.dtype)
    expected = call(**operands)
    arrays = {name: home.make(array) for name, array in operands.items()}
    if call in PADDING and home.lazy:
        with pytest.raises(TypeError, match=f"{title_of(call)}: the .* depends on the values of "):
            home.call(call, arrays)
        return
    found = home.call(call, arrays)
    assert_same_results(found, expected)
    first = next(iter(arrays.values()))
    for result, wanted in zip(found, expected, strict=True):
        if not isinstance(wanted, (int, type(None))):
            home.check(result, first)
            assert dtype_name(result).lstrip("<>=") in (home.name_of(wanted.dtype), wanted.dtype.str[1:])
    assert found[0].dtype == first.dtype
    for name, array in operands.items():
        assert_same_bits(arrays[name], array)


@calls
def test_jax_in_64_bits_gives_numpys_result(call):
    jax = needs("jax")
    operands = operands_of(call, "float64")
    with jax.enable_x64(True):
        arrays = {name: jax.numpy.asarray(array) for name, array in operands.items()}
        ways = [call] if call in PADDING else [call, jax.jit(call)]
        for way in ways:
            found = way(**arrays)
            assert found[0].dtype == np.float64
            assert_same_results(found, call(**operands))


FLOAT8 = "float8_e4m3fn"


def attention_of_float8(q, k, v, q_descale, k_descale, v_descale):
    return cupyattn.attention(
        q, k, v, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale, causal=True, alignment="bottom-right",
        return_lse=True,
    )  # fmt: skip


def float8_operands():
    drawn = everything("float32")
    descales = np.random.default_rng(4).uniform(0.5, 2, (3, 2, 2)).astype(np.float32)
    return {name: drawn[name].astype(ml_dtypes.float8_e4m3fn) for name in ("q", "k", "v")} | {
        f"{name}_descale": factors for name, factors in zip("qkv", descales, strict=True)
    }


@pytest.mark.parametrize(
    "home", [Home(FLOAT8), Torch(FLOAT8), Jax(FLOAT8), Jax(FLOAT8, jit=True), Dask(FLOAT8)], ids=str
)
def test_float8_gives_the_same_bfloat16_in_every_library_that_has_it(home):
    operands = float8_operands()
    expected = attention_of_float8(**operands)
    arrays = {name: home.make(array) for name, array in operands.items()}
    found = home.call(attention_of_float8, arrays)
    assert_same_results(found, expected)
    assert [dtype_name(x) for x in found] == ["bfloat16", "float32"]
    for result in found:
        home.check(result, arrays["q"])


EMPTIED = [Home("bfloat16"), BigEndian("float32"), Torch("float32"), Jax("float32"), Strict("float64"), Dask("float32")]


@pytest.mark.parametrize("home", EMPTIED, ids=str)
def test_results_of_empty_arrays_are_at_home_too(home):
    def make(*shape):
        return home.make(np.ones(shape, DTYPES[home.dtype]))

    def check(result, shape, fill):
        home.check(result, q)
        assert_same_bits(result, np.full(shape, fill))

    for batch, rows, num_keys, heads in ((0, 3, 4, 2), (2, 0, 4, 2), (2, 3, 0, 2), (2, 3, 4, 0)):
        q, k = make(batch, rows, heads, 8), make(batch, num_keys, heads, 8)
        out, lse = cupyattn.attention(q, k, k, return_lse=True)
        check(out, (batch, rows, heads, 8), 0.0)
        check(lse, (batch, heads, rows), -np.inf)
        for gradient, like in zip(cupyattn.attention_backward(q, q, k, k), (q, k, k), strict=False):
            check(gradient, tuple(like.shape), 0.0)


@pytest.mark.parametrize("home", [Home, Torch, Jax, Dask], ids=lambda home: home.__name__)
@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("bfloat16", "float32")], ids=" and ".join)
def test_each_gradient_has_the_dtype_of_its_own_argument(home, dtypes):
    """And not that of the first one: bits of a bfloat16 are no uint16."""
    wide, narrow = (home(dtype) for dtype in dtypes)
    drawn, others = everything(dtypes[0]), everything(dtypes[1])
    arrays = [wide.make(drawn[name]) for name in ("dout", "q", "k", "v")]
    bias, sinks = narrow.make(others["bias"]), narrow.make(others["sinks"].astype(others["bias"].dtype))
    found = cupyattn.attention_backward(*arrays, bias=bias, sinks=sinks)
    assert [dtype_name(gradient) for gradient in found[:5]] == [*(dtypes[0],) * 3, *(dtypes[1],) * 2]
    plain = [np.asarray(drawn[name]) for name in ("dout", "q", "k", "v")]
    expected = cupyattn.attention_backward(
        *plain, bias=others["bias"].astype(np.float64), sinks=others["sinks"].astype(others["bias"].dtype)
    )
    assert_matches(found.dbias, expected.dbias, rtol=2.0**-8, atol=1e-30)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@calls
def test_nan_infinities_and_overflow_raise_no_warning(call, dtype):
    operands = operands_of(call, dtype)
    for array in operands.values():
        if is_floating(array):
            flat = array.reshape(-1)
            flat[0], flat[1], flat[2], flat[3 % flat.size] = np.nan, np.inf, -np.inf, ml_dtypes.finfo(array.dtype).max
    call(**operands)  # warnings are errors


# ---------------------------------------------------------------------------------------------------
# NumPy: any memory
# ---------------------------------------------------------------------------------------------------


def fortran(array):
    base = np.asfortranarray(array)
    return base, base


def negative_strides(array):
    backwards = (slice(None, None, -1),) * array.ndim
    base = array[backwards].copy()
    return base[backwards], base


def gaps(array):
    base = np.zeros((*array.shape[:-1], 3 * array.shape[-1]), array.dtype)
    base[..., ::3] = array
    return base[..., ::3], base


def zero_strides(array):
    base = array[:1].copy()
    return np.broadcast_to(base, array.shape), base


def misaligned(array):
    base = np.zeros(array.nbytes + 1, np.uint8)
    view = np.ndarray(array.shape, array.dtype, base, offset=1)
    view[...] = array
    return view, base


def odd_strides(array):
    """A field of packed records: strides are no multiple of the item size."""
    base = np.zeros(array.shape, np.dtype([("tag", np.uint8), ("value", array.dtype)]))
    base["value"] = array
    return base["value"], base


def read_only(array):
    base = array.copy()
    base.flags.writeable = False
    return base, base


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "layout",
    [fortran, negative_strides, gaps, zero_strides, misaligned, odd_strides, read_only],
    ids=lambda f: f.__name__,
)
@calls
def test_any_memory_layout_gives_the_same_and_is_only_read(call, layout, dtype):
    views, bases = {}, []
    for name, array in operands_of(call, dtype).items():
        counts = array.dtype.kind == "i"  # equal entries would be other sequences, or none
        views[name], base = (array, array) if counts and layout is zero_strides else layout(array)
        bases.append((base, base.tobytes()))
    found = call(**views)
    for base, before in bases:
        assert base.tobytes() == before
    expected = call(**{name: np.array(view, order="C") for name, view in views.items()})
    rtol = 1e-6 if dtype == "float32" else 2.0**-7
    assert_same_results(found, expected, lambda a, b: assert_matches(a, b, rtol=rtol, atol=1e-6))


@calls
def test_results_of_numpy_are_fresh_memory(call):
    operands = operands_of(call)
    for result in call(**operands):
        if isinstance(result, np.ndarray):
            assert result.flags.writeable
            assert not any(np.shares_memory(result, array) for array in operands.values())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@calls
def test_results_outlive_later_calls(call, dtype):
    """Memory that is used again must not be what a caller holds."""
    operands = operands_of(call, dtype)
    found = call(**operands)
    before = [np.array(result) for result in found]
    for array in operands.values():
        if is_floating(array):
            array[...] = 7
    call(**operands)
    assert_same_results([result for result in found if result is not None], [x for x in before if x.dtype != object])


def test_a_result_has_the_byte_order_of_the_array_it_resembles():
    """lse resembles none: it is the machine's, like the integers of `unpad_input`."""
    drawn = {name: array.astype(">f4") for name, array in everything("float32").items() if is_floating(array)}
    q, k, v, native = drawn["q"], drawn["k"], drawn["v"], everything("float32")
    out, lse = cupyattn.attention(q, k, v, return_lse=True)
    assert (out.dtype.str, lse.dtype.str) == (">f4", "<f4")
    assert_same_bits(lse, cupyattn.attention(*(native[name] for name in ("q", "k", "v")), return_lse=True)[1])
    found = cupyattn.attention_backward(native["dout"], q, native["k"], v, bias=native["bias"], sinks=drawn["sinks"])
    assert [gradient.dtype.str for gradient in found[:5]] == [">f4", "<f4", ">f4", "<f4", ">f4"]
    merged = cupyattn.merge_states([out, out], [lse, lse])
    assert [x.dtype.str for x in merged] == [">f4", "<f4"]
    rows, *indices = cupyattn.unpad_input(np.ones((2, 3), ">i4"), np.ones((2, 3), bool))
    assert rows.dtype.str == ">i4"
    assert all(x.dtype.isnative for x in indices if isinstance(x, np.ndarray))


@calls
def test_memory_mapped_files_are_arrays(call, tmp_path):
    operands = operands_of(call)
    mapped = {}
    for name, array in operands.items():
        np.save(tmp_path / name, array)
        mapped[name] = np.load(tmp_path / f"{name}.npy", mmap_mode="r")
        assert type(mapped[name]) is np.memmap
    found = call(**mapped)
    assert_same_results(found, call(**operands))
    assert call in PADDING or not any(isinstance(result, np.memmap) for result in found)


@calls
def test_arrays_without_axes_are_refused_by_name(call):
    operands = operands_of(call)
    for name, array in operands.items():
        if name in ("mask", "bias", "offsets"):
            continue  # they broadcast, and one offset is for all sequences
        with pytest.raises((TypeError, ValueError), match=f"{title_of(call)}: "):
            call(**{**operands, name: array.reshape(-1)[0:1].reshape(())})


def test_a_bias_without_axes_has_a_gradient_without_axes():
    for dtype in DTYPES.values():
        q = np.ones((1, 3, 2, 4), dtype)
        assert cupyattn.attention_backward(q, q, q, q, bias=np.array(0.5, dtype)).dbias.shape == ()


# ---------------------------------------------------------------------------------------------------
# torch
# ---------------------------------------------------------------------------------------------------


def as_tensors(operands):
    return {name: Torch("").make(array) for name, array in operands.items()}


def transposed(tensor):
    """The same values with the order of the axes in memory turned around."""
    return tensor.permute(*reversed(range(tensor.ndim))).contiguous().permute(*reversed(range(tensor.ndim)))


def sliced(tensor):
    return needs("torch").stack([tensor, tensor], -1)[..., 0]


def expanded(tensor):
    return tensor if tensor.dtype in (needs("torch").int32, needs("torch").int64) else tensor[:1].expand(tensor.shape)


@pytest.mark.parametrize("layout", [transposed, sliced], ids=lambda f: f.__name__)
def test_float8_tensors_of_any_strides_give_the_same(layout):
    operands = float8_operands()
    found = attention_of_float8(**{name: layout(Torch(FLOAT8).make(array)) for name, array in operands.items()})
    assert_same_results(found, attention_of_float8(**operands))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", [transposed, sliced, expanded], ids=lambda f: f.__name__)
@calls
def test_any_strides_of_torch_give_the_same(call, layout, dtype):
    tensors = {name: layout(tensor) for name, tensor in as_tensors(operands_of(call, dtype)).items()}
    found = call(**tensors)
    expected = call(**{name: tensor.contiguous() for name, tensor in tensors.items()})
    rtol = 1e-6 if dtype == "float32" else 2.0**-7
    assert_same_results(found, expected, lambda a, b: assert_matches(a, b, rtol=rtol, atol=1e-6))


def test_a_lazily_negated_tensor_is_read_with_its_sign():
    torch = needs("torch")
    plain = as_tensors(operands_of(flash_attn_func))
    q = torch.complex(plain["k"], -plain["q"][:, :1].expand(2, 7, 4, 8)[:, :, :2]).conj().imag
    assert q.is_neg()
    found, expected = (cupyattn.attention(x, plain["k"], plain["v"]) for x in (q, q.clone()))
    assert_same_bits(found, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tensor_that_is_zero_without_memory_is_zeros(dtype):
    torch = needs("torch")
    operands = as_tensors(operands_of(flash_attn_func, dtype))
    q, k, v = (operands[name].detach().requires_grad_() for name in "qkv")
    zeros = torch._efficientzerotensor(q.shape, dtype=q.dtype)
    assert_same_bits(cupyattn.attention(zeros, k, v), cupyattn.attention(torch.zeros_like(q), k, v))
    cupyattn.attention(q, k, v).backward(zeros)
    assert not any(x.grad.any() for x in (q, k, v))


@calls
def test_tensors_that_require_gradients_give_the_same_values(call):
    torch = needs("torch")
    operands = operands_of(call)
    tensors = as_tensors(operands)
    parameters = {n: torch.nn.Parameter(t) if t.is_floating_point() else t for n, t in tensors.items()}
    found, expected = call(**parameters), call(**operands)
    assert_same_results(found, expected)
    assert type(found[0]) is torch.Tensor
    assert found[0].requires_grad == (call is not attention_backward)
    with torch.no_grad():
        quiet = call(**parameters)
    assert_same_results(quiet, expected)
    assert not any(x.requires_grad for x in quiet if isinstance(x, torch.Tensor))
    with torch.inference_mode():
        inferred = call(**parameters)
    assert_same_results(inferred, expected)
    assert inferred[0].is_inference()


def torch_gradients(call, operands, cotangents):
    torch = needs("torch")
    tensors = as_tensors(operands)
    smooth = [tensor.requires_grad_() for tensor in tensors.values() if tensor.is_floating_point()]
    results = call(**tensors)[: len(cotangents)]
    found = torch.autograd.grad(results, smooth, list(as_tensors(dict(enumerate(cotangents))).values()))
    names = [name for name, tensor in tensors.items() if tensor.is_floating_point()]
    return dict(zip(names, found, strict=True))


def cotangents_of(call, operands):
    """Random ones for out, and lse if there is one (a dropout mask has no gradient)."""
    rng = np.random.default_rng(11)
    results = [result for result in call(**operands)[:2] if result is not None]
    return [rng.standard_normal(result.shape).astype(result.dtype) for result in results]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torchs_gradients_are_those_of_attention_backward(dtype):
    operands = operands_of(attention, dtype)
    operands.pop("mask")
    dout, dlse = cotangents_of(unmasked_attention, operands)
    found = torch_gradients(unmasked_attention, operands, [dout, dlse])
    expected = unmasked_attention_backward(dout, dlse, operands)
    assert_same_results(list(found.values()), expected)
    for name, gradient in found.items():
        assert dtype_name(gradient) == str(operands[name].dtype)


def unmasked_attention(q, k, v, bias, slopes, sinks):
    edits = {"bias": bias, "alibi_slopes": slopes, "sinks": sinks, "alignment": "top-left"}
    return cupyattn.attention(q, k, v, **edits, return_lse=True)


def unmasked_attention_backward(dout, dlse, operands):
    q, k, v, bias, slopes, sinks = operands.values()
    found = cupyattn.attention_backward(
        dout, q, k, v, dlse=dlse, bias=bias, alibi_slopes=slopes, sinks=sinks, alignment="top-left"
    )
    return [found.dq, found.dk, found.dv, found.dbias, found.dalibi_slopes, found.dsinks]


@smooth_calls
def test_torchs_gradients_are_the_derivatives(call):
    torch = needs("torch")
    operands = {n: x.astype(np.float64) if is_floating(x) else x for n, x in operands_of(call, "float64").items()}
    tensors = as_tensors(operands)
    names = [name for name, tensor in tensors.items() if tensor.is_floating_point()]

    def smooth(*values):
        found = call(**{**tensors, **dict(zip(names, values, strict=True))})[:2]
        return tuple(x.masked_fill(x.isinf(), 0.0) for x in found if x is not None)  # lse of rows that see no key

    inputs = [tensors[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(smooth, inputs, fast_mode=True)


@pytest.mark.parametrize("call", [attention, flash_attn_varlen_func, merge_states], ids=lambda f: f.__name__)
def test_a_loss_of_one_of_two_results_has_gradients(call):
    """out without lse, or lse without out: the other's gradient is None in torch, and zero in fact."""
    torch = needs("torch")
    operands = operands_of(call)
    dout, dlse = cotangents_of(call, operands)
    for used, zeros in ((0, [dout, 0 * dlse]), (1, [0 * dout, dlse])):
        tensors = as_tensors(operands)
        smooth = [tensor.requires_grad_() for tensor in tensors.values() if tensor.is_floating_point()]
        cotangent = Torch("").make((dout, dlse)[used])
        found = torch.autograd.grad(call(**tensors)[used], smooth, cotangent, allow_unused=True)
        expected = torch_gradients(call, operands, zeros).values()
        assert_same_results([0 * t if g is None else g for g, t in zip(found, smooth, strict=True)], list(expected),
                            assert_matches)  # fmt: skip


def test_a_gradient_of_stride_zero_is_taken():
    tensors = as_tensors({name: everything("float32")[name] for name in ("q", "k", "v")})
    for tensor in tensors.values():
        tensor.requires_grad_()
    cupyattn.attention(**tensors).sum().backward()
    arrays = [tensor.detach().numpy() for tensor in tensors.values()]
    expected = cupyattn.attention_backward(np.ones_like(arrays[0]), *arrays)
    assert_same_results([tensor.grad for tensor in tensors.values()], list(expected[:3]))


@pytest.mark.parametrize(
    "call",
    [
        lambda q, k, v: cupyattn.attention(q, k, v),
        lambda q, k, v: cupyattn.attention(q, k, v, causal=True, dropout_p=0.5, dropout_seed=1),
        lambda q, k, v: cupyattn.scaled_dot_product_attention(q, k, v),
        lambda q, k, v: cupyattn.flash_attn_func(q, k, v),
    ],
    ids=["attention", "dropout", "scaled_dot_product_attention", "flash_attn_func"],
)
def test_a_graph_keeps_operands_where_torch_can_let_them_go(call):
    """As checkpointing does: by hooks on what is saved, and nowhere else."""
    needs("torch")
    import torch

    q, k, v = (torch.randn(2, 8, 4, 16, requires_grad=True) for _ in range(3))
    inner = k * 1.0
    kept = weakref.ref(inner)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: None, lambda x: x):
        out = call(q, inner, v)
    del inner
    gc.collect()
    assert kept() is None
    assert out.requires_grad


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_call_has_the_same_gradients(use_reentrant):
    needs("torch")
    from torch.utils.checkpoint import checkpoint

    operands = {name: everything("float32")[name] for name in ("q", "k", "v")}
    dout = everything("float32")["dout"]
    tensors = {name: tensor.requires_grad_() for name, tensor in as_tensors(operands).items()}
    checkpoint(cupyattn.attention, *tensors.values(), use_reentrant=use_reentrant).backward(Torch("").make(dout))
    expected = cupyattn.attention_backward(dout, **operands)
    assert_same_results([tensor.grad for tensor in tensors.values()], list(expected[:3]))


def test_second_derivatives_of_torch_raise_and_are_not_dropped():
    """A penalty on the gradient, added to a loss that has one: without a word, its share would be missing."""
    torch = needs("torch")
    q = Torch("").make(everything("float32")["q"]).requires_grad_()
    out = cupyattn.attention(q, q, q)
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError)):
        (out.sum() + (dq**2).sum()).backward()


@pytest.mark.parametrize("name", ["q", "v", "k_descale"])
def test_gradients_of_float8_are_refused_in_words_once_they_are_asked_for(name):
    tensors = {key: Torch(FLOAT8).make(array) for key, array in float8_operands().items()}
    tensors[name].requires_grad_()
    out, _ = attention_of_float8(**tensors)
    with pytest.raises(NotImplementedError, match="attention: has no gradients of float8_e4m3fn"):
        out.sum().backward()


def test_backward_can_be_called_again_on_a_kept_graph():
    q = Torch("").make(everything("float32")["q"]).requires_grad_()
    out = cupyattn.attention(q, q, q)
    out.sum().backward(retain_graph=True)
    once = q.grad.clone()
    out.sum().backward()
    assert_same_bits(q.grad, 2 * once)


DIFFERENTIABLE = [*SMOOTH, attention_backward]
differentiable_calls = pytest.mark.parametrize("call", DIFFERENTIABLE, ids=lambda call: call.__name__)


def of_a_dual(function, x):
    from torch.autograd import forward_ad

    with forward_ad.dual_level():
        function(forward_ad.make_dual(x, x))


FORWARD_MODES = {
    "dual": of_a_dual,
    "dual that requires grad": lambda function, x: of_a_dual(function, x.requires_grad_()),
    "torch.func.jvp": lambda function, x: needs("torch").func.jvp(function, (x,), (x,)),
    "torch.func.linearize of what requires grad": lambda function, x: needs("torch").func.linearize(
        lambda y: function(x.requires_grad_() * 1 + y), x.detach()
    ),
    "jacobian": lambda function, x: needs("torch").autograd.functional.jacobian(
        function, x, vectorize=True, strategy="forward-mode"
    ),
}
ignore_torchs_own_script = pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")


@ignore_torchs_own_script
@pytest.mark.parametrize("way", FORWARD_MODES)
@differentiable_calls
def test_forward_mode_is_refused_and_not_dropped(call, way):
    tensors = as_tensors(operands_of(call))
    *_, name = (name for name, tensor in tensors.items() if tensor.is_floating_point())

    def of_one(x):
        return call(**{**tensors, name: x})[0]

    with pytest.raises(NotImplementedError, match=f"{title_of(call)}: has no forward-mode derivative"):
        FORWARD_MODES[way](of_one, tensors[name].clone())


@ignore_torchs_own_script
def test_what_has_no_tangent_takes_part_in_forward_mode():
    torch = needs("torch")
    from torch.autograd import forward_ad

    tensors = as_tensors({name: everything("float32")[name] for name in ("q", "k", "v")})
    out = cupyattn.attention(**tensors)
    primal, tangent = torch.func.jvp(lambda x: x * cupyattn.attention(**tensors), (2 * out,), (3 * out,))
    assert_same_bits(primal, 2 * out * out)
    assert_same_bits(tangent, 3 * out * out)
    with forward_ad.dual_level():
        assert_same_bits(cupyattn.attention(**tensors), out)


@ignore_torchs_own_script
def test_forward_mode_over_the_gradient_is_refused():
    torch = needs("torch")
    from torch.autograd import forward_ad

    q = Torch("").make(everything("float32")["q"]).requires_grad_()
    out = cupyattn.attention(q, q, q)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="attention: has no forward-mode derivative"):
        torch.autograd.grad(out, q, forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out)))


def functional(call, operands):
    """A loss of the floating operands of a call, and these, for torch.func."""
    tensors = as_tensors(operands)
    smooth = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}

    def loss(smooth):
        results = [x for x in call(**{**tensors, **smooth})[:2] if x is not None]
        return sum(x.masked_fill(x.isinf(), 0.0).sin().sum() for x in results)

    return loss, smooth


@smooth_calls
def test_torch_func_has_the_gradients_of_autograd(call):
    torch = needs("torch")
    loss, smooth = functional(call, operands_of(call, "float64"))
    found = torch.func.grad(loss)(smooth)
    pulled = torch.func.vjp(loss, smooth)[1](torch.ones((), dtype=torch.float64))[0]
    for tensor in smooth.values():
        tensor.requires_grad_()
    expected = dict(zip(smooth, torch.autograd.grad(loss(smooth), list(smooth.values())), strict=True))
    for name, gradient in expected.items():
        assert_same_bits(found[name], gradient)
        assert_same_bits(pulled[name], gradient)


@smooth_calls
def test_torchs_vmap_is_a_loop(call):
    """Alone, around a gradient and inside of one; what is not mapped over serves all."""
    torch = needs("torch")
    loss, smooth = functional(call, operands_of(call, "float64"))
    name, x = next(iter(smooth.items()))
    both = torch.stack([x, x.flip(0)], dim=1)

    def of_one(x):
        return loss({**smooth, name: x})

    found = torch.func.vmap(of_one, in_dims=1)(both)
    assert_same_bits(found, torch.stack([of_one(both[:, i]) for i in range(2)]))
    gradients = torch.stack([torch.func.grad(of_one)(both[:, i]) for i in range(2)])
    assert_same_bits(torch.func.vmap(torch.func.grad(of_one), in_dims=1)(both), gradients)
    inside = torch.func.grad(lambda x: torch.func.vmap(of_one, in_dims=1)(x).sum())(both)
    assert_same_bits(inside.movedim(1, 0), gradients)
    recorded = both.requires_grad_()
    torch.func.vmap(of_one, in_dims=1)(recorded).sum().backward()
    assert_same_bits(recorded.grad.movedim(1, 0), gradients)


def test_torchs_jacrev_is_the_jacobian():
    torch = needs("torch")
    x = torch.randn(1, 3, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def of_one(x):
        return cupyattn.attention(x, x, x)

    assert_same_bits(torch.func.jacrev(of_one)(x), torch.autograd.functional.jacobian(of_one, x))


def test_a_constant_inside_of_a_torch_func_transform_is_one():
    torch = needs("torch")
    tensors = as_tensors({name: everything("float32")[name] for name in ("q", "k", "v")})
    out = cupyattn.attention(**tensors)
    assert_same_bits(torch.func.grad(lambda x: (x * cupyattn.attention(**tensors)).sum())(out), out)
    scales = torch.tensor([1.0, 2.0])
    assert_same_bits(torch.func.vmap(lambda s: s * cupyattn.attention(**tensors))(scales)[1], 2 * out)
    mapped = torch.func.vmap(lambda q: cupyattn.attention_backward(q, q, tensors["k"], tensors["v"]).dk)(
        torch.stack([tensors["q"], out])
    )
    assert_same_bits(mapped[1], cupyattn.attention_backward(out, out, tensors["k"], tensors["v"]).dk)


@ignore_torchs_own_script
@pytest.mark.parametrize("outer", ["grad", "jacrev", "hessian"])
def test_second_derivatives_of_torch_func_are_refused_in_words(outer):
    torch = needs("torch")
    q = Torch("").make(everything("float32")["q"])
    loss = lambda q: cupyattn.attention(q, q, q).sum()  # noqa: E731
    twice = {
        "grad": torch.func.grad(lambda q: torch.func.grad(loss)(q).sum()),
        "jacrev": torch.func.jacrev(torch.func.jacrev(loss)),
        "hessian": torch.func.hessian(loss),
    }[outer]
    with pytest.raises(
        (RuntimeError, NotImplementedError), match=r"attention: has (first derivatives only|no forward-mode)"
    ):
        twice(q)
    with pytest.raises(RuntimeError, match="attention_backward: has first derivatives only"):
        torch.func.grad(lambda q: cupyattn.attention_backward(q, q, q, q).dq.sum())(q)


def test_what_vmap_cannot_do_is_refused_in_words():
    torch = needs("torch")
    q = Torch("").make(everything("float32")["q"])
    with pytest.raises(ValueError, match="attention: vmap has to be over at least one"):
        torch.func.vmap(lambda q: cupyattn.attention(q, q, q))(q[None][:0])
    out = cupyattn.attention(q.requires_grad_(), q, q)
    with pytest.raises(NotImplementedError, match=r"attention: takes one gradient at a time, .*is_grads_batched=True"):
        torch.autograd.grad(out, q, torch.ones(2, *out.shape), is_grads_batched=True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@smooth_calls
def test_results_may_be_overwritten_where_their_gradient_does_not_need_them(call, dtype):
    """The caller's results are kept for the backward pass only where lse was asked for, and none was rounded."""
    torch = needs("torch")
    operands = operands_of(call, dtype)
    tensors = as_tensors(operands)
    smooth = [tensor.requires_grad_() for tensor in tensors.values() if tensor.is_floating_point()]
    results = [x for x in call(**tensors)[:2] if x is not None]
    losses = [3 * (x.add_(1) if i == 0 else x).masked_fill(x.isinf(), 0.0).sum() for i, x in enumerate(results)]
    has_lse = len(results) > 1 and call is not merge_states
    if dtype == "float64" and has_lse:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(sum(losses), smooth, allow_unused=True)
        return
    found = torch.autograd.grad(sum(losses), smooth, allow_unused=True)
    again = [x for x in call(**tensors)[:2] if x is not None]
    expected = torch.autograd.grad(
        sum(3 * x.masked_fill(x.isinf(), 0.0).sum() for x in again), smooth, allow_unused=True
    )
    assert_same_results(found, expected)


def test_float32_arithmetic_of_float32_tensors_keeps_its_results():
    torch = needs("torch")
    q = Torch("").make(everything("float32")["q"]).requires_grad_()
    for options in ({}, {"compute_dtype": "float32"}):
        cupyattn.attention(q, q, q, **options).add_(1).sum().backward()
    out, _ = cupyattn.attention(q, q, q, compute_dtype="float32", return_lse=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.add_(1).sum().backward()
    assert torch.is_tensor(q.grad)


@pytest.mark.parametrize("device", ["meta", "cpu"])
@calls
def test_torchs_default_device_changes_nothing(call, device):
    torch = needs("torch")
    operands = operands_of(call)
    tensors = as_tensors(operands)
    with torch.device(device):
        found = call(**tensors)
    assert_same_results(found, call(**operands))


def test_a_seed_is_drawn_on_the_cpu_whatever_the_default_device_is():
    torch = needs("torch")
    tensors = as_tensors({name: everything("float32")[name] for name in ("q", "k", "v")})
    with torch.random.fork_rng():
        torch.manual_seed(1)
        expected = dropped(**tensors)
        torch.manual_seed(1)
        with torch.device("meta"):
            assert_same_bits(dropped(**tensors), expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors is in prototype:UserWarning")
def test_tensors_that_wrap_others_are_refused_by_name():
    """What they stand for is not what is in their memory, if they have any."""
    torch = needs("torch")
    from torch.masked import masked_tensor

    q = torch.ones(1, 2, 2, 4)
    with pytest.raises(TypeError, match="attention: k is a MaskedTensor, which has no memory of its own"):
        cupyattn.attention(q, masked_tensor(q, q > 0), q)


def kinds_of_tensors():
    torch = needs("torch")

    class Meaning(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            return super().__torch_function__(function, types, args, kwargs or {})

    class Plain(torch.Tensor):
        pass

    return Meaning, Plain


@calls
def test_a_tensor_with_a_torch_function_of_its_own_is_refused_in_every_place(call):
    meaning, plain = kinds_of_tensors()
    operands = operands_of(call)
    for name in operands:
        tensors = as_tensors(operands)
        tensors[name] = tensors[name].as_subclass(meaning)
        with pytest.raises(TypeError, match=rf"{title_of(call)}: .* is a Meaning, which says by __torch_function__"):
            call(**tensors)
    torch = needs("torch")
    parameters = {n: torch.nn.Parameter(x) if x.is_floating_point() else x for n, x in as_tensors(operands).items()}
    others = {name: x.as_subclass(plain) for name, x in as_tensors(operands).items()}
    buffers = {name: torch.nn.Buffer(x) for name, x in as_tensors(operands).items()}
    for arrays in (parameters, others, buffers):
        with torch.no_grad():
            assert_same_results(call(**arrays), call(**operands))


@calls
def test_one_tensor_of_a_subclass_makes_results_of_it_as_torchs_own_functions_do(call):
    torch = needs("torch")
    _, plain = kinds_of_tensors()
    more, other = type("More", (plain,), {}), type("Other", (torch.Tensor,), {})
    for name in operands_of(call):
        tensors = as_tensors(operands_of(call))
        tensors[name] = tensors[name].as_subclass(plain)
        assert kinds_of(call(**tensors)) == {plain}
    kinds = [plain, more, torch.Tensor, torch.nn.Parameter]
    tensors = {
        n: torch.nn.Parameter(x) if i == 3 and x.is_floating_point() else x.as_subclass(kinds[i % 3])
        for i, (n, x) in enumerate(as_tensors(operands_of(call)).items())
    }
    with torch.no_grad():
        assert kinds_of(call(**tensors)) == {more if len(tensors) > 1 else plain}
    with torch._C.DisableTorchFunctionSubclass():
        assert kinds_of(call(**tensors)) == {torch.Tensor}
    if len(tensors) > 1:
        first, second, *_ = tensors
        tensors |= {first: tensors[first].as_subclass(other)}
        tensors |= {second: tensors[second].as_subclass(plain)}
        with pytest.raises(TypeError, match=rf"^{title_of(call)}: results would be of the type of one of these"):
            call(**tensors)


def kinds_of(results):
    torch = needs("torch")
    return {type(x) for x in results if isinstance(x, torch.Tensor)}


def test_gradients_through_a_subclass_are_of_it():
    _, plain = kinds_of_tensors()
    torch = needs("torch")
    tensors = as_tensors({name: everything("float32")[name] for name in ("q", "k", "v")})
    q, k, v = (x.as_subclass(plain).requires_grad_() for x in tensors.values())
    gradients = []
    for sdpa in (cupyattn.scaled_dot_product_attention, torch.nn.functional.scaled_dot_product_attention):
        out = sdpa(*(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=True)
        assert type(out) is plain
        gradients.append(torch.autograd.grad(out.sum(), (q, k, v)))
    for a, b in zip(*gradients, strict=True):
        assert type(a) is type(b) is plain
        assert_matches(a, b, rtol=1e-4, atol=1e-5)


def test_explain_refuses_tensors_with_a_meaning_of_their_own():
    torch = needs("torch")
    from torch.nn.attention.bias import causal_upper_left

    meaning, _ = kinds_of_tensors()
    q = torch.ones(1, 4, 2, 8)
    with pytest.raises(TypeError, match=r"explain: bias is a CausalBias, .* pass causal=True and its alignment"):
        cupyattn.explain(q, q, q, bias=causal_upper_left(4, 4))
    for strange in (q.as_subclass(meaning), q.to("meta").as_subclass(meaning)):
        with pytest.raises(TypeError, match="explain: k is a Meaning"):
            cupyattn.explain(q, strange, q)


# Autocast ------------------------------------------------------------------------------------------


def under_autocast(dtype="bfloat16"):
    torch = needs("torch")
    return torch.autocast("cpu", dtype=getattr(torch, dtype))


CAST = {
    *("q", "k", "v", "query", "key", "value", "rows", "keys", "values", "qkv", "kv", "bias", "dout"),
    *("packed_q", "packed_k", "packed_v", "pages_k", "pages_v"),
}
"""Operands that torch.autocast casts."""
ATTENTIONS = [call for call in SMOOTH if call is not merge_states and not call.__name__.startswith("apply_rotary")]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("call", ATTENTIONS, ids=lambda call: call.__name__)
def test_autocast_casts_q_k_v_and_a_bias_and_gradients_come_back(call, dtype):
    """As torch's own function does; the same as if the caller had cast them."""
    torch = needs("torch")
    operands = operands_of(call)
    tensors, cast = as_tensors(operands), as_tensors(operands)
    leaves = {name: x.requires_grad_() for name, x in tensors.items() if x.is_floating_point()}
    others = {name: x.requires_grad_() for name, x in cast.items() if x.is_floating_point()}
    expected = call(**{name: x.to(getattr(torch, dtype)) if name in CAST else x for name, x in cast.items()})
    with under_autocast(dtype):
        found = call(**tensors)
    assert dtype_name(found[0]) == dtype
    assert_same_results(found, expected)
    gradients = [torch.autograd.grad(results[0].float().sum(), list(x.values()), allow_unused=True)
                 for results, x in ((found, leaves), (expected, others))]  # fmt: skip
    assert_same_results(*gradients)
    assert {g.dtype for g in gradients[0] if g is not None} == {torch.float32}
    outside = call(**tensors)
    with torch.autocast("cpu", enabled=False):
        assert_same_results(call(**tensors), outside)


def test_under_autocast_sdpa_takes_what_torchs_own_takes():
    torch = needs("torch")
    q, k = torch.randn(2, 1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    bias = torch.randn(5, 5, generator=torch.Generator().manual_seed(1))
    peer, ours = torch.nn.functional.scaled_dot_product_attention, cupyattn.scaled_dot_product_attention
    for dtype in ("bfloat16", "float16"):
        with under_autocast(dtype):
            for v in (k, k.bfloat16(), k.half()):
                for mask in (None, bias, bias.half(), bias.bfloat16(), bias > 0):
                    found, wanted = ours(q, k, v, mask), peer(q, k, v, mask)
                    assert found.dtype == wanted.dtype
                    assert_matches(found, wanted.double(), rtol=2.0**-5, atol=2.0**-6)
            assert ours(q.double(), k.double(), k.double()).dtype == torch.float64
            with pytest.raises(TypeError, match="have to be of one dtype"):
                ours(q.double(), k, k)
            assert dtype_name(cupyattn.attention(q.numpy(), k.numpy(), k.numpy())) == "float32"


def test_under_autocast_attention_backward_gives_gradients_in_the_dtypes_of_its_arguments():
    torch = needs("torch")
    operands = {name: everything("float32")[name] for name in ("dout", "q", "k", "v", "bias")}
    tensors = as_tensors(operands)
    expected = cupyattn.attention_backward(**{name: x.bfloat16() for name, x in tensors.items()})
    with under_autocast():
        found = cupyattn.attention_backward(**tensors)
        again = cupyattn.attention_backward(**(tensors | {"dout": tensors["dout"].bfloat16()}))
    for gradients in (found, again):
        for gradient, wanted in zip(gradients[:4], expected[:4], strict=True):
            assert gradient.dtype == torch.float32
            assert_same_bits(gradient, wanted.float())


CACHES = [
    *(cupyattn.DynamicCache, lambda: cupyattn.StaticCache(16), lambda: cupyattn.SlidingWindowCache(16)),
    *(lambda: cupyattn.PagedCache(8, 4), cupyattn.OffloadedCache),
]


@pytest.mark.parametrize("make", CACHES, ids=["dynamic", "static", "sliding", "paged", "offloaded"])
def test_under_autocast_caches_keep_what_it_casts_to(make):
    torch = needs("torch")
    q, k, v = (x for x in as_tensors({n: everything("float32")[n] for n in ("q", "k", "v")}).values())
    cache, narrow = make(), make()
    with under_autocast(), torch.no_grad():
        for part in (slice(0, 6), slice(6, 7)):
            cache.append(k[:, part], v[:, part])
        found = cache.attend(q)
    narrow.append(k.bfloat16(), v.bfloat16())
    assert cache.nbytes == narrow.nbytes
    assert_same_bits(found, narrow.attend(q.bfloat16()))
    with pytest.raises(TypeError, match="has to be of the cache's dtype, bfloat16"):
        cache.append(k, v)


def test_under_autocast_a_cache_that_is_written_to_stays_what_it_is():
    q, k, v = (x for x in as_tensors({n: everything("float32")[n] for n in ("q", "k", "v")}).values())
    new = k[:, :1] + 1
    wide, narrow = [k.clone(), v.clone()], [k.bfloat16(), v.bfloat16()]
    with under_autocast(), pytest.raises(TypeError, match="flash_attn_with_kvcache: q, k_cache, v_cache have to be"):
        cupyattn.flash_attn_with_kvcache(q, *wide, new, new, cache_seqlens=3)
    assert_same_results(wide, [k, v])
    with under_autocast():
        found = cupyattn.flash_attn_with_kvcache(q, *narrow, new, new, cache_seqlens=3)
    assert_same_bits(narrow[0][:, 3:4], new.bfloat16())
    again = [k.bfloat16(), v.bfloat16()]
    assert_same_bits(
        found, cupyattn.flash_attn_with_kvcache(q.bfloat16(), *again, *[new.bfloat16()] * 2, cache_seqlens=3)
    )


def test_a_compiled_function_knows_of_autocast():
    torch = needs("torch")
    q, k, v = (x for x in as_tensors({n: everything("float32")[n] for n in ("q", "k", "v")}).values())
    torch.compiler.reset()
    compiled = torch.compile(lambda q, k, v: 2 * cupyattn.attention(q, k, v), backend="eager")
    with under_autocast():
        found = compiled(q, k, v)
    assert_same_bits(found, 2 * cupyattn.attention(q.bfloat16(), k.bfloat16(), v.bfloat16()))


# Traces --------------------------------------------------------------------------------------------


def by_jit(function, tensors):
    torch = needs("torch")
    return torch.jit.trace(function, tensors, check_trace=False)


def by_make_fx(function, tensors, **options):
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(function, **options)(*tensors)


def by_export(function, tensors):
    torch = needs("torch")

    class Model(torch.nn.Module):
        def forward(self, *tensors):
            return function(*tensors)

    return torch.export.export(Model(), tensors, strict=False).module()


TRACES = {
    "torch.jit.trace": by_jit,
    "make_fx": by_make_fx,
    "make_fx, pre-dispatch": lambda function, tensors: by_make_fx(function, tensors, pre_dispatch=True),
    "make_fx, fake": lambda function, tensors: by_make_fx(function, tensors, tracing_mode="fake"),
    "torch.export": by_export,
}


def append_to_a_cache(k, v):
    cupyattn.DynamicCache().append(k, v)


ignore_traces = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:Converting a tensor")


@ignore_traces
@pytest.mark.parametrize(
    ("call", "way"),
    [*((append_to_a_cache, way) for way in TRACES), (unpad_input, "make_fx"), (unpad_input, "make_fx, pre-dispatch")],
)
def test_a_trace_that_would_keep_the_examples_numbers_is_refused_in_words(call, way):
    needs("torch")
    tensors = as_tensors(operands_of(call))

    def function(*values):
        return call(**dict(zip(tensors, values, strict=True)))

    with pytest.raises(NotImplementedError, match=r"(unpad_input|append): cannot be traced by .* are recorded"):
        TRACES[way](function, tuple(tensors.values()))
    call(**tensors)  # once it is over nothing is traced


@ignore_traces
@pytest.mark.parametrize("way", ["torch.jit.trace", "make_fx, fake", "torch.export"])
def test_a_trace_of_symbols_has_as_many_rows_as_any_mask_says(way):
    torch = needs("torch")
    values = torch.arange(24.0).reshape(2, 3, 4)
    example, other = torch.tensor([[1, 1, 1], [1, 0, 0]]), torch.tensor([[1, 0, 0], [0, 1, 1]])
    traced = TRACES[way](lambda *given: cupyattn.unpad_input(*given), (values, example))
    expected = cupyattn.unpad_input(values, other)
    for found, wanted in zip(traced(values, other), expected, strict=True):
        assert torch.equal(torch.as_tensor(found), torch.as_tensor(wanted))


@ignore_traces
def test_whoever_only_looks_on_is_no_trace():
    needs("torch")
    from torch.utils.flop_counter import FlopCounterMode

    tensors = as_tensors(operands_of(attention))
    with FlopCounterMode(display=False):
        assert_same_results(attention(**tensors), attention(**operands_of(attention)))


@ignore_traces
@pytest.mark.parametrize("way", TRACES)
def test_an_operator_whose_implementation_calls_attention_is_recorded(way):
    torch = needs("torch")
    if not hasattr(torch.ops.cupyattn_tests, "attention"):
        operator = torch.library.custom_op(
            "cupyattn_tests::attention",
            lambda q, k, v: cupyattn.attention(q, k, v),
            mutates_args=(),
            schema="(Tensor q, Tensor k, Tensor v) -> Tensor",
        )
        operator.register_fake(lambda q, k, v: q.new_empty(q.shape))
    first, second = (
        tuple(as_tensors({n: everything("float32", seed)[n] for n in ("q", "k", "v")}).values()) for seed in (3, 4)
    )
    traced = TRACES[way](lambda q, k, v: torch.ops.cupyattn_tests.attention(q, k, v), first)
    assert_same_bits(traced(*second), cupyattn.attention(*second))


def test_tensors_without_values_are_refused_by_name_where_results_would_depend_on_them():
    torch = needs("torch")
    from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

    operands = as_tensors(operands_of(unpad_input))
    with pytest.raises(TypeError, match="unpad_input: needs the values of attention_mask"):
        unpad_input(**{name: tensor.to("meta") for name, tensor in operands.items()})
    with FakeTensorMode():
        fake = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in operands.items()}
    with pytest.raises(DynamicOutputShapeException, match="unpad_input"):  # as torch.nonzero without a ShapeEnv
        unpad_input(**fake)


# ---------------------------------------------------------------------------------------------------
# JAX
# ---------------------------------------------------------------------------------------------------


@smooth_calls
def test_jaxs_gradients_are_torchs(call):
    jax = needs("jax")
    operands = operands_of(call)
    cotangents = cotangents_of(call, operands)
    expected = torch_gradients(call, operands, cotangents)
    arrays = {name: jax.numpy.asarray(array) for name, array in operands.items()}
    smooth = {name: array for name, array in arrays.items() if is_floating(operands[name])}

    def outcome(smooth):
        return [x for x in call(**{**arrays, **smooth})[:2] if x is not None]

    def pull_back(smooth, cotangents):
        return jax.vjp(outcome, smooth)[1](cotangents)[0]

    for way in (pull_back, jax.jit(pull_back)):
        found = way(smooth, [jax.numpy.asarray(x) for x in cotangents])
        for name, gradient in found.items():
            assert gradient.dtype == operands[name].dtype
            assert_same_bits(gradient, expected[name])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_jaxs_gradients_are_those_of_attention_backward(dtype):
    jax = needs("jax")
    operands = operands_of(attention, dtype)
    operands.pop("mask")
    dout, dlse = cotangents_of(unmasked_attention, operands)

    def loss(*values):
        out, lse = unmasked_attention(*values)
        return (out.astype("float32") * dout.astype("float32")).sum() + (lse * dlse).sum()

    found = jax.grad(loss, argnums=range(6))(*(jax.numpy.asarray(x) for x in operands.values()))
    assert_same_results(found, unmasked_attention_backward(dout, dlse, operands))


@pytest.mark.parametrize("name", ["q", "k_descale"])
def test_jaxs_gradients_of_float8_are_refused_in_words(name):
    jax = needs("jax")
    arrays = {key: Jax(FLOAT8).make(array) for key, array in float8_operands().items()}

    def loss(array):
        return attention_of_float8(**{**arrays, name: array})[0].astype("float32").sum()

    with pytest.raises(NotImplementedError, match="attention: has no gradients of float8_e4m3fn"):
        jax.grad(loss)(arrays[name])


def test_jax_differentiates_what_is_asked_for_and_leaves_the_rest_alone():
    jax = needs("jax")
    q, k, v, mask = (jax.numpy.asarray(everything("float32")[name]) for name in ("q", "k", "v", "mask"))
    dout = everything("float32")["dout"]
    found = jax.grad(lambda v: (cupyattn.attention(q, k, v, mask=mask) * dout).sum())(v)
    expected = cupyattn.attention_backward(dout, *(to_float32(x) for x in (q, k, v)), mask=np.asarray(mask)).dv
    assert_same_bits(found, expected)


def to_float32(array):
    return to_numpy(array).astype(np.float32)


def test_jaxs_vmap_is_a_loop():
    jax = needs("jax")
    rng = np.random.default_rng(5)
    q, k, v = (jax.numpy.asarray(rng.standard_normal((3, 2, n, 2, 4)).astype(np.float32)) for n in (4, 5, 5))
    expected = np.stack([cupyattn.attention(*(np.asarray(x[i]) for x in (q, k, v))) for i in range(3)])
    assert_same_bits(jax.vmap(cupyattn.attention)(q, k, v), expected)
    assert_same_bits(jax.jit(jax.vmap(cupyattn.attention))(q, k, v), expected)
    shared = jax.vmap(cupyattn.attention, in_axes=(0, None, None))(q, k[0], v[0])
    assert_same_bits(shared[1], cupyattn.attention(*(np.asarray(x) for x in (q[1], k[0], v[0]))))
    gradient = jax.vmap(jax.grad(lambda *x: cupyattn.attention(*x).sum()))(q, k, v)
    ones = np.ones(q.shape[1:], np.float32)
    assert_same_bits(gradient[2], cupyattn.attention_backward(ones, *(np.asarray(x[2]) for x in (q, k, v))).dq)


SECOND_DERIVATIVES = {
    "grad of grad": lambda jax, f, q: jax.grad(lambda q: (jax.grad(f)(q) ** 2).sum())(q),
    "hessian": lambda jax, f, q: jax.hessian(f)(q),
    "hessian-vector product": lambda jax, f, q: jax.jvp(jax.grad(f), (q,), (q,)),
    "jit": lambda jax, f, q: jax.jit(jax.grad(lambda q: (jax.grad(f)(q) ** 2).sum()))(q),
}


@pytest.mark.parametrize("way", SECOND_DERIVATIVES)
def test_second_derivatives_of_jax_are_refused_in_our_words(way):
    jax = needs("jax")
    q, k, v = (jax.numpy.asarray(everything("float32")[name]) for name in ("q", "k", "v"))
    with pytest.raises(NotImplementedError, match="attention: has first derivatives only"):
        SECOND_DERIVATIVES[way](jax, lambda q: (cupyattn.attention(q, k, v) ** 2).sum(), q)


@pytest.mark.parametrize("way", ["jvp", "jacfwd", "jit of jacfwd"])
@pytest.mark.parametrize("call", [attention, merge_states, flash_attn_varlen_func], ids=lambda call: call.__name__)
def test_forward_mode_of_jax_is_refused_in_our_words(call, way):
    jax = needs("jax")
    arrays = {name: jax.numpy.asarray(array) for name, array in operands_of(call).items()}
    first = next(iter(arrays))

    def of_one(x):
        return call(**{**arrays, first: x})[0]

    ways = {
        "jvp": lambda x: jax.jvp(of_one, (x,), (x,)),
        "jacfwd": jax.jacfwd(of_one),
        "jit of jacfwd": jax.jit(jax.jacfwd(of_one)),
    }
    with pytest.raises(NotImplementedError, match=f"{title_of(call)}: has no forward-mode derivative; jax.grad"):
        ways[way](arrays[first])


def test_the_gradient_of_jaxs_attention_backward_is_refused_in_our_words():
    jax = needs("jax")
    q = jax.numpy.asarray(everything("float32")["q"])
    with pytest.raises(NotImplementedError, match="attention_backward: has first derivatives only"):
        jax.grad(lambda q: cupyattn.attention_backward(q, q, q, q).dq.sum())(q)


def test_under_jit_wrong_sequences_are_refused_when_they_are_seen():
    jax = needs("jax")
    arrays = {name: jax.numpy.asarray(x) for name, x in operands_of(flash_attn_varlen_func).items()}
    arrays["cu_seqlens_q"] = jax.numpy.asarray(np.array([0, 3, 99], np.int32))
    with pytest.raises(Exception, match="cu_seqlens_q ends after the last row"):
        jax.block_until_ready(jax.jit(flash_attn_varlen_func)(**arrays))


def test_what_jax_traces_cannot_be_a_number_of_ours():
    jax = needs("jax")
    q = jax.numpy.ones((2, 4, 2, 8))
    angles = jax.numpy.ones((9, 4))
    starts = jax.numpy.array([0, 4], "int32")
    for name, call in {
        "dropout_seed": lambda x, n: cupyattn.attention(x, x, x, dropout_p=0.5, dropout_seed=n),
        "dropout_p": lambda x, n: cupyattn.attention(x, x, x, dropout_p=n, dropout_seed=1),
        "softmax_scale": lambda x, n: cupyattn.attention(x, x, x, softmax_scale=n),
        "window_size": lambda x, n: cupyattn.attention(x, x, x, window_size=(n, 0)),
        "causal": lambda x, n: cupyattn.attention(x, x, x, causal=n),
        "max_seqlen_q": lambda x, n: cupyattn.flash_attn_varlen_func(x[0], x[0], x[0], starts, starts, n, n),
        "max_seqlen": lambda x, n: cupyattn.apply_rotary_emb(x[0], angles, angles, cu_seqlens=starts, max_seqlen=n),
        "batch": lambda x, n: cupyattn.pad_input(x, starts, n, 1),
    }.items():
        with pytest.raises(TypeError, match=rf"\w+: {name} has to be .*\n    {name} .*Tracer"):
            jax.jit(call)(q, 2)


def test_a_description_of_an_array_is_no_array():
    jax = needs("jax")
    described = jax.ShapeDtypeStruct((1, 2, 2, 4), "float32")
    with pytest.raises(TypeError, match="attention: q has to be an array"):
        cupyattn.attention(described, described, described)
    out = jax.eval_shape(cupyattn.attention, described, described, described)
    assert (out.shape, out.dtype) == ((1, 2, 2, 4), np.float32)


SHARDED = """
    import jax, numpy as np, cupyattn
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 4, 2, 8), np.float32)
    out, lse = cupyattn.attention(q, k, v, return_lse=True)
    gradients = cupyattn.attention_backward(np.ones_like(out), q, k, v)
    everywhere = NamedSharding(mesh, PartitionSpec())

    def check(found, expected, sharding=None):
        np.testing.assert_array_equal(np.asarray(found), expected)
        assert len(found.devices()) == 2, found.sharding
        assert sharding is None or found.sharding.is_equivalent_to(sharding, found.ndim), found.sharding
        assert (found + 1).shape == expected.shape  # it can be computed with

    def loss(*arrays):
        return cupyattn.attention(*arrays).sum()

    for axis in range(5):  # the fifth: a copy on each device
        sharding = NamedSharding(mesh, PartitionSpec(*(None,) * axis, *("x",) * (axis < 4)))
        arrays = [jax.device_put(x, sharding) for x in (q, k, v)]
        found = cupyattn.attention(*arrays, return_lse=True)
        check(found[0], out, sharding)
        check(found[1], lse, everywhere)
        for x, y in zip(cupyattn.attention_backward(jax.numpy.ones_like(arrays[0]), *arrays)[:3], gradients):
            check(x, y, sharding)
        for x, y in zip(jax.grad(loss, (0, 1, 2))(*arrays), gradients):
            check(x, y, sharding)
        check(jax.jit(cupyattn.attention)(*arrays), out)
        check(jax.jit(jax.grad(loss))(*arrays), gradients.dq)
        check(jax.vmap(lambda q: cupyattn.attention(q[None], q[None], q[None]))(arrays[0])[:, 0],
              cupyattn.attention(q, q, q))
        mask = jax.device_put(np.array([[1, 1, 1, 0], [1, 0, 0, 0]], bool), everywhere)
        rows, indices, starts, _, used = cupyattn.unpad_input(arrays[0], mask)
        check(starts, np.array([0, 3, 4]), everywhere)
        check(used, np.array([3, 1]), everywhere)
        check(cupyattn.pad_input(rows, indices, 2, 4), np.where(np.asarray(mask)[..., None, None], q, 0))
    try:
        cupyattn.attention(arrays[0], k_alone := jax.numpy.asarray(k), k_alone)
    except ValueError as error:
        assert "all arrays have to be on one device" in str(error)
    else:
        raise AssertionError
    one = jax.device_put(q, jax.devices()[1])
    assert cupyattn.attention(one, one, one, return_lse=True)[1].devices() == {jax.devices()[1]}
"""


def test_jax_arrays_on_several_devices_stay_there():
    """In a process of its own: a process decides once how many devices a CPU is."""
    needs("jax")
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": str(Path(cupyattn.__file__).parents[1]),
    }
    command = [sys.executable, "-c", textwrap.dedent(SHARDED)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------------
# dask
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [*SMOOTH, attention_backward], ids=lambda call: call.__name__)
def test_dask_computes_nothing_before_it_is_asked(call):
    dask = needs("dask")
    array = needs("dask.array")
    seen = []

    def load(x):
        seen.append(x.shape)
        return x

    operands = operands_of(call)
    lazy = {n: array.from_delayed(dask.delayed(load)(x), x.shape, x.dtype) for n, x in operands.items()}
    found = call(**lazy)
    assert not seen
    expected = [x for x in call(**operands) if x is not None]
    assert_same_results(dask.compute(*(x for x in found if x is not None)), expected)
    assert len(seen) == len(operands)  # all results come from one run


def test_dask_arrays_of_unknown_size_are_refused():
    array = needs("dask.array")
    q = array.ones((2, 5, 2, 8), chunks=2)
    unknown = q[q[:, 0, 0, 0] > 0]
    with pytest.raises(TypeError, match=r"k has chunks of unknown size; call its compute_chunk_sizes\(\) first"):
        cupyattn.attention(q, unknown, unknown)


# ---------------------------------------------------------------------------------------------------
# Refused
# ---------------------------------------------------------------------------------------------------

COMPANIONS = {
    *("mask", "bias", "slopes", "sinks", "cu_seqlens_q", "cu_seqlens_k", "block_table", "cos", "sin", "offsets"),
    *("attention_mask", "unused_mask", "indices"),
}
"""Operands that may be NumPy's beside arrays of another library."""
OTHERS = [Torch("float32"), Jax("float32"), Strict("float32"), Dask("float32")]


@pytest.mark.parametrize("home", OTHERS, ids=str)
@pytest.mark.parametrize("call", [c for c in CALLS if c is not flash_attn_qkvpacked_func], ids=lambda c: c.__name__)
def test_arrays_of_two_libraries_are_refused(call, home):
    operands = operands_of(call)
    own = [name for name in operands if name not in COMPANIONS]
    for strangers in ([own[0]], [own[-1]], list(operands)[-1:]):
        if strangers == own:  # all others are companions
            continue
        mixed = {name: home.make(x) if name in strangers else x for name, x in operands.items()}
        expected = rf"(?s){title_of(call)}: all arrays have to be of one library.*numpy\.ndarray"
        with pytest.raises(TypeError, match=expected):
            call(**mixed)


@pytest.mark.parametrize("home", [*OTHERS, Jax("float32", jit=True)], ids=str)
@pytest.mark.parametrize("call", [c for c in CALLS if COMPANIONS & operands_of(c).keys()], ids=lambda c: c.__name__)
def test_what_goes_with_q_k_and_v_may_be_numpys(call, home):
    """Masks, biases, slopes, sinks, rotary tables and index arrays, in any memory: read-only, of another byte order."""
    operands = operands_of(call)
    if call in PADDING and home.lazy:
        return
    if call is pad_input and isinstance(home, Dask):
        return
    given = {name: as_stranger(x) if name in COMPANIONS else home.make(x) for name, x in operands.items()}
    if isinstance(home, Jax) and home.jit:
        constants = {name: x for name, x in given.items() if name in COMPANIONS}
        found = home.call(
            lambda **own: call(**own, **constants), {n: x for n, x in given.items() if n not in constants}
        )
    else:
        found = call(**given)
    assert_same_results(found, call(**operands))
    for name in COMPANIONS & operands.keys():
        assert_same_bits(given[name], operands[name])


def as_stranger(array):
    array = array.astype(array.dtype.newbyteorder(">"))[::-1].copy()[::-1]
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("home", [home for home in OTHERS if not home.lazy], ids=str)
def test_descales_and_cache_indices_may_be_numpys(home):
    drawn = everything("float32")
    q, k, v = (drawn[name] for name in ("q", "k", "v"))
    seqlens, padding = np.array([7, 3], np.int32), np.array([1, 0], np.int32)
    expected = cupyattn.flash_attn_with_kvcache(q, k, v, cache_seqlens=seqlens, cache_leftpad=padding)
    found = cupyattn.flash_attn_with_kvcache(
        *(home.make(x) for x in (q, k, v)), cache_seqlens=seqlens, cache_leftpad=padding
    )
    assert_same_bits(found, expected)
    common = cupyattn.cascade_attention(q, k[0], v[0], k, v, sinks=drawn["sinks"])
    mixed = cupyattn.cascade_attention(*map(home.make, (q, k[0], v[0], k, v)), sinks=drawn["sinks"])
    assert_same_bits(mixed, common)


def test_descales_of_float8_tensors_may_be_numpys():
    operands = float8_operands()
    given = {name: x if "descale" in name else Torch(FLOAT8).make(x) for name, x in operands.items()}
    assert_same_results(attention_of_float8(**given), attention_of_float8(**operands))


def test_numpys_mask_is_copied_and_may_change_before_the_gradient():
    operands = {name: everything("float32")[name] for name in ("q", "k", "v")}
    bias = everything("float32")["bias"].copy()
    dout = everything("float32")["dout"]
    expected = cupyattn.attention_backward(dout, **operands, bias=bias).dq
    tensors = as_tensors(operands)
    out = cupyattn.attention(tensors["q"].requires_grad_(), tensors["k"], tensors["v"], bias=bias)
    bias[...] = 0
    out.backward(Torch("").make(dout))
    assert_same_bits(tensors["q"].grad, expected)


def test_integers_that_jax_cannot_hold_are_refused_and_not_wrapped():
    jax = needs("jax")
    x, angles = jax.numpy.ones((1, 2, 2, 4)), np.ones((5, 2), np.float32)
    with pytest.raises(ValueError, match="apply_rotary_emb: seqlen_offsets holds numbers that are too large for int32"):
        cupyattn.apply_rotary_emb(x, angles, angles, seqlen_offsets=np.array([2**32 + 1]))


def test_the_refusal_of_two_libraries_names_each_argument():
    torch = needs("torch")
    q = np.ones((1, 2, 2, 4), np.float32)
    with pytest.raises(TypeError) as caught:
        cupyattn.scaled_dot_product_attention(q, torch.ones(1, 2, 2, 4), q, torch.ones(2, 2, dtype=torch.bool))
    for line in ("query      numpy.ndarray", "key        torch.Tensor", "attn_mask  torch.Tensor"):
        assert line in str(caught.value)


def test_arrays_on_two_devices_are_refused_by_name():
    q, far = Strict("float32").make(np.ones((1, 2, 2, 4), np.float32)), Strict("float32", "device1")
    with pytest.raises(ValueError, match=r"attention: all arrays have to be on one device") as caught:
        cupyattn.attention(q, q, far.make(np.ones((1, 2, 2, 4), np.float32)))
    assert "v  array_api_strict.Device('device1')" in str(caught.value)
    q = Torch("").make(np.ones((1, 2, 2, 4), np.float32))
    with pytest.raises(ValueError, match=r"attention: all arrays have to be on one device") as caught:
        cupyattn.attention(q, q.to("meta"), q)
    assert "k  meta" in str(caught.value)


@pytest.mark.parametrize(
    "stranger", [None, 3.0, [[[[1.0]]]], "q", np.float32(1), object()], ids=lambda x: type(x).__name__
)
def test_what_is_no_array_is_refused_by_name(stranger):
    q = np.ones((1, 1, 1, 1), np.float32)
    for arguments, name in (((stranger, q, q), "q"), ((q, stranger, q), "k"), ((q, q, stranger), "v")):
        with pytest.raises(TypeError, match=rf"attention: .*\n(    .*\n)*    {name}  .*{type(stranger).__name__}"):
            cupyattn.attention(*arguments)


def test_a_nested_list_is_refused_in_a_line_that_says_what_to_do():
    q = np.ones((1, 8, 8, 8), np.float32)
    with pytest.raises(TypeError, match=r"q has to be an array; numpy\.asarray makes one of a list") as caught:
        cupyattn.attention(q.tolist(), q, q)
    assert len(str(caught.value)) < 150


class Frame:
    """A table of pandas, for one: NumPy can make an array of it."""

    shape, __array__ = (4, 8), None

    def __repr__(self):
        return "   0  1\n0  1  2"


class Capsule:
    """What has DLPack and nothing else."""

    __dlpack__ = __dlpack_device__ = None


class Compressed:
    """A matrix of scipy.sparse, for one."""

    shape, toarray = (4, 8), None


@pytest.mark.parametrize(
    ("stranger", "way", "shown"),
    [
        (Frame(), "; numpy.asarray makes one of a Frame", "(4, 8)"),
        (Capsule(), "; numpy.from_dlpack makes one of a Capsule", "<"),
        (Compressed(), "; its toarray() is one", "(4, 8)"),
        (memoryview(np.ones(3)), "; numpy.asarray makes one of a memoryview", "(3,)"),
        (np.float32(1), "", "np.float32(1.0)"),
        (Frame, "", "<class"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_what_is_no_array_is_told_how_to_become_one(stranger, way, shown):
    q = np.ones((1, 8, 8, 8), np.float32)
    rule = re.escape(f"attention: k has to be an array{way}\n    k  {shown}")
    with pytest.raises(TypeError, match=rf"^{rule}[^\n]*$"):
        cupyattn.attention(q, stranger, q)


def test_arrays_whose_device_cannot_be_said_are_refused_by_name():
    """ndonnx's, for one."""

    class Placeless:
        shape, dtype, ndim, device = (1, 2, 2, 4), np.dtype("float32"), 4, None
        __dlpack__ = __array_namespace__ = lambda self, **arguments: None

        def __dlpack_device__(self):
            raise ValueError("no control over the used device")

    rule = r"q cannot say where it is \(no control over the used device\); pass a NumPy array of its values"
    with pytest.raises(TypeError, match=rf"attention: {rule}\n    q  \(1, 2, 2, 4\)  \w+\.Placeless$"):
        cupyattn.attention(Placeless(), Placeless(), Placeless())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_nested_tensors_are_told_of_packed_sequences():
    torch = needs("torch")
    parts = [torch.randn(3, 4, 8), torch.randn(5, 4, 8)]
    jagged = torch.nested.nested_tensor(parts, layout=torch.jagged)
    for nested in (jagged, torch.nested.nested_tensor(parts)):
        with pytest.raises(TypeError, match=r"q is a nested tensor; flash_attn_varlen_func takes .* offsets"):
            cupyattn.attention(nested, nested, nested)
    rows, starts = jagged.values(), jagged.offsets().int()
    out = cupyattn.flash_attn_varlen_func(rows, rows, rows, starts, starts, 5, 5)
    assert torch.equal(out[:3], cupyattn.attention(*(rows[None, :3],) * 3)[0])


def test_arrays_without_a_device_are_refused_by_name():
    """MLX's, for one."""

    class Homeless:
        shape, dtype, ndim = (1, 2, 2, 4), np.dtype("float32"), 4
        __dlpack__ = __dlpack_device__ = __array_namespace__ = lambda self, **arguments: None

    with pytest.raises(TypeError, match=r"attention: q has no device, .*; pass what numpy\.asarray makes of it"):
        cupyattn.attention(Homeless(), Homeless(), Homeless())


@calls
def test_arrays_of_the_array_api_of_2022_are_taken(call):
    """Their __dlpack__ knows no max_version."""
    strict = needs("array_api_strict")
    operands = operands_of(call)
    strict.set_array_api_strict_flags(api_version="2022.12")
    try:
        found = call(**{name: Strict("float32").make(array) for name, array in operands.items()})
        assert_same_results(found, call(**operands))
    finally:
        strict.reset_array_api_strict_flags()


def test_special_arrays_are_refused_by_name():
    torch = needs("torch")
    q = np.ones((1, 2, 2, 4), np.float32)
    with pytest.raises(TypeError, match="k is a MaskedArray; pass a plain array, and a mask as mask"):
        cupyattn.attention(q, np.ma.masked_array(q), q)
    with pytest.raises(TypeError, match="x is a matrix"):
        cupyattn.apply_rotary_emb(np.ones((2, 2)).view(np.matrix), np.ones((2, 1)), np.ones((2, 1)))
    t = torch.ones(1, 2, 2, 4)
    with pytest.raises(TypeError, match=r"v is not a strided tensor \(torch\.sparse_coo\); pass its to_dense\(\)"):
        cupyattn.attention(t, t, t.to_sparse())
    for wrong in (q.astype(np.int32), q.astype(np.complex64), q > 0, q.astype(np.longdouble)):
        with pytest.raises(TypeError, match="q has to be one of float16, bfloat16, float32, float64"):
            cupyattn.attention(wrong, wrong, wrong)


def own(word):
    """A subclass of NumPy's array with a method of its own, called `word`."""
    return type("Quantity", (np.ndarray,), {word: lambda *args, **words: None})


@pytest.mark.parametrize("word", ["__array_ufunc__", "__array_function__", "__array_finalize__", "__array_wrap__"])
def test_a_subclass_of_numpys_array_with_a_meaning_of_its_own_is_refused(word):
    q = np.ones((1, 2, 2, 4), np.float32)
    meant = type("Inherited", (own(word),), {})
    for kind in (own(word), meant):
        with pytest.raises(TypeError, match=rf"k is a {kind.__name__}, which says by {word} what it means; pass numpy"):
            cupyattn.attention(q, q.view(kind), q)


def test_a_plain_subclass_of_numpys_array_is_one(tmp_path):
    q = np.random.default_rng(0).standard_normal((1, 2, 2, 4))
    mapped = np.memmap(tmp_path / "q", q.dtype, "w+", shape=q.shape)
    mapped[...] = q
    expected = cupyattn.attention(q, q, q)
    named = type("Named", (np.ndarray,), {"unit": "m"})
    for array in (q.view(named), mapped, mapped.view(type("Mine", (np.memmap,), {})), q.view(np.recarray)):
        out = cupyattn.attention(array, array, array)
        assert type(out) is np.ndarray
        assert_same_bits(out, expected)


@pytest.mark.parametrize("freed", [0, 64])
def test_a_tensor_whose_memory_was_freed_is_refused(freed):
    torch = needs("torch")
    q, k = torch.ones(2, 5, 2, 4), torch.ones(2, 5, 2, 4)
    k.untyped_storage().resize_(freed)
    with pytest.raises(TypeError, match=rf"k has no memory of its own.*resized to {freed} bytes"):
        cupyattn.attention(q, k, q)


def test_tensors_that_repeat_their_memory_or_have_none_are_no_freed_ones():
    torch = needs("torch")
    one = torch.ones(1, 5, 1, 4).expand(2, 5, 2, 4)
    assert cupyattn.attention(one, one, one).shape == (2, 5, 2, 4)
    empty = torch.ones(2, 0, 2, 4)
    assert cupyattn.attention(empty, one, one).shape == (2, 0, 2, 4)


def test_arrays_whose_values_cannot_be_read_are_refused_by_name():
    class Sparse:
        shape, dtype, ndim = (1, 2, 2, 4), np.dtype("float32"), 4

        def __array_namespace__(self, api_version=None):
            return np

    with pytest.raises(TypeError, match="attention: q has no __dlpack__"):
        cupyattn.attention(Sparse(), Sparse(), Sparse())


# ---------------------------------------------------------------------------------------------------
# The CUDA door, seen from a machine without a GPU
# ---------------------------------------------------------------------------------------------------


@calls
def test_cupy_arrays_without_a_gpu_say_what_is_missing(call):
    home = HostBackedCuPy("float16")
    arrays = {name: home.make(array) for name, array in operands_of(call, "float16").items()}
    with pytest.raises(RuntimeError, match=rf"{title_of(call)}: .*CuPy finds no NVIDIA driver or GPU"):
        call(**arrays)


@cache
def pretender():
    torch = needs("torch")

    class Pretender(torch.Tensor):
        device = property(lambda self: torch.device("cuda", 0))

    return Pretender


def pretending_to_be_on_a_gpu(tensor):
    return tensor.as_subclass(pretender())


@calls
def test_cuda_tensors_without_cupy_say_what_to_install(call, monkeypatch):
    tensors = as_tensors(operands_of(call, "float16"))
    monkeypatch.setitem(sys.modules, "cupy", None)
    expected = rf"{title_of(call)}: .*torch\.Tensor.*cupyattn\[cuda12\] or cupyattn\[cuda13\]"
    with pytest.raises(ImportError, match=expected):
        call(**{name: pretending_to_be_on_a_gpu(tensor) for name, tensor in tensors.items()})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_explain_plans_for_cupy_arrays_and_a_named_gpu(dtype):
    home = HostBackedCuPy(dtype)
    rng = np.random.default_rng(0)
    q, k = (home.make(rng.standard_normal((2, n, 4, 64)).astype(DTYPES[dtype])) for n in (128, 4096))
    plan = cupyattn.explain(q, k, k, device="H100")
    assert plan == cupyattn.explain(q.shape, k.shape, k.shape, dtype=dtype, device="H100")
    assert plan.device == "H100"
    assert plan.kernel in ("hopper", "flash")
    with pytest.raises(RuntimeError, match=r"explain: .*CuPy finds no NVIDIA driver or GPU"):
        cupyattn.explain(q, k, k)


@pytest.mark.parametrize("home", [home for home in HOMES if not isinstance(home, BigEndian)], ids=str)
def test_explain_plans_the_same_for_arrays_and_their_shapes(home):
    q, k = (home.make(np.ones((2, n, 4, 8), DTYPES[home.dtype])) for n in (6, 9))
    for device in (None, "cpu", "H100"):
        plan = cupyattn.explain(q, k, k, causal=True, alignment="top-left", device=device)
        shapes = (2, 6, 4, 8), (2, 9, 4, 8), (2, 9, 4, 8)
        of_shapes = cupyattn.explain(*shapes, dtype=home.dtype, causal=True, alignment="top-left", device=device)
        assert replace(plan, notes=()) == replace(of_shapes, notes=())


def described_by_jax(shape, dtype):
    jax = needs("jax")
    return jax.ShapeDtypeStruct(shape, dtype)


def described_by_meta(shape, dtype):
    torch = needs("torch")
    return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")


def described_by_fake(shape, dtype):
    torch = needs("torch")
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.empty(shape, dtype=getattr(torch, dtype))


class Description:
    """Of no library; the dtype by name."""

    def __init__(self, shape, dtype):
        self.shape, self.dtype = shape, dtype


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "describe", [described_by_jax, described_by_meta, described_by_fake, Description], ids=lambda f: f.__name__
)
def test_explain_plans_for_what_has_a_shape_and_a_dtype_and_no_values(describe, dtype):
    q, k = (2, 6, 4, 8), (2, 9, 2, 8)
    mask, bias = (2, 1, 6, 9), (4, 6, 9)
    for device in (None, "H100"):
        expected = cupyattn.explain(q, k, k, mask=mask, bias=bias, dtype=dtype, device=device)
        described = [describe(shape, dtype) for shape in (q, k, k)]
        extras = {"mask": describe(mask, "bool"), "bias": describe(bias, "float32")}
        assert cupyattn.explain(*described, **extras, device=device) == expected
        assert cupyattn.explain(*described, **extras, dtype=dtype, device=device) == expected
        mixed = described[0], k, k
        assert cupyattn.explain(*mixed, mask=mask, bias=bias, device=device) == expected
    arrays = [np.ones(shape, DTYPES[dtype]) for shape in (q, k, k)]
    assert cupyattn.explain(*arrays, **extras) == cupyattn.explain(*described, **extras)


@pytest.mark.parametrize("describe", [described_by_jax, described_by_meta, Description], ids=lambda f: f.__name__)
def test_explain_refuses_descriptions_as_it_would_arrays(describe):
    shape = (2, 6, 4, 8)
    q, other, mask = describe(shape, "float32"), describe(shape, "float16"), describe((6, 6), "float32")
    with pytest.raises(TypeError, match="explain: q, k, v have to be of one dtype"):
        cupyattn.explain(q, other, other)
    with pytest.raises(TypeError, match="explain: dtype has to be that of the arrays, float32"):
        cupyattn.explain(q, q, q, dtype="float16")
    with pytest.raises(TypeError, match="explain: mask has to be boolean"):
        cupyattn.explain(q, q, q, mask=mask)
    with pytest.raises(TypeError, match=r"explain: q\[0\] has to be an integer.*\n    q\[0\]  [^\n]{,300}  list$"):
        cupyattn.explain(np.ones((9, 9, 9, 9)).tolist(), (1, 9, 2, 8), (1, 9, 2, 8))
    with pytest.raises(TypeError, match="explain: q has to be one of float16"):
        cupyattn.explain(*[describe(shape, "int32")] * 3)


@pytest.mark.parametrize(
    "stranger", [None, 3.0, "q", np.float32(1), object(), Description(4, "float32")], ids=lambda x: type(x).__name__
)
def test_explain_refuses_what_describes_no_array(stranger):
    shape = (2, 6, 4, 8)
    with pytest.raises(TypeError, match="explain: k has to be an array"):
        cupyattn.explain(shape, stranger, shape)


# ---------------------------------------------------------------------------------------------------
# Dropout's randomness
# ---------------------------------------------------------------------------------------------------


def dropped(q, k, v, **arguments):
    return cupyattn.attention(q, k, v, dropout_p=0.5, **arguments)


@pytest.mark.parametrize("home", [home for home in HOMES if home.dtype == "float32"], ids=str)
def test_a_dropout_seed_says_the_same_in_every_library(home):
    operands = {name: everything("float32")[name] for name in ("q", "k", "v")}
    arrays = {name: home.make(array) for name, array in operands.items()}
    for seed in (0, 1, 2**64 - 1):
        expected = dropped(**operands, dropout_seed=seed)
        assert_same_bits(home.call(lambda seed=seed, **x: dropped(**x, dropout_seed=seed), arrays), expected)
    assert not np.array_equal(dropped(**operands, dropout_seed=0), dropped(**operands, dropout_seed=1))


def test_torchs_generator_governs_dropout():
    torch = needs("torch")
    tensors = as_tensors({name: everything("float32")[name] for name in ("q", "k", "v")})
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first, second = dropped(**tensors), dropped(**tensors)
        torch.manual_seed(1)
        again = dropped(**tensors)
        state = torch.get_rng_state()
        cupyattn.attention(**tensors)
        dropped(**tensors, dropout_seed=3)
        assert torch.equal(state, torch.get_rng_state())  # whoever needs no number draws none
    assert_same_bits(again, first)
    assert not torch.equal(first, second)


def test_under_vmap_randomness_says_whether_each_has_a_dropout_of_its_own():
    torch = needs("torch")
    x = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0)).expand(3, -1, -1, -1)

    def of_one(x, **seed):
        return cupyattn.scaled_dot_product_attention(x, x, x, dropout_p=0.5, **seed)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        same = torch.func.vmap(of_one, randomness="same")(x)
        different = torch.func.vmap(of_one, randomness="different")(x)
        grads = torch.func.vmap(torch.func.grad(lambda x: of_one(x).sum()), randomness="different")(x)
        torch.manual_seed(1)
        seeds = torch.func.vmap(
            lambda x: torch.randint(0, 2**63 - 1, (), device="cpu") + 0 * x.sum().long(), randomness="different"
        )(x)
        torch.manual_seed(1)
        again = torch.func.vmap(of_one, randomness="different")(x)
        torch.manual_seed(1)
        again_grads = torch.func.vmap(torch.func.grad(lambda x: of_one(x).sum()), randomness="different")(x)
        with pytest.raises(RuntimeError, match="randomness"):
            torch.func.vmap(of_one)(x)
    for i, seed in enumerate(seeds.tolist()):
        assert_same_bits(again[i], of_one(x[i], dropout_seed=seed))
        expected = torch.func.grad(lambda x, seed=seed: of_one(x, dropout_seed=seed).sum())(x[i])
        assert_same_bits(again_grads[i], expected)
    assert torch.equal(same[0], same[1])
    for three in (different, grads):
        assert not torch.equal(three[0], three[1])
        assert not torch.equal(three[1], three[2])
    seeded = torch.func.vmap(lambda x: of_one(x, dropout_seed=1), randomness="different")(x)
    assert torch.equal(seeded[0], seeded[1])


def test_torchs_backward_drops_what_the_forward_dropped():
    torch = needs("torch")
    q, k, v = as_tensors({name: everything("float64")[name] for name in ("q", "k", "v")}).values()
    dout = Torch("").make(everything("float64")["dout"])
    with torch.random.fork_rng():
        out = dropped(q, k, v.requires_grad_())
    out.backward(dout)
    assert_matches((v.grad * v).sum(), (out * dout).sum(), rtol=1e-12)  # out is linear in v


def test_numpys_dropout_is_new_in_every_call():
    q = everything("float32")["q"]
    assert not np.array_equal(dropped(q, q, q), dropped(q, q, q))


@pytest.mark.parametrize("home", [Jax("float32"), Jax("float32", jit=True), Dask("float32")], ids=str)
def test_libraries_without_a_generator_need_a_dropout_seed(home):
    arrays = {name: home.make(everything("float32")[name]) for name in ("q", "k", "v")}
    with pytest.raises(ValueError, match=r"dropout of .* arrays needs a dropout_seed"):
        home.call(dropped, arrays)
