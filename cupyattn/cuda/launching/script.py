"""What a call launched, as a function of addresses: the same call again, without reading what it asks for.

Everything of a parameter record is there already but where arrays lie.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from cupyattn.cuda.launching import append, launch, maps
from cupyattn.cuda.launching.memory import CuPyMemory
from cupyattn.cuda.launching.recipe import Recipe
from cupyattn.cuda.launching.views import View
from cupyattn.cuda.making.module import Launch, Specialisation
from cupyattn.problem import Shape, Spec

_put_address = struct.Struct("<Q").pack_into

Places = Mapping[str, int]
"""Where the address of an operand, a result, or scratch memory stands in a list of addresses."""


class Box:
    """A tensor map without its address, found again by being itself: a `BoxMap` is slow to hash."""

    __slots__ = ("wanted",)

    def __init__(self, wanted: maps.BoxMap) -> None:
        self.wanted = wanted


@lru_cache(maxsize=4096)
def _encoded(box: Box, address: int) -> bytes:
    return maps.encode(box.wanted, address)


@dataclass(frozen=True, slots=True)
class Step:
    """One launch."""

    function: Any
    grid: tuple[int, int, int]
    what: Specialisation
    template: bytes
    """The record, 0 for all addresses."""
    dtype: np.dtype[np.void]
    addresses: tuple[tuple[int, int], ...]
    """(offset in the record, place in the list) of each."""
    boxes: tuple[tuple[int, Box, int], ...] = ()
    """The same of tensor maps."""
    instead: int = 0
    """The place of the address to encode where there is none: that of q."""

    def ready(self, addresses: Sequence[int], stream: Any, kept: list[Any]) -> Launch:
        record = bytearray(self.template)
        for offset, place in self.addresses:
            _put_address(record, offset, addresses[place])
        for offset, box, place in self.boxes:
            record[offset : offset + maps.SIZE] = _encoded(box, addresses[place] or addresses[self.instead])
        void = np.frombuffer(record, self.dtype)[0]
        return Launch(self.function, self.grid, self.what, void, stream, kept)


def step(recipe: Recipe, function: Any, facts: Mapping[str, View], places: Places, cache_seqlen: int) -> Step:
    """That of a recipe; `facts` are views of its operands, whatever their addresses."""
    nowhere = {name: view._replace(pointer=0) for name, view in facts.items()}
    results = {"out": 0, "lse": 0}
    record = launch.record_of(recipe, nowhere, results, 0, None, cache_seqlen, lambda *of: bytes(maps.SIZE))
    boxes = tuple(
        (maps.SIZE * i, Box(wanted), places[name])
        for i, (name, wanted) in enumerate(zip(("q", "k", "v", "out"), recipe.maps, strict=False))
    )
    there = _there(launch.offsets_of(recipe), places)
    return Step(function, recipe.grid, recipe.specialisation, bytes(record), record.dtype, there, boxes, places["q"])


def step_of_append(
    recipe: append.Recipe, function: Any, facts: Mapping[str, View], places: Places, cache_seqlen: int
) -> Step:
    """The same of new keys on their way into a cache."""
    nowhere = {name: view._replace(pointer=0) for name, view in facts.items()}
    record = append.record_of(recipe, nowhere, cache_seqlen)
    there = _there({name: 8 * i for i, name in enumerate(append.POINTERS)}, places)
    return Step(function, recipe.grid, recipe.specialisation, bytes(record), record.dtype, there)


def _there(offsets: Mapping[str, int], places: Places) -> tuple[tuple[int, int], ...]:
    return tuple((offset, places[name]) for name, offset in offsets.items() if name in places)


@dataclass(frozen=True, slots=True)
class Script:
    """All launches of a call, and the memory that they need."""

    memory: CuPyMemory
    index: int
    """Of the device."""
    like: int
    """The place of q among the arrays."""
    results: tuple[tuple[Spec, int | None], ...]
    """Each with the place of the caller's array that it goes into."""
    scratch: tuple[tuple[Shape, str], ...]
    """Shapes and dtypes."""
    steps: tuple[Step, ...]

    def queue(
        self, arrays: Sequence[Any], addresses: list[int], current: Callable[[int], AbstractContextManager[Any]]
    ) -> list[Any]:
        """The results, of the caller's arrays and their addresses, behind which come those of all other memory."""
        memory, like, results = self.memory, arrays[self.like], []
        with current(self.index):
            for spec, place in self.results:
                array = memory.result(spec, like) if place is None else arrays[place]
                results.append(array)
                addresses.append(memory.pointer(array) if place is None else addresses[place])
            stream, kept = memory.stream(self.index), []
            if self.scratch:
                with memory.temporaries(stream):
                    kept = [memory.empty(shape, dtype, like) for shape, dtype in self.scratch]
                addresses += [memory.pointer(array) for array in kept]
            launches = [step.ready(addresses, stream, kept) for step in self.steps]
            for each in launches:  # nothing is written unless all are ready
                each()
        return results
