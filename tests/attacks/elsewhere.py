"""What `fuzz` does not ask: arrays of JAX and dask, float8 with its factors, gradients of queries over a cache.

The calls and the oracle are the fuzzer's.  A case is wholly determined by its seed: ``case(seed)`` says what was wrong,
or None.  A library that is not here is left out, and said to be.
"""

import warnings
from functools import cache
from importlib.util import find_spec

import ml_dtypes
import numpy as np
from attacks import fuzz
from attacks.drawing import Draw, draw_edits
from attacks.outcome import Outcome
from attacks.witness import (
    BFLOAT16,
    Expected,
    Question,
    Wrong,
    answer,
    as_float64,
    check,
    gradients,
    total_of,
)

import cupyattn

FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)


def is_array(x):
    return isinstance(x, np.ndarray) and x.ndim > 0


def native(x):
    """In the byte order of this machine, which other libraries know alone, and in their way of lying in memory."""
    return np.array(x, x.dtype if x.dtype == BFLOAT16 else x.dtype.newbyteorder("="))


def compare(found, call, allowed=lambda expected: expected):
    found = found if isinstance(found, tuple) else (found,)
    for actual, result in zip(found, call.results(), strict=True):
        dtype = result.dtype if result.dtype == BFLOAT16 else result.dtype.newbyteorder("=")
        check(result.name, actual, allowed(result.expected), dtype)
    return found


def drawn(d, *makes):
    d.is_large = False
    call = d.one(*makes)(d)
    d.shown = call.function, call.arguments
    return call, {name: native(x) for name, x in call.arguments.items() if is_array(x)}


def called(call, arguments):
    """As a user of another library would: what that warns of is its own affair."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return getattr(cupyattn, call.function)(**arguments)
    except Exception as error:
        raise Wrong(f"refused or failed: {type(error).__name__}: {str(error)[:300]}") from error


# ---------------------------------------------------------------------------------------------------
# Libraries
# ---------------------------------------------------------------------------------------------------


@cache
def jax_with_float64():
    import jax

    jax.config.update("jax_enable_x64", True)
    return jax


def flushed(expected):
    """XLA has NumPy, in callbacks, take numbers below the smallest normal one for 0 at every step."""
    return expected._replace(tolerance=expected.tolerance + 2.0**20 * float(np.finfo(np.float32).tiny))


def check_jax(d):
    """Eager calls and compiled ones, and the gradients of either."""
    jax = jax_with_float64()
    call, arrays = drawn(d, fuzz.attention, fuzz.sdpa, fuzz.flash, fuzz.varlen)
    arrays = {name: jax.numpy.asarray(x) for name, x in arrays.items()}
    wanting = [name for name, x in arrays.items() if jax.numpy.issubdtype(x.dtype, jax.numpy.floating)]
    still = {name: x for name, x in {**call.arguments, **arrays}.items() if name not in wanting}

    def function(*operands):
        return called(call, {**still, **dict(zip(wanting, operands, strict=True))})

    function = jax.jit(function) if d.chance(0.15) else function
    operands = [arrays[name] for name in wanting]
    if call.gradients is None or d.chance(0.4):
        compare(function(*operands), call, flushed)
        return
    found, pull = jax.vjp(function, *operands)
    compare(found, call, flushed)
    douts = [jax.numpy.asarray(native(d.floats(*x.shape, dtype=np.dtype("float32")))).astype(x.dtype) for x in found]
    expected = call.gradients(*map(as_float64, douts))
    for name, actual in zip(wanting, pull(tuple(douts)), strict=True):
        if name in expected:
            check(f"gradient of {name}", actual, flushed(expected[name]), np.dtype(arrays[name].dtype), lenient=True)


def check_dask(d):
    """Arrays in chunks of any size, along any axis."""
    import dask.array

    call, arrays = drawn(d, fuzz.attention, fuzz.sdpa, fuzz.flash)
    chunked = {
        name: dask.array.from_array(x, chunks=tuple(d.upto(max(1, size), 1) for size in x.shape))
        for name, x in arrays.items()
    }
    found = called(call, {**call.arguments, **chunked})
    found = found if isinstance(found, tuple) else (found,)
    with np.errstate(all="ignore"):
        compare(tuple(np.asarray(x) for x in found), call)


# ---------------------------------------------------------------------------------------------------
# float8
# ---------------------------------------------------------------------------------------------------


def float8(d):
    """attention of float8 with factors, or without; results are bfloat16."""
    (heads, heads_k, _), dim, batch = d.heads(), d.few(17), d.few(3)
    rows, keys, dim_v = d.length(), d.length(), d.few(17)
    edits = draw_edits(d, heads, dim, batch)
    arithmetic = edits.fields["arithmetic"]
    arguments = dict(edits.arguments)
    fields = edits.fields_for(rows, keys, bottom_right=True)
    if rows != keys and (edits.left is not None or edits.right is not None or "alibi_slopes" in arguments):
        arguments["alignment"] = "bottom-right"
    whole = {}
    for name, count, length, size in (("q", heads, rows, dim), ("k", heads_k, keys, dim), ("v", heads_k, keys, dim_v)):
        x = np.clip(d.rng.standard_normal((batch, count, length, size)) * d.one(1.0, 1.0, 0.01, 30.0), -448, 448)
        x = x.astype(FLOAT8)
        arguments[name] = np.ascontiguousarray(x.swapaxes(1, 2))
        whole[name] = as_float64(x)
        if d.chance(0.5):
            factors = d.rng.uniform(0.25, 2.0, (batch, heads_k)).astype(np.float32)
            factors = factors[: 1 if d.chance(0.2) else None, : 1 if d.chance(0.2) else None]
            arguments[f"{name}_descale"] = factors
            factors = np.broadcast_to(factors, (batch, heads_k)).astype(np.float64)
            whole[name] = whole[name] * np.repeat(factors, count // max(1, heads_k), axis=1)[..., None, None]
    ask = Question(**whole, **fields)
    found = answer(ask)

    def wider(expected):
        """A factor and a product are rounded, each once, where the oracle has but one number."""
        value, tolerance = expected
        return Expected(value, 4 * tolerance + 4 * arithmetic.eps * np.abs(np.nan_to_num(value)))

    def results():
        out = wider(found.out).map(lambda x: x.swapaxes(1, 2))
        return [fuzz.Result("out", out, BFLOAT16), fuzz.Result("lse", wider(found.lse), np.dtype("float32"))]

    return fuzz.Call("attention", {**arguments, "return_lse": True}, results)


def check_float8(d):
    """What is hidden, scaled and in groups, as in every other dtype; and no gradients."""
    d.is_large = False
    call = float8(d)
    fuzz.run(d, call)
    if d.chance(0.2):
        dout = np.zeros(call.results()[0].expected.value.shape, BFLOAT16)
        asked = {name: x for name, x in call.arguments.items() if name in ("q", "k", "v")}
        error, _ = fuzz.asked(d, "attention_backward", {"dout": dout, **asked})
        if not isinstance(error, (TypeError, NotImplementedError)) or "attention_backward: " not in str(error):
            raise Wrong(f"gradients of float8 are not refused in words: {error!r:.200}")


# ---------------------------------------------------------------------------------------------------
# Gradients of queries over a cache
# ---------------------------------------------------------------------------------------------------


def cache_of(d, tokens, batch):
    """(a cache that has room for the tokens, the window that it keeps)."""
    kind = d.upto(4)
    if kind == 0:
        return cupyattn.DynamicCache(), None
    if kind == 1:
        return cupyattn.StaticCache(tokens + d.upto(3)), None
    if kind == 2:
        window = d.upto(tokens + 3, 1)
        return cupyattn.SlidingWindowCache(window, rollback=tokens), window
    if kind == 3:
        size = d.one(1, 2, 3, 16)
        return cupyattn.PagedCache(batch * -(-tokens // size) + d.upto(2), size), None
    return cupyattn.OffloadedCache(), None


def check_cache_gradients(d):
    """Tokens are appended without gradients, and attended with them: those of q, sinks and slopes."""
    import torch

    d.is_large = False
    (heads, heads_k, heads_v), dim, batch = d.heads(), d.few(17), d.upto(3, 1)
    heads, heads_k, heads_v = (max(1, n) for n in (heads, heads_k, heads_v))
    steps = [d.upto(9, 1) for _ in range(d.upto(4, 1))]
    tokens, dim_v = sum(steps), d.few(17)
    rows = d.upto(steps[-1], 1)
    names = ("window_size", "softmax_scale", "softcap", "alibi_slopes", "sinks")
    edits = draw_edits(d, heads, dim, batch, names)
    causal = d.chance(0.8)
    edits.right = 0 if causal else edits.right
    cache_, window = cache_of(d, tokens, batch)
    if window is not None:
        edits.left = window - 1 if edits.left is None else edits.left
        if edits.left > window - 1:
            edits.left = window - 1
            edits.arguments["window_size"] = (window - 1, edits.right)
    fields, arithmetic = edits.fields_for(rows, tokens, bottom_right=True), edits.fields["arithmetic"]
    q = d.floats(batch, rows, heads, dim)
    k, v = d.floats(batch, tokens, heads_k, dim), d.floats(batch, tokens, heads_v, dim_v)
    arrays = {name: x for name, x in {"q": q, **edits.arguments}.items() if is_array(x)}
    tensors = {name: fuzz.in_torch(x).requires_grad_() for name, x in arrays.items()}
    arguments = {**edits.arguments, "causal": causal, **tensors, "return_lse": True}
    d.shown = f"{type(cache_).__name__}.attend", {**arguments, "k": k, "v": v}
    try:
        start = 0
        for count in steps:
            with torch.no_grad():
                cache_.append(*(fuzz.in_torch(x[:, start : start + count]) for x in (k, v)))
            start += count
        with warnings.catch_warnings(), np.errstate(all=d.errstate):
            warnings.simplefilter("error")
            out, lse = cache_.attend(arguments.pop("q"), **arguments)
    except Exception as error:
        raise Wrong(f"refused or failed: {type(error).__name__}: {str(error)[:300]}") from error
    ask = Question(*(arithmetic.read(x).swapaxes(1, 2) for x in (q, k, v)), **fields)
    found = answer(ask)
    out_dtype, lse_dtype = fuzz.result_dtypes(native(q))
    check("out", out, found.out.map(lambda x: x.swapaxes(1, 2)), out_dtype)
    check("lse", lse, found.lse, lse_dtype)
    dout, dlse = (fuzz.in_torch(d.floats(*x.shape, dtype=np.dtype("float32"))).to(x.dtype) for x in (out, lse))
    torch.autograd.backward((out, lse), (dout, dlse))
    by_word = gradients(ask, found, as_float64(dout).swapaxes(1, 2), as_float64(dlse))
    expected = {"q": by_word["q"].map(lambda x: x.swapaxes(1, 2))}
    if "sinks" in tensors:
        expected["sinks"] = total_of(arithmetic, by_word["sinks"], (0,))
    if "alibi_slopes" in tensors:
        slopes = by_word["slopes"]
        expected["alibi_slopes"] = slopes if arrays["alibi_slopes"].ndim == 2 else total_of(arithmetic, slopes, (0,))
    for name, tensor in tensors.items():
        if tensor.grad is None:
            raise Wrong(f"no gradient of {name}")
        check(f"gradient of {name}", tensor.grad, expected[name], native(arrays[name]).dtype, lenient=True)


# ---------------------------------------------------------------------------------------------------
# Cases
# ---------------------------------------------------------------------------------------------------

KINDS = {check_jax: "jax", check_dask: "dask", check_float8: "numpy", check_cache_gradients: "torch"}
"""The library that each needs."""


def case(seed: int) -> str | None:
    """One random case: what was wrong, with shapes and options, or None."""
    kinds = [kind for kind, library in KINDS.items() if find_spec(library)]
    d = Draw(seed)
    return fuzz.told(d, d.one(*kinds))


def attack(seed: int, cases: int) -> Outcome:
    """The cases of so many seeds from one on."""
    missing = sorted({library for library in KINDS.values() if not find_spec(library)})
    return Outcome(cases, fuzz.lost_of(case, seed, cases), f"not here: {', '.join(missing)}" if missing else "")
