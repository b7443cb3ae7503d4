"""Tensor maps: what TMA has to know of an array, as a value; the driver encodes it.

A map sees an array of heads as (column, head of a group, row, group, sequence).  Its box is what one instruction moves.
Source: CUDA driver API, cuTensorMapEncodeTiled.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache, lru_cache
from typing import Any, NamedTuple

from cupyattn.problem import ITEMSIZE

SIZE = 128
"""Bytes of an encoded map."""
ALIGNMENT = 64
"""Of a record with maps in it."""
LARGEST_STRIDE = 2**40


class BoxMap(NamedTuple):
    """All of a map but the address."""

    dtype: str
    dims: tuple[int, int, int, int, int]
    strides: tuple[int, int, int, int]
    """Bytes from step to step along each axis but the first."""
    box: tuple[int, int, int, int, int]
    swizzle: int
    """Bytes of a row of the tile in shared memory, whose chunks trade places."""


def swizzle_of(columns: int, dtype: str) -> int:
    """``SwizzledTile::kSwizzle``."""
    row = columns * ITEMSIZE[dtype]
    return 128 if row % 128 == 0 else 64 if row % 64 == 0 else 32


def box_map(
    dtype: str,
    columns: int,
    rows: int,
    shape: tuple[int, int, int, int],
    strides: tuple[int, int, int],
    group: int = 1,
) -> BoxMap:
    """The map of an array of (batch, rows, heads, head_dim) whose tile has so many columns, and boxes so many rows.

    Pages are a batch, too.  `strides` are elements from sequence to sequence, row to row and head to head.  With a
    `group` a box has that many neighbouring heads of each of its rows.
    """
    batch, seqlen, heads, head_dim = shape
    item = ITEMSIZE[dtype]
    from_batch, from_row, from_head = (item * stride for stride in strides)
    swizzle = swizzle_of(columns, dtype)
    dims = (head_dim, group, max(1, seqlen), heads // group, max(1, batch))  # of no keys no box is ever asked for
    steps = (from_head, from_row, group * from_head, from_batch)
    # Along an axis of one no step is ever taken, but the driver wants a lawful one.
    lawful = tuple(step if size > 1 else 16 for size, step in zip(dims[1:], steps, strict=True))
    return BoxMap(
        dtype, dims, (lawful[0], lawful[1], lawful[2], lawful[3]), (swizzle // item, group, rows, 1, 1), swizzle
    )


def objection(name: str, wanted: BoxMap, pointer_is_aligned: bool) -> str | None:
    """Why no map can be made of an array, if so."""
    if not pointer_is_aligned:
        return f"{name} does not start at a multiple of 16 bytes"
    for size, stride in zip(wanted.dims[1:], wanted.strides, strict=True):
        if size > 1 and stride % 16:
            return f"the steps of {name} are not multiples of 16 bytes"
        if size > 1 and not 0 < stride < LARGEST_STRIDE:
            return f"a step of {name} is {stride} bytes, and has to be more than 0 and less than 2**40"
    return None


# Of cuda.h.
_DTYPES = {"float8_e4m3fn": 0, "float16": 6, "bfloat16": 9}
_NOT_INTERLEAVED, _PROMOTED_TO_256_BYTES, _ZEROS_OUTSIDE = 0, 3, 0
_SWIZZLES = {32: 1, 64: 2, 128: 3}


@cache
def _encoder() -> Any:
    """The driver's cuTensorMapEncodeTiled; None without a driver that has it.

    By ctypes, since cuda-bindings encodes into an object that is not aligned to 64 bytes, as the driver wants it.
    """
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        found = driver.cuTensorMapEncodeTiled
    except (OSError, AttributeError):
        return None
    words, numbers = ctypes.POINTER(ctypes.c_uint64), ctypes.POINTER(ctypes.c_uint32)
    found.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p, words, words, numbers, numbers]
    found.argtypes += [ctypes.c_int] * 4
    found.restype = ctypes.c_int
    return found


def can_be_encoded() -> bool:
    """Whether there is a driver that encodes maps: one for CUDA 12 or newer."""
    return _encoder() is not None


@lru_cache(maxsize=4096)
def encode(wanted: BoxMap, address: int) -> bytes:
    """The map as the driver encodes it for an array that starts at `address`.

    Raises
    ------
    RuntimeError
        The driver refuses.
    """
    memory = ctypes.create_string_buffer(2 * SIZE)
    start = -ctypes.addressof(memory) % SIZE
    error = _encoder()(
        ctypes.addressof(memory) + start,
        _DTYPES[wanted.dtype],
        len(wanted.dims),
        address,
        (ctypes.c_uint64 * 5)(*wanted.dims),
        (ctypes.c_uint64 * 4)(*wanted.strides),
        (ctypes.c_uint32 * 5)(*wanted.box),
        (ctypes.c_uint32 * 5)(1, 1, 1, 1, 1),
        _NOT_INTERLEAVED,
        _SWIZZLES[wanted.swizzle],
        _PROMOTED_TO_256_BYTES,
        _ZEROS_OUTSIDE,
    )
    if error:
        raise RuntimeError(f"the driver does not encode {wanted} at {address:#x}: CUDA error {error}")
    return memory.raw[start : start + SIZE]
