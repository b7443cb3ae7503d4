"""Ranks that are the devices of a mesh of JAX, inside `jax.shard_map`, by JAX's own collectives.

One program is traced for all ranks: what a rank sees of others' keys is a branch of a switch by its number.  Gradients
are JAX's own, of `attention`'s and of the merging of states, which is written in jax.numpy here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

from cupyattn import api
from cupyattn.distributed.asked import layout_of, sharding_meant
from cupyattn.distributed.rectangles import Band, Rectangle, rectangles_of, shifts_of
from cupyattn.distributed.route import route_of
from cupyattn.distributed.sharding import Sharding
from cupyattn.problem import Array
from cupyattn.reading import attention_options, refusal

attention: Any = api.attention
"""Of keywords that are data here, which its overloads cannot know."""
State = tuple[Array, Array]
"""out, (batch, num_heads, rows, head_dim_v), in the dtype of lse, (batch, num_heads, rows)."""


class JaxComm:
    """`Comm` inside of `jax.shard_map`: ranks are the devices along an axis of its mesh.

    Parameters
    ----------
    axis_name : str
        Of the mesh.

    Notes
    -----
    There is nobody to wait for and nobody to disagree: it is one program, and what is wrong is wrong where it is
    traced.  All ranks have as many tokens.  Gradients are `jax.grad`'s.  Each rectangle of rows and keys is rounded to
    the dtype of `q`, and states are merged in that of lse.  Keys travel whole, as long as anybody further along sees
    any.
    """

    def __init__(self, axis_name: str) -> None:
        if not isinstance(axis_name, str):
            rule = "axis_name has to be a string"
            raise TypeError(refusal("JaxComm", rule, ("axis_name", repr(axis_name), type(axis_name).__name__)))
        self.axis_name = axis_name

    def __repr__(self) -> str:
        return f"JaxComm({self.axis_name!r})"


def ring(
    function: str, comm: JaxComm, sharding: Any, arrays: Mapping[str, Any], return_lse: bool, **scalars: Any
) -> Any:
    """`ring_attention` inside of shard_map."""
    call = _Call(function, comm, sharding, arrays, scalars)
    route = route_of(call.rows, call.keys, call.band)
    k, v, state = arrays["k"], arrays["v"], call.begin()
    for step in range(call.size):
        further = step + 1 < call.size and any(route.carried(owner, step + 1) for owner in range(call.size))
        following = [call.passed_on(x) for x in (k, v)] if further else None
        seen = [route.seen(rank, route.owner(rank, step)) for rank in range(call.size)]
        state = call.by_rank(seen, state, k, v)
        if following is None:
            break
        k, v = following
    return call.results(state, return_lse)


def decode(
    function: str, comm: JaxComm, sharding: Any, arrays: Mapping[str, Any], return_lse: bool, **scalars: Any
) -> Any:
    """`sharded_decode` inside of shard_map: merged by three all-reduces."""
    import jax
    import jax.numpy as jnp

    call = _Call(function, comm, sharding, arrays, scalars, replicated_rows=True)
    lax: Any = jax.lax
    shifts = shifts_of(call.rows, call.keys, call.band)
    seen = [rectangles_of(call.rows.pieces[0], keys, shifts, call.band) for keys in call.keys.pieces]
    out, lse = call.by_rank(seen, call.begin(with_sinks=False), arrays["k"], arrays["v"])
    sinks = arrays.get("sinks")
    highest = lax.pmax(lax.stop_gradient(lse), comm.axis_name)
    if sinks is not None:
        highest = jnp.maximum(highest, lax.stop_gradient(sinks.astype(lse.dtype))[None, :, None])
    weights = _weights(lse, highest)
    total = lax.psum(weights, comm.axis_name)
    if sinks is not None:
        total = total + _weights(jnp.broadcast_to(sinks.astype(lse.dtype)[None, :, None], total.shape), highest)
    whole = lax.psum(_times(weights, out), comm.axis_name)
    return call.results((_times(1.0 / jnp.where(total == 0, 1.0, total), whole), _log(total, highest)), return_lse)


def ulysses(
    function: str, comm: JaxComm, sharding: Any, arrays: Mapping[str, Any], return_lse: bool, **scalars: Any
) -> Any:
    """`ulysses_attention` inside of shard_map."""
    import jax
    import jax.numpy as jnp

    call = _Call(function, comm, sharding, arrays, scalars, takes_slopes=True)
    for name in ("mask", "bias"):
        if arrays.get(name) is not None:
            rule = f"{name} is not exchanged inside of shard_map: ring_attention takes it there"
            raise ValueError(refusal(function, rule, (name, tuple(arrays[name].shape))))
    lax: Any = jax.lax
    size, heads, rows = call.size, call.head_axis, call.row_axis
    whole = {}
    for name, tokens in (("q", call.rows), ("k", call.keys), ("v", call.keys)):
        array = arrays[name]
        count = array.shape[heads]
        if count % size and (name == "q" or size % count):
            rule = f"the heads of {name} have to be a multiple of the ranks, {size}"
            rule += "" if name == "q" else ", or divide them"
            raise ValueError(refusal(function, rule, (name, tuple(array.shape))))
        if count % size:
            array = jnp.repeat(array, size // count, axis=heads)
        array = lax.all_to_all(array, comm.axis_name, heads, rows, tiled=True)
        places = [place for rank in range(size) for place in tokens.positions(rank)]
        whole[name] = jnp.take(array, jnp.asarray(sorted(range(len(places)), key=places.__getitem__)), axis=rows)
    first = lax.axis_index(comm.axis_name) * whole["q"].shape[heads]
    edits = {
        name: lax.dynamic_slice_in_dim(arrays[name], first, whole["q"].shape[heads], axis=-1)
        for name in ("alibi_slopes", "sinks")
        if arrays.get(name) is not None
    }
    out, lse = attention(**whole, **edits, **scalars, return_lse=True)
    back = jnp.asarray([place for rank in range(size) for place in call.rows.positions(rank)])
    out = lax.all_to_all(jnp.take(out, back, axis=rows), comm.axis_name, rows, heads, tiled=True)
    if not return_lse:
        return out
    return out, lax.all_to_all(jnp.take(lse, back, axis=2), comm.axis_name, 2, 1, tiled=True)


class _Call:
    """A call, as it is traced."""

    def __init__(
        self,
        function: str,
        comm: JaxComm,
        sharding: Any,
        arrays: Mapping[str, Any],
        scalars: Mapping[str, Any],
        replicated_rows: bool = False,
        takes_slopes: bool = False,
    ) -> None:
        import jax

        lax: Any = jax.lax
        self.function, self.comm, self.arrays, self.scalars = function, comm, arrays, scalars
        options = attention_options(
            function, dropout_p=0.0, return_lse=True,
            **{name: value for name, value in scalars.items() if name != "implementation"},
        )  # fmt: skip
        self.size = int(lax.axis_size(comm.axis_name))
        self.row_axis, self.head_axis = (1, 2) if options.axes == "bshd" else (2, 1)
        meant = sharding_meant(function, sharding, options, self.size)
        for name in ("q", "k", "v"):
            if len(arrays[name].shape) != 4:
                rule = f"{name} has to have 4 axes inside of shard_map"
                raise ValueError(refusal(function, rule, (name, tuple(arrays[name].shape))))
        if arrays.get("alibi_slopes") is not None and not takes_slopes:
            rule = "alibi_slopes are not for shards inside of shard_map; ulysses_attention takes them there"
            raise ValueError(refusal(function, rule, ("alibi_slopes", tuple(arrays["alibi_slopes"].shape))))
        own_q, own_k = (arrays[name].shape[self.row_axis] for name in ("q", "k"))
        self.keys = self._layout("k", meant, own_k)
        if replicated_rows:
            self.rows = Sharding("contiguous", self.size, (own_q,), (own_q,) + (0,) * (self.size - 1))
        else:
            self.rows = self._layout("q", meant, own_q)
        total_q, total_k = self.rows.seqlens[0], self.keys.seqlens[0]
        right = 0 if options.causal else options.window[1]
        if options.alignment is None and total_q != total_k and (options.window[0], right) != (None, None):
            rule = "alignment has to be chosen where there are not as many queries as keys"
            raise ValueError(refusal(function, rule, ("q", total_q), ("k", total_k)))
        self.band = Band(options.window[0], right, options.alignment != "top-left")

    def _layout(self, name: str, meant: Sharding | str, own: int) -> Sharding:
        layout = layout_of(meant, self.size, self.size * own)
        if len(layout.seqlens) != 1 or {layout.length(rank) for rank in range(self.size)} != {own}:
            rule = f"all ranks have to have as many tokens of {name} as one, {own}, by the layout as well"
            raise ValueError(refusal(self.function, rule, ("sharding", layout)))
        return layout

    def begin(self, with_sinks: bool = True) -> State:
        """Of no keys: all that there is are the sinks."""
        import jax.numpy as jnp

        q, v, sinks = self.arrays["q"], self.arrays["v"], self.arrays.get("sinks")
        dtype: Any = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
        shape = (q.shape[0], q.shape[self.head_axis], q.shape[self.row_axis])
        # Of what varies from rank to rank: a switch wants all its branches to give back what came in.
        own = 0.0 * jnp.sum(q[:1, :1, :1, :0]) + 0.0 * jnp.sum(v[:1, :1, :1, :0])
        lse = jnp.full(shape, -jnp.inf, dtype) + own.astype(dtype)
        if with_sinks and sinks is not None:
            lse = jnp.broadcast_to(sinks.astype(dtype)[None, :, None], shape) + own.astype(dtype)
        return jnp.zeros((*shape, v.shape[-1]), dtype) + own.astype(dtype), lse

    def passed_on(self, array: Any) -> Any:
        """What the rank before this one has."""
        import jax

        ranks, lax = [(rank, (rank + 1) % self.size) for rank in range(self.size)], cast(Any, jax.lax)
        return lax.ppermute(array, self.comm.axis_name, ranks)

    def by_rank(self, seen: Sequence[tuple[Rectangle, ...]], state: State, k: Array, v: Array) -> State:
        """The state with what each rank sees of some keys."""
        import jax

        branches = [partial(self._attended, rectangles) for rectangles in seen]
        found: State = jax.lax.switch(jax.lax.axis_index(self.comm.axis_name), branches, state, k, v)
        return found

    def _attended(self, rectangles: tuple[Rectangle, ...], state: State, k: Array, v: Array) -> State:
        out, lse = state
        scalars = {name: x for name, x in self.scalars.items() if name not in ("causal", "window_size", "alignment")}
        for rectangle in rectangles:
            rows, keys, places = rectangle.rows, slice(*rectangle.keys), rectangle.places
            operands = {"q": self._cut(self.arrays["q"], rows), "k": self._cut(k, keys), "v": self._cut(v, keys)}
            for name in ("mask", "bias"):
                array = self.arrays.get(name)
                if array is not None:
                    if array.ndim > 1 and array.shape[-2] > 1:
                        array = array[..., rows, :]
                    if array.shape[-1] > 1:
                        array = array[..., places.start : places.stop : places.step]
                    operands[name] = array
            band = {"window_size": rectangle.window, "alignment": "top-left"}
            part, part_lse = attention(**operands, **scalars, **band, return_lse=True)
            part = part.astype(lse.dtype)
            part = part.swapaxes(1, 2) if self.row_axis == 1 else part
            merged = _merged((out[:, :, rows], lse[:, :, rows]), (part, part_lse.astype(lse.dtype)))
            out, lse = out.at[:, :, rows].set(merged[0]), lse.at[:, :, rows].set(merged[1])
        return out, lse

    def _cut(self, array: Array, rows: slice) -> Array:
        return array[:, rows] if self.row_axis == 1 else array[:, :, rows]

    def results(self, state: State, return_lse: bool) -> Any:
        out, lse = state
        out = (out.swapaxes(1, 2) if self.row_axis == 1 else out).astype(self.arrays["q"].dtype)
        return (out, lse) if return_lse else out


def _weights(lse: Array, highest: Array) -> Array:
    """exp(lse - highest), which is no nan where both are infinite."""
    import jax.numpy as jnp

    origin = jnp.where(jnp.isinf(highest), 0.0, highest)
    usual = jnp.exp(jnp.where(lse == jnp.inf, -jnp.inf, lse) - origin)
    return jnp.where(highest == jnp.inf, (lse == jnp.inf).astype(lse.dtype), usual)


def _times(weights: Array, out: Array) -> Array:
    """A weight of 0 is nothing, whatever it is multiplied by."""
    import jax.numpy as jnp

    return jnp.where(weights[..., None] == 0, 0.0, weights[..., None] * jnp.where(weights[..., None] == 0, 0.0, out))


def _log(total: Array, highest: Array) -> Array:
    import jax.numpy as jnp

    found = jnp.where(jnp.isinf(highest), 0.0, highest) + jnp.log(jnp.where(total == 0, 1.0, total))
    return jnp.where(highest == jnp.inf, highest, jnp.where(total == 0, -jnp.inf, found))


def _merged(first: State, second: State) -> State:
    """`merge_states` of two, in jax.numpy: JAX knows its gradients, and no callback is needed."""
    import jax
    import jax.numpy as jnp

    (out_a, lse_a), (out_b, lse_b) = first, second
    highest = jax.lax.stop_gradient(jnp.maximum(lse_a, lse_b))
    a, b = _weights(lse_a, highest), _weights(lse_b, highest)
    total = a + b
    share = 1.0 / jnp.where(total == 0, 1.0, total)
    return _times(a * share, out_a) + _times(b * share, out_b), _log(total, highest)
