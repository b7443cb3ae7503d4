"""The runtime's memory, threads, warps, barriers, copies and products of warps: what they do, and what they report.

Bodies stand beside the tests that run them; see `probes.py` for what they see.
"""

import ml_dtypes
import numpy as np
import pytest

from ptx.probes import ProbeError, Probes

SCHEDULES = (0, 1, 2)
BASE = 1024  # kSharedBase
probes = Probes()
run = probes.run
body = probes.body


def words(count, value=0):
    return np.full(count, value, np.uint32)


# ---- Errors name their place


LINE = body("thread.line = 321; if (thread.number == 40 && thread.block[1] == 2) load(thread, 4096);")


def test_errors_name_line_block_and_thread():
    with pytest.raises(ProbeError, match=r"^PTX line 321, block \(0,2,0\) thread 40: load at shared 5120 \(4 bytes\)"):
        run(LINE, grid=(1, 4, 1), threads=64)


SPECIAL_REGISTERS = body("""
    const u32 block = (thread.block[2] * launch.grid[1] + thread.block[1]) * launch.grid[0] + thread.block[0];
    u32* to = array(0) + 4 * (block * launch.threads + thread.number);
    to[0] = block;
    to[1] = 32 * thread.warp + thread.lane;
    to[2] = thread.rank;
    to[3] = launch.cluster;
""")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_thread_of_every_block_runs_once(schedule):
    out = words(24 * 64 * 4)
    run(SPECIAL_REGISTERS, out, grid=(4, 3, 2), threads=64, cluster=2, schedule=schedule)
    block, number, rank, cluster = out.reshape(24, 64, 4).transpose(2, 0, 1)
    assert (block == np.arange(24)[:, None]).all()
    assert (number == np.arange(64)).all()
    assert (rank == np.arange(24)[:, None] % 2).all()
    assert (cluster == 2).all()


@pytest.mark.parametrize("options", [{"threads": 33}, {"grid": (3, 1, 1), "cluster": 2}, {"schedule": 3}])
def test_launches_that_make_no_sense_are_refused(options):
    with pytest.raises(ProbeError, match="no launch of"):
        run(LINE, **options)


# ---- Memory: bounds, alignment, what was never written

ACCESS = {
    "shared": "shared_memory(thread, (u32)argument(1), (u32)argument(2), argument(3));",
    "global": "global_memory(thread, argument(1), (u32)argument(2), argument(3));",
    "generic": "generic_memory(thread, argument(1), (u32)argument(2), argument(3));",
    "local": "local_memory(thread, argument(1), (u32)argument(2));",
    "parameter": "parameter_memory(thread, (u64)launch.parameters + argument(1), (u32)argument(2));",
}
BODY_OF_ACCESS = {space: body(text) for space, text in ACCESS.items()}


def access(space, address, size, writes=True, buffer=None):
    run(BODY_OF_ACCESS[space], words(8) if buffer is None else buffer, address, size, writes)


@pytest.mark.parametrize(("address", "size"), [(BASE - 4, 4), (BASE + 4096, 1), (BASE + 4092, 8), (0, 4)])
def test_shared_memory_ends_where_it_was_asked_to(address, size):
    with pytest.raises(ProbeError, match=r"store at shared .*outside|not aligned"):
        access("shared", address, size)


def test_shared_memory_of_other_blocks_is_not_loaded_from():
    with pytest.raises(ProbeError, match="load at shared::cluster 0x1000400, where shared::cta is wanted"):
        access("shared", 1 << 24 | BASE, 4, writes=False)


def test_shared_memory_within_its_bounds_may_be_written():
    for size in (1, 2, 4, 8, 16):
        with pytest.raises(ProbeError, match="race"):  # for all lanes do
            access("shared", BASE, size)
        run(BODY_OF_ACCESS["shared"], words(1), BASE + 4096 - size, size, True, check_races=False)


@pytest.mark.parametrize("space", ["shared", "global", "generic", "local", "parameter"])
@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_accesses_must_be_aligned_to_their_size(space, size):
    buffer = words(8)
    start = {"shared": BASE, "global": buffer.ctypes.data, "generic": buffer.ctypes.data}.get(space, 0)
    with pytest.raises(ProbeError, match=f"not aligned to {size}"):
        access(space, start + size // 2, size, buffer=buffer)


@pytest.mark.parametrize("space", ["global", "generic"])
def test_global_memory_is_the_buffers(space):
    buffer = words(64)
    first = buffer.ctypes.data
    access(space, first + 252, 4, writes=False, buffer=buffer)
    for address, size in ((first + 256, 4), (first - 16, 16), (16, 4)):
        with pytest.raises(ProbeError, match="in no buffer"):
            access(space, address, size, buffer=buffer)


def test_what_is_read_only_may_be_read_only():
    buffer = words(8)
    buffer.flags.writeable = False
    access("global", buffer.ctypes.data, 4, writes=False, buffer=buffer)
    with pytest.raises(ProbeError, match="read-only"):
        access("global", buffer.ctypes.data, 4, writes=True, buffer=buffer)


CONSTANT = body("array(0)[0] = read<u32>(global_memory(thread, (u64)(kConstant + 1), 4, false));")
WRITTEN_CONSTANT = body("global_memory(thread, (u64)kConstant, 4, true);")


def test_constants_of_the_module_are_read():
    out = words(1)
    run(CONSTANT, out)
    assert out == 7
    with pytest.raises(ProbeError, match="in no buffer"):
        run(WRITTEN_CONSTANT, out)


LOCAL = body("""
    alignas(16) u32 numbers[4] = {1, 2, 3, 4};
    write<u32>(generic_memory(thread, (u64)(numbers + 1), 4, true), 20 + thread.number);
    array(0)[thread.number] = read<u32>(local_memory(thread, (u64)(numbers + 1), 4));
""")


def test_local_memory_is_each_threads_own():
    out = words(32)
    run(LOCAL, out)
    assert (out == 20 + np.arange(32)).all()
    with pytest.raises(ProbeError, match="outside of local memory"):
        access("local", 4096, 4)


def test_parameters_end_where_the_record_does():
    access("parameter", 120, 8)
    with pytest.raises(ProbeError, match=r"parameter 128 \(8 bytes\) outside of 128 bytes"):
        access("parameter", 128, 8)


UNWRITTEN = body(
    "if (thread.number < 4) store(thread, 4 * thread.number, 1); array(0)[thread.number] = load(thread, argument(1));"
)


def test_shared_memory_that_nobody_wrote_is_reported_or_nan():
    with pytest.raises(ProbeError, match="shared memory 1040 is read, and nobody wrote it"):
        run(UNWRITTEN, words(32), 16)
    out = words(32)
    run(UNWRITTEN, out, 16, schedule=1, check_races=False)
    assert np.isnan(out.view(np.float32)).all()
    assert np.isnan(out.view(np.float16)).all()


# ---- Races

NEIGHBOUR = """
    store(thread, 4 * thread.number, thread.number);
    {between}
    array(0)[thread.number] = load(thread, 4 * ((thread.number + {distance}) % launch.threads));
"""
SHUFFLED = "u32 to; bool in_range; shfl_sync(thread, 1, Shuffle::idx, 0, 0, 31, ~0u, &to, &in_range);"
ARRIVED = "if (thread.warp) bar_arrive(thread, 1, 1, 64); else bar_sync(thread, 2, 1, 64);"
UNORDERED = {
    "nothing": body(NEIGHBOUR.format(between="", distance=1)),
    "a shuffle": body(NEIGHBOUR.format(between=SHUFFLED, distance=1)),
    "a vote": body(NEIGHBOUR.format(between="vote_any(thread, 1, true, ~0u);", distance=1)),
}
ORDERED = {
    "of the warp": body(NEIGHBOUR.format(between="bar_warp_sync(thread, 1, ~0u);", distance=1)),
    "of the block": body(NEIGHBOUR.format(between="bar_sync(thread, 1, 0, -1);", distance=33)),
}
OF_OTHERS = {
    "of the warp": body(NEIGHBOUR.format(between="bar_warp_sync(thread, 1, ~0u);", distance=33)),
    "another for each warp": body(NEIGHBOUR.format(between="bar_sync(thread, 1, thread.warp, 32);", distance=33)),
    "where warps only arrive": body(NEIGHBOUR.format(between=ARRIVED, distance=33)),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("between", UNORDERED)
def test_what_does_not_order_lanes_leaves_a_race(between, schedule):
    with pytest.raises(ProbeError, match=r"race on shared memory|nobody wrote it"):
        run(UNORDERED[between], words(32), schedule=schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("between", "threads"), [("of the warp", 32), ("of the block", 128)])
def test_barriers_order(between, threads, schedule):
    out = words(threads)
    run(ORDERED[between], out, threads=threads, schedule=schedule)
    assert sorted(out) == list(range(threads))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("between", OF_OTHERS)
def test_barriers_of_others_order_nothing(between, schedule):
    with pytest.raises(ProbeError, match=r"race on shared memory|nobody wrote it"):
        run(OF_OTHERS[between], words(64), threads=64, schedule=schedule)


WRITE_AFTER_READ = body("""
    store(thread, 4 * thread.number, 1);
    bar_sync(thread, 1, 0, -1);
    array(0)[thread.number] = load(thread, 0) + load(thread, 4);
    if (argument(1)) bar_sync(thread, 2, 0, -1);
    if (thread.number == 0) store(thread, 0, 2);
""")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_writing_what_others_read_is_a_race_unless_they_are_waited_for(schedule):
    with pytest.raises(ProbeError, match=r"race on shared memory 1024: a (read|write) of thread \d+, block \(0,0,0\)"):
        run(WRITE_AFTER_READ, words(64), False, threads=64, schedule=schedule)
    run(WRITE_AFTER_READ, words(64), True, threads=64, schedule=schedule)


# What the last block reads of the others, as a merge of splits does.
LAST_BLOCK = body("""
    const u32 block = thread.block[0];
    write<u32>(global_memory(thread, argument(0) + 4 * (32 * block + thread.number), 4, true), block + 1);
    if (argument(3)) bar_sync(thread, 1, 0, -1);
    bool is_last = false;
    if (thread.number == 0) {
        fence_acq_rel_gpu(thread);
        const u32 before = argument(4) ? atom_add_acq_rel_gpu_global_s32(thread, argument(1), 1) : array(1)[0]++;
        is_last = before == launch.grid[0] - 1;
    }
    if (!bar_red_or(thread, 2, 0, is_last)) return;
    u32 sum = 0;
    for (u32 other = 0; other < launch.grid[0]; ++other)
        sum += read<u32>(global_memory(thread, argument(0) + 4 * (32 * other + 31 - thread.number), 4, false));
    array(2)[thread.number] = sum;
""")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_blocks_learn_of_each_other_by_atomics_alone(schedule):
    out = words(32)
    run(LAST_BLOCK, words(128), words(1), out, True, True, grid=(4, 1, 1), schedule=schedule)
    assert (out == 10).all()
    for barrier, atomic in ((False, True), (True, False)):
        with pytest.raises(ProbeError, match="race on global memory"):
            run(LAST_BLOCK, words(128), words(1), out, barrier, atomic, grid=(4, 1, 1), schedule=schedule)


PREEMPTED = body("""
    if (thread.number == 0) array(0)[0] = 0;
    bar_sync(thread, 1, 0, -1);
    for (u32 round = 0; round < 50; ++round) {
        const u32 before = array(0)[0];
        store(thread, 4 * thread.number, round);
        array(0)[0] = before + 1;
    }
""")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_threads_change_at_accesses_but_in_schedule_0(schedule):
    """Which shows where they add to the same number without an atomic."""
    out = words(1)
    run(PREEMPTED, out, threads=128, schedule=schedule)
    assert (out[0] == 50 * 128) == (schedule == 0)


# ---- Warps

SHUFFLE = {
    kind: body(f"""
        u32 to;
        bool in_range;
        const u32 value = 100 + thread.lane;
        shfl_sync(thread, 1, Shuffle::{kind}, value, (u32)argument(1), (u32)argument(2), ~0u, &to, &in_range);
        array(0)[thread.lane] = to | in_range << 16;
    """)
    for kind in ("idx", "bfly", "up", "down")
}


def shuffled(kind, lane, distance, clamp):
    """By the pseudocode of 9.7.9.6: the lane that is read, and whether it is in range."""
    segment, limit = clamp >> 8 & 31, clamp & 31
    top = lane & segment | limit & ~segment
    source = {
        "up": lane - (distance & 31),
        "down": lane + (distance & 31),
        "bfly": lane ^ distance & 31,
        "idx": lane & segment | distance & 31 & ~segment,
    }[kind]
    in_range = source >= top if kind == "up" else source <= top
    return source if in_range else lane, in_range


@pytest.mark.parametrize("kind", SHUFFLE)
@pytest.mark.parametrize("clamp", [31, 0, 15, 0x1C03, 0x1800, 0x1807])
def test_shuffles_stay_within_segments_and_clamps(kind, clamp):
    for distance in (0, 1, 2, 5, 16, 31, 33):
        out = words(32)
        run(SHUFFLE[kind], out, distance, clamp)
        expected = [shuffled(kind, lane, distance, clamp) for lane in range(32)]
        assert out.tolist() == [100 + source | in_range << 16 for source, in_range in expected]


VOTES = body("""
    const u32 mask = (u32)argument(1);
    const bool mine = mask >> thread.lane & 1;
    array(0)[thread.lane] = vote_ballot(thread, 1, mine, ~0u);
    array(0)[32 + thread.lane] = vote_any(thread, 2, mine, ~0u) | vote_all(thread, 3, mine, ~0u) << 1;
""")


@pytest.mark.parametrize(("mask", "any_and_all"), [(0, 0), (0x80000001, 1), (0xFFFFFFFF, 3)])
def test_votes(mask, any_and_all):
    out = words(64)
    run(VOTES, out, mask)
    assert (out[:32] == mask).all()
    assert (out[32:] == any_and_all).all()


DIVERGED = body("bar_warp_sync(thread, thread.lane < 16 ? 1 : 2, ~0u);")
SOME_LANES = body("bar_warp_sync(thread, 1, 0xffff);")
MISSING_LANES = body("thread.line = 12; if (thread.lane) vote_any(thread, 1, true, ~0u);")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_lanes_must_be_at_one_instruction(schedule):
    with pytest.raises(ProbeError, match=r"lanes of warp 0 are at different instructions"):
        run(DIVERGED, schedule=schedule)
    with pytest.raises(ProbeError, match="of lanes 0xffff; only all of them are known"):
        run(SOME_LANES, schedule=schedule)


def test_deadlocks_say_who_waits_where():
    with pytest.raises(
        ProbeError, match=r"^deadlock: 31 threads of warp 0 of block \(0,0,0\) at vote.sync of PTX line 12;"
    ):
        run(MISSING_LANES)


# ---- Barriers

HALF_A_BARRIER = body("thread.line = 5; if (thread.warp) bar_sync(thread, 1, 3, 64);")
OTHER_COUNT = body("if (thread.warp < 2) bar_sync(thread, 1, 3, thread.warp ? 64 : 96);")
BARRIER_NUMBER = body("bar_sync(thread, 1, 16, -1);")
BARRIER_OF = body("bar_sync(thread, 1, 1, (s64)argument(1));")
ARRIVAL_OF_ALL = body("bar_arrive(thread, 1, 1, -1);")
REDUCTION = body("array(0)[thread.number] = bar_red_or(thread, 1, 0, thread.number == argument(1));")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_barriers_wait_for_all_that_they_expect(schedule):
    with pytest.raises(
        ProbeError, match=r"deadlock: 32 threads of warp 1 of block \(0,0,0\) at bar.sync of PTX line 5;"
    ):
        run(HALF_A_BARRIER, threads=64, schedule=schedule)
    with pytest.raises(ProbeError, match=r"barrier 3 is for (64|96) threads, and here for (64|96)"):
        run(OTHER_COUNT, threads=96, schedule=schedule)


def test_barriers_are_16_and_of_whole_warps():
    with pytest.raises(ProbeError, match="there is no barrier 16"):
        run(BARRIER_NUMBER)
    for count in (0, 31, 33, 64):
        with pytest.raises(ProbeError, match=f"bar.sync of {count} threads"):
            run(BARRIER_OF, words(1), count)
    with pytest.raises(ProbeError, match=r"bar.arrive needs a number"):
        run(ARRIVAL_OF_ALL)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_bar_red_or_tells_all_threads(schedule):
    for number, expected in ((77, 1), (96, 0)):
        out = words(96, 9)
        run(REDUCTION, out, number, threads=96, schedule=schedule)
        assert (out == expected).all()


# A producer, and consumers that take turns: what keeps a buffer is bar.arrive from the other side.
PIPELINE = body("""
    for (u32 round = 0; round < 5; ++round) {
        if (thread.warp == 0) {
            if (round) bar_sync(thread, 1, 2, 96);
            store(thread, 4 * thread.lane, 100 * round + thread.lane);
            bar_arrive(thread, 2, 1, 96);
        } else {
            bar_sync(thread, 3, 1, 96);
            array(0)[96 * round + thread.number] = load(thread, 4 * thread.lane);
            if (round < 4) bar_arrive(thread, 4, 2, 96);
        }
    }
""")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_named_barriers_make_a_pipeline(schedule):
    out = words(480)
    run(PIPELINE, out, threads=96, schedule=schedule)
    assert (out.reshape(5, 3, 32)[:, 1:] == 100 * np.arange(5)[:, None, None] + np.arange(32)).all()


# ---- cp.async

COPY = """
    const u32 to = kSharedBase + 16 * thread.number;
    const u64 from = argument(1) + 16 * thread.number;
    thread.line = 8;
    cp_async_16(thread, to, from, thread.number == 3 ? 0 : 16);
    {between}
    const u32 other = (thread.number + {distance}) % launch.threads;
    for (u32 word = 0; word < 4; ++word) array(0)[4 * other + word] = load(thread, 16 * other + 4 * word);
"""
COMMIT_AND_WAIT = "cp_async_commit_group(thread); cp_async_wait_group(thread, 0);"
COPIED = body(COPY.format(between=COMMIT_AND_WAIT, distance=0))
COPIED_FOR_OTHERS = body(COPY.format(between=COMMIT_AND_WAIT + "bar_sync(thread, 1, 0, -1);", distance=1))
NOT_WAITED_FOR = {
    "no wait": body(COPY.format(between="cp_async_commit_group(thread);", distance=0)),
    "no commit": body(COPY.format(between="cp_async_wait_group(thread, 0);", distance=0)),
    "too few": body(COPY.format(between="cp_async_commit_group(thread); cp_async_wait_group(thread, 1);", distance=0)),
    "no barrier": body(COPY.format(between=COMMIT_AND_WAIT, distance=1)),
    "barrier too early": body(COPY.format(between="bar_sync(thread, 1, 0, -1);" + COMMIT_AND_WAIT, distance=1)),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("which", [COPIED, COPIED_FOR_OTHERS])
def test_copies_come_when_they_are_waited_for(which, schedule, rng):
    given, out = rng.integers(1, 2**32, (32, 4), np.uint32), words(128)
    given.flags.writeable = False
    run(which, out, given, schedule=schedule)
    expected = given.copy()
    expected[3] = 0
    np.testing.assert_array_equal(out.reshape(32, 4), expected)


COPY_OF_WORDS = body("""
    const u32 to = kSharedBase + 4 * thread.number;
    cp_async_4(thread, to, argument(1) + 4 * (thread.number ^ 1));
    cp_async_commit_group(thread);
    if (argument(2)) cp_async_wait_group(thread, 0);
    array(0)[thread.number] = load(thread, 4 * thread.number);
""")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_words_are_copied_beside_each_other(schedule, rng):
    given, out = rng.integers(1, 2**32, 32, np.uint32), words(32)
    run(COPY_OF_WORDS, out, given, True, schedule=schedule)
    np.testing.assert_array_equal(out, given[np.arange(32) ^ 1])


def test_a_word_that_nobody_waited_for_is_reported():
    with pytest.raises(ProbeError, match="a copy to it is under way"):
        run(COPY_OF_WORDS, words(32), words(32), False, schedule=1)


SEEN_AT_ONCE = ("no barrier", "barrier too early")  # in schedule 0, where copies come when they are issued


@pytest.mark.parametrize(
    ("what", "schedule"),
    [(what, schedule) for what in NOT_WAITED_FOR for schedule in SCHEDULES if schedule or what in SEEN_AT_ONCE],
)
def test_copies_that_nobody_waited_for_are_reported(what, schedule):
    with pytest.raises(ProbeError, match=r"a copy to it is under way|race on shared memory|nobody wrote it"):
        run(NOT_WAITED_FOR[what], words(128), words(128), schedule=schedule)


COPY_ELSEWHERE = body(
    "cp_async_16(thread, kSharedBase + (u32)argument(1), argument(0) + argument(2), (u32)argument(3));"
)


@pytest.mark.parametrize(
    ("to", "source", "size", "message"),
    [
        (8, 0, 16, r"cp.async to shared 1032, which is not aligned to 16"),
        (0, 8, 16, r"load at global .*, which is not aligned to 16"),
        (4096, 0, 16, r"cp.async at shared 5120 .* outside"),
        (0, 256, 16, r"load at global .* in no buffer"),
        (0, 0, 8, r"cp.async of 8 bytes"),
        (1 << 24, 0, 16, r"cp.async to 0x1000400, in another block"),
    ],
)
def test_copies_are_within_bounds_and_aligned(to, source, size, message):
    with pytest.raises(ProbeError, match=message):
        run(COPY_ELSEWHERE, words(64), to, source, size, schedule=1)


GROUPS = body("""
    const u32 to = kSharedBase + 32 * thread.number;
    cp_async_16(thread, to, argument(1), 16);
    cp_async_commit_group(thread);
    cp_async_16(thread, to + 16, argument(1), 16);
    cp_async_commit_group(thread);
    cp_async_wait_group(thread, 1);
    array(0)[thread.number] = load(thread, 32 * thread.number);
    if (argument(2)) load(thread, 32 * thread.number + 16);
    array(1)[0] = 5;
""")


def test_groups_are_waited_for_in_order():
    out = words(32)
    run(GROUPS, out, words(4, 3), False, schedule=1)
    with pytest.raises(ProbeError, match="a copy to it is under way"):
        run(GROUPS, out, words(4, 3), True, schedule=1)


# ---- Products of a warp

MMA = {
    name: body(f"""
        u32 d[4];
        const u32 *a = array(1) + 4 * thread.lane, *b = array(2) + 2 * thread.lane, *c = array(3) + 4 * thread.lane;
        mma_m16n8k16_{name}(thread, 1, d, a, b, c);
        for (u32 index = 0; index < 4; ++index) array(0)[4 * thread.lane + index] = d[index];
    """)
    for name in ("f16", "bf16")
}
ROW, PAIR = np.divmod(np.arange(32), 4)


def pairs(matrix, rows, columns):
    """Registers of two neighbours in the columns: `rows` and `columns` give each register its first element."""
    found = [np.stack([matrix[r, c], matrix[r, c + 1]], axis=-1) for r, c in zip(rows, columns, strict=True)]
    return np.stack(found, axis=1).copy().view(np.uint32)[..., 0]


@pytest.mark.parametrize(("name", "dtype"), [("f16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_mma_is_a_product_of_matrices(name, dtype, rng):
    a, b = rng.integers(-8, 9, (16, 16)).astype(dtype), rng.integers(-8, 9, (16, 8)).astype(dtype)
    c = rng.integers(-99, 99, (16, 8)).astype(np.float32)
    a_registers = pairs(a, [ROW, ROW + 8, ROW, ROW + 8], [2 * PAIR, 2 * PAIR, 2 * PAIR + 8, 2 * PAIR + 8])
    b_registers = pairs(b.T, [ROW, ROW], [2 * PAIR, 2 * PAIR + 8])
    places = [(ROW, 2 * PAIR), (ROW, 2 * PAIR + 1), (ROW + 8, 2 * PAIR), (ROW + 8, 2 * PAIR + 1)]
    c_registers = np.stack([c[place] for place in places], axis=1)
    out = np.zeros((32, 4), np.float32)
    run(MMA[name], out, a_registers, b_registers, c_registers)
    expected = a.astype(np.float64) @ b.astype(np.float64) + c
    np.testing.assert_array_equal(out, np.stack([expected[place] for place in places], axis=1))


def test_mma_makes_one_nan():
    out = words(128)
    a, b = np.full((32, 8), np.inf, np.float16), np.zeros((32, 4), np.float16)
    run(MMA["f16"], out, a, b, words(128))
    assert (out == 0x7FFFFFFF).all()


MATRICES = {
    (kind, transposes): body(f"""
        u32 registers[4];
        for (u32 word = 0; word < 4; ++word) {{
            if ({int(kind == "ldmatrix")}) store(thread, 16 * thread.lane + 4 * word, array(1)[4 * thread.lane + word]);
            registers[word] = array(1)[4 * thread.lane + word];
        }}
        bar_warp_sync(thread, 1, ~0u);
        {kind}_x4(thread, 2, {transposes}, kSharedBase + 16 * thread.lane, registers);
        bar_warp_sync(thread, 3, ~0u);
        for (u32 word = 0; word < 4; ++word)
            array(0)[4 * thread.lane + word] =
                {int(kind == "ldmatrix")} ? registers[word] : load(thread, 16 * thread.lane + 4 * word);
    """)
    for kind in ("ldmatrix", "stmatrix")
    for transposes in ("false", "true")
}


@pytest.mark.parametrize("transposes", ["false", "true"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_matrices_are_loaded_and_stored_by_pairs(transposes, schedule, rng):
    matrices = rng.integers(0, 65536, (4, 8, 8), np.uint16)
    seen = matrices.transpose(0, 2, 1) if transposes == "true" else matrices
    registers = np.stack([pairs(matrix, [ROW], [2 * PAIR])[:, 0] for matrix in seen], axis=1)
    out = np.zeros((32, 4), np.uint32)
    run(MATRICES["ldmatrix", transposes], out, matrices, schedule=schedule)
    np.testing.assert_array_equal(out, registers)
    stored = np.zeros_like(matrices)
    run(MATRICES["stmatrix", transposes], stored, registers, schedule=schedule)
    np.testing.assert_array_equal(stored, matrices)


LOAD_MATRIX_AT = body(
    "u32 to[4]; ldmatrix_x4(thread, 1, false, kSharedBase + (u32)argument(1) + 16 * thread.lane, to);"
)


def test_matrix_rows_are_accesses_like_any():
    for offset, message in ((8, "not aligned to 16"), (4096, "outside"), (0, "nobody wrote it")):
        with pytest.raises(ProbeError, match=message):
            run(LOAD_MATRIX_AT, words(1), offset)
