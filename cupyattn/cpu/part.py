"""A part of a problem on the CPU: where its operands lie, and how it is cut.

A *part* is some sequences of the problem that have the same lengths: a whole dense batch, or those of a ragged one
that are as long as each other.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from cupyattn.cpu.facts import KeyFacts
from cupyattn.cpu.places import Index, Keys, Rows, end_to_end, heads_first
from cupyattn.cpu.tiles import MOST_REMEMBERED, TileIndex, cut_into_tiles, remembered_tiles
from cupyattn.numpy_ref import Array
from cupyattn.plan import CpuTile, Plan, cpu_cost, cpu_tile
from cupyattn.problem import Problem, Span

FEW_SCORES, FEW_MULTIPLICATIONS = 9216, 2**18
"""Numbers that are summed by row, and multiplications of a product, up to which OpenBLAS starts no threads."""


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
    gradients: bool = False
    """The part is cut for the backward pass."""
    facts: KeyFacts = field(init=False)
    cut: CpuTile = field(init=False)
    """How the part is cut into tiles."""

    def __post_init__(self) -> None:
        self.facts = KeyFacts(self.k, self.v, self.seqlen_k)
        self.cut = self._cut()

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
        function = cut_into_tiles if most > MOST_REMEMBERED else remembered_tiles
        return function(self.problem, cut, self.batch, self.seqlen_q, self.seqlen_k)

    def _cut(self) -> CpuTile:
        """As planned, or by its own lengths if it is one of many."""
        problem, planned = self.problem, self.plan.tile
        if isinstance(planned, CpuTile) and not (problem.layout.lengths_are_data or self.gradients):
            return planned
        lengths, band_width = (self.batch, self.seqlen_q, self.seqlen_k), problem.mask.band_width(self.seqlen_k)
        return cpu_tile(problem.sizes, *lengths, self.num_workers, band_width, self.gradients)

    def cost(self, where: TileIndex) -> int:
        """Of a tile, roughly, in floating-point operations, as the plan counts them."""
        sizes, pairs = self.problem.sizes, where.pairs.stop - where.pairs.start
        numbers = where.batch_size * (where.num_heads * len(where.rows) + pairs * len(where.touched))
        return cpu_cost(where.work, numbers, sizes.head_dim + sizes.head_dim_v)

    def has_small_products(self, where: TileIndex) -> bool:
        """A BLAS makes those of the tile on one thread in any case."""
        sizes, pairs = self.problem.sizes, where.pairs.stop - where.pairs.start
        scores = where.num_heads // pairs * len(where.rows) * min(len(where.touched), self.cut.block_k)
        return bool(scores <= FEW_SCORES and scores * max(sizes.head_dim, sizes.head_dim_v) <= FEW_MULTIPLICATIONS)

    def diagonal(self, rows: Span) -> Array:
        """The key on each row's diagonal."""
        return np.arange(rows.start, rows.stop) + self.problem.mask.offset(self.seqlen_q, self.seqlen_k)
