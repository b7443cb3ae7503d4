"""Which sequence has which tile, as compiled: for index arrays that say anything, and for those that are right."""

import numpy as np
import pytest
from ptx import ExecutorError
from ptx.alone import BEGIN, TARGETS, built, numbers, planted, rows_of, run

from cupyattn.cuda.launching.params import OPEN
from cupyattn.plan import num_tiles, tile_of_round

pytestmark = pytest.mark.usefixtures("nvrtc")

TILING = "algorithm/tiling.cuh"
PROBE = f"""
#include "algorithm/tiling.cuh"
namespace alone {{
using namespace cupyattn;
struct Asked {{
    const int* starts;
    int sequences, total, longest, size;
}};
template <int>
__global__ void place(int count, const Asked* asked, const int2* blocks, int* found) {{
    {BEGIN}
    const Asked& its = asked[i / 32];
    const Tiling tiling = tiling_of(its.starts, its.total, its.sequences, its.longest, its.size);
    const Place at = place_of(blocks[i / 32].x, blocks[i / 32].y, tiling);
    const int all[] = {{at.sequence, at.owner, at.tile, at.tiles}};
    for (int field = 0; field < 4; ++field) found[4 * i + field] = all[field];
}}
template <int>
__global__ void search(int count, const Asked* asked, const int* tiles, int* found) {{
    {BEGIN}
    const Asked& its = asked[i / 32];
    const Tiling tiling = tiling_of(its.starts, its.total, its.sequences, its.longest, its.size);
    found[i] = tiling.sequence_with(tiles[i / 32]);
}}
template <bool kForthAndBack>
__global__ void rounds(int count, const uint32* asked, uint32* found) {{
    {BEGIN}
    found[i] = tile_of_round<kForthAndBack>(asked[3 * i], asked[3 * i + 1], asked[3 * i + 2]);
}}
}}
"""
FIELDS = ("sequences", "total", "longest", "size")
ASKED = np.dtype([("starts", "u8"), *((name, "i4") for name in FIELDS)])
LARGEST = 2**31 - 1
BLOCKS, MOST = 4_000, 70
target = pytest.mark.parametrize("target", TARGETS)


def tilings(rng):
    """(what is asked, starts): of sequences end to end, and alike; starts rise in the first half, later they lie."""
    made = np.zeros(BLOCKS, ASKED)
    made["sequences"] = rng.integers(1, MOST + 1, BLOCKS)
    made["size"] = rng.choice([1, 7, 16, 42, 64, 128, 192], BLOCKS)
    made["total"] = np.minimum(numbers(rng, BLOCKS, 0, LARGEST), np.where(made["size"] < 16, OPEN, LARGEST))
    whole, as_many = made["sequences"] * made["size"], rng.random(BLOCKS) < 0.1  # tiles of both kinds
    made["total"] -= np.where(as_many, made["total"] % whole, 0)
    as_the_longest = made["size"] * (made["total"] // whole + 1)
    made["longest"] = np.where(as_many & (as_the_longest <= OPEN), as_the_longest, numbers(rng, BLOCKS, 0, OPEN))
    starts = numbers(rng, (BLOCKS, MOST)).astype(np.int32)
    half = BLOCKS // 2
    within = rng.random((half, MOST)) ** rng.choice([0.1, 1.0, 9.0], (half, 1))
    starts[:half] = np.sort(within, axis=1) * made["total"][:half, None]
    near = rng.random(half) < 0.3  # lengths that differ by one, and none at all
    steps = made["size"][:half, None] * rng.integers(0, 3, (half, MOST)) + rng.integers(-1, 2, (half, MOST))
    starts[:half][near] = np.minimum(np.cumsum(np.maximum(steps, 0), axis=1), made["total"][:half, None])[near]
    made["starts"] = np.where(rng.random(BLOCKS) < 0.9, rows_of(starts), 0)
    return made, starts


def first_tiles(asked, starts):
    """Where each sequence's tiles begin, and where they end, by numbers that never wrap."""
    sequences, total, longest, size = (int(asked[name]) for name in FIELDS)
    each = max(1, -(-longest // size))
    if not asked["starts"] or sequences * each <= total // size + sequences:
        return [each * sequence for sequence in range(sequences + 1)]
    inside = [min(max(int(start), 0), total) for start in starts[:sequences]]
    return [0, *(start // size + at for at, start in enumerate(inside) if at), total // size + sequences]


def places_by_warps(kernel, made, blocks, starts):
    """(sequence, owner, tile, tiles) of each case, in which all lanes of its warp agree."""
    found = run(kernel, [made, blocks], np.zeros((32 * len(made), 4), np.int32), [starts]).reshape(-1, 32, 4)
    assert (found == found[:, :1]).all()
    return found[:, 0]


def hold_places(rng, kernel):
    made, starts = tilings(rng)
    owners = rng.choice([1, 2, 7, 32], BLOCKS)
    firsts = [first_tiles(*each) for each in zip(made, starts, strict=True)]
    last = np.minimum(np.array([x[-1] for x in firsts]) * owners, LARGEST) - 1
    blocks = np.where(rng.random(BLOCKS) < 0.2, last, (last * rng.random(BLOCKS)).astype(np.int64))
    given = np.ascontiguousarray(np.stack([blocks, owners], axis=1), np.int32)
    found = places_by_warps(kernel, made, given, starts).tolist()
    for case, (its, (block, heads)) in enumerate(zip(firsts, given.tolist(), strict=True)):
        sequence, owner, tile, tiles = found[case]
        assert 0 <= sequence < len(its) - 1, (its, block, heads)
        assert 0 <= owner < heads, (its, block, heads)
        assert 0 <= tile < tiles, (its, block, heads)
        assert its[sequence] <= block // heads < its[sequence + 1] == its[sequence] + tiles, (its, block, heads)
        assert owner * tiles + tile == block - its[sequence] * heads, (its, block, heads)


@target
def test_every_block_has_a_tile_of_a_sequence_whatever_the_starts_are(rng, target):
    hold_places(rng, built(PROBE, "alone::place<0>", target))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("static_cast<int64>(tile - sequence + 1) * size;", "(tile - sequence + 1) * size;"),
        ("smaller(larger(ptx::load_global(starts + sequence), 0), total)", "ptx::load_global(starts + sequence)"),
        ("sequence == 0 ? 0 : start_of", "start_of"),
        ("return start_of(sequence) <", "return start_of(sequence) <="),
        ("* each <= by_starts", "* each < by_starts"),
        ("static_cast<int64>(sequences) * each", "sequences * each"),
        ("int low = 0, high = sequences;", "int low = 0, high = sequences - 1;"),
        ("rest / its.count, rest % its.count", "rest % owners, rest / owners"),
    ],
    ids=[
        "a product that wraps",
        "starts that lie",
        "tiles in front of the first sequence",
        "a sequence that begins with the next tile",
        "as many, and not even",
        "a sum of tiles that wraps",
        "no last sequence",
        "owners fastest",
    ],
)
def test_a_fault_in_places_is_found(rng, old, new):
    with pytest.raises((AssertionError, ExecutorError)):
        hold_places(rng, built(PROBE, "alone::place<0>", "sm_80", planted(TILING, old, new)))


def hold_searches(rng, kernel, made, starts):
    """A warp for each case, all of whose lanes find the same sequence: one whose tiles have that one among them."""
    firsts = [first_tiles(*each) for each in zip(made, starts, strict=True)]
    last = np.minimum([x[-1] for x in firsts], LARGEST) - 1
    tiles = np.where(rng.random(len(made)) < 0.1, last, (last * rng.random(len(made)))).astype(np.int32)
    found = run(kernel, [made, tiles], np.zeros((32 * len(made)), np.int32), [starts]).reshape(-1, 32)
    for its, tile, lanes in zip(firsts, tiles.tolist(), found.tolist(), strict=True):
        sequence = lanes[0]
        assert lanes == 32 * [sequence]
        assert 0 <= sequence < len(its) - 1, (its, tile)
        assert its[sequence] <= tile < its[sequence + 1], (its, tile)


def many_sequences(rng, cases=400, most=2600):
    """As `tilings`, of so many that a warp needs three rounds; lengths are right, and mostly short."""
    made = np.zeros(cases, ASKED)
    made["sequences"] = rng.choice([1, 2, 33, 34, 35, 256, 1089, 1090, most], cases)
    made["size"] = rng.choice([42, 64, 128], cases)
    lengths = rng.integers(0, 90, (cases, most)) * (rng.random((cases, most)) < 0.7)
    starts = np.pad(np.cumsum(lengths, axis=1), ((0, 0), (1, 0))).astype(np.int32)
    made["total"] = starts[np.arange(cases), made["sequences"]]
    made["longest"], made["starts"] = 4000, rows_of(starts)
    return made, starts


@target
@pytest.mark.parametrize("cases", [tilings, many_sequences])
def test_a_warp_finds_whose_a_tile_is_whatever_the_starts_are(rng, cases, target):
    made, starts = cases(rng)
    hold_searches(rng, built(PROBE, "alone::search<0>", target), made[:4000], starts[:4000])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("low + (ptx::lane() + 1) * step", "low + ptx::lane() * step"),
        ("low + (before + 1) * step, high)", "low + before * step, high)"),
        ("low += before * step;", "low += (before + 1) * step;"),
        ("place >= high || ", ""),
    ],
    ids=["the first place", "an end too low", "a beginning too high", "places behind all"],
)
def test_a_fault_in_searches_is_found(rng, old, new):
    kernel = built(PROBE, "alone::search<0>", "sm_90a", planted(TILING, old, new))
    for cases in (many_sequences, tilings):
        made, starts = cases(rng)
        try:
            hold_searches(rng, kernel, made[:3000], starts[:3000])
        except (AssertionError, ExecutorError):
            return
    pytest.fail("not found")


@target
def test_every_tile_of_a_sequence_has_one_block(rng, target):
    """For starts that are right: lengths of nothing, of one and about whole tiles, and rows behind."""
    kernel = built(PROBE, "alone::place<0>", target)
    for case in range(60):
        size, owners, sequences = (int(rng.choice(x)) for x in ((16, 42, 64), (1, 3), (1, 2, 5, 33)))
        lengths = size * rng.integers(0, 4, sequences) + rng.integers(-1, 2, sequences)
        lengths = np.maximum(lengths, 0) * (rng.random(sequences) < 0.8)
        starts = np.cumsum([0, *lengths], dtype=np.int32)
        total, longest = int(starts[-1]) + int(rng.integers(0, 2 * size)) * (case % 2), int(lengths.max())
        count = num_tiles(sequences, longest, size, total) * owners
        made = np.zeros(count, ASKED)
        made[:] = (starts.ctypes.data, sequences, total, longest, size)
        blocks = np.stack([np.arange(count), np.full(count, owners)], axis=1).astype(np.int32)
        found = places_by_warps(kernel, made, blocks, starts)
        places = [tuple(row) for row in found[:, :3].tolist()]
        assert len(set(places)) == count
        needed = {
            (sequence, owner, tile)
            for sequence, length in enumerate(lengths.tolist())
            for owner in range(owners)
            for tile in range(-(-length // size))
        }
        assert needed <= set(places), (lengths, size, owners)


def hold_rounds(rng, forth_and_back, target, sources=None):
    kernel = built(PROBE, f"alone::rounds<{str(forth_and_back).lower()}>", target, sources)
    blocks = rng.choice([1, 2, 66, 132, 1000, LARGEST // 3], BLOCKS)
    block = np.where(rng.random(BLOCKS) < 0.3, blocks - 1, (blocks * rng.random(BLOCKS)).astype(np.int64))
    rounds = rng.integers(0, LARGEST // blocks, endpoint=True)
    found = run(kernel, [np.stack([rounds, block, blocks], axis=1).astype(np.uint32)], np.zeros(BLOCKS, np.uint32))
    cases = zip(rounds.tolist(), block.tolist(), blocks.tolist(), strict=True)
    assert found.tolist() == [tile_of_round(*case, forth_and_back) for case in cases]


@target
@pytest.mark.parametrize("forth_and_back", [False, True])
def test_what_a_block_takes_in_a_round_is_what_python_says(rng, forth_and_back, target):
    hold_rounds(rng, forth_and_back, target)


def test_a_fault_in_rounds_is_found(rng):
    fault = planted(TILING, "blocks - 1 - block : block", "blocks - block : block")
    with pytest.raises(AssertionError):
        hold_rounds(rng, True, "sm_90a", fault)
