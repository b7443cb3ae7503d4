// Integers and bits.
#pragma once
#include <type_traits>

#include "instructions.h"

// prmt (9.7.9.7), default mode: each of the four low digits of the selector names one of eight bytes; its highest bit
// asks for that byte's sign instead.
u32 prmt_b32(u32 a, u32 b, u32 selector) {
    const u64 bytes = (u64)b << 32 | a;
    u32 result = 0;
    for (int place = 0; place < 4; ++place) {
        const u32 digit = selector >> 4 * place & 15;
        u32 byte = bytes >> 8 * (digit & 7) & 255;
        if (digit & 8) byte = byte & 128 ? 255 : 0;
        result |= byte << 8 * place;
    }
    return result;
}

// bfi (9.7.1.20): position and length are the low bytes of their operands; what reaches beyond the last bit is dropped.
u32 bfi_b32(u32 a, u32 b, u32 position, u32 length) {
    position &= 255;
    length &= 255;
    if (position > 31 || length == 0) return b;
    const u32 mask = (length > 31 ? ~0u : (1u << length) - 1) << position;
    return (b & ~mask) | (a << position & mask);
}

u64 bfi_b64(u64 a, u64 b, u32 position, u32 length) {
    position &= 255;
    length &= 255;
    if (position > 63 || length == 0) return b;
    const u64 mask = (length > 63 ? ~u64(0) : (u64(1) << length) - 1) << position;
    return (b & ~mask) | (a << position & mask);
}

// clz (9.7.1.16): zeros above the highest bit that is set; 32 where none is.
u32 clz_b32(u32 a) {
    u32 count = 0;
    while (count < 32 && (a >> (31 - count) & 1) == 0) ++count;
    return count;
}
// brev (9.7.1.18)
u32 brev_b32(u32 a) {
    u32 reversed = 0;
    for (u32 bit = 0; bit < 32; ++bit) reversed |= (a >> bit & 1) << (31 - bit);
    return reversed;
}

// bfe (9.7.1.19)
u32 bfe_u32(u32 a, u32 position, u32 length) {
    position &= 255;
    length &= 255;
    if (position > 31 || length == 0) return 0;
    const u32 from = a >> position;
    return length > 31 ? from : from & ((1u << length) - 1);
}

// lop3 (9.7.8.6): bit 4a + 2b + c of the table.
u32 lop3_b32(u32 a, u32 b, u32 c, u32 table) {
    u32 result = 0;
    for (u32 row = 0; row < 8; ++row) {
        if ((table >> row & 1) == 0) continue;
        result |= (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
    }
    return result;
}

// shl, shr (9.7.8.8, 9.7.8.9): counts beyond the width are clamped to it, where C++ leaves them undefined.
u32 shl_b32(u32 a, u32 count) { return count > 31 ? 0 : a << count; }
u64 shl_b64(u64 a, u32 count) { return count > 63 ? 0 : a << count; }
u32 shr_u32(u32 a, u32 count) { return count > 31 ? 0 : a >> count; }
u64 shr_u64(u64 a, u32 count) { return count > 63 ? 0 : a >> count; }
u32 shr_s32(u32 a, u32 count) { return (u32)((s32)a >> (count > 31 ? 31 : count)); }
u64 shr_s64(u64 a, u32 count) { return (u64)((s64)a >> (count > 63 ? 63 : count)); }

// div, rem (9.7.1.8, 9.7.1.9). The smallest number divided by -1 wraps, where C++ leaves it undefined.
template <typename T>
static inline T quotient(Thread& thread, T a, T b) {
    if (b == 0) fail(thread, "division by zero");
    if (std::is_signed<T>::value && b == (T)-1) return (T)(0 - (u64)a);
    return a / b;
}
template <typename T>
static inline T remainder(Thread& thread, T a, T b) {
    if (b == 0) fail(thread, "remainder of a division by zero");
    if (std::is_signed<T>::value && b == (T)-1) return 0;
    return a % b;
}
u32 div_s32(Thread& thread, u32 a, u32 b) { return (u32)quotient<s32>(thread, (s32)a, (s32)b); }
u32 rem_s32(Thread& thread, u32 a, u32 b) { return (u32)remainder<s32>(thread, (s32)a, (s32)b); }
u32 div_u32(Thread& thread, u32 a, u32 b) { return quotient<u32>(thread, a, b); }
u32 rem_u32(Thread& thread, u32 a, u32 b) { return remainder<u32>(thread, a, b); }
u64 div_s64(Thread& thread, u64 a, u64 b) { return (u64)quotient<s64>(thread, (s64)a, (s64)b); }
u64 rem_s64(Thread& thread, u64 a, u64 b) { return (u64)remainder<s64>(thread, (s64)a, (s64)b); }
u64 div_u64(Thread& thread, u64 a, u64 b) { return quotient<u64>(thread, a, b); }
u64 rem_u64(Thread& thread, u64 a, u64 b) { return remainder<u64>(thread, a, b); }
