// Memory: every access is within its space, aligned to its size (9.7.9.8, ld), and touches nothing that is under way.
#pragma once
#include "order.h"

// ---- Shared memory --------------------------------------------------------------------------------------------------
// An address of shared::cluster has the block's rank, counted from 1, above its low 24 bits; of shared::cta 0 there.

constexpr u32 kRankShift = 24;
constexpr u32 kOffsetMask = (1u << kRankShift) - 1;

struct ClusterAddress {
    u32 rank, offset;
};
static ClusterAddress cluster_address(Thread& thread, u32 address) {
    const u32 place = address >> kRankShift;
    if (place > machine.blocks.size()) fail(thread, "shared::cluster address %#x is in no block", address);
    return {place ? place - 1 : thread.rank, address & kOffsetMask};
}

static u8* shared_bytes(Thread& thread, u32 rank, u32 address, u32 bytes, const char* what) {
    const u32 end = kSharedBase + machine.shared_bytes;
    if (address < kSharedBase || address + bytes > end)
        fail(thread, "%s at shared %u (%u bytes) outside of [%u, %u)", what, address, bytes, kSharedBase, end);
    return machine.blocks[rank].shared + address;
}

// What a copy is to fill holds nans until it has come, and may not be touched.
static void begin_copy_to(Block& block, u32 address, u32 bytes) {
    memset(block.shared + address, 0xff, bytes);
    const Words words = words_of(address, bytes);
    for (u32 index = words.first; index <= words.last; ++index) block.flags[index] |= kCopyUnderWay;
}
static void end_copy_to(Block& block, u32 address, u32 bytes) {
    const Words words = words_of(address, bytes);
    for (u32 index = words.first; index <= words.last; ++index) block.flags[index] &= ~kCopyUnderWay;
}
static void check_untouched(Thread& thread, const Block& block, u32 address, u32 bytes, const char* what) {
    const Words words = words_of(address, bytes);
    for (u32 index = words.first; index <= words.last; ++index) {
        if (block.flags[index] & kCopyUnderWay)
            fail(thread, "%s at shared %u: a copy to it is under way", what, address);
        if (block.flags[index] & kMbarrier) fail(thread, "%s at shared %u: an mbarrier is there", what, address);
    }
}
static void note_generic_write(const Thread& thread, Block& block, u32 address, u32 bytes) {
    const Words words = words_of(address, bytes);
    for (u32 index = words.first; index <= words.last; ++index)
        block.generic_writes[index] = {thread.index, thread.proxy_fences};
}

// Without swapping to other threads: for what a warp does as one.
static u8* shared_at_once(Thread& thread, u32 address, u32 bytes, bool writes) {
    const char* what = writes ? "store" : "load";
    if (address >> kRankShift) fail(thread, "%s at shared::cluster %#x, where shared::cta is wanted", what, address);
    if (address % bytes) fail(thread, "%s at shared %u, which is not aligned to %u", what, address, bytes);
    u8* place = shared_bytes(thread, thread.rank, address, bytes, what);
    Block& block = block_of(thread);
    check_untouched(thread, block, address, bytes, what);
    if (writes) {
        note_generic_write(thread, block, address, bytes);
        order_write(thread, block, address, bytes);
    } else {
        order_read(thread, block, address, bytes);
    }
    return place;
}
u8* shared_memory(Thread& thread, u32 address, u32 bytes, bool writes) {
    preempt(thread);
    return shared_at_once(thread, address, bytes, writes);
}

// ---- Global memory, and constants -----------------------------------------------------------------------------------

static bool lies_within(u64 address, u64 bytes, u64 low, u64 high) { return address >= low && address + bytes <= high; }

static u8* global_at_once(Thread& thread, u64 address, u32 bytes, bool writes, bool ordered) {
    const char* what = writes ? "store" : "load";
    const unsigned long printed = address;
    if (address % bytes) fail(thread, "%s at global %#lx, which is not aligned to %u", what, printed, bytes);
    const Request& request = *machine.request;
    for (s64 tried = 0; tried < request.num_buffers; ++tried) {
        const s64 index = (machine.last_buffer + tried) % request.num_buffers;
        const Buffer& buffer = request.buffers[index];
        if (!lies_within(address, bytes, buffer.address, buffer.address + buffer.bytes)) continue;
        machine.last_buffer = index;  // most accesses are where the last one was
        if (writes && !buffer.writable) fail(thread, "store at global %#lx, which is read-only", printed);
        if (ordered && buffer.writable) order_global(thread, address, bytes, writes);
        return (u8*)address;
    }
    int num_constants;
    const Region* regions = constants(&num_constants);
    for (int index = 0; index < num_constants && !writes; ++index)
        if (lies_within(address, bytes, regions[index].low, regions[index].high)) return (u8*)address;
    fail(thread, "%s at global %#lx (%u bytes), which is in no buffer", what, printed, bytes);
}
u8* global_memory(Thread& thread, u64 address, u32 bytes, bool writes) {
    preempt(thread);
    return global_at_once(thread, address, bytes, writes, true);
}

// ---- Local memory, parameters, generic addresses --------------------------------------------------------------------

static bool is_local(const Thread& thread, u64 address, u32 bytes) {
    return lies_within(address, bytes, (u64)thread.stack, (u64)thread.stack + kStackBytes);
}
static bool is_parameter(u64 address, u32 bytes) {
    const u64 low = (u64)launch.parameters;
    return lies_within(address, bytes, low, low + machine.request->parameter_bytes);
}

u8* local_memory(Thread& thread, u64 address, u32 bytes) {
    if (address % bytes) fail(thread, "local %#lx is not aligned to %u", (unsigned long)address, bytes);
    if (!is_local(thread, address, bytes))
        fail(thread, "local %#lx is outside of local memory", (unsigned long)address);
    return (u8*)address;
}
// Those of device functions are on the stack.
u8* parameter_memory(Thread& thread, u64 address, u32 bytes) {
    const s64 offset = address - (u64)launch.parameters;
    if (address % bytes) fail(thread, "parameter %ld is not aligned to %u", (long)offset, bytes);
    if (!is_local(thread, address, bytes) && !is_parameter(address, bytes))
        fail(thread, "parameter %ld (%u bytes) outside of %u bytes", (long)offset, bytes,
             machine.request->parameter_bytes);
    return (u8*)address;
}
u8* generic_memory(Thread& thread, u64 address, u32 bytes, bool writes) {
    if (is_local(thread, address, bytes)) return local_memory(thread, address, bytes);
    if (!writes && is_parameter(address, bytes)) return parameter_memory(thread, address, bytes);
    return global_memory(thread, address, bytes, writes);
}

// ---- Atomics and fences ---------------------------------------------------------------------------------------------

u32 atom_add_acq_rel_gpu_global_s32(Thread& thread, u64 address, u32 value) {
    preempt(thread);
    u8* place = global_at_once(thread, address, 4, true, false);
    acquire_and_release(thread, address);
    const u32 old = read<u32>(place);
    write<u32>(place, old + value);
    return old;
}
// Orders nothing by itself: it takes an atomic access on either side, and ours are acquire and release themselves.
void fence_acq_rel_gpu(Thread&) {}
