// hopper.cu: flash.cu's algorithm for Hopper's own units, TMA and wgmma.
//
// A thread block owns kBlockQ rows: of one head, or of the tokens of a whole group of heads that share their keys
// (packed).  Its first warpgroup fetches: one thread, or one warp, has TMA fill rings of key and value tiles.  Each other
// warpgroup has 64 of the rows, and walks the key blocks right to left:
//
//     scores = queries @ keys[block]^T              wgmma, under way while ...
//     out += weights @ values[block + 1]            ... this is queued behind it
//     weights = softmax of scores                   while the second product runs (kOverlap), and while other
//                                                   warpgroups have theirs (kPingPong: they take turns)
//
// Where all rows see all keys, the blocks of a cluster have neighbouring tiles of the same head: each fetches its share
// of every key and value tile, for all of them.
//
// A key that a row does not see never reaches its result, even if its value is nan: blocks that some rows see only
// in part pass by the other warps of the first warpgroup, who make what is not finite 0 before anybody multiplies
// it.  Rows that do see such a value get it at the end (`mend`).
//
// With kSplit the blocks of keys of a tile are shared out among several thread blocks, so that few rows that see many
// keys fill the GPU.  Each leaves what its rows have come to for merge.cu, which is launched behind it.
//
// Twin     cpu.flash.flash, in float64 with the same names.
// Source   Shah et al., FlashAttention-3, 2024 (arXiv 2407.08608): warp specialisation, overlap, ping-pong.
// Needs    sm_90a.
// Launch   any number of whole clusters of blocks, which take row tiles in rounds, the longest first (`tile_of_round`),
//          or with kSplit all of them once for each split; kThreads threads; kSharedBytes.

#include "algorithm/fetch90.cuh"
#include "algorithm/softmax90.cuh"
#include "algorithm/store90.cuh"

namespace cupyattn {

constexpr int kTurnBarrier = 1;  // named barriers from here on: whose turn it is

template <typename Traits>
struct HopperRows : HopperResult<Traits> {
    using Result = HopperResult<Traits>;
    using Result::given, Result::params, Result::memory, Result::consumer, Result::tile;
    using Result::use, Result::tile_use, Result::inspected;
    using Result::out, Result::softmax, Result::strays, Result::descaled, Result::kShift;
    using Result::scale, Result::rows, Result::store, Result::store_nothing;
    using Element = typename Traits::Element;
    using Switches = typename Traits::Switches;
    static constexpr int kBlockK = Traits::kBlockK;
    static constexpr int kValueSteps = kBlockK * sizeof(Element) / 32;  // products of 32 bytes of keys

    Accumulator<Traits::kPartCols> part;  // if kTwoLevel: of some columns, over one block
    float shrink[2];
    bool stays;  // if kLazy: shrink is 1 for all of the warp
    Fragment<Element, Switches::kWeightsInShared ? 16 : kBlockK> weights;

    DEVICE_METHOD HopperRows(const HopperParams& given_, const HopperMemory<Traits>& memory_, int consumer_)
        : Result(given_, memory_, consumer_) {}

    DEVICE_METHOD void run() {
        if (Switches::kPingPong && consumer == 0) ptx::named_barrier_arrive(kTurnBarrier, 256);  // it may begin
#pragma unroll 1
        for (uint32 round = 0, index; (index = tile_of_round<Traits>(round)) < uint32(given.num_tiles); ++round) {
            tile = row_tile<Traits>(index, given);
            if (tile.blocks.empty()) {
                if (!Traits::kSplit || tile.split == 0) store_nothing();
                continue;
            }
            attend();
            // Again, so that not all of it is kept through the walk.
            tile = row_tile<Traits>(index, given, tile.sequence.index);
            store();
            ++tile_use;
        }
    }

    // ---- The walk ----

    DEVICE_METHOD void attend() {
        out.clear();
        softmax.clear();
        strays = 0;
        if constexpr (Traits::kFloat8) descaled = descaled_scale<Traits::kEdits>(params, tile.sequence.index, tile.head);
        memory.query_ring().wait_full(tile_use);
        int block = tile.blocks.stop - 1;
        if constexpr (Switches::kOverlap) {
            begin(block--);
            walk(block, [&](int its_block, auto edge) { step<decltype(edge)::kValue>(its_block); });
            if constexpr (Switches::kRescaleFirst) rescale();
            wait_for_values(tile.blocks.start);
            multiply_in_turn();
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
        memory.key_ring().leave(use, ptx::thread() % 128);
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
        multiply_weights_by_values(0);
        pass_turn();
        ptx::wgmma_wait<1>();
        ptx::hold(scores.value);
        memory.key_ring().leave(use + 1, ptx::thread() % 128);
        const float its_shrink[2] = {shrink[0], shrink[1]};  // that of the weights in the product
        constexpr bool kMeanwhile = !kEdge || Traits::kOverlapsAtEdges;
        if constexpr (!kMeanwhile) finish_product(its_shrink);
        absorb<kEdge>(scores, block);
        // Without this the compiler would wait for the product first, and overlap nothing.
        if constexpr (kMeanwhile && Switches::kPinned) ptx::pin(softmax.row_sum[0] + softmax.row_sum[1], memory.base);
        if constexpr (kMeanwhile) finish_product(its_shrink);
        keep_weights(scores);
        if constexpr (!Switches::kRescaleFirst) rescale();
    }

    DEVICE_METHOD void finish_product(const float (&its_shrink)[2]) {
        ptx::wgmma_wait<0>();
        end_product(0, its_shrink);
        release_values();
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
        memory.key_ring().leave(use, ptx::thread() % 128);
        absorb<kEdge>(scores, block);
        keep_weights(scores);
        rescale();
        wait_for_values(block);
        multiply_in_turn();
    }
    DEVICE_METHOD void multiply_in_turn() {
#pragma unroll
        for (int index = 0; index < Traits::kParts; ++index) {
            begin_product();
            multiply_weights_by_values(index);
            ptx::wgmma_wait<0>();
            end_product(index, shrink);
        }
        release_values();
    }

    DEVICE_METHOD void take_turn() const {
        if constexpr (Switches::kPingPong) ptx::named_barrier(kTurnBarrier + consumer, 256);
    }
    DEVICE_METHOD void pass_turn() const {
        if constexpr (Switches::kPingPong)
            ptx::named_barrier_arrive(kTurnBarrier + (consumer + 1) % Traits::kConsumers, 256);
    }

    DEVICE_METHOD void wait_for_values(int block) {
        memory.value_ring().wait_full(use);
        if (Traits::kReach == kBothEdges ? !tile.whole.has(block) : block >= tile.whole.stop) {
            memory.inspected_ring().wait_full(inspected);
            uint32 found[4];
            ptx::load_shared(found, memory.found(inspected));
            strays |= found[0] | found[1] | found[2];
            ptx::warp_barrier();
            memory.inspected_ring().leave(inspected, ptx::lane());
            ++inspected;
        }
    }

    DEVICE_METHOD void multiply_queries_by_keys(Accumulator<kBlockK>& scores, int its_use) const {
        using QueryTile = typename Traits::QueryTile;
        using KeyTile = typename Traits::KeyTile;
        const uint64 left = memory.queries(tile_use).by_rows(64 * consumer), right = memory.keys(its_use).by_rows(0);
        ptx::wgmma_fence();
#pragma unroll
        for (int step = 0; step < Traits::kHeadDim * QueryTile::kItem / 32; ++step)
            ptx::wgmma<Element, false>(scores.value, left + QueryTile::along(step), right + KeyTile::along(step), step);
        ptx::wgmma_commit();
    }

    // Into the columns of a part, or all.
    DEVICE_METHOD void multiply_weights_by_values(int index) {
        using ValueTile = typename Traits::ValueTile;
        const ValueTile values = memory.values(use);
        const uint64 right = Traits::kFloat8 ? values.by_rows(index * Traits::kPartCols) : values.by_columns();
        ptx::wgmma_fence();
#pragma unroll
        for (int step = 0; step < kValueSteps; ++step) {
            const uint64 there = right + (Traits::kFloat8 ? ValueTile::along(step) : ValueTile::down(step));
            if constexpr (Switches::kWeightsInShared) {
                using WeightTile = typename Traits::WeightTile;
                const uint64 left = memory.weights(consumer).by_rows(0) + WeightTile::along(step);
                ptx::wgmma<Element, true>(out.value, left, there, true);
            } else if constexpr (Switches::kTwoLevel) {
                ptx::wgmma<Element, false>(part.value, weights.value[step][0], there, step);
            } else {
                ptx::wgmma<Element, !Traits::kFloat8>(out.value, weights.value[step][0], there, true);
            }
        }
        ptx::wgmma_commit();
    }
    // Around that product: what it reads and adds to stays where it is.
    DEVICE_METHOD void begin_product() {
        hold_sums();
        hold_weights();
    }
    DEVICE_METHOD void end_product(int index, const float (&its_shrink)[2]) {
        hold_sums();
        hold_weights();
        if constexpr (Switches::kTwoLevel) out.scale_rows_and_add(its_shrink, part, index * Traits::kPartCols);
    }
    DEVICE_METHOD void release_values() {
        memory.value_ring().leave(use, ptx::thread() % 128);
        ++use;
    }
    DEVICE_METHOD void hold_sums() {
        if constexpr (Switches::kTwoLevel)
            ptx::hold(part.value);
        else
            ptx::hold(out.value);
    }
    DEVICE_METHOD void hold_weights() {
        if constexpr (!Switches::kWeightsInShared)
#pragma unroll
            for (int step = 0; step < kValueSteps; ++step) ptx::hold(weights.value[step]);
    }

    // Scores into weights.
    template <bool kEdge>
    DEVICE_METHOD void absorb(Accumulator<kBlockK>& scores, int block) {
        if constexpr (kEdge || Traits::kEdits)
            edit<Traits::kEdits, kEdge>(scores, rows(), block * kBlockK, tile.sequence, params, scale());
        stays = fold<Traits::kEdits, Switches::kLazy, Exponential<Switches::kPolynomials>, kShift>(
            softmax, scores, rows(), block * kBlockK, tile.sequence, params,
            scale_log2_of<Traits::kEdits>(scale(), params), shrink);
    }
    // Sums in two levels shrink as a block's are added to them, in one instruction.
    DEVICE_METHOD void rescale() {
        if constexpr (!Switches::kTwoLevel)
            if (!Switches::kLazy || !stays) out.scale_rows(shrink);
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
};

// Rows at a tile's end that no whole token fits into are computed like all others, and never stored.
template <typename Traits>
DEVICE void clear_spare_rows(const HopperParams& given, const HopperMemory<Traits>& memory) {
    using QueryTile = typename Traits::QueryTile;
    const int first = given.tokens_per_tile * given.heads_per_unit, chunks = QueryTile::kSlabs * QueryTile::kSwizzle / 16;
#pragma unroll
    for (int stage = 0; stage < Traits::kQueryStages; ++stage)
        for (int i = ptx::thread(); i < (Traits::kBlockQ - first) * chunks; i += Traits::kThreads)
            ptx::store_shared(memory.queries(stage).address(first + i / chunks, i % chunks), 0u, 0u, 0u, 0u);
    ptx::fence_async_proxy();
}

template <typename Traits>
DEVICE void run_block(const HopperParams& given) {
    const HopperMemory<Traits> memory{ptx::shared_memory()};
    if (ptx::thread() == 0) {
        memory.init();
        ptx::prefetch_map(given.q);
        ptx::prefetch_map(given.k);
        ptx::prefetch_map(given.v);
        if constexpr (Traits::kStoresBoxes) ptx::prefetch_map(given.out);
    }
    if constexpr (Traits::kSplit) keep_split_size<Traits>(given);
    if constexpr (Traits::kPacked) clear_spare_rows(given, memory);
    // Of what thread 0 stored besides mbarriers it tells whoever waits for the keys that it has brought.
    if constexpr (Traits::kCluster == 1 || Traits::kPacked) ptx::barrier();
    if constexpr (Traits::kCluster > 1) ptx::begin_cluster();
    const int warpgroup = ptx::warpgroup();
    if (warpgroup == 0) {
        ptx::fewer_registers<Traits::kProducerRegisters>();
        if (ptx::warp() > 0)
            inspect<Traits>(given, memory);
        else if (Traits::kPaged || Traits::kSearches || ptx::lane() == 0)
            fetch<Traits>(given, memory);
    } else {
        ptx::more_registers<Traits::kConsumerRegisters>();
        HopperRows<Traits>(given, memory, warpgroup - 1).run();
    }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) hopper_forward(const __grid_constant__ HopperParams given) {
    run_block<Traits>(given);
}
template <typename Traits>
__global__ void __cluster_dims__(Traits::kCluster, 1, 1) __launch_bounds__(Traits::kThreads, 1)
    hopper_forward_in_clusters(const __grid_constant__ HopperParams given) {
    run_block<Traits>(given);
}

}  // namespace cupyattn
