"""Whose memory a launch works on: CuPy's, torch's, or anybody's through DLPack.

Each class tells where an array lies, makes new ones where the caller's library makes them, and names the
caller's stream.  No array is copied unless a kernel cannot read it as it is, and nobody waits for the GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from cupyattn.cuda.launch import View, Workspace, has_one_batch_axis
from cupyattn.problem import Shape

Scratch = dict[str, int]
"""Addresses by the names of ``params.Pointers``."""


class Stream(NamedTuple):
    """What a launch asks of a stream."""

    ptr: int


class CuPyMemory:
    """CuPy's arrays, memory pool and current stream."""

    def __init__(self) -> None:
        self._counters: dict[tuple[int, int], Any] = {}

    def view(self, array: Any, dtype: str) -> View:
        item = array.itemsize
        return View(array.data.ptr, array.shape, tuple(stride // item for stride in array.strides), dtype)

    def pointer(self, array: Any) -> int:
        return int(array.data.ptr)

    def empty(self, shape: Shape, dtype: str, like: Any) -> Any:
        import cupy

        return cupy.empty(shape, like.dtype if dtype == "bfloat16" else dtype)

    def zeros(self, count: int, like: Any) -> Any:
        import cupy

        return cupy.zeros(count, "int32")

    def contiguous(self, array: Any) -> Any:
        import cupy

        return cupy.ascontiguousarray(array)

    def as_float32(self, array: Any) -> Any:
        return array.astype("float32", order="C", copy=False)

    def broadcast(self, array: Any, shape: Shape) -> Any:
        import cupy

        return cupy.broadcast_to(array, shape)

    def stream(self, device_index: int) -> Stream:
        import cupy

        return Stream(cupy.cuda.get_current_stream().ptr)

    def gradients_wanted(self, arrays: Mapping[str, Any]) -> bool:
        """Whether the library would differentiate through this call."""
        return False

    def bring(self, arrays: Mapping[str, Any]) -> Mapping[str, Any]:
        """The caller's arrays as this class's."""
        return arrays

    def home(self, results: dict[str, Any]) -> dict[str, Any]:
        """This class's arrays as the caller's."""
        return results

    def scratch(self, workspace: Workspace, device_index: int, stream: Stream, like: Any) -> tuple[Scratch, list[Any]]:
        """Memory for a launch, and what has to be kept until it is queued.

        Counters are zero between launches and put back by each, so that those of a stream, whose launches
        come one after the other, can be used again and again.
        """
        if not workspace.counters:
            return {}, []
        key = (device_index, stream.ptr)
        counters = self._counters.get(key)
        if counters is None or counters.shape[0] < workspace.counters:
            counters = self._counters[key] = self.zeros(max(1024, 2 * workspace.counters), like)
        kept = {
            "partial_out": self.empty((workspace.partial_out,), "float32", like),
            "partial_lse": self.empty((workspace.partial_lse,), "float32", like),
            "counters": counters,
        }
        return {name: self.pointer(array) for name, array in kept.items()}, list(kept.values())


class TorchMemory(CuPyMemory):
    """torch's tensors, caching allocator and current stream; by pointer, without DLPack."""

    def view(self, array: Any, dtype: str) -> View:
        return View(array.data_ptr(), tuple(array.shape), array.stride(), dtype)

    def pointer(self, array: Any) -> int:
        return int(array.data_ptr())

    def empty(self, shape: Shape, dtype: str, like: Any) -> Any:
        import torch

        return torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)

    def zeros(self, count: int, like: Any) -> Any:
        import torch

        return torch.zeros(count, dtype=torch.int32, device=like.device)

    def contiguous(self, array: Any) -> Any:
        return array.contiguous()

    def as_float32(self, array: Any) -> Any:
        return array.float().contiguous()

    def broadcast(self, array: Any, shape: Shape) -> Any:
        return array.expand(shape)

    def stream(self, device_index: int) -> Stream:
        import torch

        return Stream(torch.cuda.current_stream(device_index).cuda_stream)

    def gradients_wanted(self, arrays: Mapping[str, Any]) -> bool:
        import torch

        return torch.is_grad_enabled() and any(array.requires_grad for array in arrays.values())

    def bring(self, arrays: Mapping[str, Any]) -> Mapping[str, Any]:
        if any(array.is_neg() for array in arrays.values()):
            return {name: array.resolve_neg() for name, array in arrays.items()}
        return arrays


class DLPackMemory(CuPyMemory):
    """Eager arrays of other libraries, JAX among them: as CuPy's, and the results back."""

    def __init__(self, from_dlpack: Any) -> None:
        super().__init__()
        self._from_dlpack = from_dlpack

    def bring(self, arrays: Mapping[str, Any]) -> Mapping[str, Any]:
        import cupy

        return {name: cupy.from_dlpack(array) for name, array in arrays.items()}

    def home(self, results: dict[str, Any]) -> dict[str, Any]:
        return {name: self._from_dlpack(array) for name, array in results.items()}


def copied(memory: CuPyMemory, name: str, array: Any, batch_shape: Shape) -> Any:
    """An operand that kernels cannot read as it is, as they can; see `launch.has_to_be_copied`."""
    if name in ("alibi_slopes", "sinks"):
        return memory.as_float32(array)
    if name in ("q", "k", "v", "mask", "bias") and not has_one_batch_axis(tuple(array.shape), batch_shape):
        array = one_batch_axis(memory, name, array, batch_shape)
    return array if name in ("mask", "bias") else memory.contiguous(array)


def one_batch_axis(memory: CuPyMemory, name: str, array: Any, batch_shape: Shape) -> Any:
    """Several batch axes as one; repeated as far as needed, since strides may not be able to say it."""
    inner = tuple(array.shape[-3:])
    lead = tuple(array.shape[:-3])
    if all(size == 1 for size in lead):
        return array.reshape((1,) * min(1, len(lead)) + inner)
    return memory.contiguous(memory.broadcast(array, (*batch_shape, *inner))).reshape((-1, *inner))
