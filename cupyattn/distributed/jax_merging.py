"""States of attention merged in jax.numpy, which knows their gradients: no callback is needed."""

from __future__ import annotations

from cupyattn.problem import Array

State = tuple[Array, Array]
"""out, (batch, num_heads, rows, head_dim_v), in the dtype of lse, (batch, num_heads, rows)."""


def weights(lse: Array, highest: Array) -> Array:
    """exp(lse - highest), which is no nan where both are infinite."""
    import jax.numpy as jnp

    origin = jnp.where(jnp.isinf(highest), 0.0, highest)
    usual = jnp.exp(jnp.where(lse == jnp.inf, -jnp.inf, lse) - origin)
    return jnp.where(highest == jnp.inf, (lse == jnp.inf).astype(lse.dtype), usual)


def times(weight: Array, out: Array) -> Array:
    """A weight of 0 is nothing, whatever it is multiplied by."""
    import jax.numpy as jnp

    return jnp.where(weight[..., None] == 0, 0.0, weight[..., None] * jnp.where(weight[..., None] == 0, 0.0, out))


def log(total: Array, highest: Array) -> Array:
    import jax.numpy as jnp

    found = jnp.where(jnp.isinf(highest), 0.0, highest) + jnp.log(jnp.where(total == 0, 1.0, total))
    return jnp.where(highest == jnp.inf, highest, jnp.where(total == 0, -jnp.inf, found))


def merged(first: State, second: State) -> State:
    """`merge_states` of two, in jax.numpy: JAX knows its gradients, and no callback is needed."""
    import jax
    import jax.numpy as jnp

    (out_a, lse_a), (out_b, lse_b) = first, second
    highest = jax.lax.stop_gradient(jnp.maximum(lse_a, lse_b))
    a, b = weights(lse_a, highest), weights(lse_b, highest)
    total = a + b
    share = 1.0 / jnp.where(total == 0, 1.0, total)
    return times(a * share, out_a) + times(b * share, out_b), log(total, highest)
