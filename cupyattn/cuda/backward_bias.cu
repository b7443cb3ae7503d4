// backward_bias.cu: the gradient of a bias, dbias = dS, summed over whatever repeats the bias.
//
// A block owns a tile of the bias, or of the one row or key that is repeated, and walks all heads, sequences and scores
// that use it, in the same order each time.  A bias that is not repeated costs two products more than dq alone.
//
// Twin     cpu.flash.flash_backward, its dbias.
// Needs    sm_80; lse_log2 and delta, see backward_rows.cu.
// Launch   one block per (key tile, row tile, head, sequence) of the bias; kThreads; kSharedBytes.

#include "algorithm/gradients.cuh"

namespace cupyattn {

template <typename Traits>
struct BiasBlock : BackwardBlock<Traits, false> {
    using Block = BackwardBlock<Traits, false>;
    static constexpr int kStays = Traits::kStays, kMoves = Traits::kMoves, kRowTiles = Traits::kRowTiles;

    DEVICE_METHOD BiasBlock(const BackwardParams& given, const Sequence& sequence) : Block(given, sequence) {
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) this->changes[m].clear();
    }

    // The scores of these heads and rows, and of keys [first_key, first_key + kMoves), or of all if one serves them.
    DEVICE_METHOD void add_up(const Span& heads, const Span& rows, int first_key) {
        const Span keys = this->params.grad.bias_keys == 1 ? Span{0, kOpen} : Span{first_key, first_key + kMoves};
#pragma unroll 1
        for (int head = heads.start; head < heads.stop; ++head)
#pragma unroll 1
            for (int first = rows.start; first < rows.stop; first += kStays) {
                this->head = head, this->first = first;
                this->load_staying();
                this->walk(keys);
            }
    }

    // Rows and keys that share a number are added up on the way.
    DEVICE_METHOD void store(int64 start, int first_row, int first_key) {
        const Gradients& grad = this->params.grad;
        const uint32 table = this->stays_a.base;  // a float for each pair of the tile: nobody needs the tiles any more
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
            for (int block = 0; block < kMoves / 8; ++block)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int row = Block::warp_row(m) + Accumulator<16>::row(i / 2);
                    const int column = Accumulator<16>::first_column() + Accumulator<16>::column(block, i);
                    ptx::store_shared(table + 4 * (row * kMoves + column), this->changes[m].value[block][i]);
                }
        ptx::barrier();
        const bool one_row = grad.bias_rows == 1, one_key = grad.bias_keys == 1;
        const int num_rows = one_row ? 1 : smaller(kStays, grad.bias_rows - first_row);
        const int num_keys = one_key ? 1 : smaller(kMoves, grad.bias_keys - first_key);
        const int rows_each = one_row ? kStays : 1, keys_each = one_key ? kMoves : 1;
#pragma unroll 1
        for (int i = ptx::thread(); i < num_rows * num_keys; i += Traits::kThreads) {
            const int row = i / num_keys, key = i % num_keys;
            float sum = 0.f;
#pragma unroll 1
            for (int other_row = row; other_row < row + rows_each; ++other_row)
#pragma unroll 1
                for (int other_key = key; other_key < key + keys_each; ++other_key)
                    sum += ptx::load_shared_float(table + 4 * (other_row * kMoves + other_key));
            const int64 place =
                start + (first_row + row) * grad.of_dbias.row + (first_key + key) * grad.of_dbias.key;
            store_number(grad.dbias, grad.dbias_dtype, place, sum);
        }
    }
};

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads) backward_bias(const __grid_constant__ BackwardParams params) {
    const Gradients& grad = params.grad;
    const int key_tiles = ceil_div(grad.bias_keys, Traits::kMoves), row_tiles = ceil_div(grad.bias_rows, Traits::kStays);
    const int first_key = ptx::block_x() % key_tiles * Traits::kMoves;
    const int first_row = ptx::block_x() / key_tiles % row_tiles * Traits::kStays;
    const int head = ptx::block_x() / key_tiles / row_tiles % grad.bias_heads;
    const int index = ptx::block_x() / key_tiles / row_tiles / grad.bias_heads;
    const bool one_head = grad.bias_heads == 1, one_row = grad.bias_rows == 1;
    const Span heads{one_head ? 0 : head, one_head ? params.num_heads : head + 1};
    const int last = grad.bias_batch == 1 ? params.batch : index + 1;
    BiasBlock<Traits> block(params, sequence_at(index, params));
#pragma unroll 1
    for (int other = index; other < last; ++other) {
        block.sequence = sequence_at(other, params);
        const int num_rows = block.sequence.band.seqlen_q;
        block.add_up(heads, {first_row, one_row ? num_rows : smaller(num_rows, first_row + 1)}, first_key);
    }
    block.store(index * grad.of_dbias.batch + head * grad.of_dbias.head, first_row, first_key);
}

}  // namespace cupyattn
