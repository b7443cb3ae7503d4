"""How long splits are, as compiled, for as many blocks as there can be: what the planner says."""

import math

import numpy as np
import pytest
from ptx import ExecutorError
from ptx.alone import BEGIN, PARAMS, TARGETS, built, numbers, planted, rows_of, run

from cupyattn.cuda.launching.params import OPEN
from cupyattn.plan.splits import live_split_blocks
from cupyattn.problem import Mask, Span

pytestmark = pytest.mark.usefixtures("nvrtc")

LARGEST = 2**31 - 1
MOST = 2**30
"""As which more blocks are counted."""
SPLITS = "algorithm/splits.cuh"
WARPS, BLOCK_Q, BLOCK_K = 4, 16, 64
PROBE = f"""
#include "algorithm/splits.cuh"
namespace alone {{
using namespace cupyattn;
template <int kBlockK>
__global__ void blocks(int count, const int64* totals, const int* pieces, const int* slots, int* found) {{
    {BEGIN}
    found[i] = live_split_blocks(capped(totals[i]), pieces[i], slots[i], kBlockK);
}}
struct Traits {{
    static constexpr int kNumWarps = {WARPS}, kThreads = {32 * WARPS}, kBlockQ = {BLOCK_Q}, kBlockK = {BLOCK_K};
}};
template <int>
__global__ void size(int count, const Params* params, const int* groups, int* found) {{
    const int size = live_size<Traits>(params[ptx::block_x()], groups[ptx::block_x()]);
    if (ptx::thread() == 0) ptx::store_shared(ptx::shared_memory(), 0u);  // as the queries come there in a kernel
    found[ptx::block_x() * Traits::kThreads + ptx::thread()] = size;
}}
}}
"""
target = pytest.mark.parametrize("target", TARGETS)


def hold_blocks(rng, kernel, block_k, count=40_000):
    totals = numbers(rng, count, 0, 2**50)
    pieces, slots = numbers(rng, (2, count), 0, LARGEST).astype(np.int32)
    slots = np.minimum(slots, MOST)
    found = run(kernel, [totals, pieces, slots], np.zeros(count, np.int32)).tolist()
    cases = zip(totals.tolist(), pieces.tolist(), slots.tolist(), strict=True)
    assert found == [live_split_blocks(min(total, MOST), its, there, block_k) for total, its, there in cases]


@target
@pytest.mark.parametrize("block_k", [16, 64, 128])
def test_blocks_of_any_number_are_split_as_the_planner_does(rng, block_k, target):
    hold_blocks(rng, built(PROBE, f"alone::blocks<{block_k}>", target), block_k)


def test_a_difference_on_the_wrong_side_is_found(rng):
    sources = planted(SPLITS, "larger(larger(slots - pieces, slots / 2), 1)", "larger(slots - pieces, 1)")
    with pytest.raises(AssertionError):
        hold_blocks(rng, built(PROBE, "alone::blocks<64>", "sm_80", sources), 64, 1000)


# ---- By all threads of a block, from lengths on the device -----------------------------------------------------------

CALLS = 300
MOST_SEQUENCES = 300
"""More than there are threads."""


def hold_sizes(rng, kernel):
    """Sizes of splits of sequences whose lengths are a cache's, of any numbers."""
    made = np.zeros(CALLS, PARAMS)
    lengths = numbers(rng, (CALLS, MOST_SEQUENCES)).astype(np.int32)
    short, long = np.arange(CALLS) % 3 == 0, np.arange(CALLS) % 3 == 1
    lengths[short] = rng.integers(0, 9000, (short.sum(), MOST_SEQUENCES))
    lengths[long] = np.maximum(lengths[long], OPEN)  # so many blocks that they are not counted
    rows = rng.choice([0, 1, 1, 9, 40], (CALLS, MOST_SEQUENCES))
    starts = np.cumsum(np.pad(rows, ((0, 0), (1, 0))), axis=1, dtype=np.int32)
    packed = rng.random(CALLS) < 0.5
    made["at"]["cache_seqlens"], made["at"]["cu_seqlens_q"] = rows_of(lengths), np.where(packed, rows_of(starts), 0)
    made["total_q"] = starts[:, -1]
    made["batch"] = rng.integers(1, MOST_SEQUENCES + 1, CALLS)
    made["queries_per_pair"] = rng.integers(1, 9, CALLS)
    made["seqlen_q"] = np.where(packed, rows.max(axis=1), numbers(rng, CALLS, 1, 4000))
    made["seqlen_k"] = np.select([short, long], [8000, OPEN], numbers(rng, CALLS, 0, OPEN))
    hides = (rng.random((2, CALLS)) < 0.4) & ~long
    made["left"], made["right"] = np.where(hides, numbers(rng, (2, CALLS), 0, OPEN), OPEN)
    made["bottom_right"] = rng.integers(0, 2, CALLS)
    made["num_places"] = made["batch"]
    made["num_slots"] = numbers(rng, CALLS, 1, 4000)
    groups = rng.integers(1, 17, CALLS).astype(np.int32)
    found = np.zeros((CALLS, 32 * WARPS), np.int32)
    # A block for each call; races are looked for, since the threads meet in shared memory.
    run(
        kernel,
        [made, groups],
        found,
        [lengths, starts],
        32 * WARPS,
        CALLS,
        4 * WARPS,
        schedule=1,
        seed=3,
        check_races=True,
    )
    for case in range(CALLS):
        its = {
            name: made[name][case].item() for name in made.dtype.names if made.dtype[name].shape == () and name != "at"
        }
        its_rows = rows[case] if packed[case] else np.full(MOST_SEQUENCES, its["seqlen_q"])
        sequences = list(zip(its_rows.tolist(), lengths[case].tolist(), strict=True))[: its["batch"]]
        expected = expected_size(its, sequences, int(groups[case]))
        assert (found[case] == expected).all(), (its, expected, found[case])


def expected_size(params, sequences, groups):
    """The planner's, of what the bands of all (rows, keys) touch."""
    total = 0
    sides = (None if params[side] == OPEN else params[side] for side in ("left", "right"))
    mask = Mask(*sides, ("top-left", "bottom-right")[params["bottom_right"]])
    for rows, keys in sequences:
        touched = mask.touched(Span(0, rows), rows, max(0, min(keys, params["seqlen_k"]))) if rows else ()
        if len(touched):
            tiles = math.ceil(rows * params["queries_per_pair"] / BLOCK_Q)
            total += tiles * (math.ceil(touched.stop / BLOCK_K) - touched.start // BLOCK_K)
    tiles = math.ceil(params["seqlen_q"] * params["queries_per_pair"] / BLOCK_Q)
    pieces = params["batch"] * groups * tiles
    # Sums are capped on their way; however they are put together, what is capped once stays so.
    return live_split_blocks(min(min(total, MOST) * groups, MOST), pieces, params["num_slots"], BLOCK_K)


@target
def test_all_threads_find_the_planners_size(rng, target):
    hold_sizes(rng, built(PROBE, "alone::size<0>", target))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("total = capped(int64(total) + ptx::shuffle(", "total = (total + ptx::shuffle("),
        ("ptx::barrier();\n    total = 0;", "total = 0;"),
        ("    ptx::barrier();  // the memory is free for the queries", ""),
    ],
    ids=["a sum that wraps", "nobody waits", "nobody waits for the last one"],
)
def test_a_fault_in_sizes_is_found(rng, old, new):
    kernel = built(PROBE, "alone::size<0>", "sm_80", planted(SPLITS, old, new))
    with pytest.raises((AssertionError, ExecutorError)):
        hold_sizes(rng, kernel)
