// One thread block, or one cluster of them, on one core: every CUDA thread is a fiber that runs until it has to wait
// for others.
//
// Threads swap only in functions that wait. The last lane to reach a warp's instruction performs it for all 32, so
// that an instruction costs 32 swaps and no polling: who waits is not looked at before it is woken.
// There is one machine per library, and it runs one launch at a time.
#pragma once

#include <sys/mman.h>

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "fiber.h"
#include "order.h"

namespace emulator {

constexpr int kMaxThreads = 1024;  // of a cluster
constexpr int kMaxBlocks = 8;
constexpr int kMaxGroups = 8;
constexpr int kGroupWarps = 4;
constexpr int kGroupThreads = kGroupWarps * kLanes;
constexpr int kNamedBarriers = 16;
constexpr int kRegisterFile = 65536;
// Touched pages only are paid for. No power of two, or the tops of all stacks would share the same cache lines.
constexpr std::size_t kStackBytes = (256 << 10) + 576;

// Where a kernel called; as a default argument it is the line of the call.
struct Site {
    const char* file;
    int line;
    static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
    bool operator==(const Site& other) const {
        return line == other.line && (file == other.file || std::strcmp(file, other.file) == 0);
    }
};

// What the lanes of a warp do together, and what a thread waits for alone.
enum class Verb : std::uint8_t {
    kBarrier,
    kWarpBarrier,
    kShuffleXor,
    kShuffle,
    kAny,
    kAll,
    kLoadMatrices,
    kLoadMatricesTransposed,
    kMultiplyAdd,
    kStoreMatrices,
    kNamedBarrier,
    kNamedBarrierArrive,
    kWarpgroup,
    kMoreRegisters,
    kFewerRegisters,
    kWgmmaFence,
    kWgmma,
    kWgmmaCommit,
    kWgmmaWait,
    kMbarrierWait,
    kBeginCluster,
    kFirstLane,
};
constexpr const char* kVerbNames[] = {
    "barrier", "warp_barrier", "shuffle_xor", "shuffle", "any", "all", "load_matrices", "load_matrices_transposed",
    "multiply_add", "store_matrices", "named_barrier", "named_barrier_arrive", "warpgroup", "more_registers",
    "fewer_registers", "wgmma_fence", "wgmma", "wgmma_commit", "wgmma_wait", "mbarrier_wait", "begin_cluster", "first_lane",
};

// A copy from global to shared memory that may still be under way.
struct Copy {
    std::uint32_t to;
    const void* from;  // null: zeros
    int size;          // of `width` bytes; zeros behind them
    std::uint32_t width = 16;
};

// What a lane brings to its warp's instruction, and what it takes away.
struct Operands {
    std::uint32_t value, other;
    std::uint32_t* to;
    const std::uint32_t* a;
    float* c;
    std::uint64_t left, right;  // descriptors
};

struct Warp {
    int index;  // in the cluster
    std::uint32_t ready;    // lanes that can run; the running one is not among them
    std::uint32_t arrived;  // lanes that wait, all for the same `verb` at the same `site`
    Verb verb;
    Site site;
    int number;  // of the barrier, or whatever else all lanes have to agree on
    Operands lanes[kLanes];
};

// Four warps, where they do something together.
struct Group {
    int warps_arrived;
    int registers;  // of each thread
};

struct NamedBarrier {
    int expected, arrived;  // threads
    std::uint32_t waiting_warps;
    Gathering gathering;
};

struct Fence {
    Moment moment;
    std::uint32_t time;  // 0: none
    Known known;         // to its thread
};

// A wait of one thread, not of its warp.
struct Wait {
    Verb verb;
    Site site;
    std::uint32_t address;
    int parity;
};

struct Block;

struct Thread {
    Fiber fiber;
    int index;  // in the cluster
    Warp* warp;
    Block* block;
    bool exited;
    bool waits_alone;
    Wait wait;    // if so
    Known known;  // of everybody; of itself it knows everything
    std::vector<std::uint32_t> async_fences;  // stamps of its fences between its stores and others' boxes and products
    std::vector<Copy> copies;           // under way, oldest first
    std::vector<std::uint32_t> groups;  // copies in each committed group, oldest first; the rest is not committed
    Fence fence;                        // its last that no atomic has released yet
    Moment atomic;                      // its first atomic addition

    int lane() const { return index % kLanes; }
    std::uint32_t bit() const { return 1u << lane(); }
};

struct Block {
    int x, y, z;
    std::uint32_t number;  // from 1
    int rank;              // in its cluster
    int warps_at_barrier, threads_left;
    NamedBarrier named_barriers[kNamedBarriers];
    std::uint32_t epoch;  // between two block barriers; from 1
    struct {
        std::uint32_t epoch;
        bool any;
    } votes[2];  // of barrier_any, this epoch's and the one before
};

// What works beside the threads; `what` is a format of the number.
struct Agent {
    const char* what;
    std::uint32_t number;
};

struct Machine {
    Thread threads[kMaxThreads];
    Warp warps[kMaxThreads / kLanes];
    Group groups[kMaxGroups];
    Block blocks[kMaxBlocks];  // of the cluster, by rank
    int warps_at_cluster_barrier, threads_left;
    std::uint32_t ready_warps;  // those with a ready lane
    Fiber scheduler;
    char* stacks;
    void (*kernel)();
    int grid_x, grid_y, grid_z;
    int num_blocks, num_threads, num_warps;  // blocks of a cluster, and what each of them has
    int num_agents;             // threads and others, these if there are any
    std::vector<Agent> agents;  // the others
    int schedule;
    int late_warp;  // in schedule 3
    bool check_races;
    std::uint64_t random;
    std::uint32_t time;   // counts stores to global memory and fences
    std::uint32_t stamp;  // counts whenever somebody lets others know what it did
    bool (*idle)();       // does one thing that works beside the threads; false if there is none
    void (*exit)(Block&); // after a block's last thread
    bool failed;
    char* message;
    std::size_t message_bytes;
};
inline Machine machine;

// Of each thread, as __launch_bounds__(threads, 1) lets the compiler give them: all that warpgroups have to share out.
EMULATED int entry_registers() {
    const int each = kRegisterFile / machine.num_threads / 8 * 8;
    return each < 248 ? each : 248;
}

inline Thread* now;  // the running thread

EMULATED int all_threads() { return machine.num_blocks * machine.num_threads; }
EMULATED int all_warps() { return machine.num_blocks * machine.num_warps; }
EMULATED int first_thread(const Block& block) { return block.rank * machine.num_threads; }
EMULATED int first_warp(const Block& block) { return block.rank * machine.num_warps; }

// ---- Chance ---------------------------------------------------------------------------------------

EMULATED std::uint32_t random_number() {
    machine.random ^= machine.random << 13;
    machine.random ^= machine.random >> 7;
    machine.random ^= machine.random << 17;
    return static_cast<std::uint32_t>(machine.random >> 32);
}

// A number of a bit that is set, not uniformly so.
EMULATED int random_bit(std::uint32_t bits) {
    const unsigned turn = random_number() % 32;
    const std::uint32_t turned = bits >> turn | bits << (32 - turn) % 32;
    return (__builtin_ctz(turned) + turn) % 32;
}

// ---- Errors ---------------------------------------------------------------------------------------

// Notes the first error of a launch.
__attribute__((format(printf, 1, 2))) EMULATED void report(const char* format, ...) {
    if (machine.failed) return;
    machine.failed = true;
    const Block& block = now ? *now->block : machine.blocks[0];
    const int written =
        std::snprintf(machine.message, machine.message_bytes, "block (%d, %d, %d): ", block.x, block.y, block.z);
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(machine.message + written, machine.message_bytes - written, format, arguments);
    va_end(arguments);
}

// Ends the launch from within a thread, which is abandoned where it stands.
[[noreturn]] EMULATED void give_up() {
    Fiber::swap(now->fiber, machine.scheduler);
    __builtin_unreachable();
}

// An error of the running thread at `site`.
__attribute__((format(printf, 2, 3))) [[noreturn]] EMULATED void fail(Site site, const char* format, ...) {
    char text[2048];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    report("thread %d, %s:%d: %s", now->index % machine.num_threads, site.file, site.line, text);
    give_up();
}

// ---- Who runs -------------------------------------------------------------------------------------

EMULATED void wake(Warp& warp, std::uint32_t lanes) {
    if (!lanes) return;
    warp.ready |= lanes;
    machine.ready_warps |= 1u << warp.index;
}

// Schedule 0 takes threads in order, 1 any warp, 2 lets one warp run as far as it can before another is drawn, and 3 lets
// one warp run only where nothing else can, neither others nor what works beside them.
EMULATED Thread* next_thread() {
    const std::uint32_t late = machine.schedule == 3 ? 1u << machine.late_warp : 0;
    while (!(machine.ready_warps & ~late))
        if (!machine.idle()) {
            if (!machine.ready_warps) return nullptr;
            break;
        }
    const std::uint32_t ready = machine.ready_warps & ~late ? machine.ready_warps & ~late : machine.ready_warps;
    int index = __builtin_ctz(ready);
    if (machine.schedule) {
        const bool may_stay = now && ready >> now->warp->index & 1;
        const bool stays = may_stay && (machine.schedule == 2 || random_number() % 4);
        index = stays ? now->warp->index : random_bit(ready);
    }
    Warp& warp = machine.warps[index];
    const int lane = machine.schedule ? random_bit(warp.ready) : __builtin_ctz(warp.ready);
    warp.ready &= ~(1u << lane);
    if (!warp.ready) machine.ready_warps &= ~(1u << index);
    return &machine.threads[index * kLanes + lane];
}

// Lets others run until this thread is woken.
EMULATED void suspend() {
    Thread* me = now;
    Thread* next = next_thread();
    if (next == me) return;
    now = next;
    Fiber::swap(me->fiber, next ? next->fiber : machine.scheduler);
    asm volatile("" ::: "memory");
}

EMULATED void thread_main() {
    machine.kernel();
    now->exited = true;
    if (!--now->block->threads_left) machine.exit(*now->block);
    --machine.threads_left;
    suspend();
    __builtin_unreachable();
}

// ---- Waiting for each other -------------------------------------------------------------------------

// The running lane joins its warp at `verb`; true if it is the last.
EMULATED bool arrive(Verb verb, Site site, int number = 0) {
    Warp& warp = *now->warp;
    if (!warp.arrived) {
        warp.verb = verb;
        warp.site = site;
        warp.number = number;
    } else if (warp.verb != verb || !(warp.site == site)) {
        const int first = warp.index * kLanes + __builtin_ctz(warp.arrived);
        fail(site, "the warp diverges: %s here, while thread %d waits in %s at %s:%d",
             kVerbNames[static_cast<int>(verb)], first, kVerbNames[static_cast<int>(warp.verb)], warp.site.file,
             warp.site.line);
    } else if (warp.number != number) {
        fail(site, "%s: %d here, while another thread of the warp says %d", kVerbNames[static_cast<int>(verb)], number,
             warp.number);
    }
    warp.arrived |= now->bit();
    return warp.arrived == ~0u;
}

// All lanes of a warp together; `perform` runs once, when all have come.
template <typename Perform>
inline void together(Verb verb, Site site, Perform perform) {
    Warp& warp = *now->warp;
    if (!arrive(verb, site)) return suspend();
    perform(warp);
    warp.arrived = 0;
    wake(warp, ~now->bit());
}

// What each of some threads knows and did, all of them know from now on.
EMULATED void meet(int first, int count) {
    Gathering all;
    all.start(machine.num_agents);
    Thread* threads = machine.threads + first;
    for (int index = 0; index < count; ++index) all.add(threads[index].known);
    for (int index = 0; index < count; ++index) all.add(first + index, machine.stamp);
    ++machine.stamp;
    const Known known = all.freeze();
    for (int index = 0; index < count; ++index) threads[index].known = known;
}

EMULATED void warp_barrier(Site site) {
    together(Verb::kWarpBarrier, site, [](Warp& warp) { meet(warp.index * kLanes, kLanes); });
}

EMULATED void release_warp(Warp& warp) {
    warp.arrived = 0;
    wake(warp, ~0u);
}

EMULATED void block_barrier(Site site) {
    Block& block = *now->block;
    if (!arrive(Verb::kBarrier, site)) return suspend();
    if (++block.warps_at_barrier < machine.num_warps) return suspend();
    block.warps_at_barrier = 0;
    ++block.epoch;
    meet(first_thread(block), machine.num_threads);
    for (int index = 0; index < machine.num_warps; ++index) release_warp(machine.warps[first_warp(block) + index]);
    suspend();  // the last to come is not always the first to go
}

// All threads of the cluster come to the same place and wait for each other; `perform` runs once, when all have come.
// Nobody learns from it what others did.
template <typename Perform>
inline void all_of_cluster(Verb verb, Site site, Perform perform) {
    if (!arrive(verb, site)) return suspend();
    if (++machine.warps_at_cluster_barrier < all_warps()) return suspend();
    machine.warps_at_cluster_barrier = 0;
    perform();
    for (int index = 0; index < all_warps(); ++index) release_warp(machine.warps[index]);
    suspend();
}

EMULATED bool block_barrier_any(bool condition, Site site) {
    const std::uint32_t epoch = now->block->epoch;
    auto& vote = now->block->votes[epoch % 2];
    if (vote.epoch != epoch) vote = {epoch, false};
    vote.any |= condition;
    block_barrier(site);
    return vote.any;
}

// `waits`: for the others, else the warp goes on at once.
EMULATED void named_barrier(int id, int threads, bool waits, Site site) {
    const Verb verb = waits ? Verb::kNamedBarrier : Verb::kNamedBarrierArrive;
    const char* name = kVerbNames[static_cast<int>(verb)];
    if (id < 1 || id >= kNamedBarriers) fail(site, "%s: %d is no number from 1 to 15", name, id);
    if (threads % kLanes || threads < kLanes || threads > machine.num_threads)
        fail(site, "%s: %d threads are no warps of this block", name, threads);
    if (!arrive(verb, site, id)) return suspend();
    Warp& warp = *now->warp;
    NamedBarrier& barrier = now->block->named_barriers[id];
    if (!barrier.arrived) {
        barrier.expected = threads;
        barrier.waiting_warps = 0;
        barrier.gathering.start(machine.num_agents);
    }
    if (barrier.expected != threads)
        fail(site, "%s: %d threads at barrier %d, of which others say %d", name, threads, id, barrier.expected);
    if (barrier.waiting_warps >> warp.index & 1) fail(site, "%s: the warp waits at barrier %d already", name, id);
    barrier.arrived += kLanes;
    for (int lane = 0; lane < kLanes; ++lane) {
        const int index = warp.index * kLanes + lane;
        barrier.gathering.add(machine.threads[index].known);
        barrier.gathering.add(index, machine.stamp);
    }
    ++machine.stamp;
    if (waits) barrier.waiting_warps |= 1u << warp.index;
    const bool complete = barrier.arrived == barrier.expected;
    if (complete) {
        const Known known = barrier.gathering.freeze();
        barrier.arrived = 0;
        for (int index = 0; index < all_warps(); ++index) {
            if (!(barrier.waiting_warps >> index & 1)) continue;
            for (int lane = 0; lane < kLanes; ++lane) machine.threads[index * kLanes + lane].known = known;
            release_warp(machine.warps[index]);
        }
    }
    if (!waits) release_warp(warp);
    suspend();
}

// All lanes of the four warps of a warpgroup together; `perform` runs once, when all have come.
template <typename Perform>
inline void group_together(Verb verb, Site site, int number, Perform perform) {
    const int index = now->index / kGroupThreads;
    const char* name = kVerbNames[static_cast<int>(verb)];
    if ((index + 1) * kGroupThreads > all_threads())
        fail(site, "%s: the warpgroup of thread %d has fewer than four warps", name, now->index);
    if (!arrive(verb, site, number)) return suspend();
    Group& group = machine.groups[index];
    Warp* warps = machine.warps + index * kGroupWarps;
    for (const Warp* other = warps; other < warps + kGroupWarps; ++other) {
        if (other->arrived != ~0u || other == now->warp || other->verb < Verb::kMoreRegisters) continue;
        if (other->verb != verb || !(other->site == site) || other->number != number)
            fail(site, "the warpgroup diverges: %s here, while warp %d waits in %s at %s:%d", name, other->index,
                 kVerbNames[static_cast<int>(other->verb)], other->site.file, other->site.line);
    }
    if (++group.warps_arrived < kGroupWarps) return suspend();
    group.warps_arrived = 0;
    perform(index);
    for (Warp* warp = warps; warp < warps + kGroupWarps; ++warp) release_warp(*warp);
    suspend();
}

// ---- What came before what --------------------------------------------------------------------------

EMULATED Moment this_moment() { return {machine.stamp, static_cast<std::uint16_t>(now->index)}; }

// Whether what happened at a moment of this cluster is sure to have happened for the running thread.
EMULATED bool is_before_now(const Moment& moment) { return moment.agent == now->index || now->known->covers(moment); }

// The running thread learns; threads of a warp usually learn the same one after another.
EMULATED void learn(Thread& thread, const Known& news) {
    static Known before, told, after;
    if (thread.known == news) return;
    if (before != thread.known || told != news) {
        Gathering both;
        both.begin_common(thread.known);
        both.add(news);
        before = thread.known;
        told = news;
        after = both.freeze();
    }
    thread.known = after;
}

// What each of some threads knows.
EMULATED Known common_knowledge(int first, int count) {
    const Known& known = machine.threads[first].known;
    int same = 1;
    while (same < count && machine.threads[first + same].known == known) ++same;
    if (same == count) return known;
    Gathering common;
    common.begin_common(known);
    for (int index = same; index < count; ++index) common.keep_common(machine.threads[first + index].known);
    return common.freeze();
}

// An agent that is no thread: "what number".
EMULATED int new_agent(const char* what, std::uint32_t number) {
    const int agent = all_threads() + static_cast<int>(machine.agents.size());
    if (agent == machine.num_agents) {
        report("more mbarriers, warpgroups and storing threads than the emulator is made for");
        give_up();
    }
    machine.agents.push_back({what, number});
    return agent;
}

struct AgentName {
    char text[64];
    explicit AgentName(int agent) {
        if (agent < all_threads()) {
            const int thread = agent % machine.num_threads, rank = agent / machine.num_threads;
            if (machine.num_blocks == 1)
                std::snprintf(text, sizeof text, "thread %d", thread);
            else
                std::snprintf(text, sizeof text, "thread %d of the cluster's block %d", thread, rank);
            return;
        }
        const Agent& other = machine.agents[agent - all_threads()];
        std::snprintf(text, sizeof text, other.what, other.number);
    }
};

// Of all threads when none can run: "threads 0-31 wait in barrier at flash.cu:7; threads 32-127 have exited". In a
// cluster the second block's threads count on from the first's.
EMULATED void report_deadlock() {
    char text[2048] = "";
    std::size_t length = 0;
    for (int first = 0; first < all_threads();) {
        const auto same_as_first = [first](int other) {
            const Thread &a = machine.threads[first], &b = machine.threads[other];
            if (a.exited || b.exited) return a.exited && b.exited;
            if (a.waits_alone != b.waits_alone) return false;
            if (a.waits_alone) return a.wait.address == b.wait.address && a.wait.site == b.wait.site;
            return a.warp->verb == b.warp->verb && a.warp->site == b.warp->site && a.warp->number == b.warp->number;
        };
        int last = first;
        while (last + 1 < all_threads() && same_as_first(last + 1)) ++last;
        const Thread& thread = machine.threads[first];
        const char* separator = first ? "; " : "";
        if (length + 1 < sizeof text) {
            char* end = text + length;
            const std::size_t room = sizeof text - length;
            const Verb verb = thread.waits_alone ? thread.wait.verb : thread.warp->verb;
            const Site site = thread.waits_alone ? thread.wait.site : thread.warp->site;
            if (thread.exited)
                length += std::snprintf(end, room, "%sthreads %d-%d have exited", separator, first, last);
            else
                length += std::snprintf(end, room, "%sthreads %d-%d wait in %s at %s:%d", separator, first, last,
                                        kVerbNames[static_cast<int>(verb)], site.file, site.line);
            if (thread.waits_alone && length + 1 < sizeof text)
                length += std::snprintf(text + length, sizeof text - length, " for parity %d of the mbarrier at 0x%x",
                                        thread.wait.parity, thread.wait.address);
            else if (!thread.exited && verb == Verb::kNamedBarrier && length + 1 < sizeof text)
                length += std::snprintf(text + length, sizeof text - length, " for barrier %d", thread.warp->number);
        }
        first = last + 1;
    }
    report("deadlock: %s", text);
}

// ---- A cluster from its first to its last thread ------------------------------------------------------

EMULATED void run_cluster() {
    for (int rank = 0; rank < machine.num_blocks; ++rank) {
        Block& block = machine.blocks[rank];
        block.rank = rank;
        block.warps_at_barrier = 0;
        block.threads_left = machine.num_threads;
        block.epoch = 1;
        block.votes[0] = block.votes[1] = {};
        for (NamedBarrier& barrier : block.named_barriers) barrier.arrived = 0;
    }
    machine.ready_warps = 0;
    machine.warps_at_cluster_barrier = 0;
    machine.threads_left = all_threads();
    machine.stamp = 1;
    machine.agents.clear();
    machine.num_agents = all_threads() + kUnits * kLanes;
    Gathering nothing;
    nothing.start(machine.num_agents);
    const Known known = nothing.freeze();
    for (Group& group : machine.groups) group = {0, entry_registers()};
    for (int index = 0; index < all_warps(); ++index) {
        Warp& warp = machine.warps[index];
        warp.index = index;
        warp.arrived = 0;
        warp.ready = 0;
        wake(warp, ~0u);
    }
    for (int index = 0; index < all_threads(); ++index) {
        Thread& thread = machine.threads[index];
        thread.index = index;
        thread.warp = &machine.warps[index / kLanes];
        thread.block = &machine.blocks[index / machine.num_threads];
        thread.exited = false;
        thread.waits_alone = false;
        thread.known = known;
        thread.async_fences.clear();
        thread.copies.clear();
        thread.groups.clear();
        thread.fence = {};
        thread.atomic = {};
        thread.fiber.start(machine.stacks + index * kStackBytes, kStackBytes, thread_main);
    }
    now = nullptr;
    now = next_thread();
    Fiber::swap(machine.scheduler, now->fiber);
    asm volatile("" ::: "memory");
    if (!machine.failed && machine.threads_left) report_deadlock();
}

}  // namespace emulator
