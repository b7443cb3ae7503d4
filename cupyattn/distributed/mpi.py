"""Ranks that are processes of MPI, by mpi4py, which is imported late."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupyattn.distributed import verbs
from cupyattn.distributed.comm import Array, PointToPoint, RankFailed, Receiving, Sending, seconds
from cupyattn.problem import Shape
from cupyattn.reading import refusal

DATA, GIVEN_UP = 7001, 7002
"""Tags of MPI messages: of arrays, and of the reason why a rank gives up."""
NAPS = (0.0, 1e-5, 1e-4, 1e-3)
"""Seconds between looks at a message that is waited for: a core is left to those who compute."""


_UNDER_WAY: dict[int, Any] = {}
"""Messages whose memory MPI may still read or write, by id: for good, where a call failed before they were over."""


def _kept(message: Any) -> Any:
    _UNDER_WAY[id(message)] = message
    return message


class MpiComm(PointToPoint):
    """`Comm` by mpi4py: ranks are processes that ``mpirun`` has started, on one machine or many.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm, optional
        Its ranks take part.  Default ``MPI.COMM_WORLD``.  It is duplicated, by a call that all of its ranks make: no
        message of the caller's is mistaken for one of ours.
    timeout : float
        Seconds that a rank waits for another.

    Raises
    ------
    ImportError
        There is no mpi4py.
    TypeError, ValueError
        `comm` is no communicator of mpi4py's, or `timeout` not a positive number.

    Notes
    -----
    Many MPI libraries move a large message only while both sides are inside of a call of theirs, unless they are told
    to have a thread for that, as MPICH is by ``MPICH_ASYNC_PROGRESS=1``: without it keys are under way while others are
    attended only as far as they look.

    Arrays on a GPU are given to MPI where they are, by ``__cuda_array_interface__``, once all is over that is queued on
    the current stream: the library has to be CUDA-aware, which it does not say, and one that is not may crash.  It has
    not run on a GPU yet.

    A rank that raises in the middle of a call tells the others, which raise `RankFailed`.  One that dies is noticed by
    the launcher, which ends all of them, or after `timeout`.  Messages that nobody took are then left behind, with
    their memory, and MPI may wait for them at its end: end such a program by ``MPI.COMM_WORLD.Abort()``.
    """

    def __init__(self, comm: Any = None, *, timeout: float = 60.0) -> None:
        self.timeout = seconds("MpiComm", timeout)
        from mpi4py import MPI

        if comm is not None and not isinstance(comm, MPI.Comm):
            rule = "comm has to be an mpi4py.MPI.Comm"
            raise TypeError(refusal("MpiComm", rule, ("comm", repr(comm), type(comm).__name__)))
        self._mpi: Any = MPI
        self._comm: Any = (MPI.COMM_WORLD if comm is None else comm).Dup()
        self.rank, self.size = int(self._comm.Get_rank()), int(self._comm.Get_size())
        self._failure: str | None = None

    def send(self, array: Array, to: int) -> Sending:
        self.check()
        data = np.ascontiguousarray(array) if verbs.is_numpy(array) else array
        self._settle(data)
        with self.failing(to):
            request = self._comm.Isend([verbs.as_bytes(data), self._mpi.BYTE], to, DATA)
        sending: _MpiMessage = _kept(_MpiMessage(self, request, data, to))
        return sending

    def receive(self, shape: Shape, dtype: Any, source: int, like: Array = None) -> Receiving:
        self.check()
        array = verbs.empty(shape, dtype, like)
        self._settle(array)
        with self.failing(source):
            request = self._comm.Irecv([verbs.as_bytes(array), self._mpi.BYTE], source, DATA)
        receiving: _MpiArray = _kept(_MpiArray(self, request, array, source))
        return receiving

    def _settle(self, array: Array) -> None:
        """MPI knows no streams: what is queued before has to be over, also in memory that is written to."""
        if not verbs.is_numpy(array):
            verbs.synchronize(array)

    @contextmanager
    def failing(self, other: int) -> Iterator[None]:
        """What MPI itself raises is a `RankFailed`: mostly another rank has gone, and may have said why."""
        try:
            yield
        except self._mpi.Exception as error:
            self.check()
            raise RankFailed(f"rank {self.rank}: MPI cannot talk to rank {other}: {error}") from error

    def until(self, done: Callable[[], bool], other: int, late: str) -> None:
        """Look until something is done, and raise if it takes too long, or others gave up."""
        end, looks = time.monotonic() + self.timeout, 0
        while True:
            with self.failing(other):
                if done():
                    return
            self.check()
            if time.monotonic() > end:
                raise RankFailed(f"rank {self.rank}: rank {other} {late} for {self.timeout:g} seconds")
            time.sleep(NAPS[min(looks // 50, len(NAPS) - 1)])
            looks += 1

    def check(self) -> None:
        """Raise if another rank gave up."""
        if self._failure is None and self._comm.Iprobe(self._mpi.ANY_SOURCE, GIVEN_UP):
            status = self._mpi.Status()
            text = self._comm.recv(source=self._mpi.ANY_SOURCE, tag=GIVEN_UP, status=status)
            self._failure = f"rank {self.rank}: rank {status.Get_source()} gave up: {text}"
        if self._failure is not None:
            raise RankFailed(self._failure)

    def abort(self, reason: str) -> None:
        if self._failure is None:
            self._failure = f"rank {self.rank} gave up: {reason}"
            for to in range(self.size):
                if to != self.rank:
                    _kept(self._comm.isend(reason, to, GIVEN_UP))


@dataclass
class _MpiMessage:
    comm: MpiComm
    request: Any
    array: Array
    other: int

    def wait(self) -> None:
        self.comm.until(lambda: bool(self.request.Test()), self.other, "took no message")
        _UNDER_WAY.pop(id(self), None)  # who waits again finds it over


@dataclass
class _MpiArray:
    comm: MpiComm
    request: Any
    array: Array
    other: int

    def wait(self) -> Array:
        comm, status = self.comm, self.comm._mpi.Status()
        comm.until(lambda: bool(self.request.Test(status)), self.other, "said nothing")
        _UNDER_WAY.pop(id(self), None)  # who waits again finds it over
        came = status.Get_count(comm._mpi.BYTE)
        expected = verbs.num_bytes(self.array)
        if came != expected:
            rule = f"rank {comm.rank}: rank {self.other} sent {came} bytes, and {expected} were expected"
            raise RankFailed(rule)
        return self.array
