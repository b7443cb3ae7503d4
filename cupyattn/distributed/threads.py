"""Ranks that are threads of this process: the engine that is always there."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, TypeVar

import numpy as np

from cupyattn import reading
from cupyattn.distributed.comm import PointToPoint, RankFailed, Receiving, Sending, seconds
from cupyattn.numpy_ref import Array
from cupyattn.problem import Shape

R = TypeVar("R")


@dataclass
class _World:
    """What all ranks share: letter boxes, and who gave up."""

    size: int
    changed: threading.Condition = field(default_factory=threading.Condition)
    boxes: dict[tuple[int, int], deque[Array]] = field(default_factory=dict)
    failure: tuple[int, str] | None = None
    gone: set[int] = field(default_factory=set)
    """Ranks whose function has returned."""


class _Sent:
    def wait(self) -> None:
        """It was copied when it was sent."""


@dataclass
class _Expected:
    comm: ThreadComm
    shape: Shape
    dtype: Any
    source: int

    def wait(self) -> Array:
        comm, world = self.comm, self.comm.world
        box, until = (self.source, comm.rank), monotonic() + comm.timeout
        with world.changed:
            while not world.boxes.get(box):
                comm.check()
                if self.source in world.gone:
                    raise RankFailed(f"rank {comm.rank}: rank {self.source} has returned and said nothing")
                if not world.changed.wait(max(0.0, until - monotonic())) and monotonic() >= until:
                    raise RankFailed(f"rank {comm.rank}: rank {self.source} said nothing for {comm.timeout:g} seconds")
            array = world.boxes[box].popleft()
        if (array.shape, array.dtype) != (self.shape, np.dtype(self.dtype)):
            expected = f"{self.shape} of {np.dtype(self.dtype)}"
            came = f"{array.shape} of {array.dtype}"
            raise RankFailed(f"rank {comm.rank}: rank {self.source} sent {came}, and {expected} was expected")
        return array


class ThreadComm(PointToPoint):
    """`Comm` among the threads of one process; `run_ranks` makes them."""

    def __init__(self, world: _World, rank: int, timeout: float) -> None:
        self.world, self.rank, self.size, self.timeout = world, rank, world.size, timeout

    def check(self) -> None:
        """Raise if another rank gave up."""
        failure = self.world.failure
        if failure is not None:
            raise RankFailed(f"rank {self.rank}: rank {failure[0]} gave up: {failure[1]}")

    def send(self, array: Array, to: int) -> Sending:
        copy = np.array(array, order="C")  # the caller may change his array once his own call is over
        with self.world.changed:
            self.check()
            self.world.boxes.setdefault((self.rank, to), deque()).append(copy)
            self.world.changed.notify_all()
        return _Sent()

    def receive(self, shape: Shape, dtype: Any, source: int) -> Receiving:
        return _Expected(self, shape, dtype, source)

    def abort(self, reason: str) -> None:
        with self.world.changed:
            if self.world.failure is None:
                self.world.failure = self.rank, reason
            self.world.changed.notify_all()

    def leave(self) -> None:
        """Say that nothing more will come."""
        with self.world.changed:
            self.world.gone.add(self.rank)
            self.world.changed.notify_all()


def run_ranks(function: Callable[[ThreadComm], R], size: int, *, timeout: float = 60.0) -> list[R]:
    """Call a function on several ranks at once, which are threads of this process.

    For trying, testing and teaching; and where arithmetic is worth sharing out among threads by the sequence.

    Parameters
    ----------
    function : callable
        Is given the `Comm` of its rank.
    size : int
        How many ranks.
    timeout : float
        Seconds that a rank waits for another.

    Returns
    -------
    list
        What each rank returned.

    Raises
    ------
    Exception
        What the first rank that failed has raised; the others are told, and raise `RankFailed` where they wait.

    Examples
    --------
    >>> import numpy as np
    >>> from cupyattn.distributed import run_ranks
    >>> run_ranks(lambda comm: int(comm.all_reduce(np.array([comm.rank]))[0]), 3)
    [3, 3, 3]
    """
    reading.integer("run_ranks", "size", size, low=1, high=4096)
    timeout = seconds("run_ranks", timeout)
    world = _World(size)
    found: list[Any] = [None] * size
    errors: list[tuple[int, BaseException]] = []

    def run(rank: int) -> None:
        comm = ThreadComm(world, rank, timeout)
        try:
            found[rank] = function(comm)
        except BaseException as error:
            errors.append((rank, error))
            comm.abort(f"{type(error).__name__}: {error}")
        finally:
            comm.leave()

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}") for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((error for _, error in errors if not isinstance(error, RankFailed)), errors[0][1])
    return found
