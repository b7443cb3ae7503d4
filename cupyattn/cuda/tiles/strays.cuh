// Values that are not finite, kept apart from sums that have nothing to do with them.
//
// A key that a row does not see has weight 0 there, but 0 * nan is nan.  So where a result is not finite, its rows
// walk their keys twice more: once with a code in place of each value that is not finite (a *stray*), 0 in place
// of all others, and weights 1 or 0 for seen or not, which counts the strays each sum has to do with; and once with
// 0 in place of each stray.
#pragma once

#include "tiles/fragments.cuh"

namespace cupyattn {

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

// Codes of inf, -inf and nan: counts of up to 127 of each do not touch.  The last one is also the weight of a pair whose
// strays are all to be nan.
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

// The same of a right operand in registers.
template <typename Element>
DEVICE void take_strays(uint32 (&right)[Planes<Element>::kCount][4], bool counting) {
    using Number = typename Planes<Element>::Number;
#pragma unroll
    for (int plane = 0; plane < Planes<Element>::kCount; ++plane)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            uint32& pair = right[plane][i];
            pair = plane == 0 ? without_strays<Number>(pair, counting) : counting ? 0u : pair;
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
            const bool nan = counts.value[i / 4][i % 4] >= kCodes[2];
            const uint32 count = nan ? 0u : static_cast<uint32>(counts.value[i / 4][i % 4]);
            const uint32 bits = nan ? 3u : (count & 127u ? 1u : 0u) | (count >> 7 ? 2u : 0u);
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
