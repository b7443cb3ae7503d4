"""Cutting a problem on the CPU into parts and tiles, and the view of the operands each of them has.

A *part* is some sequences of the problem that have the same lengths: a whole dense batch, or those of a ragged one
that are as long as each other.  A *tile* is some rows of some heads of a part, and one task.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from cupyattn import numpy_ref
from cupyattn.cpu import flash
from cupyattn.cpu.flash import KeyBlock
from cupyattn.cpu.scratch import Scratch
from cupyattn.numpy_ref import Array, State
from cupyattn.plan import CpuTile, Plan, cpu_tile
from cupyattn.problem import Mask, Problem, Span
from cupyattn.rounding import are_bits, widen

Index = tuple[Any, ...]

SCORE_LIMIT = {"float32": 30.0, "float64": 60.0}
"""Scores of at most this size can skip the running maximum: exp and its sum over any number of keys stay far inside
the dtype's range on both sides.  Whether products with values did is seen by the results, see `Part.attend`."""
LEAST_EXACT = {name: float(np.finfo(name).tiny / np.finfo(name).eps) * math.exp(x) for name, x in SCORE_LIMIT.items()}
"""Results as large as this lost nothing to products of small weights that were too small for the dtype."""
ROWS_WORTH_A_BOUND = 64
"""Rows per key from which reading the keys once more for their norms pays."""


def heads_first(array: Array, problem: Problem) -> Array:
    """View an array of the caller's layout as (..., batch, heads, seqlen, dim); thd has a batch of one."""
    axes = problem.layout.axes
    if axes == "thd":
        return array.swapaxes(0, 1)[None]
    if axes == "bshd":
        return array.swapaxes(-3, -2)
    return array if array.ndim >= 4 else array.reshape((1,) * (4 - array.ndim) + array.shape)


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
        self._direct = self.places is None and self.array.dtype == self.compute_dtype and _is_tidy(self.array)

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


def _is_tidy(array: Array) -> bool:
    """The BLAS takes its last two axes as they are."""
    row_stride, stride = array.strides[-2:]
    item = array.itemsize
    return bool(
        stride == item and row_stride >= item * array.shape[-1] and row_stride % item == 0 and array.flags.aligned
    )


FEW_SCORES, FEW_MULTIPLICATIONS = 9216, 2**18
"""Numbers that are summed by row, and multiplications of a product, up to which OpenBLAS starts no threads."""
COST_OF_A_NUMBER = 16
"""Multiplications that take as long as copying it."""
STRETCH = 512
"""Keys that are looked at together when a head's facts are collected."""


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


EDGE = 256
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
        edges = [
            *range(touched.start, whole.start, EDGE),
            *range(whole.start, whole.stop, block_k),
            *range(whole.stop, touched.stop, EDGE),
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

_remembered_tiles = lru_cache(maxsize=256)(cut_into_tiles)
_remembered_cuts = lru_cache(maxsize=256)(band_cuts)


@dataclass
class Part:
    """Some sequences of the problem that have the same lengths."""

    plan: Plan
    problem: Problem
    outer: Index
    """Index of all batch axes but the last."""
    q: Rows
    k: Keys
    v: Keys
    seqlen_q: int
    seqlen_k: int
    batch_ids: Array
    """The position in the whole batch of each sequence: what dropout counts by."""
    seed: int
    mask: Array | None = None
    bias: Array | None = None
    """Like `mask`, (..., heads | 1, seqlen_q | 1, seqlen_k | 1) over all batch axes, each of them | 1."""
    slopes: Array | None = None
    sinks: Array | None = None
    q_descale: Array | None = None
    """A factor of the numbers in `q`, (batch, heads)."""
    stretch_q: Index | None = None
    """The part's rows in q and out, if it is one of many whose sequences lie end to end there."""
    stretch_k: Index | None = None
    num_workers: int = 1
    """That there should be tiles for."""
    _facts: dict[tuple[str, int, int], Any] = field(default_factory=dict)
    """What was found out about the keys of some heads, by (what, first batch, first pair)."""

    @property
    def num_heads(self) -> int:
        return self.problem.sizes.num_heads

    @property
    def batch(self) -> int:
        return int(self.batch_ids.size)

    @property
    def out_size(self) -> int:
        return self.batch * self.seqlen_q

    @property
    def compute_dtype(self) -> str:
        return self.k.compute_dtype

    def of(self, array: Array) -> Rows:
        """This part of an array of the caller's rows, shaped like out."""
        if self.q.places is not None:
            return Rows(array, self.q.places)
        if self.stretch_q is not None:
            return Rows(end_to_end(array, self.stretch_q, self.batch, self.seqlen_q))
        return Rows(heads_first(array, self.problem)[self.outer])

    def lse_of(self, array: Array) -> Rows:
        """This part of an array shaped like lse."""
        if self.problem.layout.lengths_are_data:
            return self.of(array.swapaxes(-1, -2))
        return Rows(array[self.outer] if array.ndim >= 3 else array.reshape((1,) * (3 - array.ndim) + array.shape))

    @property
    def tiles(self) -> tuple[TileIndex, ...]:
        """The part, cut as the plan says; the most work first."""
        cut, sizes = self.cut, self.problem.sizes
        most = -(-self.seqlen_q // cut.block_q) * sizes.num_heads * self.batch // (cut.heads * cut.pairs * cut.batch)
        function = cut_into_tiles if most > MOST_REMEMBERED else _remembered_tiles
        return function(self.problem, cut, self.batch, self.seqlen_q, self.seqlen_k)

    @property
    def cut(self) -> CpuTile:
        """How the part is cut into tiles: as planned, or by its own lengths if it is one of many."""
        if isinstance(self.plan.tile, CpuTile) and not self.problem.layout.lengths_are_data:
            return self.plan.tile
        return cpu_tile(self.problem.sizes, self.batch, self.seqlen_q, self.seqlen_k, self.num_workers)

    def cost(self, where: TileIndex) -> int:
        """Of a tile, roughly, in floating-point operations; a number that is read or written counts as some."""
        sizes, pairs = self.problem.sizes, where.pairs.stop - where.pairs.start
        numbers = where.batch_size * (where.num_heads * len(where.rows) + pairs * len(where.touched))
        return int(2 * (where.work + COST_OF_A_NUMBER * numbers) * (sizes.head_dim + sizes.head_dim_v))

    def has_small_products(self, where: TileIndex) -> bool:
        """A BLAS makes those of the tile on one thread in any case."""
        sizes, pairs = self.problem.sizes, where.pairs.stop - where.pairs.start
        scores = where.num_heads // pairs * len(where.rows) * min(len(where.touched), self.cut.block_k)
        return bool(scores <= FEW_SCORES and scores * max(sizes.head_dim, sizes.head_dim_v) <= FEW_MULTIPLICATIONS)

    def stacked(self, rows: Rows, where: TileIndex) -> Array:
        """The tile's rows of an array of the caller's, (batch, pairs, heads * rows, ...)."""
        piece = widen(rows.of(where), self.compute_dtype)
        pairs = where.pairs.stop - where.pairs.start
        return piece.reshape(piece.shape[0], pairs, where.num_heads // pairs * len(where.rows), *piece.shape[3:])

    def tile(self, where: TileIndex, scratch: Scratch, backward: bool = False) -> flash.Tile:
        """The arithmetic's view of a tile."""
        edits = self.problem.edits
        pairs = where.pairs.stop - where.pairs.start
        heads = where.num_heads // pairs
        q = self.scaled_queries(where, pairs, scratch)
        bounded = None if backward else self.bounded_rows(where, q, heads, scratch)
        suspicious = backward and not (
            self.is_finite("v", where, scratch) and self.is_finite("k", where, scratch) and np.isfinite(q.sum())
        )
        slopes = sinks = None
        if self.slopes is not None:
            slopes = self.slopes[_or_one(self.slopes, 0, where.batches), where.heads]
            slopes = slopes.reshape(slopes.shape[0], pairs, heads, 1, 1)
        if self.sinks is not None:
            sinks = np.repeat(self.sinks[where.heads].reshape(pairs, heads), len(where.rows), axis=-1)
        return flash.Tile(
            q,
            heads,
            partial(self.blocks, where, pairs, heads, scratch),
            edits.softcap,
            slopes,
            sinks,
            bounded,
            suspicious,
            scratch,
        )

    def scaled_queries(self, where: TileIndex, pairs: int, scratch: Scratch) -> Array:
        """The tile's queries times the softmax scale, stacked: (batch, pairs, heads * rows, head_dim)."""
        piece = self.q.of(where)
        if are_bits(piece):
            piece = widen(piece, self.compute_dtype)
        if self.q_descale is not None:
            piece = piece * self.q_descale[where.batches, where.heads, None, None]
        q = scratch.array("q", piece.shape, self.compute_dtype)
        np.multiply(piece, q.dtype.type(self.problem.edits.softmax_scale), out=q)
        return q.reshape(piece.shape[0], pairs, where.num_heads // pairs * len(where.rows), piece.shape[-1])

    def attend(self, where: TileIndex, scratch: Scratch) -> State:
        tile, head_dim_v = self.tile(where, scratch), self.problem.sizes.head_dim_v
        state = flash.flash(tile, head_dim_v)
        finite = math.isfinite(np.add.reduce(state.out, axis=None))
        if not finite:  # maybe 0 * nan of a value that nobody may look at: once more, with care
            tile.suspicious = True
            state = flash.flash(tile, head_dim_v)
        if tile.bounded is None:
            return state
        # Maybe a product left the range because its weight is not that of a running maximum: such rows once more, with
        # one.  The others keep every bit.
        doubtful = self.rows_vanished(state, where, scratch)
        if not finite:
            overflown: Array = np.asarray(~np.isfinite(state.out).all(axis=-1))
            doubtful = overflown if doubtful is None else doubtful | overflown
        if doubtful is None or not (tile.bounded & doubtful).any():
            return state
        tile.bounded = tile.bounded & ~doubtful
        return flash.flash(tile, head_dim_v)

    def rows_vanished(self, state: State, where: TileIndex, scratch: Scratch) -> Array | None:
        """Those with results so small that products may have been too small for the dtype, if there are any."""
        out, least = state.out, LEAST_EXACT[self.compute_dtype]
        size = np.abs(out, out=scratch.array("size", out.shape, out.dtype))
        if out.size == 0 or np.minimum.reduce(size, axis=None) >= least:
            return None
        small = (size < least) & ~np.isneginf(state.lse)[..., None]
        known = ("columns", where.batches.start, where.pairs.start)
        if known not in self._facts:
            columns = [v.any(axis=-2, keepdims=True) for v in self.stretches(self.v, where, scratch)]
            self._facts[known] = np.logical_or.reduce(columns)
        rows: Array = (small & self._facts[known]).any(axis=-1)  # zeros of zeros are no products that vanished
        return rows if rows.any() else None

    def stretches(self, source: Keys, where: TileIndex, scratch: Scratch) -> Iterator[Array]:
        """All keys (or values) of a tile's heads, some at a time."""
        for start in range(0, self.seqlen_k, STRETCH):
            stretch = slice(start, min(self.seqlen_k, start + STRETCH))
            yield source.block(where.batches, where.pairs, stretch, scratch, "k")

    def is_finite(self, name: str, where: TileIndex, scratch: Scratch) -> bool:
        """No nan or inf in k or v of a tile's heads; found out once for all its rows."""
        known = (name, where.batches.start, where.pairs.start)
        if known not in self._facts:
            source = self.k if name == "k" else self.v
            if source.places is None and not are_bits(source.array):
                whole = source.array[where.batches, source.head_slice(where.pairs)]
                self._facts[known] = np.isfinite(whole.sum(dtype=self.compute_dtype))
            else:
                self._facts[known] = all(np.isfinite(part.sum()) for part in self.stretches(source, where, scratch))
        return bool(self._facts[known])

    def largest_square(self, where: TileIndex, scratch: Scratch) -> Array:
        """For each row of a tile, the largest squared norm of the keys it sees: (batch, pairs, 1 or rows).

        Of no other keys: what is hidden must not decide how something is computed.
        """
        known = ("norms", where.batches.start, where.pairs.start)
        if known not in self._facts:
            parts = [np.einsum("...d,...d->...", k, k) for k in self.stretches(self.k, where, scratch)]
            squares = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
            if self.problem.mask.right is None:
                squares = np.maximum.reduce(squares, axis=-1, keepdims=True)
            else:
                np.maximum.accumulate(squares, axis=-1, out=squares)
            self._facts[known] = squares
        largest: Array = self._facts[known]
        right = self.problem.mask.right
        if right is None:
            return largest
        # Rows that see no key have no scores to be bounded: any number will do for them.
        last = self.diagonal(where.rows) + right
        return np.take(largest, last, axis=-1, mode="clip")

    def bounded_rows(self, where: TileIndex, q: Array, heads: int, scratch: Scratch) -> Array | None:
        """The rows none of whose scores can be large, by Cauchy-Schwarz; None where that is not worth knowing."""
        edits, sizes = self.problem.edits, self.problem.sizes
        edited = self.mask is not None or edits.bias is not None or self.slopes is not None or edits.sinks
        worth = self.seqlen_q * sizes.queries_per_pair >= ROWS_WORTH_A_BOUND and self.seqlen_k > 0
        if edited or self.problem.mask.left is not None or not worth:
            return None
        row_square = np.einsum("...d,...d->...", q, q).reshape(*q.shape[:-2], heads, len(where.rows))
        largest = self.largest_square(where, scratch)[..., None, :]
        bounded = row_square * largest <= SCORE_LIMIT[self.compute_dtype] ** 2
        return np.asarray(bounded.reshape(q.shape[:-1]))

    def blocks(self, where: TileIndex, pairs: int, heads: int, scratch: Scratch) -> Iterator[KeyBlock]:
        """The key blocks that the tile's rows can see, left to right."""
        problem = self.problem
        shape = (pairs, heads)
        stacked = heads > 1 or self.mask is not None or self.bias is not None
        block_k = self.cut.block_k
        cuts = band_cuts if self.seqlen_k > MOST_REMEMBERED * min(block_k, EDGE) else _remembered_cuts
        for cut in cuts(problem.mask, where.rows, self.seqlen_q, self.seqlen_k, block_k, stacked):
            hidden = cut.hidden
            if self.mask is not None:
                not_seen = ~self.piece(self.mask, where, cut.keys, shape)
                hidden = not_seen if hidden is None else hidden | not_seen
                if hidden.all():
                    continue
            block = KeyBlock(
                cut.keys,
                cut.rows,
                self.k.block(where.batches, where.pairs, cut.keys, scratch, "k"),
                self.v.block(where.batches, where.pairs, cut.keys, scratch, "v"),
                hidden=hidden,
                hidden_rows=cut.hidden_rows,
            )
            if self.bias is not None:
                block.bias = widen(self.piece(self.bias, where, cut.keys, shape), self.compute_dtype)
                closed = np.isneginf(block.bias)
                if closed.any():  # hidden, even if the score is nan
                    block.hidden = closed if hidden is None else hidden | closed
            if self.slopes is not None:
                block.distance = self.distance(where.rows, cut)
            if problem.dropout_p > 0.0:
                block.keep = self.keep(where, cut, shape)
            yield block

    def diagonal(self, rows: Span) -> Array:
        """The key on each row's diagonal."""
        return np.arange(rows.start, rows.stop) + self.problem.mask.offset(self.seqlen_q, self.seqlen_k)

    def distance(self, rows: Span, cut: Cut) -> Array:
        """-|diagonal - key|, (rows, keys)."""
        diagonal = self.diagonal(rows)[cut.rows]
        distance: Array = np.abs(diagonal[:, None] - np.arange(cut.keys.start, cut.keys.stop))
        return -distance.astype(self.compute_dtype)

    def piece(self, array: Array, where: TileIndex, keys: slice, shape: tuple[int, int]) -> Array:
        """The tile's view of mask or bias: (batch | 1, pairs | 1, heads | 1, rows | 1, keys | 1)."""
        view = array[piece_index(array, self.outer, where, keys)]
        head_axes = shape if view.shape[1] > 1 else (1, 1)
        return view.reshape(view.shape[0], *head_axes, *view.shape[2:])

    def keep(self, where: TileIndex, cut: Cut, shape: tuple[int, int]) -> Array:
        """Dropout's factor for each weight: 0, or the reciprocal of the probability to stay."""
        p = self.problem.dropout_p
        factor = 0.0 if p == 1.0 else 1.0 / (1.0 - p)
        heads = np.arange(where.heads.start, where.heads.stop).reshape(shape)
        stays = numpy_ref.dropout_keep(
            p,
            self.seed,
            self.batch_ids[where.batches, None, None, None],
            heads[None, :, :, None],
            np.arange(where.rows.start, where.rows.stop)[cut.rows],
            range(cut.keys.start, cut.keys.stop),
        )
        return np.asarray(stays * np.dtype(self.compute_dtype).type(factor))


def end_to_end(array: Array, stretch: Index, batch: int, seqlen: int) -> Array:
    """View a stretch of (tokens, heads, ...) or (batch, seqlen, heads, ...) as (batch, heads, seqlen, ...)."""
    rows = array[stretch]
    return rows.reshape(batch, seqlen, *rows.shape[len(stretch) :]).swapaxes(1, 2)


def _or_one(array: Array, axis: int, index: slice) -> slice:
    return index if array.shape[axis] > 1 else slice(0, 1)


def piece_index(array: Array, outer: Index, where: TileIndex, keys: slice) -> Index:
    """Where a tile finds itself in an array whose axes may be of length one."""
    lead = tuple(i if array.shape[axis] > 1 else 0 for axis, i in enumerate(outer))
    first = len(outer)
    wanted = (where.batches, where.heads, where.row_slice, keys)
    return (*lead, *(_or_one(array, first + axis, part) for axis, part in enumerate(wanted)))
