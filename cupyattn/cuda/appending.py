"""New keys and values on their way into a cache: one launch, in front of that of attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cupyattn.cuda.launching import append
from cupyattn.cuda.launching.memory import CuPyMemory
from cupyattn.cuda.launching.views import has_to_be_copied
from cupyattn.cuda.making.module import Launch, kernel
from cupyattn.problem import Problem, Spec

OPERANDS = ("v_new", "rotary_cos", "rotary_sin", "rotary_seqlens")
"""Operands that attention knows nothing of; of k_new it has to know how many there are."""


def ready(
    memory: CuPyMemory,
    index: int,
    operands: dict[str, Any],
    specs: Mapping[str, Spec],
    problem: Problem,
    cache_seqlen: int,
    each_row: bool,
    interleaved: bool,
) -> Launch:
    """That of ``append.cu``; where there are tables, "q" among the operands is the rotated copy from here on."""
    views = {}
    stream = memory.stream(index)
    with memory.temporaries(stream):
        for name in append.POINTERS:
            if name in operands:
                view = memory.view(operands[name], specs[name].dtype)
                if has_to_be_copied("", *view[1:], problem.sizes.batch_shape):
                    operands[name] = memory.contiguous(operands[name])
                    view = memory.view(operands[name], specs[name].dtype)
                views[name] = view
        kept = list(operands.values())
        if "rotary_cos" in operands:
            operands["q"] = memory.empty(specs["q"].shape, specs["q"].dtype, operands["q"])
            views["q_rotated"] = memory.view(operands["q"], specs["q"].dtype)
    recipe = append.recipe_of(problem, views, each_row, interleaved)
    record = append.record_of(recipe, views, cache_seqlen)
    what = recipe.specialisation
    return Launch(kernel(what, index), recipe.grid, what, record, stream, kept)
