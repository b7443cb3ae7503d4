// How many keys a split has where lengths are data, which the host does not know, and which splits a tile gets.
#pragma once

#include "algorithm/mask.cuh"

namespace cupyattn {

constexpr int kFewestKeys = 256;  // of a split, unless there are fewer: below, starting and merging cost more
constexpr int kFewestKeysOfTiles = 512;  // the same of hopper.cu, whose rows are more

// Shares of the GPU: the most key blocks a split may have so that all splits run at once.  Twin:
// splits.live_split_blocks.
DEVICE int live_split_blocks(int total, int pieces, int slots, int block_k, int fewest_keys = kFewestKeys) {
    // Every piece may have one split that is not full.
    const int room = larger(larger(slots - pieces, slots / 2), 1);
    return larger(ceil_div(total, room), ceil_div(fewest_keys, block_k));
}

// One of the splits of a tile's blocks of keys; empty behind the last one.
struct Split {
    int count;  // of the tile; 1 if it has no keys
    Span part;
};
// Splits have `size` blocks.  Never are there more than the grid has; where `size` was found on the device nobody was
// promised where they end, so they are even.
DEVICE Split split_at(const Span& blocks, int split, int size, const Params& params) {
    const int total = blocks.empty() ? 0 : blocks.stop - blocks.start;
    const int most = smaller(params.num_splits, larger(1, ceil_div(total, size)));
    const int each = params.split_size > 0 && most * size >= total ? size : ceil_div(total, most);
    const int count = total == 0 ? 1 : ceil_div(total, each);
    return {count, {blocks.start + split * each, smaller(blocks.stop, blocks.start + (split + 1) * each)}};
}

// As many blocks as are counted: pages that sequences share make more of them than an int can say.
DEVICE int capped(int64 blocks) {
    constexpr int kMost = 1 << 30;
    return blocks < kMost ? static_cast<int>(blocks) : kMost;
}

// The blocks of keys of a split, by all threads, who find the same number: a block of 384 has a sequence for each of its
// threads, up to 384 of them, so that 256 take as long as one.  `units` of rows in each sequence share keys;
// `tiles_of(seqlen_q)` tells how many tiles the rows of one are.
template <typename Traits, typename TilesOf>
DEVICE int live_size(const Params& params, int units, const TilesOf& tiles_of, int fewest_keys = kFewestKeys) {
    // Every thread some of the sequences, then every warp, then all.
    int total = 0;
    for (int index = ptx::thread(); index < params.batch; index += Traits::kThreads) {
        const Band band = sequence_at(index, params).band;
        const int row_tiles = tiles_of(band.seqlen_q);
        const Span touched = row_tiles == 0 ? Span{0, 0} : band.touched(0, band.seqlen_q - 1);
        if (!touched.empty())
            total = capped(total + int64(row_tiles) * (ceil_div(touched.stop, Traits::kBlockK) -
                                                       touched.start / Traits::kBlockK));
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
        total = capped(int64(total) + ptx::shuffle(static_cast<uint32>(total), ptx::lane() ^ step));
    const uint32 sums = ptx::shared_memory();
    if (ptx::lane() == 0) ptx::store_shared(sums + 4 * ptx::warp(), static_cast<uint32>(total));
    ptx::barrier();
    total = 0;
#pragma unroll
    for (int warp = 0; warp < Traits::kThreads / 32; ++warp) total = capped(int64(total) + ptx::load_shared(sums + 4 * warp));
    ptx::barrier();  // the memory is free for the queries
    return live_split_blocks(capped(int64(total) * units), params.batch * units * tiles_of(params.seqlen_q), params.num_slots,
                             Traits::kBlockK, fewest_keys);
}
// The same of packed rows in tiles of kBlockQ.
template <typename Traits>
DEVICE int live_size(const Params& params, int groups) {
    return live_size<Traits>(params, groups, [&](int seqlen_q) {
        return ceil_div(seqlen_q * params.queries_per_pair, Traits::kBlockQ);
    });
}

}  // namespace cupyattn
