// What the template arguments of flash.cu and splitkv.cu come to: kinds of numbers, tiles, threads, shared memory.
// Twin: making.catalogue, which knows the arguments' order and the bytes.
#pragma once

#include "algorithm/params.cuh"
#include "tiles/raw.cuh"

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
    // Registers for float32 under way: sums of wide heads leave none for more than one chunk.
    static constexpr int kWidest = larger(kHeadDim, kHeadDimV), kOfLoads = kWidest > 128 ? 8 : 32;
    // Blocks of a multiprocessor that there are registers for at least, 0: as many as ptxas likes.  Left to itself, it
    // spills some of these for one more.
    static constexpr int kLeastBlocks = sizeof(Element) == 2 && kWidest > 96 && kWidest <= 128 ? 1 : 0;

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
    using Out = typename Choice<kFloat8, BFloat16, Element>::Type;
    using Given = typename Choice<kFloat8, DescaledParams, Params>::Type;
    static constexpr int kHeadDim = kHeadDim_, kHeadDimV = kHeadDimV_;  // as padded in the tiles
    // Sums of wide heads leave no registers to make planes in.
    static constexpr bool kReady = Same<Element, float>::value && larger(kHeadDim, kHeadDimV) > 128;
    using Operand = typename Choice<kReady, Ready<Element>, Raw<Element>>::Type;
    using Kept = typename Operand::Kept;
    static constexpr int kOfLoads = kReady ? 8 : 32;  // registers
    static constexpr int kBlockQ = kBlockQ_, kRowTiles = kBlockQ / 16;
    static constexpr int kNumWarps = kNumWarps_, kThreads = 32 * kNumWarps;
    static constexpr int kBlockK = 16 * kNumWarps;
    static constexpr int kNumStages = kNumStages_;  // 16-key tiles in a warp's ring
    static constexpr bool kPaged = kPaged_;
    static constexpr bool kAligned = kAligned_;
    static constexpr int kEdits = kEdits_;

    // Float8 queries are made halves when they go into registers, once; float32 ones are read again and again.
    using QueryTile = typename Choice<kFloat8, RawTile<Element, kBlockQ, kHeadDim>,
                                      SharedTile<Element, kBlockQ, kHeadDim>>::Type;
    using KeyTile = typename Operand::template Tile<16, kHeadDim>;
    using ValueTile = typename Operand::template Tile<16, kHeadDimV>;
    static constexpr int kStageBytes = KeyTile::kBytes + ValueTile::kBytes;
    static constexpr int kStateBytes = kBlockQ * (kHeadDimV + 2) * 4;  // of a warp, see merge.cuh
    // Behind the queries, and the rings in whose place states come: see walk.cuh.
    static constexpr int kWalk = QueryTile::kBytes + kNumWarps * larger(kNumStages * kStageBytes, kStateBytes);
    static constexpr int kWalkBytes = 32, kSharedBytes = kWalk + kWalkBytes;

    static_assert(kBlockQ % 16 == 0, "fragments have 16 rows");
    static_assert(kNumStages >= 2, "a tile has to arrive while another is used");
};

// Gradients of what: bits of a trait.
enum Wanted { kOfQueries = 1, kOfKeys = 2, kOfValues = 4, kOfBias = 8 };

template <typename Element_, int kHeadDim_, int kHeadDimV_, int kStays_, int kMoves_, int kNumWarps_, int kNumStages_,
          int kWanted_, bool kAligned_, int kEdits_>
struct BackwardTraits {
    using Element = Element_;
    static constexpr int kHeadDim = kHeadDim_, kHeadDimV = kHeadDimV_;  // as padded in the tiles
    static constexpr int kStays = kStays_, kMoves = kMoves_;            // rows of the tile that stays, and of one that moves
    static constexpr int kNumWarps = kNumWarps_, kThreads = 32 * kNumWarps;
    static constexpr int kNumStages = kNumStages_;
    static constexpr int kWanted = kWanted_;
    static constexpr bool kAligned = kAligned_;  // every row of q, k, v and dout starts at a multiple of 16 bytes
    static constexpr int kEdits = kEdits_;
    static constexpr bool kTurned = kWanted & (kOfKeys | kOfValues);  // keys stay, queries move
    static constexpr bool kSumsA = kWanted & (kOfQueries | kOfKeys), kSumsB = kWanted & kOfValues;
    static constexpr bool kNeedsChanges = kWanted != kOfValues;  // dS
    static constexpr int kRowTiles = kStays / (16 * kNumWarps);

    using StayingA = SharedTile<Element, kStays, kHeadDim>;
    using StayingB = SharedTile<Element, kStays, kHeadDimV>;
    using MovingA = SharedTile<Element, kMoves, kHeadDim>;
    using MovingB = SharedTile<Element, kMoves, kHeadDimV>;
    static constexpr int kTableBytes = kWanted == kOfBias ? 4 * kStays * kMoves : 0;  // takes their place at the end
    static constexpr int kStayingBytes = larger(StayingA::kBytes + StayingB::kBytes, kTableBytes);
    static constexpr int kStageBytes = MovingA::kBytes + MovingB::kBytes + (kTurned ? 8 * kMoves : 0);
    static constexpr int kSharedBytes = kStayingBytes + kNumStages * kStageBytes;

    static_assert(kStays % (16 * kNumWarps) == 0, "every warp has the same number of 16-row fragments");
    static_assert(kMoves < 128, "the strays of a tile are counted in seven bits");
    static_assert(kStageBytes % 128 == 0, "tiles begin at multiples of 128");
};

}  // namespace cupyattn
