// Which weights stay.  Twin: numpy_ref.philox and numpy_ref.dropout_keep, bit for bit.
#pragma once

#include "algorithm/scores.cuh"
#include "tiles/strays.cuh"

namespace cupyattn {

// Philox 4x32-10.  Source: Salmon, Moraes, Dror and Shaw, Parallel random numbers: as easy as 1, 2, 3, SC 2011.
DEVICE void philox(uint32 (&word)[4], uint64 seed) {
    uint32 key0 = static_cast<uint32>(seed), key1 = static_cast<uint32>(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint32 low0 = word[0] * 0xD2511F53u, high0 = ptx::multiply_high(word[0], 0xD2511F53u);
        const uint32 low1 = word[2] * 0xCD9E8D57u, high1 = ptx::multiply_high(word[2], 0xCD9E8D57u);
        word[0] = high1 ^ word[1] ^ key0;
        word[1] = low1;
        word[2] = high0 ^ word[3] ^ key1;
        word[3] = low0;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}

// Drops weights, and lets the others grow.  A lane's four keys of sixteen are one call's four words.
template <int kCols>
DEVICE void drop(Accumulator<kCols>& weights, const RowPair& rows, int first_key, int batch, const Params& params) {
#pragma unroll
    for (int sixteen = 0; sixteen < kCols / 16; ++sixteen)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint32 word[4] = {static_cast<uint32>((first_key / 16 + sixteen) * 4 + ptx::lane() % 4),
                              static_cast<uint32>(rows.token[half]), static_cast<uint32>(rows.head[half]),
                              static_cast<uint32>(batch)};
            philox(word, params.at.dropout_seed);
#pragma unroll
            for (int i = 0; i < 4; ++i)
                weights.value[2 * sixteen + i / 2][2 * half + i % 2] *=
                    word[i] >= params.dropout_threshold ? params.dropout_factor : 0.f;
        }
}

// The weights that count strays, see strays.cuh: 1 where a key is seen, 0 where it is not.  Where a weight is dropped
// every stray is nan, as 0 * infinity is.
template <int kEdits, int kCols>
DEVICE void mark_seen(Accumulator<kCols>& scores, const RowPair& rows, int first_key, int batch, const Params& params) {
    Accumulator<kCols> marks;
#pragma unroll
    for (int i = 0; i < kCols / 2; ++i) marks.value[i / 4][i % 4] = 1.f;
    if constexpr (bool(kEdits & kDropout)) drop(marks, rows, first_key, batch, params);
#pragma unroll
    for (int i = 0; i < kCols / 2; ++i) {
        float& score = scores.value[i / 4][i % 4];
        score = score == -ptx::infinity() ? 0.f : marks.value[i / 4][i % 4] == 0.f ? kCodes[2] : 1.f;
    }
}

}  // namespace cupyattn
