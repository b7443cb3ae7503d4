"""Into the compute dtype and back, rounding once.

NumPy has no bfloat16 and no float8.  In here they travel as their bits, in uint16 and uint8 arrays, so that
neither ml_dtypes nor torch is needed to compute with them; no other operand is ever unsigned.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

STORAGE = {name: np.dtype(name) for name in ("float16", "float32", "float64", "bool", "int32", "int64")}
STORAGE["bfloat16"] = np.dtype(np.uint16)
STORAGE["float8_e4m3fn"] = np.dtype(np.uint8)
"""The NumPy dtype in which results of each dtype name travel."""


def are_bits(array: Array) -> bool:
    """Whether these are no numbers yet, but the bits of some."""
    return array.dtype.kind == "u"


def widen(array: Array, dtype: Any) -> Array:
    """`array` in `dtype` ("float32" or "float64"), exactly; no copy if it is there already."""
    if array.dtype == dtype:
        return array
    if array.dtype == np.uint8:
        return np.asarray(_e4m3fn(dtype)[array])
    if array.dtype == np.uint16:
        array = (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):  # beyond the range, or a signalling nan
        return array.astype(dtype, copy=False)


@cache
def _e4m3fn(dtype: Any) -> Array:
    """What each of the 256 patterns of float8_e4m3fn means: sign, 4 bits of exponent, 3 of fraction; no infinity."""
    bits = np.arange(128)
    exponent, fraction = bits >> 3, bits & 7
    numbers = np.where(exponent == 0, fraction * 2.0**-9, (8 + fraction) * 2.0 ** (exponent - 10.0))
    numbers[127] = np.nan
    return np.concatenate([numbers, -numbers]).astype(dtype)


def narrow(values: Array, name: str) -> Array:
    """float32 or float64 `values` rounded once, to nearest even, into the storage of dtype `name`.

    float8_e4m3fn has no infinity: what is too large becomes 448 of its sign, as GPUs convert with ``satfinite``.
    """
    if name == "float8_e4m3fn":
        return _to_e4m3fn(np.asarray(values))
    if name != "bfloat16":
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            return values.astype(STORAGE[name], copy=False)
    bits = _to_odd_float32(np.asarray(values)).view(np.uint32)
    nan = np.isnan(values)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.asarray(np.where(nan, np.uint32(0x7FC0), rounded).astype(np.uint16))


def _to_e4m3fn(values: Array) -> Array:
    """The patterns nearest to `values`; of two as near the even one, of nan 0x7f."""
    nan = np.isnan(values)
    size = np.minimum(np.where(nan, 0.0, np.abs(values)), 448.0)
    exponent = np.frexp(np.maximum(size, 2.0**-6))[1] - 1  # below 2**-6 steps do not shrink any more
    steps = np.rint(np.ldexp(size, 3 - exponent))  # 8 to 16 of them, fewer only below 2**-6
    bits = (8 * (exponent + 6) + steps.astype(np.int64)).astype(np.uint8)
    return np.asarray(np.where(nan, np.uint8(0x7F), bits | np.signbit(values).astype(np.uint8) << np.uint8(7)))


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
