"""What a call launched, as a function of addresses: the same call again, without reading what it asks for.

Everything of a parameter record is there already but where arrays lie.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from typing import Any

import numpy as np

from cupyattn.cuda.launching import append, launch, maps, params
from cupyattn.cuda.launching.memory import CuPyMemory
from cupyattn.cuda.launching.recipe import Recipe
from cupyattn.cuda.launching.views import DESCALES, View
from cupyattn.cuda.making.module import Specialisation
from cupyattn.problem import Spec

Places = Mapping[str, int]
"""Where the address of an operand, a result, or scratch memory stands in a list of addresses."""
Queued = tuple[Any, tuple[int, int, int], tuple[int, int, int], tuple[Any], int]
"""What a kernel is called with but for the stream, the kernel before it: a `Launch`, as fast as Python has it."""
NOWHERE, NUMBER = -1, -2
"""The last two of the list: 0, and the cache_seqlen of all sequences of a cache."""
_address = struct.Struct("<Q")
APART = 512
"""Bytes: pieces of memory begin at multiples of it, as CuPy's and torch's do."""


class Box:
    """A tensor map without its address, found again by being itself: a `BoxMap` is slow to hash."""

    __slots__ = ("wanted",)

    def __init__(self, wanted: maps.BoxMap) -> None:
        self.wanted = wanted


@lru_cache(maxsize=4096)
def _encoded(box: Box, address: int) -> bytes:
    return maps.encode(box.wanted, address)


@dataclass(frozen=True, slots=True)
class Words:
    """The addresses of a record, side by side and in its order."""

    layout: struct.Struct
    pick: Callable[[Sequence[int]], tuple[int, ...]]

    def pack(self, addresses: Sequence[int]) -> bytes:
        return self.layout.pack(*self.pick(addresses))


def words_of(names: Sequence[str], places: Places) -> Words:
    there = {"cache_seqlen": NUMBER, **places}
    return Words(struct.Struct(f"<{len(names)}Q"), itemgetter(*(there.get(name, NOWHERE) for name in names)))


@dataclass(frozen=True, slots=True)
class Step:
    """One launch; its record is tensor maps and what fills the room of others, addresses, and what is behind them."""

    function: Any
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_memory: int
    dtype: np.dtype[np.void]
    """Of the record."""
    words: Words
    behind: bytes
    boxes: tuple[tuple[Box, int], ...] = ()
    """Each with its place in the list of addresses."""
    instead: int = NOWHERE
    """The place of the address to encode where there is none: that of q."""
    fill: bytes = b""
    descales: tuple[tuple[int, int], ...] = ()
    """(offset in what is behind, place in the list) of further addresses."""

    def ready(self, addresses: Sequence[int], packed: bytes) -> Queued:
        """`packed` are its words."""
        behind = self.behind
        if self.descales:
            whole = bytearray(behind)
            for offset, place in self.descales:
                _address.pack_into(whole, offset, addresses[place])
            behind = bytes(whole)
        record = packed + behind
        if self.boxes:
            encoded = [_encoded(box, addresses[place] or addresses[self.instead]) for box, place in self.boxes]
            record = b"".join((*encoded, self.fill, record))
        return self.function, self.grid, self.block, (np.void(record, self.dtype),), self.shared_memory


def step(recipe: Recipe, function: Any, facts: Mapping[str, View], places: Places, words: Words) -> Step:
    """That of a recipe; `facts` are views of its operands, whatever their addresses."""
    nowhere = {name: view._replace(pointer=0) for name, view in facts.items()}
    encode: Callable[[maps.BoxMap, int], bytes] = lambda wanted, address: bytes(maps.SIZE)  # noqa: E731
    record = launch.record_of(recipe, nowhere, dict.fromkeys(launch.MAPPED, 0), encode=encode)
    start, stop = launch.place_of_addresses(recipe)
    boxes = tuple((Box(wanted), places[name]) for name, wanted in zip(launch.MAPPED, recipe.maps, strict=False))
    descales: tuple[tuple[int, int], ...] = ()
    if recipe.behind:
        first = params.SIZE - (stop - start)
        descales = tuple((first + 8 * i, places[name]) for i, name in enumerate(DESCALES) if name in places)
    return Step(
        function, recipe.grid, *_shape_of(recipe.specialisation), record.dtype, words, record.tobytes()[stop:], boxes,
        places["q"], bytes(start - len(boxes) * maps.SIZE), descales,
    )  # fmt: skip


def _shape_of(what: Specialisation) -> tuple[tuple[int, int, int], int]:
    return (what.threads, 1, 1), what.shared_memory


def step_of_append(recipe: append.Recipe, function: Any, facts: Mapping[str, View], places: Places) -> Step:
    """The same of new keys on their way into a cache."""
    record = append.record_of(recipe, {name: view._replace(pointer=0) for name, view in facts.items()})
    words = words_of(append.POINTERS, places)
    behind = record.tobytes()[words.layout.size :]
    return Step(function, recipe.grid, *_shape_of(recipe.specialisation), record.dtype, words, behind)


def side_by_side(sizes: Sequence[int]) -> tuple[int, ...]:
    """`Script.scratch`, of pieces of so many bytes."""
    ends = [0]
    for size in sizes:
        ends.append(ends[-1] + -(-size // APART) * APART)
    return tuple(ends) if sizes else ()


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
    scratch: tuple[int, ...]
    """Where each piece of further memory begins in one that holds them all, and where the last one ends."""
    steps: tuple[Step, ...]
    cache_seqlen: int

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
            stream = memory.stream(self.index)
            if self.scratch:
                *starts, total = self.scratch
                with memory.temporaries(stream):
                    scratch = memory.empty((total,), "uint8", like)  # which has to stay until all are launched
                first = memory.pointer(scratch)
                addresses += [first + start for start in starts]
            addresses += (self.cache_seqlen, 0)
            launches, words, packed = list[Queued](), None, b""
            for each in self.steps:
                if each.words is not words:
                    words, packed = each.words, each.words.pack(addresses)
                launches.append(each.ready(addresses, packed))
            for function, grid, block, record, shared_memory in launches:  # nothing is written unless all are ready
                if grid[0]:
                    function(grid, block, record, shared_memory, stream)
        return results
