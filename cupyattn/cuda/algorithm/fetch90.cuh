// hopper.cu's first warpgroup: one thread fetches, or a warp what lies in pages; three warps look after values.
#pragma once

#include "algorithm/hopper.cuh"
#include "tiles/strays.cuh"

namespace cupyattn {

// Fills a tile with what lies in pages, from place `row` of the sequence on: boxes are in one page each, and each lane has
// its own, so that the table is asked for all of them at once.  Outside of all pages TMA finds zeros.
template <typename Tile>
DEVICE void load_pages(const Tile& tile, const TensorMap& map, uint32 barrier, int row, int head,
                       const Sequence& sequence, const HopperParams& given) {
    const int stop = static_cast<int>(sequence.first_key) + sequence.band.seqlen_k;
    static_assert(Tile::kRows <= 32 * 8, "boxes are of 8 rows or more, and there is a lane to each");
    const int first = ptx::lane() * given.rows_per_box, place = row + first;
    if (first >= Tile::kRows) return;
    const int page = place < stop ? page_of(place, sequence, given.params) : kNoPage;
#pragma unroll
    for (int slab = 0; slab < Tile::kSlabs; ++slab)
        ptx::load_box(tile.base + slab * Tile::kSlab + first * Tile::kSwizzle, map, barrier, slab * Tile::kSlabCols, 0,
                      place % given.params.page_size, head, page, ptx::kKeepInL2);
}

// Has every tile loaded as soon as there is room for it; by one thread, or for pages by a warp.  All lanes of that thread's
// warp come along where tiles are searched for.
template <typename Traits>
DEVICE void fetch(const HopperParams& given, const HopperMemory<Traits>& memory) {
    const Params& params = given.params;
    const auto key_ring = memory.key_ring(), value_ring = memory.fetched_ring();
    const auto query_ring = memory.query_ring();
    const int query_bytes = given.tokens_per_tile * given.heads_per_unit * Traits::kHeadDim * sizeof(typename Traits::Element);
    const bool leads = !Traits::kPaged || ptx::lane() == 0;
    int use = 0, tile_use = 0;
#pragma unroll 1
    for (uint32 round = 0, index; (index = tile_of_round<Traits>(round)) < uint32(given.num_tiles); ++round) {
        const RowTile tile = row_tile<Traits>(index, given);
        if (tile.blocks.empty() || !(Traits::kPaged || ptx::lane() == 0)) continue;
        const int batch = params.at.cu_seqlens_q ? 0 : tile.sequence.index;
        const int key_batch = params.num_places != kNoCache ? tile.sequence.place : batch;
        const int key_head = tile.head / params.queries_per_k, value_head = tile.head / params.queries_per_v;
        const auto load_block = [&](const auto& its_tile, const TensorMap& map, uint32 barrier, int block, int head) {
            const int row = static_cast<int>(tile.sequence.first_key) + block * Traits::kBlockK;
            if (leads) ptx::mbarrier_arrive_expect(barrier, its_tile.kBytes);
            if constexpr (Traits::kPaged) {
                ptx::warp_barrier();  // no box is under way before all of them are expected
                load_pages(its_tile, map, barrier, row, head, tile.sequence, given);
            } else {
                load_tile<Traits::kCluster>(its_tile, map, barrier, row, head, key_batch, ptx::kKeepInL2);
            }
        };
        const auto load_keys = [&](int block, int its_use) {
            key_ring.wait_empty(its_use);
            load_block(memory.keys(its_use), given.k, key_ring.full(its_use), block, key_head);
        };
        load_keys(tile.blocks.stop - 1, use);
        query_ring.wait_empty(tile_use);
        if (leads) {
            ptx::mbarrier_arrive_expect(query_ring.full(tile_use), query_bytes);
            load_tile<1>(memory.queries(tile_use), given.q, query_ring.full(tile_use),
                         static_cast<int>(tile.sequence.first_row) + tile.first_token, tile.head / given.heads_per_unit,
                         batch, ptx::kDropFromL2);
        }
        ++tile_use;
#pragma unroll 1
        for (int block = tile.blocks.stop - 1; block >= tile.blocks.start; --block, ++use) {
            if (block > tile.blocks.start) load_keys(block - 1, use + 1);
            value_ring.wait_empty(use);
            load_block(memory.fetched(use), given.v, value_ring.full(use), block, value_head);
        }
    }
    // Other blocks of the cluster still tell this one what they have read: it must not exit before.
    if constexpr (Traits::kCluster > 1)
        for (int stage = 0; stage < Traits::kNumStages; ++stage) {
            key_ring.wait_empty(use + stage);
            value_ring.wait_empty(use + stage);
        }
}

// Makes values 0 that are not finite, as one of several warps; whether there are any among the first `live` rows.  What
// lies behind those is nobody's.
template <typename Element, typename Tile>
DEVICE bool clean_tile(const Tile& tile, int live, int turn, int turns) {
    const uint32 stop = tile.base + Tile::kBytes, first = tile.base + 16 * (32 * turn + ptx::lane());
    uint32 probe = 0;
#pragma unroll 2
    for (uint32 at = first; at < stop; at += 16 * 32 * turns) {
        uint32 eight[4];
        ptx::load_shared(eight, at);
#pragma unroll
        for (int i = 0; i < 4; ++i) probe = ptx::probe_finite<Element>(eight[i], probe);
    }
    if (!ptx::any(probe & 0x7fff7fffu)) return false;
    bool found = false;
#pragma unroll 1
    for (uint32 at = first; at < stop; at += 16 * 32 * turns)
#pragma unroll 1
        for (uint32 word = at; word < at + 16; word += 4) {
            const uint32 pair = ptx::load_shared(word), clean = without_strays<Element>(pair, false);
            ptx::store_shared(word, clean);
            found |= clean != pair && tile.row_at(word) < live;
        }
    ptx::fence_async_proxy();
    return ptx::any(found);
}

// Three warps: look after values before they are multiplied.  In blocks that some rows see only in part, what is not
// finite becomes 0; and float8 values are turned.
template <typename Traits>
DEVICE void inspect(const HopperParams& given, const HopperMemory<Traits>& memory) {
    constexpr int kInspectors = HopperMemory<Traits>::kInspectors;
    const auto fetched_ring = memory.fetched_ring();
    const auto value_ring = memory.value_ring();
    const auto inspected_ring = memory.inspected_ring();
    const int inspector = ptx::warp() - 1;
    int use = 0, inspected = 0;
#pragma unroll 1
    for (uint32 round = 0, index; (index = tile_of_round<Traits>(round)) < uint32(given.num_tiles); ++round) {
        const RowTile tile = row_tile<Traits>(index, given);
#pragma unroll 1
        for (int block = tile.blocks.stop - 1; block >= tile.blocks.start; --block, ++use) {
            const bool whole = tile.whole.has(block);
            const int live = tile.sequence.band.seqlen_k - block * Traits::kBlockK;
            bool found = false;
            fetched_ring.wait_full(use);  // of whole blocks, too: a wait can only tell neighbouring phases apart
            if constexpr (Traits::kFloat8) {
                const auto from = memory.fetched(use);
                const auto to = memory.values(use);
                value_ring.wait_empty(use);
                if (whole)
                    turn_tile<false>(from, to, live, inspector, kInspectors);
                else
                    found = ptx::any(turn_tile<true>(from, to, live, inspector, kInspectors));
                ptx::fence_async_proxy();
                ptx::warp_barrier();
                fetched_ring.leave(use, ptx::lane());
                if (ptx::lane() == 0) ptx::mbarrier_arrive(value_ring.full(use));
            } else {
                if (!whole) found = clean_tile<typename Traits::Element>(memory.values(use), live, inspector, kInspectors);
                ptx::warp_barrier();
                value_ring.leave(use, ptx::lane());
            }
            if (whole) continue;
            inspected_ring.wait_empty(inspected);
            if (ptx::lane() == 0) ptx::store_shared(memory.found(inspected) + 4 * inspector, uint32(found));
            ptx::warp_barrier();
            if (ptx::lane() == 0) ptx::mbarrier_arrive(inspected_ring.full(inspected));
            ++inspected;
        }
    }
}

}  // namespace cupyattn
