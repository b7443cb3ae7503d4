"""`out=` and `lse_out=`: results in the caller's own arrays, all of them or none."""

import ml_dtypes
import numpy as np
import pytest
from conftest import SEED
from homes import needs

import cupyattn


def normal(*shape, dtype="float64"):
    return np.random.default_rng(SEED).standard_normal(shape).astype(dtype)


def starts(*values):
    return np.array(values, np.int32)


def operands(dtype="float64"):
    return {
        "q": normal(2, 5, 4, 8, dtype=dtype),
        "k": normal(2, 6, 2, 8, dtype=dtype),
        "v": normal(2, 6, 2, 8, dtype=dtype),
    }


PACKED = {"cu_seqlens_q": starts(0, 2, 5), "cu_seqlens_k": starts(0, 3, 6), "max_seqlen_q": 3, "max_seqlen_k": 3}
CALLS = {
    "attention": {**operands(), "return_lse": True},
    "flash_attn_func": {**operands(), "return_lse": True},
    "flash_attn_qkvpacked_func": {"qkv": normal(2, 5, 3, 4, 8), "return_attn_probs": True},
    "flash_attn_kvpacked_func": {"q": normal(2, 5, 4, 8), "kv": normal(2, 6, 2, 2, 8), "return_lse": True},
    "flash_attn_varlen_func": {**{n: x[0] for n, x in operands().items()}, **PACKED, "return_lse": True},
    "flash_attn_varlen_qkvpacked_func": {
        "qkv": normal(5, 3, 4, 8),
        "cu_seqlens": PACKED["cu_seqlens_q"],
        "max_seqlen": 3,
        "return_lse": True,
    },
    "flash_attn_varlen_kvpacked_func": {
        "q": normal(5, 4, 8),
        "kv": normal(6, 2, 2, 8),
        **PACKED,
        "return_lse": True,
    },
    "flash_attn_with_kvcache": {
        "q": normal(2, 5, 4, 8),
        "k_cache": normal(2, 6, 2, 8),
        "v_cache": normal(2, 6, 2, 8),
        "return_softmax_lse": True,
    },
    "merge_states": {"outs": [normal(2, 5, 4, 8)] * 2, "lses": [normal(2, 4, 5)] * 2},
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("strides", ["contiguous", "any"])
def test_every_function_puts_its_results_there_and_returns_these_very_arrays(name, strides):
    function, arguments = getattr(cupyattn, name), CALLS[name]
    expected = function(**arguments)
    out, lse = (np.full_like(x, np.nan) for x in expected[:2])
    if strides == "any":
        out, lse = (np.full((*x.shape, 2), np.nan, x.dtype)[::-1, ..., 1] for x in expected[:2])
    found = function(**arguments, out=out, lse_out=lse)
    assert found[0] is out
    assert found[1] is lse
    np.testing.assert_array_equal(out, expected[0])
    np.testing.assert_array_equal(lse, expected[1])


def test_out_alone_and_lse_alone():
    expected = cupyattn.attention(**operands(), return_lse=True)
    out, lse = (np.empty_like(x) for x in expected)
    assert cupyattn.attention(**operands(), out=out) is out
    found = cupyattn.attention(**operands(), return_lse=True, lse_out=lse)
    assert found[1] is lse
    for got, exact in zip((out, lse), expected, strict=True):
        np.testing.assert_array_equal(got, exact)


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16", ">f4"])
def test_numpy_in_every_dtype_and_byte_order(dtype):
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    given = {name: x.astype(kind) for name, x in operands().items()}
    out = np.empty((2, 5, 4, 8), kind)
    assert cupyattn.attention(**given, out=out) is out
    np.testing.assert_array_equal(out.astype(float), cupyattn.attention(**given).astype(float))


def test_packed_operands_and_a_result_may_interleave():
    buffer = np.zeros((2, 5, 4, 4, 8))
    buffer[:, :, :3] = normal(2, 5, 3, 4, 8)
    q, k, v, out = (buffer[:, :, i] for i in range(4))
    exact = cupyattn.attention(q, k, v)
    cupyattn.attention(q, k, v, out=out)
    np.testing.assert_array_equal(out, exact)


def test_a_tensor_is_written_to_and_its_version_counted():
    torch = needs("torch")
    q, k, v = (torch.from_numpy(x) for x in operands().values())
    exact = cupyattn.attention(q, k, v)
    out = torch.empty(8, 2, 5, 4, dtype=torch.float64).permute(1, 2, 3, 0)
    version = out._version
    assert cupyattn.attention(q, k, v, out=out) is out
    assert out._version > version
    assert torch.equal(out, exact)


def test_arrays_of_any_other_library_that_can_be_written_to():
    strict = needs("array_api_strict")
    q, k, v = (strict.asarray(x) for x in operands().values())
    out = strict.zeros((2, 5, 4, 8), dtype=strict.float64)
    assert cupyattn.attention(q, k, v, out=out) is out
    np.testing.assert_array_equal(np.asarray(out), cupyattn.attention(**operands()))


def test_a_tensor_under_autocast_has_autocasts_dtype():
    torch = needs("torch")
    q, k, v = (torch.from_numpy(x) for x in operands("float32").values())
    with torch.autocast("cpu", torch.bfloat16):
        out = torch.empty(2, 5, 4, 8, dtype=torch.bfloat16)
        assert cupyattn.attention(q, k, v, out=out) is out
        with pytest.raises(TypeError, match="out has to be bfloat16"):
            cupyattn.attention(q, k, v, out=out.float())


# ---- What is refused, before anything is written ---------------------------------------------------------


def refused(error, says, call=cupyattn.attention, **changes):
    arguments = {**operands(), "return_lse": True, **changes}
    given = {name: np.array(arguments[name], copy=True) for name in ("out", "lse_out") if name in changes}
    with pytest.raises(error, match=says):
        call(**arguments)
    for name, before in given.items():
        np.testing.assert_array_equal(np.asarray(arguments[name]), before)


def fresh(*shape, dtype="float64"):
    return np.full(shape or (2, 5, 4, 8), 7, dtype)


def test_another_shape_is_refused():
    refused(
        ValueError,
        r"attention: out has to have the shape \(2, 5, 4, 8\)\n    out  \(2, 5, 4, 9\)",
        out=fresh(2, 5, 4, 9),
    )
    refused(ValueError, r"lse_out has to have the shape \(2, 4, 5\)", out=fresh(), lse_out=fresh(2, 5, 4))


def test_another_dtype_is_refused():
    refused(
        TypeError, r"attention: out has to be float64\n    out  \(2, 5, 4, 8\)  float32", out=fresh(dtype="float32")
    )
    refused(TypeError, "lse_out has to be float64", out=fresh(), lse_out=fresh(2, 4, 5, dtype="float32"))


def test_what_is_no_array_or_of_another_library_is_refused():
    torch = needs("torch")
    with pytest.raises(TypeError, match="out has to be an array"):
        cupyattn.attention(**operands(), out=[0.0])
    with pytest.raises(
        TypeError, match=r"out has to be of the operands' library, numpy.ndarray\n    out  torch.Tensor"
    ):
        cupyattn.attention(**operands(), out=torch.empty(2, 5, 4, 8, dtype=torch.float64))
    with pytest.raises(TypeError, match="out is a MaskedArray"):
        cupyattn.attention(**operands(), out=np.ma.masked_array(fresh()))


def test_an_array_on_another_device_is_refused():
    torch = needs("torch")
    q, k, v = (torch.from_numpy(x) for x in operands().values())
    with pytest.raises(ValueError, match="out has to be on the operands' device, cpu\n    out  meta"):
        cupyattn.attention(q, k, v, out=torch.empty(2, 5, 4, 8, dtype=torch.float64, device="meta"))


def test_an_array_that_cannot_be_written_to_is_refused():
    out = fresh()
    out.flags.writeable = False
    refused(ValueError, "out is read-only and was to be overwritten", out=out)
    alike = np.lib.stride_tricks.as_strided(fresh(), strides=(0, 256, 64, 8))
    refused(ValueError, "out was to be overwritten, and its elements share memory", out=alike)
    lse = fresh(2, 4, 5)
    lse.flags.writeable = False
    refused(ValueError, "lse_out is read-only", out=fresh(), lse_out=lse)


@pytest.mark.parametrize("other", ["q", "k", "bias", "mask", "lse_out"])
def test_an_array_that_shares_memory_is_refused(other):
    buffer = fresh(4096)
    out = buffer[100:420].reshape(2, 5, 4, 8)
    there = {
        "q": lambda: buffer[99:419].reshape(2, 5, 4, 8),
        "k": lambda: buffer[400:592].reshape(2, 6, 2, 8),
        "bias": lambda: buffer[95:101],
        "mask": lambda: buffer.view(bool)[806:800:-1],
        "lse_out": lambda: buffer[419:459].reshape(2, 4, 5),
    }
    refused(ValueError, f"(out|lse_out) shares memory with (out|{other})", out=out, **{other: there[other]()})


def test_an_lse_that_nobody_asked_for_is_refused():
    with pytest.raises(ValueError, match="lse_out is for the lse, which is asked for by return_lse=True"):
        cupyattn.attention(**operands(), lse_out=fresh(2, 4, 5))
    x = fresh(2, 6, 2, 8)
    with pytest.raises(ValueError, match="asked for by return_softmax_lse=True"):
        cupyattn.flash_attn_with_kvcache(x, x, x, lse_out=fresh(2, 2, 6))


@pytest.mark.parametrize("name", ["jax", "dask.array"])
def test_immutable_arrays_are_refused_in_words(name):
    xp = needs("jax.numpy" if name == "jax" else name)
    given = {word: xp.asarray(x) for word, x in operands("float32").items()}
    with pytest.raises(TypeError, match=r"attention: out cannot be overwritten: .* is immutable"):
        cupyattn.attention(**given, out=xp.zeros((2, 5, 4, 8), dtype="float32"))


@pytest.mark.parametrize("which", ["q", "out"])
def test_what_requires_grad_is_refused_as_torch_refuses_it(which):
    torch = needs("torch")
    given = {word: torch.from_numpy(x) for word, x in operands().items()}
    given["out"] = torch.full((2, 5, 4, 8), 7.0, dtype=torch.float64)
    given[which].requires_grad_()
    with pytest.raises(ValueError, match="out cannot be differentiated through, as in torch"):
        cupyattn.attention(**given)
    assert (given["out"] == 7).all()
    with torch.no_grad():
        assert cupyattn.attention(**given) is given["out"]


def test_transforms_of_torch_are_refused():
    torch = needs("torch")
    x = torch.ones(2, 1, 3, 2, 8)
    out = torch.empty(1, 3, 2, 8)
    with pytest.raises(ValueError, match=r"outside of torch\.func's transforms"):
        torch.func.vmap(lambda q: cupyattn.attention(q, q, q, out=out))(x)


def test_inference_tensors_are_written_to_in_inference_mode_alone():
    torch = needs("torch")
    x = torch.ones(1, 3, 2, 8)
    with torch.inference_mode():
        out = torch.empty(1, 3, 2, 8)
        assert cupyattn.attention(x, x, x, out=out) is out
    with pytest.raises(ValueError, match="out was to be overwritten, and is an inference tensor"):
        cupyattn.attention(x, x, x, out=out)


def test_nothing_is_written_by_a_call_that_finds_a_wrong_index_only_when_it_computes():
    out, lse = fresh(5, 4, 8), fresh(4, 5)
    arguments = {**CALLS["flash_attn_varlen_func"], "cu_seqlens_k": starts(0, 4, 3)}
    with pytest.raises(ValueError, match="cu_seqlens_k must not decrease"):
        cupyattn.flash_attn_varlen_func(**arguments, out=out, lse_out=lse)
    assert (out == 7).all()
    assert (lse == 7).all()


def test_a_cache_takes_nothing_in_where_the_result_fits_nowhere():
    cache, x = np.zeros((1, 9, 2, 8)), np.ones((1, 3, 2, 8))
    for bad in (fresh(1, 3, 2, 9), cache[:, :3]):
        with pytest.raises(ValueError, match="flash_attn_with_kvcache: out"):
            cupyattn.flash_attn_with_kvcache(x, cache, cache.copy(), x, x, cache_seqlens=2, out=bad)
    assert not cache.any()
