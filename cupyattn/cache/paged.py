"""A cache in pages, for sequences of different lengths that may have beginnings in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from cupyattn import reading
from cupyattn.arrays import Sketch, enter, untraced
from cupyattn.cache.pages import NoPagesError, Pages
from cupyattn.cache.protocol import Cache, Kind, attend_options, check_rows, integers, nbytes_of, own
from cupyattn.cache.rows import axes_of, packed, shaped
from cupyattn.cache.schedules import Schedules
from cupyattn.corridor import Named, answer
from cupyattn.parts import Part, answer_in_parts
from cupyattn.problem import FLOAT8, Array, Shape
from cupyattn.reading import Options, refusal


class State(NamedTuple):
    """Pages, and the arrays that are in them."""

    pages: Pages
    kind: Kind | None = None
    k: Array | None = None
    v: Array | None = None
    table: Array | None = None
    """block_table at the arrays' home; None: has to be made anew."""


class PagedCache(Cache):
    """A cache in pages: sequences may differ in length, and forks share what they have in common.

    The first tokens appended say how many sequences there are; `fork`, `add_sequence`, `remove` and `reorder` change
    that.
    A page is copied when a sequence writes into one that it shares, so that a fork costs at most a page of memory.

    Parameters
    ----------
    num_pages : int
        Pages of all sequences together; their memory is asked for with the first tokens.
    page_size : int
        Tokens in a page.

    Examples
    --------
    >>> import numpy as np, cupyattn
    >>> cache = cupyattn.PagedCache(num_pages=8, page_size=4)
    >>> prompts = np.ones((5, 2, 16), np.float32)  # of three and of two tokens, packed
    >>> cache.append(prompts, prompts, seqlens=[3, 2])
    >>> cache.fork(0)
    2
    >>> cache.lengths, cache.num_free_pages
    ((3, 2, 3), 6)
    >>> cache.remove(1)  # the fork is sequence 1 from now on
    >>> cache.lengths, cache.num_free_pages
    ((3, 3), 7)
    """

    _about_schedules = "its schedule is made once for calls of the same lengths; LayeredCache shares it among layers"

    @reading.in_our_words
    def __init__(self, num_pages: int, page_size: int = 64) -> None:
        super().__init__()
        num_pages, page_size = sizes_of_pages(type(self).__name__, num_pages, page_size)
        self._num_pages = num_pages
        self._state: State = State(Pages.new(num_pages, page_size))
        self._schedules = Schedules()

    def _facts(self) -> list[str]:
        return [*super()._facts(), f"{self.num_free_pages} of {self._num_pages} pages free"]

    def _apart(self) -> State:
        pages, kind = self._state.pages.apart(), self._state.kind
        if kind is None:
            return State(pages)
        k, v = (own(kind, array) for array in (self._state.k, self._state.v))
        return self._state._replace(pages=pages, k=k, v=v)

    def _state_over(self, kind: Kind, sketch: Callable[[Array], Sketch]) -> State:
        return super()._state_over(kind, sketch)._replace(table=None)  # type: ignore[no-any-return]

    @property
    def _pages(self) -> Pages:
        return self._state.pages

    def __len__(self) -> int:
        return max(self._pages.lengths, default=0)

    @property
    def lengths(self) -> tuple[int, ...]:
        return self._pages.lengths

    @property
    def page_size(self) -> int:
        """Tokens in a page."""
        return self._pages.page_size

    @property
    def num_free_pages(self) -> int:
        """Pages that no sequence has."""
        return self._pages.num_free

    @property
    def nbytes(self) -> int:
        _, kind, k, v, _ = self._state
        return 0 if kind is None else nbytes_of(kind, k, v)

    @untraced
    def append(self, k: Array, v: Array, seqlens: Sequence[int] | Array | None = None) -> None:
        """Add tokens to the end of sequences.

        Parameters
        ----------
        k, v : array, shapes (batch, seqlen, num_heads_kv, head_dim), (batch, seqlen, num_heads_v, head_dim_v)
            As many for every sequence; or packed one sequence after the other, (tokens, num_heads_kv, head_dim).
        seqlens : sequence of int, or array of int, shape (batch,), optional
            New tokens of each sequence, if packed; 0 is one of them.

        Raises
        ------
        TypeError, ValueError
            As `Cache.append`; the pages do not suffice, or seqlens do not sum up to the tokens.
        """
        function = self._named("append")
        kind, k, v = self._tokens(function, k, v, *axes_of("k and v", seqlens))
        counts = self._counts(function, "k", tuple(k.shape), seqlens)
        pages, _, held_k, held_v, table = self._state
        if pages.lengths and len(counts) != len(pages.lengths):
            rule = f"tokens have to be for {len(pages.lengths)} sequences"
            shown = ("seqlens", counts) if seqlens is not None else ("k", tuple(k.shape))
            raise ValueError(refusal(function, rule, shown))
        try:
            growth = pages.growth(counts)
        except NoPagesError as error:
            shown_lengths = reading.short(list(pages.lengths))
            came = (("seqlens", reading.short(counts)), ("lengths", shown_lengths), ("num_pages", self._num_pages))
            raise NoPagesError(refusal(function, str(error), *came), error.missing) from None
        places = kind.library.places(growth.places, kind.anchor)
        written = []
        for held, new, features in ((held_k, k, kind.features_k), (held_v, v, kind.features_v)):
            if held is None:
                held = kind.library.empty((self._num_pages, pages.page_size, *features), kind.anchor)
            for source, target in growth.copied:
                whole = (slice(target, target + 1), Ellipsis)
                held = kind.library.put(held, whole, held[source : source + 1, ...])
            written.append(kind.library.scatter(held, places, packed(new)))
        if growth.taken or len(counts) != len(pages.lengths):
            table = None
        new_k, new_v = written
        self._state = State(pages.grown(growth), kind, new_k, new_v, table)

    def _counts(self, function: str, name: str, shape: Shape, seqlens: Sequence[int] | Array | None) -> list[int]:
        """New tokens, or rows, of each sequence."""
        if seqlens is None:
            return [shape[1]] * shape[0]
        counts = integers(function, "seqlens", seqlens, low=0, high=reading.LARGEST_SIZE)
        if sum(counts) != shape[0]:
            rule = f"seqlens have to sum up to the tokens of {name}, {shape[0]}"
            raise ValueError(refusal(function, rule, ("seqlens", reading.short(counts)), (name, shape)))
        return counts

    @untraced
    def attend(
        self,
        q: Array,
        seqlens: Sequence[int] | Array | None = None,
        *,
        cascade: bool = False,
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
        """Attention of the last tokens' queries over all tokens of their sequence.

        Parameters
        ----------
        q : array, shape (batch, seqlen_q, num_heads, head_dim)
            Of the last seqlen_q tokens of each sequence; or packed, (rows, num_heads, head_dim).
        seqlens : sequence of int, or array of int, shape (batch,), optional
            Rows of each sequence, if packed.
        cascade : bool
            Read the pages that are the same at the start of all sequences once for all of them, and not once for each
            (see `cascade_attention`).  Not together with a window to the left, ALiBi, fixed_split_size or float8.
        others
            As for `Cache.attend`.

        Returns
        -------
        out : array, shape (batch, seqlen_q, num_heads, head_dim_v), or (rows, num_heads, head_dim_v)
        lse : array, shape (batch, num_heads, seqlen_q), or (num_heads, rows), only if `return_lse`

        Raises
        ------
        TypeError, ValueError, NotImplementedError
            As `flash_attn_varlen_func`; also if q has not as many sequences as the cache.
        """
        function = self._named("attend")
        options = attend_options(function, causal, window_size, softmax_scale, softcap, compute_dtype, return_lse)
        size = reading.split_size(function, fixed_split_size)
        shares = reading.flag(function, "cascade", cascade)
        kind = self._known(function)
        shape = dict(enter(function, {"q": ("q", q), "kept": ("the cache", kind.anchor)}).specs)["q"].shape
        axes, otherwise = axes_of("q", seqlens)
        rank = 4 if seqlens is None else 3
        if len(shape) != rank:
            rule = f"q has to have {rank} axes, {reading.AXES[axes]}{otherwise}"
            raise ValueError(refusal(function, rule, ("q", shape)))
        rows = self._counts(function, "q", shape, seqlens)
        if len(rows) != len(self._pages.lengths):
            rule = f"q has to be of {len(self._pages.lengths)} sequences"
            raise ValueError(refusal(function, rule, ("q", shape), ("sequences", len(rows))))
        check_rows(function, q, rows, self._pages.lengths)
        edits = {
            "alibi_slopes": ("alibi_slopes", alibi_slopes),
            "sinks": ("sinks", sinks),
            "q_descale": ("q_descale", q_descale),
            "k_descale": ("k_descale", k_descale),
            "v_descale": ("v_descale", v_descale),
        }
        rows_of_all = packed(q) if seqlens is None else q
        if shares:
            if options.window[0] is not None or alibi_slopes is not None or size is not None:
                rule = "cascade goes with neither a window to the left, nor alibi_slopes, nor fixed_split_size"
                raise ValueError(refusal(function, rule, ("window_size", window_size)))
            if kind.dtype == FLOAT8:
                rule = f"cascade does not go with tokens of {FLOAT8}, whose descales are those of each sequence"
                raise ValueError(refusal(function, rule, ("cascade", cascade)))
            parts = self._parts(kind, rows_of_all, rows, options, edits)
            found = answer_in_parts(function, parts, needs_lse=options.needs_lse)
        else:
            whole = self._whole(kind, rows_of_all, rows, options, edits)
            found = answer(function, whole.named, whole.options, None, size, shared=whole.shared)
        return shaped(found, shape, return_lse)

    def _whole(self, kind: Kind, q: Array, rows: list[int], options: Options, edits: Named) -> Part:
        """Arrays and options of all queries over all tokens."""
        return self._over(kind, q, rows, self._pages.lengths, 0, options, edits)

    def _parts(self, kind: Kind, q: Array, rows: list[int], options: Options, edits: Named) -> list[Part]:
        """The same, for the pages after those that all sequences share and for these."""
        seen_by_all = [length - count for length, count in zip(self._pages.lengths, rows, strict=True)]
        pages = min(self._pages.num_shared(), min(seen_by_all, default=0) // self.page_size)
        if pages < 1:
            return [self._whole(kind, q, rows, options, edits)]
        shared = pages * self.page_size
        tails = [length - shared for length in self._pages.lengths]
        over_all = options._replace(causal=False, window=(None, None))
        return [
            self._over(kind, q, rows, tails, pages, options, edits),
            self._over(kind, q, [sum(rows)], [shared], 0, over_all, {}),
        ]

    def _over(
        self,
        kind: Kind,
        q: Array,
        rows: list[int],
        lengths: Sequence[int],
        first: int,
        options: Options,
        edits: Named,
    ) -> Part:
        """Of so many rows and tokens of each sequence, whose pages start in a column of the block table."""
        table = self._block_table(kind)[: len(rows), first:]
        named: Named = {
            "q": ("q", q),
            "k": ("k", self._state.k),
            "v": ("v", self._state.v),
            **edits,
            "cu_seqlens_q": ("cu_seqlens_q", _starts(kind, rows)),
            "cu_seqlens_k": ("cu_seqlens_k", _starts(kind, lengths)),
            "block_table": ("block_table", table),
        }
        # in whole pages: the problem, and what is remembered of it, stays the same for page_size tokens
        longest = math.ceil(max(lengths, default=0) / self.page_size) * self.page_size
        options = options._replace(axes="thd", max_seqlen_q=max(rows, default=0), max_seqlen_k=longest)
        return Part(named, options, partial(self._schedules.shared, (*rows, *lengths)))

    def _block_table(self, kind: Kind) -> Array:
        state = self._state
        table, tables = state.table, state.pages.tables
        if table is None:
            values = np.zeros((len(tables), max(map(len, tables), default=0)), np.int32)
            for row, pages in zip(values, tables, strict=True):
                row[: len(pages)] = pages
            table = _home(kind, values)
            if self._state is state:  # another thread may have appended meanwhile
                self._state = state._replace(table=table)
        return table

    @untraced
    def truncate(self, length: int | Sequence[int] | Array) -> None:
        """Forget all tokens after the first `length`, as after a rejected draft.

        Parameters
        ----------
        length : int, or sequence or array of int, shape (batch,)
            Of every sequence that is longer; or of each.

        Raises
        ------
        ValueError
            There are not as many.
        """
        function = self._named("truncate")
        now = self._pages.lengths
        if reading.is_one_number(length):
            most = reading.integer(function, "length", length, low=0, high=len(self))
            lengths = [min(most, own) for own in now]
        else:
            lengths = integers(function, "length", length, low=0, high=len(self))
            if len(lengths) != len(now) or any(new > own for new, own in zip(lengths, now, strict=True)):
                rule = "length has to be at most the tokens of each sequence"
                shown = (("length", reading.short(lengths)), ("lengths", reading.short(list(now))))
                raise ValueError(refusal(function, rule, *shown))
        self._go_on(self._pages.truncated(lengths))

    def _go_on(self, pages: Pages) -> None:
        self._state = self._state._replace(pages=pages, table=None)

    @untraced
    def reorder(self, sequences: Sequence[int] | Array) -> None:
        function = self._named("reorder")
        pages = self._pages
        self._go_on(pages.reordered(integers(function, "sequences", sequences, low=0, high=len(pages.lengths) - 1)))

    @untraced
    def fork(self, sequence: int) -> int:
        """Let a new sequence go on from what `sequence` is; its number.  They share all pages until one writes."""
        count = len(self._pages.lengths)
        sequence = reading.integer(self._named("fork"), "sequence", sequence, low=0, high=count - 1)
        self._go_on(self._pages.forked(sequence))
        return count

    @untraced
    def add_sequence(self) -> int:
        """Let a new sequence start without tokens; its number."""
        count = len(self._pages.lengths)
        self._go_on(self._pages.grown(self._pages.growth([0] * (count + 1))))
        return count

    @untraced
    def remove(self, sequence: int) -> None:
        """Let a sequence leave: pages that no other has are free.  Those after it are one number lower, as in a list.

        Raises
        ------
        TypeError, ValueError
            Not an integer, or not from 0 to batch - 1.
        """
        count = len(self._pages.lengths)
        sequence = reading.integer(self._named("remove"), "sequence", sequence, low=0, high=count - 1)
        self._go_on(self._pages.removed(sequence))


def sizes_of_pages(name: str, num_pages: Any, page_size: Any) -> tuple[int, int]:
    """(num_pages, page_size), checked for who is called by this name."""
    num_pages = reading.integer(name, "num_pages", num_pages, low=1)
    page_size = reading.integer(name, "page_size", page_size, low=1)
    if num_pages * page_size > reading.LARGEST_SIZE:
        rule = f"no more than {reading.LARGEST_SIZE} tokens can be told apart"
        raise ValueError(refusal(name, rule, ("num_pages", num_pages), ("page_size", page_size)))
    return num_pages, page_size


def _starts(kind: Kind, counts: Sequence[int]) -> Array:
    """cu_seqlens, at the arrays' home."""
    return _home(kind, np.cumsum([0, *counts], dtype=np.int32))


def _home(kind: Kind, values: Array) -> Array:
    return kind.library.bring(values, kind.anchor)
