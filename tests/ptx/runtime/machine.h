// One cluster of thread blocks on one core, and everything that its threads share. There is one machine in a library,
// and it runs one launch at a time.
#pragma once
#include <cstdarg>
#include <cstdio>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "numbers.h"
#include "thread.h"

constexpr u32 kLanes = 32;
constexpr u32 kGroupWarps = 4;
constexpr u32 kGroupThreads = kGroupWarps * kLanes;
constexpr u32 kNamedBarriers = 16;
// Pages that nobody touches cost nothing. No power of two, or the tops of all stacks would share the same cache lines.
constexpr size_t kStackBytes = (1 << 20) + 576;
constexpr u32 kNobody = ~0u;

// ---- What Python asks for -------------------------------------------------------------------------------------------

struct Buffer {
    u64 address, bytes, writable;
};
struct Request {
    const u8* parameters;
    u32 parameter_bytes;
    s32 grid[3];
    s32 threads, cluster;
    s64 shared_bytes;
    const Buffer* buffers;
    s64 num_buffers;
    s32 schedule, checks_races;
    u64 seed;
    char* message;
    s64 message_bytes;
    u64* visits;
};

// ---- What threads share ---------------------------------------------------------------------------------------------

// An access: its agent, and that agent's clock then.
struct Moment {
    u32 agent = kNobody;
    u32 clock = 0;
};

// Four bytes of shared memory: who wrote them last, and who read them since. Most have one reader, or readers in order;
// the others get a list.
struct Word {
    Moment write, read;
    std::unique_ptr<std::vector<Moment>> reads;
};

// What may not be touched, of four bytes.
constexpr u8 kCopyUnderWay = 1;
constexpr u8 kMbarrier = 2;

// The last write through the generic proxy that the async proxy has not overwritten (see mbarriers.h).
struct GenericWrite {
    u32 thread = kNobody;
    u32 proxy_fences = 0;
};

// bar.sync and bar.arrive
struct Barrier {
    u32 arrived = 0;
    u32 expected = 0;
    u64 generation = 0;
    bool any = false;  // of bar.red.or
    bool last_any = false;
    std::vector<Thread*> waiters;
    Clock clock, last_clock;
};

struct Mbarrier {
    Moment initialised;
    // Who has waited for this generation of the cluster's barrier knows of that, too; 0: for none. See barriers.h.
    u64 announced;
    u32 arrivals;  // of a phase
    u32 pending;
    s64 bytes;  // that copies have still to bring
    u64 phase;
    std::vector<Thread*> waiters;
    Clock clock, last_clock;
};

struct Block {
    u32 x, y, z;
    u32 number;   // in the grid
    u32 running;  // threads
    u8* shared;   // `shared + address` is the byte at this address
    std::vector<u8> flags;  // by words, as the next two
    std::vector<GenericWrite> generic_writes;
    std::vector<Word> words;
    Barrier barriers[kNamedBarriers];
    std::map<u32, Mbarrier> mbarriers;
    u32 free_registers = 0;
    std::vector<Thread*> register_waiters;
    Clock exit_clock;
    std::vector<Moment> reached_from_elsewhere;  // accesses by threads of other blocks
};

struct Warp {
    u32 arrived = 0;  // lanes, at the same instruction
    s64 site = -1;
    u64 generation = 0;
    void* operands[kLanes];
    Thread* lanes[kLanes];
    u64 issued = 0;   // products
    u64 retired = 0;  // products that were waited for
    size_t logged = 0;
};

// What all four warps of a warpgroup have to do alike.
struct Agreement {
    u64 what, how;
};
struct Group {
    std::vector<Agreement> log;
    u64 done = 0;   // products
    u32 clock = 1;  // as an agent
    std::vector<Thread*> waiters;
};

struct ClusterBarrier {
    u32 arrived = 0;
    u64 generation = 0;
    std::vector<Thread*> waiters;
    Clock clock, last_clock;
};

// A box on its way from global to shared memory.
struct Box {
    u32 rank;    // of the block that asked for it
    u32 thread;  // of the cluster
    u32 to;
    u64 map;
    u32 mbarrier;
    s32 corner[5];
    u32 ranks;  // a bit for each block that it comes to
    u32 line;
    Clock clock;
};

struct Machine {
    const Request* request;
    u32 schedule;
    bool checks_races;
    u32 shared_bytes;
    u64 random;
    bool failed;
    bool outside_of_threads;  // boxes that come when no thread runs: there is no thread to leave then

    emulator::Fiber fiber;
    Thread* current;
    std::deque<Thread*> runnable;
    std::vector<Thread*> threads;
    std::vector<Warp> warps;
    std::vector<Group> groups;
    std::vector<Block> blocks;
    std::vector<Box> boxes;
    ClusterBarrier cluster_barrier;
    u32 running;     // threads
    u32 num_agents;  // threads, and behind them the warpgroups' products
    u64 polls;
    u64 picks;
    u32 starved_warp;
    s64 last_buffer;
};

Launch launch;
u64* visits;
static Machine machine;

static Block& block_of(const Thread& thread) { return machine.blocks[thread.rank]; }
static Warp& warp_of(const Thread& thread) { return machine.warps[thread.index / kLanes]; }
static u32 group_of(const Thread& thread) { return thread.index / kGroupThreads; }

// xorshift
static u32 random_number() {
    machine.random ^= machine.random << 13;
    machine.random ^= machine.random >> 7;
    machine.random ^= machine.random << 17;
    return machine.random >> 16;
}

static void leave_thread() { emulator::Fiber::swap(machine.current->fiber, machine.fiber); }

// Nobody returns to a failed launch's threads.
struct Failure {};
static void record_failure(const char* format, ...) __attribute__((format(printf, 1, 2)));
static void record_failure(const char* format, ...) {
    if (machine.failed) return;
    machine.failed = true;
    va_list operands;
    va_start(operands, format);
    vsnprintf(machine.request->message, machine.request->message_bytes, format, operands);
    va_end(operands);
}
void fail(Thread& thread, const char* format, ...) {
    char text[2048];
    va_list operands;
    va_start(operands, format);
    vsnprintf(text, sizeof text, format, operands);
    va_end(operands);
    record_failure("PTX line %u, block (%u,%u,%u) thread %u: %s", thread.line, thread.block[0], thread.block[1],
                   thread.block[2], thread.number, text);
    if (machine.outside_of_threads) throw Failure();
    for (;;) leave_thread();
}
