// backward_rows.cu: what the gradients of a row's scores have in common.
//
//     delta = sum(dout * out) - dlse          lse_log2 = lse in powers of two, +inf where the row sees nothing
//     sink_rows = -exp(sink - lse) * delta
//
// so that exp2(score - lse_log2) is 0 wherever there is nothing to differentiate.
//
// Source   Dao, FlashAttention-2, 2023, algorithm 2, line 4; the gradient of lse folded into delta.
// Needs    sm_80.
// Launch   one warp per row and head, eight to a block, in the order of lse.

#include "algorithm/params.cuh"
#include "tiles/numbers.cuh"

namespace cupyattn {

// Where a row is in an array of (sequence, head, row), the row fastest.
struct RowPlace {
    int64 sequence, head, row;
};
template <typename Int>
DEVICE RowPlace row_place(Int index, Int num_rows, Int num_heads) {
    const Int heads = index / num_rows;
    return {heads / num_heads, heads % num_heads, index % num_rows};
}

// The products of sixteen bytes of two rows, added to a sum.
template <typename Element>
DEVICE float add_products(const Element* a, const Element* b, float sum) {
    uint32 x[4], y[4];
    ptx::load_global(x, a), ptx::load_global(y, b);
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if constexpr (Same<Element, float>::value) {
            sum = ptx::fma(ptx::from_bits(x[i]), ptx::from_bits(y[i]), sum);
        } else {
#pragma unroll
            for (int half = 0; half < 32; half += 16)
                sum = ptx::fma(ptx::widen(Element{static_cast<uint16>(x[i] >> half)}),
                               ptx::widen(Element{static_cast<uint16>(y[i] >> half)}), sum);
        }
    return sum;
}

template <typename Element>
__global__ void __launch_bounds__(256) backward_rows(const __grid_constant__ BackwardParams params) {
    const Gradients& grad = params.grad;
    const bool ragged = params.at.cu_seqlens_q;
    const int64 num_rows = ragged ? params.total_q : params.seqlen_q;
    const int64 index = static_cast<int64>(ptx::block_x()) * 8 + ptx::warp();
    const int64 all_rows = num_rows * params.num_heads * (ragged ? 1 : params.batch);
    if (index >= all_rows) return;
    // A division of 64 bits takes four times as long as one of 32.
    const auto [sequence, head, row] =
        all_rows <= kLargest
            ? row_place(static_cast<uint32>(index), static_cast<uint32>(num_rows), static_cast<uint32>(params.num_heads))
            : row_place(index, num_rows, static_cast<int64>(params.num_heads));
    const int64 out_row = sequence * params.out.batch + row * params.out.row + head * params.out.head;
    const int64 dout_row = sequence * grad.of_dout.batch + row * grad.of_dout.row + head * grad.of_dout.head;
    const Element *out = static_cast<const Element*>(params.at.out) + out_row,
                  *dout = static_cast<const Element*>(grad.dout) + dout_row;
    const bool aligned = (reinterpret_cast<uint64>(out) | reinterpret_cast<uint64>(dout)) % 16 == 0;
    constexpr int kAtOnce = 16 / static_cast<int>(sizeof(Element));  // head_dims are multiples of 8
    float delta = 0.f;
    for (int column = kAtOnce * ptx::lane(); column < params.head_dim_v; column += 32 * kAtOnce) {
        if (aligned) {
            delta = add_products(dout + column, out + column, delta);
        } else {  // in the same order, for the same bits
            for (int i = column; i < column + kAtOnce; ++i)
                delta = ptx::fma(ptx::widen(ptx::load_global(dout + i)), ptx::widen(ptx::load_global(out + i)), delta);
        }
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) delta += ptx::shuffle_xor(delta, step);
    if (ptx::lane()) return;

    const float lse = ptx::load_global(params.at.lse + index);
    const bool empty = lse == -ptx::infinity();
    if (grad.dlse) delta -= ptx::load_global(grad.dlse + index);
    if (empty) delta = 0.f;
    float lse_log2 = empty ? ptx::infinity() : lse * kLog2e;
    if (lse_log2 == -ptx::infinity()) lse_log2 = kLowest;  // as scores.cuh has it
    ptx::store_global(grad.lse_log2 + index, lse_log2);
    ptx::store_global(grad.delta + index, delta);
    if (grad.sink_rows) {
        const float sink = ptx::load_global(params.at.sinks + head);
        // A sink of infinity has all the weight of a row that knows of it; infinity - infinity is nan.
        const bool certain = sink == ptx::infinity() && lse == ptx::infinity();
        const float weight = certain ? 1.f : ptx::exp2(sink * kLog2e - lse_log2);
        ptx::store_global(grad.sink_rows + index, empty ? 0.f : -weight * delta);
    }
}

}  // namespace cupyattn
