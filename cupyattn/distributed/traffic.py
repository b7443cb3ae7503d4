"""Keys on their way round the ring, and gradients on their way back: arrays as messages, begun early, taken late."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from cupyattn.distributed.comm import Comm, Receiving, Sending
from cupyattn.distributed.rectangles import Rectangle
from cupyattn.distributed.route import Route, Spans, count
from cupyattn.numpy_ref import Array
from cupyattn.problem import Span
from cupyattn.rounding import widen


@dataclass
class Keys:
    """Some stretches of one rank's keys and values, heads first."""

    spans: Spans
    k: Array
    v: Array

    def of(self, span: Span) -> tuple[Array, Array]:
        """Views of a stretch that is within one of these."""
        first = 0
        for own in self.spans:
            if own.start <= span.start and span.stop <= own.stop:
                here = slice(first + span.start - own.start, first + span.stop - own.start)
                return self.k[:, :, here], self.v[:, :, here]
            first += len(own)
        raise AssertionError(f"{span} is not among {self.spans}")  # the route is wrong

    def message(self, spans: Spans) -> Array:
        """The bytes of some stretches, keys before values."""
        parts = [self.of(span) for span in spans]
        whole = (np.concatenate(pair, axis=2) for pair in zip(*parts, strict=True))
        return np.concatenate([np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in whole])

    def of_message(self, spans: Spans, message: Array) -> Keys:
        """What came, of the same heads and dtype as these."""
        found, first = [], 0
        for array in (self.k, self.v):
            stop = first + count(spans) * _bytes_of_a_key(array)
            shape = (*array.shape[:2], count(spans), array.shape[3])
            found.append(message[first:stop].view(array.dtype).reshape(shape))
            first = stop
        return Keys(spans, *found)

    def bytes(self, spans: Spans) -> int:
        """Of a message."""
        return count(spans) * (_bytes_of_a_key(self.k) + _bytes_of_a_key(self.v))

    def widened(self, dtype: str) -> Keys:
        return Keys(self.spans, widen(self.k, dtype), widen(self.v, dtype))

    def zeros(self) -> Keys:
        """The gradients of these, so far."""
        return Keys(self.spans, *(np.zeros(array.shape, array.dtype) for array in (self.k, self.v)))


def _bytes_of_a_key(array: Array) -> int:
    batch, heads, _, dim = array.shape
    return int(batch * heads * dim * array.itemsize)


@dataclass
class Ring:
    """A rank's place in it: what it holds now, and what is under way."""

    comm: Comm
    route: Route
    held: Keys
    """Own keys at first, then those of rank - 1, and so on."""
    _step: int = 0
    _coming: Receiving | None = None
    _going: list[Sending] = field(default_factory=list)

    def seen(self) -> tuple[Rectangle, ...]:
        """What this rank's rows see of what is held."""
        return self.route.seen(self.comm.rank, self.route.owner(self.comm.rank, self._step))

    def begin(self) -> None:
        """Send on what is held, and begin to receive what is next."""
        comm, route, after = self.comm, self.route, self._step + 1
        if after == comm.size:
            return
        there, here = route.owner(comm.rank, self._step), route.owner(comm.rank, after)
        coming, going = route.carried(here, after), route.carried(there, after)
        if coming:
            self._coming = comm.receive((self.held.bytes(coming),), np.uint8, (comm.rank - 1) % comm.size)
        if going:
            self._going.append(comm.send(self.held.message(going), (comm.rank + 1) % comm.size))

    def end(self) -> None:
        """Hold what is next, once it is there."""
        self._step += 1
        if self._step == self.comm.size:
            return
        spans = self.route.carried(self.route.owner(self.comm.rank, self._step), self._step)
        if self._coming is not None:
            self.held, self._coming = self.held.of_message(spans, self._coming.wait()), None
        else:
            self.held = Keys((), self.held.k[:, :, :0], self.held.v[:, :, :0])
        for message in self._going:
            message.wait()
        self._going.clear()


@dataclass
class Returns:
    """Gradients of keys on the way to whose keys they are."""

    comm: Comm
    route: Route
    dk: Array
    dv: Array
    """Of this rank's own keys: what is found here, and what comes."""
    _coming: list[tuple[Spans, Receiving]] = field(default_factory=list)
    _going: list[Sending] = field(default_factory=list)

    def begin(self, step: int) -> None:
        """Begin to receive what somebody else finds at this step."""
        comm = self.comm
        source = (comm.rank + step) % comm.size
        spans = self.route.seen_keys(source, comm.rank)
        if step and spans:
            size = Keys((), self.dk, self.dv).bytes(spans)
            self._coming.append((spans, comm.receive((size,), np.uint8, source)))

    def end(self, step: int, found: Keys) -> None:
        """Send what was found at this step, or add it to one's own."""
        owner = self.route.owner(self.comm.rank, step)
        spans = self.route.seen_keys(self.comm.rank, owner)
        if step == 0:
            self.dk += found.k
            self.dv += found.v
        elif spans:
            self._going.append(self.comm.send(found.message(spans), owner))

    def add(self) -> None:
        """What came, in the order of steps."""
        own = Keys((Span(0, self.dk.shape[2]),), self.dk, self.dv)
        for spans, coming in self._coming:
            came = own.of_message(spans, coming.wait())
            for span in spans:
                for total, share in zip(own.of(span), came.of(span), strict=True):
                    total += share
        for message in self._going:
            message.wait()
