"""Linear attention of many tokens at once: matrix products within a chunk, and one step of the state.

What token ``j`` has left in the state when token ``i`` comes is its key times the product of what is kept in between,
so that within a chunk there are only products of at most so many factors, and no quotients of decays.
"""

from __future__ import annotations

import numpy as np

from cupyattn.linear.tokens import Tokens, by_tokens
from cupyattn.problem import Array

CHUNK, CHUNK_OF_FEATURES = 64, 16
"""Tokens of a chunk; fewer where features of a key decay each by itself: their products are an array of three axes."""


def size_of_chunks(tokens: Tokens) -> int:
    """Where nobody asks for another."""
    return CHUNK if tokens.keep is None or tokens.keep.shape[-1] == 1 else CHUNK_OF_FEATURES


def by_chunks(tokens: Tokens, state: Array, out: Array, size: int | None = None) -> Array:
    """As `by_tokens`, up to the rounding of sums in another order."""
    size = size_of_chunks(tokens) if size is None else size
    if size == 1:
        return by_tokens(tokens, state, out)
    for start in range(0, tokens.seqlen, size):
        part, share = tokens.part(start, start + size), out[..., start : start + size, :]
        after = _chunk(part, state, share)
        state = by_tokens(part, state, share) if after is None else after
    return state


def _chunk(tokens: Tokens, state: Array, out: Array) -> Array | None:
    """The state after a chunk; None where infinities or nan are met, which matrix products would spread to all."""
    since, between = kept(tokens)
    q, k = tokens.q, tokens.k
    seen = k if since is None else k * since
    seen_by_q = q if since is None else q * since[..., None, :, :]
    written = tokens.v
    if tokens.beta is not None:
        among = np.tril(products(k[..., None, :, :], k, between)[..., 0, :, :], -1)
        try:
            written = np.linalg.solve(
                np.eye(tokens.seqlen) + tokens.beta * among, tokens.beta * (tokens.v - seen @ state)
            )
        except np.linalg.LinAlgError:
            return None
    out[...] = seen_by_q @ state[..., None, :, :] + products(q, k, between) @ written[..., None, :, :]
    left = k if between is None else k * between[..., -1, :, :]
    after = left.swapaxes(-1, -2) @ written
    after += state if since is None else state * since[..., -1, :, None]
    return after if np.isfinite(out).all() and np.isfinite(after).all() else None


def kept(tokens: Tokens) -> tuple[Array | None, Array | None]:
    """What each token sees of the state before the chunk, (..., i, features), and of token j, (..., i, j, features)."""
    keep = tokens.keep
    if keep is None:
        return None, None
    count = tokens.seqlen
    between = np.zeros((*keep.shape[:-2], count, *keep.shape[-2:]))
    for i in range(count):
        between[..., i, i, :] = 1.0
        if i:
            between[..., i, :i, :] = between[..., i - 1, :i, :] * keep[..., i, None, :]
    return np.multiply.accumulate(keep, axis=-2), between


def products(rows: Array, k: Array, between: Array | None) -> Array:
    """Of rows (..., group, i, head_dim) with keys as they are left: (..., group, i, j), 0 where j comes after i."""
    if between is None or between.shape[-1] == 1:
        dense = rows @ k[..., None, :, :].swapaxes(-1, -2)
        return np.asarray(np.tril(dense) if between is None else dense * between[..., None, :, :, 0])
    left = k[..., None, :, :] * between
    return np.asarray((rows.swapaxes(-2, -3) @ left.swapaxes(-1, -2)).swapaxes(-2, -3))
