"""Ranks that are processes of torch.distributed, on the CPU; torch is imported late."""

from __future__ import annotations

import contextlib
import threading
import time
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


class TorchComm(PointToPoint):
    """`Comm` by torch.distributed on the CPU (gloo): ranks are processes, as ``torchrun`` starts them.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup, optional
        Its ranks take part.  Default all of them.  Its backend has to send tensors of the CPU.
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
    so do they if one dies.
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
        backend = str(dist.get_backend(group))
        if "gloo" not in backend:
            rule = "the group has to send tensors of the CPU, as gloo does"
            raise ValueError(refusal("TorchComm", rule, ("backend", backend)))
        self._dist: Any = dist
        self._group: Any = group
        self._ranks = dist.get_process_group_ranks(dist.group.WORLD if group is None else group)
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._store: Any = dist.distributed_c10d._get_default_store()
        self._key = "cupyattn gave up: " + ",".join(map(str, self._ranks))
        self._failure: str | None = None

    def send(self, array: Array, to: int) -> Sending:
        _check_host(array)
        self.check()
        if not array.nbytes:  # both sides know
            return _Sent(_Done(), array)
        data = np.ascontiguousarray(array) if array.flags.writeable else np.array(array, order="C")  # or torch warns
        return _Sent(_Work(self, self._begun(self._dist.isend, _tensor_of(data), to), to), data)

    def receive(self, shape: Shape, dtype: Any, source: int, like: Array = None) -> Receiving:
        _check_host(like)
        self.check()
        array = np.empty(shape, dtype)
        if not array.nbytes:
            return _Expected(_Done(), array)
        return _Expected(_Work(self, self._begun(self._dist.irecv, _tensor_of(array), source), source), array)

    def _begun(self, start: Any, tensor: Any, other: int) -> Any:
        try:
            return start(tensor, self._ranks[other], group=self._group)
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


def _check_host(array: Array) -> None:
    if array is not None and not verbs.is_numpy(array):
        rule = "sends arrays of the CPU, as gloo does; NcclComm takes tensors that are on a GPU"
        raise ValueError(refusal("TorchComm", rule, ("array", tuple(array.shape))))


def _tensor_of(array: Array) -> Any:
    import torch

    return torch.from_numpy(array.reshape(-1).view(np.uint8))


@dataclass
class _Work:
    """What gloo is doing.  It can be waited for, but not be looked at, and who has waited in vain has lost all others,
    too: so a thread waits."""

    comm: TorchComm
    request: Any
    other: int
    done: threading.Event = field(default_factory=threading.Event)
    error: RuntimeError | None = None

    def __post_init__(self) -> None:
        threading.Thread(target=self._wait, daemon=True).start()

    def _wait(self) -> None:
        try:
            self.request.wait(timedelta(seconds=self.comm.timeout))
        except RuntimeError as error:
            self.error = error
        self.done.set()

    def wait(self) -> None:
        comm, end = self.comm, time.monotonic() + self.comm.timeout
        while not self.done.wait(LOOKS):
            comm.check()
            if time.monotonic() > end + LOOKS:
                raise RankFailed(f"rank {comm.rank}: rank {self.other} said nothing for {comm.timeout:g} seconds")
        if self.error is not None:
            comm.check()  # who gave up has said why
            raise RankFailed(f"rank {comm.rank}: rank {self.other} is not heard of: {self.error}") from self.error


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
