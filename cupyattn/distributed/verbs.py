"""What messages and totals need of arrays, NumPy's, CuPy's and torch's: a few verbs, queued on the current stream.

On a GPU nothing here waits for it, but `to_host`.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np

from cupyattn.numpy_ref import Array
from cupyattn.problem import Shape

BITS = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint64"}


def is_numpy(array: Any) -> bool:
    return isinstance(array, np.ndarray)


def is_torch(array: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def empty(shape: Shape, dtype: Any, like: Any) -> Any:
    """Memory where `like` is, that nobody has written to; `dtype` is that of an array there, or a name."""
    if like is None or is_numpy(like):
        return np.empty(shape, dtype)
    if is_torch(like):
        torch = sys.modules["torch"]
        kind = dtype if isinstance(dtype, torch.dtype) else getattr(torch, np.dtype(dtype).name)
        return torch.empty(shape, dtype=kind, device=like.device)
    import cupy

    with like.device:
        return cupy.empty(shape, dtype)


def zeros(shape: Shape, dtype: Any, like: Any) -> Any:
    found = empty(shape, dtype, like)
    write(found, 0)
    return found


def write(to: Any, values: Any) -> None:
    """Numbers, or one for all, into memory that is there, rounded to its dtype."""
    to[...] = values


def add(to: Any, values: Any) -> None:
    to += values


def copied(array: Any) -> Any:
    """The same numbers in memory of their own, end to end."""
    found = empty(tuple(array.shape), array.dtype, array)
    write(found, array)
    return found


def as_bytes(array: Any) -> Any:
    """The memory of an array whose numbers lie end to end."""
    flat = array.reshape(-1)
    return flat.view(sys.modules["torch"].uint8 if is_torch(array) else np.uint8)


def of_bytes(data: Any, dtype: Any, shape: Shape) -> Any:
    """The way back."""
    return data.view(dtype).reshape(shape)


def num_bytes(array: Any) -> int:
    count: int = math.prod(array.shape)
    return count * int(array.itemsize)


def is_contiguous(array: Any) -> bool:
    return bool(array.is_contiguous() if is_torch(array) else array.flags.c_contiguous)


def pointer(array: Any) -> int:
    """Of an array on a GPU."""
    return int(array.data_ptr() if is_torch(array) else array.data.ptr)


def name_of(dtype: Any) -> str:
    """Of a dtype of any of them, or of its name."""
    return str(dtype).removeprefix("torch.") if "torch." in str(dtype) else np.dtype(dtype).name


def device_of(array: Any) -> Any:
    """Where it is: equal for arrays on one device."""
    return "the host" if is_numpy(array) else array.device


def synchronize(array: Any) -> None:
    """Wait for all that is queued on the current stream of an array's GPU."""
    if is_torch(array):
        sys.modules["torch"].cuda.current_stream(array.device).synchronize()
        return
    import cupy

    with array.device:
        cupy.cuda.get_current_stream().synchronize()


def to_host(array: Any) -> Array:
    """Waited for."""
    return np.asarray(array.cpu().numpy() if is_torch(array) else array.get())


def from_host(values: Array, to: Any) -> None:
    """Into memory of the same dtype and shape."""
    if is_torch(to):
        to.copy_(sys.modules["torch"].from_numpy(values))
    else:
        to.set(values)
