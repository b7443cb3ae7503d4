"""Caches under any sequence of calls: they keep what a list would keep, and what raises changes nothing."""

import copy

import numpy as np
import pytest
from attacks.interrupted import ERRORS, EVERYTHING, kept
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from interruptions import interrupted
from oracle import assert_matches, assert_same_bits

import cupyattn
from cupyattn import DynamicCache, OffloadedCache, PagedCache, SlidingWindowCache, StaticCache
from cupyattn.cache.layered import changed

HEADS, HEADS_KV, HEAD_DIM = 2, 1, 4
NUM_PAGES, PAGE_SIZE = 24, 3
CAPACITY, WINDOW = 40, 5
MOST = 4
"""Sequences."""

counts = st.integers(0, 7)


def refusal_of(call):
    """The text of its ValueError; None if there was none."""
    try:
        call()
    except ValueError as refused:
        return str(refused)
    return None


class Machine(RuleBasedStateMachine):
    """What all caches have in common: their model is a list of sequences, each an array of its tokens."""

    def __init__(self):
        super().__init__()
        self.cache = self.make()
        self.tokens = []
        self.rng = np.random.default_rng(1)

    def draw(self, count, heads=HEADS_KV):
        return self.rng.standard_normal((count, heads, HEAD_DIM))

    def attend_alone(self, i, rows, **options):
        """(q, out, lse) of the last rows of a sequence, without a cache."""
        q, kv = self.draw(rows, HEADS), self.tokens[i]
        out, lse = cupyattn.attention(
            q[None], kv[None], 2 * kv[None], causal=True, alignment="bottom-right", return_lse=True, **options
        )
        return q, out[0], lse[0]

    @rule(stays=st.booleans())
    def copy(self, stays):
        """Nothing that happens to a copy, or to what it was made of, is seen by the other."""
        one, other = self.cache, copy.copy(self.cache)
        self.cache, left = (one, other) if stays else (other, one)
        left.truncate(len(left))
        if self.tokens:
            poison = np.full((len(self.tokens), 1, HEADS_KV, HEAD_DIM), np.nan)
            refusal_of(lambda: left.append(poison, poison))
        left.reorder([])

    def some(self, count, like=None):
        """k and v of so many tokens of each sequence, of another kind than the cache's if that is asked for."""
        new = np.zeros((len(self.tokens), count, HEADS_KV, HEAD_DIM))
        return [(like or (lambda x: x))(x) for x in (new, 2 * new)]

    def wrong_calls(self):
        """What every cache refuses."""
        cache, batch = self.cache, len(self.tokens)
        k, v = self.some(1)
        yield lambda: cache.append(k.astype(np.float32), v.astype(np.float32))
        yield lambda: cache.append(k[..., :2], v)
        yield lambda: cache.append(k, v.astype(np.float32))
        yield lambda: cache.append(k[:, :0], v)
        yield lambda: cache.append(k[0, 0, 0], v)
        yield lambda: cache.append(k, None)
        yield lambda: cache.truncate(len(cache) + 1)
        yield lambda: cache.truncate(-1)
        yield lambda: cache.truncate(0.5)
        yield lambda: cache.reorder([batch])
        yield lambda: cache.reorder([-1])
        yield lambda: cache.reorder([0.5])
        rows = np.zeros((batch, max(map(len, self.tokens), default=0) + 1, HEADS, HEAD_DIM))
        yield lambda: cache.attend(rows)
        yield lambda: cache.attend(rows[:, :0, :, :2])
        yield lambda: cache.attend(rows[:, :0], softcap=-1.0)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def fail(self, data):
        """What is refused changes nothing."""
        call = data.draw(st.sampled_from(list(self.wrong_calls())))
        before = kept(self.cache)
        with pytest.raises((ValueError, TypeError)):
            call()
        assert kept(self.cache) == before

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), number=st.integers(0, 4000), error=st.sampled_from(ERRORS))
    def interrupt(self, data, number, error):
        """What is interrupted happened, or did not; that it did is the case where the model follows."""
        batch, shortest = len(self.tokens), min(map(len, self.tokens))
        chosen = data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=MOST))
        length = max(0, shortest - data.draw(st.integers(0, 2)))
        k, v = self.some(1)
        change, tokens = data.draw(
            st.sampled_from(
                [
                    (lambda cache: cache.append(k, v), [np.concatenate([x, k[0]]) for x in self.tokens]),
                    (lambda cache: cache.truncate(length), [x[:length] for x in self.tokens]),
                    (lambda cache: cache.reorder(chosen), [self.tokens[i] for i in chosen]),
                    (lambda cache: copy.copy(cache).reorder([0]), self.tokens),
                ]
            )
        )
        before, twin = kept(self.cache), copy.copy(self.cache)
        if refusal_of(lambda: change(twin)) is None:
            interrupted(lambda: change(self.cache), number, *EVERYTHING, error=error)
            now = kept(self.cache)
            assert now in (before, kept(twin))
            if now != before:
                self.tokens = tokens

    @invariant()
    def the_lengths_are_those_of_the_sequences(self):
        assert self.cache.lengths == tuple(map(len, self.tokens))
        assert len(self.cache) == max(map(len, self.tokens), default=0)


class Contiguous(Machine):
    """Sequences of one length."""

    window = None
    limit = 10**9

    @initialize(batch=st.integers(1, 3), count=counts)
    def begin(self, batch, count):
        self.tokens = [self.draw(count) for _ in range(batch)]
        new = np.stack(self.tokens)
        self.cache.append(new, 2 * new)

    @rule(count=counts)
    def append(self, count):
        new = np.stack([self.draw(count) for _ in self.tokens])
        if len(self.tokens[0]) + count > self.limit:
            with pytest.raises(ValueError, match="no room"):
                self.cache.append(new, 2 * new)
            return
        self.cache.append(new, 2 * new)
        self.tokens = [np.concatenate(pair) for pair in zip(self.tokens, new, strict=True)]

    @rule(data=st.data())
    def truncate(self, data):
        length = max(0, len(self.tokens[0]) - data.draw(st.integers(0, 12)))
        refused = refusal_of(lambda: self.cache.truncate(length))
        if refused is None:
            self.tokens = [x[:length] for x in self.tokens]
        else:
            assert "have left the window" in refused
            assert self.window is not None

    @rule(data=st.data())
    def reorder(self, data):
        chosen = data.draw(st.lists(st.integers(0, len(self.tokens) - 1), min_size=1, max_size=MOST))
        self.cache.reorder(chosen)
        self.tokens = [self.tokens[i] for i in chosen]

    @rule(rows=st.integers(0, 3), softcap=st.sampled_from([0.0, 2.0]))
    def attend(self, rows, softcap):
        rows = min(rows, len(self.tokens[0]))
        window = {} if self.window is None else {"window_size": (self.window - 1, None)}
        alone = [self.attend_alone(i, rows, softcap=softcap, **window) for i in range(len(self.tokens))]
        q = np.stack([q for q, _, _ in alone])
        if self.window is not None and self.cache._state.gone > max(0, len(self.cache) - rows - self.window + 1):
            with pytest.raises(ValueError, match="have left the window"):
                self.cache.attend(q, softcap=softcap)
            return
        out, lse = self.cache.attend(q, softcap=softcap, return_lse=True)
        for i, (_, expected, expected_lse) in enumerate(alone):
            assert_matches(out[i], expected, rtol=1e-13, atol=1e-15)
            assert_matches(lse[i], expected_lse, rtol=1e-13, atol=1e-15)


class Dynamic(Contiguous):
    make = DynamicCache


class Static(Contiguous):
    limit = CAPACITY

    def make(self):
        return StaticCache(CAPACITY)


class Sliding(Contiguous):
    window = WINDOW

    def make(self):
        cache = SlidingWindowCache(WINDOW)
        cache._room = 6  # small, so that the tokens are moved often
        return cache


class Offloaded(Contiguous):
    make = OffloadedCache

    @rule()
    def prefetch(self):
        self.cache.prefetch()


class Paged(Machine):
    """Sequences of different lengths, which come and go."""

    def make(self):
        return PagedCache(NUM_PAGES, PAGE_SIZE)

    @initialize(first=st.lists(counts, min_size=1, max_size=2))
    def begin(self, first):
        self.tokens = [self.draw(count) for count in first]
        new = np.concatenate(self.tokens)
        self.cache.append(new, 2 * new, seqlens=first)

    def pages_needed(self, new):
        """An upper bound: one more than full pages, and a copy, for each."""
        return sum(-(-count // PAGE_SIZE) + 2 for count in new)

    @rule(data=st.data())
    def append(self, data):
        self.go_on(data.draw(st.lists(counts, min_size=len(self.tokens), max_size=len(self.tokens))))

    def go_on(self, new):
        tokens = [self.draw(count) for count in new]
        packed = np.concatenate([np.zeros((0, HEADS_KV, HEAD_DIM)), *tokens])
        before = self.cache.num_free_pages
        (old,), _ = changed([self.cache], kept)
        live = kept(old)
        refused = refusal_of(lambda: self.cache.append(packed, 2 * packed, seqlens=new))
        assert kept(old) == live, "who still reads what the cache was, finds something else"
        if refused is None:
            self.tokens = [np.concatenate(pair) for pair in zip(self.tokens, tokens, strict=True)]
        else:
            assert "more pages are needed" in refused
            assert self.pages_needed(new) > before == self.cache.num_free_pages

    @precondition(lambda self: self.tokens)
    @rule(count=st.integers(0, 3))
    def append_evenly(self, count):
        new = np.stack([self.draw(count) for _ in self.tokens])
        if self.pages_needed([count] * len(self.tokens)) <= self.cache.num_free_pages:
            self.cache.append(new, 2 * new)
            self.tokens = [np.concatenate(pair) for pair in zip(self.tokens, new, strict=True)]

    @precondition(lambda self: 0 < len(self.tokens) < MOST)
    @rule(data=st.data())
    def fork(self, data):
        source = data.draw(st.integers(0, len(self.tokens) - 1))
        free = self.cache.num_free_pages
        assert self.cache.fork(source) == len(self.tokens)
        assert self.cache.num_free_pages == free
        self.tokens.append(self.tokens[source])

    @precondition(lambda self: 0 < len(self.tokens) < MOST)
    @rule(data=st.data())
    def draft(self, data):
        """Forks of which some was rejected, which go on, and one of which leaves."""
        self.fork(data)
        self.cut([max(0, len(x) - data.draw(st.integers(0, 2))) for x in self.tokens])
        self.go_on([1 + data.draw(st.integers(0, 1)) for _ in self.tokens])
        self.remove(data)

    @precondition(lambda self: len(self.tokens) < MOST)
    @rule()
    def add_sequence(self):
        assert self.cache.add_sequence() == len(self.tokens)
        self.tokens.append(self.draw(0))

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def remove(self, data):
        sequence = data.draw(st.integers(0, len(self.tokens) - 1))
        self.cache.remove(sequence)
        del self.tokens[sequence]

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def reorder(self, data):
        chosen = data.draw(st.lists(st.integers(0, len(self.tokens) - 1), min_size=1, max_size=MOST))
        self.cache.reorder(chosen)
        self.tokens = [self.tokens[i] for i in chosen]

    @rule(data=st.data())
    def truncate(self, data):
        self.cut([data.draw(st.integers(0, len(x))) for x in self.tokens])

    def cut(self, lengths):
        self.cache.truncate(lengths)
        self.tokens = [x[:length] for x, length in zip(self.tokens, lengths, strict=True)]

    @rule(data=st.data())
    def truncate_all(self, data):
        length = data.draw(st.integers(0, len(self.cache)))
        self.cache.truncate(length)
        self.tokens = [x[:length] for x in self.tokens]

    @precondition(lambda self: self.tokens)
    @rule(rows=st.lists(st.integers(0, 3), min_size=MOST, max_size=MOST), cascade=st.booleans())
    def attend(self, rows, cascade):
        rows = [min(count, len(x)) for count, x in zip(rows, self.tokens, strict=False)]
        alone = [self.attend_alone(i, count) for i, count in enumerate(rows)]
        q = np.concatenate([x[0] for x in alone])
        out, lse = self.cache.attend(q, rows, return_lse=True, cascade=cascade)
        stop = 0
        for count, (_, expected, expected_lse) in zip(rows, alone, strict=True):
            start, stop = stop, stop + count
            if cascade:
                assert_matches(out[start:stop], expected, rtol=1e-13, atol=1e-15)
                assert_matches(lse[:, start:stop], expected_lse, rtol=1e-13, atol=1e-15)
            else:
                assert_same_bits(out[start:stop], expected)
                assert_same_bits(lse[:, start:stop], expected_lse)

    @invariant()
    def every_page_is_free_or_counted_as_often_as_it_is_used(self):
        pages = self.cache._pages
        uses = np.bincount([page for table in pages.tables for page in table], minlength=NUM_PAGES)
        assert pages.references.tolist() == uses.tolist()
        assert sorted(pages.stack[: pages.num_free]) == np.flatnonzero(uses == 0).tolist()
        assert [len(table) for table in pages.tables] == [-(-length // PAGE_SIZE) for length in pages.lengths]


MACHINES = (Dynamic, Static, Sliding, Offloaded, Paged)
for machine in MACHINES:
    machine.TestCase.settings = settings(
        derandomize=True,
        database=None,
        deadline=None,
        max_examples=60 if machine is Paged else 25,
        stateful_step_count=40,
        suppress_health_check=[HealthCheck.too_slow],
    )

TestDynamic = Dynamic.TestCase
TestStatic = Static.TestCase
TestSliding = Sliding.TestCase
TestOffloaded = Offloaded.TestCase
TestPaged = Paged.TestCase
