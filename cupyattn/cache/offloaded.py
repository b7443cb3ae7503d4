"""A cache on the host, whose tokens visit the GPU while they are used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import array_api_compat

from cupyattn import reading
from cupyattn.arrays import Sketch, cuda_lane, untraced
from cupyattn.cache.contiguous import SMALLEST
from cupyattn.cache.protocol import Cache, Kind, integers, nbytes_of
from cupyattn.problem import Array, Shape
from cupyattn.reading import Options, refusal

SPARE = 64
"""Tokens that may be appended to those fetched: those between a `prefetch` and its `attend`."""


class HostLane:
    """What `cuda.lanes` are for a GPU, for arrays that are on the host: their copies are made at once."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def empty(self, shape: Shape, like: Array) -> Array:
        return self._library.empty(shape, like)

    def save(self, host: Array, index: Any, values: Array) -> Array:
        return self._library.put(host, index, values)

    def move(self, host: Array, index: Any, values: Array) -> Array:
        return self._library.put(host, index, values)

    def load(self, targets: list[Array], index: Any, sources: list[Array]) -> list[Array]:
        return [self._library.put(a, index, b) for a, b in zip(targets, sources, strict=True)]

    def ready(self) -> None:
        """Everything is."""

    def settle(self) -> None:
        """Everything is."""


class Fetched(NamedTuple):
    """Tokens at the arrays' home, (seqlen, batch, num_heads_kv, head_dim)."""

    k: Array
    v: Array


class State(NamedTuple):
    """Tokens on the host, first, so that those of all sequences are one piece of memory to copy."""

    kind: Kind
    lane: Any
    """What brings tokens to the host and back."""
    host: Fetched
    length: int
    fetched: Fetched | None = None

    def live(self) -> Fetched:
        """The tokens so far on the host."""
        return Fetched(*(x[_slots(0, self.length)] for x in self.host))


class OffloadedCache(Cache):
    """A cache in memory of the host, growing as `DynamicCache` does; its tokens visit the GPU while they are used.

    `prefetch` starts their way there beside whatever the GPU is doing.  A decoder calls that of the next layer before
    it queues the work of this one, and then needs the memory of two layers instead of all::

        for layer, cache, following in zip(layers, caches, [*caches[1:], caches[0]]):
            following.prefetch()
            x = layer(x, cache)  # cache.append(k, v), cache.attend(q)

    Arrays on the CPU are copied as well, at once, so that programs are the same there.
    """

    _state: State | None

    def _apart(self) -> State | None:
        state = self._state
        if state is None:
            return None
        if state.lane is not None:
            state.lane.settle()
        lane = _lane(type(self).__name__, state.kind)
        capacity, batch = state.host.k.shape[:2]
        return state._replace(lane=lane, fetched=None, host=_moved(lane, state.kind, batch, capacity, state.live()))

    def _state_over(self, kind: Kind, sketch: Callable[[Array], Sketch]) -> State:
        state = self._state
        assert state is not None
        host, fetched = Fetched(*map(sketch, state.host)), state.fetched
        if fetched is not None:
            fetched = Fetched(*map(sketch, fetched))
        return state._replace(kind=kind, lane=HostLane(kind.library), host=host, fetched=fetched)

    def __getstate__(self) -> dict[str, Any]:
        """For `pickle` and `copy.deepcopy`: what is on the host, once it is there."""
        state = self._state
        if state is None:
            return vars(self)
        state.lane.settle()
        return {**vars(self), "_state": state._replace(lane=None, fetched=None)}

    def __len__(self) -> int:
        return 0 if self._state is None else self._state.length

    @property
    def lengths(self) -> tuple[int, ...]:
        return () if self._state is None else (self._state.length,) * int(self._state.host.k.shape[1])

    @property
    def nbytes(self) -> int:
        return 0 if self._state is None else nbytes_of(self._state.kind, *self._state.host) + self.nbytes_fetched

    @property
    def nbytes_fetched(self) -> int:
        """Those of them that are where the work is done."""
        fetched = None if self._state is None else self._state.fetched
        return 0 if fetched is None or self._state is None else nbytes_of(self._state.kind, *fetched)

    @untraced
    def append(self, k: Array, v: Array) -> None:
        function = self._named("append")
        kind, k, v = self._tokens(function, k, v, "bshd")
        batch, count = int(k.shape[0]), int(k.shape[1])
        state = self._state
        if state is not None and batch != state.host.k.shape[1]:
            rule = f"k has to have the cache's batch, {state.host.k.shape[1]}"
            raise ValueError(refusal(function, rule, ("k", tuple(k.shape))))
        if state is None:
            lane = _lane(function, kind)
            state = State(kind, lane, _moved(lane, kind, batch, max(SMALLEST, count), None), 0)
        lane, start, stop = state.lane, state.length, state.length + count
        lane.ready()  # or what is fetched might be on its way from where it is written to now
        host, fetched, place = _with_room(state, stop), state.fetched, _slots(start, stop)
        new = Fetched(*(_swapped(x) for x in (k, v)))
        host = Fetched(*(lane.save(a, place, b) for a, b in zip(host, new, strict=True)))
        if fetched is not None:
            if fetched.k.shape[0] < stop:
                fetched = None
            else:
                fetched = Fetched(*(kind.library.put(a, place, b) for a, b in zip(fetched, new, strict=True)))
        self._state = State(kind, lane, host, stop, fetched)

    @untraced
    def prefetch(self) -> None:
        """Start bringing the tokens to where the work is done; nothing waits.  `attend` does so if nobody else did."""
        self._known(self._named("prefetch"))
        self._state = self._brought()

    def _brought(self) -> State:
        """The state with tokens where the work is done, or on their way."""
        state = self._state
        assert state is not None
        if state.fetched is not None:
            return state
        shapes = ((state.length + SPARE, *x.shape[1:]) for x in state.host)
        empty = [state.kind.library.empty(shape, state.kind.anchor) for shape in shapes]
        return state._replace(fetched=Fetched(*state.lane.load(empty, _slots(0, state.length), list(state.live()))))

    def _keys(self, function: str, q: Array, options: Options) -> tuple[Array, Array, Options]:
        state = self._state = self._brought()
        assert state.fetched is not None
        state.lane.ready()
        k, v = (_swapped(x[_slots(0, state.length)]) for x in state.fetched)
        return k, v, options

    def _attended(self) -> None:
        if self._state is not None:
            self._state = self._state._replace(fetched=None)

    @untraced
    def truncate(self, length: int) -> None:
        length = reading.integer(self._named("truncate"), "length", length, low=0, high=len(self))
        if self._state is not None:
            self._state = self._state._replace(length=length)

    @untraced
    def reorder(self, sequences: Sequence[int] | Array) -> None:
        function = self._named("reorder")
        kind, state = self._known(function), self._state
        assert state is not None
        capacity, batch = state.host.k.shape[:2]
        chosen = integers(function, "sequences", sequences, low=0, high=batch - 1)
        state.lane.settle()
        picked = Fetched(*(_picked(x, chosen) for x in state.live()))
        self._state = state._replace(host=_moved(state.lane, kind, len(chosen), capacity, picked), fetched=None)


def _with_room(state: State, needed: int) -> Fetched:
    """The host's memory, or new memory with the same tokens, for as many as needed."""
    now, batch = state.host.k.shape[:2]
    if needed <= now:
        return state.host
    state.lane.settle()
    return _moved(state.lane, state.kind, batch, max(needed, now + now // 2), state.live())


def _moved(lane: Any, kind: Kind, batch: int, capacity: int, live: Fetched | None) -> Fetched:
    """New memory of the host, with the tokens so far at its start, which have to have arrived."""
    shapes = ((capacity, batch, *features) for features in (kind.features_k, kind.features_v))
    roomy = [lane.empty(shape, kind.anchor) for shape in shapes]
    if live is None:
        return Fetched(*roomy)
    place = _slots(0, int(live.k.shape[0]))
    return Fetched(*(lane.move(a, place, b) for a, b in zip(roomy, live, strict=True)))


def _lane(function: str, kind: Kind) -> Any:
    return HostLane(kind.library) if kind.place == "cpu" else cuda_lane(function, kind.library, kind.anchor)


def _slots(start: int, stop: int) -> tuple[Any, ...]:
    return slice(start, stop), Ellipsis


def _swapped(x: Array) -> Array:
    """Between (batch, seqlen, heads, dim) and (seqlen, batch, heads, dim), as a view where there are views."""
    return array_api_compat.array_namespace(x).permute_dims(x, (1, 0, 2, 3))


def _picked(x: Array, sequences: list[int]) -> Array:
    xp = array_api_compat.array_namespace(x)
    return xp.concat([x[:, i : i + 1, ...] for i in sequences], axis=1) if sequences else x[:, :0, ...]
