// What the template arguments of flash.cu and splitkv.cu come to: kinds of numbers, tiles, threads, shared memory.
// Twin: making.catalogue, which knows the arguments' order and the bytes.
#pragma once

#include "algorithm/params.cuh"
#include "tiles/tile.cuh"

namespace cupyattn {

template <typename Element_, int kHeadDim_, int kHeadDimV_, int kBlockQ_, int kBlockK_, int kNumWarps_, int kNumStages_,
          bool kQueriesInRegisters_, bool kPaged_, bool kAligned_, int kEdits_>
struct FlashTraits {
    using Element = Element_;
    static constexpr int kHeadDim = kHeadDim_, kHeadDimV = kHeadDimV_;  // as padded in the tiles
    static constexpr int kBlockQ = kBlockQ_, kBlockK = kBlockK_;
    static constexpr int kNumWarps = kNumWarps_, kThreads = 32 * kNumWarps;
    static constexpr int kNumStages = kNumStages_;  // 2: the next block's keys and values arrive meanwhile
    static constexpr bool kQueriesInRegisters = kQueriesInRegisters_;
    static constexpr bool kPaged = kPaged_;      // k and v are pages, see pages.cuh
    static constexpr bool kAligned = kAligned_;  // every row of q, k and v starts at a multiple of 16 bytes
    static constexpr int kEdits = kEdits_;
    static constexpr int kRowTiles = kBlockQ / (16 * kNumWarps);  // fragments of 16 rows per warp

    using QueryTile = SharedTile<Element, kBlockQ, kHeadDim>;
    using KeyTile = SharedTile<Element, kBlockK, kHeadDim>;
    using ValueTile = SharedTile<Element, kBlockK, kHeadDimV>;
    using OutTile = SharedTile<Half, kBlockQ, kHeadDimV>;  // takes the queries' place at the end
    static constexpr int kQueryBytes = larger(QueryTile::kBytes, OutTile::kBytes);
    static constexpr int kSharedBytes = kQueryBytes + kNumStages * (KeyTile::kBytes + ValueTile::kBytes);

    static_assert(kBlockQ % (16 * kNumWarps) == 0, "every warp has the same number of 16-row fragments");
    static_assert(kBlockK < 128, "the strays of a block are counted in seven bits");
    static_assert(kNumStages == 1 || kNumStages == 2, "blocks of keys are loaded in one or two stages");
};

template <typename Element_, int kHeadDim_, int kHeadDimV_, int kBlockQ_, int kNumWarps_, int kNumStages_, bool kPaged_,
          bool kAligned_, int kEdits_>
struct SplitTraits {
    using Element = Element_;
    static constexpr bool kFloat8 = Same<Element, Float8>::value;
    using Kept = typename Choice<kFloat8, Half, Element>::Type;  // in tiles and as weights
    using Out = typename Choice<kFloat8, BFloat16, Element>::Type;
    using Given = typename Choice<kFloat8, DescaledParams, Params>::Type;
    static constexpr int kHeadDim = kHeadDim_, kHeadDimV = kHeadDimV_;  // as padded in the tiles
    static constexpr int kBlockQ = kBlockQ_, kRowTiles = kBlockQ / 16;
    static constexpr int kNumWarps = kNumWarps_, kThreads = 32 * kNumWarps;
    static constexpr int kBlockK = 16 * kNumWarps;
    static constexpr int kNumStages = kNumStages_;  // 16-key tiles in a warp's ring
    static constexpr bool kPaged = kPaged_;
    static constexpr bool kAligned = kAligned_;
    static constexpr int kEdits = kEdits_;

    using QueryTile = SharedTile<Kept, kBlockQ, kHeadDim>;
    using KeyTile = SharedTile<Kept, 16, kHeadDim>;
    using ValueTile = SharedTile<Kept, 16, kHeadDimV>;
    static constexpr int kStageBytes = KeyTile::kBytes + ValueTile::kBytes;

    static_assert(kBlockQ % 16 == 0, "fragments have 16 rows");
    static_assert(kNumStages >= 2, "a tile has to arrive while another is used");
};

}  // namespace cupyattn
