// hopper_backward.cu: backward.cu's algorithm for Hopper's own units, TMA and wgmma.
//
// A block of 128 queries sums dq, a block of 128 keys sums dk and dv, as there; so nothing is added in memory, every
// number is the sum of one warpgroup in one order, and weights and their changes never leave the registers in which the
// next product wants them.  Of the block's three warpgroups the first fetches; each other one has 64 rows, and for each
// tile that moves by
//
//     scores = a of staying rows @ a of moving ones^T      queued behind the sums of the tile before
//     dweights = b of staying rows @ b of moving ones^T    under way while ...
//     weights = exp2(scores - lse)                         ... these are computed
//     dscores = weights * (dweights - delta)
//     sums += weights @ b, dscores @ a                     of moving rows
//
// where a is q and k, and b is dout and v (see gradients.cuh).  A pair that is not seen gives nothing, but 0 * nan would
// be nan: tiles whose sums are not finite are flagged, and backward.cu's backward_again, launched behind this, makes those
// once more.
//
// Twin     cpu.flash.flash_backward, in float64 with the same names.
// Source   Dao, FlashAttention-2, 2023, algorithm 2; Shah et al., FlashAttention-3, 2024: warp specialisation.
// Needs    sm_90a; lse_log2 and delta, see backward_rows.cu; a flag for each block, zero.
// Launch   as backward.cu.

#include "algorithm/gradients90.cuh"

namespace cupyattn {

template <typename Traits>
struct HopperGradients {
    using Element = typename Traits::Element;
    static constexpr int kMoves = Traits::kMoves, kSteps = kMoves / 16;
    static constexpr bool kTurned = Traits::kTurned;
    static constexpr int kEdits = Traits::kEdits;
    static constexpr bool kCapped = kEdits & kSoftcap, kSumsSlope = Traits::kWanted == kOfQueries && bool(kEdits & kAlibi);

    const BackwardParams& params;
    const GradientMemory<Traits> memory;
    const int consumer;  // among the consuming warpgroups
    GradientTile tile;
    int head, use;  // how often the ring was used
    float row_lse[2], row_delta[2];                                // of staying queries
    float slope_part;                                              // of the gradient of the head's ALiBi slope
    Accumulator<Traits::kSumsA ? Traits::kHeadDim : 16> sums_a;    // dq or dk
    Accumulator<Traits::kSumsB ? Traits::kHeadDimV : 16> sums_b;   // dv
    Fragment<Element, kMoves> weights, dweights;

    DEVICE_METHOD HopperGradients(const BackwardParams& params_, const GradientMemory<Traits>& memory_,
                                  const GradientTile& tile_, int consumer_)
        : params(params_), memory(memory_), consumer(consumer_), tile(tile_), use(0), slope_part(0.f) {
        sums_a.clear(), sums_b.clear();
    }

    // This lane's two rows.
    DEVICE_METHOD int row(int half) const {
        return tile.first + 64 * consumer + 16 * (ptx::warp() % 4) + Accumulator<16>::row(half);
    }
    DEVICE_METHOD bool exists(int half) const {
        return row(half) < (kTurned ? tile.sequence.band.seqlen_k : tile.sequence.band.seqlen_q);
    }

    DEVICE_METHOD void run() {
        int staying_use = 0;
#pragma unroll 1
        for (head = tile.heads.start; head < tile.heads.stop; ++head) {
            if (head == tile.heads.start || has_new_keys(head, params)) memory.staying_ring().wait_full(staying_use);
            if constexpr (!kTurned) load_row_facts();
            walk();
            if (head + 1 < tile.heads.stop && has_new_keys(head + 1, params)) {
                ptx::warp_barrier();
                memory.staying_ring().leave(staying_use++, ptx::lane());
            }
        }
        head = tile.heads.start;  // all of them are summed
        bool suspicious = false;
        if constexpr (Traits::kSumsA) suspicious |= store_a();
        if constexpr (Traits::kSumsB) suspicious |= store_b();
        if (ptx::any(suspicious) && ptx::lane() == 0) ptx::atomic_add(params.grad.flags + ptx::block_x(), 1);
    }

    DEVICE_METHOD void load_row_facts() {
        const int64 start = tile.sequence.index * params.lse_batch + head * params.lse_head + tile.sequence.first_row;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            row_lse[half] = exists(half) ? ptx::load_global(params.grad.lse_log2 + start + row(half)) : ptx::infinity();
            row_delta[half] = exists(half) ? ptx::load_global(params.grad.delta + start + row(half)) : 0.f;
        }
    }

    // ---- The walk ----

    // ptxas has products wait for each other, one by one, wherever it cannot see that nobody else touches what is under
    // way: so of a step only its sums are left to the next one, the way around the loop ends as the one through it, no
    // branch has a product in it, and registers are asked for twice nowhere (tests/cuda/test_hopper_backward_sass.py).
    DEVICE_METHOD void walk() {
#pragma unroll 1
        for (int block = tile.blocks.start; block < tile.blocks.stop; ++block) step(block);
        ptx::wgmma_wait<0>();
        hold_sums();
        if (!tile.blocks.empty()) leave(use - 1);
    }

    DEVICE_METHOD void step(int block) {
        Accumulator<kMoves> scores, dscores;
        const bool whole = tile.whole.has(block);
        memory.moving_ring().wait_full(use);
        multiply(scores, memory.stays_a(), memory.moves_a(use));
        ptx::wgmma_wait<1>();  // the sums of the tile before: dscores need the registers of their weights
        hold_sums();
        if (block > tile.blocks.start) leave(use - 1);
        if constexpr (Traits::kNeedsChanges) multiply(dscores, memory.stays_b(), memory.moves_b(use));
        ptx::wgmma_wait<Traits::kNeedsChanges ? 1 : 0>();
        ptx::hold(scores.value);
        if (whole)
            weigh<false>(scores, block);
        else
            weigh<true>(scores, block);
        if constexpr (Traits::kNeedsChanges) {
            ptx::wgmma_wait<0>();
            ptx::hold(dscores.value);
            change(scores, dscores, block);
            dweights.round_from(dscores);
        }
        if constexpr (Traits::kSumsB && !kCapped) weights.round_from(scores);
        add_up();
        ++use;
    }

    DEVICE_METHOD void leave(int its_use) const {
        ptx::warp_barrier();
        memory.moving_ring().leave(its_use, ptx::lane());
    }

    template <typename Left, typename Right>
    DEVICE_METHOD void multiply(Accumulator<kMoves>& products, const Left& left_tile, const Right& right_tile) const {
        ptx::hold(products.value);
        const uint64 left = left_tile.by_rows(64 * consumer), right = right_tile.by_rows(0);
        ptx::wgmma_fence();
#pragma unroll
        for (int step = 0; step < Left::kCols / 16; ++step)
            ptx::wgmma<Element, false>(products.value, left + Left::along(step), right + Right::along(step), step);
        ptx::wgmma_commit();
    }

    // Both sums of a tile, in one group.
    DEVICE_METHOD void add_up() {
        hold_sums();
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            if constexpr (Traits::kSumsB) ptx::hold(weights.value[step]);
            if constexpr (Traits::kSumsA) ptx::hold(dweights.value[step]);
        }
        ptx::wgmma_fence();
        if constexpr (Traits::kSumsB) add_products(sums_b, weights, memory.moves_b(use));
        if constexpr (Traits::kSumsA) add_products(sums_a, dweights, memory.moves_a(use));
        ptx::wgmma_commit();
    }
    template <int kCols, typename Tile>
    DEVICE_METHOD static void add_products(Accumulator<kCols>& sums, const Fragment<Element, kMoves>& left, const Tile& right) {
#pragma unroll
        for (int step = 0; step < kSteps; ++step)
            ptx::wgmma<Element, true>(sums.value, left.value[step][0], right.by_columns() + Tile::down(step), true);
    }
    DEVICE_METHOD void hold_sums() {
        if constexpr (Traits::kSumsA) ptx::hold(sums_a.value);
        if constexpr (Traits::kSumsB) ptx::hold(sums_b.value);
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            if constexpr (Traits::kSumsB) ptx::hold(weights.value[step]);
            if constexpr (Traits::kSumsA) ptx::hold(dweights.value[step]);
        }
    }

    // As in gradients.cuh.
    DEVICE_METHOD Apart apart_of(int first_column) const {
        if constexpr (kTurned) return apart_at<kEdits>(first_column, row(0), tile.sequence, params).turned();
        return apart_at<kEdits>(row(0), first_column, tile.sequence, params);
    }

    // Products q k^T become weights, times what the softcap lets through of a change; 0 where a pair is not seen.
    template <bool kBand>
    DEVICE_METHOD void weigh(Accumulator<kMoves>& scores, int block) {
        const float scale_log2 = scale_log2_of_edited<kEdits>(params);
        const float alibi_slope = alibi_slope_of<kEdits>(head, tile.sequence, params);
        const int first_column = block * kMoves + Accumulator<kMoves>::first_column();
        const Apart apart = apart_of(first_column);
        int start[2] = {0, 0};
        uint32 count[2] = {kMoves, kMoves};
        if constexpr (kBand) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const Band& band = tile.sequence.band;
                const Span seen = kTurned ? band.seeing_rows(row(half)) : band.visible_keys(row(half));
                start[half] = seen.start - first_column;
                count[half] = exists(half) ? larger(seen.stop - seen.start, 0) : 0;
            }
        }
#pragma unroll
        for (int eight = 0; eight < kMoves / 8; ++eight) {
            uint32 facts[4];
            if constexpr (kTurned) ptx::load_shared(facts, memory.facts(use) + 64 * eight + ptx::lane() % 4 * 16);
            float through[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int half = i / 2, column = Accumulator<kMoves>::column(eight, i);
                const float lse = kTurned ? ptx::from_bits(facts[i % 2]) : row_lse[half];
                float& x = scores.value[eight][i];
                bool hidden = kBand && static_cast<uint32>(column - start[half]) >= count[half];
                if constexpr (bool(kEdits)) {
                    const int token = kTurned ? first_column + column : row(half);
                    const int key = kTurned ? row(half) : first_column + column;
                    x = edited<kEdits>(x, token, head, key, alibi_slope, apart.at(column - 8 * half), tile.sequence, params,
                                       params.softmax_scale, hidden, through[i]);
                }
                x = ptx::exp2(ptx::fma(x, scale_log2, -lse));
                if (hidden) x = 0.f;
            }
            if constexpr (kCapped && Traits::kSumsB) weights.round_eight(scores.value[eight], eight);
            if constexpr (kCapped && Traits::kSumsA) {
#pragma unroll
                for (int i = 0; i < 4; ++i) scores.value[eight][i] *= through[i];
            }
        }
    }
    // Products dout v^T become what a change of a product q k^T comes to, the scale aside.
    DEVICE_METHOD void change(const Accumulator<kMoves>& scores, Accumulator<kMoves>& dscores, int block) {
        const Apart apart = apart_of(block * kMoves + Accumulator<kMoves>::first_column()).mirrored();
#pragma unroll
        for (int eight = 0; eight < kMoves / 8; ++eight) {
            uint32 facts[4];
            if constexpr (kTurned) ptx::load_shared(facts, memory.facts(use) + 64 * eight + ptx::lane() % 4 * 16);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float delta = kTurned ? ptx::from_bits(facts[2 + i % 2]) : row_delta[i / 2];
                float& x = dscores.value[eight][i];
                x = scores.value[eight][i] * (x - delta);
                if constexpr (kSumsSlope) {
                    const int column = Accumulator<kMoves>::column(eight, i);
                    slope_part -= x * apart.at(column - 8 * (i / 2));
                }
            }
        }
    }

    // ---- The end ----

    // dq, or dk; whether anything is not finite.
    DEVICE_METHOD bool store_a() {
        const Gradients& grad = params.grad;
        const bool suspicious = sums_a.times_zero() != 0.f;
        if constexpr (kTurned)
            store(sums_a, grad.dk, grad.dk_dtype, grad.of_dk, tile.sequence.first_key, head / grad.queries_per_dk,
                  params.head_dim, params.softmax_scale);
        else
            store(sums_a, grad.dq, grad.dq_dtype, grad.of_dq, tile.sequence.first_row, head, params.head_dim,
                  params.softmax_scale);
        if constexpr (kSumsSlope) store_slope_part(slope_part, head, row(0) - ptx::lane() / 4, tile.sequence, params);
        return suspicious;
    }
    DEVICE_METHOD bool store_b() {
        const Gradients& grad = params.grad;
        const bool suspicious = sums_b.times_zero() != 0.f;
        store(sums_b, grad.dv, grad.dv_dtype, grad.of_dv, tile.sequence.first_key, head / grad.queries_per_dv,
              params.head_dim_v, 1.f);
        return suspicious;
    }
    template <int kCols>
    DEVICE_METHOD void store(const Accumulator<kCols>& sums, void* to, int dtype, const Strides& strides, int64 first_row,
                             int its_head, int num_cols, float factor) const {
        const int64 start = tile.sequence.index * strides.batch + first_row * strides.row + its_head * strides.head;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (!exists(half)) continue;
            const int64 place = start + row(half) * strides.row + Accumulator<16>::first_column();
#pragma unroll
            for (int block = 0; block < kCols / 8; ++block)
                if (8 * block < num_cols) {
                    const float(&pair)[4] = sums.value[block];
                    store_pair(to, dtype, place + 8 * block, pair[2 * half] * factor, pair[2 * half + 1] * factor);
                }
        }
    }
};

template <typename Traits, bool kPacked>
DEVICE void hopper_backward_of_block(const HopperBackwardParams& given) {
    const GradientMemory<Traits> memory{ptx::shared_memory()};
    if (ptx::thread() == 0) {
        memory.init();
        ptx::prefetch_map(given.q);
        ptx::prefetch_map(given.k);
        ptx::prefetch_map(given.v);
        ptx::prefetch_map(given.dout);
    }
    ptx::barrier();
    const GradientTile tile = gradient_tile<Traits, kPacked>(given.params);
    const int warpgroup = ptx::warpgroup();
    if (warpgroup == 0) {
        ptx::fewer_registers<Traits::kProducerRegisters>();
        if (ptx::warp() == 0 && ptx::lane() == 0) fetch_tiles<Traits>(given, memory, tile);
        if (Traits::kTurned && ptx::warp() == 1) fetch_facts<Traits>(given.params, memory, tile);
    } else {
        ptx::more_registers<Traits::kConsumerRegisters>();
        HopperGradients<Traits>(given.params, memory, tile, warpgroup - 1).run();
    }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) hopper_backward(const __grid_constant__ HopperBackwardParams given) {
    hopper_backward_of_block<Traits, false>(given);
}
template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    hopper_backward_packed(const __grid_constant__ HopperBackwardParams given) {
    hopper_backward_of_block<Traits, true>(given);
}

}  // namespace cupyattn
