"""The comparer is the first thing to test: it has to fail when it must."""

import ml_dtypes
import numpy as np
import pytest
from oracle import assert_correctly_rounded, assert_matches, assert_same_bits

WHOLE = np.linspace(-1.0, 1.0, 24).reshape(2, 3, 4)


def changed(value, where=(1, 2, 3)):
    copy = WHOLE.copy()
    copy[where] = value
    return copy


def test_equal_arrays_pass():
    assert_matches(WHOLE, WHOLE.copy())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_nan_or_infinity_where_none_was_expected_fails(value):
    with pytest.raises(AssertionError, match=r"out\[1, 2, 3\] is (nan|inf|-inf), expected 1\.0"):
        assert_matches(changed(value), WHOLE, rtol=1e9, atol=1e9)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_where_nan_or_infinity_was_expected_fails(value):
    with pytest.raises(AssertionError):
        assert_matches(WHOLE, changed(value), rtol=1e9, atol=1e9)


def test_the_wrong_infinity_fails():
    with pytest.raises(AssertionError, match="inf differs"):
        assert_matches(changed(np.inf), changed(-np.inf))


def test_matching_nan_and_infinities_pass():
    assert_matches(changed(-np.inf), changed(-np.inf))
    assert_matches(changed(np.nan), changed(np.nan))


def test_one_value_off_fails_and_is_named():
    with pytest.raises(AssertionError, match=r"out\[0, 1, 2\].*1 of 24 are off"):
        assert_matches(changed(0.0, (0, 1, 2)), WHOLE, atol=1e-3)


def test_a_value_inside_the_tolerance_passes():
    assert_matches(WHOLE + 1e-7, WHOLE, atol=1e-6)


def test_another_shape_fails():
    with pytest.raises(AssertionError, match="shape"):
        assert_matches(WHOLE[0], WHOLE)


def test_an_empty_array_is_not_a_full_one():
    with pytest.raises(AssertionError):
        assert_matches(np.empty((0, 3, 4)), WHOLE)


def test_a_number_one_and_a_half_ulp_off_is_not_correctly_rounded():
    exact = np.full(4000, 1.0 + 2.0**-30)
    rounded = exact.astype(np.float32)
    assert_correctly_rounded(rounded, exact, "float32")
    rounded[7] += 2.0**-22
    with pytest.raises(AssertionError, match="ulp"):
        assert_correctly_rounded(rounded, exact, "float32")


def test_too_many_neighbours_of_the_rounded_number_fail():
    exact = np.full(4000, 1.0 + 0.6 * 2.0**-7)
    rounded = np.full(4000, 1.0 + 2.0**-7).astype(ml_dtypes.bfloat16)
    assert_correctly_rounded(rounded, exact, "bfloat16")
    rounded[:8] = 1.0
    with pytest.raises(AssertionError, match="correctly rounded"):
        assert_correctly_rounded(rounded, exact, "bfloat16")


def test_the_sign_of_zero_is_a_bit():
    assert_same_bits(np.array([0.0, np.nan]), np.array([0.0, np.nan]))
    with pytest.raises(AssertionError):
        assert_same_bits(np.array([-0.0]), np.array([0.0]))
