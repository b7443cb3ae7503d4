// Hopper's instructions (sm_90a), one function each; with ptx.cuh and wgmma.cuh, all there is of asm.
//
// What runs beside the threads here - boxes that TMA brings and products that warpgroups ask for - is waited for by
// mbarriers and groups, and sees what threads stored only after fence_async_proxy. tests/emulator/ptx90.cuh has the
// same names for the host.
#pragma once

#include "instructions/ptx.cuh"
#include "instructions/wgmma.cuh"

namespace cupyattn {

// Where a tensor lies and which box of it is brought at once: encoded by the driver, a parameter of the kernel that is
// __grid_constant__, so that it has an address.
struct alignas(64) TensorMap {
    uint64 words[16];
};

namespace ptx {

// ---- Who am I ---------------------------------------------------------------------------------------

// The same for a whole warp, and the compiler knows.
DEVICE int warpgroup() { return __shfl_sync(~0u, threadIdx.x / 128, 0); }

// Blocks of a cluster run side by side, and reach each other's shared memory: this one's number among them.
DEVICE int cluster_rank() {
    int rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// setmaxnreg: registers of each thread of a warpgroup, between 24 and 256, a multiple of 8. All four warps give
// them back, or wait until there are that many. Needs __launch_bounds__(threads, 1).
template <int kCount>
DEVICE void more_registers() {
    static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256);
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
DEVICE void fewer_registers() {
    static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256);
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// ---- Waiting for each other -------------------------------------------------------------------------

// An mbarrier is eight bytes of shared memory, by shared address. A phase of it ends when `arrivals` threads have
// arrived and all bytes that they expected have come; phases have parity 0, 1, 0, ...
DEVICE void mbarrier_init(uint32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// After the last mbarrier_init, before the barrier that lets others use them.
DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void mbarrier_arrive(uint32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and has the phase wait for so many bytes more.
DEVICE void mbarrier_arrive_expect(uint32 barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Until the latest phase of this parity has ended; of parity 1 there was one before the first.
DEVICE void mbarrier_wait(uint32 barrier, int parity) {
    asm volatile(
        "{ .reg .pred ended;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
        "@!ended bra.uni again; }" ::"r"(barrier), "r"(parity)
        : "memory");
}

// Arrives at the mbarrier that the cluster's block of that rank has at the same address.  It tells of reads that have
// ended, and of stores to the block's own shared memory; to release all stores to the cluster would be a fence of the
// whole GPU each time.
DEVICE void mbarrier_arrive_at(uint32 barrier, int rank) {
    asm volatile(
        "{ .reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there]; }" ::"r"(barrier), "r"(rank)
        : "memory");
}
// Of all threads of a cluster, once, behind fence_mbarrier_init: then all its blocks have begun, and everybody may use
// their mbarriers.  It orders nothing else, neither between blocks nor within one: to release all stores to the cluster
// would be a fence of the whole GPU.  No block may exit while another still reaches for its shared memory.
DEVICE void begin_cluster() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Barriers of some warps, by number from 1 to 15 (0 is ptx::barrier): `threads` in all arrive, some of them without
// waiting for the others.
DEVICE void named_barrier(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
DEVICE void named_barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// What this thread stored to shared memory is seen by boxes and products that come after.
DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- Numbers ----------------------------------------------------------------------------------------

// A pair of nans where `pair` or `probe` has something other than a finite number, else `probe`, which starts as 0.
template <typename Element>
DEVICE uint32 probe_finite(uint32 pair, uint32 probe) {
    uint32 result;
    if constexpr (Same<Element, BFloat16>::value)
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(pair), "r"(0), "r"(probe));
    else
        asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(pair), "r"(0), "r"(probe));
    return result;
}
DEVICE float add_round_down(float a, float b) {
    float sum;
    asm("add.rm.ftz.f32 %0, %1, %2;" : "=f"(sum) : "f"(a), "f"(b));
    return sum;
}
// prmt: byte i of the result is byte (selector >> 4i) & 7 of a (0 to 3) and b (4 to 7).
DEVICE uint32 permute_bytes(uint32 a, uint32 b, uint32 selector) { return __byte_perm(a, b, selector); }

// Four numbers into one register, x0 lowest; what is too large becomes 448 of its sign.
DEVICE uint32 pack_float8(float x0, float x1, float x2, float x3) {
    uint32 packed;
    asm("{ .reg .b16 low, high;\n"
        "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
        "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
        "mov.b32 %0, {low, high}; }"
        : "=r"(packed)
        : "f"(x0), "f"(x1), "f"(x2), "f"(x3));
    return packed;
}
DEVICE float widen(Float8 x) {
    uint32 pair;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(static_cast<uint16>(x.bits)));
    return widen(Half{static_cast<uint16>(pair)});
}

// ---- Boxes: TMA ---------------------------------------------------------------------------------------

// L2 cache policies.
constexpr uint64 kKeepInL2 = 0x14F0000000000000;
constexpr uint64 kDropFromL2 = 0x12F0000000000000;

DEVICE void prefetch_map(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }

// One thread has a box of a tensor brought to shared memory, from the coordinates of its first element; zeros where
// there is no tensor. The bytes that the barrier gets are always those of the whole box.
DEVICE void load_box(uint32 to, const TensorMap& map, uint32 barrier, int c0, int c1, int c2, int c3, int c4,
                     uint64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(to),
        "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4), "l"(policy)
        : "memory");
}
// For each block of the cluster whose bit is set in `ranks`: to the same address of its shared memory, and of its
// mbarrier.
DEVICE void load_box_for(uint32 ranks, uint32 to, const TensorMap& map, uint32 barrier, int c0, int c1, int c2, int c3,
                         int c4, uint64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint"
        " [%0], [%1, {%4, %5, %6, %7, %8}], [%2], %3, %9;" ::"r"(to),
        "l"(&map), "r"(barrier), "h"(static_cast<uint16>(ranks)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4), "l"(policy)
        : "memory");
}
// The other way; what lies outside of the tensor is left out.
DEVICE void store_box(const TensorMap& map, uint32 from, int c0, int c1, int c2, int c3, int c4) {
    asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(&map),
                 "r"(from), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
                 : "memory");
}
DEVICE void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until shared memory is read for all but `kPending` of this thread's latest groups.
template <int kPending>
DEVICE void wait_stores_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// ---- Tensor cores -------------------------------------------------------------------------------------

// stmatrix.x4, the inverse of load_matrices: lanes 8i to 8i + 7 give the row addresses of matrix i, register i its
// numbers.
DEVICE void store_matrices(uint32 row_address, uint32 x0, uint32 x1, uint32 x2, uint32 x3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row_address), "r"(x0),
                 "r"(x1), "r"(x2), "r"(x3)
                 : "memory");
}

// Before the first product of a group: registers that were written are read as written.
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most `kPending` of this warpgroup's latest groups are under way.
template <int kPending>
DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// c = a b, or c += a b: 64 rows, 8 * kBlocks columns, along 16 numbers of 16 bits or 32 of 8, by all four warps of a
// warpgroup; float32 sums. With w = warp % 4, g = lane / 4, t = lane % 4:
//     c[j][0], c[j][1]  (16w + g, 8j + 2t) and the next   c[j][2], c[j][3]  the same of row + 8
// Operands lie in shared memory, by descriptor; kByColumns: b's columns lie together, not its rows.
template <typename Element, bool kByColumns, int kBlocks>
DEVICE void wgmma(float (&c)[kBlocks][4], uint64 a, uint64 b, bool accumulate) {
    static_assert(!(kByColumns && Same<Element, Float8>::value), "only 16-bit numbers may lie by columns");
    Wgmma<kBlocks>::template multiply<Element, kByColumns>(c, a, b, accumulate);
}
// The same with a in registers, as multiply_add wants them: rows 16w to 16w + 15.
template <typename Element, bool kByColumns, int kBlocks>
DEVICE void wgmma(float (&c)[kBlocks][4], const uint32 (&a)[4], uint64 b, bool accumulate) {
    static_assert(!(kByColumns && Same<Element, Float8>::value), "only 16-bit numbers may lie by columns");
    Wgmma<kBlocks>::template multiply<Element, kByColumns>(c, a, b, accumulate);
}

// Keeps accumulators and fragments in their registers: before the first product that uses them, and after the wait.
template <int kBlocks>
DEVICE void hold(float (&c)[kBlocks][4]) {
#pragma unroll
    for (int j = 0; j < kBlocks; ++j)
        asm volatile("" : "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])::"memory");
}
template <int kCount>
DEVICE void hold(uint32 (&a)[kCount][4]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
        asm volatile("" : "+r"(a[i][0]), "+r"(a[i][1]), "+r"(a[i][2]), "+r"(a[i][3])::"memory");
}
// Whatever `value` depends on comes before a wait that follows: ptxas would move the wait up, and then nothing runs
// beside the products. A store that never happens, for `value` is not negative.
DEVICE void pin(float value, uint32 address) {
    asm volatile("{ .reg .pred never; setp.lt.f32 never, %0, 0f00000000; @never st.shared.f32 [%1], %0; }" ::"f"(value),
                 "r"(address)
                 : "memory");
}

}  // namespace ptx
}  // namespace cupyattn
