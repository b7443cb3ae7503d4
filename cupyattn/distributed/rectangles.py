"""Who sees whom, as rectangles: some rows of one rank over some keys of another, with a band of their own.

Rows and keys that are evenly spaced, equally far apart, see each other in a band around a diagonal, as those of
`attention` do: only the diagonal is elsewhere.  A rectangle is cut to what is seen, so that its band's edges are never
negative counted top-left; so `attention` itself, and every kernel, can be asked for it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from cupyattn.distributed.sharding import Piece, Sharding
from cupyattn.problem import Mask, Span

Window = tuple[int | None, int | None]


class Band(NamedTuple):
    """What a query sees, in positions: keys from `left` before its diagonal to `right` behind it; None: all."""

    left: int | None
    right: int | None
    bottom_right: bool
    """The diagonal of the last query is the last key; else that of the first is the first."""

    def shift(self, seqlen_q: int, seqlen_k: int) -> int:
        """From a query's position to its diagonal's."""
        return seqlen_k - seqlen_q if self.bottom_right else 0


class Rectangle(NamedTuple):
    """Rows of one rank, and keys of another of which each is seen by at least one of the rows, or nearly."""

    sequence: int
    rows: slice
    """Among the rank's own."""
    keys: Span
    """Among those of their own rank."""
    places: range
    """Of the keys in the sequence."""
    window: Window
    """Seen before and behind the diagonal of the rectangle's first row and key."""
    diagonal: int
    """Tokens from the first key to the diagonal of the first row."""

    @property
    def num_rows(self) -> int:
        return len(range(self.rows.start, self.rows.stop, self.rows.step))

    @property
    def count_visible(self) -> int:
        return Mask(*self.window, "top-left").count_visible(self.num_rows, len(self.keys))


def rectangle_of(rows: Piece, keys: Piece, band: Band, shift: int) -> Rectangle | None:
    """What these rows see of these keys, one step apart as well; None if nothing."""
    step, count_q, count_k = keys.step, len(rows), len(keys)
    far = count_q + count_k
    ahead = rows.start + shift - keys.start
    right = far if band.right is None else (ahead + band.right) // step
    left = far if band.left is None else (band.left - ahead) // step
    first, last = max(0, -right), min(count_q, count_k + left)
    start = max(0, first - left)
    stop = min(count_k, last + right)
    if first >= last or start >= stop or left + right < 0:
        return None
    right, left = right + first - start, left - first + start
    local = rows.local
    window = (
        None if left >= last - first - 1 else left,
        None if right >= stop - start - 1 else right,
    )
    return Rectangle(
        rows.sequence,
        slice(local.start + first * local.step, local.start + last * local.step, local.step),
        Span(keys.local.start + start, keys.local.start + stop),
        range(keys.start + start * step, keys.start + stop * step, step),
        window,
        ahead + (first - start) * step,
    )


def _in_steps(piece: Piece, step: int) -> Iterator[Piece]:
    """Neighbours as several pieces of tokens that are a step apart."""
    if piece.step == step:
        yield piece
        return
    for first in range(min(step, len(piece))):
        local = slice(piece.local.start + first, piece.local.stop, step)
        yield Piece(piece.sequence, piece.start + first, piece.stop, step, local)


def rectangles_of(
    rows: tuple[Piece, ...], keys: tuple[Piece, ...], shifts: tuple[int, ...], band: Band
) -> tuple[Rectangle, ...]:
    """All that the rows of one rank see of the keys of another, in the order of rows and of keys."""
    found, of_sequences = [], defaultdict(list)
    for of_keys in keys:
        of_sequences[of_keys.sequence].append(of_keys)
    for of_rows in rows:
        for of_keys in of_sequences[of_rows.sequence]:
            for piece in _in_steps(of_rows, of_keys.step):
                rectangle = rectangle_of(piece, of_keys, band, shifts[of_rows.sequence])
                if rectangle is not None:
                    found.append(rectangle)
    return tuple(found)


def shifts_of(rows: Sharding, keys: Sharding, band: Band) -> tuple[int, ...]:
    """From positions of queries to those of their diagonals, of each sequence."""
    return tuple(band.shift(*lengths) for lengths in zip(rows.seqlens, keys.seqlens, strict=True))
