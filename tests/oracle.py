"""The comparer: the set of nan and infinities has to agree exactly, then the values have to be close."""

import ml_dtypes
import numpy as np

_LOW_PRECISION = {"float16": (np.float16, 10, -14), "bfloat16": (ml_dtypes.bfloat16, 7, -126)}
_PRECISION = {"float32": (np.float32, 23, -126), "float64": (np.float64, 52, -1022), **_LOW_PRECISION}


def to_numpy(array):
    """Any CPU array as float64 (bool and integers as they are)."""
    if type(array).__module__.startswith("torch"):
        array = array.detach()
        array = array.double().numpy() if array.dtype.is_floating_point else array.numpy()
    try:
        array = np.asarray(array)
    except (TypeError, RuntimeError):
        array = np.from_dlpack(array)
    return array if array.dtype.kind in "biu" else array.astype(np.float64)


def assert_matches(actual, expected, rtol=0.0, atol=0.0):
    """Fail unless shapes agree, nan and infinities sit in the same places, and the rest is within tolerance.

    |actual - expected| <= atol + rtol * |expected|; the message names the worst position and both values.
    """
    actual, expected = to_numpy(actual), to_numpy(expected)
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    for name, kind in (("nan", np.isnan), ("inf", np.isposinf), ("-inf", np.isneginf)):
        different = kind(actual) != kind(expected)
        if different.any():
            where = tuple(int(i) for i in np.argwhere(different)[0])
            raise AssertionError(f"out{list(where)} is {actual[where]}, expected {expected[where]} ({name} differs)")
    finite = np.isfinite(expected)
    error = np.where(finite, np.abs(np.where(finite, actual, 0) - np.where(finite, expected, 0)), 0.0)
    excess = error - (atol + rtol * np.where(finite, np.abs(expected), 0.0))
    if excess.size and not excess.max() <= 0.0:
        where = tuple(int(i) for i in np.unravel_index(np.argmax(excess), excess.shape))
        raise AssertionError(
            f"out{list(where)} is {actual[where]}, expected {expected[where]}: off by {error[where]:.3g}, "
            f"allowed {atol + rtol * abs(expected[where]):.3g}; {int((excess > 0).sum())} of {excess.size} are off"
        )


def ulps(actual, expected, dtype):
    """How many units in the last place of `dtype` each value is away from float64 `expected`, rounded once."""
    _, bits, lowest = _PRECISION[dtype]
    actual, expected = to_numpy(actual), to_numpy(expected)
    exponent = np.maximum(np.frexp(np.where(expected == 0, 2.0**lowest, expected))[1] - 1, lowest)
    return np.abs(actual - expected) / np.ldexp(1.0, exponent - bits)


def assert_correctly_rounded(actual, expected, dtype, share=0.999):
    """Fail unless `share` of the values are the float64 `expected` rounded to `dtype`, and none is 1 ulp off it.

    Half a unit is what rounding costs; up to one more half is allowed where float64 itself was on the edge.
    """
    distance = ulps(actual, expected, dtype)
    assert distance.size == 0 or distance.max() <= 1.0, f"off by {distance.max():.3f} ulp of {dtype}"
    exact = float((distance <= 0.5 + 1e-6).mean()) if distance.size else 1.0
    assert exact >= share, f"only {exact:.5f} of the values are correctly rounded to {dtype}"


def assert_same_bits(actual, expected):
    """Fail unless both arrays hold the same values bit for bit (nan equals nan)."""
    actual, expected = to_numpy(actual), to_numpy(expected)
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    same = (actual == expected) | (np.isnan(actual) & np.isnan(expected))
    same &= np.signbit(actual) == np.signbit(expected) if actual.dtype.kind == "f" else True
    if not np.all(same):
        where = tuple(int(i) for i in np.argwhere(~same)[0])
        raise AssertionError(f"out{list(where)} is {actual[where]!r}, expected {expected[where]!r}")
