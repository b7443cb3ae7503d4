// The host's twin of cupyattn/cuda/instructions/ptx90.cuh: the same functions, with the meaning the PTX manual gives them.
//
// A TensorMap is what `encode_map` of this package makes, not what the driver makes.
#pragma once

#include "products.h"
#include "instructions/ptx.cuh"

namespace cupyattn {

struct alignas(64) TensorMap {
    uint64 words[16];
};

namespace ptx {

// ---- Who am I ---------------------------------------------------------------------------------------

DEVICE int warpgroup(Site site = Site::here()) {
    emulator::together(Verb::kWarpgroup, site, [](Warp&) {});
    return thread() / 128;
}
// Blocks of a cluster run side by side, and reach each other's shared memory.
DEVICE int cluster_rank() { return emulator::now->block->rank; }

template <int kCount>
DEVICE void more_registers(Site site = Site::here()) {
    static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256);
    emulator::change_registers(kCount, true, site);
}
template <int kCount>
DEVICE void fewer_registers(Site site = Site::here()) {
    static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256);
    emulator::change_registers(kCount, false, site);
}

// ---- Waiting for each other -------------------------------------------------------------------------

DEVICE void mbarrier_init(uint32 barrier, int arrivals, Site site = Site::here()) {
    emulator::init_mbarrier(barrier, arrivals, site);
}
DEVICE void fence_mbarrier_init() { emulator::fence_initializations(); }
DEVICE void mbarrier_arrive(uint32 barrier, Site site = Site::here()) {
    emulator::arrive_at_mbarrier(barrier, 0, "mbarrier_arrive", site);
}
DEVICE void mbarrier_arrive_expect(uint32 barrier, int bytes, Site site = Site::here()) {
    emulator::arrive_at_mbarrier(barrier, bytes, "mbarrier_arrive_expect", site);
}
DEVICE void mbarrier_wait(uint32 barrier, int parity, Site site = Site::here()) {
    emulator::wait_for_mbarrier(barrier, parity, site);
}
DEVICE void mbarrier_arrive_at(uint32 barrier, int rank, Site site = Site::here()) {
    emulator::arrive_at_mbarrier(barrier, 0, "mbarrier_arrive_at", site, rank);
}
DEVICE void begin_cluster(Site site = Site::here()) { emulator::begin_cluster(site); }
DEVICE void named_barrier(int id, int threads, Site site = Site::here()) {
    emulator::named_barrier(id, threads, true, site);
}
DEVICE void named_barrier_arrive(int id, int threads, Site site = Site::here()) {
    emulator::named_barrier(id, threads, false, site);
}
DEVICE void fence_async_proxy() { emulator::now->async_fences.push_back(machine.stamp++); }

// ---- Numbers ----------------------------------------------------------------------------------------

template <typename Element>
DEVICE uint32 probe_finite(uint32 pair, uint32 probe) {
    const auto half = [](uint32 x, uint32 before) -> uint32 {
        const float product = widen(Element{static_cast<uint16>(x)}) * 0.0f;
        return round_to(product + widen(Element{static_cast<uint16>(before)}), Element());
    };
    return half(pair, probe) | half(pair >> 16, probe >> 16) << 16;
}
// Downwards from the nearest if that is above the sum, which differs from it by what is lost: exactly a float.
DEVICE float add_round_down(float a, float b) {
    a = flush(a), b = flush(b);
    float sum = a + b;
    if (std::isinf(sum) && std::isfinite(a) && std::isfinite(b)) return sum > 0 ? -kLowest : sum;
    if (!std::isfinite(sum)) return sum;
    const float part = sum - a;
    const float lost = (a - (sum - part)) + (b - part);
    if (lost < 0) sum = std::nextafter(sum, -infinity());
    if (sum == 0 && (std::signbit(a) || std::signbit(b))) return -0.0f;
    return flush(sum);
}
DEVICE uint32 permute_bytes(uint32 a, uint32 b, uint32 selector) {
    const uint64 bytes = static_cast<uint64>(b) << 32 | a;
    uint32 result = 0;
    for (int i = 0; i < 4; ++i) result |= (bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return result;
}
// To nearest, ties to even, at most 448; every NaN becomes 0x7f.
DEVICE uint32 round_to(float x, Float8) {
    if (x != x) return 0x7f;
    const uint32 sign = bits(x) >> 24 & 0x80;
    const uint32 size = bits(x) & 0x7fffffff;
    if (size >= 0x43e00000) return sign | 0x7e;
    if (size < 0x3c800000)  // below 2^-6 the sum rounds to a multiple of 2^-9, the smallest there is
        return sign | (bits(from_bits(size) + 16384.0f) - bits(16384.0f));
    return sign | (size - (120u << 23) + 0x7ffff + (size >> 20 & 1)) >> 20;
}
DEVICE uint32 pack_float8(float x0, float x1, float x2, float x3) {
    return round_to(x0, Float8()) | round_to(x1, Float8()) << 8 | round_to(x2, Float8()) << 16 |
           round_to(x3, Float8()) << 24;
}
// The exponent starts at -7, that of a float at -127.
DEVICE float widen(Float8 x) {
    const uint32 size = x.bits & 0x7f;
    const float number = size == 0x7f ? nan() : from_bits(size << 20) * 1.329227995784916e36f;
    return x.bits & 0x80 ? -number : number;
}

// ---- Boxes: TMA ---------------------------------------------------------------------------------------

constexpr uint64 kKeepInL2 = 0x14F0000000000000;
constexpr uint64 kDropFromL2 = 0x12F0000000000000;

DEVICE void prefetch_map(const TensorMap& map, Site site = Site::here()) {
    emulator::decode(map.words, "prefetch_map", site);
}
DEVICE void load_box(uint32 to, const TensorMap& map, uint32 barrier, int c0, int c1, int c2, int c3, int c4,
                     uint64 policy, Site site = Site::here()) {
    if (policy != kKeepInL2 && policy != kDropFromL2) emulator::fail(site, "load_box: this is no cache policy");
    emulator::load_box(to, map.words, barrier, {c0, c1, c2, c3, c4}, site);
}
DEVICE void load_box_for(uint32 ranks, uint32 to, const TensorMap& map, uint32 barrier, int c0, int c1, int c2, int c3,
                         int c4, uint64 policy, Site site = Site::here()) {
    if (policy != kKeepInL2 && policy != kDropFromL2) emulator::fail(site, "load_box_for: this is no cache policy");
    emulator::load_box_for(ranks, to, map.words, barrier, {c0, c1, c2, c3, c4}, site);
}
DEVICE void store_box(const TensorMap& map, uint32 from, int c0, int c1, int c2, int c3, int c4,
                      Site site = Site::here()) {
    emulator::store_box(map.words, from, {c0, c1, c2, c3, c4}, site);
}
DEVICE void commit_stores() { emulator::commit_stores(); }
template <int kPending>
DEVICE void wait_stores_read() {
    emulator::wait_for_stores(kPending);
}

// ---- Tensor cores -------------------------------------------------------------------------------------

DEVICE void store_matrices(uint32 row_address, uint32 x0, uint32 x1, uint32 x2, uint32 x3, Site site = Site::here()) {
    uint32 numbers[4] = {x0, x1, x2, x3};
    emulator::Operands& mine = emulator::now->warp->lanes[lane()];
    mine.to = numbers;
    mine.value = row_address;
    emulator::together(Verb::kStoreMatrices, site, [site](Warp& warp) {
        for (int matrix = 0; matrix < 4; ++matrix)
            for (int row = 0; row < 8; ++row) {
                const uint32 address = warp.lanes[8 * matrix + row].value;
                std::uint8_t* to = emulator::shared_at(address, 16, "store_matrices", site);
                for (int pair = 0; pair < 4; ++pair) {
                    const int lane = 4 * row + pair;
                    emulator::note_store_of(32 * warp.index + lane, address + 4 * pair, 4, "store_matrices", site);
                    std::memcpy(to + 4 * pair, warp.lanes[lane].to + matrix, 4);
                }
            }
    });
}

DEVICE void wgmma_fence(Site site = Site::here()) { emulator::fence_products(site); }
DEVICE void wgmma_commit(Site site = Site::here()) { emulator::commit_products(site); }
template <int kPending>
DEVICE void wgmma_wait(Site site = Site::here()) {
    emulator::wait_for_products(kPending, site);
}

template <typename Element>
DEVICE float widen_bits(decltype(Element::bits) x) {
    return widen(Element{x});
}
template <typename Element, bool kByColumns, int kBlocks>
DEVICE void multiply_group(float (&c)[kBlocks][4], uint64 a, const uint32* fragments, uint64 b, bool accumulate,
                           Site site) {
    static_assert(!(kByColumns && Same<Element, Float8>::value), "only 16-bit numbers may lie by columns");
    static_assert(kBlocks % 2 == 0 && kBlocks >= 2 && kBlocks <= 32);
    using Bits = decltype(Element::bits);
    constexpr auto perform = emulator::perform_product<Bits, widen_bits<Element>, kByColumns>;
    emulator::multiply({perform, a, b, kBlocks, accumulate, kByColumns, fragments != nullptr}, c[0], fragments, site);
}
template <typename Element, bool kByColumns, int kBlocks>
DEVICE void wgmma(float (&c)[kBlocks][4], uint64 a, uint64 b, bool accumulate, Site site = Site::here()) {
    multiply_group<Element, kByColumns>(c, a, nullptr, b, accumulate, site);
}
template <typename Element, bool kByColumns, int kBlocks>
DEVICE void wgmma(float (&c)[kBlocks][4], const uint32 (&a)[4], uint64 b, bool accumulate, Site site = Site::here()) {
    multiply_group<Element, kByColumns>(c, 0, a, b, accumulate, site);
}

template <int kBlocks>
DEVICE void hold(float (&)[kBlocks][4]) {}
template <int kCount>
DEVICE void hold(uint32 (&)[kCount][4]) {}
DEVICE void pin(float value, uint32, Site site = Site::here()) {
    if (value < 0) emulator::fail(site, "pin: the value is negative, and would be stored");
}

}  // namespace ptx
}  // namespace cupyattn
