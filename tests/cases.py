"""The calls both kernels are asked: scores edited in every way, arrays in every layout, values nobody may see.

Each is a function of (rng, dtype) that returns arrays, options and a dropout seed; sizes are small, and odd where that
is harder. The tables are what tests are made of.
"""

import numpy as np
import pytest
from emulated import STORED, operands, options_of

from cupyattn.problem import Distances

HEADS = (4, 2, 2)
SEED = 0x1234_5678_9ABC_DEF0


def call(rng, dtype, heads=HEADS, seqlens=(13, 77), dims=(64, 64), batch=2, layout="bshd", options=None, **arrays):
    """A dense call; `arrays` come beside q, k and v."""
    given = operands(rng, dtype, layout, batch, heads, seqlens, dims)
    return {**given, **arrays}, options_of(layout=layout, **(options or {})), SEED


def slopes(*shape):
    return (2.0 ** -np.arange(1, 1 + np.prod(shape)) * (-1) ** np.arange(np.prod(shape))).astype("f4").reshape(shape)


def additive(rng, shape, dtype):
    """A bias with some -inf in it, and at least one number in every row."""
    bias = 2.0 * rng.standard_normal(shape)
    bias[rng.random(shape) < 0.2] = -np.inf
    bias[..., 0] = 1.0
    return bias.astype(STORED.get(dtype, dtype))


def biased(shape, kind, **options):
    def make(rng, dtype):
        return call(rng, dtype, options=options, bias=additive(rng, shape, kind))

    return make


def masked(shape, share=0.5, **options):
    def make(rng, dtype):
        return call(rng, dtype, options=options, mask=rng.random(shape) < share)

    return make


def plain(**options):
    def make(rng, dtype):
        return call(rng, dtype, options=options)

    return make


def lengths(seqlen_q, seqlen_k, **options):
    def make(rng, dtype):
        return call(rng, dtype, seqlens=(seqlen_q, seqlen_k), options=options)

    return make


def grouped(*heads):
    def make(rng, dtype):
        return call(rng, dtype, heads=heads, seqlens=(5, 70), options={"causal": True, "alignment": "bottom-right"})

    return make


def with_slopes(*shape, **options):
    def make(rng, dtype):
        return call(rng, dtype, options={"alignment": "bottom-right", **options}, alibi_slopes=slopes(*shape))

    return make


def with_sinks(seqlens=(13, 77), sinks=(-1.0, 0.0, 3.0, 40.0), **options):
    def make(rng, dtype):
        arrays, asked, seed = call(rng, dtype, seqlens=seqlens, options=options)
        return {**arrays, "sinks": np.array(sinks, "f4")}, asked, seed

    return make


def everything(rng, dtype):
    """All edits in one call: their order shows."""
    options = {"softcap": 3.0, "dropout_p": 0.3, "window_size": (40, 9), "alignment": "bottom-right"}
    return call(
        rng, dtype, options=options,
        bias=additive(rng, (2, 4, 13, 77), "float32"), mask=rng.random((4, 13, 77)) < 0.8,
        alibi_slopes=slopes(2, 4), sinks=np.array([-1.0, 0.0, 1.0, 2.0], "f4"),
    )  # fmt: skip


def apart(first, step, seqlens=(37, 130), alignment="top-left", heads=HEADS, layout="bshd", **options):
    """Slopes by distances that are not from the mask's diagonal: of rows and keys that are some of a sequence's."""

    def make(rng, dtype):
        asked = {"alignment": alignment, **options}
        arrays, found, seed = call(rng, dtype, heads, seqlens, layout=layout, options=asked)
        return {**arrays, "alibi_slopes": slopes(heads[0])}, found._replace(distances=Distances(first, step)), seed

    return make


DISTANCES = {
    "rows behind all keys": apart(200, 1),
    "rows before all keys": apart(-90, 1),
    "rows among the keys": apart(40, 1),
    "every third token": apart(131, 3),
    "every fourth token, the first before the keys": apart(-21, 4, seqlens=(70, 67)),
    "behind the mask's diagonal": apart(5, 1, causal=True),
    "on the mask's diagonal, every second token": apart(0, 2, causal=True),
    "before the mask's diagonal": apart(-1, 2, causal=True),
    "under a window": apart(7, 2, window_size=(30, 11)),
    "under a window behind the rows": apart(33, 3, window_size=(30, 11)),
    "of a mask aligned elsewhere": apart(11, 2, alignment="bottom-right", causal=True),
    "behind one aligned elsewhere": apart(300, 3, alignment="bottom-right", causal=True, heads=(6, 3, 1)),
    "heads first, a softcap": apart(25, 2, layout="bhsd", softcap=3.0),
}
"""Signs that change inside of a tile, and those that do not; slopes that are added to products, and others."""

EDITS = {
    "scale": plain(softmax_scale=0.7),
    "scale 0": plain(softmax_scale=0.0, causal=True, alignment="top-left"),
    "scale of nearly 0": plain(softmax_scale=1e-50, causal=True, alignment="top-left"),
    "scale -0": plain(softmax_scale=-0.0, causal=True, alignment="top-left"),
    "scale below 0": plain(softmax_scale=-0.7),
    "scale below 0, rows that see nothing": lengths(90, 23, softmax_scale=-0.3, causal=True, alignment="bottom-right"),
    "scale below 0, sinks, softcap, window": with_sinks(
        (40, 77), softmax_scale=-0.4, softcap=2.0, window_size=(30, 3), alignment="bottom-right"
    ),
    "softcap 2": plain(softcap=2.0),
    "softcap 50": plain(softcap=50.0),
    "softcap 1000": plain(softcap=1000.0),
    "softcap beyond every score": plain(softcap=1e38),
    "softcap of nearly 0": plain(softcap=1e-50),
    "slopes by head": with_slopes(4, causal=True),
    "slopes by batch and head": with_slopes(2, 4),
    "slopes, top-left": with_slopes(4, alignment="top-left"),
    "bias, float16": biased((2, 4, 13, 77), "float16"),
    "bias, bfloat16": biased((4, 13, 77), "bfloat16"),
    "bias, float32": biased((13, 77), "float32"),
    "bias, float64": biased((2, 1, 13, 77), "float64", causal=True, alignment="bottom-right"),
    "bias of one row": biased((2, 4, 1, 77), "float32"),
    "bias of one key": biased((2, 4, 13, 1), "float32"),
    "bias of one number": biased((1, 1, 1, 1), "float32"),
    "bias of the keys alone": biased((77,), "float16"),
    "mask": masked((2, 4, 13, 77)),
    "mask of the batch": masked((2, 1, 1, 77), causal=True, alignment="bottom-right"),
    "mask of the heads": masked((4, 13, 1)),
    "mask of rows and keys": masked((13, 77)),
    "mask that hides all": masked((13, 77), share=0.0),
    "dropout 0.1": plain(dropout_p=0.1),
    "dropout 0.5 under a window": plain(dropout_p=0.5, window_size=(30, 3), alignment="bottom-right"),
    "dropout of all": plain(dropout_p=1.0),
    "sinks": with_sinks(),
    "sinks of rows that see nothing": with_sinks(window_size=(0, 0), alignment="bottom-right", seqlens=(90, 20)),
    "sinks of infinity": with_sinks((90, 20), (np.inf, 0.0, np.inf, -np.inf), causal=True, alignment="bottom-right"),
    "sinks of nan": with_sinks((90, 20), (np.nan, 0.0, np.nan, 3.0), causal=True, alignment="bottom-right"),
    "everything": everything,
}

VISIBLE = {
    "one row, one key": lengths(1, 1),
    "15 rows": lengths(15, 63),
    "16 rows": lengths(16, 64, causal=True, alignment="top-left"),
    "17 rows": lengths(17, 65, causal=True, alignment="bottom-right"),
    "64 keys": lengths(3, 64),
    "67 rows, 131 keys": lengths(67, 131),
    "no keys": lengths(5, 0),
    "3 rows, 1 key, bottom-right": lengths(3, 1, alignment="bottom-right"),
    "3 rows, 1 key, causal, bottom-right": lengths(3, 1, causal=True, alignment="bottom-right"),
    "more rows, bottom-right": lengths(90, 23, alignment="bottom-right"),
    "causal, more keys, top-left": lengths(19, 150, causal=True, alignment="top-left"),
    "causal, more keys, bottom-right": lengths(19, 150, causal=True, alignment="bottom-right"),
    "causal, more rows, top-left": lengths(90, 23, causal=True, alignment="top-left"),
    "causal, more rows, bottom-right": lengths(90, 23, causal=True, alignment="bottom-right"),
    "window": lengths(70, 200, window_size=(37, 5), alignment="bottom-right"),
    "window of the diagonal": lengths(33, 33, window_size=(0, 0)),
    "window, left only": lengths(20, 140, window_size=(64, None), alignment="bottom-right"),
    "window, right only": lengths(20, 140, window_size=(None, 63), alignment="top-left"),
    "window behind the keys": lengths(100, 30, window_size=(3, 3), alignment="top-left"),
    "window before the keys": lengths(100, 30, window_size=(3, 3), alignment="bottom-right"),
    "causal window": lengths(40, 170, window_size=(16, None), causal=True, alignment="bottom-right"),
    "window as wide as can be": lengths(50, 40, window_size=(2**31 - 2, 2**31 - 2), alignment="bottom-right"),
    "one key head for all": grouped(5, 1, 1),
    "four heads to a key head": grouped(8, 2, 2),
    "more value heads": grouped(6, 2, 3),
    "fewer value heads": grouped(4, 4, 1),
    "one value head": grouped(6, 3, 1),
}
"""Lengths, bands and groups: one specialisation does them all."""


# ---------------------------------------------------------------------------------------------------
# Layouts
# ---------------------------------------------------------------------------------------------------


def heads_before_rows(rng, dtype):
    return call(rng, dtype, layout="bhsd")


def transposed(rng, dtype):
    """(batch, rows, heads, head_dim) whose memory is (batch, heads, rows, head_dim)."""
    arrays, options, seed = call(rng, dtype)
    return {name: np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for name, x in arrays.items()}, options, seed


def rows_backwards(rng, dtype):
    arrays, options, seed = call(rng, dtype)
    return {name: np.ascontiguousarray(x[:, ::-1])[:, ::-1] for name, x in arrays.items()}, options, seed


def every_second_row(rng, dtype):
    arrays, options, seed = call(rng, dtype)
    return {name: np.repeat(x, 2, axis=1)[:, ::2] for name, x in arrays.items()}, options, seed


def one_row_repeated(rng, dtype):
    arrays, options, seed = call(rng, dtype)
    return {name: np.broadcast_to(x[:, :1], x.shape) for name, x in arrays.items()}, options, seed


def packed_together(rng, dtype):
    """q, k and v side by side in one array."""
    whole = rng.standard_normal((2, 40, 3, 4, 64)).astype(STORED[dtype])
    return {name: whole[:, :, i] for i, name in enumerate("qkv")}, options_of(), SEED


def one_batch_of_keys(rng, dtype):
    arrays, options, seed = call(rng, dtype)
    return {"q": arrays["q"], "k": arrays["k"][:1], "v": arrays["v"][1:]}, options, seed


def _shifted(x, by):
    """The same numbers, `by` elements further in memory than where NumPy would put them."""
    memory = np.zeros(x.size + by, x.dtype)
    memory[by:] = x.ravel()
    return memory[by:].reshape(x.shape)


def odd_address(name):
    def make(rng, dtype):
        arrays, options, seed = call(rng, dtype)
        return {**arrays, name: _shifted(arrays[name], 1)}, options, seed

    return make


def odd_rows(rng, dtype):
    """Rows at every distance: 67 numbers."""
    arrays, options, seed = call(rng, dtype, dims=(67, 67))
    options = options._replace(softmax_scale=0.125)
    return {name: x[..., 1:65] for name, x in arrays.items()}, options, seed


def odd_bias(rng, dtype):
    """A bias whose axes run backwards, at every second key."""
    bias = additive(rng, (13, 154, 4, 2), "float32")
    bias[:, 1] = bias[:, 0]
    return call(rng, dtype, bias=bias[::-1, 1::2].transpose(3, 2, 0, 1))


def odd_mask(rng, dtype):
    return call(rng, dtype, mask=(rng.random((13, 154, 4, 2)) < 0.5)[::-1, 1::2].transpose(3, 2, 0, 1))


LAYOUTS = {
    "bhsd": heads_before_rows,
    "transposed": transposed,
    "rows backwards": rows_backwards,
    "every second row": every_second_row,
    "one row repeated": one_row_repeated,
    "q, k and v in one array": packed_together,
    "one batch of k and v": one_batch_of_keys,
    "q at an odd address": odd_address("q"),
    "k at an odd address": odd_address("k"),
    "v at an odd address": odd_address("v"),
    "rows at odd addresses": odd_rows,
    "bias with odd strides": odd_bias,
    "mask with odd strides": odd_mask,
}

# ---------------------------------------------------------------------------------------------------
# Values nobody may see
# ---------------------------------------------------------------------------------------------------


def _poison(arrays, keys, which=(np.nan, np.inf, -np.inf)):
    """Copies of k and v whose `keys` hold what is not finite."""
    for name in "kv":
        poisoned = arrays[name].copy()
        count = poisoned[:, keys].size
        poisoned[:, keys] = np.resize(np.array(which), count).reshape(poisoned[:, keys].shape)
        yield name, poisoned


def behind_the_band(rng, dtype):
    arrays, options, seed = call(rng, dtype, options={"causal": True, "alignment": "top-left"})
    return arrays, {**arrays, **dict(_poison(arrays, slice(13, None)))}, options, seed


def beside_the_window(rng, dtype):
    asked = {"window_size": (9, 2), "alignment": "bottom-right"}
    arrays, options, seed = call(rng, dtype, options=asked)
    return arrays, {**arrays, **dict(_poison(arrays, slice(0, 77 - 13 - 9)))}, options, seed


def behind_the_mask(rng, dtype):
    mask = np.ones(77, bool)
    mask[[3, 16, 17, 40, 76]] = False
    arrays, options, seed = call(rng, dtype, mask=mask)
    return arrays, {**arrays, **dict(_poison(arrays, ~mask))}, options, seed


def behind_the_bias(rng, dtype):
    bias = rng.standard_normal(77).astype("f4")
    bias[[0, 15, 33, 64]] = -np.inf
    arrays, options, seed = call(rng, dtype, bias=bias)
    return arrays, {**arrays, **dict(_poison(arrays, np.isneginf(bias)))}, options, seed


def behind_the_last_key(rng, dtype):
    """Keys of a longer buffer that the call was not given."""
    arrays, options, seed = call(rng, dtype)
    longer = {name: np.full((2, 200, *arrays[name].shape[2:]), np.nan, arrays[name].dtype) for name in "kv"}
    for name, x in longer.items():
        x[:, :77] = arrays[name]
    return arrays, {**arrays, **{name: x[:, :77] for name, x in longer.items()}}, options, seed


def behind_the_last_query(rng, dtype):
    """Queries of a longer buffer that the call was not given."""
    arrays, options, seed = call(rng, dtype)
    longer = np.full((2, 100, *arrays["q"].shape[2:]), np.nan, arrays["q"].dtype)
    longer[:, :13] = arrays["q"]
    return arrays, {**arrays, "q": longer[:, :13]}, options, seed


HIDDEN = {
    "behind the band": behind_the_band,
    "beside the window": beside_the_window,
    "behind the mask": behind_the_mask,
    "behind the bias": behind_the_bias,
    "behind the last key": behind_the_last_key,
    "behind the last query": behind_the_last_query,
}
"""(arrays, the same with values that are not finite where nobody sees them, options, dropout seed)."""


def strays(*found, seqlens=(40, 77), **options):
    """Values that are not finite: (name, key, column, what), seen by some rows and hidden from others."""

    def make(rng, dtype):
        arrays, asked, seed = call(rng, dtype, seqlens=seqlens, options=options)
        for name, key, column, what in found:
            arrays[name][0, key, 0, column] = what
        return arrays, asked, seed

    return make


def faint_inf(rng, dtype):
    """An inf whose weight is 0 in float32, and not in float64."""
    arrays, options, seed = call(rng, dtype, options={"softmax_scale": 1.0})
    arrays["q"][...], arrays["k"][...] = 1.0, 0.0
    arrays["k"][:, :64] = -2.0
    arrays["v"][0, 20, 0, 7] = np.inf
    return arrays, options, seed


CAUSAL = {"causal": True, "alignment": "top-left"}
STRAYS = {
    "inf": strays(("v", 20, 3, np.inf), **CAUSAL),
    "-inf": strays(("v", 0, 63, -np.inf), **CAUSAL),
    "nan": strays(("v", 39, 0, np.nan), **CAUSAL),
    "inf and -inf in one tile": strays(("v", 17, 5, np.inf), ("v", 30, 5, -np.inf), **CAUSAL),
    "inf and -inf apart": strays(
        ("v", 3, 5, np.inf), ("v", 70, 5, -np.inf), window_size=(None, 45), alignment="top-left"
    ),
    "sixteen infs": strays(*(("v", key, 9, np.inf) for key in range(16, 32)), **CAUSAL),
    "150 infs": strays(
        *(("v", key, 9, np.inf) for key in range(150)), seqlens=(40, 180), **CAUSAL | {"alignment": "bottom-right"}
    ),
    "inf to the left of a window": strays(("v", 4, 8, np.inf), window_size=(10, 5), alignment="top-left"),
    "inf of little weight": faint_inf,
    "a key of nan": strays(("k", 25, 1, np.nan), **CAUSAL),
    "sixteen keys of nan": strays(*(("k", key, 9, np.nan) for key in range(16, 32)), **CAUSAL),
    "a query of nan": strays(("q", 25, 1, np.nan), **CAUSAL),
    "a query of inf": strays(("q", 25, 1, np.inf), **CAUSAL),
}

SEVERAL = (("v", 3, 5, np.inf), ("v", 17, 5, -np.inf), ("v", 20, 9, np.nan), ("v", 30, 11, -np.inf))
DROPPED = {
    "inf": strays(("v", 20, 3, np.inf), dropout_p=0.5, **CAUSAL),
    "several": strays(*SEVERAL, dropout_p=0.2, window_size=(None, 45), alignment="top-left"),
    "all": strays(*SEVERAL, dropout_p=1.0, **CAUSAL),
    "150 infs": strays(*(("v", key, 9, np.inf) for key in range(150)), seqlens=(40, 180), dropout_p=0.9),
}
"""Values that are not finite, and weights of 0 that dropout leaves: 0 * inf is nan."""


def turns(table):
    """Parameters of a test, value and schedule, so that the emulator's schedules take turns."""
    return [pytest.param(value, index % 3, id=name) for index, (name, value) in enumerate(table.items())]
