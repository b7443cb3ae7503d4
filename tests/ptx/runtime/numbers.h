// Floating-point numbers as bits: what an instruction rounds, flushes and makes of special values.
//
// Every nan that an instruction makes is 0x7fffffff (9.7.3), or 0x7fff in half precision (9.7.4). `.ftz` takes
// subnormal operands for zeros of their signs, and makes zeros of subnormal results. The approximations (.approx) are
// exact to a unit in the last place here, closer than the ISA demands: a GPU's other last bits are no subject of these
// tests.
#pragma once
#include <cmath>

#include "instructions.h"

constexpr u32 kNan = 0x7fffffff;
constexpr u16 kHalfNan = 0x7fff;
constexpr u32 kSign = 0x80000000;

static inline float float_of(u32 bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
static inline u32 bits_of(float value) {
    u32 bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
static inline double double_of(u64 bits) {
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
static inline u64 bits_of(double value) {
    u64 bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
static inline bool is_nan(float value) { return value != value; }
static inline bool is_nan(double value) { return value != value; }

static inline u32 flushed(u32 bits) { return (bits & 0x7f800000) ? bits : bits & kSign; }
static inline float flushed_float(u32 bits) { return float_of(flushed(bits)); }
static inline u32 result_of(float value) { return is_nan(value) ? kNan : bits_of(value); }
static inline u32 flushed_result_of(float value) { return is_nan(value) ? kNan : flushed(bits_of(value)); }

// ---- Arithmetic (9.7.3) ---------------------------------------------------------------------------------------------

u32 add_rn_f32(u32 a, u32 b) { return result_of(float_of(a) + float_of(b)); }
u32 add_rn_ftz_f32(u32 a, u32 b) { return flushed_result_of(flushed_float(a) + flushed_float(b)); }
u32 sub_rn_ftz_f32(u32 a, u32 b) { return flushed_result_of(flushed_float(a) - flushed_float(b)); }
u32 mul_rn_ftz_f32(u32 a, u32 b) { return flushed_result_of(flushed_float(a) * flushed_float(b)); }
u32 fma_rn_ftz_f32(u32 a, u32 b, u32 c) {
    return flushed_result_of(__builtin_fmaf(flushed_float(a), flushed_float(b), flushed_float(c)));
}
u32 div_rn_ftz_f32(u32 a, u32 b) { return flushed_result_of(flushed_float(a) / flushed_float(b)); }
u32 rcp_rn_ftz_f32(u32 a) { return flushed_result_of(1.f / flushed_float(a)); }
u32 rcp_approx_ftz_f32(u32 a) { return rcp_rn_ftz_f32(a); }
u32 neg_ftz_f32(u32 a) { return flushed(a) ^ kSign; }
u32 abs_ftz_f32(u32 a) { return flushed(a) & ~kSign; }

// div.approx (9.7.3.8): divisors beyond 2^126 give zero, or nan if the dividend is infinite.
u32 div_approx_ftz_f32(u32 a, u32 b) {
    const float dividend = flushed_float(a);
    const float divisor = flushed_float(b);
    const float size = std::fabs(divisor);
    if (size > 0x1p126f && size < INFINITY) {
        if (!std::isfinite(dividend)) return kNan;
        return (a ^ b) & kSign;
    }
    return flushed_result_of(dividend / divisor);
}

// add.rm (9.7.3.3), towards minus infinity: the sum to nearest, and one step down if its error says so.
u32 add_rm_ftz_f32(u32 a, u32 b) {
    const float left = flushed_float(a);
    const float right = flushed_float(b);
    float sum = left + right;
    if (is_nan(sum)) return kNan;
    if (std::isinf(sum)) {
        const bool overflows = std::isfinite(left) && std::isfinite(right);
        return overflows && sum > 0 ? 0x7f7fffff : bits_of(sum);
    }
    const float of_right = sum - left;  // Knuth's two-sum: `error` is exact
    const float error = (left - (sum - of_right)) + (right - of_right);
    if (error < 0) sum = std::nextafterf(sum, -INFINITY);
    if (sum == 0 && std::signbit(left) != std::signbit(right)) sum = -0.f;
    return flushed(bits_of(sum));
}

// min, max (9.7.3.11, 9.7.3.12): a nan loses against a number, and -0 is less than +0.
u32 max_ftz_f32(u32 a, u32 b) {
    const float left = flushed_float(a);
    const float right = flushed_float(b);
    if (is_nan(left)) return result_of(right);
    if (is_nan(right)) return bits_of(left);
    if (left == 0 && right == 0) return bits_of(std::signbit(left) ? right : left);
    return bits_of(left > right ? left : right);
}
u32 min_ftz_f32(u32 a, u32 b) {
    const float left = flushed_float(a);
    const float right = flushed_float(b);
    if (is_nan(left)) return result_of(right);
    if (is_nan(right)) return bits_of(left);
    if (left == 0 && right == 0) return bits_of(std::signbit(left) ? left : right);
    return bits_of(left < right ? left : right);
}

// lg2, ex2, tanh (9.7.3.20, 9.7.3.21, 9.7.3.22)
u32 ex2_approx_ftz_f32(u32 a) { return flushed_result_of(std::exp2(flushed_float(a))); }
u32 lg2_approx_ftz_f32(u32 a) {
    const float value = flushed_float(a);
    if (value == 0) return 0xff800000;
    if (value < 0) return kNan;
    return flushed_result_of(std::log2(value));
}
u32 tanh_approx_f32(u32 a) { return result_of(std::tanh(float_of(a))); }

// setp (9.7.6.2): ordered comparisons are false where a nan is, those that end in u are true.
bool setp_f32(Compare compare, bool ftz, u32 a, u32 b) {
    const float left = ftz ? flushed_float(a) : float_of(a);
    const float right = ftz ? flushed_float(b) : float_of(b);
    const bool unordered = is_nan(left) || is_nan(right);
    switch (compare) {
        case Compare::eq: return left == right;
        case Compare::ne: return !unordered && left != right;
        case Compare::lt: return left < right;
        case Compare::le: return left <= right;
        case Compare::gt: return left > right;
        case Compare::ge: return left >= right;
        case Compare::equ: return unordered || left == right;
        case Compare::neu: return unordered || left != right;
        case Compare::ltu: return unordered || left < right;
        case Compare::leu: return unordered || left <= right;
        case Compare::gtu: return unordered || left > right;
        case Compare::geu: return unordered || left >= right;
        case Compare::num: return !unordered;
        case Compare::nan: return unordered;
    }
    __builtin_unreachable();
}

// ---- Between integers and floating-point numbers (9.7.9.21) ---------------------------------------------------------

u64 cvt_f64_f32(u32 a) { return bits_of((double)float_of(a)); }
u64 cvt_ftz_f64_f32(u32 a) { return bits_of((double)flushed_float(a)); }
u32 cvt_rn_ftz_f32_f64(u64 a) { return flushed_result_of((float)double_of(a)); }
// What is too large saturates, and a nan is 0.
u32 cvt_rzi_ftz_u32_f32(u32 a) {
    const float value = flushed_float(a);
    if (!(value > 0)) return 0;
    return value >= 0x1p32f ? ~0u : (u32)value;
}
u32 cvt_rzi_ftz_s32_f32(u32 a) {
    const float value = flushed_float(a);
    if (is_nan(value)) return 0;
    if (value >= 0x1p31f) return 0x7fffffff;
    if (value <= -0x1p31f) return 0x80000000;
    return (u32)(s32)value;
}
u32 cvt_rn_f32_s32(u32 a) { return bits_of((float)(s32)a); }
u32 cvt_rn_f32_u32(u32 a) { return bits_of((float)a); }
u32 cvt_rn_f32_s64(u64 a) { return bits_of((float)(s64)a); }
u32 cvt_rn_f32_u16(u16 a) { return bits_of((float)a); }

// ---- Small numbers: half, bfloat16, e4m3 ----------------------------------------------------------------------------

// Values by bits, for they are asked for a billion times.
struct SmallNumbers {
    float half[65536];
    float e4m3[256];
    SmallNumbers();
};
extern const SmallNumbers small_numbers;
static inline float half_value(u16 bits) { return small_numbers.half[bits]; }
static inline float bfloat16_value(u16 bits) { return float_of((u32)bits << 16); }
static inline float e4m3_value(u8 bits) { return small_numbers.e4m3[bits]; }

u16 half_of(float);
u16 bfloat16_of(float);
u8 e4m3_of(float);  // .satfinite: what is too large becomes the largest

static inline u32 pair_of(u16 high, u16 low) { return (u32)high << 16 | low; }
u32 cvt_f32_f16(u16 a) { return result_of(half_value(a)); }
u32 cvt_rn_bf16x2_f32(u32 high, u32 low) { return pair_of(bfloat16_of(float_of(high)), bfloat16_of(float_of(low))); }
u32 cvt_rn_f16x2_f32(u32 high, u32 low) { return pair_of(half_of(float_of(high)), half_of(float_of(low))); }
u16 cvt_rn_satfinite_e4m3x2_f32(u32 high, u32 low) {
    return (u16)(e4m3_of(float_of(high)) << 8 | e4m3_of(float_of(low)));
}
// Every e4m3 is a half.
u32 cvt_rn_f16x2_e4m3x2(u16 pair) { return pair_of(half_of(e4m3_value(pair >> 8)), half_of(e4m3_value(pair & 255))); }
