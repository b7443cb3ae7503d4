"""Where the running maximum is skipped, and where it must not be.

Scores that are known to be small need none.  Their weights are then not those of a running maximum, so that products
with very large or very small values may leave the dtype's range: the results tell.
"""

from __future__ import annotations

import math

import numpy as np

from cupyattn.cpu.part import Part
from cupyattn.cpu.scratch import Scratch
from cupyattn.cpu.tiles import TileIndex
from cupyattn.numpy_ref import Array, State

SCORE_LIMIT = {"float32": 30.0, "float64": 60.0}
"""Scores of at most this size can skip the running maximum: exp and its sum over any number of keys stay far inside
the dtype's range on both sides.  Whether products with values did is seen by the results, see `forward.attend`."""
LEAST_EXACT = {name: float(np.finfo(name).tiny / np.finfo(name).eps) * math.exp(x) for name, x in SCORE_LIMIT.items()}
"""Results as large as this lost nothing to products of small weights that were too small for the dtype."""
ROWS_WORTH_A_BOUND = 64
"""Rows per key from which reading the keys once more for their norms pays."""


def bounded_rows(part: Part, where: TileIndex, q: Array, heads: int, scratch: Scratch) -> Array | None:
    """The rows none of whose scores can be large, by Cauchy-Schwarz; None where that is not worth knowing."""
    mask, edits, sizes = part.problem.mask, part.problem.edits, part.problem.sizes
    edited = part.mask is not None or edits.bias is not None or part.slopes is not None or edits.sinks
    worth = part.seqlen_q * sizes.queries_per_pair >= ROWS_WORTH_A_BOUND and part.seqlen_k > 0
    if edited or mask.left is not None or not worth:
        return None
    row_square = np.einsum("...d,...d->...", q, q).reshape(*q.shape[:-2], heads, len(where.rows))
    last = None if mask.right is None else part.diagonal(where.rows) + mask.right
    largest = part.facts.largest_square(where, last, scratch)[..., None, :]
    bounded = row_square * largest <= SCORE_LIMIT[part.compute_dtype] ** 2
    return np.asarray(bounded.reshape(q.shape[:-1]))


def rows_vanished(part: Part, state: State, where: TileIndex, scratch: Scratch) -> Array | None:
    """Those with results so small that products may have been too small for the dtype, if there are any."""
    out, least = state.out, LEAST_EXACT[part.compute_dtype]
    size = np.abs(out, out=scratch.array("size", out.shape, out.dtype))
    if out.size == 0 or np.minimum.reduce(size, axis=None) >= least:
        return None
    small = (size < least) & ~np.isneginf(state.lse)[..., None]
    rows = np.asarray((small & part.facts.columns(where, scratch)).any(axis=-1))  # zeros of zeros did not vanish
    return rows if rows.any() else None
