// What rows have come to over some of their keys, and the merge of such states: those of a block's warps, in shared
// memory.  Those of a piece's splits are left in global memory for merge.cu.  Twin: numpy_ref.merge.
#pragma once

#include "algorithm/softmax.cuh"

namespace cupyattn {

// One block's part in that.
template <typename Traits>
struct SplitStates {
    static constexpr int kColumns = Traits::kHeadDimV / 32;  // of a row, per lane

    const typename Traits::Given& params;
    uint32 states;  // the warps' sums, in the rings' place

    DEVICE_METHOD explicit SplitStates(const typename Traits::Given& given) : params(given) {}

    // What a row has come to: weights relative to 2^exponent, their sum, and this lane's columns of the output.
    struct RowState {
        float exponent, sum, column[kColumns];

        DEVICE_METHOD void clear(float to) {
            exponent = to, sum = 0.f;
#pragma unroll
            for (int i = 0; i < kColumns; ++i) column[i] = 0.f;
        }
        // Adds a state whose columns `read(i)` tells; the exponent is the largest of all already.  What is not finite
        // counts however little it weighs.
        template <typename Read>
        DEVICE_METHOD void add(float its_exponent, float its_sum, const Read& read) {
            const float share = ptx::exp2(its_exponent - (exponent == -ptx::infinity() ? 0.f : exponent));
            sum += share * its_sum;
#pragma unroll
            for (int i = 0; i < kColumns; ++i) {
                const float x = read(i);
                column[i] = ptx::fma(x - x == 0.f ? share : 1.f, x, column[i]);
            }
        }
    };

    DEVICE_METHOD uint32 state_sums(int warp, int row) const { return states + warp * Traits::kStateBytes + row * 8; }
    DEVICE_METHOD uint32 state_row(int warp, int row) const {
        return states + warp * Traits::kStateBytes + Traits::kBlockQ * 8 + row * Traits::kHeadDimV * 4;
    }

    // All warps' states of a row.
    DEVICE_METHOD RowState merged_warps(int row) const {
        float exponent = -ptx::infinity();
#pragma unroll
        for (int warp = 0; warp < Traits::kNumWarps; ++warp)
            exponent = ptx::max(exponent, ptx::load_shared_float(state_sums(warp, row)));
        RowState state;
        state.clear(exponent);
#pragma unroll
        for (int warp = 0; warp < Traits::kNumWarps; ++warp)
            state.add(ptx::load_shared_float(state_sums(warp, row)), ptx::load_shared_float(state_sums(warp, row) + 4),
                      [&](int i) { return ptx::load_shared_float(state_row(warp, row) + (32 * i + ptx::lane()) * 4); });
        return state;
    }

    // For merge.cu; `place` is the split's among all that there may be.
    DEVICE_METHOD void leave_partial(const RowState& state, int64 place, int row) const {
        const int64 its_row = place * Traits::kBlockQ + row;
#pragma unroll
        for (int i = 0; i < kColumns; ++i)
            ptx::store_global(params.at.partial_out + its_row * Traits::kHeadDimV + 32 * i + ptx::lane(), state.column[i]);
        if (ptx::lane() == 0) {
            ptx::store_global(params.at.partial_lse + its_row * 2, state.exponent);
            ptx::store_global(params.at.partial_lse + its_row * 2 + 1, state.sum);
        }
    }
};

}  // namespace cupyattn
