// hopper.cu: flash.cu's algorithm for Hopper's own units, TMA and wgmma.
//
// A thread block owns kBlockQ rows: of one head, or of the tokens of a whole group of heads that share their keys
// (packed).  Its first warpgroup fetches: one thread has TMA fill rings of key and value tiles.  Each other
// warpgroup has 64 of the rows, and walks the key blocks right to left:
//
//     scores = queries @ keys[block]^T              wgmma, under way while ...
//     out += weights @ values[block + 1]            ... this is queued behind it
//     weights = softmax of scores                   while the second product runs (kOverlap), and while other
//                                                   warpgroups have theirs (kPingPong: they take turns)
//
// A key that a row does not see never reaches its result, even if its value is nan: blocks that some rows see only
// in part pass by the other warps of the first warpgroup, who make what is not finite 0 before anybody multiplies
// it.  Rows that do see such a value get it at the end (`mend`).
//
// Twin     numpy_ref.flash, in float64 with the same names.
// Source   Shah et al., FlashAttention-3, 2024 (arXiv 2407.08608): warp specialisation, overlap, ping-pong.
// Needs    sm_90a.
// Launch   any number of blocks: block i takes row tiles i, i + blocks, and so on, the longest first; kThreads
//          threads; kSharedBytes.

#include "softmax90.cuh"
#include "tile90.cuh"

namespace cupyattn {

// Which keys can be hidden from a row: beyond the ends of its sequence, right of its diagonal, on both sides of it.
enum Reach { kAllKeys, kRightEdge, kBothEdges };

// What can be had in two ways, to be settled by measurements; the defaults are in plan.py.
template <bool kPingPong_, bool kOverlap_, bool kPinned_, bool kRescaleFirst_, bool kLazy_, bool kWeightsInShared_,
          int kPolynomials_>
struct HopperSwitches {
    static constexpr bool kPingPong = kPingPong_;  // warpgroups take turns at the tensor cores
    static constexpr bool kOverlap = kOverlap_;    // a block's softmax runs beside the product before it
    static constexpr bool kPinned = kPinned_;      // ... and the compiler is kept from undoing that, see ptx::pin
    static constexpr bool kRescaleFirst = kRescaleFirst_;  // sums shrink before the product that is queued, not after it
    static constexpr bool kLazy = kLazy_;                  // they shrink only where it matters, see OnlineSoftmax
    static constexpr bool kWeightsInShared = kWeightsInShared_;  // not in registers
    static constexpr int kPolynomials = kPolynomials_;  // of 32 exponentials of a thread, by arithmetic: see softmax90.cuh
};

template <typename Element_, int kHeadDim_, int kHeadDimV_, int kBlockQ_, int kBlockK_, int kNumStages_, int kReach_,
          bool kPacked_, bool kStoresBoxes_, int kEdits_, typename Switches_>
struct HopperTraits {
    using Element = Element_;
    using Switches = Switches_;
    static constexpr int kHeadDim = kHeadDim_, kHeadDimV = kHeadDimV_;  // as padded in the tiles
    static constexpr int kBlockQ = kBlockQ_, kBlockK = kBlockK_, kNumStages = kNumStages_;
    static constexpr int kReach = kReach_;
    static constexpr bool kPacked = kPacked_;            // rows are (token, head of the group), the head fastest
    static constexpr bool kStoresBoxes = kStoresBoxes_;  // by TMA, which clips; else row by row
    static constexpr int kEdits = kEdits_;

    static constexpr int kConsumers = kBlockQ / 64;  // warpgroups
    static constexpr int kThreads = 128 * (1 + kConsumers);
    // Multiples of 8 that add up to no more than 512 over all warpgroups; the fetching one needs few.
    static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 240;
    static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 24;

    using QueryTile = SwizzledTile<Element, kBlockQ, kHeadDim>;
    using KeyTile = SwizzledTile<Element, kBlockK, kHeadDim>;
    using ValueTile = SwizzledTile<Element, kBlockK, kHeadDimV>;
    using WeightTile = SwizzledTile<Element, 64, kBlockK>;
    using OutTile = SwizzledTile<Element, kBlockQ, kHeadDimV>;  // takes the queries' place at the end

    static constexpr int kQueryBytes = QueryTile::kBytes;
    static constexpr int kWeightBytes = Switches::kWeightsInShared ? kConsumers * WeightTile::kBytes : 0;
    static constexpr int kKeys = kQueryBytes, kValues = kKeys + kNumStages * KeyTile::kBytes;
    static constexpr int kWeights = kValues + kNumStages * ValueTile::kBytes;
    static constexpr int kFound = kWeights + kWeightBytes;          // 16 bytes for each stage
    static constexpr int kBarriers = kFound + 16 * kNumStages;
    static constexpr int kSharedBytes = kBarriers + 4 * Ring<kNumStages>::kBytes;

    static_assert(kBlockQ == 128 || kBlockQ == 192, "two or three warpgroups of 64 rows");
    static_assert(kBlockK % 16 == 0 && kBlockK <= 256, "the sizes of a wgmma");
    static_assert(kHeadDimV <= kHeadDim && OutTile::kSwizzle == QueryTile::kSwizzle,
                  "a warpgroup's rows of the output lie where its own queries were");
};

// ---- What to do -------------------------------------------------------------------------------------

struct HopperParams {
    // (column, head of a group, row, group or head, sequence); boxes are a tile's slab, or 16 rows of it for `out`.
    TensorMap q, k, v, out;
    Params params;
    int num_tiles;          // row tiles of all units
    int tiles_per_unit;     // of the longest sequence
    int tokens_per_tile;    // whole ones
    int heads_per_unit;     // a unit is what a tile's rows are of: a head of a sequence, or a group of them if packed
    int units_per_section;  // units whose keys are used side by side, so that they stay in the second-level cache
};

// The rows of a tile and the blocks of keys they see.  Producer and consumers go by this, and by nothing else.
struct RowTile {
    Sequence sequence;
    int head;         // the first one
    int first_token;  // within the sequence
    Span blocks;      // those that some row sees
    Span whole;       // those that every row sees wholly
};

// Tiles come in sections; within one the last rows come first, which see the most keys under a causal mask.
template <typename Traits>
DEVICE RowTile row_tile(int index, const HopperParams& given) {
    const Params& params = given.params;
    const int units = given.num_tiles / given.tiles_per_unit, per_section = given.tiles_per_unit * given.units_per_section;
    const int section = index / per_section, first = section * given.units_per_section;
    const int size = smaller(given.units_per_section, units - first), rest = index - section * per_section;
    const int unit = first + rest % size, place = given.tiles_per_unit - 1 - rest / size;
    const int units_per_sequence = params.num_heads / given.heads_per_unit;

    RowTile tile{sequence_at(unit / units_per_sequence, params), unit % units_per_sequence * given.heads_per_unit,
                 place * given.tokens_per_tile, {0, 0}, {0, 0}};
    const Band& band = tile.sequence.band;
    const int last = smaller(tile.first_token + given.tokens_per_tile, band.seqlen_q) - 1;
    if (last < tile.first_token) return tile;
    constexpr int kBlockK = Traits::kBlockK;
    const Span touched = band.touched(tile.first_token, last), whole = band.whole(tile.first_token, last);
    if (touched.empty()) return tile;
    tile.blocks = {touched.start / kBlockK, ceil_div(touched.stop, kBlockK)};
    tile.whole = {ceil_div(whole.start, kBlockK), whole.stop / kBlockK};
    return tile;
}

// Shared memory, and the barriers in it.
template <typename Traits>
struct HopperMemory {
    using Stages = Ring<Traits::kNumStages>;
    uint32 base;

    DEVICE_METHOD typename Traits::QueryTile queries() const { return {base}; }
    DEVICE_METHOD typename Traits::OutTile out() const { return {base}; }
    DEVICE_METHOD typename Traits::KeyTile keys(int use) const {
        return {base + Traits::kKeys + Stages::slot(use) * Traits::KeyTile::kBytes};
    }
    DEVICE_METHOD typename Traits::ValueTile values(int use) const {
        return {base + Traits::kValues + Stages::slot(use) * Traits::ValueTile::kBytes};
    }
    DEVICE_METHOD typename Traits::WeightTile weights(int consumer) const {
        return {base + Traits::kWeights + consumer * Traits::WeightTile::kBytes};
    }
    // Four words: whether each of the inspecting warps found values that are not finite, and 0.
    DEVICE_METHOD uint32 found(int use) const { return base + Traits::kFound + 16 * Stages::slot(use); }

    DEVICE_METHOD Ring<1> query_ring() const { return {base + Traits::kBarriers}; }
    DEVICE_METHOD Stages key_ring() const { return {base + Traits::kBarriers + Stages::kBytes}; }
    DEVICE_METHOD Stages value_ring() const { return {base + Traits::kBarriers + 2 * Stages::kBytes}; }
    // Of what was found in values that had to be inspected.
    DEVICE_METHOD Stages inspected_ring() const { return {base + Traits::kBarriers + 3 * Stages::kBytes}; }

    DEVICE_METHOD void init() const {
        query_ring().init(1, 4 * Traits::kConsumers);
        key_ring().init(1, Traits::kConsumers);
        value_ring().init(1, Traits::kConsumers);
        inspected_ring().init(kInspectors, 4 * Traits::kConsumers);
        ptx::fence_mbarrier_init();
        for (int use = 0; use < Traits::kNumStages; ++use) ptx::store_shared(found(use) + 4 * kInspectors, 0u);
    }
    static constexpr int kInspectors = 3;  // warps
};

// ---- The first warpgroup ----------------------------------------------------------------------------

// One thread: has every tile loaded as soon as there is room for it.
template <typename Traits>
DEVICE void fetch(const HopperParams& given, const HopperMemory<Traits>& memory) {
    const Params& params = given.params;
    const auto key_ring = memory.key_ring(), value_ring = memory.value_ring();
    const auto query_ring = memory.query_ring();
    const int query_bytes = given.tokens_per_tile * given.heads_per_unit * Traits::kHeadDim * sizeof(typename Traits::Element);
    int use = 0, tile_use = 0;
#pragma unroll 1
    for (int index = ptx::block_x(); index < given.num_tiles; index += ptx::grid_x()) {
        const RowTile tile = row_tile<Traits>(index, given);
        if (tile.blocks.empty()) continue;
        const int batch = params.at.cu_seqlens_q ? 0 : tile.sequence.index;
        const int key_head = tile.head / params.queries_per_k, value_head = tile.head / params.queries_per_v;
        const auto load_keys = [&](int block, int its_use) {
            key_ring.wait_empty(its_use);
            ptx::mbarrier_arrive_expect(key_ring.full(its_use), Traits::KeyTile::kBytes);
            load_tile(memory.keys(its_use), given.k, key_ring.full(its_use),
                      static_cast<int>(tile.sequence.first_key) + block * Traits::kBlockK, key_head, batch, ptx::kKeepInL2);
        };
        load_keys(tile.blocks.stop - 1, use);
        query_ring.wait_empty(tile_use);
        ptx::mbarrier_arrive_expect(query_ring.full(tile_use), query_bytes);
        load_tile(memory.queries(), given.q, query_ring.full(tile_use),
                  static_cast<int>(tile.sequence.first_row) + tile.first_token, tile.head / given.heads_per_unit, batch,
                  ptx::kDropFromL2);
        ++tile_use;
#pragma unroll 1
        for (int block = tile.blocks.stop - 1; block >= tile.blocks.start; --block, ++use) {
            if (block > tile.blocks.start) load_keys(block - 1, use + 1);
            value_ring.wait_empty(use);
            ptx::mbarrier_arrive_expect(value_ring.full(use), Traits::ValueTile::kBytes);
            load_tile(memory.values(use), given.v, value_ring.full(use),
                      static_cast<int>(tile.sequence.first_key) + block * Traits::kBlockK, value_head, batch,
                      ptx::kKeepInL2);
        }
    }
}

// Three warps: make values 0 that are not finite, in the blocks that some rows see only in part.
template <typename Traits>
DEVICE void inspect(const HopperParams& given, const HopperMemory<Traits>& memory) {
    using Element = typename Traits::Element;
    constexpr int kInspectors = HopperMemory<Traits>::kInspectors, kStep = 16 * 32 * kInspectors;
    const auto value_ring = memory.value_ring(), inspected_ring = memory.inspected_ring();
    const int inspector = ptx::warp() - 1;
    int use = 0, inspected = 0;
#pragma unroll 1
    for (int index = ptx::block_x(); index < given.num_tiles; index += ptx::grid_x()) {
        const RowTile tile = row_tile<Traits>(index, given);
#pragma unroll 1
        for (int block = tile.blocks.stop - 1; block >= tile.blocks.start; --block, ++use) {
            value_ring.wait_full(use);  // those of whole blocks, too: a wait can only tell neighbouring phases apart
            if (tile.whole.has(block)) continue;
            const uint32 start = memory.values(use).base, stop = start + Traits::ValueTile::kBytes;
            const uint32 mine = start + 16 * (ptx::thread() - 32);
            uint32 probe = 0;
#pragma unroll 2
            for (uint32 at = mine; at < stop; at += kStep) {
                uint32 eight[4];
                ptx::load_shared(eight, at);
#pragma unroll
                for (int i = 0; i < 4; ++i) probe = ptx::probe_finite<Element>(eight[i], probe);
            }
            const bool found = ptx::any(probe & 0x7fff7fffu);
            if (found) {
#pragma unroll 1
                for (uint32 at = mine; at < stop; at += kStep) {
#pragma unroll 1
                    for (uint32 word = at; word < at + 16; word += 4)
                        ptx::store_shared(word, without_strays<Element>(ptx::load_shared(word), false));
                }
                ptx::fence_async_proxy();
            }
            inspected_ring.wait_empty(inspected);
            if (ptx::lane() == 0) ptx::store_shared(memory.found(inspected) + 4 * inspector, uint32(found));
            ptx::warp_barrier();
            if (ptx::lane() == 0) ptx::mbarrier_arrive(inspected_ring.full(inspected));
            ++inspected;
        }
    }
}

// ---- The other warpgroups ---------------------------------------------------------------------------

constexpr int kTurnBarrier = 1;  // named barriers from here on: whose turn it is

template <typename Traits>
struct HopperRows {
    using Element = typename Traits::Element;
    using Switches = typename Traits::Switches;
    static constexpr int kBlockK = Traits::kBlockK;

    const HopperParams& given;
    const Params& params;
    const HopperMemory<Traits> memory;
    const int consumer;  // among the consuming warpgroups
    RowTile tile;
    int use, tile_use, inspected;  // how often the rings were used
    Accumulator<Traits::kHeadDimV> out;
    OnlineSoftmax softmax;
    float shrink[2];
    Fragment<Element, Switches::kWeightsInShared ? 16 : kBlockK> weights;
    uint32 strays;  // not 0: some values were made 0 that may be seen

    DEVICE_METHOD HopperRows(const HopperParams& given_, const HopperMemory<Traits>& memory_, int consumer_)
        : given(given_), params(given_.params), memory(memory_), consumer(consumer_), use(0), tile_use(0), inspected(0) {}

    DEVICE_METHOD void run() {
        if (Switches::kPingPong && consumer == 0) ptx::named_barrier_arrive(kTurnBarrier, 256);  // it may begin
#pragma unroll 1
        for (int index = ptx::block_x(); index < given.num_tiles; index += ptx::grid_x()) {
            tile = row_tile<Traits>(index, given);
            if (tile.blocks.empty()) {
                store_nothing();
                continue;
            }
            attend();
            tile = row_tile<Traits>(index, given);  // again, so that not all of it is kept through the walk
            store();
            ++tile_use;
        }
    }

    // This lane's two rows: 16 rows of a warp, 64 of a warpgroup.
    DEVICE_METHOD int row(int half) const { return 64 * consumer + 16 * (ptx::warp() % 4) + Accumulator<16>::row(half); }
    DEVICE_METHOD int num_rows() const { return given.tokens_per_tile * given.heads_per_unit; }
    DEVICE_METHOD int token_of(int row) const {
        return tile.first_token + (Traits::kPacked ? row / given.heads_per_unit : row);
    }
    DEVICE_METHOD int head_of(int row) const { return tile.head + (Traits::kPacked ? row % given.heads_per_unit : 0); }
    DEVICE_METHOD bool exists(int row) const { return row < num_rows() && token_of(row) < tile.sequence.band.seqlen_q; }
    DEVICE_METHOD RowPair rows() const {
        return {{token_of(row(0)), token_of(row(1))}, {head_of(row(0)), head_of(row(1))}, {exists(row(0)), exists(row(1))}};
    }

    // ---- The walk ----

    DEVICE_METHOD void attend() {
        out.clear();
        softmax.clear();
        strays = 0;
        memory.query_ring().wait_full(tile_use);
        int block = tile.blocks.stop - 1;
        if constexpr (Switches::kOverlap) {
            begin(block--);
            walk(block, [&](int its_block, auto edge) { step<decltype(edge)::kValue>(its_block); });
            if constexpr (Switches::kRescaleFirst) rescale();
            wait_for_values(tile.blocks.start);
            begin_product();
            multiply_weights_by_values();
            ptx::wgmma_wait<0>();
            end_product();
        } else {
            walk(block, [&](int its_block, auto edge) { step_by_step<decltype(edge)::kValue>(its_block); });
        }
    }

    template <bool kValue_>
    struct Edge {
        static constexpr bool kValue = kValue_;
    };
    // The blocks from `block` down, in one loop for those at an edge and one for the others, for they differ in code.
    template <typename Step>
    DEVICE_METHOD void walk(int block, const Step& step_at) {
        // Where keys are only hidden by the end of the sequence, that is in the first block.
        if constexpr (Traits::kReach != kAllKeys || !Switches::kOverlap) {
#pragma unroll 1
            for (; block >= tile.blocks.start && block >= tile.whole.stop; --block) step_at(block, Edge<true>());
        }
        const int stop = Traits::kReach == kBothEdges ? larger(tile.blocks.start, tile.whole.start) : tile.blocks.start;
#pragma unroll 1
        for (; block >= stop; --block) step_at(block, Edge<false>());
        if constexpr (Traits::kReach == kBothEdges) {
#pragma unroll 1
            for (; block >= tile.blocks.start; --block) step_at(block, Edge<true>());
        }
    }

    // The first block's weights.
    DEVICE_METHOD void begin(int block) {
        Accumulator<kBlockK> scores;
        memory.key_ring().wait_full(use);
        ptx::hold(scores.value);
        multiply_queries_by_keys(scores, use);
        ptx::wgmma_wait<0>();
        ptx::hold(scores.value);
        release(memory.key_ring().empty(use));
        absorb<true>(scores, block);
        keep_weights(scores);
    }

    // A block's scores and weights, and the values of the block before it.
    template <bool kEdge>
    DEVICE_METHOD void step(int block) {
        Accumulator<kBlockK> scores;
        memory.key_ring().wait_full(use + 1);
        take_turn();
        ptx::hold(scores.value);
        multiply_queries_by_keys(scores, use + 1);
        if constexpr (Switches::kRescaleFirst) rescale();
        wait_for_values(block + 1);
        begin_product();
        multiply_weights_by_values();
        pass_turn();
        ptx::wgmma_wait<1>();
        ptx::hold(scores.value);
        release(memory.key_ring().empty(use + 1));
        absorb<kEdge>(scores, block);
        // Without this the compiler would wait for the product first, and overlap nothing.
        if constexpr (Switches::kPinned) ptx::pin(softmax.row_sum[0] + softmax.row_sum[1], memory.base);
        ptx::wgmma_wait<0>();
        end_product();
        keep_weights(scores);
        if constexpr (!Switches::kRescaleFirst) rescale();
    }

    // A block from its scores to its values, one thing after the other.
    template <bool kEdge>
    DEVICE_METHOD void step_by_step(int block) {
        Accumulator<kBlockK> scores;
        memory.key_ring().wait_full(use);
        take_turn();
        ptx::hold(scores.value);
        multiply_queries_by_keys(scores, use);
        pass_turn();
        ptx::wgmma_wait<0>();
        ptx::hold(scores.value);
        release(memory.key_ring().empty(use));
        absorb<kEdge>(scores, block);
        keep_weights(scores);
        rescale();
        wait_for_values(block);
        begin_product();
        multiply_weights_by_values();
        ptx::wgmma_wait<0>();
        end_product();
    }

    DEVICE_METHOD void take_turn() const {
        if constexpr (Switches::kPingPong) ptx::named_barrier(kTurnBarrier + consumer, 256);
    }
    DEVICE_METHOD void pass_turn() const {
        if constexpr (Switches::kPingPong)
            ptx::named_barrier_arrive(kTurnBarrier + (consumer + 1) % Traits::kConsumers, 256);
    }
    // One thread tells that this warpgroup has read a slot.
    DEVICE_METHOD static void release(uint32 barrier) {
        if (ptx::thread() % 128 == 0) ptx::mbarrier_arrive(barrier);
    }

    DEVICE_METHOD void wait_for_values(int block) {
        memory.value_ring().wait_full(use);
        if (!tile.whole.has(block)) {
            memory.inspected_ring().wait_full(inspected);
            uint32 found[4];
            ptx::load_shared(found, memory.found(inspected));
            strays |= found[0] | found[1] | found[2];
            ptx::warp_barrier();
            if (ptx::lane() == 0) ptx::mbarrier_arrive(memory.inspected_ring().empty(inspected));
            ++inspected;
        }
    }

    DEVICE_METHOD void multiply_queries_by_keys(Accumulator<kBlockK>& scores, int its_use) const {
        using QueryTile = typename Traits::QueryTile;
        using KeyTile = typename Traits::KeyTile;
        const uint64 left = memory.queries().by_rows(64 * consumer), right = memory.keys(its_use).by_rows(0);
        ptx::wgmma_fence();
#pragma unroll
        for (int step = 0; step < Traits::kHeadDim * QueryTile::kItem / 32; ++step)
            ptx::wgmma<Element, false>(scores.value, left + QueryTile::along(step), right + KeyTile::along(step), step);
        ptx::wgmma_commit();
    }

    DEVICE_METHOD void multiply_weights_by_values() {
        using ValueTile = typename Traits::ValueTile;
        const uint64 right = memory.values(use).by_columns();
        ptx::wgmma_fence();
#pragma unroll
        for (int step = 0; step < kBlockK / 16; ++step)
            if constexpr (Switches::kWeightsInShared) {
                using WeightTile = typename Traits::WeightTile;
                const uint64 left = memory.weights(consumer).by_rows(0);
                ptx::wgmma<Element, true>(out.value, left + WeightTile::along(step), right + ValueTile::down(step), true);
            } else {
                ptx::wgmma<Element, true>(out.value, weights.value[step][0], right + ValueTile::down(step), true);
            }
        ptx::wgmma_commit();
    }
    // Around that product: what it reads and adds to stays where it is.
    DEVICE_METHOD void begin_product() {
        ptx::hold(out.value);
        hold_weights();
    }
    DEVICE_METHOD void end_product() {
        ptx::hold(out.value);
        hold_weights();
        release(memory.value_ring().empty(use));
        ++use;
    }
    DEVICE_METHOD void hold_weights() {
        if constexpr (!Switches::kWeightsInShared)
#pragma unroll
            for (int step = 0; step < kBlockK / 16; ++step) ptx::hold(weights.value[step]);
    }

    // Scores into weights.
    template <bool kEdge>
    DEVICE_METHOD void absorb(Accumulator<kBlockK>& scores, int block) {
        if constexpr (kEdge || Traits::kEdits)
            edit<Traits::kEdits, kEdge>(scores, rows(), block * kBlockK, tile.sequence, params);
        softmax.template fold<Switches::kLazy, Exponential<Switches::kPolynomials>>(
            scores, scale_log2_of<Traits::kEdits>(params), shrink);
    }
    DEVICE_METHOD void rescale() {
        if (Switches::kLazy && ptx::all(shrink[0] == 1.f && shrink[1] == 1.f)) return;
        out.scale_rows(shrink);
    }

    DEVICE_METHOD void keep_weights(const Accumulator<kBlockK>& scores) {
        if constexpr (Switches::kWeightsInShared) {
            const typename Traits::WeightTile tile_of_weights = memory.weights(consumer);
#pragma unroll
            for (int step = 0; step < kBlockK / 16; ++step) {
                Accumulator<16> sixteen;
#pragma unroll
                for (int i = 0; i < 8; ++i) sixteen.value[i / 4][i % 4] = scores.value[2 * step + i / 4][i % 4];
                weights.round_from(sixteen);
                const uint32(&x)[4] = weights.value[0][0];
                ptx::store_matrices(
                    tile_of_weights.address(16 * (ptx::warp() % 4) + ptx::lane() % 16, 2 * step + ptx::lane() / 16),
                    x[0], x[1], x[2], x[3]);
            }
            ptx::fence_async_proxy();
            ptx::warp_barrier();  // wgmma has each warp read its own 16 rows
        } else {
            weights.round_from(scores);
        }
    }

    // ---- The end ----

    DEVICE_METHOD void store() {
        softmax.finish(scale_log2_of<Traits::kEdits>(params));
        float factor[2];
        bool suspicious = strays;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int head = head_of(row(half)), token = token_of(row(half));
            const Finish end = finish_row(softmax.row_max[half], softmax.row_sum[half], sink_of(head));
            factor[half] = end.factor;
            if (params.at.lse && ptx::lane() % 4 == 0 && exists(row(half))) store_lse(head, token, end.lse);
        }
        out.scale_rows(factor);
        suspicious |= out.times_zero() != 0.f;

        // By way of the queries' place, of which a warp reads and writes its own 16 rows.
        const auto staged = memory.out();
        const int first = 64 * consumer + 16 * (ptx::warp() % 4);
#pragma unroll
        for (int step = 0; step < Traits::kHeadDimV / 16; ++step) {
            const float(&left)[4] = out.value[2 * step], (&right)[4] = out.value[2 * step + 1];
            ptx::store_matrices(staged.address(first + ptx::lane() % 16, 2 * step + ptx::lane() / 16),
                                ptx::pack<Element>(left[0], left[1]), ptx::pack<Element>(left[2], left[3]),
                                ptx::pack<Element>(right[0], right[1]), ptx::pack<Element>(right[2], right[3]));
        }
        if (ptx::any(suspicious)) mend(staged, first);
        if constexpr (Traits::kStoresBoxes) {
            ptx::fence_async_proxy();
            ptx::warp_barrier();
            if (ptx::lane() == 0) {
                const int batch = tile.sequence.index;
#pragma unroll
                for (int slab = 0; slab < Traits::OutTile::kSlabs; ++slab)
                    ptx::store_box(given.out, staged.address(first, 0) + slab * Traits::OutTile::kSlab,
                                   slab * Traits::OutTile::kSlabCols, 0, token_of(first), tile.head / given.heads_per_unit,
                                   batch);
                ptx::commit_stores();
                ptx::wait_stores_read<0>();
            }
        } else {
            ptx::warp_barrier();
            constexpr int kChunks = Traits::kHeadDimV / 8;
#pragma unroll 1
            for (int i = ptx::lane(); i < 16 * kChunks; i += 32) {
                const int its_row = first + i / kChunks, chunk = i % kChunks;
                if (exists(its_row) && 8 * chunk < params.head_dim_v) {
                    uint32 eight[4];
                    ptx::load_shared(eight, staged.address(its_row, chunk));
                    ptx::store_global(static_cast<void*>(out_row(head_of(its_row), token_of(its_row)) + 8 * chunk), eight);
                }
            }
            ptx::fence_async_proxy();  // before TMA puts the next queries here
            ptx::warp_barrier();
        }
        if (ptx::lane() == 0) ptx::mbarrier_arrive(memory.query_ring().empty(tile_use));
    }

    DEVICE_METHOD float sink_of(int head) const {
        return params.at.sinks ? ptx::load_global(params.at.sinks + head) * kLog2e : -ptx::infinity();
    }
    DEVICE_METHOD Element* out_row(int head, int token) const {
        return static_cast<Element*>(params.at.out) + tile.sequence.index * params.out.batch +
               (tile.sequence.first_row + token) * params.out.row + head * params.out.head;
    }
    DEVICE_METHOD void store_lse(int head, int token, float lse) const {
        ptx::store_global(params.at.lse + tile.sequence.index * params.lse_batch + head * params.lse_head +
                              tile.sequence.first_row + token,
                          lse);
    }

    // Rows that see no key, and those behind the last sequence: out = 0, lse = -inf or that of the sink alone.
    DEVICE_METHOD void store_nothing() const {
        const int end = tile.sequence.band.seqlen_q, threads = 128 * Traits::kConsumers;
        // Behind the last sequence there may be more rows than a sequence's tiles have.
        const int step = tile.sequence.index == params.batch ? given.tiles_per_unit * given.tokens_per_tile : kOpen - end;
        const int columns = params.head_dim_v / 8, thread = ptx::thread() - 128;
        for (int first = tile.first_token; first < end; first += step) {
            const int tokens = smaller(given.tokens_per_tile, end - first), count = tokens * given.heads_per_unit;
            for (int i = thread; i < count * columns; i += threads) {
                const int its_row = i / columns, head = tile.head + its_row % given.heads_per_unit;
                const uint32 zeros[4] = {};
                ptx::store_global(static_cast<void*>(out_row(head, first + its_row / given.heads_per_unit) + 8 * (i % columns)), zeros);
            }
            if (params.at.lse)
                for (int i = thread; i < count; i += threads) {
                    const int head = tile.head + i % given.heads_per_unit;
                    const float sink = tile.sequence.index < params.batch ? sink_of(head) : -ptx::infinity();
                    store_lse(head, first + i / given.heads_per_unit, finish_row(-ptx::infinity(), 0.f, sink).lse);
                }
        }
    }

    // Puts inf and nan where rows of this warp see values that are not finite: two lanes to a row, a pair of columns
    // after the other through all keys, which is slow, and needed by no good data.
    DEVICE_METHOD void mend(const typename Traits::OutTile& staged, int first) const {
        ptx::warp_barrier();
        const int its_row = first + ptx::lane() / 2, from = ptx::lane() / 2 % 8 * 4;
        const uint32 upper = ptx::shuffle(ptx::bits(softmax.row_sum[0]), from);
        const uint32 lower = ptx::shuffle(ptx::bits(softmax.row_sum[1]), from);
        const float row_sum = ptx::from_bits(ptx::lane() < 16 ? upper : lower);
        if (!exists(its_row) || row_sum * 0.f != 0.f) return;  // a score that is nan makes the whole row nan
        const Span keys = tile.sequence.band.visible_keys(token_of(its_row));
        const Element* values = static_cast<const Element*>(params.at.v) + tile.sequence.index * params.v.batch +
                                tile.sequence.first_key * params.v.row + tile.head / params.queries_per_v * params.v.head;
#pragma unroll 1
        for (int pair = ptx::lane() % 2; 2 * pair < params.head_dim_v; pair += 2) {
            float sum[2] = {0.f, 0.f};
#pragma unroll 1
            for (int key = keys.start; key < keys.stop; ++key)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const float value = ptx::widen(ptx::load_global(values + key * params.v.row + 2 * pair + i));
                    if (value * 0.f != 0.f) sum[i] += value;
                }
            const uint32 place = staged.address(its_row, pair / 4) + pair % 4 * 4;
            uint32 bits = ptx::load_shared(place);
            if (sum[0] != 0.f) bits = (bits & 0xffff0000u) | (ptx::pack<Element>(sum[0], 0.f) & 0xffffu);
            if (sum[1] != 0.f) bits = (bits & 0xffffu) | (ptx::pack<Element>(0.f, sum[1]) & 0xffff0000u);
            ptx::store_shared(place, bits);
        }
    }
};

// Rows at a tile's end that no whole token fits into are computed like all others, and never stored.
template <typename Traits>
DEVICE void clear_spare_rows(const HopperParams& given, const HopperMemory<Traits>& memory) {
    using QueryTile = typename Traits::QueryTile;
    const int first = given.tokens_per_tile * given.heads_per_unit, chunks = QueryTile::kSlabs * QueryTile::kSwizzle / 16;
    for (int i = ptx::thread(); i < (Traits::kBlockQ - first) * chunks; i += Traits::kThreads)
        ptx::store_shared(memory.queries().address(first + i / chunks, i % chunks), 0u, 0u, 0u, 0u);
    ptx::fence_async_proxy();
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) hopper_forward(const __grid_constant__ HopperParams given) {
    const HopperMemory<Traits> memory{ptx::shared_memory()};
    if (ptx::thread() == 0) {
        memory.init();
        ptx::prefetch_map(given.q);
        ptx::prefetch_map(given.k);
        ptx::prefetch_map(given.v);
        if constexpr (Traits::kStoresBoxes) ptx::prefetch_map(given.out);
    }
    if constexpr (Traits::kPacked) clear_spare_rows(given, memory);
    ptx::barrier();
    const int warpgroup = ptx::warpgroup();
    if (warpgroup == 0) {
        ptx::fewer_registers<Traits::kProducerRegisters>();
        if (ptx::warp() > 0)
            inspect<Traits>(given, memory);
        else if (ptx::lane() == 0)
            fetch<Traits>(given, memory);
    } else {
        ptx::more_registers<Traits::kConsumerRegisters>();
        HopperRows<Traits>(given, memory, warpgroup - 1).run();
    }
}

}  // namespace cupyattn
