"""What requests share: the same bits as without, whatever happens to the others."""

import copy
import pickle

import numpy as np
import pytest
from attacks.interrupted import CACHES as FILES
from homes import needs
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from interruptions import at_every_instruction
from oracle import assert_matches, assert_same_bits

from cupyattn import PrefixCache, attention
from cupyattn.cache.pages import NoPagesError

LAYERS, PAGE, PAGES = 2, 2, 12


def keys_of(ids, namespace, layer):
    """One number for each token, which depends on all ids up to it."""
    found, state = [], len(namespace or "")
    for each in ids:
        state = (31 * state + each + 1) % 65521
        found.append(state + 1e5 * layer)
    return np.array(found, np.float64).reshape(-1, 1, 1)


def compute(cache, sequence, ids, namespace=None):
    """Let a sequence go on to be these ids, in all layers."""
    length = cache.lengths[sequence]
    counts = [len(ids) - length if i == sequence else 0 for i in range(len(cache.lengths))]
    for layer in range(cache.num_layers):
        new = keys_of(ids, namespace, layer)[length:]
        cache.update(new, 2 * new, layer, counts)


def serve(cache, ids, namespace=None, *, stays=False):
    """A request from its start to its end; (tokens found, tokens remembered)."""
    sequence, length = cache.start(ids, namespace)
    compute(cache, sequence, ids, namespace)
    remembered = cache.insert(ids, sequence, namespace)
    if not stays:
        cache.remove(sequence)
    return length, remembered


def made(**options):
    return PrefixCache(LAYERS, PAGES, PAGE, **options)


def contents(cache):
    """All that a cache has, checked: what lies in its pages, how often each is counted, and which are free."""
    state, told = cache._state, []
    tables = [node.pages for node in state.tree.nodes.values()] + list(state.locks.values())
    for layer, held in enumerate(state.layers):
        pages = held._pages
        used = [page for table in pages.tables for page in table] + [page for x in tables for page in x[layer]]
        uses = np.bincount(np.array(used, int), minlength=len(pages.references))
        assert pages.references.tolist() == uses.tolist(), "references are not counted right"
        assert sorted(pages.stack[: pages.num_free].tolist()) == np.flatnonzero(uses == 0).tolist()
        for table, length in zip(pages.tables, pages.lengths, strict=True):
            told.append(tuple(tokens_in(held, table, length).tolist()))
    for key, number in sorted(state.tree.below.items(), key=repr):
        pages = state.tree.nodes[number].pages[0]
        told.append((key, tokens_in(state.layers[0], pages, cache.page_size * len(pages)).tolist()))
    return cache.lengths, told, sorted(state.locks), state.layers[0].num_free_pages


def tokens_in(held, table, length):
    """The first so many numbers in these pages."""
    if not len(table):
        return np.zeros(0)
    k, v = (x[list(table)].reshape(-1)[:length] for x in (held._state.k, held._state.v))
    assert (v == 2 * k).all()
    return k


# ---------------------------------------------------------------------------------------------------
# A decoder
# ---------------------------------------------------------------------------------------------------


class Decoder:
    """Two layers of attention with eight heads of queries and two of keys; each row is computed by itself."""

    def __init__(self, rng, dtype=np.float32):
        def weights(*shape):
            return (rng.standard_normal(shape) * shape[0] ** -0.5).astype(dtype)

        self.words, self.places = 4 * weights(50, 32), weights(64, 32)
        self.layers = [[weights(32, 64), weights(32, 16), weights(32, 16), weights(64, 32)] for _ in range(LAYERS)]

    def __call__(self, ids, start, attend):
        """Logits of the tokens from `start` on; `attend(q, k, v, layer)` is their attention."""
        hidden = self.words[ids[start:]] + self.places[start : len(ids)]
        for layer, (wq, wk, wv, wo) in enumerate(self.layers):
            q, k, v = (rows(hidden, w).reshape(len(hidden), -1, 8) for w in (wq, wk, wv))
            hidden = hidden + np.tanh(rows(attend(q, k, v, layer).reshape(len(hidden), -1), wo))
        return rows(hidden, self.words.T)


def rows(x, w):
    """x @ w, of which the bits of a row do not depend on how many there are."""
    return np.stack([row @ w for row in x])


def through(cache, decoder, ids, **options):
    """(tokens that were shared, logits of the others)."""
    sequence, length = cache.start(ids)
    counts = [0] * sequence + [len(ids) - length]

    def attend(q, k, v, layer):
        cache.update(k, v, layer, counts)
        return cache.attend(q, layer, counts, **options)

    logits = decoder(ids, length, attend)
    cache.insert(ids, sequence)
    return length, logits


@pytest.mark.parametrize("options", [{}, {"fixed_split_size": 4}, {"window_size": (9, 0)}, {"softcap": 5.0}], ids=str)
def test_logits_are_the_same_bits_with_and_without_what_others_computed(options, rng):
    decoder, system = Decoder(rng), rng.integers(0, 50, 21)
    requests = [np.concatenate([system, rng.integers(0, 50, count)]) for count in (3, 14, 1, 7)]
    shared, found = PrefixCache(LAYERS, 64, 4), []
    for ids in (*requests, *requests):
        length, logits = through(shared, decoder, ids, **options)
        nothing, whole = through(PrefixCache(LAYERS, 64, 4), decoder, ids, **options)
        found.append(length)
        assert nothing == 0
        assert_same_bits(logits, whole[length:])
    assert found == [0, 20, 20, 20, 20, 32, 20, 24]


def test_logits_are_those_of_attention_without_a_cache(rng):
    decoder = Decoder(rng)
    ids = rng.integers(0, 50, 30)

    def attend(q, k, v, layer):
        return attention(q[None], k[None], v[None], causal=True)[0]

    cache = PrefixCache(LAYERS, 32, 4)
    through(cache, decoder, ids[:19])
    length, logits = through(cache, decoder, ids)
    assert length == 16
    assert_matches(logits, decoder(ids, 0, attend)[16:], rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------
# Call by call
# ---------------------------------------------------------------------------------------------------


def test_whole_pages_are_shared_and_the_last_token_is_left():
    cache = made()
    assert serve(cache, [1, 2, 3, 4, 5]) == (0, 4)
    assert [cache.match([1, 2, 3, 4, 5][:count]) for count in range(6)] == [0, 0, 0, 2, 2, 4]
    assert (cache.match([1, 2, 3, 9, 5]), cache.match([2, 2, 3, 4, 5])) == (2, 0)
    assert (cache.num_cached_pages, cache.num_free_pages) == (2, PAGES - 2)


def test_namespaces_share_nothing():
    cache = made()
    serve(cache, [1, 2, 3, 4, 5], "lora")
    assert [cache.match([1, 2, 3, 4, 5], name) for name in ("lora", None, "other")] == [4, 0, 0]


def test_what_was_used_longest_ago_goes_first():
    cache = made()
    for ids in ([1, 1, 1], [2, 2, 2], [3, 3, 3]):
        serve(cache, ids)
    serve(cache, [1, 1, 1])
    assert cache.evict(1) == 1
    assert [cache.match([i, i, i]) for i in (1, 2, 3)] == [2, 0, 2]
    assert cache.evict(5) == 2
    assert (cache.num_cached_pages, cache.num_free_pages) == (0, PAGES)


def test_a_look_does_not_count_as_a_use():
    cache = made()
    for ids in ([1, 1, 1], [2, 2, 2]):
        serve(cache, ids)
    cache.match([1, 1, 1])
    cache.evict(1)
    assert [cache.match([i, i, i]) for i in (1, 2)] == [0, 2]


def test_pages_of_a_running_sequence_stay():
    cache = made()
    serve(cache, [1, 2, 3, 4, 5], stays=True)
    serve(cache, [1, 2, 9, 9, 9])
    assert cache.evict(10) == 1
    assert (cache.match([1, 2, 3, 4, 5]), cache.match([1, 2, 9, 9, 9])) == (4, 2)
    cache.remove(0)
    assert cache.evict(10) == 2


def test_what_is_locked_stays_until_it_is_unlocked():
    cache = made()
    serve(cache, [1, 2, 3, 4, 5, 6])
    first, second = cache.lock([1, 2, 3, 4]), cache.lock([1, 2])
    assert cache.evict(10) == 1
    cache.unlock(first)
    assert cache.evict(10) == 1
    assert cache.match([1, 2, 3, 4, 5]) == 2
    cache.unlock(second)
    with pytest.raises(ValueError, match=r"PrefixCache\.unlock: lock has to be what lock returned, once"):
        cache.unlock(second)
    assert cache.evict(10) == 1


def test_an_update_takes_the_pages_that_were_remembered():
    cache = made()
    for i in range(4):
        serve(cache, 6 * [i])
    assert (cache.num_cached_pages, cache.num_free_pages) == (12, 0)
    sequence, _ = cache.start(3 * [3])
    compute(cache, sequence, [3, 3, *range(10, 18)])
    assert [cache.match(7 * [i]) for i in range(4)] == [0, 4, 6, 6]


def test_an_update_for_which_too_little_can_go_forgets_nothing():
    cache = made()
    serve(cache, 9 * [1], stays=True)
    serve(cache, 9 * [2])
    before = contents(cache)
    with pytest.raises(ValueError, match=r"^PrefixCache\.update: 10 more pages are needed and 3 are free"):
        compute(cache, 0, list(range(30)))
    assert contents(cache) == before


def test_a_capacity_bounds_what_is_remembered():
    cache = made(capacity=3)
    assert serve(cache, 5 * [1]) == (0, 4)
    assert serve(cache, 5 * [2]) == (0, 4)
    assert (cache.num_cached_pages, cache.match(5 * [1]), cache.match(5 * [2])) == (3, 2, 4)
    assert serve(cache, list(range(10, 20))) == (0, 6)
    assert cache.num_cached_pages == 3
    lock = cache.lock(list(range(10, 20)))
    assert serve(cache, 5 * [3]) == (0, 0)
    assert serve(cache, list(range(10, 24))) == (6, 6)
    cache.unlock(lock)
    assert serve(made(capacity=0), 5 * [1]) == (0, 0)


def test_what_a_sequence_begins_with_does_not_go_for_its_end():
    """Two computed the same; what the first left to others is in nobody's way, and used by none."""
    cache, ids = made(capacity=3), list(range(8))
    for sequence in (cache.start(ids)[0], cache.start(ids)[0]):
        compute(cache, sequence, ids)
    cache.insert(ids[:4], 0)
    cache.remove(0)
    assert cache.insert(ids, 0) == 6
    contents(cache)
    assert (cache.match([*ids, 0]), cache.num_cached_pages) == (6, 3)


def test_a_sequence_that_writes_into_what_it_shares_gets_a_copy():
    cache = made()
    serve(cache, [1, 2, 3, 4, 5])
    sequence, _ = cache.start([1, 2, 3, 4, 5])
    cache.truncate([3])
    compute(cache, sequence, [1, 2, 3, 7, 8])
    assert serve(cache, [1, 2, 3, 4, 5]) == (4, 4)
    assert contents(cache)[1][0] == tuple(keys_of([1, 2, 3, 7, 8], None, 0)[:, 0, 0])


def test_after_a_reset_nothing_is_remembered():
    cache = made()
    serve(cache, [1, 2, 3, 4, 5])
    lock = cache.lock([1, 2])
    cache.reset()
    assert (cache.lengths, cache.match([1, 2, 3]), cache.num_cached_pages, cache.nbytes) == ((), 0, 0, 0)
    with pytest.raises(ValueError, match="unlock"):
        cache.unlock(lock)
    assert cache.lock([1]) != lock
    assert serve(cache, [1, 2, 3, 4, 5]) == (0, 4)


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_remembers_in_memory_of_its_own(way):
    cache = made()
    serve(cache, [1, 2, 3, 4, 5], stays=True)
    before, twin = contents(cache), way(cache)
    twin.remove(0)
    twin.evict(2)
    serve(twin, list(range(30, 50)))
    assert contents(cache) == before
    serve(cache, [1, 2, 3, 4, 5])
    contents(twin)


IDS = {
    "tuple": tuple,
    "NumPy": np.array,
    "bytes": lambda ids: np.array(ids, np.uint8),
    "torch": lambda ids: needs("torch").tensor(ids),
}


@pytest.mark.parametrize("kind", IDS.values(), ids=IDS)
def test_ids_are_integers_of_any_kind(kind):
    cache = made()
    serve(cache, [1, 2, 3, 4, 5])
    assert cache.match(kind([1, 2, 3, 9])) == 2
    assert cache.match(kind([1, 2, 3, 4, 5])) == 4


def test_tensors_stay_tensors(rng):
    torch = needs("torch")
    cache = PrefixCache(1, 8, 2)
    sequence, _ = cache.start([1, 2, 3])
    q, k, v = torch.from_numpy(rng.standard_normal((3, 3, 1, 4), np.float32))
    cache.update(k, v, 0, [3])
    cache.insert([1, 2, 3], sequence)
    again, length = cache.start([1, 2, 5])
    cache.update(k[length:], v[length:], 0, [0, 1])
    out = cache.attend(torch.cat([q, q[length:]]), 0, [3, 1])
    assert isinstance(out, torch.Tensor)
    assert (again, length) == (1, 2)
    assert_same_bits(out[2], out[3])


def refusals():
    yield "no pages", ValueError, "PrefixCache: num_pages has to be from 1", lambda c: PrefixCache(1, 0)
    yield "no layers", ValueError, "PrefixCache: num_layers has to be from 1", lambda c: PrefixCache(0, 4)
    more = "PrefixCache: capacity has to be from 0 to 4"
    yield "more than there is", ValueError, more, lambda c: PrefixCache(1, 4, capacity=5)
    yield "text", TypeError, "PrefixCache.match: tokens has to be a list of integers", lambda c: c.match("abc")
    yield "halves", TypeError, r"start: tokens\[1\] has to be an integer", lambda c: c.start([1, 0.5])
    yield "below 0", ValueError, r"insert: tokens\[0\] has to be from 0", lambda c: c.insert([-1], 0)
    yield "far too large", ValueError, r"match: tokens\[0\] has to be from 0", lambda c: c.match([2**70])
    yield (
        "a matrix",
        TypeError,
        "tokens has to be a list of integers, or an array",
        lambda c: c.match(np.ones((2, 2), int)),
    )
    yield "numbers", TypeError, "tokens has to be a list of integers", lambda c: c.match(np.ones(3))
    yield "a list as a name", TypeError, "lock: namespace has to be hashable", lambda c: c.lock([1], [2])
    yield "no such sequence", ValueError, "insert: sequence has to be from 0 to 0", lambda c: c.insert([1], 1)
    yield (
        "no tokens yet",
        ValueError,
        "insert: tokens have to be in all layers, which have 5",
        lambda c: c.insert([1, 2, 3, 4, 5, 6], 0),
    )
    yield "fewer than none", ValueError, "evict: num_pages has to be from 0", lambda c: c.evict(-1)
    yield "no such lock", ValueError, "unlock: lock has to be what lock returned", lambda c: c.unlock(0)


@pytest.mark.parametrize(("error", "message", "call"), [r[1:] for r in refusals()], ids=[r[0] for r in refusals()])
def test_what_is_refused_changes_nothing(error, message, call):
    cache = made()
    serve(cache, [1, 2, 3, 4, 5], stays=True)
    before = contents(cache)
    with pytest.raises(error, match=message):
        call(cache)
    assert contents(cache) == before


# ---------------------------------------------------------------------------------------------------
# Any sequence of calls
# ---------------------------------------------------------------------------------------------------


def begun():
    """A running sequence, prefixes that part, a lock, few free pages, two of which a capacity leaves out."""
    cache = made(capacity=8)
    serve(cache, [1, 2, 3, 4, 5, 6], stays=True)
    serve(cache, [1, 2, 3, 9, 9, 9])
    serve(cache, [7, 7, 7, 7, 7])
    cache.lock([1, 2])
    cache.start([1, 2, 3, 4, 8])
    return cache


CALLS = {
    "start": lambda cache: cache.start([1, 2, 3, 4, 5, 6, 7]),
    "start within a node": lambda cache: cache.start([7, 7, 1]),
    "insert": lambda cache: cache.insert([1, 2, 3, 4, 5, 6], 0, "other"),
    "evict": lambda cache: cache.evict(3),
    "lock": lambda cache: cache.lock([7, 7, 1]),
    "unlock": lambda cache: cache.unlock(0),
    "remove": lambda cache: cache.remove(0),
    "reset": lambda cache: cache.reset(),
    "copy": copy.copy,
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_interrupted_anywhere_happened_or_did_not(name):
    call, cache, count = CALLS[name], begun(), 0
    before = contents(cache)
    call(cache)
    after, held = contents(cache), [begun()]
    for number, _ in at_every_instruction(lambda: call(held[0]), *FILES, step=5):
        count += 1
        assert contents(held[0]) in (before, after), number
        held[0] = begun()
    assert count > 10


def test_an_interrupted_update_may_have_forgotten_and_has_written_nothing_else():
    new, held = np.ones((12, 1, 1)), [begun()]
    found = set()
    for number, _ in at_every_instruction(lambda: held[0].update(new, 2 * new, 1, [0, 12]), *FILES, step=5):
        lengths, _, locks, _ = contents(held[0])
        now = held[0].num_cached_pages, held[0].get_seq_length(1)
        found.add(now)
        assert (lengths, locks, held[0].get_seq_length(0)) == ((6, 4), [0], 6), number
        held[0] = begun()
    assert found == {(7, 6), (6, 6), (6, 16)}


@pytest.mark.parametrize("lengths", [(7, 5), (5, 7), (3, 2)], ids=str)
def test_an_interrupted_update_of_forks_of_different_lengths_has_written_over_neither(lengths):
    """In the page that is theirs alone, and in that which is remembered."""

    def prepare():
        cache = PrefixCache(LAYERS, PAGES, 4)
        serve(cache, [1, 2, 3, 4, 5, 6, 7], stays=True)
        cache.fork(0)
        cache.truncate(lengths)
        return cache

    def call(cache):
        cache.update(new, 2 * new, 0, [1, 1])

    new, cache = np.ones((2, 1, 1)), prepare()
    before = contents(cache)
    call(cache)
    after, held = contents(cache), [prepare()]
    assert after[2:] != before[2:]
    for number, _ in at_every_instruction(lambda: call(held[0]), *FILES):
        assert contents(held[0]) in (before, after), number
        held[0] = prepare()


class Requests(RuleBasedStateMachine):
    """Requests come and go; the model knows each one's ids, and looks into every page."""

    def __init__(self):
        super().__init__()
        self.cache, self.running, self.locks = made(capacity=9), [], []

    ids = st.lists(st.integers(0, 1), max_size=9)
    namespaces = st.sampled_from([None, "other"])

    @precondition(lambda self: len(self.running) < 3)
    @rule(ids=ids, namespace=namespaces)
    def start(self, ids, namespace):
        expected = self.cache.match(ids, namespace)
        sequence, length = self.cache.start(ids, namespace)
        assert (sequence, length) == (len(self.running), expected)
        assert length < max(1, len(ids))
        self.running.append((ids[:length], namespace))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), new=ids)
    def compute(self, data, new):
        number = data.draw(st.integers(0, len(self.running) - 1))
        ids, namespace = self.running[number]
        remembered = self.cache.num_cached_pages
        try:
            compute(self.cache, number, ids + new, namespace)
        except NoPagesError:
            assert self.cache.lengths == tuple(len(x) for x, _ in self.running)
            self.cache.truncate(self.cache.lengths)
            assert self.cache.num_cached_pages == remembered
        else:
            self.running[number] = (ids + new, namespace)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def insert(self, data):
        number = data.draw(st.integers(0, len(self.running) - 1))
        ids, namespace = self.running[number]
        count = self.cache.insert(ids, number, namespace)
        assert count <= len(ids)
        assert self.cache.match([*ids[:count], 0], namespace) == count

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def remove(self, data):
        number = data.draw(st.integers(0, len(self.running) - 1))
        self.cache.remove(number)
        del self.running[number]

    @precondition(lambda self: 0 < len(self.running) < 3)
    @rule(data=st.data())
    def fork(self, data):
        number = data.draw(st.integers(0, len(self.running) - 1))
        self.running.append(self.running[number])
        assert self.cache.fork(number) == len(self.running) - 1

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def truncate(self, data):
        lengths = [data.draw(st.integers(0, len(ids))) for ids, _ in self.running]
        self.cache.truncate(lengths)
        self.running = [(ids[:length], name) for (ids, name), length in zip(self.running, lengths, strict=True)]

    @rule(count=st.integers(0, 6))
    def evict(self, count):
        free = self.cache.num_free_pages
        assert self.cache.evict(count) == self.cache.num_free_pages - free <= count

    @precondition(lambda self: len(self.locks) < 2)
    @rule(ids=ids, namespace=namespaces)
    def lock(self, ids, namespace):
        found = self.cache.match([*ids, 0], namespace)
        self.locks.append((self.cache.lock(ids, namespace), [*ids[:found], 0], namespace))

    @precondition(lambda self: self.locks)
    @rule()
    def unlock(self):
        self.cache.unlock(self.locks.pop(0)[0])

    @rule(stays=st.booleans())
    def copy(self, stays):
        one, other = self.cache, copy.copy(self.cache)
        self.cache, left = (one, other) if stays else (other, one)
        while left.lengths:
            left.remove(0)
        left.evict(PAGES)
        serve(left, list(range(7)))

    @invariant()
    def every_page_holds_what_its_ids_make(self):
        contents(self.cache)
        state = self.cache._state
        assert state.tree.num_pages <= 9
        for layer, held in enumerate(state.layers):
            for table, (ids, namespace) in zip(held._pages.tables, self.running, strict=True):
                assert (tokens_in(held, table, len(ids)) == keys_of(ids, namespace, layer)[:, 0, 0]).all()
            for node in state.tree.nodes.values():
                ids, above = node.ids.tolist(), node.above
                while isinstance(above, int):
                    ids, above = state.tree.nodes[above].ids.tolist() + ids, state.tree.nodes[above].above
                expected = keys_of(ids, above[0], layer)[len(ids) - node.ids.size :, 0, 0]
                assert (tokens_in(held, node.pages[layer], node.ids.size) == expected).all()

    @invariant()
    def what_is_locked_is_there(self):
        for _, ids, namespace in self.locks:
            assert self.cache.match(ids, namespace) >= len(ids) - 1


Requests.TestCase.settings = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=30,
    stateful_step_count=40,
    suppress_health_check=[HealthCheck.too_slow],
)
TestRequests = Requests.TestCase
