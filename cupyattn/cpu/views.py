"""The arithmetic's view of a tile: its queries, its keys block by block, and what edits their scores."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from cupyattn.cpu import flash
from cupyattn.cpu.bounded import bounded_rows
from cupyattn.cpu.edits import distances, dropout_factors, piece_of, slopes_of
from cupyattn.cpu.flash import KeyBlock
from cupyattn.cpu.part import Part
from cupyattn.cpu.places import Rows, is_tidy
from cupyattn.cpu.scratch import Scratch
from cupyattn.cpu.tiles import EDGE, MOST_REMEMBERED, Cut, TileIndex, band_cuts, remembered_cuts
from cupyattn.numpy_ref import Array
from cupyattn.rounding import are_bits, widen


def tile_of(part: Part, where: TileIndex, scratch: Scratch, backward: bool = False) -> flash.Tile:
    """The arithmetic's view of a tile."""
    edits = part.problem.edits
    pairs = where.pairs.stop - where.pairs.start
    heads = where.num_heads // pairs
    q = scaled_queries(part, where, pairs, scratch)
    bounded = None if backward else bounded_rows(part, where, q, heads, scratch)
    slopes = sinks = None
    if part.slopes is not None:
        slopes = slopes_of(part.slopes, where, (pairs, heads))
        steep = _steep(part, where, (pairs, heads))
        if steep is not None:
            slopes = np.where(steep, slopes.dtype.type(0.0), slopes)
    if part.sinks is not None:
        sinks = np.repeat(part.sinks[where.heads].reshape(pairs, heads), len(where.rows), axis=-1)
    return flash.Tile(
        q,
        heads,
        partial(blocks, part, where, pairs, heads, scratch),
        edits.softcap,
        slopes,
        sinks,
        bounded,
        scratch=scratch,
    )


def scaled_queries(part: Part, where: TileIndex, pairs: int, scratch: Scratch) -> Array:
    """The tile's queries times the softmax scale, stacked: (batch, pairs, heads * rows, head_dim)."""
    piece = part.q.of(where)
    if are_bits(piece):
        piece = widen(piece, part.compute_dtype)
    if part.q_descale is not None:
        piece = piece * part.q_descale[where.batches, where.heads, None, None]
    q = scratch.array("q", piece.shape, part.compute_dtype)
    np.multiply(piece, q.dtype.type(part.problem.edits.softmax_scale), out=q)
    return q.reshape(piece.shape[0], pairs, where.num_heads // pairs * len(where.rows), piece.shape[-1])


def stacked(part: Part, rows: Rows, where: TileIndex, scratch: Scratch, name: str) -> Array:
    """The tile's rows of an array of the caller's, (batch, pairs, heads * rows, ...), as the BLAS likes them.

    Scratch memory of this `name`, where the array's own does not do.
    """
    piece, pairs = rows.of(where), where.pairs.stop - where.pairs.start
    if are_bits(piece):
        piece = widen(piece, part.compute_dtype)
    if piece.dtype != part.compute_dtype or where.num_heads > pairs or not is_tidy(piece):
        copy = scratch.array(name, piece.shape, part.compute_dtype)
        np.copyto(copy, piece, casting="same_kind")
        piece = copy
    return piece.reshape(piece.shape[0], pairs, where.num_heads // pairs * len(where.rows), *piece.shape[3:])


def blocks(part: Part, where: TileIndex, pairs: int, heads: int, scratch: Scratch) -> Iterator[KeyBlock]:
    """The key blocks that the tile's rows can see, left to right."""
    problem = part.problem
    shape = (pairs, heads)
    steep = _steep(part, where, shape)
    stacked = heads > 1 or part.mask is not None or part.bias is not None or steep is not None
    block_k = part.cut.block_k
    cuts = band_cuts if part.seqlen_k > MOST_REMEMBERED * min(block_k, EDGE) else remembered_cuts
    for cut in cuts(problem.mask, where.rows, part.seqlen_q, part.seqlen_k, block_k, stacked):
        hidden = cut.hidden
        if part.mask is not None:
            not_seen = ~piece_of(part.mask, part.outer, where, cut.keys, shape)
            hidden = not_seen if hidden is None else hidden | not_seen
            if hidden.all():
                continue
        distance = None if part.slopes is None else _distances(part, where, cut)
        if steep is not None:
            hidden = _off_diagonal(steep, distance, hidden)
            if hidden.all():
                continue
        block = KeyBlock(
            cut.keys,
            cut.rows,
            part.k.block(where.batches, where.pairs, cut.keys, scratch, "k"),
            part.v.block(where.batches, where.pairs, cut.keys, scratch, "v"),
            hidden=hidden,
            hidden_rows=cut.hidden_rows,
            distance=distance,
        )
        if part.bias is not None:
            block.bias = widen(piece_of(part.bias, part.outer, where, cut.keys, shape), part.compute_dtype)
            closed = np.isneginf(block.bias)
            if closed.any():  # hidden, even if the score is nan
                block.hidden = closed if hidden is None else hidden | closed
        if problem.dropout_p > 0.0:
            ids = part.batch_ids[where.batches]
            block.keep = dropout_factors(problem.dropout_p, part.seed, ids, where, cut, shape, part.compute_dtype)
        yield block


def _steep(part: Part, where: TileIndex, shape: tuple[int, int]) -> Array | None:
    """Which slopes are infinite, if any is.  These hide all keys but the diagonal's, to which 0 * inf were nan."""
    if part.slopes is None:
        return None
    steep = np.isposinf(slopes_of(part.slopes, where, shape))
    return steep if steep.any() else None


def _off_diagonal(steep: Array, distance: Array | None, hidden: Array | None) -> Array:
    beside = np.asarray(steep & (distance != 0.0))
    return beside if hidden is None else hidden | beside


def _distances(part: Part, where: TileIndex, cut: Cut) -> Array:
    """Of a block's keys from its rows' diagonals, as ALiBi's slopes multiply them."""
    apart = part.problem.edits.distances
    if apart is None:
        return distances(part.diagonal(where.rows)[cut.rows], cut.keys, part.compute_dtype)
    rows = np.arange(where.rows.start, where.rows.stop)[cut.rows]
    return distances(apart.first + apart.step * rows, cut.keys, part.compute_dtype, apart.step)
