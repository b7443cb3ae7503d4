"""Which page holds which tokens of which sequence: a free list, reference counts, copy-on-write; numbers alone.

Sequences that were forked share their pages, the last one too, even if it is not full.  Whoever first writes into a
shared page gets a copy of it; where all who share one write at once, the longest keeps it, since only its new tokens
lie behind what is live for the others.  Pages are a value: a change makes another one, and leaves this one as it was,
what is live in its pages included.  Of two that were made of one, only one may go on: their stack of free pages is the
same memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np

from cupyattn.problem import Array

Table = tuple[int, ...]
"""The pages of a sequence."""
Tables = tuple[Table, ...]


class NoPagesError(ValueError):
    """There are not enough free pages."""

    def __init__(self, message: str, missing: int) -> None:
        super().__init__(message)
        self.missing = missing


@dataclass(slots=True)
class Growth:
    """What more tokens change: nothing of it has happened yet."""

    counts: list[int]
    """New tokens of each sequence."""
    copied: list[tuple[int, int]] = field(default_factory=list)
    """(page, its copy)."""
    tables: dict[int, Table] = field(default_factory=dict)
    """The pages of a sequence from that of its first new token on."""
    taken: int = 0
    """Pages from the end of the free list."""
    places: Array = field(default_factory=lambda: np.zeros((2, 0), np.int64))
    """The page of each new token, sequence after sequence, and its slot there."""


@dataclass(frozen=True, slots=True)
class Pages:
    """The pages of some sequences, in order, and how many tokens each sequence has."""

    page_size: int
    tables: Tables
    lengths: tuple[int, ...]
    references: Array
    """Of each page: how many sequences have it, and others who hold it."""
    stack: Array
    """The first `num_free` are the free pages, the last of them the next to be taken.  Pages that become free are
    written behind them, where nobody looks before their number is larger."""
    num_free: int

    @classmethod
    def new(cls, num_pages: int, page_size: int) -> Pages:
        return cls(page_size, (), (), np.zeros(num_pages, np.int64), np.arange(num_pages)[::-1].copy(), num_pages)

    def apart(self) -> Pages:
        """The same, to go on from beside this one."""
        return replace(self, stack=self.stack.copy())

    def growth(self, counts: Sequence[int]) -> Growth:
        """What `counts` more tokens of each sequence would change; sequences that are not there yet are empty.

        Raises
        ------
        NoPagesError
        """
        growth = Growth(list(counts))
        in_place, places = self._in_place(counts), []
        for sequence, count in enumerate(counts):
            if not count:
                continue
            table, length = self._of(sequence)
            first, last = length // self.page_size, (length + count - 1) // self.page_size
            begun = table[first:]  # the page that is not full, if there is one
            new = last + 1 - first - len(begun)
            if begun and sequence not in in_place:
                own = self._take(growth, 1)
                growth.copied += zip(begun, own, strict=False)
                begun = own
            tail = begun + self._take(growth, new)
            if growth.taken > self.num_free:
                continue
            growth.tables[sequence] = tail
            page, slot = np.divmod(np.arange(length, length + count), self.page_size)
            places.append(np.stack([np.asarray(tail, np.int64)[page - first], slot]))
        if growth.taken > self.num_free:
            words = f"{growth.taken} more pages are needed and {self.num_free} are free"
            raise NoPagesError(words, growth.taken - self.num_free)
        if places:
            growth.places = np.concatenate(places, axis=1)
        return growth

    def _in_place(self, counts: Sequence[int]) -> set[int]:
        """Those that write into their last page itself, and not into a copy: nothing is live there behind their end."""
        writers: dict[int, list[tuple[int, int]]] = {}
        for sequence, (table, length, count) in enumerate(zip(self.tables, self.lengths, counts, strict=False)):
            if count and length % self.page_size:
                writers.setdefault(table[-1], []).append((length, sequence))
        return {max(of_page)[1] for page, of_page in writers.items() if len(of_page) == self.references[page]}

    def _of(self, sequence: int) -> tuple[Table, int]:
        return (self.tables[sequence], self.lengths[sequence]) if sequence < len(self.tables) else ((), 0)

    def _take(self, growth: Growth, count: int) -> Table:
        """So many free pages; none where there are too few, since the growth is refused in the end."""
        before, growth.taken = growth.taken, growth.taken + count
        if growth.taken > self.num_free:
            return ()
        return tuple(self._free(before, growth.taken).tolist())

    def _free(self, start: int, stop: int) -> Array:
        """Those of the free pages, in the order in which they are taken."""
        return self.stack[self.num_free - stop : self.num_free - start][::-1]

    def grown(self, growth: Growth) -> Pages:
        new = len(growth.counts) - len(self.tables)
        tables, lengths = [*self.tables, *[()] * new], [*self.lengths, *[0] * new]
        references = self.references
        if growth.taken:
            references = references.copy()
            references[self._free(0, growth.taken)] = 1
            np.subtract.at(references, [page for page, _ in growth.copied], 1)  # which others still have
        for sequence, tail in growth.tables.items():
            first = lengths[sequence] // self.page_size
            if tables[sequence][first:] != tail:
                tables[sequence] = tables[sequence][:first] + tail
            lengths[sequence] += growth.counts[sequence]
        return Pages(
            self.page_size, tuple(tables), tuple(lengths), references, self.stack, self.num_free - growth.taken
        )

    def truncated(self, lengths: Sequence[int]) -> Pages:
        """Without what comes after so many tokens of each sequence."""
        used = [-(-length // self.page_size) for length in lengths]
        kept = tuple(table[:n] for table, n in zip(self.tables, used, strict=True))
        return self._with(kept, tuple(lengths), lost=[table[n:] for table, n in zip(self.tables, used, strict=True)])

    def forked(self, sequence: int) -> Pages:
        """With one more sequence, which goes on from what `sequence` is."""
        table = self.tables[sequence]
        return self._with((*self.tables, table), (*self.lengths, self.lengths[sequence]), gained=[table])

    def begun(self, table: Table) -> Pages:
        """With one more sequence, whose tokens so far fill these pages."""
        return self._with((*self.tables, table), (*self.lengths, len(table) * self.page_size), gained=[table])

    def held(self, table: Table) -> Pages:
        """With pages that do not become free, whatever sequences do, before they are `released`."""
        return self._with(self.tables, self.lengths, gained=[table])

    def released(self, table: Table) -> Pages:
        return self._with(self.tables, self.lengths, lost=[table])

    def removed(self, sequence: int) -> Pages:
        """Without `sequence`; those after it are one number lower."""
        table, after = self.tables[sequence], slice(sequence + 1, None)
        tables, lengths = ((*x[:sequence], *x[after]) for x in (self.tables, self.lengths))
        return self._with(tables, lengths, lost=[table])

    def reordered(self, sequences: Sequence[int]) -> Pages:
        """Sequence ``i`` goes on from what ``sequences[i]`` was."""
        tables = tuple(self.tables[i] for i in sequences)
        return self._with(tables, tuple(self.lengths[i] for i in sequences), gained=tables, lost=self.tables)

    def _with(
        self, tables: Tables, lengths: tuple[int, ...], *, gained: Iterable[Table] = (), lost: Iterable[Table] = ()
    ) -> Pages:
        """With other tables: those that have come, and those that have gone."""
        more, fewer = (np.fromiter(chain.from_iterable(x), np.int64) for x in (gained, lost))
        references = self.references.copy()
        np.add.at(references, more, 1)
        np.subtract.at(references, fewer, 1)
        freed = np.unique(fewer[references[fewer] == 0])[::-1]
        num_free = self.num_free + freed.size
        self.stack[self.num_free : num_free] = freed
        return Pages(self.page_size, tables, lengths, references, self.stack, num_free)

    def num_shared(self) -> int:
        """Pages at the start of every sequence that are the same in all."""
        shortest = min(self.tables, key=len, default=())
        others = ((i, page) for i, page in enumerate(shortest) if any(table[i] != page for table in self.tables))
        return next(others, (len(shortest), -1))[0]
