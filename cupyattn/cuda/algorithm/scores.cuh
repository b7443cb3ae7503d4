// What happens to scores before the softmax, in this order: scale, softcap, ALiBi, bias; and who may see whom.
#pragma once

#include "algorithm/mask.cuh"
#include "tiles/fragments.cuh"

namespace cupyattn {

// The two rows of a lane in a 16-row fragment.  Rows that do not exist (tails) see nothing.
struct RowPair {
    int token[2];  // the query's place in its sequence
    int head[2];
    bool exists[2];
};

// tanh to a relative error of 2^-22, since a softcap multiplies it: near zero, where exp2 would leave 1 - (1 - x), the
// odd polynomial with the least relative error up to 0.55.
DEVICE float tanh(float x) {
    const float square = x * x;
    float tail = ptx::fma(0.016458735f, square, -0.052684132f);
    tail = ptx::fma(tail, square, 0.13320942f);
    tail = ptx::fma(tail, square, -0.33332959f) * square;
    if (square < 0.55f * 0.55f) return ptx::fma(tail, x, x);
    return 1.f - ptx::divide(2.f, ptx::exp2(2.f * kLog2e * x) + 1.f);
}

// Where the scores of a row begin in a mask or bias.
DEVICE int64 row_of(const ScoreStrides& array, int batch, int head, int token) {
    return batch * array.batch + head * array.head + token * array.row;
}

// A score q k^T, edited, as an exponent of two; `hidden` becomes true where bias or mask hide its key, and `slope` is by
// how much of a change of the score the softcap lets through.
template <int kEdits>
DEVICE float edited(float x, int token, int head, int key, float alibi_slope, const Sequence& sequence,
                    const Params& params, float softmax_scale, bool& hidden, float& slope) {
    x *= softmax_scale;
    if constexpr (bool(kEdits & kSoftcap)) {
        const float share = tanh(ptx::divide(x, params.softcap));
        slope = 1.f - share * share;
        x = params.softcap * share;
    }
    if constexpr (bool(kEdits & kAlibi)) {
        const int distance = token + sequence.band.offset - key;
        x -= alibi_slope * static_cast<float>(distance < 0 ? -distance : distance);
    }
    if constexpr (bool(kEdits & kBias))
        if (!hidden) {
            const float bias = number_at(params.at.bias, params.bias_dtype,
                                         row_of(params.bias, sequence.index, head, token) + key * params.bias.key);
            x += bias;
            hidden = bias == -ptx::infinity();  // even if the score is nan
        }
    if constexpr (bool(kEdits & kMaskArray))
        if (!hidden) {
            const int64 index = row_of(params.mask, sequence.index, head, token) + key * params.mask.key;
            hidden = !ptx::load_global(params.at.mask + index);
        }
    const float exponent = x * kLog2e;
    // A bias of the lowest number hides nothing by itself: a row of nothing else is a mean.
    return exponent == -ptx::infinity() && x != exponent ? kLowest : exponent;
}

// That of a head of this sequence.
template <int kEdits>
DEVICE float alibi_slope_of(int head, const Sequence& sequence, const Params& params) {
    if constexpr (bool(kEdits & kAlibi))
        return ptx::load_global(params.at.alibi_slopes + sequence.index * params.alibi_slopes_batch + head);
    return 0.f;
}

// What 16 rows of a head, of which a warp's lanes have parts, add to the gradient of its slope: their place is the same
// whatever tile they are in.
DEVICE void store_slope_part(float part, int head, int first_row, const Sequence& sequence, const BackwardParams& params) {
    if (!params.grad.slope_parts) return;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) part += ptx::shuffle_xor(part, step);
    const int64 parts = 8 * larger(1, ceil_div(params.seqlen_q, 128));
    const int64 start = (static_cast<int64>(sequence.index) * params.num_heads + head) * parts;
    if (ptx::lane() == 0) ptx::store_global(params.grad.slope_parts + start + first_row / 16, part);
}

// Edits the scores of keys [first_key, first_key + kCols) in place; minus infinity where a key is not seen.
// The results are exponents of two if anything but the band is edited, and products q k^T as they were if not.
// kBand: some row may see less than all these keys.  `softmax_scale` is that of params, or another in its place.
template <int kEdits, bool kBand, int kCols>
DEVICE void edit(Accumulator<kCols>& scores, const RowPair& rows, int first_key, const Sequence& sequence,
                 const Params& params, float softmax_scale) {
    const int first = first_key + Accumulator<kCols>::first_column();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int token = rows.token[half], head = rows.head[half];
        Span visible{0, kOpen};
        if constexpr (kBand) visible = sequence.band.visible_keys(token);
        if (!rows.exists[half]) visible.stop = 0;
        // Columns are constants, so that they are compared with what is left of the span at the first of them.
        const int start = visible.start - first, stop = visible.stop - first;
        const float alibi_slope = alibi_slope_of<kEdits>(head, sequence, params);
#pragma unroll
        for (int block = 0; block < kCols / 8; ++block)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float& x = scores.value[block][2 * half + i];
                const int column = Accumulator<kCols>::column(block, i), key = first + column;
                bool hidden = (kBand || kEdits) && (column < start || column >= stop);
                float slope;
                if constexpr (bool(kEdits & ~kDropout))
                    x = edited<kEdits>(x, token, head, key, alibi_slope, sequence, params, softmax_scale, hidden, slope);
                if (hidden) x = -ptx::infinity();
            }
    }
}

template <int kEdits, bool kBand, int kCols>
DEVICE void edit(Accumulator<kCols>& scores, const RowPair& rows, int first_key, const Sequence& sequence,
                 const Params& params) {
    edit<kEdits, kBand>(scores, rows, first_key, sequence, params, params.softmax_scale);
}

// 1 where a key is seen, 0 where it is not: the weights that count strays, see strays.cuh.
template <int kCols>
DEVICE void mark_seen(Accumulator<kCols>& scores) {
#pragma unroll
    for (int block = 0; block < kCols / 8; ++block)
#pragma unroll
        for (int i = 0; i < 4; ++i) scores.value[block][i] = scores.value[block][i] == -ptx::infinity() ? 0.f : 1.f;
}

// What the softmax multiplies such scores by, to make them exponents of two.
template <int kEdits>
DEVICE float scale_log2_of(float softmax_scale) {
    return kEdits & ~kDropout ? 1.f : softmax_scale * kLog2e;
}
template <int kEdits>
DEVICE float scale_log2_of(const Params& params) {
    return scale_log2_of<kEdits>(params.softmax_scale);
}

}  // namespace cupyattn
