// hopper_backward.cu's traits, parameters and shared memory, and the warps that fetch.
#pragma once

#include "algorithm/gradients_tiling.cuh"
#include "algorithm/scores.cuh"
#include "algorithm/traits.cuh"
#include "tiles/tile90.cuh"

namespace cupyattn {

template <typename Element_, int kHeadDim_, int kHeadDimV_, int kStays_, int kMoves_, int kNumWarps_, int kNumStages_,
          int kWanted_, int kEdits_>
struct HopperBackwardTraits {
    using Element = Element_;
    static constexpr int kHeadDim = kHeadDim_, kHeadDimV = kHeadDimV_;  // as padded in the tiles
    static constexpr int kStays = kStays_, kMoves = kMoves_;
    static constexpr int kNumStages = kNumStages_;
    static constexpr int kWanted = kWanted_;
    static constexpr int kEdits = kEdits_;
    static constexpr int kConsumers = kStays / 64, kThreads = 128 * (1 + kConsumers);
    // Of 168 for each of 384 threads: what the fetching warpgroup gives back, the others take.  It could not do with
    // 24, for facts have addresses.
    static constexpr int kConsumerRegisters = 232, kProducerRegisters = 40;
    static constexpr bool kTurned = kWanted & (kOfKeys | kOfValues);  // keys stay, queries move
    static constexpr bool kSumsA = kWanted & (kOfQueries | kOfKeys), kSumsB = kWanted & kOfValues;
    static constexpr bool kNeedsChanges = kWanted != kOfValues;  // dS

    using StayingA = SwizzledTile<Element, kStays, kHeadDim>;
    using StayingB = SwizzledTile<Element, kStays, kHeadDimV>;
    using MovingA = SwizzledTile<Element, kMoves, kHeadDim>;
    using MovingB = SwizzledTile<Element, kMoves, kHeadDimV>;
    static constexpr int kStayingBytes = StayingA::kBytes + (kNeedsChanges ? StayingB::kBytes : 0);
    static constexpr int kMovingBytes = MovingA::kBytes + MovingB::kBytes;
    static constexpr int kMoving = kStayingBytes;
    static constexpr int kFacts = kMoving + kNumStages * kMovingBytes;  // lse and delta of moving queries
    static constexpr int kFactBytes = kTurned ? 8 * kMoves : 0;
    static constexpr int kBarriers = kFacts + kNumStages * kFactBytes;
    static constexpr int kSharedBytes = kBarriers + Ring<kNumStages>::kBytes + Ring<1>::kBytes;

    static_assert(!(kEdits & kSoftcap) || !(kEdits & kAlibi), "a slope's share is of the change before the softcap");
    static_assert(kStays == kFlaggedRows && kNumWarps_ == 12, "two warpgroups of 64 rows, and one that fetches");
    static_assert(kMoves % 16 == 0 && kMoves <= 256, "the sizes of a wgmma");
    static_assert(kStayingBytes % 1024 == 0 && kMovingBytes % 1024 == 0 && MovingA::kBytes % 1024 == 0,
                  "swizzles go by addresses");
};

struct HopperBackwardParams {
    TensorMap q, k, v, dout;  // as HopperParams has them; boxes are a tile's slab
    BackwardParams params;
};

// What a block has to do: producer and consumers go by this, and by nothing else.
struct GradientTile {
    Sequence sequence;
    Span heads;
    int first;    // of the rows that stay
    Span blocks;  // those of the other side that some of them see, or are seen by
    Span whole;   // those that all of them see wholly
};

template <typename Traits, bool kPacked>
DEVICE GradientTile gradient_tile(const BackwardParams& params) {
    constexpr bool kTurned = Traits::kTurned;
    constexpr int kMoves = Traits::kMoves;
    const int shared = kTurned ? params.grad.heads_per_block : 1;
    const Place place = staying_place<kTurned, kPacked>(ptx::block_x(), params, params.num_heads / shared, Traits::kStays);
    GradientTile tile{sequence_at(place.sequence, params), {place.owner * shared, (place.owner + 1) * shared},
                      first_row_of<kTurned>(place, params, Traits::kStays), {0, 0}, {0, 0}};
    const Band& band = tile.sequence.band;
    const int last = smaller(tile.first + Traits::kStays, kTurned ? band.seqlen_k : band.seqlen_q) - 1;
    if (last < tile.first) {
        tile.heads.stop = tile.heads.start;
        return tile;
    }
    const Span touched = kTurned ? band.touching(tile.first, last) : band.touched(tile.first, last);
    const Span whole = kTurned ? band.seeing_all(tile.first, last) : band.whole(tile.first, last);
    if (touched.empty()) return tile;
    tile.blocks = {touched.start / kMoves, ceil_div(touched.stop, kMoves)};
    if (last + 1 == tile.first + Traits::kStays) tile.whole = {ceil_div(whole.start, kMoves), whole.stop / kMoves};
    return tile;
}

// Whether a head has other keys or values than the one before it.
DEVICE bool has_new_keys(int head, const Params& params) {
    return head % params.queries_per_k == 0 || head % params.queries_per_v == 0;
}

template <typename Traits>
struct GradientMemory {
    using Stages = Ring<Traits::kNumStages>;
    uint32 base;

    DEVICE_METHOD typename Traits::StayingA stays_a() const { return {base}; }
    DEVICE_METHOD typename Traits::StayingB stays_b() const { return {base + Traits::StayingA::kBytes}; }
    DEVICE_METHOD typename Traits::MovingA moves_a(int use) const {
        return {base + Traits::kMoving + Stages::slot(use) * Traits::kMovingBytes};
    }
    DEVICE_METHOD typename Traits::MovingB moves_b(int use) const { return {moves_a(use).base + Traits::MovingA::kBytes}; }
    DEVICE_METHOD uint32 facts(int use) const { return base + Traits::kFacts + Stages::slot(use) * Traits::kFactBytes; }
    DEVICE_METHOD Stages moving_ring() const { return {base + Traits::kBarriers}; }
    DEVICE_METHOD Ring<1> staying_ring() const { return {base + Traits::kBarriers + Stages::kBytes}; }

    DEVICE_METHOD void init() const {
        // Facts come from a warp, tiles from TMA; and each warp that computes leaves by itself: it reads facts, and where
        // a tile is seen by nobody nothing holds the warps of a warpgroup together, so that one could miss a round.
        moving_ring().init(Traits::kTurned ? 2 : 1, 4 * Traits::kConsumers);
        staying_ring().init(1, 4 * Traits::kConsumers);
        ptx::fence_mbarrier_init();
    }
};

// One thread: has every tile loaded as soon as there is room for it.
template <typename Traits>
DEVICE void fetch_tiles(const HopperBackwardParams& given, const GradientMemory<Traits>& memory, const GradientTile& tile) {
    const BackwardParams& params = given.params;
    const Sequence& sequence = tile.sequence;
    const auto moving = memory.moving_ring();
    const auto staying = memory.staying_ring();
    const int batch = params.at.cu_seqlens_q ? 0 : sequence.index;
    const int first_row = static_cast<int>(sequence.first_row), first_key = static_cast<int>(sequence.first_key);
    const auto load_queries = [&](const auto& a, const auto& b, bool wants_b, uint32 barrier, int row, int head) {
        load_tile<1>(a, given.q, barrier, first_row + row, head, batch, ptx::kKeepInL2);
        if (wants_b) load_tile<1>(b, given.dout, barrier, first_row + row, head, batch, ptx::kKeepInL2);
    };
    const auto load_keys = [&](const auto& a, const auto& b, bool wants_b, uint32 barrier, int row, int head) {
        load_tile<1>(a, given.k, barrier, first_key + row, head / params.queries_per_k, batch, ptx::kKeepInL2);
        if (wants_b) load_tile<1>(b, given.v, barrier, first_key + row, head / params.queries_per_v, batch, ptx::kKeepInL2);
    };
    int use = 0, staying_use = 0;
#pragma unroll 1
    for (int head = tile.heads.start; head < tile.heads.stop; ++head) {
        if (head == tile.heads.start || has_new_keys(head, params)) {
            staying.wait_empty(staying_use);
            const uint32 barrier = staying.full(staying_use);
            ptx::mbarrier_arrive_expect(barrier, Traits::kStayingBytes);
            if constexpr (Traits::kTurned)
                load_keys(memory.stays_a(), memory.stays_b(), Traits::kNeedsChanges, barrier, tile.first, head);
            else
                load_queries(memory.stays_a(), memory.stays_b(), Traits::kNeedsChanges, barrier, tile.first, head);
            ++staying_use;
        }
#pragma unroll 1
        for (int block = tile.blocks.start; block < tile.blocks.stop; ++block, ++use) {
            moving.wait_empty(use);
            const uint32 barrier = moving.full(use);
            ptx::mbarrier_arrive_expect(barrier, Traits::kMovingBytes);
            if constexpr (Traits::kTurned)
                load_queries(memory.moves_a(use), memory.moves_b(use), true, barrier, block * Traits::kMoves, head);
            else
                load_keys(memory.moves_a(use), memory.moves_b(use), true, barrier, block * Traits::kMoves, head);
        }
    }
}

// A warp: lse and delta of moving queries, of two neighbours together, as a lane will ask for them.
template <typename Traits>
DEVICE void fetch_facts(const BackwardParams& params, const GradientMemory<Traits>& memory, const GradientTile& tile) {
    const auto moving = memory.moving_ring();
    int use = 0;
#pragma unroll 1
    for (int head = tile.heads.start; head < tile.heads.stop; ++head) {
        const int64 start = tile.sequence.index * params.lse_batch + head * params.lse_head + tile.sequence.first_row;
#pragma unroll 1
        for (int block = tile.blocks.start; block < tile.blocks.stop; ++block, ++use) {
            moving.wait_empty(use);
#pragma unroll 1
            for (int pair = ptx::lane(); pair < Traits::kMoves / 2; pair += 32) {
                float facts[4] = {ptx::infinity(), ptx::infinity(), 0.f, 0.f};
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int token = block * Traits::kMoves + 2 * pair + i;
                    if (token >= tile.sequence.band.seqlen_q) continue;
                    facts[i] = ptx::load_global(params.grad.lse_log2 + start + token);
                    facts[2 + i] = ptx::load_global(params.grad.delta + start + token);
                }
                ptx::store_shared(memory.facts(use) + 16 * pair, ptx::bits(facts[0]), ptx::bits(facts[1]),
                                  ptx::bits(facts[2]), ptx::bits(facts[3]));
            }
            ptx::warp_barrier();
            if (ptx::lane() == 0) ptx::mbarrier_arrive(moving.full(use));
        }
    }
}

}  // namespace cupyattn
