"""Gradients by the CUDA kernels under the emulator, and what they are held to: the dense derivative in float64.

    arrays = operands(rng, "bfloat16", heads=(4, 2, 2), seqlens=(17, 65), dims=(64, 64))
    check(with_dout(rng, arrays, options), options, schedule=1)

The bar: an emulation in NumPy rounds what the kernels have to round, the output, the weights and the derivatives of
scores, and each gradient at the end. A kernel's largest error may be twice the emulation's and its mean error one and a
half times; one unit in the last place is let go.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import emulator
import numpy as np
from emulated import (
    BITS,
    ENOUGH,
    FLAGS,
    LOWEST,
    STORED,
    definition,
    encode,
    guarded,
    heads_first,
    parts_of,
    problem_of,
    tokens_apart,
)
from oracle import assert_matches

from cupyattn.cuda.launching.gradients import as_asked, backward_recipe, with_dtypes
from cupyattn.cuda.launching.views import view_of_numpy
from cupyattn.plan import OF_BIAS, OF_KEYS, OF_QUERIES, OF_VALUES, BackwardTiles, choose_backward, heads_per_block
from cupyattn.problem import NAMED_DEVICES

A100 = replace(NAMED_DEVICES["A100"], num_units=1)
"""Whose kernels take everything; those of Hopper are asked for by `device`. It is full with one block: heads that share
keys are summed by one."""
OPERANDS = ("q", "k", "v", "bias", "sinks", "alibi_slopes")


def with_dout(rng, arrays, options, dlse=False):
    """The arrays of a call and a gradient of its output, and of its lse if asked for."""
    problem = problem_of(arrays, options)
    made = {"dout": rng.standard_normal(problem.out_shape).astype(STORED[problem.dtype])}
    if dlse:
        made["dlse"] = rng.standard_normal(problem.lse_shape).astype(np.float32)
    return {**arrays, **made}


class Result(NamedTuple):
    """Gradients by operand, and what was asked."""

    grads: dict
    problem: Any
    plan: Any
    out: Any
    lse: Any


def _of_these(passes, tiles):
    """The tiles of the passes that sum the same."""
    wanted = [bits for bits, _ in passes]
    these = [(x, heads) for x, heads in zip(tiles.passes, tiles.heads, strict=True) if x[0] in wanted]
    return BackwardTiles(tuple(x for x, _ in these), tuple(heads for _, heads in these))


class Call:
    """Gradients of a call whose memory stays; `sources` are those of `emulator.build`.

    `passes` replace the plan's; of fewer of them there are fewer gradients.
    """

    def __init__(
        self, arrays, options, dropout_seed=0, device=A100, sources=None, flags=FLAGS, passes=None, forward=None
    ):
        emulator.require_compiler()
        operands = {name: x for name, x in arrays.items() if name not in ("dout", "dlse")}
        self.problem = problem = replace(problem_of(operands, options), needs_lse=True)
        self.plan = choose_backward(problem, device)
        if passes is not None:
            sizes = problem.sizes
            together = sum(bits == OF_KEYS | OF_VALUES for bits, _ in passes)
            assert not together or sizes.num_heads_k == sizes.num_heads_v, "no plan sums these together"
            instead = self.plan.instead and replace(self.plan.instead, tile=_of_these(passes, self.plan.instead.tile))
            heads = tuple(heads_per_block(problem, device, *each) for each in passes)
            self.plan = replace(self.plan, tile=BackwardTiles(passes, heads), instead=instead)
        out, lse = forward or definition(operands, problem, dropout_seed)
        everything = dict(
            arrays, out=np.asarray(out).astype(STORED[problem.dtype]), lse=np.asarray(lse).astype(np.float32)
        )
        self.arrays = everything
        for name in ("alibi_slopes", "sinks"):
            if name in everything:
                everything[name] = everything[name].astype(np.float32)
        views = {name: view_of_numpy(x, x.dtype.name) for name, x in everything.items()}
        recipe = backward_recipe(self.plan, problem, views)
        assert not recipe.copies, recipe.copies
        wanted = {"sinks", *(name for bits, _ in self.plan.tile.passes for name in summed(bits))}
        asked = {
            name: as_asked(written, everything[name].shape, everything[name].dtype.name)
            for name, written in recipe.written.items()
            if name in wanted
        }
        self.asked = asked
        recipe = with_dtypes(recipe, {name: x.dtype for name, x in asked.items()})
        ragged = problem.layout.ragged
        self.results = {f"d{name}": guarded(x.shape, STORED.get(x.dtype, x.dtype)) for name, x in asked.items()}
        if ragged:  # rows and keys of no sequence are cleared by the launcher
            for x in self.results.values():
                x[...] = 0
        if "dalibi_slopes" in self.results:
            self.results["dalibi_slopes"][...] = 0
        self.scratch = {"lse_log2": guarded(recipe.num_rows, np.float32), "delta": guarded(recipe.num_rows, np.float32)}
        if recipe.num_flags:
            self.scratch["flags"] = np.zeros(recipe.num_flags, np.int32)
        names = {"dsinks": "sink_rows", "dalibi_slopes": "slope_parts"}
        homes = {names.get(n, n): x.ctypes.data for n, x in {**self.results, **self.scratch}.items()}
        given = [(x, False) for x in everything.values()] + [
            (x, True) for x in (*self.results.values(), *self.scratch.values())
        ]
        self.buffers = [(x, writable) for x, writable in given if x.size]
        self.launches = []
        for step in recipe.steps:
            what = step.specialisation
            kernel = emulator.build(what.source, what.expression, sources=sources, flags=flags)
            self.launches.append((kernel, recipe.record_of(step, views, homes, dropout_seed, encode), step))

    def flag_all(self):
        """As if the kernels on Hopper, which are left out, had raised all flags."""
        self.launches = [x for x in self.launches if x[2].specialisation.source != "hopper_backward.cu"]
        self.scratch["flags"][...] = 1

    def run(self, schedule=0, seed=0):
        for kernel, record, step in self.launches:
            what = step.specialisation
            kernel.launch(record, (step.grid, 1, 1), what.threads, what.shared_memory, self.buffers, schedule, seed)
        grads = {name: self._home(name) for name in self.asked}
        return Result(grads, self.problem, self.plan, self.arrays["out"], self.arrays["lse"])

    @np.errstate(all="ignore")
    def _home(self, name):
        found, like = self.results[f"d{name}"], self.arrays[name]
        if self.asked[name].is_whole:
            return found.reshape(like.shape)
        found = found.astype(np.float64)
        if name == "sinks":
            axes = (*range(found.ndim - 2), found.ndim - 1)
            return found.sum(axis=axes if not self.problem.layout.ragged else 1)
        if self.asked[name].parts > 1:
            found = found.sum(axis=-self.asked[name].axis_of_parts)
        if name == "alibi_slopes":
            return found.sum(axis=(0, 2) if like.ndim == 1 else 2)
        return sum_to(found, like.shape)


def summed(bits):
    """Operands whose gradients a pass comes to; those of sinks come with the rows, before all passes."""
    of_bit = {OF_QUERIES: ("q", "alibi_slopes"), OF_KEYS: ("k",), OF_VALUES: ("v",), OF_BIAS: ("bias",)}
    return ("sinks", *(name for bit, names in of_bit.items() if bits & bit for name in names))


def sum_to(gradient, shape):
    """Over the axes that `shape` repeats."""
    extra = gradient.ndim - len(shape)
    with np.errstate(invalid="ignore"):  # inf - inf
        gradient = gradient.sum(axis=tuple(range(extra)))
        made = tuple(axis for axis, size in enumerate(shape) if size == 1 and gradient.shape[axis] != 1)
        return gradient.sum(axis=made, keepdims=True)


def run(arrays, options, schedule=0, seed=0, **call):
    return Call(arrays, options, **call).run(schedule, seed)


# ---------------------------------------------------------------------------------------------------
# The definition
# ---------------------------------------------------------------------------------------------------


@np.errstate(all="ignore")
def derivative(arrays, problem, dropout_seed=0, rounding=None, forward=None):
    """Gradients by operand in float64; with `rounding`, as an algorithm that rounds to that dtype has them.

    `forward` is the (out, lse) to go by where it is rounded.
    """
    operands = {name: x for name, x in arrays.items() if name not in ("dout", "dlse", "out", "lse")}
    out, lse = definition(operands, problem, dropout_seed) if forward is None else forward
    grads = {name: np.zeros(_full(name, arrays, problem)) for name in OPERANDS if name in arrays}
    by_head = {"out": heads_first(np.asarray(out, np.float64), problem)}
    by_head["dout"] = heads_first(np.asarray(arrays["dout"], np.float64), problem)
    dlse = np.asarray(arrays.get("dlse", np.zeros(problem.lse_shape)), np.float64)
    for index, part in enumerate(parts_of(operands, problem, dropout_seed)):
        rows = (by_head["out"], by_head["dout"], np.asarray(lse, np.float64), dlse)
        found = _of_part(part, *(x[part.place] for x in rows), problem, rounding)
        _add(grads, found, part, index, arrays, problem)
        if "sinks" in grads:
            grads["sinks"] += found["sinks"]
        if "alibi_slopes" in grads:
            slopes = grads["alibi_slopes"]
            slopes[... if slopes.ndim == 1 else index] += found["alibi_slopes"]
        if "bias" in grads:
            grads["bias"][index] += found["bias"]
    return {n: x if n in ("sinks", "alibi_slopes") else sum_to(x, arrays[n].shape) for n, x in grads.items()}


def _full(name, arrays, problem):
    sizes, shape = problem.sizes, arrays[name].shape
    if name in ("sinks", "alibi_slopes") or problem.layout.ragged:
        return shape
    if name == "bias":
        return (sizes.batch, sizes.num_heads, sizes.seqlen_q, sizes.seqlen_k)
    return (sizes.batch, *shape[-3:])


def _add(grads, found, part, index, arrays, problem):
    """dq, dk and dv of a sequence where they belong; heads that share keys are summed."""
    sizes = problem.sizes
    for name, heads in (("q", sizes.num_heads), ("k", sizes.num_heads_k), ("v", sizes.num_heads_v)):
        x = found[name]
        with np.errstate(invalid="ignore"):  # inf - inf
            x = x.reshape(heads, len(x) // heads, *x.shape[1:]).sum(axis=1)
        if problem.layout.ragged:
            starts = arrays["cu_seqlens_q" if name == "q" else "cu_seqlens_k"]
            grads[name][starts[index] : starts[index + 1]] += x.swapaxes(0, 1)
        else:
            heads_first(grads[name], problem)[index] += x


def _of_part(part, out, dout, lse, dlse, problem, rounding):
    q, k, v = part.operands.values()
    asked, scale = part.edits, part.edits["scale"]

    def rounded(x):
        return x if rounding is None else x.astype(rounding).astype(np.float64)

    with np.errstate(all="ignore"):
        scores = q @ k.swapaxes(-1, -2) * scale
        slope = 1.0
        if asked["softcap"]:
            share = np.tanh(scores / asked["softcap"])
            scores, slope = asked["softcap"] * share, 1.0 - share**2
        scores = scores + asked["bias"]
        seen = np.broadcast_to(asked["visible"], scores.shape) & ~np.isneginf(scores)
        empty = np.isneginf(lse)
        weights = np.where(seen, np.exp(scores - np.where(empty, 0.0, lse)[..., None]), 0.0)
        delta = np.where(empty, 0.0, (dout * out).sum(axis=-1) - dlse)
        factor = np.where(asked["keep"], 1.0 / (1.0 - asked["dropout_p"]) if asked["dropout_p"] < 1.0 else 0.0, 0.0)
        dweights = dout @ v.swapaxes(-1, -2) * factor
        changes = np.where(seen, weights * (dweights - delta[..., None]), 0.0)
        found = {"bias": changes, "v": product(rounded(weights * factor).swapaxes(-1, -2), dout, seen.swapaxes(-1, -2))}
        of_products = rounded(np.where(seen, changes * slope, 0.0))
        found["k"] = scale * product(of_products.swapaxes(-1, -2), q, seen.swapaxes(-1, -2))
        found["q"] = scale * product(of_products, k, seen)
        seqlen_q, seqlen_k = scores.shape[-2:]
        found["alibi_slopes"] = -(changes * tokens_apart(problem, seqlen_q, seqlen_k)).sum(axis=(-2, -1))
        if asked["sinks"] is not None:
            sinks = asked["sinks"]
            certain = np.isposinf(sinks) & np.isposinf(lse)
            weight = np.where(certain, 1.0, np.exp(sinks - np.where(empty, 0.0, lse)))
            found["sinks"] = np.where(empty, 0.0, -weight * delta).sum(axis=-1)
    return found


def product(weights, values, seen):
    """``weights @ values`` over pairs that are seen."""
    if np.isfinite(values).all():
        return weights @ values
    terms = np.where(seen[..., None], weights[..., None] * values[..., None, :, :], 0.0)
    return terms.sum(axis=-2)


# ---------------------------------------------------------------------------------------------------
# The bar
# ---------------------------------------------------------------------------------------------------


def check(arrays, options, schedule=0, seed=0, dropout_seed=0, **call):
    """Run a call and hold its gradients to the definition; returns what it left."""
    found = run(arrays, options, schedule, seed, dropout_seed=dropout_seed, **call)
    hold(arrays, found, dropout_seed)
    return found


def hold(arrays, found, dropout_seed=0):
    """Fail unless all gradients are within their bars; returns (largest error, largest share of a bar)."""
    problem = found.problem
    exact = derivative(arrays, problem, dropout_seed)
    assert set(found.grads) <= set(exact)
    rounding = STORED[problem.dtype]
    own = derivative(arrays, problem, dropout_seed, rounding, (found.out, found.lse))
    finite = [np.nan_to_num(np.asarray(arrays[name], np.float64), posinf=0.0, neginf=0.0) for name in ("dout", "v")]
    sums = np.sqrt(problem.sizes.head_dim_v) * max(1.0, np.prod([np.abs(x).max(initial=0.0) for x in finite]))
    held = [(0.0, 0.0)]
    for name in found.grads:
        dtype = arrays[name].dtype.name if name in ("q", "k", "v", "bias") else "float32"
        held.append(assert_within_the_bar(name, found.grads[name], exact[name], own[name], dtype, problem.dtype, sums))
    return tuple(max(x) for x in zip(*held, strict=True))


def assert_within_the_bar(name, actual, exact, own, dtype, inner, sums):
    """`sums` is how large the products get of which a small difference is taken."""
    if inner == "float32" and name in ("q", "k"):  # an infinity times a plane of 0 is nan
        actual, exact, own = (np.where(np.isinf(x), np.nan, x) for x in (actual, exact, own))
    assert_matches(actual, exact, atol=np.inf)
    finite = np.isfinite(exact) & np.isfinite(own)
    if not finite.any():
        return 0.0, 0.0
    size, own = np.where(finite, exact, 0.0), np.where(finite, own, 0.0)
    if dtype in STORED and dtype != "float64":
        own = own.astype(STORED[dtype]).astype(np.float64)
    largest = np.abs(size).max()
    error, off = np.abs(np.where(finite, np.asarray(actual, np.float64), 0.0) - size), np.abs(own - size)
    bits, lowest = BITS.get(dtype, 23), LOWEST.get(dtype, -126)
    ulp = np.ldexp(1.0, np.frexp(np.maximum(np.abs(size), 2.0**lowest))[1] - 1 - bits)
    # Sums of float32 products, in whatever order: 2^-24 of the largest thing that was added, a few times.
    slack = (4e-6 if inner == "float32" else 1e-6) * max(largest, sums / 4.0)
    allowed = 2.0 * off.max() + ulp + slack
    worst = (error - allowed).max()
    assert worst <= 0.0, f"d{name}: {worst:.3g} beyond the bar; largest error {error.max():.3g}, own {off.max():.3g}"
    if error.size >= ENOUGH and inner != "float32":
        assert error.mean() <= 1.5 * off.mean() + slack, f"d{name}: mean error {error.mean():.3g}, own {off.mean():.3g}"
    return float(error.max()), float((error / allowed).max())
