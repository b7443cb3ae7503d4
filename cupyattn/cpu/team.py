"""torch's own threads, lent to us while a call works on tensors.

After each of torch's operators its OpenMP threads wait for the next one in a loop that takes all of a core, for
milliseconds.  Threads of ours would share these cores with them, and take up to twice as long.  So calls on tensors are
worked on by the very threads that wait.
"""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from _thread import get_ident
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from typing import Any

from cupyattn.cpu.machine import is_forked

Helper = Callable[[int], None]
"""What a thread does to help, given its number from 1 on."""

_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_lent: ContextVar[int] = ContextVar("threads that torch lends us", default=0)


@contextmanager
def lent_by_torch(count: int) -> Iterator[None]:
    """For the calls inside, torch's `count` threads of the calling thread are at hand."""
    before = _lent.set(count)
    try:
        yield
    finally:
        _lent.reset(before)


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


def team_for(num_workers: int) -> OpenMP | None:
    """The OpenMP that lends its threads to a call with so many workers; None: it has to start its own.

    Not where many of them would come for nothing, for all are asked each time: those who are not would end.  Nor in a
    forked child, which does not have them, though OpenMP believes so.
    """
    count = _lent.get()
    if not num_workers <= count <= 2 * num_workers or is_forked() or sys.is_finalizing():
        return None
    openmp = _openmp()
    return openmp if openmp is not None and openmp.level() == 0 else None


class Team:
    """A parallel region of the calling thread, in which others help; a context, in which `begin` begins it.

    The end of this object ends it, where `__exit__` was interrupted.
    """

    def __init__(self, openmp: OpenMP, num_workers: int, helper: Helper) -> None:
        def body(_: object) -> None:
            if (number := openmp.thread_number()) < num_workers:
                helper(number)

        self._body = _BODY(body)
        self._end = partial(_end_region, openmp, get_ident())
        self._mark: weakref.ref[Team] | None = weakref.ref(self, self._end)
        self._begin = openmp.begin_parallel

    def __enter__(self) -> Callable[[], None]:
        return partial(self._begin, self._body, None, _lent.get())

    def __exit__(self, *exception: object) -> None:
        self._end()
        self._mark = None


def _end_region(openmp: OpenMP, caller: int, _: weakref.ref[Team] | None = None) -> None:
    """Wait for those who help, if that has not been done: OpenMP knows, but only of the thread that asks."""
    if get_ident() == caller and openmp.level() > 0:
        openmp.end_parallel()
