// splitkv.cu: exact attention for few queries and many keys.
//
// A piece is kBlockQ rows that share their keys: the query heads of one group and, if there are several, the
// queries of one sequence, token by token, so that keys and values are read once for all of them.  Its keys are
// cut into splits, a thread block each, and within a block the warps take turns, 16 keys at a time, each with
// copies of its own under way and none waiting for another.  At the end the warps' sums are merged, and stored as
// results where there is one split; otherwise they are left for merge.cu, which is launched behind it.
//
// Keys and values lie in the rings as they come, and are made what products take, halves or planes, in the registers of
// the warp that owns them: see raw.cuh.  Halves hold the numbers of float8 exactly, and its weights are halves, too.
// Float32 of wide heads is made planes on the way into the rings, by as many registers as sums leave.
//
// Where lengths are data the grid is as large as the GPU, and a block takes one split after the other, by a schedule that
// schedule.cu has made of the lengths; where the host knows them a block has one.
//
// Twin     cpu.flash.flash and numpy_ref.merge.
// Source   Dao, Haziza, Massa and Sizov, Flash-Decoding, 2023.
// Needs    sm_80.
// Launch   one block per (split, row tile, group, sequence), the split fastest, or, behind schedule.cu, num_slots of
//          them; kThreads threads; merge.cu behind it, if pieces may have several splits.

#include "algorithm/descales.cuh"
#include "algorithm/dropout.cuh"
#include "algorithm/merge.cuh"
#include "algorithm/pages.cuh"
#include "algorithm/traits.cuh"
#include "algorithm/walk.cuh"
#include "tiles/strays.cuh"

namespace cupyattn {

// One block's work.  With kCare the walk that keeps values apart which are not finite, see strays.cuh.
template <typename Traits, bool kCare>
struct SplitBlock : SplitStates<Traits> {
    using States = SplitStates<Traits>;
    using States::params, States::states, States::state_sums, States::state_row, States::kColumns;
    using typename States::RowState;
    using Element = typename Traits::Element;
    using Kept = typename Traits::Kept;
    using Operand = typename Traits::Operand;
    using QueryTile = typename Traits::QueryTile;
    static constexpr int kRowTiles = Traits::kRowTiles, kBlockK = Traits::kBlockK, kThreads = Traits::kThreads;
    static constexpr int kPlanes = Planes<Kept>::kCount;
    // Not where they would take registers from wide sums; float8 ones have to be made halves.
    static constexpr bool kQueriesInRegisters = (kRowTiles * kPlanes == 1 && Traits::kHeadDim <= 192) || Traits::kFloat8;
    static constexpr int kQuerySteps = kQueriesInRegisters ? Traits::kHeadDim / 16 : 1;
    using QueryFragments = uint32[kRowTiles][kPlanes][4];

    Sequence sequence;
    int first_head, first_row;  // of the piece; rows are packed, queries_per_pair to a token
    int num_rows;
    QueryTile queries;
    uint32 ring;  // this warp's
    RowPair rows[kRowTiles];
    QueryFragments query[kQuerySteps];
    Accumulator<Traits::kHeadDimV> out[kRowTiles];
    OnlineSoftmax softmax[kRowTiles];
    bool counting;  // strays, if kCare
    Strays<Traits::kHeadDimV> strays[kRowTiles];
    float descaled;  // the softmax scale of float8 operands

    DEVICE_METHOD SplitBlock(const typename Traits::Given& given, int tile, int group, const Sequence& sequence_)
        : States(given) {
        look_at(tile, group, sequence_);
        queries.base = ptx::shared_memory();
        states = queries.base + QueryTile::kBytes;
        ring = states + ptx::warp() * Traits::kNumStages * Traits::kStageBytes;
        if constexpr (Traits::kFloat8)
            descaled = descaled_scale<Traits::kEdits>(params, sequence.index, first_head, kOfFloat8 * kOfFloat8);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = 16 * m + Accumulator<16>::row(half);
                rows[m].token[half] = token_of(row);
                rows[m].head[half] = head_of(row);
                rows[m].exists[half] = row < num_rows;
            }
    }

    DEVICE_METHOD void look_at(int tile, int group, const Sequence& its) {
        sequence = its;
        first_head = group * params.queries_per_pair;
        first_row = tile * Traits::kBlockQ;
        num_rows = smaller(Traits::kBlockQ, sequence.band.seqlen_q * params.queries_per_pair - first_row);
    }

    DEVICE_METHOD int token_of(int row) const { return (first_row + row) / params.queries_per_pair; }
    DEVICE_METHOD int head_of(int row) const { return first_head + (first_row + row) % params.queries_per_pair; }

    template <typename To, typename From>
    DEVICE_METHOD To* row_of(From* data, const Strides& strides, int row) const {
        return static_cast<To*>(data) + sequence.index * strides.batch +
               (sequence.first_row + token_of(row)) * strides.row + head_of(row) * strides.head;
    }

    DEVICE_METHOD float scale() const {
        if constexpr (Traits::kFloat8) return descaled;
        return params.softmax_scale;
    }

    // ---- Loads ----

    DEVICE_METHOD void load_queries() {
        const Element* anywhere = static_cast<const Element*>(params.at.q);
        int thread = ptx::thread();
        ptx::disguise(thread);  // or its places in the tile would be kept from one item to the next
        load_rows_from<kThreads, Traits::kAligned, Traits::kOfLoads>(queries, thread, num_rows, params.head_dim, anywhere,
                                                   [&](int row) { return row_of<const Element>(anywhere, params.q, row); });
        ptx::commit_copies();
        ptx::wait_copies<0>();
        ptx::barrier();
    }
    DEVICE_METHOD void keep_queries() {
#pragma unroll
        for (int step = 0; step < kQuerySteps; step += Operand::kTogether)
#pragma unroll
            for (int m = 0; m < kRowTiles; ++m)
                if constexpr (Traits::kFloat8)
                    Operand::template take_left<QueryTile>(query[step][m], query[step + 1][m],
                                                           left_operand(queries, 16 * m), step / 2);
                else
                    load_fragment<Kept, QueryTile>(query[step][m], left_operand(queries, 16 * m), step);
    }
    DEVICE_METHOD void take_queries(QueryFragments& to, const QueryTile& tile, int step) const {
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
            if constexpr (!kQueriesInRegisters) {
                load_fragment<Kept, QueryTile>(to[m], left_operand(tile, 16 * m), step);
            } else {
#pragma unroll
                for (int i = 0; i < 4; ++i) to[m][0][i] = query[step][m][0][i];
            }
    }

    DEVICE_METHOD typename Traits::KeyTile key_tile(int stage) const { return {ring + stage * Traits::kStageBytes}; }
    DEVICE_METHOD typename Traits::ValueTile value_tile(int stage) const {
        return {ring + stage * Traits::kStageBytes + Traits::KeyTile::kBytes};
    }
    DEVICE_METHOD static int first_key(int block) { return block * kBlockK + ptx::warp() * 16; }

    // This warp's 16 keys and values of a block.
    DEVICE_METHOD void load(int block, int stage) {
        const int key = first_key(block), left = sequence.band.seqlen_k - key;
        load_operand(key_tile(stage), params.at.k, params.k, first_head / params.queries_per_k, params.head_dim, key, left);
        load_operand(value_tile(stage), params.at.v, params.v, first_head / params.queries_per_v, params.head_dim_v, key,
                     left);
    }
    template <typename Tile>
    DEVICE_METHOD void load_operand(const Tile& tile, const void* data, const Strides& strides, int head, int num_cols,
                                    int key, int left) const {
        const Element* base = static_cast<const Element*>(data) + head * strides.head;
        if constexpr (!Traits::kPaged) {
            base += sequence.place * strides.batch + (sequence.first_key + key) * strides.row;
            load_rows<32, Traits::kAligned, Traits::kOfLoads>(tile, ptx::lane(), left, num_cols, base, strides.row);
        } else {
            key += static_cast<int>(sequence.first_key);
            if ((params.page_size | key) % 16 == 0) {  // all of the tile is in one page
                const Element* first = left > 0 ? row_in_pages(base, strides, key, sequence, params) : nullptr;
                load_rows<32, Traits::kAligned, Traits::kOfLoads>(tile, ptx::lane(), first ? left : 0, num_cols, first ? first : base,
                                                strides.row);
            } else {
                load_rows_from<32, Traits::kAligned, Traits::kOfLoads>(tile, ptx::lane(), left, num_cols, base, [&](int row) {
                    return row_in_pages(base, strides, key + row, sequence, params);
                });
            }
        }
    }

    // ---- The algorithm ----

    // This warp's keys of blocks [start, stop).
    DEVICE_METHOD void attend(const Span& part) {
        constexpr int kAhead = Traits::kNumStages - 1;
        const Span whole = sequence.band.whole(token_of(0), token_of(num_rows - 1));
        if constexpr (kQueriesInRegisters) keep_queries();
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) out[m].clear(), softmax[m].clear();
        int stage = 0;
#pragma unroll 1
        for (int block = part.start - kAhead; block < part.stop; ++block) {
            if (block + kAhead < part.stop) load(block + kAhead, stage == 0 ? kAhead : stage - 1);
            ptx::commit_copies();
            if (block < part.start) {  // the first tiles have to come first
                stage = stage == kAhead ? 0 : stage + 1;
                continue;
            }
            ptx::wait_copies<kAhead>();
            ptx::warp_barrier();  // this tile is here, from all lanes
            const int key = first_key(block);
            if (!kCare && whole.start <= key && key + 16 <= whole.stop)
                absorb<false>(key, stage);
            else
                absorb<true>(key, stage);
            ptx::warp_barrier();  // all lanes are done with it
            stage = stage == kAhead ? 0 : stage + 1;
        }
        ptx::wait_copies<0>();
    }

    template <bool kBand>
    DEVICE_METHOD void absorb(int key, int stage) {
        Accumulator<16> scores[kRowTiles];
        QueryTile tile = queries;
        // Or an address for each step would be kept from block to block, and below where each row's band is: registers that
        // sums of ready planes and strays need.
        if constexpr (Traits::kReady) ptx::disguise(tile.base);
        const auto take_left = [&](QueryFragments& left, int step) { take_queries(left, tile, step); };
        multiply_by_rows<Operand, Traits::kHeadDim>(scores, key_tile(stage), take_left);
        Fragment<Kept, 16> weights[kRowTiles];
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
            RowPair its = rows[m];
            if constexpr (Traits::kReady || kCare) ptx::disguise(its.token[0]), ptx::disguise(its.token[1]);
            edit<Traits::kEdits, kBand>(scores[m], its, key, sequence, params, scale());
            if (kCare && counting) {
                mark_seen<Traits::kEdits>(scores[m], rows[m], key, sequence.index, params);
                out[m].clear();
            } else {
                float shrink[2];
                fold<Traits::kEdits>(softmax[m], scores[m], rows[m], key, sequence, params,
                                     scale_log2_of<Traits::kEdits>(scale(), params), shrink);
                out[m].scale_rows(shrink);
                if constexpr (bool(Traits::kEdits & kDropout)) drop(scores[m], rows[m], key, sequence.index, params);
            }
            weights[m].round_from(scores[m]);
        }
        multiply_by_columns<Operand>(out, weights, value_tile(stage), [&](uint32(&right)[kPlanes][4]) {
            if constexpr (kCare) take_strays<Kept>(right, counting);
        });
        if (kCare && counting)
#pragma unroll
            for (int m = 0; m < kRowTiles; ++m) strays[m].collect(out[m]);
    }

    // The walk again, so that values which are not finite reach only the rows that see them.
    DEVICE_METHOD void attend_with_care(const Span& part) {
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) strays[m].clear();
#pragma unroll 1
        for (int walk = 0; walk < 2; ++walk) {
            counting = walk == 0;
            ptx::warp_barrier();  // all lanes are done with the walk before
            attend(part);
        }
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) strays[m].add_to(out[m]);
    }

    // Nan or inf anywhere in this block's sums; everybody meets, and is done with the rings.
    DEVICE_METHOD bool is_suspicious() const {
        float probe = 0.f;
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) probe += out[m].times_zero();
        return ptx::barrier_any(probe != 0.f);
    }

    // ---- The end ----

    DEVICE_METHOD void leave_state() {
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
            softmax[m].finish(scale_log2_of<Traits::kEdits>(scale(), params));
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = 16 * m + Accumulator<16>::row(half);
                if (ptx::lane() % 4 == 0) {
                    ptx::store_shared(state_sums(ptx::warp(), row), softmax[m].row_max[half]);
                    ptx::store_shared(state_sums(ptx::warp(), row) + 4, softmax[m].row_sum[half]);
                }
#pragma unroll
                for (int block = 0; block < Traits::kHeadDimV / 8; ++block)
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const int column = Operand::first_column() + Operand::column(block, i);
                        ptx::store_shared(state_row(ptx::warp(), row) + column * 4, out[m].value[block][2 * half + i]);
                    }
            }
        }
    }

    DEVICE_METHOD void store(const RowState& state, int row) const {
        const int head = head_of(row);
        const float sink = params.at.sinks ? ptx::load_global(params.at.sinks + head) * kLog2e : -ptx::infinity();
        const Finish end = finish_row(state.exponent, state.sum, sink);
        float factor = end.factor;
        if constexpr (Traits::kFloat8) factor *= kOfFloat8 * descale_of_values(params, sequence.index, first_head);
        auto* to = row_of<typename Traits::Out>(params.at.out, params.out, row);
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
            const int column = 32 * i + ptx::lane();
            if (column < params.head_dim_v) store_rounded(to + column, state.column[i] * factor);
        }
        if (params.at.lse && ptx::lane() == 0)
            ptx::store_global(params.at.lse + sequence.index * params.lse_batch + head * params.lse_head +
                                  sequence.first_row + token_of(row),
                              end.lse);
    }
};

// Once more from the queries in shared memory on; apart, since it is rarely run.
template <typename Traits>
DEVICE_APART void split_with_care(const typename Traits::Given& params, int tile, int group, const Sequence& sequence,
                                  const Span& part) {
    SplitBlock<Traits, true> block(params, tile, group, sequence);
    block.attend_with_care(part);
    ptx::barrier();  // everybody is done with the rings
    block.leave_state();
}

template <typename Traits>
DEVICE void attend_to(const typename Traits::Given& params, const SplitItem& item) {
    using Walk = SplitWalk<Traits>;
    SplitBlock<Traits, false> block(params, item.tile, item.group, item.sequence);
    block.load_queries();
    block.attend(item.part);
    if (block.is_suspicious())
        split_with_care<Traits>(params, item.tile, item.group, item.sequence, item.part);
    else
        block.leave_state();
    ptx::barrier();
    const SplitItem* again = ptx::disguised(item);  // so that little of it is kept through the walk
    block.look_at(again->tile, again->group, again->sequence);
    const bool is_whole = Walk::is_whole();
    const int64 place = Walk::place();
    for (int row = ptx::warp(); row < block.num_rows; row += Traits::kNumWarps) {
        const auto state = block.merged_warps(row);
        if (is_whole)
            block.store(state, row);
        else
            block.leave_partial(state, place, row);
    }
    if (Walk::splits() && params.num_splits > 1 && ptx::thread() == 0)
        ptx::store_global(params.at.told + place, 2 * Walk::splits());
}

// Apart, with registers of its own.
template <typename Traits>
DEVICE_APART void next_item(const Params& params, SplitItem& item) {
    item.exists = SplitWalk<Traits>(params).next(item);
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads) split_forward(const __grid_constant__ typename Traits::Given params) {
    SplitWalk<Traits>(params).begin();
    SplitItem item;
#pragma unroll 1
    while (true) {
        next_item<Traits>(params, item);
        if (!item.exists) return;
        if (item.sequence.index < params.batch) {
            attend_to<Traits>(params, item);
        } else if (item.part.start == 0) {
            const int head = item.group * params.queries_per_pair;
            wipe<typename Traits::Out>(params, item.sequence, {head, head + params.queries_per_pair}, item.tile,
                                       item.tiles);
        }
    }
}

}  // namespace cupyattn
