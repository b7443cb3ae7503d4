"""What becomes of a row, as compiled: sums, maxima and sinks that are nothing, infinite or no numbers."""

import numpy as np
import pytest
from ptx.alone import BEGIN, TARGETS, built, planted, run

pytestmark = pytest.mark.usefixtures("nvrtc")

SOFTMAX = "algorithm/softmax.cuh"
LOWEST = np.finfo(np.float32).min
LEAST = 2.0**-126
"""Smaller numbers are zeros."""
WARPS, COLS = 1500, 16
PROBE = f"""
#include "algorithm/softmax.cuh"
namespace alone {{
using namespace cupyattn;
template <int>
__global__ void finish(int count, const float* rows, float* found) {{
    {BEGIN}
    const Finish its = finish_row(rows[3 * i], rows[3 * i + 1], rows[3 * i + 2]);
    found[2 * i] = its.factor, found[2 * i + 1] = its.lse;
}}
template <bool kLazy, int kShift>
__global__ void fold(int count, const float* scales, const float* all_scores, const float* maxima, const float* sums,
                     float* found) {{
    const int warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = ptx::lane();
    Accumulator<{COLS}> scores;
    OnlineSoftmax softmax;
    float shrink[2];
    for (int half = 0; half < 2; ++half) {{
        const int row = 16 * warp + scores.row(half);
        softmax.row_max[half] = maxima[row], softmax.row_sum[half] = sums[4 * row + lane % 4];
    }}
#pragma unroll
    for (int block = 0; block < {COLS} / 8; ++block)
#pragma unroll
        for (int x = 0; x < 4; ++x)
            scores.value[block][x] = all_scores[{COLS} * (16 * warp + scores.row(x / 2)) + scores.first_column() +
                                                scores.column(block, x)];
    const bool stays = softmax.fold<kLazy, FastExponential, kShift>(scores, scales[warp], shrink);
    found += 15 * (32 * warp + lane);
    for (int half = 0; half < 2; ++half)
        found[half] = shrink[half], found[2 + half] = softmax.row_max[half], found[4 + half] = softmax.row_sum[half];
#pragma unroll
    for (int block = 0; block < {COLS} / 8; ++block)
#pragma unroll
        for (int x = 0; x < 4; ++x) found[6 + 4 * block + x] = scores.value[block][x];
    found[14] = stays;
}}
}}
"""


def assert_close(found, expected, atol=LEAST, rtol=2e-6):
    np.testing.assert_allclose(found, expected, rtol, atol, equal_nan=True)


# ---- The end of a row ------------------------------------------------------------------------------------------------


MARKS = (-np.inf, LOWEST, -1e38, -200.0, -1.0, -0.0, 0.0, 1.0, 90.0, 1e38, -LOWEST, np.inf)
"""Of maxima, and of sinks, which may besides be nan."""
SUMS = (2.0**-9, 0.5, 1.0, 3.0, 2.0**17, 3e38, np.nan)
"""Of rows that saw a key: the largest weight is 2^-8 or more."""


def ends_of_rows(rng, count=20_000):
    """(row_max, row_sum, sink): all marks with each other, and rows at random."""
    rows = [(x, y, sink) for x in MARKS[1:] for y in SUMS for sink in (*MARKS, np.nan)]
    rows += [(-np.inf, y, sink) for y in (0.0, np.nan) for sink in (*MARKS, np.nan)]
    more = [rng.normal(0.0, 40.0, count), 2.0 ** rng.uniform(-9.0, 17.0, count), rng.normal(0.0, 40.0, count)]
    return np.concatenate([rows, np.stack(more, axis=1)]).astype(np.float32)


def expected_ends(rows):
    """(factor, lse, whether nan is beside the lowest number) by sums in float64."""
    row_max, row_sum, sink = rows.astype(np.float64).T
    lost = np.isnan(row_sum) | np.isnan(sink) | np.isposinf(row_max)  # infinity less infinity is nan
    with np.errstate(all="ignore"):
        lse = np.logaddexp2(row_max + np.log2(row_sum), sink) * np.log(2.0)
        factor = np.where(row_sum > 0.0, 1.0 / (row_sum + np.exp2(sink - row_max)), 0.0)
        at_lowest = np.fmax(row_max, sink) == LOWEST
        lse = np.where(at_lowest & ~np.isneginf(lse), LOWEST, lse)
        factor, lse = np.where(lost & (row_sum != 0.0), np.nan, factor), np.where(lost, np.nan, lse)
        return factor.astype(np.float32), lse.astype(np.float32), at_lowest & lost


def hold_finish(kernel, rows):
    found = run(kernel, [rows], np.zeros((len(rows), 2), np.float32))
    factor, lse, _ = expected_ends(rows)
    assert_close(found[:, 0], factor, rtol=2.0**-17)  # a difference of exponents, rounded, may be 2^7
    assert_close(found[:, 1], lse, atol=1e-6)


@pytest.mark.parametrize("target", TARGETS)
def test_rows_of_any_maxima_sums_and_sinks_end_well(rng, target):
    rows = ends_of_rows(rng)
    hold_finish(built(PROBE, "alone::finish<0>", target), rows[~expected_ends(rows)[2]])


def test_nan_beside_the_lowest_number_is_nan(rng):
    rows = ends_of_rows(rng, 0)
    hold_finish(built(PROBE, "alone::finish<0>", "sm_80"), rows[expected_ends(rows)[2]])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("sink == ptx::infinity() ? 1.f : ", ""),
        ("highest == kLowest ? ptx::fma(total, 0.f, kLowest) : ", ""),
        ("highest == -ptx::infinity() ? 0.f : highest;", "highest;"),
        ("row_sum == 0.f ? 0.f : ", ""),
    ],
    ids=[
        "infinity less infinity",
        "the lowest is no mark",
        "-inf less -inf",
        "nothing divided by nothing",
    ],
)
def test_a_fault_at_the_end_of_a_row_is_found(rng, old, new):
    rows = ends_of_rows(rng)
    kernel = built(PROBE, "alone::finish<0>", "sm_80", planted(SOFTMAX, old, new))
    with pytest.raises(AssertionError):
        hold_finish(kernel, rows[~expected_ends(rows)[2]])


# ---- A block of keys -------------------------------------------------------------------------------------------------


def blocks_of_scores(rng):
    """(scales, scores, maxima, sums): rows that saw nothing, that see nothing, that grow by just so much."""
    scales = rng.choice([0.125, 1.0, 0.18033688], WARPS).astype(np.float32)
    scores = rng.normal(0.0, 5.0, (WARPS, 16, COLS)).astype(np.float32)
    maxima = rng.normal(0.0, 5.0, (WARPS, 16)).astype(np.float32)
    sums = rng.uniform(0.0, 9.0, (WARPS, 16, 4)).astype(np.float32)
    scores[rng.random(scores.shape) < 0.1] = -np.inf
    hidden, fresh = rng.random((2, WARPS, 16)) < 0.1
    scores[hidden] = -np.inf
    maxima[fresh] = -np.inf
    sums[fresh] = 0.0
    # Warps whose rows grow at most to the power of two that is the limit, some of them by a bit more.
    limits = np.arange(WARPS) % 3 == 0
    maxima[limits], scores[limits] = 0.0, np.minimum(scores[limits], 1.0)
    scores[limits, 3, 5] = (8.0 / scales)[limits]
    beyond = np.arange(WARPS) % 6 == 0
    scores[beyond, 3, 5] = np.nextafter(scores[beyond, 3, 5], np.float32(np.inf))
    strays = (rng.random(scores.shape) < 0.001) & ~limits[:, None, None]
    scores[strays] = rng.choice(np.array([np.nan, np.inf, LOWEST, -LOWEST], np.float32), strays.sum())
    return scales, scores, maxima, sums


def expected_fold(scales, scores, maxima, sums, lazy, shift):
    """(stays, shrink, row_max, weights, row_sum): decisions in float32, as the kernel does, numbers in float64."""
    scale = scales[:, None]
    with np.errstate(all="ignore"):
        highest = np.fmax(maxima, np.fmax.reduce(scores, axis=2))
        stays = ~((highest - maxima) * scale > np.float32(8.0)).any(axis=1, keepdims=True) & lazy  # nan is no reason
        highest = np.where(stays, maxima, highest)
        origin = np.where(np.isneginf(highest), np.float32(0.0), highest * scale).astype(np.float64)
        fma = (maxima.astype(np.float64) * scale - origin).astype(np.float32)
        shrink = np.where(stays, 1.0, np.exp2(fma.astype(np.float64)))
        exponent = (scores.astype(np.float64) * scale[..., None] - (origin - shift)[..., None]).astype(np.float32)
        weights = np.exp2(exponent.astype(np.float64))
        lanes = weights.reshape(WARPS, 16, COLS // 8, 4, 2).sum(axis=(2, 4))
        return stays, shrink, highest, weights, sums * shrink[..., None] + lanes


def hold_fold(rng, kernel, lazy, shift):
    given = blocks_of_scores(rng)
    found = np.zeros((WARPS * 32, 15), np.float32)
    run(kernel, list(given), found)
    by_lane = found.reshape(WARPS, 8, 4, 15)  # (warp, row of a half, lane of a row, what)

    def of_rows(x):
        """(warp, row, lane of a row, ...) of what a lane has for its two halves."""
        return np.moveaxis(x, 3, 1).reshape(WARPS, 16, 4, *x.shape[4:])

    weights = of_rows(np.moveaxis(by_lane[..., 6:14].reshape(WARPS, 8, 4, COLS // 8, 2, 2), 4, 3))
    weights = np.moveaxis(weights, 2, 3).reshape(WARPS, 16, COLS)
    stays, shrink, row_max, exact, row_sum = expected_fold(*given, lazy, shift)
    assert not lazy or 0.2 < stays.mean() < 0.8
    np.testing.assert_array_equal(found[:, 14], np.repeat(stays, 32))
    np.testing.assert_array_equal(of_rows(by_lane[..., 2:4]), np.repeat(row_max[..., None], 4, axis=2))
    assert_close(of_rows(by_lane[..., 0:2]), np.repeat(shrink[..., None], 4, axis=2))
    assert_close(weights, exact)
    assert_close(of_rows(by_lane[..., 4:6]), row_sum)


VARIANTS = {"eager": (False, 0), "lazy": (True, 0), "shifted": (False, 8)}


def fold_of(name, target, sources=None):
    lazy, shift = VARIANTS[name]
    return built(PROBE, f"alone::fold<{str(lazy).lower()}, {shift}>", target, sources)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", VARIANTS)
def test_blocks_of_any_scores_are_folded(rng, name, target):
    hold_fold(rng, fold_of(name, target), *VARIANTS[name])


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("lazy", "scale_log2 > 8.f ||", "scale_log2 >= 8.f ||"),
        ("lazy", " || (highest[1] - row_max[1]) * scale_log2 > 8.f", ""),
        (
            "lazy",
            "!ptx::any((highest[0] - row_max[0]) * scale_log2 > 8.f",
            "ptx::all((highest[0] - row_max[0]) * scale_log2 <= 8.f",
        ),
        ("lazy", "return stays;", "return kLazy;"),
        ("eager", "highest[half] == -ptx::infinity() ? 0.f : highest[half] * scale_log2", "highest[half] * scale_log2"),
    ],
    ids=["the limit", "half of the rows", "rows that see nothing", "it always stays", "-inf less -inf"],
)
def test_a_fault_in_a_fold_is_found(rng, name, old, new):
    with pytest.raises(AssertionError):
        hold_fold(rng, fold_of(name, "sm_80", planted(SOFTMAX, old, new)), *VARIANTS[name])
