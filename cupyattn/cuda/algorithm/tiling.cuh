// Which tile of which sequence a thread block has.  Twin: plan.tiling.
//
// Where sequences lie end to end only their number and their rows together are known before the launch.  In an array cut
// into tiles, sequence i begins in tile starts[i] / size; since a sequence that begins within a tile may reach one tile
// more than it has rows for, each is given one more than that: those from starts[i] / size + i on.  So the grid has few
// blocks in vain, and a block finds its sequence by a search, without the lengths of those before it.
#pragma once

#include "algorithm/mask.cuh"

namespace cupyattn {

// What others are divided by, by a multiplication: two instructions, and not the twenty and more for a number of which
// nothing is known before.  Of numbers below 2^31.  Twin: launching.launch.divisor.
struct Divisor {
    int value;
    uint32 multiplier;  // ceil(2^(32 + shift) / value)
    int shift;

    DEVICE_METHOD int quotient(int x) const {
        return value == 1 ? x : static_cast<int>(ptx::multiply_high(static_cast<uint32>(x), multiplier) >> shift);
    }
};

// A sequence's tiles among those of all: [first, first + count).  The last ones may lie behind its end.
struct Stretch {
    int sequence, first, count;
};

// How sequences are cut into tiles of `size` rows.
struct Tiling {
    const int* starts;
    int total;  // tokens
    int sequences;
    int tiles;  // of all sequences
    int each;   // of each sequence, whatever its length is; 0: by `starts`
    int size;
    int heads = 1;  // of a token, each a row

    DEVICE_METHOD int start_of(int sequence) const {
        return smaller(larger(ptx::load_global(starts + sequence), 0), total) * heads;
    }
    // The first one begins with the first tile, wherever it lies; the last one ends with the last.
    DEVICE_METHOD int first_of(int sequence) const {
        if (sequence == sequences) return tiles;
        return sequence == 0 ? 0 : start_of(sequence) / size + sequence;
    }
    DEVICE_METHOD Stretch stretch_of(int sequence) const {
        if (each) return {sequence, sequence * each, each};
        const int first = first_of(sequence);
        return {sequence, first, first_of(sequence + 1) - first};
    }
    // Whether its tiles begin there or before: first_of(sequence) <= tile.
    DEVICE_METHOD bool begins_by(int sequence, int tile) const {
        return start_of(sequence) < static_cast<int64>(tile - sequence + 1) * size;
    }
    // The sequence that has this tile, by a whole warp.  Whatever the numbers in `starts` are, its tiles begin there or
    // before, and those of the next one behind.  A warp looks at 32 places at once: of up to 1089 sequences in two rounds,
    // where a search by halves waits for memory ten times, one load after the other.
    DEVICE_METHOD int sequence_with(int tile) const {
        if (each) return tile / each;
        int low = 0, high = sequences;
#pragma unroll 1
        while (high - low > 1) {
            constexpr int kSpans = 33;
            const int step = ceil_div(high - low, kSpans), place = low + (ptx::lane() + 1) * step;
            const int before = ptx::first_lane(place >= high || !begins_by(place, tile));  // places that its tiles begin by
            high = smaller(low + (before + 1) * step, high);
            low += before * step;
        }
        return low;
    }
};

// Of sequences not longer than `longest` tokens.  Each has the tiles of the longest one if those are no more.
DEVICE Tiling tiling_of(const int* starts, int64 total, int sequences, int longest, int size, int heads = 1) {
    const int tokens = static_cast<int>(total), each = larger(1, ceil_div(longest * heads, size));
    const int by_starts = tokens * heads / size + sequences;
    const bool even = !starts || static_cast<int64>(sequences) * each <= by_starts;
    return {starts, tokens, sequences, by_starts, even ? each : 0, size, heads};
}

// Of queries; one more sequence wipes the rows behind the last one.
DEVICE int sequences_of_rows(const Params& params) { return params.batch + (params.at.cu_seqlens_q ? 1 : 0); }

// A block's tile, of all that a sequence has for each of some owners: heads, or groups of them.  By whole warps.
struct Place {
    int sequence, owner, tile, tiles;
};
DEVICE Place place_of(int block, int owners, const Tiling& tiling) {
    const Stretch its = tiling.stretch_of(tiling.sequence_with(block / owners));
    const int rest = block - its.first * owners;
    return {its.sequence, rest / its.count, rest % its.count, its.count};
}

// The tile that a block takes in a round. Where tiles have less and less to do, rounds go through the blocks forth and
// back, so that nobody has the longest tile of each.
template <bool kForthAndBack>
DEVICE uint32 tile_of_round(uint32 round, uint32 block, uint32 blocks) {
    return round * blocks + (kForthAndBack && round % 2 ? blocks - 1 - block : block);
}

}  // namespace cupyattn
