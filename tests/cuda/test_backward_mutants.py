"""Planted bugs in the kernels for gradients: each has to be noticed in the group of calls named for it.

As in test_mutants.py; a group is of one pass and one tile, so that a mutant is one kernel to compile.  Every second of
them is `long`: `make proof` plants them.

What cannot be noticed, since nothing but time comes of it or nothing at all: a short tile that stays and is taken for a
whole one, whose rows that do not exist are not stored; a tile behind a sequence's last, the same; the last row that
stays, a few further on; rows of fragments dealt to warps in another order; delta or lse of a row that sees nothing,
since all its pairs are hidden; stages that are not swapped where there is one.
"""

from dataclasses import replace

import numpy as np
import pytest
from cases import additive, slopes
from emulated import definition, operands, options_of, problem_of, ragged_operands, ragged_options
from emulated_backward import A100, Call, check, with_dout
from mutants import Mutant, assert_caught, groups_of, misplaced, some_of_them

from cupyattn.plan import OF_BIAS, OF_KEYS, OF_QUERIES, OF_VALUES, BackwardTile

SEED = 7

MUTANTS = [
    # ---- Who waits for whom
    Mutant("tiles not waited for", "gradients.cuh",
           "ptx::wait_copies<0>();\n            ptx::barrier();  // the tiles are here",
           "ptx::barrier();  // the tiles are here", "dq"),
    Mutant("tiles not met for", "gradients.cuh",
           "ptx::barrier();  // the tiles are here, and everybody is done with those before them", "", "dq"),
    Mutant("tiles of a stage not met for", "gradients.cuh",
           "ptx::barrier();  // the tiles are here, and everybody is done with those before them", "",
           "dk and dv, tall"),
    Mutant("tiles overwritten", "gradients.cuh", "ptx::barrier();  // everybody is done with the tiles", "", "dq"),
    Mutant("lse overwritten", "gradients.cuh", "ptx::barrier();  // everybody is done with the tiles",
           "ptx::wait_copies<0>();", "dk and dv"),
    Mutant("a walk that ends before all are done", "gradients.cuh",
           "ptx::barrier();  // nothing is under way, and everybody is done", "", "dk and dv, tall"),
    Mutant("the next tile in the stage that is read", "gradients.cuh",
           "load_moving(block + 1, turn + 1);\n                ptx::commit_copies();\n            }\n            const",
           "load_moving(block + 1, turn);\n                ptx::commit_copies();\n            }\n            const",
           "dk and dv, tall"),
    Mutant("one stage for two", "gradients.cuh", "kNumStages == 2 && turn % 2 ? Traits::kStageBytes : 0",
           "kNumStages & 0", "dq, tall"),
    Mutant("facts read from the other stage", "gradients.cuh", "column_facts + stage_offset(turn) + 64",
           "column_facts + stage_offset(turn + 1) + 64", "dk and dv, tall"),
    Mutant("facts left in the first stage", "gradients.cuh", "column_facts + stage_offset(turn) + 4 * number",
           "column_facts + 4 * number", "dk and dv, tall"),
    Mutant("facts over the next stage", "traits.cuh", "(kTurned ? 8 * kMoves : 0)", "0", "dk and dv, tall"),
    Mutant("strays taken while others multiply", "gradients.cuh",
           "ptx::barrier();  // everybody has the products with what is not finite", "", "dq"),
    Mutant("multiplied while others take strays", "gradients.cuh",
           "ptx::thread(), counting);\n            ptx::barrier();", "ptx::thread(), counting);", "dk and dv, strays"),
    # ---- Where things lie
    Mutant("facts of other columns", "gradients.cuh", "ptx::lane() % 4 * 16", "ptx::lane() / 8 * 16", "dk and dv"),
    Mutant("lse of the first of two columns", "gradients.cuh", "ptx::from_bits(facts[i % 2])",
           "ptx::from_bits(facts[0])", "dk and dv"),
    Mutant("lse for delta", "gradients.cuh", "ptx::from_bits(facts[2 + i % 2])", "ptx::from_bits(facts[i % 2])",
           "dk and dv"),
    Mutant("facts behind the last query", "gradients.cuh", "if (token < sequence.band.seqlen_q)", "if (true)",
           "dk and dv"),
    Mutant("lse behind the last query", "gradients.cuh",
           "exists(m, half) ? ptx::load_global(params.grad.lse_log2 + place)",
           "true ? ptx::load_global(params.grad.lse_log2 + place)", "dq"),
    Mutant("delta of the first half", "gradients.cuh", "row_delta[m][half];", "row_delta[m][0];", "dq"),
    Mutant("lse of the first head", "gradients.cuh", " + head * params.lse_head", "", "dq"),
    Mutant("lse of the first sequence", "gradients.cuh", "sequence.index * params.lse_batch + ", "", "dq"),
    Mutant("lse of the sequence before", "gradients.cuh", "params.lse_head + sequence.first_row;", "params.lse_head;",
           "dq"),
    Mutant("queries of the first sequence", "gradients.cuh", "(sequence.first_row + token) * strides.row",
           "token * strides.row", "dk and dv, sequences"),
    Mutant("keys of the first sequence", "gradients.cuh", "(sequence.first_key + key) * strides.row",
           "key * strides.row", "dq"),
    Mutant("one query too many", "gradients.cuh", "sequence.band.seqlen_q - token, num_cols",
           "sequence.band.seqlen_q - token + 1, num_cols", "dk and dv"),
    Mutant("one key too many", "gradients.cuh", "sequence.band.seqlen_k - key, num_cols",
           "sequence.band.seqlen_k - key + 1, num_cols", "dq"),
    Mutant("group of k by remainder", "gradients.cuh", "params.k, head / params.queries_per_k",
           "params.k, head % params.queries_per_k", "dk and dv"),
    Mutant("v's head is k's", "gradients.cuh", "params.v, head / params.queries_per_v",
           "params.v, head / params.queries_per_k", "dk, then dv"),
    Mutant("v's rows as far apart as k's", "gradients.cuh", "params.at.v, params.v,", "params.at.v, params.k,", "dq"),
    Mutant("dout's rows as far apart as q's", "gradients.cuh", "params.grad.dout, params.grad.of_dout,",
           "params.grad.dout, params.q,", "dk and dv"),
    Mutant("columns of dout as many as q's", "gradients.cuh", "params.grad.of_dout, token, params.head_dim_v",
           "params.grad.of_dout, token, params.head_dim", "dq"),
    Mutant("both fragments of a warp are the first", "gradients.cuh", "ptx::warp() * kRowTiles + m",
           "ptx::warp() * kRowTiles", "dq, tall"),
    Mutant("products of the first fragment", "fragments.cuh", "left_operand(left, first_row(m)), step",
           "left_operand(left, first_row(0)), step", "dq, tall"),
    Mutant("products of the first columns", "fragments.cuh",
           "Right::advance(from, step) + plane * Right::kPlane + Right::down(pair)",
           "Right::advance(from, step) + plane * Right::kPlane", "dq, tall"),
    # ---- Tiles of sequences end to end
    Mutant("the last tile is lost", "gradients_tiling.cuh", "total / size + params.batch, 0, size}",
           "total / size + params.batch - 1, 0, size}", "dq"),
    Mutant("a sequence that begins with the next tile", "tiling.cuh", "start_of(sequence) < static",
           "start_of(sequence) <= static", "dk and dv, sequences"),
    Mutant("an empty sequence takes its neighbour's tile", "tiling.cuh", "(tile - sequence + 1) * size;",
           "(tile - sequence + 2) * size;", "dk and dv, sequences"),
    Mutant("a tile counted twice", "tiling.cuh", "first_of(sequence + 1) - first}",
           "first_of(sequence + 1) - first + 1}", "dq"),
    Mutant("last tile first, by one", "gradients_tiling.cuh", "place.tiles - 1 - place.tile",
           "place.tiles - place.tile", "dq"),
    # ---- Who sees whom
    Mutant("lengths of the other side", "gradients.cuh",
           "smaller(Traits::kStays, (kTurned ? sequence.band.seqlen_k : sequence.band.seqlen_q)",
           "smaller(Traits::kStays, (kTurned ? sequence.band.seqlen_q : sequence.band.seqlen_k)", "dq"),
    Mutant("queries touched as keys are", "gradients.cuh", "kTurned ? band.touching(first, last) : ", "", "dk and dv"),
    Mutant("queries wholly seen as keys are", "gradients.cuh", "kTurned ? band.seeing_all(first, last) : ", "",
           "dk and dv"),
    Mutant("an edge taken for whole", "gradients.cuh", "(block + 1) * kMoves <= whole.stop",
           "block * kMoves < whole.stop", "dq"),
    Mutant("a first edge taken for whole", "gradients.cuh", "whole.start <= block * kMoves",
           "whole.start < (block + 1) * kMoves", "dk and dv"),
    Mutant("the first tile left out", "gradients.cuh", "touched.empty() ? 0 : touched.start / kMoves",
           "touched.empty() ? 0 : ceil_div(touched.start, kMoves)", "dq"),
    Mutant("the last tile left out", "gradients.cuh", "touched.empty() ? 0 : ceil_div(touched.stop, kMoves)",
           "touched.empty() ? 0 : touched.stop / kMoves", "dk and dv"),
    Mutant("the first query one late", "mask.cuh", "larger(diagonal - right, 0)", "larger(diagonal - right + 1, 0)",
           "dk and dv"),
    Mutant("the last query one early", "mask.cuh", "smaller(seqlen_q, add_capped(diagonal, left) + 1)",
           "smaller(seqlen_q, add_capped(diagonal, left))", "dk and dv"),
    Mutant("all queries but the last", "mask.cuh", "left == kOpen ? seqlen_q :", "left == kOpen ? seqlen_q - 1 :",
           "dk and dv"),
    Mutant("queries of the first key alone", "mask.cuh", "seeing_rows(first).start, seeing_rows(last).stop",
           "seeing_rows(first).start, seeing_rows(first).stop", "dk and dv"),
    Mutant("queries that see all are those that see any", "mask.cuh",
           "return {seeing_rows(last).start, seeing_rows(first).stop};", "return touching(first, last);", "dk and dv"),
    Mutant("a score of -inf is seen", "gradients.cuh", "hidden = hidden || x == -ptx::infinity();", ";",
           "dk and dv, strays"),
    # ---- The arithmetic
    Mutant("dS for P", "gradients.cuh", "weights[m].round_from(scores[m])", "weights[m].round_from(dscores[m])",
           "dk and dv"),
    Mutant("P for dS", "gradients.cuh", "dweights[m].round_from(dscores[m])", "dweights[m].round_from(scores[m])",
           "dq"),
    Mutant("dP of q and k", "gradients.cuh", "multiply_rows<Element>(dscores, stays_b, tile_b",
           "multiply_rows<Element>(dscores, stays_a, tile_a", "dq"),
    Mutant("dv of queries", "gradients.cuh", "add_to_b(weights, right_operand_by_columns(tile_b))",
           "add_to_b(weights, right_operand_by_columns(tile_a))", "dk and dv"),
    Mutant("dk of gradients", "gradients.cuh", "add_to_a(dweights, right_operand_by_columns(tile_a))",
           "add_to_a(dweights, right_operand_by_columns(tile_b))", "dk alone"),
    Mutant("no delta", "gradients.cuh", "dscores.value[block][i], -delta)", "dscores.value[block][i], 0.f)",
           "dk alone"),
    Mutant("an lse of the scores' base", "gradients.cuh", "ptx::fma(x, scale_log2, -lse)",
           "ptx::fma(x - lse, scale_log2, 0.f)", "dq"),
    # ---- Edits
    Mutant("a softcap without a slope", "gradients.cuh", "counting ? 1.f : change * slope;", "counting ? 1.f : change;",
           "dq, edits"),
    Mutant("a softcap's slope of the first order", "scores.cuh", "slope = 1.f - share * share;",
           "slope = 1.f - share;", "dk and dv, edits"),
    Mutant("a bias through the softcap", "gradients.cuh", "changes[m].value[block][i] += change;",
           "changes[m].value[block][i] += change * slope;", "dbias"),
    Mutant("slopes the other way", "gradients.cuh", "slope_part -= change", "slope_part += change", "dq, edits"),
    Mutant("slopes from the first key", "scores.cuh", "(token + sequence.band.offset)", "token", "dq, edits"),
    Mutant("slopes of the row eight before", "gradients.cuh", "apart.at(column - 8 * half)", "apart.at(column)",
           "dq, edits"),
    Mutant("turned, slopes to the other side", "gradients.cuh", "sequence, params).turned();", "sequence, params);",
           "dk and dv, edits"),
    Mutant("slopes through the softcap", "gradients.cuh", "slope_part -= change *", "slope_part -= change * slope *",
           "dq, edits"),
    Mutant("slopes twice where strays are counted", "gradients.cuh",
           "if (!(kCare && counting)) slope_part", "slope_part", "dq, edits"),
    Mutant("slopes of the last tile", "backward.cu", "this->first + Block::warp_row(0)", "Block::warp_row(0)",
           "dq, edits"),
    Mutant("slopes of half a warp", "scores.cuh", "step < 32", "step < 16", "dq, edits"),
    Mutant("slopes of one warp", "backward.cu", "this->first + Block::warp_row(0)", "this->first", "dq, edits"),
    Mutant("slopes of one sequence", "scores.cuh",
           "(static_cast<int64>(sequence.index) * params.num_heads + head) * parts", "head * parts", "dq, edits"),
    Mutant("dP of what was dropped", "gradients.cuh", "weight * ptx::fma(factor,", "weight * ptx::fma(1.f,",
           "dq, edits"),
    Mutant("weights that were dropped", "gradients.cuh", ": weight * factor;", ": weight;", "dk and dv, edits"),
    Mutant("same dropout in both rows", "gradients.cuh", "call % 2 : row(m, call);", "call % 2 : row(m, 0);",
           "dq, edits"),
    Mutant("halves of dropout swapped", "gradients.cuh", "kept[i / 2][2 * call + i % 2]",
           "kept[1 - i / 2][2 * call + i % 2]", "dq, edits"),
    Mutant("turned, same dropout in every eight", "gradients.cuh", "column + 8 * (call / 2)", "column",
           "dk and dv, edits"),
    Mutant("turned, same dropout in two queries", "gradients.cuh", "Accumulator<16>::first_column() + call % 2 :",
           "Accumulator<16>::first_column() :", "dk and dv, edits"),
    Mutant("turned, another lane's dropout", "gradients.cuh", "kTurned ? own / 2", "kTurned ? own % 4",
           "dk and dv, edits"),
    Mutant("turned, words of odd and even keys swapped", "gradients.cuh", "own % 2 ? word[2 * i + 1] : word[2 * i]",
           "own % 2 ? word[2 * i] : word[2 * i + 1]", "dk and dv, edits"),
    Mutant("turned, words of the first eight keys", "gradients.cuh", "own % 2 ? word[2 * i + 1] : word[2 * i]",
           "own % 2 ? word[1] : word[0]", "dk and dv, edits"),
    Mutant("turned, dropout of the first warp's keys", "gradients.cuh", "(kTurned ? first + warp_row(m) : column) / 16",
           "(kTurned ? first : column) / 16", "dk and dv, edits"),
    # ---- What is not finite
    Mutant("nobody looks for nan in dq", "backward.cu", "suspicious |= this->is_suspicious(this->sums_a);", "", "dq"),
    Mutant("nobody looks for nan in dv", "backward.cu", "suspicious |= this->is_suspicious(this->sums_b);", "",
           "dk and dv, strays"),
    Mutant("strays of the moving side stay", "gradients.cuh",
           "if constexpr (kSumsA) take_strays<kThreads, Element>(tile_a, ptx::thread(), counting);", "",
           "dk and dv, strays"),
    Mutant("strays not counted", "gradients.cuh", "take_strays<kThreads, Element>(tile_b, ptx::thread(), counting);",
           "take_strays<kThreads, Element>(tile_b, ptx::thread(), false);", "dk and dv, strays"),
    Mutant("strays counted by weight", "gradients.cuh", "kCare && counting && !hidden ? mark : weight * factor",
           "weight * factor",
           "dk and dv, strays"),
    Mutant("hidden changes of a bias", "gradients.cuh", "kCare || kWanted == kOfBias;", "kCare;", "dbias"),
    Mutant("hidden strays counted", "gradients.cuh", "kCare && counting && !hidden ? mark", "kCare && counting ? mark",
           "dk and dv, strays"),
    Mutant("hidden changes, with care", "gradients.cuh", "if (kChoosy && hidden) change = 0.f;", "",
           "dk and dv, strays"),
    Mutant("hidden weights", "gradients.cuh", "weight = hidden ? 0.f : ptx::exp2(", "weight = ptx::exp2(", "dk and dv"),
    Mutant("a pair one early is seen", "gradients.cuh", "column - start[half]) >= count",
           "column - start[half] + 1) >= count", "dq"),
    Mutant("dk summed while strays are counted", "gradients.cuh", "if (!(kCare && counting)) return multiply_values",
           "return multiply_values", "dk and dv, strays"),
    Mutant("strays forgotten", "backward.cu", "this->strays[m].add_to(this->sums_b[m]);", ";", "dk and dv, strays"),
    Mutant("strays of the keys before", "gradients.cuh", "sums_b[m].clear(), strays[m].clear();", "sums_b[m].clear();",
           "dk and dv, strays"),
    Mutant("strays under a softcap forgotten", "gradients.cuh", "sums_a[m].value[i / 4][i % 4] = ptx::nan();", ";",
           "dk and dv, edits"),
    Mutant("strays under a softcap not looked for", "backward.cu", "Block::kCountsA || Block::kCountsB",
           "Block::kCountsB", "dq, edits"),
    # ---- Heads and places
    Mutant("keys of the first head", "backward.cu",
           "head % shared == 0 || head % params.queries_per_k == 0 || head % params.queries_per_v == 0",
           "head % shared == 0", "dk, then dv"),
    Mutant("others where v's head changes", "backward.cu", "head % params.queries_per_k == 0 || ", "", "dk, then dv"),
    Mutant("others where k's head changes", "backward.cu", " || head % params.queries_per_v == 0)", ")", "dk, then dv"),
    Mutant("the first head of those that share", "backward.cu", "while (this->head % shared);", "while (false);",
           "dk and dv"),
    Mutant("care from the last head on", "backward.cu", "block.head - (shared - 1)", "block.head", "dk and dv, strays"),
    Mutant("strays of the last head", "backward.cu", "this->counting = true;\n            walk_heads(first_head);",
           "this->counting = true;\n            walk_heads(first_head + heads_of_block(this->params) - 1);",
           "dk and dv, strays"),
    Mutant("another sequence, looked at again", "backward.cu", "int index = this->sequence.index;", "int index = 0;",
           "dk and dv, sequences"),
    Mutant("dk's head by remainder", "backward.cu", "this->head / grad.queries_per_dk;",
           "this->head % grad.queries_per_dk;", "dk alone"),
    Mutant("dv's head is dk's", "backward.cu", "this->head / grad.queries_per_dv;",
           "this->head / grad.queries_per_dk;", "dk, then dv"),
    Mutant("a share of dk in the whole's place", "backward.cu", "this->head / grad.queries_per_dk;",
           "this->head / params.queries_per_k;", "shares"),
    Mutant("dk without the scale", "backward.cu", "grad.of_dk.row, params.head_dim, params.softmax_scale",
           "grad.of_dk.row, params.head_dim, 1.f", "dk alone"),
    Mutant("dq without the scale", "backward.cu", "grad.of_dq.row, params.head_dim, params.softmax_scale",
           "grad.of_dq.row, params.head_dim, 1.f", "dq"),
    Mutant("dv with the scale", "backward.cu", "params.head_dim_v, 1.f", "params.head_dim_v, params.softmax_scale",
           "dk and dv"),
    Mutant("dk over the first sequence's", "backward.cu", "sequence.first_key * grad.of_dk.row", "0",
           "dk and dv, sequences"),
    Mutant("dq over the first sequence's", "backward.cu", "sequence.first_row * grad.of_dq.row", "0", "dq"),
    Mutant("rows that do not exist are stored", "gradients.cuh",
           "if (own >= num_staying()) continue;", "", "dq"),
    Mutant("columns that do not exist are stored", "gradients.cuh", "if (8 * block < num_cols) {", "if (true) {",
           "dk and dv"),
    Mutant("both halves are the first", "gradients.cuh", "pair[2 * half] * factor, pair[2 * half + 1]",
           "pair[0] * factor, pair[1]", "dq"),
    Mutant("rows stored from the first on", "gradients.cuh", "start + (first + own) * row_stride",
           "start + own * row_stride", "dq"),
    Mutant("a pair stored backwards", "numbers.cuh", "ptx::pack<Half>(a, b)", "ptx::pack<Half>(b, a)", "dq"),
    Mutant("one number of a pair of float32", "numbers.cuh", "+ index + 1, b);", "+ index + 1, a);",
           "dk and dv, sequences"),
    Mutant("as many tiles as of queries", "gradients_tiling.cuh", "kTurned ? params.seqlen_k : params.seqlen_q",
           "params.seqlen_q", "dk and dv"),
    Mutant("ends where the queries end", "backward.cu",
           "(kTurned ? sequence.band.seqlen_k : sequence.band.seqlen_q)", "sequence.band.seqlen_q",
           "dk and dv, sequences"),
    Mutant("owners side by side", "backward.cu", "block.run(place.owner * shared, first)",
           "block.run(place.owner, first)", "dk alone"),
    Mutant("as many owners as heads", "backward.cu", "owners = params.num_heads / shared;\n    const Place",
           "owners = params.num_heads;\n    const Place",
           "dk alone"),
    # ---- backward_rows.cu
    Mutant("no gradient of lse", "backward_rows.cu", "if (grad.dlse) delta -=", "if (false) delta -=", "dq"),
    Mutant("gradient of lse the other way", "backward_rows.cu", "if (grad.dlse) delta -=", "if (grad.dlse) delta +=",
           "dq"),
    Mutant("lse in powers of e", "backward_rows.cu", "ptx::infinity() : lse * kLog2e", "ptx::infinity() : lse", "dq"),
    Mutant("delta of some columns", "backward_rows.cu", "step < 32", "step < 4", "dq, wide"),
    Mutant("delta of 32 columns", "backward_rows.cu", "column < params.head_dim_v", "column < 32", "dq, wide"),
    Mutant("out of the first head", "backward_rows.cu", " + head * params.out.head;", ";", "dq"),
    Mutant("dout as far apart as out", "backward_rows.cu", "row * grad.of_dout.row", "row * params.out.row", "dq"),
    Mutant("rows of more sequences than there are", "backward_rows.cu", "(ragged ? 1 : params.batch)", "params.batch",
           "dq"),
    Mutant("the lowest lse is -inf", "backward_rows.cu", "if (lse_log2 == -ptx::infinity()) lse_log2 = kLowest;", "",
           "dbias"),
    Mutant("sinks the other way", "backward_rows.cu", "0.f : -weight * delta", "0.f : weight * delta", "dq, edits"),
    Mutant("sinks of infinity", "backward_rows.cu", "certain ? 1.f : ptx::exp2", "ptx::exp2", "dq"),
    Mutant("sinks of the first head", "backward_rows.cu", "params.at.sinks + head", "params.at.sinks", "dq, edits"),
    # ---- backward_bias.cu
    Mutant("a bias of one head", "backward_bias.cu", "one_head ? 0 : head, one_head ? params.num_heads : head + 1",
           "head, head + 1", "dbias"),
    Mutant("a bias of one sequence", "backward_bias.cu", "grad.bias_batch == 1 ? params.batch : index + 1", "index + 1",
           "dbias"),
    Mutant("a bias of the first sequence", "backward_bias.cu", "block.sequence = sequence_at(other, params);",
           "block.sequence = sequence_at(0, params);", "dbias"),
    Mutant("a bias of one row of tiles", "backward_bias.cu", "one_row ? num_rows : ", "", "dbias"),
    Mutant("a bias of one tile of keys", "backward_bias.cu", "this->params.grad.bias_keys == 1 ? Span{0, kOpen} : ", "",
           "dbias"),
    Mutant("a bias of the first rows", "backward_bias.cu", "one_row ? kStays : 1", "1", "dbias"),
    Mutant("a bias of the first keys", "backward_bias.cu", "one_key ? kMoves : 1", "1", "dbias"),
    Mutant("a bias's table read too early", "backward_bias.cu", "        ptx::barrier();\n        const bool one_row",
           "        const bool one_row", "dbias"),
    Mutant("a bias over its first rows", "backward_bias.cu", "(first_row + row) * grad.of_dbias.row",
           "row * grad.of_dbias.row", "dbias"),
    Mutant("a bias beyond its keys", "backward_bias.cu", "smaller(kMoves, grad.bias_keys - first_key)", "kMoves",
           "dbias"),
    Mutant("a bias of as many heads as there are", "backward_bias.cu", "row_tiles % grad.bias_heads",
           "row_tiles % params.num_heads", "dbias"),
    Mutant("a bias of the queries before", "backward_bias.cu", "this->load_staying();", "", "dbias"),
    Mutant("a bias of the rows before, too", "gradients.cuh", "if (!exists(m, half)) seen.stop = 0;", "", "dbias"),
]  # fmt: skip


# ---------------------------------------------------------------------------------------------------
# Groups
# ---------------------------------------------------------------------------------------------------

CAUSAL = {"causal": True, "alignment": "bottom-right"}
SMALL, TALL = BackwardTile(32, 16, 2, 1), BackwardTile(64, 32, 2, 2)


def dense(sources, passes, schedule=1, heads=(4, 2, 2), seqlens=(40, 70), dims=(24, 8), options=None, change=None,
          batch=2, device=A100, **more):  # fmt: skip
    rng = np.random.default_rng(SEED)
    arrays = {**operands(rng, "float16", "bshd", batch, heads, seqlens, dims), **more}
    asked = options_of(**(options or {}))
    arrays = with_dout(rng, arrays, asked, dlse=True)
    if change:
        change(arrays)
    check(arrays, asked, schedule, dropout_seed=77, sources=sources, passes=passes, device=device)


def ragged(sources, passes, schedule=1, **options):
    rng = np.random.default_rng(SEED)
    arrays = ragged_operands(rng, "float16", (50, 0, 17), (40, 24, 70), (4, 2, 2), (24, 8), behind=(0, 3))
    asked = ragged_options(arrays, **options)
    check(with_dout(rng, arrays, asked, dlse=True), asked, schedule, sources=sources, passes=passes)


def lies(sources, passes):
    """Lengths beyond all arrays: nothing but addresses can be wrong."""
    rng = np.random.default_rng(SEED)
    arrays = ragged_operands(rng, "float16", (20, 20), (20, 20), (2, 1, 1), (24, 8))
    asked = ragged_options(arrays)
    forward = definition(arrays, problem_of(arrays, asked))
    arrays = with_dout(rng, arrays, asked)
    arrays["cu_seqlens_q"][:], arrays["cu_seqlens_k"][:] = [-5, 4, 2**31 - 1], [3, 1, 1000]
    Call(arrays, asked, sources=sources, passes=passes, forward=forward).run(1)


def put(name, where, what):
    def change(arrays):
        arrays[name][where] = what

    return change


def several(*changes):
    def change(arrays):
        for each in changes:
            each(arrays)

    return change


def every_second_row(arrays):
    arrays["dout"] = np.repeat(arrays["dout"], 2, axis=1)[:, ::2]


def thirty_times_the_queries(arrays):
    arrays["q"] *= 30


def hidden_by_a_score(arrays):
    """A key whose scores are -inf, and a gradient of inf in a row that would see it."""
    arrays["q"][..., 3] = np.abs(arrays["q"][..., 3])
    arrays["k"][0, 5] = 0.0
    arrays["k"][0, 5, :, 3] = -np.inf
    arrays["dout"][0, 20, 1, 5] = np.inf


def edits(sources, passes, schedule, change=None):
    rng = np.random.default_rng(SEED)
    more = {
        "bias": additive(rng, (4, 1, 70), "float32"),
        "mask": rng.random((2, 1, 40, 70)) < 0.8,
        "alibi_slopes": slopes(2, 4),
        "sinks": np.array([-1.0, 0.0, 1.0, 2.0], "f4"),
    }
    options = {"softcap": 3.0, "dropout_p": 0.3, "window_size": (40, 9), "alignment": "bottom-right"}
    dense(sources, passes, schedule, options=options, change=change, **more)


def of_queries(sources):
    passes = ((OF_QUERIES, SMALL),)
    dense(sources, passes, 1, options=CAUSAL, change=every_second_row)
    dense(sources, passes, 0, seqlens=(77, 50), options={"window_size": (20, 3), "alignment": "bottom-right"})
    dense(
        sources,
        passes,
        2,
        options=CAUSAL,
        change=several(put("k", np.s_[0, 60], np.nan), put("v", np.s_[1, 65], np.nan)),
    )
    dense(sources, passes, 0, sinks=np.array([np.inf, 0.0, -np.inf, 1.0], "f4"))
    for schedule in (0, 1, 2):
        ragged(sources, passes, schedule, **CAUSAL)
    lies(sources, passes)


def of_queries_in_tall_tiles(sources):
    for schedule in (0, 1, 2):
        dense(sources, ((OF_QUERIES, TALL),), schedule, seqlens=(77, 90), options=CAUSAL)


def of_wide_queries(sources):
    dense(sources, ((OF_QUERIES, SMALL),), 1, dims=(24, 40))


def of_edited_queries(sources):
    passes = ((OF_QUERIES, SMALL),)
    edits(sources, passes, 1)
    edits(sources, passes, 0, several(put("mask", np.s_[..., 50], False), put("k", np.s_[:, 50], np.nan)))
    edits(sources, passes, 2, put("k", np.s_[0, 45, 1, 5], np.inf))


def of_keys_and_values(sources):
    passes = ((OF_KEYS | OF_VALUES, SMALL),)
    dense(sources, passes, 1, heads=(12, 3, 3), options=CAUSAL)
    dense(sources, passes, 2, heads=(12, 2, 2), seqlens=(50, 40))
    dense(sources, passes, 0, seqlens=(50, 77), options={"window_size": (20, 3), "alignment": "top-left"})


def of_strays(sources):
    passes = ((OF_KEYS | OF_VALUES, SMALL),)
    window = {"window_size": (20, 3), "alignment": "top-left"}
    seen = several(put("dout", np.s_[0, 30, 1, 5], np.inf), put("dout", np.s_[1, 47, 0, 2], np.nan))
    for schedule in (0, 1, 2):
        dense(sources, passes, schedule, seqlens=(50, 77), options=window, change=seen)
    nobody = several(put("q", np.s_[:, 18:30], np.nan), put("dout", np.s_[:, 25:30], np.inf))
    dense(sources, passes, 1, seqlens=(70, 40), options=CAUSAL, change=nobody)
    dense(sources, passes, 0, seqlens=(70, 40), options=CAUSAL, change=put("dout", np.s_[:, 25:30], np.inf))
    dense(sources, passes, 0, heads=(4, 2, 2), change=put("dout", np.s_[0, 3, 0, 5], -np.inf))
    dense(sources, passes, 0, change=hidden_by_a_score)
    unseen = put("dout", np.s_[:, 25:30], np.inf)
    dense(sources, ((OF_VALUES, SMALL),), 0, seqlens=(70, 40), options=CAUSAL, change=unseen)


def of_keys_and_values_of_sequences(sources):
    passes = ((OF_KEYS | OF_VALUES, SMALL),)
    dense(sources, passes, 0, change=lambda arrays: arrays.update(k=arrays["k"][:1]))
    for schedule in (0, 1, 2):
        ragged(sources, passes, schedule, **CAUSAL)
    lies(sources, passes)


def of_keys_and_values_in_tall_tiles(sources):
    passes = ((OF_KEYS | OF_VALUES, TALL),)
    for schedule in (0, 1, 2):
        dense(sources, passes, schedule, seqlens=(90, 77), options=CAUSAL)
        dense(sources, passes, schedule, seqlens=(128, 20))


def of_shares(sources):
    """On a GPU that is filled by three blocks of each sequence: 4 of the 12 heads that share keys or values."""
    device = replace(A100, num_units=6)
    dense(sources, ((OF_KEYS | OF_VALUES, SMALL),), 1, (12, 1, 1), (40, 30), options=CAUSAL, device=device)


def of_keys(sources):
    dense(sources, ((OF_KEYS, SMALL),), 1, heads=(6, 2, 3), options=CAUSAL)


def of_keys_then_values(sources):
    """Of which not as many heads share either."""
    passes = ((OF_KEYS, SMALL), (OF_VALUES, SMALL))
    dense(sources, passes, 1, heads=(12, 2, 3), options=CAUSAL)
    dense(sources, passes, 2, heads=(12, 3, 2), seqlens=(50, 40))


def of_edited_keys_and_values(sources):
    passes = ((OF_KEYS | OF_VALUES, SMALL),)
    edits(sources, passes, 1)
    edits(sources, passes, 2, put("q", np.s_[0, 20, 1, 5], np.inf))
    dense(sources, passes, 1, options={"softcap": 200.0}, change=thirty_times_the_queries)  # too high for the short way


def of_a_bias(sources):
    passes, rng = ((OF_BIAS, SMALL),), np.random.default_rng(SEED)
    for schedule, shape in enumerate([(2, 4, 40, 70), (1, 1, 40, 70), (2, 1, 1, 70), (4, 40, 1), (1, 1, 1, 1)]):
        bias = additive(rng, shape, "float32")
        dense(sources, passes, schedule % 3, options={"softcap": 2.0, **CAUSAL}, bias=bias)
    bias = np.zeros((40, 70), np.float32)
    bias[3] = np.finfo(np.float32).min
    dense(sources, passes, 0, options={"softcap": 2.0}, bias=bias)
    dense(sources, passes, 0, options=CAUSAL, bias=np.zeros((40, 70), "f4"), change=put("v", np.s_[0, 60], np.nan))


GROUPS = {
    "dq": of_queries,
    "dq, tall": of_queries_in_tall_tiles,
    "dq, wide": of_wide_queries,
    "dq, edits": of_edited_queries,
    "dk and dv": of_keys_and_values,
    "dk and dv, strays": of_strays,
    "dk and dv, sequences": of_keys_and_values_of_sequences,
    "dk and dv, tall": of_keys_and_values_in_tall_tiles,
    "dk and dv, edits": of_edited_keys_and_values,
    "dk alone": of_keys,
    "dk, then dv": of_keys_then_values,
    "shares": of_shares,
    "dbias": of_a_bias,
}


def test_every_bug_has_its_place():
    assert misplaced(MUTANTS) == []


@pytest.mark.parametrize("group", groups_of(GROUPS, MUTANTS))
def test_the_sources_as_they_are_pass(group):
    GROUPS[group](None)


@pytest.mark.parametrize("mutant", some_of_them(MUTANTS))
def test_a_planted_bug_is_caught(mutant):
    assert_caught(mutant, GROUPS)
