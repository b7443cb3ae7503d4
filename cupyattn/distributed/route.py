"""The way of the keys round the ring: what goes on at each step, and what is attended there.

The keys of each rank travel from neighbour to neighbour, ``r`` to ``r + 1``.  What goes on is what somebody further
along sees: with a window that is little, and soon nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache

from cupyattn.distributed.rectangles import Band, Rectangle, rectangles_of, shifts_of
from cupyattn.distributed.sharding import Sharding
from cupyattn.problem import Span

Spans = tuple[Span, ...]
"""Of a rank's keys: some stretches, in order, that do not touch."""


def joined(spans: Iterable[Span]) -> Spans:
    """The union of stretches."""
    found: list[Span] = []
    for span in sorted(span for span in spans if len(span)):
        if found and span.start <= found[-1].stop:
            found[-1] = Span(found[-1].start, max(found[-1].stop, span.stop))
        else:
            found.append(span)
    return tuple(found)


def count(spans: Spans) -> int:
    return sum(map(len, spans))


@dataclass(frozen=True)
class Route:
    """Who sees whom, and what is sent for that; the same on all ranks."""

    rows: Sharding
    keys: Sharding
    band: Band

    @property
    def size(self) -> int:
        return self.rows.size

    @cached_property
    def shifts(self) -> tuple[int, ...]:
        return shifts_of(self.rows, self.keys, self.band)

    def seen(self, rank: int, owner: int) -> tuple[Rectangle, ...]:
        """What a rank's rows see of an owner's keys."""
        return self._seen[rank][owner]

    @cached_property
    def _seen(self) -> tuple[tuple[tuple[Rectangle, ...], ...], ...]:
        return tuple(
            tuple(rectangles_of(rows, keys, self.shifts, self.band) for keys in self.keys.pieces)
            for rows in self.rows.pieces
        )

    def owner(self, rank: int, step: int) -> int:
        """Whose keys a rank has at a step."""
        return (rank - step) % self.size

    def carried(self, owner: int, step: int) -> Spans:
        """An owner's keys that somebody sees who has them at this step or later."""
        return self._carried[owner][step]

    @cached_property
    def _carried(self) -> tuple[tuple[Spans, ...], ...]:
        found = []
        for owner in range(self.size):
            later: Spans = ()
            of_steps = []
            for step in reversed(range(self.size)):
                rank = (owner + step) % self.size
                later = joined((*later, *(rectangle.keys for rectangle in self.seen(rank, owner))))
                of_steps.append(later)
            found.append(tuple(reversed(of_steps)))
        return tuple(found)

    def keys_sent(self, rank: int, step: int) -> int:
        """How many keys a rank sends on, during a step, for the next."""
        return count(self.carried(self.owner(rank, step), step + 1)) if step + 1 < self.size else 0

    def seen_keys(self, rank: int, owner: int) -> Spans:
        """Those of an owner's keys that a rank's rows see."""
        return joined(rectangle.keys for rectangle in self.seen(rank, owner))

    def pairs(self, rank: int) -> int:
        """How many (query, key) pairs a rank's rows have."""
        return sum(x.count_visible for owner in range(self.size) for x in self.seen(rank, owner))


@lru_cache(maxsize=256)
def route_of(rows: Sharding, keys: Sharding, band: Band) -> Route:
    """Remembered: a model asks for the same one in each of its layers."""
    return Route(rows, keys, band)
