"""How a part is cut into tiles, and the keys of a tile into blocks.

A *tile* is some rows of some heads of a part, and one task.  Nothing here touches the caller's arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from cupyattn.numpy_ref import Array
from cupyattn.plan import CpuTile
from cupyattn.problem import Mask, Problem, Span


@dataclass(frozen=True)
class TileIndex:
    """Which batches, heads and rows of a part a tile covers."""

    batches: slice
    pairs: slice
    heads: slice
    rows: Span
    touched: Span

    @property
    def row_slice(self) -> slice:
        return slice(self.rows.start, self.rows.stop)

    @property
    def batch_size(self) -> int:
        return int(self.batches.stop - self.batches.start)

    @property
    def num_heads(self) -> int:
        return int(self.heads.stop - self.heads.start)

    @property
    def work(self) -> int:
        return self.batch_size * self.num_heads * len(self.rows) * len(self.touched)


def cut_into_tiles(problem: Problem, cut: CpuTile, batch: int, seqlen_q: int, seqlen_k: int) -> tuple[TileIndex, ...]:
    """Every row of every head of every sequence once; the most work first."""
    mask, group = problem.mask, problem.sizes.queries_per_pair
    num_pairs = problem.sizes.num_heads // group
    tiles = []
    for first_row in range(0, seqlen_q, cut.block_q):
        rows = Span(first_row, min(seqlen_q, first_row + cut.block_q))
        touched = mask.touched(rows, seqlen_q, seqlen_k)
        for pair in range(0, num_pairs, cut.pairs):
            pairs = slice(pair, min(num_pairs, pair + cut.pairs))
            first, last = pairs.start * group, pairs.stop * group
            step = cut.heads if cut.pairs == 1 else last - first
            for head in range(first, last, step):
                heads = slice(head, min(last, head + step))
                for start in range(0, batch, cut.batch):
                    batches = slice(start, min(batch, start + cut.batch))
                    tiles.append(TileIndex(batches, pairs, heads, rows, touched))
    return tuple(sorted(tiles, key=lambda tile: -tile.work))


EDGE = 128
"""Keys per block where the band ends inside a tile: small, so that few hidden scores are computed there."""


class Cut(NamedTuple):
    """Some keys, the rows of a tile that see any of them, and which of these pairs the band hides."""

    keys: slice
    rows: slice
    hidden: Array | None
    hidden_rows: slice = slice(None)
    """Those among `rows` that `hidden` is about; the others see all these keys."""


def band_cuts(mask: Mask, rows: Span, seqlen_q: int, seqlen_k: int, block_k: int, stacked: bool) -> tuple[Cut, ...]:
    """The keys that `rows` can see, left to right, cut into blocks.

    Rows of several stacked heads see the same keys, so that they can only be taken all together.
    """
    touched, whole = mask.touched(rows, seqlen_q, seqlen_k), mask.whole(rows, seqlen_q, seqlen_k)
    if stacked or len(rows) <= EDGE or not len(whole):
        edges = [
            touched.start,
            *range(touched.start // block_k * block_k + block_k, touched.stop, block_k),
            touched.stop,
        ]
    else:
        rest = whole.start + len(whole) // EDGE * EDGE  # with what is left over, which is no block of its own
        edges = [
            *range(touched.start, whole.start, EDGE),
            *range(whole.start, rest, block_k),
            *range(rest, touched.stop, EDGE),
            touched.stop,
        ]
    shift = mask.offset(seqlen_q, seqlen_k)
    cuts = []
    for start, stop in pairwise(edges):
        first, last = 0, len(rows)
        if not stacked and mask.right is not None:
            first = max(0, start - mask.right - shift - rows.start)
        if not stacked and mask.left is not None:
            last = min(last, stop + mask.left - shift - rows.start)
        if start >= stop or first >= last:
            continue
        inside = whole.start <= start and stop <= whole.stop
        diagonal = rows.start + first + shift - start
        hidden = None if inside else hidden_band(last - first, stop - start, diagonal, mask.left, mask.right)
        if stacked or hidden is None:
            cuts.append(Cut(slice(start, stop), slice(None) if stacked else slice(first, last), hidden))
        else:
            partly = np.flatnonzero(hidden.any(axis=-1))
            edge = slice(int(partly[0]), int(partly[-1]) + 1) if partly.size else slice(0, 0)
            cuts.append(Cut(slice(start, stop), slice(first, last), hidden[edge], edge))
    return tuple(cuts)


@lru_cache(maxsize=256)
def hidden_band(num_rows: int, num_keys: int, diagonal: int, left: int | None, right: int | None) -> Array:
    """True where a key lies outside the band, (rows, keys); `diagonal` is the key on row 0's diagonal.

    A row is the one below it, a key further: a view of one stretch of memory for all of them.
    """
    distance = np.arange(1 - num_rows, num_keys) - diagonal
    hidden = np.zeros(distance.shape, bool)
    if left is not None:
        hidden |= distance < -left
    if right is not None:
        hidden |= distance > right
    return sliding_window_view(hidden, num_keys)[::-1]


MOST_REMEMBERED = 64
"""Tiles of a part, blocks of a tile, up to which how they are cut is remembered: a few megabytes for all that are."""

remembered_tiles = lru_cache(maxsize=256)(cut_into_tiles)
remembered_cuts = lru_cache(maxsize=256)(band_cuts)
