"""Which page holds which tokens of which sequence: a free list, reference counts, copy-on-write; numbers alone.

Sequences that were forked share their pages, the last one too, even if it is not full.  Whoever first writes into a
shared page gets a copy of it.  A change is worked out by `growth`, which changes nothing, and made by `grow`, once the
arrays are written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from cupyattn.problem import Array


class NoPagesError(ValueError):
    """There are not enough free pages."""


@dataclass(slots=True)
class Growth:
    """What more tokens change: nothing of it has happened yet."""

    counts: list[int]
    """New tokens of each sequence."""
    copied: list[tuple[int, int]] = field(default_factory=list)
    """(page, its copy)."""
    tables: dict[int, list[int]] = field(default_factory=dict)
    """The pages of a sequence from that of its first new token on."""
    taken: int = 0
    """Pages from the end of the free list."""
    places: Array = field(default_factory=lambda: np.zeros((2, 0), np.int64))
    """The page of each new token, sequence after sequence, and its slot there."""


class Pages:
    """The pages of some sequences, in order, and how many tokens each sequence has."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.tables: list[list[int]] = []
        self.lengths: list[int] = []
        self.references = [0] * num_pages
        self.free = list(range(num_pages))[::-1]

    def copy(self) -> Pages:
        twin = Pages(0, self.page_size)
        twin.tables, twin.lengths = [list(table) for table in self.tables], list(self.lengths)
        twin.references, twin.free = list(self.references), list(self.free)
        return twin

    def growth(self, counts: Sequence[int]) -> Growth:
        """What `counts` more tokens of each sequence would change; sequences that are not there yet are empty.

        Raises
        ------
        NoPagesError
        """
        growth = Growth(list(counts))
        left: dict[int, int] = {}  # references of shared pages, as they will be
        places = []
        for sequence, count in enumerate(counts):
            if not count:
                continue
            table, length = self._of(sequence)
            first, last = length // self.page_size, (length + count - 1) // self.page_size
            begun = table[first:]  # the page that is not full, if there is one
            new = last + 1 - first - len(begun)
            if begun and (owners := left.get(begun[0], self.references[begun[0]])) > 1:
                left[begun[0]] = owners - 1
                own = self._take(growth, 1)
                growth.copied += zip(begun, own, strict=False)
                begun = own
            tail = begun + self._take(growth, new)
            if growth.taken > len(self.free):
                continue
            growth.tables[sequence] = tail
            page, slot = np.divmod(np.arange(length, length + count), self.page_size)
            places.append(np.stack([np.asarray(tail, np.int64)[page - first], slot]))
        if growth.taken > len(self.free):
            raise NoPagesError(f"{growth.taken} more pages are needed and {len(self.free)} are free")
        if places:
            growth.places = np.concatenate(places, axis=1)
        return growth

    def _of(self, sequence: int) -> tuple[list[int], int]:
        return (self.tables[sequence], self.lengths[sequence]) if sequence < len(self.tables) else ([], 0)

    def _take(self, growth: Growth, count: int) -> list[int]:
        """So many free pages; none where there are too few, since the growth is refused in the end."""
        before, growth.taken = growth.taken, growth.taken + count
        if growth.taken > len(self.free):
            return []
        return [self.free[-1 - i] for i in range(before, growth.taken)]

    def grow(self, growth: Growth) -> None:
        while len(self.tables) < len(growth.counts):
            self.tables.append([])
            self.lengths.append(0)
        for _ in range(growth.taken):
            self.references[self.free.pop()] = 1
        for page, _ in growth.copied:
            self.references[page] -= 1
        for sequence, tail in growth.tables.items():
            self.tables[sequence][self.lengths[sequence] // self.page_size :] = tail
            self.lengths[sequence] += growth.counts[sequence]

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget what comes after so many tokens of each sequence."""
        for sequence, length in enumerate(lengths):
            table, used = self.tables[sequence], -(-length // self.page_size)
            for page in reversed(table[used:]):
                self._release(page)
            del table[used:]
            self.lengths[sequence] = length

    def fork(self, sequence: int) -> None:
        """One more sequence, which goes on from what `sequence` is."""
        self.tables.append(list(self.tables[sequence]))
        self.lengths.append(self.lengths[sequence])
        for page in self.tables[-1]:
            self.references[page] += 1

    def reorder(self, sequences: Sequence[int]) -> None:
        """Sequence ``i`` goes on from what ``sequences[i]`` was."""
        former = self.tables
        self.tables = [list(former[source]) for source in sequences]
        self.lengths = [self.lengths[source] for source in sequences]
        for table in self.tables:
            for page in table:
                self.references[page] += 1
        for table in former:
            for page in reversed(table):
                self._release(page)

    def _release(self, page: int) -> None:
        self.references[page] -= 1
        if not self.references[page]:
            self.free.append(page)

    def num_shared(self) -> int:
        """Pages at the start of every sequence that are the same in all."""
        shortest = min(self.tables, key=len, default=[])
        others = ((i, page) for i, page in enumerate(shortest) if any(table[i] != page for table in self.tables))
        return next(others, (len(shortest), -1))[0]
