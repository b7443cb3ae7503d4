// Products of a warpgroup (9.7.15): wgmma.mma_async works beside the threads, from wgmma.fence to wgmma.wait_group.
//
// Each warp issues its quarter, 16 of 64 rows; a product is done when all four have issued it: in schedule 0 then, in
// schedule 1 when it is waited for, in schedule 2 at random. Accumulators hold poison from issue to wait, so that what
// is read too early is nan, and what is written meanwhile is noticed. A in registers must not change meanwhile.
#pragma once
#include <algorithm>

#include "layouts.h"

constexpr u32 kPoison = 0x7ff1dead;
constexpr u32 kWarpRows = 16;
constexpr u32 kMostColumns = 256;
// Sums of float8 products: bits behind the first of the largest term that are kept of each term. The rest is cut off.
// Found by measuring Hopper, not in the ISA.
constexpr int kKeptBitsOfFloat8 = 13;

// What a warp knew when it issued the product is all that the product may see.
static void order_matrix(Warp& warp, const Product& product, const SharedMatrix& matrix) {
    if (!machine.checks_races) return;
    Thread& thread = *warp.lanes[0];
    Block& block = block_of(thread);
    const u32 group = group_of(thread);
    const Moment reader{(u32)machine.threads.size() + group, machine.groups[group].clock};
    each_matrix_chunk(thread, matrix, [&](u32, u32, u32 address) {
        check_read(thread, *product.issued, block, address, kChunkBytes);
        note_read(reader, nullptr, block, address, kChunkBytes);
    });
}

// ---- A product ------------------------------------------------------------------------------------------------------

static Product& product_of(Warp& warp, u32 lane, u64 number) {
    return warp.lanes[lane]->products[number - warp.retired];
}

// A in registers (9.7.15.5.1.1.1): lane = 4 * row + column; each register is 4 bytes of row, or of row + 8.
static void read_a_registers(Warp& warp, u64 number, float (&a)[kMostDepth][kWarpRows]) {
    for (u32 lane = 0; lane < kLanes; ++lane) {
        const Product& product = product_of(warp, lane, number);
        const u32 itemsize = itemsize_of(product.what.number);
        const u32 per_register = 4 / itemsize;
        for (u32 index = 0; index < 4; ++index) {
            const u32 bits = *product.a_registers[index];
            if (bits != product.a_values[index])
                fail(*warp.lanes[lane], "wgmma of line %u: register %u of A changed while it was under way",
                     product.line, index);
            u8 bytes[4];
            write<u32>(bytes, bits);
            const u32 row = lane / 4 + index % 2 * 8;
            const u32 k = (lane % 4 + index / 2 * 4) * per_register;
            for (u32 item = 0; item < per_register; ++item)
                a[k + item][row] = product.what.sign_a * value_at(product.what.number, bytes + item * itemsize);
        }
    }
}

typedef double Sums[kWarpRows][kMostColumns];

// Accumulators (9.7.15.5.1.1.2): pairs of columns of row and row + 8, for each 8 columns.
struct Place {
    u32 row, column;
};
static Place place_of_accumulator(u32 lane, u32 index) {
    return {lane / 4 + index / 2 % 2 * 8, index / 4 * 8 + lane % 4 * 2 + index % 2};
}
static void read_accumulators(Warp& warp, u64 number, Sums& sums) {
    for (u32 lane = 0; lane < kLanes; ++lane) {
        const Product& product = product_of(warp, lane, number);
        for (u32 index = 0; index < product.what.columns / 2; ++index) {
            const Place place = place_of_accumulator(lane, index);
            sums[place.row][place.column] =
                product.what.adds ? (double)float_of(product.accumulators->values[index]) : 0.0;
        }
    }
}
static void write_accumulators(Warp& warp, u64 number, const Sums& sums) {
    for (u32 lane = 0; lane < kLanes; ++lane) {
        const Product& product = product_of(warp, lane, number);
        for (u32 index = 0; index < product.what.columns / 2; ++index) {
            const Place place = place_of_accumulator(lane, index);
            product.accumulators->values[index] = result_of((float)sums[place.row][place.column]);
        }
    }
}

static double sum_cut_off(const double* terms, u32 num_terms) {
    double largest = 0;
    double sum = 0;
    for (u32 index = 0; index < num_terms; ++index) {
        sum += terms[index];
        largest = std::max(largest, std::fabs(terms[index]));
    }
    if (largest == 0 || !std::isfinite(sum)) return sum;
    const int first_bit = std::ilogb(largest);
    const double to_units = std::ldexp(1.0, kKeptBitsOfFloat8 - first_bit);
    s64 units = 0;
    for (u32 index = 0; index < num_terms; ++index) units += (s64)(terms[index] * to_units);
    return std::ldexp((double)units, first_bit - kKeptBitsOfFloat8);
}
static void add_products_cut_off(const float (&a)[kMostDepth][kWarpRows], const float (&b)[kMostDepth][kMostColumns],
                                 u32 columns, Sums& sums) {
    double terms[kMostDepth + 1];
    for (u32 row = 0; row < kWarpRows; ++row)
        for (u32 column = 0; column < columns; ++column) {
            for (u32 k = 0; k < kMostDepth; ++k) terms[k] = (double)a[k][row] * b[k][column];
            terms[kMostDepth] = sums[row][column];
            sums[row][column] = sum_cut_off(terms, kMostDepth + 1);
        }
}
static void add_products(const float (&a)[kMostDepth][kWarpRows], const float (&b)[kMostDepth][kMostColumns],
                         u32 columns, Sums& sums) {
    for (u32 row = 0; row < kWarpRows; ++row)
        for (u32 k = 0; k < kDepthBytes / 2; ++k) {
            const double left = a[k][row];
            for (u32 column = 0; column < columns; ++column) sums[row][column] += left * b[k][column];
        }
}

// `b` is the same for all four warps.
static void perform_quarter(Warp& warp, u64 number, const float (&b)[kMostDepth][kMostColumns]) {
    static float a[kMostDepth][kWarpRows];
    static Sums sums;
    Thread& thread = *warp.lanes[0];
    const Product& product = product_of(warp, 0, number);
    const WarpgroupProduct& what = product.what;
    if (what.a_is_shared) {
        const u32 first_row = thread.warp % kGroupWarps * kWarpRows;
        const SharedMatrix matrix{product.descriptor_a, what.transposes_a, what.number,
                                  what.sign_a,          first_row,         kWarpRows};
        order_matrix(warp, product, matrix);
        read_matrix(thread, matrix, a);
    } else {
        read_a_registers(warp, number, a);
    }
    read_accumulators(warp, number, sums);
    if (what.number == Number::e4m3) {
        add_products_cut_off(a, b, what.columns, sums);
    } else {
        add_products(a, b, what.columns, sums);
    }
    write_accumulators(warp, number, sums);
}
static void perform_product(u32 group, u64 number) {
    static float b[kMostDepth][kMostColumns];
    Warp* warps = &machine.warps[group * kGroupWarps];
    u32 lines[kGroupWarps];
    for (u32 index = 0; index < kGroupWarps; ++index) {
        Thread& thread = *warps[index].lanes[0];
        lines[index] = thread.line;
        thread.line = product_of(warps[index], 0, number).line;
    }
    const Product& first = product_of(warps[0], 0, number);
    const WarpgroupProduct& what = first.what;
    const SharedMatrix matrix{first.descriptor_b, what.transposes_b, what.number, what.sign_b, 0, what.columns};
    for (u32 index = 0; index < kGroupWarps; ++index)
        order_matrix(warps[index], product_of(warps[index], 0, number), matrix);
    read_matrix(*warps[0].lanes[0], matrix, b);
    for (u32 index = 0; index < kGroupWarps; ++index) {
        perform_quarter(warps[index], number, b);
        warps[index].lanes[0]->line = lines[index];
    }
}

// ---- From issue to wait ---------------------------------------------------------------------------------------------

static bool all_have_issued(u32 group, u64 products) {
    for (u32 index = 0; index < kGroupWarps; ++index)
        if (machine.warps[group * kGroupWarps + index].issued < products) return false;
    return true;
}
static void perform_products(u32 group, u64 up_to) {
    Group& mine = machine.groups[group];
    for (; mine.done < up_to; ++mine.done) {
        perform_product(group, mine.done);
        for (u32 index = 0; index < kGroupWarps; ++index)
            for (u32 lane = 0; lane < kLanes; ++lane)
                product_of(machine.warps[group * kGroupWarps + index], lane, mine.done).done = mine.clock;
    }
    ++mine.clock;
}

// The oldest product was waited for: its thread knows that it has read, and has the sums when it was their last.
static void retire_product(Warp& warp) {
    for (Thread* lane : warp.lanes) {
        const Product product = std::move(lane->products.front());
        lane->products.pop_front();
        if (machine.checks_races) {
            u32& known = lane->clock[machine.threads.size() + group_of(*lane)];
            known = std::max(known, product.done);
        }
        Accumulators& accumulators = *product.accumulators;
        if (--accumulators.users) continue;
        for (size_t index = 0; index < accumulators.registers.size(); ++index) {
            if (*accumulators.registers[index] != kPoison)
                fail(*lane, "wgmma of line %u: accumulator %zu was written while it was under way", product.line,
                     index);
            *accumulators.registers[index] = accumulators.values[index];
        }
        lane->registers_then[accumulators.registers[0]] = {accumulators.values, lane->product_fences};
    }
    ++warp.retired;
}

void wgmma_fence(Thread& thread, int site) {
    together<void>(thread, site, "wgmma.fence", nullptr, [&](Warp& warp) {
        agree(thread, "wgmma.fence", site, 0);
        for (Thread* lane : warp.lanes) ++lane->product_fences;
    });
}
void wgmma_commit_group(Thread& thread, int site) {
    together<void>(thread, site, "wgmma.commit_group", nullptr, [&](Warp& warp) {
        agree(thread, "wgmma.commit_group", site, 0);
        for (Thread* lane : warp.lanes) ++lane->product_groups;
    });
}
void wgmma_wait_group(Thread& thread, int site, u32 pending) {
    const char* what = "wgmma.wait_group";
    const u32 group = group_of(thread);
    u64 up_to = 0;
    together(thread, site, what, &up_to, [&](Warp& warp) {
        agree(thread, what, site, pending);
        u64 products = warp.retired;
        for (const Product& product : warp.lanes[0]->products)
            products += product.group + pending < warp.lanes[0]->product_groups;
        for (u32 lane = 0; lane < kLanes; ++lane) brought<u64>(warp, lane) = products;
    });
    wait_until([&] { return all_have_issued(group, up_to); }, machine.groups[group].waiters, thread,
               "wgmma.wait_group, for the other warps");
    together<void>(thread, -1 - (s64)site, what, nullptr, [&](Warp& warp) {
        perform_products(group, up_to);
        while (warp.retired < up_to) retire_product(warp);
    });
}

// ---- Issue ----------------------------------------------------------------------------------------------------------

struct ProductOperands {
    const WarpgroupProduct* what;
    u32* const* d;
    u32* const* a;
    u64 descriptor_a, descriptor_b;
};

static void check_product(Thread& thread, const WarpgroupProduct& what) {
    const bool fits = what.columns % 8 == 0 && what.columns >= 8 && what.columns <= kMostColumns;
    if (!fits) fail(thread, "wgmma of %u columns", what.columns);
    if (std::abs(what.sign_a) != 1 || std::abs(what.sign_b) != 1) fail(thread, "wgmma with signs that are not 1 or -1");
    const bool transposes = what.transposes_a || what.transposes_b;
    if (transposes && what.number == Number::e4m3) fail(thread, "wgmma of transposed e4m3");
    if (what.transposes_a && !what.a_is_shared) fail(thread, "wgmma of transposed registers");
}
static void require_same_operands(Thread& lane, const ProductOperands& mine, const ProductOperands& other) {
    const bool same = mine.descriptor_b == other.descriptor_b && mine.what->adds == other.what->adds &&
                      (!mine.what->a_is_shared || mine.descriptor_a == other.descriptor_a);
    if (!same) fail(lane, "wgmma: descriptors or scale-d differ between lanes");
}
// 9.7.15.7.1: in front of the first product, and whenever registers of one were changed.
static void require_product_fence(Thread& lane, u32* const* registers, u32 count) {
    if (lane.product_fences == 0) fail(lane, "wgmma without wgmma.fence before");
    const auto found = lane.registers_then.find(registers[0]);
    if (found == lane.registers_then.end() || found->second.values.size() != count) return;
    if (found->second.fences != lane.product_fences) return;
    for (u32 index = 0; index < count; ++index)
        if (*registers[index] != found->second.values[index])
            fail(lane, "wgmma: register %u was changed since the last product, without wgmma.fence", index);
}
static std::shared_ptr<Accumulators> new_accumulators(Thread& lane, u32* const* registers, u32 count) {
    for (const Product& other : lane.products)
        for (u32* under_way : other.accumulators->registers)
            if (std::find(registers, registers + count, under_way) != registers + count)
                fail(lane, "wgmma: an accumulator is under way with others");
    require_product_fence(lane, registers, count);
    auto accumulators = std::make_shared<Accumulators>();
    accumulators->users = 0;
    for (u32 index = 0; index < count; ++index) {
        accumulators->registers.push_back(registers[index]);
        accumulators->values.push_back(*registers[index]);
    }
    std::vector<u32*> sorted = accumulators->registers;
    std::sort(sorted.begin(), sorted.end());
    if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end())
        fail(lane, "wgmma: an accumulator is named twice");
    for (u32 index = 0; index < count; ++index) *registers[index] = kPoison;
    return accumulators;
}
// Products may follow each other in the same accumulators without a wait.
static std::shared_ptr<Accumulators> accumulators_for(Thread& lane, u32* const* registers, u32 count) {
    for (const Product& other : lane.products) {
        const std::vector<u32*>& under_way = other.accumulators->registers;
        if (under_way[0] != registers[0] || under_way.size() != count) continue;
        if (!std::equal(under_way.begin(), under_way.end(), registers))
            fail(lane, "wgmma: accumulators under way in another order");
        return other.accumulators;
    }
    return new_accumulators(lane, registers, count);
}
static void issue_product(Thread& lane, const ProductOperands& operands, u32 line,
                          std::shared_ptr<const Clock> issued) {
    Product product;
    product.what = *operands.what;
    product.descriptor_a = operands.descriptor_a;
    product.descriptor_b = operands.descriptor_b;
    product.line = line;
    product.group = lane.product_groups;
    product.done = 0;
    product.issued = std::move(issued);
    if (!operands.what->a_is_shared) {
        require_product_fence(lane, operands.a, 4);
        for (u32 index = 0; index < 4; ++index) {
            product.a_registers[index] = operands.a[index];
            product.a_values[index] = *operands.a[index];
        }
        const std::vector<u32> values(product.a_values, product.a_values + 4);
        lane.registers_then[operands.a[0]] = {values, lane.product_fences};
    }
    product.accumulators = accumulators_for(lane, operands.d, operands.what->columns / 2);
    ++product.accumulators->users;
    lane.products.push_back(std::move(product));
}
static void perform_some_products(u32 group, u64 issued) {
    const bool now = machine.schedule == 0 || (machine.schedule == 2 && random_number() % 2);
    if (!now) return;
    while (!all_have_issued(group, issued)) --issued;
    perform_products(group, issued);
}

void wgmma_mma_async(Thread& thread, int site, const WarpgroupProduct& what, u32* const* d, u64 descriptor_a,
                     u32* const* a, u64 descriptor_b) {
    check_product(thread, what);
    ProductOperands mine{&what, d, a, descriptor_a, descriptor_b};
    together(thread, site, "wgmma", &mine, [&](Warp& warp) {
        agree(thread, "wgmma", site, descriptor_b * 2 + what.adds);
        if (what.a_is_shared) agree(thread, "wgmma", site, descriptor_a);
        std::shared_ptr<const Clock> issued;
        if (machine.checks_races) issued = std::make_shared<const Clock>(thread.clock);
        for (u32 lane = 0; lane < kLanes; ++lane) {
            const ProductOperands& operands = brought<ProductOperands>(warp, lane);
            require_same_operands(*warp.lanes[lane], operands, mine);
            issue_product(*warp.lanes[lane], operands, thread.line, issued);
            tick(*warp.lanes[lane]);  // what it writes from here on, the product may not read
        }
        ++warp.issued;
        const u32 group = group_of(thread);
        perform_some_products(group, warp.issued);
        wake_all(machine.groups[group].waiters);
    });
}
