// One thread block on one core: every CUDA thread is a fiber that runs until it has to wait for others.
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

namespace emulator {

constexpr int kLanes = 32;
constexpr int kMaxThreads = 1024;
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

// What the lanes of a warp do together.
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
};
constexpr const char* kVerbNames[] = {
    "barrier", "warp_barrier", "shuffle_xor", "shuffle", "any", "all", "load_matrices", "load_matrices_transposed",
    "multiply_add",
};

// A copy from global to shared memory that may still be under way.
struct Copy {
    std::uint32_t to;
    const void* from;  // null: zeros
};

// What a lane brings to its warp's instruction, and what it takes away.
struct Operands {
    std::uint32_t value, other;
    std::uint32_t* to;
    const std::uint32_t* a;
    float* c;
};

struct Warp {
    int index;
    std::uint32_t ready;    // lanes that can run; the running one is not among them
    std::uint32_t arrived;  // lanes that wait, all for the same `verb` at the same `site`
    Verb verb;
    Site site;
    std::uint32_t interval;  // between two warp barriers; unique in the block
    Operands lanes[kLanes];
};

// When a thread did something, as far as others can tell.
struct Moment {
    std::uint32_t epoch;     // of the block, between two of its barriers; 0: never
    std::uint32_t interval;  // of the warp, between two of its own or the block's
    std::uint16_t thread;
};

struct Fence {
    Moment moment;
    std::uint32_t time;  // 0: none
};

struct Thread {
    Fiber fiber;
    int index;
    Warp* warp;
    bool exited;
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
    int num_warps, warps_at_barrier, threads_left;
    std::uint32_t ready_warps;  // those with a ready lane
    std::uint32_t epoch;        // between two block barriers; from 1
    std::uint32_t intervals;    // given out to warps
    struct {
        std::uint32_t epoch;
        bool any;
    } votes[2];  // of barrier_any, this epoch's and the one before
};

struct Machine {
    Thread threads[kMaxThreads];
    Warp warps[kMaxThreads / kLanes];
    Block block;
    Fiber scheduler;
    char* stacks;
    void (*kernel)();
    int grid_x, grid_y, grid_z, num_threads;
    int schedule;
    bool check_races;
    std::uint64_t random;
    std::uint32_t time;  // counts stores to global memory and fences
    bool failed;
    char* message;
    std::size_t message_bytes;
};
inline Machine machine;

inline Thread* now;  // the running thread

// ---- Chance ---------------------------------------------------------------------------------------

inline std::uint32_t random_number() {
    machine.random ^= machine.random << 13;
    machine.random ^= machine.random >> 7;
    machine.random ^= machine.random << 17;
    return static_cast<std::uint32_t>(machine.random >> 32);
}

// A number of a bit that is set, not uniformly so.
inline int random_bit(std::uint32_t bits) {
    const unsigned turn = random_number() % 32;
    const std::uint32_t turned = bits >> turn | bits << (32 - turn) % 32;
    return (__builtin_ctz(turned) + turn) % 32;
}

// ---- Errors ---------------------------------------------------------------------------------------

// Notes the first error of a launch.
__attribute__((format(printf, 1, 2))) inline void report(const char* format, ...) {
    if (machine.failed) return;
    machine.failed = true;
    const Block& block = machine.block;
    const int written =
        std::snprintf(machine.message, machine.message_bytes, "block (%d, %d, %d): ", block.x, block.y, block.z);
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(machine.message + written, machine.message_bytes - written, format, arguments);
    va_end(arguments);
}

// Ends the launch from within a thread, which is abandoned where it stands.
[[noreturn]] inline void give_up() {
    Fiber::swap(now->fiber, machine.scheduler);
    __builtin_unreachable();
}

// An error of the running thread at `site`.
__attribute__((format(printf, 2, 3))) [[noreturn]] inline void fail(Site site, const char* format, ...) {
    char text[2048];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    report("thread %d, %s:%d: %s", now->index, site.file, site.line, text);
    give_up();
}

// ---- Who runs -------------------------------------------------------------------------------------

inline void wake(Warp& warp, std::uint32_t lanes) {
    if (!lanes) return;
    warp.ready |= lanes;
    machine.block.ready_warps |= 1u << warp.index;
}

// Schedule 0 takes threads in order, 1 any warp, and 2 lets one warp run as far as it can before another is drawn.
inline Thread* next_thread() {
    Block& block = machine.block;
    if (!block.ready_warps) return nullptr;
    int index = __builtin_ctz(block.ready_warps);
    if (machine.schedule) {
        const bool may_stay = now && now->warp->ready;
        const bool stays = may_stay && (machine.schedule == 2 || random_number() % 4);
        index = stays ? now->warp->index : random_bit(block.ready_warps);
    }
    Warp& warp = machine.warps[index];
    const int lane = machine.schedule ? random_bit(warp.ready) : __builtin_ctz(warp.ready);
    warp.ready &= ~(1u << lane);
    if (!warp.ready) block.ready_warps &= ~(1u << index);
    return &machine.threads[index * kLanes + lane];
}

// Lets others run until this thread is woken.
inline void suspend() {
    Thread* me = now;
    Thread* next = next_thread();
    if (next == me) return;
    now = next;
    Fiber::swap(me->fiber, next ? next->fiber : machine.scheduler);
    asm volatile("" ::: "memory");
}

inline void thread_main() {
    machine.kernel();
    now->exited = true;
    --machine.block.threads_left;
    suspend();
    __builtin_unreachable();
}

// ---- Waiting for each other -------------------------------------------------------------------------

// The running lane joins its warp at `verb`; true if it is the last.
inline bool arrive(Verb verb, Site site) {
    Warp& warp = *now->warp;
    if (!warp.arrived) {
        warp.verb = verb;
        warp.site = site;
    } else if (warp.verb != verb || !(warp.site == site)) {
        const int first = warp.index * kLanes + __builtin_ctz(warp.arrived);
        fail(site, "the warp diverges: %s here, while thread %d waits in %s at %s:%d",
             kVerbNames[static_cast<int>(verb)], first, kVerbNames[static_cast<int>(warp.verb)], warp.site.file,
             warp.site.line);
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

inline void warp_barrier(Site site) {
    together(Verb::kWarpBarrier, site, [](Warp& warp) { warp.interval = ++machine.block.intervals; });
}

inline void block_barrier(Site site) {
    Block& block = machine.block;
    if (!arrive(Verb::kBarrier, site)) return suspend();
    if (++block.warps_at_barrier < block.num_warps) return suspend();
    block.warps_at_barrier = 0;
    ++block.epoch;
    for (int index = 0; index < block.num_warps; ++index) {
        Warp& warp = machine.warps[index];
        warp.interval = ++block.intervals;
        warp.arrived = 0;
        wake(warp, ~0u);
    }
    suspend();  // the last to come is not always the first to go
}

inline bool block_barrier_any(bool condition, Site site) {
    auto& vote = machine.block.votes[machine.block.epoch % 2];
    if (vote.epoch != machine.block.epoch) vote = {machine.block.epoch, false};
    vote.any |= condition;
    block_barrier(site);
    return vote.any;
}

// ---- What came before what --------------------------------------------------------------------------

inline Moment this_moment() {
    return {machine.block.epoch, now->warp->interval, static_cast<std::uint16_t>(now->index)};
}

inline bool barrier_between(const Moment& earlier, const Moment& later) {
    if (earlier.epoch < later.epoch) return true;
    return earlier.thread / kLanes == later.thread / kLanes && earlier.interval < later.interval;
}
inline bool barrier_since(const Moment& moment) { return barrier_between(moment, this_moment()); }

// Whether what happened at a moment of this block is sure to have happened for the running thread.
inline bool is_before_now(const Moment& moment) { return moment.thread == now->index || barrier_since(moment); }

// Of all threads when none can run: "threads 0-31 wait in barrier at flash.cu:7; threads 32-127 have exited".
inline void report_deadlock() {
    char text[2048] = "";
    std::size_t length = 0;
    for (int first = 0; first < machine.num_threads;) {
        const auto same_as_first = [first](int other) {
            const Thread &a = machine.threads[first], &b = machine.threads[other];
            if (a.exited || b.exited) return a.exited && b.exited;
            return a.warp->verb == b.warp->verb && a.warp->site == b.warp->site;
        };
        int last = first;
        while (last + 1 < machine.num_threads && same_as_first(last + 1)) ++last;
        const Thread& thread = machine.threads[first];
        const char* separator = first ? "; " : "";
        if (length + 1 < sizeof text) {
            char* end = text + length;
            const std::size_t room = sizeof text - length;
            if (thread.exited)
                length += std::snprintf(end, room, "%sthreads %d-%d have exited", separator, first, last);
            else
                length += std::snprintf(end, room, "%sthreads %d-%d wait in %s at %s:%d", separator, first, last,
                                        kVerbNames[static_cast<int>(thread.warp->verb)], thread.warp->site.file,
                                        thread.warp->site.line);
        }
        first = last + 1;
    }
    report("deadlock: %s", text);
}

// ---- A block from its first to its last thread ------------------------------------------------------

inline void run_block() {
    Block& block = machine.block;
    block.num_warps = machine.num_threads / kLanes;
    block.warps_at_barrier = 0;
    block.threads_left = machine.num_threads;
    block.ready_warps = 0;
    block.epoch = 1;
    block.votes[0] = block.votes[1] = {};
    block.intervals = 0;
    for (int index = 0; index < block.num_warps; ++index) {
        Warp& warp = machine.warps[index];
        warp.index = index;
        warp.arrived = 0;
        warp.ready = 0;
        warp.interval = ++block.intervals;
        wake(warp, ~0u);
    }
    for (int index = 0; index < machine.num_threads; ++index) {
        Thread& thread = machine.threads[index];
        thread.index = index;
        thread.warp = &machine.warps[index / kLanes];
        thread.exited = false;
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
    if (!machine.failed && block.threads_left) report_deadlock();
}

}  // namespace emulator
