"""Sequences of which only so many rows and keys are used, as packed sequences: no kernel has to know of it.

Of each sequence, of a dense batch or packed itself, there are three in a row: its used rows over its used keys, its
other rows over no keys, and no rows over its other keys.  So nothing that is unused meets anything, whatever it holds,
and all of it has results and gradients of zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from cupyattn.arrays import Arrays
from cupyattn.problem import Problem, Shape, Spec

PARTS = 3
"""Packed sequences of each one."""
NOTE = "each sequence is three packed ones: what is used, the other rows, the other keys; bhsd arrays are copied for it"
ROWS = {"q": "q", "k": "k", "v": "k", "dout": "q", "out": "q"}
"""Arrays of rows, (batch, seqlen, num_heads, dim) or with heads first, and by whose length they go."""
USED = ("seqlens_q", "seqlens_k")
LENGTHS = (*USED, *(f"cu_{name}" for name in USED), "cache_seqlens")
"""What says where sequences begin, and how much of them is used."""


@lru_cache(maxsize=4096)
def packed(problem: Problem) -> Problem:
    """The same as a problem of packed sequences."""
    sizes, edits = problem.sizes, problem.edits
    slopes, total = edits.alibi_slopes, sizes.total_q if problem.layout.ragged else sizes.batch * sizes.seqlen_q
    return replace(
        problem,
        sizes=replace(sizes, batch_shape=(PARTS * sizes.batch,), total_q=total),
        layout=replace(problem.layout, axes="thd", seqlens=False),
        edits=replace(edits, alibi_slopes=_packed_shape("alibi_slopes", slopes, problem)) if slopes else edits,
    )


def packed_specs(problem: Problem, specs: Mapping[str, Spec]) -> dict[str, Spec]:
    """Those of `packed_arrays`."""
    found = {
        name: spec._replace(shape=_packed_shape(name, spec.shape, problem))
        for name, spec in specs.items()
        if name not in LENGTHS
    }
    count = PARTS * problem.sizes.batch
    keys = ("cache_seqlens", "", count) if problem.layout.cached else ("cu_seqlens_k", "seqlens_k", count + 1)
    for name, used, size in (("cu_seqlens_q", "seqlens_q", count + 1), keys):
        known = next((specs[word].name for word in (used, name) if word in specs), used)
        found[name] = Spec(known, (size,), "int32")
    return found


def packed_arrays(problem: Problem, arrays: Arrays) -> Arrays:
    """Operands, and what is known of results, of any one library."""
    import array_api_compat

    xp = array_api_compat.array_namespace(arrays["q"])
    found = {name: _packed(xp, name, array, problem) for name, array in arrays.items() if name not in LENGTHS}
    for name, longest in zip(USED, (problem.sizes.seqlen_q, problem.sizes.seqlen_k), strict=True):
        if name == "seqlens_k" and problem.layout.cached:
            keys = arrays["cache_seqlens"]
            found["cache_seqlens"] = xp.reshape(xp.stack([keys, *[xp.zeros_like(keys)] * (PARTS - 1)], axis=1), (-1,))
        else:
            bounds = _bounds(xp, arrays, f"cu_{name}", longest, problem)
            found[f"cu_{name}"] = _starts(xp, arrays.get(name), bounds, name == "seqlens_q")
    return found


def forward(run: Callable[[Problem, Arrays], Arrays], problem: Problem, arrays: Arrays) -> Arrays:
    """The results by name, of whoever can `run` packed sequences."""
    found = run(packed(problem), packed_arrays(problem, arrays))
    results = {name: _dense(name, array, problem) for name, array in found.items()}
    if "lse" in results and problem.edits.sinks:  # which are the lse of rows that see no keys, and not of unused ones
        results["lse"] = _where_used(arrays, problem, results["lse"], -float("inf"))
    return results


def backward(
    run: Callable[[Problem, Arrays, Arrays], Arrays], problem: Problem, arrays: Arrays, known: Arrays
) -> Arrays:
    """The gradients by operand, of whoever can `run` packed sequences."""
    given = {name: array for name, array in known.items() if array is not None}
    if problem.edits.sinks:  # which have gradients of used rows alone
        given = {name: array for name, array in given.items() if name not in ("out", "lse")}
        given = {name: _where_used(arrays, problem, array, 0.0, name == "dout") for name, array in given.items()}
    whole = packed_arrays(problem, {**arrays, **given})
    found = run(
        packed(problem),
        {name: array for name, array in whole.items() if name not in known},
        {name: whole.get(name) for name in known},
    )
    return {name: _dense(name, array, problem) for name, array in found.items() if array is not None}


def _packed_shape(name: str, shape: Shape, problem: Problem) -> Shape:
    sizes = problem.sizes
    if problem.layout.ragged and name in (*ROWS, "lse", "dlse"):
        return shape
    if name in ROWS:
        heads, rows = (-2, -3) if problem.layout.axes == "bshd" else (-3, -2)
        return (sizes.batch * shape[rows], shape[heads], shape[-1])
    if name in ("lse", "dlse"):
        return (sizes.num_heads, sizes.batch * sizes.seqlen_q)
    if name != "sinks" and len(shape) == 2 and shape[0] == sizes.batch:
        return (PARTS * shape[0], shape[1])
    return shape


def _packed(xp: Any, name: str, array: Any, problem: Problem) -> Any:
    shape = _packed_shape(name, tuple(array.shape), problem)
    if shape == tuple(array.shape):
        return array
    if name in ROWS:
        rows = array if problem.layout.axes == "bshd" else xp.permute_dims(array, (0, 2, 1, 3))
        return xp.reshape(rows, shape)
    if name in ("lse", "dlse"):
        return xp.reshape(xp.permute_dims(array, (1, 0, 2)), shape)
    return xp.repeat(array, PARTS, axis=0)


def _dense(name: str, array: Any, problem: Problem) -> Any:
    """A result, or a gradient, as the caller's layout has it."""
    import array_api_compat

    xp, sizes = array_api_compat.array_namespace(array), problem.sizes
    if problem.layout.ragged and name in (*ROWS, "lse"):
        return array
    if name in ROWS:
        length = sizes.seqlen_q if ROWS[name] == "q" else sizes.seqlen_k
        rows = xp.reshape(array, (sizes.batch, length, *array.shape[1:]))
        return rows if problem.layout.axes == "bshd" else xp.permute_dims(rows, (0, 2, 1, 3))
    if name == "lse":
        return xp.permute_dims(xp.reshape(array, (sizes.num_heads, sizes.batch, sizes.seqlen_q)), (1, 0, 2))
    if name == "alibi_slopes" and len(array.shape) == 2:
        return xp.sum(xp.reshape(array, (sizes.batch, PARTS, sizes.num_heads)), axis=1, dtype=array.dtype)
    return array


def _bounds(xp: Any, arrays: Arrays, name: str, longest: int, problem: Problem) -> Any:
    """Where each whole sequence begins, and the last one ends, among all rows or keys."""
    import array_api_compat

    if problem.layout.ragged:
        return arrays[name]
    device = array_api_compat.device(arrays["q"])
    return longest * xp.arange(problem.sizes.batch + 1, dtype=xp.int32, device=device)


def _starts(xp: Any, used: Any, bounds: Any, of_rows: bool) -> Any:
    """cu_seqlens of the packed sequences, by where each whole one begins and the last one ends.

    Lengths outside of the arrays, which are not refused on a GPU, are cut; not by clip, for which
    array_api_compat has CuPy gather by a mask, and so wait for it.
    """
    first, end = bounds[:-1], bounds[1:]
    stop = end if used is None else first + _cut(xp, used, end - first)
    steps = (first, stop, end) if of_rows else (first, stop, stop)
    return xp.concat([xp.reshape(xp.stack(steps, axis=1), (-1,)), bounds[-1:]])


def _cut(xp: Any, used: Any, longest: Any) -> Any:
    """Lengths from 0 to the longest of each."""
    return xp.maximum(xp.minimum(xp.astype(used, xp.int32), longest), xp.zeros_like(longest))


def _where_used(arrays: Arrays, problem: Problem, array: Any, otherwise: float, is_out: bool = False) -> Any:
    """An array of rows' numbers, like lse or like out, with another number where a row is not used."""
    import array_api_compat

    used = arrays.get("seqlens_q")
    if used is None:
        return array
    xp, sizes = array_api_compat.array_namespace(array), problem.sizes
    device, ragged = array_api_compat.device(array), problem.layout.ragged
    rows = xp.arange(sizes.total_q if ragged else sizes.seqlen_q, dtype=xp.int32, device=device)
    if ragged:
        starts = _starts(xp, used, arrays["cu_seqlens_q"], of_rows=True)
        is_used = xp.searchsorted(starts[1:], rows, side="right") % PARTS == 0
    else:
        is_used = rows[None, :] < used[:, None]
    if ragged:
        shape: Shape = (sizes.total_q, 1, 1) if is_out else (1, sizes.total_q)
    elif not is_out:
        shape = (sizes.batch, 1, sizes.seqlen_q)
    elif problem.layout.axes == "bshd":
        shape = (sizes.batch, sizes.seqlen_q, 1, 1)
    else:
        shape = (sizes.batch, 1, sizes.seqlen_q, 1)
    number = xp.full((), otherwise, dtype=array.dtype, device=device)  # made there, not copied
    return xp.where(xp.reshape(is_used, shape), array, number)
