// hopper.cu's end: which rows a warpgroup that computes has, what they have come to, and how that gets into memory.
#pragma once

#include "algorithm/hopper.cuh"
#include "algorithm/scores.cuh"
#include "algorithm/softmax.cuh"

namespace cupyattn {

// One warpgroup's rows, tile after tile.
template <typename Traits>
struct HopperResult {
    using Element = typename Traits::Element;
    using Out = typename Traits::Out;
    static constexpr int kShift = Traits::kFloat8 ? kFloat8Shift : 0;  // weights are that many powers of two larger
    static constexpr float kShrinkBack = 1.f / (1 << kShift);

    const HopperParams& given;
    const DescaledParams& params;
    const HopperMemory<Traits> memory;
    const int consumer;  // among the consuming warpgroups
    RowTile tile;
    int use, tile_use, inspected;  // how often the rings were used
    Accumulator<Traits::kHeadDimV> out;
    OnlineSoftmax softmax;
    uint32 strays;  // not 0: some values were made 0 that may be seen
    float descaled;  // the softmax scale of float8 operands

    DEVICE_METHOD HopperResult(const HopperParams& given_, const HopperMemory<Traits>& memory_, int consumer_)
        : given(given_), params(given_.params), memory(memory_), consumer(consumer_), use(0), tile_use(0), inspected(0) {}

    DEVICE_METHOD float scale() const { return Traits::kFloat8 ? descaled : params.softmax_scale; }

    // This lane's two rows: 16 rows of a warp, 64 of a warpgroup.
    DEVICE_METHOD int row(int half) const { return 64 * consumer + 16 * (ptx::warp() % 4) + Accumulator<16>::row(half); }
    DEVICE_METHOD int num_rows() const { return given.tokens_per_tile * given.heads_per_unit; }
    DEVICE_METHOD int token_of(int row) const {
        return tile.first_token + (Traits::kPacked ? row / given.heads_per_unit : row);
    }
    DEVICE_METHOD int head_of(int row) const { return tile.head + (Traits::kPacked ? row % given.heads_per_unit : 0); }
    DEVICE_METHOD bool exists(int row) const { return row < num_rows() && token_of(row) < tile.sequence.band.seqlen_q; }
    // In float8 two rows do without what they could share, or ptxas spills it.
    DEVICE_METHOD Rows<!Traits::kPacked && !Traits::kFloat8> rows() const {
        const int a = row(0), b = row(1);
        return {{{token_of(a), token_of(b)}, {head_of(a), head_of(b)}, {exists(a), exists(b)}}};
    }

    DEVICE_METHOD void store() {
        softmax.finish(scale_log2_of<Traits::kEdits>(scale(), params));
        if constexpr (Traits::kSplit) {
            tell(2 * tile.num_splits + (strays != 0));
            if (tile.num_splits > 1) {
                leave_partial();
                memory.query_ring().leave(tile_use, ptx::lane());
                return;
            }
        }
        int first = row(0);
        ptx::disguise(first);  // so that rows are not kept in registers through the walk, where there are none to spare
        float factor[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if constexpr (kShift != 0) softmax.row_sum[half] *= kShrinkBack;
            const int its_row = first + 8 * half, head = head_of(its_row), token = token_of(its_row);
            const Finish end = finish_row(softmax.row_max[half], softmax.row_sum[half], sink_of(head));
            factor[half] = end.factor;
            if constexpr (Traits::kFloat8)
                factor[half] *= kShrinkBack * descale_of_values(params, tile.sequence.index, tile.head);
            if (params.at.lse && ptx::lane() % 4 == 0 && exists(its_row)) store_lse(head, token, end.lse);
        }
        out.scale_rows(factor);
        // Not of rows that do not exist: where they are, queries of others lie, or what was staged there.
        ptx::disguise(first);
        const bool upper = strays || (exists(first) && out.template times_zero<0, 1>() != 0.f);
        const bool lower = strays || (exists(first + 8) && out.template times_zero<2, 3>() != 0.f);
        const uint32 suspicious = (upper ? kUpper : 0u) | (lower ? kLower : 0u);
#pragma unroll
        for (int index = 0; index < Traits::kOutParts; ++index) store_part(index, suspicious);
        memory.query_ring().leave(tile_use, ptx::lane());
    }

    // A lane's two rows.
    static constexpr uint32 kUpper = 1u, kLower = 2u;

    // Some columns, by way of the queries' place, of which a warp reads and writes its own 16 rows; those of this lane's
    // that are `suspicious` are looked at once more.
    DEVICE_METHOD void store_part(int part, uint32 suspicious) {
        constexpr int kCols = Traits::OutTile::kCols;
        const auto staged = memory.out(tile_use);
        const int first = 64 * consumer + 16 * (ptx::warp() % 4);
#pragma unroll
        for (int step = 0; step < kCols / 16; ++step) {
            const int block = part * (kCols / 8) + 2 * step;
            const float(&left)[4] = out.value[block], (&right)[4] = out.value[block + 1];
            ptx::store_matrices(staged.address(first + ptx::lane() % 16, 2 * step + ptx::lane() / 16),
                                ptx::pack<Out>(left[0], left[1]), ptx::pack<Out>(left[2], left[3]),
                                ptx::pack<Out>(right[0], right[1]), ptx::pack<Out>(right[2], right[3]));
        }
        if (ptx::any(suspicious)) mend(staged, first, part * kCols, suspicious);
        if constexpr (Traits::kStoresBoxes) {
            ptx::fence_async_proxy();
            ptx::warp_barrier();
            if (ptx::lane() == 0) {
#pragma unroll
                for (int slab = 0; slab < Traits::OutTile::kSlabs; ++slab)
                    ptx::store_box(given.out, staged.address(first, 0) + slab * Traits::OutTile::kSlab,
                                   part * kCols + slab * Traits::OutTile::kSlabCols, 0, token_of(first),
                                   tile.head / given.heads_per_unit, tile.sequence.index);
                ptx::commit_stores();
                ptx::wait_stores_read<0>();
            }
        } else {
            ptx::warp_barrier();
            constexpr int kChunks = kCols / 8;
#pragma unroll 1
            for (int i = ptx::lane(); i < 16 * kChunks; i += 32) {
                const int its_row = first + i / kChunks, column = part * kCols + i % kChunks * 8;
                if (exists(its_row) && column < params.head_dim_v) {
                    uint32 eight[4];
                    ptx::load_shared(eight, staged.address(its_row, i % kChunks));
                    ptx::store_global(static_cast<void*>(out_row(head_of(its_row), token_of(its_row)) + column), eight);
                }
            }
            ptx::fence_async_proxy();  // before TMA puts the next queries here
        }
        ptx::warp_barrier();
    }

    // ---- What merge.cu gets of a split ----

    // Where a split's are among those of all: by tiles of the longest sequence, of heads (or groups), of sequences.
    DEVICE_METHOD int64 place() const {
        const int units = params.num_heads / given.heads_per_unit;
        const int64 unit = int64(tile.sequence.index) * units + tile.head / given.heads_per_unit;
        const int tiles = ceil_div(params.seqlen_q, given.tokens_per_tile);
        return (unit * tiles + tile.first_token / given.tokens_per_tile) * params.num_splits + tile.split;
    }
    DEVICE_METHOD void tell(int what) const {
        if (ptx::thread() == 128) ptx::store_global(params.at.told + place(), what);
    }
    DEVICE_METHOD void leave_partial() const {
        constexpr int kWidth = Traits::kHeadDimV;
        const int64 first = place() * Traits::kBlockQ;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (!exists(row(half))) continue;
            if (ptx::lane() % 4 == 0) {
                const float sums[2] = {softmax.row_max[half], softmax.row_sum[half] * kShrinkBack};
                store_two(params.at.partial_lse + (first + row(half)) * 2, sums);
            }
            float* its_row = params.at.partial_out + (first + row(half)) * kWidth + Accumulator<16>::first_column();
#pragma unroll
            for (int block = 0; block < kWidth / 8; ++block) {
                const float(&four)[4] = out.value[block];
                const float two[2] = {four[2 * half] * kShrinkBack, four[2 * half + 1] * kShrinkBack};
                store_two(its_row + Accumulator<16>::column(block, 0), two);
            }
        }
    }
    DEVICE_METHOD static void store_two(float* to, const float (&two)[2]) {
        const uint32 bits[2] = {ptx::bits(two[0]), ptx::bits(two[1])};
        ptx::store_global(static_cast<void*>(to), bits);
    }

    DEVICE_METHOD float sink_of(int head) const {
        return params.at.sinks ? ptx::load_global(params.at.sinks + head) * kLog2e : -ptx::infinity();
    }
    DEVICE_METHOD Out* out_row(int head, int token) const {
        return static_cast<Out*>(params.at.out) + tile.sequence.index * params.out.batch +
               (tile.sequence.first_row + token) * params.out.row + head * params.out.head;
    }
    DEVICE_METHOD void store_lse(int head, int token, float lse) const {
        ptx::store_global(params.at.lse + tile.sequence.index * params.lse_batch + head * params.lse_head +
                              tile.sequence.first_row + token,
                          lse);
    }

    // Rows that see no key, and those behind the last sequence: out = 0, lse = -inf or that of the sink alone.
    DEVICE_METHOD void store_nothing() const {
        if constexpr (Traits::kSplit)
            if (tile.first_token < tile.sequence.band.seqlen_q && tile.sequence.index < params.batch) tell(2);
        const int end = tile.sequence.band.seqlen_q, threads = 128 * Traits::kConsumers;
        // Behind the last sequence there may be more rows than a sequence's tiles have.
        const int step = tile.sequence.index == params.batch ? tile.tiles * given.tokens_per_tile : end;
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

    DEVICE_METHOD const Element* value_row(const Element* values, int key) const {
        if constexpr (!Traits::kPaged) return values + key * params.v.row;
        const int place = static_cast<int>(tile.sequence.first_key) + key;
        return row_in_pages(values, params.v, place, tile.sequence, params);
    }

    // Puts inf and nan where suspicious rows of this warp see values that are not finite: two lanes to a row, a pair of
    // columns after the other through all keys, which is slow, and needed by no good data.
    DEVICE_METHOD void mend(const typename Traits::OutTile& staged, int first, int first_column, uint32 suspicious) const {
        ptx::warp_barrier();
        const int its_row = first + ptx::lane() / 2, from = ptx::lane() / 2 % 8 * 4;
        const uint32 upper = ptx::shuffle(ptx::bits(softmax.row_sum[0]), from);
        const uint32 lower = ptx::shuffle(ptx::bits(softmax.row_sum[1]), from);
        const float row_sum = ptx::from_bits(ptx::lane() < 16 ? upper : lower);
        uint32 seen = 0;  // by the four lanes that have the row's sums
        for (int lane = from; lane < from + 4; ++lane) seen |= ptx::shuffle(suspicious, lane);
        if (!exists(its_row) || !(seen & (ptx::lane() < 16 ? kUpper : kLower))) return;
        if (row_sum * 0.f != 0.f) return;  // a score that is nan makes the whole row nan
        const Span keys = tile.sequence.band.visible_keys(token_of(its_row));
        const Element* values = static_cast<const Element*>(params.at.v) + tile.head / params.queries_per_v * params.v.head;
        if constexpr (!Traits::kPaged)
            values += tile.sequence.place * params.v.batch + tile.sequence.first_key * params.v.row;
#pragma unroll 1
        for (int pair = ptx::lane() % 2; 2 * pair < smaller(Traits::OutTile::kCols, params.head_dim_v - first_column);
             pair += 2) {
            float sum[2] = {0.f, 0.f};
#pragma unroll 1
            for (int key = keys.start; key < keys.stop; ++key) {
                const Element* its_row = value_row(values, key);
                if (!its_row) continue;
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const float value = ptx::widen(ptx::load_global(its_row + first_column + 2 * pair + i));
                    if (value * 0.f != 0.f) sum[i] += value;
                }
            }
            const uint32 place = staged.address(its_row, pair / 4) + pair % 4 * 4;
            uint32 bits = ptx::load_shared(place);
            if (sum[0] != 0.f) bits = (bits & 0xffff0000u) | (ptx::pack<Out>(sum[0], 0.f) & 0xffffu);
            if (sum[1] != 0.f) bits = (bits & 0xffffu) | (ptx::pack<Out>(0.f, sum[1]) & 0xffff0000u);
            ptx::store_shared(place, bits);
        }
    }
};

}  // namespace cupyattn
