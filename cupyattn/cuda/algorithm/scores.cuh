// What happens to scores before the softmax, in this order: scale, softcap, ALiBi, bias; and who may see whom.
#pragma once

#include "algorithm/softmax.cuh"

namespace cupyattn {

// The two rows of a lane in a 16-row fragment.  Rows that do not exist (tails) see nothing.
struct RowPair {
    int token[2];  // the query's place in its sequence
    int head[2];
    bool exists[2];
    static constexpr bool kEightApart = false;
};
// The same; kEightApart: of one head, the second eight tokens behind the first.
template <bool kEightApart_>
struct Rows : RowPair {
    static constexpr bool kEightApart = kEightApart_;
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

// -1 / (exp(2 y) + 1) of y = scale * x / softcap: half of what tanh(y) is below 1.  Its error is 2^-24 near zero, too, where
// the tanh is small, and a low cap times that is little beside the rounding of a weight.
DEVICE float rest_of_tanh(float x, float softmax_scale, const Params& params) {
    const float inner = ptx::divide(softmax_scale, params.softcap) * (2.f * kLog2e);
    return ptx::divide(1.f, -ptx::exp2(x * inner) - 1.f);
}

// Where the scores of a row begin in a mask or bias.
DEVICE int64 row_of(const ScoreStrides& array, int batch, int head, int token) {
    return batch * array.batch + head * array.head + token * array.row;
}

// The tokens between a lane's row and its keys, which ALiBi's slopes multiply.  Twin: problem.Distances.  In float32:
// exact up to 2^24, and an instruction for each key.
struct Apart {
    float first;  // to the first column, less than 0 where that comes first
    float step;   // from each column to the next

    DEVICE_METHOD float at(int column) const {
        return ptx::absolute(ptx::fma(step, static_cast<float>(column), first));
    }
    DEVICE_METHOD Apart turned() const { return {-first, step}; }  // of columns that are queries
    // The same distances by other numbers: the compiler would keep those that it has had before, and spill them.
    DEVICE_METHOD Apart mirrored() const { return {-first, -step}; }
};
template <int kEdits>
DEVICE Apart apart_at(int token, int key, const Sequence& sequence, const Params& params) {
    if constexpr (!bool(kEdits & kAlibi)) return {0.f, 0.f};
    const int diagonal = params.distance_step * (token + sequence.band.offset) + params.distance_shift;
    const int behind = params.distance_step * key - diagonal;
    return {static_cast<float>(behind), params.float_step};
}

// A score q k^T, edited, as an exponent of two; `hidden` becomes true where bias or mask hide its key, and `slope` is by
// how much of a change of the score the softcap lets through.
template <int kEdits>
DEVICE float edited(float x, int token, int head, int key, float alibi_slope, float distance, const Sequence& sequence,
                    const Params& params, float softmax_scale, bool& hidden, float& slope) {
    if constexpr (bool(kEdits & kLowCap)) {
        const float rest = rest_of_tanh(x, softmax_scale, params);
        slope = -4.f * ptx::fma(rest, rest, rest);
        x = ptx::fma(rest, 2.f * params.softcap, params.softcap);
    } else if constexpr (bool(kEdits & kSoftcap)) {
        const float share = tanh(x * ptx::divide(softmax_scale, params.softcap));
        slope = 1.f - share * share;
        x = params.softcap * share;
    } else {
        x *= softmax_scale;
    }
    if constexpr (bool(kEdits & kAlibi)) x -= alibi_slope * distance;
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
    return kEdits & kBias && exponent == -ptx::infinity() && x != exponent ? kLowest : exponent;
}

// That of a head of this sequence.
template <int kEdits>
DEVICE float alibi_slope_of(int head, const Sequence& sequence, const Params& params) {
    if constexpr (bool(kEdits & kAlibi))
        return ptx::load_global(params.at.alibi_slopes + sequence.index * params.alibi_slopes_batch + head);
    return 0.f;
}

// What 16 rows of a head, of which a warp's lanes have parts, add to the gradient of its slope: their place is the same
// whatever tile they are in.  Rows behind the sequence's end, of tiles that have no others, have none.
DEVICE void store_slope_part(float part, int head, int first_row, const Sequence& sequence, const BackwardParams& params) {
    if (!params.grad.slope_parts || first_row >= sequence.band.seqlen_q) return;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) part += ptx::shuffle_xor(part, step);
    const int64 parts = 8 * larger(1, ceil_div(params.seqlen_q, 128));
    const int64 start = (static_cast<int64>(sequence.index) * params.num_heads + head) * parts;
    if (ptx::lane() == 0) ptx::store_global(params.grad.slope_parts + start + first_row / 16, part);
}

// What `edit` leaves to the softmax, which multiplies and adds anyway: a scale, and an offset of each lane's row.
template <int kEdits>
struct Left {
    static constexpr bool kRestOfTanh = (kEdits & ~kDropout) == (kSoftcap | kLowCap);  // scores are that, less a half
    static constexpr bool kCausalSlopes = kEdits & kCausalAlibi;  // scores are products, and slopes by the scale added to them
    static constexpr bool kOffset = kRestOfTanh || kCausalSlopes;
    static constexpr bool kNothing = bool(kEdits & ~kDropout) && !kOffset;  // scores are exponents of two
};

// Edits the scores of keys [first_key, first_key + kCols) in place; minus infinity where a key is not seen.
// kBand: some row may see less than all these keys.  `softmax_scale` is that of params, or another in its place.
template <int kEdits, bool kBand, typename TwoRows, int kCols>
DEVICE void edit(Accumulator<kCols>& scores, const TwoRows& rows, int first_key, const Sequence& sequence,
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
        // A key eight further is as far from the second row, so that both rows have their distances in common.
        const Apart apart = apart_at<kEdits>(rows.token[TwoRows::kEightApart ? 0 : half], first, sequence, params);
        const int shared = TwoRows::kEightApart ? 8 * half : 0;
        const float slope_of_products = alibi_slope * params.inverse_scale * params.float_step;
#pragma unroll
        for (int block = 0; block < kCols / 8; ++block)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float& x = scores.value[block][2 * half + i];
                const int column = Accumulator<kCols>::column(block, i), key = first + column;
                // Memory of a bias or a mask is read where rows exist.
                bool hidden = (kBand || kEdits & (kBias | kMaskArray)) && (column < start || column >= stop);
                float slope;
                if constexpr (Left<kEdits>::kCausalSlopes)
                    x = ptx::fma(slope_of_products, static_cast<float>(column), x);
                else if constexpr (Left<kEdits>::kRestOfTanh)
                    x = rest_of_tanh(x, softmax_scale, params);
                else if constexpr (Left<kEdits>::kNothing)
                    x = edited<kEdits>(x, token, head, key, alibi_slope, apart.at(column - shared), sequence, params,
                                       softmax_scale, hidden, slope);
                if (hidden) x = -ptx::infinity();
            }
    }
}

template <int kEdits, bool kBand, typename TwoRows, int kCols>
DEVICE void edit(Accumulator<kCols>& scores, const TwoRows& rows, int first_key, const Sequence& sequence,
                 const Params& params) {
    edit<kEdits, kBand>(scores, rows, first_key, sequence, params, params.softmax_scale);
}

// What the softmax multiplies such scores by, to make them exponents of two.
template <int kEdits>
DEVICE float scale_log2_of(float softmax_scale, const Params& params) {
    if constexpr (Left<kEdits>::kRestOfTanh) return 2.f * kLog2e * params.softcap;
    return Left<kEdits>::kNothing ? 1.f : softmax_scale * kLog2e;
}

// Has the softmax fold a lane's scores, as `edit` left them, and returns what it does.  So a softcap costs four
// instructions, and slopes where no key that is seen comes behind its row cost one.
template <int kEdits, bool kLazy = false, typename Exponential = FastExponential, int kShift = 0, typename TwoRows,
          int kCols>
DEVICE bool fold(OnlineSoftmax& softmax, Accumulator<kCols>& scores, const TwoRows& rows, int first_key,
                 const Sequence& sequence, const Params& params, float scale_log2, float (&shrink)[2]) {
    if constexpr (Left<kEdits>::kOffset) {
        const int first = first_key + Accumulator<kCols>::first_column();
        float offset[2] = {0.5f, 0.5f};
#pragma unroll
        for (int half = 0; half < 2 && Left<kEdits>::kCausalSlopes; ++half) {
            const float slope = alibi_slope_of<kEdits>(rows.head[half], sequence, params) * params.inverse_scale;
            if (TwoRows::kEightApart && half)
                offset[1] = ptx::fma(-8.f, slope * params.float_step, offset[0]);
            else
                offset[half] = slope * apart_at<kEdits>(rows.token[half], first, sequence, params).first;
        }
        return softmax.template fold<kLazy, Exponential, kShift, true>(scores, scale_log2, shrink, offset);
    } else {
        return softmax.template fold<kLazy, Exponential, kShift>(scores, scale_log2, shrink);
    }
}
// The same of `edited` ones.
template <int kEdits>
DEVICE float scale_log2_of_edited(const Params& params) {
    return kEdits & ~kDropout ? 1.f : params.softmax_scale * kLog2e;
}

}  // namespace cupyattn
