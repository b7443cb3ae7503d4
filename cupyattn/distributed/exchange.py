"""Heads for tokens, and tokens for heads: the all-to-alls of Ulysses, and what is attended in between.

Wherever the arrays are: what is done to them is `verbs`, and the work's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate

from cupyattn.arrays import Arrays
from cupyattn.distributed import verbs
from cupyattn.distributed.asked import Asked
from cupyattn.distributed.sharding import Sharding
from cupyattn.distributed.working import AnyWork
from cupyattn.problem import Array
from cupyattn.reading import Options, refusal

HeadsOf = Callable[[int], slice]
"""Which heads a rank works on."""


@dataclass
class Exchange:
    """One rank's heads of the whole sequence, for its tokens of all heads.  Arrays are heads first."""

    work: AnyWork

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
        going = [_end_to_end(array[:, heads(rank)]) for rank in range(comm.size)]
        batch, count, _, dim = going[comm.rank].shape
        came = comm.all_to_all(going, [(batch, count, tokens.length(rank), dim) for rank in range(comm.size)])
        whole = verbs.empty((batch, count, sum(tokens.seqlens), dim), array.dtype, array)
        for rank, part in enumerate(came):
            for places, own in _stretches(tokens, rank):
                verbs.write(whole[:, :, places], part[:, :, own])
        return whole

    def scattered(self, whole: Array, tokens: Sharding, heads: HeadsOf) -> Iterator[tuple[slice, Array]]:
        """The way back: heads of each rank, and what it found of them for this rank's tokens."""
        comm = self.comm
        batch, count, _, dim = whole.shape
        going = [verbs.empty((batch, count, tokens.length(to), dim), whole.dtype, whole) for to in range(comm.size)]
        for rank, part in enumerate(going):
            for places, own in _stretches(tokens, rank):
                verbs.write(part[:, :, own], whole[:, :, places])
        counts = [heads(rank).stop - heads(rank).start for rank in range(comm.size)]
        came = comm.all_to_all(going, [(batch, count, tokens.length(comm.rank), dim) for count in counts])
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

    def call(self, whole: Arrays, sequence: tuple[int, slice, slice]) -> tuple[Arrays, Options]:
        """The attention of this rank's heads in one sequence."""
        i, rows, keys = sequence
        asked, operands = self.work.asked, {"q": whole["q"][:, :, rows]}
        for name, count in (("k", self.sizes.num_heads_k), ("v", self.sizes.num_heads_v)):
            operands[name] = whole[name][:, :, keys]
            if not _are_groups(self.users(count)):
                operands[name] = _repeated(operands[name], self.users(count))
        for name in ("mask", "bias", "alibi_slopes", "sinks"):
            if name in whole:
                operands[name] = whole[name]
        if asked.packed and operands.get("alibi_slopes") is not None and operands["alibi_slopes"].ndim == 2:
            operands["alibi_slopes"] = operands["alibi_slopes"][i]
        options = asked.options._replace(
            axes="bhsd", needs_lse=True, alignment=asked.options.alignment or "bottom-right"
        )
        return operands, options

    def attend(self, whole: Arrays) -> tuple[Array, Array]:
        """(out, lse) of this rank's heads of all rows."""
        q, (of_out, of_lse) = whole["q"], self.work.state_dtypes
        shape = (self.sizes.batch, self.num_heads, q.shape[2])
        out, lse = verbs.zeros((*shape, self.sizes.head_dim_v), of_out, q), verbs.empty(shape, of_lse, q)
        verbs.write(lse, -math.inf)
        for sequence in self.sequences() if self.num_heads else ():
            found = self.work.answer(*self.call(whole, sequence))
            verbs.write(out[:, :, sequence[1]], found["out"])
            verbs.write(lse[:, :, sequence[1]], found["lse"])
        return out, lse

    def gradients(self, whole: Arrays, known: Arrays) -> Arrays:
        """Of this rank's heads of all rows and keys, and of what edits them, in the shapes of `whole`."""
        names = [name for name in ("q", "k", "v", "bias", "alibi_slopes") if name in whole]
        totals: Arrays = {name: verbs.zeros(tuple(whole[name].shape), self.work.dtype, whole[name]) for name in names}
        for sequence in self.sequences() if self.num_heads else ():
            i, rows, keys = sequence
            here = {name: None if x is None else x[:, :, rows] for name, x in known.items()}
            found = self.work.pull(*self.call(whole, sequence), here)
            verbs.add(totals["q"][:, :, rows], found["q"])
            for name, count in (("k", self.sizes.num_heads_k), ("v", self.sizes.num_heads_v)):
                total = totals[name][:, :, keys]
                if _are_groups(self.users(count)):
                    verbs.add(total, found[name])
                else:
                    for head, user in enumerate(self.users(count)):
                        verbs.add(total[:, user], found[name][:, head])
            if "bias" in found:
                verbs.add(totals["bias"], found["bias"])
            if "alibi_slopes" in found:
                slopes = totals["alibi_slopes"]
                verbs.add(slopes[i] if self.work.asked.packed and slopes.ndim == 2 else slopes, found["alibi_slopes"])
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


def _stretches(tokens: Sharding, rank: int) -> Iterator[tuple[slice, slice]]:
    """A rank's tokens, evenly spaced ones together: where they are in the whole, and among its own."""
    starts = list(accumulate(tokens.seqlens, initial=0))
    for piece in tokens.pieces[rank]:
        first = starts[piece.sequence]
        yield slice(first + piece.start, first + piece.stop, piece.step), piece.local


def _end_to_end(array: Array) -> Array:
    return array if verbs.is_contiguous(array) else verbs.copied(array)


def _repeated(array: Array, users: list[int]) -> Array:
    """A key head for each of its users."""
    found = verbs.empty((array.shape[0], len(users), *array.shape[2:]), array.dtype, array)
    for head, user in enumerate(users):
        verbs.write(found[:, head], array[:, user])
    return found


def _of_rank_4(array: Array) -> Array:
    return array.reshape((1,) * (4 - array.ndim) + array.shape)


def _the_one(rank: int) -> slice:
    """Of an axis of heads that is one for all."""
    return slice(0, 1)


def _are_groups(users: list[int]) -> bool:
    """Whether as many neighbours use each key head, as `attention` has it."""
    heads = max(users, default=-1) + 1
    return not users or (len(users) % heads == 0 and users == [i // (len(users) // heads) for i in range(len(users))])
