// What the warpgroups of hopper.cu have in common: traits, parameters, which rows and keys a tile has, shared memory.
#pragma once

#include "algorithm/descales.cuh"
#include "tiles/float8.cuh"
#include "algorithm/pages.cuh"
#include "algorithm/splits.cuh"
#include "algorithm/tiling.cuh"

namespace cupyattn {

// Which keys can be hidden from a row: beyond the ends of its sequence, right of its diagonal, on both sides of it.
enum Reach { kAllKeys, kRightEdge, kBothEdges };

constexpr int kMostSharedBytes = 232448;  // of a block

// What can be had in two ways, to be settled by measurements; the defaults are in hopper.py.
template <bool kPingPong_, bool kOverlap_, bool kPinned_, bool kRescaleFirst_, bool kLazy_, bool kWeightsInShared_,
          int kPolynomials_, bool kTwoLevel_>
struct HopperSwitches {
    static constexpr bool kPingPong = kPingPong_;  // warpgroups take turns at the tensor cores
    static constexpr bool kOverlap = kOverlap_;    // a block's softmax runs beside the product before it
    static constexpr bool kPinned = kPinned_;      // ... and the compiler is kept from undoing that, see ptx::pin
    static constexpr bool kRescaleFirst = kRescaleFirst_;  // sums shrink before the product that is queued, not after it
    static constexpr bool kLazy = kLazy_;                  // they shrink only where it matters, see OnlineSoftmax
    static constexpr bool kWeightsInShared = kWeightsInShared_;  // not in registers
    static constexpr int kPolynomials = kPolynomials_;  // of 32 exponentials of a thread, by arithmetic: see softmax90.cuh
    static constexpr bool kTwoLevel = kTwoLevel_;  // the tensor cores sum over a block of keys only, see float8.cuh
};

template <typename Element_, int kHeadDim_, int kHeadDimV_, int kBlockQ_, int kBlockK_, int kNumStages_, int kCluster_,
          int kReach_, bool kPaged_, bool kPacked_, bool kStoresBoxes_, int kEdits_, typename Switches_, bool kSplit_ = false>
struct HopperTraits {
    using Element = Element_;
    using Switches = Switches_;
    static constexpr bool kFloat8 = Same<Element, Float8>::value;
    using Out = typename Choice<kFloat8, BFloat16, Element>::Type;
    static constexpr int kHeadDim = kHeadDim_, kHeadDimV = kHeadDimV_;  // as padded in the tiles
    static constexpr int kBlockQ = kBlockQ_, kBlockK = kBlockK_, kNumStages = kNumStages_;
    static constexpr int kCluster = kCluster_;  // blocks whose rows see the same keys, which are loaded once for all
    static constexpr int kReach = kReach_;
    static constexpr bool kPaged = kPaged_;              // k and v are pages
    static constexpr bool kPacked = kPacked_;            // rows are (token, head of the group), the head fastest
    static constexpr bool kStoresBoxes = kStoresBoxes_;  // by TMA, which clips; else row by row
    static constexpr int kEdits = kEdits_;
    static constexpr bool kSplit = kSplit_;  // a tile's keys are shared out among several blocks, see merge.cu
    // Sequences may have their own numbers of tiles; whose a tile is is then searched for, by whole warps.
    static constexpr bool kSearches = !kStoresBoxes && !kSplit && kCluster == 1;

    static constexpr int kConsumers = kBlockQ / 64;  // warpgroups
    static constexpr int kThreads = 128 * (1 + kConsumers);
    // Columns of the output that are summed at once: sums of a block need registers beside those of all blocks.
    static constexpr int kParts = Switches::kTwoLevel && kHeadDimV > 128 ? 2 : 1, kPartCols = kHeadDimV / kParts;
    // Both sums leave no registers for an edge's bounds while a product is under way, if they have 128 columns.
    static constexpr bool kOverlapsAtEdges = !(Switches::kTwoLevel && kHeadDimV == 128);
    // Multiples of 8. All warpgroups share what the launch gave the block: 168 for each of 384 threads, 128 for each of
    // 512; the fetching one hands over what it does not need.
    static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 232;
    static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 40;

    using QueryTile = SwizzledTile<Element, kBlockQ, kHeadDim>;
    using KeyTile = SwizzledTile<Element, kBlockK, kHeadDim>;
    using FetchedTile = SwizzledTile<Element, kBlockK, kHeadDimV>;  // values as TMA brings them
    using TurnedTile = SwizzledTile<Element, kHeadDimV, kBlockK>;
    using ValueTile = typename Choice<kFloat8, TurnedTile, FetchedTile>::Type;  // as they are multiplied
    using WeightTile = SwizzledTile<Element, 64, kBlockK>;
    // Takes the queries' place at the end, with half of the columns at a time if they are twice as wide.
    static constexpr int kOutParts = sizeof(Out) / sizeof(Element);
    using OutTile = SwizzledTile<Out, kBlockQ, kHeadDimV / kOutParts>;

    static constexpr int kFetchedBytes = kFloat8 ? kNumStages * FetchedTile::kBytes : 0;
    static constexpr int kWeightBytes = Switches::kWeightsInShared ? kConsumers * WeightTile::kBytes : 0;
    // Where there is room, the next tile's queries come while this one's are multiplied, or its output is on its way.
    static constexpr int kBesideQueries = kNumStages * (KeyTile::kBytes + ValueTile::kBytes) + kFetchedBytes + kWeightBytes + 1024;
    static constexpr int kQueryStages = 2 * QueryTile::kBytes + kBesideQueries <= kMostSharedBytes ? 2 : 1;
    static constexpr int kKeys = kQueryStages * QueryTile::kBytes, kValues = kKeys + kNumStages * KeyTile::kBytes;
    static constexpr int kFetched = kValues + kNumStages * ValueTile::kBytes;
    static constexpr int kWeights = kFetched + kFetchedBytes;
    static constexpr int kFound = kWeights + kWeightBytes;          // 16 bytes for each stage
    static constexpr int kBarriers = kFound + 16 * kNumStages;
    static constexpr int kQueryBarriers = kBarriers + 4 * Ring<kNumStages>::kBytes;
    static constexpr int kSplitSize = kQueryBarriers + Ring<kQueryStages>::kBytes;  // blocks of a split, if kSplit
    static constexpr int kSharedBytes = kSplitSize + (kSplit ? 16 : 0);

    static_assert(kBlockQ == 128 || kBlockQ == 192, "two or three warpgroups of 64 rows");
    static_assert(kSharedBytes - kQueryStages * QueryTile::kBytes <= kBesideQueries, "there is the room that was counted on");
    static_assert(kBlockK % 16 == 0 && kBlockK <= 256, "the sizes of a wgmma");
    static_assert(kCluster == 1 || !kPaged, "a block brings its share in one piece");
    static_assert(kCluster == 1 || kReach == kAllKeys, "neighbouring tiles see the same blocks of keys");
    static_assert(kCluster == 1 || !kSplit, "neighbouring blocks have the same blocks of keys");
    static_assert(OutTile::kBytes <= QueryTile::kBytes && OutTile::kSwizzle == QueryTile::kSwizzle,
                  "a warpgroup's rows of the output lie where its own queries were");
    static_assert(!kFloat8 || (kBlockK % 32 == 0 && !Switches::kLazy && !Switches::kWeightsInShared),
                  "float8 weights use all the range there is, and lie as only registers let them");
    static_assert(!Switches::kTwoLevel || kFloat8, "products of 16-bit numbers sum in float32");
    static_assert(!Switches::kTwoLevel || !Switches::kRescaleFirst, "those sums shrink where a block's are added to them");
    static_assert(kParts == 1 || !Switches::kOverlap, "one product is queued behind the scores");
    static_assert(kKeys % KeyTile::kAlignment == 0 && kValues % ValueTile::kAlignment == 0 &&
                      (!kFloat8 || kFetched % FetchedTile::kAlignment == 0) &&
                      (!Switches::kWeightsInShared || kWeights % WeightTile::kAlignment == 0),
                  "swizzles go by addresses");
};

// ---- What to do -------------------------------------------------------------------------------------

struct HopperParams {
    // (column, head of a group, row, group or head, sequence or page); boxes are a tile's slab, rows_per_box of one for
    // pages, and 16 rows of it for `out`.
    TensorMap q, k, v, out;
    DescaledParams params;
    int num_tiles;          // row tiles of all units; as many for each split
    int tiles_per_unit;     // of the longest sequence; whole clusters of them; 0: each unit has its own number
    int tiles_per_head;     // of all sequences
    int tokens_per_tile;    // whole ones
    int heads_per_unit;     // a unit is what a tile's rows are of: a head of a sequence, or a group of them if packed
    int rows_per_box;       // of pages: a multiple of 8
    int whole_sections;     // of a sequence if its units have their own number of tiles, or else of all
    int rising;             // of every second section, 0 or 1, the first rows come first; -1: of none
    Divisor tiles_of_section;  // if tiles_per_unit
    Divisor units_of_section;  // units whose keys are used side by side, so that they stay in the second-level cache
    Divisor units_of_last;     // of the section behind the whole ones
    Divisor units_per_sequence;
};

// The rows of a tile and the blocks of keys they see.  Producer and consumers go by this, and by nothing else.
struct RowTile {
    Sequence sequence;
    int head;         // the first one
    int first_token;  // within the sequence
    Span blocks;      // those that some row sees
    Span whole;       // those that every row sees wholly
    int tiles;        // of its unit
    int split, num_splits;  // if kSplit: which of its splits this is, out of how many
};

// Tiles come in sections; within one the last rows come first, which see the most keys under a causal mask.  Where a
// block takes one tile after the other that is so of every second section, the last one among them: then neighbouring
// tiles have about as much to do everywhere, and rounds forth and back (tiling.cuh) give blocks equal shares. Sections of
// one unit, as clusters have them, make neighbours of neighbouring tiles.  Where sequences have tiles of their own number,
// which are never stored as boxes, each has its own sections.  `known` is the tile's sequence, if it was found before.
//
// First come all tiles with their first splits, then all with their second ones, and so on: where lengths are data some
// tiles have fewer splits than there are, and what is empty comes last.  All sequences then have the same number of tiles.
template <typename Traits>
DEVICE RowTile row_tile(int index, const HopperParams& given, int known = -1) {
    const Params& params = given.params;
    int split = 0;
    if constexpr (Traits::kSplit) {
        const int num_tiles = given.num_tiles / params.num_splits;
        split = index / num_tiles;
        index -= split * num_tiles;
    }
    Stretch its{0, 0, given.tiles_per_unit};
    if (Traits::kSearches && !given.tiles_per_unit) {
        const Tiling tiling{params.at.cu_seqlens_q, static_cast<int>(params.total_q), sequences_of_rows(params),
                            given.tiles_per_head, 0, given.tokens_per_tile};
        its = tiling.stretch_of(known < 0 ? tiling.sequence_with(given.units_per_sequence.quotient(index)) : known);
        index -= its.first * given.units_per_sequence.value;
    }
    const int per_section = its.count * given.units_of_section.value;
    const bool even = !Traits::kSearches || given.tiles_per_unit;
    const int section = even ? given.tiles_of_section.quotient(index) : index / per_section;
    const Divisor size = section < given.whole_sections ? given.units_of_section : given.units_of_last;
    const int rest = index - section * per_section, row = size.quotient(rest);
    const int unit = section * given.units_of_section.value + rest - row * size.value;
    const bool rises = Traits::kReach != kAllKeys && section % 2 == given.rising;
    const int place = rises ? row : its.count - 1 - row, sequence = given.units_per_sequence.quotient(unit);

    RowTile tile{sequence_at(its.sequence + sequence, params),
                 (unit - sequence * given.units_per_sequence.value) * given.heads_per_unit, place * given.tokens_per_tile,
                 {0, 0}, {0, 0}, its.count, split, 1};
    const Band& band = tile.sequence.band;
    const int last = smaller(tile.first_token + given.tokens_per_tile, band.seqlen_q) - 1;
    if (last < tile.first_token) return tile;
    constexpr int kBlockK = Traits::kBlockK;
    const Span touched = band.touched(tile.first_token, last), whole = band.whole(tile.first_token, last);
    // Without a branch, so that they stay in uniform registers.
    tile.blocks = touched.empty() ? Span{0, 0} : Span{touched.start / kBlockK, ceil_div(touched.stop, kBlockK)};
    tile.whole = {ceil_div(whole.start, kBlockK), whole.stop / kBlockK};
    if constexpr (Traits::kSplit) {
        if (touched.empty()) return tile;
        const Split its = split_at(tile.blocks, split, ptx::load_shared(ptx::shared_memory() + Traits::kSplitSize), params);
        tile.blocks = its.part, tile.num_splits = its.count;
    }
    return tile;
}

// What this thread block takes in a round, of as many tiles as there are blocks.
template <typename Traits>
DEVICE uint32 tile_of_round(uint32 round) {
    return tile_of_round<Traits::kReach != kAllKeys>(round, ptx::block_x(), ptx::grid_x());
}

// Has row_tile know how many blocks a split has; all threads have to meet before anybody asks.
template <typename Traits>
DEVICE void keep_split_size(const HopperParams& given) {
    const Params& params = given.params;
    int size = params.split_size / Traits::kBlockK;
    if (size == 0) {
        size = live_size<Traits>(
            params, params.num_heads / given.heads_per_unit,
            [&](int seqlen_q) { return ceil_div(seqlen_q, given.tokens_per_tile); }, kFewestKeysOfTiles);
        ptx::fence_async_proxy();  // before TMA puts queries where sums were
    }
    if (ptx::thread() == 0) ptx::store_shared(ptx::shared_memory() + Traits::kSplitSize, static_cast<uint32>(size));
}

// Shared memory, and the barriers in it.
template <typename Traits>
struct HopperMemory {
    using Stages = Ring<Traits::kNumStages>;
    using SharedStages = Ring<Traits::kNumStages, Traits::kCluster>;  // those that TMA fills
    using ValueStages = typename Choice<Traits::kFloat8, Stages, SharedStages>::Type;
    uint32 base;

    DEVICE_METHOD typename Traits::QueryTile queries(int tile_use) const {
        return {base + Ring<Traits::kQueryStages>::slot(tile_use) * Traits::QueryTile::kBytes};
    }
    DEVICE_METHOD typename Traits::OutTile out(int tile_use) const { return {queries(tile_use).base}; }
    DEVICE_METHOD typename Traits::KeyTile keys(int use) const {
        return {base + Traits::kKeys + Stages::slot(use) * Traits::KeyTile::kBytes};
    }
    DEVICE_METHOD typename Traits::ValueTile values(int use) const {
        return {base + Traits::kValues + Stages::slot(use) * Traits::ValueTile::kBytes};
    }
    DEVICE_METHOD typename Traits::FetchedTile fetched(int use) const {
        constexpr int kThere = Traits::kFloat8 ? Traits::kFetched : Traits::kValues;
        return {base + kThere + Stages::slot(use) * Traits::FetchedTile::kBytes};
    }
    DEVICE_METHOD typename Traits::WeightTile weights(int consumer) const {
        return {base + Traits::kWeights + consumer * Traits::WeightTile::kBytes};
    }
    // Four words: whether each of the inspecting warps found values that are not finite, and 0.
    DEVICE_METHOD uint32 found(int use) const { return base + Traits::kFound + 16 * Stages::slot(use); }

    DEVICE_METHOD Ring<Traits::kQueryStages> query_ring() const { return {base + Traits::kQueryBarriers}; }
    DEVICE_METHOD SharedStages key_ring() const { return {base + Traits::kBarriers}; }
    DEVICE_METHOD ValueStages value_ring() const { return {base + Traits::kBarriers + Stages::kBytes}; }
    // Of what was found in values that had to be inspected.
    DEVICE_METHOD Stages inspected_ring() const { return {base + Traits::kBarriers + 2 * Stages::kBytes}; }

    // Of values as TMA brings them.
    DEVICE_METHOD SharedStages fetched_ring() const {
        return {base + Traits::kBarriers + (Traits::kFloat8 ? 3 : 1) * Stages::kBytes};
    }

    DEVICE_METHOD void init() const {
        query_ring().init(1, 4 * Traits::kConsumers);
        key_ring().init(1, Traits::kConsumers);
        // Inspectors look at all values before they go, for a wait that misses a phase may never end.
        value_ring().init(Traits::kFloat8 ? kInspectors : 1, Traits::kConsumers + (Traits::kFloat8 ? 0 : kInspectors));
        if constexpr (Traits::kFloat8) fetched_ring().init(1, kInspectors);
        inspected_ring().init(kInspectors, 4 * Traits::kConsumers);
        ptx::fence_mbarrier_init();
        for (int use = 0; use < Traits::kNumStages; ++use) ptx::store_shared(found(use) + 4 * kInspectors, 0u);
    }
    static constexpr int kInspectors = 3;  // warps
};

}  // namespace cupyattn
