"""Keys on their way round the ring, and gradients on their way back: arrays as messages, begun early, taken late."""

from __future__ import annotations

from dataclasses import dataclass, field

from cupyattn.distributed import verbs
from cupyattn.distributed.comm import Array, Comm, Receiving, Sending
from cupyattn.distributed.rectangles import Rectangle
from cupyattn.distributed.route import Route, Spans, count
from cupyattn.problem import Span


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
        found = verbs.empty((self.bytes(spans),), "uint8", self.k)
        to = self.of_message(spans, found)
        for span in spans:
            for whole, part in zip(to.of(span), self.of(span), strict=True):
                verbs.write(whole, part)
        return found

    def of_message(self, spans: Spans, message: Array) -> Keys:
        """What came, of the same heads and dtype as these."""
        found, first = [], 0
        for array in (self.k, self.v):
            stop = first + count(spans) * _bytes_of_a_key(array)
            shape = (*array.shape[:2], count(spans), array.shape[3])
            found.append(verbs.of_bytes(message[first:stop], array.dtype, shape))
            first = stop
        return Keys(spans, *found)

    def bytes(self, spans: Spans) -> int:
        """Of a message."""
        return count(spans) * (_bytes_of_a_key(self.k) + _bytes_of_a_key(self.v))

    def zeros(self, dtype: str) -> Keys:
        """The gradients of these, so far."""
        return Keys(self.spans, *(verbs.zeros(tuple(x.shape), dtype, x) for x in (self.k, self.v)))


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
        message = self.held.message(going) if going else None
        with comm.grouped():
            if coming:
                size, source = self.held.bytes(coming), (comm.rank - 1) % comm.size
                self._coming = comm.receive((size,), "uint8", source, self.held.k)
            if message is not None:
                self._going.append(comm.send(message, (comm.rank + 1) % comm.size))

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

    def exchange(self, step: int, found: Keys) -> None:
        """Begin to send what was found at this step, and to receive what somebody else found; or add it to one's own.

        Both at once: where messages wait for each other in a queue, as on a stream of a GPU, all ranks would else wait
        for what comes, and nobody would send.
        """
        comm, route = self.comm, self.route
        if step == 0:
            verbs.add(self.dk, found.k)
            verbs.add(self.dv, found.v)
            return
        owner, source = route.owner(comm.rank, step), (comm.rank + step) % comm.size
        going, coming = route.seen_keys(comm.rank, owner), route.seen_keys(source, comm.rank)
        message = found.message(going) if going else None
        with comm.grouped():
            if coming:
                size = Keys((), self.dk, self.dv).bytes(coming)
                self._coming.append((coming, comm.receive((size,), "uint8", source, self.dk)))
            if message is not None:
                self._going.append(comm.send(message, owner))

    def add(self) -> None:
        """What came, in the order of steps."""
        own = Keys((Span(0, self.dk.shape[2]),), self.dk, self.dv)
        for spans, coming in self._coming:
            came = own.of_message(spans, coming.wait())
            for span in spans:
                for total, share in zip(own.of(span), came.of(span), strict=True):
                    verbs.add(total, share)
        for message in self._going:
            message.wait()
