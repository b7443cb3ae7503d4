"""Planted bugs in the Hopper kernel: each has to be noticed in the group of calls named for it; see test_mutants.py."""

import numpy as np
import pytest
from cases import HIDDEN, STRAYS
from emulated import Call, check, operands, options_of, paged, problem_of, ragged_operands, ragged_options
from mutants import Mutant, assert_caught, groups_of, misplaced, some_of_them

from cupyattn.plan.hopper import Switches, hopper_tile

SEED = 7
BOTTOM = {"alignment": "bottom-right"}


MUTANTS = [
    # ---- Tiles, maps and rings
    Mutant("swizzle by other rows", "tile90.cuh", "place >> 7 & (kChunks - 1)", "place >> 8 & (kChunks - 1)", "tiles"),
    Mutant("slabs on top of each other", "tile90.cuh", "return descriptor(base, kSlab);",
           "return descriptor(base, kSwizzle);", "wide"),
    Mutant("half a step along", "tile90.cuh", "step % kSteps * 32) >> 4", "step % kSteps * 16) >> 4", "tiles"),
    Mutant("no step into the next slab", "tile90.cuh", "step / kSteps * kSlab", "step / kSteps * 32", "wide"),
    Mutant("half a step down", "tile90.cuh", "return 16 * step * kSwizzle >> 4;", "return 8 * step * kSwizzle >> 4;",
           "tiles"),
    Mutant("eight rows too near", "tile90.cuh", "static_cast<uint64>(kAlignment >> 4) << 32",
           "static_cast<uint64>(kAlignment >> 5) << 32", "tiles"),
    Mutant("first columns in all slabs", "tile90.cuh", "const int column = slab * Tile::kSlabCols;",
           "const int column = 0;", "wide"),
    Mutant("phases of single uses", "tile90.cuh", "return use / kNumStages & 1;", "return use & 1;", "tiles"),
    Mutant("nothing is empty at first", "tile90.cuh", "parity(use) ^ 1", "parity(use)", "tiles"),
    # ---- Tile after tile
    Mutant("queries of the tile before", "hopper.cu", "memory.queries(tile_use).by_rows",
           "memory.queries(tile_use ? tile_use - 1 : 0).by_rows", "tiles"),
    Mutant("output over the next queries", "store90.cuh", "memory.out(tile_use);", "memory.out(tile_use + 1);",
           "tiles"),
    Mutant("a tile of two rounds", "tiling.cuh", "blocks - 1 - block : block", "blocks - block : block", "tiles"),
    Mutant("the next queries do not wait", "fetch90.cuh", "query_ring.wait_empty(tile_use);", "", "tiles"),
    # ---- The first warpgroup
    Mutant("half of the keys expected", "fetch90.cuh", "expect(barrier, its_tile.kBytes)",
           "expect(barrier, its_tile.kBytes / 2)", "tiles"),
    Mutant("values of the keys' head", "fetch90.cuh", "tile.head / params.queries_per_v",
           "tile.head / params.queries_per_k",
           "tiles"),
    Mutant("keys one block ahead of nobody", "fetch90.cuh", "load_keys(block - 1, use + 1)",
           "load_keys(block, use + 1)",
           "tiles"),
    Mutant("keys of all sequences are the first's", "fetch90.cuh",
           "static_cast<int>(tile.sequence.first_row) + tile.first_token", "tile.first_token", "ragged"),
    Mutant("values are loaded before there is room", "fetch90.cuh",
           "value_ring.wait_empty(use);\n            load_block", "load_block", "tiles"),
    Mutant("nan stays among hidden values", "fetch90.cuh", "if (!ptx::any(probe & 0x7fff7fffu)) return false;",
           "return false;", "strays"),
    Mutant("strays that somebody sees are not told of", "fetch90.cuh", "found |= clean != pair &&", "found |= false &&",
           "strays"),
    Mutant("strays of float8 are not told of", "float8.cuh", "found |= nans &", "found |= 0u &", "float8"),
    Mutant("clean values are not told of", "fetch90.cuh", "ptx::fence_async_proxy();\n    return ptx::any",
           "return ptx::any", "strays"),
    Mutant("values inspected before they come", "fetch90.cuh", "fetched_ring.wait_full(use);  //", "//", "tiles"),
    Mutant("found by one warp alone", "fetch90.cuh", "memory.found(inspected) + 4 * inspector",
           "memory.found(inspected)",
           "strays"),
    # ---- Clusters
    Mutant("each block keeps its share", "tile90.cuh", "(1u << kCluster) - 1, to,", "1u << ptx::cluster_rank(), to,",
           "clusters"),
    Mutant("all bring the same share", "tile90.cuh", "column, 0, row + first, head,", "column, 0, row, head,",
           "clusters"),
    Mutant("all bring it to the same place", "tile90.cuh", "slab * Tile::kSlab + first * Tile::kSwizzle",
           "slab * Tile::kSlab", "clusters"),
    Mutant("a slot is empty when it is so here", "tile90.cuh", "empty(use), kCluster * emptiers",
           "empty(use), emptiers", "clusters"),
    Mutant("each block tells itself alone", "tile90.cuh", "ptx::mbarrier_arrive_at(empty(use), index);",
           "ptx::mbarrier_arrive(empty(use));", "clusters"),
    Mutant("a block begins before the other", "hopper.cu", "ptx::begin_cluster();", "ptx::barrier();",
           "clusters"),
    Mutant("spare rows cleared while they are read", "hopper.cu", "Traits::kCluster == 1 || Traits::kPacked",
           "Traits::kCluster == 1", "packed_clusters"),
    Mutant("a block exits before the other", "fetch90.cuh", "if constexpr (Traits::kCluster > 1)\n        for",
           "if constexpr (false)\n        for", "clusters"),
    Mutant("the end waits for half of the slots", "fetch90.cuh",
           "            key_ring.wait_empty(use + stage);\n", "", "clusters"),
    # ---- Pages
    Mutant("first keys of a page", "fetch90.cuh", "place % given.params.page_size, head, page,", "0, head, page,",
           "pages"),
    Mutant("boxes on top of each other", "fetch90.cuh", "slab * Tile::kSlab + first * Tile::kSwizzle, map,",
           "slab * Tile::kSlab, map,", "pages"),
    Mutant("the table behind the last key", "fetch90.cuh",
           "place < stop ? page_of(place, sequence, given.params) : kNoPage",
           "page_of(place, sequence, given.params)", "pages"),
    Mutant("one page for all boxes", "fetch90.cuh", "page_of(place, sequence,", "page_of(row, sequence,", "pages"),
    Mutant("every lane expects the tile", "fetch90.cuh",
           "if (leads) ptx::mbarrier_arrive_expect(barrier, its_tile.kBytes);",
           "ptx::mbarrier_arrive_expect(barrier, its_tile.kBytes);", "pages"),
    Mutant("every lane brings the queries", "fetch90.cuh", "!Traits::kPaged || ptx::lane() == 0", "true", "pages"),
    Mutant("a lane brings its neighbour's box", "fetch90.cuh", "place = row + first;",
           "place = row + (first ^ given.rows_per_box);", "pages"),
    Mutant("one lane fetches", "hopper.cu", "else if (Traits::kPaged || Traits::kSearches || ptx::lane() == 0)",
           "else if (ptx::lane() == 0)", "pages"),
    Mutant("strays of another page", "store90.cuh",
           "if constexpr (!Traits::kPaged) return values + key * params.v.row;",
           "return values + key * params.v.row;", "pages"),
    # ---- Which rows and keys
    Mutant("an edge taken for whole", "hopper.cuh", "whole.stop / kBlockK}", "ceil_div(whole.stop, kBlockK)}", "tiles"),
    Mutant("a left edge taken for whole", "hopper.cuh", "{ceil_div(whole.start, kBlockK),", "{whole.start / kBlockK,",
           "tiles"),
    Mutant("first block left out", "hopper.cuh", "{touched.start / kBlockK,", "{ceil_div(touched.start, kBlockK),",
           "tiles"),
    Mutant("tiles of a short section", "hopper.cuh",
           "section < given.whole_sections ? given.units_of_section : given.units_of_last", "given.units_of_section",
           "tiles"),
    Mutant("quotients half as large", "tiling.cuh", "multiplier) >> shift", "multiplier) >> (shift + 1)", "tiles"),
    Mutant("nothing divided by one", "tiling.cuh", "value == 1 ? x : ", "", "tiles"),
    Mutant("tiles of all sequences in the first one's sections", "hopper.cuh",
           "        index -= its.first * given.units_per_sequence.value;\n", "", "ragged"),
    Mutant("one lane searches", "hopper.cu", "Traits::kPaged || Traits::kSearches || ", "Traits::kPaged || ", "ragged"),
    Mutant("all lanes that search fetch", "fetch90.cuh",
           "tile.blocks.empty() || !(Traits::kPaged || ptx::lane() == 0)", "tile.blocks.empty()", "ragged"),
    Mutant("results of the first sequence", "hopper.cu", "row_tile<Traits>(index, given, tile.sequence.index)",
           "row_tile<Traits>(index, given, 0)", "ragged"),
    Mutant("no sequence wipes", "tiling.cuh", "params.batch + (params.at.cu_seqlens_q ? 1 : 0)", "params.batch",
           "ragged"),
    Mutant("tiles of the first unit alone", "hopper.cuh",
           "tiling.sequence_with(given.units_per_sequence.quotient(index))", "tiling.sequence_with(index)",
           "ragged"),
    Mutant("one consumer empties all", "hopper.cuh", "key_ring().init(1, Traits::kConsumers);",
           "key_ring().init(1, 1);", "tiles"),
    Mutant("registers that the block does not have", "hopper.cuh", "kConsumers == 3 ? 32 : 40;",
           "kConsumers == 3 ? 32 : 48;", "tiles"),
    # ---- The other warpgroups
    Mutant("nobody begins", "hopper.cu", "if (Switches::kPingPong && consumer == 0)", "if (false)", "tiles"),
    Mutant("scores of keys that have not come", "hopper.cu", "memory.key_ring().wait_full(use + 1);", "", "tiles"),
    Mutant("scores read while they are summed", "hopper.cu", "ptx::wgmma_wait<1>();", "", "tiles"),
    Mutant("weights overwritten while they are read", "hopper.cu",
           "ptx::wgmma_wait<0>();\n        end_product(0, its_shrink);", "end_product(0, its_shrink);", "tiles"),
    Mutant("another slot of keys released", "hopper.cu", "memory.key_ring().leave(use + 1, ",
           "memory.key_ring().leave(use, ", "tiles"),
    Mutant("values never released", "hopper.cu", "memory.value_ring().leave(use, ptx::thread() % 128);", "", "tiles"),
    Mutant("sums never shrink", "hopper.cu", "if constexpr (!Switches::kRescaleFirst) rescale();", "", "switches"),
    Mutant("sums stay where maxima move", "hopper.cu", "if (!Switches::kLazy || !stays) out",
           "if (!Switches::kLazy) out", "switches"),
    Mutant("the last block looked at is not", "hopper.cu", ": block >= tile.whole.stop)", ": block > tile.whole.stop)",
           "strays"),
    Mutant("blocks at a left edge are not looked at", "hopper.cu", "!tile.whole.has(block) : ",
           "block >= tile.whole.stop : ", "tiles"),
    Mutant("both rows of a lane are the upper one", "store90.cuh", "first + 8 * half, head", "first, head", "tiles"),
    Mutant("sums never shrink first", "hopper.cu",
           "if constexpr (Switches::kRescaleFirst) rescale();\n        wait_for_values(block + 1);",
           "wait_for_values(block + 1);", "switches"),
    Mutant("queries replaced while results leave", "store90.cuh", "ptx::wait_stores_read<0>();", "", "tiles"),
    Mutant("results not told of", "store90.cuh",
           "if constexpr (Traits::kStoresBoxes) {\n            ptx::fence_async_proxy();",
           "if constexpr (Traits::kStoresBoxes) {", "tiles"),
    Mutant("results of rows not told of", "store90.cuh",
           "ptx::fence_async_proxy();  // before TMA puts the next queries here", "", "ragged"),
    Mutant("inspected values not waited for", "hopper.cu", "memory.inspected_ring().wait_full(inspected);", "",
           "strays"),
    Mutant("every warp has the first rows", "store90.cuh", "64 * consumer + 16 * (ptx::warp() % 4) + Accumulator<16>",
           "64 * consumer + Accumulator<16>", "tiles"),
    Mutant("tokens of packed rows", "store90.cuh", "Traits::kPacked ? row / given.heads_per_unit : row",
           "Traits::kPacked ? row % given.heads_per_unit : row", "packed"),
    Mutant("heads of packed rows", "store90.cuh", "Traits::kPacked ? row % given.heads_per_unit : 0", "0", "packed"),
    Mutant("spare rows of anything", "hopper.cu", "if constexpr (Traits::kPacked) clear_spare_rows(given, memory);", "",
           "packed"),
    Mutant("rows behind the last sequence", "store90.cuh",
           "tile.sequence.index == params.batch ? tile.tiles * given.tokens_per_tile : end",
           "end", "ragged"),
    Mutant("empty rows with sinks", "store90.cuh", "finish_row(-ptx::infinity(), 0.f, sink).lse", "-ptx::infinity()",
           "tiles"),
    Mutant("weights in shared memory not told of", "hopper.cu",
           "ptx::fence_async_proxy();\n            ptx::warp_barrier();  // wgmma has each warp read its own 16 rows",
           "ptx::warp_barrier();", "switches"),
    # ---- Values that are not finite
    Mutant("nobody mends", "store90.cuh", "if (ptx::any(suspicious)) mend(", "if (false) mend(", "strays"),
    Mutant("inf where the scores are nan", "store90.cuh", "if (row_sum * 0.f != 0.f) return;", "", "strays"),
    Mutant("a row is mended whose first lane has seen a stray", "store90.cuh", "lane < from + 4; ++lane",
           "lane < from + 1; ++lane", "strays"),
    Mutant("the row eight before is mended", "store90.cuh", "kUpper : kLower))) return;", "kLower : kUpper))) return;",
           "strays"),
    Mutant("the last stray alone", "store90.cuh", "sum[i] += value;", "sum[i] = value;", "strays"),
    Mutant("strays of hidden keys", "store90.cuh", "key = keys.start; key < keys.stop; ++key",
           "key = 0; key < tile.sequence.band.seqlen_k; ++key", "strays"),
    # ---- The softmax
    Mutant("weights may grow beyond all bounds", "softmax.cuh",
           "(highest[0] - row_max[0]) * scale_log2 > 8.f", "(highest[0] - row_max[0]) * scale_log2 > 800.f",
           "switches"),
    Mutant("lower rows do not count", "softmax.cuh", " || (highest[1] - row_max[1]) * scale_log2 > 8.f", "",
           "switches"),
    Mutant("maxima move where they stay", "softmax.cuh", "if (stays) highest[half] = row_max[half];", "", "tiles"),
    Mutant("half of an exponent", "softmax90.cuh", "ptx::bits(shifted) << 23", "ptx::bits(shifted) << 22", "switches"),
    Mutant("a polynomial without its end", "softmax90.cuh", "0.077119089663028717f", "0.f", "switches"),
    # ---- Float8
    Mutant("weights of float8 as they are", "softmax.cuh", "if constexpr (kShift != 0) origin[half] -= kShift;", "",
           "float8"),
    Mutant("lse of larger weights", "store90.cuh",
           "if constexpr (kShift != 0) softmax.row_sum[half] *= kShrinkBack;", "", "float8"),
    Mutant("keys in another order", "float8.cuh", "ptx::permute_bytes(four[0], four[1], 0x6420)",
           "ptx::permute_bytes(four[0], four[1], 0x5410)", "float8"),
    Mutant("columns in another order", "float8.cuh", "lane % 8 * 2 + lane / 8 % 2", "lane % 8 + lane / 8 % 2 * 8",
           "float8"),
    Mutant("weights in another order", "float8.cuh", "block = 4 * step + i / 2 * 2", "block = 4 * step + i / 2",
           "float8"),
    Mutant("sums of a block go on with the next", "hopper.cu",
           "part.value, weights.value[step][0], there, step);", "part.value, weights.value[step][0], there, true);",
           "float8"),
    Mutant("both halves of the columns are the first", "hopper.cu", "values.by_rows(index * Traits::kPartCols)",
           "values.by_rows(0)", "float8"),
    Mutant("both halves are added to the first", "hopper.cu", "part, index * Traits::kPartCols);", "part, 0);",
           "float8"),
    Mutant("sums of float8 shrink by the block after", "hopper.cu", "end_product(0, its_shrink);",
           "end_product(0, shrink);", "float8"),
    Mutant("sums of float8 shrink twice", "hopper.cu", "if constexpr (!Switches::kTwoLevel)\n", "", "float8"),
    Mutant("sums of float8 never shrink", "fragments.cuh", "x = ptx::fma(x, factor[i / 2], part.value[block][i]);",
           "x += part.value[block][i];", "float8"),
    Mutant("lower sums shrink as upper ones", "fragments.cuh", "ptx::fma(x, factor[i / 2], part",
           "ptx::fma(x, factor[0], part", "float8"),
    Mutant("a block's own sums shrink", "fragments.cuh", "x = ptx::fma(x, factor[i / 2], part.value[block][i]);",
           "x = (x + part.value[block][i]) * factor[i / 2];", "float8"),
    Mutant("nan of float8 stays", "float8.cuh", "four[i] &= ~((nans >> 7) * 0xffu);", "", "float8"),
    Mutant("turned values not told of", "fetch90.cuh",
           "ptx::fence_async_proxy();\n                ptx::warp_barrier();", "ptx::warp_barrier();", "float8"),
    Mutant("turned into a slot in use", "fetch90.cuh", "                value_ring.wait_empty(use);\n", "", "float8"),
    Mutant("descale of one head", "descales.cuh", "sequence * params.k_descale_batch + head * params.k_descale_head",
           "sequence * params.k_descale_batch", "float8"),
    Mutant("values without their descale", "store90.cuh",
           "kShrinkBack * descale_of_values(params, tile.sequence.index, tile.head);", "kShrinkBack;", "float8"),
    # ---- Splits, and their merge
    Mutant("every split begins at the first key", "splits.cuh", "{blocks.start + split * each, smaller(",
           "{blocks.start, smaller(", "splits"),
    Mutant("more splits than there is room for", "splits.cuh",
           "const int most = smaller(params.num_splits, larger(1, ceil_div(total, size)));",
           "const int most = larger(1, ceil_div(total, size));", "ragged_splits"),
    Mutant("all splits have all keys", "hopper.cuh", "tile.blocks = its.part, tile.num_splits = its.count;",
           "tile.num_splits = its.count;", "splits"),
    Mutant("tiles of the next split are those behind", "hopper.cuh", "        index -= split * num_tiles;\n", "",
           "splits"),
    Mutant("queries come where sums still are", "hopper.cuh",
           "        ptx::fence_async_proxy();  // before TMA puts queries where sums were\n", "", "splits_of_lengths"),
    Mutant("every split wipes the rows", "hopper.cu", "if (!Traits::kSplit || tile.split == 0) store_nothing();",
           "store_nothing();", "ragged_splits"),
    Mutant("a split without keys is not told of", "store90.cuh",
           "if (tile.first_token < tile.sequence.band.seqlen_q && tile.sequence.index < params.batch) tell(2);", ";",
           "ragged_splits"),
    Mutant("rows of no sequence are told of", "store90.cuh", " && tile.sequence.index < params.batch) tell(2);",
           ") tell(2);", "ragged_splits"),
    Mutant("strays that nobody hears of", "store90.cuh", "tell(2 * tile.num_splits + (strays != 0));",
           "tell(2 * tile.num_splits);", "splits"),
    Mutant("all tiles leave their splits at one place", "store90.cuh",
           "unit * tiles + tile.first_token / given.tokens_per_tile", "unit * tiles", "splits"),
    Mutant("queries kept by a split that has left", "store90.cuh",
           "leave_partial();\n                memory.query_ring().leave(tile_use, ptx::lane());", "leave_partial();",
           "splits"),
    Mutant("weights of float8 as they are, in a split", "store90.cuh", "softmax.row_sum[half] * kShrinkBack};",
           "softmax.row_sum[half]};", "splits_of_float8"),
    Mutant("every lane has its own exponent", "merge.cu",
           "exponent = ptx::max(exponent, ptx::shuffle_xor(exponent, step));", ";", "splits"),
    Mutant("splits weigh the same", "merge.cu", "ptx::exp2(ptx::load_global(sums_of(split)) - origin)", "1.f",
           "splits"),
    Mutant("a split's columns are those of the first", "merge.cu", "ptx::load_global(four, out + first_column(chunk));",
           "ptx::load_global(four, out);", "splits"),
    Mutant("merged without sinks", "merge.cu",
           "params.at.sinks ? ptx::load_global(params.at.sinks + head) * kLog2e : -ptx::infinity()", "-ptx::infinity()",
           "splits"),
    Mutant("what the first split is told of strays", "merge.cu", "strays |= row.strays_in(split);",
           "strays |= row.strays_in(0);", "splits"),
    Mutant("merged rows are not mended", "merge.cu", "if (params.mends && ptx::any(strays || probe != 0.f) &&",
           "if (false &&",
           "splits"),
    Mutant("inf where merged scores are nan", "merge.cu", " && sum * 0.f == 0.f) mend();", ") mend();", "splits"),
    Mutant("rows that are not there are merged", "merge.cu", "    if (!row.exists()) return;\n", "", "ragged_splits"),
    Mutant("what one split has done is merged", "merge.cu", "if (row.splits <= 1) return;", "", "ragged_splits"),
    Mutant("heads of merged rows", "merge.cu", " + packed_row % given.heads_per_unit;", ";", "ragged_splits"),
    Mutant("merged values without their descale", "merge.cu",
           "params.of_columns * descale_of_values(params, sequence.index, head);", "params.of_columns;",
           "splits_of_float8"),
    Mutant("merged strays of another page", "merge.cu",
           "if (!params.at.block_table) return values + key * params.v.row;", "return values + key * params.v.row;",
           "splits_in_pages"),
]  # fmt: skip


# ---------------------------------------------------------------------------------------------------
# Groups
# ---------------------------------------------------------------------------------------------------


def held(sources, arrays, options, schedule, **edits):
    """A call with blocks of 32 keys, held to the definition."""
    tile = hopper_tile(problem_of(arrays, options))._replace(block_q=128, block_k=32)._replace(**edits)
    check(arrays, options, "hopper", schedule, tile=tile, sources=sources, num_workers=2)


def dense(sources, schedule, seqlens, heads=(6, 3, 2), dims=(64, 56), dtype="float16", batch=2, extra=None,
           options=None,
          **edits):  # fmt: skip
    arrays = operands(np.random.default_rng(SEED), dtype, "bshd", batch, heads, seqlens, dims)
    held(sources, arrays | (extra or {}), options_of(**(options or {})), schedule, **edits)


def tiles(sources):
    for schedule in (1, 2):
        dense(sources, schedule, (150, 130), options={"causal": True, **BOTTOM}, units_per_section=5)
        dense(sources, schedule, (200, 90), options={"window_size": (40, 3), **BOTTOM})
    dense(sources, 1, (130, 500), (1, 1, 1), options={"window_size": (215, 3), **BOTTOM})
    sinks = {"sinks": np.arange(6, dtype="f4")}
    dense(sources, 1, (260, 60), extra=sinks, options={"causal": True, **BOTTOM})
    dense(sources, 2, (130, 100), persistent=True)


def wide(sources):
    dense(sources, 1, (20, 70), (2, 1, 1), (96, 72), batch=1)
    dense(sources, 2, (20, 70), (2, 1, 1), (128, 128), batch=1)


def switches(sources):
    dense(sources, 1, (130, 130), (1, 1, 1), batch=1, switches=Switches(rescale_first=True))
    dense(sources, 1, (130, 130), (1, 1, 1), batch=1, switches=Switches(weights_in_shared=True))
    arrays = operands(np.random.default_rng(SEED), "float16", "bshd", 1, (1, 1, 1), (128, 400), (64, 64))
    arrays["k"] *= np.linspace(9.0, 0.1, 400)[:, None, None].astype("f2")
    held(sources, arrays, options_of(), 1, switches=Switches(lazy=True))
    held(sources, arrays, options_of(), 0, switches=Switches(polynomials=16))


def clusters(sources):
    for schedule in (0, 1, 2):
        dense(sources, schedule, (256, 170), (2, 1, 1), persistent=True, cluster=2)
        dense(sources, schedule, (256, 70), (2, 2, 1), (64, 64), "float8_e4m3fn", persistent=True, cluster=2)


def packed_clusters(sources):
    for schedule in (0, 1, 2):
        dense(sources, schedule, (84, 70), (6, 2, 2), heads_per_unit=3, cluster=2)


def pages(sources):
    rng = np.random.default_rng(SEED)
    arrays = ragged_operands(rng, "float16", (17, 40), (40, 134), (4, 2, 2), behind=(0, 7))
    arrays["v"][100, 0, 3] = np.inf
    options = ragged_options(arrays, causal=True, **BOTTOM)
    for page_size in (8, 48):
        held(sources, paged(rng, arrays, page_size), options, page_size % 3)
    lying = paged(rng, arrays, 16)
    lying["block_table"][0] = 2**31 - 1
    lying["block_table"] = lying["block_table"][:, :9].copy()
    Call(lying, options, "hopper", sources=sources).run()


def strays(sources):
    for name in ("inf and -inf in one tile", "a key of nan", "inf", "nan", "inf to the left of a window"):
        arrays, options, _ = STRAYS[name](np.random.default_rng(SEED), "float16")
        held(sources, arrays, options, 1)
    arrays, options, _ = STRAYS["a query of nan"](np.random.default_rng(SEED), "float16")
    arrays["v"][0, 3, 0, 5] = np.inf
    held(sources, arrays, options, 2)
    _, arrays, options, _ = HIDDEN["behind the band"](np.random.default_rng(SEED), "float16")
    held(sources, arrays, options, 2)
    # a stray in each third of a tile, for each of the three inspecting warps to find
    for key in (0, 8, 16, 24):
        arrays = operands(np.random.default_rng(SEED), "float16", "bshd", 1, (1, 1, 1), (130, 32), (64, 64))
        arrays["v"][0, key, 0, 5] = np.nan
        held(sources, arrays, options_of(causal=True, alignment="top-left"), 1)
    # inf of a weight that vanishes in float32 alone, in a block that all rows see, of which there are eight
    arrays = operands(np.random.default_rng(SEED), "float16", "bshd", 1, (1, 1, 1), (8, 64), (64, 64))
    arrays["q"][...], arrays["k"][0, 20] = 4.0, -5.0
    arrays["v"][0, 20, 0, 3] = np.inf
    held(sources, arrays, options_of(), 1)


def packed(sources):
    for heads in ((6, 2, 2), (5, 1, 1)):
        dense(sources, 1, (50, 70), heads, options={"causal": True, **BOTTOM}, heads_per_unit=heads[0] // heads[1])


def ragged(sources):
    arrays = ragged_operands(
        np.random.default_rng(SEED), "float16", (17, 0, 33), (40, 5, 70), (4, 2, 2), behind=(700, 7)
    )
    for schedule in (1, 2):
        held(sources, arrays, ragged_options(arrays, causal=True, **BOTTOM), schedule)
    held(sources, arrays, ragged_options(arrays), 1, persistent=True)
    # each sequence with tiles of its own number
    arrays = ragged_operands(
        np.random.default_rng(SEED), "float16", (17, 260, 128, 2), (9, 40, 5, 3), (4, 2, 2), behind=(5, 0)
    )
    for units in (1, 3, 64):
        held(sources, arrays, ragged_options(arrays, causal=True, **BOTTOM), 1, units_per_section=units)
    held(sources, arrays, ragged_options(arrays), 1, persistent=True)  # queries where results were staged


def float8(sources):
    rng = np.random.default_rng(SEED)
    factors = {f"{name}_descale": rng.uniform(0.5, 2.0, (2, 2)).astype("f4") for name in "qkv"}
    for schedule in (1, 2):
        dense(sources, schedule, (70, 150), (4, 2, 2), (64, 64), "float8_e4m3fn", extra=factors)
    dense(sources, 1, (70, 90), (1, 1, 1), (192, 192), "float8_e4m3fn", batch=1)
    arrays = operands(rng, "float8_e4m3fn", "bshd", 1, (1, 1, 1), (40, 77), (64, 64))
    arrays["v"][0, [3, 20, 38], 0, [5, 63, 0]] = np.nan
    held(sources, arrays, options_of(causal=True, alignment="top-left"), 1)


def held_in_splits(sources, arrays, options, schedule, num_splits=3, **edits):
    edits = {"block_q": 128, "block_k": 32, "persistent": False, "cluster": 1, **edits}
    tile = hopper_tile(problem_of(arrays, options))._replace(**edits)
    check(arrays, options, "hopper", schedule, tile=tile, sources=sources, num_splits=num_splits, num_workers=2)


def splits(sources):
    rng = np.random.default_rng(SEED)
    options = options_of(causal=True, **BOTTOM)
    arrays = operands(rng, "float16", "bshd", 1, (2, 1, 1), (150, 300), (64, 64))
    arrays["k"] *= np.linspace(3.0, 0.1, 300)[:, None, None].astype("f2")
    arrays["sinks"] = np.array([3.0, -1.0], "f4")
    held_in_splits(sources, arrays, options, 1, heads_per_unit=1)
    held_in_splits(sources, arrays, options, 1, heads_per_unit=1, persistent=True)
    arrays["v"][0, 295, 0, 5] = np.inf  # in the last split alone
    held_in_splits(sources, arrays, options, 2, heads_per_unit=1)
    arrays["q"][0, 149, 1, 3] = np.nan
    held_in_splits(sources, arrays, options, 0, heads_per_unit=1)


def ragged_splits(sources):
    rng = np.random.default_rng(SEED)
    arrays = ragged_operands(rng, "float16", (5, 80, 3, 140), (30, 1900, 0, 64), (4, 2, 2), behind=(3, 0))
    arrays["sinks"] = np.arange(4, dtype="f4")
    for schedule in (1, 2):
        held_in_splits(sources, arrays, ragged_options(arrays, causal=True, **BOTTOM), schedule, 2, heads_per_unit=2)


def splits_of_lengths(sources):
    arrays = ragged_operands(np.random.default_rng(SEED), "float16", (5, 80), (30, 1200), (2, 2, 2))
    held_in_splits(sources, arrays, ragged_options(arrays, causal=True, **BOTTOM), 1, 2)


def splits_in_pages(sources):
    rng = np.random.default_rng(SEED)
    arrays = ragged_operands(rng, "float16", (17, 40), (40, 1300), (4, 2, 2), behind=(0, 7))
    arrays["v"][1320, 0, 3] = np.inf
    held_in_splits(sources, paged(rng, arrays, 48), ragged_options(arrays, causal=True, **BOTTOM), 1)


def splits_of_float8(sources):
    rng = np.random.default_rng(SEED)
    arrays = operands(rng, "float8_e4m3fn", "bshd", 2, (2, 2, 2), (40, 300), (64, 64))
    arrays |= {f"{name}_descale": rng.uniform(0.5, 2.0, (2, 2)).astype("f4") for name in "qkv"}
    held_in_splits(sources, arrays, options_of(causal=True, **BOTTOM), 1)


GROUPS = {
    group.__name__: group
    for group in (tiles, wide, switches, clusters, packed_clusters, pages, strays, packed, ragged, float8, splits,
                  ragged_splits, splits_of_lengths, splits_in_pages, splits_of_float8)
}  # fmt: skip


def test_every_bug_has_its_place():
    assert misplaced(MUTANTS) == []


@pytest.mark.parametrize("group", groups_of(GROUPS, MUTANTS))
def test_the_sources_as_they_are_pass(group):
    GROUPS[group](None)


@pytest.mark.parametrize("mutant", some_of_them(MUTANTS))
def test_a_planted_bug_is_caught(mutant):
    assert_caught(mutant, GROUPS)
