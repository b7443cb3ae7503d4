"""What ranks say to each other: the protocol, and all of it for whoever can send and receive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from cupyattn import reading
from cupyattn.numpy_ref import Array
from cupyattn.problem import Shape


class RankFailed(RuntimeError):
    """Another rank raised an error, died, or did not answer in time; nothing more can be said to it."""


class Sending(Protocol):
    """A message on its way out."""

    def wait(self) -> None:
        """Until its memory may be used again.

        Raises
        ------
        RankFailed
            Nobody took it in time.
        """


class Receiving(Protocol):
    """A message that is waited for."""

    def wait(self) -> Array:
        """What came.

        Raises
        ------
        RankFailed
            Nothing came in time, or something else than was expected.
        """


class Comm(Protocol):
    """Ranks that can talk to each other: what `ring_attention` and its kind need of an engine.

    Arrays are NumPy's, contiguous.  Between two ranks messages arrive in the order in which they were sent.  Whoever
    waits longer than `timeout` seconds, or hears that another rank gave up, raises `RankFailed`.
    """

    rank: int
    size: int
    timeout: float

    def send(self, array: Array, to: int) -> Sending:
        """Begin to send; the array stays as it is until that was waited for."""

    def receive(self, shape: Shape, dtype: Any, source: int) -> Receiving:
        """Begin to receive."""

    def all_to_all(self, arrays: Sequence[Array], shapes: Sequence[Shape]) -> list[Array]:
        """One array to each rank, of any shapes and one dtype, for one from each, of the `shapes`."""

    def all_gather(self, array: Array) -> list[Array]:
        """Each rank's array, all of one shape and dtype, in the order of ranks."""

    def all_reduce(self, array: Array) -> Array:
        """Their sum, added up in the order of ranks: the same bits everywhere, in every run."""

    def abort(self, reason: str) -> None:
        """Tell all others that this rank gives up, and why; nothing can be said any more."""


class PointToPoint:
    """The rest of `Comm`, by sending and receiving alone: no engine's collective can be left halfway."""

    rank: int
    size: int
    timeout: float

    def send(self, array: Array, to: int) -> Sending:
        raise NotImplementedError

    def receive(self, shape: Shape, dtype: Any, source: int) -> Receiving:
        raise NotImplementedError

    def all_to_all(self, arrays: Sequence[Array], shapes: Sequence[Shape]) -> list[Array]:
        dtype = arrays[0].dtype
        others = [(self.rank + step) % self.size for step in range(1, self.size)]
        coming = {source: self.receive(shapes[source], dtype, source) for source in others}
        going = [self.send(np.ascontiguousarray(arrays[to]), to) for to in others]
        found = [
            arrays[self.rank].copy() if source == self.rank else coming[source].wait() for source in range(self.size)
        ]
        for message in going:
            message.wait()
        return found

    def all_gather(self, array: Array) -> list[Array]:
        return self.all_to_all([array] * self.size, [array.shape] * self.size)

    def all_reduce(self, array: Array) -> Array:
        first, *others = self.all_gather(array)
        for other in others:
            first += other
        return first


def seconds(function: str, timeout: Any) -> float:
    """How long to wait for others."""
    rule = "a positive number of seconds"
    return reading.number(function, "timeout", timeout, rule=rule, ok=lambda number: number > 0)
