// Mbarriers, and the boxes that TMA brings and takes away.
//
// A box has an agent's name of its own: its mbarrier's when it comes, its thread's stores' when it goes. What the agent
// did is known to who waited for that mbarrier, or for those stores. Boxes come when asked for in schedule 0; in
// schedule 1 when their mbarrier is waited for, or nobody can run; in schedule 2, one drawn, when nobody can run.
#pragma once

#include <map>

#include "memory.h"

namespace emulator {

struct Mbarrier {
    std::uint32_t address;
    int rank;                             // of its block in the cluster
    int arrivals, pending;                // of the phase: all, and those to come
    std::int64_t bytes, bytes_under_way;  // expected and not here, and those of them that were asked for
    int parity;                           // of the phase
    int initializer;
    Moment initialized;
    bool is_fenced;
    bool is_announced;  // fenced before the cluster began, so that all its threads know of it
    bool is_awaited;  // since boxes have come
    int agent;        // its boxes
    Gathering gathering;
    Known ended;  // what the last phase's end lets know
    std::uint32_t waiting[kMaxThreads / kLanes];
    std::vector<Moment> from_afar;  // other blocks' last arrivals, one for each thread
};

// `TensorMap` as tests/emulator/__init__.py encodes it.
struct Map {
    static constexpr std::uint32_t kMark = 0x50414d54;
    std::uint64_t address;
    int itemsize, swizzle;
    std::int64_t dims[5], strides[5];
    int box[5];
    int row_bytes, bytes;  // of a box
};

struct Box {
    Map map;
    std::uint32_t shared;
    int rank;  // of the block whose shared memory that is
    int corner[5];
    int mbarrier;  // its index; -1: goes
};

// What a thread stores: boxes, and how many are in each committed group; the rest is not committed.
struct Stores {
    int agent;
    std::vector<Box> boxes;
    std::vector<std::pair<std::uint32_t, std::uint32_t>> groups;  // boxes and stamp, oldest first
};

struct Beside {
    std::vector<Mbarrier> mbarriers;
    std::vector<Box> coming;
    std::map<int, Stores> stores;  // by thread
};
inline Beside beside_threads;

// ---- Mbarriers --------------------------------------------------------------------------------------

EMULATED void init_mbarrier(std::uint32_t address, int arrivals, Site site) {
    constexpr const char* verb = "mbarrier_init";
    shared_at(address, 8, verb, site);
    if (arrivals < 1 || arrivals >= 1 << 20) fail(site, "%s: %d arrivals are not 1 to 2^20 - 1", verb, arrivals);
    for (const Mbarrier& other : beside_threads.mbarriers)
        if (other.address == address && other.rank == now->block->rank)
            fail(site, "%s: the mbarrier at 0x%x is in use", verb, address);
    note_write(address, 8, this_thread(), {this_moment(), State::kMbarrier, true, 0}, verb, site);
    Mbarrier barrier{};
    barrier.address = address;
    barrier.rank = now->block->rank;
    barrier.arrivals = barrier.pending = arrivals;
    barrier.initializer = now->index;
    barrier.initialized = this_moment();
    barrier.is_awaited = true;
    barrier.agent = new_agent("a box for the mbarrier at 0x%x", address);
    barrier.gathering.start(machine.num_agents);
    barrier.ended = barrier.gathering.freeze();
    beside_threads.mbarriers.push_back(barrier);
}

EMULATED void fence_initializations() {
    for (Mbarrier& barrier : beside_threads.mbarriers) barrier.is_fenced |= barrier.initializer == now->index;
}

// Who waits here knows of initialisations that were fenced, and of nothing else.
EMULATED void begin_cluster(Site site) {
    all_of_cluster(Verb::kBeginCluster, site, [] {
        for (Mbarrier& barrier : beside_threads.mbarriers) barrier.is_announced |= barrier.is_fenced;
    });
}

EMULATED Mbarrier& mbarrier_at(std::uint32_t address, const char* verb, Site site, int rank = now->block->rank) {
    if (rank < 0 || rank >= machine.num_blocks) fail(site, "%s: the cluster has no block of rank %d", verb, rank);
    if (!machine.blocks[rank].threads_left) fail(site, "%s: the cluster's block %d has exited", verb, rank);
    for (Mbarrier& barrier : beside_threads.mbarriers) {
        if (barrier.address != address || barrier.rank != rank) continue;
        if (!barrier.is_fenced)
            fail(site, "%s: thread %d initialised the mbarrier at 0x%x, with no fence_mbarrier_init since", verb,
                 barrier.initializer, address);
        if (!barrier.is_announced && !is_before_now(barrier.initialized))
            fail(site, "%s: thread %d initialised the mbarrier at 0x%x, with no barrier since", verb,
                 barrier.initializer, address);
        return barrier;
    }
    fail(site, "%s: there is no mbarrier at shared address 0x%x", verb, address);
}

EMULATED void end_phase_if_complete(Mbarrier& barrier) {
    if (barrier.pending || barrier.bytes) return;
    barrier.gathering.add(barrier.agent, machine.stamp++);
    barrier.ended = barrier.gathering.freeze();
    barrier.gathering.start(machine.num_agents);
    barrier.pending = barrier.arrivals;
    barrier.parity ^= 1;
    for (int index = 0; index < all_warps(); ++index) {
        wake(machine.warps[index], barrier.waiting[index]);
        barrier.waiting[index] = 0;
    }
}

EMULATED void arrive_at_mbarrier(std::uint32_t address, int bytes, const char* verb, Site site,
                               int rank = now->block->rank) {
    Mbarrier& barrier = mbarrier_at(address, verb, site, rank);
    if (bytes < 0 || barrier.bytes + bytes >= 1 << 20) fail(site, "%s: %d bytes are too many", verb, bytes);
    if (!barrier.pending)
        fail(site, "%s: all %d arrivals at the mbarrier at 0x%x have been, and its bytes have not all come", verb,
             barrier.arrivals, address);
    if (rank != now->block->rank) {
        auto mine = std::find_if(barrier.from_afar.begin(), barrier.from_afar.end(),
                                 [](const Moment& moment) { return moment.agent == now->index; });
        if (mine == barrier.from_afar.end()) mine = barrier.from_afar.insert(mine, Moment{});
        *mine = this_moment();
    }
    barrier.gathering.add(now->known);
    barrier.gathering.add(now->index, machine.stamp++);
    --barrier.pending;
    barrier.bytes += bytes;
    end_phase_if_complete(barrier);
}

// ---- Boxes: what they are -----------------------------------------------------------------------------

EMULATED Map decode(const void* encoded, const char* verb, Site site) {
    if (reinterpret_cast<std::uintptr_t>(encoded) % 64)
        fail(site, "%s: the map's address is not a multiple of 64", verb);
    std::uint64_t words[16];
    std::memcpy(words, encoded, sizeof words);
    if (words[1] >> 32 != Map::kMark) fail(site, "%s: this is no map", verb);
    Map map;
    map.address = words[0];
    map.itemsize = words[1] & 0xff;
    map.swizzle = words[1] >> 8 & 0xff;
    map.strides[0] = map.itemsize;
    map.bytes = map.itemsize;
    for (int axis = 0; axis < 5; ++axis) {
        map.dims[axis] = static_cast<std::int64_t>(words[2 + axis]);
        if (axis) map.strides[axis] = static_cast<std::int64_t>(words[6 + axis]);
        map.box[axis] = static_cast<int>(words[11] >> 8 * axis & 0xff) + 1;
        map.bytes *= map.box[axis];
    }
    map.row_bytes = map.itemsize * map.box[0];
    return map;
}

// Where a byte of a tile lies whose rows have `width` bytes, if it would lie at `address` in order.
EMULATED std::uint32_t swizzled(std::uint32_t address, std::uint32_t width) {
    return width ? address ^ (address >> 7 & (width / 16 - 1)) << 4 : address;
}

EMULATED std::uint8_t* shared_range(std::uint32_t address, std::uint32_t bytes, std::uint32_t alignment, const char* verb,
                                  Site site) {
    shared_at(address, alignment, verb, site);
    const std::uint32_t offset = address - kSharedBase;
    if (memory.shared_bytes - offset < bytes)
        fail(site, "%s: %u bytes at shared address 0x%x are outside the block's %u bytes from 0x%x", verb, bytes,
             address, memory.shared_bytes, kSharedBase);
    return memory.shared + offset_of(address);
}

// Calls visit(shared address in order, global address, bytes before, bytes inside) for each row of a box; a row that
// is outside has no bytes inside.
template <typename Visit>
inline void visit_rows(const Box& box, Visit visit) {
    const Map& map = box.map;
    std::uint32_t shared = box.shared;
    const std::int64_t first = std::max<std::int64_t>(0, -static_cast<std::int64_t>(box.corner[0]));
    const std::int64_t end = std::min<std::int64_t>(map.box[0], map.dims[0] - box.corner[0]);
    int at[5];
    for (at[4] = 0; at[4] < map.box[4]; ++at[4])
        for (at[3] = 0; at[3] < map.box[3]; ++at[3])
            for (at[2] = 0; at[2] < map.box[2]; ++at[2])
                for (at[1] = 0; at[1] < map.box[1]; ++at[1], shared += map.row_bytes) {
                    bool inside = first < end;
                    std::uint64_t global = map.address + (box.corner[0] + first) * map.itemsize;
                    for (int axis = 1; axis < 5; ++axis) {
                        const std::int64_t index = static_cast<std::int64_t>(box.corner[axis]) + at[axis];
                        inside &= index >= 0 && index < map.dims[axis];
                        global += index * map.strides[axis];
                    }
                    const int before = inside ? static_cast<int>(first) * map.itemsize : 0;
                    visit(shared, global, before, inside ? static_cast<int>(end - first) * map.itemsize : 0);
                }
}

// After all checks that need no order.
EMULATED Box make_box(std::uint32_t shared, const void* encoded, const int (&corner)[5], Access access,
                    const char* verb, Site site) {
    Box box{decode(encoded, verb, site), shared, now->block->rank, {}, -1};
    std::memcpy(box.corner, corner, sizeof corner);
    const std::uint32_t alignment = box.map.swizzle ? std::max(128, 8 * box.map.swizzle) : 128;
    shared_range(shared, box.map.bytes, alignment, verb, site);
    visit_rows(box, [=](std::uint32_t, std::uint64_t global, int, int bytes) {
        if (bytes) global_range(global, bytes, access, verb, site);
    });
    return box;
}

EMULATED void perform(const Box& box) {
    const bool comes = box.mbarrier >= 0;
    const Map& map = box.map;
    visit_rows(box, [&](std::uint32_t shared, std::uint64_t global, int before, int bytes) {
        std::uint8_t row[256 * 8];
        if (comes) {
            std::memset(row, 0, map.row_bytes);
            if (bytes) std::memcpy(row + before, reinterpret_cast<const void*>(global), bytes);
        }
        for (int chunk = 0; chunk < map.row_bytes; chunk += 16) {
            std::uint8_t* at = memory.shared + offset_of(swizzled(shared + chunk, map.swizzle), box.rank);
            if (comes)
                std::memcpy(at, row + chunk, 16);
            else
                std::memcpy(row + chunk, at, 16);
        }
        if (!comes && bytes) std::memcpy(reinterpret_cast<void*>(global), row + before, bytes);
    });
}

// ---- Boxes that come ----------------------------------------------------------------------------------

EMULATED void finish(const Box& box) {
    perform(box);
    if (machine.check_races) {
        Word* words = words_at(box.shared, box.rank);
        for (int word = 0; word < box.map.bytes / 4; ++word) words[word].state = State::kPlain;
    }
    Mbarrier& barrier = beside_threads.mbarriers[box.mbarrier];
    barrier.bytes -= box.map.bytes;
    barrier.bytes_under_way -= box.map.bytes;
    barrier.is_awaited = false;
    end_phase_if_complete(barrier);
}

EMULATED void finish_one(std::size_t index) {
    const Box box = beside_threads.coming[index];
    beside_threads.coming.erase(beside_threads.coming.begin() + index);
    finish(box);
}

// When no thread can run.
EMULATED bool finish_any() {
    const std::size_t count = beside_threads.coming.size();
    if (count) finish_one(machine.schedule == 2 ? random_number() % count : 0);
    return count;
}

// A box for one block of the cluster, with its mbarrier at the same address.
EMULATED void load_box_of(int rank, Box box, std::uint32_t mbarrier, const char* verb, Site site) {
    Mbarrier& barrier = mbarrier_at(mbarrier, verb, site, rank);
    box.rank = rank;
    box.mbarrier = static_cast<int>(&barrier - beside_threads.mbarriers.data());
    Party party = this_thread();
    party.is_async = true;
    const Moment moment = {machine.stamp, static_cast<std::uint16_t>(barrier.agent)};
    note_write(box.shared, box.map.bytes, party, {moment, State::kBox, false, 0}, verb, site, rank);
    barrier.bytes_under_way += box.map.bytes;
    if (!machine.schedule) return finish(box);
    std::memset(memory.shared + offset_of(box.shared, rank), 0xFF, box.map.bytes);
    beside_threads.coming.push_back(box);
}

EMULATED void load_box(std::uint32_t to, const void* encoded, std::uint32_t mbarrier, const int (&corner)[5],
                     Site site) {
    constexpr const char* verb = "load_box";
    const Mbarrier& barrier = mbarrier_at(mbarrier, verb, site);
    const Box box = make_box(to, encoded, corner, Access::kLoadFresh, verb, site);
    if (barrier.bytes - barrier.bytes_under_way < box.map.bytes)
        fail(site, "%s: the mbarrier at 0x%x expects %lld bytes more, and the box has %d", verb, mbarrier,
             static_cast<long long>(barrier.bytes - barrier.bytes_under_way), box.map.bytes);
    load_box_of(now->block->rank, box, mbarrier, verb, site);
}

// The bytes may come before another block's thread expects them.
EMULATED void load_box_for(std::uint32_t ranks, std::uint32_t to, const void* encoded, std::uint32_t mbarrier,
                         const int (&corner)[5], Site site) {
    constexpr const char* verb = "load_box_for";
    if (!ranks || ranks >> machine.num_blocks)
        fail(site, "%s: the cluster has %d blocks, and the box is for 0x%x", verb, machine.num_blocks, ranks);
    const Box box = make_box(to, encoded, corner, Access::kLoadFresh, verb, site);
    for (std::uint32_t left = ranks; left; left &= left - 1)
        load_box_of(__builtin_ctz(left), box, mbarrier, verb, site);
}

EMULATED void wait_for_mbarrier(std::uint32_t address, int parity, Site site) {
    Mbarrier& barrier = mbarrier_at(address, "mbarrier_wait", site);
    if (parity & ~1) fail(site, "mbarrier_wait: %d is no parity", parity);
    const int index = static_cast<int>(&barrier - beside_threads.mbarriers.data());
    for (std::size_t box = 0; machine.schedule == 1 && box < beside_threads.coming.size();)
        if (beside_threads.coming[box].mbarrier == index)
            finish_one(box);
        else
            ++box;
    while (barrier.parity == parity) {
        barrier.waiting[now->warp->index] |= now->bit();
        now->waits_alone = true;
        now->wait = {Verb::kMbarrierWait, site, address, parity};
        suspend();
    }
    now->waits_alone = false;
    barrier.is_awaited = true;
    learn(*now, barrier.ended);
}

// ---- Boxes that go ------------------------------------------------------------------------------------

EMULATED void store_box(const void* encoded, std::uint32_t from, const int (&corner)[5], Site site) {
    constexpr const char* verb = "store_box";
    const Box box = make_box(from, encoded, corner, Access::kStore, verb, site);
    const auto found = beside_threads.stores.find(now->index);
    if (found == beside_threads.stores.end())
        beside_threads.stores[now->index].agent = new_agent("a box that thread %d stores", now->index);
    Stores& mine = beside_threads.stores[now->index];
    note_read(from, box.map.bytes, beside(mine.agent, now->known, now->index), verb, site);
    if (!machine.schedule) perform(box);
    mine.boxes.push_back(box);
}

EMULATED void commit_stores() {
    const auto found = beside_threads.stores.find(now->index);
    if (found == beside_threads.stores.end()) return;
    Stores& mine = found->second;
    std::uint32_t committed = 0;
    for (const auto& group : mine.groups) committed += group.first;
    mine.groups.push_back({static_cast<std::uint32_t>(mine.boxes.size()) - committed, machine.stamp++});
}

EMULATED void wait_for_stores(std::size_t pending_groups) {
    const auto found = beside_threads.stores.find(now->index);
    if (found == beside_threads.stores.end()) return;
    Stores& mine = found->second;
    if (mine.groups.size() <= pending_groups) return;
    std::uint32_t count = 0, stamp = 0;
    for (; mine.groups.size() > pending_groups; mine.groups.erase(mine.groups.begin())) {
        count += mine.groups[0].first;
        stamp = mine.groups[0].second;
    }
    if (machine.schedule)
        for (std::uint32_t index = 0; index < count; ++index) perform(mine.boxes[index]);
    mine.boxes.erase(mine.boxes.begin(), mine.boxes.begin() + count);
    Gathering news;
    news.begin_common(now->known);
    news.add(mine.agent, stamp);
    now->known = news.freeze();
}

// ---- A cluster from its first to its last thread ------------------------------------------------------

// Whoever may still arrive at a block's mbarriers finds no block.
EMULATED void check_exit(Block& block) {
    const Thread* mine = machine.threads + first_thread(block);
    for (const Mbarrier& barrier : beside_threads.mbarriers) {
        if (barrier.rank != block.rank) continue;
        for (const Moment& moment : barrier.from_afar) {
            const auto knows = [&](const Thread& thread) { return thread.known->covers(moment); };
            if (std::any_of(mine, mine + machine.num_threads, knows)) continue;
            report("all threads have exited, and %s may still be about to arrive at the mbarrier at 0x%x",
                   AgentName(moment.agent).text, barrier.address);
            give_up();
        }
    }
}

EMULATED void begin_boxes() {
    beside_threads.mbarriers.clear();
    beside_threads.mbarriers.reserve(kUnits * kLanes);  // so that none moves while it is waited for
    beside_threads.coming.clear();
    beside_threads.stores.clear();
    machine.idle = finish_any;
    machine.exit = check_exit;
}

EMULATED void end_boxes() {
    for (const Mbarrier& barrier : beside_threads.mbarriers) {
        if (barrier.bytes)
            report("all threads have exited, and the mbarrier at 0x%x still expects %lld bytes", barrier.address,
                   static_cast<long long>(barrier.bytes));
        if (!barrier.is_awaited)
            report("nobody waited for the last boxes of the mbarrier at 0x%x", barrier.address);
    }
    for (const auto& [thread, stores] : beside_threads.stores)
        if (!stores.boxes.empty())
            report("thread %d has exited, and has not waited for boxes that it stores (wait_stores_read)", thread);
}

}  // namespace emulator
