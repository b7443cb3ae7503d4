"""Ranks that are processes of torch.distributed; torch is imported late.

What is on the host goes by gloo, and a thread waits for each message.  What is on a GPU goes by NCCL, which torch has
wait for the stream that is current when a message is begun; the one that is current when it is waited for waits for it.
"""

from __future__ import annotations

import atexit
import contextlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np

from cupyattn.distributed import verbs
from cupyattn.distributed.comm import Array, PointToPoint, RankFailed, Receiving, Sending, seconds
from cupyattn.problem import Shape
from cupyattn.reading import refusal

LOOKS = 0.25
"""Seconds between looks at torch's key-value store, where others say that they give up: each asks another process."""
NEVER = timedelta(days=365)
"""When gloo stops waiting.  It would close all connections of the group, also under a later `TorchComm`: who waits for
a message has a clock of his own."""


class TorchComm(PointToPoint):
    """`Comm` by torch.distributed: ranks are processes, as ``torchrun`` starts them.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup, optional
        Its ranks take part.  Default all of them.  It has to have gloo for the CPU, on which ranks agree, and for
        arrays on GPUs NCCL beside it, as by ``init_process_group("cpu:gloo,cuda:nccl")``.
    timeout : float
        Seconds that a rank waits for another.

    Raises
    ------
    ImportError
        There is no torch.
    TypeError
        `group` is none.
    ValueError
        torch.distributed has not been initialised, or the group has no gloo.

    Notes
    -----
    A rank that raises in the middle of a call tells the others by torch's key-value store, and they raise `RankFailed`;
    so do they if one dies.  On a GPU they hear of it when they begin the next message; a stream that waits for one
    which never comes is torch's to end, by the timeout of the group.  By NCCL it has not run yet.

    After that nothing more can be said by this one.  Where the processes live on, a new one of the same group can be
    made, and hears nothing of messages on the CPU that were left behind; NCCL, which does not tell messages apart,
    needs a new group.  The n-th of each rank talks to the n-th of the others: all ranks have to make as many.
    """

    def __init__(self, group: Any = None, *, timeout: float = 60.0) -> None:
        self.timeout = seconds("TorchComm", timeout)
        import torch.distributed as dist

        if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
            rule = "group has to be a torch.distributed.ProcessGroup"
            raise TypeError(refusal("TorchComm", rule, ("group", repr(group), type(group).__name__)))
        if not dist.is_available() or not dist.is_initialized():
            rule = "torch.distributed has to be initialised, as by init_process_group('gloo')"
            raise ValueError(refusal("TorchComm", rule))
        backends = dist.get_backend_config(group)
        self._backends = dict(part.split(":") for part in backends.split(","))
        if self._backends.get("cpu") != "gloo":
            rule = "the group has to send arrays of the CPU by gloo, as after init_process_group('cpu:gloo,cuda:nccl')"
            raise ValueError(refusal("TorchComm", rule, ("backend", backends)))
        self._dist: Any = dist
        self._group: Any = group
        self._ranks = dist.get_process_group_ranks(dist.group.WORLD if group is None else group)
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._store: Any = dist.distributed_c10d._get_default_store()
        ranks = ",".join(map(str, self._ranks))
        number = int(self._store.add(f"cupyattn, ranks {ranks}, made by {self.rank}", 1))
        self._key = f"cupyattn, ranks {ranks}, {number} gave up"
        self._tag = number
        self._failure: str | None = None
        self._batch: _Batch | None = None

    @contextmanager
    def grouped(self) -> Iterator[None]:
        """One group of NCCL's; what is begun before it ends can be waited for behind it."""
        if self._batch is not None:
            yield
            return
        batch = self._batch = _Batch()
        try:
            yield
        finally:
            self._batch = None
        self._begin(batch)

    def send(self, array: Array, to: int) -> Sending:
        self.check()
        if not verbs.num_bytes(array):  # both sides know
            return _Sent(_Done(), array)
        if not verbs.is_numpy(array):
            return self._on_device(self._dist.isend, array, to)
        data = np.ascontiguousarray(array) if array.flags.writeable else np.array(array, order="C")  # or torch warns
        return _Sent(_Work(self, self._begun(self._dist.isend, _tensor_of(data), to), to), data)

    def receive(self, shape: Shape, dtype: Any, source: int, like: Array = None) -> Receiving:
        self.check()
        array = verbs.empty(shape, dtype, like)
        if not verbs.num_bytes(array):
            return _Expected(_Done(), array)
        if not verbs.is_numpy(array):
            return self._on_device(self._dist.irecv, array, source)
        return _Expected(_Work(self, self._begun(self._dist.irecv, _tensor_of(array), source), source), array)

    def _on_device(self, start: Any, array: Array, other: int) -> _OnDevice:
        tensor = _on_the_way(array)
        backend = self._backends.get(tensor.device.type)
        if backend is None or (backend == "gloo") != (tensor.device.type == "cpu"):
            rule = f"the group has nothing that sends arrays of {tensor.device.type}; "
            rule += "init_process_group('cpu:gloo,cuda:nccl') brings NCCL for a GPU"
            raise ValueError(
                refusal("TorchComm", rule, ("backend", str(self._backends)), ("array", tuple(array.shape)))
            )
        batch = self._batch or _Batch()
        tag = self._tag if backend == "gloo" else 0  # NCCL has none
        batch.operations.append(self._dist.P2POp(start, tensor, self._ranks[other], self._group, tag))
        batch.arrays.append(array)
        if batch is not self._batch:
            self._begin(batch)
        return _OnDevice(self, batch, array)

    def _begin(self, batch: _Batch) -> None:
        if not batch.operations:
            return
        try:
            with _stream_of(batch.arrays[0]):
                batch.works = self._dist.batch_isend_irecv(batch.operations)
        except RuntimeError as error:
            raise RankFailed(f"rank {self.rank}: messages could not be begun: {error}") from error

    def _begun(self, start: Any, tensor: Any, other: int) -> Any:
        try:
            return start(tensor, self._ranks[other], group=self._group, tag=self._tag)
        except RuntimeError as error:  # the connection is gone
            raise RankFailed(f"rank {self.rank}: rank {other} is not there: {error}") from error

    def check(self) -> None:
        """Raise if another rank gave up."""
        if self._failure is None:
            try:
                if self._store.check([self._key]):
                    self._failure = f"rank {self.rank}: {self._store.get(self._key).decode()}"
            except RuntimeError as error:  # whoever kept the store is gone
                self._failure = f"rank {self.rank}: the store of torch.distributed is gone: {error}"
        if self._failure is not None:
            raise RankFailed(self._failure)

    def abort(self, reason: str) -> None:
        if self._failure is None:
            self._failure = f"rank {self.rank} gave up: {reason}"
            with contextlib.suppress(RuntimeError):
                self._store.set(self._key, self._failure)


def _tensor_of(array: Array) -> Any:
    import torch

    return torch.from_numpy(array.reshape(-1).view(np.uint8))


def _on_the_way(array: Array) -> Any:
    """The bytes of an array on a device, as a tensor on the same memory."""
    import torch

    from_dlpack: Any = torch.utils.dlpack.from_dlpack
    return verbs.as_bytes(array if verbs.is_torch(array) else from_dlpack(array))


def _stream_of(array: Array) -> Any:
    """Has torch work on the stream that is current for this array: torch's own, or CuPy's."""
    if verbs.is_torch(array):
        return contextlib.nullcontext()
    import cupy
    import torch

    stream_of: Any = torch.cuda.ExternalStream
    return torch.cuda.stream(stream_of(cupy.cuda.get_current_stream().ptr, array.device.id))


@dataclass
class _Batch:
    """Messages on a device that are under way together."""

    operations: list[Any] = field(default_factory=list)
    arrays: list[Array] = field(default_factory=list)
    works: list[Any] | None = None
    """What torch does about them, and nobody has waited for; None until they are begun."""


@dataclass
class _OnDevice:
    """One of them; who waits for it waits for all.  On a GPU it is the current stream that waits."""

    comm: TorchComm
    batch: _Batch
    array: Array

    def wait(self) -> Array:
        if self.batch.works is None:
            raise RuntimeError("a message is waited for inside of its own group")
        self.comm.check()
        try:
            with _stream_of(self.array):
                while self.batch.works:  # each once: gloo's would wait for another message
                    self.batch.works.pop().wait()
        except RuntimeError as error:
            raise RankFailed(f"rank {self.comm.rank}: a message did not come: {error}") from error
        return self.array


@dataclass(eq=False)
class _Work:
    """What gloo is doing.  It can be waited for, but not be looked at, and who has waited in vain has lost all others,
    too: so a thread waits."""

    comm: TorchComm
    request: Any
    other: int
    done: threading.Event = field(default_factory=threading.Event)
    error: RuntimeError | None = None

    def __post_init__(self) -> None:
        _waiting.add(self)
        threading.Thread(target=self._wait, daemon=True).start()

    def _wait(self) -> None:
        try:
            self.request.wait(NEVER)
        except RuntimeError as error:
            self.error = error
        _waiting.discard(self)
        self.done.set()

    def wait(self) -> None:
        comm, end = self.comm, time.monotonic() + self.comm.timeout
        while not self.done.wait(LOOKS):
            comm.check()
            if time.monotonic() > end:
                raise RankFailed(f"rank {comm.rank}: rank {self.other} said nothing for {comm.timeout:g} seconds")
        if self.error is not None:
            comm.check()  # who gave up has said why
            raise RankFailed(f"rank {comm.rank}: rank {self.other} is not heard of: {self.error}") from self.error


_waiting: set[_Work] = set()
"""Those whose threads wait: after a failure also for messages that never come."""


@atexit.register
def _end_waiting() -> None:
    """A thread that torch lets go of while Python ends would abort the process: all are let go of before, by a short
    wait in vain, which closes the connections."""
    for work in list(_waiting):
        with contextlib.suppress(RuntimeError):
            work.request.wait(timedelta(milliseconds=1))
        work.done.wait(1.0)


class _Done:
    """Of a message of no bytes, which is not sent."""

    def wait(self) -> None:
        pass


@dataclass
class _Sent:
    work: _Work | _Done
    array: Array
    """Kept until it has been sent."""

    def wait(self) -> None:
        self.work.wait()


@dataclass
class _Expected:
    work: _Work | _Done
    array: Array

    def wait(self) -> Array:
        self.work.wait()
        return self.array
