// What the instructions of PTX mean, one function each: the translated text calls them, the runtime is them.
//
// A function has its instruction's name, dots turned into underscores, without what is true of all that we know
// (.sync.aligned of warps and warpgroups, .shared::cta of mbarriers; .ftz is said, since it changes a result). Above it
// stands the section of the PTX ISA (9.0) that says what it does. Registers are bits: u32 for .f32, .b32, .s32 alike.
#pragma once
#include <cstdint>
#include <cstring>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int8_t s8;
typedef int16_t s16;
typedef int32_t s32;
typedef int64_t s64;

// Where dynamic shared memory begins: as on sm_90, whose first KiB is the system's.
constexpr u32 kSharedBase = 1024;

// What a launch is, for the special registers.
struct Launch {
    u32 threads;  // of a block
    u32 grid[3];
    u32 cluster;  // blocks of one
    u8* parameters;
};
extern Launch launch;

// One CUDA thread; the runtime has more of it behind this.
struct ThreadBase {
    u32 number;    // %tid.x
    u32 lane;      // %laneid
    u32 warp;      // of its block
    u32 rank;      // %cluster_ctarank
    u32 block[3];  // %ctaid
    u32 line;      // of the PTX that it is at: set before every instruction that can fail
};
struct Thread;

extern u64* visits;  // of each basic block of the text

[[noreturn]] void fail(Thread&, const char* format, ...);

// ---- Floating-point instructions (9.7.3), single precision: bits in, bits out ---------------------------------------

u32 add_rn_f32(u32 a, u32 b);
u32 add_rn_ftz_f32(u32 a, u32 b);
u32 add_rm_ftz_f32(u32 a, u32 b);
u32 sub_rn_ftz_f32(u32 a, u32 b);
u32 mul_rn_ftz_f32(u32 a, u32 b);
u32 fma_rn_ftz_f32(u32 a, u32 b, u32 c);
u32 div_rn_ftz_f32(u32 a, u32 b);
u32 div_approx_ftz_f32(u32 a, u32 b);
u32 rcp_rn_ftz_f32(u32 a);
u32 rcp_approx_ftz_f32(u32 a);
u32 neg_ftz_f32(u32 a);
u32 abs_ftz_f32(u32 a);
u32 max_ftz_f32(u32 a, u32 b);
u32 min_ftz_f32(u32 a, u32 b);
u32 ex2_approx_ftz_f32(u32 a);
u32 lg2_approx_ftz_f32(u32 a);
u32 tanh_approx_f32(u32 a);
// Of setp (9.7.6.2): the ordered comparisons, and whether neither is nan; `ftz` as the instruction says.
enum class Compare { eq, ne, lt, le, gt, ge, equ, neu, ltu, leu, gtu, geu, num, nan };
bool setp_f32(Compare, bool ftz, u32 a, u32 b);

// Half precision (9.7.4), pairs
u32 fma_rn_f16x2(u32 a, u32 b, u32 c);
u32 fma_rn_bf16x2(u32 a, u32 b, u32 c);

// Conversions (9.7.9.21)
u32 cvt_rn_bf16x2_f32(u32 high, u32 low);
u32 cvt_rn_f16x2_f32(u32 high, u32 low);
u16 cvt_rn_satfinite_e4m3x2_f32(u32 high, u32 low);
u32 cvt_rn_f16x2_e4m3x2(u16 pair);
u32 cvt_f32_f16(u16 a);
u64 cvt_f64_f32(u32 a);
u64 cvt_ftz_f64_f32(u32 a);
u32 cvt_rn_ftz_f32_f64(u64 a);
u32 cvt_rzi_ftz_u32_f32(u32 a);
u32 cvt_rzi_ftz_s32_f32(u32 a);
u32 cvt_rn_f32_s32(u32 a);
u32 cvt_rn_f32_u32(u32 a);
u32 cvt_rn_f32_s64(u64 a);
u32 cvt_rn_f32_u16(u16 a);

// ---- Integers and bits (9.7.1, 9.7.8) -------------------------------------------------------------------------------

u32 prmt_b32(u32 a, u32 b, u32 selector);
u32 bfi_b32(u32 a, u32 b, u32 position, u32 length);
u64 bfi_b64(u64 a, u64 b, u32 position, u32 length);
u32 clz_b32(u32 a);
u32 brev_b32(u32 a);
u32 bfe_u32(u32 a, u32 position, u32 length);
u32 lop3_b32(u32 a, u32 b, u32 c, u32 table);
u32 shl_b32(u32 a, u32 count);
u64 shl_b64(u64 a, u32 count);
u32 shr_u32(u32 a, u32 count);
u64 shr_u64(u64 a, u32 count);
u32 shr_s32(u32 a, u32 count);
u64 shr_s64(u64 a, u32 count);
// A divisor of zero fails: the ISA leaves it open.
u32 div_s32(Thread&, u32 a, u32 b);
u32 rem_s32(Thread&, u32 a, u32 b);
u32 div_u32(Thread&, u32 a, u32 b);
u32 rem_u32(Thread&, u32 a, u32 b);
u64 div_s64(Thread&, u64 a, u64 b);
u64 rem_s64(Thread&, u64 a, u64 b);
u64 div_u64(Thread&, u64 a, u64 b);
u64 rem_u64(Thread&, u64 a, u64 b);

// ---- Memory (9.7.9): a pointer to bytes that may be accessed, or failure --------------------------------------------

u8* shared_memory(Thread&, u32 address, u32 bytes, bool writes);
u8* global_memory(Thread&, u64 address, u32 bytes, bool writes);
u8* generic_memory(Thread&, u64 address, u32 bytes, bool writes);
u8* local_memory(Thread&, u64 address, u32 bytes);
u8* parameter_memory(Thread&, u64 address, u32 bytes);
template <typename T>
inline T read(const u8* from) {
    T value;
    memcpy(&value, from, sizeof value);
    return value;
}
template <typename T>
inline void write(u8* to, T value) {
    memcpy(to, &value, sizeof value);
}
u32 atom_add_acq_rel_gpu_global_s32(Thread&, u64 address, u32 value);  // 9.7.13.5
void fence_acq_rel_gpu(Thread&);                                       // 9.7.13.4, membar / fence

// ---- Warps and blocks (9.7.9.6, 9.7.13); `site` names the instruction: all lanes have to be at the same one ---------

enum class Shuffle { idx, bfly, up, down };
void shfl_sync(Thread&, int site, Shuffle, u32 value, u32 lane, u32 clamp, u32 members, u32* to, bool* in_range);
bool vote_any(Thread&, int site, bool predicate, u32 members);
bool vote_all(Thread&, int site, bool predicate, u32 members);
u32 vote_ballot(Thread&, int site, bool predicate, u32 members);
void bar_warp_sync(Thread&, int site, u32 members);
void bar_sync(Thread&, int site, u32 barrier, s64 threads);  // threads < 0: all of the block
void bar_arrive(Thread&, int site, u32 barrier, s64 threads);
bool bar_red_or(Thread&, int site, u32 barrier, bool predicate);
void barrier_cluster_arrive_release(Thread&, int site);
void barrier_cluster_arrive_relaxed(Thread&, int site);
void barrier_cluster_wait_acquire(Thread&, int site);
void setmaxnreg_inc(Thread&, int site, u32 registers);
void setmaxnreg_dec(Thread&, int site, u32 registers);

// ---- Products and moves of a warp (9.7.14) --------------------------------------------------------------------------

void mma_m16n8k16_f16(Thread&, int site, u32* d, const u32* a, const u32* b, const u32* c);
void mma_m16n8k16_bf16(Thread&, int site, u32* d, const u32* a, const u32* b, const u32* c);
void ldmatrix_x4(Thread&, int site, bool transposes, u32 address, u32* to);
void stmatrix_x4(Thread&, int site, bool transposes, u32 address, const u32* from);

// ---- Copies that happen later (9.7.9.25) ----------------------------------------------------------------------------

void cp_async_16(Thread&, u32 to, u64 from, u32 bytes);  // bytes < 16: zeros behind them
void cp_async_4(Thread&, u32 to, u64 from);
void cp_async_commit_group(Thread&);
void cp_async_wait_group(Thread&, u32 pending);
void cp_async_bulk_commit_group(Thread&);
void cp_async_bulk_wait_group(Thread&, u32 pending, bool only_reads);
void prefetch_tensormap(Thread&, u64 map);
void cp_async_bulk_tensor_5d_load(Thread&, u32 to, u64 map, u32 mbarrier, const u32* corner, bool multicasts, u32 ranks,
                                  u64 policy);
void cp_async_bulk_tensor_5d_store(Thread&, u64 map, u32 from, const u32* corner);

// ---- mbarriers and proxies (9.7.13.15, 9.7.13.4) --------------------------------------------------------------------

u32 mapa_shared_cluster(Thread&, u32 address, u32 rank);
void mbarrier_init(Thread&, u32 address, u32 arrivals);
void mbarrier_arrive(Thread&, u32 address, bool anywhere_in_the_cluster);
void mbarrier_arrive_expect_tx(Thread&, u32 address, u32 bytes);
bool mbarrier_try_wait_parity(Thread&, u32 address, u32 parity);
void fence_proxy_async(Thread&);
void fence_mbarrier_init(Thread&);

// ---- Products of a warpgroup (9.7.15) -------------------------------------------------------------------------------

void wgmma_fence(Thread&, int site);
void wgmma_commit_group(Thread&, int site);
void wgmma_wait_group(Thread&, int site, u32 pending);
enum class Number { f16, bf16, e4m3 };
struct WarpgroupProduct {
    u32 columns;  // N
    Number number;
    bool a_is_shared;
    bool adds;  // scale-d
    s32 sign_a, sign_b;
    bool transposes_a, transposes_b;
};
// `d` and `a` point to the registers themselves: those of D are poison while the product is under way, those of A must
// not change. `a` is null where A is in shared memory, by `descriptor_a`.
void wgmma_mma_async(Thread&, int site, const WarpgroupProduct&, u32* const* d, u64 descriptor_a, u32* const* a,
                     u64 descriptor_b);
