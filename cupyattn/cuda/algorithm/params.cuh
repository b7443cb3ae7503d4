// What a launch is told: one record by value, made by cuda/params.py field for field.
//
// Strides count elements.  Fields go from wide to narrow, so that there is no padding to disagree about.
#pragma once

#include "instructions/common.cuh"

namespace cupyattn {

// What changes from call to call.  Pointers are null where the call has no such thing.
struct Pointers {
    const void *q, *k, *v;
    void* out;
    float* lse;
    const uint8* mask;  // 0: not seen
    const void* bias;
    const int *cu_seqlens_q, *cu_seqlens_k;  // [batch + 1]
    const int* block_table;                  // [batch, pages of a sequence]
    const int *cache_seqlens, *cache_batch_idx, *cache_leftpad;  // [batch], of a cache
    const int* cu_seqlens_k_new;                                 // [batch + 1], of what is appended to it
    int64 cache_seqlen;                                          // of all sequences, without cache_seqlens
    const float* alibi_slopes;
    const float* sinks;                // [num_heads]
    float *partial_out, *partial_lse;  // what splits leave for their merge, see merge.cu
    int* told;                         // by each of them
    int* schedule;                     // whose work is what; null: a thread block for each split, see schedule.cuh
    uint64 dropout_seed;
};

// Of q, k, v or out: from sequence to sequence (or page to page), row to row, head to head.  Within a head
// numbers are contiguous.
struct Strides {
    int64 batch, row, head;
};

// Of what is broadcast to the scores, by strides of zero.
struct ScoreStrides {
    int64 batch, head, row, key;
};

struct Params {
    Pointers at;
    Strides q, k, v, out;
    ScoreStrides mask, bias;
    int64 lse_batch, lse_head;
    int64 block_table_row;
    int64 alibi_slopes_batch;
    int64 total_q, total_k;  // rows of q and k if there are cu_seqlens
    int batch, num_heads;
    int seqlen_q, seqlen_k;  // the longest ones, if there are cu_seqlens
    int head_dim, head_dim_v;
    int queries_per_k, queries_per_v;  // query heads that share a key head, a value head
    int queries_per_pair;              // neighbouring query heads that share both
    int left, right;                   // keys seen before and after the diagonal; kOpen: all
    int bottom_right;                  // the diagonal ends at the last key of the last row
    int page_size, num_pages;
    int num_places;  // sequences that k and v have room for, if they are a cache; otherwise kNoCache
    int seqlen_new;  // appended to each sequence of a cache; to all together, if there are cu_seqlens_k_new
    int bias_dtype;  // see number_at
    int split_size;  // keys of a split; 0: found on the device, from the lengths there; kEven, see schedule.cuh
    int num_splits;  // of the grid
    int num_slots;   // thread blocks that fill the GPU once; those of the grid, where there is a schedule
    uint32 dropout_threshold;
    float dropout_factor;  // 1 / (1 - p)
    float softmax_scale;
    float softcap;
    int distance_step, distance_shift;  // of ALiBi: |step * (a row's diagonal - key) + shift| tokens; 1 and 0 as a rule
    float float_step, inverse_scale;    // that step, and 1 / softmax_scale where slopes are divided by it
};

// Of a kernel that may be for float8.
struct DescaledParams : Params {
    const float *q_descale, *k_descale, *v_descale;  // what float8 numbers are multiples of; null: 1
    // Elements from sequence to sequence and head to head (of keys, or values) of those.
    int q_descale_batch, q_descale_head, k_descale_batch, k_descale_head, v_descale_batch, v_descale_head;
};

// Of merge.cu and schedule.cu: how rows lie in pieces, whose splits are merged.
struct MergeParams : DescaledParams {
    int block_q;         // rows that a piece has room for
    int rows_per_piece;  // that it has: rows are (token, head of the unit), the head fastest
    int heads_per_unit;
    int pieces_per_unit;  // of the longest sequence
    int columns;          // of a partial result: head_dim_v as padded
    int mends;            // values that are not finite were taken for 0, and have to be put where they are seen
    float of_columns;     // what partial results have to be multiplied by, besides descales
    int block_k;          // keys of a block
    int fewest_keys;      // of a split, unless there are fewer or it was asked for
};

// Of the kernels for gradients.  What has no gradient here, or is not asked for, is null.
struct Gradients {
    const void* dout;
    const float* dlse;         // as lse lies, like all that follow up to sink_rows
    float *lse_log2, *delta;   // of each row, see backward_rows.cu
    float* sink_rows;          // what each row adds to the gradient of its head's sink
    float* slope_parts;        // [batch, num_heads, 16 rows]: what these add to that of an ALiBi slope; of whole 128
    int* flags;                // of hopper_backward.cu's blocks
    void *dq, *dk, *dv, *dbias;
    Strides of_dout, of_dq, of_dk, of_dv;
    ScoreStrides of_dbias;
    int bias_batch, bias_heads, bias_rows, bias_keys;  // how many of each the bias has; 1: it is repeated
    int heads_per_block;                               // query heads that share keys or values and have one block
    int queries_per_dk, queries_per_dv;                // query heads that are summed: a share of queries_per_k, or all
    int dq_dtype, dk_dtype, dv_dtype, dbias_dtype;     // see number_at
};

struct BackwardParams : Params {
    Gradients grad;
};

constexpr int kOpen = (1 << 30) - (1 << 10);  // no sequence has more rows or keys: plan.LONGEST
constexpr int kNoCache = -1;

// What happens to scores before the softmax; bits of a trait, since each changes the machine code.
enum Edit {
    kScaleFirst = 1,  // multiply by the scale at once, not inside the exponential; all others imply it
    kSoftcap = 2,
    kAlibi = 4,
    kBias = 8,
    kMaskArray = 16,
    kDropout = 32,
    kLowCap = 64,         // of softcaps: so low that 1 - 2 / (exp(2 x) + 1) is tanh(x) well enough
    kCausalAlibi = 128,   // of slopes: no distance of a key that is seen is below 0, and nothing else of scores is edited
};

}  // namespace cupyattn
