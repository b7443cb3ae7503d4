"""Gradients on a GPU: several launches, one after the other, and sums over what repeats an operand."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from cupyattn.cuda.copying import readable
from cupyattn.cuda.launching.gradients import (
    NAMES,
    Written,
    as_asked,
    backward_recipe,
    with_dtypes,
)
from cupyattn.cuda.launching.memory import CuPyMemory
from cupyattn.cuda.making.module import Launch, kernel
from cupyattn.plan import Plan
from cupyattn.problem import Problem, Shape, Spec

__all__ = ["NAMES", "queue"]

POINTERS = {"dsinks": "sink_rows", "dalibi_slopes": "slope_parts"}
"""What a kernel calls that which becomes a gradient by a sum."""


def queue(
    memory: CuPyMemory,
    index: int,
    operands: Mapping[str, Any],
    specs: Mapping[str, Spec],
    results: Mapping[str, Any],
    plan: Plan,
    problem: Problem,
    seed: int,
) -> None:
    """All launches, on the caller's stream; `results` are the gradients by operand."""
    if 0 in problem.out_shape or not problem.sizes.num_heads:
        for array in results.values():
            memory.zero(array)
        return
    views = {name: memory.view(array, specs[name].dtype) for name, array in operands.items()}
    stream = memory.stream(index)
    kept: list[Any] = list(operands.values())
    with memory.temporaries(stream):
        now, views, recipe = readable(memory, operands, views, specs, problem, partial(backward_recipe, plan, problem))
        kept += now.values()
        asked = {name: as_asked(x, specs[name].shape, specs[name].dtype) for name, x in recipe.written.items()}
        recipe = with_dtypes(recipe, {name: x.dtype for name, x in asked.items()})
        like = operands["q"]
        places = {
            name: results[name] if x.is_whole else memory.empty(x.shape, x.dtype, like) for name, x in asked.items()
        }
        for name, array in places.items():
            # Rows and keys of no sequence, and tiles of no rows: nobody writes there.
            if problem.layout.ragged or name == "alibi_slopes":
                memory.zero(array)
        rows = {name: memory.empty((recipe.num_rows,), "float32", like) for name in ("lse_log2", "delta")}
        if recipe.num_flags:
            rows["flags"] = memory.empty((recipe.num_flags,), "int32", like)
            memory.zero(rows["flags"])
        addresses = {name: memory.pointer(array) for name, array in rows.items()}
        for name, array in places.items():
            addresses[POINTERS.get(f"d{name}", f"d{name}")] = memory.pointer(array)
        launches = []
        for step in recipe.steps:
            what, record = step.specialisation, recipe.record_of(step, views, addresses, seed)
            launches.append(Launch(kernel(what, index), (step.grid, 1, 1), what, record, stream, kept))
        for launch in launches:  # nothing is written unless all are ready
            launch()
        for name, array in places.items():
            if not asked[name].is_whole:
                memory.sum_into(results[name], array, axes_of(name, asked[name], specs[name].shape, problem))


def axes_of(name: str, written: Written, shape: Shape, problem: Problem) -> tuple[int, ...]:
    """The axes over which what a kernel wrote has to be summed."""
    rank = len(written.shape)
    if name == "sinks":
        return tuple(axis for axis in range(rank) if axis != rank - 2)
    if name == "alibi_slopes":
        return (2,) if len(shape) == 2 and shape[0] == problem.sizes.batch else (0, 2)
    if written.parts > 1:  # an axis more
        place = rank - written.axis_of_parts
        found = written._replace(shape=written.shape[:place] + written.shape[place + 1 :], parts=1)
        return tuple(sorted({place, *(axis + (axis >= place) for axis in axes_of(name, found, shape, problem))}))
    padded = (1,) * (rank - len(shape)) + tuple(shape)
    if len(padded) > rank:  # several batch axes of one
        padded = padded[-rank:]
    return tuple(axis for axis in range(rank) if padded[axis] == 1 and written.shape[axis] != 1)
