"""Attention of a tile the way it is computed, in memory that does not grow with seqlen_q * seqlen_k.

`OnlineSoftmax` and `flash`, forward, and `flash_backward`; the CUDA classes of the same names are twins of these, and
what they mean is `numpy_ref.attention`.

Words: *scores* are before the exponential, *weights* after it.  A score of minus infinity is a key
that is not seen.  A row that sees no key has out = 0, lse = -inf and gradients of zero.
Arrays here are (..., rows, head_dim) and (..., keys, head_dim); leading axes broadcast.

Source: Dao, FlashAttention-2, 2023, algorithms 1 and 2 (arXiv 2307.08691); Milakov and Gimelshein,
Online normalizer calculation for softmax, 2018 (arXiv 1805.02867).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import numpy as np

from cupyattn.cpu.hiding import exponentials, hide
from cupyattn.cpu.scratch import Scratch
from cupyattn.cpu.strays import join_sinks, taken_apart, weighted_sum
from cupyattn.numpy_ref import Array, State


@lru_cache(maxsize=64)
def _ones(count: int, dtype: Any) -> Array:
    """A column of ones: a matrix product with it is the fastest sum of rows there is."""
    return np.ones((count, 1), dtype)


class OnlineSoftmax:
    """The running (row_max, row_sum) of some rows while their keys arrive block by block.

    Twin of ``OnlineSoftmax`` in ``cuda/algorithm/softmax.cuh``: same fields, same order of steps, in powers of e
    where the kernel uses powers of two.

    `bounded` promises for some rows that none of their scores can overflow or underflow the exponential:
    their maximum is not needed, row_max stays 0, and nothing ever has to be rescaled.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: Any, sinks: Array | None = None, bounded: Array | None = None
    ) -> None:
        self.bounded = bounded
        self.all_bounded = bounded is not None and bool(bounded.all())
        self.fresh = sinks is None  # nothing to shrink before the first block
        self.row_max = np.full(shape, -np.inf, dtype)
        if bounded is not None:
            self.row_max[bounded] = 0.0
        self.row_sum = np.zeros(shape, dtype)
        if sinks is not None:  # a sink is a key seen before all others, whose value is zero
            self.row_max[...] = sinks
            self.row_sum[...] = 1.0

    def fold(
        self, scores: Array, rows: slice = slice(None), exponentiate: Callable[[Array], None] | None = None
    ) -> Array | None:
        """Turn the scores of `rows` into weights in place; return the factor by which earlier results shrink."""
        row_max, row_sum = self.row_max[..., rows], self.row_sum[..., rows]
        shrink = None
        if not self.all_bounded:
            new_max = np.maximum.reduce(scores, axis=-1)
            fresh = self.fresh and scores.shape[:-1] == self.row_max.shape
            if not fresh:
                new_max = np.maximum(row_max, new_max)
            if self.bounded is not None:
                new_max[self.bounded[..., rows]] = 0.0
            # A row that has seen no key yet: -inf - -inf would be nan, 0 keeps its weights 0.
            origin = np.where(new_max == -np.inf, new_max.dtype.type(0.0), new_max)
            if not fresh:
                shrink = np.exp(row_max - origin)
                row_sum *= shrink
            self.fresh = False
            np.subtract(scores, origin[..., None], out=scores)
            row_max[...] = new_max
        np.exp(scores, out=scores) if exponentiate is None else exponentiate(scores)
        row_sum += (scores @ _ones(scores.shape[-1], scores.dtype))[..., 0]
        return shrink

    def finish(self, out: Array) -> State:
        """Normalise `out` in place and return the state."""
        total = np.where(self.row_sum == 0.0, self.row_sum.dtype.type(1.0), self.row_sum)
        out /= total[..., None]
        # Where nothing was summed: log(0) + origin, and origin is 0 or -inf.
        return State(out, np.log(self.row_sum) + self.row_max)


@dataclass
class KeyBlock:
    """Some keys and what a tile's rows have to know about them.

    `bias`, `hidden`, `keep` and `distance` broadcast to (..., heads, rows, keys), see `Tile`.
    """

    keys: slice
    rows: slice
    """The rows of the tile that see any of these keys; all of them if heads are stacked."""
    k: Array
    v: Array
    bias: Array | None = None
    hidden: Array | None = None
    hidden_rows: slice = field(default_factory=partial(slice, None))
    """The rows, of those above, that `hidden` is about; the others see all these keys."""
    keep: Array | None = None
    """(1 - dropout_p) ** -1 where a weight stays, 0 where it is dropped."""
    distance: Array | None = None
    """-|diagonal - key|, which the ALiBi slopes multiply."""


FEW_ROWS, MANY_KEYS = 32, 128
"""Rows up to which, and keys from which, products are shaped for a decode."""
LIKED = 4
"""Of a few rows the BLAS likes multiples of this: seven take it half as long again as eight."""
SMALL_PRODUCT = 10**6
"""Multiplications of a float64 product up to which OpenBLAS (for AVX-512) leaves its operands where they are.
Beyond, it copies them into panels first, which for a few rows costs as much as the product does."""


def small_steps(rows: int, keys: int, dim: int) -> Iterator[slice]:
    """Cut the keys so that products with a few rows are small."""
    step = max(64, SMALL_PRODUCT // max(1, rows * dim) // 64 * 64)
    return (slice(start, min(keys, start + step)) for start in range(0, max(1, keys), step))


@dataclass
class Tile:
    """Some rows of some neighbouring query heads that share their keys, and the way to those keys.

    The heads of a group are stacked as rows, so that a block of keys is read once for all of them.
    """

    q: Array
    """(..., heads * rows, head_dim), in the compute dtype, already multiplied by the softmax scale."""
    heads: int
    blocks: Callable[[], Iterator[KeyBlock]]
    softcap: float = 0.0
    slopes: Array | None = None
    """(..., heads, 1, 1)."""
    sinks: Array | None = None
    """(..., heads * rows)."""
    bounded: Array | None = None
    """The rows that cannot have large scores, see `OnlineSoftmax`."""
    suspicious: bool = False
    """Some operand may hold nan or inf, so that 0 * operand is not 0."""
    scratch: Scratch = field(default_factory=Scratch)
    padded: Array | None = None
    """The scores of the last block with rows that nobody asked for, where there were too few for the BLAS."""

    def per_head(self, scores: Array) -> Array:
        """View (..., heads * rows, keys) as (..., heads, rows, keys)."""
        heads = self.heads
        return scores.reshape(*scores.shape[:-2], heads, scores.shape[-2] // heads, scores.shape[-1])

    def matmul(self, name: str, a: Array, b: Array) -> Array:
        """``a @ b`` into memory that is kept from block to block."""
        return np.matmul(a, b, out=self.scratch.array(name, (*a.shape[:-1], b.shape[-1]), a.dtype))

    def times_keys(self, q: Array, k: Array) -> Array:
        """``q @ k.T``; a few rows get some of zeros beside them, see `padded`."""
        rows, keys = q.shape[-2], k.shape[-2]
        self.padded = None
        if not 1 < rows <= FEW_ROWS or rows % LIKED == 0 or keys < MANY_KEYS:
            return self.matmul("scores", q, k.swapaxes(-1, -2))
        with_zeros = self.scratch.array("with zeros", (*q.shape[:-2], rows + -rows % LIKED, q.shape[-1]), q.dtype)
        np.copyto(with_zeros[..., :rows, :], q)
        with_zeros[..., rows:, :] = 0.0
        self.padded = self.matmul("scores", with_zeros, k.swapaxes(-1, -2))
        return self.padded[..., :rows, :]

    def times_values(self, weights: Array, v: Array, out: Array | None = None) -> Array:
        """``weights @ v``, of weights that `times_keys` gave the memory of; into `out` or memory that is kept."""
        whole = weights if self.padded is None else self.padded
        if whole is weights and out is not None:
            self._multiply(whole, v, out)
            return out
        product = self.scratch.array("product", (*whole.shape[:-1], v.shape[-1]), whole.dtype)
        self._multiply(whole, v, product)
        product = product[..., : weights.shape[-2], :]
        if out is None:
            return product
        np.copyto(out, product)
        return out

    def _multiply(self, weights: Array, v: Array, out: Array) -> None:
        """``weights @ v``, for a few rows of float64 some keys at a time."""
        rows, keys = weights.shape[-2], v.shape[-2]
        if rows > FEW_ROWS or keys < MANY_KEYS or weights.dtype != np.float64:
            np.matmul(weights, v, out=out)
            return
        first, *others = small_steps(rows, keys, v.shape[-1])
        np.matmul(weights[..., first], v[..., first, :], out=out)
        for step in others:
            out += self.matmul("addend", weights[..., step], v[..., step, :])

    def scores(self, block: KeyBlock, slope_of_softcap: Array | None = None) -> Array:
        """The edited scores of one block; minus infinity where a key is hidden.

        `slope_of_softcap`, if given, receives the derivative of the softcap at each score.
        """
        scores = self.times_keys(self.q[..., block.rows, :], block.k)
        if self.softcap:
            scores /= self.softcap
            np.tanh(scores, out=scores)
            if slope_of_softcap is not None:
                np.subtract(1.0, scores**2, out=slope_of_softcap)
            scores *= self.softcap
        by_head = self.per_head(scores)
        if self.slopes is not None and block.distance is not None:
            by_head += self.slopes * block.distance
        if block.bias is not None:
            by_head += block.bias
        if block.hidden is not None:
            hide(by_head[..., block.hidden_rows, :], block.hidden, self.scratch)
        return scores

    def exponentiate(self, block: KeyBlock, scores: Array) -> None:
        exponentials(self.per_head(scores), block.hidden if block.hidden_rows == slice(None) else None, self.scratch)


def flash(tile: Tile, head_dim_v: int) -> State:
    """Attention of one tile, block of keys by block of keys, keeping only sums.

    The state's `out` is scratch memory of the tile: use it before the next tile does.
    """
    rows = tile.q.shape[:-1]
    joining, apart = tile.sinks, None
    if tile.sinks is not None and not np.isfinite(tile.sinks).all():
        joining, apart = taken_apart(tile.sinks)
    softmax = OnlineSoftmax(rows, tile.q.dtype, joining, tile.bounded)
    out = tile.scratch.array("out", (*rows, head_dim_v), tile.q.dtype)
    started = False
    for block in tile.blocks():
        scores = tile.scores(block)
        unseen = np.isneginf(scores) if tile.suspicious else None
        exponentiate = None if block.hidden is None else partial(tile.exponentiate, block)
        shrink = softmax.fold(scores, block.rows, exponentiate)
        if block.keep is not None:
            tile.per_head(scores)[...] *= block.keep
        if not started and unseen is None and scores.shape[:-1] == rows:
            tile.times_values(scores, block.v, out)
            started = True
            continue
        if not started:
            out.fill(0.0)
            started = True
        part = out[..., block.rows, :]
        if shrink is not None:
            part *= shrink[..., None]
        if unseen is None:
            part += tile.times_values(scores, block.v)
        else:
            part += weighted_sum(scores, block.v, unseen, tile.times_values)
    if not started:
        out.fill(0.0)
    state = softmax.finish(out)
    if apart is not None:
        join_sinks(state, apart)
    return state


@dataclass
class TileGradients:
    """What a tile adds to the gradients; those of keys, values and bias are handed over block by block."""

    dq: Array
    """Scratch memory of the tile: use it before the next tile does."""
    dsinks: Array | None
    dslopes: Array | None


@dataclass
class BlockGradients:
    """What one block adds to the gradients; `dq` and `dslopes` are shares of the tile's."""

    dq: Array
    dk: Array
    dv: Array
    """These three are scratch memory of the tile: use them before the next block does."""
    dbias: Array | None
    dslopes: Array | None

    def are_finite(self) -> bool:
        """Whatever was nan or inf on the way would be in these sums, each of which it enters."""
        shares = (self.dq, self.dk, self.dv, self.dbias, self.dslopes)
        return math.isfinite(sum(float(np.add.reduce(share, axis=None)) for share in shares if share is not None))


FAR = {"float32": 2.0**15, "float64": 2.0**27}
"""A row's log-sum-exp beyond this lost what its softmax is: next to scores that are all -3.4e38 the logarithm of how
many they are is nothing.  Highest score and sum are then found again, as the forward pass had them."""


def flash_backward(
    tile: Tile,
    state: State,
    dout: Array,
    dlse: Array | None,
    scale: float,
    add: Callable[[KeyBlock, BlockGradients], None],
) -> TileGradients:
    """Gradients of one tile; ``add(block, gradients)`` receives each block's share.

    With P the weights, ``delta = sum(dout * out) - dlse`` and ``dS = P * (dout @ v.T - delta)``:
    FlashAttention-2, algorithm 2, with the gradient of the log-sum-exp folded into delta.
    """
    delta = np.einsum("...d,...d->...", dout, state.out)
    if dlse is not None:
        delta -= dlse
    empty = np.isneginf(state.lse)
    origin = np.where(empty, state.lse.dtype.type(0.0), state.lse)
    delta[empty] = 0.0
    share = None
    far = np.isfinite(origin) & (np.abs(origin) > FAR[tile.q.dtype.name])
    if far.any():
        origin, share = _taken_again(tile, far, origin)
    dq = tile.scratch.array("dq", tile.q.shape, tile.q.dtype)
    dq.fill(0.0)
    dslopes = None if tile.slopes is None else np.zeros(tile.per_head(dq).shape[:-2], tile.q.dtype)
    for block in tile.blocks():
        found = block_gradients(tile, block, dout, origin, delta, share)
        if not found.are_finite():  # maybe 0 * nan of what nobody may look at: once more, with care
            found = block_gradients(tile, block, dout, origin, delta, share, with_care=True)
        dq[..., block.rows, :] += found.dq
        if dslopes is not None and found.dslopes is not None:
            dslopes += found.dslopes
        add(block, found)
    dq *= scale
    dsinks = None
    if tile.sinks is not None:
        certain = np.isposinf(tile.sinks) & np.isposinf(state.lse)
        weight_of_sink = np.where(certain, 1.0, np.exp(tile.sinks - origin))
        if share is not None:
            weight_of_sink *= share
        dsinks = np.where(empty, 0.0, -weight_of_sink * delta)
    return TileGradients(dq, dsinks, dslopes)


def _taken_again(tile: Tile, far: Array, origin: Array) -> tuple[Array, Array]:
    """(origin, share): of these rows the highest score and one over the sum of weights; of others origin and 1."""
    softmax = OnlineSoftmax(origin.shape, origin.dtype, tile.sinks)
    for block in tile.blocks():
        softmax.fold(tile.scores(block), block.rows)
    return np.where(far, softmax.row_max, origin), np.where(far, 1.0 / softmax.row_sum, origin.dtype.type(1.0))


def block_gradients(
    tile: Tile,
    block: KeyBlock,
    dout: Array,
    origin: Array,
    delta: Array,
    share: Array | None = None,
    with_care: bool = False,
) -> BlockGradients:
    """One block's share of the gradients; weights are the exponentials of scores less `origin`, times `share`.

    A pair that is not seen has a weight of 0, and what it adds is 0 times something.  Only `with_care` that is 0
    whatever is multiplied, and whatever the row's log-sum-exp is.
    """
    rows, scratch = block.rows, tile.scratch
    q, dout, k, v = tile.q[..., rows, :], dout[..., rows, :], block.k, block.v
    shape, dtype = (*q.shape[:-1], k.shape[-2]), q.dtype
    slope = scratch.array("slope", shape, dtype) if tile.softcap else None
    scores = tile.scores(block, slope)
    unseen = np.isneginf(scores) if with_care else None
    weights = np.subtract(scores, origin[..., rows, None], out=scores)
    tile.exponentiate(block, weights)
    if share is not None:
        weights *= share[..., rows, None]
    if unseen is not None:
        weights[unseen] = 0.0
    kept = weights
    dscores = tile.matmul("dscores", dout, v.swapaxes(-1, -2))  # of the weights, yet
    if block.keep is not None:
        kept = scratch.array("kept", shape, dtype)
        np.multiply(tile.per_head(weights), block.keep, out=tile.per_head(kept))
        tile.per_head(dscores)[...] *= block.keep
    dscores -= delta[..., rows, None]
    dscores *= weights
    if unseen is not None:
        dscores[unseen] = 0.0
    dbias = None if block.bias is None else tile.per_head(dscores).copy()
    dslopes = None
    if tile.slopes is not None and block.distance is not None:
        dslopes = (tile.per_head(dscores) * block.distance).sum(axis=(-2, -1))
    if slope is not None:
        dscores *= slope if unseen is None else np.where(unseen, 0.0, slope)
    if unseen is None:
        dv = tile.matmul("dv", kept.swapaxes(-1, -2), dout)
        dk = tile.matmul("dk", dscores.swapaxes(-1, -2), q)
        return BlockGradients(tile.matmul("dq of block", dscores, k), dk, dv, dbias, dslopes)
    flipped = unseen.swapaxes(-1, -2)
    dv = weighted_sum(kept.swapaxes(-1, -2), dout, flipped)
    dk = weighted_sum(dscores.swapaxes(-1, -2), q, flipped)
    return BlockGradients(weighted_sum(dscores, k, unseen), dk, dv, dbias, dslopes)
