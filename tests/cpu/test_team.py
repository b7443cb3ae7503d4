"""Threads that torch lends: the same ones in each call, and torch finds them as it left them."""

import contextlib
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from interruptions import at_every_instruction

import cupyattn
from cupyattn.cpu import num_cores, team, threads
from cupyattn.cpu.team import lent_by_torch, team_for
from cupyattn.cpu.threads import run_all

torch = pytest.importorskip("torch")

WAIT = 20
IS_AWAKE = team._is_awake
on_several_cores = pytest.mark.skipif(num_cores() < 2, reason="one core has no use for a second thread")


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    """Of torch and of ours, on one core too."""
    if team._openmp() is None:
        pytest.skip("needs a torch whose OpenMP is GNU's")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(team, "_is_awake", lambda thread: True)
    monkeypatch.setattr(type(threads._blas), "num_threads", lambda self: 2)
    torch.ones(10**6).sum()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def started(monkeypatch):
    """The threads of our own that were started."""
    found = []

    def start(function, arguments):
        found.append(arguments)
        return genuine(function, arguments)

    genuine = threads.start_new_thread
    monkeypatch.setattr(threads, "start_new_thread", start)
    monkeypatch.setattr("cupyattn.cpu.tasks.is_crowded", lambda: False)  # where tests run beside tests
    return found


def who_works(num_workers=2):
    """The system's numbers of the threads that worked at the same time."""
    together, found = threading.Barrier(num_workers, timeout=WAIT), []

    def task(scratch):
        together.wait()
        found.append(threading.get_native_id())

    run_all([task] * num_workers, num_workers)
    return set(found)


def level():
    return team._openmp().level()


def test_the_threads_are_the_same_in_every_call(started):
    with lent_by_torch(2):
        first, second = who_works(), who_works()
    assert first == second
    assert len(first) == 2
    assert threading.get_native_id() in first
    assert not started


def test_once_they_sleep_threads_are_our_own(started, monkeypatch):
    with lent_by_torch(2):
        who_works()
        monkeypatch.setattr(team, "_is_awake", lambda thread: thread != team._helpers.first)
        who_works()
        assert len(started) == 1
        monkeypatch.setattr(team, "_is_awake", lambda thread: thread == team._helpers.first)
        who_works()
        assert len(started) == 1


def test_who_is_awake_is_told_from_who_sleeps():
    numbers, done = [], threading.Event()

    def sleep():
        numbers.append(threading.get_native_id())
        done.wait(WAIT)

    sleeper = threading.Thread(target=sleep)
    sleeper.start()
    until = time.monotonic() + WAIT
    while (not numbers or IS_AWAKE(numbers[0])) and time.monotonic() < until:
        time.sleep(0.001)
    assert not IS_AWAKE(numbers[0])
    assert IS_AWAKE(threading.get_native_id())
    done.set()
    sleeper.join()


def test_helpers_who_are_gone_are_met_anew(monkeypatch):
    """As after torch.set_num_threads."""
    monkeypatch.setattr(team, "_is_awake", IS_AWAKE)
    with lent_by_torch(2):
        team._helpers.first = 2**22 + 1  # more than there can be
        assert team_for(2) is not None
        who_works()
        assert team._helpers.first not in (None, 2**22 + 1)


def test_outside_a_call_on_tensors_they_are_our_own(started):
    assert len(who_works()) == 2
    assert len(started) == 1


@pytest.mark.parametrize(("lent", "num_workers", "taken"), [(1, 2, False), (2, 2, True), (4, 2, True), (5, 2, False)])
def test_they_are_taken_where_there_are_enough_and_not_far_too_many(lent, num_workers, taken):
    with lent_by_torch(lent):
        assert (team_for(num_workers) is not None) == taken


def test_of_more_than_are_wanted_the_others_do_nothing():
    seen = []

    def task(scratch):
        time.sleep(0.001)
        seen.append(threading.get_native_id())

    with lent_by_torch(4):
        run_all([task] * 100, 2)
    assert len(seen) == 100
    assert len(set(seen)) <= 2


@on_several_cores
def test_calls_on_tensors_take_them_forward_and_backward(started):
    x = torch.randn(1, 1200, 2, 16, requires_grad=True)
    assert cupyattn.explain(x, x, x).num_workers > 1
    cupyattn.attention(x, x, x).sum().backward()
    cupyattn.attention(x.detach(), x.detach(), x.detach())
    assert not started


@on_several_cores
def test_tensors_get_the_bits_of_arrays(started):
    x = np.random.default_rng(0).standard_normal((1, 1200, 2, 16)).astype(np.float32)
    expected = cupyattn.attention(x, x, x)
    assert started
    started.clear()
    t = torch.from_numpy(x)
    np.testing.assert_array_equal(cupyattn.attention(t, t, t), expected)
    assert not started


class Boom(Exception):
    pass


def test_what_a_helper_raises_is_raised_and_the_region_has_ended():
    caller, together = threading.get_ident(), threading.Barrier(2, timeout=WAIT)

    def task(scratch):
        together.wait()
        if threading.get_ident() != caller:
            raise Boom

    with lent_by_torch(2), pytest.raises(Boom):
        run_all([task] * 2, 2)
    assert level() == 0


def test_an_interruption_anywhere_ends_the_region_and_leaves_the_blas_as_it_was():
    count = 0
    with lent_by_torch(2):
        for number, _ in at_every_instruction(
            lambda: run_all([lambda scratch: None] * 3, 2), threads.__file__, team.__file__
        ):
            count += 1
            assert level() == 0, f"after {number} instructions"
            assert not threads._blas._latest().holders, f"after {number} instructions"
    assert count > 150
    assert torch.ones(10**6).sum() == 10**6


def test_the_end_of_an_interrupted_call_that_comes_late_does_not_end_a_later_ones_region():
    """Its traceback keeps the region's object: of a caller who keeps the exception, as a notebook does."""
    caller, kept = threading.get_ident(), []

    class Kept(KeyboardInterrupt):
        def __init__(self):
            kept.append(self)

    with lent_by_torch(2):
        for number, _ in at_every_instruction(
            lambda: run_all([lambda scratch: None] * 2, 2), team.__file__, error=Kept, first=40
        ):
            was_open, together, levels = level(), threading.Barrier(2, timeout=WAIT), []

            def task(scratch, together=together, levels=levels):
                together.wait()
                if threading.get_ident() == caller:
                    kept.clear()
                    levels.append(level())

            run_all([task] * 2, 2)
            assert levels == [0 if was_open else 1], f"after {number} instructions"
            assert level() == 0


def test_an_interruption_anywhere_takes_back_what_was_lent():
    def call():
        with lent_by_torch(2):
            pass

    for number, _ in at_every_instruction(call, team.__file__, contextlib.__file__):
        assert team_for(2) is None, f"after {number} instructions"


def test_an_interruption_stops_those_who_help():
    everybody, done, caller = threading.Barrier(2, timeout=WAIT), [], threading.get_ident()

    def task(scratch):
        if not done:
            everybody.wait()
        done.append(1)
        if threading.get_ident() == caller:
            raise KeyboardInterrupt

    with lent_by_torch(2), pytest.raises(KeyboardInterrupt):
        run_all([task] * 10**6, 2)
    assert len(done) < 10**6
    assert level() == 0


def test_a_call_out_of_a_signals_handler_has_threads_of_its_own(started):
    """It comes while torch's are at work."""
    seen = []

    class Handled(Exception):
        def __init__(self):
            seen.append(level())
            run_all([lambda scratch: None] * 2, 2)

    with lent_by_torch(2):
        for _ in at_every_instruction(
            lambda: run_all([lambda scratch: None] * 2, 2), threads.__file__, error=Handled, step=5
        ):
            assert level() == 0
    assert set(seen) == {0, 1}
    assert len(started) >= seen.count(1)


def test_every_calling_thread_has_its_own():
    found = {}

    def call(name):
        with lent_by_torch(2):
            found[name] = who_works()

    callers = [threading.Thread(target=call, args=(name,)) for name in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(WAIT)
    assert [len(workers) for workers in found.values()] == [2] * 4


def run_in_a_process_of_its_own(source):
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


TENSORS = """
import os
import numpy as np
import torch
import cupyattn

torch.set_num_threads(2)
x = torch.randn(1, 1200, 2, 16)
expected = cupyattn.attention(x, x, x)
torch.ones(10**6).sum()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork (POSIX)")
def test_a_forked_child_does_not_wait_for_its_parents_threads():
    run_in_a_process_of_its_own(
        TENSORS
        + """
child = os.fork()
if child == 0:
    # torch's own comparison would wait for ever
    os._exit(0 if np.array_equal(cupyattn.attention(x, x, x).numpy(), expected.numpy()) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    )


def test_calls_work_at_exit_and_after_the_main_thread_has_ended():
    said = run_in_a_process_of_its_own(
        TENSORS
        + """
import atexit, threading

def call(when):
    assert (cupyattn.attention(x, x, x) == expected).all()
    print(when, flush=True)

def outlive():
    threading.main_thread().join()
    call("a thread that outlives the main one")

atexit.register(call, "at exit")
threading.Thread(target=outlive).start()
"""
    )
    assert sorted(said.splitlines()) == ["a thread that outlives the main one", "at exit"]


def test_where_torchs_openmp_is_another_threads_are_our_own(monkeypatch, started):
    monkeypatch.setattr(team, "_openmp", lambda: None)
    with lent_by_torch(2):
        who_works()
    assert len(started) == 1


def test_another_openmp_is_not_taken_for_gnus():
    class Intels:
        def __getattr__(self, name):
            return lambda *arguments: None

    with pytest.MonkeyPatch.context() as monkey:
        monkey.setattr(team.ctypes, "CDLL", lambda *arguments, **options: Intels())
        assert team._openmp.__wrapped__() is None
