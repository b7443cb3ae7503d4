"""Many threads, children of every kind, and memory that runs out: the same bits, or a MemoryError and nothing torn.

What crashes when an allocation fails is no part of a package in Python: NumPy, CPython or OpenBLAS do, and such
numbers are told apart by a run of their own and said in the notes.

    python tests/attacks/processes.py limited SEED NUMBER          # an address space that is nearly full
    python tests/attacks/processes.py nomemory NUMBER FIRST STEP   # a call whose allocation FIRST, ... fails
    python tests/attacks/processes.py threads SEED NUMBER
"""

import collections
import concurrent.futures
import copy
import ctypes
import gc
import hashlib
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import ml_dtypes
import numpy as np
from attacks.interrupted import appending, attending, begun, calls, outlook
from attacks.outcome import Outcome
from threadpoolctl import ThreadpoolController, threadpool_limits

import cupyattn
from cupyattn import DynamicCache, OffloadedCache, PagedCache, SlidingWindowCache, StaticCache
from cupyattn.cpu import threads

DTYPES = (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)
CALLERS = 16
CALLS_OF_EACH = 4
BLAS_THREADS = 3
"""No default, so that what is not given back is seen on any machine."""
JOBS = 2
"""Children at a time, where they compute."""
WAIT = 120
"""Seconds after which somebody hangs."""
PATIENCE = 5
"""The same for one call that has too little memory."""
QUIET = 60
"""So many allocations in a row that fail without anybody's noticing: the call has no more."""

# ---------------------------------------------------------------------------------------------------
# Calls and their bits
# ---------------------------------------------------------------------------------------------------


def _asked(rng, count):
    """Calls as (function, dtype, whether it is for several threads, seed)."""
    return [
        (rng.choice(list(FUNCTIONS)), rng.randrange(len(DTYPES)), rng.random() < 0.15, rng.randrange(2**32))
        for _ in range(count)
    ]


def _bits(asked):
    """What a call gives, as one number."""
    name, dtype, is_big, seed = asked
    rng = np.random.default_rng(seed)
    rows, keys = rng.integers(350, 550, 2) if is_big else rng.integers(1, 90, 2)
    heads, dim = (8, 64) if is_big else (2, 16)

    def drawn(count, *more):
        return rng.standard_normal((2, int(count), *(more or (heads, dim)))).astype(DTYPES[dtype])

    results = FUNCTIONS[name](drawn, rows, keys)
    return hashlib.sha256(b"".join(np.ascontiguousarray(x).tobytes() for x in results)).hexdigest()


def _forward(drawn, rows, keys):
    return cupyattn.attention(drawn(rows), drawn(keys), drawn(keys), causal=True, alignment="top-left", return_lse=True)


def _edited(drawn, rows, keys):
    asked = {"softcap": 5.0, "dropout_p": 0.2, "dropout_seed": 7, "window_size": (40, 3), "alignment": "top-left"}
    return [cupyattn.attention(drawn(rows), drawn(keys), drawn(keys), **asked)]


def _backward(drawn, rows, keys):
    """Gradients, also of a bias that all heads and sequences have in common: sums of several tasks."""
    bias = drawn(keys, 1)[:1].reshape(1, 1, 1, -1)
    found = cupyattn.attention_backward(drawn(rows), drawn(rows), drawn(keys), drawn(keys), bias=bias)
    return [x for x in found if x is not None]


def _grouped(drawn, rows, keys):
    q = drawn(rows)
    return [cupyattn.flash_attn_func(q, drawn(keys, 1, q.shape[-1]), drawn(keys, 1, q.shape[-1]))]


def _packed(drawn, rows, keys):
    q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (drawn(rows), drawn(keys), drawn(keys)))
    starts = [np.array([0, n // 3, 2 * n], np.int32) for n in (rows, keys)]
    longest = [int(np.diff(x).max()) for x in starts]
    return [cupyattn.flash_attn_varlen_func(q, k, v, *starts, *longest, causal=True)]


def _cached(drawn, rows, keys):
    found, caches = [], (DynamicCache(), StaticCache(int(keys) + 4), SlidingWindowCache(20), OffloadedCache(),
                         PagedCache(700, 2))  # fmt: skip
    k, v, q, more = drawn(keys), drawn(keys), drawn(3), drawn(3)
    for cache in caches:
        cache.append(k, v)
        cache.append(more, more)
        found.append(cache.attend(q))
    return found


FUNCTIONS = {
    "forward": _forward,
    "edited": _edited,
    "backward": _backward,
    "grouped": _grouped,
    "packed": _packed,
    "cached": _cached,
}


def _blas_threads():
    return [library.num_threads for library in ThreadpoolController().select(user_api="blas").lib_controllers]


# ---------------------------------------------------------------------------------------------------
# Threads
# ---------------------------------------------------------------------------------------------------


def _crowd(seed, number):
    """What is wrong after many threads called at once."""
    rng, lost = random.Random(f"{seed}-threads-{number}"), []
    asked = [_asked(rng, CALLS_OF_EACH) for _ in range(CALLERS)]
    with threadpool_limits(BLAS_THREADS, user_api="blas"):
        before = _blas_threads()
        expected = [[_bits(each) for each in some] for some in asked]
        everybody = threading.Barrier(CALLERS)

        def call(some, wanted):
            everybody.wait(WAIT)
            for each, right in zip(some, wanted, strict=True):
                try:
                    if _bits(each) != right:
                        lost.append(f"{each} gave other bits among {CALLERS} threads")
                except Exception as error:
                    lost.append(f"{each} among {CALLERS} threads: {error!r}")

        callers = [threading.Thread(target=call, args=x, daemon=True) for x in zip(asked, expected, strict=True)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(WAIT)
        if any(caller.is_alive() for caller in callers):
            lost.append(f"threads hung for {WAIT} s")
        elif _blas_threads() != before:
            lost.append(f"the BLAS had {before} threads and has {_blas_threads()}")
    return [f"{line}; python tests/attacks/processes.py threads {seed} {number}" for line in lost]


# ---------------------------------------------------------------------------------------------------
# Children
# ---------------------------------------------------------------------------------------------------


def _child(asked, pipe):
    try:
        pipe.send(([_bits(each) for each in asked], bool(threads._blas._latest().holders)))
    except BaseException as error:
        pipe.send((repr(error), False))


def _child_of(method, asked, expected):
    """What is wrong with the bits of a child; nothing if they are right."""
    context = multiprocessing.get_context(method)
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(asked, there), daemon=True)
    process.start()
    there.close()
    try:
        if not here.poll(WAIT):
            return f"hung for {WAIT} s"
        found, is_held = here.recv()
    except EOFError:
        process.join(WAIT)
        return f"died with {process.exitcode}"
    finally:
        process.kill()
        process.join()
        here.close()
    if found != expected:
        return f"gave {found if isinstance(found, str) else 'other bits'}"
    return "holds the BLAS for nobody" if is_held else ""


def _children(seed, count):
    """The same calls in `count` children of each kind; a fork also while threads are inside of calls."""
    rng, lost, tried = random.Random(f"{seed}-children"), [], 0
    methods = [x for x in ("fork", "spawn", "forkserver") if x in multiprocessing.get_all_start_methods()]
    if "forkserver" in methods:
        multiprocessing.get_context("forkserver").set_forkserver_preload(["cupyattn", "attacks.processes"])
    for number in range(count):
        asked = _asked(rng, 3)
        expected = [_bits(each) for each in asked]
        for method in methods:
            tried += 1
            if wrong := _child_of(method, asked, expected):
                lost.append(f"{method} with {asked}: {wrong}; seed {seed}, child {number} of {count}")
        if "fork" not in methods:
            continue
        for busy in (("forward", 2, True, 1), ("backward", 3, True, 2), ("forward", 2, False, 3)):
            tried += 1
            stop = threading.Event()

            def work(busy=busy, stop=stop):
                while not stop.is_set():
                    _bits(busy)

            worker = threading.Thread(target=work, daemon=True)
            worker.start()
            stop.wait(rng.uniform(0.0, 0.03))
            if wrong := _child_of("fork", asked, expected):
                lost.append(f"fork beside {busy} with {asked}: {wrong}; seed {seed}, child {number} of {count}")
            stop.set()
            worker.join(WAIT)
    return tried, lost


# ---------------------------------------------------------------------------------------------------
# A full address space
# ---------------------------------------------------------------------------------------------------

MANY = 20_000


def _caches():
    """(name, how the cache is made, the call): arrays of megabytes."""
    kinds = {
        "dynamic": DynamicCache,
        "static": lambda: StaticCache(3 * MANY),
        "sliding": lambda: SlidingWindowCache(MANY // 2),
        "offloaded": OffloadedCache,
        "paged": lambda: PagedCache(3 * MANY, 2),
    }
    ways = {
        "first tokens": (0, appending(MANY)),
        "append": (3, appending(MANY)),
        "append a little": (MANY, appending(1)),
        "truncate": (MANY, lambda cache: cache.truncate(5)),
        "reorder": (MANY, lambda cache: cache.reorder([1, 0])),
        "reorder to three": (MANY // 2, lambda cache: cache.reorder([1, 1, 0])),
        "attend": (MANY, attending(2)),
        "copy": (MANY, copy.copy),
        "deepcopy": (MANY, copy.deepcopy),
    }
    for kind, make in kinds.items():
        for name, (count, call) in ways.items():
            yield f"{kind}: {name}", (lambda make=make, n=count: begun(make(), count=n) if n else make()), call
        if kind == "paged":
            yield "paged: fork", (lambda make=make: begun(make(), count=MANY)), lambda cache: cache.fork(0)
        if kind == "offloaded":
            yield "offloaded: prefetch", (lambda make=make: begun(make(), count=MANY)), lambda cache: cache.prefetch()


def _what_came(result):
    if isinstance(result, np.ndarray):
        return result.tobytes()
    return outlook(result) if isinstance(result, cupyattn.Cache) else result


def _limited(seed, number):
    """In a process of its own: how many calls were right and how many refused, and what was neither."""
    import resource

    _say_where_it_hangs()
    rng, counts, lost = random.Random(f"{seed}-limited-{number}"), collections.Counter(), []
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    room = 0 if rng.random() < 0.4 else round(2 ** rng.uniform(14, 23))

    def warm(scratch):
        for dtype in (np.float32, np.float64):
            x = np.ones((600, 600), dtype)
            x @ x

    # OpenBLAS takes a buffer for each thread when that first needs one, and ends the process where it gets none.
    threads.run_all([warm] * 50, os.cpu_count() or 1)
    warm(None)

    def limited(call):
        """(whether it came to its end, what it gave)."""
        threads._shelf._spare.clear()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed is no hidden room
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        signal.alarm(PATIENCE)
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room, hard))
        try:
            return True, call()
        except (MemoryError, SystemError):  # C code that failed without a word, which is not ours
            return False, None
        finally:
            signal.alarm(0)
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))

    def note(name, ended, wrong):
        counts["right" if ended else "refused"] += 1
        if wrong:
            lost.append(f"{name} with room for {room} bytes: {wrong}")

    for asked in _asked(rng, 20 * (number % 2)):
        expected = _bits(asked)
        try:
            ended, found = limited(lambda asked=asked: _bits(asked))
            note(asked, ended, "wrong bits" if ended and found != expected else "")
        except Exception:
            note(asked, False, traceback.format_exc()[-600:])
    for name, prepare, call in rng.sample(list(_caches()), 16 * (1 - number % 2)):
        before = outlook(prepare())
        cache = prepare()
        expected = _what_came(call(cache))
        after = outlook(cache)
        cache = prepare()
        try:
            ended, found = limited(lambda cache=cache, call=call: call(cache))
        except Exception:
            note(name, False, traceback.format_exc()[-600:])
            continue
        left = outlook(cache)
        is_whole = left == after if ended else left in (before, after)
        wrong = "" if is_whole else "the cache is torn"
        note(name, ended, wrong or ("wrong result" if ended and _what_came(found) != expected else ""))
    if threads._blas._latest().holders:
        lost.append("somebody holds the BLAS for ever")
    return {"counts": counts, "lost": lost}


def _in_memory_limits(seed, count):
    """(calls, what was lost, what came of all, notes)."""
    counts, lost, crashes = collections.Counter(), [], []
    with concurrent.futures.ThreadPoolExecutor(JOBS) as pool:
        runs = list(pool.map(lambda number: _run(["limited", seed, number]), range(count)))
    for number, (found, crash) in enumerate(runs):
        again = f"python tests/attacks/processes.py limited {seed} {number}"
        if found is None:
            (crashes if _is_a_crash(crash) else lost).append(f"{again}: {crash}")
            continue
        counts.update(found["counts"])
        lost += [f"{line}; {again}" for line in found["lost"]]
    notes = f"{counts['right']} calls had memory enough and {counts['refused']} had not"
    if crashes:
        notes += f"; OpenBLAS, NumPy or CPython ended {len(crashes)} processes: {crashes[0]}"
    return sum(counts.values()), lost, notes


def _run(arguments, wait=WAIT):
    """(what a process of this file says, None) or (None, how it ended)."""
    command = [sys.executable, "-X", "faulthandler", __file__, *map(str, arguments)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=wait, check=False)
    except subprocess.TimeoutExpired:
        return None, f"hung for {wait} s"
    if done.returncode:
        return None, f"died with {done.returncode}: {_in_a_line(done.stderr)}"
    return json.loads(done.stdout.splitlines()[-1]), None


def _say_where_it_hangs():
    """After an alarm; then the process ends."""
    import faulthandler

    faulthandler.register(signal.SIGALRM, chain=True)


def _is_a_crash(ended):
    """Whether OpenBLAS gave up or the interpreter crashed."""
    signals = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE)
    return "OpenBLAS" in ended or any(f"died with {-number}" in ended for number in signals)


def _waits_for_a_thread(ended):
    """Whether `Thread.start` waits for ever, since the thread had no memory to say that it has begun."""
    return f"died with {-signal.SIGALRM}" in ended and bool(re.search(r"in wait \| threading.py.* in start", ended))


def _in_a_line(text):
    """Where a thread of a traceback was, or the last words there are, without folders."""
    text = re.sub(r'File "(?:[^"]*/)?([^"]+)"', r"\1", text.split("Extension modules")[0])
    *before, last = re.split(r"\(most recent call first\):\n", text)
    if before:  # the thread that is deepest in calls; others wait for it
        last = max((*before[1:], last), key=lambda frames: frames.count(" line "))
    lines = [line.strip() for line in last.splitlines() if line.strip()]
    return " | ".join(lines[:8] if before else lines[-8:])[:600]


# ---------------------------------------------------------------------------------------------------
# One allocation that fails
# ---------------------------------------------------------------------------------------------------


def _fallible():
    """(name, how what it is about is made, the call, what is left): caches and threads."""
    for name, prepare, call in calls():
        yield name, prepare, call, outlook
    for workers in (1, 2):
        tasks = [lambda scratch: None] * 3
        yield (
            f"threads: {workers}",
            lambda: None,
            lambda _, workers=workers, tasks=tasks: threads.run_all(tasks, workers),
            lambda _: (_blas_threads(), len(threads._blas._latest().holders)),
        )


def _nomemory(number, first, step, progress=None):
    """In a process of its own: what a call left whose allocation `first`, `first + step`, ... failed."""
    import _testcapi

    _say_where_it_hangs()
    name, prepare, call, left_by = list(_fallible())[number]
    before = left_by(prepare())
    thing = prepare()
    call(thing)
    after = left_by(thing)
    lost, errors, tried, quiet = [], collections.Counter(), 0, 0
    fail, stop = _testcapi.set_nomemory, _testcapi.remove_mem_hooks
    sys.unraisablehook = lambda _: None  # a message for each would need memory, too
    gc.disable()
    while quiet < QUIET and (step or not tried):
        thing, error = prepare(), None
        if progress is not None:
            os.pwrite(progress, f"{first:<20}".encode(), 0)
        signal.alarm(PATIENCE)
        fail(first, first + 1)
        try:
            call(thing)
        except BaseException as caught:
            stop()
            error = type(caught).__name__  # not itself, whose traceback would keep alive what the call held
        stop()
        signal.alarm(0)
        tried += 1
        quiet = quiet + step if error is None else 0
        try:
            left = left_by(thing)
        except Exception as error_of_outlook:
            left = repr(error_of_outlook)
        if left not in ((after,) if error is None else (before, after)):
            again = f"python tests/attacks/processes.py nomemory {number} {first} 0"
            lost.append(f"allocation {first} of {name} ({error}): {str(left)[:200]}, no state there should be; {again}")
        if error is not None:
            errors[error] += 1
        first += step
    return {"tried": tried, "lost": lost, "errors": errors}


def _with_failures(seed, count, step):
    """Every so manieth allocation of `count` calls fails: (tried, lost, notes)."""
    try:
        from _testcapi import set_nomemory  # noqa: F401
    except ImportError:
        return 0, [], "no _testcapi.set_nomemory"
    names = dict(enumerate(name for name, *_ in _fallible()))
    tried, lost, crashes, errors = 0, [], [], collections.Counter()

    def fail(number):
        first, found = seed % step, []
        while first is not None:
            *some, first = _until_a_crash(number, first, step)
            found.append(some)
        return found

    with concurrent.futures.ThreadPoolExecutor(JOBS) as pool:
        numbers = sorted(random.Random(seed).sample(list(names), min(count, len(names))))
        for number, runs in zip(numbers, pool.map(fail, numbers), strict=True):
            for found, crash in runs:
                tried += found["tried"]
                lost += found["lost"]
                errors.update(found["errors"])
                if crash:
                    crashes.append(f"{names[number]}: {crash}")
    others = {kind: count for kind, count in errors.items() if kind != "MemoryError"}
    notes = f"{errors['MemoryError']} MemoryErrors and {others or 'no other'} came out of {tried} calls"
    if crashes:
        notes += f"; {len(crashes)} crashes of CPython or NumPy, or hangs of Thread.start, such as {crashes[0]}"
    return tried, lost, notes


def _until_a_crash(number, first, step):
    """(what was found, how the process crashed or None, where to go on or None)."""
    with tempfile.TemporaryFile() as progress:
        command = [sys.executable, "-X", "faulthandler", __file__, "nomemory", number, first, step, progress.fileno()]
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, pass_fds=[progress.fileno()], check=False
        )
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1]), None, None
        reached = progress.seek(0) or progress.read().strip()
    nothing = {"tried": 0, "lost": [], "errors": {}}
    if not reached:
        return {**nothing, "lost": [f"died with {done.returncode} before all: {done.stderr[-500:]}"]}, None, None
    reached, again = int(reached), ""
    if done.returncode != -signal.SIGALRM:
        again = ", alone as well" if _run(["nomemory", number, reached, 0])[1] else ", but not alone"
    rerun = f"python tests/attacks/processes.py nomemory {number} {reached} 0"
    crash = f"allocation {reached} died with {done.returncode}{again}: {_in_a_line(done.stderr)}; {rerun}"
    if not (_is_a_crash(crash) or _waits_for_a_thread(crash)):
        return {**nothing, "lost": [crash]}, None, reached + step
    return {**nothing, "tried": 1}, crash, reached + step


def attack(seed: int, cases: int) -> Outcome:
    """Of `cases`: crowds of threads, children, limits, and an even share of all allocations."""
    tried, lost = 0, []
    for number in range(max(1, cases // 25)):
        lost += _crowd(seed, number)
        tried += CALLERS * CALLS_OF_EACH
    count, found = _children(seed, max(1, cases // 20))
    tried, lost = tried + count, lost + found
    count, found, limits = _in_memory_limits(seed, max(1, cases // 10))
    tried, lost = tried + count, lost + found
    count, found, failures = _with_failures(seed, cases, max(1, 400 // cases))
    return Outcome(tried + count, lost + found, f"limits: {limits}. Allocations: {failures}")


def _honest_about_memory(function, *arguments):
    """A call in a process whose memory is what the system says it is."""
    libc, found = ctypes.CDLL(None), []
    libc.mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: arrays come from the system
    libc.mallopt(-8, 1)  # M_ARENA_MAX: each thread's own would be 64 MB of hidden room
    # The main thread's stack grows, and where it may not, the process ends without a word; a thread's is all there.
    before = threading.stack_size(2**24)
    thread = threading.Thread(target=lambda: found.append(function(*arguments)))
    thread.start()
    threading.stack_size(before)
    thread.join()
    return found[0]


if __name__ == "__main__":
    what, *numbers = sys.argv[1], *map(int, sys.argv[2:])
    if what == "limited":
        print(json.dumps(_honest_about_memory(_limited, *numbers)))
    else:
        print(json.dumps({"nomemory": _nomemory, "threads": _crowd}[what](*numbers)))
