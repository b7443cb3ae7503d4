"""What is found out about the keys and values of a part, by reading them once more.

How large the keys are, which columns of the values are all zeros: each of it once, for all tiles that share these
heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cupyattn.cpu.places import Keys
from cupyattn.cpu.scratch import Scratch
from cupyattn.cpu.tiles import TileIndex
from cupyattn.numpy_ref import Array

STRETCH = 512
"""Keys that are looked at together."""


@dataclass
class KeyFacts:
    """The facts about a part's keys and values."""

    k: Keys
    v: Keys
    seqlen_k: int
    _known: dict[tuple[str, int, int], Any] = field(default_factory=dict)
    """By (what, first batch, first pair)."""

    def stretches(self, source: Keys, where: TileIndex, scratch: Scratch) -> Iterator[Array]:
        """All keys (or values) of a tile's heads, some at a time."""
        for start in range(0, self.seqlen_k, STRETCH):
            stretch = slice(start, min(self.seqlen_k, start + STRETCH))
            yield source.block(where.batches, where.pairs, stretch, scratch, "k")

    def columns(self, where: TileIndex, scratch: Scratch) -> Array:
        """Which columns of the values of a tile's heads are not all zeros: (batch, pairs, 1, head_dim_v)."""
        known = ("columns", where.batches.start, where.pairs.start)
        if known not in self._known:
            columns = [v.any(axis=-2, keepdims=True) for v in self.stretches(self.v, where, scratch)]
            self._known[known] = np.logical_or.reduce(columns)
        found: Array = self._known[known]
        return found

    def largest_square(self, where: TileIndex, last: Array | None, scratch: Scratch) -> Array:
        """For each row of a tile, the largest squared norm of the keys it sees: (batch, pairs, 1 or rows).

        Of no other keys: what is hidden must not decide how something is computed.  A row sees the keys up to its
        `last` one, or all of them if that is None; it is None for all tiles of a part or for none.
        """
        known = ("norms", where.batches.start, where.pairs.start)
        if known not in self._known:
            parts = [np.einsum("...d,...d->...", k, k) for k in self.stretches(self.k, where, scratch)]
            squares = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
            if last is None:
                squares = np.maximum.reduce(squares, axis=-1, keepdims=True)
            else:
                np.maximum.accumulate(squares, axis=-1, out=squares)
            self._known[known] = squares
        largest: Array = self._known[known]
        # Rows that see no key have no scores to be bounded: any number will do for them.
        return largest if last is None else np.take(largest, last, axis=-1, mode="clip")
