// What is different where operands are float8: products of 32 keys at a time, whose operands both have to lie along
// the keys.
//
// wgmma reads 8-bit values only in rows of keys, and TMA brings them in rows of columns: three warps turn every tile
// of values.  In what order keys come does not matter to a product as long as both operands have the same, and the
// order that is free is the one in which a lane has its weights (see `Fragment` below): of 16 keys,
// 0 1 8 9  2 3 10 11  4 5 12 13  6 7 14 15.
//
// The tensor cores sum float8 products in fewer bits than float32 has, 13 after the point, and cut off the rest: over
// many keys sums would fall behind.  So they sum over one block only, and what comes out is added up in float32
// (kTwoLevel), which takes registers: blocks are shorter for it, or nothing is queued behind the scores.
//
// Source   Shah et al., FlashAttention-3, 2024, section 3.3; Zhang et al., SageAttention2, 2024, for sums in two levels.
#pragma once

#include "tiles/fragments.cuh"
#include "tiles/tile90.cuh"

namespace cupyattn {

// Weights are multiplied by it before they are rounded to float8, whose least normal number is 2^-6.
constexpr int kFloat8Shift = 8;

// 16 rows x kCols as the left operand of a product.
template <int kCols>
struct Fragment<Float8, kCols> {
    uint32 value[kCols / 32][1][4];

    DEVICE_METHOD void round_from(const Accumulator<kCols>& from) {
#pragma unroll
        for (int step = 0; step < kCols / 32; ++step)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int block = 4 * step + i / 2 * 2, first = 2 * (i % 2);
                const float(&left)[4] = from.value[block], (&right)[4] = from.value[block + 1];
                value[step][0][i] = ptx::pack_float8(left[first], left[first + 1], right[first], right[first + 1]);
            }
    }
};

// The nans of four values, the only ones that are not finite: the highest bit of each.
DEVICE uint32 nans_of(uint32 four) { return ((four & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u; }

// Columns of `from` into rows of `to`, by the warps of number `turn` out of `turns`.  kClean: nan becomes 0, and the
// result is not 0 if there was any among the first `live` keys.
template <bool kClean, typename From, typename To>
DEVICE uint32 turn_tile(const From& from, const To& to, int live, int turn, int turns) {
    constexpr int kColumnGroups = From::kCols / 16, kGroups = From::kRows / 32 * kColumnGroups;
    const int lane = ptx::lane();
    uint32 found = 0;
#pragma unroll 1  // more would need registers that the consumers have
    for (int group = turn; group < kGroups; group += turns) {
        const int key = group / kColumnGroups * 32, chunk = group % kColumnGroups;
        uint32 four[4];  // pairs of columns of keys 0 to 7, 8 to 15, ...
        ptx::load_matrices_transposed(four, from.address(key + lane, chunk));
        if constexpr (kClean)
#pragma unroll
            for (int i = 0; i < 4; ++i) {  // of two keys, two columns each
                const uint32 nans = nans_of(four[i]);
                const int its_key = key + 8 * i + lane % 4 * 2;
                four[i] &= ~((nans >> 7) * 0xffu);
                found |= nans & (its_key + 1 < live ? ~0u : its_key < live ? 0xffffu : 0u);
            }
        // Lanes 8i to 8i + 7 give the rows of matrix i: the even columns of 16 keys, the odd ones, and so again.
        const int row = 16 * chunk + lane % 8 * 2 + lane / 8 % 2;
        ptx::store_matrices(to.address(row, key / 16 + lane / 16), ptx::permute_bytes(four[0], four[1], 0x6420),
                            ptx::permute_bytes(four[0], four[1], 0x7531), ptx::permute_bytes(four[2], four[3], 0x6420),
                            ptx::permute_bytes(four[2], four[3], 0x7531));
    }
    return found;
}

}  // namespace cupyattn
