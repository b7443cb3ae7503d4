// Which keys of which rows a thread block has, where lengths are data.  Twin: plan.schedule, which has a picture.
//
// Pieces, rows that share their keys, lie end to end on a line, each as long as its sequence has blocks of keys that
// anybody sees, and kOverhead more; every thread block has an equal share.  schedule.cu writes down where sequences
// begin.  That is taken for where to cut, and for nothing else: the last split of a piece has all blocks to its end, and
// numbers made for other lengths, by as many sequences and thread blocks, lead to other cuts and to the same results.
// Whatever numbers they are, no thread block leaves more than two partial results, in its own places.
#pragma once

#include "algorithm/splits.cuh"
#include "algorithm/tiling.cuh"

namespace cupyattn {

constexpr int kOverhead = 1;  // blocks of keys that it takes to begin and to end a piece
// Instead of the keys of a split: pieces are cut where shares end; into even splits, as many as may be.
constexpr int kByShares = 0, kEven = -1;

DEVICE int64 smaller(int64 a, int64 b) { return a < b ? a : b; }
DEVICE int64 larger(int64 a, int64 b) { return a > b ? a : b; }

// Positions on the line.
struct Stretch64 {
    int64 start, stop;
};

// A piece there; blocks of keys, without the overhead.
struct LinePiece {
    int64 start;
    int length;
};

struct Schedule {
    int* words;  // share and starts of two each, then the first sequence of each thread block
    int sequences, blocks;

    DEVICE_METHOD explicit Schedule(const Params& params)
        : words(params.at.schedule), sequences(sequences_of_rows(params)), blocks(params.num_slots) {}

    DEVICE_METHOD int64* wide() const { return reinterpret_cast<int64*>(words); }
    DEVICE_METHOD int64* starts() const { return wide() + 1; }
    DEVICE_METHOD int* first() const { return words + 2 * (sequences + 2); }

    // Within what sums and products of them have room for, as all that was made for any call is.
    DEVICE_METHOD int64 share() const { return bounded(ptx::load_global(wide()), 1, int64(1) << 40); }
    DEVICE_METHOD int64 start_of(int sequence) const {
        return bounded(ptx::load_global(starts() + sequence), 0, int64(1) << 60);
    }
    DEVICE_METHOD static int64 bounded(int64 number, int64 least, int64 most) {
        return smaller(larger(number, least), most);
    }
    DEVICE_METHOD int first_of(int block) const {
        return smaller(larger(ptx::load_global(first() + block), 0), sequences);
    }

    // A thread block's; the first and the last one have all that is before and behind.
    DEVICE_METHOD Stretch64 share_of(int block) const {
        constexpr int64 kEnd = int64(1) << 62;
        const int64 each = share();
        return {block == 0 ? -kEnd : block * each, block == blocks - 1 ? kEnd : (block + 1) * each};
    }
    DEVICE_METHOD int owner_of(int64 position) const {
        return static_cast<int>(larger(smaller(position / share(), int64(blocks - 1)), int64(0)));
    }

    // What a piece of the sequence takes of the line.
    DEVICE_METHOD int64 step_of(int sequence, int pieces) const {
        return larger(start_of(sequence + 1) - start_of(sequence), int64(0)) / larger(pieces, 1);
    }
    DEVICE_METHOD LinePiece piece_of(int64 start, int64 step, int piece) const {
        return {start + piece * step, capped(larger(step - kOverhead, int64(0)))};
    }
};

// Tiles of a sequence's packed rows.
DEVICE int row_tiles_of(int seqlen_q, int heads, int block_q) { return ceil_div(seqlen_q * heads, block_q); }

// The blocks of keys that any row of a sequence sees.
DEVICE Span blocks_of(const Band& band, int block_k) {
    if (band.seqlen_q <= 0) return {0, 0};
    const Span touched = band.touched(0, band.seqlen_q - 1);
    return touched.empty() ? Span{0, 0} : Span{touched.start / block_k, ceil_div(touched.stop, block_k)};
}

// The blocks of a piece, from the first one of its sequence on, that a share has where pieces are cut by shares.
struct Cut {
    bool is_there, is_first, is_whole;
    Span part;
};
DEVICE Cut cut_at(const LinePiece& piece, const Stretch64& share) {
    const int64 last = piece.start + larger(piece.length, 1) - 1;
    const bool begins = piece.start >= share.start, ends = last < share.stop;
    const int start = begins ? 0 : static_cast<int>(smaller(share.start - piece.start, int64(piece.length)));
    const int stop = ends ? kLargest : static_cast<int>(share.stop - piece.start);
    return {piece.start < share.stop && last >= share.start, begins, begins && ends, {start, stop}};
}

// The splits that begin within a share, of `count` of a piece, `each` so many blocks long.
DEVICE Span splits_within(const LinePiece& piece, int count, int each, const Stretch64& share) {
    const int64 last = larger(piece.length, 1) - 1, from = share.start - piece.start, to = share.stop - piece.start;
    // The first split that begins at a place or behind it; what would begin behind the piece's end begins there.
    const auto first_from = [&](int64 place) {
        if (place <= 0) return 0;
        return place > last ? count : smaller(count, ceil_div(static_cast<int>(place), larger(each, 1)));
    };
    return {first_from(from), first_from(to)};
}

}  // namespace cupyattn
