// What float8 numbers are multiples of, by sequence and head of keys or values.
#pragma once

#include "algorithm/params.cuh"
#include "instructions/ptx.cuh"

namespace cupyattn {

DEVICE float descale(const float* factors, int64 index) { return factors ? ptx::load_global(factors + index) : 1.f; }

// Of a query head: the softmax scale times what queries and keys are multiples of, and what tiles of both are besides.
template <int kEdits>
DEVICE float descaled_scale(const DescaledParams& params, int64 sequence, int query_head, float of_tiles = 1.f) {
    const int64 head = query_head / params.queries_per_k;
    const float product = params.softmax_scale *
                          descale(params.q_descale, sequence * params.q_descale_batch + head * params.q_descale_head) *
                          descale(params.k_descale, sequence * params.k_descale_batch + head * params.k_descale_head);
    if constexpr (bool(kEdits & ~kDropout)) return product * of_tiles;  // scores are scaled before the largest is taken
    // Times a negative number the largest product is not the largest score: rather nan than wrong.
    return product >= 0.f ? ptx::max(product * of_tiles, kLeastNormal) : ptx::nan();
}
// Of a query head: what values are multiples of.
DEVICE float descale_of_values(const DescaledParams& params, int64 sequence, int query_head) {
    const int64 head = query_head / params.queries_per_v;
    return descale(params.v_descale, sequence * params.v_descale_batch + head * params.v_descale_head);
}

}  // namespace cupyattn
