"""Requests that begin with the same tokens share the pages of these, also with requests that are gone."""

from __future__ import annotations

import reprlib
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from cupyattn import reading
from cupyattn.arrays import untraced
from cupyattn.cache.layered import LayeredCache, changed
from cupyattn.cache.paged import PagedCache
from cupyattn.cache.pages import NoPagesError, Pages, Table
from cupyattn.cache.protocol import integers
from cupyattn.cache.tree import Tree
from cupyattn.problem import Array
from cupyattn.reading import refusal


class State(NamedTuple):
    layers: tuple[PagedCache, ...]
    tree: Tree
    locks: dict[int, Array]
    """Pages that stay, (layers, pages), by the number of the lock."""
    num_locks: int = 0
    """So far."""


class PrefixCache(LayeredCache):
    """A cache of all layers that remembers what it has computed, by the ids of the tokens.

    A request begins with `start`, which finds how many of its first tokens are there already: their keys and values
    are shared, and only the others have to go through the decoder.  `insert` leaves those of a request to others, and
    `remove` ends it.  What is shared is whole pages, and the last token of a request is always left to be computed, for
    its logits.  A page is the same bits, whoever reads it, so that sharing changes a result no more than a batch of
    another size would: not at all, but for the last bits of float64.

    What is remembered takes pages that nobody else needs.  Where `update` needs one and none is free, what was used
    longest ago is forgotten; pages of requests that are running, or that are locked, stay.  Each change copies the
    tree's index: about 0.1 ms for a thousand sequences that are remembered.

    Parameters
    ----------
    num_layers : int
        Layers of the decoder.
    num_pages : int
        Pages of each layer.
    page_size : int
        Tokens of a page.
    capacity : int, optional
        Pages of each layer that are remembered, at most.  Default all.

    Raises
    ------
    TypeError, ValueError
        As `LayeredCache`.

    Notes
    -----
    Keys and values are functions of all ids before them and of the model.  What else they depend on, an adapter (LoRA)
    or an image, has to be told apart by `namespace`, which is compared like a key of a dictionary.

    The tree is that of SGLang (Zheng et al., "SGLang: Efficient Execution of Structured Language Model Programs",
    section 3), kept in pages as those of vLLM (Kwon et al., "Efficient Memory Management for Large Language Model
    Serving with PagedAttention", section 4).

    Examples
    --------
    >>> import numpy as np
    >>> from cupyattn import PrefixCache
    >>> cache = PrefixCache(num_layers=2, num_pages=16, page_size=4)
    >>> def compute(tokens):
    ...     sequence, length = cache.start(tokens)
    ...     new = np.ones((len(tokens) - length, 1, 8), np.float32)  # what a decoder would make of tokens[length:]
    ...     seqlens = [0] * sequence + [len(new)]
    ...     for layer in range(cache.num_layers):
    ...         cache.update(new, new, layer, seqlens)
    ...         out = cache.attend(new, layer, seqlens)
    ...     cache.insert(tokens, sequence)
    ...     cache.remove(sequence)
    ...     return length
    >>> compute([*range(10)]), compute([*range(10)]), compute([0, 1, 2, 3, 99, 98])
    (0, 8, 4)
    """

    @reading.in_our_words
    def __init__(self, num_layers: int, num_pages: int, page_size: int = 64, *, capacity: int | None = None) -> None:
        super().__init__(num_layers, num_pages=num_pages, page_size=page_size)
        layers = self._state.layers
        self._num_pages = layers[0].num_free_pages
        most = self._num_pages
        if capacity is not None:
            most = reading.integer(type(self).__name__, "capacity", capacity, low=0, high=most)
        self._capacity = most
        self._state = State(layers, Tree.new(layers[0].page_size), {})

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        size: int = self._state.tree.page_size
        return size

    @property
    def num_free_pages(self) -> int:
        """Pages that are neither a sequence's nor remembered; of the layer that has fewest."""
        free: int = min(layer.num_free_pages for layer in self._state.layers)
        return free

    @property
    def num_cached_pages(self) -> int:
        """Pages of each layer that are remembered, shared with sequences or not."""
        pages: int = self._state.tree.num_pages
        return pages

    @reading.in_our_words
    def match(self, tokens: Sequence[int] | Array, namespace: Hashable = None) -> int:
        """How many tokens `start` would find; nothing changes, and nothing counts as used.

        Parameters
        ----------
        tokens : sequence of int, or array of int, shape (seqlen,)
            Ids of a request's tokens.
        namespace : hashable
            Other namespaces share nothing with this one.

        Raises
        ------
        TypeError, ValueError
            Ids are not integers from 0 on, or the namespace has no hash.
        """
        path = self._path("match", tokens, namespace)
        return self.page_size * sum(count for _, count in path)

    @untraced
    def start(self, tokens: Sequence[int] | Array, namespace: Hashable = None) -> tuple[int, int]:
        """Let a new sequence begin with those of its tokens that are remembered.

        Parameters
        ----------
        tokens, namespace
            As for `match`.

        Returns
        -------
        sequence : int
            Its number, as of `add_sequence`.
        length : int
            Tokens that it has; the decoder goes on with ``tokens[length:]``, of which there is at least one if there
            are tokens.

        Raises
        ------
        TypeError, ValueError
            As `match`.
        """
        path, number = self._path("start", tokens, namespace), len(self.lengths)
        pages = self._state.tree.pages(path, self.num_layers)
        layers = self._with_pages(Pages.begun, pages)
        self._state = self._state._replace(layers=layers, tree=self._state.tree.touched(path))
        return number, pages.shape[1] * self.page_size

    @untraced
    def insert(self, tokens: Sequence[int] | Array, sequence: int, namespace: Hashable = None) -> int:
        """Remember the first tokens of a sequence, all of which have been computed, for others to begin with.

        Parameters
        ----------
        tokens : sequence of int, or array of int, shape (seqlen,)
            Ids of the sequence's first tokens; those of a page that is not full are left out.  They have to be the ids
            from which its keys and values were computed: nothing here could tell.
        sequence : int
            Its number.
        namespace : hashable
            As for `match`.

        Returns
        -------
        int
            How many of the tokens are remembered now: fewer where `capacity` does not suffice.

        Raises
        ------
        TypeError, ValueError
            As `match`; there is no such sequence, or a layer has not all of these tokens yet.
        """
        function, lengths = self._named("insert"), self.lengths
        ids = _ids(function, tokens)
        number = reading.integer(function, "sequence", sequence, low=0, high=len(lengths) - 1)
        if ids.size > lengths[number]:
            rule = f"tokens have to be in all layers, which have {lengths[number]} of sequence {number}"
            raise ValueError(refusal(function, rule, ("tokens", (ids.size,))))
        state: State = self._state
        size, tree, layers = self.page_size, state.tree, state.layers
        ids = ids[: ids.size // size * size]
        path = tree.path(_namespace(function, namespace), ids)
        known, wanted = sum(count for _, count in path), int(ids.size) // size
        over = tree.num_pages + wanted - known - self._capacity
        if over > 0:
            tree, gone = tree.evicted(over, self._idle, {number for number, _ in path})
            layers = self._with_pages(Pages.released, gone)
            wanted = max(known, wanted - over + int(gone.shape[1]))
        pages = np.array([layer._pages.tables[number][:wanted] for layer in layers], np.int64)
        tree = tree.inserted(namespace, ids[: wanted * size], pages)
        layers = self._with_pages(Pages.held, pages[:, known:], layers)
        self._state = self._state._replace(layers=layers, tree=tree)
        return wanted * size

    @untraced
    def evict(self, num_pages: int) -> int:
        """Forget what was used longest ago, until so many pages of each layer are free that were not.

        Returns
        -------
        int
            How many there are: fewer where all others belong to running sequences, or are locked.

        Raises
        ------
        TypeError, ValueError
            Not an integer, or below 0.
        """
        count = reading.integer(self._named("evict"), "num_pages", num_pages, low=0)
        tree, gone = self._state.tree.evicted(count, self._idle)
        self._state = self._state._replace(layers=self._with_pages(Pages.released, gone), tree=tree)
        return int(gone.shape[1])

    @untraced
    def lock(self, tokens: Sequence[int] | Array, namespace: Hashable = None) -> int:
        """Keep those of these tokens that are remembered, whatever has to go, until `unlock`.

        Parameters
        ----------
        tokens, namespace
            As for `match`, the last token included.

        Returns
        -------
        int
            What `unlock` takes.

        Raises
        ------
        TypeError, ValueError
            As `match`.
        """
        path = self._path("lock", tokens, namespace, left=0)
        number: int = self._state.num_locks
        pages = self._state.tree.pages(path, self.num_layers)
        locks = {**self._state.locks, number: pages}
        self._state = State(self._with_pages(Pages.held, pages), self._state.tree.touched(path), locks, number + 1)
        return number

    @untraced
    def unlock(self, lock: int) -> None:
        """Let what `lock` kept go its way; the lock is gone.

        Raises
        ------
        TypeError, ValueError
            Not an integer, or not the number of a lock.
        """
        function = self._named("unlock")
        number = reading.integer(function, "lock", lock, low=0)
        locks = dict(self._state.locks)
        if number not in locks:
            raise ValueError(refusal(function, "lock has to be what lock returned, once", ("lock", number)))
        layers = self._with_pages(Pages.released, locks.pop(number))
        self._state = self._state._replace(layers=layers, locks=locks)

    @reading.in_our_words
    def update(self, k: Array, v: Array, layer: int, seqlens: Sequence[int] | Array | None = None) -> None:
        """Add tokens in one layer, as `LayeredCache.update` does; where pages are wanting, what is remembered goes.

        What was used longest ago goes first, and nothing if all of it would not suffice.  What has gone stays gone if
        the call is interrupted afterwards.

        Raises
        ------
        TypeError, ValueError
            As `LayeredCache.update`.
        """
        try:
            super().update(k, v, layer, seqlens)
        except NoPagesError as error:
            tree, gone = self._state.tree.evicted(error.missing, self._idle)
            if gone.shape[1] < error.missing:
                raise
            self._state = self._state._replace(layers=self._with_pages(Pages.released, gone), tree=tree)
        else:
            return
        super().update(k, v, layer, seqlens)

    @untraced
    def reset(self) -> None:
        """Let all layers be as new: nothing is remembered, nor locked.  Memory is given back."""
        layers: Any = self._as_new()
        self._state = State(layers, Tree.new(self.page_size), {}, self._state.num_locks)
        self._schedules.forget()

    def _path(self, method: str, tokens: Any, namespace: Hashable, left: int = 1) -> list[tuple[int, int]]:
        """Where the first tokens are in the tree; so many at the end are left out."""
        function = self._named(method)
        ids = _ids(function, tokens)
        whole = max(0, ids.size - left) // self.page_size * self.page_size
        path: list[tuple[int, int]] = self._state.tree.path(_namespace(function, namespace), ids[:whole])
        return path

    def _idle(self, pages: Array) -> Array:
        """Whether nobody but the tree has pages, (layers, pages), in any layer."""
        counts = [layer._pages.references[own] for layer, own in zip(self._state.layers, pages, strict=True)]
        idle: Array = np.max(counts, axis=0) == 1
        return idle

    def _with_pages(self, change: Any, pages: Array, layers: Sequence[PagedCache] | None = None) -> Any:
        """The layers after a change of each with its own of these pages."""
        tables: list[Table] = [tuple(own) for own in pages.tolist()]

        def of_one(layer: PagedCache) -> None:
            layer._go_on(change(layer._pages, tables.pop(0)))

        return changed(self._state.layers if layers is None else layers, of_one)[0] if tables else self._state.layers


def _ids(function: str, tokens: Any) -> Array:
    """Looked at one by one only where something is wrong with them."""
    plain = isinstance(tokens, (list, tuple)) and all(type(token) is int for token in tokens)
    ids = np.array(tokens) if plain and tokens else tokens
    if isinstance(ids, np.ndarray) and ids.ndim == 1 and ids.size and ids.dtype.kind in "iu":
        if 0 <= ids.min() <= ids.max() <= reading.LARGEST_SIZE:
            return ids.astype(np.int64)
        tokens = ids.tolist()
    return np.array(integers(function, "tokens", tokens, low=0, high=reading.LARGEST_SIZE), np.int64)


def _namespace(function: str, namespace: Any) -> Hashable:
    try:
        hash(namespace)
    except TypeError:
        rule = "namespace has to be hashable, a word or a number"
        came = ("namespace", reprlib.repr(namespace), type(namespace).__name__)
        raise TypeError(refusal(function, rule, came)) from None
    return namespace  # type: ignore[no-any-return]
