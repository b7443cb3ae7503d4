"""Many tasks on some threads, and a BLAS that has its own threads back afterwards."""

import _thread
import os
import random
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from interruptions import at_every_instruction
from threadpoolctl import ThreadpoolController, threadpool_limits

import cupyattn
from cupyattn.cpu import flash, threads
from cupyattn.cpu.threads import run_all

WAIT = 20
"""Seconds after which a thread that should have come is missed."""


def blas_threads():
    """Threads of each BLAS in this process."""
    return [library.num_threads for library in ThreadpoolController().select(user_api="blas").lib_controllers]


@pytest.fixture
def three_blas_threads():
    """A user who set 3: no default, so that what is not restored is seen, on one core too.

    Other packages' BLAS may have come since the first call, which NumPy does not use; here they are all looked at.
    """
    vars(threads._blas).pop("_libraries", None)
    with threadpool_limits(3, user_api="blas"):
        counts = blas_threads()
        if not counts or set(counts) != {3}:
            pytest.skip("needs a BLAS whose threads can be counted and set")
        yield counts


pytestmark = pytest.mark.usefixtures("three_blas_threads")


def wait_until(is_so):
    end = time.monotonic() + WAIT
    while not is_so() and time.monotonic() < end:
        time.sleep(0.001)
    assert is_so()


class Boom(Exception):
    pass


@pytest.mark.parametrize("num_workers", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 500])
def test_every_task_runs_once(count, num_workers):
    done = []
    run_all([lambda scratch, i=i: done.append(i) for i in range(count)], num_workers)
    assert sorted(done) == list(range(count))
    if num_workers == 1:
        assert done == list(range(count))


def test_tasks_that_run_at_once_have_scratch_memory_of_their_own():
    everybody = threading.Barrier(3, timeout=WAIT)

    def task(scratch):
        everybody.wait()  # three tasks that wait for each other are on three threads
        mine = scratch.array("mine", (1000,), np.int64)
        mine[...] = threading.get_ident()
        everybody.wait()
        assert (mine == threading.get_ident()).all()

    run_all([task] * 3, 3)
    run_all([task] * 3, 3)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_what_a_task_raises_is_raised_and_stops_the_rest(num_workers):
    done = []

    def bad(scratch):
        raise Boom

    def slow(scratch):
        time.sleep(0.001)
        done.append(1)

    with pytest.raises(Boom):
        run_all([slow, bad, *[slow] * 1000], num_workers)
    assert len(done) < 500


def test_what_a_helping_thread_raises_is_raised_too():
    caller, raised = threading.get_ident(), threading.Event()

    def task(scratch):
        if threading.get_ident() == caller:
            assert raised.wait(WAIT)
        else:
            raised.set()
            raise Boom

    with pytest.raises(Boom):
        run_all([task] * 2, 2)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interruption_is_raised_and_restores_the_blas(error, three_blas_threads):
    def task(scratch):
        raise error

    with pytest.raises(error):
        run_all([task] * 4, 3)
    assert blas_threads() == three_blas_threads


def test_calls_nest():
    done = []

    def outer(scratch):
        run_all([lambda scratch: done.append(blas_threads()[0])] * 5, 2)

    run_all([outer] * 4, 3)
    assert done == [1] * 20
    assert blas_threads() == [3] * len(blas_threads())


def test_the_blas_has_one_thread_inside_and_its_own_again_outside(three_blas_threads):
    inside = []
    run_all([lambda scratch: inside.append(set(blas_threads()))] * 4, 2)
    assert inside == [{1}] * 4
    assert blas_threads() == three_blas_threads
    with pytest.raises(ZeroDivisionError):
        run_all([lambda scratch: 1 / 0] * 4, 2)
    assert blas_threads() == three_blas_threads


def test_the_blas_has_one_thread_if_one_worker_does_it_all(three_blas_threads):
    inside = []
    run_all([lambda scratch: inside.append(set(blas_threads()))] * 3, 1)
    assert inside == [{1}] * 3
    assert blas_threads() == three_blas_threads


def test_nobody_holds_the_blas_for_small_products(three_blas_threads):
    inside = []
    run_all([lambda scratch: inside.append(blas_threads())] * 3, 1, are_small=True)
    assert inside == [three_blas_threads] * 3


@pytest.mark.parametrize(("tokens", "threads_inside"), [(64, 3), (65, 1), (200, 1)])
@pytest.mark.parametrize("function", ["flash", "flash_backward"])
def test_calls_hold_the_blas_where_it_had_threads(tokens, threads_inside, function, monkeypatch, rng):
    """OpenBLAS takes threads from 2 ** 18 multiplications on."""
    torch, inside, original = pytest.importorskip("torch"), [], getattr(flash, function)

    def watched(*arguments):
        inside.append(set(blas_threads()))
        return original(*arguments)

    monkeypatch.setattr(flash, function, watched)
    q = torch.from_numpy(rng.standard_normal((1, tokens, 1, 64))).requires_grad_()
    cupyattn.attention(q, q, q).sum().backward()
    assert inside == [{threads_inside}] * len(inside) != []


def test_two_callers_that_overlap_restore_the_blas_after_the_later_one(three_blas_threads):
    """The one that came first leaves first: the other must neither lose its limit nor make it permanent."""
    second_is_in, first_is_out = threading.Event(), threading.Event()
    seen = []

    def second():
        def task(scratch):
            second_is_in.set()
            assert first_is_out.wait(WAIT)
            seen.append(set(blas_threads()))

        run_all([task] * 2, 2)

    other = threading.Thread(target=second)

    def task(scratch):
        assert second_is_in.wait(WAIT)

    def start_the_other(scratch):
        other.start()
        task(scratch)

    run_all([start_the_other, task], 2)
    first_is_out.set()
    other.join(WAIT)
    assert seen == [{1}, {1}]
    assert blas_threads() == three_blas_threads


def test_the_blas_is_held_whichever_thread_calls(three_blas_threads):
    """threadpoolctl listens to one thread at a time: the one that set a limit last and has not let go."""
    seen = []

    def call():
        run_all([lambda scratch: seen.append(set(blas_threads()))] * 2, 2)
        seen.append(blas_threads())

    other = threading.Thread(target=call)
    other.start()
    other.join(WAIT)
    call()
    assert seen == 2 * [{1}, {1}, three_blas_threads]
    assert blas_threads() == three_blas_threads


def test_two_threads_that_call_attention_at_once_get_their_answers(three_blas_threads, rng):
    operands = [rng.standard_normal((3, 1, 512, 4, 32), dtype=np.float32) for _ in range(2)]
    expected = [cupyattn.attention(*x) for x in operands]
    found = [None, None]

    def call(i):
        for _ in range(3):
            found[i] = cupyattn.attention(*operands[i])

    callers = [threading.Thread(target=call, args=(i,)) for i in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    np.testing.assert_array_equal(found, expected)
    assert blas_threads() == three_blas_threads


class FakeBlas:
    """What threadpoolctl has for a library, and whoever sets it waits for its turn first, whatever it means to set."""

    def __init__(self, turn):
        self.num_threads = 3
        self.turn = turn

    def set_num_threads(self, count):
        self.turn()
        self.num_threads = count


def blas_of(library):
    blas = threads._Blas()
    vars(blas)["_libraries"] = [library]
    return blas


def in_every_order(steps_of, count):
    """What `steps_of(turn)` gives, by threads that go on one at a time, from `turn` to `turn`, in `count` orders."""
    for seed in range(count):
        order, waiting, back = random.Random(seed), [], threading.Semaphore(0)
        mine = threading.local()

        def turn(waiting=waiting, back=back, mine=mine):
            if gate := getattr(mine, "gate", None):
                waiting.append(gate)
                back.release()
                assert gate.acquire(timeout=WAIT)

        callers, check = steps_of(turn)

        def run(caller, back=back, mine=mine, turn=turn):
            mine.gate = threading.Semaphore(0)
            turn()
            caller()
            back.release()

        started = [threading.Thread(target=run, args=(caller,), daemon=True) for caller in callers]
        for thread in started:
            thread.start()
        for _ in started:
            assert back.acquire(timeout=WAIT)
        while waiting:
            waiting.pop(order.randrange(len(waiting))).release()
            assert back.acquire(timeout=WAIT)
        check(seed)


def test_callers_that_overlap_in_any_order_restore_the_blas(monkeypatch):
    """One that is late to set what was asked for before others came and went, or went, is the last to set anything."""
    seen = set()

    def steps_of(turn):
        library = FakeBlas(turn)
        blas = blas_of(library)
        latest = blas._latest
        blas._latest = lambda: turn() or latest()

        def call():
            for _ in range(2):
                with blas.on_one_thread():
                    seen.add((library.num_threads, blas.num_threads()))

        def check(seed):
            assert (library.num_threads, blas._latest().originals) == (3, None), seed

        return [call] * 3, check

    in_every_order(steps_of, 400)
    assert {original for _, original in seen} == {3}


def test_a_hold_that_was_let_go_is_not_ended_again():
    """What an object's end calls is no place for an interruption: Python prints it, and goes on."""
    blas, ended = blas_of(FakeBlas(lambda: None)), []
    blas.end = ended.append
    for _ in range(3):
        with blas.on_one_thread():
            pass
    assert ended == []


def test_the_end_of_a_hold_is_tried_again_if_it_is_interrupted(monkeypatch):
    blas, let_go, seen = blas_of(FakeBlas(lambda: None)), threads._Blas.let_go, []
    monkeypatch.setattr("sys.unraisablehook", lambda told: seen.append(told.exc_type))

    def interrupted_once(self, holder):
        monkeypatch.setattr(threads._Blas, "let_go", let_go)
        raise KeyboardInterrupt

    hold = blas.on_one_thread()
    hold.__enter__()
    monkeypatch.setattr(threads._Blas, "let_go", interrupted_once)
    del hold
    state = blas._latest()
    assert (state.holders, state.leaving, state.originals, seen) == ((), (), None, [KeyboardInterrupt])
    assert blas.num_threads() == 3


@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_interruption_anywhere_leaves_the_blas_as_it_was(num_workers, three_blas_threads):
    def call():
        run_all([lambda scratch: None] * 3, num_workers)

    before, count = _thread._count(), 0
    for number, _ in at_every_instruction(call, threads.__file__):
        count += 1
        assert blas_threads() == three_blas_threads, f"after {number} instructions"
        state = threads._blas._latest()
        assert (state.holders, state.leaving, state.originals) == ((), (), None), f"after {number} instructions"
    wait_until(lambda: _thread._count() == before)
    assert count > 50 * num_workers
    call()
    assert blas_threads() == three_blas_threads


def test_an_interruption_while_others_hold_the_blas_leaves_it_to_them(three_blas_threads):
    with threads._blas.on_one_thread():
        for number, _ in at_every_instruction(lambda: run_all([lambda scratch: None] * 2, 2), threads.__file__, step=7):
            assert set(blas_threads()) == {1}, f"after {number} instructions"
    assert blas_threads() == three_blas_threads


def test_an_interruption_stops_those_who_help():
    everybody, done = threading.Barrier(2, timeout=WAIT), []
    caller = threading.get_ident()

    def task(scratch):
        if not done:
            everybody.wait()
        done.append(1)
        if threading.get_ident() == caller:
            raise KeyboardInterrupt
        time.sleep(0.001)

    with pytest.raises(KeyboardInterrupt):
        run_all([task] * 1000, 2)
    assert len(done) < 500


def test_an_interruption_while_waiting_for_a_helper_is_no_reason_to_wait_for_ever(three_blas_threads):
    """It may come when the helper is done and the caller has not yet let go of what it waited for."""
    hung = []

    def call():
        arrived = []

        def task(scratch):
            arrived.append(threading.get_ident())
            until = time.monotonic() + 0.05
            while len(set(arrived)) < 2 and time.monotonic() < until:
                time.sleep(0)

        run_all([task] * 2, 2)

    def interrupt_everywhere():
        for number, _ in at_every_instruction(call, threads.__file__):
            hung[:] = [number + 1]

    caller = threading.Thread(target=interrupt_everywhere, daemon=True)
    caller.start()
    while caller.is_alive():
        before = list(hung)
        caller.join(WAIT)
        assert not caller.is_alive() or hung != before, f"waits for ever when interrupted after {hung} instructions"
    assert hung[0] > 100


def test_a_call_out_of_a_signals_handler_does_not_wait_for_the_call_it_interrupts(three_blas_threads):
    """At every instruction: the handler calls what it has interrupted, as a signal's would."""
    seen = []

    class Handled(Exception):
        def __init__(self):
            run_all([lambda scratch: seen.append(set(blas_threads()))] * 2, 2)

    for _ in at_every_instruction(lambda: run_all([lambda scratch: None] * 2, 2), threads.__file__, error=Handled):
        assert blas_threads() == three_blas_threads
    assert seen.count({1}) == len(seen) > 100


def test_a_count_that_is_read_while_somebody_holds_the_blas_is_not_believed(three_blas_threads):
    with threads._blas.on_one_thread():
        assert set(blas_threads()) == {1}
        assert threads._blas.num_threads() == 3
        with threads._blas.on_one_thread():
            pass
        assert set(blas_threads()) == {1}
    assert blas_threads() == three_blas_threads


@pytest.mark.parametrize("error", [RuntimeError, MemoryError])
def test_where_no_thread_can_be_started_the_caller_does_it_all(error, monkeypatch, three_blas_threads):
    def refuse(function, arguments):
        raise error("can't start new thread")

    monkeypatch.setattr(threads, "start_new_thread", refuse)
    seen = []
    run_all([lambda scratch: seen.append(threading.get_ident())] * 20, 3)
    assert seen == [threading.get_ident()] * 20
    assert blas_threads() == three_blas_threads


def test_a_users_limit_of_one_thread_is_respected():
    seen = set()
    with threadpool_limits(1, user_api="blas"):
        run_all([lambda scratch: seen.add(threading.get_ident())] * 20, 8)
        assert set(blas_threads()) == {1}
    assert seen == {threading.get_ident()}
    assert set(blas_threads()) == {3}


def test_no_more_threads_than_the_user_allows_the_blas():
    start = threading.active_count()
    seen = []

    def task(scratch):
        time.sleep(0.002)
        seen.append(threading.active_count() - start + 1)

    run_all([task] * 20, 8)
    assert max(seen) <= 3


def test_torchs_own_limit_holds_for_tensors():
    """torch's DataLoader sets it to one in each of its workers."""
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).standard_normal((1, 1500, 2, 16)).astype(np.float32)
    t, before = torch.from_numpy(x), torch.get_num_threads()
    expected = cupyattn.attention(x, x, x)
    started = []
    monkey = pytest.MonkeyPatch()
    monkey.setattr(threads, "start_new_thread", lambda function, arguments: started.append(function))
    torch.set_num_threads(1)
    try:
        np.testing.assert_array_equal(cupyattn.attention(t, t, t), expected)
        assert (started, cupyattn.explain(t, t, t).num_workers) == ([], 1)
        torch.set_num_threads(2)
        assert cupyattn.explain(t, t, t).num_workers == min(2, threads.num_cores())
        assert cupyattn.explain(x, x, x).num_workers == threads.num_cores()
    finally:
        monkey.undo()
        torch.set_num_threads(before)


def test_no_thread_outlives_the_call():
    before = _thread._count()
    run_all([lambda scratch: None] * 20, 3)
    wait_until(lambda: _thread._count() == before)


def test_nobody_waits_for_a_thread_that_never_begins(monkeypatch, three_blas_threads):
    """As where there is no memory for it to begin."""
    monkeypatch.setattr(threads, "start_new_thread", lambda function, arguments: 1)
    seen = []
    run_all([lambda scratch: seen.append(1)] * 20, 3)
    assert len(seen) == 20
    assert blas_threads() == three_blas_threads


def test_a_thread_that_begins_late_finds_nothing_to_do(monkeypatch):
    late, seen = [], []
    monkeypatch.setattr(threads, "start_new_thread", lambda function, arguments: late.append((function, arguments)))
    run_all([lambda scratch: seen.append(1)] * 20, 3)
    for function, arguments in late:
        function(*arguments)
    assert (len(late), len(seen)) == (2, 20)


def test_a_task_that_a_helper_has_taken_is_waited_for():
    both, done = threading.Barrier(2, timeout=WAIT), []

    def task(scratch):
        both.wait()
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.05)
        done.append(1)

    run_all([task] * 2, 2)
    assert len(done) == 2


def test_tasks_warn_of_no_arithmetic():
    run_all([lambda scratch: np.log(np.zeros(2)) / np.zeros(2)] * 4, 2)


def test_cores_are_those_this_process_may_use():
    assert 1 <= threads.num_cores() <= (os.cpu_count() or 1)


def run_in_a_process_of_its_own(program):
    """pytest's process has libraries in it that do not want to be forked, and limits that were set before."""
    quiet = "ignore:This process:DeprecationWarning"  # Python 3.12 warns of every fork beside a thread
    here = os.path.dirname(os.path.dirname(cupyattn.__file__))
    result = subprocess.run(
        [sys.executable, "-W", quiet, "-c", program], capture_output=True, text=True, timeout=60, cwd=here
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


LIMITED = """
import threading
import numpy as np
from cupyattn.cpu.threads import run_all
from threadpoolctl import ThreadpoolController, threadpool_limits

def counts():
    return {library.num_threads for library in ThreadpoolController().select(user_api="blas").lib_controllers}

def set_four():  # in a thread that ends, so that nobody is left who could set it back
    ThreadpoolController().select(user_api="blas").limit(limits=4)

called, done = threading.Event(), threading.Event()
setter = threading.Thread(target=set_four)
setter.start()
setter.join()
before = counts()
assert before <= {4}, before

def work():
    run_all([lambda scratch: None] * 4, 4)
    called.set()
    done.wait(20)

worker = threading.Thread(target=work)
worker.start()
assert called.wait(20)
assert counts() == before, counts()
with threadpool_limits(3, user_api="blas"):
    assert counts() <= {3}, f"a limit of 3 gives {counts()}"
assert counts() == before, counts()
done.set()
worker.join()
"""


def test_users_can_still_limit_the_blas_after_another_thread_called():
    run_in_a_process_of_its_own(LIMITED)


AT_THE_END = """
import atexit, sys, threading, time
import numpy as np
import cupyattn
from threadpoolctl import threadpool_limits

threadpool_limits(3, user_api="blas")
q = np.random.default_rng(0).standard_normal((1, 512, 8, 32), dtype=np.float32)
expected = cupyattn.attention(q, q, q)
assert cupyattn.explain(q, q, q).flops > 200e6

def call(who):
    assert np.array_equal(cupyattn.attention(q, q, q), expected)
    print(who, flush=True)

def later():
    threading.main_thread().join()
    call("a thread that outlives the main one")

atexit.register(call, "at exit")
threading.Thread(target=later).start()
daemon = threading.Thread(target=call, args=("a daemon",), daemon=True)
daemon.start()
daemon.join()
"""


def test_calls_work_at_exit_and_after_the_main_thread_has_ended():
    said = run_in_a_process_of_its_own(AT_THE_END)
    assert sorted(said.splitlines()) == ["a daemon", "a thread that outlives the main one", "at exit"]


FORKED = """
import os, sys, threading
import numpy as np
import cupyattn
from cupyattn.cpu.threads import run_all
from threadpoolctl import ThreadpoolController, threadpool_limits

def counts():
    return {library.num_threads for library in ThreadpoolController().select(user_api="blas").lib_controllers}

q = np.random.default_rng(0).standard_normal((1, 512, 8, 32), dtype=np.float32)
threadpool_limits(3, user_api="blas")
expected = cupyattn.attention(q, q, q)

def fork():
    child = os.fork()
    if child == 0:
        ok = counts() <= {3} and np.array_equal(cupyattn.attention(q, q, q), expected) and counts() <= {3}
        os._exit(0 if ok else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

fork()  # between two calls
forked = threading.Event()
inside = threading.Event()

def wait(scratch):
    inside.set()
    assert forked.wait(20)

other = threading.Thread(target=lambda: run_all([wait, wait], 2))
other.start()
assert inside.wait(20)
fork()  # while another thread holds the BLAS
forked.set()
other.join()
assert counts() <= {3}
assert np.array_equal(cupyattn.attention(q, q, q), expected)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork (POSIX)")
@pytest.mark.skipif(sys.platform == "darwin", reason="Apple's Accelerate cannot be used after a fork")
def test_a_forked_child_computes_with_threads_of_its_own():
    run_in_a_process_of_its_own(FORKED)
