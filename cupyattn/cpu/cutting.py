"""Cutting a problem on the CPU into parts, each with views of the operands: see `part.Part`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np

from cupyattn.cpu.part import Part
from cupyattn.cpu.places import Index, Keys, Places, Rows, end_to_end, heads_first
from cupyattn.numpy_ref import Array
from cupyattn.plan import Plan
from cupyattn.problem import FLOAT8, Problem
from cupyattn.rounding import widen


class Descales(NamedTuple):
    """Factors of the numbers in q, k and v, (batch, heads) each; None: they are what they are."""

    q: Array | None
    k: Array | None
    v: Array | None

    def of(self, ids: Array) -> Descales:
        """Those of some sequences."""
        if self is NO_DESCALES:
            return self
        return Descales(*(None if factors is None else factors[ids] for factors in self))


NO_DESCALES = Descales(None, None, None)


def _descales(problem: Problem, operands: Mapping[str, Array], compute: str) -> Descales:
    if problem.dtype != FLOAT8:
        return NO_DESCALES
    sizes = problem.sizes

    def whole(name: str, heads: int) -> Array | None:
        array = operands.get(name)
        return None if array is None else np.broadcast_to(widen(array, compute), (sizes.batch, heads))

    by_key_head = whole("q_descale", sizes.num_heads_k)
    group = sizes.num_heads // max(1, sizes.num_heads_k)
    by_head = None if by_key_head is None else np.repeat(by_key_head, group, axis=1)
    return Descales(by_head, whole("k_descale", sizes.num_heads_k), whole("v_descale", sizes.num_heads_v))


def cut_into_parts(
    plan: Plan, problem: Problem, operands: Mapping[str, Array], seed: int, gradients: bool = False
) -> Iterator[Part]:
    """The parts of a problem, each with views of the operands."""
    sizes, compute = problem.sizes, plan.compute_dtype
    slopes, sinks = operands.get("alibi_slopes"), operands.get("sinks")
    if slopes is not None:
        slopes = widen(slopes, compute)
        slopes = slopes[None] if slopes.ndim == 1 else slopes
    if sinks is not None:
        sinks = widen(sinks, compute)
    descales = _descales(problem, operands, compute)
    if problem.layout.lengths_are_data:
        everything = _Sequences(plan, problem, operands, seed, slopes, sinks, descales, gradients)
        yield from map(everything.part, everything.groups())
        return
    pairs = sizes.num_heads // sizes.queries_per_pair
    lead = sizes.batch_shape or (1,)
    rank = len(lead) + 3

    def whole(name: str, heads: int) -> Array:
        array = heads_first(operands[name], problem)
        shape = (*lead, heads, *array.shape[-2:])
        return array if array.shape == shape else np.broadcast_to(array, shape)

    def with_rank(name: str) -> Array | None:
        array = operands.get(name)
        return None if array is None else array.reshape((1,) * (rank - array.ndim) + array.shape)

    q, k, v = whole("q", sizes.num_heads), whole("k", sizes.num_heads_k), whole("v", sizes.num_heads_v)
    mask, bias = with_rank("mask"), with_rank("bias")
    ids = np.arange(sizes.batch).reshape(lead)
    for outer in product(*map(range, lead[:-1])):
        slopes_here = slopes if slopes is None or slopes.shape[0] == 1 else slopes[ids[outer]]
        factors = descales.of(ids[outer])
        yield Part(
            plan,
            problem,
            outer,
            Rows(q[outer]),
            Keys(k[outer], pairs, compute, descale=factors.k),
            Keys(v[outer], pairs, compute, descale=factors.v),
            sizes.seqlen_q,
            sizes.seqlen_k,
            ids[outer],
            seed,
            mask,
            bias,
            slopes_here,
            sinks,
            factors.q,
            num_workers=plan.num_workers,
            gradients=gradients,
        )


SHORT = 2**17
"""Numbers of a sequence up to which it goes together with others: by itself it would cost more than copying them."""
SHARE = 4
"""Parts per worker from which a part need not be shared out among them."""


@dataclass
class _Sequences:
    """The sequences of a problem in which each has lengths of its own."""

    plan: Plan
    problem: Problem
    operands: Mapping[str, Array]
    seed: int
    slopes: Array | None
    sinks: Array | None
    descales: Descales
    gradients: bool

    def __post_init__(self) -> None:
        sizes, operands = self.problem.sizes, self.operands
        if self.problem.layout.ragged:
            self.starts_q, self.seqlens_q = _starts_and_lengths(operands["cu_seqlens_q"])
        else:
            self.starts_q, self.seqlens_q = np.zeros(sizes.batch, np.int64), np.full(sizes.batch, sizes.seqlen_q)
        if "cache_seqlens" in operands:  # of pages, to which nothing was appended
            self.starts_k, self.seqlens_k = np.zeros(sizes.batch, np.int64), operands["cache_seqlens"].astype(np.int64)
        elif self.problem.layout.cached:
            self.starts_k = operands["first_key"]
            self.seqlens_k = operands["seqused_k"] - self.starts_k
        else:
            self.starts_k, self.seqlens_k = _starts_and_lengths(operands["cu_seqlens_k"])
            if "block_table" in operands:
                self.starts_k = np.zeros(sizes.batch, np.int64)
        self.work = max(1, int((self.seqlens_q * self.seqlens_k).sum()))

    def groups(self) -> Iterator[Array]:
        """The sequences that have rows; short ones together with all that are as long.

        By nothing but lengths, so that results do not depend on where keys lie.
        """
        sizes = self.problem.sizes
        with_rows = np.flatnonzero(self.seqlens_q)
        order = with_rows[np.lexsort((self.seqlens_k[with_rows], self.seqlens_q[with_rows]))]
        rows, keys = self.seqlens_q[order], self.seqlens_k[order]
        per_row = sizes.num_heads * (sizes.head_dim + sizes.head_dim_v)
        per_key = sizes.num_heads_k * sizes.head_dim + sizes.num_heads_v * sizes.head_dim_v
        alone = rows * per_row + keys * per_key > SHORT
        apart = (np.diff(rows) != 0) | (np.diff(keys) != 0) | alone[1:]
        yield from np.split(order, np.flatnonzero(apart) + 1) if order.size else ()

    def part(self, ids: Array) -> Part:
        """Sequences of the same lengths as one part."""
        problem, sizes = self.problem, self.problem.sizes
        seqlen_q, seqlen_k = int(self.seqlens_q[ids[0]]), int(self.seqlens_k[ids[0]])
        sequences = None if problem.layout.ragged else ids
        places_q, index_q = _lie(self.starts_q[ids], seqlen_q, sequences)
        if problem.layout.page_size is None:
            sequences = self.operands["cache_batch_idx"][ids] if problem.layout.cached else None
            places_k, index_k = _lie(self.starts_k[ids], seqlen_k, sequences)
        else:
            pages = self.operands["block_table"][ids]
            places_k, index_k = Places(self.starts_k[ids], None, pages, problem.layout.page_size), None
        pairs = sizes.num_heads // sizes.queries_per_pair
        factors = self.descales.of(ids)

        def keys(name: str, descale: Array | None) -> Keys:
            array = self.operands[name]
            view = array if index_k is None else end_to_end(array, index_k, ids.size, seqlen_k)
            return Keys(view, pairs, self.plan.compute_dtype, places_k, descale)

        q = self.operands["q"]
        workers, work = self.plan.num_workers, ids.size * seqlen_q * seqlen_k
        return Part(
            self.plan,
            problem,
            (),
            Rows(q if index_q is None else end_to_end(q, index_q, ids.size, seqlen_q), places_q),
            keys("k", factors.k),
            keys("v", factors.v),
            seqlen_q,
            seqlen_k,
            ids,
            self.seed,
            slopes=self.slopes if self.slopes is None or self.slopes.shape[0] == 1 else self.slopes[ids],
            sinks=self.sinks,
            q_descale=factors.q,
            stretch_q=index_q,
            stretch_k=index_k,
            num_workers=workers if SHARE * workers * work >= self.work else 1,
            gradients=self.gradients,
        )


def _starts_and_lengths(cu_seqlens: Array) -> tuple[Array, Array]:
    bounds = cu_seqlens.astype(np.int64)
    return bounds[:-1], np.diff(bounds)


def _lie(starts: Array, seqlen: int, sequences: Array | None) -> tuple[Places | None, Index | None]:
    """Where sequences lie: in one stretch of the array, or at places.

    Each is in a sequence of the array's, or they are all among its tokens.
    """
    first, count = int(starts[0]), starts.size
    if sequences is None:
        if (np.diff(starts) == seqlen).all():
            return None, (slice(first, first + count * seqlen),)
        return Places(starts), None
    if (np.diff(sequences) == 1).all() and (starts == first).all():
        there = int(sequences[0])
        return None, (slice(there, there + count), slice(first, first + seqlen))
    return Places(starts, sequences), None
