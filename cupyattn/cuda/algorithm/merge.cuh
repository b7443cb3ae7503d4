// What rows have come to over some of their keys, and the merge of such states: first those of a block's warps, in
// shared memory, then those of a piece's splits, in global memory.  Twin: numpy_ref.merge.
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

    static constexpr int kStateBytes = Traits::kBlockQ * (Traits::kHeadDimV + 2) * 4;  // of a warp
    DEVICE_METHOD uint32 state_sums(int warp, int row) const { return states + warp * kStateBytes + row * 8; }
    DEVICE_METHOD uint32 state_row(int warp, int row) const {
        return states + warp * kStateBytes + Traits::kBlockQ * 8 + row * Traits::kHeadDimV * 4;
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

    DEVICE_METHOD float* partial_row(int64 piece, int split, int row) const {
        return params.at.partial_out +
               ((piece * params.num_splits + split) * Traits::kBlockQ + row) * Traits::kHeadDimV;
    }
    DEVICE_METHOD float* partial_sums(int64 piece, int split, int row) const {
        return params.at.partial_lse + ((piece * params.num_splits + split) * Traits::kBlockQ + row) * 2;
    }

    DEVICE_METHOD void leave_partial(const RowState& state, int64 piece, int split, int row) const {
#pragma unroll
        for (int i = 0; i < kColumns; ++i)
            ptx::store_global_fresh(partial_row(piece, split, row) + 32 * i + ptx::lane(), state.column[i]);
        if (ptx::lane() == 0) {
            ptx::store_global_fresh(partial_sums(piece, split, row), state.exponent);
            ptx::store_global_fresh(partial_sums(piece, split, row) + 1, state.sum);
        }
    }

    // All splits' states of a row, always in the same order.
    DEVICE_METHOD RowState merged_splits(int64 piece, int splits, int row) const {
        float exponent = -ptx::infinity();
        for (int split = ptx::lane(); split < splits; split += 32)
            exponent = ptx::max(exponent, ptx::load_global_fresh(partial_sums(piece, split, row)));
#pragma unroll
        for (int step = 16; step > 0; step /= 2) exponent = ptx::max(exponent, ptx::shuffle_xor(exponent, step));
        RowState state;
        state.clear(exponent);
#pragma unroll 4
        for (int split = 0; split < splits; ++split)
            state.add(ptx::load_global_fresh(partial_sums(piece, split, row)),
                      ptx::load_global_fresh(partial_sums(piece, split, row) + 1), [&](int i) {
                          return ptx::load_global_fresh(partial_row(piece, split, row) + 32 * i + ptx::lane());
                      });
        return state;
    }
};

}  // namespace cupyattn
