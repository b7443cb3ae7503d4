"""Gradients of linear attention, of many tokens at once: what `chunks` does, backwards.

A query head reads what a chunk's state and tokens have left; with beta a key does so, too, before it writes, so that
in the gradients keys are one more head of rows.  What tokens write solves a triangular system, its gradient the
transposed one.  Decays have no quotients here either: that of a token is the sum over all pairs that it lies between.

Source: Yang et al., "Gated Linear Attention Transformers" (2023), section 4, "Parallelizing Linear Transformers with
the Delta Rule over Sequence Length" (2024), section 3, "Gated Delta Networks" (2024), section 3.
"""

from __future__ import annotations

import math

import numpy as np

from cupyattn.linear.chunks import by_chunks, kept, products, size_of_chunks
from cupyattn.linear.tokens import Derivatives, Tokens, back_by_tokens
from cupyattn.problem import Array


def gradients(
    tokens: Tokens, state: Array, dout: Array, dstate: Array, size: int | None = None
) -> tuple[Derivatives, Array]:
    """Gradients of the tokens and of the first state, from those of out and of the last state.

    States are kept after every so many chunks, and computed again between: about twice the square root of the number
    of chunks are there at a time.
    """
    size = size_of_chunks(tokens) if size is None else size
    every = size * max(1, math.isqrt(-(-tokens.seqlen // size)))
    found = Derivatives(*(None if array is None else np.empty(array.shape) for array in tokens))
    starts = range(0, tokens.seqlen, every)
    for start, first in _from_the_last(starts, _states(tokens, state, every, size)):
        stop = start + every
        part, rows, share = tokens.part(start, stop), dout[..., start:stop, :], found.part(start, stop)
        if size == 1:
            dstate = back_by_tokens(part, first, rows, dstate, share)
            continue
        inner = range(0, part.seqlen, size)
        for begin, before in _from_the_last(inner, _states(part, first, size, size)):
            end = begin + size
            of_chunk = part.part(begin, end), before, rows[..., begin:end, :], dstate, share.part(begin, end)
            after = _back(*of_chunk)
            dstate = back_by_tokens(*of_chunk) if after is None else after
    return found, dstate


def _states(tokens: Tokens, state: Array, every: int, size: int) -> list[Array]:
    """The states before each so many tokens."""
    before = [state]
    for start in range(0, tokens.seqlen - every, every):
        part = tokens.part(start, start + every)
        before.append(by_chunks(part, before[-1], np.empty(part.out_shape()), size))
    return before


def _from_the_last(starts: range, states: list[Array]) -> list[tuple[int, Array]]:
    return list(zip(starts, states, strict=False))[::-1]


def _back(tokens: Tokens, state: Array, dout: Array, dstate: Array, found: Derivatives) -> Array | None:
    """Fill `found`; the gradient of the state before a chunk.  None where infinities or nan are met."""
    since, between = kept(tokens)
    rows, k, beta = tokens.q, tokens.k, tokens.beta
    scores = products(rows, k, between)
    left = k if between is None else k * between[..., -1, :, :]
    dwritten = (_turned(scores) @ dout).sum(axis=-3) + left @ dstate
    written, reads = tokens.v, dout
    if beta is not None and found.beta is not None:
        among = np.tril(products(k[..., None, :, :], k, between)[..., 0, :, :], -1)
        system = np.eye(tokens.seqlen) + beta * among
        error = tokens.v - (k if since is None else k * since) @ state
        try:
            written, solved = np.linalg.solve(system, beta * error), np.linalg.solve(_turned(system), dwritten)
        except np.linalg.LinAlgError:
            return None
        found.beta[...] = (solved * (error - among @ written)).sum(axis=-1, keepdims=True)
        dwritten = beta * solved
        rows = np.concatenate([rows, k[..., None, :, :]], axis=-3)
        scores = np.concatenate([scores, among[..., None, :, :]], axis=-3)
        reads = np.concatenate([dout, -dwritten[..., None, :, :]], axis=-3)
    found.v[...] = dwritten
    dscores = np.tril(reads @ _turned(written)[..., None, :, :])
    if beta is not None:
        dscores[..., -1, :, :] = np.tril(dscores[..., -1, :, :], -1)
    drows, dk, pairs = _of_pairs(rows, k, between, scores, dscores)
    dleft, dseen = written @ _turned(dstate), reads @ _turned(state)[..., None, :, :]
    seen, before = rows, dstate
    if since is not None and between is not None:
        seen, before = rows * since[..., None, :, :], dstate * since[..., -1, :, None]
        dkept = (seen * dseen).sum(axis=-3)
        dkept[..., -1, :] += (before * state).sum(axis=-1)
        dseen, between_last = dseen * since[..., None, :, :], left * dleft
        _fill_decay(found, dkept, pairs, between_last)
        dleft = dleft * between[..., -1, :, :]
    drows, dk = drows + dseen, dk + dleft
    found.q[...] = drows if beta is None else drows[..., :-1, :, :]
    found.k[...] = dk if beta is None else dk + drows[..., -1, :, :]
    before = before + (_turned(seen) @ reads).sum(axis=-3)
    finite = (np.isfinite(array).all() for array in (*found, before) if array is not None)
    return before if all(finite) else None


def _of_pairs(
    rows: Array, k: Array, between: Array | None, scores: Array, dscores: Array
) -> tuple[Array, Array, Array | None]:
    """Gradients of rows and of keys by their scores; and of the decays between row i and key j, (..., i, j, features)
    or 1 for these."""
    if between is not None and between.shape[-1] != 1:
        by_row = dscores.swapaxes(-2, -3)  # (..., i, heads, j)
        drows = (by_row @ (k[..., None, :, :] * between)).swapaxes(-2, -3)
        dkeys = (_turned(by_row) @ rows.swapaxes(-2, -3)) * between
        return drows, dkeys.sum(axis=-3), dkeys * k[..., None, :, :]
    weighted = dscores if between is None else dscores * between[..., None, :, :, 0]
    pairs = None if between is None else (dscores * scores).sum(axis=-3)[..., None]
    return weighted @ k[..., None, :, :], (_turned(weighted) @ rows).sum(axis=-3), pairs


def _fill_decay(found: Derivatives, dkept: Array, pairs: Array | None, of_last: Array) -> None:
    """That of each token: of all that the state before the chunk is read by, from this token on, and of all pairs
    that it lies between."""
    assert found.keep is not None
    assert pairs is not None
    if found.keep.shape[-1] == 1:
        dkept, of_last = (x.sum(axis=-1, keepdims=True) for x in (dkept, of_last))
    pairs[..., -1, :, :] += of_last
    found.keep[...] = np.flip(np.cumsum(np.flip(dkept, -2), axis=-2), -2)
    from_here_on = np.zeros(pairs.shape[:-3] + pairs.shape[-2:])
    for t in reversed(range(pairs.shape[-3])):
        from_here_on[..., :t, :] += pairs[..., t, :t, :]
        found.keep[..., t, :] += from_here_on[..., :t, :].sum(axis=-2)


def _turned(array: Array) -> Array:
    return array.swapaxes(-1, -2)
