"""Which keys of which rows each thread block has, where lengths are data: the twin of ``schedule.cuh``.

Pieces, rows that share their keys, lie end to end on a line: those of a sequence behind those of the one before it.  A
piece is as long as its sequence has blocks of keys that anybody sees, and `OVERHEAD` more.  Every thread block of a
grid as large as the GPU has an equal share of the line, whatever lengths there are; where a share ends, a piece is cut.

    sequences     0            1     2
    pieces     |-----|-----|--|--|-------|-------|
    shares     |--------|--------|--------|--------|

Whoever wants a sequence's result not to depend on the others has pieces cut by its own length alone; then a split is
the thread block's in whose share it begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from cupyattn.problem import Layout

OVERHEAD = 1
"""Blocks of keys that it takes to begin and to end a piece.  A model: queries are loaded, sums of warps are merged."""
BY_SHARES, EVEN = 0, -1
"""Instead of the keys of a split: pieces are cut where shares end; into even splits, as many as may be."""


class Schedule(NamedTuple):
    """What the device is told, and the layout of its memory: see `num_words`."""

    share: int
    """Of a thread block, on the line."""
    starts: tuple[int, ...]
    """Of each sequence's pieces, and the end of the last one's."""
    first: tuple[int, ...]
    """The sequence in which each thread block's share begins."""


def num_words(sequences: int, blocks: int) -> int:
    """Words of 32 bits of a schedule: share and starts take two each."""
    return 2 * (sequences + 2) + blocks


def num_sequences(layout: Layout, batch: int) -> int:
    """One more where they lie end to end: it wipes the rows behind the last one."""
    return batch + layout.ragged


def shortest_share(fewest_keys: int, block_k: int) -> int:
    return -(-fewest_keys // block_k) + OVERHEAD


def schedule_of(pieces: Sequence[int], lengths: Sequence[int], blocks: int, shortest: int) -> Schedule:
    """For so many thread blocks, of each sequence's number of pieces, and of its blocks of keys.

    Two sequences of one piece each, of 6 blocks of keys and of 2, on two thread blocks:

    >>> schedule_of([1, 1], [6, 2], blocks=2, shortest=1)
    Schedule(share=5, starts=(0, 7, 10), first=(0, 0))
    """
    starts = [0]
    for count, length in zip(pieces, lengths, strict=True):
        starts.append(starts[-1] + count * (length + OVERHEAD))
    share = max(shortest, -(-starts[-1] // max(1, blocks)))
    return Schedule(share, tuple(starts), tuple(_first_of(starts, share * block) for block in range(blocks)))


def _first_of(starts: Sequence[int], position: int) -> int:
    """The first sequence that may have a piece at this position: of several that begin there the first, since those
    that have no pieces may have got some since."""
    low, high = 0, len(starts) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if starts[middle] < position else (low, middle)
    return low if low < len(starts) - 1 and starts[low] == position else max(0, low - 1)


class Item(NamedTuple):
    """Work of a thread block."""

    sequence: int
    piece: int
    """Of the sequence."""
    start: int
    stop: int | None
    """Blocks of keys, from the first that the sequence sees; None: all from the start on."""
    split: int
    is_whole: bool
    """Nobody else has blocks of that piece."""


def cuts_of(schedule: Schedule, pieces: Sequence[int], block: int) -> Iterator[Item]:
    """What a thread block has where pieces are cut by shares.

    >>> schedule = schedule_of([1, 1], [6, 2], blocks=2, shortest=1)
    >>> list(cuts_of(schedule, [1, 1], 0))
    [Item(sequence=0, piece=0, start=0, stop=5, split=0, is_whole=False)]
    >>> [tuple(item) for item in cuts_of(schedule, [1, 1], 1)]
    [(0, 0, 5, None, 1, False), (1, 0, 0, None, 0, True)]
    """
    for sequence, piece, start, length in _pieces_from(schedule, pieces, block):
        first, last = (_owner_of(schedule, x) for x in (start, start + max(1, length) - 1))
        if first <= block <= last:
            begin = block * schedule.share - start if block > first else 0
            stop = (block + 1) * schedule.share - start if block < last else None
            yield Item(sequence, piece, begin, stop, block - first, first == last)


def splits_of(
    schedule: Schedule, pieces: Sequence[int], block: int, cut: Sequence[Sequence[tuple[int, int]]]
) -> Iterator[tuple[int, int, int]]:
    """(sequence, piece, split) of a thread block where `cut` says (splits, blocks of each) of every piece."""
    for sequence, piece, start, length in _pieces_from(schedule, pieces, block):
        count, each = cut[sequence][piece]
        for split in range(count):
            if _owner_of(schedule, start + min(split * each, max(1, length) - 1)) == block:
                yield sequence, piece, split


def places_of(schedule: Schedule, start: int, length: int) -> list[int]:
    """Where the splits of a piece cut by shares leave what they have come to: a thread block has room for two, one of
    a piece that ended in it, and one of a piece that goes on behind it."""
    first, last = (_owner_of(schedule, x) for x in (start, start + max(1, length) - 1))
    return [2 * first + 1, *(2 * block for block in range(first + 1, last + 1))]


def _owner_of(schedule: Schedule, position: int) -> int:
    return max(0, min(position // schedule.share, len(schedule.first) - 1))


def _pieces_from(schedule: Schedule, pieces: Sequence[int], block: int) -> Iterator[tuple[int, int, int, int]]:
    """(sequence, piece, where it begins, its length) from the first one of a thread block on."""
    for sequence in range(schedule.first[block], len(pieces)):
        begin = schedule.starts[sequence]
        each = (schedule.starts[sequence + 1] - begin) // max(1, pieces[sequence])
        for piece in range(pieces[sequence]):
            yield sequence, piece, begin + piece * each, max(0, each - OVERHEAD)


def most_cuts(blocks: int, pieces: int, slots: int, shortest: int) -> int:
    """Splits that a piece may get, at most: those of a sequence that has all the keys, while others are empty.

    1 if not even then a piece is longer than a share: nothing is worth cutting, and there is no schedule.
    """
    share = max(shortest, -(-pieces * (blocks + OVERHEAD) // max(1, slots)))
    return 1 if blocks + OVERHEAD <= share else min(slots, 1 + -(-(blocks - 1) // share))
