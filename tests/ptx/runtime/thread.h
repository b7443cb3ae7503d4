// What the translated text includes: the instructions, and one CUDA thread with all that is under way for it.
//
// The text defines `kernel`, `kNumBlocks` and `constants`; everything else is runtime.cpp, which is one translation
// unit, and exports executor_launch and executor_num_blocks.
#pragma once
#include <deque>
#include <map>
#include <memory>
#include <vector>

#include "../../emulator/fiber.h"
#include "instructions.h"

// What is known of every agent (see order.h): everything it did until its clock said this.
typedef std::vector<u32> Clock;

// cp.async of 16 or 4 bytes; of fewer, zeros behind them.
struct Copy {
    u32 to;
    u64 from;
    u32 width;
    u32 bytes;
    u32 line;
};

// A box on its way from shared to global memory.
struct BulkStore {
    u64 map;
    u32 from;
    s32 corner[5];
    u32 line;
};

// The accumulators of products under way, as long as one of them has not been waited for.
struct Accumulators {
    std::vector<u32*> registers;
    std::vector<u32> values;
    int users;  // products
};

// One thread's share of a wgmma.mma_async under way.
struct Product {
    WarpgroupProduct what;
    std::shared_ptr<Accumulators> accumulators;
    u32* a_registers[4];
    u32 a_values[4];  // when it was issued: they must not change
    u64 descriptor_a, descriptor_b;
    u32 line;
    u64 group;                            // of wgmma.commit_group
    u32 done;                             // its warpgroup's clock when it has been done
    std::shared_ptr<const Clock> issued;  // what its warp knew then
};

// What registers of a product held when it was issued, or waited for: who changes them must have a wgmma.fence behind
// that before the next product.
struct RegistersThen {
    std::vector<u32> values;
    u64 fences;
};

enum class State { runs, waits, exited };

struct Thread : ThreadBase {
    u32 index;  // among the cluster's threads
    emulator::Fiber fiber;
    char* stack;
    State state;
    const char* waits_for;
    u32 waits_at;  // line
    Clock clock;

    std::vector<Copy> copies;                   // since the last cp.async.commit_group
    std::deque<std::vector<Copy>> copy_groups;  // that were not waited for
    std::vector<BulkStore> stores;
    std::deque<std::vector<BulkStore>> store_groups;
    std::deque<Product> products;
    u64 product_groups;  // committed
    u64 product_fences;  // wgmma.fence
    std::map<u32*, RegistersThen> registers_then;  // by the first of them

    u32 proxy_fences;         // how many fence.proxy.async were there
    bool barriers_to_fence;   // mbarriers initialised, and no fence.mbarrier_init since
    u64 cluster_generation;   // of the barrier that it has arrived at; 0: at none
    u64 cluster_waits;        // the last generation of it that it has waited for
};

// What the translated text has to define.
struct Region {
    u64 low, high;
};
void kernel(Thread&);
extern const int kNumBlocks;
const Region* constants(int* count);
