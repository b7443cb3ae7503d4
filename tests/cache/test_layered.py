"""The caches of all layers: what happens to one of them happens to all, or to none."""

import copy
import pickle
import re

import numpy as np
import pytest
from attacks.interrupted import CACHES as FILES
from attacks.interrupted import kept
from homes import needs
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from interruptions import at_every_instruction
from oracle import assert_same_bits

from cupyattn import (
    DynamicCache,
    LayeredCache,
    OffloadedCache,
    PagedCache,
    PrefixCache,
    SlidingWindowCache,
    StaticCache,
)

LAYERS = 3


def mixed(layer):
    return (DynamicCache, lambda: SlidingWindowCache(4), OffloadedCache)[layer]()


def draw(rng, batch=2, count=3, layers=LAYERS):
    """q, k, v of each layer."""
    return [rng.standard_normal((3, batch, count, 2, 4)).astype(np.float32) for _ in range(layers)]


def filled(cache, rng, *counts, batch=2):
    """The cache after some steps of the decoder."""
    for count in counts:
        for layer, (_, k, v) in enumerate(draw(rng, batch, count, cache.num_layers)):
            cache.update(k, v, layer)
    return cache


def contents(cache):
    return [kept(layer) for layer in cache._state.layers]


@pytest.mark.parametrize(
    ("built", "alone"),
    [
        ({}, DynamicCache),
        ({"capacity": 9}, lambda: StaticCache(9)),
        ({"window": 4}, lambda: SlidingWindowCache(4)),
        ({"num_pages": 9, "page_size": 2}, lambda: PagedCache(9, 2)),
        ({"make": lambda layer: OffloadedCache()}, OffloadedCache),
    ],
    ids=lambda x: ", ".join(x) if isinstance(x, dict) else "",
)
def test_each_layer_says_what_a_cache_of_its_own_says(built, alone, rng):
    cache, others = LayeredCache(LAYERS, **built), [alone() for _ in range(LAYERS)]
    for count in (5, 1, 2):
        for layer, (q, k, v) in enumerate(draw(rng, count=count)):
            cache.update(k, v, layer)
            others[layer].append(k, v)
            assert_same_bits(cache.attend(q, layer, softcap=3.0), others[layer].attend(q, softcap=3.0))
    assert (cache.lengths, len(cache)) == ((8, 8), 8)
    assert contents(cache) == [kept(other) for other in others]
    assert cache.nbytes == sum(layer.nbytes for layer in cache._state.layers) >= sum(other.nbytes for other in others)


def test_layers_in_pages_take_packed_tokens_and_sequences_that_come_and_go(rng):
    cache, alone = LayeredCache(2, num_pages=9, page_size=2), PagedCache(9, 2)
    q, k, v = rng.standard_normal((3, 5, 2, 4))
    alone.append(k, v, [3, 2])
    for layer in range(2):
        cache.update(k, v, layer, [3, 2])
    assert (cache.fork(0), cache.add_sequence()) == (alone.fork(0), alone.add_sequence()) == (2, 3)
    cache.remove(1)
    alone.remove(1)
    cache.truncate([3, 1, 0])
    alone.truncate([3, 1, 0])
    assert cache.lengths == (3, 1, 0)
    for layer in range(2):
        assert_same_bits(cache.attend(q[:3], layer, [2, 1, 0], cascade=True), alone.attend(q[:3], [2, 1, 0]))


def test_what_one_layer_refuses_happens_to_none(rng):
    cache = filled(LayeredCache(LAYERS, mixed), rng, *[1] * 90)
    before = contents(cache)
    with pytest.raises(
        ValueError, match=r"^LayeredCache\.truncate, layer 1 \(SlidingWindowCache\): some of the tokens"
    ):
        cache.truncate(3)
    with pytest.raises(ValueError, match=r"^LayeredCache\.reorder, layer 0 \(DynamicCache\): sequences\[0\] has to be"):
        cache.reorder([2])
    assert contents(cache) == before


def test_a_step_that_went_half_way_is_taken_back(rng):
    cache = filled(LayeredCache(LAYERS, mixed), rng, 3, 2)
    before = contents(cache)
    (_, k, v), *_ = draw(rng, count=1)
    cache.update(k, v, 0)
    assert (cache.lengths, cache.get_seq_length(), cache.get_seq_length(2)) == ((5, 5), 6, 5)
    cache.truncate(len(cache))
    assert contents(cache) == before


def test_after_a_reset_other_sequences_may_come(rng):
    cache = filled(LayeredCache(LAYERS, mixed), rng, 70, 20)
    cache.reset()
    assert (cache.lengths, cache.nbytes) == ((), 0)
    new = rng.standard_normal((1, 2, 1, 8))
    cache.update(new, new, 0)
    assert cache.get_seq_length() == 2


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_goes_on_in_memory_of_its_own(way, rng):
    cache = filled(LayeredCache(LAYERS, mixed), rng, 3)
    before, twin = contents(cache), way(cache)
    filled(twin, rng, 4)
    twin.truncate(1)
    filled(twin, rng, 2)
    assert contents(cache) == before
    assert twin.lengths == (3, 3)


def test_the_layer_after_an_update_is_on_its_way(rng):
    cache = filled(LayeredCache(LAYERS, lambda layer: OffloadedCache()), rng, 3)
    cache.reorder([0, 1])  # what is fetched is of the old order
    _, k, v = draw(rng, count=1)[0]
    for layer in range(LAYERS):
        cache.update(k, v, layer)
        fetched = [other.nbytes_fetched > 0 for other in cache._state.layers]
        assert fetched[(layer + 1) % LAYERS]
        cache.attend(k, layer)
    assert [other.nbytes_fetched > 0 for other in cache._state.layers] == [True, False, False]


def test_tensors_stay_tensors(rng):
    torch = needs("torch")
    cache = LayeredCache(1)
    q, k, v = torch.from_numpy(rng.standard_normal((3, 1, 2, 2, 4)))
    cache.update(k, v, 0)
    assert isinstance(cache.attend(q, 0), torch.Tensor)


ONE = np.ones((2, 1, 2, 4), np.float32)
TWO = np.ones((2, 2, 2, 4), np.float32)


def refusals():
    dynamic, paged = lambda: LayeredCache(2), lambda: LayeredCache(2, num_pages=4)
    yield "no layers", ValueError, "LayeredCache: num_layers has to be from 1", lambda: LayeredCache(0)
    yield "half a layer", TypeError, "LayeredCache: num_layers has to be an integer", lambda: LayeredCache(1.5)
    both = "LayeredCache: one of make, capacity, window, num_pages .*\n +given +capacity and window"
    yield "two ways", ValueError, both, lambda: LayeredCache(2, capacity=3, window=4)
    alone = "LayeredCache: page_size goes with num_pages"
    yield "a page of nothing", ValueError, alone, lambda: LayeredCache(2, page_size=4)
    yield "no capacity", ValueError, "LayeredCache: capacity has to be from 1", lambda: LayeredCache(2, capacity=0)
    yield "no window", ValueError, "LayeredCache: window has to be from 1", lambda: LayeredCache(2, window=0)
    many = "LayeredCache: no more than .* tokens can be told apart"
    yield "many pages", ValueError, many, lambda: LayeredCache(2, num_pages=2**30, page_size=2**30)
    yield "no factory", TypeError, "make has to be callable", lambda: LayeredCache(2, DynamicCache())
    other = r"LayeredCache: make has to return a new cache .*\n +make\(0\) +3"
    yield "no caches", TypeError, other, lambda: LayeredCache(2, lambda layer: layer + 3)
    used = DynamicCache()
    used.append(ONE, ONE)
    again = r"LayeredCache: make has to return a new cache(.|\n)*lengths +\(1, 1\)"
    yield "a used cache", ValueError, again, lambda: LayeredCache(2, lambda layer: used)
    yield (
        "no such layer",
        ValueError,
        "LayeredCache.update: layer has to be from 0 to 1",
        lambda: dynamic().update(ONE, ONE, 2),
    )
    yield "the last layer", ValueError, "LayeredCache.attend: layer has to be from 0", lambda: dynamic().attend(ONE, -1)
    yield "a named layer", TypeError, "layer has to be an integer", lambda: dynamic().get_seq_length("0")
    packed = "LayeredCache.update: seqlens are for layers of PagedCache"
    yield "seqlens", TypeError, packed, lambda: dynamic().update(ONE[0], ONE[0], 0, [1])
    fork = "LayeredCache.fork: sequences come and go where all layers are of PagedCache\n +layer 0 +DynamicCache"
    yield "a fork", TypeError, fork, lambda: dynamic().fork(0)
    gone = r"^LayeredCache\.remove, layer 0 \(PagedCache\): sequence has to be"
    yield "no sequence", ValueError, gone, lambda: paged().remove(0)
    yield "no room", ValueError, r"^LayeredCache\.update: ", lambda: LayeredCache(2, capacity=1).update(TWO, TWO, 1)
    yield (
        "no heads",
        ValueError,
        r"^LayeredCache\.update: k has to have 4 axes",
        lambda: dynamic().update(TWO[0], TWO[0], 0),
    )
    yield "nothing yet", ValueError, r"^LayeredCache\.attend: nothing has been", lambda: dynamic().attend(ONE, 1)
    ids = r"^PrefixCache\.fork, layer 0 \(PagedCache\): sequence has to be"
    yield "of a subclass", ValueError, ids, lambda: PrefixCache(2, 4).fork(0)


@pytest.mark.parametrize(("error", "message", "call"), [r[1:] for r in refusals()], ids=[r[0] for r in refusals()])
def test_what_cannot_be_meant_is_refused(error, message, call):
    with pytest.raises(error, match=message):
        call()


CALLS = {
    "truncate": lambda cache: cache.truncate(2),
    "reorder": lambda cache: cache.reorder([1, 1, 0]),
    "reset": lambda cache: cache.reset(),
    "update": lambda cache: cache.update(ONE, ONE, 1),
    "fork": lambda cache: cache.fork(0),
    "add_sequence": lambda cache: cache.add_sequence(),
    "remove": lambda cache: cache.remove(0),
    "copy": copy.copy,
}


KINDS = {
    "mixed": set(CALLS) - {"fork", "add_sequence", "remove"},
    "paged": set(CALLS),
    "forks of different lengths": {"update", "reorder"},
}


def begun(kind):
    rng = np.random.default_rng(1)
    if kind == "mixed":
        return filled(LayeredCache(LAYERS, mixed), rng, 3)
    if kind == "paged":
        return filled(LayeredCache(LAYERS, num_pages=12, page_size=2), rng, 3)
    cache = filled(LayeredCache(LAYERS, num_pages=8, page_size=4), rng, 7, batch=1)
    cache.fork(0)
    cache.truncate([7, 5])
    return cache


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in sorted(KINDS[kind])])
def test_an_interrupted_call_happened_to_all_layers_or_to_none(kind, name):
    call, cache, count = CALLS[name], begun(kind), 0
    before = contents(cache)
    call(cache)
    after, held = contents(cache), [begun(kind)]
    for number, _ in at_every_instruction(lambda: call(held[0]), *FILES):
        count += 1
        assert contents(held[0]) in (before, after), number
        held[0] = begun(kind)
    assert count > 20


class Layers(RuleBasedStateMachine):
    """The model is a list of caches, each changed by itself."""

    def __init__(self):
        super().__init__()
        self.rng = np.random.default_rng(1)
        self.cache, self.model = LayeredCache(LAYERS, mixed), [mixed(layer) for layer in range(LAYERS)]

    @initialize(batch=st.integers(1, 3), count=st.integers(0, 7))
    def begin(self, batch, count):
        self.step(batch, count, LAYERS)

    def step(self, batch, count, layers):
        for layer, (_, k, v) in enumerate(draw(self.rng, batch, count, layers)):
            self.cache.update(k, v, layer)
            self.model[layer].append(k, v)

    @rule(count=st.integers(0, 7), layers=st.integers(0, LAYERS))
    def grow(self, count, layers):
        """All layers, or the first of them, as in a step that raised half way."""
        self.step(len(self.model[0].lengths), count, layers)
        self.cache.truncate(len(self.cache))
        for cache in self.model:
            cache.truncate(min(map(len, self.model)))

    @rule(back=st.integers(0, 9))
    def truncate(self, back):
        length = max(0, len(self.model[0]) - back)
        twins = copy.deepcopy(self.model)
        try:
            for cache in twins:
                cache.truncate(length)
        except ValueError as refused:
            rule = str(refused).partition(": ")[2]
            with pytest.raises(ValueError, match=rf"^LayeredCache\.truncate, layer \d \(.*\): {re.escape(rule)}"):
                self.cache.truncate(length)
        else:
            self.cache.truncate(length)
            self.model = twins

    @rule(data=st.data())
    def reorder(self, data):
        batch = len(self.model[0].lengths)
        chosen = data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=4))
        for cache in (self.cache, *self.model):
            cache.reorder(chosen)

    @rule(stays=st.booleans())
    def copy(self, stays):
        one, other = self.cache, copy.copy(self.cache)
        self.cache, left = (one, other) if stays else (other, one)
        left.reset()

    @invariant()
    def each_layer_is_what_it_would_be_by_itself(self):
        assert [layer[:2] for layer in contents(self.cache)] == [kept(cache)[:2] for cache in self.model]
        assert self.cache.lengths == self.model[0].lengths


Layers.TestCase.settings = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=20,
    stateful_step_count=30,
    suppress_health_check=[HealthCheck.too_slow],
)
TestLayers = Layers.TestCase
