// Where numbers lie: tiles in shared memory, fragments in registers, and the products between them.
//
// Nothing here knows of attention.
#pragma once

#include "instructions/ptx.cuh"

namespace cupyattn {

// How an element takes part in tensor-core products: as itself, or, for float, as the exact sum of three
// bfloat16 numbers.  Of the nine products of two such sums the three smallest, under 2^-24, are left out.
template <typename Element>
struct Planes {
    using Number = Element;
    static constexpr int kCount = 1;
};
template <>
struct Planes<float> {
    using Number = BFloat16;
    static constexpr int kCount = 3;
};

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

// ---- Float8 without its instructions, which not every GPU has -------------------------------------------

// Two float8 numbers, in the upper bytes of the halves of `pair`, as halves that are 2^-8 of them: exactly, the
// subnormal ones too.
DEVICE uint32 halves_of(uint32 pair) {
    const uint32 size = pair & 0x7f007f00u, nans = (size + 0x01000100u) & 0x80008000u;
    return (pair & 0x80008000u) | size >> 1 | (nans >> 15) * 0x7c00u;
}
constexpr float kOfFloat8 = 256.f;  // what such halves have to be multiplied by

DEVICE float number_of(Float8 x) {
    return ptx::widen(Half{static_cast<uint16>(halves_of(static_cast<uint32>(x.bits) << 8))}) * kOfFloat8;
}
template <typename Element>
DEVICE float number_of(Element x) {
    return ptx::widen(x);
}
// To nearest, ties to even; what is too large becomes 448 of its sign, as cvt.rn.satfinite has it.
DEVICE Float8 float8_of(float x) {
    const uint32 sign = ptx::bits(x) >> 24 & 0x80u, size = ptx::bits(x) & 0x7fffffffu;
    if (size > 0x7f800000u) return {0x7f};
    if (size >= 0x43e00000u) return {static_cast<uint8>(sign | 0x7eu)};
    // Below 2^-6 the sum rounds to a multiple of 2^-9, the smallest there is.
    const uint32 small = ptx::bits(ptx::from_bits(size) + 16384.f) - ptx::bits(16384.f);
    const uint32 other = (size - (120u << 23) + 0x7ffffu + (size >> 20 & 1u)) >> 20;
    return {static_cast<uint8>(sign | (size < 0x3c800000u ? small : other))};
}

// ---- From global to shared memory -------------------------------------------------------------------

// Splits x exactly into high + middle + low, each a bfloat16; what is not finite stays whole in `high`.
DEVICE void split(float x, float& high, float& middle, float& low) {
    const uint32 bits = ptx::bits(x);
    high = ptx::from_bits(bits & 0xffff0000u);
    if ((bits & 0x7f800000u) == 0x7f800000u) {
        high = ptx::from_bits((bits & 0x007fffffu) ? 0x7fff0000u : bits);
        middle = low = 0.f;
        return;
    }
    const float rest = x - high;
    middle = ptx::from_bits(ptx::bits(rest) & 0xffff0000u);
    low = ptx::from_bits(ptx::bits(rest - middle) & 0xffff0000u);
}

// Both numbers of a pair as packed bfloat16; they have no bits below those kept.
DEVICE uint32 pack_exact(float low, float high) { return (ptx::bits(low) >> 16) | (ptx::bits(high) & 0xffff0000u); }

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

// ---- Fragments --------------------------------------------------------------------------------------

// 16 rows x kCols of float32 sums, spread over a warp as mma.sync leaves them: element [block][i] of a lane is
// row lane / 4 + 8 * (i / 2), column 8 * block + 2 * (lane % 4) + i % 2.
template <int kCols>
struct Accumulator {
    static constexpr int kBlocks = kCols / 8;
    float value[kBlocks][4];

    DEVICE_METHOD void clear() {
#pragma unroll
        for (int block = 0; block < kBlocks; ++block)
#pragma unroll
            for (int i = 0; i < 4; ++i) value[block][i] = 0.f;
    }
    DEVICE_METHOD static int row(int half) { return ptx::lane() / 4 + 8 * half; }
    DEVICE_METHOD static int first_column() { return 2 * (ptx::lane() % 4); }
    DEVICE_METHOD static constexpr int column(int block, int i) { return 8 * block + i % 2; }  // beyond first_column()

    DEVICE_METHOD void scale_rows(const float (&factor)[2]) {
#pragma unroll
        for (int block = 0; block < kBlocks; ++block)
#pragma unroll
            for (int i = 0; i < 4; ++i) value[block][i] *= factor[i / 2];
    }
    // Adds sums of as many columns as `part` has, from `first` on.
    template <int kPartCols>
    DEVICE_METHOD void add(const Accumulator<kPartCols>& part, int first) {
#pragma unroll
        for (int block = 0; block < kPartCols / 8; ++block)
#pragma unroll
            for (int i = 0; i < 4; ++i) value[first / 8 + block][i] += part.value[block][i];
    }
    // 0, or nan if any of this lane's sums is nan or inf.
    DEVICE_METHOD float times_zero() const {
        float probe = 0.f;
#pragma unroll
        for (int block = 0; block < kBlocks; ++block)
#pragma unroll
            for (int i = 0; i < 4; ++i) probe = ptx::fma(value[block][i], 0.f, probe);
        return probe;
    }
};

// One number into memory, rounded to its kind.
DEVICE void store_rounded(float* to, float x) { ptx::store_global(to, x); }
DEVICE void store_rounded(Float8* to, float x) { ptx::store_global(to, float8_of(x)); }
template <typename Element>
DEVICE void store_rounded(Element* to, float x) {
    ptx::store_global(&to->bits, static_cast<uint16>(ptx::pack<Element>(x, 0.f)));
}

// A number of a dtype that is known only now: 0 Half, 1 BFloat16, 2 float, 3 double.
DEVICE float number_at(const void* data, int dtype, int64 index) {
    switch (dtype) {
        case 0: return ptx::widen(ptx::load_global(static_cast<const Half*>(data) + index));
        case 1: return ptx::widen(ptx::load_global(static_cast<const BFloat16*>(data) + index));
        case 2: return ptx::load_global(static_cast<const float*>(data) + index);
        default: return ptx::widen(ptx::load_global(static_cast<const double*>(data) + index));
    }
}

// 16 rows x kCols as the left operand of a product, in 16-bit planes.
template <typename Element, int kCols>
struct Fragment {
    uint32 value[kCols / 16][Planes<Element>::kCount][4];

    // The sums of one product are the operand of the next, as they lie: no lane has to ask another.
    DEVICE_METHOD void round_from(const Accumulator<kCols>& from) {
#pragma unroll
        for (int step = 0; step < kCols / 16; ++step)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float(&pair)[4] = from.value[2 * step + i / 2];
                const float low = pair[2 * (i % 2)], high = pair[2 * (i % 2) + 1];
                if constexpr (Same<Element, float>::value) {
                    float a[3], b[3];
                    split(low, a[0], a[1], a[2]);
                    split(high, b[0], b[1], b[2]);
#pragma unroll
                    for (int plane = 0; plane < 3; ++plane) value[step][plane][i] = pack_exact(a[plane], b[plane]);
                } else {
                    value[step][0][i] = ptx::pack<Element>(low, high);
                }
            }
    }
};

// Where a lane finds its part of the left operand: 16 rows from `first_row`.
template <typename Tile>
DEVICE uint32 left_operand(const Tile& tile, int first_row) {
    return tile.address(first_row + ptx::lane() % 16, ptx::lane() / 16);
}
// Of a tile whose rows are the columns of the product (keys): 16 of them from row 0.
template <typename Tile>
DEVICE uint32 right_operand_by_rows(const Tile& tile) {
    return tile.address(ptx::lane() % 8 + ptx::lane() / 16 * 8, ptx::lane() / 8 % 2);
}
// Of a tile whose rows are summed over (values): 16 of them from row 0.
template <typename Tile>
DEVICE uint32 right_operand_by_columns(const Tile& tile) {
    return tile.address(ptx::lane() % 16, ptx::lane() / 16);
}

// Columns [16 * step, 16 * step + 16) of the left operand, all planes.
template <typename Element, typename Tile>
DEVICE void load_fragment(uint32 (&to)[Planes<Element>::kCount][4], uint32 left, int step) {
#pragma unroll
    for (int plane = 0; plane < Planes<Element>::kCount; ++plane)
        ptx::load_matrices(to[plane], Tile::advance(left, step) + plane * Tile::kPlane);
}

// sums += left x right, 16 x 16 x 16, over the planes whose products matter.
template <typename Element>
DEVICE void multiply_planes(float (&first)[4], float (&second)[4], const uint32 (&left)[Planes<Element>::kCount][4],
                            const uint32 (&right)[4], int right_plane) {
    using Number = typename Planes<Element>::Number;
#pragma unroll
    for (int plane = 0; plane < Planes<Element>::kCount; ++plane)
        if (plane + right_plane < Planes<Element>::kCount) {
            ptx::multiply_add<Number>(first, left[plane], right[0], right[1]);
            ptx::multiply_add<Number>(second, left[plane], right[2], right[3]);
        }
}

// out[m] += weights[m] x values, for a tile of values as it lies in memory.
template <typename Tile, typename Element, int kRowTiles, int kKeys, int kCols>
DEVICE void multiply_values(Accumulator<kCols> (&out)[kRowTiles], const Fragment<Element, kKeys> (&weights)[kRowTiles],
                            uint32 right) {
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step)
#pragma unroll
        for (int pair = 0; pair < kCols / 16; ++pair)
#pragma unroll
            for (int plane = 0; plane < Planes<Element>::kCount; ++plane) {
                uint32 values[4];
                ptx::load_matrices_transposed(values,
                                              Tile::advance(right, pair) + plane * Tile::kPlane + Tile::down(step));
#pragma unroll
                for (int m = 0; m < kRowTiles; ++m)
                    multiply_planes<Element>(out[m].value[2 * pair], out[m].value[2 * pair + 1], weights[m].value[step],
                                             values, plane);
            }
}

// ---- Values that are not finite ---------------------------------------------------------------------
//
// A key that a row does not see has weight 0 there, but 0 * nan is nan.  So where a result is not finite, its rows
// walk their keys twice more: once with a code in place of each value that is not finite (a *stray*), 0 in place
// of all others, and weights 1 or 0 for seen or not, which counts the strays each sum has to do with; and once with
// 0 in place of each stray.

template <typename Number>
struct Exponent;
template <>
struct Exponent<Half> {
    static constexpr uint32 kBits = 0x7c00u;
};
template <>
struct Exponent<BFloat16> {
    static constexpr uint32 kBits = 0x7f80u;
};

// Codes of inf, -inf and nan: counts of up to 127 of each do not touch.
constexpr float kCodes[3] = {1.f, 128.f, 16384.f};

// A pair of values with its strays made 0, or with codes for them and all else made 0.
template <typename Number>
DEVICE uint32 without_strays(uint32 pair, bool counting) {
    constexpr uint32 kExponent = Exponent<Number>::kBits;
    float codes[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint32 bits = pair >> 16 * i & 0xffffu;
        const bool stray = (bits & kExponent) == kExponent, nan = bits & 0x7fffu & ~kExponent;
        codes[i] = !stray ? 0.f : nan ? kCodes[2] : bits >> 15 ? kCodes[1] : kCodes[0];
        if (stray) pair &= 0xffff0000u >> 16 * i;
    }
    return counting ? ptx::pack<Number>(codes[0], codes[1]) : pair;
}

// Does so to a whole tile, in place, by kThreads threads who meet before and after.  What is not finite is whole in
// the first plane, and the others are 0 there; where codes are wanted they are 0 everywhere.
template <int kThreads, typename Element, typename Tile>
DEVICE void take_strays(const Tile& tile, int thread, bool counting) {
    using Number = typename Planes<Element>::Number;
#pragma unroll 1
    for (int at = 4 * thread; at < Tile::kBytes; at += 4 * kThreads) {
        const uint32 pair = ptx::load_shared(tile.base + at);
        const bool first = at < Tile::kPlane;
        ptx::store_shared(tile.base + at, first ? without_strays<Number>(pair, counting) : counting ? 0u : pair);
    }
}

// The strays of some sums, two bits each: inf, and -inf; both are nan.
template <int kCols>
struct Strays {
    uint32 word[kCols / 32];

    DEVICE_METHOD void clear() {
#pragma unroll
        for (int i = 0; i < kCols / 32; ++i) word[i] = 0u;
    }
    // Remembers which strays were counted.
    DEVICE_METHOD void collect(const Accumulator<kCols>& counts) {
#pragma unroll
        for (int i = 0; i < kCols / 2; ++i) {
            const uint32 count = static_cast<uint32>(counts.value[i / 4][i % 4]);
            const uint32 bits = count >> 14 ? 3u : (count & 127u ? 1u : 0u) | (count >> 7 ? 2u : 0u);
            word[i / 16] |= bits << 2 * (i % 16);
        }
    }
    DEVICE_METHOD void add_to(Accumulator<kCols>& sums) const {
#pragma unroll
        for (int i = 0; i < kCols / 2; ++i) {
            const uint32 bits = word[i / 16] >> 2 * (i % 16);
            if (bits & 1u) sums.value[i / 4][i % 4] += ptx::infinity();
            if (bits & 2u) sums.value[i / 4][i % 4] -= ptx::infinity();
        }
    }
};

}  // namespace cupyattn
