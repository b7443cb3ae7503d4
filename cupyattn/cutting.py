"""Cutting a problem on the CPU into parts, each with views of the operands: see `tiles.Part`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import NamedTuple

import numpy as np

from cupyattn.numpy_ref import Array
from cupyattn.plan import Plan
from cupyattn.problem import FLOAT8, Problem
from cupyattn.rounding import widen
from cupyattn.tiles import Keys, Part, heads_first


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


def cut_into_parts(plan: Plan, problem: Problem, operands: Mapping[str, Array], seed: int) -> Iterator[Part]:
    """The parts of a problem, each with views of the operands."""
    sizes, compute = problem.sizes, plan.compute_dtype
    pairs = sizes.num_heads // sizes.queries_per_pair
    slopes, sinks = operands.get("alibi_slopes"), operands.get("sinks")
    if slopes is not None:
        slopes = widen(slopes, compute)
        slopes = slopes[None] if slopes.ndim == 1 else slopes
    if sinks is not None:
        sinks = widen(sinks, compute)
    descales = _descales(problem, operands, compute)
    if problem.layout.lengths_are_data:
        cut = _cached_parts if problem.layout.cached else _ragged_parts
        yield from cut(plan, problem, operands, seed, pairs, compute, slopes, sinks, descales)
        return
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
            slice(None),
            q[outer],
            Keys(k[outer], pairs, compute, descale=factors.k),
            Keys(v[outer], pairs, compute, descale=factors.v),
            sizes.seqlen_k,
            ids[outer],
            seed,
            mask,
            bias,
            slopes_here,
            sinks,
            factors.q,
        )


def _ragged_parts(
    plan: Plan,
    problem: Problem,
    operands: Mapping[str, Array],
    seed: int,
    pairs: int,
    compute: str,
    slopes: Array | None,
    sinks: Array | None,
    descales: Descales,
) -> Iterator[Part]:
    q = heads_first(operands["q"], problem)
    starts_q, starts_k = operands["cu_seqlens_q"].tolist(), operands["cu_seqlens_k"].tolist()
    table = operands.get("block_table")
    for index in range(problem.sizes.batch):
        tokens = slice(starts_q[index], starts_q[index + 1])
        first, last = starts_k[index], starts_k[index + 1]
        here = np.array([index])
        factors = descales.of(here)

        def keys(name: str, descale: Array | None, first: int = first, last: int = last, index: int = index) -> Keys:
            if table is not None:
                return Keys(operands[name], pairs, compute, table[index], descale)
            array = heads_first(operands[name], problem)[:, :, first:last]
            return Keys(array, pairs, compute, descale=descale)

        yield Part(
            plan,
            problem,
            (),
            tokens,
            q[:, :, tokens],
            keys("k", factors.k),
            keys("v", factors.v),
            last - first,
            here,
            seed,
            slopes=slopes if slopes is None or slopes.shape[0] == 1 else slopes[index : index + 1],
            sinks=sinks,
            q_descale=factors.q,
            first_key=first,
        )


def _cached_parts(
    plan: Plan,
    problem: Problem,
    operands: Mapping[str, Array],
    seed: int,
    pairs: int,
    compute: str,
    slopes: Array | None,
    sinks: Array | None,
    descales: Descales,
) -> Iterator[Part]:
    """One part per sequence: its keys are those from first_key up to seqused_k, in its place or its pages."""
    q, table = heads_first(operands["q"], problem), operands.get("block_table")
    starts_q = operands["cu_seqlens_q"].tolist() if problem.layout.ragged else None
    spans = zip(operands["first_key"].tolist(), operands["seqused_k"].tolist(), strict=True)
    for index, (first, stop) in enumerate(spans):
        factors = descales.of(np.array([index]))  # the sequence's in this call, wherever in the cache it lies

        def keys(
            name: str, descale: Array | None, index: int = index, live: slice = slice(first, stop), first: int = first
        ) -> Keys:
            if table is not None:
                return Keys(operands[name], pairs, compute, table[index], descale, first)
            array = operands[name][operands["cache_batch_idx"][index], live]
            return Keys(array.swapaxes(0, 1)[None], pairs, compute, descale=descale)

        here = slice(index, index + 1)
        tokens = slice(None) if starts_q is None else slice(starts_q[index], starts_q[index + 1])
        yield Part(
            plan,
            problem,
            () if starts_q is not None else (here,),
            tokens,
            q[:, :, tokens] if starts_q is not None else q[here],
            keys("k", factors.k),
            keys("v", factors.v),
            stop - first,
            np.array([index]),
            seed,
            slopes=slopes if slopes is None or slopes.shape[0] == 1 else slopes[here],
            sinks=sinks,
            q_descale=factors.q,
        )
