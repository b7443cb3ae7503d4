"""Into the compute dtype exactly, and back with one rounding; compared with integer arithmetic."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cupyattn.rounding import STORAGE, narrow, widen

FORMATS = {"bfloat16": (8, 8), "float16": (5, 11)}
"""Bits of the exponent, and of the significand with its hidden bit."""
formats = pytest.mark.parametrize("name", FORMATS)


def limits(name):
    """(exponent of the smallest normal number, exponent of the largest, bits of the fraction)."""
    exponent_bits, precision = FORMATS[name]
    largest = 2 ** (exponent_bits - 1) - 1
    return 1 - largest, largest, precision - 1


def meaning(bits, name):
    """The number that a pattern of bits stands for, by IEEE 754's definition."""
    lowest, highest, fraction_bits = limits(name)
    sign = -1.0 if bits >> 15 else 1.0
    exponent, fraction = (bits & 0x7FFF) >> fraction_bits, bits & (2**fraction_bits - 1)
    if exponent == highest - lowest + 2:
        return sign * np.inf if fraction == 0 else np.nan
    if exponent == 0:
        return sign * fraction * 2.0 ** (lowest - fraction_bits)
    return sign * (fraction + 2**fraction_bits) * 2.0 ** (exponent - 1 + lowest - fraction_bits)


def rounded(value, name):
    """The nearest number of a format to a float64, ties to even, in exact arithmetic."""
    if value == 0 or not np.isfinite(value):
        return value
    lowest, highest, fraction_bits = limits(name)
    exponent = max(int(np.frexp(value)[1]) - 1, lowest)
    step = Fraction(2) ** (exponent - fraction_bits)
    result = round(Fraction(value) / step) * step  # Python rounds fractions half to even
    if abs(result) >= Fraction(2) ** (highest + 1):
        return np.copysign(np.inf, value)
    return np.copysign(float(result), value)


def every_pattern(name):
    return np.arange(2**16, dtype=np.uint16).view(STORAGE[name])


def assert_identical(found, expected):
    """Equal values, nan where nan is expected, and equal signs of zeros."""
    with np.errstate(invalid="ignore"):  # signalling nan
        found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_array_equal(found, expected)
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(found[numbers]), np.signbit(expected[numbers]))


def round_trip(values, name):
    """What `values` are after narrowing."""
    return widen(narrow(values, name), "float64")


def between(name, seed=2):
    """Midpoints of neighbours of a format, and float64s so close to them that float32 cannot tell."""
    rng = np.random.default_rng(seed)
    lowest, highest, fraction_bits = limits(name)
    infinity = (highest - lowest + 2) << fraction_bits
    edges = [0, 1, 2**fraction_bits - 1, 2**fraction_bits, infinity - 1]
    below = np.concatenate([rng.integers(0, infinity, 1500), edges])
    step = 2.0 ** (lowest - fraction_bits)
    lower = np.array([meaning(int(bits), name) for bits in below])
    upper = np.array([meaning(int(bits) + 1, name) for bits in below])
    upper = np.where(np.isinf(upper), 2.0 ** (highest + 1), upper)
    middle = (lower + upper) / 2
    assert (middle % (step / 2) == 0).all()
    near = [np.nextafter(middle, np.inf), np.nextafter(middle, 0), middle * (1 + 2.0**-40), middle * (1 - 2.0**-40)]
    values = np.concatenate([middle, *near, lower, np.nextafter(lower, np.inf)])
    return np.concatenate([values, -values])


@formats
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_pattern_widens_to_what_it_means(name, dtype):
    expected = [meaning(bits, name) for bits in range(2**16)]
    found = widen(every_pattern(name), dtype)
    assert found.dtype == dtype
    assert_identical(found, expected)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_pattern_of_float8_widens_to_what_ml_dtypes_takes_it_for(dtype):
    patterns = np.arange(2**8, dtype=np.uint8)
    found = widen(patterns.reshape(16, 16).T, dtype)
    assert found.dtype == dtype
    assert_identical(found, patterns.view(ml_dtypes.float8_e4m3fn).reshape(16, 16).T)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_to_float8_is_rounded_once_to_the_nearest_of_all_patterns_and_to_the_even_one_of_two(dtype):
    numbers = widen(np.arange(127, dtype=np.uint8), "float64")
    middles = (numbers[1:] + numbers[:-1]) / 2
    sizes = np.concatenate([[449.0, 1e30, np.inf, 1e-40], middles]).astype(dtype)
    beside = [np.nextafter(middles.astype(dtype), sizes.dtype.type(side)) for side in (0, np.inf)]
    sizes = np.concatenate([numbers.astype(dtype), sizes, *beside])
    values = np.concatenate([sizes, -sizes])
    off = np.abs(np.minimum(np.abs(values), 448.0).astype(np.float64)[:, None] - numbers)
    nearest = [set(np.flatnonzero(row == row.min())) for row in off]
    found = narrow(values, "float8_e4m3fn")
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found >> 7, np.signbit(values))
    for bits, allowed in zip(found & 0x7F, nearest, strict=True):
        assert bits in allowed
        assert len(allowed) == 1 or bits % 2 == 0
    np.testing.assert_array_equal(narrow(np.array([np.nan, -np.nan], dtype), "float8_e4m3fn"), [0x7F, 0x7F])


@formats
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_pattern_survives_the_way_there_and_back(name, dtype):
    patterns = every_pattern(name)
    back = narrow(widen(patterns, dtype), name)
    assert back.dtype == STORAGE[name]
    numbers = ~np.isnan(widen(patterns, "float64"))
    np.testing.assert_array_equal(back[numbers].view(np.uint16), patterns[numbers].view(np.uint16))
    assert np.isnan(widen(back[~numbers], "float64")).all()


@formats
def test_float64_is_rounded_once_to_nearest_even(name):
    values = between(name)
    expected = np.array([rounded(value, name) for value in values])
    assert_identical(round_trip(values, name), expected)
    kind = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[name]
    with np.errstate(over="ignore"):
        twice = values.astype(np.float32).astype(kind).astype(np.float64)
    assert (twice != expected).mean() > 0.1  # these values do tell one rounding from two


@formats
def test_float32_is_rounded_to_nearest_even(name):
    with np.errstate(over="ignore"):
        values = between(name).astype(np.float32)
    assert_identical(round_trip(values, name), [rounded(float(value), name) for value in values])


@formats
@given(value=st.floats(width=64))
@example(value=3.3895313892515355e38)  # bfloat16's largest number
@example(value=3.3961775292304957e38)  # half a step above it
@example(value=65519.99999999999)
@example(value=65520.0)
@example(value=4.591774807899561e-41)  # half of bfloat16's smallest
@example(value=4.5917748078995606e-41)
@example(value=5e-324)
def test_any_float64_is_rounded_correctly(name, value):
    assert_identical(round_trip(np.array([value]), name), [rounded(value, name)])


@formats
def test_special_values_stay_what_they_are(name):
    values = np.array([np.inf, -np.inf, np.nan, -np.nan, 0.0, -0.0, 1e-300, -1e-300, 1e300, -1e300])
    expected = [np.inf, -np.inf, np.nan, np.nan, 0.0, -0.0, 0.0, -0.0, np.inf, -np.inf]
    assert_identical(round_trip(values, name), expected)
    with np.errstate(over="ignore", under="ignore"):
        assert_identical(round_trip(values.astype(np.float32), name), expected)


@formats
def test_every_kind_of_nan_stays_nan(name):
    payloads = np.array([0x7FF0000000000001, 0x7FF8000000000000, 0xFFFFFFFFFFFFFFFF, 0x7FF000000FFFFFFF], np.uint64)
    assert np.isnan(round_trip(payloads.view(np.float64), name)).all()
    payloads = np.array([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF, 0x7F80FFFF], np.uint32)
    assert np.isnan(round_trip(payloads.view(np.float32), name)).all()


def test_wider_dtypes_are_left_or_rounded_as_numpy_does():
    values = np.array([1.0, 1.0 + 2.0**-30, np.pi, 1e-320, -np.inf])
    assert narrow(values, "float64") is values
    assert widen(values, "float64") is values
    with np.errstate(under="ignore"):
        np.testing.assert_array_equal(narrow(values, "float32"), values.astype(np.float32))


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
def test_shapes_and_strides_do_not_matter(name):
    values = np.random.default_rng(4).standard_normal((3, 4, 6))
    expected = narrow(values, name)
    assert expected.dtype == STORAGE[name]
    for view in (slice(None, None, -1), (Ellipsis, slice(None, None, 2)), (slice(0, 0),), (1, 2, 3), (Ellipsis, None)):
        piece, wanted = values[view], expected[view]
        for array in (np.asarray(piece), np.asfortranarray(piece)):
            found = narrow(array, name)
            assert found.shape == array.shape
            np.testing.assert_array_equal(found, wanted.reshape(array.shape))
            wide = widen(found, "float64").reshape(wanted.shape)
            np.testing.assert_array_equal(widen(np.asarray(wanted), "float64"), wide)


def test_narrowing_does_not_change_its_argument():
    values = between("bfloat16")
    for kind in (np.float64, np.float32):
        with np.errstate(over="ignore"):
            argument = values.astype(kind)
        before = argument.tobytes()
        narrow(argument, "bfloat16")
        narrow(argument, "float16")
        assert argument.tobytes() == before


def test_numbers_beyond_float32_warn_nobody():
    """float64 beside float32 arithmetic; where a user wants to hear of overflow, it is of his own."""
    with np.errstate(all="raise"):
        found = widen(np.array([1e300, -1e300, 1e-300]), "float32")
    assert found.tolist() == [np.inf, -np.inf, 0.0]
