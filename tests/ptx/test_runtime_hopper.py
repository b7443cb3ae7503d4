"""The runtime's mbarriers, boxes, clusters and products of warpgroups: what they do, and what they report."""

import struct

import ml_dtypes
import numpy as np
import pytest

from ptx.probes import ProbeError, Probes

SCHEDULES = (0, 1, 2)
BASE = 1024  # kSharedBase
FLOAT8 = ml_dtypes.float8_e4m3fn
EVICT_NORMAL = "0x1000000000000000"
probes = Probes()
run = probes.run
body = probes.body


def words(count, value=0):
    return np.full(count, value, np.uint32)


MBARRIER = 65536
SHARED_MEMORY = MBARRIER + 64


def begin(arrivals=1):
    """What most bodies begin with: an mbarrier behind 64 KiB."""
    return f"""
        const u32 mbarrier = kSharedBase + {MBARRIER};
        if (thread.number == 0) {{
            mbarrier_init(thread, mbarrier, {arrivals});
            fence_mbarrier_init(thread);
        }}
        bar_sync(thread, 900, 0, -1);
    """


WAIT = "while (!mbarrier_try_wait_parity(thread, mbarrier, 0)) {}"


def launch(which, *arguments, **options):
    run(which, *arguments, shared_memory=SHARED_MEMORY, **options)


# ---- mbarriers

# The first warp writes, the second one reads: two mbarriers, so that neither overtakes the other.
HANDSHAKE = body("""
    const u32 full = kSharedBase + 2048, empty = kSharedBase + 2056;
    if (thread.number == 0) {
        mbarrier_init(thread, full, 32);
        mbarrier_init(thread, empty, 32);
    }
    bar_sync(thread, 1, 0, -1);
    for (u32 round = 0; round < 6; ++round) {
        if (thread.warp == 0) {
            if (round && argument(1)) while (!mbarrier_try_wait_parity(thread, empty, (round + 1) & 1)) {}
            store(thread, 4 * thread.lane, 100 * round + thread.lane);
            mbarrier_arrive(thread, full, false);
        } else {
            if (argument(2)) while (!mbarrier_try_wait_parity(thread, full, round & 1)) {}
            array(0)[32 * round + thread.lane] = load(thread, 4 * (31 - thread.lane));
            mbarrier_arrive(thread, empty, false);
        }
    }
""")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_mbarriers_hand_over_by_parity(schedule):
    out = words(192)
    run(HANDSHAKE, out, True, True, threads=64, schedule=schedule)
    assert (out.reshape(6, 32) == 100 * np.arange(6)[:, None] + np.arange(31, -1, -1)).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("waits", [(False, True), (True, False)])
def test_a_wait_that_is_missing_is_a_race(waits, schedule):
    with pytest.raises(ProbeError, match=r"race on shared memory|nobody wrote it|more than 32 arrivals|deadlock"):
        run(HANDSHAKE, words(192), *waits, threads=64, schedule=schedule)


PARITY = body(begin(2) + "array(0)[0] = mbarrier_try_wait_parity(thread, mbarrier, 1);" + WAIT)
ARRIVALS = body(begin(4) + "mbarrier_arrive(thread, mbarrier, false); if (argument(0)) " + WAIT)
BYTES = body(
    begin() + "if (!thread.number) mbarrier_arrive_expect_tx(thread, mbarrier, 64);"
    "if (argument(0)) mbarrier_arrive(thread, mbarrier, false);" + WAIT
)
UNFINISHED_BYTES = body(begin() + "if (!thread.number) mbarrier_arrive_expect_tx(thread, mbarrier, 64);")
NO_MBARRIER = body("mbarrier_arrive(thread, kSharedBase + 8, false);")
TOO_MANY_BYTES = body(begin() + "mbarrier_arrive_expect_tx(thread, mbarrier, 1 << 20);")
PARITY_OF_2 = body(begin() + "mbarrier_try_wait_parity(thread, mbarrier, 2);")
ENDLESS = body(begin() + "while (mbarrier_try_wait_parity(thread, mbarrier, 1)) {}")
MISALIGNED_ARRIVAL = body("mbarrier_arrive(thread, kSharedBase + 12, false);")
UNORDERED_INIT = body("""
    if (thread.number == 0) mbarrier_init(thread, kSharedBase, 1);
    bar_sync(thread, 1, 0, 32);
    if (thread.number == 1) store(thread, 0, 1);
""")
RACING_INIT = body("""
    if (thread.warp == 0 && thread.lane == 0) mbarrier_init(thread, kSharedBase, 1);
    if (thread.warp == 1) for (u32 turn = 0; turn < 50; ++turn) bar_sync(thread, 1, 1, 32);
    if (thread.warp == 1) mbarrier_try_wait_parity(thread, kSharedBase, 1);
""")
TWICE = body("if (thread.number == 0) for (u32 turn = 0; turn < 2; ++turn) mbarrier_init(thread, kSharedBase, 1);")
MISALIGNED = body("mbarrier_init(thread, kSharedBase + 4, 1);")
TOO_FEW_ARRIVALS = body("mbarrier_init(thread, kSharedBase, 0);")


def test_the_phase_before_the_first_counts_as_ended():
    out = words(1)
    with pytest.raises(ProbeError, match=r"deadlock: 32 threads .* at mbarrier.try_wait"):
        launch(PARITY, out)
    assert out == 1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_more_threads_arrive_than_the_mbarrier_is_for(schedule):
    launch(ARRIVALS, False, schedule=schedule)  # 8 phases
    with pytest.raises(ProbeError, match=r"deadlock|more than"):
        launch(BYTES, True, schedule=schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_phases_wait_for_bytes(schedule):
    with pytest.raises(ProbeError, match=r"deadlock: .* at mbarrier.try_wait"):
        launch(BYTES, False, schedule=schedule)
    with pytest.raises(ProbeError, match=f"mbarrier {BASE + MBARRIER} still waits for 64 bytes at the end"):
        launch(UNFINISHED_BYTES, schedule=schedule)


def test_mbarriers_must_be_there_and_in_order():
    cases = [
        (NO_MBARRIER, "no mbarrier was initialised at shared 1032"),
        (UNORDERED_INIT, "an mbarrier is there"),
        (TWICE, "initialised twice"),
        (MISALIGNED, "mbarrier.init at shared 1028, which is not aligned to 8"),
        (MISALIGNED_ARRIVAL, "mbarrier at shared 1036, which is not aligned to 8"),
        (TOO_FEW_ARRIVALS, "for 0 arrivals"),
    ]
    for which, message in cases:
        with pytest.raises(ProbeError, match=message):
            run(which)
    cases = [
        (TOO_MANY_BYTES, "expect_tx of 1048576 bytes"),
        (PARITY_OF_2, "for parity 2"),
        (ENDLESS, "mbarrier.try_wait came 5000000 times"),
    ]
    for which, message in cases:
        with pytest.raises(ProbeError, match=message):
            launch(which)
    with pytest.raises(ProbeError, match="race: the initialisation of mbarrier 1024"):
        run(RACING_INIT, threads=64)


# ---- Boxes


def tensor_map(array, box, swizzle=0, dims=None):
    """Of an array with five axes; `box` with the innermost first."""
    dims = array.shape[::-1] if dims is None else dims
    sizes = (*dims, *array.strides[-2::-1], *box)
    head = (0x70616D2D78747000, array.ctypes.data, array.itemsize, swizzle)
    return struct.pack("<QQII5I4x4Q5H", *head, *sizes).ljust(128, b"\0")


def corner(*place):
    return [value % 2**64 for value in place]


CORNER = (
    "const u32 corner[5] = {(u32)argument(1), (u32)argument(2), (u32)argument(3), (u32)argument(4), (u32)argument(5)};"
)
LOAD_BOX = (
    f"cp_async_bulk_tensor_5d_load(thread, kSharedBase, tensor_map(0), mbarrier, corner, false, 0, {EVICT_NORMAL});"
)
COPY_OUT = """
    for (u32 offset = 4 * thread.number; offset < argument(7); offset += 4 * launch.threads)
        array(0)[offset / 4] = load(thread, offset);
"""
BOX = body(
    f"""{begin()} {CORNER}
    if (thread.number == 0) {{
        prefetch_tensormap(thread, tensor_map(0));
        mbarrier_arrive_expect_tx(thread, mbarrier, (u32)argument(6));
        {LOAD_BOX}
    }}
    if (argument(8)) {WAIT}
    {COPY_OUT}"""
)


def swizzled(offsets, swizzle):
    """Bytes' places: bits 4 and on are exchanged by bits 7 and on, as many as tell a row's chunks apart."""
    chunks = max(swizzle, 16) // 16
    return offsets ^ ((offsets >> 7) % chunks << 4)


def box_of(array, start, sizes):
    """What a box holds, zeros outside; axes as in the array."""
    found = np.zeros(sizes[::-1], array.dtype)
    for place in np.ndindex(found.shape):
        index = [first + at for first, at in zip(start[::-1], place, strict=True)]
        if all(0 <= i < n for i, n in zip(index, array.shape, strict=True)):
            found[place] = array[tuple(index)]
    return found


@pytest.fixture
def tensor(rng):
    array = rng.integers(1, 2**16, (2, 2, 3, 40, 72), np.uint16)
    array.flags.writeable = False
    return array


BOXES = [
    ((0, 0, 0, 0, 0), (64, 16, 1, 1, 1), 128),
    ((40, 30, 1, 1, 1), (64, 16, 1, 1, 1), 128),  # over both edges
    ((-8, -3, 2, 0, 1), (64, 8, 1, 1, 1), 128),
    ((8, 39, 0, 1, 0), (32, 8, 1, 1, 1), 64),
    ((65, 1, 0, 0, 1), (16, 8, 1, 1, 1), 32),
    ((0, 3, 1, 0, 0), (8, 4, 2, 2, 2), 0),
    ((0, 0, 0, 0, 0), (64, 20, 3, 1, 1), 128),  # more rows than a pattern
    ((100, 0, 0, 0, 0), (64, 8, 1, 1, 1), 128),  # wholly outside
]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("start", "sizes", "swizzle"), BOXES)
def test_boxes_come_swizzled_with_zeros_outside(start, sizes, swizzle, schedule, tensor):
    expected = box_of(tensor, start, sizes).view(np.uint8).ravel()
    out = np.zeros(expected.size, np.uint8)
    map_ = tensor_map(tensor, sizes, swizzle)
    launch(BOX, out, *corner(*start), out.size, out.size, True, tensor, maps=[map_], schedule=schedule)
    np.testing.assert_array_equal(out[swizzled(np.arange(out.size), swizzle)], expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_boxes_that_nobody_waited_for_are_reported(schedule, tensor):
    map_ = tensor_map(tensor, (64, 8, 1, 1, 1), 128)
    with pytest.raises(ProbeError, match=r"a copy to it is under way|race on shared memory|nobody wrote it"):
        launch(BOX, words(256), *corner(0, 0, 0, 0, 0), 1024, 1024, False, tensor, maps=[map_], schedule=schedule)


@pytest.mark.parametrize("announced", [512, 2048])
def test_boxes_bring_the_bytes_that_were_announced(announced, tensor):
    map_ = tensor_map(tensor, (64, 8, 1, 1, 1), 128)
    with pytest.raises(ProbeError, match=r"deadlock|still waits for"):
        launch(BOX, words(256), *corner(0, 0, 0, 0, 0), announced, 1024, True, tensor, maps=[map_])


WRITTEN_BEFORE = f"""{begin()} {CORNER}
    for (u32 offset = 4 * thread.number; offset < 1024; offset += 128) store(thread, offset, 1);
    %s
    bar_sync(thread, 1, 0, -1);
    if (thread.number == 0) {{ mbarrier_arrive_expect_tx(thread, mbarrier, 1024); {LOAD_BOX} }}
    {WAIT}"""
UNFENCED = body(WRITTEN_BEFORE % "")
FENCED = body(WRITTEN_BEFORE % "fence_proxy_async(thread);")
UNFENCED_MBARRIER = body(
    f"""const u32 mbarrier = kSharedBase + {MBARRIER}; {CORNER}
    if (thread.number == 0) {{
        mbarrier_init(thread, mbarrier, 1);
        mbarrier_arrive_expect_tx(thread, mbarrier, 1024);
        {LOAD_BOX}
    }}"""
)
NO_PARAMETER = body("prefetch_tensormap(thread, argument(0) & ~63);")
MISALIGNED_MAP = body("prefetch_tensormap(thread, tensor_map(0) + 32);")
ELSEWHERE = body(begin() + CORNER + LOAD_BOX.replace("kSharedBase,", "kSharedBase + (1 << 24),"))
MISPLACED_STORE = body(CORNER + "cp_async_bulk_tensor_5d_store(thread, tensor_map(0), kSharedBase + 16, corner);")
MISPLACED = body(begin() + CORNER + LOAD_BOX.replace("kSharedBase,", "kSharedBase + 64,"))
OTHER_POLICY = body(begin() + CORNER + LOAD_BOX.replace(EVICT_NORMAL, "1"))


def test_the_async_proxy_needs_fences_and_legal_operands(tensor):
    box = words(1), *corner(0, 0, 0, 0, 0), 0, 0, 0, tensor
    maps = [tensor_map(tensor, (64, 8, 1, 1, 1), 128)]
    launch(FENCED, *box, maps=maps)
    cases = [
        (UNFENCED, maps, r"box at shared \d+: thread \d+ wrote there, without fence.proxy.async since"),
        (UNFENCED_MBARRIER, maps, "no fence.mbarrier_init since its initialisation"),
        (MISPLACED, maps, "not aligned to 128"),
        (OTHER_POLICY, maps, "cache policy 0x1"),
        (FENCED, [bytes(128)], "no tensor map at"),
        (FENCED, [tensor_map(tensor, (64, 8, 1, 1, 1), 64)], "rows of a box have 128 bytes, with a swizzle of 64"),
        (NO_PARAMETER, [], "is no parameter"),
        (MISALIGNED_MAP, maps, "tensor map at .*, not aligned to 64"),
        (ELSEWHERE, maps, "in another block"),
        (MISPLACED_STORE, maps, "box from shared 0x410, not aligned to 128"),
    ]
    for which, given, message in cases:
        with pytest.raises(ProbeError, match=message):
            launch(which, *box, maps=given)


# Stores of a box that all threads wrote.
STORE_BOX = body(
    f"""{CORNER}
    for (u32 offset = 4 * thread.number; offset < argument(7); offset += 4 * launch.threads)
        store(thread, offset, array(6)[offset / 4]);
    if (argument(8)) fence_proxy_async(thread);
    bar_sync(thread, 1, 0, -1);
    if (thread.number == 0) {{
        cp_async_bulk_tensor_5d_store(thread, tensor_map(0), kSharedBase, corner);
        cp_async_bulk_commit_group(thread);
        if (argument(9)) cp_async_bulk_wait_group(thread, 0, true);
    }}
    if (argument(10)) bar_sync(thread, 2, 0, -1);
    store(thread, 4 * thread.number, 0);"""
)


def store_box(array, start, sizes, swizzle, fenced=True, waited_for=True, ordered=True, **options):
    """What the array is afterwards, and what it should be; out of bounds nothing is written."""
    count = int(np.prod(sizes))
    box = np.arange(1, count + 1, dtype=array.dtype).reshape(sizes[::-1])
    image = np.zeros(box.nbytes, np.uint8)
    image[swizzled(np.arange(box.nbytes), swizzle)] = box.view(np.uint8).ravel()
    expected = array.copy()
    for place in np.ndindex(box.shape):
        index = tuple(first + at for first, at in zip(start[::-1], place, strict=True))
        if all(0 <= i < n for i, n in zip(index, array.shape, strict=True)):
            expected[index] = box[place]
    flags = fenced, waited_for, ordered
    maps = [tensor_map(array, sizes, swizzle)]
    launch(STORE_BOX, array, *corner(*start), image, image.size, *flags, maps=maps, **options)
    return array, expected


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("start", "sizes", "swizzle"), BOXES)
def test_boxes_go_back_without_what_is_outside(start, sizes, swizzle, schedule):
    found, expected = store_box(np.zeros((2, 2, 3, 40, 72), np.uint16), start, sizes, swizzle, schedule=schedule)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_stores_read_what_was_fenced_and_is_kept(schedule):
    def store(**flags):
        return store_box(
            np.zeros((1, 1, 1, 8, 64), np.uint16), (0,) * 5, (64, 8, 1, 1, 1), 128, schedule=schedule, **flags
        )

    with pytest.raises(ProbeError, match=r"without fence.proxy.async since"):
        store(fenced=False)
    with pytest.raises(ProbeError, match=r"race on shared memory|without fence.proxy.async since"):
        store(ordered=False)
    if schedule == 1:
        with pytest.raises(ProbeError, match=r"may still read shared memory|without fence|race"):
            store(waited_for=False)


# ---- Clusters

MULTICAST = body(
    f"""{begin()} {CORNER}
    if (thread.number == 0) mbarrier_arrive_expect_tx(thread, mbarrier, 1024);
    barrier_cluster_arrive_release(thread, 1);
    barrier_cluster_wait_acquire(thread, 2);
    if (thread.number == 0 && thread.rank == 1)
        cp_async_bulk_tensor_5d_load(thread, kSharedBase, tensor_map(0), mbarrier, corner, true, (u32)argument(8),
                                     {EVICT_NORMAL});
    {WAIT}
    for (u32 offset = 4 * thread.number; offset < 1024; offset += 4 * launch.threads)
        array(0)[256 * thread.rank + offset / 4] = load(thread, offset);
    barrier_cluster_arrive_release(thread, 3);
    barrier_cluster_wait_acquire(thread, 4);"""
)
ANNOUNCED = body(
    f"""const u32 mbarrier = kSharedBase + {MBARRIER};
    if (thread.number == 0) {{
        mbarrier_init(thread, mbarrier, 2);
        if (argument(0) != 1) fence_mbarrier_init(thread);
        store(thread, 0, 7);
    }}
    if (argument(0) == 2) barrier_cluster_arrive_release(thread, 1);
    if (argument(0) != 2) barrier_cluster_arrive_relaxed(thread, 1);
    barrier_cluster_wait_acquire(thread, 2);
    if (thread.number < 2) mbarrier_arrive(thread, mapa_shared_cluster(thread, mbarrier, thread.number), true);
    if (thread.number == 1 && argument(0)) load(thread, 0);
    {WAIT}"""
)
REMOTE_ARRIVAL = body(
    f"""{begin()}
    if (argument(0)) {{ barrier_cluster_arrive_release(thread, 1); barrier_cluster_wait_acquire(thread, 2); }}
    if (thread.rank == 0 && thread.number == 0)
        mbarrier_arrive(thread, mapa_shared_cluster(thread, mbarrier, 1), argument(2));
    if (thread.rank == 1) {WAIT}
    if (argument(1)) {{ barrier_cluster_arrive_release(thread, 3); barrier_cluster_wait_acquire(thread, 4); }}"""
)
MAPA = body("mapa_shared_cluster(thread, kSharedBase, (u32)argument(0));")
ARRIVAL_AT = body("mbarrier_arrive(thread, (u32)argument(0), true);")
WAIT_ALONE = body("barrier_cluster_wait_acquire(thread, 1);")
ARRIVE_TWICE = body("for (u32 turn = 0; turn < 2; ++turn) barrier_cluster_arrive_release(thread, 1);")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_multicast_comes_to_all_that_it_names(schedule, tensor):
    out = words(512)
    maps = [tensor_map(tensor, (64, 8, 1, 1, 1))]
    options = {"maps": maps, "grid": (2, 1, 1), "cluster": 2, "schedule": schedule}
    launch(MULTICAST, out, *corner(0, 0, 0, 0, 0), tensor, 0, 3, **options)
    expected = np.ascontiguousarray(tensor[0, 0, 0, :8, :64]).view(np.uint32).ravel()
    np.testing.assert_array_equal(out.reshape(2, 256), [expected, expected])
    for ranks, message in ((1, "deadlock"), (4, "multicast to blocks 0x4 of 2"), (0, "multicast to blocks 0")):
        with pytest.raises(ProbeError, match=message):
            launch(MULTICAST, out, *corner(0, 0, 0, 0, 0), tensor, 0, ranks, **options)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_blocks_reach_for_each_others_mbarriers_while_they_are_there(schedule):
    options = {"grid": (2, 1, 1), "cluster": 2, "schedule": schedule}
    launch(REMOTE_ARRIVAL, True, True, True, **options)
    with pytest.raises(ProbeError, match=r"no mbarrier was initialised|race: the initialisation"):
        launch(REMOTE_ARRIVAL, False, True, True, **options)
    with pytest.raises(ProbeError, match="in another block"):
        launch(REMOTE_ARRIVAL, True, True, False, **options)
    with pytest.raises(ProbeError, match="mapa to block 2 of 2"):
        launch(MAPA, 2, **options)
    with pytest.raises(ProbeError, match="address 0x3000400 is in no block"):
        launch(ARRIVAL_AT, 3 << 24 | BASE, **options)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_relaxed_arrival_tells_of_mbarriers_behind_their_fence_and_of_nothing_else(schedule):
    options = {"grid": (2, 1, 1), "cluster": 2, "schedule": schedule}
    nothing, unfenced, released, read = range(4)
    launch(ANNOUNCED, nothing, **options)
    launch(ANNOUNCED, released, **options)
    with pytest.raises(ProbeError, match=r"race: the initialisation of mbarrier|no fence.mbarrier_init since"):
        launch(ANNOUNCED, unfenced, **options)
    with pytest.raises(ProbeError, match=r"race on shared memory 1024: a write of thread 0"):
        launch(ANNOUNCED, read, **options)


LATE_REACH = body(
    f"""{begin()}
    barrier_cluster_arrive_release(thread, 1);
    barrier_cluster_wait_acquire(thread, 2);
    for (u32 turn = 0; turn < argument(0) && thread.rank == 0; ++turn) bar_sync(thread, 3, 0, -1);
    if (thread.rank == 0 && thread.number == 0)
        mbarrier_arrive(thread, mapa_shared_cluster(thread, mbarrier, 1), true);"""
)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_blocks_that_may_exit_before_others_reach_for_them_are_reported(schedule):
    with pytest.raises(ProbeError, match=r"may exit before|has exited"):
        launch(LATE_REACH, 0, grid=(2, 1, 1), cluster=2, schedule=schedule)
    with pytest.raises(ProbeError, match=r"block 1 of the cluster, whose mbarrier this is, has exited"):
        launch(LATE_REACH, 50, grid=(2, 1, 1), cluster=2)


def test_cluster_barriers_are_arrived_at_and_then_waited_for():
    with pytest.raises(ProbeError, match=r"barrier.cluster.arrive twice"):
        run(ARRIVE_TWICE)
    with pytest.raises(ProbeError, match=r"barrier.cluster.wait without barrier.cluster.arrive"):
        run(WAIT_ALONE)


# ---- Registers

REGISTERS = body("""
    if (thread.warp < 4) {
        if (argument(0)) setmaxnreg_dec(thread, 1, (u32)argument(0));
    } else {
        setmaxnreg_inc(thread, 2, (u32)argument(1));
    }
""")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_registers_are_what_others_gave_back(schedule):
    run(REGISTERS, 24, 240, threads=384, schedule=schedule)  # of 168; two warpgroups take half of 144 each
    with pytest.raises(ProbeError, match=r"deadlock: .* at setmaxnreg.inc, for registers that others give back"):
        run(REGISTERS, 0, 240, threads=384, schedule=schedule)
    with pytest.raises(ProbeError, match=r"deadlock: .* at setmaxnreg.inc"):
        run(REGISTERS, 24, 248, threads=384, schedule=schedule)


@pytest.mark.parametrize(
    ("fewer", "more", "message"),
    [
        (16, 240, "to 16"),
        (36, 240, "to 36"),
        (176, 240, "dec to 176 from 168"),
        (0, 264, "to 264"),
        (0, 160, "inc to 160"),
    ],
)
def test_numbers_of_registers_are_checked(fewer, more, message):
    with pytest.raises(ProbeError, match=f"setmaxnreg.?{message}"):
        run(REGISTERS, fewer, more, threads=384)


# ---- Products of warpgroups

NUMBERS = {"f16": np.float16, "bf16": ml_dtypes.bfloat16, "e4m3": FLOAT8}
COLUMNS = 64
FILL = """
    for (u32 offset = 4 * thread.number; offset < 65536; offset += 4 * launch.threads)
        store(thread, offset, array(1)[offset / 4]);
    fence_proxy_async(thread);
    bar_sync(thread, 1, 0, -1);
"""
TAKE = f"""
    u32 d[{COLUMNS // 2}], a[4];
    u32 *d_registers[{COLUMNS // 2}], *a_registers[4];
    for (u32 index = 0; index < {COLUMNS // 2}; ++index) {{
        d[index] = array(2)[{COLUMNS // 2} * thread.number + index];
        d_registers[index] = d + index;
    }}
    for (u32 index = 0; index < 4; ++index) {{
        a[index] = array(3)[4 * thread.number + index];
        a_registers[index] = a + index;
    }}
"""
GIVE = f"""
    for (u32 index = 0; index < {COLUMNS // 2}; ++index)
        array(0)[{COLUMNS // 2} * thread.number + index] = d[index];
"""
BEGIN_PRODUCT = "wgmma_fence(thread, 2);"
END_PRODUCT = "wgmma_commit_group(thread, 4); wgmma_wait_group(thread, 5, 0);"


def issue(number="f16", name="what"):
    return f"""
        const WarpgroupProduct {name}{{{COLUMNS}, Number::{number}, (bool)argument(6), (bool)argument(7),
                                      (s32)argument(8), (s32)argument(9), (bool)argument(10), (bool)argument(11)}};
        wgmma_mma_async(thread, 3, {name}, d_registers, argument(4), {name}.a_is_shared ? nullptr : a_registers,
                        argument(5));
    """


def product_body(number="f16", begin=BEGIN_PRODUCT, end=END_PRODUCT, fill=FILL):
    return body(fill + TAKE + begin + issue(number) + end + GIVE)


PRODUCT = {number: product_body(number) for number in NUMBERS}


def lane_places(columns):
    """Rows and columns of the accumulators of 128 threads, by 9.7.15.5.1.1.2."""
    thread, index = np.divmod(np.arange(128 * columns // 2), columns // 2)
    warp, lane = thread // 32, thread % 32
    row = 16 * warp + lane // 4 + index // 2 % 2 * 8
    return row, index // 4 * 8 + lane % 4 * 2 + index % 2


def a_registers(a):
    """A's registers of 128 threads: bytes of row and row + 8, and 16 bytes on."""
    row_bytes = np.ascontiguousarray(a).view(np.uint8).reshape(64, 32)
    thread = np.arange(128)
    row, place = 16 * (thread // 32) + thread % 32 // 4, thread % 4 * 4
    found = [
        row_bytes[(row + row_step)[:, None], (place + byte_step)[:, None] + np.arange(4)]
        for byte_step in (0, 16)
        for row_step in (0, 8)
    ]
    return np.stack(found, axis=1).copy().view(np.uint32)[..., 0]


def put(image, start, matrix, transposes, swizzle):
    """Lays `matrix` (rows, K) out from byte `start` of shared memory on, as TMA would; its descriptor.

    Not transposed, K is contiguous: rows of the swizzle's width, of which the product takes the second 32 bytes where
    there are so many.  Transposed, rows are: columns of the swizzle's width, then 8 of K, then the next columns.
    """
    itemsize, (rows, depth) = matrix.dtype.itemsize, matrix.shape
    row, k = np.meshgrid(np.arange(rows), np.arange(depth), indexing="ij")
    width = swizzle or 16
    skipped = 32 if swizzle >= 64 and not transposes else 0
    mode = {0: 0, 128: 1, 64: 2, 32: 3}[swizzle]
    if not transposes and swizzle:
        stride, leading = 8 * width, 16
        place = row * width + k * itemsize + skipped
    elif not transposes:
        stride, leading = 128, 128 * rows // 8
        place = row // 8 * stride + row % 8 * 16 + k * itemsize // 16 * leading + k * itemsize % 16
    elif swizzle:
        stride, leading = 8 * width, 8 * width * depth // 8
        place = k // 8 * stride + k % 8 * width + row * itemsize // width * leading + row * itemsize % width
    else:
        stride, leading = 128, 128 * rows * itemsize // 16
        place = row * itemsize // 16 * stride + k // 8 * leading + k % 8 * 16 + row * itemsize % 16
    values = np.ascontiguousarray(matrix).view(f"u{itemsize}")
    for byte in range(itemsize):
        image[swizzled(start + place + byte, swizzle)] = values >> (8 * byte) if itemsize > 1 else values
    shared = BASE + start + skipped
    return shared >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62


def product(
    which, a, b, c, a_is_shared=True, transposes=(False, False), swizzle=128, adds=True, signs=(1, 1), **options
):
    """D = A B + C by the body `which`; `b` is (N, K)."""
    image = np.zeros(65536, np.uint8)
    descriptors = put(image, 0, a, transposes[0], swizzle), put(image, 32768, b, transposes[1], swizzle)
    places = lane_places(COLUMNS)
    d = c[places].astype(np.float32)
    out = np.full(d.size, 7, np.float32)
    flags = a_is_shared, adds, *corner(*signs), *transposes
    run(which, out, image, d, a_registers(a), *descriptors, *flags, threads=128, shared_memory=65536, **options)
    found = np.zeros((64, COLUMNS), np.float32)
    found[places] = out
    return found


def matrices(number, rng):
    dtype = NUMBERS[number]
    depth = 32 // dtype(0).itemsize
    a, b = rng.integers(-8, 9, (64, depth)).astype(dtype), rng.integers(-8, 9, (COLUMNS, depth)).astype(dtype)
    return a, b, rng.integers(-99, 100, (64, COLUMNS)).astype(np.float32)


def exact(a, b, c):
    return a.astype(np.float64) @ b.astype(np.float64).T + c


LAYOUTS = [
    (number, a_is_shared, (transposes_a, transposes_b), swizzle)
    for number in NUMBERS
    for a_is_shared in (False, True)
    for transposes_a in (False, True)
    for transposes_b in (False, True)
    for swizzle in (0, 32, 64, 128)
    if (number != "e4m3" or not (transposes_a or transposes_b)) and (a_is_shared or not transposes_a)
]


@pytest.mark.parametrize(("number", "a_is_shared", "transposes", "swizzle"), LAYOUTS)
def test_wgmma_is_a_product_in_every_layout(number, a_is_shared, transposes, swizzle, rng):
    a, b, c = matrices(number, rng)
    options = {"a_is_shared": a_is_shared, "transposes": transposes, "swizzle": swizzle}
    for schedule in SCHEDULES:
        np.testing.assert_array_equal(product(PRODUCT[number], a, b, c, schedule=schedule, **options), exact(a, b, c))


def test_wgmma_has_signs_and_may_not_add(rng):
    a, b, c = matrices("f16", rng)
    found = product(PRODUCT["f16"], a, b, c, signs=(-1, 1))
    np.testing.assert_array_equal(found, exact(-a, b, c))
    np.testing.assert_array_equal(product(PRODUCT["f16"], a, b, c, signs=(1, -1)), exact(-a, b, c))
    np.testing.assert_array_equal(product(PRODUCT["f16"], a, b, c, adds=False), exact(a, b, 0))


def test_sums_of_float8_keep_13_bits_behind_the_largest_terms_first():
    """448 * 448 is 2**17 and more: what is below 2**4 of each other term is lost."""
    a, b, c = np.zeros((64, 32), FLOAT8), np.zeros((COLUMNS, 32), FLOAT8), np.zeros((64, COLUMNS), np.float32)
    a[:, 0], b[:, 0] = 448, 448
    for small, kept in ((9, 0), (15, 0), (16, 16), (18, 16), (-15, 0), (-18, -16), (40, 32)):
        a[:, 1], b[:, 1] = 1, 1
        c[:] = small
        a[:, 1] = small if abs(small) < 16 or small == 18 else 0
        expected = 448**2 + kept + (kept if abs(small) < 16 or small == 18 else 0)
        assert (product(PRODUCT["e4m3"], a, b, c) == expected).all()


READ_EARLY = product_body(end="wgmma_commit_group(thread, 4);" + GIVE + "wgmma_wait_group(thread, 5, 0); return;")
WRITTEN_EARLY = product_body(end="wgmma_commit_group(thread, 4); d[3] = 0; wgmma_wait_group(thread, 5, 0);")
A_CHANGED = product_body(end="wgmma_commit_group(thread, 4); a[1] ^= 1; wgmma_wait_group(thread, 5, 0);")
NO_WAIT = product_body(end="wgmma_commit_group(thread, 4); return;")
NO_COMMIT = product_body(end="wgmma_wait_group(thread, 5, 0); return;")
WAIT_FOR_FEWER = product_body(end="wgmma_commit_group(thread, 4); wgmma_wait_group(thread, 5, 1);" + GIVE + "return;")
NO_FENCE = product_body(begin="")
NO_SECOND_FENCE = product_body(end=END_PRODUCT + "d[2] = 5;" + issue(name="again") + END_PRODUCT)
UNFENCED_SHARED = product_body(fill=FILL.replace("fence_proxy_async(thread);", ""))
UNORDERED_SHARED = product_body(fill=FILL.replace("bar_sync(thread, 1, 0, -1);", ""))
OVERWRITTEN = product_body(
    end="wgmma_commit_group(thread, 4); store(thread, 4 * thread.number, 0); wgmma_wait_group(thread, 5, 0);"
)
SAME_REGISTER = product_body(begin=BEGIN_PRODUCT + "d_registers[3] = d;")
OTHER_STREAM = product_body(begin=BEGIN_PRODUCT + "if (thread.warp == 2) wgmma_fence(thread, 2);")
BROKEN = {
    "an accumulator written": (WRITTEN_EARLY, {}, "accumulator 3 was written while it was under way"),
    "A changed": (A_CHANGED, {"a_is_shared": False, "transposes": (False, False)}, "register 1 of A changed"),
    "no wait": (NO_WAIT, {}, "exit with wgmma under way"),
    "no commit": (NO_COMMIT, {}, "exit with wgmma under way"),
    "no wgmma.fence": (NO_FENCE, {}, "wgmma without wgmma.fence before"),
    "no wgmma.fence behind a change": (NO_SECOND_FENCE, {}, "register 2 was changed since the last product"),
    "no fence.proxy.async": (UNFENCED_SHARED, {}, "without fence.proxy.async since"),
    "no barrier": (UNORDERED_SHARED, {}, "race on shared memory|nobody wrote it|without fence"),
    "a register twice": (SAME_REGISTER, {}, "an accumulator is named twice"),
    "warps apart": (OTHER_STREAM, {}, "the warps of a warpgroup do different things|deadlock"),
}


# In schedules 0 and 2 A may have been read before it changes.
@pytest.mark.parametrize(
    ("what", "schedule"),
    [(what, schedule) for what in BROKEN for schedule in SCHEDULES if schedule == 1 or what != "A changed"],
)
def test_what_must_not_be_done_around_wgmma_is_reported(what, schedule, rng):
    which, options, message = BROKEN[what]
    with pytest.raises(ProbeError, match=message):
        product(which, *matrices("f16", rng), schedule=schedule, **options)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("which", [READ_EARLY, WAIT_FOR_FEWER])
def test_accumulators_that_are_read_too_early_are_nan(which, schedule, rng):
    if which == WAIT_FOR_FEWER:
        with pytest.raises(ProbeError, match="exit with wgmma under way"):
            product(which, *matrices("f16", rng), schedule=schedule)
    else:
        assert np.isnan(product(which, *matrices("f16", rng), schedule=schedule)).all()


def test_shared_memory_overwritten_while_a_product_may_read_it_is_reported(rng):
    with pytest.raises(ProbeError, match=r"race on shared memory|without fence.proxy.async"):
        product(OVERWRITTEN, *matrices("f16", rng), schedule=1)
    with pytest.raises(ProbeError, match=r"race on shared memory \d+: a read by products of warpgroup 0"):
        product(OVERWRITTEN, *matrices("f16", rng), schedule=0)


@pytest.mark.parametrize(
    ("bits", "message"), [(1 << 14, "bits that must be 0"), (1 << 49, "a base offset"), (8, "begins within")]
)
def test_descriptors_are_checked(bits, message, rng):
    a, _b, c = matrices("f16", rng)
    image = np.zeros(65536, np.uint8)
    descriptor = put(image, 0, a, False, 128)
    flags = True, True, 1, 1, False, False
    out, d = np.zeros(64 * COLUMNS, np.float32), c[lane_places(COLUMNS)].astype(np.float32)
    arguments = out, image, d, a_registers(a), descriptor, (descriptor & ~0x6) | bits, *flags
    with pytest.raises(ProbeError, match=message):
        run(PRODUCT["f16"], *arguments, threads=128, shared_memory=65536)


OTHER_ORDER = "std::swap(d_registers[1], d_registers[2]);"
OTHER_SET = "u32 more = 0; d_registers[0] = &more;"
ILLEGAL = {
    "60 columns": (body(FILL + TAKE + BEGIN_PRODUCT + issue().replace(f"{{{COLUMNS},", "{60,") + END_PRODUCT), {}),
    "signs that are not 1 or -1": (PRODUCT["f16"], {"signs": (2, 1)}),
    "transposed e4m3": (PRODUCT["e4m3"], {"transposes": (False, True)}),
    "transposed registers": (PRODUCT["f16"], {"a_is_shared": False, "transposes": (True, False)}),
    "differ between lanes": (
        body(FILL + TAKE + BEGIN_PRODUCT + issue().replace("argument(5)", "argument(5) + 2 * (thread.lane == 3)")),
        {},
    ),
    "accumulators under way in another order": (product_body(end=OTHER_ORDER + issue(name="second") + END_PRODUCT), {}),
    "an accumulator is under way with others": (product_body(end=OTHER_SET + issue(name="second") + END_PRODUCT), {}),
}


@pytest.mark.parametrize("message", ILLEGAL)
def test_products_that_cannot_be_are_refused(message, rng):
    which, options = ILLEGAL[message]
    number = "e4m3" if which == PRODUCT["e4m3"] else "f16"
    a, b, c = matrices(number, rng)
    if number == "e4m3":
        options = {**options, "swizzle": 32}
    with pytest.raises(ProbeError, match=message):
        product(which, a, b, c, **options)


ACCUMULATED = product_body(
    end=issue(name="second") + "wgmma_commit_group(thread, 4);"
    + issue(name="third") + END_PRODUCT.replace("(thread, 4)", "(thread, 6)")
)  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_products_follow_each_other_in_the_same_accumulators(schedule, rng):
    a, b, c = matrices("f16", rng)
    np.testing.assert_array_equal(product(ACCUMULATED, a, b, c, schedule=schedule), 3 * exact(a, b, 0) + c)


ODD_BLOCK = body("wgmma_fence(thread, 1);")


def test_warpgroups_are_whole():
    with pytest.raises(ProbeError, match="no whole number of warpgroups"):
        run(ODD_BLOCK, threads=96)
