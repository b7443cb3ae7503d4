// schedule.cu: lengths that are data into work, of thread blocks of which there are as many as the GPU runs at once.
//
//     schedule  one share of the line, int64; starts [sequences + 1], int64: where the pieces of each sequence begin on it;
//               first [thread blocks], int32: the sequence in which the share of each begins.  See schedule.cuh.
//
// Twin     plan.schedule.schedule_of.
// Needs    sm_80.
// Launch   one block of kThreads threads in front of the kernel that goes by it, or of several: it holds for all calls
//          whose lengths and masks are the same.

#include "algorithm/schedule.cuh"

namespace cupyattn {

// The sum of what all threads before this one have, and of what all have.
template <int kThreads>
struct Sums {
    int64 before, all;

    DEVICE_METHOD explicit Sums(int64 mine) {
        int64 upto = mine;  // of this warp, this lane among them
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int64 other = from_lane(upto, ptx::lane() - step);
            if (ptx::lane() >= step) upto += other;
        }
        const uint32 sums = ptx::shared_memory();
        if (ptx::lane() == 31) {
            ptx::store_shared(sums + 8 * ptx::warp(), static_cast<uint32>(upto));
            ptx::store_shared(sums + 8 * ptx::warp() + 4, static_cast<uint32>(upto >> 32));
        }
        ptx::barrier();
        before = upto - mine, all = 0;
        for (int warp = 0; warp < kThreads / 32; ++warp) {
            const int64 its = joined(ptx::load_shared(sums + 8 * warp), ptx::load_shared(sums + 8 * warp + 4));
            if (warp < ptx::warp()) before += its;
            all += its;
        }
        ptx::barrier();  // the memory is free for the next ones
    }
    DEVICE_METHOD static int64 joined(uint32 low, uint32 high) {
        return static_cast<int64>(static_cast<uint64>(high) << 32 | low);
    }
    DEVICE_METHOD static int64 from_lane(int64 value, int lane) {
        return joined(ptx::shuffle(static_cast<uint32>(value), lane & 31),
                      ptx::shuffle(static_cast<uint32>(value >> 32), lane & 31));
    }
};

// What a sequence takes of the line.
DEVICE int64 work_of(int index, const MergeParams& params) {
    const Band band = sequence_at(index, params).band;
    const int units = params.num_heads / params.heads_per_unit;
    const int64 pieces = int64(units) * row_tiles_of(band.seqlen_q, params.heads_per_unit, params.block_q);
    const Span blocks = index < params.batch ? blocks_of(band, params.block_k) : Span{0, 0};
    return pieces * (blocks.stop - blocks.start + kOverhead);
}

// The first sequence that may have a piece there: of several that begin there the first, since those that have no pieces
// now may have some when the schedule is gone by.
DEVICE int first_sequence(const Schedule& schedule, int64 position) {
    int low = 0, high = schedule.sequences;
    while (low < high) {
        const int middle = low + (high - low) / 2;
        if (schedule.start_of(middle) < position)
            low = middle + 1;
        else
            high = middle;
    }
    return low < schedule.sequences && schedule.start_of(low) == position ? low : larger(0, low - 1);
}

template <int kThreads>
__global__ void __launch_bounds__(kThreads) make_schedule(const __grid_constant__ MergeParams params) {
    const Schedule schedule(params);
    int64 total = 0;
#pragma unroll 1
    for (int base = 0; base < schedule.sequences; base += kThreads) {
        const int index = base + ptx::thread();
        const bool exists = index < schedule.sequences;
        const Sums<kThreads> sums(exists ? work_of(index, params) : 0);
        if (exists) ptx::store_global(schedule.starts() + index, total + sums.before);
        total += sums.all;
    }
    const int64 shortest = ceil_div(params.fewest_keys, params.block_k) + kOverhead;
    const int64 share = larger(shortest, (total + schedule.blocks - 1) / schedule.blocks);
    if (ptx::thread() == 0) {
        ptx::store_global(schedule.wide(), share);
        ptx::store_global(schedule.starts() + schedule.sequences, total);
    }
    ptx::barrier();  // starts are there
    for (int block = ptx::thread(); block < schedule.blocks; block += kThreads)
        ptx::store_global(schedule.first() + block, first_sequence(schedule, block * share));
}

}  // namespace cupyattn
