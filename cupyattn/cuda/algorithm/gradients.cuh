// What the gradients of a tile of queries and keys have in common, whoever of the two stays and whoever moves by.
#pragma once

#include "algorithm/dropout.cuh"
#include "algorithm/gradients_tiling.cuh"
#include "algorithm/softmax.cuh"
#include "algorithm/traits.cuh"
#include "tiles/strays.cuh"

namespace cupyattn {

// One block's work: rows of one tile stay in shared memory, and those of the other side pass by, tile after tile.
//
//     kOfQueries        queries stay, keys move:    dq += dS k
//     kOfKeys           keys stay, queries move:    dk += dS^T q       (kTurned: scores have a row for each key)
//     kOfValues         the same:                   dv += P^T dout
//     kOfBias           queries stay, keys move:    dbias += dS
//
// with P = exp(scores - lse), dP = dout v^T and dS = P (dP - delta).  Side a is q and k, side b is dout and v.
//
// With kCare the walk that keeps apart what is not finite, see strays.cuh: of q and k nothing is lost by zeros, since
// where a pair is seen its dS is nan already; of dout the strays are counted.  A softcap makes a score of infinity
// finite, and its dS 0: there strays of q and k are counted, too, and each is nan, as 0 * infinity is.
template <typename Traits, bool kCare>
struct BackwardBlock {
    using Element = typename Traits::Element;
    static constexpr bool kTurned = Traits::kTurned;
    static constexpr int kWanted = Traits::kWanted, kEdits = Traits::kEdits;
    static constexpr int kRowTiles = Traits::kRowTiles, kMoves = Traits::kMoves, kThreads = Traits::kThreads;
    static constexpr bool kSumsA = Traits::kSumsA, kSumsB = Traits::kSumsB, kNeedsChanges = Traits::kNeedsChanges;
    static constexpr bool kChoosy = kCare || kWanted == kOfBias;  // elsewhere 0 times what is not finite calls for care
    static constexpr bool kCountsA = kCare && kSumsA && bool(kEdits & kSoftcap), kCountsB = kCare && kSumsB;

    const BackwardParams& params;
    Sequence sequence;
    int head;
    int first;  // of the rows that stay, within the sequence
    typename Traits::StayingA stays_a;
    typename Traits::StayingB stays_b;
    typename Traits::MovingA moves_a;  // stage 0
    typename Traits::MovingB moves_b;  // stage 0
    uint32 column_facts;               // stage 0: lse and delta of moving queries
    float row_lse[kRowTiles][2], row_delta[kRowTiles][2];      // of staying ones, lse as an exponent of two
    Accumulator<kSumsA ? Traits::kHeadDim : 8> sums_a[kRowTiles];   // dq or dk
    Accumulator<kSumsB ? Traits::kHeadDimV : 8> sums_b[kRowTiles];  // dv
    Accumulator<kWanted == kOfBias ? kMoves : 8> changes[kRowTiles];  // dS
    float slope_part;  // of the gradient of the head's ALiBi slope
    bool counting;     // strays, if kCare
    Strays<kSumsB ? Traits::kHeadDimV : 32> strays[kRowTiles];

    DEVICE_METHOD BackwardBlock(const BackwardParams& given, const Sequence& sequence_) : params(given), sequence(sequence_) {
        const uint32 memory = ptx::shared_memory();
        stays_a.base = memory;
        stays_b.base = memory + Traits::StayingA::kBytes;
        moves_a.base = memory + Traits::kStayingBytes;
        moves_b.base = moves_a.base + Traits::MovingA::kBytes;
        column_facts = moves_b.base + Traits::MovingB::kBytes;
        counting = false;
        clear_a(), clear_b();
    }
    DEVICE_METHOD void clear_a() {
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) sums_a[m].clear();
        slope_part = 0.f;
    }
    DEVICE_METHOD void clear_b() {
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) sums_b[m].clear(), strays[m].clear();
    }

    // ---- Places ----

    DEVICE_METHOD static int warp_row(int m) { return (ptx::warp() * kRowTiles + m) * 16; }
    DEVICE_METHOD int row(int m, int half) const { return first + warp_row(m) + Accumulator<16>::row(half); }
    DEVICE_METHOD int num_staying() const {
        return smaller(Traits::kStays, (kTurned ? sequence.band.seqlen_k : sequence.band.seqlen_q) - first);
    }
    DEVICE_METHOD bool exists(int m, int half) const { return row(m, half) - first < num_staying(); }
    DEVICE_METHOD int64 lse_row() const {
        return sequence.index * params.lse_batch + head * params.lse_head + sequence.first_row;
    }
    // A block's own tile among the stages, which take turns.
    template <typename Tile>
    DEVICE_METHOD static Tile stage(const Tile& tile, int turn) {
        return {tile.base + stage_offset(turn)};
    }
    DEVICE_METHOD static uint32 stage_offset(int turn) {
        return Traits::kNumStages == 2 && turn % 2 ? Traits::kStageBytes : 0;
    }

    // ---- Loads ----

    static constexpr int kOfLoads = 8;  // registers: with more of float32 under way, sums would be spilled

    // This thread's number, from which its places in a tile are found anew for each: sums leave no registers to keep them.
    DEVICE_METHOD static int thread_anew() {
        int thread = ptx::thread();
        ptx::disguise(thread);
        return thread;
    }

    template <typename Tile>
    DEVICE_METHOD void load_queries(const Tile& tile, const void* data, const Strides& strides, int token, int num_cols) const {
        const Element* from = static_cast<const Element*>(data) + sequence.index * strides.batch + head * strides.head +
                              (sequence.first_row + token) * strides.row;
        load_rows<kThreads, Traits::kAligned, kOfLoads>(tile, thread_anew(), sequence.band.seqlen_q - token, num_cols,
                                                        from, strides.row);
    }
    template <typename Tile>
    DEVICE_METHOD void load_keys(const Tile& tile, const void* data, const Strides& strides, int its_head, int key,
                                 int num_cols) const {
        const Element* from = static_cast<const Element*>(data) + sequence.place * strides.batch +
                              its_head * strides.head + (sequence.first_key + key) * strides.row;
        load_rows<kThreads, Traits::kAligned, kOfLoads>(tile, thread_anew(), sequence.band.seqlen_k - key, num_cols,
                                                        from, strides.row);
    }
    template <typename TileA, typename TileB>
    DEVICE_METHOD void load_queries(const TileA& a, const TileB& b, int token) const {
        load_queries(a, params.at.q, params.q, token, params.head_dim);
        load_queries(b, params.grad.dout, params.grad.of_dout, token, params.head_dim_v);
    }
    template <typename TileA, typename TileB>
    DEVICE_METHOD void load_keys(const TileA& a, const TileB& b, int key) const {
        load_keys(a, params.at.k, params.k, head / params.queries_per_k, key, params.head_dim);
        load_keys(b, params.at.v, params.v, head / params.queries_per_v, key, params.head_dim_v);
    }
    DEVICE_METHOD void load_staying() {
        if constexpr (kTurned) {
            load_keys(stays_a, stays_b, first);
        } else {
            load_queries(stays_a, stays_b, first);
#pragma unroll
            for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int64 place = lse_row() + row(m, half);
                    row_lse[m][half] = exists(m, half) ? ptx::load_global(params.grad.lse_log2 + place) : ptx::infinity();
                    row_delta[m][half] = exists(m, half) ? ptx::load_global(params.grad.delta + place) : 0.f;
                }
        }
    }
    DEVICE_METHOD void load_moving(int block, int turn) const {
        const int begin = block * kMoves;
        if constexpr (kTurned) {
            load_column_facts(begin, turn);
            load_queries(stage(moves_a, turn), stage(moves_b, turn), begin);
        } else {
            load_keys(stage(moves_a, turn), stage(moves_b, turn), begin);
        }
    }
    // Of two neighbours together, as a lane will ask for them: their lse, then their delta.  They come as tiles do: a warp
    // that waited for them would be waited for by all others.
    DEVICE_METHOD void load_column_facts(int begin, int turn) const {
        static_assert(2 * kMoves <= kThreads, "a thread has a number, or none");
        const int number = ptx::thread(), token = begin + number / 4 * 2 + number % 2;
        if (number >= 2 * kMoves) return;
        const bool is_lse = number % 4 < 2;
        const uint32 to = column_facts + stage_offset(turn) + 4 * number;
        const float* from = is_lse ? params.grad.lse_log2 : params.grad.delta;
        if (token < sequence.band.seqlen_q)
            ptx::copy_word_async(to, from + lse_row() + token);
        else
            ptx::store_shared(to, is_lse ? ptx::infinity() : 0.f);
    }

    // ---- The algorithm ----

    // All that moves by within `limits`, for one head; the sums hold what it adds.
    DEVICE_METHOD void walk(const Span& limits) {
        const Band& band = sequence.band;
        const int last = first + num_staying() - 1;
        Span touched = kTurned ? band.touching(first, last) : band.touched(first, last);
        const Span whole = kTurned ? band.seeing_all(first, last) : band.whole(first, last);
        touched = {larger(touched.start, limits.start), smaller(touched.stop, limits.stop)};
        const int stop = touched.empty() ? 0 : ceil_div(touched.stop, kMoves);
        int block = touched.empty() ? 0 : touched.start / kMoves;
        if (block < stop) load_moving(block, 0);
        ptx::commit_copies();
#pragma unroll 1
        for (int turn = 0; block < stop; ++block, ++turn) {
            ptx::wait_copies<0>();
            ptx::barrier();  // the tiles are here, and everybody is done with those before them
            if constexpr (Traits::kNumStages == 2) {
                if (block + 1 < stop) load_moving(block + 1, turn + 1);
                ptx::commit_copies();
            }
            const bool inside = num_staying() == Traits::kStays && whole.start <= block * kMoves &&
                                (block + 1) * kMoves <= whole.stop;
            if (!kCare && inside)
                absorb<false>(block, turn);
            else
                absorb<true>(block, turn);
            if constexpr (Traits::kNumStages == 1) {
                ptx::barrier();  // everybody is done with the tiles
                if (block + 1 < stop) load_moving(block + 1, turn + 1);
                ptx::commit_copies();
            }
        }
        ptx::wait_copies<0>();
        ptx::barrier();  // nothing is under way, and everybody is done
    }

    template <bool kBand>
    DEVICE_METHOD void absorb(int block, int turn) {
        const auto tile_a = stage(moves_a, turn);
        const auto tile_b = stage(moves_b, turn);
        Accumulator<kMoves> scores[kRowTiles], dscores[kRowTiles];
        multiply_rows<Element>(scores, stays_a, tile_a, warp_row);
        if constexpr (kNeedsChanges) multiply_rows<Element>(dscores, stays_b, tile_b, warp_row);
        Fragment<Element, kMoves> weights[kRowTiles], dweights[kRowTiles];
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
            weigh<kBand>(scores[m], dscores[m], m, block * kMoves, turn);
            if constexpr (kSumsB) weights[m].round_from(scores[m]);
            if constexpr (kSumsA) dweights[m].round_from(dscores[m]);
        }
        if constexpr (kCare && (kSumsA || kSumsB)) {
            ptx::barrier();  // everybody has the products with what is not finite
            if constexpr (kSumsA) take_strays<kThreads, Element>(tile_a, ptx::thread(), counting);
            if constexpr (kSumsB) take_strays<kThreads, Element>(tile_b, ptx::thread(), counting);
            ptx::barrier();
        }
        if constexpr (kSumsB) add_to_b(weights, right_operand_by_columns(tile_b));
        if constexpr (kSumsA) add_to_a(dweights, right_operand_by_columns(tile_a));
    }

    DEVICE_METHOD void add_to_a(const Fragment<Element, kMoves> (&dweights)[kRowTiles], uint32 tile) {
        if (!(kCare && counting)) return multiply_values<typename Traits::MovingA>(sums_a, dweights, tile);
        if constexpr (kCountsA) {
            Accumulator<Traits::kHeadDim> counts[kRowTiles];
#pragma unroll
            for (int m = 0; m < kRowTiles; ++m) counts[m].clear();
            multiply_values<typename Traits::MovingA>(counts, dweights, tile);
#pragma unroll
            for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
                for (int i = 0; i < Traits::kHeadDim / 2; ++i)
                    if (counts[m].value[i / 4][i % 4] != 0.f) sums_a[m].value[i / 4][i % 4] = ptx::nan();
        }
    }

    DEVICE_METHOD void add_to_b(const Fragment<Element, kMoves> (&weights)[kRowTiles], uint32 tile) {
        if (kCare && counting) {
            Accumulator<kSumsB ? Traits::kHeadDimV : 8> counts[kRowTiles];
#pragma unroll
            for (int m = 0; m < kRowTiles; ++m) counts[m].clear();
            multiply_values<typename Traits::MovingB>(counts, weights, tile);
#pragma unroll
            for (int m = 0; m < kRowTiles; ++m) strays[m].collect(counts[m]);
        } else {
            multiply_values<typename Traits::MovingB>(sums_b, weights, tile);
        }
    }

    // From the first of a lane's rows, and of its columns; of the second row eight columns behind.
    DEVICE_METHOD Apart apart_of(int m, int first_column) const {
        if constexpr (kTurned) return apart_at<kEdits>(first_column, row(m, 0), sequence, params).turned();
        return apart_at<kEdits>(row(m, 0), first_column, sequence, params);
    }

    // Products q k^T become weights, as dropout leaves them, and products dout v^T what a change of the product q k^T
    // comes to, the scale aside.  A pair that is not seen has 0 of both, whatever is there.
    template <bool kBand>
    DEVICE_METHOD void weigh(Accumulator<kMoves>& scores, Accumulator<kMoves>& dscores, int m, int begin, int turn) {
        const float scale_log2 = scale_log2_of_edited<kEdits>(params);
        const float alibi_slope = alibi_slope_of<kEdits>(head, sequence, params);
        const int first_column = begin + Accumulator<kMoves>::first_column();
        const Apart apart = apart_of(m, first_column);
        int start[2];
        uint32 count[2];  // of the columns that each row is seen by, or sees
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            Span seen{0, kTurned ? sequence.band.seqlen_q : sequence.band.seqlen_k};
            if constexpr (kBand)
                seen = kTurned ? sequence.band.seeing_rows(row(m, half)) : sequence.band.visible_keys(row(m, half));
            if (!exists(m, half)) seen.stop = 0;
            start[half] = seen.start - first_column, count[half] = larger(seen.stop - seen.start, 0);
        }
#pragma unroll
        for (int sixteen = 0; sixteen < kMoves / 16; ++sixteen) {
            float kept[2][4];
            keep(kept, m, begin + 16 * sixteen);
#pragma unroll
            for (int eight = 0; eight < 2; ++eight) {
                const int block = 2 * sixteen + eight;
                uint32 facts[4];
                if constexpr (kTurned)
                    ptx::load_shared(facts, column_facts + stage_offset(turn) + 64 * block + ptx::lane() % 4 * 16);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int half = i / 2, column = Accumulator<kMoves>::column(block, i);
                    const int token = kTurned ? first_column + column : row(m, half);
                    const int key = kTurned ? row(m, half) : first_column + column;
                    const float lse = kTurned ? ptx::from_bits(facts[i % 2]) : row_lse[m][half];
                    const float delta = kTurned ? ptx::from_bits(facts[2 + i % 2]) : row_delta[m][half];
                    bool hidden = (kBand || kEdits) && static_cast<uint32>(column - start[half]) >= count[half];
                    float x = scores.value[block][i], slope = 1.f;
                    const float distance = apart.at(column - 8 * half);
                    if constexpr (bool(kEdits & ~kDropout))
                        x = edited<kEdits>(x, token, head, key, alibi_slope, distance, sequence, params,
                                           params.softmax_scale, hidden, slope);
                    if constexpr (kChoosy) hidden = hidden || x == -ptx::infinity();
                    const float weight = hidden ? 0.f : ptx::exp2(ptx::fma(x, scale_log2, -lse));
                    const float factor = kEdits & kDropout ? kept[eight][i] : 1.f;
                    const float mark = kEdits & kDropout && factor == 0.f ? kCodes[2] : 1.f;  // see mark_seen
                    scores.value[block][i] = kCare && counting && !hidden ? mark : weight * factor;
                    if constexpr (kNeedsChanges) {
                        float change = weight * ptx::fma(factor, dscores.value[block][i], -delta);
                        if (kChoosy && hidden) change = 0.f;
                        if constexpr (kWanted == kOfBias) changes[m].value[block][i] += change;
                        if constexpr (kWanted == kOfQueries && bool(kEdits & kAlibi))
                            if (!(kCare && counting)) slope_part -= change * distance;
                        const float through = kCountsA && counting ? 1.f : change * slope;
                        dscores.value[block][i] = kEdits & kSoftcap && !(kChoosy && hidden) ? through : change;
                    }
                }
            }
        }
    }

    // What dropout multiplies sixteen columns by; see `drop`.  Four keys of a row share a call's words: where keys are
    // rows, a lane has two of them.
    DEVICE_METHOD void keep(float (&kept)[2][4], int m, int column) const {
        if constexpr (bool(kEdits & kDropout)) {
#pragma unroll
            for (int call = 0; call < (kTurned ? 4 : 2); ++call) {
                const int own = ptx::lane() / 4;  // row of the fragment, and eight behind it
                const int token = kTurned ? column + 8 * (call / 2) + Accumulator<16>::first_column() + call % 2 : row(m, call);
                const int sixteen = (kTurned ? first + warp_row(m) : column) / 16;
                const int lane = kTurned ? own / 2 : ptx::lane() % 4;
                uint32 word[4] = {static_cast<uint32>(sixteen * 4 + lane), static_cast<uint32>(token),
                                  static_cast<uint32>(head), static_cast<uint32>(sequence.index)};
                philox(word, params.at.dropout_seed);
#pragma unroll
                for (int i = 0; i < (kTurned ? 2 : 4); ++i) {
                    const uint32 its = !kTurned ? word[i] : own % 2 ? word[2 * i + 1] : word[2 * i];
                    const float factor = its >= params.dropout_threshold ? params.dropout_factor : 0.f;
                    if constexpr (kTurned)
                        kept[call / 2][2 * i + call % 2] = factor;
                    else
                        kept[i / 2][2 * call + i % 2] = factor;
                }
            }
        }
    }

    // ---- The end ----

    // Nan or inf anywhere in some of this block's sums.
    template <int kCols>
    DEVICE_METHOD static bool is_suspicious(const Accumulator<kCols> (&sums)[kRowTiles]) {
        float probe = 0.f;
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) probe += sums[m].times_zero();
        return ptx::barrier_any(probe != 0.f);
    }

    // Sums times `factor` into memory, from the first number of the sequence and head on.
    template <int kCols>
    DEVICE_METHOD void store(const Accumulator<kCols> (&sums)[kRowTiles], void* to, int dtype, int64 start, int64 row_stride,
                             int num_cols, float factor) const {
        const int thread = thread_anew();
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int own = (thread / 32 * kRowTiles + m) * 16 + thread % 32 / 4 + 8 * half;  // as `row` has it
                if (own >= num_staying()) continue;
                const int64 place = start + (first + own) * row_stride + Accumulator<16>::first_column();
#pragma unroll
                for (int block = 0; block < kCols / 8; ++block)
                    if (8 * block < num_cols) {
                        const float(&pair)[4] = sums[m].value[block];
                        store_pair(to, dtype, place + 8 * block, pair[2 * half] * factor, pair[2 * half + 1] * factor);
                    }
            }
    }
};

}  // namespace cupyattn
