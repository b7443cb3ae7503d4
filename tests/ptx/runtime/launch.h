// A launch: clusters one after another, for they share nothing but global memory; in order in schedule 0.
#pragma once
#include <sys/mman.h>

#include "warpgroups.h"

constexpr u32 kSharedAlignment = 1024;
constexpr u32 kMostClusterBlocks = 8;

static void exit_thread(Thread& thread) {
    if (!thread.products.empty()) fail(thread, "exit with wgmma under way");
    end_all_copies(thread);
    require_all_stores_read(thread);
    if (machine.checks_races) learn(block_of(thread).exit_clock, thread.clock);
    thread.state = State::exited;
    --machine.running;
    --block_of(thread).running;
    complete_cluster_barrier();
}
static void run_thread() {
    Thread& thread = *machine.current;
    kernel(thread);
    exit_thread(thread);
    for (;;) leave_thread();
}

static bool box_comes_now() {
    if (machine.boxes.empty()) return false;
    return machine.runnable.empty() || (machine.schedule == 2 && random_number() % kPicksBetweenBoxes == 0);
}
static void run_threads() {
    while (!machine.failed) {
        if (box_comes_now()) {
            perform_any_box();
            continue;
        }
        if (machine.runnable.empty()) break;
        machine.current = &next_thread();
        emulator::Fiber::swap(machine.fiber, machine.current->fiber);
    }
    if (!machine.failed && machine.running) report_deadlock();
}

// What must be true of a cluster that has come to its end.
static void check_reach_into_exited_blocks() {
    if (!machine.checks_races) return;
    for (const Block& block : machine.blocks)
        for (const Moment& access : block.reached_from_elsewhere)
            if (!known(access, block.exit_clock))
                record_failure(
                    "block (%u,%u,%u) of a cluster may exit before thread %u of another reaches for its shared "
                    "memory",
                    block.x, block.y, block.z, machine.threads[access.agent]->number);
}
static void check_mbarriers_at_end() {
    for (const Block& block : machine.blocks)
        for (const auto& each : block.mbarriers)
            if (each.second.bytes)
                record_failure("block (%u,%u,%u): mbarrier %u still waits for %ld bytes at the end", block.x, block.y,
                               block.z, each.first, (long)each.second.bytes);
}

// ---- Before a cluster runs ------------------------------------------------------------------------------------------

struct Storage {
    std::vector<u8> shared;
    u32 block_bytes;
    char* stacks;
    size_t stack_bytes;
    std::vector<Thread> threads;
};

static u8* aligned(u8* place, size_t alignment) { return (u8*)(((u64)place + alignment - 1) / alignment * alignment); }
static void begin_block(const Request& request, Storage& storage, u32 rank, u32 number) {
    Block& block = machine.blocks[rank];
    block.number = number;
    block.x = number % request.grid[0];
    block.y = number / request.grid[0] % request.grid[1];
    block.z = number / request.grid[0] / request.grid[1];
    block.running = request.threads;
    block.shared = aligned(storage.shared.data(), kSharedAlignment) + (size_t)rank * storage.block_bytes;
    // What nobody wrote is nan in every type in the schedules that look for it, and small numbers in schedule 0.
    memset(block.shared, machine.schedule ? 0xff : 0xaa, storage.block_bytes);
    const u32 words = storage.block_bytes / 4;
    block.flags.assign(words, 0);
    block.generic_writes.assign(words, GenericWrite());
    if (machine.checks_races) block.words.resize(words);
    block.exit_clock = fresh_clock();
}
static void begin_thread(const Request& request, Storage& storage, u32 index) {
    Thread& thread = storage.threads[index];
    thread = Thread();
    thread.index = index;
    thread.rank = index / request.threads;
    thread.number = index % request.threads;
    thread.lane = thread.number % kLanes;
    thread.warp = thread.number / kLanes;
    const Block& block = machine.blocks[thread.rank];
    thread.block[0] = block.x;
    thread.block[1] = block.y;
    thread.block[2] = block.z;
    thread.state = State::runs;
    thread.stack = storage.stacks + index * kStackBytes;
    thread.fiber.start(thread.stack, kStackBytes, run_thread);
    thread.clock = fresh_clock();
    tick(thread);
    machine.warps[index / kLanes].lanes[thread.lane] = &thread;
    machine.threads.push_back(&thread);
    machine.runnable.push_back(&thread);
}
static void begin_cluster(const Request& request, Storage& storage, u32 number) {
    const u32 threads = request.threads * request.cluster;
    const u32 groups = (threads + kGroupThreads - 1) / kGroupThreads;
    machine.num_agents = threads + groups;
    machine.running = threads;
    machine.polls = 0;
    machine.runnable.clear();
    machine.threads.clear();
    machine.boxes.clear();
    machine.warps.assign(threads / kLanes, Warp());
    machine.groups.assign(groups, Group());
    machine.cluster_barrier = ClusterBarrier();
    machine.blocks.clear();
    machine.blocks.resize(request.cluster);
    global_order.acquired.clear();
    for (u32 rank = 0; rank < (u32)request.cluster; ++rank)
        begin_block(request, storage, rank, number * request.cluster + rank);
    for (u32 index = 0; index < threads; ++index) begin_thread(request, storage, index);
}

// ---- The launch -----------------------------------------------------------------------------------------------------

static bool request_is_sound(const Request& request) {
    const s32* grid = request.grid;
    const bool sound = request.threads > 0 && request.threads % kLanes == 0 && request.threads <= 1024 &&
                       request.cluster >= 1 && request.cluster <= (s32)kMostClusterBlocks && grid[0] > 0 &&
                       grid[1] > 0 && grid[2] > 0 && grid[0] % request.cluster == 0 && request.schedule >= 0 &&
                       request.schedule <= 2;
    if (!sound)
        record_failure("no launch of (%d,%d,%d) blocks of %d threads in clusters of %d, schedule %d", grid[0], grid[1],
                       grid[2], request.threads, request.cluster, request.schedule);
    return sound;
}
static void begin_launch(const Request& request, u8* parameters) {
    launch.threads = request.threads;
    for (int axis = 0; axis < 3; ++axis) launch.grid[axis] = request.grid[axis];
    launch.cluster = request.cluster;
    launch.parameters = parameters;
    visits = request.visits;
    machine.request = &request;
    machine.schedule = request.schedule;
    machine.checks_races = request.checks_races;
    machine.shared_bytes = (u32)request.shared_bytes;
    machine.failed = false;
    machine.last_buffer = 0;
    machine.picks = 0;
    machine.starved_warp = 0;
    machine.random = request.seed * 0x9e3779b97f4a7c15 + 88172645463325252;
    if (machine.random == 0) machine.random = 1;  // zero would stay zero
    for (int warm_up = 0; warm_up < 16; ++warm_up) random_number();
    global_order.writes.clear();
    global_order.released.clear();
}
static std::vector<u32> order_of_clusters(const Request& request) {
    std::vector<u32> order((size_t)request.grid[0] * request.grid[1] * request.grid[2] / request.cluster);
    for (size_t index = 0; index < order.size(); ++index) order[index] = (u32)index;
    if (request.schedule)
        for (size_t left = order.size(); left > 1; --left) std::swap(order[left - 1], order[random_number() % left]);
    return order;
}
static void run_clusters(const Request& request, Storage& storage) {
    for (u32 number : order_of_clusters(request)) {
        begin_cluster(request, storage, number);
        run_threads();
        if (!machine.failed) check_reach_into_exited_blocks();
        if (!machine.failed) check_mbarriers_at_end();
        if (machine.failed) return;
    }
}

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int executor_num_blocks() { return kNumBlocks; }

// 0, or 1 and a message.
EXPORT int executor_launch(const Request* asked) {
    const Request& request = *asked;
    request.message[0] = 0;
    std::vector<u8> parameters(request.parameter_bytes + 2 * kMapBytes);
    u8* place = aligned(parameters.data(), kMapBytes);
    memcpy(place, request.parameters, request.parameter_bytes);
    begin_launch(request, place);
    if (!request_is_sound(request)) return 1;

    Storage storage;
    const u32 threads = request.threads * request.cluster;
    const u32 end = kSharedBase + machine.shared_bytes;
    storage.block_bytes = (end + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment;
    storage.shared.resize((size_t)storage.block_bytes * request.cluster + kSharedAlignment);
    storage.threads.resize(threads);
    storage.stack_bytes = threads * kStackBytes;
    constexpr int kMapping = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* stacks = mmap(nullptr, storage.stack_bytes, PROT_READ | PROT_WRITE, kMapping, -1, 0);
    if (stacks == MAP_FAILED) {
        record_failure("no memory for %u stacks", threads);
        return 1;
    }
    storage.stacks = (char*)stacks;
    run_clusters(request, storage);
    munmap(stacks, storage.stack_bytes);
    machine.blocks.clear();
    return machine.failed;
}
