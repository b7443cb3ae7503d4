"""Ranks that have a GPU each, by NCCL through CuPy, which is imported late.

What is sent and received is queued on a stream of its own.  Before it stands an event of the caller's stream, so that
what is sent is there, and memory that is received into is nobody's any more; behind it one that the caller's stream
waits for when the message is.  In between, the caller's stream goes on.

Memory that is under way is held here until the caller's stream has been told to wait: who allocates after that gets it
in that stream's order, behind the message.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cupyattn.distributed import verbs
from cupyattn.distributed.comm import Array, PointToPoint, RankFailed, Receiving, Sending, seconds
from cupyattn.problem import Shape
from cupyattn.reading import refusal

NAPS = (0.0, 1e-5, 1e-4, 1e-3)
"""Seconds between looks at an event that the host waits for."""
SUMS = {"float32": "NCCL_FLOAT32", "float64": "NCCL_FLOAT64"}
"""What `NcclComm.all_reduce` leaves to NCCL."""


@dataclass
class _Batch:
    """Messages that are under way together."""

    calls: list[tuple[bool, Array, int]] = field(default_factory=list)
    """Whether it is sent, what, and to or from whom."""
    arrays: list[Array] = field(default_factory=list)
    """Whose memory is under way."""
    of_caller: list[Array] = field(default_factory=list)
    """Those that were made on the caller's stream."""
    done: Any = None
    """An event behind all of them; None until they are queued."""


@dataclass
class _Message:
    comm: NcclComm
    batch: _Batch
    array: Array
    on_host: bool
    """What came is wanted there."""

    def wait(self) -> Any:
        """On a GPU nobody waits but the caller's stream; on the host, this thread, for so long."""
        comm, batch = self.comm, self.batch
        if batch.done is None:
            raise RuntimeError("a message is waited for inside of its own group")
        comm.check()
        if not self.on_host:
            comm.caller(self.array).wait_event(batch.done)
            comm.let_go(batch)
            return self.array
        comm.look(batch.done)
        comm.let_go(batch)
        with comm.device, comm.stream:
            return verbs.to_host(self.array)


class NcclComm(PointToPoint):
    """`Comm` by NCCL through CuPy: each rank has a GPU, for arrays of CuPy and tensors of torch.

    Parameters
    ----------
    communicator : cupy.cuda.nccl.NcclCommunicator
        Its ranks take part.  It is the caller's: made by ``NcclCommunicator(size, unique_id, rank)`` on the rank's own
        device, and destroyed by him.
    timeout : float
        Seconds that the host waits for other ranks, where it does: see Notes.

    Raises
    ------
    ImportError
        There is no CuPy.
    TypeError, ValueError
        That is no communicator, or `timeout` not a positive number.
    RuntimeError
        CuPy finds no NCCL.

    Notes
    -----
    It has not run on a GPU yet: it was tested against a stand-in for NCCL that checks NCCL's rules.

    Messages are queued on a stream of its own, and events are all that connects it with the caller's: the next keys
    travel while these are attended.  The host waits once in a call, at its beginning, where ranks agree: for what NCCL
    was asked to do before, not for the caller's stream.

    NCCL does not say when another rank gives up.  A rank that does aborts the communicator, and the others raise
    `RankFailed` when NCCL reports that, or when they have waited for `timeout` seconds at the beginning of their next
    call; in between their streams may wait in vain.  A communicator that was aborted is no good any more.

    `all_reduce` of float32 and float64 is NCCL's own: the same bits on all ranks, added up in NCCL's order.

    Examples
    --------
    With mpi4py to tell all ranks the id::

        from cupy.cuda import Device, nccl
        from mpi4py import MPI

        world = MPI.COMM_WORLD
        unique_id = world.bcast(nccl.get_unique_id() if world.rank == 0 else None)
        with Device(world.rank % 8):
            comm = NcclComm(nccl.NcclCommunicator(world.size, unique_id, world.rank))
            out = ring_attention(q, k, v, comm=comm, causal=True)
    """

    def __init__(self, communicator: Any, *, timeout: float = 60.0) -> None:
        self.timeout = seconds("NcclComm", timeout)
        missing = [name for name in ("send", "recv", "rank_id", "size", "abort") if not hasattr(communicator, name)]
        if missing:
            rule = "communicator has to be a cupy.cuda.nccl.NcclCommunicator"
            came = ("communicator", repr(communicator), type(communicator).__name__)
            raise TypeError(refusal("NcclComm", rule, came))
        import cupy
        from cupy.cuda import nccl

        if not nccl.available:
            raise RuntimeError(refusal("NcclComm", "CuPy finds no NCCL: pip install nvidia-nccl-cu12, or -cu13"))
        self._cupy: Any = cupy
        self._nccl: Any = nccl
        self._communicator = communicator
        self.rank, self.size = int(communicator.rank_id()), int(communicator.size())
        self.device: Any = cupy.cuda.Device(int(communicator.device_id()))
        with self.device:
            self.stream: Any = cupy.cuda.Stream(non_blocking=True)
        self._group: _Batch | None = None
        self._under_way: list[_Batch] = []
        self._failure: str | None = None

    def send(self, array: Array, to: int) -> Sending:
        """NumPy's arrays travel by way of the GPU."""
        here = self._here(array)
        return self._begun(True, here, to, here is array, False)

    def receive(self, shape: Shape, dtype: Any, source: int, like: Array = None) -> Receiving:
        on_host = like is None or verbs.is_numpy(like)
        with self.device, self.stream if on_host else contextlib.nullcontext():
            array = self._cupy.empty(shape, dtype) if on_host else verbs.empty(shape, dtype, like)
        return self._begun(False, array, source, not on_host, on_host)

    @contextmanager
    def grouped(self) -> Iterator[None]:
        """One group of NCCL's; what is begun before it ends can be waited for behind it."""
        if self._group is not None:
            yield
            return
        batch = self._group = _Batch()
        try:
            yield
        finally:
            self._group = None
        self._queue(batch)

    def all_gather(self, array: Array) -> list[Array]:
        here = self._here(array)
        with self.device, contextlib.nullcontext() if here is array else self.stream:
            whole = verbs.empty((self.size, *here.shape), here.dtype, here)
        nccl, count = self._nccl, verbs.num_bytes(here)

        def gather() -> None:
            if count:
                own, all_of_it = verbs.pointer(here), verbs.pointer(whole)
                self._communicator.allGather(own, all_of_it, count, nccl.NCCL_UINT8, self.stream.ptr)

        batch = self._under(gather, _Batch([], [here, whole], [array] if here is array else []))
        found = _Message(self, batch, whole, here is not array).wait()
        return [found[rank] for rank in range(self.size)]

    def all_reduce(self, array: Array) -> Array:
        name = SUMS.get(verbs.name_of(array.dtype))
        if name is None:
            return super().all_reduce(array)
        here = self._here(array)
        with self.device, contextlib.nullcontext() if here is array else self.stream:
            total = verbs.empty(tuple(here.shape), here.dtype, here)
        nccl, count = self._nccl, verbs.num_bytes(here) // int(here.itemsize)

        def reduce() -> None:
            if count:
                own, to = verbs.pointer(here), verbs.pointer(total)
                kind, how = getattr(nccl, name), nccl.NCCL_SUM
                self._communicator.allReduce(own, to, count, kind, how, self.stream.ptr)

        batch = self._under(reduce, _Batch([], [here, total], [array] if here is array else []))
        return _Message(self, batch, total, here is not array).wait()

    def check(self) -> None:
        """Raise if this communicator is no good any more."""
        if self._failure is None:
            try:
                self._communicator.check_async_error()
            except Exception as error:
                self._failure = f"rank {self.rank}: NCCL reports: {error}"
        if self._failure is not None:
            raise RankFailed(self._failure)

    def abort(self, reason: str) -> None:
        if self._failure is None:
            self._failure = f"rank {self.rank} gave up: {reason}"
            self._communicator.abort()
            self._under_way.clear()

    def caller(self, array: Array) -> Any:
        """The caller's stream, as CuPy's."""
        if not verbs.is_torch(array):
            return self._cupy.cuda.get_current_stream()
        import torch

        return self._cupy.cuda.ExternalStream(torch.cuda.current_stream(array.device).cuda_stream)

    def look(self, event: Any) -> None:
        """Wait for an event on the host, for so long."""
        end, looks = time.monotonic() + self.timeout, 0
        while not event.done:
            self.check()
            if time.monotonic() > end:
                said = f"others said nothing for {self.timeout:g} seconds"
                self.abort(said)
                raise RankFailed(f"rank {self.rank}: {said}")
            time.sleep(NAPS[min(looks // 50, len(NAPS) - 1)])
            looks += 1

    def let_go(self, batch: _Batch) -> None:
        """Of its memory: whoever is given it is behind the message."""
        self._under_way = [other for other in self._under_way if other is not batch]

    def _here(self, array: Array) -> Array:
        if not verbs.is_numpy(array):
            return array
        with self.device, self.stream:
            found = self._cupy.empty(array.shape, array.dtype)
            verbs.from_host(np.array(array, order="C"), found)
        return found

    def _begun(self, is_sent: bool, array: Array, other: int, of_caller: bool, on_host: bool) -> _Message:
        self.check()
        batch = self._group or _Batch()
        batch.calls.append((is_sent, array, other))
        batch.arrays.append(array)
        batch.of_caller += [array] if of_caller else []
        if batch is not self._group:
            self._queue(batch)
        return _Message(self, batch, array, on_host)

    def _queue(self, batch: _Batch) -> None:
        def messages() -> None:
            self._nccl.groupStart()
            try:
                for is_sent, array, other in batch.calls:
                    call, count = (
                        self._communicator.send if is_sent else self._communicator.recv,
                        verbs.num_bytes(array),
                    )
                    if count:
                        call(verbs.pointer(array), count, self._nccl.NCCL_UINT8, other, self.stream.ptr)
            finally:
                self._nccl.groupEnd()

        self._under(messages, batch)

    def _under(self, calls: Callable[[], None], batch: _Batch) -> _Batch:
        """Queue calls of NCCL behind what is queued on the caller's stream, and an event behind them."""
        self.check()
        with self.device:
            for caller in {x.ptr: x for x in map(self.caller, batch.of_caller)}.values():
                ready = self._cupy.cuda.Event(disable_timing=True)
                ready.record(caller)
                self.stream.wait_event(ready)
            self._under_way.append(batch)
            calls()
            batch.done = self._cupy.cuda.Event(disable_timing=True)
            batch.done.record(self.stream)
        return batch
