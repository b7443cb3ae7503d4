"""Ranks that are threads of this process: the engine that is always there."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, TypeVar

from cupyattn import reading
from cupyattn.distributed import verbs
from cupyattn.distributed.comm import Array, PointToPoint, RankFailed, Receiving, Sending, seconds
from cupyattn.problem import Shape
from cupyattn.reading import refusal

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
    like: Array

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
        expected, came = (self.shape, verbs.name_of(self.dtype)), (tuple(array.shape), verbs.name_of(array.dtype))
        if came != expected:
            said = f"sent {came[0]} of {came[1]}, and {expected[0]} of {expected[1]} was expected"
            raise RankFailed(f"rank {comm.rank}: rank {self.source} {said}")
        if self.like is None or verbs.device_of(array) == verbs.device_of(self.like):
            return array
        found = verbs.empty(self.shape, self.dtype, self.like)  # of another GPU: copied from there
        verbs.write(found, array)
        verbs.synchronize(found)
        return found


class ThreadComm(PointToPoint):
    """`Comm` among the threads of one process; `run_ranks` makes them.

    Arrays on a GPU are copied once, and a thread waits for its own stream before it says that they are there: correct,
    also between the GPUs of one process, and nothing overlaps.
    """

    def __init__(self, world: _World, rank: int, timeout: float) -> None:
        if not isinstance(world, _World):
            rule = "is made by run_ranks, which gives it to function(comm)"
            raise TypeError(refusal("ThreadComm", rule, ("world", repr(world), type(world).__name__)))
        self.world, self.rank, self.size, self.timeout = world, rank, world.size, timeout

    def check(self) -> None:
        """Raise if another rank gave up."""
        failure = self.world.failure
        if failure is not None:
            raise RankFailed(f"rank {self.rank}: rank {failure[0]} gave up: {failure[1]}")

    def send(self, array: Array, to: int) -> Sending:
        copy = verbs.copied(array)  # the caller may change his array once his own call is over
        if not verbs.is_numpy(copy):
            verbs.synchronize(copy)
        with self.world.changed:
            self.check()
            self.world.boxes.setdefault((self.rank, to), deque()).append(copy)
            self.world.changed.notify_all()
        return _Sent()

    def receive(self, shape: Shape, dtype: Any, source: int, like: Array = None) -> Receiving:
        return _Expected(self, shape, dtype, source, like)

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
    TypeError, ValueError
        `function` cannot be called, `size` is no number of ranks, or `timeout` none of seconds.
    Exception
        What the first rank that failed has raised; the others are told, and raise `RankFailed` where they wait.

    Examples
    --------
    >>> import numpy as np
    >>> from cupyattn.distributed import run_ranks
    >>> run_ranks(lambda comm: int(comm.all_reduce(np.array([comm.rank]))[0]), 3)
    [3, 3, 3]
    """
    if not callable(function):
        rule = "function has to be callable, as function(comm)"
        raise TypeError(refusal("run_ranks", rule, ("function", repr(function), type(function).__name__)))
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
