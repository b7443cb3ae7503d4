"""Schedules that the layers of a step share: torch's arrays in host memory, launches recorded or emulated."""

import copy
import pickle
import threading

import numpy as np
import pytest

import cupyattn
from cupyattn import LayeredCache, PagedCache, PrefixCache, SlidingWindowCache, StaticCache
from cupyattn.cache.schedules import MOST, Schedules

LENGTHS = (700, 3)


@pytest.fixture
def recorded(driver, monkeypatch):
    """The driver, whose launches are counted and not executed."""
    monkeypatch.setattr(driver, "queue", lambda work: None)
    return driver


def filled(torch, layers=32, cache=None, lengths=LENGTHS):
    cache = LayeredCache(layers, num_pages=128, page_size=32) if cache is None else cache
    for layer in range(cache.num_layers):
        cache.update(*rows(torch, 2, sum(lengths)), layer, list(lengths))
    return cache


def rows(torch, count, tokens, heads=2):
    return [torch.randn(tokens, heads, 64).half() for _ in range(count)]


def step(torch, cache, **options):
    """One new token of each sequence through all layers."""
    batch = len(cache.lengths)
    for layer in range(cache.num_layers):
        cache.update(*rows(torch, 2, batch), layer, [1] * batch)
        cache.attend(*rows(torch, 1, batch, heads=4), layer, [1] * batch, **options)


def schedules_of(driver):
    """How many were made since this was asked last, of all attention calls."""
    sources = [what.source for what, _ in driver.launches]
    driver.launches.clear()
    return sources.count("schedule.cu"), sources.count("splitkv.cu")


def test_a_step_of_32_layers_makes_one_schedule_ahead_of_all(torch, recorded):
    cache = filled(torch)
    step(torch, cache)
    assert [what.source for what, _ in recorded.launches] == ["schedule.cu", *32 * ["splitkv.cu", "merge.cu"]]


def test_each_step_makes_its_own(torch, recorded):
    cache = filled(torch, layers=4)
    for _ in range(3):
        step(torch, cache)
        assert schedules_of(recorded) == (1, 4)


def test_a_prefix_cache_shares_too(torch, recorded):
    cache = PrefixCache(4, num_pages=64, page_size=32)
    for count in LENGTHS:
        cache.start([*range(count)])
    filled(torch, cache=cache)
    step(torch, cache)
    assert schedules_of(recorded) == (1, 4)


def test_layers_of_one_cache_among_others_share(torch, recorded):
    cache = LayeredCache(4, lambda layer: SlidingWindowCache(64) if layer % 2 else PagedCache(64, 32))
    x = torch.randn(2, 700, 2, 64).half()
    for layer in range(4):
        cache.update(x, x, layer)
        cache.attend(torch.randn(2, 1, 4, 64).half(), layer)
    assert schedules_of(recorded)[0] == 1


def test_layers_with_and_without_a_window_have_a_schedule_of_each_kind(torch, recorded):
    cache = filled(torch, layers=8)
    for layer in range(8):
        window = (600, 0) if layer % 2 else (None, None)
        cache.attend(*rows(torch, 1, 2, heads=4), layer, [1, 1], window_size=window)
    assert schedules_of(recorded) == (2, 8)


def test_a_cascade_has_a_schedule_for_each_of_its_parts(torch, recorded):
    cache = filled(torch, layers=4, lengths=(1200,))
    cache.fork(0)
    for layer in range(4):
        cache.update(*rows(torch, 2, 900), layer, [800, 100])
        cache.attend(*rows(torch, 1, 2, heads=4), layer, [1, 1], cascade=True)
    assert schedules_of(recorded) == (2, 8)


CHANGES = {
    "append": lambda torch, cache: cache.update(*rows(torch, 2, 1), 0, [0, 1]),
    "truncate": lambda torch, cache: cache.truncate([699, 3]),
    "reorder": lambda torch, cache: cache.reorder([1, 0]),
    "fork": lambda torch, cache: cache.fork(0),
    "add_sequence": lambda torch, cache: cache.add_sequence(),
    "remove": lambda torch, cache: cache.remove(1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_changes_lengths_makes_it_anew(torch, recorded, name):
    cache = filled(torch, layers=1)

    def attend():
        counts = [min(1, length) for length in cache.lengths]
        cache.attend(*rows(torch, 1, sum(counts), heads=4), 0, counts)
        return schedules_of(recorded)

    assert [attend(), attend()] == [(1, 1), (0, 1)]
    CHANGES[name](torch, cache)
    assert [attend(), attend()] == [(1, 1), (0, 1)]


OTHERS = {
    "rows": {"counts": [2, 1]},
    "window": {"window_size": (500, 0)},
    "split size": {"fixed_split_size": 256},
    "heads": {"heads": 8},
    "not causal": {"causal": False},
}


def test_as_many_rows_of_other_sequences_make_another(torch, recorded):
    cache = filled(torch, layers=1)
    for counts in ([2, 1], [1, 2]):
        cache.attend(*rows(torch, 1, 3, heads=4), 0, counts)
        assert schedules_of(recorded) == (1, 1)


@pytest.mark.parametrize("name", OTHERS)
def test_whatever_else_is_asked_makes_another(torch, recorded, name):
    cache = filled(torch, layers=1)

    def attend(counts=(1, 1), heads=4, **options):
        cache.attend(*rows(torch, 1, sum(counts), heads), 0, list(counts), **options)
        return schedules_of(recorded)

    assert [attend(), attend(**OTHERS[name]), attend(), attend(**OTHERS[name])] == [(1, 1), (1, 1), (0, 1), (0, 1)]


def test_another_stream_makes_its_own(torch, recorded):
    cache = filled(torch, layers=1)
    for stream, made in ((7, 1), (8, 1), (7, 0)):
        recorded.stream = stream
        cache.attend(*rows(torch, 1, 2, heads=4), 0, [1, 1])
        assert schedules_of(recorded) == (made, 1)


def test_another_device_makes_its_own(torch, recorded, monkeypatch):
    cache = filled(torch, layers=1)
    for index in (0, 1):
        monkeypatch.setattr("cupyattn.cuda.index_of", lambda array, index=index: index)
        cache.attend(*rows(torch, 1, 2, heads=4), 0, [1, 1])
        assert schedules_of(recorded) == (1, 1)


def test_another_thread_makes_its_own(torch, recorded):
    cache = filled(torch, layers=1)
    q = rows(torch, 1, 2, heads=4)
    for _ in range(2):  # the second one may have the number of the first one, which is gone
        thread = threading.Thread(target=lambda: cache.attend(*q, 0, [1, 1]))
        thread.start()
        thread.join()
        assert schedules_of(recorded) == (1, 1)


def test_a_call_that_makes_it_and_raises_leaves_none_that_was_not_queued(torch, recorded, monkeypatch):
    cache, q = filled(torch, layers=1), rows(torch, 1, 2, heads=4)

    def broken(specialisation, index):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("cupyattn.cuda.scheduling.kernel", broken)
        with pytest.raises(KeyboardInterrupt):
            cache.attend(*q, 0, [1, 1])
    cache.attend(*q, 0, [1, 1])
    assert schedules_of(recorded) == (1, 1)


def test_layers_that_have_no_schedule_make_none(torch, recorded):
    cache, x = LayeredCache(4, lambda layer: StaticCache(1024)), torch.randn(2, 700, 2, 64).half()
    for layer in range(4):
        cache.update(x, x, layer)
        cache.attend(torch.randn(2, 1, 4, 64).half(), layer)
    assert schedules_of(recorded) == (0, 4)
    assert cache._schedules._kept == ()


# ---- Numbers


def numbers(torch, cascade=False, layers=3):
    """Of three steps of some layers, among which sequences fork and leave."""
    torch.manual_seed(0)
    cache, found = filled(torch, layers, lengths=(600, 3)), []
    for change in (lambda: None, lambda: cache.fork(0), lambda: cache.remove(1)):
        change()
        batch = len(cache.lengths)
        for layer in range(layers):
            cache.update(*rows(torch, 2, batch), layer, [1] * batch)
            q = rows(torch, 1, batch, heads=4)
            found += cache.attend(*q, layer, [1] * batch, cascade=cascade, return_lse=True)
    return found


def alone(monkeypatch):
    """Every call makes its own."""
    monkeypatch.setattr(Schedules, "shared", lambda self, lengths, what, make: make())


@pytest.mark.parametrize("cascade", [False, True])
def test_results_are_the_same_bits_as_with_a_schedule_each(torch, driver, monkeypatch, cascade):
    shared = numbers(torch, cascade)
    made, calls = schedules_of(driver)
    alone(monkeypatch)
    own = numbers(torch, cascade)
    assert schedules_of(driver) == (made * 3, calls)
    assert all(torch.equal(a, b) for a, b in zip(shared, own, strict=True))


def test_in_a_graph_each_call_has_its_own_and_what_was_made_outside_is_not_used(torch, driver):
    cache, q = filled(torch, layers=1, lengths=(600, 3)), rows(torch, 1, 2, heads=4)
    expected = cache.attend(*q, 0, [1, 1])
    schedules_of(driver)
    with driver.capture() as replay:
        captured = [cache.attend(*q, 0, [1, 1]) for _ in range(2)]
    assert [what.source for what, _ in driver.launches] == 2 * ["schedule.cu", "splitkv.cu", "merge.cu"]
    for _, kept in cache._schedules._kept:
        kept.fill_(-1)  # memory that is somebody else's when the graph runs
    replay()
    assert all(torch.equal(out, expected) for out in captured)


def test_what_a_graph_made_is_not_used_outside(torch, driver):
    cache, q = filled(torch, layers=1, lengths=(600, 3)), rows(torch, 1, 2, heads=4)
    with driver.capture():
        cache.attend(*q, 0, [1, 1])
    schedules_of(driver)
    cache.attend(*q, 0, [1, 1])
    assert schedules_of(driver) == (1, 1)


# ---- What is kept


def test_no_more_are_kept_than_it_says():
    kept, made = Schedules(), []
    for i in range(2 * MOST):
        kept.shared((i,), "what", lambda i=i: made.append(i) or i)
    assert [kept.shared((i,), "what", lambda: None) for i in range(MOST, 2 * MOST)] == [*range(MOST, 2 * MOST)]
    assert len(kept._kept) == MOST


def test_a_reset_gives_them_back(torch, recorded):
    for cache in (filled(torch, layers=2), PrefixCache(2, num_pages=64, page_size=32)):
        if not cache.lengths:
            cache.start([*range(700)])
            filled(torch, cache=cache, lengths=(700,))
        step(torch, cache)
        assert cache._schedules._kept
        cache.reset()
        assert cache._schedules._kept == ()


@pytest.mark.parametrize("way", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_copies_have_their_own_and_their_layers_share_them(way):
    cache = LayeredCache(2, num_pages=8)
    cache._schedules.shared((), "what", lambda: 1)
    twin = way(cache)
    assert twin._schedules._kept == ()
    assert twin._schedules is not cache._schedules
    assert {id(layer._schedules) for layer in (*twin._state.layers, *twin._new)} == {id(twin._schedules)}


# ---- explain


def explained(cache, *more, device="H100"):
    return cupyattn.explain(cache.attend, (1, 1, 4, 64), *more, device=device).notes


def test_explain_says_where_a_schedule_is_shared(rng):
    x = rng.standard_normal((1, 700, 2, 64)).astype(np.float16)
    layered, paged = LayeredCache(3, num_pages=64), PagedCache(64)
    for layer in range(3):
        layered.update(x, x, layer)
    paged.append(x, x)
    assert "for all layers that are asked alike, of 3 in pages" in explained(layered, 0)[-1]
    assert "LayeredCache shares it" in explained(paged)[-1]


def test_explain_says_nothing_of_it_where_there_is_none(rng):
    x = rng.standard_normal((1, 700, 2, 64)).astype(np.float16)
    static, layered, paged = StaticCache(1024), LayeredCache(2, num_pages=64), PagedCache(64)
    static.append(x, x)
    paged.append(x, x)
    for layer in range(2):
        layered.update(x, x, layer)
    said = [*explained(static), *explained(layered, 0, device="cpu"), *explained(paged, device=None)]
    assert not any("schedule" in note for note in said)


def test_a_rehearsal_makes_and_keeps_none(rng):
    cache = LayeredCache(1, num_pages=64)
    x = rng.standard_normal((1, 700, 2, 64)).astype(np.float16)
    cache.update(x, x, 0)
    explained(cache, 0)
    assert cache._schedules._kept == ()
