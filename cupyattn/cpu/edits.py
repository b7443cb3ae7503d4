"""What edits the scores and weights of a block: its piece of mask and bias, ALiBi's distances, dropout's factors."""

from __future__ import annotations

import numpy as np

from cupyattn import numpy_ref
from cupyattn.cpu.places import Index
from cupyattn.cpu.tiles import Cut, TileIndex
from cupyattn.numpy_ref import Array


def slopes_of(slopes: Array, where: TileIndex, shape: tuple[int, int]) -> Array:
    """A tile's ALiBi slopes, (batch | 1, pairs, heads, 1, 1)."""
    found = slopes[_or_one(slopes, 0, where.batches), where.heads]
    return found.reshape(found.shape[0], *shape, 1, 1)


def distances(diagonal: Array, keys: slice, compute_dtype: str, step: int = 1) -> Array:
    """-|diagonal - step * key|, (rows, keys), given where each row's diagonal is."""
    found: Array = np.abs(diagonal[:, None] - step * np.arange(keys.start, keys.stop))
    return -found.astype(compute_dtype)


def dropout_factors(
    p: float, seed: int, batch_ids: Array, where: TileIndex, cut: Cut, shape: tuple[int, int], compute_dtype: str
) -> Array:
    """Dropout's factor for each weight: 0, or the reciprocal of the probability to stay."""
    factor = 0.0 if p == 1.0 else 1.0 / (1.0 - p)
    heads = np.arange(where.heads.start, where.heads.stop).reshape(shape)
    stays = numpy_ref.dropout_keep(
        p,
        seed,
        batch_ids[:, None, None, None],
        heads[None, :, :, None],
        np.arange(where.rows.start, where.rows.stop)[cut.rows],
        range(cut.keys.start, cut.keys.stop),
    )
    return np.asarray(stays * np.dtype(compute_dtype).type(factor))


def piece_of(array: Array, outer: Index, where: TileIndex, keys: slice, shape: tuple[int, int]) -> Array:
    """A tile's view of mask or bias: (batch | 1, pairs | 1, heads | 1, rows | 1, keys | 1)."""
    view = array[piece_index(array, outer, where, keys)]
    head_axes = shape if view.shape[1] > 1 else (1, 1)
    return view.reshape(view.shape[0], *head_axes, *view.shape[2:])


def piece_index(array: Array, outer: Index, where: TileIndex, keys: slice) -> Index:
    """Where a tile finds itself in an array whose axes may be of length one."""
    lead = tuple(i if array.shape[axis] > 1 else 0 for axis, i in enumerate(outer))
    first = len(outer)
    wanted = (where.batches, where.heads, where.row_slice, keys)
    return (*lead, *(_or_one(array, first + axis, part) for axis, part in enumerate(wanted)))


def _or_one(array: Array, axis: int, index: slice) -> slice:
    """`index`, or all there is along an axis of length one."""
    return index if array.shape[axis] > 1 else slice(0, 1)
