"""Attention by the CUDA kernels under the emulator, and what it is held to: the definition, sequence by sequence.

    arrays = operands(rng, "bfloat16", heads=(4, 2, 2), seqlens=(17, 65), dims=(64, 64))
    check(arrays, options_of(causal=True), "flash", schedule=1)

The bar: an emulation in NumPy walks the same blocks of keys and rounds only what the kernel has to round, the weights
and the result, to the arrays' dtype. A kernel's largest error may be twice the emulation's and its mean error one and
a half times; one unit in the last place is let go. For float32 the emulation does all arithmetic in float32, products
as sums of products of bfloat16 planes, and besides no error may exceed 2e-6 of the largest value.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import emulator
import ml_dtypes
import numpy as np
import pytest
from oracle import assert_matches

from cupyattn import numpy_ref, plan
from cupyattn.cuda.launching.launch import recipe_of, record_of
from cupyattn.cuda.launching.views import view_of_numpy
from cupyattn.plan.hopper import hopper_tile
from cupyattn.plan.schedule import EVEN
from cupyattn.plan.splits import blocks_of_splitkv, split, split_pieces
from cupyattn.problem import ITEMSIZE, NAMED_DEVICES, Spec
from cupyattn.reading import Options, attention_options, read

STORED = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
}
BITS = {"float16": 10, "bfloat16": 7, "float32": 23}
LOWEST = {"float16": -14, "bfloat16": -126, "float32": -126}
H100 = NAMED_DEVICES["H100"]
LOG2E = np.float64(np.log2(np.e))
FLAGS = ()
"""Of g++, besides the emulator's own: sanitizers put theirs here."""
ENOUGH = 4096
"""Results from which a mean error says something."""


def marks_of(dims):
    """`covered` where the compiled kernels of these head dimensions are executed by `make proof`, 64 aside."""
    return (pytest.mark.covered,) if tuple(dims) in ((96, 96), (128, 128), (192, 192), (256, 256), (192, 128)) else ()


# ---------------------------------------------------------------------------------------------------
# Calls
# ---------------------------------------------------------------------------------------------------


def operands(rng, dtype="float16", layout="bshd", batch=1, heads=(1, 1, 1), seqlens=(1, 1), dims=(64, 64)):
    """q, k and v, normally distributed; `heads` and `dims` in that order, head_dim and head_dim_v."""
    sizes = [(seqlens[0], heads[0], dims[0]), (seqlens[1], heads[1], dims[0]), (seqlens[1], heads[2], dims[1])]
    arrays = {}
    for name, (seqlen, num_heads, width) in zip("qkv", sizes, strict=True):
        shape = (batch, seqlen, num_heads, width) if layout == "bshd" else (batch, num_heads, seqlen, width)
        arrays[name] = rng.standard_normal(shape).astype(STORED[dtype])
    return arrays


def ragged_operands(rng, dtype, lengths_q, lengths_k, heads=(1, 1, 1), dims=(64, 64), behind=(0, 0)):
    """q, k and v of sequences end to end, with some rows and keys `behind` the last of them."""
    starts = [np.cumsum([0, *lengths], dtype=np.int32) for lengths in (lengths_q, lengths_k)]
    totals = [int(x[-1]) + more for x, more in zip(starts, behind, strict=True)]
    sizes = [(totals[0], heads[0], dims[0]), (totals[1], heads[1], dims[0]), (totals[1], heads[2], dims[1])]
    arrays = {name: rng.standard_normal(shape).astype(STORED[dtype]) for name, shape in zip("qkv", sizes, strict=True)}
    return {**arrays, "cu_seqlens_q": starts[0], "cu_seqlens_k": starts[1]}


def options_of(layout="bshd", causal=False, alignment=None, window_size=(None, None), softmax_scale=None, softcap=0.0,
               dropout_p=0.0, return_lse=True):  # fmt: skip
    return attention_options(
        "attention", layout, causal, alignment, window_size, softmax_scale, softcap, dropout_p, None, return_lse
    )


def ragged_options(arrays, max_seqlen_q=None, max_seqlen_k=None, window_size=(None, None), **edits):
    """What flash_attn_varlen_func asks for; by default the longest lengths are the longest there are."""
    longest = [int(np.diff(arrays[f"cu_seqlens_{x}"]).max(initial=0)) for x in "qk"]
    return Options(
        axes="thd",
        window=window_size,
        needs_lse=True,
        max_seqlen_q=longest[0] if max_seqlen_q is None else max_seqlen_q,
        max_seqlen_k=longest[1] if max_seqlen_k is None else max_seqlen_k,
        **edits,
    )


def paged(rng, arrays, page_size, spare=3):
    """The same keys and values in pages, in random order among `spare` more that hold nan, as do unused rows."""
    starts = arrays["cu_seqlens_k"]
    lengths = np.diff(starts)
    used = [-(-int(length) // page_size) for length in lengths]
    order = rng.permutation(sum(used) + spare).astype(np.int32)
    table = np.full((len(lengths), max(1, *used)), order[-1], np.int32)
    found = dict(arrays)
    for name in "kv":
        x = arrays[name]
        found[name] = np.full((len(order), page_size, *x.shape[1:]), np.nan, x.dtype)
    place = 0
    for index, count in enumerate(used):
        table[index, :count] = order[place : place + count]
        place += count
        for key in range(lengths[index]):
            page, row = table[index, key // page_size], key % page_size
            for name in "kv":
                found[name][page, row] = arrays[name][starts[index] + key]
    found["block_table"] = table
    return found


def without_pages(arrays, index):
    """(arrays, arrays) of pages: one sequence's are outside of all there are, or are one page of zeros."""
    lost, zeros = ({**arrays, "block_table": arrays["block_table"].copy()} for _ in range(2))
    lost["block_table"][index] = np.resize([2**31 - 1, -1, -(2**31)], arrays["block_table"].shape[1])
    zeros["block_table"][index] = len(arrays["k"])
    for name in "kv":
        zeros[name] = np.concatenate([arrays[name], np.zeros_like(arrays[name][:1])])
    return lost, zeros


# ---------------------------------------------------------------------------------------------------
# Launches
# ---------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """What a launch left, and what was asked of it."""

    out: Any
    lse: Any
    problem: Any
    plan: Any


def problem_of(arrays, options):
    """The problem of NumPy arrays by our words, as the door would read it."""
    specs = tuple((name, Spec(name, x.shape, x.dtype.name)) for name, x in arrays.items())
    return read("attention", specs, options._replace(takes_float8=True))


def plan_of(problem, kernel, device=H100, fixed_split_size=None, **edits):
    """The plan as if `kernel` had been chosen; `edits` replace its fields.

    Where only num_splits is replaced, the keys of a problem that is not ragged are cut into so many equal splits.
    """
    tile = edits.get("tile") or (hopper_tile(problem) if kernel == "hopper" else plan.gpu_tile(problem, device, kernel))
    size, splits = 0, 1
    if kernel == "splitkv":
        size, splits, _, _ = split(problem, device, tile.block_q, tile.block_k, fixed_split_size)
        edits.setdefault("num_slots", 2 * device.num_units)
    elif kernel == "hopper" and fixed_split_size is not None:
        size, splits, _, _ = split_pieces(problem, 1, 1, tile.block_k, fixed_split_size)
    if "num_splits" in edits and problem.layout.lengths_are_data and kernel == "splitkv":
        size = size or EVEN
    elif "num_splits" in edits and (size or (kernel == "hopper" and not problem.layout.lengths_are_data)):
        size = -(-max(1, problem.sizes.seqlen_k) // (tile.block_k * edits["num_splits"])) * tile.block_k
    if kernel == "splitkv" and problem.layout.lengths_are_data:
        most = edits.get("num_splits", splits)
        edits.setdefault("num_workers", blocks_of_splitkv(problem, tile.block_q, most, edits["num_slots"]))
    chosen = plan.choose(problem, device)
    if kernel == "hopper":
        edits.setdefault("num_slots", device.num_units)
        edits.setdefault("num_workers", 2)  # fewer than there are tiles, so that a block that is to take several does
        edits.setdefault(
            "instead", plan_of(problem, "splitkv" if problem.dtype == "float8_e4m3fn" else "flash", device)
        )
    return replace(chosen, **{"kernel": kernel, "tile": tile, "split_size": size, "num_splits": splits, **edits})


UNTOLD = 2**31 - 1
"""What nobody has told a merge: more splits than there is memory for."""


def guarded(shape, dtype):
    """An array of nan: what a kernel forgets to write shows."""
    return np.full(shape, np.nan, dtype)


def encode(wanted, address):
    """A tensor map for the emulator instead of the driver."""
    return emulator.encode_map(address, ITEMSIZE[wanted.dtype], wanted.dims, wanted.strides, wanted.box, wanted.swizzle)


class Call:
    """A call whose memory stays, so that it can be launched again; `sources` are those of `emulator.build`."""

    def __init__(self, arrays, options, kernel, dropout_seed=0, device=H100, sources=None, flags=FLAGS, **plan_edits):
        emulator.require_compiler()
        self.problem = problem = problem_of(arrays, options)
        self.plan = plan_of(problem, kernel, device, **plan_edits)
        self.results = {"out": guarded(problem.out_shape, STORED[problem.out_dtype])}
        if problem.needs_lse:
            self.results["lse"] = guarded(problem.lse_shape, np.float32)
        views = {name: view_of_numpy(x, x.dtype.name) for name, x in arrays.items()}
        homes = {name: x.ctypes.data for name, x in self.results.items()}
        recipe = recipe_of(self.plan, problem, views)
        workspace = recipe.workspace
        self.scratch = {
            "partial_out": guarded(workspace.partial_out, np.float32),
            "partial_lse": guarded(workspace.partial_lse, np.float32),
            "told": np.full(workspace.told, UNTOLD, np.int32),
            "schedule": np.full(workspace.schedule, UNTOLD, np.int32),
        }
        addresses = {name: x.ctypes.data for name, x in self.scratch.items() if x.size}
        self.grid, self.wanted = recipe.grid, recipe.specialisation
        given = [(x, False) for x in arrays.values()]
        given += [(x, True) for x in (*self.results.values(), *self.scratch.values())]
        self.buffers = [(x, writable) for x, writable in given if x.size]
        self.launches = []
        for each in recipe.launches:
            what = each.specialisation
            record = record_of(each, views, homes, dropout_seed, addresses, encode=encode)
            built = emulator.build(what.source, what.expression, sources=sources, flags=flags)
            self.launches.append((built, record, each.grid, what))

    def run(self, schedule=0, seed=0):
        for built, record, grid, what in self.launches:
            block = (what.threads, what.shared_memory)
            built.launch(record, grid, *block, self.buffers, schedule, seed, cluster=what.cluster)
        return Result(self.results["out"], self.results.get("lse"), self.problem, self.plan)


def run(arrays, options, kernel, schedule=0, seed=0, **call):
    """One launch under the emulator, on arrays by our words; `call` as for `Call`."""
    return Call(arrays, options, kernel, **call).run(schedule, seed)


# ---------------------------------------------------------------------------------------------------
# The definition
# ---------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """One sequence: where its rows lie in results with heads first, and what `numpy_ref.attention` is asked."""

    place: Any
    operands: dict
    edits: dict


def heads_first(array, problem):
    """A view of an operand or `out` whose axes are (..., heads, rows, head_dim)."""
    return array if problem.layout.axes == "bhsd" else array.swapaxes(-3, -2)


def descale(arrays, name, problem, index):
    """What one sequence's float8 numbers of q, k or v are multiples of, by head: (heads, 1, 1)."""
    sizes = problem.sizes
    heads = sizes.num_heads_v if name == "v" else sizes.num_heads_k
    factors = np.broadcast_to(arrays.get(f"{name}_descale", np.float32(1.0)), (sizes.batch, heads))[index]
    repeats = sizes.num_heads // heads if name == "q" else 1
    return np.repeat(factors, repeats).astype(np.float64)[:, None, None]


def parts_of(arrays, problem, dropout_seed=0):
    """Every sequence of a call."""
    sizes = problem.sizes
    wide = {name: np.asarray(arrays[name]).astype(np.float64) for name in "qkv"}
    if problem.layout.ragged:
        starts_q, starts_k = arrays["cu_seqlens_q"], arrays["cu_seqlens_k"]
        for index in range(sizes.batch):
            rows = slice(int(starts_q[index]), int(starts_q[index + 1]))
            num_keys = int(starts_k[index + 1] - starts_k[index])
            if problem.layout.page_size:
                pages = arrays["block_table"][index, : -(-num_keys // problem.layout.page_size)]
                keys = {name: np.concatenate([wide[name][pages].reshape(-1, *wide[name].shape[2:])]) for name in "kv"}
                keys = {name: x[:num_keys] for name, x in keys.items()}
            else:
                keys = {name: wide[name][starts_k[index] : starts_k[index + 1]] for name in "kv"}
            place = (slice(None), rows)
            yield _part(arrays, problem, dropout_seed, index, place, {"q": wide["q"][rows], **keys})
        return
    for index in range(sizes.batch):
        of_this = {name: x[min(index, len(x) - 1)] for name, x in wide.items()}
        yield _part(arrays, problem, dropout_seed, index, (index,), of_this)


def _part(arrays, problem, dropout_seed, index, place, operands):
    sizes, edits = problem.sizes, problem.edits
    q, k, v = (heads_first(operands[name], problem) * descale(arrays, name, problem, index) for name in "qkv")
    k = np.repeat(k, sizes.num_heads // sizes.num_heads_k, axis=0)
    v = np.repeat(v, sizes.num_heads // sizes.num_heads_v, axis=0)
    seqlen_q, seqlen_k = q.shape[-2], k.shape[-2]
    scores = (sizes.num_heads, seqlen_q, seqlen_k)
    ahead = np.arange(seqlen_k) - np.arange(seqlen_q)[:, None]
    distance = ahead - problem.mask.offset(seqlen_q, seqlen_k)
    visible = np.ones(scores, bool)
    if problem.mask.left is not None:
        visible &= distance >= -problem.mask.left
    if problem.mask.right is not None:
        visible &= distance <= problem.mask.right

    def of_this(name):
        array = np.asarray(arrays[name])
        return np.broadcast_to(array, (sizes.batch, *scores))[index].astype(np.float64)

    bias = np.zeros(scores)
    if "mask" in arrays:
        visible &= of_this("mask") != 0
    if "bias" in arrays:
        bias = of_this("bias")
        visible &= ~np.isneginf(bias)
    if "alibi_slopes" in arrays:
        slopes = np.broadcast_to(arrays["alibi_slopes"], (sizes.batch, sizes.num_heads))[index].astype(np.float64)
        bias = bias - slopes[:, None, None] * tokens_apart(problem, seqlen_q, seqlen_k)
    keep = True
    if problem.dropout_p:
        head, row = np.arange(sizes.num_heads)[:, None], np.arange(seqlen_q)
        keep = numpy_ref.dropout_keep(problem.dropout_p, dropout_seed, index, head, row, range(seqlen_k))
    sinks = arrays["sinks"].astype(np.float64)[:, None] if "sinks" in arrays else None
    asked = {
        "visible": visible,
        "scale": edits.softmax_scale,
        "softcap": edits.softcap,
        "bias": bias,
        "sinks": sinks,
        "keep": keep,
        "dropout_p": problem.dropout_p,
    }
    return Part(place, {"q": q, "k": k, "v": v}, asked)


def tokens_apart(problem, seqlen_q, seqlen_k):
    """Of rows and keys, as ALiBi's slopes multiply it."""
    first, step = problem.edits.distances or (problem.mask.offset(seqlen_q, seqlen_k), 1)
    return np.abs(first + step * (np.arange(seqlen_q)[:, None] - np.arange(seqlen_k)))


def _whole(arrays, problem, dropout_seed, compute):
    """Results of `compute` for every sequence, in the caller's layout; what belongs to none is (0, -inf)."""
    out, lse = np.zeros(problem.out_shape), np.full(problem.lse_shape, -np.inf)
    by_head = heads_first(out, problem)
    for part in parts_of(arrays, problem, dropout_seed):
        by_head[part.place], lse[part.place] = compute(part)
    return out, lse


def definition(arrays, problem, dropout_seed=0):
    """(out, lse) in float64."""

    def compute(part):
        state = numpy_ref.attention(*part.operands.values(), **part.edits)
        return state.out, state.lse

    return _whole(arrays, problem, dropout_seed, compute)


# ---------------------------------------------------------------------------------------------------
# The bar
# ---------------------------------------------------------------------------------------------------


def emulation(arrays, problem, block_k, dropout_seed=0, kernel="hopper", tensor_cores=False):
    """`out` as the algorithm gives it, block by block, where weights and the result are rounded and nothing else.

    float32 sums are rounded after each term; or, as `tensor_cores` have it, cut off after sixteen.
    """
    dtype, of_weights, shift = STORED[problem.out_dtype], STORED[problem.dtype], 1.0
    if problem.dtype == "float8_e4m3fn":
        of_weights, shift = (of_weights, 2.0**8) if kernel == "hopper" else (np.float16, 1.0)  # see float8.cuh
    inner = np.float32 if problem.dtype == "float32" else np.float64

    def rounded(x):
        return x.astype(dtype).astype(inner)

    def rounded_weights(x):
        return (x * shift).astype(of_weights).astype(inner) / shift

    def compute(part):
        q, k, v = (x.astype(inner) for x in part.operands.values())
        asked = part.edits
        row_max = np.full(q.shape[:-1], -np.inf, inner)
        row_sum, out = np.zeros_like(row_max), np.zeros((*q.shape[:-1], v.shape[-1]), inner)
        bias, scale, softcap = asked["bias"].astype(inner), inner(asked["scale"]), inner(asked["softcap"])
        unedited = not (softcap or bias.any())
        keep = np.broadcast_to(asked["keep"], bias.shape)
        grow = inner(0.0 if problem.dropout_p == 1.0 else 1.0 / (1.0 - problem.dropout_p))
        for start in range(0, k.shape[-2], block_k):
            keys = slice(start, start + block_k)
            scores = _add_product(inner(0.0), q, k[:, keys], tensor_cores)
            if unedited:
                scores = scores * np.float64(inner(scale * LOG2E))
            elif softcap:
                scores = (softcap * np.tanh(scores * scale / softcap) + bias[..., keys]) * LOG2E
            else:
                scores = (scores * scale + bias[..., keys]) * LOG2E
            scores = np.where(asked["visible"][..., keys], scores, -np.inf)
            highest = np.maximum(row_max, scores.max(axis=-1).astype(inner))
            origin = np.where(np.isneginf(highest), inner(0.0), highest)
            # One rounding, of the product and the difference together: weights of the largest scores are not quite 1.
            scores = (np.float64(scores) - origin[..., None]).astype(inner)
            shrink, weights = np.exp2(row_max - origin), np.exp2(scores)
            row_max, row_sum = highest, row_sum * shrink + weights.sum(axis=-1)
            kept = rounded_weights(weights * np.where(keep[..., keys], grow, inner(0.0)))
            values = np.where(np.isfinite(v[:, keys]), v[:, keys], inner(0.0))
            out = _add_product(out * shrink[..., None], kept, values.swapaxes(-1, -2), tensor_cores)
        sink = inner(-np.inf) if asked["sinks"] is None else (asked["sinks"] * LOG2E).astype(inner)
        highest = np.maximum(row_max, sink)
        origin = np.where(np.isneginf(highest), inner(0.0), highest)
        shrink = np.exp2(row_max - origin)
        total = row_sum * shrink + np.where(np.isposinf(sink), inner(1.0), np.exp2(sink - origin))
        return rounded(out * (shrink / np.where(total == 0.0, 1.0, total))[..., None]), 0.0

    with np.errstate(all="ignore"):
        return _whole(arrays, problem, dropout_seed, compute)[0]


def _add_product(total, a, b, tensor_cores=False):
    """``total + a @ b.T``; in float32 term after term, from planes of bfloat16 that add up to the numbers.

    Tensor cores add sixteen products to a sum at once, nearly exactly, and cut off what float32 has no room for (Fasi,
    Higham, Mikaitis and Pranesh, Numerical behavior of NVIDIA tensor cores, 2021).
    """
    if a.dtype == np.float64:
        return total + a @ b.swapaxes(-1, -2)
    total = np.array(np.broadcast_to(total, (*a.shape[:-1], b.shape[-2])), np.float32)
    planes_a, planes_b = _planes(a), _planes(b)
    for first in range(0, a.shape[-1], 16):
        for j, right in enumerate(planes_b):
            for left in planes_a[: 3 - j]:
                if tensor_cores:
                    some = slice(first, first + 16)
                    products = left[..., some].astype(np.float64) @ right[..., some].astype(np.float64).swapaxes(-1, -2)
                    total = _cut_off(products + total)
                    continue
                for term in range(first, min(first + 16, a.shape[-1])):
                    total += left[..., term, None] * right[..., None, :, term]
    return total


def _cut_off(x):
    """Float64 numbers as float32, rounded toward zero."""
    near = x.astype(np.float32)
    return np.where(np.abs(near.astype(np.float64)) > np.abs(x), np.nextafter(near, np.float32(0.0)), near)


def _planes(x):
    """Three float32 arrays whose sum is x, each with eight significant bits."""
    planes = []
    for _ in range(3):
        planes.append((x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32))
        x = x - planes[-1]
    return planes


def assert_within_the_bar(actual, exact, emulated, dtype, largest, slack=1.0):
    """Fail unless `actual` is no further from `exact` than the bar lets it; nan and infinities exactly there.

    `slack` is for what float32 is besides: 2e-6 of the largest value.
    """
    finite = np.isfinite(exact) & np.isfinite(emulated)
    size, own = np.where(finite, exact, 0.0), np.where(finite, emulated, 0.0)
    error, own = np.where(finite, actual.astype(np.float64), 0.0) - size, np.abs(own - size)
    ulp = np.ldexp(1.0, np.frexp(np.maximum(np.abs(size), 2.0 ** LOWEST[dtype]))[1] - 1 - BITS[dtype])
    _assert_within(actual, exact, 2.0 * own.max(initial=0.0) + ulp)
    if dtype == "float32":
        worst = np.abs(error).max(initial=0.0)
        assert worst <= slack * 2e-6 * largest, f"an error of {worst:.3g} beside values of {largest:.3g}"
    if error.size >= ENOUGH:
        mean, allowed = np.abs(error).mean(), 1.5 * own.mean()
        assert mean <= allowed, f"mean error {mean:.3g}, allowed {allowed:.3g}"


def assert_close_lse(actual, exact, cut_off=0.0):
    """Fail unless lse is right to 1e-5, absolutely or of its size, and to `cut_off`; -inf and nan exactly there."""
    _assert_within(actual, exact, 1e-5 * np.maximum(1.0, np.abs(np.where(np.isfinite(exact), exact, 0.0))) + cut_off)


def cut_off(arrays, problem, kernel, exact_lse):
    """How far lse may be off because the tensor cores of Hopper cut off sums of float8 products behind 13 bits.

    After each 32 numbers of a head dimension a score may have lost 2^-13 of what it has become, and once more for the
    products among themselves.  lse loses what scores do, weighted as the softmax weighs them.
    """
    if kernel != "hopper" or problem.dtype != "float8_e4m3fn":
        return 0.0

    def compute(part):
        q, k, _ = part.operands.values()
        asked, scores, lost = part.edits, 0.0, 0.0
        for first in range(0, q.shape[-1], 32):
            scores = scores + q[..., first : first + 32] @ k[..., first : first + 32].swapaxes(-1, -2)
            lost = lost + 2.0**-12 * np.abs(scores)
        scores = scores * asked["scale"]
        if asked["softcap"]:
            scores = asked["softcap"] * np.tanh(scores / asked["softcap"])
        with np.errstate(invalid="ignore"):
            weights = np.exp(scores + asked["bias"] - exact_lse[part.place][..., None])
        weights = np.where(asked["visible"] & np.isfinite(weights), weights, 0.0)
        return 0.0, (weights * lost).sum(axis=-1) * abs(asked["scale"])

    return np.maximum(_whole(arrays, problem, 0, compute)[1], 0.0)


def _assert_within(actual, exact, allowed):
    """`assert_matches` with its own tolerance for each value."""
    assert_matches(actual, exact, atol=np.inf)
    with np.errstate(invalid="ignore"):
        excess = np.where(np.isfinite(exact), np.abs(actual.astype(np.float64) - exact) - allowed, 0.0)
    if excess.size:
        where = np.unravel_index(np.argmax(excess), excess.shape)
        assert_matches(np.asarray(actual)[where], exact[where], atol=allowed[where])


def check(arrays, options, kernel, schedule=0, seed=0, dropout_seed=0, **call):
    """Run a call and hold it to the definition; returns what it left."""
    found = run(arrays, options, kernel, schedule, seed, dropout_seed=dropout_seed, **call)
    out, lse, problem, chosen = found
    exact_out, exact_lse = definition(arrays, problem, dropout_seed)
    assert_close_lse(lse, exact_lse, cut_off(arrays, problem, chosen.kernel, exact_lse))
    emulated = emulation(arrays, problem, chosen.tile.block_k, dropout_seed, chosen.kernel)
    values = np.abs(np.asarray(arrays["v"]).astype(np.float64))
    largest = values[np.isfinite(values)].max(initial=0.0)
    assert_within_the_bar(out, exact_out, emulated, problem.out_dtype, largest)
    return found
