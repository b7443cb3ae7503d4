"""Caches whose calls are interrupted: before or after, never between.

What a cache is, is what it says of its tokens and what it goes on to be: after every interruption its keys and values
are compared with those before the call and those after it, then a token is appended to each sequence, and they are
compared again.
"""

import copy
from pathlib import Path

import numpy as np
from attacks.outcome import Outcome
from interruptions import at_every_instruction, instructions

import cupyattn
from cupyattn import DynamicCache, OffloadedCache, PagedCache, SlidingWindowCache, StaticCache
from cupyattn.cpu import threads

PACKAGE = Path(cupyattn.__file__).parent
CACHES = tuple(map(str, sorted((PACKAGE / "cache").glob("*.py"))))
EVERYTHING = tuple(map(str, sorted(PACKAGE.rglob("*.py"))))
ERRORS = (KeyboardInterrupt, MemoryError)

HEADS, DIM = 1, 2


def tokens(batch, count, first=0):
    """No two alike."""
    numbers = first + np.arange(batch * count, dtype=np.float32).reshape(batch, count, 1, 1)
    return np.broadcast_to(numbers, (batch, count, HEADS, DIM)).copy(), 1000 + 2 * numbers.repeat(DIM, 3)


def begun(cache, batch=2, count=3, **seqlens):
    k, v = tokens(batch, count)
    if seqlens:
        k, v = (x.reshape(-1, HEADS, DIM) for x in (k, v))
    cache.append(k, v, **seqlens)
    return cache


def forked():
    """Sequences that share pages, the last of them half full; few pages are free, and one sequence has none."""
    cache = begun(PagedCache(10, 2), batch=1, count=5)
    cache.fork(0)
    cache.fork(1)
    cache.append(*(x.reshape(-1, HEADS, DIM) for x in tokens(1, 3, 50)), seqlens=[0, 1, 2])
    cache.add_sequence()
    return cache


def parted():
    """Forks that share a page in which each has another number of tokens, the longest of them neither first nor last.

    No page of it may be written to by a shorter one where the longest has its tokens.
    """
    cache = begun(PagedCache(10, 4), batch=1, count=7)
    cache.fork(0)
    cache.fork(0)
    cache.truncate([6, 7, 5])
    cache.add_sequence()
    return cache


def appending(count, batch=2, first=100, **seqlens):
    k, v = tokens(batch, count, first)
    if seqlens:
        k, v = (x.reshape(-1, HEADS, DIM) for x in (k, v))
    return lambda cache: cache.append(k, v, **seqlens)


def attending(rows, **options):
    q = np.ones((rows if isinstance(rows, tuple) else (2, rows)) + (HEADS, DIM), np.float32)
    return lambda cache: cache.attend(q, **options)


def calls():
    """(name, how the cache is made, the call)."""
    contiguous = {
        "first tokens": (None, appending(3)),
        "append": (begun, appending(1)),
        "append to the brim": (begun, appending(5)),
        "truncate": (begun, lambda cache: cache.truncate(1)),
        "reorder": (begun, lambda cache: cache.reorder([1, 0])),
        "reorder to one": (begun, lambda cache: cache.reorder([1])),
        "reorder to three": (begun, lambda cache: cache.reorder(np.array([1, 1, 0]))),
        "attend": (begun, attending(2)),
        "copy": (begun, copy.copy),
        "deepcopy": (begun, copy.deepcopy),
    }
    kinds = {
        "dynamic": DynamicCache,
        "static": lambda: StaticCache(8),
        "sliding": lambda: SlidingWindowCache(2),
        "offloaded": OffloadedCache,
    }
    for kind, make in kinds.items():
        for name, (prepare, call) in contiguous.items():
            yield f"{kind}: {name}", (lambda make=make, prepare=prepare: (prepare or (lambda x: x))(make())), call
    for kind in ("dynamic", "offloaded"):
        yield f"{kind}: grow", lambda make=kinds[kind]: begun(make(), count=63), appending(2)
    yield "sliding: slide", lambda: begun(SlidingWindowCache(2), count=60), appending(9)

    def fetched(after=lambda cache: None):
        cache = begun(OffloadedCache())
        cache.prefetch()
        after(cache)
        return cache

    yield "offloaded: prefetch", lambda: begun(OffloadedCache()), lambda cache: cache.prefetch()
    for name in ("append", "truncate", "reorder", "attend", "copy", "deepcopy"):
        yield f"offloaded, prefetched: {name}", fetched, contiguous[name][1]
    yield "offloaded, prefetched: grow", fetched, appending(80)

    yield "paged: first tokens", lambda: PagedCache(10, 2), appending(3)
    yield "paged: first sequence", lambda: PagedCache(10, 2), lambda cache: cache.add_sequence()
    paged = {
        "append": appending(4, batch=1, seqlens=[2, 1, 0, 1]),
        "append evenly": appending(1, batch=4),
        "too many": lambda cache: _refused(cache, appending(9, batch=4)),
        "truncate": lambda cache: cache.truncate(3),
        "truncate each": lambda cache: cache.truncate([1, 6, 0, 0]),
        "reorder": lambda cache: cache.reorder([2, 0, 3, 1]),
        "reorder to two": lambda cache: cache.reorder([2, 2]),
        "fork": lambda cache: cache.fork(1),
        "add_sequence": lambda cache: cache.add_sequence(),
        "remove": lambda cache: cache.remove(1),
        "attend": attending((3,), seqlens=[1, 2, 0, 0]),
        "attend together": attending((3,), seqlens=[1, 1, 1, 0], cascade=True),
        "copy": copy.copy,
        "deepcopy": copy.deepcopy,
    }
    for name, call in paged.items():
        yield f"paged: {name}", forked, call
    for name in ("append", "append evenly", "too many", "truncate each", "reorder"):
        yield f"paged, forks of different lengths: {name}", parted, paged[name]


def _refused(cache, call):
    try:
        call(cache)
    except ValueError:
        return
    raise AssertionError("was to be refused")


def kept(cache):
    """What a cache has: tokens of each sequence, and free pages."""
    lengths, state = cache.lengths, cache._state
    if isinstance(cache, PagedCache):
        pages = state.pages
        _check_pages(pages)
        arrays = []
        for table, length in zip(pages.tables, lengths, strict=True):
            slot = np.arange(length)
            page = np.array(table, int)[slot // pages.page_size]
            arrays += [x[page, slot % pages.page_size] for x in (state.k, state.v) if x is not None]
        return lengths, tuple(x.tobytes() for x in arrays), pages.num_free
    if state is None:
        return lengths, (), 0
    if isinstance(cache, OffloadedCache):
        live = [x.swapaxes(0, 1) for x in state.live()]
        if state.fetched is not None:
            for home, host in zip(state.fetched, live, strict=True):
                assert np.array_equal(home[: len(cache)].swapaxes(0, 1), host), "what was fetched is not what there is"
    else:
        live = state.live()
    return lengths, tuple(x.tobytes() for x in live), getattr(state, "gone", 0)


def _check_pages(pages):
    used = np.array([page for table in pages.tables for page in table], int)
    uses = np.bincount(used, minlength=len(pages.references))
    free = pages.stack[: pages.num_free]
    assert pages.references.tolist() == uses.tolist(), "references are not counted right"
    assert sorted(free.tolist()) == np.flatnonzero(uses == 0).tolist(), "a page is free and in use, or neither"
    assert [len(x) for x in pages.tables] == [-(-n // pages.page_size) for n in pages.lengths], "a table does not fit"


def outlook(cache):
    """What a cache has, and what it has after one more token each, or what it says to that."""
    now = kept(cache)
    try:
        appending(1, batch=max(1, len(cache.lengths)), first=500)(cache)
    except ValueError as error:
        return now, str(error)
    return now, kept(cache)


def torn(prepare, call, files=CACHES, error=KeyboardInterrupt, first=0, step=1):
    """(interruptions, what each of those that tore something left)."""
    cache = prepare()
    before = outlook(cache)
    cache = prepare()
    call(cache)
    after = outlook(cache)
    count, found, held = 0, [], [prepare()]
    for number, _ in at_every_instruction(lambda held=held: call(held[0]), *files, error=error, first=first, step=step):
        count += 1
        try:
            left = outlook(held[0])
        except Exception as error_of_outlook:
            left = repr(error_of_outlook)
        if left not in (before, after):
            found.append(f"before instruction {number}: {left}")
        held[0] = prepare()
    return count, found


def torn_threads(num_workers, first=0, step=1):
    """The same for tasks on threads: the BLAS has its threads afterwards, and nobody holds it."""
    count, found, before = 0, [], threads._blas.num_threads()

    def call():
        threads.run_all([lambda scratch: None] * 3, num_workers)

    for number, _ in at_every_instruction(call, *EVERYTHING, first=first, step=step):
        count += 1
        now = max(threads._blas._originals(threads._State((), (), None)), default=before)
        if now != before or threads._blas._latest().holders:
            found.append(f"before instruction {number}: the BLAS has {now} threads and had {before}")
    return count, found


def attack(seed, cases):
    """About `cases` interruptions, every so many instructions of each call; the first ones differ by the seed."""
    length = sum(instructions(lambda cache=cache, call=call: call(cache), *EVERYTHING) for cache, call in _prepared())
    step = max(1, round(len(ERRORS) * length / cases))
    tried, lost = 0, []
    for error in ERRORS:
        for name, prepare, call in calls():
            count, found = torn(prepare, call, EVERYTHING, error, seed % step, step)
            tried += count
            lost += [f"{error.__name__} in {name}, {line}" for line in found]
    for num_workers in (1, 2, 3):
        count, found = torn_threads(num_workers, seed % step, step)
        tried += count
        lost += [f"on {num_workers} threads, {line}" for line in found]
    return Outcome(tried, lost)


def _prepared():
    for _, prepare, call in calls():
        yield prepare(), call
