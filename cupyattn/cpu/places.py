"""Where the rows and keys of a part lie in the caller's arrays, and how those of a tile are fetched and put back.

Mostly a view of the array has them all; where none has (sequences anywhere among the tokens, pages of a cache) there
are `Places`, by which they are gathered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from cupyattn.cpu.scratch import Scratch
from cupyattn.cpu.tiles import TileIndex
from cupyattn.numpy_ref import Array
from cupyattn.problem import Problem
from cupyattn.rounding import are_bits, widen

Index = tuple[Any, ...]


def heads_first(array: Array, problem: Problem) -> Array:
    """View an array of the caller's layout as (..., batch, heads, seqlen, dim); thd has a batch of one."""
    axes = problem.layout.axes
    if axes == "thd":
        return array.swapaxes(0, 1)[None]
    if axes == "bshd":
        return array.swapaxes(-3, -2)
    return array if array.ndim >= 4 else array.reshape((1,) * (4 - array.ndim) + array.shape)


def end_to_end(array: Array, stretch: Index, batch: int, seqlen: int) -> Array:
    """View a stretch of (tokens, heads, ...) or (batch, seqlen, heads, ...) as (batch, heads, seqlen, ...)."""
    rows = array[stretch]
    return rows.reshape(batch, seqlen, *rows.shape[len(stretch) :]).swapaxes(1, 2)


@dataclass(frozen=True)
class Places:
    """Where a part's rows (or keys) lie in one of the caller's arrays, (..., heads, dim), if no view has them all."""

    starts: Array
    """The place of each sequence's first row: among all tokens, in its pages, or in its sequence of the array."""
    sequences: Array | None = None
    """The sequence of the array that each sequence is, if it is (sequences, seqlen, heads, dim)."""
    pages: Array | None = None
    """The page of each page_size rows of each sequence, if the array is (pages, page_size, heads, dim)."""
    page_size: int = 0

    def index(self, batches: slice, rows: slice, heads: slice) -> Index:
        """Of some rows and heads of some sequences: what is found there is (batch, rows, heads, ...)."""
        index = self.starts[batches, None] + np.arange(rows.start, rows.stop)
        if self.pages is not None:
            ids = np.arange(batches.start, batches.stop)[:, None]
            return self.pages[ids, index // self.page_size], index % self.page_size, heads
        return (index, heads) if self.sequences is None else (self.sequences[batches, None], index, heads)


class Rows(NamedTuple):
    """A part's rows in one of the caller's arrays: q, out, lse or a gradient of theirs."""

    array: Array
    """A view, (batch, heads, rows, ...); or, with `places`, all the caller's, (..., heads, ...)."""
    places: Places | None = None

    def of(self, where: TileIndex) -> Array:
        """Those of a tile, (batch, heads, rows, ...)."""
        if self.places is None:
            return self.array[where.batches, where.heads, where.row_slice]
        return self.array[self.places.index(where.batches, where.row_slice, where.heads)].swapaxes(1, 2)

    def put(self, where: TileIndex, values: Array) -> None:
        if self.places is None:
            self.array[where.batches, where.heads, where.row_slice] = values
        else:
            self.array[self.places.index(where.batches, where.row_slice, where.heads)] = values.swapaxes(1, 2)


@dataclass
class Keys:
    """The keys (or values) of a part, fetched block by block in the compute dtype."""

    array: Array
    """A view, (batch, heads, keys, dim); or, with `places`, all the caller's, (..., heads, dim)."""
    num_pairs: int
    compute_dtype: str
    places: Places | None = None
    descale: Array | None = None
    """A factor of the numbers in `array`, (batch, heads)."""

    @property
    def num_heads(self) -> int:
        return int(self.array.shape[1 if self.places is None else -2])

    def head_slice(self, pairs: slice) -> slice:
        """The heads that `pairs` use.  Several pairs at once only where each has a head of its own."""
        if self.num_heads == self.num_pairs:
            return pairs
        head = pairs.start * self.num_heads // self.num_pairs
        return slice(head, head + 1)

    def __post_init__(self) -> None:
        self._direct = self.places is None and self.array.dtype == self.compute_dtype and is_tidy(self.array)

    def block(self, batches: slice, pairs: slice, keys: slice, scratch: Scratch, name: str) -> Array:
        """(batch, pairs, keys, dim), laid out so that the BLAS takes it without a detour.

        Scratch memory of this `name`, where the operand's own memory does not do.
        """
        heads = self.head_slice(pairs)
        if self._direct:
            return self.array[batches, heads, keys]
        if self.places is None:
            block = self.array[batches, heads, keys]
        else:
            block = self.array[self.places.index(batches, keys, heads)].swapaxes(1, 2)
        if are_bits(block):
            block = widen(block, self.compute_dtype)
        tidy = scratch.array(name, block.shape, self.compute_dtype)
        if self.descale is None:
            np.copyto(tidy, block)
        else:
            np.multiply(block, self.descale[batches, heads, None, None], out=tidy)
        return tidy


def is_tidy(array: Array) -> bool:
    """The BLAS takes its last two axes as they are."""
    row_stride, stride = array.strides[-2:]
    item = array.itemsize
    return bool(
        stride == item and row_stride >= item * array.shape[-1] and row_stride % item == 0 and array.flags.aligned
    )
