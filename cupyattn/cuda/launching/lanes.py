"""Copies between a GPU and pinned memory of the host, so that nobody waits who need not.

Results are copied to the host on the caller's stream.  Copies back run beside it, on a stream of their own, between two
events: they start when all that was queued before is done, among it the last use of the memory they are written to;
and whoever reads them lets the caller's stream wait, by `ready`, which nobody may forget before that memory is given
back.  Until then a lane holds it, from before the first copy is queued: an interruption between two of them loses
nothing but the event, and then `ready` waits for the whole stream.
"""

from __future__ import annotations

from typing import Any

from cupyattn.problem import Array, Shape


class TorchLane:
    """torch's tensors and streams."""

    def __init__(self, like: Array) -> None:
        import torch

        self._device = like.device
        self._beside: Any = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._done: Any = None
        """The event after the copies of what is held; None: they were interrupted before there was one."""
        self._held: list[Array] = []
        """What is written to by copies under way."""

    def empty(self, shape: Shape, like: Array) -> Array:
        """Memory of the host."""
        import torch

        with torch.inference_mode(False):
            return torch.empty(shape, dtype=like.dtype, pin_memory=True)

    def save(self, host: Array, index: Any, values: Array) -> Array:
        """`values` to a contiguous part of the host's memory."""
        host[index].copy_(values, non_blocking=True)
        return host

    def move(self, host: Array, index: Any, values: Array) -> Array:
        """The same for values of the host, which have to be there: see `settle`."""
        host[index] = values
        return host

    def load(self, targets: list[Array], index: Any, sources: list[Array]) -> list[Array]:
        """Contiguous parts of the host's memory to an index of the targets."""
        import torch

        self._beside.wait_stream(torch.cuda.current_stream(self._device))
        self._held = [*self._held, *targets]
        self._done = None
        with torch.cuda.stream(self._beside):
            for target, source in zip(targets, sources, strict=True):
                target[index].copy_(source, non_blocking=True)
            self._done = self._beside.record_event()
        return targets

    def ready(self) -> None:
        """What is queued from now on finds the loaded values."""
        import torch

        if self._held:
            done = self._beside.record_event() if self._done is None else self._done
            torch.cuda.current_stream(self._device).wait_event(done)
            self._held = []

    def settle(self) -> None:
        """Wait until the host finds the saved values."""
        import torch

        self.ready()
        torch.cuda.current_stream(self._device).synchronize()

    def __del__(self) -> None:
        if self._held:
            self._beside.synchronize()


class CuPyLane:
    """CuPy's arrays and streams; the host's memory is NumPy's."""

    def __init__(self, device_index: int) -> None:
        import cupy

        self._device = cupy.cuda.Device(device_index)
        with self._device:
            self._beside = cupy.cuda.Stream(non_blocking=True)
        self._done: Any = None
        self._held: list[Array] = []

    def empty(self, shape: Shape, like: Array) -> Array:
        import cupyx

        return cupyx.empty_pinned(shape, like.dtype)

    def save(self, host: Array, index: Any, values: Array) -> Array:
        import cupy

        with self._device:
            cupy.ascontiguousarray(values).get(out=host[index], blocking=False)
        return host

    def move(self, host: Array, index: Any, values: Array) -> Array:
        host[index] = values
        return host

    def load(self, targets: list[Array], index: Any, sources: list[Array]) -> list[Array]:
        import cupy

        with self._device:
            self._beside.wait_event(cupy.cuda.get_current_stream().record())
            self._held = [*self._held, *targets]
            self._done = None
            for target, source in zip(targets, sources, strict=True):
                target[index].set(source, stream=self._beside)
            self._done = self._beside.record()
        return targets

    def ready(self) -> None:
        import cupy

        if self._held:
            with self._device:
                done = self._beside.record() if self._done is None else self._done
                cupy.cuda.get_current_stream().wait_event(done)
            self._held = []

    def settle(self) -> None:
        import cupy

        self.ready()
        with self._device:
            cupy.cuda.get_current_stream().synchronize()

    def __del__(self) -> None:
        if self._held:
            self._beside.synchronize()
