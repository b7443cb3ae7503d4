// Tiles in shared memory as TMA writes them and wgmma reads them.
//
// Nothing here knows of attention.
#pragma once

#include "instructions/ptx90.cuh"

namespace cupyattn {

// A tile of kRows x kCols elements, cut into slabs of kSwizzle bytes a row, one slab after the other.
//
// Within a slab the 16-byte chunks of a row trade places by its number, so that eight rows of one chunk fall into
// different banks: TMA writes, wgmma and `address` agree on how.
template <typename Element, int kRows_, int kCols_>
struct SwizzledTile {
    static constexpr int kRows = kRows_, kCols = kCols_;
    static constexpr int kItem = sizeof(Element);
    static constexpr int kSwizzle = kCols * kItem % 128 == 0 ? 128 : kCols * kItem % 64 == 0 ? 64 : 32;
    static constexpr int kSlabCols = kSwizzle / kItem;
    static constexpr int kSlabs = kCols / kSlabCols;
    static constexpr int kSlab = kRows * kSwizzle;
    static constexpr int kBytes = kSlabs * kSlab;
    static constexpr int kAlignment = 8 * kSwizzle;  // of `base`
    static_assert(kCols % kSlabCols == 0, "a tile is made of whole slabs");
    static_assert(kSlab % kAlignment == 0, "every slab is as aligned as the first");

    uint32 base;

    DEVICE_METHOD uint32 address(int row, int chunk) const {
        constexpr int kChunks = kSwizzle / 16;
        const uint32 place = row * kSwizzle + chunk % kChunks * 16;
        return base + chunk / kChunks * kSlab + (place ^ (place >> 7 & (kChunks - 1)) << 4);
    }

    // Whose byte lies at an address: swizzles leave what is a row's in its place.
    DEVICE_METHOD int row_at(uint32 place) const { return (place - base) % kSlab / kSwizzle; }

    // ---- What wgmma is told: PTX ISA, matrix descriptors ----

    // The operand whose rows, from `first_row` on, are rows (or columns) of the product; sums run along them.
    DEVICE_METHOD uint64 by_rows(int first_row) const { return descriptor(base + first_row * kSwizzle, 16); }
    // From there 32 bytes times `step` along the rows.
    DEVICE_METHOD static constexpr uint64 along(int step) {
        constexpr int kSteps = kSwizzle / 32;
        return (step / kSteps * kSlab + step % kSteps * 32) >> 4;
    }
    // The operand whose rows are summed over.
    DEVICE_METHOD uint64 by_columns() const { return descriptor(base, kSlab); }
    // From there 16 * step rows down.
    DEVICE_METHOD static constexpr uint64 down(int step) { return 16 * step * kSwizzle >> 4; }

   private:
    DEVICE_METHOD static uint64 descriptor(uint32 start, uint32 from_slab_to_slab) {
        constexpr uint64 kMode = kSwizzle == 128 ? 1 : kSwizzle == 64 ? 2 : 3;
        return kMode << 62 | static_cast<uint64>(kAlignment >> 4) << 32 |
               static_cast<uint64>(from_slab_to_slab >> 4) << 16 | (start & 0x3ffffu) >> 4;
    }
};

// Fills a tile from a map, slab by slab, with what lies at `row` of `head` and `batch`; see HopperParams.  In a cluster
// of kCluster blocks each brings its share of the rows, to all of them.
template <int kCluster, typename Tile>
DEVICE void load_tile(const Tile& tile, const TensorMap& map, uint32 barrier, int row, int head, int batch,
                      uint64 policy) {
    constexpr int kRows = Tile::kRows / kCluster;
    static_assert(kRows * kCluster == Tile::kRows && kRows * Tile::kSwizzle % Tile::kAlignment == 0,
                  "every share is as aligned as the tile");
    const int first = kCluster == 1 ? 0 : ptx::cluster_rank() * kRows;
#pragma unroll
    for (int slab = 0; slab < Tile::kSlabs; ++slab) {
        const uint32 to = tile.base + slab * Tile::kSlab + first * Tile::kSwizzle;
        const int column = slab * Tile::kSlabCols;
        if constexpr (kCluster == 1)
            ptx::load_box(to, map, barrier, column, 0, row, head, batch, policy);
        else
            ptx::load_box_for((1u << kCluster) - 1, to, map, barrier, column, 0, row + first, head, batch, policy);
    }
}

// kNumStages slots that a producer fills and consumers empty, again and again.  The n-th use is of slot
// n % kNumStages; a barrier's phases alternate, and `parity` names the one that ends with the n-th use.
//
// In a cluster of kCluster blocks each producer fills the slot of all of them: it is empty when it is so everywhere.
template <int kNumStages, int kCluster = 1>
struct Ring {
    static constexpr int kBytes = 2 * 8 * kNumStages;

    uint32 barriers;

    DEVICE_METHOD static int slot(int use) { return use % kNumStages; }
    DEVICE_METHOD static int parity(int use) { return use / kNumStages & 1; }
    DEVICE_METHOD uint32 full(int use) const { return barriers + 8 * slot(use); }
    DEVICE_METHOD uint32 empty(int use) const { return barriers + 8 * (kNumStages + slot(use)); }

    DEVICE_METHOD void init(int fillers, int emptiers) const {
        for (int use = 0; use < kNumStages; ++use) {
            ptx::mbarrier_init(full(use), fillers);
            ptx::mbarrier_init(empty(use), kCluster * emptiers);
        }
    }
    DEVICE_METHOD void wait_full(int use) const { ptx::mbarrier_wait(full(use), parity(use)); }
    // A slot that was never used is empty: its barrier's phase before the first counts as over.
    DEVICE_METHOD void wait_empty(int use) const { ptx::mbarrier_wait(empty(use), parity(use) ^ 1); }
    // One emptier is done with a slot: its threads of `index` below kCluster tell the blocks of these ranks.
    DEVICE_METHOD void leave(int use, int index) const {
        if (index >= kCluster) return;
        if constexpr (kCluster == 1)
            ptx::mbarrier_arrive(empty(use));
        else
            ptx::mbarrier_arrive_at(empty(use), index);
    }
};

}  // namespace cupyattn
