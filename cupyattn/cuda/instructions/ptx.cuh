// Every instruction and every access to memory, one function each; asm is here and in ptx90.cuh, nowhere else.
//
// Kernels touch shared memory by its 32-bit shared address and global memory through load_global and
// store_global, nothing else: tests/emulator/ptx.cuh has the same names for the host, and checks each access.
#pragma once

#include "instructions/common.cuh"

namespace cupyattn::ptx {

// ---- Who am I ---------------------------------------------------------------------------------------

DEVICE int thread() { return threadIdx.x; }
DEVICE int threads() { return blockDim.x; }
DEVICE int lane() { return threadIdx.x % 32; }
DEVICE int warp() { return threadIdx.x / 32; }
DEVICE int block_x() { return blockIdx.x; }
DEVICE int block_y() { return blockIdx.y; }
DEVICE int block_z() { return blockIdx.z; }
DEVICE int grid_x() { return gridDim.x; }

// ---- Waiting for each other -------------------------------------------------------------------------

DEVICE void barrier() { __syncthreads(); }
// A barrier that tells everybody whether the condition holds for anybody.
DEVICE bool barrier_any(bool condition) { return __syncthreads_or(condition); }
DEVICE void warp_barrier() { __syncwarp(); }

// fence.acq_rel.gpu: what this thread wrote is visible to whoever sees a later write of it.
DEVICE void fence_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// atom.add.acq_rel.gpu; returns the value before.
DEVICE int atomic_add(int* address, int value) {
    int before;
    asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], %2;" : "=r"(before) : "l"(address), "r"(value) : "memory");
    return before;
}

// ---- Between the lanes of a warp --------------------------------------------------------------------

DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(~0u, value, mask); }
DEVICE uint32 shuffle(uint32 value, int lane) { return __shfl_sync(~0u, value, lane); }
DEVICE bool any(bool condition) { return __any_sync(~0u, condition); }
DEVICE bool all(bool condition) { return __all_sync(~0u, condition); }
// The first lane for which the condition holds; 32 if there is none.
DEVICE int first_lane(bool condition) { return __clz(__brev(__ballot_sync(~0u, condition))); }

// ---- Numbers ----------------------------------------------------------------------------------------

DEVICE float infinity() { return __int_as_float(0x7f800000); }
DEVICE float nan() { return __int_as_float(0x7fffffff); }
DEVICE uint32 bits(float value) { return __float_as_uint(value); }
DEVICE float from_bits(uint32 value) { return __uint_as_float(value); }
// The same number, of which the compiler does not know that it has it already; what a pointer leads to, likewise.
DEVICE void disguise(int& x) { asm volatile("" : "+r"(x)); }
DEVICE void disguise(uint32& x) { asm volatile("" : "+r"(x)); }
template <typename T>
DEVICE void disguise(const T*& x) {
    asm volatile("" : "+l"(x) : : "memory");
}
// Where it is, so that what is read of it there is not kept from before.
template <typename T>
DEVICE const T* disguised(const T& x) {
    const T* place = &x;
    disguise(place);
    return place;
}

// ex2.approx.ftz: relative error 2^-22.
DEVICE float exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// lg2.approx.ftz: absolute error 2^-22 near 1, relative elsewhere.
DEVICE float log2(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float divide(float a, float b) { return __fdividef(a, b); }
DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEVICE float max(float a, float b) { return fmaxf(a, b); }
DEVICE float absolute(float x) { return fabsf(x); }
DEVICE uint32 multiply_high(uint32 a, uint32 b) { return __umulhi(a, b); }

// cvt.rn: two numbers into one register, `low` in the lower half.
template <typename Element>
DEVICE uint32 pack(float low, float high) {
    uint32 packed;
    if constexpr (Same<Element, BFloat16>::value)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}
DEVICE float widen(BFloat16 x) { return __uint_as_float(static_cast<uint32>(x.bits) << 16); }
DEVICE float widen(Half x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
DEVICE float widen(float x) { return x; }
DEVICE float widen(double x) { return static_cast<float>(x); }

// ---- Shared memory ----------------------------------------------------------------------------------

// The block's dynamic shared memory, aligned to 1024 bytes.
DEVICE uint32 shared_memory() {
    extern __shared__ __align__(1024) uint8 cupyattn_shared_memory[];
    return static_cast<uint32>(__cvta_generic_to_shared(cupyattn_shared_memory));
}

DEVICE void store_shared(uint32 address, uint32 value) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
DEVICE void store_shared(uint32 address, float value) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}
DEVICE void store_shared(uint32 address, uint32 a, uint32 b, uint32 c, uint32 d) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
DEVICE uint32 load_shared(uint32 address) {
    uint32 value;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
    return value;
}
DEVICE void load_shared(uint32 (&value)[2], uint32 address) {
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(value[0]), "=r"(value[1]) : "r"(address) : "memory");
}
DEVICE float load_shared_float(uint32 address) { return __uint_as_float(load_shared(address)); }
DEVICE void load_shared(uint32 (&value)[4], uint32 address) {
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value[0]), "=r"(value[1]), "=r"(value[2]), "=r"(value[3])
                 : "r"(address)
                 : "memory");
}

// ---- Global memory ----------------------------------------------------------------------------------

// An ordinary load of a scalar: uint8, uint16, int, uint32, float, double, Half or BFloat16.
template <typename T>
DEVICE T load_global(const T* address) {
    return *address;
}
// Sixteen bytes, aligned to sixteen.
DEVICE void load_global(uint32 (&value)[4], const void* address) {
    const uint4 found = *static_cast<const uint4*>(address);
    value[0] = found.x, value[1] = found.y, value[2] = found.z, value[3] = found.w;
}
template <typename T>
DEVICE void store_global(T* address, T value) {
    *address = value;
}
DEVICE void store_global(void* address, const uint32 (&value)[4]) {
    *static_cast<uint4*>(address) = make_uint4(value[0], value[1], value[2], value[3]);
}
DEVICE void store_global(void* address, const uint32 (&value)[2]) {
    *static_cast<uint2*>(address) = make_uint2(value[0], value[1]);
}
// ld.global.cg, st.global.cg: past the first-level cache, for what another block wrote during this launch.
DEVICE float load_global_fresh(const float* address) {
    float value;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(value) : "l"(address) : "memory");
    return value;
}
DEVICE void store_global_fresh(float* address, float value) {
    asm volatile("st.global.cg.f32 [%0], %1;" ::"l"(address), "f"(value) : "memory");
}

// ---- Copies that run beside the arithmetic: cp.async ------------------------------------------------

// Up to sixteen bytes from global to shared memory, and zeros behind them; of none, no access at all.
DEVICE void copy_async(uint32 to, const void* from, int size) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(size) : "memory");
}
// Four bytes.
DEVICE void copy_word_async(uint32 to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most `kPending` of this thread's latest groups are under way.
template <int kPending>
DEVICE void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- Tensor cores -----------------------------------------------------------------------------------

// ldmatrix.x4: four 8x8 matrices of 16-bit numbers; lanes 8i to 8i + 7 give the row addresses of matrix i.
// Register i of a lane then holds row lane / 4, columns 2 * (lane % 4) and the next, of matrix i.
DEVICE void load_matrices(uint32 (&to)[4], uint32 row_address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row_address)
                 : "memory");
}
// The same with each matrix transposed.
DEVICE void load_matrices_transposed(uint32 (&to)[4], uint32 row_address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row_address)
                 : "memory");
}

// mma.sync m16n8k16: c += a b, float32 sums of 16-bit products.  With g = lane / 4, t = lane % 4:
//     a[0] (g, 2t) (g, 2t+1)   a[1] the same of row g + 8   a[2], a[3] the same of columns + 8
//     b0 (2t, g) (2t+1, g)     b1 the same of rows + 8
//     c[0], c[1] (g, 2t) (g, 2t+1)   c[2], c[3] the same of row g + 8
template <typename Element>
DEVICE void multiply_add(float (&c)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
    if constexpr (Same<Element, BFloat16>::value)
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace cupyattn::ptx
