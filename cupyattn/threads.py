"""Running many NumPy tasks on the cores of this machine.

NumPy's matrix products use the BLAS's own threads.  Here each task gets one Python thread (NumPy lets
go of the GIL) and the BLAS is held to one thread for as long as they run.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np

from cupyattn.scratch import Scratch, Shelf

Task = Callable[[Scratch], None]


def num_cores() -> int:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Blas:
    """NumPy's BLAS, held to one thread while anybody needs that.

    Counted under a lock: of callers that overlap, the first one finds out the original number of threads and
    the last one restores it, whichever threads they are.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = 0
        self._originals: list[tuple[Any, int]] = []

    @cached_property
    def _libraries(self) -> list[Any]:
        from threadpoolctl import ThreadpoolController

        return list(ThreadpoolController().select(user_api="blas").lib_controllers)

    def num_threads(self) -> int:
        """The threads the BLAS would use now: the user's own limit on us, too."""
        return max((library.num_threads for library in self._libraries), default=num_cores())

    @contextmanager
    def on_one_thread(self) -> Iterator[None]:
        with self._lock:
            if self._holders == 0:
                self._originals = [(library, library.num_threads) for library in self._libraries]
                for library, _ in self._originals:
                    _set_num_threads(library, 1)
            self._holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if self._holders == 0:
                    self.restore()

    def restore(self) -> None:
        for library, original in self._originals:
            _set_num_threads(library, original)

    @property
    def held(self) -> bool:
        return self._holders > 0


def _set_num_threads(library: Any, count: int) -> None:
    """Set it whichever thread calls; threadpoolctl 3.8 itself would listen to one thread only."""
    getattr(library, "_real_set_num_threads", library.set_num_threads)(count)


_blas = _Blas()
_shelf = Shelf()


def _forget_other_threads() -> None:
    """In a forked child nobody holds the BLAS any more, and the lock may have been taken."""
    global _blas
    before, _blas = _blas, _Blas()
    if before.held:
        before.restore()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_other_threads)


def run_all(tasks: Sequence[Task], num_workers: int) -> None:
    """Run every task, the first ones first, on up to `num_workers` threads; raise what a task raises.

    A task receives scratch memory that it may use until it returns.
    The threads live for one call, so that a fork between calls finds none.
    """
    if len(tasks) <= 1:
        scratch = _shelf.take()
        with np.errstate(all="ignore"):
            for task in tasks:
                task(scratch)
        _shelf.put_back(scratch)
        return
    if num_workers > 1 and not _blas.held:
        num_workers = min(num_workers, _blas.num_threads())
    queue = iter(tasks)
    taking = threading.Lock()
    failed = threading.Event()

    def work() -> None:
        scratch = _shelf.take()
        with np.errstate(all="ignore"):
            while not failed.is_set():
                with taking:
                    task = next(queue, None)
                if task is None:
                    break
                try:
                    task(scratch)
                except BaseException:
                    failed.set()
                    raise
        _shelf.put_back(scratch)

    num_workers = min(num_workers, len(tasks))
    if num_workers <= 1:
        work()
        return
    from concurrent.futures import ThreadPoolExecutor  # here, since most imports of cupyattn never need it

    with _blas.on_one_thread(), ThreadPoolExecutor(num_workers - 1, "cupyattn") as pool:
        helpers = [pool.submit(work) for _ in range(num_workers - 1)]
        work()
        for helper in helpers:
            helper.result()
