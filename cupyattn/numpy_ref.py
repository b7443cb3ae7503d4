"""The meaning of attention, in NumPy: dense and literal.

The definition, `attention`, with which everything in the package is compared; what states over parts of the keys
are together, `merge`; and the random bits of dropout.  How a CPU computes it is another story: `cupyattn.cpu.flash`.

Words: *scores* are before the exponential, *weights* after it.  A score of minus infinity is a key
that is not seen.  A row that sees no key has out = 0, lse = -inf and gradients of zero.
Arrays here are (..., rows, head_dim) and (..., keys, head_dim); leading axes broadcast.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


# ---------------------------------------------------------------------------------------------------
# The definition
# ---------------------------------------------------------------------------------------------------


@dataclass
class State:
    """A partial or whole result: the normalised output and the log-sum-exp of its scores.

    States form a monoid under `merge`; its identity is out = 0, lse = -inf.
    """

    out: Array
    lse: Array


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    visible: Array | bool = True,
    scale: float,
    softcap: float = 0.0,
    bias: Array | float = 0.0,
    sinks: Array | None = None,
    keep: Array | bool = True,
    dropout_p: float = 0.0,
) -> State:
    """The definition: dense, in float64, one sum per row over the keys that row sees.

    A sink of +inf has all the weight: out = 0 and lse = +inf, of rows that see no key too.

    Parameters
    ----------
    q, k, v : arrays (..., rows, head_dim), (..., keys, head_dim), (..., keys, head_dim_v)
    visible, bias, keep : arrays that broadcast to (..., rows, keys)
    sinks : array that broadcasts to (..., rows)
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    with np.errstate(all="ignore"):
        scores = scale * (q @ k.swapaxes(-1, -2))
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        scores = np.where(visible, scores + bias, -np.inf)
        sink = np.full(scores.shape[:-1], -np.inf) if sinks is None else np.broadcast_to(sinks, scores.shape[:-1])
        highest = np.maximum(scores.max(axis=-1, initial=-np.inf), sink)
        origin = np.where(np.isneginf(highest), 0.0, highest)
        weights = np.exp(scores - origin[..., None])
        total = weights.sum(axis=-1) + np.where(np.isposinf(sink), 1.0, np.exp(sink - origin))
        kept = weights * keep * (0.0 if dropout_p == 1.0 else 1.0 / (1.0 - dropout_p))
        out = np.zeros((*scores.shape[:-1], v.shape[-1]))
        v = np.broadcast_to(v, (*scores.shape[:-2], *v.shape[-2:]))
        for row in np.ndindex(scores.shape[:-1]):
            seen = ~np.isneginf(scores[row])
            if seen.any():
                out[row] = kept[row][seen] @ v[row[:-1]][seen] / total[row]
        return State(out, np.where(total == 0.0, -np.inf, origin + np.log(total)))


# ---------------------------------------------------------------------------------------------------
# Parts of the keys
# ---------------------------------------------------------------------------------------------------


def merge(states: Iterable[State]) -> State:
    """The state of all keys together, from states over disjoint sets of keys.

    Associative; a state with lse = -inf adds nothing, whatever its out holds; never NaN by itself.
    """
    outs, lses = zip(*((state.out, state.lse) for state in states), strict=True)
    lse = np.stack(lses)
    with np.errstate(all="ignore"):
        highest = lse.max(axis=0)
        weights = np.exp(lse - np.where(np.isinf(highest), 0.0, highest))
        # An infinite lse outweighs every finite one; inf - inf would be nan.
        weights = np.where(np.isposinf(highest), np.isposinf(lse), weights).astype(lse.dtype, copy=False)
        total = weights.sum(axis=0)
        share = weights / np.where(total == 0.0, 1.0, total)
        out = np.zeros(outs[0].shape, outs[0].dtype)
        for part, part_share in zip(outs, share, strict=True):
            out += np.where(part_share[..., None] == 0.0, 0.0, part_share[..., None] * part)
        return State(out, np.where(np.isinf(highest), highest, highest + np.log(total)))


def merge_backward(states: list[State], dout: Array, dlse: Array) -> list[tuple[Array, Array]]:
    """(dout, dlse) of each state, from those of their merge."""
    whole = merge(states)
    found = []
    with np.errstate(all="ignore"):
        for state in states:
            nothing = np.isneginf(state.lse)
            origin = np.where(np.isinf(whole.lse), 0.0, whole.lse)
            share = np.where(nothing, 0.0, np.exp(state.lse - origin))
            apart = np.where(nothing[..., None], 0.0, state.out - whole.out)
            found.append((share[..., None] * dout, share * ((dout * apart).sum(axis=-1) + dlse)))
    return found


# ---------------------------------------------------------------------------------------------------
# Dropout
# ---------------------------------------------------------------------------------------------------


def philox(counter: tuple[Array, Array, Array, Array], seed: int) -> tuple[Array, Array, Array, Array]:
    """Philox 4x32-10: four random 32-bit words for each 128-bit counter, as uint64 arrays.

    Source: Salmon, Moraes, Dror and Shaw, Parallel random numbers: as easy as 1, 2, 3, SC 2011.
    """
    c0, c1, c2, c3 = (np.asarray(word, np.uint64) for word in counter)
    low = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    key0, key1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        product0, product1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (product1 >> half) ^ c1 ^ np.uint64(key0),
            product1 & low,
            (product0 >> half) ^ c3 ^ np.uint64(key1),
            product0 & low,
        )
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def dropout_keep(p: float, seed: int, batch: Array, head: Array, row: Array, keys: range) -> Array:
    """True where the weight of (batch, head, row, key) stays; shape: the broadcast one plus a key axis.

    Sixteen keys of a row share four counters, (key block * 4 + lane, row, head, batch), and a counter's
    four words belong to keys 2 * lane, 2 * lane + 1 and the same plus 8: the four keys one thread
    holds in a 16-wide tensor-core tile, so that a kernel calls Philox once for them.
    A weight stays if its word is at least p * 2 ** 32.
    """
    first = keys.start // 16
    count = -(-keys.stop // 16) - first
    lanes = np.arange(first * 4, (first + count) * 4, dtype=np.uint64)
    counter = np.broadcast_arrays(lanes, *(np.asarray(x, np.uint64)[..., None] for x in (row, head, batch)))
    words = np.stack(philox((counter[0], counter[1], counter[2], counter[3]), seed), axis=-1)
    lead = words.shape[:-2]
    # (block, lane, half, parity) -> key order (block, half, lane, parity)
    by_key = words.reshape(*lead, count, 4, 2, 2).swapaxes(-3, -2).reshape(*lead, count * 16)
    threshold = np.uint64(round(p * 2**32))
    return np.asarray(by_key[..., keys.start - first * 16 : keys.stop - first * 16] >= threshold)
