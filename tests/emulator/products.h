// The products that warpgroups ask for: wgmma.
//
// A product is a whole one, of 64 rows and all columns, performed once. In schedule 0 that is when it is asked for; in
// the others when it is waited for, its operands are read only then, and until then its sums are NaNs in their
// registers. A warpgroup's products are an agent, known to who waited for them.
#pragma once

#include "boxes.h"

namespace emulator {

constexpr int kProductRows = 64;
constexpr int kOperandBytes = 32;  // of a row along the sum: 16 numbers of two bytes or 32 of one
constexpr std::uint32_t kPoison = 0xFFBFFFFF;  // a NaN that signals: arithmetic makes it another

// A matrix in shared memory: of 8-row (or, by columns, 8-deep) tiles.
struct Descriptor {
    std::uint32_t start, leading, stride, swizzle;
};

// Accumulators that products under way will add to: their numbers, while the registers hold NaNs.
struct Sums {
    float* registers[kGroupThreads];
    int blocks, under_way;
    std::vector<float> numbers;  // 64 rows
};

struct Product;

// What all threads say.
struct Instruction {
    void (*perform)(const Product& product, float* sums);
    std::uint64_t left, right;
    int blocks;
    bool accumulates, by_columns, has_fragments;
};

struct Product : Instruction {
    const std::uint32_t* fragments[kGroupThreads];  // of the left operand, and what they held
    std::uint32_t held[kGroupThreads][4];
    Sums* sums;
    Site site;
};

struct ProductGroup {
    std::vector<Product> products;
    std::uint32_t stamp;
};

struct Products {
    int agent;  // 0: none yet
    bool is_fenced;
    std::vector<Product> open;
    std::vector<ProductGroup> groups;  // committed, oldest first
    std::vector<std::unique_ptr<Sums>> sums;
};
inline Products products_of[kMaxGroups];

// ---- Operands in shared memory ------------------------------------------------------------------------

EMULATED Descriptor decode(std::uint64_t bits, Site site) {
    constexpr std::uint64_t kUsed = 0xC00E3FFF3FFF3FFF;
    constexpr std::uint32_t kWidths[] = {0, 128, 64, 32};
    const auto field = [bits](int place) { return static_cast<std::uint32_t>(bits >> place & 0x3FFF) << 4; };
    const Descriptor found = {field(0), field(16), field(32), kWidths[bits >> 62]};
    const auto written = static_cast<unsigned long long>(bits);
    if (bits & ~kUsed) fail(site, "wgmma: descriptor %#llx has bits where there are none", written);
    if (bits >> 49 & 7) fail(site, "wgmma: the base offset of descriptor %#llx is not 0", written);
    const std::uint32_t width = found.swizzle;
    if (width && found.start % (8 * width) >= width)
        fail(site, "wgmma: the operand at 0x%x does not start in the first row of a swizzled tile of %u bytes",
             found.start, 8 * width);
    return found;
}

// Calls visit(row, chunk, address) for each 16 bytes of an operand whose rows are along the sum.
template <typename Visit>
inline void visit_rows(const Descriptor& from, int first, int end, Visit visit) {
    for (int row = first; row < end; ++row)
        for (int chunk = 0; chunk < 2; ++chunk) {
            const std::uint32_t tile = from.start + row / 8 * from.stride;
            const std::uint32_t in_order = from.swizzle ? tile + row % 8 * from.swizzle + 16 * chunk
                                                        : tile + row % 8 * 16 + chunk * from.leading;
            visit(row, chunk, swizzled(in_order, from.swizzle));
        }
}

// Calls visit(depth, first column, address) for each 16 bytes of an operand whose columns lie together, 8 of 16 bits.
template <typename Visit>
inline void visit_columns(const Descriptor& from, int columns, Visit visit) {
    const int slab = static_cast<int>(from.swizzle / 2);
    for (int depth = 0; depth < 16; ++depth)
        for (int column = 0; column < columns; column += 8) {
            const std::uint32_t in_order = from.start + column / slab * from.leading + depth / 8 * from.stride +
                                           depth % 8 * from.swizzle + column % slab * 2;
            visit(depth, column, swizzled(in_order, from.swizzle));
        }
}

EMULATED const std::uint8_t* chunk_at(std::uint32_t address) { return memory.shared + offset_of(address); }

// That the operands may be read, by each warp what it reads.
EMULATED void note_operands(const Product& product, int agent, Site site) {
    constexpr const char* verb = "wgmma";
    const int first_thread = now->index / kGroupThreads * kGroupThreads;
    const auto read = [=](const Party& party, std::uint32_t address) {
        shared_at(address, 16, verb, site);
        note_read(address, 16, party, verb, site);
    };
    if (!product.has_fragments) {
        const Descriptor left = decode(product.left, site);
        for (int warp = 0; warp < kGroupWarps; ++warp) {
            const Known known = common_knowledge(first_thread + warp * kLanes, kLanes);
            visit_rows(left, 16 * warp, 16 * warp + 16, [&](int, int, std::uint32_t address) {
                read(beside(agent, known, -1), address);
            });
        }
    }
    const Descriptor right = decode(product.right, site);
    const Known known = common_knowledge(first_thread, kGroupThreads);
    const auto visit = [&](int, int, std::uint32_t address) { read(beside(agent, known, -1), address); };
    if (product.by_columns && !right.swizzle) fail(site, "wgmma: the emulator knows operands by columns only swizzled");
    if (product.by_columns)
        visit_columns(right, 8 * product.blocks, visit);
    else
        visit_rows(right, 0, 8 * product.blocks, visit);
}

// ---- The product --------------------------------------------------------------------------------------

using Eight = float __attribute__((vector_size(32), aligned(4)));

// sums [64][columns] += left [64][depth] @ right [depth][columns]; columns are a multiple of 16.
template <int kDepth>
inline void multiply_rows(float* sums, const float (*left)[kDepth], const float (*right)[256], int columns) {
    constexpr int kRows = 4;
    for (int row = 0; row < kProductRows; row += kRows)
        for (int column = 0; column < columns; column += 16) {
            Eight total[kRows][2];
            for (int i = 0; i < kRows; ++i)
                for (int half = 0; half < 2; ++half)
                    total[i][half] = *reinterpret_cast<const Eight*>(sums + (row + i) * columns + column + 8 * half);
            for (int k = 0; k < kDepth; ++k) {
                const Eight first = *reinterpret_cast<const Eight*>(right[k] + column);
                const Eight second = *reinterpret_cast<const Eight*>(right[k] + column + 8);
                for (int i = 0; i < kRows; ++i) {
                    total[i][0] += left[row + i][k] * first;
                    total[i][1] += left[row + i][k] * second;
                }
            }
            for (int i = 0; i < kRows; ++i)
                for (int half = 0; half < 2; ++half)
                    *reinterpret_cast<Eight*>(sums + (row + i) * columns + column + 8 * half) = total[i][half];
        }
}

// Sums of 8-bit numbers have 13 bits behind the point on Hopper, and lose the others.
EMULATED void cut_off(float& sum) {
    std::uint32_t bits;
    std::memcpy(&bits, &sum, 4);
    if ((bits & 0x7F800000) != 0x7F800000) bits &= ~0x3FFu;
    std::memcpy(&sum, &bits, 4);
}

// `kWiden` makes a float of the bits of an element.
template <typename Bits, float (*kWiden)(Bits), bool kByColumns>
inline void perform_product(const Product& product, float* sums) {
    constexpr int kDepth = kOperandBytes / sizeof(Bits), kChunk = 16 / sizeof(Bits);
    const int columns = 8 * product.blocks;
    float left[kProductRows][kDepth];
    float right[kDepth][256];
    Bits numbers[kChunk];
    if (product.has_fragments) {
        for (int thread = 0; thread < kGroupThreads; ++thread)
            for (int i = 0; i < 4; ++i) {
                constexpr int kEach = 4 / sizeof(Bits);
                const int row = thread / kLanes * 16 + thread % kLanes / 4 + i % 2 * 8;
                std::memcpy(numbers, product.fragments[thread] + i, 4);
                float* to = left[row] + kEach * (thread % 4) + i / 2 * (kDepth / 2);
                for (int j = 0; j < kEach; ++j) to[j] = kWiden(numbers[j]);
            }
    } else {
        visit_rows(decode(product.left, product.site), 0, kProductRows, [&](int row, int chunk, std::uint32_t address) {
            std::memcpy(numbers, chunk_at(address), 16);
            for (int i = 0; i < kChunk; ++i) left[row][chunk * kChunk + i] = kWiden(numbers[i]);
        });
    }
    const Descriptor from = decode(product.right, product.site);
    if (kByColumns)
        visit_columns(from, columns, [&](int depth, int column, std::uint32_t address) {
            std::memcpy(numbers, chunk_at(address), 16);
            for (int i = 0; i < kChunk; ++i) right[depth][column + i] = kWiden(numbers[i]);
        });
    else
        visit_rows(from, 0, columns, [&](int column, int chunk, std::uint32_t address) {
            std::memcpy(numbers, chunk_at(address), 16);
            for (int i = 0; i < kChunk; ++i) right[chunk * kChunk + i][column] = kWiden(numbers[i]);
        });
    if (!product.accumulates) std::memset(sums, 0, sizeof(float) * kProductRows * columns);
    multiply_rows<kDepth>(sums, left, right, columns);
    if (sizeof(Bits) == 1)
        for (int index = 0; index < kProductRows * columns; ++index) cut_off(sums[index]);
}

// ---- Accumulators -------------------------------------------------------------------------------------

// Calls visit(number, register) for each accumulator of a warpgroup.
template <typename Visit>
inline void visit_registers(Sums& sums, Visit visit) {
    const int columns = 8 * sums.blocks;
    for (int thread = 0; thread < kGroupThreads; ++thread) {
        const int row = thread / kLanes * 16 + thread % kLanes / 4;
        float* upper = sums.numbers.data() + row * columns + thread % 4 * 2;
        float* lower = upper + 8 * columns;
        float* registers = sums.registers[thread];
        for (int block = 0; block < sums.blocks; ++block) {
            visit(upper[8 * block], registers[4 * block]);
            visit(upper[8 * block + 1], registers[4 * block + 1]);
            visit(lower[8 * block], registers[4 * block + 2]);
            visit(lower[8 * block + 1], registers[4 * block + 3]);
        }
    }
}

EMULATED void take(Sums& sums) {
    sums.numbers.resize(kProductRows * 8 * sums.blocks);
    visit_registers(sums, [](float& number, float& at) { number = at; });
    if (machine.schedule)
        visit_registers(sums, [](float&, float& at) { std::memcpy(&at, &kPoison, 4); });
}

EMULATED void give_back(Sums& sums, Site site) {
    bool touched = false;
    if (machine.schedule)
        visit_registers(sums, [&](float&, float& at) { touched |= std::memcmp(&at, &kPoison, 4) != 0; });
    if (touched) fail(site, "wgmma: an accumulator was written while the product was under way");
    visit_registers(sums, [](float& number, float& at) { at = number; });
}

// The accumulators of this product, taken if no product under way has them.
EMULATED Sums* find_sums(Products& mine, const Warp* warps, int blocks, Site site) {
    float* first = warps[0].lanes[0].c;
    for (const std::unique_ptr<Sums>& sums : mine.sums) {
        if (sums->registers[0] != first) continue;
        if (sums->blocks != blocks) fail(site, "wgmma: a product of another width has these accumulators");
        return sums.get();
    }
    auto sums = std::make_unique<Sums>();
    for (int thread = 0; thread < kGroupThreads; ++thread)
        sums->registers[thread] = warps[thread / kLanes].lanes[thread % kLanes].c;
    sums->blocks = blocks;
    sums->under_way = 0;
    take(*sums);
    mine.sums.push_back(std::move(sums));
    return mine.sums.back().get();
}

EMULATED void finish(Products& mine, const Product& product) {
    if (product.has_fragments)
        for (int thread = 0; thread < kGroupThreads; ++thread)
            if (std::memcmp(product.fragments[thread], product.held[thread], 16) != 0)
                fail(product.site, "wgmma: thread %d of the warpgroup wrote its left operand's registers while the "
                     "product was under way", thread);
    Sums& sums = *product.sums;
    product.perform(product, sums.numbers.data());
    if (--sums.under_way) return;
    give_back(sums, product.site);
    for (auto at = mine.sums.begin(); at != mine.sums.end(); ++at)
        if (at->get() == &sums) return void(mine.sums.erase(at));
}

// ---- What a warpgroup does ------------------------------------------------------------------------------

EMULATED void fence_products(Site site) {
    group_together(Verb::kWgmmaFence, site, 0, [](int group) { products_of[group].is_fenced = true; });
}

EMULATED void multiply(const Instruction& instruction, float* c, const std::uint32_t* a, Site site) {
    Operands& mine = now->warp->lanes[now->lane()];
    mine.c = c;
    mine.a = a;
    mine.left = instruction.left;
    mine.right = instruction.right;
    mine.value = instruction.accumulates;
    group_together(Verb::kWgmma, site, instruction.blocks, [&](int group) {
        Products& products = products_of[group];
        const Warp* warps = machine.warps + group * kGroupWarps;
        Product product;
        static_cast<Instruction&>(product) = instruction;
        product.site = site;
        for (int thread = 0; thread < kGroupThreads; ++thread) {
            const Operands& lane = warps[thread / kLanes].lanes[thread % kLanes];
            if (lane.left != product.left || lane.right != product.right || lane.value != product.accumulates)
                fail(site, "wgmma: the threads of the warpgroup do not agree on descriptors and accumulation");
            product.fragments[thread] = lane.a;
            if (product.has_fragments) std::memcpy(product.held[thread], lane.a, 16);
        }
        if (!products.is_fenced)
            fail(site, "wgmma: the warpgroup may have written registers, with no wgmma_fence since");
        if (!products.agent) products.agent = new_agent("a product of warpgroup %d", group);
        note_operands(product, products.agent, site);
        product.sums = find_sums(products, warps, product.blocks, site);
        ++product.sums->under_way;
        if (!machine.schedule) finish(products, product);
        products.open.push_back(product);
    });
}

EMULATED void commit_products(Site site) {
    group_together(Verb::kWgmmaCommit, site, 0, [](int group) {
        Products& mine = products_of[group];
        mine.groups.push_back({std::move(mine.open), machine.stamp++});
        mine.open.clear();
    });
}

EMULATED void wait_for_products(std::size_t pending_groups, Site site) {
    // Where nothing is under way nobody waits for the other warps of the group, who have asked for all that this one has.
    Products& its = products_of[now->warp->index / kGroupWarps];
    if (its.open.empty() && its.groups.size() <= pending_groups) {
        its.is_fenced = false;
        return;
    }
    group_together(Verb::kWgmmaWait, site, static_cast<int>(pending_groups), [=](int group) {
        Products& mine = products_of[group];
        mine.is_fenced = false;
        std::uint32_t stamp = 0;
        for (; mine.groups.size() > pending_groups; mine.groups.erase(mine.groups.begin())) {
            stamp = mine.groups[0].stamp;
            if (!machine.schedule) continue;
            for (const Product& product : mine.groups[0].products) finish(mine, product);
        }
        if (!stamp || !mine.agent) return;
        Gathering news;
        news.start(machine.num_agents);
        news.add(mine.agent, stamp);
        const Known known = news.freeze();
        Thread* threads = machine.threads + group * kGroupThreads;
        for (int thread = 0; thread < kGroupThreads; ++thread) learn(threads[thread], known);
    });
}

// `count` registers for each thread of the warpgroup: more or fewer than it has.
EMULATED void change_registers(int count, bool more, Site site) {
    const Verb verb = more ? Verb::kMoreRegisters : Verb::kFewerRegisters;
    group_together(verb, site, count, [=](int group) {
        int& registers = machine.groups[group].registers;
        if (more ? count < registers : count > registers)
            fail(site, "%s: %d, and the warpgroup has %d", kVerbNames[static_cast<int>(verb)], count, registers);
        registers = count;
    });
}

// ---- A cluster from its first to its last thread ------------------------------------------------------

EMULATED void begin_beside() {
    begin_boxes();
    for (Products& products : products_of) products = {};
}

EMULATED void end_beside() {
    end_boxes();
    const int groups = machine.num_threads / kGroupThreads, pool = entry_registers() * machine.num_threads;
    for (int rank = 0; rank < machine.num_blocks; ++rank) {
        int registers = 0;
        for (int group = rank * groups; group < (rank + 1) * groups; ++group) {
            if (!products_of[group].open.empty() || !products_of[group].groups.empty())
                report("warpgroup %d has exited, and has not waited for its products (wgmma_commit, wgmma_wait)",
                       group % groups);
            registers += kGroupThreads * machine.groups[group].registers;
        }
        if (registers > pool)
            report("more_registers waits forever: the warpgroups ask for %d registers, and the block has %d", registers,
                   pool);
    }
}

}  // namespace emulator
