"""Tensor maps: what TMA has to know of an array, as a value; the driver encodes it.

A map sees an array of heads as (column, head of a group, row, group, sequence).  Its box is what one instruction moves.
Source: CUDA driver API, cuTensorMapEncodeTiled.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from typing import NamedTuple

from cupyattn.problem import ITEMSIZE

SIZE = 128
"""Bytes of an encoded map."""
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

    `strides` are elements from sequence to sequence, row to row and head to head.  With a `group` a box has that many
    neighbouring heads of each of its rows.
    """
    batch, seqlen, heads, head_dim = shape
    item = ITEMSIZE[dtype]
    from_batch, from_row, from_head = (item * stride for stride in strides)
    swizzle = swizzle_of(columns, dtype)
    dims = (head_dim, group, max(1, seqlen), heads // group, batch)  # of no keys no box is ever asked for
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


def can_be_encoded() -> bool:
    """Whether cuda-bindings, through which the driver is asked, is installed."""
    try:
        return importlib.util.find_spec("cuda.bindings") is not None
    except ModuleNotFoundError:
        return False


@lru_cache(maxsize=4096)
def encode(wanted: BoxMap, address: int) -> bytes:
    """The map as the driver encodes it for an array that starts at `address`.

    Raises
    ------
    RuntimeError
        The driver refuses.
    """
    from cuda.bindings import driver

    kinds = driver.CUtensorMapDataType
    dtypes = {
        "float16": kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        "bfloat16": kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        "float8_e4m3fn": kinds.CU_TENSOR_MAP_DATA_TYPE_UINT8,
    }
    swizzles = driver.CUtensorMapSwizzle
    error, encoded = driver.cuTensorMapEncodeTiled(
        dtypes[wanted.dtype],
        len(wanted.dims),
        address,
        [driver.cuuint64_t(size) for size in wanted.dims],
        [driver.cuuint64_t(stride) for stride in wanted.strides],
        [driver.cuuint32_t(size) for size in wanted.box],
        [driver.cuuint32_t(1)] * len(wanted.dims),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        getattr(swizzles, f"CU_TENSOR_MAP_SWIZZLE_{wanted.swizzle}B"),
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"the driver does not encode {wanted} at {address:#x}: {error.name}")
    return b"".join(int(word).to_bytes(8, "little") for word in encoded.opaque)
