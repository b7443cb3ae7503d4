"""Operands that kernels cannot read where they lie, or none that is fast: copied, for forward and gradients alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from cupyattn.cuda.launching.gradients import BackwardRecipe
from cupyattn.cuda.launching.memory import CuPyMemory, copied
from cupyattn.cuda.launching.recipe import Recipe
from cupyattn.cuda.launching.views import View
from cupyattn.problem import Problem, Shape, Spec

R = TypeVar("R", Recipe, BackwardRecipe)


def readable(
    memory: CuPyMemory,
    operands: Mapping[str, Any],
    views: Mapping[str, View],
    specs: Mapping[str, Spec],
    problem: Problem,
    recipe_of: Callable[[Mapping[str, View], tuple[str, ...]], R],
) -> tuple[dict[str, Any], dict[str, View], R]:
    """The operands, copied as far as their recipe asks for it, where they lie then, and the recipe for that.

    `recipe_of` takes views, and the names of operands that were remade.  To be asked for among `memory.temporaries`.
    """
    now, lie = dict(operands), dict(views)
    recipe = recipe_of(lie, ())
    if recipe.copies:
        for name in recipe.copies:
            now[name] = copied(memory, name, now[name], problem.sizes.batch_shape)
            dtype = "float32" if name in ("alibi_slopes", "sinks") else specs[name].dtype
            lie[name] = memory.view(now[name], dtype)
        recipe = recipe_of(lie, ())
    if recipe.remade:
        for name in recipe.remade:
            now[name] = memory.fresh(now[name], _of_all_batches(tuple(now[name].shape), problem))
            lie[name] = memory.view(now[name], specs[name].dtype)
        recipe = recipe_of(lie, recipe.remade)
    return now, lie, recipe


def _of_all_batches(shape: Shape, problem: Problem) -> Shape:
    """That of an array which batches may share, once each has its own."""
    if problem.layout.ragged:
        return shape
    return (problem.sizes.batch, *(1,) * (3 - len(shape)), *shape[-3:])
