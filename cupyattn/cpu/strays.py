"""What is nan or inf, kept apart from sums: values that not all rows may look at, and sinks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cupyattn.numpy_ref import Array, State

Product = Callable[[Array, Array], Array]


def weighted_sum(weights: Array, values: Array, unseen: Array | None, product: Product = np.matmul) -> Array:
    """``weights @ values`` over the pairs that are seen; `unseen` is None if every value is finite.

    Where a key is not seen its weight is 0, but 0 * nan is nan: values nobody may look at are left
    out instead of multiplied.  `product` is what makes the product where all is finite, and does so here: no bit
    depends on what nobody may look at.
    """
    if unseen is None:
        return np.asarray(weights @ values)
    finite = np.isfinite(values)
    total = product(weights, _without_strays(values, finite))
    bad_keys = ~finite.all(axis=-1)
    for key in np.flatnonzero(bad_keys.reshape(-1, bad_keys.shape[-1]).any(axis=0)):
        stray = np.where(finite[..., key, :], 0.0, values[..., key, :])
        term = weights[..., key, None] * stray[..., None, :]
        skip = unseen[..., key, None] | finite[..., None, key, :]
        total = total + np.where(skip, 0.0, term)
    return np.asarray(total)


def _without_strays(values: Array, finite: Array) -> Array:
    """With 0 in their place, and a gap between rows where there is one: the BLAS sums few columns by that, too."""
    dim = values.shape[-1]
    has_gaps = values.strides[-2] != dim * values.itemsize
    room = np.zeros((*values.shape[:-1], dim + has_gaps), values.dtype)[..., :dim]
    np.copyto(room, values, where=finite)
    return room


def taken_apart(sinks: Array) -> tuple[Array, Array]:
    """(sinks that can be summed, the others): +inf, which has all the weight, and nan would leave nan in the sums."""
    special, nothing = ~(sinks < np.inf), sinks.dtype.type(-np.inf)
    return np.where(special, nothing, sinks), np.where(special, sinks, nothing)


def join_sinks(state: State, sinks: Array) -> None:
    """Add sinks of +inf and of nan to a state without them; what is nan stays nan."""
    special, sees_any = ~np.isneginf(sinks), ~np.isneginf(state.lse)
    share = np.where(np.isnan(sinks), sinks, sinks.dtype.type(0.0))
    with_sink = np.where(sees_any[..., None], state.out * share[..., None] + 0.0, 0.0)
    np.copyto(state.out, with_sink, where=special[..., None])
    np.copyto(state.lse, np.where(np.isnan(state.lse), state.lse, sinks), where=special)
