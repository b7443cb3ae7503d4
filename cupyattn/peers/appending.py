"""New keys and values on their way into a cache: what may come, where it goes, and the CPU's way of putting it there.

Places in a cache are data.  `check_new` refuses what shapes and dtypes rule out, `Appended.read` what the values of
index arrays rule out, all of it before the first write; a GPU's kernel, which nobody waits for, skips what
`Appended.read` would have refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import numpy as np

from cupyattn.peers.overlap import Memory, Pages, touched
from cupyattn.peers.rotary import rotated, too_wide
from cupyattn.problem import FLOATS, Array, Problem, Spec
from cupyattn.reading import DESCALES, refusal, short, span

NEW = (("k_new", "k"), ("v_new", "v"))
"""What is appended, and to what."""
INDICES = (
    *("cache_seqlens", "cache_batch_idx", "cache_leftpad", "block_table"),
    *("cu_seqlens_q", "cu_seqlens_k_new", "rotary_seqlens"),
)
ASKED = ("q", "k", "v", "alibi_slopes", "sinks", "block_table", "cu_seqlens_q", *DESCALES)
"""What attention is asked besides, as it came."""


@lru_cache(maxsize=4096)
def check_new(function: str, spec_items: tuple[tuple[str, Spec], ...], problem: Problem, has_seqlen: bool) -> None:
    """Refuse new keys, values and rotary tables that do not fit the caches.

    Raises
    ------
    TypeError
        A dtype differs.
    ValueError
        A shape differs, or one comes without another that it needs.
    """
    specs = dict(spec_items)
    for name, needed, why in (
        ("v_new", "k_new", "v is appended together with k"),
        ("k_new", "v_new", "k is appended together with v"),
        ("rotary_sin", "rotary_cos", "rotary_sin needs rotary_cos"),
        ("rotary_cos", "rotary_sin", "rotary_cos needs rotary_sin"),
        ("rotary_cos", "k_new", "q and new keys are rotated together: rotary_cos needs k"),
        ("rotary_seqlens", "rotary_cos", "rotary_seqlens needs rotary_cos and rotary_sin"),
        ("cu_seqlens_k_new", "k_new", "cu_seqlens_k_new needs k"),
    ):
        if name in specs and needed not in specs:
            raise ValueError(refusal(function, why, (specs[name].name, specs[name].shape)))
    if "k_new" not in specs:
        return
    if not has_seqlen and "cache_seqlens" not in specs:
        rule = "cache_seqlens has to say where k is appended"
        raise ValueError(refusal(function, rule, (specs["k_new"].name, specs["k_new"].shape)))
    packed, batch = "cu_seqlens_k_new" in specs, problem.sizes.batch
    if packed and specs["cu_seqlens_k_new"].shape != (batch + 1,):
        spec = specs["cu_seqlens_k_new"]
        rule = f"{spec.name} has to be (batch + 1,), ({batch + 1},)"
        raise ValueError(refusal(function, rule, (spec.name, spec.shape)))
    for name, cache in NEW:
        spec, room = specs[name], specs[cache]
        if spec.dtype != problem.dtype:
            rule = f"{spec.name} and {room.name} have to be of one dtype"
            raise TypeError(
                refusal(function, rule, (spec.name, spec.shape, spec.dtype), (room.name, room.shape, room.dtype))
            )
        lead = spec.shape[:-2]
        fits = len(lead) == 1 if packed else len(lead) == 2 and lead[0] == batch
        if spec.shape[-2:] != room.shape[-2:] or not fits:
            axes = "(total, num_heads_kv, head_dim)" if packed else "(batch, seqlen_new, num_heads_kv, head_dim)"
            rule = f"{spec.name} has to be {axes}, as {room.name} has it"
            raise ValueError(refusal(function, rule, (spec.name, spec.shape), (room.name, room.shape)))
    k, v = specs["k_new"], specs["v_new"]
    if k.shape[:-2] != v.shape[:-2]:
        rule = f"{k.name} and {v.name} have to hold the same new tokens"
        raise ValueError(refusal(function, rule, (k.name, k.shape), (v.name, v.shape)))
    if "rotary_cos" in specs:
        _check_tables(function, specs, problem)


def _check_tables(function: str, specs: Mapping[str, Spec], problem: Problem) -> None:
    cos, sin = specs["rotary_cos"], specs["rotary_sin"]
    for spec in (cos, sin):
        if spec.dtype not in FLOATS:
            rule = f"{spec.name} has to be one of {', '.join(FLOATS)}"
            raise TypeError(refusal(function, rule, (spec.name, spec.shape, spec.dtype)))
    if cos.dtype != sin.dtype:
        rule = "rotary_cos and rotary_sin have to be of one dtype"
        raise TypeError(refusal(function, rule, (cos.name, cos.dtype), (sin.name, sin.dtype)))
    if len(cos.shape) != 2 or cos.shape != sin.shape:
        rule = "rotary_cos and rotary_sin have to be of one shape, (positions, rotary_dim / 2)"
        raise ValueError(refusal(function, rule, (cos.name, cos.shape), (sin.name, sin.shape)))
    if 2 * cos.shape[1] > problem.sizes.head_dim:
        rule = too_wide("rotary_cos", cos.shape[1], problem.sizes.head_dim)
        raise ValueError(refusal(function, rule, (cos.name, cos.shape)))
    if cos.shape[0] < problem.sizes.seqlen_k:
        rule = f"rotary_cos has to have a row for every place of a sequence in the cache, {problem.sizes.seqlen_k}"
        raise ValueError(refusal(function, rule, (cos.name, cos.shape), (specs["k"].name, specs["k"].shape)))


@dataclass
class Appended:
    """Where everything is, once the values of the index arrays are known to be right."""

    first_key: Array
    """Of each sequence: places before it are padding."""
    seqlens: Array
    """Places taken before the call, the padding among them."""
    new: Array
    """Tokens that are appended to each sequence."""
    places: Array
    """The sequence of the cache that each sequence is; nothing to go by if there are pages."""
    first_position: Array
    """For rotary embeddings: that of the first new token."""
    starts_q: Array | None
    starts_new: Array | None

    @classmethod
    def read(
        cls,
        function: str,
        specs: Mapping[str, Spec],
        problem: Problem,
        indices: Mapping[str, Array],
        seqlen: int | None,
    ) -> Appended:
        """From the values of the index arrays; `seqlen` is cache_seqlens where that is one number.

        Raises
        ------
        ValueError
            A value leads out of an array, or two of them to one place.
        """
        batch, capacity = problem.sizes.batch, problem.sizes.seqlen_k
        wide = {name: array.astype(np.int64) for name, array in indices.items()}
        new = np.zeros(batch, np.int64)
        starts_q, starts_new = wide.get("cu_seqlens_q"), wide.get("cu_seqlens_k_new")
        if starts_q is not None:
            _check_starts(function, "cu_seqlens_q", starts_q, specs["q"], problem.sizes.seqlen_q)
        if starts_new is not None:
            _check_starts(function, "cu_seqlens_k_new", starts_new, specs["k_new"], None)
            new = np.diff(starts_new)
        elif "k_new" in specs:
            new[:] = specs["k_new"].shape[1]
        seqlens = wide.get("cache_seqlens")
        if seqlens is None:
            seqlens = np.full(batch, capacity if seqlen is None else seqlen, np.int64)
        first_key = wide.get("cache_leftpad", np.zeros(batch, np.int64))
        places = wide.get("cache_batch_idx", np.arange(batch))
        found = cls(first_key, seqlens, new, places, wide.get("rotary_seqlens", seqlens), starts_q, starts_new)
        found._check_lengths(function, specs, capacity)
        if "block_table" in specs:
            found._check_pages(function, specs, indices["block_table"])
        else:
            found._check_places(function, specs)
        return found

    @property
    def stops(self) -> Array:
        """The keys of each sequence end here."""
        return np.asarray(self.seqlens + self.new)

    def _check_lengths(self, function: str, specs: Mapping[str, Spec], capacity: int) -> None:
        shown = ("cache_seqlens", short(self.seqlens.tolist()))
        cache = specs["k"]
        if self.seqlens.min(initial=0) < 0:
            raise ValueError(refusal(function, "cache_seqlens must not be negative", shown))
        if self.stops.max(initial=0) > capacity:
            index = int(np.argmax(self.stops > capacity))
            rule = f"sequence {index} would have {self.stops[index]} keys, and its cache has room for {capacity}"
            raise ValueError(
                refusal(function, rule, shown, ("new tokens", short(self.new.tolist())), (cache.name, cache.shape))
            )
        if (self.first_key < 0).any() or (self.first_key > self.seqlens).any():
            rule = "cache_leftpad has to be from 0 to cache_seqlens"
            raise ValueError(refusal(function, rule, ("cache_leftpad", short(self.first_key.tolist())), shown))

    def _check_places(self, function: str, specs: Mapping[str, Spec]) -> None:
        cache, shown = specs["k"], ("cache_batch_idx", short(self.places.tolist()))
        if self.places.min(initial=0) < 0 or self.places.max(initial=-1) >= cache.shape[0]:
            rule = f"cache_batch_idx has to be {span(0, cache.shape[0] - 1)}"
            raise ValueError(refusal(function, rule, shown, (cache.name, cache.shape)))
        written = self.places[self.new > 0]
        if np.unique(written).size != written.size:
            rule = "cache_batch_idx names a sequence twice, and both would append to it"
            raise ValueError(refusal(function, rule, shown))

    def _check_pages(self, function: str, specs: Mapping[str, Spec], table: Array) -> None:
        (num_pages, page_size), spec = specs["k"].shape[:2], specs["block_table"]
        used = np.arange(table.shape[1])
        looked_at = (used >= (self.first_key // page_size)[:, None]) & (used < -(-self.stops // page_size)[:, None])
        wrong = looked_at & ((table < 0) | (table >= num_pages))
        if wrong.any():
            index, entry = (int(i) for i in np.argwhere(wrong)[0])
            rule = f"{spec.name} of sequence {index} names page {table[index, entry]}, and there are {num_pages}"
            row = short(table[index].tolist())
            raise ValueError(refusal(function, rule, (spec.name, row), (specs["k"].name, specs["k"].shape)))
        page, slot = self._written(table, page_size)
        slots = page.astype(np.int64) * page_size + slot
        if np.unique(slots).size != slots.size:
            rule = f"{spec.name} leads two new tokens to one row of a page"
            raise ValueError(refusal(function, rule, (spec.name, spec.shape), ("cache_seqlens", self.seqlens.tolist())))

    def _tokens(self) -> tuple[Array, Array, Array]:
        """Of every new token: its sequence, its number among the new ones there, and its place in the cache."""
        sequence = np.repeat(np.arange(self.new.size), self.new)
        within = np.arange(sequence.size) - np.repeat(np.cumsum(self.new) - self.new, self.new)
        return sequence, within, self.seqlens[sequence] + within

    def _written(self, table: Array | None, page_size: int) -> Pages:
        """The places of all new tokens."""
        sequence, _, key = self._tokens()
        if table is None:
            return self.places[sequence], key
        return table[sequence, key // page_size], key % page_size

    def check_apart(self, function: str, specs: Mapping[str, Spec], k: Memory, v: Memory, table: Array | None) -> None:
        """Refuse to write in one cache what is memory of a live token, old or new, in the other.

        Raises
        ------
        ValueError
            It is, or the caches lie in each other's bounds by steps of which it cannot be told.
        """
        if not self.new.any() or not k.is_near(v):
            return
        page_size = k.shape[1]
        places = self._written(table, page_size)
        for one, other in permutations((k, v)):
            taken = touched(one, places, other)
            if taken is None or self._are_live(taken, table, page_size).any():
                rule = f"{specs['k'].name} and {specs['v'].name} share memory, and a new token of one would overwrite"
                rule += " a token of the other"
                raise ValueError(refusal(function, rule, (specs["k"].name, k.shape), (specs["v"].name, v.shape)))

    def _are_live(self, places: Pages, table: Array | None, page_size: int) -> Array:
        """Whether any sequence has a key there, once all new ones are in."""
        table = self.places[:, None] if table is None else table
        begins = np.arange(table.shape[1]) * page_size
        first, stop = (np.clip(x[:, None] - begins, 0, page_size) for x in (self.first_key, self.stops))
        pages, which = np.unique(places[0], return_inverse=True)
        named = (first < stop) & np.isin(table, pages)
        row = np.searchsorted(pages, table[named])
        begun = np.zeros((pages.size, page_size + 1), np.int64)
        np.add.at(begun, (row, first[named]), 1)
        np.add.at(begun, (row, stop[named]), -1)
        return np.asarray(np.cumsum(begun, axis=1)[which, places[1]] > 0)

    def check_positions(
        self, function: str, specs: Mapping[str, Spec], problem: Problem, each_row: bool
    ) -> tuple[Array, Array]:
        """Positions of new tokens and of rows of q, for rotary embeddings; each row of q has its own or its sequence's.

        Raises
        ------
        ValueError
            A position lies outside of the tables.
        """
        sequence, within, _ = self._tokens()
        keys = self.first_position[sequence] + within
        if self.starts_q is None:
            step = np.arange(problem.sizes.seqlen_q) if each_row else np.zeros(problem.sizes.seqlen_q, np.int64)
            rows = self.first_position[:, None] + step
        else:
            lengths = np.diff(self.starts_q)
            rows = np.repeat(self.first_position, lengths)
            if each_row:
                rows = rows + np.arange(rows.size) - np.repeat(self.starts_q[:-1], lengths)
        known = specs["rotary_cos"].shape[0]
        for what in (keys, rows):
            if what.size and (what.min() < 0 or what.max() >= known):
                rule = f"positions have to be {span(0, known - 1)}, the rows of rotary_cos and rotary_sin"
                came = (("positions", f"{what.min()} to {what.max()}"), ("rotary_cos", specs["rotary_cos"].shape))
                raise ValueError(refusal(function, rule, *came))
        return keys, np.asarray(rows)

    def append(
        self,
        function: str,
        specs: Mapping[str, Spec],
        problem: Problem,
        operands: Mapping[str, Array],
        each_row: bool,
        interleaved: bool,
    ) -> dict[str, Array]:
        """Write the new keys and values into the caches, and return what attention is asked of then.

        Everything is refused and computed before the first write.
        """
        asked = {name: array for name, array in operands.items() if name in ASKED}
        asked |= {"first_key": self.first_key, "seqused_k": self.stops, "cache_batch_idx": self.places}
        if "k_new" not in specs:
            return asked
        table = operands.get("block_table")
        self.check_apart(function, specs, Memory.of(operands["k"]), Memory.of(operands["v"]), table)
        sequence, within, _ = self._tokens()
        rows = (sequence, within) if self.starts_new is None else (self.starts_new[sequence] + within,)
        new = {cache: operands[name][rows] for name, cache in NEW}
        if "rotary_cos" in specs:
            at_keys, at_rows = self.check_positions(function, specs, problem, each_row)
            tables = operands["rotary_cos"], operands["rotary_sin"]
            new["k"] = rotated(new["k"], *tables, at_keys, interleaved, problem.dtype)
            used = slice(None) if self.starts_q is None else slice(int(self.starts_q[-1]))
            asked["q"] = rotated(operands["q"][used], *tables, at_rows, interleaved, problem.dtype)
        elif any(np.may_share_memory(operands["q"], operands[cache]) for _, cache in NEW):
            asked["q"] = operands["q"].copy()
        places = self._written(table, operands["k"].shape[1])
        for name, values in new.items():
            operands[name][places] = values
        return asked


def _check_starts(function: str, name: str, starts: Array, rows: Spec, longest: int | None) -> None:
    shown, steps = (name, short(starts.tolist())), np.diff(starts)
    if starts[0] != 0:
        raise ValueError(refusal(function, f"{name} has to start with 0", shown))
    if steps.min(initial=0) < 0:
        raise ValueError(refusal(function, f"{name} must not decrease", shown))
    if starts[-1] > rows.shape[0]:
        raise ValueError(
            refusal(function, f"{name} ends after the last row of {rows.name}", shown, (rows.name, rows.shape))
        )
    if longest is not None and steps.max(initial=0) > longest:
        rule = f"a sequence of {name} is longer than max_seqlen_q"
        raise ValueError(refusal(function, rule, shown, ("longest", int(steps.max())), ("allowed", longest)))
