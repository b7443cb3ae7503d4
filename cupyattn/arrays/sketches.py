"""Arrays of which no more is known than their shape, dtype and device, and a library for them: calls are rehearsed.

A public function that is called with sketches reads the call, refuses what can be refused, plans, and stops before the
work: `Rehearsed` is what it would have done.  Sketches are on any device, be it there or not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

from cupyattn.arrays.library import Arrays, Library, Specs
from cupyattn.problem import ITEMSIZE, Array, Device, Problem, Shape

Index = int | slice | EllipsisType | None


class Rehearsed(Exception):
    """A call up to the work: specs of its arrays by our words, and each problem with its plan."""

    def __init__(self, specs: Specs, steps: Sequence[tuple[Problem, Any]]) -> None:
        super().__init__("a call was rehearsed")
        self.specs, self.steps = dict(specs), steps


@dataclass(frozen=True, eq=False)
class Sketch:
    """An array without values."""

    shape: Shape
    dtype: str
    device: Device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __getitem__(self, index: Index | tuple[Index, ...]) -> Sketch:
        """By integers, slices, an ellipsis and new axes: what is done with arrays before the work begins."""
        parts = list(index) if isinstance(index, tuple) else [index]
        if Ellipsis in parts:
            where, taken = parts.index(Ellipsis), sum(part is not None for part in parts) - 1
            parts[where : where + 1] = [slice(None)] * (self.ndim - taken)
        sizes, left = [], list(self.shape)
        for part in parts:
            if part is None:
                sizes.append(1)
            elif isinstance(part, slice):
                sizes.append(len(range(left.pop(0))[part]))
            else:
                left.pop(0)
        return self._shaped((*sizes, *left))

    def __array_namespace__(self, api_version: str | None = None) -> Any:
        return _Namespace

    def _shaped(self, shape: Shape) -> Sketch:
        return Sketch(shape, self.dtype, self.device)


class _Namespace:
    """What functions ask of a namespace before the work begins."""

    @staticmethod
    def reshape(array: Sketch, shape: Shape) -> Sketch:
        known = math.prod(size for size in shape if size >= 0)
        whole = tuple(size if size >= 0 else math.prod(array.shape) // max(1, known) for size in shape)
        return array._shaped(whole)

    @staticmethod
    def permute_dims(array: Sketch, axes: Sequence[int]) -> Sketch:
        return array._shaped(tuple(array.shape[axis] for axis in axes))


class Sketches(Library):
    """The library of sketches; of one rehearsal, where somebody counts what is made on its way."""

    title = "sketches"

    def __init__(self) -> None:
        self.nbytes_made = 0
        """Of arrays that were asked for by `empty`."""

    def dtype(self, array: Any) -> str:
        return str(array.dtype)

    def place(self, array: Any) -> tuple[str, Any]:
        return array.device.kind, array.device

    def refuses(self, array: Any) -> str | None:
        return None

    def imagined(self, array: Any) -> Device | None:
        known: Device = array.device
        return known

    def before_work(self, specs: Specs, steps: Sequence[tuple[Problem, Any]]) -> None:
        raise Rehearsed(specs, steps)

    def empty(self, shape: Shape, like: Any) -> Any:
        self.nbytes_made += math.prod(shape) * ITEMSIZE[like.dtype]
        return Sketch(shape, like.dtype, like.device)

    def bring(self, values: Array, like: Any) -> Any:
        return Sketch(values.shape, values.dtype.name, like.device)

    def put(self, array: Any, index: Any, values: Any) -> Any:
        return array

    def check_in_place(self, function: str, name: str, array: Any) -> None:
        """It is nobody's memory."""

    def draw_seed(self, function: str) -> int:
        return 0

    def values(self, array: Any) -> Array:
        raise AssertionError("a sketch has no values, and nobody asks for any before the work begins")

    def run(self, job: Any, arrays: Arrays) -> Arrays:
        raise AssertionError("a rehearsal ends before the work begins")


SKETCHES = Sketches()
