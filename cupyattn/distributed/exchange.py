"""Heads for tokens, and tokens for heads: the all-to-alls of Ulysses, and what is attended in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from cupyattn import cpu
from cupyattn.arrays import Arrays
from cupyattn.corridor import plan_for, plan_for_gradients
from cupyattn.distributed.asked import Asked
from cupyattn.distributed.sharding import Sharding
from cupyattn.distributed.work import Work, problem_of
from cupyattn.numpy_ref import Array, State
from cupyattn.problem import Problem
from cupyattn.reading import refusal

HeadsOf = Callable[[int], slice]
"""Which heads a rank works on."""


@dataclass
class Exchange:
    """One rank's heads of the whole sequence, for its tokens of all heads.  Arrays are heads first."""

    work: Work

    def __post_init__(self) -> None:
        asked = self.work.asked
        self.comm, self.rows, self.keys, self.sizes = asked.comm, asked.rows, asked.keys, asked.problem.sizes
        self.of_k, self.of_v = self.heads_of_keys(self.sizes.num_heads_k), self.heads_of_keys(self.sizes.num_heads_v)
        self.own = self.heads(self.comm.rank)
        self.num_heads = self.own.stop - self.own.start

    def heads(self, rank: int) -> slice:
        """Query heads that a rank attends."""
        size, count = self.comm.size, self.sizes.num_heads
        return slice(rank * count // size, (rank + 1) * count // size)

    def heads_of_keys(self, count: int) -> HeadsOf:
        """Those of `count` key heads that a rank's query heads use."""
        group = self.sizes.num_heads // max(1, count)

        def heads(rank: int) -> slice:
            mine = self.heads(rank)
            return slice(0, 0) if mine.start == mine.stop else slice(mine.start // group, (mine.stop - 1) // group + 1)

        return heads

    def users(self, count: int) -> list[int]:
        """For each of this rank's query heads, its key head among those that came."""
        group, first = self.sizes.num_heads // max(1, count), self.heads_of_keys(count)(self.comm.rank).start
        return [head // group - first for head in range(self.own.start, self.own.stop)]

    def gathered(self, array: Array, tokens: Sharding, heads: HeadsOf) -> Array:
        """Of (batch, all heads, own tokens, dim): (batch, own heads, all tokens, dim), in the sequence's order."""
        comm = self.comm
        going = [np.ascontiguousarray(array[:, heads(rank)]) for rank in range(comm.size)]
        batch, count, _, dim = going[comm.rank].shape
        came = comm.all_to_all(going, [(batch, count, tokens.length(rank), dim) for rank in range(comm.size)])
        whole = np.empty((batch, count, sum(tokens.seqlens), dim), array.dtype)
        for rank, part in enumerate(came):
            whole[:, :, tokens.positions(rank)] = part
        return whole

    def scattered(self, whole: Array, tokens: Sharding, heads: HeadsOf) -> Iterator[tuple[slice, Array]]:
        """The way back: heads of each rank, and what it found of them for this rank's tokens."""
        comm = self.comm
        going = [np.ascontiguousarray(whole[:, :, tokens.positions(rank)]) for rank in range(comm.size)]
        batch, own, dim = whole.shape[0], tokens.length(comm.rank), whole.shape[-1]
        counts = [heads(rank).stop - heads(rank).start for rank in range(comm.size)]
        came = comm.all_to_all(going, [(batch, count, own, dim) for count in counts])
        for rank, part in enumerate(came):
            yield heads(rank), part

    def edits(self) -> Arrays:
        """Mask, bias, slopes and sinks of this rank's heads, and all rows."""
        work, found = self.work, {}
        for name, array in (("mask", work.mask), ("bias", work.bias)):
            if array is None:
                continue
            array = _of_rank_4(array)
            heads = self.heads if array.shape[1] > 1 else _the_one
            if has_rows(work.asked, name):
                found[name] = self.gathered(array, self.rows, heads)
            else:
                found[name] = array[:, heads(self.comm.rank)]
        if work.slopes is not None:
            found["alibi_slopes"] = work.slopes[..., self.own]
        if work.sinks is not None:
            found["sinks"] = work.sinks[self.own]
        return found

    def sequences(self) -> Iterator[tuple[int, slice, slice]]:
        """Number, rows and keys of each, among all."""
        first_q = first_k = 0
        for i, (rows, keys) in enumerate(zip(self.rows.seqlens, self.keys.seqlens, strict=True)):
            yield i, slice(first_q, first_q + rows), slice(first_k, first_k + keys)
            first_q, first_k = first_q + rows, first_k + keys

    def call(self, whole: Arrays, sequence: tuple[int, slice, slice]) -> tuple[Problem, Arrays]:
        """The attention of this rank's heads in one sequence."""
        i, rows, keys = sequence
        asked, operands = self.work.asked, {"q": whole["q"][:, :, rows]}
        for name, count in (("k", self.sizes.num_heads_k), ("v", self.sizes.num_heads_v)):
            operands[name] = whole[name][:, :, keys]
            if not _are_groups(self.users(count)):
                operands[name] = operands[name][:, self.users(count)]
        for name in ("mask", "bias", "alibi_slopes", "sinks"):
            if name in whole:
                operands[name] = whole[name]
        if asked.packed and operands.get("alibi_slopes") is not None and operands["alibi_slopes"].ndim == 2:
            operands["alibi_slopes"] = operands["alibi_slopes"][i]
        options = asked.options._replace(
            axes="bhsd", needs_lse=True, alignment=asked.options.alignment or "bottom-right"
        )
        return problem_of(asked.function, operands, options), operands

    def attend(self, whole: Arrays) -> State:
        """This rank's heads of all rows."""
        asked, device = self.work.asked, self.work.device
        shape = (self.sizes.batch, self.num_heads, whole["q"].shape[2])
        out, lse = np.zeros((*shape, self.sizes.head_dim_v)), np.full(shape, -np.inf)
        for sequence in self.sequences() if self.num_heads else ():
            problem, operands = self.call(whole, sequence)
            plan = plan_for(asked.function, problem, device, asked.allowed)
            found = cpu.run(plan, replace(problem, dtype="float64"), operands)
            out[:, :, sequence[1]], lse[:, :, sequence[1]] = found["out"], found["lse"]
        return State(out, lse)

    def gradients(self, whole: Arrays, known: Arrays) -> Arrays:
        """Of this rank's heads of all rows and keys, and of what edits them, in the shapes of `whole`."""
        asked, device, dtype = self.work.asked, self.work.device, self.work.dtype
        names = [name for name in ("q", "k", "v", "bias", "alibi_slopes") if name in whole]
        totals: Arrays = {name: np.zeros(whole[name].shape, dtype) for name in names}
        for sequence in self.sequences() if self.num_heads else ():
            i, rows, keys = sequence
            problem, operands = self.call(whole, sequence)
            plan = plan_for_gradients(asked.function, problem, device, asked.allowed)
            here = {name: None if x is None else x[:, :, rows] for name, x in known.items()}
            found = cpu.run_backward(plan, problem, operands, here)
            totals["q"][:, :, rows] += found["q"]
            for name, count in (("k", self.sizes.num_heads_k), ("v", self.sizes.num_heads_v)):
                total = totals[name][:, :, keys]
                if found[name].shape == total.shape and _are_groups(self.users(count)):
                    total += found[name]
                else:
                    for head, user in enumerate(self.users(count)):
                        total[:, user] += found[name][:, head]
            if "bias" in found:
                totals["bias"] += found["bias"]
            if "alibi_slopes" in found:
                slopes = totals["alibi_slopes"]
                slopes = slopes[i] if asked.packed and slopes.ndim == 2 else slopes
                slopes += found["alibi_slopes"]
        return totals


def has_rows(asked: Asked, name: str) -> bool:
    """Whether every rank's mask, or bias, is of its own rows; else each is one for all, or something is wrong."""
    specs = [specs[name] for specs in asked.of_ranks if name in specs]
    counts = [1 if len(spec.shape) < 2 else spec.shape[-2] for spec in specs]
    if counts == [asked.rows.length(rank) for rank in range(asked.comm.size)]:
        return True
    if set(counts) <= {1}:
        return False
    rule = f"{name} has to be of a rank's own rows on all ranks, or one for all rows"
    raise ValueError(refusal(asked.function, rule, *((f"rank {i}", spec.shape) for i, spec in enumerate(specs))))


def _of_rank_4(array: Array) -> Array:
    return array.reshape((1,) * (4 - array.ndim) + array.shape)


def _the_one(rank: int) -> slice:
    """Of an axis of heads that is one for all."""
    return slice(0, 1)


def _are_groups(users: list[int]) -> bool:
    """Whether as many neighbours use each key head, as `attention` has it."""
    heads = max(users, default=-1) + 1
    return not users or (len(users) % heads == 0 and users == [i // (len(users) // heads) for i in range(len(users))])
