"""Whose memory a launch works on: CuPy's, torch's, or JAX's through DLPack.

Each class tells where an array lies, makes new ones where the caller's library makes them, and names the
caller's stream.  No array is copied unless a kernel cannot read it as it is, and nobody waits for the GPU, unless many
calls of JAX's arrays are under way.

What a launch needs for itself is given back when it is queued, and is its own until it has run, since the next user
of that memory is behind it on the same stream.  In a CUDA graph that is not enough: it runs again, with the memory it
was captured with, when the streams have long gone on.  There such memory is the graph's: see `temporaries`.
"""

from __future__ import annotations

import atexit
from collections import deque
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from cupyattn.cuda.launching.recipe import Workspace
from cupyattn.cuda.launching.views import View, has_one_batch_axis
from cupyattn.problem import Array, Shape, Spec

Scratch = dict[str, int]
"""Addresses by the names of ``params.Pointers``."""
NOTHING = nullcontext()
LEGACY = (0, 1)
"""The default stream of a device, which cannot be captured: to be asked, while others are, is an error to CUDA."""
MOST_UNDER_WAY = 32
"""Calls of JAX's arrays that are not waited for; XLA lets no more computations run ahead."""


class Stream(NamedTuple):
    """What a launch asks of a stream."""

    ptr: int
    itself: Any = None
    """What has to be held for no other stream to be at that address, if anything has to."""


class CuPyMemory:
    """CuPy's arrays, memory pool and current stream."""

    def view(self, array: Any, dtype: str) -> View:
        item = array.itemsize
        return View(array.data.ptr, array.shape, tuple(stride // item for stride in array.strides), dtype)

    def pointer(self, array: Any) -> int:
        return int(array.data.ptr)

    def empty(self, shape: Shape, dtype: str, like: Any) -> Any:
        import cupy

        return cupy.empty(shape, like.dtype if dtype == "bfloat16" else dtype)

    def result(self, spec: Spec, like: Any) -> Any:
        """Memory for a result; `like` is an operand as the caller has it."""
        return self.empty(spec.shape, spec.dtype, like)

    def is_plain(self, array: Any) -> bool:
        """Whether what its memory says are its numbers."""
        return True

    def contiguous(self, array: Any) -> Any:
        import cupy

        return cupy.ascontiguousarray(array)

    def as_float32(self, array: Any) -> Any:
        return array.astype("float32", order="C", copy=False)

    def zero(self, array: Any) -> None:
        array.fill(0)

    def write(self, to: Any, values: Any, factor: float = 1.0) -> None:
        """Numbers, or one for all, into memory that is there, rounded to its dtype."""
        to[...] = values if factor == 1.0 else values * factor

    def sum_into(self, result: Any, array: Any, axes: tuple[int, ...]) -> None:
        """The sum over some axes, into memory of as many numbers, rounded once."""
        result[...] = array.sum(axis=axes).reshape(result.shape)

    def broadcast(self, array: Any, shape: Shape) -> Any:
        import cupy

        return cupy.broadcast_to(array, shape)

    def fresh(self, array: Any, shape: Shape) -> Any:
        """A copy in memory of its own, repeated as far as that shape says."""
        import cupy

        return cupy.array(cupy.broadcast_to(array, shape), order="C")

    def stream(self, device_index: int) -> Stream:
        import cupy

        current = cupy.cuda.get_current_stream()
        return Stream(current.ptr, current)

    def is_capturing(self, stream: Stream) -> bool:
        """Whether what is queued on the current stream becomes part of a CUDA graph."""
        if stream.ptr in LEGACY:
            return False
        import cupy

        return bool(cupy.cuda.runtime.streamIsCapturing(stream.ptr))

    def temporaries(self, stream: Stream) -> AbstractContextManager[Any]:
        """Where arrays are made that a launch needs for itself, on the current stream.

        CuPy's pool knows nothing of graphs, and would give their memory to somebody else.  That of a capture is taken
        from the driver, as nodes of the graph: from here to where it is let go, it is the graph's at every replay.
        """
        import cupy

        return cupy.cuda.using_allocator(_of_the_graph) if self.is_capturing(stream) else NOTHING

    def gradients_wanted(self, arrays: Mapping[str, Any]) -> bool:
        """Whether the library would differentiate through this call."""
        return False

    def bring(self, arrays: Mapping[str, Any]) -> Mapping[str, Any]:
        """The caller's arrays as this class's."""
        return arrays

    def home(self, results: dict[str, Any]) -> dict[str, Any]:
        """This class's arrays as the caller's."""
        return results

    def scratch(self, workspace: Workspace, like: Any) -> tuple[Scratch, list[Any]]:
        """Memory for a launch, and what has to be kept until it is queued; asked for among `temporaries`."""
        own = {
            name: self.empty((count,), "float32" if name.startswith("partial") else "int32", like)
            for name, count in zip(workspace._fields, workspace, strict=True)
            if count
        }
        return {name: self.pointer(array) for name, array in own.items()}, list(own.values())

    def launched(self, *what: Mapping[str, Any]) -> None:
        """To be told when all kernels are queued that work on these arrays."""

    def to_host(self, array: Any) -> Array:
        """Waited for; bfloat16 and float8 as their bits."""
        import cupy

        bits = {1: "uint8", 2: "uint16"}
        plain = array if array.dtype.isbuiltin == 1 else array.view(bits[array.itemsize])
        return cupy.asnumpy(plain)

    def from_host(self, array: Any, values: Array) -> None:
        """Into memory that is there."""
        (array if array.dtype.isbuiltin == 1 else array.view(values.dtype)).set(values)


def _of_the_graph(num_bytes: int) -> Any:
    import cupy

    return cupy.cuda.MemoryPointer(cupy.cuda.MemoryAsync(num_bytes, cupy.cuda.get_current_stream()), 0)


class TorchMemory(CuPyMemory):
    """torch's tensors, caching allocator and current stream; by pointer, without DLPack."""

    def view(self, array: Any, dtype: str) -> View:
        return View(array.data_ptr(), tuple(array.shape), array.stride(), dtype)

    def pointer(self, array: Any) -> int:
        return int(array.data_ptr())

    def empty(self, shape: Shape, dtype: str, like: Any) -> Any:
        import torch

        return torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)

    def is_plain(self, array: Any) -> bool:
        return _is_literal(array)

    def contiguous(self, array: Any) -> Any:
        return array.contiguous()

    def as_float32(self, array: Any) -> Any:
        return array.float().contiguous()

    def zero(self, array: Any) -> None:
        array.zero_()

    def sum_into(self, result: Any, array: Any, axes: tuple[int, ...]) -> None:
        result.copy_((array.sum(dim=axes) if axes else array).reshape(result.shape))

    def broadcast(self, array: Any, shape: Shape) -> Any:
        return array.expand(shape)

    def fresh(self, array: Any, shape: Shape) -> Any:
        import torch

        return array.expand(shape).clone(memory_format=torch.contiguous_format)

    def stream(self, device_index: int) -> Stream:
        import torch

        return Stream(torch.cuda.current_stream(device_index).cuda_stream)

    def is_capturing(self, stream: Stream) -> bool:
        import torch

        return torch.cuda.is_current_stream_capturing()

    def temporaries(self, stream: Stream) -> AbstractContextManager[Any]:
        """Anywhere: while a graph is captured torch has a pool for it, which lives as long."""
        return NOTHING

    def gradients_wanted(self, arrays: Mapping[str, Any]) -> bool:
        import torch

        return torch.is_grad_enabled() and any(array.requires_grad for array in arrays.values())

    def bring(self, arrays: Mapping[str, Any]) -> Mapping[str, Any]:
        if all(map(_is_literal, arrays.values())):
            return arrays
        return {name: x.clone() if x._is_zerotensor() else x.resolve_neg() for name, x in arrays.items()}


def _is_literal(array: Any) -> bool:
    """A tensor that is neither negated nor zero by a flag, whose numbers are what lies in its memory."""
    return not (array.is_neg() or array._is_zerotensor())


class JaxMemory(CuPyMemory):
    """Eager arrays of JAX, as CuPy's by DLPack, and the results back.

    XLA computes on streams of its own.  DLPack lets our stream wait for its arrays, and its streams for our results.
    It lets neither side wait for the other's reading: XLA learns nothing of our kernel, and says that it is done with
    an array when its own last reader is queued, not when it has run.  So all memory is XLA's, that of results too,
    since XLA gives it to nobody before its own readers are through; and all is held here until an event behind our
    kernel has passed.  The next call asks for it: what the last one used is held until then, or the process ends.
    """

    def __init__(self) -> None:
        self._under_way: deque[tuple[Any, tuple[Mapping[str, Any], ...]]] = deque()
        atexit.register(self.settle)

    def result(self, spec: Spec, like: Any) -> Any:
        import cupy
        import jax

        with jax.ensure_compile_time_eval():  # also where `like` is a constant of a traced function
            (device,) = like.devices()
            return cupy.from_dlpack(jax.numpy.empty(spec.shape, spec.dtype, device=device))

    def bring(self, arrays: Mapping[str, Any]) -> Mapping[str, Any]:
        import cupy

        return {name: cupy.from_dlpack(array) for name, array in arrays.items()}

    def home(self, results: dict[str, Any]) -> dict[str, Any]:
        import jax

        return {name: jax.dlpack.from_dlpack(_Handed(array)) for name, array in results.items()}

    def launched(self, *what: Mapping[str, Any]) -> None:
        import cupy

        event = cupy.cuda.Event(disable_timing=True)
        event.record()
        self._under_way.append((event, what))
        for _ in range(len(self._under_way)):
            try:
                event, what = self._under_way.popleft()
            except IndexError:  # another thread was faster
                return
            if len(self._under_way) >= MOST_UNDER_WAY:
                event.synchronize()
            if not event.done:
                self._under_way.append((event, what))

    def settle(self) -> None:
        """Wait until no kernel needs what is held, and let go of it, as long as there is an XLA to give it back to."""
        while self._under_way:
            event, _ = self._under_way.popleft()
            event.synchronize()


class _Handed:
    """A result on its way to JAX.

    A consumer that does not say on which stream it will read is believed to use the default one by CuPy, and XLA does
    not: for it the host waits.
    """

    def __init__(self, array: Any) -> None:
        self._array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        found: tuple[int, int] = self._array.__dlpack_device__()
        return found

    def __dlpack__(self, *, stream: int | None = None, **more: Any) -> Any:
        import cupy

        if stream is None:
            cupy.cuda.get_current_stream().synchronize()
            stream = -1  # nobody has to wait
        return self._array.__dlpack__(stream=stream, **more)


def copied(memory: CuPyMemory, name: str, array: Any, batch_shape: Shape) -> Any:
    """An operand that kernels cannot read as it is, as they can; see `views.has_to_be_copied`."""
    if name in ("alibi_slopes", "sinks"):
        return memory.as_float32(array)
    if name in ("q", "k", "v", "mask", "bias", "dout", "out") and not has_one_batch_axis(
        tuple(array.shape), batch_shape
    ):
        array = one_batch_axis(memory, name, array, batch_shape)
    return array if name in ("mask", "bias") else memory.contiguous(array)


def one_batch_axis(memory: CuPyMemory, name: str, array: Any, batch_shape: Shape) -> Any:
    """Several batch axes as one; repeated as far as needed, since strides may not be able to say it."""
    inner = tuple(array.shape[-3:])
    lead = tuple(array.shape[:-3])
    if all(size == 1 for size in lead):
        return array.reshape((1,) * min(1, len(lead)) + inner)
    return memory.contiguous(memory.broadcast(array, (*batch_shape, *inner))).reshape((-1, *inner))
