// Tiles in shared memory, and how they are filled from global memory.
//
// Nothing here knows of attention.
#pragma once

#include "tiles/numbers.cuh"

namespace cupyattn {

// A tile of kRows x kCols elements in shared memory, one 16-bit plane after the other.
//
// A plane is cut into slabs of 32 columns, a row of a slab is 64 bytes, four chunks of 16.  So that eight rows of
// one chunk (ldmatrix) and eight chunks of one row (copies) fall into different banks, chunks trade places within
// a row by (row / 2) % 4, and neighbouring rows trade places in every other slab.
template <typename Element, int kRows_, int kCols_>
struct SharedTile {
    static constexpr int kRows = kRows_, kCols = kCols_, kNumPlanes = Planes<Element>::kCount;
    static constexpr int kPerChunk = 8;  // elements that a thread loads at a time
    static constexpr int kSlab = kRows * 64;
    static constexpr int kPlane = kRows * kCols * 2;
    static constexpr int kBytes = kNumPlanes * kPlane;
    static_assert(kCols % 32 == 0, "a tile is made of slabs of 32 columns");
    static_assert(kRows % 16 == 0, "fragments have 16 rows");

    uint32 base;  // a multiple of 128

    // The address of 8 elements: columns 8 * chunk and on.
    DEVICE_METHOD uint32 address(int row, int chunk) const {
        const int slab = chunk / 4;
        return base + slab * kSlab + ((row ^ (slab & 1)) << 6) + (((chunk ^ (row >> 1)) & 3) << 4);
    }
    // From the address of (row, chunk), chunk 0 or 1, to that of the same row 16 * step columns further.
    DEVICE_METHOD static uint32 advance(uint32 address, int step) {
        return (address ^ ((step & 1) << 5) ^ ((step & 2) << 5)) + (step / 2) * kSlab;
    }
    // From there 16 * blocks rows down.
    DEVICE_METHOD static constexpr int down(int blocks) { return blocks * 16 * 64; }
};

// A tile of numbers of any size as they come from memory, 16 bytes to a chunk, for those who make halves or planes of
// them in registers, see raw.cuh.  Columns beyond kCols, up to whole slabs, are zeros.
template <typename Element, int kRows_, int kCols_>
struct RawTile : SharedTile<Half, kRows_, ceil_div(kCols_ * static_cast<int>(sizeof(Element)), 64) * 32> {
    static constexpr int kPerChunk = 16 / sizeof(Element);
};

// ---- From global to shared memory -------------------------------------------------------------------

DEVICE uint32 bits_of(float x) { return ptx::bits(x); }
template <typename Element>
DEVICE uint32 bits_of(Element x) {
    return x.bits;
}

// A chunk of a tile on its way.  What does not go by itself waits in registers between `load` and `store`, so that a
// thread has several of them under way.
template <bool kAligned, typename Tile, typename Element>
struct Chunk {
    static constexpr bool kAsync = kAligned && Tile::kNumPlanes == 1;
    static constexpr int kPerWord = 4 / sizeof(Element), kWords = Tile::kPerChunk / kPerWord;

    uint32 word[Tile::kNumPlanes][4];  // as they come, and then of planes

    DEVICE_METHOD void clear() {
#pragma unroll
        for (int i = 0; i < 4 * Tile::kNumPlanes; ++i) word[i / 4][i % 4] = 0u;
    }
    // The first `count` elements; what is behind them stays as it is.
    DEVICE_METHOD void load(const Element* from, int count) {
        if constexpr (kAligned) {
#pragma unroll
            for (int i = 0; i < kWords / 4; ++i) ptx::load_global(word[i], from + 4 * kPerWord * i);
        } else {
#pragma unroll
            for (int i = 0; i < Tile::kPerChunk; ++i) {
                uint32& part = word[i / (4 * kPerWord)][i / kPerWord % 4];
                if (i < count) part |= bits_of(ptx::load_global(from + i)) << 32 / kPerWord * (i % kPerWord);
            }
        }
    }
    DEVICE_METHOD void split_planes() {
        if constexpr (Tile::kNumPlanes == 3) {
            float x[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) x[i] = ptx::from_bits(word[i / 4][i % 4]);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                uint32 planes[3];
                split_pair(x[2 * i], x[2 * i + 1], planes);
#pragma unroll
                for (int plane = 0; plane < 3; ++plane) word[plane][i] = planes[plane];
            }
        }
    }
    DEVICE_METHOD void store(uint32 to) const {
#pragma unroll
        for (int plane = 0; plane < Tile::kNumPlanes; ++plane) {
            const uint32(&x)[4] = word[plane];
            ptx::store_shared(to + plane * Tile::kPlane, x[0], x[1], x[2], x[3]);
        }
    }
};

// Where a thread puts its share of a tile: kThreads threads, several to a row, 16 bytes each at a time.
template <typename Tile, int kThreads>
struct Share {
    static constexpr int kLanes = Tile::kCols % 64 == 0 ? 8 : 4;  // threads to a row
    static constexpr int kGroups = Tile::kCols / (8 * kLanes);
    static constexpr int kRowsAtOnce = kThreads / kLanes;
    static constexpr int kPasses = ceil_div(Tile::kRows, kRowsAtOnce);

    int row, chunk;  // of the first pass and group
    uint32 first;    // their address

    DEVICE_METHOD Share(const Tile& tile, int thread) : row(thread / kLanes), chunk(thread % kLanes) {
        first = tile.address(row, chunk);
    }
    // The address in the given pass and group; written so that nearly all of it is a constant.
    DEVICE_METHOD uint32 address(const Tile& tile, int pass, int group) const {
        if constexpr (kRowsAtOnce % 8 != 0) return tile.address(row + pass * kRowsAtOnce, chunk + group * kLanes);
        const uint32 there = first + pass * kRowsAtOnce * 64;
        return kLanes == 8 ? there + group * 2 * Tile::kSlab : (there ^ (group & 1) << 6) + group * Tile::kSlab;
    }
    // Some tiles have fewer rows than there are threads for.
    DEVICE_METHOD bool idle(int pass) const {
        return Tile::kRows % kRowsAtOnce != 0 && row + pass * kRowsAtOnce >= Tile::kRows;
    }
};

// Where a thread's part of a row begins, and whether there is such a row.
template <typename Element>
struct RowPart {
    const Element* from;
    bool exists;
};

// Fills a tile by the rows that `row_of(pass)` gives, asked for each pass once and in order; zeros where there is none,
// and behind columns [0, num_cols), a multiple of 8.  What does not go by itself takes up to kRegisters of a thread.
template <bool kAligned, int kRegisters, typename Element, typename Tile, typename Its, typename RowOf>
DEVICE void fill(const Tile& tile, const Its& share, int num_cols, const RowOf& row_of) {
    using Part = Chunk<kAligned, Tile, Element>;
    constexpr int kPerChunk = Tile::kPerChunk, kPlaces = Its::kPasses * Its::kGroups;
    constexpr int kAtOnce = Part::kAsync ? 1 : larger(1, kRegisters / Part::kWords);
    RowPart<Element> row;
#pragma unroll
    for (int first = 0; first < kPlaces; first += kAtOnce) {
        Part parts[kAtOnce];
#pragma unroll
        for (int place = first; place < smaller(first + kAtOnce, kPlaces); ++place) {
            const int pass = place / Its::kGroups, group = place % Its::kGroups;
            if (group == 0) row = row_of(pass);  // of an idle one, too, for which it would be kept otherwise
            if (share.idle(pass)) break;
            const int column = kPerChunk * (share.chunk + Its::kLanes * group);
            const int count = kPerChunk == 16 ? smaller(16, num_cols - column) : kPerChunk;
            const int found = row.exists && column < num_cols ? count : 0;
            const Element* from = row.from + kPerChunk * Its::kLanes * group;
            if constexpr (Part::kAsync) {
                ptx::copy_async(share.address(tile, pass, group), from, found * static_cast<int>(sizeof(Element)));
            } else {
                Part& part = parts[place - first];
                part.clear();
                if (found) {
                    part.load(from, found);
                    if constexpr (kAtOnce == 1) part.split_planes();
                }
            }
        }
        if constexpr (Part::kAsync) continue;
#pragma unroll
        for (int place = first; place < smaller(first + kAtOnce, kPlaces); ++place) {
            const int pass = place / Its::kGroups, group = place % Its::kGroups;
            if (share.idle(pass)) break;
            if constexpr (kAtOnce > 1) parts[place - first].split_planes();
            parts[place - first].store(share.address(tile, pass, group));
        }
    }
}

// Fills a tile with rows [0, num_rows) and columns [0, num_cols) of memory, and zeros beyond; by kThreads threads,
// who then have to commit, wait and meet.
template <int kThreads, bool kAligned, int kRegisters = 32, typename Tile, typename Element>
DEVICE void load_rows(const Tile& tile, int thread, int num_rows, int num_cols, const Element* from, int64 row_stride) {
    using Its = Share<Tile, kThreads>;
    const Its share(tile, thread);
    from += share.row * row_stride + Tile::kPerChunk * share.chunk;
    fill<kAligned, kRegisters, Element>(tile, share, num_cols, [&](int pass) {
        const RowPart<Element> row{from, share.row + pass * Its::kRowsAtOnce < num_rows};
        from += Its::kRowsAtOnce * row_stride;
        return row;
    });
}

// The same for rows that lie anywhere: `row_address(row)` is asked for rows below num_rows; null is a row of zeros.
template <int kThreads, bool kAligned, int kRegisters = 32, typename Tile, typename Element, typename RowAddress>
DEVICE void load_rows_from(const Tile& tile, int thread, int num_rows, int num_cols, const Element* anywhere,
                           const RowAddress& row_address) {
    using Its = Share<Tile, kThreads>;
    const Its share(tile, thread);
    fill<kAligned, kRegisters, Element>(tile, share, num_cols, [&](int pass) {
        const int row = share.row + pass * Its::kRowsAtOnce;
        const Element* found = row < num_rows ? row_address(row) : nullptr;
        return RowPart<Element>{(found ? found : anywhere) + Tile::kPerChunk * share.chunk, found != nullptr};
    });
}

}  // namespace cupyattn
