"""What every cache can do, and the door its arrays come through."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from cupyattn import reading
from cupyattn.arrays import Sketch, Sketches, enter, untraced
from cupyattn.corridor import answer
from cupyattn.problem import ITEMSIZE, Array, Device, Shape, Spec
from cupyattn.reading import AXES, Options, refusal


@dataclass(frozen=True, slots=True)
class Kind:
    """What all tokens of a cache have in common."""

    library: Any
    anchor: Any
    """An array without elements, by whose library, device and dtype new arrays are judged and made."""
    dtype: str
    features_k: Shape
    """(num_heads_kv, head_dim)."""
    features_v: Shape
    place: str
    """ "cpu" or "cuda"."""


_BY_LAYER = {"append": "update", "attend": "attend"}
"""What a layered cache calls the methods that are called of one layer."""


class Cache:
    """The keys and values of one layer's tokens so far.

    What all caches can do.  A decoder has one for each layer, in a list: layers need not be alike.  Library, device,
    dtype, heads and head_dim are those of the first tokens appended; arrays of any library that can be written to
    will do, and those of JAX, which are copied at each append.  Values are kept, gradients are not.

    torch.compile calls a cache between two graphs: what it is, lengths and pages and who shares them, is kept in Python
    and decides what is computed.  So ``fullgraph=True`` refuses it; where a step has to be one graph, or a CUDA graph,
    `flash_attn_with_kvcache` takes tokens in and attends over arrays and lengths of the caller's.

    A call that raises leaves the cache as it was, whatever it raises: KeyboardInterrupt and MemoryError too.  Copies
    have memory of their own, those of `copy.copy` too.
    """

    # What a cache is, is one value, `_state`: a change is worked out aside and put in place by one assignment.  What
    # a state has in memory is never written to, but for what is behind that which is live.

    _about_schedules = ""
    """What `explain` says of calls that have one."""
    _layer: tuple[str, int] | None = None
    """The class of the layered cache that it is in, and its number there."""

    @reading.in_our_words
    def __init__(self) -> None:
        self._state: Any = None
        """None, or what has `kind`: that of the tokens."""

    @untraced
    def __copy__(self) -> Self:
        """A cache that goes on from what this one is, in memory of its own; what else a subclass has is shared."""
        twin = object.__new__(type(self))
        vars(twin).update(vars(self))
        twin._state = twin._apart()
        return twin

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What `pickle` and `copy.deepcopy` make, in memory as the cache would have made it: pinned, say."""
        vars(self).update(state)
        self._state = self._apart()

    def _apart(self) -> Any:
        """The state, in copies of all that is written to."""
        raise NotImplementedError

    def __len__(self) -> int:
        """Tokens so far, those that have left a window included; of the longest sequence, where lengths differ."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {', '.join(self._facts())}>"

    def _facts(self) -> list[str]:
        """What it says of itself."""
        kind = self._kind
        return ["empty"] if kind is None else [*facts_of(self.lengths, kind), f"{self.nbytes} bytes"]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes of all memory that is held, used or not."""
        raise NotImplementedError

    def append(self, k: Array, v: Array) -> None:
        """Add tokens to the end of every sequence.

        Parameters
        ----------
        k, v : array, shapes (batch, seqlen, num_heads_kv, head_dim), (batch, seqlen, num_heads_v, head_dim_v)
            Copied.  Every time of the same library, device, dtype and shape, but for seqlen.  The dtype is that which
            torch.autocast casts to, under it.

        Raises
        ------
        TypeError
            Not arrays, of another library or dtype than the cache's, without values (under a trace), or immutable.
        ValueError
            Shapes do not fit, another device, no room is left, or gradients are recorded.
        """
        raise NotImplementedError

    def truncate(self, length: int) -> None:
        """Forget all tokens after the first `length`, as after a rejected draft.

        Raises
        ------
        ValueError
            There are not as many, or some of those that the next token would see have left the window.
        """
        raise NotImplementedError

    def reorder(self, sequences: Sequence[int] | Array) -> None:
        """Let sequence ``i`` go on as a copy of what ``sequences[i]`` was; as many as there are entries.

        For beams, ``reorder([0, 0, 2])``: the first went on twice, the second was dropped.

        Raises
        ------
        TypeError, ValueError
            Not integers, or not from 0 to batch - 1.
        """
        raise NotImplementedError

    @untraced
    def attend(
        self,
        q: Array,
        *,
        causal: bool = True,
        window_size: tuple[int | None, int | None] = (None, None),
        softmax_scale: float | None = None,
        softcap: float = 0.0,
        alibi_slopes: Array | None = None,
        sinks: Array | None = None,
        q_descale: Array | None = None,
        k_descale: Array | None = None,
        v_descale: Array | None = None,
        compute_dtype: Any = None,
        fixed_split_size: int | None = None,
        return_lse: bool = False,
    ) -> Any:
        """Attention of the last tokens' queries over all tokens.

        Parameters
        ----------
        q : array, shape (batch, seqlen_q, num_heads, head_dim)
            Of the last seqlen_q tokens, which have been appended, so of no more than those: masks are aligned
            bottom-right.
        causal : bool
            A query sees no token after its own.
        q_descale, k_descale, v_descale : array of float32, optional
            As for `attention`, of caches of float8_e4m3fn: those of k and v are for all of a sequence's tokens.
        others
            As for `attention`.

        Returns
        -------
        out : array, shape (batch, seqlen_q, num_heads, head_dim_v)
        lse : array, shape (batch, num_heads, seqlen_q), only if `return_lse`

        Raises
        ------
        TypeError, ValueError, NotImplementedError
            As `attention`; also if nothing has been appended yet, or fewer tokens than there are queries.
        """
        function = self._named("attend")
        options = attend_options(function, causal, window_size, softmax_scale, softcap, compute_dtype, return_lse)
        size = reading.split_size(function, fixed_split_size)
        self._known(function)
        check_rows(function, q, [rows_of(q)], [len(self)])
        keys, values, options = self._keys(function, q, options)
        named = {
            "q": ("q", q),
            "k": ("k", keys),
            "v": ("v", values),
            "alibi_slopes": ("alibi_slopes", alibi_slopes),
            "sinks": ("sinks", sinks),
            "q_descale": ("q_descale", q_descale),
            "k_descale": ("k_descale", k_descale),
            "v_descale": ("v_descale", v_descale),
        }
        try:
            found = answer(function, named, options, None, size)
        finally:
            self._attended()
        return (found["out"], found["lse"]) if return_lse else found["out"]

    def _keys(self, function: str, q: Array, options: Options) -> tuple[Array, Array, Options]:
        """Keys, values and what is asked of them, for these queries."""
        raise NotImplementedError

    def _attended(self) -> None:
        """After the use of keys and values."""

    def _named(self, method: str) -> str:
        """What errors call a method; of a layer, what the user called, who says himself which layer is to attend."""
        if self._layer is None:
            return f"{type(self).__name__}.{method}"
        owner, number = self._layer
        if method in _BY_LAYER:
            return f"{owner}.{_BY_LAYER[method]}"
        return f"{owner}.{method}, layer {number} ({type(self).__name__})"

    def _known(self, function: str) -> Kind:
        if self._kind is None:
            raise ValueError(refusal(function, "nothing has been appended yet"))
        return self._kind

    @property
    def _kind(self) -> Kind | None:
        return None if self._state is None else self._state.kind

    def _sketched(self, device: Device, library: Sketches) -> Cache:
        """A twin of sketches on a device, to rehearse what `attend` would do; the cache itself if it has no tokens."""
        kind = self._kind
        if kind is None:
            return self
        twin = object.__new__(type(self))
        vars(twin).update(vars(self))
        anchor = Sketch((0,), kind.dtype, device)
        own = replace(kind, library=library, anchor=anchor, place=device.kind)
        twin._state = self._state_over(own, lambda array: Sketch(tuple(array.shape), own.dtype, device))
        return twin

    def _state_over(self, kind: Kind, sketch: Callable[[Array], Sketch]) -> Any:
        """The state, with sketches for its arrays."""
        return self._state._replace(kind=kind, k=sketch(self._state.k), v=sketch(self._state.v))

    def _tokens(self, function: str, k: Array, v: Array, axes: str, otherwise: str = "") -> tuple[Kind, Array, Array]:
        """Look at new tokens, and return them as they are kept; refuse those that do not go with the others.

        `otherwise` is said after their axes.
        """
        named, kind = {"k": ("k", k), "v": ("v", v)}, self._kind
        if kind is not None:
            named["kept"] = ("the cache", kind.anchor)
        visit = enter(function, named)
        specs, k, v = dict(visit.specs), visit.arrays["k"], visit.arrays["v"]
        _check_tokens(function, specs, axes, otherwise)
        visit.library.check_keepable(function, {"k": k, "v": v})
        if visit.kind == "cuda":
            visit.device()
        if kind is not None:
            _check_alike(function, specs, kind)
            return kind, k, v
        anchor = visit.library.empty((0,), k)
        features = specs["k"].shape[-2:], specs["v"].shape[-2:]
        return Kind(visit.library, anchor, specs["k"].dtype, *features, visit.kind), k, v


def facts_of(lengths: Sequence[int], kind: Kind) -> list[str]:
    """Sequences, tokens, heads and dtype in words."""
    least, most = min(lengths, default=0), max(lengths, default=0)
    sequences = f"{len(lengths)} sequence{'s' * (len(lengths) != 1)}"
    tokens = f"{least} to {most} tokens" if least < most else f"{most} token{'s' * (most != 1)}"
    heads, values = kind.features_k, kind.features_v
    of_values = "" if heads == values else f" (of values {values[0]} of {values[1]})"
    features = f"{heads[0]} head{'s' * (heads[0] != 1)} of {heads[1]}{of_values}"
    return [f"{sequences} of {tokens}", features, f"{kind.library.title} of {kind.dtype}"]


def _check_tokens(function: str, specs: dict[str, Spec], axes: str, otherwise: str) -> None:
    k, v = specs["k"], specs["v"]
    rank = len(AXES[axes].split(","))
    for spec in (k, v):
        if spec.dtype not in ITEMSIZE:
            rule = f"{spec.name} has to be one of {', '.join(ITEMSIZE)}"
            raise TypeError(refusal(function, rule, (spec.name, spec.shape, spec.dtype)))
        if len(spec.shape) != rank:
            rule = f"{spec.name} has to have {rank} axes, {AXES[axes]}{otherwise}"
            raise ValueError(refusal(function, rule, (spec.name, spec.shape)))
    if k.dtype != v.dtype:
        rule = "k and v have to be of one dtype"
        raise TypeError(refusal(function, rule, ("k", k.shape, k.dtype), ("v", v.shape, v.dtype)))
    if k.shape[:-2] != v.shape[:-2]:
        rule = "k and v have to hold the same tokens"
        raise ValueError(refusal(function, rule, ("k", k.shape), ("v", v.shape)))


def _check_alike(function: str, specs: dict[str, Spec], kind: Kind) -> None:
    for spec, features in ((specs["k"], kind.features_k), (specs["v"], kind.features_v)):
        if spec.dtype != kind.dtype:
            rule = f"{spec.name} has to be of the cache's dtype, {kind.dtype}"
            raise TypeError(refusal(function, rule, (spec.name, spec.shape, spec.dtype)))
        if spec.shape[-2:] != features:
            rule = f"{spec.name} has to have the cache's heads and head_dim, {features}"
            raise ValueError(refusal(function, rule, (spec.name, spec.shape)))


def rows_of(q: Any) -> int:
    """Queries of each sequence; 0 for what has other axes, and is refused for that."""
    return int(q.shape[1]) if len(getattr(q, "shape", ())) == 4 else 0


def check_rows(function: str, q: Any, rows: Sequence[int], lengths: Sequence[int]) -> None:
    """Refuse more queries of a sequence than it has tokens: they are those of tokens."""
    for sequence, (count, length) in enumerate(zip(rows, lengths, strict=True)):
        if count > length:
            rule = f"q has {count} rows of sequence {sequence}, which has {length} tokens; append theirs first"
            raise ValueError(refusal(function, rule, ("q", tuple(q.shape)), ("tokens", reading.short(list(lengths)))))


def attend_options(
    function: str,
    causal: bool,
    window_size: Any,
    softmax_scale: float | None,
    softcap: float,
    compute_dtype: Any,
    return_lse: bool,
) -> Options:
    return Options(
        causal=reading.flag(function, "causal", causal),
        window=reading.window(function, "window_size", window_size),
        softmax_scale=reading.softmax_scale(function, "softmax_scale", softmax_scale),
        softcap=reading.softcap(function, softcap),
        compute_dtype=reading.compute_dtype(function, compute_dtype),
        needs_lse=reading.flag(function, "return_lse", return_lse),
        takes_float8=True,
    )


def integers(function: str, name: str, values: Sequence[int] | Array, *, low: int, high: int) -> list[int]:
    """A list of integers on the host, from a sequence of them or from an array of any library."""
    rule = f"{name} has to be a list of integers, or an array of one axis"
    is_sequence = isinstance(values, Sequence) and not isinstance(values, (str, bytes))
    if not is_sequence and not hasattr(values, "shape"):
        raise TypeError(refusal(function, rule, (name, reprlib.repr(values), type(values).__name__)))
    if not is_sequence:
        visit = enter(function, {name: (name, values)})
        spec = dict(visit.specs)[name]
        if len(spec.shape) != 1 or not spec.dtype.startswith(("int", "uint")):
            raise TypeError(refusal(function, rule, (name, spec.shape, spec.dtype)))
        if visit.library.is_deferred(visit.arrays):
            raise TypeError(refusal(function, f"needs the values of {name}, {visit.library.when_deferred}"))
        values = np.asarray(visit.library.values(values)).tolist()
    return [reading.integer(function, f"{name}[{i}]", value, low=low, high=high) for i, value in enumerate(values)]


def own(kind: Kind, array: Array) -> Array:
    """A copy, at the cache's home."""
    return kind.library.put(kind.library.empty(tuple(array.shape), kind.anchor), (slice(None), Ellipsis), array)


def nbytes_of(kind: Kind, *arrays: Array) -> int:
    """Of arrays in the dtype of the cache."""
    return sum(math.prod(array.shape) * ITEMSIZE[kind.dtype] for array in arrays)
