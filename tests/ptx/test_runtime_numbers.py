"""The runtime's numbers and bits, against NumPy, ml_dtypes and exact fractions."""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from ptx.probes import ProbeError, Probes

NAN = 0x7FFFFFFF
HALF_NAN = 0x7FFF
LEAST_NORMAL = np.float32(2.0**-126)
INFINITY = np.float32(np.inf)
probes = Probes()


def bits(*values):
    return np.array(values, np.float32).view(np.uint32)


def expression(text, result="u32", operand="u32"):
    """The body that computes it for every a, b and c of three arrays."""
    return probes.body(f"""
        for (u64 index = thread.number; index < argument(4); index += launch.threads) {{
            const {operand} a = array<{operand}>(1)[index];
            const {operand} b = array<{operand}>(2)[index];
            const {operand} c = array<{operand}>(3)[index];
            array<{result}>(0)[index] = {text};
        }}
    """)


def evaluate(body, a, b=None, c=None, result=np.uint32):
    """What came of it, as an array of `result`."""
    a, b, c = (np.broadcast_to(x, np.shape(a)).copy() for x in (a, a if b is None else b, a if c is None else c))
    out = np.zeros(np.shape(a), result)
    probes.run(body, out, a, b, c, a.size)
    return out


SPECIALS = bits(0, -0.0, 1, -1, 1e-40, -1e-40, 2.0**-126, 1e38, -1e38, np.inf, -np.inf, np.nan)
ADD = expression("add_rn_ftz_f32(a, b)")
ADD_WITHOUT_FTZ = expression("add_rn_f32(a, b)")
ADD_DOWN = expression("add_rm_ftz_f32(a, b)")
SUBTRACT = expression("sub_rn_ftz_f32(a, b)")
MULTIPLY = expression("mul_rn_ftz_f32(a, b)")
MULTIPLY_ADD = expression("fma_rn_ftz_f32(a, b, c)")
DIVIDE = expression("div_rn_ftz_f32(a, b)")
DIVIDE_APPROXIMATELY = expression("div_approx_ftz_f32(a, b)")
RECIPROCAL = expression("rcp_rn_ftz_f32(a)")
RECIPROCAL_APPROXIMATELY = expression("rcp_approx_ftz_f32(a)")
NEGATE = expression("neg_ftz_f32(a)")
ABSOLUTE = expression("abs_ftz_f32(a)")
MAXIMUM = expression("max_ftz_f32(a, b)")
MINIMUM = expression("min_ftz_f32(a, b)")
EXP2 = expression("ex2_approx_ftz_f32(a)")
LOG2 = expression("lg2_approx_ftz_f32(a)")
TANH = expression("tanh_approx_f32(a)")
BINARY = {
    "add": (ADD, np.add),
    "sub": (SUBTRACT, np.subtract),
    "mul": (MULTIPLY, np.multiply),
    "div": (DIVIDE, np.divide),
}


def flushed(values):
    return np.where(np.abs(values) < LEAST_NORMAL, np.copysign(np.float32(0), values), values)


def canonical(values):
    found = values.astype(np.float32).view(np.uint32)
    return np.where(np.isnan(values), np.uint32(NAN), found)


@pytest.mark.parametrize("name", BINARY)
def test_arithmetic_is_that_of_numpy_with_subnormals_flushed_and_one_nan(name, rng):
    body, function = BINARY[name]
    noise = rng.integers(0, 2**32, (2, 20000), np.uint64).astype(np.uint32)
    pairs = np.array(np.meshgrid(SPECIALS, SPECIALS)).reshape(2, -1)
    a, b = np.concatenate([noise, pairs], axis=1)
    with np.errstate(all="ignore"):
        expected = canonical(flushed(function(flushed(a.view(np.float32)), flushed(b.view(np.float32)))))
    np.testing.assert_array_equal(evaluate(body, a, b), expected)


def test_addition_without_ftz_keeps_subnormals():
    a, b = bits(1e-40, 2.0**-126), bits(2e-40, -(2.0**-126) * (1 + 2.0**-20))
    np.testing.assert_array_equal(evaluate(ADD_WITHOUT_FTZ, a, b).view(np.float32), a.view("f4") + b.view("f4"))
    np.testing.assert_array_equal(evaluate(ADD, a, b), bits(0, -0.0))


def test_fma_rounds_once_to_nearest(rng):
    a, b = rng.standard_normal((2, 2000)).astype(np.float32)
    c = (-a * b * (1 + rng.integers(-2, 3, 2000) * np.float32(2.0**-24))).astype(np.float32)
    for left, right, more, bits_found in zip(
        a, b, c, evaluate(MULTIPLY_ADD, *map(bits, (a, b, c))).ravel(), strict=True
    ):
        exact = Fraction(float(left)) * Fraction(float(right)) + Fraction(float(more))
        found = np.uint32(bits_found).view(np.float32)
        if found == 0:
            assert abs(exact) < Fraction(2) ** -126
            continue
        for other in (np.nextafter(found, INFINITY), np.nextafter(found, -INFINITY)):
            assert abs(Fraction(float(found)) - exact) <= abs(Fraction(float(other)) - exact)


def test_add_rm_gives_the_largest_number_that_is_not_larger(rng):
    a = rng.standard_normal(4000).astype(np.float32)
    b = (rng.standard_normal(4000) * 2.0 ** rng.integers(-30, 5, 4000)).astype(np.float32)
    for left, right, bits_found in zip(a, b, evaluate(ADD_DOWN, bits(a).ravel(), bits(b).ravel()), strict=True):
        exact = Fraction(float(left)) + Fraction(float(right))
        found = np.uint32(bits_found).view(np.float32)
        assert Fraction(float(found)) <= exact < Fraction(float(np.nextafter(found, INFINITY)))


def test_add_rm_of_what_cancels_or_overflows():
    top = np.float32(np.finfo(np.float32).max)
    a, b = bits(1, 0, -0.0, 0, top, -top, np.inf, np.nan, np.inf), bits(-1, -0.0, -0.0, 0, top, -top, -1, 1, -np.inf)
    expected = bits(-0.0, -0.0, -0.0, 0, top, -np.inf, np.inf, 0, 0)
    expected[[7, 8]] = NAN
    np.testing.assert_array_equal(evaluate(ADD_DOWN, a, b), expected)


def test_max_and_min_prefer_numbers_to_nans_and_order_zeros():
    a = bits(np.nan, 1, np.nan, -0.0, 0.0, 1e-40, np.inf, -3)
    b = bits(2, np.nan, np.nan, 0.0, -0.0, -1e-40, -np.inf, -2)
    most, least = bits(2, 1, 0, 0.0, 0.0, 0.0, np.inf, -2), bits(2, 1, 0, -0.0, -0.0, -0.0, -np.inf, -3)
    most[2] = least[2] = NAN
    np.testing.assert_array_equal(evaluate(MAXIMUM, a, b), most)
    np.testing.assert_array_equal(evaluate(MINIMUM, a, b), least)


def test_negation_and_absolute_value_flush():
    np.testing.assert_array_equal(evaluate(NEGATE, bits(1, -2, 1e-40, -1e-40, 0)), bits(-1, 2, -0.0, 0, -0.0))
    np.testing.assert_array_equal(evaluate(ABSOLUTE, bits(1, -2, 1e-40, -1e-40, -0.0)), bits(1, 2, 0, 0, 0))


@pytest.mark.parametrize("body", [RECIPROCAL, RECIPROCAL_APPROXIMATELY])
def test_reciprocals_of_special_values(body):
    a = bits(0, -0.0, 1e-40, np.inf, -np.inf, 4, 2.0**127, np.nan)
    expected = bits(np.inf, -np.inf, np.inf, 0, -0.0, 0.25, 0, 0)
    expected[7] = NAN
    np.testing.assert_array_equal(evaluate(body, a), expected)


def test_approximate_division_by_large_numbers_gives_zero():
    a, b = bits(1e38, -1, np.inf, 6, 1), bits(2.0**127, 2.0**127, 2.0**127, 3, np.inf)
    expected = bits(0, -0.0, 0, 2, 0)
    expected[2] = NAN
    np.testing.assert_array_equal(evaluate(DIVIDE_APPROXIMATELY, a, b), expected)


def test_ex2_lg2_and_tanh_of_special_values():
    a = bits(np.inf, -np.inf, np.nan, 0, -0.0, 1e-40, -127, -126, 128)
    expected = bits(np.inf, 0, 0, 1, 1, 1, 0, LEAST_NORMAL, np.inf)
    expected[2] = NAN
    np.testing.assert_array_equal(evaluate(EXP2, a), expected)
    a = bits(np.inf, -1, np.nan, 0, -0.0, 1e-40, -1e-40, 1, 8)
    expected = bits(np.inf, 0, 0, -np.inf, -np.inf, -np.inf, -np.inf, 0, 3)
    expected[[1, 2]] = NAN
    np.testing.assert_array_equal(evaluate(LOG2, a), expected)
    a, expected = bits(np.inf, -np.inf, 0, -0.0, np.nan), bits(1, -1, 0, -0.0, 0)
    expected[4] = NAN
    np.testing.assert_array_equal(evaluate(TANH, a), expected)


@pytest.mark.parametrize(("body", "function"), [(EXP2, np.exp2), (LOG2, np.log2), (TANH, np.tanh)])
def test_approximations_are_within_two_units_in_the_last_place(body, function, rng):
    a = np.abs(rng.standard_normal(5000) * 20 + 1e-3).astype(np.float32)
    found = evaluate(body, a.view(np.uint32)).view(np.float32)
    np.testing.assert_allclose(found, function(a.astype(np.float64)), rtol=2.0**-22, atol=2.0**-24)


COMPARISONS = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: (a < b) | (a > b),
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
}
NEGATED = {"equ": "ne", "neu": "eq", "ltu": "ge", "leu": "gt", "gtu": "le", "geu": "lt", "nan": "num"}
COMPARE = {name: expression(f"setp_f32(Compare::{name}, true, a, b)") for name in (*COMPARISONS, *NEGATED)}
LESS_WITHOUT_FTZ = expression("setp_f32(Compare::lt, false, a, b)")


@pytest.mark.parametrize("name", COMPARE)
def test_comparisons_are_ordered_or_not(name):
    a, b = np.array(np.meshgrid(SPECIALS, SPECIALS)).reshape(2, -1)
    ordered = COMPARISONS[NEGATED.get(name, name)](flushed(a.view(np.float32)), flushed(b.view(np.float32)))
    np.testing.assert_array_equal(evaluate(COMPARE[name], a, b) != 0, ordered ^ (name in NEGATED))


def test_comparisons_without_ftz_see_subnormals():
    assert evaluate(LESS_WITHOUT_FTZ, bits(1e-40), bits(2e-40))
    assert not evaluate(COMPARE["lt"], bits(1e-40), bits(2e-40))


FROM_HALF = expression("cvt_f32_f16(a)", operand="u16")
TO_HALVES = expression("cvt_rn_f16x2_f32(a, b)")
TO_BFLOATS = expression("cvt_rn_bf16x2_f32(a, b)")
TO_E4M3 = expression("cvt_rn_satfinite_e4m3x2_f32(a, b)")
FROM_E4M3 = expression("cvt_rn_f16x2_e4m3x2(a)", operand="u16")


def around(dtype):
    """Every number of a small type, what lies between neighbours, and what lies beside that; as float32."""
    count = 2 ** (8 * np.dtype(dtype).itemsize)
    exact = np.arange(count).astype(f"u{np.dtype(dtype).itemsize}").view(dtype).astype(np.float32)
    order = np.unique(exact[np.isfinite(exact)]).astype(np.float64)
    ties = ((order[:-1] + order[1:]) / 2).astype(np.float32)
    beside = [np.nextafter(ties, INFINITY), np.nextafter(ties, -INFINITY)]
    largest = min(2 * order[-1], float(np.finfo(np.float32).max))
    last = np.float32([largest, -largest, np.inf, -np.inf, 1e-42, -1e-42, -0.0])
    return np.concatenate([order.astype(np.float32), ties, *beside, last])


def test_every_half_is_its_value():
    halves = np.arange(65536, dtype=np.uint16)
    expected = canonical(halves.view(np.float16).astype(np.float32))
    np.testing.assert_array_equal(evaluate(FROM_HALF, halves), expected)


@pytest.mark.parametrize(("body", "dtype"), [(TO_HALVES, np.float16), (TO_BFLOATS, ml_dtypes.bfloat16)])
def test_floats_become_halves_and_bfloats_to_nearest_even(body, dtype):
    values = around(dtype)
    with np.errstate(over="ignore"):
        expected = values.astype(dtype).view(np.uint16)
    np.testing.assert_array_equal(evaluate(body, bits(0), bits(np.nan))[0] & 0xFFFF, HALF_NAN)
    low = evaluate(body, np.zeros_like(values.view(np.uint32)), values.view(np.uint32))
    high = evaluate(body, values.view(np.uint32), np.zeros_like(values.view(np.uint32)))
    np.testing.assert_array_equal(low, expected)
    np.testing.assert_array_equal(high >> 16, expected)


def test_floats_become_e4m3_to_nearest_even_and_saturate():
    values = around(ml_dtypes.float8_e4m3fn)
    expected = np.clip(values, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    zeros = np.zeros_like(values.view(np.uint32))
    np.testing.assert_array_equal(evaluate(TO_E4M3, zeros, values.view(np.uint32)), expected)
    np.testing.assert_array_equal(evaluate(TO_E4M3, values.view(np.uint32), zeros) >> 8, expected)
    assert evaluate(TO_E4M3, bits(np.nan), bits(-np.nan)) == 0x7F7F


def test_every_pair_of_e4m3_is_two_halves():
    pairs = np.arange(65536, dtype=np.uint16)
    values = pairs.view(ml_dtypes.float8_e4m3fn).astype(np.float16).view(np.uint16)
    values = np.where(np.isnan(values.view(np.float16)), HALF_NAN, values)
    np.testing.assert_array_equal(evaluate(FROM_E4M3, pairs), values.astype(np.uint16).view(np.uint32))


FMA_HALVES = expression("fma_rn_f16x2(a, b, c)")
FMA_BFLOATS = expression("fma_rn_bf16x2(a, b, c)")


@pytest.mark.parametrize(("body", "dtype"), [(FMA_HALVES, np.float16), (FMA_BFLOATS, ml_dtypes.bfloat16)])
def test_fma_of_pairs_rounds_once(body, dtype, rng):
    """Also where float64 would round first: 7 * 37 lies halfway between two bfloat16."""
    a, b, c = (rng.standard_normal((3, 1000)) * 2.0 ** rng.integers(-6, 7, (3, 1000))).astype(dtype)
    tiny = dtype(2.0**-24) if dtype is np.float16 else dtype(2.0**-60)
    a, b, c = (
        np.append(a, np.array([7, 7], dtype)),
        np.append(b, np.array([37, -37], dtype)),
        np.append(c, [-tiny, tiny]),
    )
    packed = [np.repeat(x.view(np.uint16), 2).view(np.uint32) for x in (a, b, c)]
    found = evaluate(body, *packed).view(np.uint16)
    np.testing.assert_array_equal(found[::2], found[1::2])
    with np.errstate(invalid="ignore"):  # of signalling nans
        grid = np.unique(np.arange(65536, dtype=np.uint16).view(dtype).astype(np.float64))
    grid = grid[np.isfinite(grid)]
    for left, right, more, result in zip(a, b, c, found[::2].view(dtype), strict=True):
        exact = Fraction(float(left)) * Fraction(float(right)) + Fraction(float(more))
        if not np.isfinite(np.float32(result)):
            assert abs(exact) > grid[-1]
            continue
        place = np.searchsorted(grid, float(result))
        for other in grid[max(place - 1, 0) : place + 2]:
            assert abs(Fraction(float(result)) - exact) <= abs(Fraction(other) - exact)


TO_U32 = expression("cvt_rzi_ftz_u32_f32(a)")
TO_S32 = expression("cvt_rzi_ftz_s32_f32(a)")
FROM_INTEGERS = [
    (expression("cvt_rn_f32_s32(a)"), np.int32, np.uint32),
    (expression("cvt_rn_f32_u32(a)"), np.uint32, np.uint32),
    (expression("cvt_rn_f32_s64(a)", operand="u64"), np.int64, np.uint64),
    (expression("cvt_rn_f32_u16(a)", operand="u16"), np.uint16, np.uint16),
]
TO_DOUBLE = expression("cvt_f64_f32(a)", result="u64")
TO_DOUBLE_FLUSHED = expression("cvt_ftz_f64_f32(a)", result="u64")
FROM_DOUBLE = expression("cvt_rn_ftz_f32_f64(a)", operand="u64")


def test_floats_to_integers_cut_off_and_saturate():
    a = bits(2.9, -2.9, 1e10, -1e10, np.nan, np.inf, -np.inf, 2.0**31, 0.9)
    largest, most, least = 2**32 - 1, 2**31 - 1, 2**31
    unsigned = [2, 0, largest, 0, 0, largest, 0, 2**31, 0]
    signed = [2, 2**32 - 2, most, least, 0, most, least, most, 0]
    np.testing.assert_array_equal(evaluate(TO_U32, a), unsigned)
    np.testing.assert_array_equal(evaluate(TO_S32, a), signed)


@pytest.mark.parametrize(("body", "dtype", "operand"), FROM_INTEGERS, ids=["s32", "u32", "s64", "u16"])
def test_integers_to_floats(body, dtype, operand, rng):
    info = np.iinfo(dtype)
    values = np.concatenate([rng.integers(info.min, info.max, 1000, dtype), np.array([info.min, info.max, 0], dtype)])
    found = evaluate(body, values.view(operand)).view(np.float32)
    np.testing.assert_array_equal(found, values.astype(np.float32))


def test_doubles_and_back():
    a = bits(1, -3, 1e-40, 1e38, np.inf)
    np.testing.assert_array_equal(evaluate(TO_DOUBLE, a, result=np.float64), a.view(np.float32).astype(np.float64))
    assert evaluate(TO_DOUBLE_FLUSHED, bits(-1e-40), result=np.uint64) == 1 << 63
    doubles = np.array([1 + 2.0**-24, 1 + 2.0**-23 + 2.0**-24, 1e-40, 1e300, np.nan])
    expected = bits(1, 1 + 2.0**-22, 0, np.inf, 0)
    expected[4] = NAN
    np.testing.assert_array_equal(evaluate(FROM_DOUBLE, doubles.view(np.uint64)), expected)


PERMUTE = expression("prmt_b32(a, b, c)")
INSERT = expression("bfi_b32(a, b, c & 255, c >> 8)")
INSERT_LONG = {
    place: expression(f"bfi_b64(a, b, {place & 255}, {place >> 8})", "u64", "u64")
    for place in (0x2020, 0x0820, 0x4000, 0x2130, 0xFF01, 0x0040, 0x0005)
}
LEADING, REVERSED = expression("clz_b32(a)"), expression("brev_b32(a)")
EXTRACT = expression("bfe_u32(a, c & 255, c >> 8)")
TABLES = {table: expression(f"lop3_b32(a, b, c, {table})") for table in (0, 0x80, 0xE8, 0x96, 0xCA, 0x01, 0xFF)}
SHIFTS = {
    "shl_b32": (np.uint32, lambda value, count: value << count),
    "shr_u32": (np.uint32, lambda value, count: value >> count),
    "shr_s32": (np.uint32, lambda value, count: (value - (value >> 31 << 32)) >> count),
    "shl_b64": (np.uint64, lambda value, count: value << count),
    "shr_u64": (np.uint64, lambda value, count: value >> count),
    "shr_s64": (np.uint64, lambda value, count: (value - (value >> 63 << 64)) >> count),
}
SHIFT = {
    name: expression(f"{name}(a, (u32)b)", *(("u64", "u64") if dtype is np.uint64 else ("u32", "u32")))
    for name, (dtype, _) in SHIFTS.items()
}


def test_prmt_picks_bytes_and_signs(rng):
    a, b, c = rng.integers(0, 2**32, (3, 500), np.uint64).astype(np.uint32)
    for left, right, selector, found in zip(
        *map(np.ndarray.tolist, (a, b, c, evaluate(PERMUTE, a, b, c))), strict=True
    ):
        source = left.to_bytes(4, "little") + right.to_bytes(4, "little")
        digits = [selector >> 4 * place & 15 for place in range(4)]
        expected = bytes(source[d & 7] if d < 8 else 255 * (source[d & 7] >> 7) for d in digits)
        assert found == int.from_bytes(expected, "little")


def fields():
    """Positions and lengths, packed as INSERT and EXTRACT want them."""
    edges = (0, 1, 7, 16, 31, 32, 33, 255)
    return np.array([position | length << 8 for position in edges for length in edges], np.uint32)


def test_bfi_inserts_what_fits(rng):
    places = fields()
    a, b = rng.integers(0, 2**32, (2, places.size), np.uint64).astype(np.uint32)
    for left, right, place, found in zip(
        *map(np.ndarray.tolist, (a, b, places, evaluate(INSERT, a, b, places))), strict=True
    ):
        position, length = place & 255, place >> 8
        mask = ((1 << length) - 1) << position
        assert found == ((right & ~mask) | (left << position & mask)) % 2**32


@pytest.mark.parametrize("place", INSERT_LONG)
def test_bfi_of_64_bits_inserts_what_fits(place, rng):
    a, b = rng.integers(0, 2**64 - 1, (2, 50), np.uint64)
    mask = ((1 << (place >> 8)) - 1) << (place & 255)
    for left, right, found in zip(
        *map(np.ndarray.tolist, (a, b, evaluate(INSERT_LONG[place], a, b, result=np.uint64))), strict=True
    ):
        assert found == ((right & ~mask) | (left << (place & 255) & mask)) % 2**64


def test_clz_and_brev_see_every_bit(rng):
    a = np.concatenate([[0, 1, 2**31, 2**32 - 1], rng.integers(0, 2**32, 200) >> rng.integers(0, 32, 200)])
    a = a.astype(np.uint32)
    assert evaluate(LEADING, a, a, a).tolist() == [32 - x.bit_length() for x in a.tolist()]
    assert evaluate(REVERSED, a, a, a).tolist() == [int(f"{x:032b}"[::-1], 2) for x in a.tolist()]


def test_bfe_extracts_zeros_beyond_the_word(rng):
    places = fields()
    a = rng.integers(0, 2**32, places.size, np.uint64).astype(np.uint32)
    for left, place, found in zip(a.tolist(), places.tolist(), evaluate(EXTRACT, a, a, places).tolist(), strict=True):
        assert found == left >> (place & 255) & ((1 << (place >> 8)) - 1)


@pytest.mark.parametrize("table", TABLES)
def test_lop3_looks_each_bit_up(table, rng):
    a, b, c = rng.integers(0, 2**32, (3, 50), np.uint64).astype(np.uint32)
    index = [(x[:, None] >> np.arange(32, dtype=np.uint32)) & 1 for x in (a, b, c)]
    looked_up = table >> (4 * index[0] + 2 * index[1] + index[2]) & 1
    expected = (looked_up.astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(axis=1)
    np.testing.assert_array_equal(evaluate(TABLES[table], a, b, c), expected)


@pytest.mark.parametrize("name", SHIFTS)
def test_shifts_beyond_the_width_are_clamped(name):
    dtype, function = SHIFTS[name]
    width = 8 * np.dtype(dtype).itemsize
    counts = np.array([0, 1, 31, 32, 33, 63, 64, 65, 255, 2**31, 2**32 - 1], dtype)
    for value in (1, 0x80000001, 2**width - 1, 2 ** (width - 1)):
        found = evaluate(SHIFT[name], np.full(counts.size, value, dtype), counts, result=dtype)
        expected = [function(value, min(int(count), width)) % 2**width for count in counts]
        assert found.tolist() == expected


DIVISIONS = {
    f"{name}_{kind}": expression(f"{name}_{kind}(thread, a, b)", f"u{kind[1:]}", f"u{kind[1:]}")
    for name in ("div", "rem")
    for kind in ("s32", "u32", "s64", "u64")
}


@pytest.mark.parametrize("name", DIVISIONS)
def test_divisions_cut_off_towards_zero_and_wrap(name):
    signed, width = name[4] == "s", int(name[5:])
    unsigned_type = f"u{width // 8}"
    values = [0, 1, 7, 2**width - 7, 2**width - 1, 2 ** (width - 1), 2 ** (width - 1) - 1]
    a, b = np.array([(x, y) for x in values for y in values if y], unsigned_type).T.copy()
    found = evaluate(DIVISIONS[name], a, b, result=unsigned_type)
    for left, right, result in zip(a.tolist(), b.tolist(), found.tolist(), strict=True):
        if signed:
            left, right = (x - (x >> width - 1 << width) for x in (left, right))
        quotient = abs(left) // abs(right) * (1 if (left < 0) == (right < 0) else -1)
        expected = quotient if name.startswith("div") else left - quotient * right
        assert result == expected % 2**width
    with pytest.raises(ProbeError, match="division by zero"):
        evaluate(DIVISIONS[name], a[:1], np.zeros(1, unsigned_type), result=unsigned_type)


def test_tanh_is_odd_and_bounded():
    values = np.linspace(0, 12, 500, dtype=np.float32)
    up, down = (evaluate(TANH, x.view(np.uint32)).view(np.float32) for x in (values, -values))
    np.testing.assert_array_equal(up, -down)
    assert math.isclose(up.max(), 1)
