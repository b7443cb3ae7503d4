// Rows: their running maximum and sum, and what becomes of them at the end.
#pragma once

#include "algorithm/mask.cuh"
#include "tiles/fragments.cuh"

namespace cupyattn {

// A float per row half of a lane, reduced over the four lanes that share a row.
template <typename Reduce>
DEVICE void over_row(float (&value)[2], const Reduce& reduce) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int step = 1; step <= 2; step *= 2) value[half] = reduce(value[half], ptx::shuffle_xor(value[half], step));
}

// How the exponential of a thread's number `place` is computed: by the special function unit.
struct FastExponential {
    DEVICE_METHOD static float at(int, float x) { return ptx::exp2(x); }
};

// The running (row_max, row_sum) of 16 rows while their keys arrive block by block.  Twin:
// cpu.flash.OnlineSoftmax, in powers of e.
struct OnlineSoftmax {
    float row_max[2];
    float row_sum[2];  // this lane's share, until `finish`

    DEVICE_METHOD void clear() {
        row_max[0] = row_max[1] = -ptx::infinity();
        row_sum[0] = row_sum[1] = 0.f;
    }

    // Turns scores into weights exp2(scale_log2 * (score - row_max)) in place, adds them to row_sum, and sets
    // `shrink`, by which all that was summed under the old row_max has to be multiplied.
    //
    // kLazy: the old row_max stays, and shrink is exactly 1, as long as no weight of the warp passes 2^8, and whether it
    // stays is returned.  A row that sees nothing, whose maximum less itself is nan, is no reason to move the others'.
    // kShift: weights, and so row_sum, come multiplied by 2^kShift.
    // kOffset: `offset` is to be added to all scores of a lane's row.
    template <bool kLazy = false, typename Exponential = FastExponential, int kShift = 0, bool kOffset = false, int kCols>
    DEVICE_METHOD bool fold(Accumulator<kCols>& scores, float scale_log2, float (&shrink)[2], const float (&offset)[2] = {}) {
        float highest[2] = {row_max[0], row_max[1]};
        if constexpr (kOffset) highest[0] = highest[1] = -ptx::infinity();
#pragma unroll
        for (int block = 0; block < kCols / 8; ++block)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float(&x)[4] = scores.value[block];
                highest[half] = ptx::max(highest[half], ptx::max(x[2 * half], x[2 * half + 1]));
            }
        if constexpr (kOffset)
#pragma unroll
            for (int half = 0; half < 2; ++half) highest[half] = ptx::max(row_max[half], highest[half] + offset[half]);
        over_row(highest, [](float a, float b) { return ptx::max(a, b); });
        bool stays = kLazy;
        if constexpr (kLazy)
            stays = !ptx::any((highest[0] - row_max[0]) * scale_log2 > 8.f || (highest[1] - row_max[1]) * scale_log2 > 8.f);
        float origin[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (stays) highest[half] = row_max[half];
            // A row that has seen no key yet: -inf - -inf would be nan, 0 keeps its weights 0.
            origin[half] = highest[half] == -ptx::infinity() ? 0.f : highest[half] * scale_log2;
            shrink[half] = stays ? 1.f : ptx::exp2(ptx::fma(row_max[half], scale_log2, -origin[half]));
            row_max[half] = highest[half];
            row_sum[half] *= shrink[half];
            if constexpr (kShift != 0) origin[half] -= kShift;
            if constexpr (kOffset) origin[half] = ptx::fma(-offset[half], scale_log2, origin[half]);
        }
#pragma unroll
        for (int block = 0; block < kCols / 8; ++block)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float& x = scores.value[block][i];
                x = Exponential::at(4 * block + i, ptx::fma(x, scale_log2, -origin[i / 2]));
                row_sum[i / 2] += x;
            }
        return stays;
    }

    // Adds up the lanes' shares.  After this row_max is an exponent of two.
    DEVICE_METHOD void finish(float scale_log2) {
        over_row(row_sum, [](float a, float b) { return a + b; });
#pragma unroll
        for (int half = 0; half < 2; ++half)
            row_max[half] = row_max[half] == -ptx::infinity() ? row_max[half] : row_max[half] * scale_log2;
    }
};

// What a finished row is multiplied by, and its log-sum-exp.
struct Finish {
    float factor, lse;
};

// row_max and sink are exponents of two; a sink joins as a key whose value is zero.  A row that sees no key has a factor
// of zero, whatever the sink is: who sees one has a sum, of which the largest weight is a part.  Its lse is the sink, or
// the logarithm of nothing.
DEVICE Finish finish_row(float row_max, float row_sum, float sink) {
    const float highest = ptx::max(row_max, sink);
    const float origin = highest == -ptx::infinity() ? 0.f : highest;
    const float shrink = ptx::exp2(row_max - origin);
    const float of_sink = sink == ptx::infinity() ? 1.f : ptx::exp2(sink - origin);  // infinity - infinity is nan
    const float total = row_sum * shrink + of_sink;
    // The lowest number stands for all that are lower as exponents of two, see scores.cuh; a sum of nan is nan still.
    const float lse = highest == kLowest ? ptx::fma(total, 0.f, kLowest) : (origin + ptx::log2(total)) * kLn2;
    return {row_sum == 0.f ? 0.f : shrink / total, lse};
}

// Rows that belong to no sequence, of some heads: out = 0, lse = -inf.  The whole block takes every `step`-th row.
template <typename Element>
DEVICE void wipe(const Params& params, const Sequence& rest, const Span& heads, int first, int step) {
    for (int row = first; row < rest.band.seqlen_q; row += step)
        for (int head = heads.start; head < heads.stop; ++head) {
            const int64 place = (rest.first_row + row) * params.out.row + head * params.out.head;
            for (int column = ptx::thread(); column < params.head_dim_v; column += ptx::threads())
                store_rounded(static_cast<Element*>(params.at.out) + place + column, 0.f);
            if (params.at.lse && ptx::thread() == 0)
                ptx::store_global(params.at.lse + head * params.lse_head + rest.first_row + row, -ptx::infinity());
        }
}

}  // namespace cupyattn
