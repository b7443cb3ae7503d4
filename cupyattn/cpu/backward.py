"""The CPU's door: cut the operands into tiles, run the algorithm of `flash` on each.

Tasks run in parallel; in the backward pass one task owns all tiles that share a key or a value head.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np

from cupyattn.cpu import flash
from cupyattn.cpu.cutting import cut_into_parts
from cupyattn.cpu.flash import KeyBlock
from cupyattn.cpu.scratch import Scratch
from cupyattn.cpu.threads import run_all
from cupyattn.cpu.tiles import Keys, Part, Rows, TileIndex, end_to_end, heads_first, piece_index
from cupyattn.numpy_ref import Array, State
from cupyattn.plan import Plan
from cupyattn.problem import Problem
from cupyattn.rounding import STORAGE, narrow


def run(plan: Plan, problem: Problem, operands: Mapping[str, Array], seed: int = 0) -> dict[str, Array]:
    """Compute ``out``, ``lse`` (and ``dropout_mask`` if wanted) in the caller's layout."""
    results = {
        "out": np.empty(problem.out_shape, STORAGE[problem.out_dtype]),
        "lse": np.empty(problem.lse_shape, problem.lse_dtype),
    }
    if problem.layout.ragged:  # rows after the last sequence belong to no tile
        results["out"].fill(0)
        results["lse"].fill(-np.inf)
    parts = [
        part
        for part in cut_into_parts(plan, problem, operands, seed)
        if part.out_size and part.num_heads  # an empty part has nothing to say
    ]
    tasks: list[Costly] = []
    for part in parts:
        out = part.of(results["out"])
        lse = part.lse_of(results["lse"])
        for tile in part.tiles:
            tasks.append((part, (tile,), partial(_forward_task, part, tile, out, lse)))
    _run(tasks, plan.num_workers)
    if problem.needs_dropout_mask:
        with np.errstate(all="ignore"):
            results["dropout_mask"] = _dropout_mask(problem, parts)
    return results


LITTLE = 2**20
"""Cost up to which a task is mostly Python, of which only one thread runs at a time."""


Addition = Callable[[], None]
"""What a task has to do yet, to sums that it has in common with others."""
Work = Callable[[Scratch], Addition | None]
Costly = tuple[Part, Sequence[TileIndex], Work]
"""A task and the tiles it is about."""


def _run(tasks: list[Costly], num_workers: int) -> None:
    are_small = num_workers == 1 and all(part.has_small_products(tiles[0]) for part, tiles, _ in tasks)
    if len(tasks) == 1:  # a small call, of which every microsecond is seen
        run_all([partial(_alone, tasks[0][2])], 1, are_small=are_small)
        return
    in_turn, first, runs = _InTurn(), 0, []
    for group in _in_order(tasks, num_workers):
        runs.append(partial(_one_after_the_other, group, first, in_turn))
        first += len(group)
    run_all(runs, num_workers, are_small=are_small)


def _alone(task: Work, scratch: Scratch) -> None:
    addition = task(scratch)
    if addition is not None:
        addition()


def _one_after_the_other(tasks: Sequence[Work], first: int, in_turn: _InTurn, scratch: Scratch) -> None:
    for turn, task in enumerate(tasks, first):
        addition = task(scratch)
        if addition is not None:
            in_turn.add(turn, addition)


class _InTurn:
    """Additions of tasks in the order of the tasks, whichever ends first, so that sums are the same to the last bit.

    Nobody waits: what comes before its turn is left to those whose turn it is.
    """

    def __init__(self) -> None:
        self._adding = threading.Lock()
        self._waiting: dict[int, Addition] = {}
        self._turn = 0

    def add(self, turn: int, addition: Addition) -> None:
        with self._adding:
            self._waiting[turn] = addition
            while self._turn in self._waiting:
                self._waiting.pop(self._turn)()
                self._turn += 1


def _in_order(tasks: list[Costly], num_workers: int) -> list[list[Work]]:
    """Those to run, the dearest first; threads get all those of little cost as one."""
    if len(tasks) < 2:
        return [[task] for _, _, task in tasks]
    dearest = sorted(((sum(map(part.cost, tiles)), task) for part, tiles, task in tasks), key=lambda entry: -entry[0])
    if num_workers == 1 or dearest[-1][0] > LITTLE:
        return [[task] for _, task in dearest]
    together = [task for cost, task in dearest if cost <= LITTLE]
    return [together, *([task] for cost, task in dearest if cost > LITTLE)]


def _forward_task(part: Part, where: TileIndex, out: Rows, lse: Rows, scratch: Scratch) -> None:
    state = part.attend(where, scratch)
    shape = (where.batch_size, where.num_heads, len(where.rows))
    problem = part.problem
    values = state.out.reshape(*shape, problem.sizes.head_dim_v)
    if problem.out_dtype == "bfloat16":
        values = narrow(values, problem.out_dtype)
    out.put(where, values)
    lse.put(where, state.lse.reshape(shape))


def _dropout_mask(problem: Problem, parts: list[Part]) -> Array:
    """flash-attn's S_dmask, (batch, heads, seqlen_q, seqlen_k): weights, negative where dropped."""
    sizes = problem.sizes
    weights = np.zeros((sizes.batch, sizes.num_heads, sizes.seqlen_q, sizes.seqlen_k), STORAGE[problem.out_dtype])
    for part in parts:
        ids = part.batch_ids
        for where in part.tiles:
            lse = part.attend(where, Scratch()).lse
            tile = part.tile(where, Scratch())
            origin = np.where(np.isneginf(lse), 0.0, lse)
            for block in tile.blocks():
                scores = tile.scores(block)
                found = np.where(np.isneginf(scores), 0.0, np.exp(scores - origin[..., block.rows, None]))
                by_head = tile.per_head(found)
                signed = np.where(block.keep == 0.0, -by_head, by_head)
                signed = narrow(signed, problem.out_dtype).reshape(
                    where.batch_size, where.num_heads, *signed.shape[-2:]
                )
                rows = range(where.rows.start, where.rows.stop)[block.rows]
                weights[ids[where.batches], where.heads, rows.start : rows.stop, block.keys] = signed
    return weights


@cache
def memory_of_machine() -> float:
    """Bytes that this process may have at most; inf where nobody says."""
    try:
        whole = float(os.sysconf("SC_PHYS_PAGES")) * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on this system
        return math.inf
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # no group, no limit: "max"
            whole = min(whole, float(Path(limit).read_text()))
    return whole


# ---------------------------------------------------------------------------------------------------
# Backward
# ---------------------------------------------------------------------------------------------------


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
    for part in cut_into_parts(plan, problem, operands, seed):
        if part.out_size == 0 or (part.seqlen_k == 0 and not problem.edits.sinks) or part.num_heads == 0:
            continue
        owners = _owners(part, sizes.num_heads_k, sizes.num_heads_v)
        tasks.extend((part, tiles, partial(job.run, part, tiles)) for tiles in owners)
    _run(tasks, plan.num_workers)
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


@dataclass
class _BackwardJob:
    """Where the tasks of one backward pass put their gradients."""

    problem: Problem
    collected: dict[str, Array]
    grads: Mapping[str, Array | None]
    forward: dict[str, Array | None]

    def run(self, part: Part, tiles: list[TileIndex], scratch: Scratch) -> Addition:
        """The tiles of some sequences that share keys, one after the other; what others add to as well is returned."""
        problem, compute = self.problem, part.compute_dtype
        batches = tiles[0].batches
        common: list[Addition] = []
        totals: dict[tuple[str, int], tuple[slice, Array]] = {}

        def share(name: str, keys: Keys, where: TileIndex) -> Array:
            heads = keys.head_slice(where.pairs)
            if (name, heads.start) not in totals:
                shape = (where.batch_size, heads.stop - heads.start, part.seqlen_k, keys.array.shape[-1])
                totals[name, heads.start] = heads, np.zeros(shape, compute)
            return totals[name, heads.start][1]

        for where in tiles:
            tile = part.tile(where, scratch, backward=True)
            dout = self.rows_like_out(part, where, "dout")
            dlse = self.rows_like_lse(part, where, "dlse")
            tile.suspicious = tile.suspicious or not bool(np.isfinite(dout.sum()))
            state = self.state(part, where, scratch)
            dk_total, dv_total = share("k", part.k, where), share("v", part.v, where)

            def add(
                block: KeyBlock,
                dk: Array,
                dv: Array,
                dbias: Array | None,
                dk_total: Array = dk_total,
                dv_total: Array = dv_total,
                where: TileIndex = where,
            ) -> None:
                dk_total[:, :, block.keys] += dk
                dv_total[:, :, block.keys] += dv
                if dbias is not None:
                    by_head = dbias.reshape(where.batch_size, where.num_heads, *dbias.shape[-2:])
                    target = self.bias_of(part, where, block.keys)
                    addition = partial(_add, target, _sum_to(by_head, target.shape))
                    if self.each_has_its_bias():
                        addition()
                    else:
                        common.append(addition)

            gradients = flash.flash_backward(tile, state, dout, dlse, problem.edits.softmax_scale, add)
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
                    slopes[part.batch_ids[batches], where.heads] += dslopes
        for (name, _), (heads, total) in totals.items():
            common += self.add_keys(name, part, batches, heads, total)

        def add_all() -> None:
            for addition in common:
                addition()

        return add_all

    def rows_like_out(self, part: Part, where: TileIndex, name: str) -> Array:
        array = self.grads.get(name)
        if array is None:
            array = np.broadcast_to(np.zeros((), part.compute_dtype), self.problem.out_shape)
        return part.stacked(part.of(array), where)

    def rows_like_lse(self, part: Part, where: TileIndex, name: str) -> Array | None:
        array = self.grads.get(name)
        if array is None:
            return None
        return part.stacked(part.lse_of(array), where)

    def state(self, part: Part, where: TileIndex, scratch: Scratch) -> State:
        """The forward's result: the caller's, or computed again where it was not kept."""
        if self.forward["out"] is None:
            return part.attend(where, Scratch())
        lse = self.rows_like_lse(part, where, "lse")
        assert lse is not None
        return State(self.rows_like_out(part, where, "out"), lse)

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

    def add_keys(self, name: str, part: Part, batches: slice, heads: slice, total: Array) -> list[Addition]:
        """Sum the gradients of all keys of some sequences and heads, (batch, heads, keys, dim)."""
        source, gradient = part.k if name == "k" else part.v, self.collected[name]
        if source.places is not None:
            index = source.places.index(batches, slice(0, part.seqlen_k), heads)
            return [partial(np.add.at, gradient, index, total.swapaxes(1, 2))]  # sequences may share pages
        if part.stretch_k is not None:
            view = end_to_end(gradient, part.stretch_k, part.batch, part.seqlen_k)
        else:
            view = heads_first(gradient, self.problem)[part.outer]
        view[batches, heads] += total
        return []


def _add(target: Array, values: Array) -> None:
    target += values
