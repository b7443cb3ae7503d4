// backward.cu: gradients of q, k and v, from that of the output.
//
//     P = exp(scale * q k^T - lse)        dP = dout v^T        dS = P * (dP - delta)
//     dq = scale * dS k                   dk = scale * dS^T q  dv = P^T dout
//
// A block of queries walks the keys that they see and sums dq; a block of keys walks the queries that see them, for
// every query head that shares them, and sums dk and dv.  So every number is the sum of one block, in float32, in the
// same order each time, and nothing has to be added in memory.  It costs two products more than adding dq there.
//
// A row that sees no key gets gradients of 0 and gives none.  A pair that is not seen gives nothing, whatever its
// numbers are: where sums are not finite they are made once more, with care (see strays.cuh).
//
// Twin     cpu.flash.flash_backward, in float64 with the same names.
// Source   Dao, FlashAttention-2, 2023, algorithm 2 (arXiv 2307.08691).
// Needs    sm_80; lse_log2 and delta, see backward_rows.cu.
// Launch   one block per (tile that stays, query head or owner, sequence), the tile fastest (see gradients_tiling.cuh);
//          backward_again: one per 32 of hopper_backward.cu's blocks, or more; kThreads; kSharedBytes.

#include "algorithm/gradients.cuh"

namespace cupyattn {

template <typename Traits, bool kCare>
struct BackwardPass : BackwardBlock<Traits, kCare> {
    using Block = BackwardBlock<Traits, kCare>;
    using Block::Block;

    // The tile from row `first_row` on, of the heads from `first_head` on whose sums are one; whether anything that came
    // out is not finite.
    DEVICE_METHOD bool run(int first_head, int first_row) {
        this->first = first_row;
        if constexpr (Block::kCountsA || Block::kCountsB) {  // of all heads first, while there are no sums to be kept
            this->counting = true;
            walk_heads(first_head);
            this->counting = false;
        }
        walk_heads(first_head);
        look_again();
        bool suspicious = false;
        if constexpr (Traits::kSumsA) {
            suspicious |= this->is_suspicious(this->sums_a);
            store_a();
        }
        if constexpr (Traits::kSumsB) {
            // What is not finite of dout is in every change of its row, and in dk.
            if constexpr (!Traits::kSumsA) suspicious |= this->is_suspicious(this->sums_b);
            store_b();
        }
        return suspicious;
    }

    // Their first one is a multiple of their number, so that nothing has to be kept to know which they are.
    DEVICE_METHOD void walk_heads(int first_head) {
        const BackwardParams& params = this->params;
        const int shared = heads_of_block(params);
        this->head = first_head;
#pragma unroll 1
        do {
            const int head = this->head;
            look_again();
            // Beside keys whose sum it is, values may be others' from here on; or the other way round.
            if (head % shared == 0 || head % params.queries_per_k == 0 || head % params.queries_per_v == 0)
                this->load_staying();
            this->walk({0, kOpen});
            ptx::disguise(++this->head);  // in the place of the one before it
        } while (this->head % shared);
        --this->head;
    }

    DEVICE_METHOD static int heads_of_block(const BackwardParams& params) {
        return Traits::kTurned ? params.grad.heads_per_block : 1;
    }

    // At the sequence, so that little of it is kept through a walk, which leaves no registers.
    DEVICE_METHOD void look_again() {
        int index = this->sequence.index;
        ptx::disguise(index), ptx::disguise(this->first);
        this->sequence = sequence_at(index, this->params);
    }

    // dq, or dk.
    DEVICE_METHOD void store_a() {
        const BackwardParams& params = this->params;
        const Gradients& grad = params.grad;
        const Sequence& sequence = this->sequence;
        if constexpr (Traits::kTurned) {
            const int head = this->head / grad.queries_per_dk;
            const int64 start =
                sequence.index * grad.of_dk.batch + sequence.first_key * grad.of_dk.row + head * grad.of_dk.head;
            this->store(this->sums_a, grad.dk, grad.dk_dtype, start, grad.of_dk.row, params.head_dim, params.softmax_scale);
        } else {
            const int64 start =
                sequence.index * grad.of_dq.batch + sequence.first_row * grad.of_dq.row + this->head * grad.of_dq.head;
            this->store(this->sums_a, grad.dq, grad.dq_dtype, start, grad.of_dq.row, params.head_dim, params.softmax_scale);
            if constexpr (bool(Traits::kEdits & kAlibi))
                store_slope_part(this->slope_part, this->head, this->first + Block::warp_row(0), sequence, params);
        }
    }
    DEVICE_METHOD void store_b() {
        const BackwardParams& params = this->params;
        const Gradients& grad = params.grad;
        const Sequence& sequence = this->sequence;
        if constexpr (kCare)
#pragma unroll
            for (int m = 0; m < Traits::kRowTiles; ++m) this->strays[m].add_to(this->sums_b[m]);
        const int head = this->head / grad.queries_per_dv;
        const int64 start =
            sequence.index * grad.of_dv.batch + sequence.first_key * grad.of_dv.row + head * grad.of_dv.head;
        this->store(this->sums_b, grad.dv, grad.dv_dtype, start, grad.of_dv.row, params.head_dim_v, 1.f);
    }
};

// Once more; apart, since it is rarely run.
template <typename Traits>
DEVICE_APART void backward_with_care(const BackwardParams& params, int sequence, int head, int first) {
    BackwardPass<Traits, true> block(params, sequence_at(sequence, params));
    block.run(head, first);
}

template <typename Traits, bool kPacked>
DEVICE void backward_of_block(const BackwardParams& params) {
    constexpr bool kTurned = Traits::kTurned;
    using Pass = BackwardPass<Traits, false>;
    const int shared = Pass::heads_of_block(params), owners = params.num_heads / shared;
    const Place place = staying_place<kTurned, kPacked>(ptx::block_x(), params, owners, Traits::kStays);
    const Sequence sequence = sequence_at(place.sequence, params);
    const int first = first_row_of<kTurned>(place, params, Traits::kStays);
    if (first >= (kTurned ? sequence.band.seqlen_k : sequence.band.seqlen_q)) return;
    Pass block(params, sequence);
    if (block.run(place.owner * shared, first))  // told by what the block knows, which nothing else is kept for
        backward_with_care<Traits>(params, block.sequence.index, block.head - (shared - 1), block.first);
}

// Tiles in which hopper_backward.cu met what is not finite.  A block looks at up to a warp's lanes of flags, so many blocks
// apart from each other that tiles which are flagged together are shared out; each of its warps looks by itself, and anew
// each time, so that little is kept while a tile is made.
template <typename Traits, bool kPacked>
DEVICE void backward_again_of_blocks(const BackwardParams& params) {
    constexpr bool kTurned = Traits::kTurned;
    static_assert(kFlaggedRows % Traits::kStays == 0, "a tile that is flagged is some of these");
    const int shared = BackwardPass<Traits, true>::heads_of_block(params), owners = params.num_heads / shared;
    int lane = 0, done = 0;  // the first whose flag is not done with, and the rows of its tile that are
#pragma unroll 1
    while (true) {
        const int its = ptx::block_x() + ptx::lane() * ptx::grid_x();
        lane = ptx::first_lane(ptx::lane() >= lane && its < staying_blocks<kTurned, kPacked>(params, owners, kFlaggedRows) &&
                               ptx::load_global(params.grad.flags + its));
        if (lane == 32) return;
        const int flagged = ptx::block_x() + lane * ptx::grid_x();
        const Place place = staying_place<kTurned, kPacked>(flagged, params, owners, kFlaggedRows);
        const Band band = sequence_at(place.sequence, params).band;
        const int row = first_row_of<kTurned>(place, params, kFlaggedRows) + done;
        if (done == kFlaggedRows || row >= (kTurned ? band.seqlen_k : band.seqlen_q)) {
            ++lane, done = 0;
        } else {
            backward_with_care<Traits>(params, place.sequence, place.owner * shared, row);
            done += Traits::kStays;
        }
    }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) backward(const __grid_constant__ BackwardParams params) {
    backward_of_block<Traits, false>(params);
}
template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) backward_packed(const __grid_constant__ BackwardParams params) {
    backward_of_block<Traits, true>(params);
}
template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) backward_again(const __grid_constant__ BackwardParams params) {
    backward_again_of_blocks<Traits, false>(params);
}
template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) backward_again_packed(const __grid_constant__ BackwardParams params) {
    backward_again_of_blocks<Traits, true>(params);
}

}  // namespace cupyattn
