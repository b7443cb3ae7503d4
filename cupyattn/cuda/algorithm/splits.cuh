// How many keys a split of splitkv.cu has where lengths are data, which the host does not know.
#pragma once

#include "algorithm/mask.cuh"

namespace cupyattn {

constexpr int kFewestKeys = 256;  // of a split, unless there are fewer: below, starting and merging cost more

// Shares of the GPU: the most key blocks a split may have so that all splits run at once.  Twin:
// splits.live_split_blocks.
DEVICE int live_split_blocks(int total, int pieces, int slots, int block_k) {
    // Every piece may have one split that is not full.
    const int room = larger(larger(slots - pieces, slots / 2), 1);
    return larger(ceil_div(total, room), ceil_div(kFewestKeys, block_k));
}

// As many blocks as are counted: pages that sequences share make more of them than an int can say.
DEVICE int capped(int64 blocks) {
    constexpr int kMost = 1 << 30;
    return blocks < kMost ? static_cast<int>(blocks) : kMost;
}

// The blocks of keys of a split, by all threads, who find the same number.
template <typename Traits>
DEVICE int live_size(const Params& params, int groups) {
    // Every thread some of the sequences, then every warp, then all.
    int total = 0;
    for (int index = ptx::thread(); index < params.batch; index += Traits::kThreads) {
        const Band band = sequence_at(index, params).band;
        const int row_tiles = ceil_div(band.seqlen_q * params.queries_per_pair, Traits::kBlockQ);
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
    for (int warp = 0; warp < Traits::kNumWarps; ++warp) total = capped(int64(total) + ptx::load_shared(sums + 4 * warp));
    ptx::barrier();  // the memory is free for the queries
    const int row_tiles = ceil_div(params.seqlen_q * params.queries_per_pair, Traits::kBlockQ);
    return live_split_blocks(capped(int64(total) * groups), params.batch * groups * row_tiles, params.num_slots, Traits::kBlockK);
}

}  // namespace cupyattn
