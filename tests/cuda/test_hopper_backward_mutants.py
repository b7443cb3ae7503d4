"""Planted bugs in Hopper's gradients: each has to be noticed in the group named for it; see test_mutants.py.

Not noticed: a walk without tiles that leaves the tile before its first, whose barrier nobody waits for any more.
"""

from dataclasses import replace

import numpy as np
import pytest
from emulated import operands, options_of, ragged_operands, ragged_options
from emulated_backward import Call, hold, with_dout
from emulator import EmulatorError
from mutants import Mutant, assert_caught, misplaced

from cupyattn.cuda.launching import gradients
from cupyattn.plan import OF_KEYS, OF_QUERIES, OF_VALUES, BackwardTile
from cupyattn.problem import NAMED_DEVICES

H100 = replace(NAMED_DEVICES["H100"], num_units=1)  # full with one block
SEED = 7
CAUSAL = {"causal": True, "alignment": "bottom-right"}
TOGETHER = OF_KEYS | OF_VALUES
FETCH, COMPUTE, AGAIN, TILES = "gradients90.cuh", "hopper_backward.cu", "backward.cu", "gradients_tiling.cuh"

MUTANTS = [
    # ---- Rings
    Mutant("tiles are there without their facts", FETCH, "Traits::kTurned ? 2 : 1", "1", "keys"),
    Mutant("one warp of each warpgroup empties all", FETCH, "2 : 1, 4 * Traits::kConsumers);",
           "2 : 1, Traits::kConsumers);", "queries"),
    Mutant("one warpgroup has new staying tiles loaded", FETCH, "staying_ring().init(1, 4 * Traits::kConsumers)",
           "staying_ring().init(1, 1)", "keys"),
    Mutant("half of what stays is expected", FETCH, "Traits::kStayingBytes);\n            if",
           "Traits::kStayingBytes / 2);\n            if", "queries"),
    Mutant("half of what moves is expected", FETCH, "expect(barrier, Traits::kMovingBytes)",
           "expect(barrier, Traits::kMovingBytes / 2)", "queries"),
    Mutant("what stays is replaced before there is room", FETCH, "            staying.wait_empty(staying_use);\n", "",
           "keys"),
    Mutant("what moves is loaded before there is room", FETCH, "moving.wait_empty(use);\n            const uint32",
           "const uint32", "queries"),
    Mutant("facts are written before there is room", FETCH, "moving.wait_empty(use);\n#pragma", "\n#pragma", "keys"),
    Mutant("facts are told of by one lane for all", FETCH,
           "ptx::warp_barrier();\n            if (ptx::lane() == 0) ptx::mbarrier_arrive", "if (ptx::lane() == 0) "
           "ptx::mbarrier_arrive", "keys"),
    Mutant("one slot of facts", FETCH, "kFacts + Stages::slot(use) * Traits::kFactBytes", "kFacts", "keys"),
    Mutant("one slot of tiles", FETCH, "Stages::slot(use) * Traits::kMovingBytes", "0", "queries"),
    Mutant("a tile is not waited for", COMPUTE, "        memory.moving_ring().wait_full(use);\n", "", "queries"),
    Mutant("what stays is not waited for", COMPUTE, "memory.staying_ring().wait_full(staying_use);", ";", "queries"),
    Mutant("a tile is left while it is read", COMPUTE, "if (block > tile.blocks.start) leave(use - 1);", "leave(use);",
           "queries"),
    Mutant("no tile but the last is left", COMPUTE, "if (block > tile.blocks.start) leave(use - 1);", "", "queries"),
    Mutant("the last tile of a walk is not left", COMPUTE, "if (!tile.blocks.empty()) leave(use - 1);", "", "keys"),
    Mutant("left by one lane for all", COMPUTE, "ptx::warp_barrier();\n        memory.moving_ring()",
           "memory.moving_ring()", "keys"),
    Mutant("what stays is not left", COMPUTE, "memory.staying_ring().leave(staying_use++, ptx::lane());",
           "staying_use++;", "keys"),
    Mutant("what stays is left after each head", COMPUTE,
           "if (head + 1 < tile.heads.stop && has_new_keys(head + 1, params))", "if (head + 1 < tile.heads.stop)",
           "keys"),
    # ---- Products
    Mutant("sums under way when their tile is left", COMPUTE, "ptx::wgmma_wait<1>();  //", "//", "queries"),
    Mutant("scores read while they are summed", COMPUTE, "kNeedsChanges ? 1 : 0>()", "kNeedsChanges ? 2 : 0>()",
           "queries"),
    Mutant("values' scores read while they are summed", COMPUTE, "kNeedsChanges ? 1 : 0>()", "kNeedsChanges ? 1 : 1>()",
           "values"),
    Mutant("changes read while they are summed", COMPUTE, "ptx::wgmma_wait<0>();\n            ptx::hold(dscores",
           "ptx::hold(dscores", "queries"),
    Mutant("sums stored while they are summed", COMPUTE, "ptx::wgmma_wait<0>();\n        hold_sums();\n        if",
           "hold_sums();\n        if", "queries"),
    Mutant("no fence before scores", COMPUTE, "        ptx::wgmma_fence();\n#pragma", "#pragma", "queries"),
    Mutant("no fence before sums", COMPUTE, "        ptx::wgmma_fence();\n        if", "        if", "queries"),
    Mutant("both warpgroups have the first rows", COMPUTE, "left_tile.by_rows(64 * consumer)", "left_tile.by_rows(0)",
           "queries"),
    Mutant("half a step along", COMPUTE, "right + Right::along(step)", "right + Right::along(step / 2)", "queries"),
    Mutant("no step down", COMPUTE, "+ Tile::down(step)", "+ Tile::down(0)", "queries"),
    Mutant("scores go on with those before", COMPUTE, "right + Right::along(step), step)",
           "right + Right::along(step), true)", "queries"),
    Mutant("dout is q", COMPUTE, "multiply(dscores, memory.stays_b()", "multiply(dscores, memory.stays_a()", "queries"),
    Mutant("dv of q", COMPUTE, "add_products(sums_b, weights, memory.moves_b(use))",
           "add_products(sums_b, weights, memory.moves_a(use))", "keys"),
    Mutant("dk of weights", COMPUTE, "add_products(sums_a, dweights,", "add_products(sums_a, weights,", "keys"),
    # ---- Which heads, rows and keys
    Mutant("keys of a new head are not loaded", FETCH, "head == tile.heads.start || has_new_keys(head, params)",
           "head == tile.heads.start", "keys"),
    Mutant("only values are new", FETCH, "return head % params.queries_per_k == 0 || head", "return head", "keys"),
    Mutant("values of the keys' head", FETCH, "first_key + row, head / params.queries_per_v",
           "first_key + row, head / params.queries_per_k", "queries"),
    Mutant("q in dout's place", FETCH, "load_tile<1>(b, given.dout,", "load_tile<1>(b, given.q,", "queries"),
    Mutant("rows of the first sequence", FETCH, "first_row = static_cast<int>(sequence.first_row)", "first_row = 0",
           "ragged"),
    Mutant("keys of the first sequence", FETCH, "first_key = static_cast<int>(sequence.first_key)", "first_key = 0",
           "ragged"),
    Mutant("facts of the first sequence", FETCH, "head * params.lse_head + tile.sequence.first_row;",
           "head * params.lse_head;", "ragged"),
    Mutant("facts behind the last query", FETCH, "if (token >= tile.sequence.band.seqlen_q) continue;", "", "keys"),
    Mutant("an edge taken for whole", FETCH, "whole.stop / kMoves}", "ceil_div(whole.stop, kMoves)}", "queries"),
    Mutant("a left edge taken for whole", FETCH, "{ceil_div(whole.start, kMoves),", "{whole.start / kMoves,", "keys"),
    Mutant("the last tile left out", FETCH, "ceil_div(touched.stop, kMoves)};", "touched.stop / kMoves};", "queries"),
    Mutant("the first tile left out", FETCH, "{touched.start / kMoves,", "{ceil_div(touched.start, kMoves),", "keys"),
    Mutant("facts of the first head", COMPUTE, "params.lse_batch + head * params.lse_head +", "params.lse_batch +",
           "queries"),
    # ---- Numbers
    Mutant("the neighbour's lse", COMPUTE, "ptx::from_bits(facts[i % 2])", "ptx::from_bits(facts[0])", "keys"),
    Mutant("the neighbour's delta", COMPUTE, "ptx::from_bits(facts[2 + i % 2])", "ptx::from_bits(facts[2])", "keys"),
    Mutant("hidden pairs have weights", COMPUTE, "if (hidden) x = 0.f;", "", "queries"),
    Mutant("a pair one early is seen", COMPUTE, "column - start[half]) >= count", "column - start[half] + 1) >= count",
           "queries"),
    Mutant("dq without the scale", COMPUTE, "head, params.head_dim,\n                  params.softmax_scale);",
           "head, params.head_dim, 1.f);", "queries"),
    Mutant("dk of the heads' number", COMPUTE, "head = tile.heads.start;  // all", "// all", "keys"),
    Mutant("dk of one query head", COMPUTE, "            walk();\n", "            sums_a.clear(), walk();\n", "keys"),
    Mutant("rows that are none are stored", COMPUTE, "if (!exists(half)) continue;", "", "queries"),
    # ---- Edits
    Mutant("a softcap without a slope", COMPUTE, "*= through[i];", "*= 1.f;", "capped"),
    Mutant("a softcap's slope in the weights, too", COMPUTE, "kCapped && Traits::kSumsB) weights.round_eight("
           "scores.value[eight], eight);", "false) {}", "capped"),
    Mutant("softcap's weights before the softcap", COMPUTE, "Traits::kSumsB && !kCapped)", "Traits::kSumsB)", "capped"),
    Mutant("the scale twice", COMPUTE, "scale_log2_of_edited<kEdits>(params)", "params.softmax_scale * kLog2e",
           "sloped"),
    Mutant("queries and keys of slopes swapped", COMPUTE, "params).turned();", "params);", "sloped"),
    Mutant("slopes of the row eight before", COMPUTE, "alibi_slope, apart.at(column - 8 * half)",
           "alibi_slope, apart.at(column)", "sloped"),
    Mutant("slopes of another head", COMPUTE, "alibi_slope_of<kEdits>(head,", "alibi_slope_of<kEdits>(0,", "sloped"),
    Mutant("a slope's change the other way", COMPUTE, "slope_part -= x", "slope_part += x", "sloped"),
    Mutant("a slope's change of the first row", COMPUTE, "x * apart.at(column - 8 * (i / 2))",
           "x * apart.at(column)", "sloped"),
    Mutant("a slope's change of the first keys", COMPUTE, "apart_of(block * kMoves + ", "apart_of(", "sloped"),
    Mutant("parts of slopes of one warp", COMPUTE, "row(0) - ptx::lane() / 4, tile", "tile.first, tile", "sloped"),
    # ---- Tiles that are not finite
    Mutant("nobody raises a flag", COMPUTE, "if (ptx::any(suspicious) && ptx::lane() == 0)", "if (false)", "strays"),
    Mutant("one lane raises the flag", COMPUTE, "if (ptx::any(suspicious) && ptx::lane() == 0)",
           "if (suspicious && ptx::lane() == 0)", "strays"),
    Mutant("the first block's flag", COMPUTE, "params.grad.flags + ptx::block_x()", "params.grad.flags", "strays"),
    Mutant("flags as the longest has tiles", AGAIN, "staying_place<kTurned, kPacked>(flagged", "staying_place<kTurned, "
           "false>(flagged", "skewed_strays"),
    Mutant("fewer blocks than there are", AGAIN, "staying_blocks<kTurned, kPacked>(params, owners, kFlaggedRows)",
           "staying_blocks<kTurned, kPacked>(params, 1, kFlaggedRows)", "strays"),
    Mutant("a lane looks at one flag with all", AGAIN, "ptx::block_x() + ptx::lane() * ptx::grid_x();",
           "ptx::block_x();", "few_look"),
    Mutant("one tile of those a block finds", AGAIN, "++lane, done = 0;", "lane = 32;", "few_look"),
    Mutant("the flag of another block", AGAIN, "ptx::block_x() + lane * ptx::grid_x();", "ptx::block_x() + lane;",
           "few_look"),
    Mutant("the first rows of a tile that is flagged", AGAIN, "done += Traits::kStays;", "done = kFlaggedRows;",
           "halves"),
    Mutant("the tile before is made again", AGAIN, "place.owner * shared, row);",
           "place.owner * shared, row < kFlaggedRows ? row : row - kFlaggedRows);", "strays"),
    # ---- Tiles of sequences end to end
    Mutant("the last tile is lost", TILES, "total / size + params.batch, 0, size}",
           "total / size + params.batch - 1, 0, size}", "skewed"),
    Mutant("the neighbour's sequence at a border", "tiling.cuh", "start_of(sequence) < static",
           "start_of(sequence) <= static", "skewed"),
    Mutant("an empty sequence takes its neighbour's tile", "tiling.cuh", "(tile - sequence + 1) * size;",
           "(tile - sequence + 2) * size;", "skewed"),
    Mutant("the last sequence is nobody's", TILES, "total, params.batch, total", "total, params.batch - 1, total",
           "skewed"),
    Mutant("a tile counted twice", "tiling.cuh", "first_of(sequence + 1) - first}",
           "first_of(sequence + 1) - first + 1}", "skewed"),
    Mutant("keys cut by where queries begin", TILES, "kTurned ? params.at.cu_seqlens_k : params.at.cu_seqlens_q",
           "params.at.cu_seqlens_q", "skewed"),
    Mutant("all of the longest's tiles", TILES, "if constexpr (kPacked) return place_of", "if (false) return place_of",
           "skewed"),
    Mutant("dq may be anything", COMPUTE, "kSumsA) suspicious |= store_a();", "kSumsA) store_a();", "strays"),
]  # fmt: skip
BEFORE_A_COMMIT = (
    "tiles are there without their facts",
    "half of what moves is expected",
    "facts are written before there is room",
    "left by one lane for all",
    "what stays is not left",
    "sums under way when their tile is left",
    "changes read while they are summed",
    "keys of the first sequence",
    "the first block's flag",
    "one tile of those a block finds",
)
"""Those of `make test`; `make proof` has all."""


# ---------------------------------------------------------------------------------------------------
# Groups
# ---------------------------------------------------------------------------------------------------


def held(sources, wanted, arrays, options, schedules, mended=False, moves=32):
    """A pass by tiles of 32 and two stages, held to the definition; `mended`: the other kernel comes behind it."""
    arrays = with_dout(np.random.default_rng(SEED + 1), arrays, options, dlse=True)
    for schedule in schedules:
        passes = ((wanted, BackwardTile(128, moves, 12, 2)),)
        call = Call(arrays, options, device=H100, sources=sources, passes=passes)
        kernels = [step.specialisation.source for _, _, step in call.launches]
        assert kernels == ["backward_rows.cu", "hopper_backward.cu", "backward.cu"]
        if not mended:
            del call.launches[2]
        hold(call.arrays, call.run(schedule, SEED))


def dense(heads, seqlens, dims=(64, 64)):
    return operands(np.random.default_rng(SEED), "bfloat16", "bshd", 1, heads, seqlens, dims)


def queries(sources):
    held(sources, OF_QUERIES, dense((2, 2, 1), (150, 170)), options_of(**CAUSAL), (1, 2))


def keys(sources):
    held(sources, TOGETHER, dense((4, 2, 2), (100, 150)), options_of(**CAUSAL), (1, 2))
    held(sources, OF_KEYS, dense((4, 1, 2), (100, 150)), options_of(**CAUSAL), (1,))
    held(sources, OF_VALUES, dense((4, 2, 1), (100, 150)), options_of(**CAUSAL), (1,))


def values(sources):
    held(sources, OF_VALUES, dense((1, 1, 1), (70, 90), (136, 136)), options_of(**CAUSAL), (1,))


def unseen(sources):
    """Keys that no query sees."""
    options = options_of(causal=True, alignment="top-left")
    held(sources, TOGETHER, dense((2, 1, 1), (20, 150)), options, (1,))


def ragged(sources):
    arrays = ragged_operands(
        np.random.default_rng(SEED), "bfloat16", (17, 0, 33), (40, 5, 70), (2, 1, 1), behind=(3, 7)
    )
    held(sources, TOGETHER, arrays, ragged_options(arrays, **CAUSAL), (1,))


SKEWED = (5, 0, 251, 17, 0, 120), (40, 9, 3, 260, 5, 30)
"""Of queries and keys: not all take the tiles of the longest, and one begins with a tile."""


def of_skewed(options):
    arrays = ragged_operands(np.random.default_rng(SEED), "bfloat16", *SKEWED, (2, 2, 2))
    return arrays, ragged_options(arrays, **options)


def skewed(sources):
    for wanted in (OF_QUERIES, TOGETHER):
        held(sources, wanted, *of_skewed(CAUSAL), (1,))


def skewed_strays(sources):
    """Of one head and one sequence a tile, not the first, has a nan that none of its rows sees."""
    arrays, options = of_skewed({})
    arrays["k"][40 + 9 + 3 + 260 + 2, 1, 2] = np.nan  # of the empty sequence, in the boxes of the one before it
    held(sources, OF_QUERIES, arrays, options, (1,), mended=True)


def strays(sources):
    """Of two heads and two tiles the last meets a nan that none of its rows sees: 0 * nan, in one column of dq."""
    arrays = dense((2, 2, 2), (170, 190))
    arrays["k"][0, 185, 1, 2] = np.nan
    held(sources, OF_QUERIES, arrays, options_of(causal=True, alignment="top-left"), (1,), mended=True)


def few_look(sources):
    """Two blocks look at eight flags, of which each finds some."""
    arrays = dense((4, 4, 4), (230, 250))
    arrays["k"][0, 245, 1:, 2] = np.nan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradients, "LOOKING", 2)
        gradients._recipe.cache_clear()
        held(sources, OF_QUERIES, arrays, options_of(causal=True, alignment="top-left"), (1,), mended=True)
    gradients._recipe.cache_clear()


def halves(sources):
    """The other kernel's tiles are half as high."""
    arrays = dense((1, 1, 1), (120, 130), (136, 136))
    arrays["k"][0, 125, 0, 2] = np.nan
    held(sources, OF_QUERIES, arrays, options_of(causal=True, alignment="top-left"), (1,), mended=True)


def capped(sources):
    arrays, options = dense((2, 1, 1), (150, 100)), options_of(softcap=0.7, **CAUSAL)
    for wanted in (OF_QUERIES, TOGETHER):
        held(sources, wanted, arrays, options, (1,))


def sloped(sources):
    arrays = dense((2, 1, 1), (150, 100)) | {"alibi_slopes": np.array([0.25, -0.0625], np.float32)}
    for wanted in (OF_QUERIES, TOGETHER):
        held(sources, wanted, arrays, options_of(**CAUSAL), (1,))


OF_SEQUENCES = (ragged, skewed, skewed_strays)
GROUPS = {
    group.__name__: group
    for group in (queries, keys, values, unseen, *OF_SEQUENCES, strays, few_look, halves, capped, sloped)
}


def test_every_bug_has_its_place():
    assert misplaced(MUTANTS) == []


@pytest.mark.parametrize("group", GROUPS)
def test_the_sources_as_they_are_pass(group):
    GROUPS[group](None)


@pytest.mark.parametrize(
    "mutant",
    [pytest.param(x, id=x.name, marks=() if x.name in BEFORE_A_COMMIT else pytest.mark.covered) for x in MUTANTS],
)
def test_a_planted_bug_is_caught(mutant):
    assert_caught(mutant, GROUPS)


@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
def test_a_map_of_another_tile_is_caught(name, monkeypatch):
    """Boxes of as many rows as the other side's tile has: of each operand in turn."""
    made, place = gradients._maps, ("q", "k", "v", "dout").index(name)

    def swapped(problem, arrays, tile, wanted):
        maps = list(made(problem, arrays, tile, wanted))
        other = made(problem, arrays, tile._replace(stays=tile.moves, moves=tile.stays), wanted)
        maps[place] = other[place]
        return tuple(maps)

    monkeypatch.setattr(gradients, "_maps", swapped)
    gradients._recipe.cache_clear()
    try:
        with pytest.raises((AssertionError, EmulatorError)):
            queries(None)
    finally:
        gradients._recipe.cache_clear()
