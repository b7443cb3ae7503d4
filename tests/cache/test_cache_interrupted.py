"""Caches whose calls are interrupted at every instruction of theirs."""

import pytest
from attacks.interrupted import CACHES, ERRORS, EVERYTHING, appending, begun, calls, outlook, parted, torn

from cupyattn import DynamicCache, PagedCache
from cupyattn.cache.contiguous import Store

CALLS = [pytest.param(prepare, call, id=name) for name, prepare, call in calls()]


@pytest.mark.parametrize(("prepare", "call"), CALLS)
def test_an_interrupted_call_happened_or_did_not(prepare, call):
    count, found = torn(prepare, call, CACHES)
    assert found == []
    assert count > 20


@pytest.mark.parametrize(("prepare", "call"), CALLS)
@pytest.mark.parametrize("error", ERRORS)
def test_wherever_it_is_interrupted(prepare, call, error):
    """In all of the package, at some instructions; `make attack` takes every one."""
    count, found = torn(prepare, call, EVERYTHING, error, step=61)
    assert found == []
    assert count > 0


@pytest.mark.parametrize("writes", [1, 2])
def test_memory_that_runs_out_between_keys_and_values_leaves_forks_as_they_were(writes, monkeypatch):
    cache, before, done = parted(), outlook(parted()), []
    library = type(cache._state.kind.library)
    scatter = library.scatter

    def failing(*arguments):
        found = scatter(*arguments)
        done.append(found)
        if len(done) == writes:
            raise MemoryError
        return found

    with monkeypatch.context() as patched:
        patched.setattr(library, "scatter", failing)
        with pytest.raises(MemoryError):
            appending(1, batch=4)(cache)
    assert len(done) == writes
    assert outlook(cache) == before


def test_a_call_of_two_steps_is_found():
    def two_steps(cache):
        cache._state = cache._state._replace(stop=1)
        cache._state = cache._state._replace(stop=2)

    module = __file__
    assert len(torn(lambda: begun(DynamicCache()), two_steps, [module])[1]) > 0


def test_what_is_written_over_live_tokens_is_found():
    def in_place(cache):
        store: Store = cache._state
        store.k[:] = store.k[::-1].copy()
        store.v[:] = store.v[::-1].copy()

    assert len(torn(lambda: begun(DynamicCache()), in_place, [__file__])[1]) > 0


def test_a_page_that_is_free_and_in_use_is_found():
    def releases(cache):
        pages = cache._state.pages
        taken = pages.stack[pages.num_free - 1]
        pages.stack[pages.num_free - 1] = pages.tables[0][0]
        pages.stack[pages.num_free - 1] = taken

    assert len(torn(lambda: begun(PagedCache(4, 2), batch=1), releases, [__file__])[1]) > 0
