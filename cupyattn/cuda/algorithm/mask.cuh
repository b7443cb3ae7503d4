// Who sees whom: integer spans of keys.  Twin: problem.Mask.
//
// No sum or difference wraps, whatever branch it stands in: compilers think that signed numbers never do, and compute
// what a branch guards without it.  Lengths and windows are at most kOpen, so that two of them and a tile fit an int.
#pragma once

#include "algorithm/params.cuh"
#include "instructions/ptx.cuh"

namespace cupyattn {

// The half-open range from start up to stop; empty if stop <= start.
struct Span {
    int start, stop;

    DEVICE_METHOD bool has(int index) const { return start <= index && index < stop; }
    DEVICE_METHOD bool empty() const { return stop <= start; }
};

// One sequence's lengths and the band around its diagonal.
struct Band {
    int seqlen_q, seqlen_k;
    int left, right;
    int offset;  // the key on the diagonal of row 0

    // The keys that query `row` sees.
    DEVICE_METHOD Span visible_keys(int row) const {
        const int diagonal = row + offset;
        const int start = larger(diagonal - left, 0);
        const int stop = right == kOpen ? seqlen_k : smaller(seqlen_k, add_capped(diagonal, right) + 1);
        return {start, stop};
    }
    // The keys that at least one of rows [first, last] sees; the band is monotone, so they are one span.
    DEVICE_METHOD Span touched(int first, int last) const {
        return {visible_keys(first).start, visible_keys(last).stop};
    }
    // The keys that every one of these rows sees.
    DEVICE_METHOD Span whole(int first, int last) const {
        return {visible_keys(last).start, visible_keys(first).stop};
    }
    // The queries that see key `key`.  Nothing wraps: the diagonal of a key is a row or at most kOpen in front of one.
    DEVICE_METHOD Span seeing_rows(int key) const {
        const int diagonal = key - offset;
        const int start = right == kOpen ? 0 : larger(diagonal - right, 0);
        const int stop = left == kOpen ? seqlen_q : smaller(seqlen_q, add_capped(diagonal, left) + 1);
        return {start, stop};
    }
    // The queries that see at least one of keys [first, last], and those that see every one.
    DEVICE_METHOD Span touching(int first, int last) const {
        return {seeing_rows(first).start, seeing_rows(last).stop};
    }
    DEVICE_METHOD Span seeing_all(int first, int last) const {
        return {seeing_rows(last).start, seeing_rows(first).stop};
    }
    // a + b for b >= 0, at most the last key that there can be.  A sum alone would not wrap either, but what NVRTC makes
    // of it spills in Hopper's float8 kernels, and so does a stop that is computed before the start.
    DEVICE_METHOD static int add_capped(int a, int b) { return a > 0 && b > kOpen - 1 - a ? kOpen - 1 : a + b; }
};

// Where a sequence's rows and keys lie, and its band.
struct Sequence {
    int index;
    int place;        // among the sequences of k and v
    int64 first_row;  // within q and out: rows before this sequence's
    int64 first_key;  // within k and v; of pages and caches, behind the padding on the left
    Band band;
};

// Part of `total` rows or keys: [starts[index], starts[index + 1]), kept inside whatever the numbers there say.
DEVICE Span packed(const int* starts, int index, int64 total, int longest) {
    const int end = static_cast<int>(total);
    const int start = smaller(larger(ptx::load_global(starts + index), 0), end);
    const int stop = smaller(larger(ptx::load_global(starts + index + 1), start), end);
    return {start, smaller(stop, start + smaller(longest, end - start))};
}

// The live keys of a sequence of a cache, those that are being appended among them; none outside of the cache.
DEVICE Span cached(int index, const Params& params) {
    int64 stop = params.at.cache_seqlens ? ptx::load_global(params.at.cache_seqlens + index) : params.at.cache_seqlen;
    if (params.at.cu_seqlens_k_new) {
        const Span tokens = packed(params.at.cu_seqlens_k_new, index, params.seqlen_new, params.seqlen_new);
        stop += tokens.stop - tokens.start;
    } else {
        stop += params.seqlen_new;
    }
    const int end = stop < params.seqlen_k ? static_cast<int>(stop) : params.seqlen_k;
    const int start = params.at.cache_leftpad ? ptx::load_global(params.at.cache_leftpad + index) : 0;
    return {smaller(larger(start, 0), end), end};
}

// The sequence of this index.  Behind the last one come the rows that belong to none, which see no keys.
DEVICE Sequence sequence_at(int index, const Params& params) {
    Sequence found{index, index, 0, 0, {params.seqlen_q, params.seqlen_k, params.left, params.right, 0}};
    if (params.at.cu_seqlens_q) {
        Span rows{0, static_cast<int>(params.total_q)};
        if (index < params.batch)
            rows = packed(params.at.cu_seqlens_q, index, params.total_q, params.seqlen_q);
        else
            rows.start = smaller(larger(ptx::load_global(params.at.cu_seqlens_q + index), 0), rows.stop);
        found.first_row = rows.start;
        found.band.seqlen_q = rows.stop - rows.start;
    }
    if (index == params.batch) {
        found.band.seqlen_k = 0;
    } else if (params.num_places != kNoCache) {
        Span keys = cached(index, params);
        if (params.at.cache_batch_idx) found.place = ptx::load_global(params.at.cache_batch_idx + index);
        if (found.place < 0 || found.place >= params.num_places) found.place = 0, keys.stop = keys.start;
        found.first_key = keys.start;
        found.band.seqlen_k = keys.stop - keys.start;
    } else if (params.at.cu_seqlens_k) {
        // The keys of pages lie anywhere; only their number is told.
        const int64 total = params.at.block_table ? kLargest : params.total_k;
        const Span keys = packed(params.at.cu_seqlens_k, index, total, params.seqlen_k);
        found.first_key = params.at.block_table ? 0 : keys.start;
        found.band.seqlen_k = keys.stop - keys.start;
    }
    if (params.bottom_right) found.band.offset = found.band.seqlen_k - found.band.seqlen_q;
    return found;
}

}  // namespace cupyattn
