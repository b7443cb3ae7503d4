// Numbers of one dtype as those of another, exactly where they can be: float32 as three bfloat16 numbers, float8 as
// halves; and on their way from and to memory in a dtype that is known only now, or rounded.
//
// Nothing here knows of attention.
#pragma once

#include "instructions/ptx.cuh"

namespace cupyattn {

// ---- Float32 as bfloat16 numbers ---------------------------------------------------------------------

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

// A pair of numbers as one of bfloat16 in each plane.
DEVICE void split_pair(float first, float second, uint32 (&planes)[3]) {
    float a[3], b[3];
    split(first, a[0], a[1], a[2]);
    split(second, b[0], b[1], b[2]);
#pragma unroll
    for (int plane = 0; plane < 3; ++plane) planes[plane] = pack_exact(a[plane], b[plane]);
}

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

// ---- From and to memory ------------------------------------------------------------------------------

// One number into memory, rounded to its kind.
DEVICE void store_rounded(float* to, float x) { ptx::store_global(to, x); }
DEVICE void store_rounded(Float8* to, float x) { ptx::store_global(to, float8_of(x)); }
template <typename Element>
DEVICE void store_rounded(Element* to, float x) {
    ptx::store_global(&to->bits, static_cast<uint16>(ptx::pack<Element>(x, 0.f)));
}

// A pair of them, of a dtype that is known only now, see number_at; both lie within eight bytes that do not cross.
DEVICE void store_pair(void* data, int dtype, int64 index, float a, float b) {
    switch (dtype) {
        case 0: return ptx::store_global(static_cast<uint32*>(data) + index / 2, ptx::pack<Half>(a, b));
        case 1: return ptx::store_global(static_cast<uint32*>(data) + index / 2, ptx::pack<BFloat16>(a, b));
        default:
            ptx::store_global(static_cast<float*>(data) + index, a);
            ptx::store_global(static_cast<float*>(data) + index + 1, b);
    }
}
DEVICE void store_number(void* data, int dtype, int64 index, float x) {
    switch (dtype) {
        case 0: return store_rounded(static_cast<Half*>(data) + index, x);
        case 1: return store_rounded(static_cast<BFloat16*>(data) + index, x);
        case 2: return ptx::store_global(static_cast<float*>(data) + index, x);
        default: ptx::store_global(static_cast<double*>(data) + index, static_cast<double>(x));
    }
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

}  // namespace cupyattn
