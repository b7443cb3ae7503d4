// append.cu: new keys and values into a cache, rotated on the way, and rotated queries beside it; in one launch.
//
//     k_new, v_new  [batch, seqlen_new, num_heads_kv, head_dim] or [total_new, ...], cut by cu_seqlens_k_new
//     k, v          [num_places, capacity, num_heads_kv, head_dim], or pages, found through block_table
//     q, q_rotated  [batch, seqlen_q, num_heads, head_dim] or [total_q, ...], cut by cu_seqlens_q
//     cos, sin      [positions, rotary_dim / 2], of any floating dtype
//
// A thread moves two numbers of one token and head: a pair that is rotated, or two neighbours that are not.  A token
// whose place lies outside of the cache is not written, and one whose position lies outside of the tables is not
// rotated, whatever the index arrays say.  Float8 is copied bit for bit; rotated, it is rounded to float8 again.
//
// Twin     appending.Appended, in NumPy; there wrong indices are refused.
// Needs    sm_80.
// Launch   one block per (token, part of its heads), those of k first, then of v, then of q; kAppendThreads threads.

#include "algorithm/params.cuh"
#include "tiles/numbers.cuh"

namespace cupyattn {

constexpr int kAppendThreads = 128;

struct AppendParams {
    const void *k_new, *v_new, *q;
    void *k, *v, *q_rotated;
    const void *cos, *sin;
    const int *cache_seqlens, *cache_batch_idx, *rotary_seqlens;  // [batch]
    const int *cu_seqlens_q, *cu_seqlens_k_new;                   // [batch + 1]
    const int* block_table;                                       // [batch, pages of a sequence]
    int64 cache_seqlen;                                           // of all sequences, without cache_seqlens
    Strides k_new_steps, v_new_steps, q_steps, k_steps, v_steps, q_rotated_steps;
    int64 cos_row, sin_row, block_table_row;
    int batch, seqlen_new, seqlen_q;     // of each sequence; without a meaning where there are cu_seqlens
    int num_new, num_rows;               // tokens of all sequences in k_new, in q; no rows: q is not rotated
    int num_heads, num_heads_k, num_heads_v;
    int head_dim, head_dim_v;
    int capacity, num_places;            // keys of a sequence, sequences of the cache
    int page_size, num_pages;            // 0: no pages
    int half, positions;                 // columns and rows of the tables
    int interleaved;                     // pairs are neighbours
    int each_row;                        // of q has a position of its own
    int table_dtype;                     // see number_at
    int parts_k, parts_v, parts_q;       // blocks of a token
};

// One token: the sequence it belongs to, or -1, and its number there.
struct Token {
    int sequence, number;
};

// By [starts[i], starts[i + 1]); tokens before the first start and behind the last one belong to nobody.
DEVICE Token token_at(int index, const int* starts, int each, int batch) {
    if (!starts) return {index / each, index % each};
    int low = 0, high = batch;  // the last start that is not behind the token is among [low, high]
    while (low < high) {
        const int middle = low + (high - low + 1) / 2;
        if (ptx::load_global(starts + middle) <= index)
            low = middle;
        else
            high = middle - 1;
    }
    if (low == batch) return {-1, 0};
    const int start = ptx::load_global(starts + low);
    if (start < 0 || start > index) return {-1, 0};
    return {low, index - start};
}

DEVICE int64 seqlen_of(int sequence, const AppendParams& params) {
    return params.cache_seqlens ? ptx::load_global(params.cache_seqlens + sequence) : params.cache_seqlen;
}

// Where a token's key, or value, lies from the cache's start; -1 if nowhere.
DEVICE int64 place_of(const Token& token, const Strides& steps, const AppendParams& params) {
    if (token.sequence < 0) return -1;
    const int64 key = seqlen_of(token.sequence, params) + token.number;
    if (key < 0 || key >= params.capacity) return -1;
    const int at = static_cast<int>(key);
    if (params.page_size) {
        const int* row = params.block_table + token.sequence * params.block_table_row;
        const int page = ptx::load_global(row + at / params.page_size);
        if (page < 0 || page >= params.num_pages) return -1;
        return page * steps.batch + at % params.page_size * steps.row;
    }
    const int place = params.cache_batch_idx ? ptx::load_global(params.cache_batch_idx + token.sequence) : token.sequence;
    if (place < 0 || place >= params.num_places) return -1;
    return place * steps.batch + at * steps.row;
}

// The row of the tables for a token, `steps` after its sequence's first; -1 if there is none.
DEVICE int position_of(int sequence, int steps, const AppendParams& params) {
    const int64 first =
        params.rotary_seqlens ? ptx::load_global(params.rotary_seqlens + sequence) : seqlen_of(sequence, params);
    const int64 position = first + steps;
    return position < 0 || position >= params.positions ? -1 : static_cast<int>(position);
}

// Copies this thread's two numbers of a head, rotated if they are a pair and there is a position.
template <typename Element>
DEVICE void move_pair(Element* to, const Element* from, int pair, int position, const AppendParams& params) {
    const bool rotates = position >= 0 && pair < params.half;
    const bool apart = rotates && !params.interleaved;
    const int first = apart ? pair : 2 * pair, second = apart ? pair + params.half : 2 * pair + 1;
    const Element a = ptx::load_global(from + first), b = ptx::load_global(from + second);
    if (!rotates) {
        ptx::store_global(to + first, a);
        ptx::store_global(to + second, b);
        return;
    }
    const float cos = number_at(params.cos, params.table_dtype, position * params.cos_row + pair);
    const float sin = number_at(params.sin, params.table_dtype, position * params.sin_row + pair);
    const float x = number_of(a), y = number_of(b);
    store_rounded(to + first, ptx::fma(x, cos, -(y * sin)));
    store_rounded(to + second, ptx::fma(x, sin, y * cos));
}

template <typename Element>
DEVICE void append_token(const void* from, const Strides& from_steps, void* to, const Strides& to_steps, int index,
                         int part, int num_heads, int head_dim, bool rotates, const AppendParams& params) {
    const int unit = part * kAppendThreads + ptx::thread(), head = unit / (head_dim / 2), pair = unit % (head_dim / 2);
    if (head >= num_heads) return;
    const Token token = token_at(index, params.cu_seqlens_k_new, params.seqlen_new, params.batch);
    const int64 place = place_of(token, to_steps, params);
    if (place < 0) return;
    const int64 row = params.cu_seqlens_k_new ? index * from_steps.row
                                              : token.sequence * from_steps.batch + token.number * from_steps.row;
    move_pair(static_cast<Element*>(to) + place + head * to_steps.head,
              static_cast<const Element*>(from) + row + head * from_steps.head, pair,
              rotates ? position_of(token.sequence, token.number, params) : -1, params);
}

template <typename Element>
DEVICE void rotate_row(int index, int part, const AppendParams& params) {
    const int pairs = params.head_dim / 2;
    const int unit = part * kAppendThreads + ptx::thread(), head = unit / pairs, pair = unit % pairs;
    if (head >= params.num_heads) return;
    const Token token = token_at(index, params.cu_seqlens_q, params.seqlen_q, params.batch);
    const bool packed = params.cu_seqlens_q;
    const int64 from = packed ? index * params.q_steps.row
                              : token.sequence * params.q_steps.batch + token.number * params.q_steps.row;
    const int64 to = packed ? index * params.q_rotated_steps.row
                            : token.sequence * params.q_rotated_steps.batch + token.number * params.q_rotated_steps.row;
    move_pair(static_cast<Element*>(params.q_rotated) + to + head * params.q_rotated_steps.head,
              static_cast<const Element*>(params.q) + from + head * params.q_steps.head, pair,
              token.sequence < 0 ? -1 : position_of(token.sequence, params.each_row ? token.number : 0, params), params);
}

template <typename Element>
__global__ void __launch_bounds__(kAppendThreads) append(const __grid_constant__ AppendParams params) {
    int block = ptx::block_x();
    if (block < params.num_new * params.parts_k)
        return append_token<Element>(params.k_new, params.k_new_steps, params.k, params.k_steps, block / params.parts_k,
                                     block % params.parts_k, params.num_heads_k, params.head_dim, params.positions > 0,
                                     params);
    block -= params.num_new * params.parts_k;
    if (block < params.num_new * params.parts_v)
        return append_token<Element>(params.v_new, params.v_new_steps, params.v, params.v_steps, block / params.parts_v,
                                     block % params.parts_v, params.num_heads_v, params.head_dim_v, false, params);
    block -= params.num_new * params.parts_v;
    rotate_row<Element>(block / params.parts_q, block % params.parts_q, params);
}

}  // namespace cupyattn
