"""The meaning of linear attention: a token decays the state, corrects and writes it, and reads it; and its gradients.

All in float64.  Axes before those that are named are batch and key heads.
"""

from __future__ import annotations

from typing import NamedTuple

from cupyattn.problem import Array


class Tokens(NamedTuple):
    """What tokens bring."""

    q: Array
    """(..., group, tokens, head_dim), times the scale: the query heads that read the state of one key head."""
    k: Array
    """(..., tokens, head_dim)"""
    v: Array
    """(..., tokens, head_dim_v)"""
    keep: Array | None
    """(..., tokens, head_dim or 1): what of the state is left, exp(decay)."""
    beta: Array | None
    """(..., tokens, 1): how much of the error is corrected."""

    @property
    def seqlen(self) -> int:
        return int(self.k.shape[-2])

    def part(self, start: int, stop: int) -> Tokens:
        return Tokens(*(None if array is None else array[..., start:stop, :] for array in self))

    def out_shape(self) -> tuple[int, ...]:
        return (*self.q.shape[:-1], self.v.shape[-1])


def by_tokens(tokens: Tokens, state: Array, out: Array) -> Array:
    """One after the other: what everything else has to agree with."""
    for t in range(tokens.seqlen):
        state = _kept(tokens, t, state)
        state = state + tokens.k[..., t, :, None] * _written(tokens, t, state)[..., None, :]
        out[..., t, :] = tokens.q[..., t, :] @ state
    return state


def _kept(tokens: Tokens, t: int, state: Array) -> Array:
    return state if tokens.keep is None else state * tokens.keep[..., t, :, None]


def _written(tokens: Tokens, t: int, kept: Array) -> Array:
    """What a token writes under its key: its value, or what the state lacks of it, times beta."""
    if tokens.beta is None:
        return tokens.v[..., t, :]
    return tokens.beta[..., t, :] * _error(tokens, t, kept)


def _error(tokens: Tokens, t: int, kept: Array) -> Array:
    return tokens.v[..., t, :] - (tokens.k[..., t, None, :] @ kept)[..., 0, :]


class Derivatives(NamedTuple):
    """Gradients of what tokens bring, in its shapes; `keep` is that of the decay, not of its exponential."""

    q: Array
    k: Array
    v: Array
    keep: Array | None
    beta: Array | None

    def part(self, start: int, stop: int) -> Derivatives:
        return Derivatives(*(None if array is None else array[..., start:stop, :] for array in self))


def back_by_tokens(tokens: Tokens, first: Array, dout: Array, dstate: Array, found: Derivatives) -> Array:
    """Fill `found` from the last token to the first; the gradient of the state `first`."""
    states = [first]
    for t in range(tokens.seqlen):
        kept = _kept(tokens, t, states[-1])
        states.append(kept + tokens.k[..., t, :, None] * _written(tokens, t, kept)[..., None, :])
    for t in reversed(range(tokens.seqlen)):
        q, k, d = tokens.q[..., t, :], tokens.k[..., t, :], dout[..., t, :]
        kept = _kept(tokens, t, states[t])
        found.q[..., t, :] = d @ states[t + 1].swapaxes(-1, -2)
        dstate = dstate + q.swapaxes(-1, -2) @ d
        dwritten = (k[..., None, :] @ dstate)[..., 0, :]
        found.k[..., t, :] = (dstate @ _written(tokens, t, kept)[..., None])[..., 0]
        if tokens.beta is not None and found.beta is not None:
            found.beta[..., t, :] = (dwritten * _error(tokens, t, kept)).sum(axis=-1, keepdims=True)
            dwritten = tokens.beta[..., t, :] * dwritten
            found.k[..., t, :] -= (kept @ dwritten[..., None])[..., 0]
            dstate = dstate - k[..., :, None] * dwritten[..., None, :]
        found.v[..., t, :] = dwritten
        if tokens.keep is not None and found.keep is not None:
            dkept = (dstate * kept).sum(axis=-1)
            found.keep[..., t, :] = dkept if found.keep.shape[-1] > 1 else dkept.sum(axis=-1, keepdims=True)
            dstate = dstate * tokens.keep[..., t, :, None]
    return dstate
