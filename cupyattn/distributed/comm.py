"""What ranks say to each other: the protocol, and all of it for whoever can send and receive."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from cupyattn import reading
from cupyattn.distributed import verbs
from cupyattn.problem import Shape

Array = Any
"""NumPy's; or, where an engine has them, CuPy's and torch's on a GPU.  In memory end to end."""


class RankFailed(RuntimeError):
    """Another rank raised an error, died, or did not answer in time; nothing more can be said to it."""


class Sending(Protocol):
    """A message on its way out."""

    def wait(self) -> None:
        """Until its memory may be used again: by the host, or, on a GPU, by what is queued on the current stream.

        Raises
        ------
        RankFailed
            Nobody took it in time.
        """


class Receiving(Protocol):
    """A message that is waited for."""

    def wait(self) -> Array:
        """What came: for the host, or, on a GPU, for what is queued on the current stream.

        Raises
        ------
        RankFailed
            Nothing came in time, or something else than was expected.
        """


class Comm(Protocol):
    """Ranks that can talk to each other: what `ring_attention` and its kind need of an engine.

    Arrays are contiguous, NumPy's or those of a GPU; what of them is on a GPU is sent once all is done that was queued
    on the current stream before.  Between two ranks messages arrive in the order in which they were sent.  Whoever
    waits longer than `timeout` seconds, or hears that another rank gave up, raises `RankFailed`.
    """

    rank: int
    size: int
    timeout: float

    def send(self, array: Array, to: int) -> Sending:
        """Begin to send; the array stays as it is until that was waited for."""

    def receive(self, shape: Shape, dtype: Any, source: int, like: Array = None) -> Receiving:
        """Begin to receive, to where the array `like` is; default to the host."""

    def grouped(self) -> AbstractContextManager[Any]:
        """Messages begun meanwhile are under way together: none waits for another, whatever their order."""

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

    def receive(self, shape: Shape, dtype: Any, source: int, like: Array = None) -> Receiving:
        raise NotImplementedError

    def grouped(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def all_to_all(self, arrays: Sequence[Array], shapes: Sequence[Shape]) -> list[Array]:
        like = arrays[0]
        others = [(self.rank + step) % self.size for step in range(1, self.size)]
        contiguous = {to: x if verbs.is_contiguous(x) else verbs.copied(x) for to, x in enumerate(arrays)}
        with self.grouped():
            coming = {source: self.receive(shapes[source], like.dtype, source, like) for source in others}
            going = [self.send(contiguous[to], to) for to in others]
        found = [
            verbs.copied(arrays[self.rank]) if source == self.rank else coming[source].wait()
            for source in range(self.size)
        ]
        for message in going:
            message.wait()
        return found

    def all_gather(self, array: Array) -> list[Array]:
        return self.all_to_all([array] * self.size, [tuple(array.shape)] * self.size)

    def all_reduce(self, array: Array) -> Array:
        first, *others = self.all_gather(array)
        for other in others:
            verbs.add(first, other)
        return first


def seconds(function: str, timeout: Any) -> float:
    """How long to wait for others."""
    rule = "a positive number of seconds"
    return reading.number(function, "timeout", timeout, rule=rule, ok=lambda number: number > 0)
