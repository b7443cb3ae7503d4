// c = a @ b for the emulator's own tests: everything a kernel of cupyattn does to memory, on one page.
//
//     a [m, k]   b [k, n]   Element, rows contiguous, k and n multiples of 8
//     c [m, n]   float
//
// Four warps make 32 x 32 of c, a quarter each; steps of 16 along k go through a ring of two stages.
// Launch: grid (ceil_div(n, 32), ceil_div(m, 32), 1), kThreads threads, kSharedBytes bytes.
#include "instructions/ptx.cuh"

namespace cupyattn {

struct MatmulParams {
    const void* a;
    const void* b;
    float* c;
    int m, n, k;
};

constexpr int kThreads = 128;
constexpr int kTile = 32;
constexpr int kStep = 16;
constexpr int kStages = 2;
constexpr uint32 kTileBytes = kTile * kStep * 2;
constexpr uint32 kSharedBytes = kStages * 2 * kTileBytes;

// The first 64 threads bring the step's 32 x 16 of a, the others its 16 x 32 of b, 16 bytes each.
DEVICE void load_step(uint32 stage, int row0, int column0, int k0, const MatmulParams& p) {
    const int piece = ptx::thread() % 64;
    if (ptx::thread() < 64) {
        const int row = row0 + piece / 2, column = k0 + 8 * (piece % 2);
        const auto* from = static_cast<const uint16*>(p.a) + static_cast<int64>(row) * p.k + column;
        ptx::copy_async(stage + 16 * piece, from, row < p.m && column < p.k);
    } else {
        const int row = k0 + piece / 4, column = column0 + 8 * (piece % 4);
        const auto* from = static_cast<const uint16*>(p.b) + static_cast<int64>(row) * p.n + column;
        ptx::copy_async(stage + kTileBytes + 16 * piece, from, row < p.k && column < p.n);
    }
}

template <typename Element>
__global__ void __launch_bounds__(kThreads) matmul(const __grid_constant__ MatmulParams p) {
    const int row0 = kTile * ptx::block_y(), column0 = kTile * ptx::block_x();
    const int warp_row = 16 * (ptx::warp() / 2), warp_column = 16 * (ptx::warp() % 2);
    const int lane = ptx::lane();
    const uint32 ring = ptx::shared_memory();
    float c[2][4] = {};

    load_step(ring, row0, column0, 0, p);
    ptx::commit_copies();
    const int num_steps = ceil_div(p.k, kStep);
    for (int step = 0; step < num_steps; ++step) {
        const uint32 stage = ring + step % kStages * 2 * kTileBytes;
        const uint32 next = ring + (step + 1) % kStages * 2 * kTileBytes;
        if (step + 1 < num_steps) load_step(next, row0, column0, (step + 1) * kStep, p);
        ptx::commit_copies();
        ptx::wait_copies<1>();  // this step is here, the next may be under way
        ptx::barrier();
        uint32 a[4], b[4];
        ptx::load_matrices(a, stage + (warp_row + lane % 16) * 32 + lane / 16 * 16);
        ptx::load_matrices_transposed(b, stage + kTileBytes + lane % 16 * 64 + warp_column * 2 + lane / 16 * 16);
        ptx::multiply_add<Element>(c[0], a, b[0], b[1]);
        ptx::multiply_add<Element>(c[1], a, b[2], b[3]);
        ptx::barrier();  // every warp has read the stage that the next copies overwrite
    }

    for (int half = 0; half < 2; ++half)
        for (int i = 0; i < 4; ++i) {
            const int row = row0 + warp_row + lane / 4 + i / 2 * 8;
            const int column = column0 + warp_column + 8 * half + lane % 4 * 2 + i % 2;
            if (row < p.m && column < p.n) ptx::store_global(p.c + static_cast<int64>(row) * p.n + column, c[half][i]);
        }
}

}  // namespace cupyattn
