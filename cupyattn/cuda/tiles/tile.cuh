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
    static constexpr int kRows = kRows_, kCols = kCols_;
    static constexpr int kSlab = kRows * 64;
    static constexpr int kPlane = kRows * kCols * 2;
    static constexpr int kBytes = Planes<Element>::kCount * kPlane;
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

// ---- From global to shared memory -------------------------------------------------------------------

// Eight elements into a tile, float8 as halves; zeros if not `valid`.
template <bool kAligned, typename Tile, typename Element>
DEVICE void load_chunk(uint32 to, const Element* from, bool valid) {
    if constexpr (Same<Element, float>::value) {
        uint32 planes[3][4] = {};
        if (valid) {
            float x[8];
            if constexpr (kAligned) {
                uint32 half[2][4];
                ptx::load_global(half[0], from);
                ptx::load_global(half[1], from + 4);
#pragma unroll
                for (int i = 0; i < 8; ++i) x[i] = ptx::from_bits(half[i / 4][i % 4]);
            } else {
#pragma unroll
                for (int i = 0; i < 8; ++i) x[i] = ptx::load_global(from + i);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float a[3], b[3];
                split(x[2 * i], a[0], a[1], a[2]);
                split(x[2 * i + 1], b[0], b[1], b[2]);
#pragma unroll
                for (int plane = 0; plane < 3; ++plane) planes[plane][i] = pack_exact(a[plane], b[plane]);
            }
        }
#pragma unroll
        for (int plane = 0; plane < 3; ++plane) {
            const uint32(&x)[4] = planes[plane];
            ptx::store_shared(to + plane * Tile::kPlane, x[0], x[1], x[2], x[3]);
        }
    } else if constexpr (Same<Element, Float8>::value) {
        uint32 x[4] = {};
        if (valid) {
            uint32 four[2] = {};
            if constexpr (kAligned)
                ptx::load_global(four, from);
            else
#pragma unroll
                for (int i = 0; i < 8; ++i) four[i / 4] |= static_cast<uint32>(ptx::load_global(from + i).bits) << 8 * (i % 4);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint32 two = four[i / 2] >> 16 * (i % 2);
                x[i] = halves_of((two & 0xffu) << 8 | (two & 0xff00u) << 16);
            }
        }
        ptx::store_shared(to, x[0], x[1], x[2], x[3]);
    } else if constexpr (kAligned) {
        ptx::copy_async(to, from, valid);
    } else {
        uint32 x[4] = {};
        if (valid) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint32 low = ptx::load_global(from + 2 * i).bits, high = ptx::load_global(from + 2 * i + 1).bits;
                x[i] = low | high << 16;
            }
        }
        ptx::store_shared(to, x[0], x[1], x[2], x[3]);
    }
}

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

// Fills a tile with rows [0, num_rows) and columns [0, num_cols) of memory, and zeros beyond; by kThreads threads,
// who then have to commit, wait and meet.
template <int kThreads, bool kAligned, typename Tile, typename Element>
DEVICE void load_rows(const Tile& tile, int thread, int num_rows, int num_cols, const Element* from, int64 row_stride) {
    using Its = Share<Tile, kThreads>;
    const Its share(tile, thread);
    from += share.row * row_stride + 8 * share.chunk;
#pragma unroll
    for (int pass = 0; pass < Its::kPasses; ++pass) {
        if (share.idle(pass)) break;
        const bool exists = share.row + pass * Its::kRowsAtOnce < num_rows;
#pragma unroll
        for (int group = 0; group < Its::kGroups; ++group)
            load_chunk<kAligned, Tile>(share.address(tile, pass, group), from + 8 * Its::kLanes * group,
                                       exists && 8 * (share.chunk + Its::kLanes * group) < num_cols);
        from += Its::kRowsAtOnce * row_stride;
    }
}

// The same for rows that lie anywhere: `row_address(row)` is asked for rows below num_rows; null is a row of zeros.
template <int kThreads, bool kAligned, typename Tile, typename Element, typename RowAddress>
DEVICE void load_rows_from(const Tile& tile, int thread, int num_rows, int num_cols, const Element* anywhere,
                           const RowAddress& row_address) {
    using Its = Share<Tile, kThreads>;
    const Its share(tile, thread);
#pragma unroll
    for (int pass = 0; pass < Its::kPasses; ++pass) {
        if (share.idle(pass)) break;
        const int row = share.row + pass * Its::kRowsAtOnce;
        const Element* found = row < num_rows ? row_address(row) : nullptr;
        const Element* from = (found ? found : anywhere) + 8 * share.chunk;
#pragma unroll
        for (int group = 0; group < Its::kGroups; ++group)
            load_chunk<kAligned, Tile>(share.address(tile, pass, group), from + 8 * Its::kLanes * group,
                                       found && 8 * (share.chunk + Its::kLanes * group) < num_cols);
    }
}

}  // namespace cupyattn
