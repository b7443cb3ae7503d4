"""torch's own threads, lent to us while a call works on tensors.

After each of torch's operators its OpenMP threads wait for the next one in a loop that takes all of a core, for
milliseconds.  Threads of ours would share these cores with them, and take up to twice as long.  So calls on tensors are
worked on by the very threads that wait.  Once these sleep, new threads are better: they begin on a core that is idle,
and who is woken may for milliseconds wait where the caller is at work.
"""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from _thread import _local, get_ident, get_native_id
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from itertools import starmap
from typing import Any

from cupyattn.cpu.machine import is_forked

Helper = Callable[[int], None]
"""What a thread does to help, given its number from 1 on."""

_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Loan:
    """So many threads, until the end of this object."""

    def __init__(self, count: int) -> None:
        self.count = count


_lent: ContextVar[weakref.ref[_Loan] | None] = ContextVar("threads that torch lends us", default=None)


@contextmanager
def lent_by_torch(count: int) -> Iterator[None]:
    """For the calls inside, torch's `count` threads of the calling thread are at hand."""
    loan = _Loan(count)  # which ends with this frame, also where an interruption comes before the reset
    before = _lent.set(weakref.ref(loan))
    try:
        yield
    finally:
        _lent.reset(before)


def _num_lent() -> int:
    found = _lent.get()
    loan = None if found is None else found()
    return 0 if loan is None else loan.count


class OpenMP:
    """The functions we need of GNU's OpenMP, as in `library` or what that was linked with."""

    def __init__(self, library: Any) -> None:
        self.begin_parallel = library.GOMP_parallel_start
        self.begin_parallel.argtypes = (_BODY, ctypes.c_void_p, ctypes.c_uint)
        self.end_parallel = library.GOMP_parallel_end
        self.level = library.omp_get_level
        self.thread_number = library.omp_get_thread_num
        for returns_nothing in (self.begin_parallel, self.end_parallel):
            returns_nothing.restype = None


@cache
def _openmp() -> OpenMP | None:
    """torch's, if it is GNU's; looked for once torch is there."""
    if not sys.platform.startswith("linux"):
        return None
    path = os.path.join(os.path.dirname(sys.modules["torch"].__file__ or ""), "lib", "libtorch_cpu.so")
    try:
        library = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        return None if hasattr(library, "kmp_get_blocktime") else OpenMP(library)
    except (OSError, AttributeError):
        return None


class _Helpers(_local):
    """What is known of those who help the thread that asks."""

    first: int | None = None
    """The system's number of the first one; None: nobody has helped yet."""


_helpers = _Helpers()


def team_for(num_workers: int) -> OpenMP | None:
    """The OpenMP that lends its threads to a call with so many workers; None: it has to start its own.

    Not where many of them would come for nothing, for all are asked each time: those who are not would end.  Nor where
    they sleep, which is known once they have helped.  Nor in a forked child, which does not have them, though OpenMP
    believes so.
    """
    count = _num_lent()
    if not num_workers <= count <= 2 * num_workers or is_forked() or sys.is_finalizing():
        return None
    openmp = _openmp()
    if openmp is None or openmp.level() > 0:
        return None
    return openmp if _helpers.first is None or _is_awake(_helpers.first) else None


def _is_awake(thread: int) -> bool:
    """Whether a thread is on a core or waits for one; who is gone has to be met anew."""
    try:
        file = os.open(f"/proc/self/task/{thread}/stat", os.O_RDONLY)
    except OSError:
        _helpers.first = None
        return True
    try:
        said = os.read(file, 512)
    finally:
        os.close(file)
    return said[said.rindex(b")") + 2 :].startswith(b"R")


class Team:
    """A parallel region of the calling thread, in which others help; a context, in which `begin` begins it.

    The end of this object ends it, where `__exit__` was interrupted.
    """

    def __init__(self, openmp: OpenMP, num_workers: int, helper: Helper) -> None:
        self._first: list[int] = []

        def body(_: object, first: list[int] = self._first) -> None:
            number = openmp.thread_number()
            if number == 1:
                first.append(get_native_id())
            if 0 < number < num_workers:
                helper(number)

        self._body = _BODY(body)
        self._calls: list[None] = []
        self._end = partial(_end_region, openmp, self._calls, get_ident())
        self._mark: weakref.ref[Team] | None = weakref.ref(self, self._end)
        self._begin = openmp.begin_parallel

    def __enter__(self) -> Callable[[], None]:
        return partial(self._calls.extend, starmap(self._begin, [(self._body, None, _num_lent())]))

    def __exit__(self, *exception: object) -> None:
        self._end()
        self._mark = None
        _helpers.first = next(iter(self._first), None)


def _end_region(openmp: OpenMP, calls: list[None], caller: int, _: weakref.ref[Team] | None = None) -> None:
    """Wait for those who help, if they have begun and that has not been done.

    `calls` has an entry for the region's begin and one for its end.  Each is made and entered by one `extend`, which no
    signal's handler divides: a region that is not this one's, but a later call's, is never ended.
    """
    if get_ident() == caller and len(calls) == 1:
        calls.extend(starmap(openmp.end_parallel, [()]))
