"""What stands for NCCL and for streams: ranks are threads, and a stream is a list of what is to be done.

Strict: nothing that is queued is done before somebody who may wait for it does.  Memory that is received into is
poison from the call on; it has its numbers only once the receiving stream has been waited for, by an event.  NCCL's
rules are checked: matched peers, counts and dtypes, groups, one order of collectives, and messages that one stream
has outside of a group wait for each other.
"""

import ctypes
import threading
from collections import defaultdict, deque
from types import SimpleNamespace
from typing import ClassVar

import numpy as np

POISON = 0xA5
ITEM = {"u1": 1, "f4": 4, "f8": 8}
SECONDS = 60.0


class Broken(AssertionError):
    """A rule of NCCL's."""


def memory(pointer, count):
    return np.ctypeslib.as_array((ctypes.c_uint8 * count).from_address(pointer))


class Stream:
    """Work in order; `ptr` names it."""

    made: ClassVar = {}

    def __init__(self, non_blocking=False, ptr=None):
        self.ptr = id(self) if ptr is None else ptr
        self.work = deque()
        Stream.made[self.ptr] = self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def wait_event(self, event):
        self.work.append(event.settle)

    def run(self):
        while self.work:
            self.work.popleft()()


class Event:
    """Done when all is that its stream had before it; whoever settles it does that."""

    def __init__(self, disable_timing=False):
        self.stream, self.before, self.over = None, [], False

    def record(self, stream):
        self.stream, here = stream, threading.Event()
        stream.work.append(here.set)
        self.reached = here

    def settle(self):
        while not self.reached.is_set():
            self.stream.work.popleft()()

    @property
    def done(self):
        self.settle()
        return True


class World:
    """What all ranks' communicators share."""

    def __init__(self, size):
        self.size = size
        self.boxes, self.changed = defaultdict(deque), threading.Condition()
        self.collectives = defaultdict(dict)
        self.groups = []

    def put(self, key, value):
        with self.changed:
            self.boxes[key].append(value)
            self.changed.notify_all()

    def take(self, key):
        with self.changed:
            if not self.changed.wait_for(lambda: self.boxes[key], SECONDS):
                raise Broken(f"nobody sends what {key} waits for: a deadlock")
            return self.boxes[key].popleft()


class Communicator:
    """`cupy.cuda.nccl.NcclCommunicator`."""

    def __init__(self, world, rank):
        self.world, self.rank, self.aborted, self.number = world, rank, False, 0

    def rank_id(self):
        return self.rank

    def size(self):
        return self.world.size

    def device_id(self):
        return 0

    def check_async_error(self):
        if self.aborted:
            raise RuntimeError("NCCL_ERROR: aborted")

    def abort(self):
        self.aborted = True

    def send(self, pointer, count, dtype, peer, stream):
        self._queue(("send", pointer, count, dtype, peer), stream)

    def recv(self, pointer, count, dtype, peer, stream):
        memory(pointer, count * ITEM[dtype])[:] = POISON
        self._queue(("recv", pointer, count, dtype, peer), stream)

    def _queue(self, call, stream):
        if call[4] == self.rank or not 0 <= call[4] < self.world.size:
            raise Broken(f"rank {self.rank} has no peer {call[4]}")
        group = nccl.group()
        if group is None:
            Stream.made[stream].work.append(lambda: self._exchange([call]))
        else:
            group.append((self, stream, call))

    def _exchange(self, calls):
        """All of a group: none of its messages waits for another.  Ungrouped ones wait for their peer to be there."""
        self.world.groups.append((self.rank, [call[0] for call in calls]))
        tickets = []
        for kind, pointer, count, dtype, peer in calls:
            if kind == "send":
                taken = threading.Event()
                data = memory(pointer, count * ITEM[dtype]).copy()
                self.world.put((self.rank, peer), (count, dtype, data, pointer, taken))
                tickets.append((pointer, data, taken, peer))
        for kind, pointer, count, dtype, peer in calls:
            if kind == "recv":
                its_count, its_dtype, data, _, taken = self.world.take((peer, self.rank))
                if (its_count, its_dtype) != (count, dtype):
                    raise Broken(f"{its_count} of {its_dtype} were sent, and {count} of {dtype} are received")
                memory(pointer, data.size)[:] = data
                taken.set()
        for pointer, data, taken, peer in tickets:
            if not taken.wait(SECONDS):
                raise Broken(f"rank {peer} does not take what rank {self.rank} sends: a deadlock")
            if not np.array_equal(memory(pointer, data.size), data):
                raise Broken("memory was written to while it was sent")

    def _collective(self, what, pointer, count, dtype, stream, then):
        number, self.number = self.number, self.number + 1

        def work():
            own = memory(pointer, count * ITEM[dtype]).copy()
            with self.world.changed:
                there = self.world.collectives[number]
                there[self.rank] = (what, count, dtype, own)
                self.world.changed.notify_all()
                if not self.world.changed.wait_for(lambda: len(there) == self.world.size, SECONDS):
                    raise Broken("not all ranks call a collective: a deadlock")
            if len({x[:3] for x in there.values()}) > 1:
                raise Broken("ranks call different collectives")
            then([there[rank][3] for rank in range(self.world.size)])

        Stream.made[stream].work.append(work)

    def allGather(self, own, whole, count, dtype, stream):
        size = count * ITEM[dtype]
        memory(whole, size * self.world.size)[:] = POISON

        def then(parts):
            memory(whole, size * self.world.size)[:] = np.concatenate(parts)

        self._collective("allGather", own, count, dtype, stream, then)

    def allReduce(self, own, total, count, dtype, op, stream):
        size = count * ITEM[dtype]
        memory(total, size)[:] = POISON

        def then(parts):
            memory(total, size)[:] = sum(x.view(dtype) for x in parts).astype(dtype).view(np.uint8)

        self._collective("allReduce", own, count, dtype, stream, then)


class _Nccl:
    """The module `cupy.cuda.nccl`."""

    available = True
    NCCL_UINT8, NCCL_FLOAT32, NCCL_FLOAT64, NCCL_SUM = "u1", "f4", "f8", "sum"

    def __init__(self):
        self._own = threading.local()

    def group(self):
        return getattr(self._own, "calls", None)

    def groupStart(self):
        if self.group() is not None:
            raise Broken("a group inside of a group")
        self._own.calls = []

    def groupEnd(self):
        calls, self._own.calls = self.group(), None
        by_stream = defaultdict(list)
        for communicator, stream, call in calls:
            by_stream[communicator, stream].append(call)
        for (communicator, stream), its in by_stream.items():
            Stream.made[stream].work.append(lambda own=communicator, its=its: own._exchange(its))


nccl = _Nccl()


class Device:
    def __init__(self, index):
        self.id = index

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


class Cupy:
    """As much of CuPy as `NcclComm` asks for; its arrays on a GPU are torch's, in host memory."""

    ndarray = type("ndarray", (), {})

    def __init__(self, torch):
        self.torch = torch
        self.own = threading.local()
        self.cuda = SimpleNamespace(
            nccl=nccl, Stream=Stream, Event=Event, Device=Device, ExternalStream=lambda ptr: self.current()
        )

    def current(self):
        """The caller's stream, one for each thread, whose own work is done at once."""
        if not hasattr(self.own, "stream"):
            self.own.stream = Eager()
        return self.own.stream

    def empty(self, shape, dtype):
        return self.torch.empty(tuple(shape), dtype=getattr(self.torch, np.dtype(dtype).name))


class Eager(Stream):
    """A stream that waits at once."""

    def wait_event(self, event):
        event.settle()

    def __init__(self):
        super().__init__()
        self.work = _AtOnce()


class _AtOnce:
    def append(self, work):
        work()
