"""Which tokens of a sequence are whose: the layout as a value, and arrays cut by it and put together again."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise, starmap
from typing import Any, Literal, NamedTuple, TypeAlias

import array_api_compat

from cupyattn import reading
from cupyattn.problem import A
from cupyattn.reading import refusal

Kind: TypeAlias = Literal["contiguous", "zigzag", "striped"]
KINDS: tuple[Kind, ...] = ("contiguous", "zigzag", "striped")
Lengths: TypeAlias = tuple[int, ...] | tuple[tuple[int, ...], ...]
"""Of each rank; of packed sequences, of each rank in each sequence."""


class Piece(NamedTuple):
    """Tokens of one sequence that one rank has, evenly spaced: ``range(start, stop, step)``."""

    sequence: int
    start: int
    stop: int
    step: int
    local: slice
    """Where they are among the rank's own tokens."""

    def __len__(self) -> int:
        return len(range(self.start, self.stop, self.step))


@dataclass(frozen=True)
class Sharding:
    """Which tokens of a sequence, or of packed sequences, each rank has.

    Parameters
    ----------
    kind : {"contiguous", "zigzag", "striped"}
        Of each sequence, rank ``r`` of ``size`` has one stretch of neighbours, the ``r``-th; or the stretches ``r``
        and ``2 * size - 1 - r`` of twice as many, which have the same work under a causal mask; or every ``size``-th
        token from the ``r``-th on.  Stretches of a length that does not divide differ by one token.
    size : int
        How many ranks there are.
    seqlens : tuple of int
        Length of each sequence.  One, unless they are packed: then a rank's tokens are those of its first sequence,
        of its second, and so on.
    lengths : tuple of int, or of tuples of int, optional
        Tokens of each rank, where "contiguous" stretches are not as equal as can be: of several sequences a tuple for
        each rank, of its tokens in each of them.

    Raises
    ------
    ValueError, TypeError
        An unknown kind, sizes that are no such, or `lengths` that do not add up or belong to another kind.

    Examples
    --------
    >>> from cupyattn.distributed import Sharding
    >>> layout = Sharding("zigzag", size=2, seqlens=(8,))
    >>> [layout.positions(rank) for rank in range(2)]
    [(0, 1, 6, 7), (2, 3, 4, 5)]
    """

    kind: Kind
    size: int
    seqlens: tuple[int, ...]
    lengths: Lengths | None = None

    def __post_init__(self) -> None:
        function = "Sharding"
        reading.choice(function, "kind", self.kind, KINDS)
        reading.integer(function, "size", self.size, low=1)
        if not isinstance(self.seqlens, tuple):
            raise TypeError(refusal(function, "seqlens have to be a tuple", ("seqlens", repr(self.seqlens))))
        reading.integers(function, "seqlens", self.seqlens)
        if self.lengths is not None:
            self._check_lengths(function)

    def _check_lengths(self, function: str) -> None:
        is_one, lengths = len(self.seqlens) == 1, self.lengths
        if not isinstance(lengths, tuple) or not (is_one or all(isinstance(own, tuple) for own in lengths)):
            rule = "lengths have to be a tuple, or None" if is_one else "lengths have to be a tuple of tuples, or None"
            raise TypeError(refusal(function, rule, ("lengths", repr(lengths))))
        for rank, own in enumerate(lengths):
            name = f"lengths[{rank}]"
            if isinstance(own, tuple):
                reading.integers(function, name, own)
            else:
                reading.integer(function, name, own, low=0)
        if self.kind != "contiguous":
            rule = "lengths are for the contiguous stretches of sequences"
            raise ValueError(refusal(function, rule, ("kind", self.kind), ("lengths", lengths)))
        counts, totals = {len(own) for own in self._of_ranks}, tuple(map(sum, zip(*self._of_ranks, strict=False)))
        if len(lengths) != self.size or counts != {len(self.seqlens)} or totals != self.seqlens:
            rule = "lengths have to be one for each rank and sequence, and to add up to the sequences'"
            raise ValueError(refusal(function, rule, ("lengths", lengths), ("seqlens", self.seqlens)))

    @cached_property
    def pieces(self) -> tuple[tuple[Piece, ...], ...]:
        """Of each rank, in the order in which it has them."""
        return tuple(self._pieces_of(rank) for rank in range(self.size))

    def _pieces_of(self, rank: int) -> tuple[Piece, ...]:
        found, first = [], 0
        for sequence in range(len(self.seqlens)):
            for span in self._spans(rank, sequence):
                piece = Piece(sequence, span.start, span.stop, span.step, slice(first, first + len(span), 1))
                if len(span):
                    found.append(piece)
                first += len(span)
        return tuple(found)

    @cached_property
    def _of_ranks(self) -> tuple[tuple[int, ...], ...]:
        """`lengths` of each rank in each sequence."""
        return tuple(own if isinstance(own, tuple) else (own,) for own in self.lengths or ())

    @cached_property
    def _stretches(self) -> tuple[tuple[range, ...], ...]:
        """Of each sequence, that of each rank by `lengths`."""
        ends = (accumulate(lengths, initial=0) for lengths in zip(*self._of_ranks, strict=True))
        return tuple(tuple(starmap(range, pairwise(x))) for x in ends)

    def _spans(self, rank: int, sequence: int) -> list[range]:
        if self.lengths is not None:
            return [self._stretches[sequence][rank]]
        seqlen = self.seqlens[sequence]
        if self.kind == "striped":
            return [range(rank, seqlen, self.size)]
        count = self.size if self.kind == "contiguous" else 2 * self.size
        chunks = [rank] if self.kind == "contiguous" else [rank, count - 1 - rank]
        return [range(chunk * seqlen // count, (chunk + 1) * seqlen // count) for chunk in chunks]

    def length(self, rank: int) -> int:
        """How many tokens a rank has."""
        rank = reading.integer("Sharding.length", "rank", rank, low=0, high=self.size - 1)
        return sum(map(len, self.pieces[rank]))

    def positions(self, rank: int) -> tuple[int, ...]:
        """Places of a rank's tokens in the whole: in the sequence, or in all of them packed end to end."""
        rank = reading.integer("Sharding.positions", "rank", rank, low=0, high=self.size - 1)
        starts = [sum(self.seqlens[:i]) for i in range(len(self.seqlens))]
        return tuple(
            starts[piece.sequence] + place
            for piece in self.pieces[rank]
            for place in range(piece.start, piece.stop, piece.step)
        )


def shard_sequence(array: A, sharding: Sharding, rank: int, *, axis: int = 1) -> A:
    """A rank's tokens of an array that has all of them.

    Parameters
    ----------
    array : array
        Of any library.
    sharding : Sharding
        Which tokens are whose.
    rank : int
        Whose.
    axis : int
        That of the tokens: 1 of (batch, seqlen, num_heads, head_dim), 0 of packed sequences.

    Returns
    -------
    array
        In the order in which `ring_attention` and its kind have it.

    Raises
    ------
    TypeError, ValueError
        `array` is none, `sharding` no `Sharding`, the axis not as long as that says, or there is no such rank.

    Examples
    --------
    >>> import numpy as np
    >>> from cupyattn.distributed import Sharding, shard_sequence
    >>> shard_sequence(np.arange(8), Sharding("striped", 2, (8,)), 1, axis=0)
    array([1, 3, 5, 7])
    """
    function = "shard_sequence"
    _check_kinds(function, sharding, {"array": array})
    reading.integer(function, "rank", rank, low=0, high=sharding.size - 1)
    axis, total = _axis(function, array, axis), sum(sharding.seqlens)
    if array.shape[axis] != total:
        rule = f"axis {axis} of array has to be as long as the layout says, {total}"
        raise ValueError(refusal(function, rule, ("array", tuple(array.shape)), ("sharding", sharding)))
    shard: A = _taken(array, axis, sharding.positions(rank))
    return shard


def unshard_sequence(shards: Sequence[A], sharding: Sharding, *, axis: int = 1) -> A:
    """The array with all tokens, from those of all ranks: the inverse of `shard_sequence`.

    Parameters
    ----------
    shards : sequence of arrays
        One of each rank, in order; `Comm.all_gather` has them.
    sharding, axis
        As for `shard_sequence`.

    Returns
    -------
    array

    Raises
    ------
    TypeError, ValueError
        There is not one array for each rank, `sharding` is no `Sharding`, or one is not as long as that says.

    Examples
    --------
    >>> import numpy as np
    >>> from cupyattn.distributed import Sharding, shard_sequence, unshard_sequence
    >>> layout, x = Sharding("zigzag", 3, (10,)), np.arange(10)
    >>> unshard_sequence([shard_sequence(x, layout, rank, axis=0) for rank in range(3)], layout, axis=0)
    array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    """
    function = "unshard_sequence"
    if not isinstance(shards, (list, tuple)):
        rule = "shards have to be a list or tuple of arrays"
        raise TypeError(refusal(function, rule, ("shards", repr(shards), type(shards).__name__)))
    _check_kinds(function, sharding, {f"shards[{rank}]": shard for rank, shard in enumerate(shards)})
    if len(shards) != sharding.size:
        rule = f"there has to be one of each rank, {sharding.size}"
        raise ValueError(refusal(function, rule, ("shards", len(shards))))
    axis = _axis(function, shards[0], axis)
    for rank, shard in enumerate(shards):
        if shard.shape[axis] != sharding.length(rank):
            rule = f"axis {axis} of rank {rank}'s has to be as long as the layout says, {sharding.length(rank)}"
            raise ValueError(refusal(function, rule, (f"shards[{rank}]", tuple(shard.shape)), ("sharding", sharding)))
    xp: Any = array_api_compat.array_namespace(*shards)
    places = [place for rank in range(sharding.size) for place in sharding.positions(rank)]
    whence = sorted(range(len(places)), key=places.__getitem__)
    whole: A = _taken(xp.concat(list(shards), axis=axis), axis, tuple(whence))
    return whole


def _check_kinds(function: str, sharding: Any, arrays: Mapping[str, Any]) -> None:
    if not isinstance(sharding, Sharding):
        came = ("sharding", repr(sharding), type(sharding).__name__)
        raise TypeError(refusal(function, "sharding has to be a Sharding", came))
    for name, array in arrays.items():
        if not array_api_compat.is_array_api_obj(array):
            came = (name, reprlib.repr(array), type(array).__name__)
            raise TypeError(refusal(function, f"{name} has to be an array", came))


def _axis(function: str, array: Any, axis: int) -> int:
    rank = len(array.shape)
    return reading.integer(function, "axis", axis, low=-rank, high=rank - 1) % max(1, rank)


def _taken(array: Any, axis: int, places: tuple[int, ...]) -> Any:
    xp = array_api_compat.array_namespace(array)
    index = xp.asarray(places, dtype=xp.int32, device=array_api_compat.device(array))
    return xp.take(array, index, axis=axis)
