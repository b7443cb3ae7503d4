"""Tensors of which only shape, strides and dtype are known, and a library for them that computes nothing.

A public function that is called with outlines refuses what it refuses before it looks at values, in the same words.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from cupyattn.arrays.library import Arrays, Job
from cupyattn.arrays.torch import Torch
from cupyattn.problem import Array


class ValuesAsked(Exception):
    """Nothing was refused before values were looked at."""


class Outlines(Torch):
    """Of the CPU, whatever device they are outlines of: what only a GPU refuses is refused when it runs."""

    def check_call(self, function: str) -> None:
        """Whoever makes an outline knows that it is one."""

    def refuses(self, array: Any) -> str | None:
        return None

    def place(self, array: Any) -> tuple[str, Any]:
        return "cpu", "an outline"

    def as_called(self, arrays: Arrays, kind: str, in_place: tuple[str, ...]) -> Arrays:
        return arrays

    def is_deferred(self, arrays: Arrays) -> bool:
        return False

    def differentiates(self, arrays: Arrays) -> bool:
        return False

    def values(self, array: Any) -> Array:
        raise ValuesAsked

    def bring(self, values: Array, like: Any) -> Any:
        return outline(values.shape, None, values.dtype.name)

    def note_overwritten(self, array: Any) -> None:
        """Nothing was."""

    def check_in_place(self, function: str, name: str, array: Any) -> None:
        """It has no memory that could be another's."""

    def draw_seed(self, function: str) -> int:
        return 0

    def run(self, job: Job, arrays: Arrays) -> Arrays:
        return {name: outline(spec.shape, None, spec.dtype) for name, spec in job.results.items()}


@cache
def _kind() -> Any:
    import torch

    class Outline(torch.Tensor):
        """A tensor on the meta device that says so by its type."""

    return Outline


def outline(shape: tuple[int, ...], strides: tuple[int, ...] | None, dtype: Any) -> Any:
    """Of integers; `dtype` is torch's, or its name."""
    import torch

    kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if strides is None:
        return torch.empty(shape, dtype=kind, device="meta").as_subclass(_kind())
    return torch.empty_strided(shape, strides, dtype=kind, device="meta").as_subclass(_kind())


OUTLINES = Outlines()
