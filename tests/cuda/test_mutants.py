"""Planted bugs: each has to be noticed, as wrong numbers or by the emulator, in the group of calls named for it.

A mutant is one piece of text in one source, which has to be there exactly once, and what takes its place. A group is a
few calls of one specialisation under schedules of their own; the sources as they are have to pass every group.
"""

import numpy as np
import pytest
from cases import DISTANCES, EDITS, HIDDEN, LAYOUTS, STRAYS, VISIBLE, call
from emulated import (
    Call,
    assert_close_lse,
    check,
    definition,
    operands,
    options_of,
    paged,
    ragged_operands,
    ragged_options,
)
from mutants import Mutant, assert_caught, groups_of, misplaced, some_of_them

from cupyattn.plan import Tile

SEED = 7


MUTANTS = [
    # ---- Tiles in shared memory
    Mutant("swizzle by other rows", "tile.cuh", "(row >> 1)", "(row >> 2)", "flash"),
    Mutant("swizzle lost from step to step", "tile.cuh", "(step & 1) << 5", "(step & 1) << 4", "flash"),
    Mutant("slab parity lost from step to step", "tile.cuh", " ^ ((step & 2) << 5)", "", "flash"),
    Mutant("slab parity lost in addresses", "tile.cuh", "(row ^ (slab & 1))", "row", "flash"),
    Mutant("slab parity lost in copies", "tile.cuh", "(there ^ (group & 1) << 6)", "there", "flash, 96"),
    Mutant("fragments half as far down", "tile.cuh", "blocks * 16 * 64", "blocks * 8 * 64", "flash"),
    Mutant("left operand's halves swapped", "fragments.cuh", "first_row + ptx::lane() % 16, ptx::lane() / 16",
           "first_row + ptx::lane() / 2, ptx::lane() % 2", "flash"),
    Mutant("right operand's halves swapped", "fragments.cuh",
           "ptx::lane() % 8 + ptx::lane() / 16 * 8, ptx::lane() / 8 % 2",
           "ptx::lane() % 16, ptx::lane() / 16", "flash"),
    Mutant("weights in another order", "fragments.cuh", "round_eight(from.value[block], block)",
           "round_eight(from.value[block], block ^ 1)", "flash"),
    Mutant("one row too many is loaded", "tile.cuh", "Its::kRowsAtOnce < num_rows}", "Its::kRowsAtOnce <= num_rows}",
           "flash"),
    Mutant("eight columns too many are loaded", "tile.cuh", "column < num_cols ?", "column <= num_cols ?", "flash"),
    Mutant("a word's numbers in another order", "tile.cuh", "32 / kPerWord * (i % kPerWord)",
           "32 / kPerWord * (kPerWord - 1 - i % kPerWord)", "flash, odd"),
    Mutant("what waited is stored as it came", "tile.cuh",
           "if constexpr (kAtOnce > 1) parts[place - first].split_planes();", "", "flash, float32"),
    Mutant("what waited is stored twice", "tile.cuh", "parts[place - first].store(", "parts[0].store(",
           "flash, float32"),
    Mutant("a later row for the first", "tile.cuh", "if (group == 0) row = row_of(pass);",
           "if (pass == 0) row = row_of(pass);", "flash"),
    # ---- Planes of float32
    Mutant("low plane empty", "numbers.cuh", "ptx::bits(rest - middle) & 0xffff0000u", "0u", "flash, float32"),
    Mutant("a product of planes left out", "fragments.cuh", "plane + right_plane < Planes<Element>::kCount",
           "plane + right_plane < (Planes<Element>::kCount + 1) / 2", "flash, float32"),
    Mutant("a low plane left out", "fragments.cuh", "if (plane + right_plane < Planes<Element>::kCount)",
           "if (plane + right_plane < Planes<Element>::kCount && plane < 2)", "split, float32"),
    Mutant("planes of another tile", "fragments.cuh", "Tile::advance(left, step) + plane * Tile::kPlane",
           "Tile::advance(left, step)", "flash, float32"),
    # ---- Values that are not finite
    Mutant("nobody looks for nan", "flash.cu", "ptx::barrier_any(probe != 0.f)", "ptx::barrier_any(false)", "flash"),
    Mutant("hidden strays are counted", "dropout.cuh", "score = score == -ptx::infinity() ? 0.f :", "score =", "flash"),
    Mutant("strays stay among the values", "strays.cuh", "if (stray) pair &=", "if (false) pair &=", "flash"),
    Mutant("strays are forgotten", "strays.cuh", "if (bits & 1u) sums.value", "if (false) sums.value", "flash"),
    Mutant("strays of the last block alone", "strays.cuh", "word[i / 16] |= bits", "word[i / 16] = bits", "flash"),
    Mutant("inf and -inf are inf", "strays.cuh", "(count >> 7 ? 2u : 0u)", "0u", "flash"),
    Mutant("nan is inf", "strays.cuh", "!stray ? 0.f : nan ? kCodes[2]", "!stray ? 0.f : nan ? kCodes[0]", "flash"),
    Mutant("strays counted over all blocks", "flash.cu", "sequence.index, params);\n                out[m].clear();",
           "sequence.index, params);", "flash"),
    Mutant("strays taken while others multiply", "flash.cu", "ptx::barrier();\n        }\n        multiply_values",
           "}\n        multiply_values", "flash"),
    Mutant("a walk before the last one ends", "flash.cu", "ptx::barrier();  // everybody is done with the walk before",
           "", "flash, two stages"),
    Mutant("strays stay among what is in registers", "splitkv.cu",
           "if constexpr (kCare) take_strays", "if constexpr (false) take_strays", "split"),
    Mutant("planes below the first count, too", "strays.cuh", ": counting ? 0u : pair;\n        }",
           ": pair;\n        }", "split, float32"),
    Mutant("nan outshone by finite warps", "merge.cuh", "sum += share * its_sum;",
           "if (share == 0.f) return;\n            sum += share * its_sum;", "split"),
    Mutant("inf of little weight", "merge.cuh", "x - x == 0.f ? share : 1.f", "share", "split"),
    # ---- Who sees whom
    Mutant("causal off by one", "mask.cuh", "right) + 1)", "right))", "flash"),
    Mutant("window one key short", "mask.cuh", "larger(diagonal - left, 0)", "larger(diagonal - left + 1, 0)", "flash"),
    Mutant("diagonal one key late", "mask.cuh", "found.band.seqlen_k - found.band.seqlen_q;",
           "found.band.seqlen_k - found.band.seqlen_q + 1;", "split"),
    Mutant("blocks skipped by the first row", "mask.cuh", "visible_keys(first).start, visible_keys(last).stop",
           "visible_keys(first).start, visible_keys(first).stop", "flash"),
    Mutant("no band where some row sees all", "mask.cuh", "visible_keys(last).start, visible_keys(first).stop",
           "visible_keys(first).start, visible_keys(last).stop", "flash"),
    Mutant("keys of all sequences are the first's", "mask.cuh", ": keys.start;", ": 0;", "flash"),
    Mutant("rows of all sequences are the first's", "mask.cuh", "found.first_row = rows.start;", "", "flash"),
    # ---- Which tile is whose
    Mutant("a tile for each that the array has", "tiling.cuh", "start_of(sequence) / size + sequence;",
           "start_of(sequence) / size;", "flash"),
    Mutant("a sequence that begins with the next tile", "tiling.cuh", "start_of(sequence) < static",
           "start_of(sequence) <= static", "flash"),
    Mutant("one tile more at the end", "tiling.cuh", "== sequences) return tiles;",
           "== sequences) return tiles + 1;", "flash"),
    Mutant("one tile more for each head", "tiling.cuh", "first_of(sequence + 1) - first}",
           "first_of(sequence + 1) - first + 1}", "flash"),
    Mutant("as many tiles as the longest has", "tiling.cuh",
           "const bool even = !starts || static_cast<int64>(sequences) * each <= by_starts;", "const bool even = true;",
           "flash"),
    Mutant("rows behind the last sequence are nobody's", "tiling.cuh",
           "params.batch + (params.at.cu_seqlens_q ? 1 : 0)", "params.batch", "flash"),
    Mutant("heads of all sequences together", "tiling.cuh", "block - its.first * owners", "block - its.first", "flash"),
    Mutant("lengths may lie", "mask.cuh", "smaller(stop, start + smaller(longest, end - start))", "stop",
           "split, pages"),
    # ---- Edits
    Mutant("softcap before the scale", "scores.cuh",
           "tanh(x * ptx::divide(softmax_scale, params.softcap))",
           "softmax_scale * tanh(ptx::divide(x, params.softcap))", "flash, float32 edits"),
    Mutant("a low cap before the scale", "scores.cuh", "ptx::divide(softmax_scale, params.softcap) * (2.f",
           "ptx::divide(1.f, params.softcap) * (2.f", "flash, low cap"),
    Mutant("a low cap of half the slope", "scores.cuh", "params.softcap) * (2.f * kLog2e)", "params.softcap) * kLog2e",
           "flash, low cap"),
    Mutant("a low cap the other way", "scores.cuh", "-ptx::exp2(x * inner) - 1.f", "-ptx::exp2(-x * inner) - 1.f",
           "flash, low cap"),
    Mutant("a low cap's tanh from zero", "scores.cuh", "offset[2] = {0.5f, 0.5f}", "offset[2] = {0.f, 0.f}",
           "flash, low cap"),
    Mutant("half of a low cap", "scores.cuh", "kRestOfTanh) return 2.f * kLog2e * params.softcap;",
           "kRestOfTanh) return kLog2e * params.softcap;", "flash, low cap"),
    Mutant("a low cap among others of half its size", "scores.cuh", "ptx::fma(rest, 2.f * params.softcap,",
           "ptx::fma(rest, params.softcap,", "flash, edits"),
    Mutant("causal slopes not by the scale", "scores.cuh", "= alibi_slope * params.inverse_scale", "= alibi_slope",
           "flash, causal slopes"),
    Mutant("causal slopes' offsets not by the scale", "scores.cuh", "sequence, params) * params.inverse_scale;",
           "sequence, params);", "flash, causal slopes"),
    Mutant("causal slopes of every token", "scores.cuh", "inverse_scale * params.float_step;", "inverse_scale;",
           "flash, distances"),
    Mutant("of causal slopes the second row eight tokens behind", "scores.cuh", "slope * params.float_step, offset[0])",
           "slope, offset[0])", "flash, distances"),
    Mutant("causal slopes of every second column", "scores.cuh", "static_cast<float>(column), x)",
           "static_cast<float>(column / 2 * 2), x)", "flash, causal slopes"),
    Mutant("causal slopes of the first lane", "scores.cuh",
           "const int first = first_key + Accumulator<kCols>::first_column();\n        float",
           "const int first = first_key;\n        float", "flash, causal slopes"),
    Mutant("causal slopes of the first block", "scores.cuh",
           "const int first = first_key + Accumulator<kCols>::first_column();\n        float",
           "const int first = Accumulator<kCols>::first_column();\n        float",
           "flash, causal slopes"),
    Mutant("causal slopes of the first row", "scores.cuh", "apart_at<kEdits>(rows.token[half], first,",
           "apart_at<kEdits>(rows.token[0], first,", "split, causal slopes"),
    Mutant("causal slopes of the first row for both", "scores.cuh", "ptx::fma(-8.f, slope", "ptx::fma(0.f, slope",
           "flash, causal slopes"),
    Mutant("causal slopes of the first head", "scores.cuh", "alibi_slope_of<kEdits>(rows.head[half], sequence",
           "alibi_slope_of<kEdits>(0, sequence", "split, causal slopes"),
    Mutant("an offset missing in the maximum", "softmax.cuh", "highest[half] + offset[half])", "highest[half])",
           "flash, causal slopes"),
    Mutant("an offset missing in the weights", "softmax.cuh", "ptx::fma(-offset[half], scale_log2, origin[half])",
           "origin[half]", "flash, causal slopes"),
    Mutant("with an offset no row_max of before", "softmax.cuh",
           "ptx::max(row_max[half], highest[half] + offset[half])", "highest[half] + offset[half]",
           "flash, causal slopes"),
    Mutant("tanh of large numbers for all", "scores.cuh", "if (square < 0.55f * 0.55f)", "if (square < 0.f)",
           "flash, float32 edits"),
    Mutant("alibi the other way", "scores.cuh", "x -= alibi_slope", "x += alibi_slope", "flash, edits"),
    Mutant("alibi from the first key", "scores.cuh", "(token + sequence.band.offset)", "token", "split, edits"),
    Mutant("alibi of every token", "scores.cuh", "behind = params.distance_step * key", "behind = key",
           "flash, distances"),
    Mutant("alibi from the mask's diagonal", "scores.cuh", " + params.distance_shift;", ";", "flash, distances"),
    Mutant("alibi's steps of one token", "scores.cuh", "static_cast<float>(behind), params.float_step}",
           "static_cast<float>(behind), 1.f}", "flash, distances"),
    Mutant("alibi with a sign", "scores.cuh",
           "return ptx::absolute(ptx::fma(step, static_cast<float>(column), first));",
           "return -ptx::fma(step, static_cast<float>(column), first);", "flash, distances"),
    Mutant("alibi of rows that are not neighbours", "scores.cuh", "? 8 * half : 0;", "? 0 : 0;", "flash, distances"),
    Mutant("alibi of the first batch", "scores.cuh", " + sequence.index * params.alibi_slopes_batch", "",
           "flash, edits"),
    Mutant("bias of other keys", "scores.cuh", "key * params.bias.key", "key", "flash, edits"),
    Mutant("bias and mask of other rows", "scores.cuh", "+ token * array.row", "", "flash, edits"),
    Mutant("bias of -inf hides no nan", "scores.cuh", "hidden = bias == -ptx::infinity();", "", "flash, edits"),
    Mutant("mask upside down", "scores.cuh", "hidden = !ptx::load_global", "hidden = ptx::load_global", "flash, edits"),
    Mutant("mask of other keys", "scores.cuh", "key * params.mask.key", "key", "flash, edits"),
    Mutant("tail rows read bias and mask", "scores.cuh", "if (!rows.exists[half]) visible.stop = 0;", "",
           "flash, edits"),
    Mutant("edited scores scaled twice", "scores.cuh", "kNothing ? 1.f", "kNothing ? softmax_scale", "split, edits"),
    Mutant("same dropout in every sixteen", "dropout.cuh", "(first_key / 16 + sixteen) * 4", "(first_key / 16) * 4",
           "flash, edits"),
    Mutant("same dropout in both rows", "dropout.cuh", "rows.token[half]", "rows.token[0]", "split, edits"),
    Mutant("same dropout in all heads", "dropout.cuh", "rows.head[half]", "0", "flash, edits"),
    Mutant("same dropout in all batches", "dropout.cuh", "static_cast<uint32>(batch)", "0", "split, edits"),
    Mutant("nine rounds of Philox", "dropout.cuh", "round < 10", "round < 9", "flash, edits"),
    # ---- Softmax
    Mutant("rows of one lane's maximum", "softmax.cuh",
           "over_row(highest, [](float a, float b) { return ptx::max(a, b); });", "", "flash"),
    Mutant("rows of one lane's sum", "softmax.cuh", "over_row(row_sum, [](float a, float b) { return a + b; });", "",
           "flash"),
    Mutant("rows of two lanes", "softmax.cuh", "step <= 2", "step <= 1", "flash"),
    Mutant("row_sum not rescaled", "softmax.cuh", "row_sum[half] *= shrink[half];", "", "flash"),
    Mutant("-inf less -inf", "softmax.cuh", "highest[half] == -ptx::infinity() ? 0.f : highest[half] * scale_log2",
           "highest[half] * scale_log2", "flash"),
    Mutant("nothing divided by nothing", "softmax.cuh", "row_sum == 0.f ? 0.f : ", "", "flash"),
    Mutant("lse in powers of two", "softmax.cuh", "(origin + ptx::log2(total)) * kLn2", "origin + ptx::log2(total)",
           "flash"),
    Mutant("sink forgotten", "softmax.cuh", " + of_sink", "", "split"),
    Mutant("infinity less infinity", "softmax.cuh", "sink == ptx::infinity() ? 1.f : ", "", "flash"),
    Mutant("sink in powers of e", "flash.cu", "ptx::load_global(params.at.sinks + head) * kLog2e",
           "ptx::load_global(params.at.sinks + head)", "flash"),
    Mutant("sink larger than all scores", "softmax.cuh", ": shrink / total,", ": 1.f / total,", "flash"),
    # ---- flash.cu
    Mutant("out not rescaled", "flash.cu", "out[m].scale_rows(shrink);", "", "flash"),
    Mutant("group of k by remainder", "flash.cu", "head / params.queries_per_k", "head % params.queries_per_k",
           "flash"),
    Mutant("v's head is k's", "flash.cu", "head / params.queries_per_v", "head / params.queries_per_k", "flash"),
    Mutant("rows of v as far apart as k's", "flash.cu", "block, values, params.v, params.head_dim_v",
           "block, values, params.k, params.head_dim_v", "flash"),
    Mutant("keys are not waited for by all", "flash.cu",
           "ptx::barrier();  // the keys are here, and everybody is done with the values before them", "", "flash"),
    Mutant("values are not waited for by all", "flash.cu",
           "ptx::barrier();  // the values are here, and everybody is done with the keys", "", "flash"),
    Mutant("values are not committed", "flash.cu", "load_values(block, turn);\n                ptx::commit_copies();",
           "load_values(block, turn);", "flash"),
    Mutant("queries not waited for where nothing is seen", "flash.cu",
           "ptx::wait_copies<0>();  // where no key is seen the queries may still be on their way", "", "flash"),
    Mutant("keys of the next stage not waited for", "flash.cu", "ptx::wait_copies<1>();", "ptx::wait_copies<2>();",
           "flash, two stages"),
    Mutant("values of the next stage not waited for", "flash.cu", "ptx::wait_copies<2>();", "ptx::wait_copies<3>();",
           "flash, two stages"),
    Mutant("stages not met for", "flash.cu",
           "ptx::barrier();  // the keys are here, and everybody is done with the block before", "",
           "flash, two stages"),
    Mutant("values of a stage not met for", "flash.cu",
           "ptx::barrier();  // the values are here; the next block's keys and values may be under way", "",
           "flash, two stages"),
    Mutant("one stage for two", "flash.cu", "turn % 2 ? kStageBytes : 0", "false ? kStageBytes : 0",
           "flash, two stages"),
    Mutant("queries kept too early", "flash.cu", "ptx::wait_copies<Traits::kNumStages>();",
           "ptx::wait_copies<Traits::kNumStages + 1>();", "flash, two stages"),
    Mutant("others' queries kept too early", "flash.cu",
           "ptx::wait_copies<Traits::kNumStages>();\n        ptx::barrier();",
           "ptx::wait_copies<Traits::kNumStages>();", "flash, two stages"),
    Mutant("result read before it is written", "flash.cu", "ptx::warp_barrier();\n        constexpr", "constexpr",
           "flash"),
    Mutant("all rows behind are the first", "softmax.cuh", "(rest.first_row + row) * params.out.row",
           "row * params.out.row", "flash"),
    Mutant("some rows behind are left", "softmax.cuh", "row < rest.band.seqlen_q; row += step",
           "row < rest.band.seqlen_q; row += 2 * step", "flash"),
    Mutant("lse of rows behind", "softmax.cuh", "head * params.lse_head + rest.first_row + row, -ptx::infinity()",
           "head * params.lse_head + rest.first_row + row, 0.f", "split"),
    Mutant("heads of rows behind", "splitkv.cu", "{head, head + params.queries_per_pair}", "{head, head + 1}", "split"),
    Mutant("result of columns that do not exist", "flash.cu", "row < num_rows() && 8 * chunk < params.head_dim_v",
           "row < num_rows()", "flash"),
    Mutant("result of rows that do not exist", "flash.cu", "row < num_rows() && 8 * chunk < params.head_dim_v",
           "8 * chunk < params.head_dim_v", "flash"),
    Mutant("lse of rows that do not exist", "flash.cu", " && rows(m).exists[half])", ")", "flash"),
    Mutant("lse of another sequence", "flash.cu", "head * params.lse_head + sequence.first_row;",
           "head * params.lse_head;", "flash"),
    Mutant("last tile first, by one", "flash.cu", "tiles - 1 - place", "tiles - place", "flash"),
    Mutant("no tiles at all", "tiling.cuh", "larger(1, ceil_div(longest * heads, size))",
           "larger(2, ceil_div(longest * heads, size))", "flash"),
    # ---- splitkv.cu
    Mutant("out not rescaled while splitting", "splitkv.cu", "out[m].scale_rows(shrink);", "", "split"),
    Mutant("heads of the first group", "splitkv.cu", "return first_head + (first_row + row)",
           "return (first_row + row)", "split"),
    Mutant("group of k by remainder while splitting", "splitkv.cu", "params.k, first_head / params.queries_per_k",
           "params.k, first_head % params.queries_per_k", "split"),
    Mutant("v's head is k's while splitting", "splitkv.cu", "params.v, first_head / params.queries_per_v",
           "params.v, first_head / params.queries_per_k", "split"),
    Mutant("descale of k by remainder", "descales.cuh", "query_head / params.queries_per_k",
           "query_head % params.queries_per_k", "split, float8"),
    Mutant("queries not waited for", "splitkv.cu", "ptx::wait_copies<0>();\n        ptx::barrier();\n    }",
           "ptx::barrier();\n    }", "split"),
    Mutant("queries not met for", "splitkv.cu", "ptx::wait_copies<0>();\n        ptx::barrier();\n    }",
           "ptx::wait_copies<0>();\n    }", "split"),
    Mutant("states over the rings of others", "splitkv.cu", "return ptx::barrier_any(probe != 0.f);",
           "return ptx::any(probe != 0.f);", "split"),
    Mutant("states over the rings of others who take care", "splitkv.cu",
           "ptx::barrier();  // everybody is done with the rings", "", "split"),
    Mutant("a ring's tile not waited for", "splitkv.cu", "ptx::wait_copies<kAhead>();",
           "ptx::wait_copies<kAhead + 1>();", "split"),
    Mutant("a ring's tile not met for", "splitkv.cu", "ptx::warp_barrier();  // this tile is here, from all lanes", "",
           "split"),
    Mutant("a ring's tile overwritten", "splitkv.cu", "ptx::warp_barrier();  // all lanes are done with it", "",
           "split"),
    Mutant("a ring out of step", "splitkv.cu", "stage == 0 ? kAhead : stage - 1", "stage", "split"),
    Mutant("keys behind the last", "splitkv.cu", "left = sequence.band.seqlen_k - key;",
           "left = sequence.band.seqlen_k - key + 1;", "split"),
    Mutant("states read before they are written", "splitkv.cu", "block.leave_state();\n    ptx::barrier();",
           "block.leave_state();", "split"),
    # ---- merge.cu, where all warps of a block have a row
    Mutant("splits of one warp alone", "merge.cu", "split += kTogether ? Traits::kNumWarps : 1",
           "split += Traits::kNumWarps", "split"),
    Mutant("every warp has all splits", "merge.cu", "split = kTogether ? ptx::warp() : 0", "split = 0",
           "split, together"),
    Mutant("sums of warps not waited for", "merge.cu", "        ptx::barrier();\n        if (warp > 0) return;",
           "        if (warp > 0) return;", "split, together"),
    Mutant("warps in each other's place", "merge.cu", "(warp - 1) * Traits::kStateBytes + 512 * chunk",
           "512 * chunk", "split, together"),
    Mutant("a sum among the columns", "merge.cu", "warp * Traits::kStateBytes - 16;",
           "(warp - 1) * Traits::kStateBytes;", "split, together"),
    Mutant("the last warp does not count", "merge.cu", "other < Traits::kNumWarps; ++other",
           "other < Traits::kNumWarps - 1; ++other", "split, together"),
    Mutant("every warp stores", "merge.cu", "        if (ptx::warp() > 0) return;\n    }\n    bool strays",
           "    }\n    bool strays", "split, together"),
    Mutant("sums merged without weights", "merge.cuh", "sum += share * its_sum", "sum += its_sum", "split"),
    Mutant("columns merged without weights", "merge.cuh", "x - x == 0.f ? share : 1.f", "1.f", "split"),
    Mutant("partial results in each other's place", "walk.cuh", "params.num_splits + its_split;", "params.num_splits;",
           "split"),
    Mutant("splits not told of", "splitkv.cu", "place, 2 * Walk::splits()", "place, 2", "split"),
    Mutant("partial rows one after the other", "merge.cuh", "its_row = place * Traits::kBlockQ + row",
           "its_row = place + row", "split"),
    Mutant("a merge of one split less", "merge.cu", "smaller(told(0) >> 1,", "smaller((told(0) >> 1) - 1,", "split"),
    Mutant("the first place of a thread block for all it leaves", "merge.cu", "2 * (owner + split) + (split == 0)",
           "2 * (owner + split)", "split, scheduled"),
    Mutant("a piece's splits are the first one's", "merge.cu", "head / params.heads_per_unit * tiles + ", "",
           "split, scheduled"),
    Mutant("an item begun before the last one ends", "walk.cuh",
           "ptx::barrier();  // everybody is done with the item before", "", "split, scheduled"),
    Mutant("the last split ends where it was to end", "schedule.cuh", "ends ? kLargest :", "ends ? piece.length :",
           "split, scheduled"),
    Mutant("sequences without work passed over", "schedule.cu", "== position ? low : larger(0, low - 1)",
           "== position ? low + 1 : larger(0, low - 1)", "split, scheduled"),
    Mutant("values of halves for those of float8 merged", "merge.cu", "factor *= params.of_columns * ", "factor *= ",
           "split, float8"),
    Mutant("splits overlap", "splits.cuh", "blocks.start + (split + 1) * each", "blocks.start + (split + 1) * each + 1",
           "split"),
    Mutant("splits from the first key", "splits.cuh", "{blocks.start + split * each, smaller", "{split * each, smaller",
           "split"),
    Mutant("lse of another sequence while splitting", "splitkv.cu", "sequence.first_row + token_of(row),\n",
           "token_of(row),\n", "split"),
    Mutant("pages of sixteen keys", "pages.cuh", "table + key / params.page_size", "table + key / 16", "split, pages"),
    Mutant("first rows of a page", "pages.cuh", " + key % params.page_size * strides.row;", ";", "split, pages"),
    Mutant("one row of small pages for all", "splitkv.cu", "strides, key + row, sequence,", "strides, key, sequence,",
           "split, pages"),
    Mutant("pages behind the last", "pages.cuh", "page >= 0 && page < params.num_pages", "page >= 0", "split, pages"),
    Mutant("pages before the first", "pages.cuh", "page >= 0 && page < params.num_pages", "page < params.num_pages",
           "split, pages"),
    Mutant("pages of the first sequence", "pages.cuh", " + sequence.index * params.block_table_row;", ";",
           "split, pages"),
    Mutant("all rows in the first's page", "flash.cu", "strides, place + row, sequence,", "strides, place, sequence,",
           "flash, pages"),
    Mutant("pages of all blocks are the first's", "flash.cu", "key + static_cast<int>(sequence.first_key)", "0",
           "flash, pages"),
    # ---- Float8
    Mutant("even columns are the odd ones", "raw.cuh", "halves_of(four << 8)", "halves_of(four)", "split, float8"),
    Mutant("fours of a row in another order than those of a query", "raw.cuh",
           "to[i][0][0] = even(above), to[i][0][1] = odd(above)", "to[i][0][0] = odd(above), to[i][0][1] = even(above)",
           "split, float8"),
    Mutant("eight rows for sixteen columns", "raw.cuh", "above = word[i], below = word[2 + i]",
           "above = word[2 * i], below = word[2 * i + 1]", "split, float8"),
    Mutant("rows and columns of values swapped", "raw.cuh", "first[1] = even(word[1]), first[2] = odd(word[0])",
           "first[1] = odd(word[0]), first[2] = even(word[1])", "split, float8"),
    Mutant("pairs of sums side by side", "raw.cuh", "2 * (i % 2) + block % 2", "i % 2 + 2 * (block % 2)",
           "split, float8"),
    Mutant("sums of a lane in pairs", "raw.cuh", "return 4 * (ptx::lane() % 4);", "return 2 * (ptx::lane() % 4);",
           "split, float32"),
    Mutant("columns behind the last of float8", "tile.cuh", "smaller(16, num_cols - column)", "16", "split, float8"),
    Mutant("steps of queries for those of keys", "splitkv.cu", "left_operand(queries, 16 * m), step / 2);",
           "left_operand(queries, 16 * m), step);", "split, float8"),
    # ---- Float32 as it comes
    Mutant("eight columns of float32 twice", "raw.cuh", "? from ^ kEightColumns : from", "? from : from",
           "split, float32"),
    Mutant("a row of float32 twice", "raw.cuh", "(from ^ kNextRow) + i", "from + i", "split, float32"),
    Mutant("eight rows of float32 are four", "raw.cuh", "kEightRows = 8 * 64", "kEightRows = 4 * 64", "split, float32"),
    Mutant("blocks of values swapped with rows", "raw.cuh", "to[0][plane][2 * j + i]", "to[0][plane][2 * i + j]",
           "split, float32"),
    Mutant("rows of float32 every second step", "raw.cuh",
           "const uint32 from = Tile::advance(right, 2 * step);\n#pragma unroll\n        for (int i = 0; i < 4;",
           "const uint32 from = Tile::advance(right, step);\n#pragma unroll\n        for (int i = 0; i < 4;",
           "split, float32"),
    Mutant("nan of float8 is 480", "numbers.cuh", "(nans >> 15) * 0x7c00u", "0u", "split, float8"),
    Mutant("float8 without signs", "numbers.cuh", "(pair & 0x80008000u) | size", "size", "split, float8"),
    Mutant("scores of halves for those of float8", "splitkv.cu", "first_head, kOfFloat8 * kOfFloat8);", "first_head);",
           "split, float8"),
    Mutant("values of halves for those of float8", "splitkv.cu", "factor *= kOfFloat8 * ", "factor *= ",
           "split, float8"),
    Mutant("descale of one head for splits", "descales.cuh",
           "sequence * params.k_descale_batch + head * params.k_descale_head", "sequence * params.k_descale_batch",
           "split, float8"),
    Mutant("descale of one sequence for splits", "descales.cuh",
           "sequence * params.v_descale_batch + head * params.v_descale_head", "head * params.v_descale_head",
           "split, float8"),
    Mutant("q without its descale", "descales.cuh", "head * params.q_descale_head) *",
           "head * params.q_descale_head) * 0.f +", "split, float8"),
    Mutant("splits of values without their descale", "splitkv.cu",
           "kOfFloat8 * descale_of_values(params, sequence.index, first_head);", "kOfFloat8;",
           "split, float8"),
    Mutant("edited scores without descales", "splitkv.cu", "sequence, params, scale());", "sequence, params);",
           "split, float8"),
    Mutant("nan of a negative scale", "descales.cuh", "kEdits & ~kDropout", "false", "split, float8"),
    Mutant("nan of a negative descale", "descales.cuh", ", kLeastNormal) : ptx::nan();", ", kLeastNormal) : -product;",
           "split, float8"),
]  # fmt: skip


# ---------------------------------------------------------------------------------------------------
# Groups
# ---------------------------------------------------------------------------------------------------

BOTTOM = {"alignment": "bottom-right"}
SMALL = {"tile": Tile(32, 32, 2, 1)}
TWO_STAGES = {"tile": Tile(32, 32, 2, 2, True)}
SPLIT = {"tile": Tile(16, 32, 2, 2)}


def held(kernel, make, dtype, schedule, sources, **call):
    """A call of a table, held to the definition."""
    arrays, options, seed = make(np.random.default_rng(SEED), dtype)
    check(arrays, options, kernel, schedule, dropout_seed=seed, sources=sources, **call)


def ragged(kernel, schedule, sources, lengths_q, lengths_k, behind=(0, 0), page_size=None, **call):
    rng = np.random.default_rng(SEED)
    arrays = ragged_operands(rng, "float16", lengths_q, lengths_k, (4, 2, 2), behind=behind)
    options = ragged_options(arrays, causal=True, **BOTTOM)
    check(paged(rng, arrays, page_size) if page_size else arrays, options, kernel, schedule, sources=sources, **call)


def lies(kernel, sources, page_size=None, **call):
    """Lengths and pages beyond all arrays: nothing but addresses can be wrong."""
    rng = np.random.default_rng(SEED)
    arrays = ragged_operands(rng, "float16", (20, 20), (20, 20))
    options = ragged_options(arrays)
    arrays["cu_seqlens_q"][:] = [-5, 4, 2**31 - 1]
    if page_size:
        arrays = paged(rng, arrays, page_size)
        arrays["block_table"][:] = np.resize([2**31 - 1, -9], arrays["block_table"].shape)
        arrays["cu_seqlens_k"][1:] = [900, 1800]
    else:
        arrays["cu_seqlens_k"][:] = [3, 1, 1000]
    Call(arrays, options, kernel, sources=sources, **call).run()


def both(kernel, schedule, sources, seqlens, options=None, heads=(6, 3, 2), dims=(40, 56), **call):
    """Different heads of k and v, and columns that do not fill a tile."""
    rng = np.random.default_rng(SEED)
    arrays = operands(rng, "float16", "bshd", 2, heads, seqlens, dims)
    check(arrays, options_of(**(options or {})), kernel, schedule, sources=sources, **call)


def flash(sources):
    both("flash", 1, sources, (40, 97), {"causal": True, **BOTTOM}, **SMALL)
    both("flash", 2, sources, (77, 30), {"window_size": (20, 3), **BOTTOM}, **SMALL)
    for name in ("inf and -inf in one tile", "150 infs", "inf", "nan"):
        held("flash", STRAYS[name], "float16", 1, sources, **SMALL)
    held("flash", poisoned("behind the band"), "float16", 2, sources, **SMALL)
    for name in ("window as wide as can be", "causal, more keys, top-left"):
        held("flash", VISIBLE[name], "float16", 0, sources, **SMALL)
    for name in ("sinks", "sinks of infinity"):
        held("flash", EDITS[name], "float16", 0, sources, **SMALL)
    for schedule in (0, 1, 2):
        ragged("flash", schedule, sources, (17, 0, 33), (40, 5, 70), (100, 7), **SMALL)
        ragged("flash", schedule, sources, (32, 95, 0, 33), (40, 70, 5, 3), (1, 0), **SMALL)


def flash_of_96(sources):
    both("flash", 1, sources, (20, 40), dims=(96, 72), **SMALL)


def flash_of_two_stages(sources):
    for schedule in (0, 1, 2):
        both("flash", schedule, sources, (40, 170), {"causal": True, **BOTTOM}, **TWO_STAGES)
        held("flash", STRAYS["inf"], "float16", schedule, sources, **TWO_STAGES)


def flash_at_odd_addresses(sources):
    held("flash", LAYOUTS["rows at odd addresses"], "float16", 0, sources, **SMALL)


def flash_of_float32(sources):
    held("flash", VISIBLE["causal, more keys, top-left"], "float32", 0, sources, **SMALL)
    held("flash", STRAYS["inf"], "float32", 1, sources, **SMALL)


def flash_of_edits(sources):
    held("flash", EDITS["everything"], "float16", 1, sources, **SMALL)
    held("flash", everything_broadcast, "float16", 0, sources, **SMALL)


def flash_of_a_low_cap(sources):
    held("flash", EDITS["softcap 2"], "float16", 1, sources, **SMALL)


def flash_of_causal_slopes(sources):
    held("flash", EDITS["slopes by head"], "float16", 1, sources, **SMALL)
    held("flash", slopes_towards_the_start, "float16", 0, sources, **SMALL)


def flash_of_distances(sources):
    for name in ("every third token", "behind one aligned elsewhere"):
        held("flash", DISTANCES[name], "float16", 1, sources, **SMALL)


def split_of_causal_slopes(sources):
    held("splitkv", EDITS["slopes by head"], "float16", 2, sources, num_splits=2, **SPLIT)


def slopes_towards_the_start(rng, dtype):
    """The largest scores are of the first keys, which come last or first."""
    return call(
        rng, dtype, seqlens=(70, 131), options={"causal": True, **BOTTOM}, alibi_slopes=np.array([-1, 1, -3, 2], "f4")
    )


def flash_of_float32_edits(sources):
    held("flash", EDITS["softcap 1000"], "float32", 1, sources, **SMALL)


def split(sources):
    for schedule in (0, 1, 2):
        both("splitkv", schedule, sources, (1, 300), num_splits=4, **SPLIT)
    both("splitkv", 1, sources, (7, 230), {"window_size": (90, 0), **BOTTOM}, num_splits=2, split_size=64, **SPLIT)
    for name in ("sixteen keys of nan", "150 infs", "inf of little weight"):
        for num_splits in (1, 2):
            held("splitkv", STRAYS[name], "float16", 1, sources, num_splits=num_splits, **SPLIT)
    held("splitkv", EDITS["sinks"], "float16", 0, sources, **SPLIT)
    ragged("splitkv", 1, sources, (1, 0, 3), (400, 5, 70), (40, 7), num_splits=3, **SPLIT)
    lies("splitkv", sources, **SPLIT)


def split_together(sources):
    for schedule in (0, 1, 2):
        both("splitkv", schedule, sources, (1, 900), num_splits=7, **SPLIT)


def split_by_schedule(sources):
    """Cut where shares of few thread blocks end; then by a schedule of other lengths."""
    few = {"num_slots": 7, **SPLIT}
    ragged("splitkv", 1, sources, (1, 0, 3, 9), (1400, 5, 470, 90), (40, 7), **few)
    ragged("splitkv", 2, sources, (1, 1), (1400, 600), page_size=16, **few)
    rng = np.random.default_rng(SEED)
    arrays = ragged_operands(rng, "float16", (1, 1, 1), (900, 900, 900), (4, 2, 2))
    options = ragged_options(arrays, 1, 900)
    ends = arrays["cu_seqlens_k"].copy()
    arrays["cu_seqlens_k"][1:] = (300, 300, 700)
    made = Call(arrays, options, "splitkv", sources=sources, **few)
    made.run()
    arrays["cu_seqlens_k"][:] = ends
    stale = Call(arrays, options, "splitkv", sources=sources, **few)
    stale.scratch["schedule"][...] = made.scratch["schedule"]
    stale.launches = [each for each in stale.launches if each[3].source != "schedule.cu"]
    found = stale.run(1)
    exact, exact_lse = definition(arrays, found.problem)
    assert_close_lse(found.lse, exact_lse)
    np.testing.assert_allclose(found.out.astype("f8"), exact, atol=2e-3)


def flash_of_pages(sources):
    for page_size in (5, 48):
        ragged("flash", page_size % 3, sources, (40, 2), (130, 70), page_size=page_size, **SMALL)
        lies("flash", sources, page_size, **SMALL)


def split_of_pages(sources):
    for page_size in (5, 48):
        ragged("splitkv", page_size % 3, sources, (1, 2), (130, 70), page_size=page_size, num_splits=2, **SPLIT)
        lies("splitkv", sources, page_size, **SPLIT)


def split_of_edits(sources):
    held("splitkv", EDITS["everything"], "float16", 2, sources, num_splits=2, **SPLIT)


def split_of_float32(sources):
    held("splitkv", VISIBLE["causal, more keys, top-left"], "float32", 0, sources, **SPLIT)
    held("splitkv", inf_among_negative_numbers, "float32", 1, sources, **SPLIT)


def split_of_float8(sources):
    rng = np.random.default_rng(SEED)
    factors = {f"{name}_descale": rng.uniform(0.5, 2.0, (2, 2)).astype("f4") for name in "qkv"}
    arrays = operands(rng, "float8_e4m3fn", "bshd", 2, (4, 2, 2), (3, 130), (40, 56))
    for asked in ({}, {"softcap": 2.0}, {"softmax_scale": -0.3}):
        check(arrays | factors, options_of(**asked), "splitkv", 1, sources=sources, num_splits=2, **SPLIT)
    check(arrays | factors, options_of(), "splitkv", 0, sources=sources, num_splits=1, **SPLIT)
    aligned = {name: np.full((*arrays[name].shape[:-1], 64), np.nan, arrays[name].dtype) for name in "qkv"}
    for name, x in aligned.items():
        x[..., : arrays[name].shape[-1]] = arrays[name]
    aligned = {name: x[..., : arrays[name].shape[-1]] for name, x in aligned.items()}
    check(aligned, options_of(), "splitkv", 2, sources=sources, num_splits=2, **SPLIT)
    held("splitkv", LAYOUTS["rows at odd addresses"], "float8_e4m3fn", 2, sources, **SPLIT)
    held("splitkv", STRAYS["nan"], "float8_e4m3fn", 1, sources, **SPLIT)
    negative = {"k_descale": np.full((1, 1), -1, "f4")}
    found = Call(arrays | negative, options_of(), "splitkv", sources=sources, **SPLIT).run()
    assert np.isnan(found.out.astype(float)).all()


def poisoned(name):
    """A call of the table of hidden values, with those values."""

    def make(rng, dtype):
        _, arrays, options, seed = HIDDEN[name](rng, dtype)
        return arrays, options, seed

    return make


def inf_among_negative_numbers(rng, dtype):
    """Their lower planes, were they counted, would make less than one of it."""
    arrays, options, seed = call(rng, dtype, seqlens=(5, 40))
    arrays["v"] = -np.abs(arrays["v"])
    arrays["v"][:, 9, :, 3] = np.inf
    return arrays, options, seed


def everything_broadcast(rng, dtype):
    """All edits, with keys of nan behind a bias of -inf, and a mask and a bias repeated along the other axes."""
    bias = rng.standard_normal((4, 13, 1)).astype("f4")
    bias[:, 5] = -np.inf
    arrays, options, seed = call(
        rng, dtype, options={"softcap": 3.0, "dropout_p": 0.3, "window_size": (40, 9), **BOTTOM},
        bias=bias, mask=rng.random((2, 1, 13, 1)) < 0.8, alibi_slopes=np.ones(4, "f4"),
    )  # fmt: skip
    arrays["q"][:, 5] = np.nan
    return arrays, options, seed


GROUPS = {
    "flash": flash,
    "flash, 96": flash_of_96,
    "flash, two stages": flash_of_two_stages,
    "flash, odd": flash_at_odd_addresses,
    "flash, float32": flash_of_float32,
    "flash, edits": flash_of_edits,
    "flash, float32 edits": flash_of_float32_edits,
    "flash, low cap": flash_of_a_low_cap,
    "flash, causal slopes": flash_of_causal_slopes,
    "flash, distances": flash_of_distances,
    "split, causal slopes": split_of_causal_slopes,
    "split": split,
    "split, together": split_together,
    "split, scheduled": split_by_schedule,
    "split, pages": split_of_pages,
    "flash, pages": flash_of_pages,
    "split, edits": split_of_edits,
    "split, float32": split_of_float32,
    "split, float8": split_of_float8,
}


def test_every_bug_has_its_place():
    assert misplaced(MUTANTS) == []


@pytest.mark.parametrize("group", groups_of(GROUPS, MUTANTS))
def test_the_sources_as_they_are_pass(group):
    GROUPS[group](None)


@pytest.mark.parametrize("mutant", some_of_them(MUTANTS))
def test_a_planted_bug_is_caught(mutant):
    assert_caught(mutant, GROUPS)
