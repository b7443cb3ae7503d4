"""Where rows and chunks lie in a tile, as compiled: all of them, for tiles of the kernels' shapes."""

import numpy as np
import pytest
from ptx.alone import BEGIN, TARGETS, built, planted, run

pytestmark = pytest.mark.usefixtures("nvrtc")

BASES = np.array([0, 1024, 128 * 1001, 2**17 + 384], np.uint32)
SHAPES = (
    ("Half", 16, 64, 32),
    ("float", 16, 32, 32),
    ("BFloat16", 64, 96, 128),
    ("Half", 48, 160, 96),
    ("Half", 128, 128, 128),
    ("float", 80, 192, 160),
    ("BFloat16", 16, 256, 256),
)
"""Elements, rows, columns, threads that fill it; the last has rows for half of its threads."""
PROBE = f"""
#include "tiles/tile.cuh"
namespace alone {{
using namespace cupyattn;
template <typename Element, int kRows, int kCols>
__global__ void places(int count, const uint32* bases, uint32* found) {{
    {BEGIN}
    using Tile = SharedTile<Element, kRows, kCols>;
    const Tile tile{{bases[i / kRows]}};
    const int row = i % kRows;
    found += i * (kCols / 8 * 2 + 1);
#pragma unroll
    for (int chunk = 0; chunk < kCols / 8; ++chunk) {{
        found[chunk] = tile.address(row, chunk);
        found[kCols / 8 + chunk] = Tile::advance(tile.address(row, chunk % 2), chunk / 2);
    }}
    found[kCols / 4] = tile.address(row % 16, 0) + Tile::down(row / 16);
}}
template <typename Element, int kRows, int kCols, int kThreads>
__global__ void shares(int count, const uint32* bases, uint32* found) {{
    {BEGIN}
    using Tile = SharedTile<Element, kRows, kCols>;
    using Its = Share<Tile, kThreads>;
    const Tile tile{{bases[i / kThreads]}};
    const Its share(tile, i % kThreads);
#pragma unroll
    for (int pass = 0; pass < Its::kPasses; ++pass)
#pragma unroll
        for (int group = 0; group < Its::kGroups; ++group)
            found[(i * Its::kPasses + pass) * Its::kGroups + group] =
                share.idle(pass) ? ~0u : share.address(tile, pass, group);
}}
}}
"""


def expression(name, element, *numbers):
    element = element if element == "float" else f"cupyattn::{element}"
    return f"alone::{name}<{', '.join(map(str, (element, *numbers)))}>"


def hold_places(element, rows, cols, target, sources=None):
    chunks = cols // 8
    kernel = built(PROBE, expression("places", element, rows, cols), target, sources)
    found = run(kernel, [BASES], np.zeros((len(BASES) * rows, 2 * chunks + 1), np.uint32))
    found = found.reshape(len(BASES), rows, -1) - BASES[:, None, None]
    places, advanced, below = np.split(found, [chunks, 2 * chunks], axis=-1)
    np.testing.assert_array_equal(np.sort(places.reshape(len(BASES), -1)), [16 * np.arange(rows * chunks)] * len(BASES))
    np.testing.assert_array_equal(advanced, places)
    np.testing.assert_array_equal(below[..., 0], places[..., 0])
    banks = places // 16 % 8
    by_rows = np.sort(banks.reshape(len(BASES), rows // 8, 8, chunks), axis=2)
    assert (by_rows == np.arange(8)[:, None]).all(), "eight rows of a chunk meet in a bank"
    by_chunks = np.sort(banks[..., : chunks // 8 * 8].reshape(len(BASES), rows, -1, 8))
    assert (by_chunks == np.arange(8)).all(), "eight chunks of a row meet in a bank"
    return places


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("element", "rows", "cols", "threads"), SHAPES)
def test_chunks_have_places_of_their_own(element, rows, cols, threads, target):
    hold_places(element, rows, cols, target)


def hold_shares(element, rows, cols, threads, target, sources=None):
    kernel = built(PROBE, expression("shares", element, rows, cols, threads), target, sources)
    lanes = 8 if cols % 64 == 0 else 4
    groups, at_once = cols // (8 * lanes), threads // lanes
    passes = -(-rows // at_once)
    found = run(kernel, [BASES], np.zeros((len(BASES) * threads, passes, groups), np.uint32))
    places = hold_places(element, rows, cols, target)
    found = found.reshape(len(BASES), threads, passes, groups)
    thread, which, group = np.ogrid[:threads, :passes, :groups]
    row, chunk = thread // lanes + which * at_once, thread % lanes + group * lanes
    exists = np.broadcast_to(row < rows, found.shape[1:])
    expected = np.where(exists, places[:, np.minimum(row, rows - 1), chunk] + BASES[:, None, None, None], 2**32 - 1)
    np.testing.assert_array_equal(found, expected)
    assert exists.sum() == rows * cols // 8


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("element", "rows", "cols", "threads"), SHAPES)
def test_threads_fill_every_chunk_once(element, rows, cols, threads, target):
    hold_shares(element, rows, cols, threads, target)


@pytest.mark.parametrize(
    ("hold", "old", "new"),
    [
        (hold_places, "((row ^ (slab & 1)) << 6)", "(row << 6)"),
        (hold_places, "((step & 2) << 5)", "((step & 2) << 4)"),
        (hold_places, "blocks * 16 * 64", "blocks * 16 * 32"),
        (hold_shares, "(group & 1) << 6", "(group & 1) << 5"),
        (hold_shares, "if constexpr (kRowsAtOnce % 8 != 0)", "if constexpr (false)"),
        (hold_shares, "pass * kRowsAtOnce >= Tile::kRows", "pass * kRowsAtOnce > Tile::kRows"),
    ],
    ids=["a bank for two", "steps", "rows down", "slabs of rows", "four rows at once", "nobody idle"],
)
def test_a_fault_in_places_is_found(hold, old, new):
    shapes = {
        "(group & 1) << 5": ("BFloat16", 64, 96, 128),
        "if constexpr (false)": ("Half", 16, 64, 32),
        "pass * kRowsAtOnce > Tile::kRows": ("BFloat16", 16, 256, 256),
    }
    shape = shapes.get(new, ("BFloat16", 64, 96))
    with pytest.raises(AssertionError):
        hold(*shape, "sm_80", planted("tiles/tile.cuh", old, new))
