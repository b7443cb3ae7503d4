// What the library offers to Python: one launch of the kernel it was built for.
#pragma once

#include "products.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace emulator {

template <typename Parameters>
Parameters parameters_of(void (*)(Parameters));

struct LaunchRequest {
    const void* parameters;
    std::int32_t grid[3];
    std::int32_t num_threads;
    std::int32_t cluster;  // blocks of one
    std::int64_t shared_bytes;
    const Buffer* buffers;
    std::int64_t num_buffers;
    std::int32_t schedule;
    std::int32_t check_races;
    std::uint64_t seed;
    char* message;
    std::int64_t message_bytes;
};

EMULATED void prepare_machine(const LaunchRequest& request) {
    machine.grid_x = request.grid[0], machine.grid_y = request.grid[1], machine.grid_z = request.grid[2];
    machine.num_threads = request.num_threads;
    machine.num_warps = request.num_threads / kLanes;
    machine.num_blocks = request.cluster;
    machine.schedule = request.schedule;
    machine.late_warp = static_cast<int>(request.seed % machine.num_warps);
    machine.check_races = request.check_races;
    machine.random = request.seed * 2 + 1;  // zero would stay zero
    for (int warm_up = 0; warm_up < 16; ++warm_up) random_number();
    machine.time = 0;
    machine.failed = false;
    machine.message = request.message;
    machine.message_bytes = request.message_bytes;
}

EMULATED void prepare_memory(const LaunchRequest& request, std::size_t num_blocks) {
    memory.shared_bytes = request.shared_bytes;
    memory.shared_step = (request.shared_bytes + 1023) / 1024 * 1024;  // all blocks' are aligned alike
    memory.storage.resize(machine.num_blocks * memory.shared_step + 1024);
    const auto start = reinterpret_cast<std::uintptr_t>(memory.storage.data());
    memory.shared = reinterpret_cast<std::uint8_t*>((start + 1023) / 1024 * 1024);
    memory.buffers = request.buffers;
    memory.num_buffers = request.num_buffers;
    memory.last_buffer = 0;
    memory.released.assign(num_blocks + 1, {});
    memory.traces.assign(request.num_buffers, {});
    for (int index = 0; index < request.num_buffers; ++index)
        if (machine.check_races && request.buffers[index].writable)
            memory.traces[index].resize(request.buffers[index].bytes);
}

// Clusters in order in schedule 0, else in random order; one after another, for they share only global memory.
EMULATED int launch(const LaunchRequest& request, void (*kernel)()) {
    prepare_machine(request);
    machine.kernel = kernel;
    const auto num_blocks = static_cast<std::size_t>(machine.grid_x) * machine.grid_y * machine.grid_z;
    prepare_memory(request, num_blocks);

    const std::size_t num_clusters = num_blocks / machine.num_blocks;
    std::vector<std::uint32_t> order(num_clusters);
    for (std::size_t index = 0; index < num_clusters; ++index) order[index] = index;
    if (machine.schedule)
        for (std::size_t left = num_clusters; left > 1; --left)
            std::swap(order[left - 1], order[random_number() % left]);

    const std::size_t stack_bytes = all_threads() * kStackBytes;
    constexpr int kMapping = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* stacks = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, kMapping, -1, 0);
    if (stacks == MAP_FAILED) {
        std::snprintf(machine.message, machine.message_bytes, "no memory for %d stacks", all_threads());
        return 1;
    }
    machine.stacks = static_cast<char*>(stacks);
    for (std::size_t place = 0; place < num_clusters && !machine.failed; ++place) {
        for (int rank = 0; rank < machine.num_blocks; ++rank) {
            const int index = order[place] * machine.num_blocks + rank;
            Block& block = machine.blocks[rank];
            block.x = index % machine.grid_x;
            block.y = index / machine.grid_x % machine.grid_y;
            block.z = index / machine.grid_x / machine.grid_y;
            block.number = index + 1;
        }
        const std::size_t shared_bytes = machine.num_blocks * memory.shared_step;
        std::memset(memory.shared, 0xAA, shared_bytes);
        if (machine.check_races) memory.words.assign(shared_bytes / 4, Word{});
        memory.readings.assign(1, {});
        memory.free_readings = 0;
        begin_beside();
        run_cluster();
        end_beside();
    }
    munmap(stacks, stack_bytes);
    return machine.failed;
}

}  // namespace emulator

// `kernel` is a constant function pointer whose one parameter is a struct by value.
#define EMULATED_KERNEL(kernel)                                                              \
    namespace emulator {                                                                     \
    using Parameters = decltype(parameters_of(kernel));                                      \
    alignas(Parameters) static unsigned char parameters[sizeof(Parameters)];                 \
    static void run_kernel() { kernel(*reinterpret_cast<const Parameters*>(parameters)); }   \
    }                                                                                        \
    EXPORT unsigned long emulator_parameter_bytes() { return sizeof(emulator::Parameters); } \
    EXPORT int emulator_launch(const emulator::LaunchRequest* request) {                     \
        std::memcpy(emulator::parameters, request->parameters, sizeof emulator::parameters); \
        return emulator::launch(*request, emulator::run_kernel);                             \
    }
