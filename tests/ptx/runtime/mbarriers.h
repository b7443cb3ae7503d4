// mbarriers (9.7.13.15), and the fences between generic accesses and those of the async proxy (9.7.13.4).
//
// A phase of an mbarrier ends when all arrivals have come, and all bytes that were announced. What arrivals release is
// acquired by those who see the phase's end, and what boxes brought, too.
#pragma once
#include "copies.h"

constexpr u32 kMbarrierBytes = 8;
constexpr u32 kMostArrivals = (1 << 20) - 1;
constexpr u32 kMostBytes = (1 << 20) - 1;
constexpr u64 kMostPolls = 5000000;

// mapa (9.7.9.23)
u32 mapa_shared_cluster(Thread& thread, u32 address, u32 rank) {
    const ClusterAddress place = cluster_address(thread, address);
    if (rank >= machine.blocks.size()) fail(thread, "mapa to block %u of %zu", rank, machine.blocks.size());
    return place.offset | (rank + 1) << kRankShift;
}

static Mbarrier& mbarrier_at(Thread& thread, u32 rank, u32 address) {
    if (address % kMbarrierBytes) fail(thread, "mbarrier at shared %u, which is not aligned to 8", address);
    shared_bytes(thread, rank, address, kMbarrierBytes, "mbarrier");
    Block& block = machine.blocks[rank];
    const auto found = block.mbarriers.find(address);
    if (found == block.mbarriers.end())
        fail(thread, "no mbarrier was initialised at shared %u of block %u of the cluster", address, rank);
    Mbarrier& mbarrier = found->second;
    const bool announced = mbarrier.announced && mbarrier.announced <= thread.cluster_waits;
    const bool is_checked = machine.checks_races && !machine.outside_of_threads;
    if (is_checked && !announced && !is_before(mbarrier.initialised, thread))
        fail(thread, "race: the initialisation of mbarrier %u is not ordered before this", address);
    if (block.running == 0) fail(thread, "block %u of the cluster, whose mbarrier this is, has exited", rank);
    return mbarrier;
}
static void require_own_mbarrier(Thread& thread, u32 address, const char* what) {
    if (address >> kRankShift) fail(thread, "%s at %#x, in another block", what, address);
}
// Other blocks, and the async proxy, see an initialisation behind fence.mbarrier_init only.
static void require_init_fence(Thread& thread, const Mbarrier& mbarrier, u32 address) {
    if (machine.threads[mbarrier.initialised.agent]->barriers_to_fence)
        fail(thread, "mbarrier %u: no fence.mbarrier_init since its initialisation", address);
}
static void end_phase_if_complete(Mbarrier& mbarrier) {
    if (mbarrier.pending != 0 || mbarrier.bytes != 0) return;
    mbarrier.pending = mbarrier.arrivals;
    ++mbarrier.phase;
    mbarrier.last_clock = mbarrier.clock;  // which goes on: a later phase's end says what an earlier one's said
    wake_all(mbarrier.waiters);
}
static void arrive(Thread& thread, Mbarrier& mbarrier, u32 address) {
    if (mbarrier.pending == 0)
        fail(thread, "mbarrier %u: more than %u arrivals in a phase", address, mbarrier.arrivals);
    --mbarrier.pending;
    tell(thread, mbarrier.clock);
    end_phase_if_complete(mbarrier);
}

void mbarrier_init(Thread& thread, u32 address, u32 arrivals) {
    preempt(thread);
    require_own_mbarrier(thread, address, "mbarrier.init");
    if (address % kMbarrierBytes) fail(thread, "mbarrier.init at shared %u, which is not aligned to 8", address);
    if (arrivals < 1 || arrivals > kMostArrivals) fail(thread, "mbarrier.init for %u arrivals", arrivals);
    shared_bytes(thread, thread.rank, address, kMbarrierBytes, "mbarrier.init");
    Block& block = block_of(thread);
    if (block.mbarriers.count(address)) fail(thread, "mbarrier %u is initialised twice", address);
    check_untouched(thread, block, address, kMbarrierBytes, "mbarrier.init");
    order_write(thread, block, address, kMbarrierBytes);
    Mbarrier& mbarrier = block.mbarriers[address];
    mbarrier.initialised = now(thread);
    mbarrier.announced = 0;
    mbarrier.arrivals = mbarrier.pending = arrivals;
    mbarrier.bytes = 0;
    mbarrier.phase = 0;
    mbarrier.clock = mbarrier.last_clock = fresh_clock();
    tick(thread);
    for (u32 word = address / 4; word < (address + kMbarrierBytes) / 4; ++word) block.flags[word] |= kMbarrier;
    thread.barriers_to_fence = true;
}

void mbarrier_arrive(Thread& thread, u32 address, bool anywhere_in_the_cluster) {
    preempt(thread);
    if (!anywhere_in_the_cluster) require_own_mbarrier(thread, address, "mbarrier.arrive.shared::cta");
    const ClusterAddress place = cluster_address(thread, address);
    Mbarrier& mbarrier = mbarrier_at(thread, place.rank, place.offset);
    if (place.rank != thread.rank) {
        require_init_fence(thread, mbarrier, place.offset);
        machine.blocks[place.rank].reached_from_elsewhere.push_back(now(thread));
    }
    arrive(thread, mbarrier, place.offset);
}
void mbarrier_arrive_expect_tx(Thread& thread, u32 address, u32 bytes) {
    preempt(thread);
    require_own_mbarrier(thread, address, "mbarrier.arrive.expect_tx");
    if (bytes > kMostBytes) fail(thread, "mbarrier.arrive.expect_tx of %u bytes", bytes);
    Mbarrier& mbarrier = mbarrier_at(thread, thread.rank, address);
    mbarrier.bytes += bytes;
    arrive(thread, mbarrier, address);
}

static bool phase_has_ended(const Mbarrier& mbarrier, u32 parity) { return (mbarrier.phase & 1) != parity; }

// Waits for some time, which may be short: false then, though nothing is wrong.
bool mbarrier_try_wait_parity(Thread& thread, u32 address, u32 parity) {
    preempt(thread);
    require_own_mbarrier(thread, address, "mbarrier.try_wait");
    if (parity > 1) fail(thread, "mbarrier.try_wait for parity %u", parity);
    if (++machine.polls > kMostPolls) fail(thread, "mbarrier.try_wait came %lu times", (unsigned long)kMostPolls);
    Mbarrier& mbarrier = mbarrier_at(thread, thread.rank, address);
    const bool is_short = machine.schedule && random_number() % 4 == 0;
    if (!phase_has_ended(mbarrier, parity) && is_short) {
        let_others_run(thread);
        if (!phase_has_ended(mbarrier, parity)) return false;
    }
    wait_until([&] { return phase_has_ended(mbarrier, parity); }, mbarrier.waiters, thread, "mbarrier.try_wait");
    be_told(thread, mbarrier.last_clock);
    return true;
}

// ---- Proxies --------------------------------------------------------------------------------------------------------
// What a thread wrote through the generic proxy is seen by boxes, bulk stores and products only behind its own
// fence.proxy.async.

void fence_proxy_async(Thread& thread) { ++thread.proxy_fences; }
void fence_mbarrier_init(Thread& thread) { thread.barriers_to_fence = false; }

static void require_proxy_fence(Thread& thread, const Block& block, u32 address, u32 bytes, const char* what) {
    const Words words = words_of(address, bytes);
    for (u32 index = words.first; index <= words.last; ++index) {
        const GenericWrite& write = block.generic_writes[index];
        if (write.thread == kNobody) continue;
        const Thread& writer = *machine.threads[write.thread];
        if (writer.proxy_fences <= write.proxy_fences)
            fail(thread, "%s at shared %u: thread %u wrote there, without fence.proxy.async since", what, address,
                 writer.number);
    }
}
static u8* async_read(Thread& thread, u32 address, u32 bytes, const char* what) {
    u8* place = shared_bytes(thread, thread.rank, address, bytes, what);
    const Block& block = block_of(thread);
    check_untouched(thread, block, address, bytes, what);
    require_proxy_fence(thread, block, address, bytes, what);
    return place;
}
