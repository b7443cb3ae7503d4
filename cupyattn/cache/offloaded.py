"""A cache on the host, whose tokens visit the GPU while they are used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import array_api_compat

from cupyattn import reading
from cupyattn.arrays import cuda_lane, untraced
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


class OffloadedCache(Cache):
    """A cache in memory of the host, growing as `DynamicCache` does; its tokens visit the GPU while they are used.

    `prefetch` starts their way there beside whatever the GPU is doing.  A decoder calls that of the next layer before
    it queues the work of this one, and then needs the memory of two layers instead of all::

        for layer, cache, following in zip(layers, caches, [*caches[1:], caches[0]]):
            following.prefetch()
            x = layer(x, cache)  # cache.append(k, v), cache.attend(q)

    Arrays on the CPU are copied as well, at once, so that programs are the same there.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lane: Any = None
        """What brings tokens to the host and back, from the first ones on."""
        self._host: Fetched | None = None
        """Tokens first, so that those of all sequences are one piece of memory to copy."""
        self._fetched: Fetched | None = None
        self._length = 0

    def _part(self) -> None:
        kind, host = self._kind, self._host
        if kind is not None and host is not None:
            if self._lane is not None:
                self._lane.settle()
            self._lane, self._fetched = _lane(type(self).__name__, kind), None
            self._host = self._moved(self._lane, kind, int(host.k.shape[1]), int(host.k.shape[0]), host)

    def __getstate__(self) -> dict[str, Any]:
        """For `pickle` and `copy.deepcopy`: what is on the host, once it is there."""
        if self._lane is not None:
            self._lane.settle()
        return {**vars(self), "_lane": None, "_fetched": None}

    def __len__(self) -> int:
        return self._length

    @property
    def lengths(self) -> tuple[int, ...]:
        return () if self._host is None else (self._length,) * int(self._host.k.shape[1])

    @property
    def nbytes(self) -> int:
        return 0 if self._host is None else nbytes_of(self._kind, *self._host) + self.nbytes_fetched

    @property
    def nbytes_fetched(self) -> int:
        """Those of them that are where the work is done."""
        return 0 if self._fetched is None else nbytes_of(self._kind, *self._fetched)

    @untraced
    def append(self, k: Array, v: Array) -> None:
        function = self._named("append")
        kind, k, v = self._tokens(function, k, v, "bshd")
        batch, count = int(k.shape[0]), int(k.shape[1])
        if self._host is not None and batch != self._host.k.shape[1]:
            rule = f"k has to have the cache's batch, {self._host.k.shape[1]}"
            raise ValueError(refusal(function, rule, ("k", tuple(k.shape))))
        lane = self._lane or _lane(function, kind)
        lane.ready()  # or what is fetched might be on its way from where it is written to now
        stop = self._length + count
        host = self._with_room(lane, kind, batch, stop)
        new = Fetched(*(_swapped(x) for x in (k, v)))
        host = Fetched(*(lane.save(a, _slots(self._length, stop), b) for a, b in zip(host, new, strict=True)))
        fetched = self._fetched
        if fetched is not None:
            if fetched.k.shape[0] < stop:
                fetched = None
            else:
                place = _slots(self._length, stop)
                fetched = Fetched(*(kind.library.put(a, place, b) for a, b in zip(fetched, new, strict=True)))
        self._kind, self._lane, self._host, self._fetched, self._length = kind, lane, host, fetched, stop

    def _with_room(self, lane: Any, kind: Kind, batch: int, needed: int) -> Fetched:
        """The host's memory, or new memory with the same tokens, for as many as needed."""
        host = self._host
        now = 0 if host is None else int(host.k.shape[0])
        if host is not None and needed <= now:
            return host
        if host is not None:
            lane.settle()
        return self._moved(lane, kind, batch, max(SMALLEST, needed, now + now // 2), host)

    def _moved(self, lane: Any, kind: Kind, batch: int, capacity: int, source: Fetched | None) -> Fetched:
        """New memory of the host, with the tokens so far of a source, which have to be there."""
        shapes = ((capacity, batch, *features) for features in (kind.features_k, kind.features_v))
        roomy = [lane.empty(shape, kind.anchor) for shape in shapes]
        if source is None:
            return Fetched(*roomy)
        live = _slots(0, self._length)
        return Fetched(*(lane.move(a, live, b[live]) for a, b in zip(roomy, source, strict=True)))

    @untraced
    def prefetch(self) -> None:
        """Start bringing the tokens to where the work is done; nothing waits.  `attend` does so if nobody else did."""
        function = self._named("prefetch")
        kind, host = self._known(function), self._host
        assert host is not None
        if self._fetched is not None:
            return
        shapes = ((self._length + SPARE, *x.shape[1:]) for x in host)
        empty = [kind.library.empty(shape, kind.anchor) for shape in shapes]
        live = _slots(0, self._length)
        self._fetched = Fetched(*self._lane.load(empty, live, [x[live] for x in host]))

    def _keys(self, function: str, q: Array, options: Options) -> tuple[Array, Array, Options]:
        self._known(function)
        self.prefetch()
        assert self._fetched is not None
        self._lane.ready()
        k, v = (_swapped(x[_slots(0, self._length)]) for x in self._fetched)
        return k, v, options

    def _attended(self) -> None:
        self._fetched = None

    @untraced
    def truncate(self, length: int) -> None:
        self._length = reading.integer(self._named("truncate"), "length", length, low=0, high=self._length)

    @untraced
    def reorder(self, sequences: Sequence[int] | Array) -> None:
        function = self._named("reorder")
        kind, host = self._known(function), self._host
        assert host is not None
        chosen = integers(function, "sequences", sequences, low=0, high=host.k.shape[1] - 1)
        self._lane.settle()
        live = _slots(0, self._length)
        picked = Fetched(*(_picked(x[live], chosen) for x in host))
        self._host = self._moved(self._lane, kind, len(chosen), int(host.k.shape[0]), picked)
        self._fetched = None


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
