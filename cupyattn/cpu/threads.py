"""Running many NumPy tasks on the cores of this machine.

NumPy's matrix products use the BLAS's own threads.  Here each task gets one Python thread (NumPy lets
go of the GIL) and the BLAS is held to one thread for as long as they run, also where one thread does all: threads of
its own would wait for each other at every small product, for long where others want the cores.
"""

from __future__ import annotations

import os
import weakref
from _thread import LockType, allocate_lock, start_new_thread
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from typing import Any, TypeAlias

import numpy as np

from cupyattn.cpu.machine import num_cores
from cupyattn.cpu.scratch import Scratch, Shelf
from cupyattn.cpu.team import Helper, Team, team_for

Task = Callable[[Scratch], None]


Mark: TypeAlias = "weakref.ref[_Hold]"


class _State:
    """Who holds the BLAS, and what it is to have again afterwards; never changed, only followed by another one."""

    __slots__ = ("after", "holders", "leaving", "originals")

    def __init__(self, holders: tuple[Mark, ...], leaving: tuple[Mark, ...], originals: tuple[int, ...] | None) -> None:
        self.holders = holders
        self.leaving = leaving
        """Who holds it no more, but may yet be about to set what an earlier state asked for."""
        self.originals = originals
        """Threads of each library, which it has not got back yet; None: it has."""
        self.after: dict[str, _State] = {}

    def left_by(self, holder: Mark) -> _State:
        leaving = _without(holder, self.leaving)
        return _State(self.holders, leaving, self.originals if self.holders or leaving else None)


class _Blas:
    """NumPy's BLAS, held to one thread while anybody needs that.

    Of callers that overlap, the first one finds out the original number of threads and the last one restores it,
    whichever threads they are.  There is no lock, which an interruption could leave locked and a signal's handler
    could wait for in vain: a state follows another by one `dict.setdefault`, which happens or does not, and whoever
    has changed the state gives the BLAS the threads that the latest one asks for.  What it is to have again is
    forgotten, and believed of the libraries, when nobody is at that any more, who may be late with an earlier number.
    """

    def __init__(self) -> None:
        self._state = _State((), (), None)

    @cached_property
    def _libraries(self) -> list[Any]:
        from threadpoolctl import ThreadpoolController

        return list(ThreadpoolController().select(user_api="blas").lib_controllers)

    def num_threads(self) -> int:
        """The threads the BLAS would use if nobody held it: the user's own limit on us, too."""
        return max(self._originals(self._latest()), default=num_cores())

    def on_one_thread(self) -> _Hold:
        return _Hold(self)

    def take(self, holder: Mark) -> None:
        self._follow(lambda state: _State((*state.holders, holder), state.leaving, self._originals(state)))
        self._settle()

    def let_go(self, holder: Mark) -> None:
        """Also for the second time, where the first one was interrupted."""
        if _is_in(holder, self._latest().holders):
            self._follow(
                lambda state: _State(_without(holder, state.holders), (*state.leaving, holder), state.originals)
            )
        if _is_in(holder, self._latest().leaving):
            self._settle()
            self._follow(partial(_State.left_by, holder=holder))
            self._latest()  # or the state before would keep the mark, which then is told of its object's end

    def end(self, holder: Mark) -> None:
        """Of a hold whose `__exit__` was interrupted; this may be, too, and nobody would try again."""
        try:
            self.let_go(holder)
        except BaseException:
            self.let_go(holder)
            raise

    def _settle(self) -> None:
        """Give the BLAS as many threads as the latest state says."""
        state = None
        while state is not (state := self._latest()):
            for library, original in zip(self._libraries, state.originals or (), strict=False):
                _set_num_threads(library, 1 if state.holders else original)

    def _originals(self, state: _State) -> tuple[int, ...]:
        """What the libraries say counts only where nobody has told them otherwise."""
        return tuple(library.num_threads for library in self._libraries) if state.originals is None else state.originals

    def _latest(self) -> _State:
        state = self._state
        while (later := state.after.get("next")) is not None:
            state = self._state = later
        return state

    def _follow(self, change: Callable[[_State], _State]) -> None:
        while True:
            state = self._latest()
            following = change(state)
            if state.after.setdefault("next", following) is following:
                return


class _Hold:
    """One caller's hold on the BLAS, a context; the end of this object ends it, where `__exit__` was interrupted."""

    def __init__(self, blas: _Blas) -> None:
        self._blas = blas
        self._mark: Mark | None = weakref.ref(self, blas.end)

    def __enter__(self) -> None:
        assert self._mark is not None
        self._blas.take(self._mark)

    def __exit__(self, *exception: object) -> None:
        assert self._mark is not None
        self._blas.let_go(self._mark)
        self._mark = None


def _is_in(holder: Mark, some: tuple[Mark, ...]) -> bool:
    """By identity: references that are dead are equal to nothing."""
    return any(each is holder for each in some)


def _without(holder: Mark, some: tuple[Mark, ...]) -> tuple[Mark, ...]:
    return tuple(each for each in some if each is not holder)


def _set_num_threads(library: Any, count: int) -> None:
    """Set it whichever thread calls; threadpoolctl 3.8 itself would listen to one thread only."""
    getattr(library, "_real_set_num_threads", library.set_num_threads)(count)


_blas = _Blas()
_shelf = Shelf()


def _forget_other_threads() -> None:
    """In a forked child nobody holds the BLAS any more."""
    state = _blas._latest()
    for holder in (*state.holders, *state.leaving):
        _blas.let_go(holder)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_other_threads)


def run_all(tasks: Sequence[Task], num_workers: int, *, are_small: bool = False) -> None:
    """Run every task, the first ones first, on up to `num_workers` threads; raise what a task raises.

    `are_small` says of tasks for one worker that no BLAS has threads for their products, and spares holding it.  A
    task receives scratch memory that it may use until it returns.
    The threads live for one call, so that a fork between calls finds none; or they are torch's, see `team`.
    """
    queue = deque(tasks)
    num_workers = min(num_workers, len(tasks))
    errors: list[BaseException] = []

    def work() -> None:
        scratch = _shelf.take()
        with np.errstate(all="ignore"):
            while queue and not errors:
                try:
                    task = queue.popleft()
                except IndexError:  # somebody else was faster
                    break
                task(scratch)
        _shelf.put_back(scratch)

    at_work: list[LockType] = []
    """Of helpers that have begun, each of them held until it is done."""
    raised: list[BaseException | None] = [None] * num_workers  # an append could want memory that there is not

    def help_with_it(number: int) -> None:
        busy = allocate_lock()
        with busy:
            at_work.append(busy)  # before it takes the first task: who finds no task left knows all who have one
            try:
                work()
            except BaseException as error:
                raised[number] = error
                errors.append(error)
            finally:
                at_work.remove(busy)  # before anybody else holds it: who is interrupted with it waits for it no more

    if num_workers > 1:
        num_workers = min(num_workers, _blas.num_threads())
    if num_workers <= 1:
        with nullcontext() if are_small else _blas.on_one_thread():
            work()
        return
    with _blas.on_one_thread(), _helpers(num_workers, help_with_it) as begin:
        try:
            begin()
            work()
            _wait_for(at_work)
        except BaseException as error:
            errors.append(error)  # so that the others stop after what they are at
            _wait_for(at_work)
            raise
    for found in raised:
        if found is not None:
            raise found


def _helpers(num_workers: int, helper: Helper) -> AbstractContextManager[Callable[[], None]]:
    """A context whose value has them begin: threads of torch's that wait for work, or else new ones."""
    openmp = team_for(num_workers)
    if openmp is not None:
        return Team(openmp, num_workers, helper)
    return nullcontext(partial(_start_threads, num_workers, helper))


def _start_threads(num_workers: int, helper: Helper) -> None:
    for number in range(1, num_workers):
        try:
            # Not a threading.Thread, which waits until it has begun, for ever if there is no memory to begin.
            start_new_thread(helper, (number,))
        except (RuntimeError, MemoryError):  # too many, or the interpreter is about to end: fewer will do
            break


def _wait_for(locks: list[LockType]) -> None:
    """Until all of them are let go, and out of the list."""
    while locks:
        try:
            lock = locks[-1]
        except IndexError:  # the last one was let go just now
            break
        with lock:
            pass
