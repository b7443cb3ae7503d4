// Boxes of tensors (5.5, 9.7.9.25.5): from global to shared memory, for an mbarrier, and back, in bulk groups.
//
// A box comes at once in schedule 0, else when nobody can go on without it, in any order, in schedule 2 also earlier.
// One that goes back is read at once, or in schedule 1 when it is waited for.
#pragma once
#include "mbarriers.h"

// ---- Tensor maps: not the driver's, which nobody knows, but those of encode_map -------------------------------------

struct TensorMap {
    u64 mark;
    u64 address;
    u32 itemsize;
    u32 swizzle;     // bytes of a row in shared memory, or 0
    u32 dims[5];     // elements, the innermost first
    u64 strides[4];  // bytes, of all but the innermost
    u16 box[5];
};
constexpr u64 kMapMark = 0x70616d2d78747000;  // "\0ptx-map"
constexpr u32 kMapBytes = 128;
constexpr u32 kMapAlignment = 64;
constexpr u32 kBoxAlignment = 128;
constexpr u32 kChunkBytes = 16;  // what a swizzle moves as one

// createpolicy (9.7.9.18) makes 64 bits that no manual explains; these are the three that CUTLASS has.
constexpr u64 kEvictNormal = 0x1000000000000000;
constexpr u64 kEvictFirst = 0x12F0000000000000;
constexpr u64 kEvictLast = 0x14F0000000000000;

static const TensorMap& tensor_map(Thread& thread, u64 address) {
    if (address % kMapAlignment) fail(thread, "tensor map at %#lx, not aligned to 64", (unsigned long)address);
    if (!is_parameter(address, kMapBytes)) fail(thread, "tensor map at %#lx is no parameter", (unsigned long)address);
    const TensorMap& map = *(const TensorMap*)address;
    if (map.mark != kMapMark) fail(thread, "no tensor map at %#lx", (unsigned long)address);
    return map;
}
void prefetch_tensormap(Thread& thread, u64 map) { tensor_map(thread, map); }

static u32 box_bytes(const TensorMap& map) {
    u32 bytes = map.itemsize;
    for (u32 size : map.box) bytes *= size;
    return bytes;
}
static void check_box(Thread& thread, const TensorMap& map) {
    const u32 row = map.box[0] * map.itemsize;
    if (row % kChunkBytes || (map.swizzle && row > map.swizzle))
        fail(thread, "rows of a box have %u bytes, with a swizzle of %u", row, map.swizzle);
}

// Swizzling (5.5.7): the 16-byte chunks of a row change places by the row's number, which is in bits 7 and on of the
// address, whatever the swizzle's width is.
static u32 swizzled(u32 address, u32 swizzle) {
    if (swizzle < 32) return address;
    const u32 chunks = swizzle / kChunkBytes;
    return address ^ (address >> 7 & (chunks - 1)) << 4;
}

// 16 bytes of a box: where they are in shared memory, and where each element is in global memory; 0: outside of the
// tensor.
struct BoxChunk {
    u32 shared;
    u32 num_elements;
    u64 elements[kChunkBytes];
};
static BoxChunk box_chunk(const TensorMap& map, const s64 (&at)[5], u32 shared) {
    BoxChunk chunk;
    chunk.shared = swizzled(shared, map.swizzle);
    chunk.num_elements = kChunkBytes / map.itemsize;
    u64 row = map.address;
    bool inside = true;
    for (int axis = 1; axis < 5; ++axis) {
        inside &= at[axis] >= 0 && at[axis] < (s64)map.dims[axis];
        row += at[axis] * map.strides[axis - 1];
    }
    for (u32 element = 0; element < chunk.num_elements; ++element) {
        const s64 column = at[0] + element;
        const bool exists = inside && column >= 0 && column < (s64)map.dims[0];
        chunk.elements[element] = exists ? row + column * map.itemsize : 0;
    }
    return chunk;
}
template <typename Visit>
static void each_chunk(const TensorMap& map, u32 shared, const s32 (&corner)[5], const Visit& visit) {
    const u32 per_chunk = kChunkBytes / map.itemsize;
    const u32 num_chunks = box_bytes(map) / kChunkBytes;
    u32 index[5] = {};
    for (u32 chunk = 0; chunk < num_chunks; ++chunk) {
        s64 at[5];
        for (int axis = 0; axis < 5; ++axis) at[axis] = (s64)corner[axis] + index[axis];
        visit(box_chunk(map, at, shared + chunk * kChunkBytes));
        index[0] += per_chunk;
        for (int axis = 0; axis < 4 && index[axis] >= map.box[axis]; ++axis) {
            index[axis] = 0;
            ++index[axis + 1];
        }
    }
}

// ---- Loads ----------------------------------------------------------------------------------------------------------

static void load_chunk(Thread& thread, const TensorMap& map, const BoxChunk& chunk, u8* to) {
    memset(to, 0, kChunkBytes);
    for (u32 element = 0; element < chunk.num_elements; ++element) {
        const u64 from = chunk.elements[element];
        if (!from) continue;
        memcpy(to + element * map.itemsize, global_at_once(thread, from, map.itemsize, false, false), map.itemsize);
    }
}
// Errors are those of the thread that asked for it.
static void perform_box(const Box& box) {
    Thread& thread = *machine.threads[box.thread];
    const u32 line = thread.line;
    thread.line = box.line;
    const TensorMap& map = *(const TensorMap*)box.map;
    for (u32 rank = 0; rank < machine.blocks.size(); ++rank) {
        if ((box.ranks >> rank & 1) == 0) continue;
        Block& block = machine.blocks[rank];
        each_chunk(map, box.to, box.corner, [&](const BoxChunk& chunk) {
            load_chunk(thread, map, chunk, shared_bytes(thread, rank, chunk.shared, kChunkBytes, "box"));
            end_copy_to(block, chunk.shared, kChunkBytes);
        });
        Mbarrier& mbarrier = mbarrier_at(thread, rank, box.mbarrier);
        if (machine.checks_races) {
            learn(mbarrier.clock, box.clock);
            if (rank != box.rank) block.reached_from_elsewhere.push_back({box.thread, box.clock[box.thread]});
        }
        mbarrier.bytes -= box_bytes(map);
        end_phase_if_complete(mbarrier);
    }
    thread.line = line;
}
static void begin_box_in(Thread& thread, const TensorMap& map, const Box& box, u32 rank) {
    require_init_fence(thread, mbarrier_at(thread, rank, box.mbarrier), box.mbarrier);
    Block& block = machine.blocks[rank];
    each_chunk(map, box.to, box.corner, [&](const BoxChunk& chunk) {
        shared_bytes(thread, rank, chunk.shared, kChunkBytes, "box");
        check_untouched(thread, block, chunk.shared, kChunkBytes, "box");
        require_proxy_fence(thread, block, chunk.shared, kChunkBytes, "box");
        const Words words = words_of(chunk.shared, kChunkBytes);
        for (u32 index = words.first; index <= words.last; ++index) block.generic_writes[index] = GenericWrite();
        order_write(thread, block, chunk.shared, kChunkBytes);
        begin_copy_to(block, chunk.shared, kChunkBytes);
    });
}

void cp_async_bulk_tensor_5d_load(Thread& thread, u32 to, u64 map_address, u32 mbarrier, const u32* corner,
                                  bool multicasts, u32 ranks, u64 policy) {
    preempt(thread);
    const TensorMap& map = tensor_map(thread, map_address);
    check_box(thread, map);
    if (policy != kEvictNormal && policy != kEvictFirst && policy != kEvictLast)
        fail(thread, "cache policy %#lx", (unsigned long)policy);
    if (to >> kRankShift || mbarrier >> kRankShift)
        fail(thread, "box to %#x, for mbarrier %#x, in another block", to, mbarrier);
    if (to % kBoxAlignment) fail(thread, "box to shared %u, which is not aligned to 128", to);
    Box box;
    box.rank = thread.rank;
    box.thread = thread.index;
    box.to = to;
    box.map = map_address;
    box.mbarrier = mbarrier;
    for (int axis = 0; axis < 5; ++axis) box.corner[axis] = (s32)corner[axis];
    box.ranks = multicasts ? ranks & 0xffff : 1u << thread.rank;
    box.line = thread.line;
    if (!box.ranks || box.ranks >> machine.blocks.size())
        fail(thread, "multicast to blocks %#x of %zu", box.ranks, machine.blocks.size());
    for (u32 rank = 0; rank < machine.blocks.size(); ++rank)
        if (box.ranks >> rank & 1) begin_box_in(thread, map, box, rank);
    box.clock = thread.clock;
    tick(thread);
    if (machine.schedule) {
        machine.boxes.push_back(std::move(box));
    } else {
        perform_box(box);
    }
}
static void perform_any_box() {
    const size_t pick = random_number() % machine.boxes.size();
    const Box box = std::move(machine.boxes[pick]);
    machine.boxes.erase(machine.boxes.begin() + pick);
    machine.outside_of_threads = true;
    try {
        perform_box(box);
    } catch (const Failure&) {
    }
    machine.outside_of_threads = false;
}

// ---- Stores ---------------------------------------------------------------------------------------------------------

static void perform_store(Thread& thread, const BulkStore& store) {
    const u32 line = thread.line;
    thread.line = store.line;
    const TensorMap& map = *(const TensorMap*)store.map;
    each_chunk(map, store.from, store.corner, [&](const BoxChunk& chunk) {
        const u8* from = async_read(thread, chunk.shared, kChunkBytes, "bulk store");
        order_read(thread, block_of(thread), chunk.shared, kChunkBytes);
        for (u32 element = 0; element < chunk.num_elements; ++element) {
            const u64 to = chunk.elements[element];
            if (!to) continue;
            u8* place = global_at_once(thread, to, map.itemsize, true, true);
            memcpy(place, from + element * map.itemsize, map.itemsize);
        }
    });
    thread.line = line;
}
void cp_async_bulk_tensor_5d_store(Thread& thread, u64 map, u32 from, const u32* corner) {
    preempt(thread);
    check_box(thread, tensor_map(thread, map));
    if (from >> kRankShift || from % kBoxAlignment) fail(thread, "box from shared %#x, not aligned to 128", from);
    BulkStore store{map, from, {}, thread.line};
    for (int axis = 0; axis < 5; ++axis) store.corner[axis] = (s32)corner[axis];
    if (machine.schedule != 1) perform_store(thread, store);
    thread.stores.push_back(store);
}
void cp_async_bulk_commit_group(Thread& thread) {
    thread.store_groups.push_back(std::move(thread.stores));
    thread.stores.clear();
}
// What was read need not have been written where only_reads; but here both happen together.
void cp_async_bulk_wait_group(Thread& thread, u32 pending, bool) {
    while (thread.store_groups.size() > pending) {
        const std::vector<BulkStore> group = std::move(thread.store_groups.front());
        thread.store_groups.pop_front();
        if (machine.schedule != 1) continue;
        for (const BulkStore& store : group) perform_store(thread, store);
    }
}
static void require_all_stores_read(Thread& thread) {
    if (machine.schedule == 1 && (!thread.stores.empty() || !thread.store_groups.empty()))
        fail(thread, "exit while a bulk store may still read shared memory");
}
