"""How many tiles the sequences of a problem take, before their lengths are known."""

from __future__ import annotations

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


def num_row_tiles(problem: Problem, tokens: int) -> int:
    """Tiles of so many rows that a launch has for each head; if ragged, those that wipe rows behind the last sequence
    among them."""
    return num_tiles(*_sequences_of(problem, tokens))


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
