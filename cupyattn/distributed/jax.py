"""Ranks that are the devices of a mesh of JAX, inside `jax.shard_map`, by JAX's own collectives.

One program is traced for all ranks: what a rank sees of others' keys is a branch of a switch by its number.  Gradients
are JAX's own, of `attention`'s and of the merging of states, which is written in jax.numpy here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import numpy as np

from cupyattn import api
from cupyattn.distributed.asked import check_alignment, check_packed, layout_of, rows_everywhere, sharding_meant
from cupyattn.distributed.jax_merging import State, log, merged, times, weights
from cupyattn.distributed.rectangles import Band, Rectangle, rectangles_of, shifts_of
from cupyattn.distributed.route import route_of
from cupyattn.distributed.sharding import Sharding
from cupyattn.problem import Array
from cupyattn.reading import attention_options, refusal

attention: Any = api.attention
"""Of keywords that are data here, which its overloads cannot know."""


class JaxComm:
    """`Comm` inside of `jax.shard_map`: ranks are the devices along an axis of its mesh.

    Parameters
    ----------
    axis_name : str
        Of the mesh.

    Notes
    -----
    There is nobody to wait for and nobody to disagree: it is one program, and what is wrong is wrong where it is
    traced.  All ranks have as many tokens, also of packed sequences.  Gradients are `jax.grad`'s.  Each rectangle of
    rows and keys is rounded to the dtype of `q`, and states are merged in that of lse.  Keys travel whole, as long as
    anybody further along sees any.  In rings and decodes ALiBi is a bias of each rectangle, as large as its scores;
    `ulysses_attention`, where diagonals are `attention`'s own, needs none.
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
    k, v, state = call.arrays["k"], call.arrays["v"], call.begin()
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
    function: str,
    comm: JaxComm,
    sharding: Any,
    seqlens_q: Any,
    arrays: Mapping[str, Any],
    return_lse: bool,
    **scalars: Any,
) -> Any:
    """`sharded_decode` inside of shard_map: merged by three all-reduces."""
    import jax
    import jax.numpy as jnp

    call = _Call(function, comm, sharding, arrays, scalars, replicated_rows=True, seqlens_q=seqlens_q)
    lax: Any = jax.lax
    shifts = shifts_of(call.rows, call.keys, call.band)
    seen = [rectangles_of(call.rows.pieces[0], keys, shifts, call.band) for keys in call.keys.pieces]
    out, lse = call.by_rank(seen, call.begin(with_sinks=False), call.arrays["k"], call.arrays["v"])
    sinks = arrays.get("sinks")
    highest = lax.pmax(lax.stop_gradient(lse), comm.axis_name)
    if sinks is not None:
        highest = jnp.maximum(highest, lax.stop_gradient(sinks.astype(lse.dtype))[None, :, None])
    own = weights(lse, highest)
    total = lax.psum(own, comm.axis_name)
    if sinks is not None:
        total = total + weights(jnp.broadcast_to(sinks.astype(lse.dtype)[None, :, None], total.shape), highest)
    whole = lax.psum(times(own, out), comm.axis_name)
    return call.results((times(1.0 / jnp.where(total == 0, 1.0, total), whole), log(total, highest)), return_lse)


def ulysses(
    function: str, comm: JaxComm, sharding: Any, arrays: Mapping[str, Any], return_lse: bool, **scalars: Any
) -> Any:
    """`ulysses_attention` inside of shard_map."""
    import jax.numpy as jnp

    call = _Call(function, comm, sharding, arrays, scalars)
    exchange = _Exchange(call)
    whole = {name: exchange.gathered(name, call.rows if name == "q" else call.keys) for name in ("q", "k", "v")}
    edits = exchange.edits(whole["q"].shape[call.head_axis])
    outs, lses, first = [], [], 0
    for sequence, seqlen in enumerate(call.rows.seqlens):
        here, own = whole, edits
        if call.packed:
            stretch = slice(first, first + seqlen)
            here = {name: call.cut(array, stretch) for name, array in whole.items()}
            if "alibi_slopes" in edits:
                own = {**edits, "alibi_slopes": call.slopes_of(sequence, edits["alibi_slopes"])}
        out, lse = attention(**here, **own, **scalars, return_lse=True)
        outs.append(out)
        lses.append(lse)
        first += seqlen
    out = exchange.scattered(jnp.concatenate(outs, axis=call.row_axis), call.row_axis, call.head_axis)
    lse = exchange.scattered(jnp.concatenate(lses, axis=2), 2, 1) if return_lse else None
    return call.as_asked(out, lse)


class _Exchange:
    """Heads for tokens, and tokens for heads."""

    def __init__(self, call: _Call) -> None:
        import jax

        self.call, self.lax = call, cast(Any, jax.lax)
        self.num_heads = call.arrays["q"].shape[call.head_axis]

    def gathered(self, name: str, tokens: Sharding) -> Array:
        """Some heads of q, k or v, of all tokens in their order."""
        import jax.numpy as jnp

        call, array = self.call, self.call.arrays[name]
        count, size = array.shape[call.head_axis], call.size
        if count % size and (name == "q" or size % count):
            rule = f"the heads of {name} have to be a multiple of the ranks, {size}"
            rule += "" if name == "q" else ", or divide them"
            raise ValueError(refusal(call.function, rule, (name, call.shape_given(name))))
        if count % size:
            array = jnp.repeat(array, size // count, axis=call.head_axis)
        found = self.lax.all_to_all(array, call.comm.axis_name, call.head_axis, call.row_axis, tiled=True)
        return self._in_order(found, tokens, call.row_axis)

    def scattered(self, whole: Array, row_axis: int, head_axis: int) -> Array:
        """The way back: all heads of this rank's rows."""
        import jax.numpy as jnp

        back = jnp.asarray(_places(self.call.rows))
        return self.lax.all_to_all(
            jnp.take(whole, back, axis=row_axis), self.call.comm.axis_name, row_axis, head_axis, tiled=True
        )

    def edits(self, num_heads: int) -> dict[str, Array]:
        """What edits the scores of this rank's `num_heads` heads, in all rows."""
        arrays = self.call.arrays
        first = self.lax.axis_index(self.call.comm.axis_name) * num_heads

        def own(array: Array, axis: int) -> Array:
            return self.lax.dynamic_slice_in_dim(array, first, num_heads, axis=axis)

        found = {name: own(arrays[name], -1) for name in ("alibi_slopes", "sinks") if arrays.get(name) is not None}
        for name in ("mask", "bias"):
            if arrays.get(name) is not None:
                array = self._of_rank_4(name)
                if array.shape[2] == self.call.own_rows:
                    found[name] = self._of_all_rows(array)
                else:
                    found[name] = own(array, 1) if array.shape[1] > 1 else array
        return found

    def _of_rank_4(self, name: str) -> Array:
        array: Any = self.call.arrays[name]
        found: Array = array.reshape((1,) * (4 - array.ndim) + tuple(array.shape))
        if found.ndim > 4 or found.shape[1] not in (1, self.num_heads) or found.shape[2] not in (1, self.call.own_rows):
            rule = f"{name} has to broadcast to (batch, num_heads, own rows, all keys), of {self.num_heads} heads"
            rule += f" and {self.call.own_rows} rows"
            raise ValueError(refusal(self.call.function, rule, (name, tuple(array.shape))))
        return found

    def _of_all_rows(self, array: Array) -> Array:
        """Of a mask or bias of own rows: that of this rank's heads, or the one for all heads."""
        axis_name = self.call.comm.axis_name
        if array.shape[1] > 1:
            found = self.lax.all_to_all(array, axis_name, 1, 2, tiled=True)
        else:
            found = self.lax.all_gather(array, axis_name, axis=2, tiled=True)
        return self._in_order(found, self.call.rows, 2)

    def _in_order(self, array: Array, tokens: Sharding, axis: int) -> Array:
        import jax.numpy as jnp

        places = _places(tokens)
        return jnp.take(array, jnp.asarray(sorted(range(len(places)), key=places.__getitem__)), axis=axis)


def _places(tokens: Sharding) -> list[int]:
    """Of all ranks' tokens, one rank behind the other."""
    return [place for rank in range(tokens.size) for place in tokens.positions(rank)]


def _size_of_axis(function: str, comm: JaxComm) -> int:
    import jax

    lax: Any = jax.lax
    try:
        return int(lax.axis_size(comm.axis_name))
    except NameError:
        rule = "comm has to name an axis of the mesh of the jax.shard_map around the call"
        raise ValueError(refusal(function, rule, ("comm", comm))) from None


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
        seqlens_q: Any = None,
    ) -> None:
        self.function, self.comm, self.scalars = function, comm, scalars
        options = attention_options(
            function, dropout_p=0.0, return_lse=True,
            **{name: value for name, value in scalars.items() if name != "implementation"},
        )  # fmt: skip
        self.size = _size_of_axis(function, comm)
        self.row_axis, self.head_axis = (1, 2) if options.axes == "bshd" else (2, 1)
        meant = sharding_meant(function, sharding, options, self.size)
        self.packed = isinstance(meant, Sharding) and len(arrays["q"].shape) == 3
        self.arrays = self._of_rank_4(arrays, meant, options.axes)
        own_q, own_k = (self.arrays[name].shape[self.row_axis] for name in ("q", "k"))
        self.own_rows = own_q
        self.keys = self._layout("k", meant, own_k)
        if replicated_rows:
            self.rows = rows_everywhere(function, seqlens_q, own_q, self.keys, self.packed)
        else:
            self.rows = self._layout("q", meant, own_q)
        self._check_slopes()
        check_alignment(function, options, arrays.get("alibi_slopes") is not None, self.rows, self.keys)
        right = 0 if options.causal else options.window[1]
        self.band = Band(options.window[0], right, options.alignment != "top-left")

    def _layout(self, name: str, meant: Sharding | str, own: int) -> Sharding:
        layout = layout_of(meant, self.size, self.size * own)
        if {layout.length(rank) for rank in range(self.size)} != {own}:
            rule = f"all ranks have to have as many tokens of {name} as one, {own}, by the layout as well"
            raise ValueError(refusal(self.function, rule, ("sharding", layout)))
        return layout

    def _of_rank_4(self, arrays: Mapping[str, Any], meant: Sharding | str, axes: str) -> dict[str, Any]:
        """The arrays with packed tokens as a batch of one."""
        rank, several = 3 if self.packed else 4, isinstance(meant, Sharding) and len(meant.seqlens) != 1
        for name in ("q", "k", "v"):
            shape = tuple(arrays[name].shape)
            if len(shape) != rank or (several and not self.packed):
                rule = f"{name} has to have 4 axes inside of shard_map, or 3, (tokens, num_heads, head_dim), where "
                rule += "sharding is a Sharding, of packed sequences"
                raise ValueError(refusal(self.function, rule, (name, shape), ("sharding", meant)))
        if not self.packed:
            return dict(arrays)
        check_packed(self.function, axes)
        for name in ("mask", "bias"):
            if arrays.get(name) is not None:
                rule = f"{name} does not go with packed sequences"
                raise ValueError(refusal(self.function, rule, (name, tuple(arrays[name].shape))))
        return {name: x[None] if name in ("q", "k", "v") else x for name, x in arrays.items()}

    def shape_given(self, name: str) -> tuple[int, ...]:
        """Of an array of the caller's."""
        shape = tuple(self.arrays[name].shape)
        return shape[1:] if self.packed else shape

    def _check_slopes(self) -> None:
        slopes, q = self.arrays.get("alibi_slopes"), self.arrays["q"]
        if slopes is None:
            return
        outer = len(self.rows.seqlens) if self.packed else q.shape[0]
        heads = q.shape[self.head_axis]
        if tuple(slopes.shape) not in ((heads,), (outer, heads)):
            rule = f"alibi_slopes have to be ({heads},) or ({outer}, {heads})"
            raise ValueError(refusal(self.function, rule, ("alibi_slopes", tuple(slopes.shape))))

    def slopes_of(self, sequence: int, slopes: Array) -> Array:
        """Those of a sequence, where sequences are packed; else those of the batch."""
        return slopes[sequence] if self.packed and slopes.ndim == 2 else slopes

    def begin(self, with_sinks: bool = True) -> State:
        """Of no keys: all that there is are the sinks."""
        import jax.numpy as jnp

        q, v, sinks = self.arrays["q"], self.arrays["v"], self.arrays.get("sinks")
        dtype: Any = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
        shape = (q.shape[0], q.shape[self.head_axis], q.shape[self.row_axis])
        # Of what varies from rank to rank: a switch wants all its branches to give back what came in.
        own = self._nothing(dtype)
        lse = jnp.full(shape, -jnp.inf, dtype) + own
        if with_sinks and sinks is not None:
            lse = jnp.broadcast_to(sinks.astype(dtype)[None, :, None], shape) + own
        return jnp.zeros((*shape, v.shape[-1]), dtype) + own, lse

    def passed_on(self, array: Any) -> Any:
        """What the rank before this one has."""
        import jax

        ranks, lax = [(rank, (rank + 1) % self.size) for rank in range(self.size)], cast(Any, jax.lax)
        return lax.ppermute(array, self.comm.axis_name, ranks)

    def by_rank(self, seen: Sequence[tuple[Rectangle, ...]], state: State, k: Array, v: Array) -> State:
        """The state with what each rank sees of some keys."""
        import jax

        branches = [partial(self._attended, rectangles) for rectangles in seen]
        others = {name: self._varying(x) for name, x in self.arrays.items() if x is not None and name not in ("k", "v")}
        found: State = jax.lax.switch(
            jax.lax.axis_index(self.comm.axis_name), branches, state, {**others, "k": k, "v": v}
        )
        return found

    def _varying(self, array: Any) -> Array:
        """The same where each rank has its own: the gradient of what all ranks have in common is a sum over them, and
        within a branch of a switch they would not meet for it."""
        import jax.numpy as jnp

        found: Array = array + self._nothing(array.dtype) if jnp.issubdtype(array.dtype, jnp.floating) else array
        return found

    def _nothing(self, dtype: Any) -> Array:
        """A zero that varies from rank to rank, as rows or keys do."""
        import jax.numpy as jnp

        q, v = self.arrays["q"], self.arrays["v"]
        return (0.0 * jnp.sum(q[:1, :1, :1, :0]) + 0.0 * jnp.sum(v[:1, :1, :1, :0])).astype(dtype)

    def _attended(self, rectangles: tuple[Rectangle, ...], state: State, arrays: Mapping[str, Any]) -> State:
        out, lse = state
        scalars = {name: x for name, x in self.scalars.items() if name not in ("causal", "window_size", "alignment")}
        for rectangle in rectangles:
            rows, keys, places = rectangle.rows, slice(*rectangle.keys), rectangle.places
            operands = {name: self.cut(arrays[name], rows if name == "q" else keys) for name in ("q", "k", "v")}
            for name in ("mask", "bias"):
                array = arrays.get(name)
                if array is not None:
                    if array.ndim > 1 and array.shape[-2] > 1:
                        array = array[..., rows, :]
                    if array.shape[-1] > 1:
                        array = array[..., places.start : places.stop : places.step]
                    operands[name] = array
            if "alibi_slopes" in arrays:
                alibi = self._alibi(rectangle, arrays["alibi_slopes"], lse.dtype)
                operands["bias"] = alibi + operands["bias"] if "bias" in operands else alibi
            band = {"window_size": rectangle.window, "alignment": "top-left"}
            part, part_lse = attention(**operands, **scalars, **band, return_lse=True)
            part = part.astype(lse.dtype)
            part = part.swapaxes(1, 2) if self.row_axis == 1 else part
            both = merged((out[:, :, rows], lse[:, :, rows]), (part, part_lse.astype(lse.dtype)))
            out, lse = out.at[:, :, rows].set(both[0]), lse.at[:, :, rows].set(both[1])
        return out, lse

    def _alibi(self, rectangle: Rectangle, slopes: Array, dtype: Any) -> Array:
        """As a bias, since a rectangle's own diagonal is elsewhere: (..., num_heads, rows, keys)."""
        import jax.numpy as jnp

        step, num_keys = rectangle.places.step, len(rectangle.keys)
        apart = rectangle.diagonal + step * (np.arange(rectangle.num_rows)[:, None] - np.arange(num_keys))
        slopes = self.slopes_of(rectangle.sequence, slopes)
        return -slopes.astype(dtype)[..., None, None] * jnp.asarray(np.abs(apart), dtype)

    def cut(self, array: Array, rows: slice) -> Array:
        """Some tokens of q, k or v."""
        return array[:, rows] if self.row_axis == 1 else array[:, :, rows]

    def results(self, state: State, return_lse: bool) -> Any:
        out, lse = state
        out = (out.swapaxes(1, 2) if self.row_axis == 1 else out).astype(self.arrays["q"].dtype)
        return self.as_asked(out, lse if return_lse else None)

    def as_asked(self, out: Array, lse: Array | None) -> Any:
        """The results, packed as the operands are."""
        if self.packed:
            out, lse = out[0], None if lse is None else lse[0]
        return out if lse is None else (out, lse)
