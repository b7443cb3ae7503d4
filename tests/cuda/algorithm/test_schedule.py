"""Schedules and what thread blocks make of them, as compiled and under the emulator: what the planner's twin says, item
for item, for lengths of any numbers."""

import math
from types import SimpleNamespace

import emulator
import numpy as np
import ptx
import pytest
from ptx import ExecutorError
from ptx.alone import PARAMS, TARGETS, built, numbers, planted

from cupyattn.cuda.launching.params import OPEN
from cupyattn.plan import num_words
from cupyattn.plan.schedule import BY_SHARES, EVEN, cuts_of, places_of, schedule_of, shortest_share, splits_of
from cupyattn.problem import Mask, Span

pytestmark = pytest.mark.usefixtures("nvrtc")

KERNEL = "cupyattn::make_schedule<256>"
BLOCK_Q, BLOCK_K, FEWEST = 16, 64, 256
MOST = 4000
"""Items that a thread block may say it has."""
FIELDS = ("sequence", "tile", "group", "start", "stop", "is_whole", "splits", "place")
PROBE = f"""
#include "algorithm/traits.cuh"
#include "algorithm/walk.cuh"
namespace alone {{
using namespace cupyattn;
struct Traits {{
    static constexpr int kThreads = 32, kBlockQ = {BLOCK_Q}, kBlockK = {BLOCK_K}, kWalk = 0;
}};
struct Walked {{
    MergeParams params;
    int* counts;
    int* found;
}};
template <int>
__global__ void __launch_bounds__(32) items(const __grid_constant__ Walked given) {{
    SplitWalk<Traits> walk(given.params);
    walk.begin();
    SplitItem item;
    int count = 0;
    while (walk.next(item)) {{
        const int all[] = {{item.sequence.index, item.tile, item.group, item.part.start, item.part.stop, item.is_whole,
                            item.splits, static_cast<int>(item.place)}};
        if (ptx::thread() == 0 && count < {MOST})
            for (int field = 0; field < 8; ++field)
                ptx::store_global(given.found + (ptx::block_x() * {MOST} + count) * 8 + field, all[field]);
        ++count;
    }}
    if (ptx::thread() == 0) ptx::store_global(given.counts + ptx::block_x(), count);
}}
}}
"""
OF_MERGES = [("descales", "u8", 3), ("steps", "i4", 6)]
OF_MERGES += [(name, "i4") for name in ("block_q", "rows_per_piece", "heads_per_unit", "pieces_per_unit", "columns")]
OF_MERGES += [("mends", "i4"), ("of_columns", "f4"), ("block_k", "i4"), ("fewest_keys", "i4"), ("rest", "i4")]
MERGE_PARAMS = np.dtype([("params", PARAMS), *OF_MERGES])
KINDS = {"by shares": BY_SHARES, "even": EVEN, "of a size": 320}


def case_of(rng, kind, turn):
    """A record, the arrays it points to, and each sequence's (rows, keys); by turns of many sequences and few."""
    batch, blocks = (300, 1, 2, 7, 40)[turn % 5], int(rng.choice([1, 3, 16, 132]))
    long = kind == "by shares" and turn % 2 == 0
    lengths = (
        numbers(rng, batch).astype(np.int32) if long else rng.integers(0, rng.choice([700, 9000]), batch, np.int32)
    )
    rows = rng.choice([0, 1, 1, 9, 20], batch)
    starts = np.cumsum([0, *rows], dtype=np.int32)
    packed, group, units = bool(rng.random() < 0.5), int(rng.integers(1, 9)), int(rng.integers(1, 5))
    if turn == 0:  # as much work as may be
        packed, group, units = False, 8, 4
    record = np.zeros(1, MERGE_PARAMS)
    its = record["params"][0]
    its["batch"], its["num_heads"], its["queries_per_pair"] = batch, group * units, group
    its["seqlen_q"] = max(1, rows.max()) if packed else rng.choice([1, 1, 5, 30] if turn else [30])
    its["total_q"] = starts[-1] + int(rng.choice([0, 50]))
    its["seqlen_k"] = OPEN if long else 5000
    hides = (rng.random(2) < 0.4) & (turn % 4 > 0)
    its["left"], its["right"] = (int(rng.integers(0, 900)) if hidden else OPEN for hidden in hides)
    its["bottom_right"] = rng.integers(0, 2)
    its["num_places"], its["num_slots"], its["split_size"] = batch, blocks, KINDS[kind]
    its["num_splits"] = int(rng.integers(2, 9)) if kind == "even" else 5000 // 320 + 1
    schedule = np.full(num_words(batch + packed, blocks), 2**31 - 1, np.int32)
    its["at"]["cache_seqlens"], its["at"]["schedule"] = lengths.ctypes.data, schedule.ctypes.data
    if packed:
        its["at"]["cu_seqlens_q"] = starts.ctypes.data
    record["block_q"], record["heads_per_unit"], record["block_k"], record["fewest_keys"] = (
        BLOCK_Q,
        group,
        BLOCK_K,
        FEWEST,
    )
    its_rows = rows.tolist() if packed else [int(its["seqlen_q"])] * batch
    sequences = list(zip(its_rows, np.clip(lengths, 0, its["seqlen_k"]).tolist(), strict=True))
    if packed:
        sequences.append((int(its["total_q"]) - int(starts[-1]), 0))
    return SimpleNamespace(record=record, lengths=lengths, starts=starts, schedule=schedule, sequences=sequences)


def blocks_of(case, rows, keys, first, last):
    """The blocks of keys that rows from `first` to `last` see."""
    its = case.record["params"][0]
    sides = (None if its[side] == OPEN else int(its[side]) for side in ("left", "right"))
    mask = Mask(*sides, ("top-left", "bottom-right")[its["bottom_right"]])
    seen = mask.touched(Span(first, last + 1), rows, keys) if first <= last else ()
    return (seen.start // BLOCK_K, math.ceil(seen.stop / BLOCK_K)) if len(seen) else (0, 0)


def schedule_by_the_twin(case):
    """(schedule, pieces of each sequence)."""
    its = case.record["params"][0]
    group = int(its["queries_per_pair"])
    units = int(its["num_heads"]) // group
    pieces = [units * math.ceil(rows * group / BLOCK_Q) for rows, _ in case.sequences]
    spans = [blocks_of(case, rows, keys, 0, rows - 1) for rows, keys in case.sequences]
    lengths = [stop - start for start, stop in spans]
    return schedule_of(pieces, lengths, int(its["num_slots"]), shortest_share(FEWEST, BLOCK_K)), pieces, spans


def make(kernel, case):
    """The schedule that the kernel makes of a case."""
    buffers = [(case.lengths, False), (case.starts, False), (case.schedule, True)]
    kernel.launch(case.record.tobytes(), (1, 1, 1), 256, 64, buffers, 1, 3)
    sequences, blocks = len(case.sequences), int(case.record["params"][0]["num_slots"])
    wide = case.schedule[: 2 * (sequences + 2)].view(np.int64).tolist()
    return wide[0], tuple(wide[1:]), tuple(case.schedule[2 * (sequences + 2) :].tolist()), blocks


def hold_schedules(rng, kernel, count):
    for turn in range(count):
        case = case_of(rng, "by shares", turn)
        expected = schedule_by_the_twin(case)[0]
        assert make(kernel, case)[:3] == tuple(expected), case.sequences


@pytest.mark.parametrize("target", TARGETS)
def test_a_schedule_is_the_planners_for_lengths_of_any_numbers(rng, target):
    hold_schedules(rng, ptx.build("schedule.cu", KERNEL, target=target), 25)


def test_under_the_emulator_too(rng):
    emulator.require_compiler()
    hold_schedules(rng, emulator.build("schedule.cu", KERNEL), 25)


@pytest.mark.parametrize(
    ("source", "old", "new"),
    [
        ("schedule.cu", "if (ptx::lane() >= step) upto", "upto"),
        ("schedule.cu", "if (warp < ptx::warp()) before", "if (warp <= ptx::warp()) before"),
        ("schedule.cu", "        ptx::barrier();\n        before", "        before"),
        ("schedule.cu", "    ptx::barrier();  // starts are there\n", ""),
        ("schedule.cu", "        ptx::barrier();  // the memory is free for the next ones\n", ""),
        ("schedule.cu", "total + sums.before", "sums.before"),
        ("schedule.cu", "total + schedule.blocks - 1", "total"),
        ("schedule.cu", "index < params.batch ? blocks_of(band, params.block_k) : Span{0, 0}", "Span{0, 0}"),
        ("schedule.cu", "static_cast<uint64>(high) << 32 | low", "low"),
        ("algorithm/schedule.cuh", "ceil_div(touched.stop, block_k)", "touched.stop / block_k"),
    ],
    ids=[
        "lanes before the first",
        "a warp counted twice",
        "sums of warps not waited for",
        "starts not waited for",
        "memory of sums taken too early",
        "sequences of the first threads alone",
        "a share that is too short",
        "no keys",
        "sums that wrap",
        "no last block",
    ],
)
def test_a_fault_in_schedules_is_found(rng, source, old, new):
    kernel = ptx.build("schedule.cu", KERNEL, sources=planted(source, old, new), target="sm_80")
    with pytest.raises((AssertionError, ExecutorError)):
        hold_schedules(rng, kernel, 12)


# ---- What thread blocks make of it -----------------------------------------------------------------------------------


def items_by_the_twin(case, kind, block):
    """What a thread block has to do, as the probe says it."""
    schedule, pieces, spans = schedule_by_the_twin(case)
    its = case.record["params"][0]
    group, longest = int(its["queries_per_pair"]), int(its["seqlen_q"])
    units, most_tiles = int(its["num_heads"]) // group, max(1, math.ceil(longest * group / BLOCK_Q))
    tiles = [count // units for count in pieces]

    def tile_of(sequence, piece):
        rows, keys = case.sequences[sequence]
        tile = piece % tiles[sequence]
        last = min((tile + 1) * BLOCK_Q, rows * group) - 1
        return tile, piece // tiles[sequence], blocks_of(case, rows, keys, tile * BLOCK_Q // group, last // group)

    if kind == "by shares":
        for sequence, piece, start, stop, split, is_whole in cuts_of(schedule, pieces, block):
            tile, unit, (low, high) = tile_of(sequence, piece)
            first = spans[sequence][0]
            length = spans[sequence][1] - first
            begin = schedule.starts[sequence] + piece * (length + 1)
            place = places_of(schedule, begin, length)[split]
            part = max(low, first + start), high if stop is None else min(high, first + stop)
            yield sequence, tile, unit, *part, is_whole, 0, place
        return
    size, most = max(KINDS[kind], FEWEST) // BLOCK_K, int(its["num_splits"])
    cut = []
    for sequence, count in enumerate(pieces):
        cut.append([])
        for piece in range(count):
            low, high = tile_of(sequence, piece)[2]
            splits = min(most, max(1, math.ceil((high - low) / size)))
            each = size if kind == "of a size" and splits * size >= high - low else math.ceil((high - low) / splits)
            cut[-1].append((math.ceil((high - low) / each) if high > low else 1, each))
    for sequence, piece, split in splits_of(schedule, pieces, block, cut):
        tile, unit, (low, high) = tile_of(sequence, piece)
        splits, each = cut[sequence][piece]
        place = ((sequence * units + unit) * most_tiles + tile) * most + split
        yield sequence, tile, unit, low + split * each, min(high, low + (split + 1) * each), splits == 1, splits, place


def hold_items(rng, kind, maker, walker, count):
    for turn in range(count):
        case = case_of(rng, kind, 1 + turn % 4)
        blocks = make(maker, case)[3]
        counts, found = np.full(blocks, -1, np.int32), np.zeros((blocks, MOST, len(FIELDS)), np.int32)
        record = case.record.tobytes() + np.array([counts.ctypes.data, found.ctypes.data], "u8").tobytes()
        buffers = [(case.lengths, False), (case.starts, False), (case.schedule, False), (counts, True), (found, True)]
        walker.launch(record, (blocks, 1, 1), 32, 32, buffers, 1, 3)
        for block in range(blocks):
            expected = [list(map(int, item)) for item in items_by_the_twin(case, kind, block)]
            assert found[block, : counts[block]].tolist() == expected, (block, case.sequences)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", TARGETS)
def test_thread_blocks_have_the_planners_items(rng, kind, target):
    hold_items(
        rng,
        kind,
        ptx.build("schedule.cu", KERNEL, target=target),
        built(PROBE, "alone::items<0>", target),
        3 if kind == "of a size" else 8,
    )


@pytest.mark.parametrize(
    ("path", "old", "new", "kind"),
    [
        ("walk.cuh", "2 * ptx::block_x() + cut.is_first", "2 * ptx::block_x()", "by shares"),
        ("walk.cuh", "        ptx::barrier();  // everybody knows where it was\n", "", "even"),
        ("walk.cuh", "split = larger(split + 1, mine.start)", "split = split + 1", "of a size"),
        ("walk.cuh", "smaller(int64(tile.stop), first + cut.part.stop)", "int64(tile.stop)", "by shares"),
        ("schedule.cuh", "begins ? 0 :", "begins ? 1 :", "by shares"),
        ("schedule.cuh", "last < share.stop", "last <= share.stop", "by shares"),
        ("schedule.cuh", "return place > last ? count :", "return place > last ? count - 1 :", "of a size"),
    ],
)
def test_a_fault_in_items_is_found(rng, path, old, new, kind):
    walker = built(PROBE, "alone::items<0>", "sm_80", planted(f"algorithm/{path}", old, new))
    with pytest.raises((AssertionError, ExecutorError)):
        hold_items(rng, kind, ptx.build("schedule.cu", KERNEL, target="sm_80"), walker, 3 if kind == "of a size" else 8)
