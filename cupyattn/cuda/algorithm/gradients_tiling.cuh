// Which tile a thread block of gradients has, of what stays.  Twin: plan.tiling.
//
// Each sequence has the tiles of the longest, or, kPacked, of its own rows: those are kernels of their own, which the host
// asks for where that makes fewer.  A block of hopper_backward.cu flags its tile by its own number, from which
// backward_again finds the tile.
#pragma once

#include "algorithm/tiling.cuh"

namespace cupyattn {

constexpr int kFlaggedRows = 128;  // of a tile that has a flag: all that hopper_backward.cu has

// How what stays, keys if kTurned or queries, is cut into tiles of `size`: by where sequences begin.  Rows of no sequence
// lie behind those of the last one, and are nobody's here.
template <bool kTurned>
DEVICE Tiling packed_tiling(const Params& params, int size) {
    const int total = static_cast<int>(kTurned ? params.total_k : params.total_q);
    return {kTurned ? params.at.cu_seqlens_k : params.at.cu_seqlens_q, total, params.batch, total / size + params.batch, 0, size};
}
template <bool kTurned>
DEVICE int tiles_of_longest(const Params& params, int size) {
    return larger(1, ceil_div(kTurned ? params.seqlen_k : params.seqlen_q, size));
}

// A block's, of so many owners: query heads, or groups of them that share keys.
template <bool kTurned, bool kPacked>
DEVICE Place staying_place(int block, const Params& params, int owners, int size) {
    if constexpr (kPacked) return place_of(block, owners, packed_tiling<kTurned>(params, size));
    const int tiles = tiles_of_longest<kTurned>(params, size);
    return {block / tiles / owners, block / tiles % owners, block % tiles, tiles};
}
// How many blocks that makes.
template <bool kTurned, bool kPacked>
DEVICE int staying_blocks(const Params& params, int owners, int size) {
    if constexpr (kPacked) return packed_tiling<kTurned>(params, size).tiles * owners;
    return params.batch * owners * tiles_of_longest<kTurned>(params, size);
}
// Its first row.  Under a causal mask the last queries see the most keys, and the first keys are seen by the most queries:
// blocks with the most to do come first.
template <bool kTurned>
DEVICE int first_row_of(const Place& place, const Params& params, int size) {
    return size * (kTurned || params.right == kOpen ? place.tile : place.tiles - 1 - place.tile);
}

}  // namespace cupyattn
