// Barriers of a block and of a cluster, and registers handed from warpgroup to warpgroup.
#pragma once
#include "warps.h"

// ---- bar.sync, bar.red, bar.arrive (9.7.13.1) -----------------------------------------------------------------------

struct BarrierArrival {
    bool predicate;
    u64 generation;
};

static void begin_barrier(Barrier& barrier, u32 threads) {
    barrier.expected = threads;
    barrier.any = false;
    barrier.clock = fresh_clock();
}
static void complete_barrier(Barrier& barrier) {
    barrier.arrived = 0;
    ++barrier.generation;
    barrier.last_any = barrier.any;
    barrier.last_clock = barrier.clock;
    wake_all(barrier.waiters);
}
// A warp arrives as a whole, whoever of its lanes executes it.
static void arrive_at_barrier(Thread& thread, Warp& warp, u32 number, u32 threads) {
    Barrier& barrier = block_of(thread).barriers[number];
    if (barrier.arrived == 0) begin_barrier(barrier, threads);
    if (barrier.expected != threads)
        fail(thread, "barrier %u is for %u threads, and here for %u", number, barrier.expected, threads);
    for (u32 lane = 0; lane < kLanes; ++lane) {
        BarrierArrival& arrival = brought<BarrierArrival>(warp, lane);
        barrier.any |= arrival.predicate;
        arrival.generation = barrier.generation;
        tell(*warp.lanes[lane], barrier.clock);
    }
    barrier.arrived += kLanes;
    if (barrier.arrived == barrier.expected) complete_barrier(barrier);
}

struct BarrierUse {
    u32 number;
    s64 threads;
    bool waits;
    const char* name;
};
// Whether any thread brought a true predicate: it can be asked for until the barrier completes again, and that takes
// all who wait here.
static bool use_barrier(Thread& thread, int site, const BarrierUse& use, bool predicate) {
    const s64 threads = use.threads < 0 ? launch.threads : use.threads;
    if (use.number >= kNamedBarriers) fail(thread, "%s: there is no barrier %u", use.name, use.number);
    if (threads == 0 || threads % kLanes) fail(thread, "%s of %ld threads", use.name, (long)threads);
    if (threads > launch.threads)
        fail(thread, "%s of %ld threads in a block of %u", use.name, (long)threads, launch.threads);
    BarrierArrival mine{predicate, 0};
    together(thread, site, use.name, &mine,
             [&](Warp& warp) { arrive_at_barrier(thread, warp, use.number, (u32)threads); });
    if (!use.waits) return false;
    Barrier& barrier = block_of(thread).barriers[use.number];
    wait_until([&] { return barrier.generation != mine.generation; }, barrier.waiters, thread, use.name);
    be_told(thread, barrier.last_clock);
    return barrier.last_any;
}

void bar_sync(Thread& thread, int site, u32 barrier, s64 threads) {
    use_barrier(thread, site, {barrier, threads, true, "bar.sync"}, false);
}
void bar_arrive(Thread& thread, int site, u32 barrier, s64 threads) {
    if (threads < 0) fail(thread, "bar.arrive needs a number of threads");
    use_barrier(thread, site, {barrier, threads, false, "bar.arrive"}, false);
}
bool bar_red_or(Thread& thread, int site, u32 barrier, bool predicate) {
    return use_barrier(thread, site, {barrier, -1, true, "bar.red.or"}, predicate);
}

// ---- barrier.cluster (9.7.13.3): of all threads that have not exited ------------------------------------------------

// By the generation that it arrives at; if one of its initialisations is not fenced, of none of them.
static void announce_mbarriers(Thread& thread) {
    if (thread.barriers_to_fence) return;
    for (auto& [address, mbarrier] : block_of(thread).mbarriers)
        if (mbarrier.initialised.agent == thread.index && !mbarrier.announced)
            mbarrier.announced = thread.cluster_generation;
}
static void complete_cluster_barrier() {
    ClusterBarrier& barrier = machine.cluster_barrier;
    if (barrier.arrived == 0 || barrier.arrived < machine.running) return;
    barrier.arrived = 0;
    ++barrier.generation;
    barrier.last_clock = barrier.clock;
    wake_all(barrier.waiters);
}
static void arrive_at_cluster_barrier(Thread& thread, int site, bool releases) {
    together<void>(thread, site, "barrier.cluster.arrive", nullptr, [](Warp&) {});
    ClusterBarrier& barrier = machine.cluster_barrier;
    if (thread.cluster_generation) fail(thread, "barrier.cluster.arrive twice, without a wait between");
    if (barrier.arrived == 0) barrier.clock = fresh_clock();
    thread.cluster_generation = barrier.generation + 1;
    if (releases)
        tell(thread, barrier.clock);
    else
        announce_mbarriers(thread);
    ++barrier.arrived;
    complete_cluster_barrier();
}
void barrier_cluster_arrive_release(Thread& thread, int site) { arrive_at_cluster_barrier(thread, site, true); }
// Whoever waits learns nothing of what this thread did: only the mbarriers that it initialised in front of its
// fence.mbarrier_init.release.cluster, which orders these and no other access (9.7.13.4).
void barrier_cluster_arrive_relaxed(Thread& thread, int site) { arrive_at_cluster_barrier(thread, site, false); }
void barrier_cluster_wait_acquire(Thread& thread, int site) {
    together<void>(thread, site, "barrier.cluster.wait", nullptr, [](Warp&) {});
    ClusterBarrier& barrier = machine.cluster_barrier;
    const u64 awaited = thread.cluster_generation;
    if (!awaited) fail(thread, "barrier.cluster.wait without barrier.cluster.arrive");
    wait_until([&] { return barrier.generation >= awaited; }, barrier.waiters, thread, "barrier.cluster.wait");
    thread.cluster_waits = awaited;
    thread.cluster_generation = 0;
    be_told(thread, barrier.last_clock);
}

// ---- What all warps of a warpgroup have to do alike -----------------------------------------------------------------
// The four may be at different places of one stream of instructions: the first to come says what it is.

static void agree(Thread& thread, const char* name, u64 what, u64 how) {
    if (launch.threads % kGroupThreads)
        fail(thread, "%s in a block of %u threads, which is no whole number of warpgroups", name, launch.threads);
    std::vector<Agreement>& log = machine.groups[group_of(thread)].log;
    size_t& place = warp_of(thread).logged;
    if (place == log.size()) log.push_back({what, how});
    const Agreement& agreed = log[place];
    if (agreed.what != what || agreed.how != how)
        fail(thread, "%s: the warps of a warpgroup do different things", name);
    ++place;
}

// ---- setmaxnreg (9.7.19.5) ------------------------------------------------------------------------------------------
// Registers come from what other warps of the block gave back; until there are enough, setmaxnreg.inc waits.

constexpr u32 kRegisterFile = 65536;
constexpr u32 kMostRegistersAtLaunch = 248;

static void check_registers(Thread& thread, u32 registers) {
    if (registers < 24 || registers > 256 || registers % 8) fail(thread, "setmaxnreg to %u", registers);
}
// What __launch_bounds__(threads, 1) leaves to ptxas.
static u32 registers_at_launch() {
    const u32 share = kRegisterFile / launch.threads / 8 * 8;
    return share < kMostRegistersAtLaunch ? share : kMostRegistersAtLaunch;
}
void setmaxnreg_dec(Thread& thread, int site, u32 registers) {
    check_registers(thread, registers);
    const u32 before = registers_at_launch();
    if (registers > before) fail(thread, "setmaxnreg.dec to %u from %u", registers, before);
    together<void>(thread, site, "setmaxnreg.dec", nullptr, [&](Warp&) {
        agree(thread, "setmaxnreg.dec", site, registers);
        Block& block = block_of(thread);
        block.free_registers += kLanes * (before - registers);
        wake_all(block.register_waiters);
    });
}
void setmaxnreg_inc(Thread& thread, int site, u32 registers) {
    check_registers(thread, registers);
    const u32 before = registers_at_launch();
    if (registers < before) fail(thread, "setmaxnreg.inc to %u from %u", registers, before);
    together<void>(thread, site, "setmaxnreg.inc", nullptr,
                   [&](Warp&) { agree(thread, "setmaxnreg.inc", site, registers); });
    if (thread.lane != 0) return;
    Block& block = block_of(thread);
    const u32 more = kLanes * (registers - before);
    wait_until([&] { return block.free_registers >= more; }, block.register_waiters, thread,
               "setmaxnreg.inc, for registers that others give back");
    block.free_registers -= more;
}
