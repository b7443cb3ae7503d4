// flash.cu: exact attention in one pass over the keys.
//
//     out = softmax(scale * q @ k^T) @ v          lse = log(sum(exp(scale * q @ k^T)))
//
// A thread block owns kBlockQ query rows of one head and walks the key blocks those rows can see, left to
// right, keeping per row only the running maximum, the running sum and the output so far.
//
// A row that sees no key gets out = 0 and lse = -inf.  A key that a row does not see never reaches its result:
// the products are done as if all values were finite, and again, with care, where a result is not (see strays.cuh).
//
// Twin     cpu.flash.flash, in float64 with the same names.
// Source   Dao, FlashAttention-2, 2023, algorithm 1 (arXiv 2307.08691).
// Needs    sm_80.
// Launch   one block per (row tile, head, sequence), the row tile fastest (see tiling.cuh); kThreads threads;
//          kSharedBytes.

#include "algorithm/dropout.cuh"
#include "algorithm/pages.cuh"
#include "algorithm/softmax.cuh"
#include "algorithm/tiling.cuh"
#include "algorithm/traits.cuh"
#include "tiles/strays.cuh"

namespace cupyattn {

// A block's work: rows of a head.
struct FlashItem {
    Sequence sequence;
    int tile, head;
};

// One block's part in it.  With kCare the walk that keeps values apart which are not finite, see strays.cuh.
template <typename Traits, bool kCare>
struct FlashBlock {
    using Element = typename Traits::Element;
    static constexpr int kRowTiles = Traits::kRowTiles, kBlockK = Traits::kBlockK, kThreads = Traits::kThreads;
    static constexpr int kPlanes = Planes<Element>::kCount;
    static constexpr int kQuerySteps = Traits::kQueriesInRegisters ? Traits::kHeadDim / 16 : 1;

    const Params& params;
    Sequence sequence;
    int head;
    int first_row;  // of this block's rows, within the sequence
    const Element *keys, *values;  // of this sequence and head, from key 0; of pages, from page 0
    typename Traits::QueryTile queries;
    typename Traits::KeyTile key_tile;      // stage 0
    typename Traits::ValueTile value_tile;  // stage 0
    uint32 query[kQuerySteps][kRowTiles][kPlanes][4];  // if they are kept in registers
    Accumulator<Traits::kHeadDimV> out[kRowTiles];
    OnlineSoftmax softmax[kRowTiles];
    bool counting;  // strays, if kCare
    Strays<Traits::kHeadDimV> strays[kRowTiles];

    static constexpr int kStageBytes = Traits::KeyTile::kBytes + Traits::ValueTile::kBytes;

    DEVICE_METHOD FlashBlock(const Params& given, const FlashItem& item) : params(given) {
        look_at(item);
        const uint32 memory = ptx::shared_memory();
        queries.base = memory;
        key_tile.base = memory + Traits::kQueryBytes;
        value_tile.base = key_tile.base + Traits::KeyTile::kBytes;
        const int place = Traits::kPaged ? 0 : sequence.place;
        const int64 row = Traits::kPaged ? 0 : sequence.first_key;
        keys = start_of<const Element>(params.at.k, params.k, place, head / params.queries_per_k, row);
        values = start_of<const Element>(params.at.v, params.v, place, head / params.queries_per_v, row);
    }

    DEVICE_METHOD void look_at(const FlashItem& item) {
        sequence = item.sequence, head = item.head, first_row = item.tile * Traits::kBlockQ;
    }

    // The two rows of this lane in fragment `m`.
    DEVICE_METHOD Rows<true> rows(int m) const {
        const int token = first_row + warp_row(m) + Accumulator<16>::row(0), end = sequence.band.seqlen_q;
        return {{{token, token + 8}, {head, head}, {token < end, token + 8 < end}}};
    }
    template <typename To, typename From>
    DEVICE_METHOD static To* start_of(From* data, const Strides& strides, int place, int its_head, int64 row) {
        return static_cast<To*>(data) + place * strides.batch + row * strides.row + its_head * strides.head;
    }
    DEVICE_METHOD static int warp_row(int m) { return (ptx::warp() * kRowTiles + m) * 16; }
    DEVICE_METHOD int num_rows() const { return smaller(Traits::kBlockQ, sequence.band.seqlen_q - first_row); }

    // ---- Loads ----

    DEVICE_METHOD void load_queries() {
        load_rows<kThreads, Traits::kAligned, Traits::kOfLoads>(queries, ptx::thread(), num_rows(), params.head_dim,
                                              start_of<const Element>(params.at.q, params.q, sequence.index, head,
                                                                      sequence.first_row + first_row),
                                              params.q.row);
    }
    DEVICE_METHOD void load_keys(int block, int turn) {
        load_block(stage(key_tile, turn), block, keys, params.k, params.head_dim);
    }
    DEVICE_METHOD void load_values(int block, int turn) {
        load_block(stage(value_tile, turn), block, values, params.v, params.head_dim_v);
    }
    template <typename Tile>
    DEVICE_METHOD void load_block(const Tile& tile, int block, const Element* data, const Strides& strides,
                                  int num_cols) const {
        const int key = block * kBlockK, left = sequence.band.seqlen_k - key;
        if constexpr (Traits::kPaged) {
            const int place = key + static_cast<int>(sequence.first_key);
            load_rows_from<kThreads, Traits::kAligned, Traits::kOfLoads>(tile, ptx::thread(), left, num_cols, data, [&](int row) {
                return row_in_pages(data, strides, place + row, sequence, params);
            });
        } else {
            load_rows<kThreads, Traits::kAligned, Traits::kOfLoads>(tile, ptx::thread(), left, num_cols, data + key * strides.row,
                                                  strides.row);
        }
    }
    // A block's own tile among the stages, which take turns.
    template <typename Tile>
    DEVICE_METHOD static Tile stage(const Tile& tile, int turn) {
        return {tile.base + (Traits::kNumStages == 2 && turn % 2 ? kStageBytes : 0)};
    }

    // ---- The algorithm ----

    // Walks the keys; `out` and `softmax` hold the sums afterwards.
    DEVICE_METHOD void attend() {
        const int last_row = first_row + num_rows() - 1;
        const Span touched = sequence.band.touched(first_row, last_row), whole = sequence.band.whole(first_row, last_row);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) out[m].clear(), softmax[m].clear();
        if (touched.empty()) return;
        const int stop = ceil_div(touched.stop, kBlockK), first = next_visible(touched.start / kBlockK, stop);
        if (first >= stop) return;

        load_keys(first, 0);
        ptx::commit_copies();
        if constexpr (Traits::kNumStages == 2) {
            load_values(first, 0);
            ptx::commit_copies();
        }
        if constexpr (Traits::kQueriesInRegisters) keep_queries();
        int turn = 0;
#pragma unroll 1
        for (int block = first, next; block < stop; block = next, ++turn) {
            next = next_visible(block + 1, stop);
            if constexpr (Traits::kNumStages == 1) {
                ptx::wait_copies<0>();
                ptx::barrier();  // the keys are here, and everybody is done with the values before them
                load_values(block, turn);
                ptx::commit_copies();
            } else {
                ptx::wait_copies<1>();
                ptx::barrier();  // the keys are here, and everybody is done with the block before
                if (next < stop) load_keys(next, turn + 1);
                ptx::commit_copies();
                if (next < stop) load_values(next, turn + 1);
                ptx::commit_copies();
            }
            const bool inside = whole.start <= block * kBlockK && (block + 1) * kBlockK <= whole.stop;
            if (!kCare && inside)
                absorb<false>(block, next, stop, turn);
            else
                absorb<true>(block, next, stop, turn);
        }
    }

    // The first block from `block` on that a boolean mask does not hide from all rows; others are not even loaded.
    DEVICE_METHOD int next_visible(int block, int stop) const {
        if constexpr (bool(Traits::kEdits & kMaskArray))
            while (block < stop && !ptx::barrier_any(mask_shows(block))) ++block;
        return block;
    }
    // Whether this thread's share of a block's mask has a key that is seen.
    DEVICE_METHOD bool mask_shows(int block) const {
        const int num_keys = smaller(kBlockK, sequence.band.seqlen_k - block * kBlockK);
        for (int i = ptx::thread(); i < Traits::kBlockQ * kBlockK; i += kThreads) {
            const int row = i / kBlockK, key = i % kBlockK;
            if (row >= num_rows() || key >= num_keys) continue;
            const int64 index = row_of(params.mask, sequence.index, head, first_row + row) +
                                (block * kBlockK + key) * params.mask.key;
            if (ptx::load_global(params.at.mask + index)) return true;
        }
        return false;
    }

    // One block of keys.
    template <bool kBand>
    DEVICE_METHOD void absorb(int block, int next, int stop, int turn) {
        Accumulator<kBlockK> scores[kRowTiles];
        multiply_queries_by_keys(scores, stage(key_tile, turn));
        const float scale_log2 = scale_log2_of<Traits::kEdits>(params.softmax_scale, params);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
            edit<Traits::kEdits, kBand>(scores[m], rows(m), block * kBlockK, sequence, params);

        if constexpr (Traits::kNumStages == 1) {
            ptx::wait_copies<0>();
            ptx::barrier();  // the values are here, and everybody is done with the keys
            if (next < stop) load_keys(next, turn + 1);
            ptx::commit_copies();
        }
        Fragment<Element, kBlockK> weights[kRowTiles];
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
            if (kCare && counting) {
                mark_seen<Traits::kEdits>(scores[m], rows(m), block * kBlockK, sequence.index, params);
                out[m].clear();
            } else {
                float shrink[2];
                fold<Traits::kEdits>(softmax[m], scores[m], rows(m), block * kBlockK, sequence, params, scale_log2,
                                     shrink);
                out[m].scale_rows(shrink);
                if constexpr (bool(Traits::kEdits & kDropout))
                    drop(scores[m], rows(m), block * kBlockK, sequence.index, params);
            }
            weights[m].round_from(scores[m]);
        }
        if constexpr (Traits::kNumStages == 2) {
            ptx::wait_copies<2>();
            ptx::barrier();  // the values are here; the next block's keys and values may be under way
        }
        const auto tile = stage(value_tile, turn);
        if constexpr (kCare) {
            take_strays<kThreads, Element>(tile, ptx::thread(), counting);
            ptx::barrier();
        }
        multiply_values<typename Traits::ValueTile>(out, weights, right_operand_by_columns(tile));
        if (kCare && counting)
#pragma unroll
            for (int m = 0; m < kRowTiles; ++m) strays[m].collect(out[m]);
    }

    DEVICE_METHOD void multiply_queries_by_keys(Accumulator<kBlockK> (&scores)[kRowTiles],
                                                const typename Traits::KeyTile& tile) {
        using KeyTile = typename Traits::KeyTile;
        const uint32 right = right_operand_by_rows(tile);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) scores[m].clear();
#pragma unroll
        for (int step = 0; step < Traits::kHeadDim / 16; ++step) {
            uint32 loaded[kRowTiles][kPlanes][4];
            if constexpr (!Traits::kQueriesInRegisters)
#pragma unroll
                for (int m = 0; m < kRowTiles; ++m)
                    load_fragment<Element, typename Traits::QueryTile>(loaded[m], left_operand(queries, warp_row(m)),
                                                                       step);
            const auto& left = Traits::kQueriesInRegisters ? query[Traits::kQueriesInRegisters ? step : 0] : loaded;
#pragma unroll
            for (int pair = 0; pair < kBlockK / 16; ++pair)
#pragma unroll
                for (int plane = 0; plane < kPlanes; ++plane) {
                    uint32 key[4];
                    ptx::load_matrices(
                        key, KeyTile::advance(right, step) + plane * KeyTile::kPlane + KeyTile::down(pair));
#pragma unroll
                    for (int m = 0; m < kRowTiles; ++m)
                        multiply_planes<Element>(scores[m].value[2 * pair], scores[m].value[2 * pair + 1], left[m], key,
                                                 plane);
                }
        }
    }

    // The queries were committed before everything else.
    DEVICE_METHOD void keep_queries() {
        ptx::wait_copies<Traits::kNumStages>();
        ptx::barrier();
#pragma unroll
        for (int step = 0; step < kQuerySteps; ++step)
#pragma unroll
            for (int m = 0; m < kRowTiles; ++m)
                load_fragment<Element, typename Traits::QueryTile>(query[step][m], left_operand(queries, warp_row(m)),
                                                                   step);
    }

    // The walk again, so that values which are not finite reach only the rows that see them.
    DEVICE_METHOD void attend_with_care() {
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) strays[m].clear();
#pragma unroll 1
        for (int walk = 0; walk < 2; ++walk) {
            counting = walk == 0;
            ptx::barrier();  // everybody is done with the walk before
            attend();
        }
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) strays[m].add_to(out[m]);
    }

    // Nan or inf anywhere in this block's sums.
    DEVICE_METHOD bool is_suspicious() const {
        float probe = 0.f;
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) probe += out[m].times_zero();
        return ptx::barrier_any(probe != 0.f);
    }

    // ---- The end ----

    DEVICE_METHOD void store() {
        float* lse_row = nullptr;
        if (params.at.lse)
            lse_row = params.at.lse + sequence.index * params.lse_batch + head * params.lse_head + sequence.first_row;
        const float sink =
            params.at.sinks ? ptx::load_global(params.at.sinks + head) * kLog2e : -ptx::infinity();
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
            softmax[m].finish(scale_log2_of<Traits::kEdits>(params.softmax_scale, params));
            float factor[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const Finish end = finish_row(softmax[m].row_max[half], softmax[m].row_sum[half], sink);
                factor[half] = end.factor;
                if (lse_row && ptx::lane() % 4 == 0 && rows(m).exists[half])
                    ptx::store_global(lse_row + rows(m).token[half], end.lse);
            }
            out[m].scale_rows(factor);
        }
        Element* to =
            start_of<Element>(params.at.out, params.out, sequence.index, head, sequence.first_row + first_row);
        if constexpr (kPlanes == 1)
            store_by_way_of_shared_memory(to);
        else
            store_from_registers(to);
    }

    // Through the rows of the query tile that only this warp reads, so that 16 bytes go out together.
    DEVICE_METHOD void store_by_way_of_shared_memory(Element* to) {
        const typename Traits::OutTile tile{queries.base};
        ptx::warp_barrier();  // all lanes have their queries
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int block = 0; block < Traits::kHeadDimV / 8; ++block) {
                    const float(&pair)[4] = out[m].value[block];
                    ptx::store_shared(
                        tile.address(warp_row(m) + Accumulator<16>::row(half), block) + ptx::lane() % 4 * 4,
                        ptx::pack<Element>(pair[2 * half], pair[2 * half + 1]));
                }
        ptx::warp_barrier();
        constexpr int kChunks = Traits::kHeadDimV / 8;
#pragma unroll 4
        for (int i = ptx::lane(); i < 16 * kRowTiles * kChunks; i += 32) {
            const int row = warp_row(0) + i / kChunks, chunk = i % kChunks;
            if (row < num_rows() && 8 * chunk < params.head_dim_v) {
                uint32 eight[4];
                ptx::load_shared(eight, tile.address(row, chunk));
                ptx::store_global(static_cast<void*>(to + row * params.out.row + 8 * chunk), eight);
            }
        }
    }

    DEVICE_METHOD void store_from_registers(Element* to) {
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
            for (int block = 0; block < Traits::kHeadDimV / 8; ++block)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int row = warp_row(m) + Accumulator<16>::row(i / 2);
                    const int column = Accumulator<16>::first_column() + Accumulator<16>::column(block, i);
                    if (row < num_rows() && column < params.head_dim_v)
                        ptx::store_global(to + row * params.out.row + column,
                                          static_cast<Element>(out[m].value[block][i]));
                }
    }
};

// Once more from the queries in shared memory on; apart, since it is rarely run.
template <typename Traits>
DEVICE_APART void flash_with_care(const Params& params, const FlashItem& item) {
    FlashBlock<Traits, true> block(params, item);
    block.attend_with_care();
    block.look_at(*ptx::disguised(item));
    block.store();
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kLeastBlocks) flash_forward(const __grid_constant__ Params params) {
    const Tiling tiling = tiling_of(params.at.cu_seqlens_q, params.total_q, sequences_of_rows(params), params.seqlen_q,
                                    Traits::kBlockQ);
    const Place place = place_of(ptx::block_x(), params.num_heads, tiling);
    const Sequence sequence = sequence_at(place.sequence, params);
    // Under a causal mask the last rows see the most keys: they start first, and short blocks fill the end.
    int tile = params.right == kOpen ? place.tile : place.tiles - 1 - place.tile;
    ptx::disguise(tile);  // or where it came from would be kept, too
    if (sequence.index == params.batch)
        return wipe<typename Traits::Element>(params, sequence, {place.owner, place.owner + 1}, place.tile, place.tiles);
    if (tile * Traits::kBlockQ >= sequence.band.seqlen_q) return;
    const FlashItem item{sequence, tile, place.owner};
    FlashBlock<Traits, false> block(params, item);
    block.load_queries();
    ptx::commit_copies();
    block.attend();
    ptx::wait_copies<0>();  // where no key is seen the queries may still be on their way
    if (block.is_suspicious()) {
        flash_with_care<Traits>(params, item);
    } else {
        block.look_at(*ptx::disguised(item));  // so that little of it is kept through the walk
        block.store();
    }
}

}  // namespace cupyattn
