// Numbers to fewer bits, rounded once, to nearest, ties to even (9.7.9.21, and fma of 9.7.4).
#pragma once
#include <algorithm>

#include "machine.h"

// A type by its bits: sign, exponent, mantissa; subnormals below the least exponent.
struct Format {
    int mantissa_bits;
    int bias;
    u32 infinity;   // bits of what is too large; without its sign
    double limit;   // from here on
};
constexpr Format kHalf = {10, 15, 0x7c00, 65520};
constexpr Format kBfloat16 = {7, 127, 0x7f80, 0x1.ffp127};
constexpr Format kE4m3 = {3, 7, 0x7e, 448};  // .satfinite

// No nan. The bits of a rounded number count up through subnormals and exponents without a gap.
static u32 bits_in(const Format& format, double value) {
    const double size = std::fabs(value);
    if (size >= format.limit) return format.infinity;
    if (size == 0) return 0;
    const int exponent = std::max(std::ilogb(size), 1 - format.bias);
    const double steps = std::nearbyint(std::ldexp(size, format.mantissa_bits - exponent));
    const u32 below = (u32)(exponent + format.bias - 1) << format.mantissa_bits;
    return below + (u32)steps;
}

static u16 half_of_double(double value) {
    if (is_nan(value)) return kHalfNan;
    return (std::signbit(value) ? 0x8000 : 0) | bits_in(kHalf, value);
}
static u16 bfloat16_of_double(double value) {
    if (is_nan(value)) return kHalfNan;
    return (std::signbit(value) ? 0x8000 : 0) | bits_in(kBfloat16, value);
}

// These two in integers, for kernels convert every weight.
u16 half_of(float value) {
    const u32 bits = bits_of(value);
    const u32 sign = bits >> 16 & 0x8000;
    const u32 size = bits & ~kSign;
    if (size > 0x7f800000) return kHalfNan;
    if (size >= 0x477ff000) return sign | 0x7c00;                     // 65520
    if (size < 0x38800000) return sign | bits_in(kHalf, float_of(size));  // subnormal
    const u32 rounded = size + 0xfff + (size >> 13 & 1);
    return sign | (rounded - 0x38000000) >> 13;
}
u16 bfloat16_of(float value) {
    const u32 bits = bits_of(value);
    if (is_nan(value)) return kHalfNan;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
u8 e4m3_of(float value) {
    if (is_nan(value)) return 0x7f;
    return (std::signbit(value) ? 0x80 : 0) | bits_in(kE4m3, value);
}

static float value_of_half(u32 bits) {
    const u32 exponent = bits >> 10 & 31;
    const u32 mantissa = bits & 1023;
    float size = exponent ? std::ldexp(1024.f + mantissa, (int)exponent - 25) : std::ldexp((float)mantissa, -24);
    if (exponent == 31) size = mantissa ? NAN : INFINITY;
    return bits & 0x8000 ? -size : size;
}
static float value_of_e4m3(u32 bits) {
    const u32 exponent = bits >> 3 & 15;
    const u32 mantissa = bits & 7;
    float size = exponent ? std::ldexp(8.f + mantissa, (int)exponent - 10) : std::ldexp((float)mantissa, -9);
    if (exponent == 15 && mantissa == 7) size = NAN;
    return bits & 0x80 ? -size : size;
}
SmallNumbers::SmallNumbers() {
    for (u32 bits = 0; bits < 65536; ++bits) half[bits] = value_of_half(bits);
    for (u32 bits = 0; bits < 256; ++bits) e4m3[bits] = value_of_e4m3(bits);
}
const SmallNumbers small_numbers;

// fma.rn of pairs (9.7.4.5). The product is exact in float64, the sum need not be: rounded to odd, it says enough to be
// rounded once more.
static double multiply_add_to_odd(double a, double b, double c) {
    const double product = a * b;
    const double sum = product + c;
    if (!std::isfinite(sum)) return sum;
    const double of_c = sum - product;
    const double error = (product - (sum - of_c)) + (c - of_c);
    const bool is_odd = bits_of(sum) & 1;
    if (error == 0 || is_odd) return sum;
    return std::nextafter(sum, error > 0 ? INFINITY : -INFINITY);
}
static u16 fma_half(u16 a, u16 b, u16 c) {
    return half_of_double(multiply_add_to_odd(half_value(a), half_value(b), half_value(c)));
}
static u16 fma_bfloat16(u16 a, u16 b, u16 c) {
    return bfloat16_of_double(multiply_add_to_odd(bfloat16_value(a), bfloat16_value(b), bfloat16_value(c)));
}
u32 fma_rn_f16x2(u32 a, u32 b, u32 c) {
    return pair_of(fma_half(a >> 16, b >> 16, c >> 16), fma_half((u16)a, (u16)b, (u16)c));
}
u32 fma_rn_bf16x2(u32 a, u32 b, u32 c) {
    return pair_of(fma_bfloat16(a >> 16, b >> 16, c >> 16), fma_bfloat16((u16)a, (u16)b, (u16)c));
}
