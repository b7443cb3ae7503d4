// Which tile a thread block of gradients has, of what stays, and where the flag of such a tile lies.  Twin: plan.tiling.
//
// Each sequence has the tiles of the longest, or, kPacked, of its own rows: those are kernels of their own, which the host
// asks for where that makes fewer.  Both kernels of a pass go by this, since tiles that hopper_backward.cu flags are those
// that backward.cu makes again, by tiles of another size.
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

// This block's, of so many owners: query heads, or groups of them that share keys.
template <bool kTurned, bool kPacked>
DEVICE Place staying_place(const Params& params, int owners, int size) {
    if constexpr (kPacked) return place_of(ptx::block_x(), owners, packed_tiling<kTurned>(params, size));
    const int tiles = tiles_of_longest<kTurned>(params, size);
    return {ptx::block_x() / tiles / owners, ptx::block_x() / tiles % owners, ptx::block_x() % tiles, tiles};
}

// Where, among the flags of a pass, that of the rows from `first` on lies: of all tiles, the owner fastest, if kPacked.
template <bool kTurned, bool kPacked>
DEVICE int64 flag_of(const Params& params, int owners, int sequence, int owner, int first) {
    const int within = first / kFlaggedRows;
    if constexpr (kPacked)
        return (packed_tiling<kTurned>(params, kFlaggedRows).first_of(sequence) + static_cast<int64>(within)) * owners + owner;
    return (static_cast<int64>(sequence) * owners + owner) * tiles_of_longest<kTurned>(params, kFlaggedRows) + within;
}

}  // namespace cupyattn
