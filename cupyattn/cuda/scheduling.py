"""Schedules that are made once, for several calls whose lengths are the same."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from typing import Any

from cupyattn.cuda.launching.launch import recipe_of, record_of
from cupyattn.cuda.launching.memory import CuPyMemory, Stream
from cupyattn.cuda.launching.recipe import Recipe
from cupyattn.cuda.launching.views import View, contiguous_strides
from cupyattn.cuda.making.module import Launch, kernel
from cupyattn.plan import Plan
from cupyattn.problem import Problem, Spec
from cupyattn.reading import refusal

WORD = "scheduler_metadata"
Shared = Callable[[Hashable, Callable[[], Any]], Any]
"""What there is already for a key, or else what the function makes: of calls whose lengths are the same."""


def made(
    memory: CuPyMemory, index: int, operands: Mapping[str, Any], specs: Mapping[str, Spec], plan: Plan, problem: Problem
) -> tuple[Any, list[Launch]]:
    """Memory for a schedule, and the launch that makes it, if there is one: of calls of these specs by index arrays."""
    views = {name: View(0, spec.shape, contiguous_strides(spec.shape), spec.dtype) for name, spec in specs.items()}
    here = {name: memory.contiguous(array) for name, array in operands.items()}
    views |= {name: memory.view(array, specs[name].dtype) for name, array in here.items()}
    recipe = recipe_of(plan, problem, {name: view for name, view in views.items() if name != "v_new"})
    found = memory.result(Spec(WORD, (recipe.workspace.schedule,), "int32"), operands["cache_seqlens"])
    if recipe.schedule is None:
        return found, []
    record = record_of(recipe.schedule, views, {}, scratch={"schedule": memory.pointer(found)})
    what, stream = recipe.schedule.specialisation, memory.stream(index)
    return found, [Launch(kernel(what, index), recipe.schedule.grid, what, record, stream, [*here.values(), found])]


def shared_among(
    shared: Shared, memory: CuPyMemory, index: int, stream: Stream, recipe: Recipe, views: Mapping[str, View], like: Any
) -> Any:
    """The schedule of a call, queued if another one has not done so on this stream; None if each has to make its own.

    So it is without a schedule, and in a CUDA graph: that runs again, when what was made outside of it may be gone.
    """
    wanted = recipe.schedule
    if wanted is None or memory.is_capturing(stream):
        return None

    def make() -> Any:
        found = memory.empty((recipe.workspace.schedule,), "int32", like)
        record = record_of(wanted, views, {}, scratch={"schedule": memory.pointer(found)})
        Launch(kernel(wanted.specialisation, index), wanted.grid, wanted.specialisation, record, stream, [found])()
        return found

    return shared((wanted, memory, index, stream), make)


def going_by(function: str, recipe: Recipe, view: View) -> Recipe:
    """The recipe of a call that is given a schedule; an empty one says nothing.

    Raises
    ------
    ValueError
        It was made for calls of other sizes, or is not as it was made.
    """
    words = recipe.workspace.schedule
    if view.shape == (0,):
        return recipe
    if view.shape != (words,):
        rule = f"{WORD} was made for other calls: get_scheduler_metadata makes ({words},) for this one"
        raise ValueError(refusal(function, rule, (WORD, view.shape)))
    if view.strides != (1,) or view.pointer % 8:
        rule = f"{WORD} has to lie as get_scheduler_metadata made it, in one piece from a multiple of 8 bytes on"
        raise ValueError(refusal(function, rule, (WORD, view.shape, f"strides {view.strides}")))
    return without(recipe)


def without(recipe: Recipe) -> Recipe:
    """The recipe of a call whose schedule is there."""
    return replace(recipe, schedule=None, workspace=recipe.workspace._replace(schedule=0))
