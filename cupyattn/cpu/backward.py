"""The backward pass: a task for all tiles that share a key or a value head, so that one alone adds to its gradient.

Where these are too few for the workers, tasks share a head, and add to its gradient in turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from cupyattn.cpu import flash
from cupyattn.cpu.cutting import cut_into_parts
from cupyattn.cpu.edits import piece_index
from cupyattn.cpu.flash import KeyBlock
from cupyattn.cpu.forward import attend
from cupyattn.cpu.part import Part
from cupyattn.cpu.places import Index, Keys, end_to_end, heads_first
from cupyattn.cpu.scratch import Scratch
from cupyattn.cpu.tasks import Addition, Costly, run_in_order
from cupyattn.cpu.tiles import TileIndex
from cupyattn.cpu.views import stacked, tile_of
from cupyattn.numpy_ref import Array, State
from cupyattn.plan import Plan
from cupyattn.problem import Problem
from cupyattn.rounding import narrow

PIECES = 3
"""Tasks for each of several workers, at least: they end at about the same time."""


def run_backward(
    plan: Plan, problem: Problem, operands: Mapping[str, Array], grads: Mapping[str, Array | None], seed: int = 0
) -> dict[str, Array]:
    """Gradients of every floating operand, by its name and in its shape and dtype.

    `grads` holds ``dout`` and, or None, ``dlse`` and the forward's ``out`` and ``lse``.
    """
    sizes, compute = problem.sizes, plan.compute_dtype
    if grads.get("out") is None or grads.get("lse") is None:
        forward: dict[str, Array | None] = {"out": None, "lse": None}
    else:
        forward = {name: grads[name] for name in ("out", "lse")}
    collected = {name: np.zeros(_whole_shape(name, problem, operands), compute) for name in ("q", "k", "v")}
    for name in ("bias", "sinks", "alibi_slopes"):
        if name in operands:
            collected[name] = np.zeros(operands[name].shape, compute)
    job = _BackwardJob(problem, collected, grads, forward)
    tasks: list[Costly] = []
    for part in cut_into_parts(plan, problem, operands, seed, gradients=True):
        if part.out_size == 0 or (part.seqlen_k == 0 and not problem.edits.sinks) or part.num_heads == 0:
            continue
        owners = _owners(part, sizes.num_heads_k, sizes.num_heads_v)
        pieces = -(-PIECES * part.num_workers // len(owners)) if part.num_workers > 1 else 1
        for owned in owners:
            for tiles in filter(None, (owned[first::pieces] for first in range(pieces))):
                tasks.append((part, tiles, partial(job.run, part, tiles, len(tiles) == len(owned))))
    run_in_order(tasks, plan.num_workers)
    with np.errstate(all="ignore"):
        return {
            name: narrow(_sum_to(gradient, operands[name].shape), _dtype_name(operands[name]))
            for name, gradient in collected.items()
        }


def _dtype_name(array: Array) -> str:
    return "bfloat16" if array.dtype == np.uint16 else array.dtype.name


def _whole_shape(name: str, problem: Problem, operands: Mapping[str, Array]) -> tuple[int, ...]:
    """The shape of q, k or v after broadcasting its batch and heads, in the caller's layout."""
    shape = operands[name].shape
    sizes, axes = problem.sizes, problem.layout.axes
    if axes == "thd":
        return shape
    heads = {"q": sizes.num_heads, "k": sizes.num_heads_k, "v": sizes.num_heads_v}[name]
    if axes == "bshd":
        return (*sizes.batch_shape, shape[-3], heads, shape[-1])
    return (*(sizes.batch_shape or (1,)), heads, *shape[-2:])


def _sum_to(gradient: Array, shape: tuple[int, ...]) -> Array:
    """The gradient of an operand from that of its broadcast: sum over the axes that were made."""
    extra = gradient.ndim - len(shape)
    gradient = gradient.sum(axis=tuple(range(extra))) if extra > 0 else gradient
    made = tuple(axis for axis, size in enumerate(shape) if size == 1 and gradient.shape[axis] != 1)
    return gradient.sum(axis=made, keepdims=True) if made else gradient


def _owners(part: Part, num_heads_k: int, num_heads_v: int) -> list[list[TileIndex]]:
    """Tiles grouped so that no two groups share a key head or a value head of a sequence."""
    per_owner = part.num_heads // int(np.gcd(num_heads_k, num_heads_v))
    groups: dict[tuple[int, int], list[TileIndex]] = {}
    for where in part.tiles:
        groups.setdefault((where.batches.start, where.heads.start // per_owner), []).append(where)
    return list(groups.values())


class _KeyTotals:
    """Gradients of the keys and values of some sequences, summed over the tiles of one task."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self._totals: dict[tuple[str, int], tuple[slice, Array]] = {}

    def of(self, name: str, keys: Keys, where: TileIndex) -> Array:
        """Those of the heads that a tile reads, (batch, heads, keys, dim)."""
        heads = keys.head_slice(where.pairs)
        if (name, heads.start) not in self._totals:
            shape = (where.batch_size, heads.stop - heads.start, self._part.seqlen_k, keys.array.shape[-1])
            self._totals[name, heads.start] = heads, np.zeros(shape, self._part.compute_dtype)
        return self._totals[name, heads.start][1]

    def __iter__(self) -> Iterator[tuple[str, slice, Array]]:
        for (name, _), (heads, total) in self._totals.items():
            yield name, heads, total


@dataclass
class _BackwardJob:
    """Where the tasks of one backward pass put their gradients."""

    problem: Problem
    collected: dict[str, Array]
    grads: Mapping[str, Array | None]
    forward: dict[str, Array | None]

    def run(self, part: Part, tiles: list[TileIndex], alone: bool, scratch: Scratch) -> Addition:
        """Tiles of some sequences that share keys, one after the other; what others add to as well is returned.

        They are `alone` if no other task adds to the gradients of their keys.
        """
        common: list[Addition] = []
        totals = _KeyTotals(part)
        for where in tiles:
            common += self.run_tile(part, where, totals, scratch)
        for name, heads, total in totals:
            addition = self.addition_of_keys(name, part, tiles[0].batches, heads, total)
            if alone and (part.k if name == "k" else part.v).places is None:
                addition()
            else:
                common.append(addition)

        def add_all() -> None:
            for addition in common:
                addition()

        return add_all

    def run_tile(self, part: Part, where: TileIndex, totals: _KeyTotals, scratch: Scratch) -> list[Addition]:
        """One of them, whose keys' gradients go to `totals`."""
        state = self.state(part, where, scratch)  # first: what is computed again is in memory that the tile overwrites
        tile = tile_of(part, where, scratch, backward=True)
        dout = self.rows_like_out(part, where, "dout", scratch)
        dlse = self.rows_like_lse(part, where, "dlse", scratch)
        dk_total, dv_total = totals.of("k", part.k, where), totals.of("v", part.v, where)
        common: list[Addition] = []

        def add(block: KeyBlock, found: flash.BlockGradients) -> None:
            dk_total[:, :, block.keys] += found.dk
            dv_total[:, :, block.keys] += found.dv
            if found.dbias is not None:
                by_head = found.dbias.reshape(where.batch_size, where.num_heads, *found.dbias.shape[-2:])
                target = self.bias_of(part, where, block.keys)
                addition = partial(_add, target, _sum_to(by_head, target.shape))
                if self.each_has_its_bias():
                    addition()
                else:
                    common.append(addition)

        gradients = flash.flash_backward(tile, state, dout, dlse, self.problem.edits.softmax_scale, add)
        shape = (where.batch_size, where.num_heads, len(where.rows))
        part.of(self.collected["q"]).put(where, gradients.dq.reshape(*shape, -1))
        if gradients.dsinks is not None:
            dsinks = gradients.dsinks.reshape(shape).sum(axis=(0, -1))
            common.append(partial(_add, self.collected["sinks"][where.heads], dsinks))
        if gradients.dslopes is not None:
            slopes, dslopes = self.collected["alibi_slopes"], gradients.dslopes.reshape(shape[:2])
            if slopes.ndim == 1:
                common.append(partial(_add, slopes[where.heads], dslopes.sum(axis=0)))
            else:
                common.append(partial(_add, slopes, dslopes, (part.batch_ids[where.batches], where.heads)))
        return common

    def rows_like_out(self, part: Part, where: TileIndex, name: str, scratch: Scratch) -> Array:
        array = self.grads.get(name)
        if array is None:
            array = np.broadcast_to(np.zeros((), part.compute_dtype), self.problem.out_shape)
        return stacked(part, part.of(array), where, scratch, name)

    def rows_like_lse(self, part: Part, where: TileIndex, name: str, scratch: Scratch) -> Array | None:
        array = self.grads.get(name)
        if array is None:
            return None
        return stacked(part, part.lse_of(array), where, scratch, name)

    def state(self, part: Part, where: TileIndex, scratch: Scratch) -> State:
        """The forward's result: the caller's, or computed again where it was not kept."""
        if self.forward["out"] is None:
            return attend(part, where, scratch)
        lse = self.rows_like_lse(part, where, "lse", scratch)
        assert lse is not None
        return State(self.rows_like_out(part, where, "out", scratch), lse)

    def each_has_its_bias(self) -> bool:
        """Sequences and heads have none in common."""
        batch_shape = self.problem.sizes.batch_shape or (1,)
        return self.collected["bias"].shape[:-2] == (*batch_shape, self.problem.sizes.num_heads)

    def bias_of(self, part: Part, where: TileIndex, keys: slice) -> Array:
        """What one block's (batch, heads, rows, keys) are added to, one number where the bias is repeated."""
        rank = len(self.problem.sizes.batch_shape or (1,)) + 3
        total = self.collected["bias"]
        total = total.reshape((1,) * (rank - total.ndim) + total.shape)
        return total[piece_index(total, part.outer, where, keys)]

    def addition_of_keys(self, name: str, part: Part, batches: slice, heads: slice, total: Array) -> Addition:
        """Sums up the gradients of all keys of some sequences and heads, (batch, heads, keys, dim)."""
        source, gradient = part.k if name == "k" else part.v, self.collected[name]
        if source.places is not None:
            index = source.places.index(batches, slice(0, part.seqlen_k), heads)
            return partial(np.add.at, gradient, index, total.swapaxes(1, 2))  # sequences may share pages
        if part.stretch_k is not None:
            view = end_to_end(gradient, part.stretch_k, part.batch, part.seqlen_k)
        else:
            view = heads_first(gradient, self.problem)[part.outer]
        return partial(_add, view[batches, heads], total)


def _add(target: Array, values: Array, index: Index = (...,)) -> None:
    target[index] += values
