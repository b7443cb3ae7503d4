"""How many tiles the sequences of a problem take, before their lengths are known, and in which order."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate

from cupyattn.problem import Problem


def num_tiles(sequences: int, longest: int, size: int, total: int | None = None) -> int:
    """Tiles of `size` rows (or keys) for each head, of sequences not longer than the longest.

    Those that lie end to end, in an array of `total` rows, are not as many as the longest one would be alone: each may
    begin and end within a tile, so that together they take one more for each sequence than the array does.  Or they are
    about as long as each other, and it is fewer to count them all as the longest.
    Twin of ``Tiling`` in ``tiling.cuh``, which gives these tiles to sequences.

    64 sequences, the longest of 8192, of 65536 rows together; and 64 of 1024:

    >>> num_tiles(64, 8192, 128), num_tiles(64, 8192, 128, 65536), num_tiles(64, 1024, 128, 65536)
    (4096, 576, 512)
    """
    as_the_longest = sequences * max(1, -(-longest // size))
    return as_the_longest if total is None else min(as_the_longest, total // size + sequences)


def tile_of_round(round_: int, block: int, blocks: int, forth_and_back: bool) -> int:
    """The tile that a block takes in a round of as many tiles as there are blocks.

    Tiles come the longest first; forth and back, nobody has the longest of every round.
    Twin of the function of this name in ``tiling.cuh``.

    >>> [[tile_of_round(x, block, 3, True) for x in range(4)] for block in range(3)]
    [[0, 5, 6, 11], [1, 4, 7, 10], [2, 3, 8, 9]]
    """
    return round_ * blocks + (blocks - 1 - block if forth_and_back and round_ % 2 else block)


MOST_ROUNDS = 64
"""Behind so many, each of them shared out forth and back, nobody has much more to do than others."""


@lru_cache(maxsize=1024)
def balanced_section(work: tuple[int, ...], units: int, most: int, blocks: int) -> int:
    """How many units take turns, so that the busiest of the blocks has least to do, or little more.

    `work` is that of a unit's tiles, the first rows first; all of a section's units have their longest tile before any
    has the next one, as ``row_tile`` in ``hopper.cuh`` has it.  `most` units are as many as the second-level cache has
    room for, about; half of them keep what there is in use as well.

    128 heads of 2048 tokens, each tile of which has a block of keys more than the one before:

    >>> balanced_section(tuple(range(2, 18)), 128, 32, 132)
    33
    """
    if most < 2 or not blocks < len(work) * units <= MOST_ROUNDS * blocks:
        return most
    others = [x for x in range(most + most // 16, most // 2, -1) if x <= units and x != most]
    busiest = {section: _busiest(work, units, section, blocks) for section in (most, *others)}
    return next(section for section, its in busiest.items() if its <= 1.005 * min(busiest.values()))


def _busiest(work: tuple[int, ...], units: int, section: int, blocks: int) -> int:
    """What the busiest block has to do.  Neighbours take the same, so that only where that changes is kept."""
    more, tile = [0] * (blocks + 1), 0
    counts = [min(section, units - first) for first in range(0, units, section)]
    for index, count in enumerate(counts):
        rises = index % 2 == len(counts) % 2
        for its in work if rises else reversed(work):
            left = count
            while left:
                round_, first = divmod(tile, blocks)
                stop = min(first + left, blocks)
                tile, left = tile + stop - first, left - (stop - first)
                if round_ % 2:
                    first, stop = blocks - stop, blocks - first
                more[first] += its
                more[stop] -= its
    return max(accumulate(more))


def num_row_tiles(problem: Problem, size: int, heads: int = 1) -> int:
    """Tiles of so many rows that a launch has for each head, or for each so many that are packed into rows; if ragged,
    those that wipe rows behind the last sequence among them."""
    sequences, longest, size, total = _sequences_of(problem, size)
    return num_tiles(sequences, longest * heads, size, None if total is None else total * heads)


def tiles_if_even(problem: Problem, tokens: int) -> int:
    """Of each sequence, if all have as many as the longest; 0 if by where they begin there are fewer."""
    sequences, longest, _, _ = asked = _sequences_of(problem, tokens)
    each = max(1, -(-longest // tokens))
    return each if num_tiles(*asked) == sequences * each else 0


def _sequences_of(problem: Problem, tokens: int) -> tuple[int, int, int, int | None]:
    sizes = problem.sizes
    if problem.layout.ragged:
        return sizes.batch + 1, sizes.seqlen_q, tokens, sizes.total_q
    return sizes.batch, sizes.seqlen_q, tokens, None
