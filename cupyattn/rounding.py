"""Into the compute dtype and back, rounding once.

NumPy has no bfloat16.  In here it travels as its bits in a uint16 array, so that neither ml_dtypes nor
torch is needed to compute with it; no other operand is ever uint16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

STORAGE = {name: np.dtype(name) for name in ("float16", "float32", "float64", "bool", "int32", "int64")}
STORAGE["bfloat16"] = np.dtype(np.uint16)
"""The NumPy dtype in which each dtype name travels."""


def widen(array: Array, dtype: Any) -> Array:
    """`array` in `dtype` ("float32" or "float64"), exactly; no copy if it is there already."""
    if array.dtype == dtype:
        return array
    if array.dtype == np.uint16:
        array = (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    with np.errstate(invalid="ignore"):  # a signalling nan
        return array.astype(dtype, copy=False)


def narrow(values: Array, name: str) -> Array:
    """float32 or float64 `values` rounded once, to nearest even, into the storage of dtype `name`."""
    if name != "bfloat16":
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            return values.astype(STORAGE[name], copy=False)
    bits = _to_odd_float32(np.asarray(values)).view(np.uint32)
    nan = np.isnan(values)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.asarray(np.where(nan, np.uint32(0x7FC0), rounded).astype(np.uint16))


def _to_odd_float32(values: Array) -> Array:
    """float64 to float32, inexact results to the neighbour with an odd last bit.

    Rounding that again to nearest gives what rounding once from float64 would have given.
    """
    if values.dtype == np.float32:
        return np.asarray(values, order="C")
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        nearest = values.astype(np.float32, order="C")
        inexact = (nearest != values) & ~np.isnan(values)
        away = np.abs(nearest.astype(np.float64)) > np.abs(values)
    bits = nearest.view(np.uint32)
    toward_zero = bits - (inexact & away).astype(np.uint32)  # also steps from inf to the largest number
    return np.asarray((toward_zero | inexact.astype(np.uint32)).view(np.float32))
