// merge.cu: what the splits of a row have come to, into its result.
//
// A kernel that shares out keys among thread blocks leaves for each split of a piece (rows that share keys, as many as a block has)
//
//     partial_out [piece, split, block_q, columns], not yet divided; partial_lse [piece, split, block_q, 2]: the
//     exponent of two they are relative to, and the sum of weights; told [piece, split]: twice the number of splits that
//     the piece has, and one more if values that are not finite were taken for 0.
//
// Where pieces are cut by shares of thread blocks (kByShares) nobody is told, for it follows from the schedule, and there
// are two places for each thread block, see schedule.cuh.  Rows of a piece that has one split are done already.  A warp has
// a row; or, with kTogether, all warps of a block have one, and every fourth split each, so that few rows of many splits
// wait for memory a quarter as often.  Either way splits are added up always in the same order.  Where a row sees values
// that are not finite they are looked for, one by one, in all of its keys.
//
// Twin     numpy_ref.merge.
// Needs    sm_80.
// Launch   behind the kernel that leaves all that, on its stream; blocks of kThreads threads, a warp or a block to a row,
//          for rows_per_piece rows of pieces_per_unit pieces of each unit of each sequence; kShared bytes.

#include "algorithm/descales.cuh"
#include "algorithm/pages.cuh"
#include "algorithm/schedule.cuh"
#include "algorithm/softmax.cuh"
#include "tiles/numbers.cuh"

namespace cupyattn {

template <typename Element_, int kChunks_, bool kTogether_>
struct MergeTraits {
    using Element = Element_;
    static constexpr bool kFloat8 = Same<Element, Float8>::value;
    using Out = typename Choice<kFloat8, BFloat16, Element>::Type;
    static constexpr int kChunks = kChunks_;  // of 128 columns, four for each lane
    static constexpr bool kTogether = kTogether_;
    static constexpr int kNumWarps = 4, kThreads = 32 * kNumWarps;
    static constexpr uint32 kStateBytes = 512 * kChunks + 16;  // a warp's columns, and the sum of their weights
    static constexpr uint32 kShared = kTogether ? (kNumWarps - 1) * kStateBytes : 0;
};

// A row, and this lane's columns of it.
template <typename Traits>
struct MergedRow {
    using Element = typename Traits::Element;
    using Out = typename Traits::Out;
    static constexpr int kChunks = Traits::kChunks;
    static constexpr bool kTogether = Traits::kTogether;

    const MergeParams& params;
    Sequence sequence;
    int64 piece;
    int row;  // of the piece
    int token, head;
    int splits, owner;  // of the piece; the thread block that has the first one, where they are cut by shares
    float exponent, sum, column[kChunks][4];

    DEVICE_METHOD MergedRow(const MergeParams& given, uint32 index) : params(given) {
        const uint32 pieces = given.pieces_per_unit, units = given.num_heads / given.heads_per_unit;
        const uint32 place = index / given.rows_per_piece;
        piece = place;
        row = index - place * given.rows_per_piece;
        sequence = sequence_at(place / pieces / units, given);
        const int packed_row = place % pieces * given.rows_per_piece + row;
        token = packed_row / given.heads_per_unit;
        head = place / pieces % units * given.heads_per_unit + packed_row % given.heads_per_unit;
    }
    DEVICE_METHOD bool exists() const { return token < sequence.band.seqlen_q; }

    // Before anything is read of a split.
    DEVICE_METHOD void find_splits() {
        if (!params.at.schedule || params.split_size != kByShares) {
            splits = smaller(told(0) >> 1, params.num_splits);  // under a schedule of other sizes nobody may have told
            return;
        }
        const Schedule schedule(params);
        const int units = params.num_heads / params.heads_per_unit, index = sequence.index;
        const int tiles = row_tiles_of(sequence.band.seqlen_q, params.heads_per_unit, params.block_q);
        const int64 step = schedule.step_of(index, tiles * units);
        const int place = head / params.heads_per_unit * tiles + static_cast<int>(static_cast<uint32>(piece) % params.pieces_per_unit);
        const LinePiece its = schedule.piece_of(schedule.start_of(index), step, place);
        owner = schedule.owner_of(its.start);
        splits = schedule.owner_of(its.start + larger(its.length, 1) - 1) - owner + 1;
    }
    DEVICE_METHOD int64 place_of(int split) const {
        if (params.at.schedule && params.split_size == kByShares) return 2 * (owner + split) + (split == 0);
        return piece * params.num_splits + split;
    }
    DEVICE_METHOD bool strays_in(int split) const { return params.mends && told(split) & 1; }
    DEVICE_METHOD int told(int split) const { return ptx::load_global(params.at.told + place_of(split)); }
    DEVICE_METHOD const float* sums_of(int split) const {
        return params.at.partial_lse + (place_of(split) * params.block_q + row) * 2;
    }
    DEVICE_METHOD static int first_column(int chunk) { return 128 * chunk + 4 * ptx::lane(); }
    DEVICE_METHOD bool has(int chunk) const { return first_column(chunk) < params.head_dim_v; }

    // This warp's splits, the largest exponent of all first.  What is not finite counts however little it weighs.
    DEVICE_METHOD void merge() {
        exponent = -ptx::infinity(), sum = 0.f;
        for (int split = ptx::lane(); split < splits; split += 32)
            exponent = ptx::max(exponent, ptx::load_global(sums_of(split)));
#pragma unroll
        for (int step = 16; step > 0; step /= 2) exponent = ptx::max(exponent, ptx::shuffle_xor(exponent, step));
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk)
#pragma unroll
            for (int i = 0; i < 4; ++i) column[chunk][i] = 0.f;
        const float origin = exponent == -ptx::infinity() ? 0.f : exponent;
#pragma unroll 4
        for (int split = kTogether ? ptx::warp() : 0; split < splits; split += kTogether ? Traits::kNumWarps : 1) {
            const float share = ptx::exp2(ptx::load_global(sums_of(split)) - origin);
            sum += share * ptx::load_global(sums_of(split) + 1);
            const float* out = params.at.partial_out + (place_of(split) * params.block_q + row) * params.columns;
#pragma unroll
            for (int chunk = 0; chunk < kChunks; ++chunk) {
                if (!has(chunk)) continue;
                uint32 four[4];
                ptx::load_global(four, out + first_column(chunk));
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float x = ptx::from_bits(four[i]);
                    column[chunk][i] = ptx::fma(x - x == 0.f ? share : 1.f, x, column[chunk][i]);
                }
            }
        }
    }

    // Gives the first warp what the others have, one after the other.
    DEVICE_METHOD void join() {
        const int warp = ptx::warp();
        if (warp > 0) {
#pragma unroll
            for (int chunk = 0; chunk < kChunks; ++chunk) {
                const float(&four)[4] = column[chunk];
                ptx::store_shared(state_of(warp, chunk), ptx::bits(four[0]), ptx::bits(four[1]), ptx::bits(four[2]),
                                  ptx::bits(four[3]));
            }
            if (ptx::lane() == 0) ptx::store_shared(sum_of(warp), sum);
        }
        ptx::barrier();
        if (warp > 0) return;
#pragma unroll
        for (int other = 1; other < Traits::kNumWarps; ++other) {
            sum += ptx::load_shared_float(sum_of(other));
#pragma unroll
            for (int chunk = 0; chunk < kChunks; ++chunk) {
                uint32 four[4];
                ptx::load_shared(four, state_of(other, chunk));
#pragma unroll
                for (int i = 0; i < 4; ++i) column[chunk][i] += ptx::from_bits(four[i]);
            }
        }
    }
    DEVICE_METHOD static uint32 state_of(int warp, int chunk) {
        return ptx::shared_memory() + (warp - 1) * Traits::kStateBytes + 512 * chunk + 16 * ptx::lane();
    }
    DEVICE_METHOD static uint32 sum_of(int warp) {
        return ptx::shared_memory() + warp * Traits::kStateBytes - 16;
    }

    DEVICE_METHOD void store(bool strays) {
        const float sink = params.at.sinks ? ptx::load_global(params.at.sinks + head) * kLog2e : -ptx::infinity();
        const Finish end = finish_row(exponent, sum, sink);
        float factor = end.factor, probe = 0.f;
        if constexpr (Traits::kFloat8) factor *= params.of_columns * descale_of_values(params, sequence.index, head);
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                column[chunk][i] *= factor;
                probe += column[chunk][i] * 0.f;
            }
        // A score that is nan makes the whole row nan.
        if (params.mends && ptx::any(strays || probe != 0.f) && sum * 0.f == 0.f) mend();
        Out* to = static_cast<Out*>(params.at.out) + sequence.index * params.out.batch +
                  (sequence.first_row + token) * params.out.row + head * params.out.head;
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk)
            if (has(chunk)) store_four(to + first_column(chunk), column[chunk]);
        if (params.at.lse && ptx::lane() == 0)
            ptx::store_global(params.at.lse + sequence.index * params.lse_batch + head * params.lse_head +
                                  sequence.first_row + token,
                              end.lse);
    }
    // At once, unless the caller's memory begins anywhere.
    DEVICE_METHOD static void store_four(Out* to, const float (&x)[4]) {
        const bool aligned = reinterpret_cast<uint64>(to) % (4 * sizeof(Out)) == 0;
        if constexpr (sizeof(Out) == 2) {
            const uint32 bits[2] = {ptx::pack<Out>(x[0], x[1]), ptx::pack<Out>(x[2], x[3])};
            if (aligned) return ptx::store_global(static_cast<void*>(to), bits);
        } else {
            const uint32 bits[4] = {ptx::bits(x[0]), ptx::bits(x[1]), ptx::bits(x[2]), ptx::bits(x[3])};
            if (aligned) return ptx::store_global(static_cast<void*>(to), bits);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) store_rounded(to + i, x[i]);
    }

    // Puts inf and nan where the row sees values that are not finite, which is slow, and needed by no good data.
    DEVICE_METHOD void mend() {
        const Span keys = sequence.band.visible_keys(token);
        const Element* values = static_cast<const Element*>(params.at.v) + head / params.queries_per_v * params.v.head;
        if (!params.at.block_table) values += sequence.place * params.v.batch + sequence.first_key * params.v.row;
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk) {
            if (!has(chunk)) continue;
            float found[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 1
            for (int key = keys.start; key < keys.stop; ++key) {
                const Element* its_row = value_row(values, key);
                if (!its_row) continue;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float value = number_of(ptx::load_global(its_row + first_column(chunk) + i));
                    if (value * 0.f != 0.f) found[i] += value;
                }
            }
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (found[i] != 0.f) column[chunk][i] = found[i];
        }
    }
    DEVICE_METHOD const Element* value_row(const Element* values, int key) const {
        if (!params.at.block_table) return values + key * params.v.row;
        return row_in_pages(values, params.v, static_cast<int>(sequence.first_key) + key, sequence, params);
    }
};

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads) merge_splits(const __grid_constant__ MergeParams params) {
    const uint32 block = ptx::block_x();
    const uint32 index = Traits::kTogether ? block : block * Traits::kNumWarps + ptx::warp();
    const uint32 units = params.num_heads / params.heads_per_unit;
    if (index >= params.batch * units * params.pieces_per_unit * params.rows_per_piece) return;
    MergedRow<Traits> row(params, index);
    if (!row.exists()) return;
    row.find_splits();
    if (row.splits <= 1) return;
    row.merge();
    if constexpr (Traits::kTogether) {
        row.join();
        if (ptx::warp() > 0) return;
    }
    bool strays = false;
    for (int split = ptx::lane(); split < row.splits; split += 32) strays |= row.strays_in(split);
    row.store(strays);
}

}  // namespace cupyattn
