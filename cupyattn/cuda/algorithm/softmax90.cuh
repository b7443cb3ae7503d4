// The softmax where exponentials are what a kernel waits for: part of them by arithmetic.
#pragma once

#include "instructions/ptx90.cuh"
#include "algorithm/scores.cuh"
#include "algorithm/softmax.cuh"

namespace cupyattn {

// 2 to the power of x <= 128 by Cody and Waite's split and a polynomial of degree three: relative error 8.8e-5, which
// the rounding of a 16-bit weight hides.  Below 2^-127 it stays there, instead of going on to 0; nan stays nan.
DEVICE float exp2_polynomial(float x) {
    constexpr float kWhole = 12582912.f;  // 1.5 * 2^23: the last bit of a sum with it is worth 1
    if (x != x) return x;
    x = ptx::max(x, -127.f);
    const float shifted = ptx::add_round_down(x, kWhole);
    const float fraction = x - (shifted - kWhole);  // in [0, 1)
    float power = ptx::fma(0.077119089663028717f, fraction, 0.22756439447402954f);
    power = ptx::fma(power, fraction, 0.69514614343643188f);
    power = ptx::fma(power, fraction, 1.f);
    return ptx::from_bits((ptx::bits(shifted) << 23) + ptx::bits(power));
}

// kPolynomials of every 32 exponentials by arithmetic, spread evenly; the others by the special function unit.
template <int kPolynomials>
struct Exponential {
    DEVICE_METHOD static float at(int place, float x) {
        const int turn = place % 32;
        const bool by_arithmetic = (turn + 1) * kPolynomials / 32 > turn * kPolynomials / 32;
        return by_arithmetic ? exp2_polynomial(x) : ptx::exp2(x);
    }
};

}  // namespace cupyattn
