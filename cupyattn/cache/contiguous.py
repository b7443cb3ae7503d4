"""Caches in one array for keys and one for values, (batch, capacity, num_heads_kv, head_dim).

The live tokens are one stretch of it, so that attention takes them as they are, and may start anywhere.  What a
cache decides is how large its arrays are, and which tokens come along when they are replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from cupyattn import reading
from cupyattn.arrays import untraced
from cupyattn.cache.protocol import Cache, Kind, integers, nbytes_of, rows_of
from cupyattn.problem import Array
from cupyattn.reading import Options, refusal

SMALLEST = 64
"""Tokens of the smallest array: below, growing would come too often."""


class Store(NamedTuple):
    """Keys and values, and the stretch of slots that is live."""

    kind: Kind
    k: Array
    v: Array
    start: int = 0
    stop: int = 0
    gone: int = 0
    """Tokens that have left."""

    @property
    def batch(self) -> int:
        return int(self.k.shape[0])

    @property
    def capacity(self) -> int:
        return int(self.k.shape[1])

    def live(self) -> tuple[Array, Array]:
        index = tokens(self.start, self.stop)
        return self.k[index], self.v[index]


def tokens(start: int, stop: int) -> tuple[Any, ...]:
    """The index of some slots of every sequence."""
    return slice(None), slice(start, stop), Ellipsis


def new_store(kind: Kind, batch: int, capacity: int) -> Store:
    k, v = (kind.library.empty((batch, capacity, *x), kind.anchor) for x in (kind.features_k, kind.features_v))
    return Store(kind, k, v)


def written(store: Store, k: Array, v: Array) -> Store:
    """The store with tokens after its live ones, for which there is room."""
    stop, put = store.stop + int(k.shape[1]), store.kind.library.put
    index = tokens(store.stop, stop)
    return store._replace(k=put(store.k, index, k), v=put(store.v, index, v), stop=stop)


class ContiguousCache(Cache):
    """What the caches below have in common."""

    _state: Store | None

    def _apart(self) -> Store | None:
        store = self._state
        if store is None:
            return None
        roomy = new_store(store.kind, store.batch, store.capacity)
        return written(roomy._replace(gone=store.gone), *store.live())

    def __len__(self) -> int:
        return 0 if self._state is None else self._state.gone + self._state.stop - self._state.start

    @property
    def lengths(self) -> tuple[int, ...]:
        return () if self._state is None else (len(self),) * self._state.batch

    @property
    def nbytes(self) -> int:
        return 0 if self._state is None else nbytes_of(self._state.kind, self._state.k, self._state.v)

    @property
    def capacity(self) -> int:
        """Tokens for which there is memory."""
        return 0 if self._state is None else self._state.capacity

    @untraced
    def append(self, k: Array, v: Array) -> None:
        function = self._named("append")
        kind, k, v = self._tokens(function, k, v, "bshd")
        batch, count = int(k.shape[0]), int(k.shape[1])
        store = self._state
        if store is not None and batch != store.batch:
            rule = f"k has to have the cache's batch, {store.batch}"
            raise ValueError(refusal(function, rule, ("k", tuple(k.shape))))
        self._state = written(self._with_room(function, kind, store, batch, count), k, v)

    def _with_room(self, function: str, kind: Kind, store: Store | None, batch: int, count: int) -> Store:
        """The store, or another one, that has room for `count` more tokens."""
        live = 0 if store is None else store.stop - store.start
        kept = self._kept(live)
        capacity = self._capacity(function, kept, count)
        if store is not None and store.stop + count <= store.capacity <= capacity:
            return store
        roomy = new_store(kind, batch, capacity)
        if store is None:
            return roomy
        roomy = roomy._replace(gone=store.gone + live - kept)
        return written(roomy, *store._replace(start=store.stop - kept).live())

    def _kept(self, live: int) -> int:
        """How many of the live tokens come along into another store."""
        return live

    def _capacity(self, function: str, kept: int, count: int) -> int:
        """Of a store for as many tokens and `count` more; one that is larger is replaced."""
        raise NotImplementedError

    @untraced
    def truncate(self, length: int) -> None:
        function = self._named("truncate")
        length = reading.integer(function, "length", length, low=0, high=len(self))
        store = self._state
        if store is not None:
            self._check_forgettable(function, length, store.gone)
            self._state = store._replace(stop=store.start + length - store.gone)

    def _check_forgettable(self, function: str, length: int, gone: int) -> None:
        """Refuse to take back what can not be."""

    @untraced
    def reorder(self, sequences: Sequence[int] | Array) -> None:
        function = self._named("reorder")
        kind, store = self._known(function), self._state
        assert store is not None
        chosen = integers(function, "sequences", sequences, low=0, high=store.batch - 1)
        index = np.asarray(chosen, np.int64)
        k, v = (kind.library.take(array, index) for array in store.live())
        fresh = new_store(kind, len(chosen), store.capacity)
        self._state = written(fresh._replace(gone=store.gone), k, v)

    def _keys(self, function: str, q: Array, options: Options) -> tuple[Array, Array, Options]:
        assert self._state is not None
        return *self._state.live(), options


class DynamicCache(ContiguousCache):
    """A cache that grows by half whenever it is full, so that a token is copied about twice, however many come.

    At most a third of its memory is unused.

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> cache = cupyattn.DynamicCache()
    >>> for _ in range(3):
    ...     q, k, v = np.ones((3, 2, 1, 4, 8), np.float32)  # (batch, seqlen, num_heads, head_dim)
    ...     cache.append(k, v)
    ...     out = cache.attend(q)
    >>> len(cache), out.shape
    (3, (2, 1, 4, 8))
    """

    def _capacity(self, function: str, kept: int, count: int) -> int:
        needed, now = kept + count, self.capacity
        return now if needed <= now else max(SMALLEST, needed, now + now // 2)


class StaticCache(ContiguousCache):
    """A cache of fixed capacity, whose memory stays where it is from the first tokens on, but for `reorder`.

    Parameters
    ----------
    capacity : int
        Tokens of each sequence.
    """

    @reading.in_our_words
    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._limit = reading.integer(type(self).__name__, "capacity", capacity, low=1)

    def _capacity(self, function: str, kept: int, count: int) -> int:
        if kept + count > self._limit:
            rule = f"no room for {count} more tokens"
            raise ValueError(refusal(function, rule, ("capacity", self._limit), ("tokens", kept)))
        return self._limit


class SlidingWindowCache(ContiguousCache):
    """The last `window` tokens alone, in memory that does not grow with the number of tokens.

    The live tokens slide through arrays somewhat longer than the window and are moved to the front when they reach the
    end: so they are always one stretch in order, attention reads them as they are, and a token is moved a few times
    at most.  Tokens appended at once are there until the next append, however many they are: a prompt may be
    longer than the window.

    Parameters
    ----------
    window : int
        Tokens that a query sees, its own included.
    rollback : int
        So many tokens can be taken back by `truncate`, from the most that there have been.  Those that were appended
        last always can.
    """

    @reading.in_our_words
    def __init__(self, window: int, *, rollback: int = 0) -> None:
        super().__init__()
        name = type(self).__name__
        self.window: int = reading.integer(name, "window", window, low=1)
        self._back = self.window - 1 + reading.integer(name, "rollback", rollback, low=0)
        self._room = max(SMALLEST, self._back // 4)

    def _kept(self, live: int) -> int:
        return min(live, self._back)

    def _capacity(self, function: str, kept: int, count: int) -> int:
        return max(self._back + self._room, kept + count)

    def _check_forgettable(self, function: str, length: int, gone: int) -> None:
        least = gone + self.window - 1 if gone else 0
        if length < least:
            rule = "some of the tokens that the next one would see have left the window"
            raise ValueError(refusal(function, rule, ("length", length), ("least", least), ("tokens", len(self))))

    def _keys(self, function: str, q: Array, options: Options) -> tuple[Array, Array, Options]:
        left, right = options.window
        farthest = self.window - 1
        if left is not None and left > farthest:
            rule = f"window_size reaches back farther than the cache, {farthest} tokens"
            raise ValueError(refusal(function, rule, ("window_size", options.window), ("window", self.window)))
        left = farthest if left is None else left
        k, v, options = super()._keys(function, q, options._replace(window=(left, right)))
        rows = rows_of(q)
        assert self._state is not None
        if self._state.gone > max(0, len(self) - rows - left):
            rule = f"the first of {rows} queries would see tokens that have left the window"
            raise ValueError(refusal(function, rule, ("q", tuple(q.shape)), ("tokens left", k.shape[1])))
        return k, v, options
