// The host's twin of cupyattn/cuda/instructions/ptx.cuh: the same functions, with the meaning the PTX manual gives them.
//
// Each takes one more argument that kernels leave out: where it was called, for messages.
#pragma once

#include <cmath>

#include "instructions/common.cuh"
#include "memory.h"

namespace cupyattn::ptx {

using emulator::Access;
using emulator::machine;
using emulator::Site;
using emulator::Verb;
using emulator::Warp;

// ---- Who am I ---------------------------------------------------------------------------------------

DEVICE int thread() { return emulator::now->index % machine.num_threads; }
DEVICE int threads() { return machine.num_threads; }
DEVICE int lane() { return emulator::now->lane(); }
DEVICE int warp() { return emulator::now->warp->index % machine.num_warps; }
DEVICE int block_x() { return emulator::now->block->x; }
DEVICE int block_y() { return emulator::now->block->y; }
DEVICE int block_z() { return emulator::now->block->z; }
DEVICE int grid_x() { return machine.grid_x; }

// ---- Waiting for each other -------------------------------------------------------------------------

DEVICE void barrier(Site site = Site::here()) { emulator::block_barrier(site); }
DEVICE bool barrier_any(bool condition, Site site = Site::here()) {
    return emulator::block_barrier_any(condition, site);
}
DEVICE void warp_barrier(Site site = Site::here()) { emulator::warp_barrier(site); }
DEVICE void fence_gpu() { emulator::fence(); }
DEVICE int atomic_add(int* address, int value, Site site = Site::here()) {
    emulator::global_at(address, 4, Access::kAtomic, "atomic_add", site);
    emulator::release_and_acquire();
    const int before = *address;
    *address = static_cast<int>(static_cast<uint32>(before) + static_cast<uint32>(value));
    return before;
}

// ---- Numbers ----------------------------------------------------------------------------------------

DEVICE uint32 bits(float value) {
    uint32 result;
    std::memcpy(&result, &value, 4);
    return result;
}
template <typename T>
DEVICE void disguise(T&) {}
template <typename T>
DEVICE const T* disguised(const T& x) {
    return &x;
}
DEVICE float from_bits(uint32 value) {
    float result;
    std::memcpy(&result, &value, 4);
    return result;
}
DEVICE float infinity() { return from_bits(0x7f800000); }
DEVICE float nan() { return from_bits(0x7fffffff); }

// .ftz: a subnormal number is a zero of its sign, before and after.
DEVICE float flush(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }
DEVICE float exp2(float x) { return flush(::exp2f(flush(x))); }
DEVICE float log2(float x) { return flush(::log2f(flush(x))); }
// __fdividef: zero, and NaN for an infinite `a`, where 1 / b would be subnormal.
DEVICE float divide(float a, float b) {
    const float size = std::fabs(b);
    if (size > 8.5070592e37f && size < infinity()) return a * from_bits(std::signbit(b) ? 0x80000000 : 0);
    return a / b;
}
DEVICE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
DEVICE float max(float a, float b) { return a > b || b != b ? a : b; }
DEVICE float absolute(float x) { return std::fabs(x); }
DEVICE uint32 multiply_high(uint32 a, uint32 b) {
    return static_cast<uint32>(static_cast<uint64>(a) * static_cast<uint64>(b) >> 32);
}

// To nearest, ties to even; every NaN becomes 0x7fff.
DEVICE uint32 round_to(float x, BFloat16) {
    if (x != x) return 0x7fff;
    const uint32 value = bits(x);
    return (value + 0x7fff + (value >> 16 & 1)) >> 16;
}
DEVICE uint32 round_to(float x, Half) {
    if (x != x) return 0x7fff;
    const uint32 sign = bits(x) >> 16 & 0x8000;
    const uint32 size = bits(x) & 0x7fffffff;
    if (size >= 0x477ff000) return sign | 0x7c00;  // from 65520 on, nearer to 65536 than to the largest half
    if (size < 0x38800000)  // below 2^-14 the sum rounds to a multiple of 2^-24, the smallest half
        return sign | (bits(from_bits(size) + 0.5f) - bits(0.5f));
    return sign | (size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13;
}
template <typename Element>
DEVICE uint32 pack(float low, float high) {
    return round_to(low, Element()) | round_to(high, Element()) << 16;
}
DEVICE float widen(BFloat16 x) { return from_bits(static_cast<uint32>(x.bits) << 16); }
// The exponent of a half starts at -15, that of a float at -127: a factor of 2^112, exact for subnormals too.
DEVICE float widen(Half x) {
    const uint32 size = static_cast<uint32>(x.bits & 0x7fff) << 13;
    const uint32 finite = bits(from_bits(size) * 5.192296858534828e33f);
    const uint32 value = size >= 0x0f800000 ? size | 0x7f800000 : finite;
    return from_bits(value | static_cast<uint32>(x.bits & 0x8000) << 16);
}
DEVICE float widen(float x) { return x; }
DEVICE float widen(double x) { return static_cast<float>(x); }

// ---- Between the lanes of a warp --------------------------------------------------------------------

// Results replace what the lanes brought only when all have come, and the next instruction waits for all again.
DEVICE uint32 shuffle_from(Verb verb, uint32 value, int source, Site site) {
    emulator::Operands& mine = emulator::now->warp->lanes[lane()];
    mine.value = value;
    mine.other = source % 32u;
    emulator::together(verb, site, [](Warp& warp) {
        uint32 values[32];
        for (int lane = 0; lane < 32; ++lane) values[lane] = warp.lanes[warp.lanes[lane].other].value;
        for (int lane = 0; lane < 32; ++lane) warp.lanes[lane].value = values[lane];
    });
    return mine.value;
}
DEVICE float shuffle_xor(float value, int mask, Site site = Site::here()) {
    return from_bits(shuffle_from(Verb::kShuffleXor, bits(value), lane() ^ mask, site));
}
DEVICE uint32 shuffle(uint32 value, int lane, Site site = Site::here()) {
    return shuffle_from(Verb::kShuffle, value, lane, site);
}
DEVICE int count_votes(Verb verb, bool condition, Site site) {
    emulator::Operands& mine = emulator::now->warp->lanes[lane()];
    mine.value = condition;
    emulator::together(verb, site, [](Warp& warp) {
        uint32 count = 0;
        for (int lane = 0; lane < 32; ++lane) count += warp.lanes[lane].value;
        for (int lane = 0; lane < 32; ++lane) warp.lanes[lane].value = count;
    });
    return mine.value;
}
DEVICE bool any(bool condition, Site site = Site::here()) { return count_votes(Verb::kAny, condition, site) > 0; }
DEVICE bool all(bool condition, Site site = Site::here()) { return count_votes(Verb::kAll, condition, site) == 32; }
DEVICE int first_lane(bool condition, Site site = Site::here()) {
    emulator::Operands& mine = emulator::now->warp->lanes[lane()];
    mine.value = condition;
    emulator::together(Verb::kFirstLane, site, [](Warp& warp) {
        uint32 first = 0;
        while (first < 32 && !warp.lanes[first].value) ++first;
        for (int lane = 0; lane < 32; ++lane) warp.lanes[lane].value = first;
    });
    return mine.value;
}

// ---- Shared memory ----------------------------------------------------------------------------------

DEVICE uint32 shared_memory() { return emulator::kSharedBase; }

template <int kWords>
DEVICE void store_shared_words(uint32 address, const uint32 (&value)[kWords], Site site) {
    std::uint8_t* to = emulator::shared_at(address, 4 * kWords, "store_shared", site);
    emulator::note_store(address, 4 * kWords, "store_shared", site);
    std::memcpy(to, value, 4 * kWords);
}
template <int kWords>
DEVICE void load_shared_words(uint32 (&value)[kWords], uint32 address, Site site) {
    const std::uint8_t* from = emulator::shared_at(address, 4 * kWords, "load_shared", site);
    emulator::note_read(address, 4 * kWords, emulator::this_thread(), "load_shared", site);
    std::memcpy(value, from, 4 * kWords);
}
DEVICE void store_shared(uint32 address, uint32 value, Site site = Site::here()) {
    store_shared_words(address, {value}, site);
}
DEVICE void store_shared(uint32 address, float value, Site site = Site::here()) {
    store_shared_words(address, {bits(value)}, site);
}
DEVICE void store_shared(uint32 address, uint32 a, uint32 b, uint32 c, uint32 d, Site site = Site::here()) {
    store_shared_words(address, {a, b, c, d}, site);
}
DEVICE uint32 load_shared(uint32 address, Site site = Site::here()) {
    uint32 value[1];
    load_shared_words(value, address, site);
    return value[0];
}
DEVICE void load_shared(uint32 (&value)[2], uint32 address, Site site = Site::here()) {
    load_shared_words(value, address, site);
}
DEVICE float load_shared_float(uint32 address, Site site = Site::here()) {
    return from_bits(load_shared(address, site));
}
DEVICE void load_shared(uint32 (&value)[4], uint32 address, Site site = Site::here()) {
    load_shared_words(value, address, site);
}

// ---- Global memory ----------------------------------------------------------------------------------

template <typename T>
DEVICE T load_global(const T* address, Site site = Site::here()) {
    T value;
    std::memcpy(&value, emulator::global_at(address, sizeof(T), Access::kLoad, "load_global", site), sizeof(T));
    return value;
}
DEVICE void load_global(uint32 (&value)[4], const void* address, Site site = Site::here()) {
    std::memcpy(value, emulator::global_at(address, 16, Access::kLoad, "load_global", site), 16);
}
template <typename T>
DEVICE void store_global(T* address, T value, Site site = Site::here()) {
    std::memcpy(emulator::global_at(address, sizeof(T), Access::kStore, "store_global", site), &value, sizeof(T));
}
DEVICE void store_global(void* address, const uint32 (&value)[4], Site site = Site::here()) {
    std::memcpy(emulator::global_at(address, 16, Access::kStore, "store_global", site), value, 16);
}
DEVICE void store_global(void* address, const uint32 (&value)[2], Site site = Site::here()) {
    std::memcpy(emulator::global_at(address, 8, Access::kStore, "store_global", site), value, 8);
}
DEVICE float load_global_fresh(const float* address, Site site = Site::here()) {
    float value;
    std::memcpy(&value, emulator::global_at(address, 4, Access::kLoadFresh, "load_global_fresh", site), 4);
    return value;
}
DEVICE void store_global_fresh(float* address, float value, Site site = Site::here()) {
    std::memcpy(emulator::global_at(address, 4, Access::kStore, "store_global_fresh", site), &value, 4);
}

// ---- Copies that run beside the arithmetic ----------------------------------------------------------

DEVICE void copy_async(uint32 to, const void* from, int size, Site site = Site::here()) {
    emulator::issue({to, size ? from : nullptr, size}, site);
}
DEVICE void copy_async(uint32 to, const void* from, bool valid, Site site = Site::here()) {
    copy_async(to, from, valid ? 16 : 0, site);
}
DEVICE void copy_word_async(uint32 to, const void* from, Site site = Site::here()) {
    emulator::issue({to, from, 4, 4}, site);
}
DEVICE void commit_copies() { emulator::commit(); }
template <int kPending>
DEVICE void wait_copies() {
    emulator::wait_for_copies(kPending);
}

// ---- Tensor cores -----------------------------------------------------------------------------------

template <bool kTransposed>
DEVICE void load_four_matrices(uint32 (&to)[4], uint32 row_address, Site site) {
    constexpr Verb verb = kTransposed ? Verb::kLoadMatricesTransposed : Verb::kLoadMatrices;
    emulator::Operands& mine = emulator::now->warp->lanes[lane()];
    mine.to = to;
    mine.value = row_address;
    emulator::together(verb, site, [site](Warp& warp) {
        constexpr const char* name = emulator::kVerbNames[static_cast<int>(verb)];
        const emulator::Known known = emulator::common_knowledge(32 * warp.index, 32);
        for (int matrix = 0; matrix < 4; ++matrix) {
            uint16 elements[8][8];
            for (int row = 0; row < 8; ++row) {
                const uint32 address = warp.lanes[8 * matrix + row].value;
                std::memcpy(elements[row], emulator::shared_at(address, 16, name, site), 16);
                emulator::note_read(address, 16, emulator::this_warp(known), name, site);
            }
            for (int lane = 0; lane < 32; ++lane) {
                const int row = lane / 4, column = 2 * (lane % 4);
                const uint32 low = kTransposed ? elements[column][row] : elements[row][column];
                const uint32 high = kTransposed ? elements[column + 1][row] : elements[row][column + 1];
                warp.lanes[lane].to[matrix] = low | high << 16;
            }
        }
    });
}
DEVICE void load_matrices(uint32 (&to)[4], uint32 row_address, Site site = Site::here()) {
    load_four_matrices<false>(to, row_address, site);
}
DEVICE void load_matrices_transposed(uint32 (&to)[4], uint32 row_address, Site site = Site::here()) {
    load_four_matrices<true>(to, row_address, site);
}

template <typename Element>
DEVICE void multiply_add_warp(Warp& warp) {
    using Quad = float __attribute__((vector_size(16)));
    const auto low = [](uint32 pair) { return widen(Element{static_cast<uint16>(pair)}); };
    const auto high = [](uint32 pair) { return widen(Element{static_cast<uint16>(pair >> 16)}); };
    alignas(Quad) float b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4;
        b[2 * t][g] = low(warp.lanes[lane].value);
        b[2 * t + 1][g] = high(warp.lanes[lane].value);
        b[2 * t + 8][g] = low(warp.lanes[lane].other);
        b[2 * t + 9][g] = high(warp.lanes[lane].other);
    }
    for (int row = 0; row < 16; ++row) {
        const emulator::Operands* lanes = &warp.lanes[row % 8 * 4];
        const int below = row / 8;
        float a[16];
        alignas(Quad) float c[8];
        for (int t = 0; t < 4; ++t) {
            const uint32 left = lanes[t].a[below], right = lanes[t].a[2 + below];
            a[2 * t] = low(left), a[2 * t + 1] = high(left);
            a[2 * t + 8] = low(right), a[2 * t + 9] = high(right);
            c[2 * t] = lanes[t].c[2 * below], c[2 * t + 1] = lanes[t].c[2 * below + 1];
        }
        Quad *sums = reinterpret_cast<Quad*>(c), first = sums[0], second = sums[1];
        for (int k = 0; k < 16; ++k) {
            first += a[k] * *reinterpret_cast<const Quad*>(&b[k][0]);
            second += a[k] * *reinterpret_cast<const Quad*>(&b[k][4]);
        }
        sums[0] = first, sums[1] = second;
        for (int t = 0; t < 4; ++t) lanes[t].c[2 * below] = c[2 * t], lanes[t].c[2 * below + 1] = c[2 * t + 1];
    }
}
template <typename Element>
DEVICE void multiply_add(float (&c)[4], const uint32 (&a)[4], uint32 b0, uint32 b1, Site site = Site::here()) {
    emulator::Operands& mine = emulator::now->warp->lanes[lane()];
    mine.c = c;
    mine.a = a;
    mine.value = b0;
    mine.other = b1;
    emulator::together(Verb::kMultiplyAdd, site, multiply_add_warp<Element>);
}

}  // namespace cupyattn::ptx
