"""The caches of all layers of a decoder: tokens come layer by layer, all else happens to all of them at once."""

from __future__ import annotations

import copy
import reprlib
from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple, Self, TypeVar

from cupyattn import reading
from cupyattn.arrays import Sketches, untraced
from cupyattn.cache.contiguous import DynamicCache, SlidingWindowCache, StaticCache
from cupyattn.cache.offloaded import OffloadedCache
from cupyattn.cache.paged import PagedCache, sizes_of_pages
from cupyattn.cache.protocol import Cache, Kind, facts_of
from cupyattn.cache.schedules import Schedules
from cupyattn.problem import Array, Device
from cupyattn.reading import refusal

Layer = TypeVar("Layer", bound=Cache)


class State(NamedTuple):
    layers: tuple[Cache, ...]


class LayeredCache:
    """The keys and values of all layers of a decoder.

    Each layer has a cache of its own, which gets the layer's tokens by `update` and answers its queries in `attend`.
    Whatever changes sequences, `truncate`, `reorder` and so on, changes all layers, or none if it raises.  A step of
    the decoder that raised half way is taken back by ``truncate(len(cache))``, or by ``truncate(cache.lengths)`` where
    lengths differ.  Copies have memory of their own.

    On a GPU layers in pages share the schedule of a step, which says whose work is whose: it is made by the first of
    them that attends, on the same stream, and by each one for itself in a CUDA graph.

    Parameters
    ----------
    num_layers : int
        Layers of the decoder.
    make : callable, optional
        Called with the number of each layer, returns a new cache for it: layers need not be alike.
    capacity, window, num_pages : int, optional
        Instead: layers of `StaticCache` with so many tokens, of `SlidingWindowCache`, or of `PagedCache` with so many
        pages each.  Without any of these and `make`, layers are of `DynamicCache`.
    page_size : int, optional
        Tokens of a page, with `num_pages`; 64 if not given.

    Raises
    ------
    TypeError
        A number is not an integer, or `make` returns something else than a new cache.
    ValueError
        A number makes no sense, more than one of make, capacity, window and num_pages is given, or page_size without
        num_pages.

    Examples
    --------
    Every second layer has a window:

    >>> import numpy as np
    >>> from cupyattn import DynamicCache, LayeredCache, SlidingWindowCache
    >>> cache = LayeredCache(4, lambda layer: SlidingWindowCache(64) if layer % 2 else DynamicCache())
    >>> for _ in range(3):
    ...     for layer in range(cache.num_layers):
    ...         q, k, v = np.ones((3, 2, 1, 4, 8), np.float32)  # (batch, seqlen, num_heads, head_dim)
    ...         cache.update(k, v, layer)
    ...         out = cache.attend(q, layer)
    >>> cache.reorder([1, 1, 0])
    >>> cache.truncate(2)
    >>> cache.lengths, len(cache)
    ((2, 2, 2), 2)
    """

    # As of `Cache`: what it is, is one value, and what happens to several layers is put in place by one assignment.
    # Layers are changed in copies that share their memory, of which only the one or the other goes on.

    @reading.in_our_words
    def __init__(
        self,
        num_layers: int,
        make: Callable[[int], Cache] | None = None,
        *,
        capacity: int | None = None,
        window: int | None = None,
        num_pages: int | None = None,
        page_size: int | None = None,
    ) -> None:
        name = type(self).__name__
        count = reading.integer(name, "num_layers", num_layers, low=1, high=reading.LARGEST_SIZE)
        ways = {"make": make, "capacity": capacity, "window": window, "num_pages": num_pages}
        given = [way for way, value in ways.items() if value is not None]
        if len(given) > 1:
            rule = f"one of {', '.join(ways)} says what the layers are"
            raise ValueError(refusal(name, rule, ("given", " and ".join(given))))
        if page_size is not None and num_pages is None:
            raise ValueError(refusal(name, "page_size goes with num_pages", ("page_size", reprlib.repr(page_size))))
        if make is not None and not callable(make):
            rule = "make has to be callable with the number of a layer"
            raise TypeError(refusal(name, rule, ("make", reprlib.repr(make), type(make).__name__)))
        if make is None:
            make = _maker(name, capacity, window, num_pages, 64 if page_size is None else page_size)
        self._new = tuple(_checked(name, layer, make(layer)) for layer in range(count))
        """Layers without tokens."""
        self._schedules = Schedules()
        for number, layer in enumerate(self._new):
            layer._layer = (name, number)
            if isinstance(layer, PagedCache):
                layer._schedules = self._schedules
        self._state: Any = State(self._as_new())

    def _as_new(self) -> tuple[Cache, ...]:
        return tuple(copy.copy(layer) for layer in self._new)

    @untraced
    def __copy__(self) -> Self:
        twin = object.__new__(type(self))
        vars(twin).update(vars(self))
        twin._state = self._state._replace(layers=tuple(copy.copy(layer) for layer in self._state.layers))
        return twin

    @property
    def _kind(self) -> Kind | None:
        """That of the first layer's tokens: all of them are at one place."""
        return self._state.layers[0]._kind  # type: ignore[no-any-return]

    @property
    def _about_schedules(self) -> str:
        """What `explain` says of calls that have one."""
        count = sum(isinstance(layer, PagedCache) for layer in self._state.layers)
        return f"its schedule is made once in a step for all layers that are asked alike, of {count} in pages"

    def _sketched(self, device: Device, library: Sketches) -> Self:
        """A twin of sketches, as of `Cache`."""
        twin = object.__new__(type(self))
        vars(twin).update(vars(self))
        layers = tuple(layer._sketched(device, library) for layer in self._state.layers)
        twin._state = self._state._replace(layers=layers)
        return twin

    def __len__(self) -> int:
        """Tokens that all layers have, of the longest sequence."""
        return max(self.lengths, default=0)

    @property
    def num_layers(self) -> int:
        return len(self._state.layers)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence that all layers have: fewer than in the first layer while a step is under way."""
        return tuple(map(min, zip_longest(*(layer.lengths for layer in self._state.layers), fillvalue=0)))

    @property
    def nbytes(self) -> int:
        """Bytes of all memory that is held, used or not."""
        return sum(layer.nbytes for layer in self._state.layers)

    @reading.in_our_words
    def get_seq_length(self, layer: int = 0) -> int:
        """Tokens of the longest sequence in a layer, under the name that transformers has for it."""
        return len(self._state.layers[self._number("get_seq_length", layer)])

    @untraced
    def update(self, k: Array, v: Array, layer: int, seqlens: Sequence[int] | Array | None = None) -> None:
        """Add tokens to the end of every sequence in one layer, as `Cache.append` does.

        An `OffloadedCache` of the layer after it is on its way to where the work is done meanwhile.

        Parameters
        ----------
        k, v : array, shapes (batch, seqlen, num_heads_kv, head_dim), (batch, seqlen, num_heads_v, head_dim_v)
            Copied; where the layer is a `PagedCache` also packed, (tokens, num_heads_kv, head_dim).
        layer : int
            From 0 on.
        seqlens : sequence of int, or array of int, shape (batch,), optional
            New tokens of each sequence, if packed.

        Raises
        ------
        TypeError, ValueError
            As `Cache.append`; there is no such layer, or seqlens are given and its tokens are not in pages.
        """
        number = self._number("update", layer)
        cache, following = (self._state.layers[i % self.num_layers] for i in (number, number + 1))
        packed = self._packed("update", cache, seqlens)
        if isinstance(following, OffloadedCache) and following.lengths:
            following.prefetch()
        cache.append(k, v, **packed)

    @untraced
    def attend(self, q: Array, layer: int, seqlens: Sequence[int] | Array | None = None, **options: Any) -> Any:
        """Attention of the last tokens' queries over all tokens of a layer.

        Parameters
        ----------
        q : array, shape (batch, seqlen_q, num_heads, head_dim)
            Of the last seqlen_q tokens; where the layer is a `PagedCache` also packed, (rows, num_heads, head_dim).
        layer : int
            From 0 on.
        seqlens : sequence of int, or array of int, shape (batch,), optional
            Rows of each sequence, if packed.
        **options
            As for `Cache.attend`, or `PagedCache.attend`.

        Returns
        -------
        out : array, shape (batch, seqlen_q, num_heads, head_dim_v), or (rows, num_heads, head_dim_v)
        lse : array, shape (batch, num_heads, seqlen_q), or (num_heads, rows), only with ``return_lse=True``

        Raises
        ------
        TypeError, ValueError, NotImplementedError
            As `Cache.attend`; there is no such layer, or seqlens are given and its tokens are not in pages.
        """
        cache = self._state.layers[self._number("attend", layer)]
        return cache.attend(q, **self._packed("attend", cache, seqlens), **options)

    @untraced
    def truncate(self, length: int | Sequence[int] | Array) -> None:
        """Forget all tokens after the first `length` in all layers, as `Cache.truncate` does.

        Parameters
        ----------
        length : int, or sequence or array of int, shape (batch,)
            Of every sequence; of each only where all layers are of `PagedCache`.

        Raises
        ------
        TypeError, ValueError
            As `Cache.truncate`, in any of the layers.
        """
        self._change(lambda layer: layer.truncate(length))  # type: ignore[arg-type]

    @untraced
    def reorder(self, sequences: Sequence[int] | Array) -> None:
        """Let sequence ``i`` go on as a copy of what ``sequences[i]`` was, in all layers."""
        self._change(lambda layer: layer.reorder(sequences))

    @untraced
    def reset(self) -> None:
        """Let all layers be as new: other sequences, of another library or dtype, may come.  Memory is given back."""
        self._state = self._state._replace(layers=self._as_new())
        self._schedules.forget()

    @untraced
    def fork(self, sequence: int) -> int:
        """Let a new sequence go on from what `sequence` is, in layers that are all of `PagedCache`; its number."""
        number: int = self._change_pages("fork", lambda layer: layer.fork(sequence))
        return number

    @untraced
    def add_sequence(self) -> int:
        """Let a new sequence start without tokens, in layers that are all of `PagedCache`; its number."""
        number: int = self._change_pages("add_sequence", lambda layer: layer.add_sequence())
        return number

    @untraced
    def remove(self, sequence: int) -> None:
        """Let a sequence leave, in layers that are all of `PagedCache`; those after it are one number lower."""
        self._change_pages("remove", lambda layer: layer.remove(sequence))

    def _change(self, change: Callable[[Cache], Any]) -> Any:
        """Change all layers, or none; what the change of the last one returned."""
        layers, found = changed(self._state.layers, change)
        self._state = self._state._replace(layers=layers)
        return found[-1]

    def _change_pages(self, method: str, change: Callable[[PagedCache], Any]) -> Any:
        for number, layer in enumerate(self._state.layers):
            if not isinstance(layer, PagedCache):
                rule = "sequences come and go where all layers are of PagedCache"
                raise TypeError(refusal(self._named(method), rule, (f"layer {number}", type(layer).__name__)))
        return self._change(change)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        layers = self._state.layers
        kinds = " and ".join(dict.fromkeys(type(layer).__name__ for layer in layers))
        kind = self._kind
        facts = ["empty"] if kind is None else [*facts_of(self.lengths, kind), f"{self.nbytes} bytes"]
        return f"<{type(self).__name__}: {', '.join([f'{len(layers)} layers of {kinds}', *facts])}>"

    def _named(self, method: str) -> str:
        """What errors call a method."""
        return f"{type(self).__name__}.{method}"

    def _number(self, method: str, layer: int) -> int:
        return reading.integer(self._named(method), "layer", layer, low=0, high=self.num_layers - 1)

    def _packed(self, method: str, cache: Cache, seqlens: Any) -> dict[str, Any]:
        if seqlens is None:
            return {}
        if not isinstance(cache, PagedCache):
            rule = "seqlens are for layers of PagedCache, whose sequences may differ in length"
            raise TypeError(refusal(self._named(method), rule, ("layer", type(cache).__name__)))
        return {"seqlens": seqlens}


def _maker(
    name: str, capacity: int | None, window: int | None, num_pages: int | None, page_size: int
) -> Callable[[int], Cache]:
    make: Callable[[], Cache] = DynamicCache
    if capacity is not None:
        make = partial(StaticCache, reading.integer(name, "capacity", capacity, low=1))
    if window is not None:
        make = partial(SlidingWindowCache, reading.integer(name, "window", window, low=1))
    if num_pages is not None:
        make = partial(PagedCache, *sizes_of_pages(name, num_pages, page_size))
    return lambda layer: make()


def _checked(name: str, layer: int, cache: Any) -> Cache:
    """A layer's cache, in memory of its own."""
    rule = "make has to return a new cache of one layer, without tokens"
    if not isinstance(cache, Cache):
        raise TypeError(refusal(name, rule, (f"make({layer})", reprlib.repr(cache), type(cache).__name__)))
    if cache.lengths:
        raise ValueError(refusal(name, rule, (f"make({layer})", type(cache).__name__), ("lengths", cache.lengths)))
    return copy.copy(cache)


def changed(layers: Sequence[Layer], change: Callable[[Layer], Any]) -> tuple[tuple[Layer, ...], list[Any]]:
    """Other layers in the same memory, and what the change of each returned."""
    twins = []
    for layer in layers:
        twin = object.__new__(type(layer))
        vars(twin).update(vars(layer))
        twins.append(twin)
    return tuple(twins), [change(twin) for twin in twins]
