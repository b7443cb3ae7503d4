"""Hopper's part of the emulator: what its instructions mean, in every schedule, and that every error is reported.

Bodies of small kernels stand beside the test that runs them, as in test_emulator.py. They see: `in` and `out` (arrays
of uint32 unless cast), `n`, `base` (shared memory, aligned to 1024 bytes), `thread`, `lane`, `warp`, and the parameter
`p` with the maps `p.from` and `p.to`.
"""

import functools

import ml_dtypes
import numpy as np
import pytest

import emulator
from emulator import SCHEDULES, EmulatorError, encode_map

SEED = 20261121
DTYPES = {"Half": np.float16, "BFloat16": ml_dtypes.bfloat16, "Float8": ml_dtypes.float8_e4m3fn}
BODIES = []

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)


@pytest.fixture(autouse=True)
def compiler():
    emulator.require_compiler()


@pytest.fixture
def rng():
    return np.random.default_rng(SEED)


def body(text):
    """Notes the body of a kernel; the result names it."""
    BODIES.append(text)
    return len(BODIES) - 1


PROBE = np.dtype(
    {
        "names": ["from", "to", "in", "out", "which", "n"],
        "formats": ["V128", "V128", "u8", "u8", "i4", "i4"],
        "offsets": [0, 128, 256, 264, 272, 276],
        "itemsize": 320,
    }
)
NO_MAP = bytes(128)

HELPERS = """
    constexpr uint32 kBarriers = 0x400 + 65536;  // mbarriers lie behind 64 KiB
    DEVICE uint32 mbarrier(int index) { return kBarriers + 8 * index; }
    // Eight mbarriers that wait for one thread, and a ninth that waits for 128.
    DEVICE void init_mbarriers() {
        if (ptx::thread() == 0) {
            for (int index = 0; index < 9; ++index) ptx::mbarrier_init(mbarrier(index), index < 8 ? 1 : 128);
            ptx::fence_mbarrier_init();
        }
        ptx::barrier();
    }
    // A matrix whose rows of `width` bytes are swizzled, in tiles of 8 rows; next slabs follow after `rows` rows.
    DEVICE uint64 descriptor(uint32 start, uint32 leading, int width) {
        const uint64 mode = width == 128 ? 1 : width == 64 ? 2 : width == 32 ? 3 : 0;
        return start >> 4 | uint64(leading >> 4) << 16 | uint64(8 * width >> 4) << 32 | mode << 62;
    }
    template <int kBlocks>
    DEVICE void store_sums(float* out, const float (&c)[kBlocks][4]) {
        const int thread = ptx::thread() % 128;
        const int row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
        for (int j = 0; j < kBlocks; ++j)
            for (int i = 0; i < 4; ++i)
                ptx::store_global(out + (row + i / 2 * 8) * 8 * kBlocks + 8 * j + column + i % 2, c[j][i]);
    }
"""


@functools.cache
def probes():
    functions = "".join(
        f"DEVICE void body_{index}(const Probe& p, uint32* in, uint32* out, int n, uint32 base, int thread, int lane,"
        f' int warp) {{\n#line 1 "body"\n{text}\n}}\n'
        for index, text in enumerate(BODIES)
    )
    cases = "".join(
        f"case {index}: return body_{index}(p, p.in, p.out, p.n, ptx::shared_memory(), ptx::thread(), ptx::lane(), "
        "ptx::warp());\n"
        for index in range(len(BODIES))
    )
    source = f"""
        #include "instructions/ptx90.cuh"
        namespace cupyattn {{
        struct Probe {{ TensorMap from, to; uint32 *in, *out; int which, n; }};
        {HELPERS}
        {functions}
        __global__ void probe(const __grid_constant__ Probe p) {{ switch (p.which) {{ {cases} }} }}
        }}
    """
    return emulator.build("probe90.cu", "cupyattn::probe", sources={"probe90.cu": source}, flags=("-Wno-unused",))


def probe(which, given=None, out=None, n=0, threads=128, from_map=NO_MAP, to_map=NO_MAP, grid=(1, 1, 1), **options):
    """Runs a body, by default in one block; `out` if given, else what came of zeros, one uint32 for each thread."""
    given = np.zeros(4, np.uint32) if given is None else given
    out = np.zeros(threads, np.uint32) if out is None else out
    record = np.zeros((), PROBE)
    record["from"], record["to"] = np.void(from_map), np.void(to_map)
    record["in"], record["out"], record["which"], record["n"] = given.ctypes.data, out.ctypes.data, which, n
    shared_memory = 65536 + 1024
    probes().launch(record, grid, threads, shared_memory, [(given, False), (out, True)], **options)
    return out


def aligned(shape, dtype, fill=None):
    """An array at an address that TMA takes."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.zeros(size + 16, np.uint8)
    start = -raw.ctypes.data % 16
    array = raw[start : start + size].view(dtype).reshape(shape)
    if fill is not None:
        array[...] = fill
    return array


def map_of(array, box, swizzle=0):
    """The map of an array of five axes, slowest first as NumPy has them; so is the box."""
    return encode_map(array.ctypes.data, array.itemsize, array.shape[::-1], array.strides[-2::-1], box[::-1], swizzle)


# ---- Boxes ------------------------------------------------------------------------------------------

LOAD_BOX = body("""
    init_mbarriers();
    if (thread == 0) {
        ptx::prefetch_map(p.from);
        ptx::mbarrier_arrive_expect(mbarrier(0), 4 * n);
        int corner[5];
        for (int axis = 0; axis < 5; ++axis) corner[axis] = int(ptx::load_global(in + axis));
        ptx::load_box(base, p.from, mbarrier(0), corner[0], corner[1], corner[2], corner[3], corner[4], ptx::kKeepInL2);
    }
    ptx::mbarrier_wait(mbarrier(0), 0);
    for (int i = thread; i < n; i += 128) ptx::store_global(out + i, ptx::load_shared(base + 4 * i));
""")


def load_box(array, corner, box, swizzle=0, **options):
    """What a box from a corner looks like in shared memory."""
    words = int(np.prod(box)) * array.itemsize // 4
    given = np.array([*corner[::-1], 0, 0, 0], np.int32).view(np.uint32)
    out = np.zeros(words, np.uint32)
    record = np.zeros((), PROBE)
    record["from"] = np.void(map_of(array, box, swizzle))
    record["in"], record["out"], record["which"], record["n"] = given.ctypes.data, out.ctypes.data, LOAD_BOX, words
    buffers = [(given, False), (out, True), (array, False)]
    probes().launch(record, (1, 1, 1), 128, 65536 + 1024, buffers, **options)
    return out.view(array.dtype).reshape(box)


def clipped(array, corner, box):
    """The box, with zeros outside of the array."""
    found = np.zeros(box, array.dtype)
    index = np.ix_(*(np.arange(size) for size in box))
    where = [at + start for at, start in zip(index, corner, strict=True)]
    inside = functools.reduce(np.logical_and, [(w >= 0) & (w < d) for w, d in zip(where, array.shape, strict=True)])
    safe = [np.clip(w, 0, d - 1) for w, d in zip(where, array.shape, strict=True)]
    found[...] = np.where(inside, array[tuple(safe)], 0)
    return found


def swizzle_rows(tile, width):
    """Rows of `width` bytes as TMA lays them: byte a of the tile goes to a ^ (a >> 7 & width / 16 - 1) << 4."""
    raw = tile.reshape(-1).view(np.uint8)
    at = np.arange(raw.size)
    out = np.empty_like(raw)
    out[at ^ ((at >> 7 & (width // 16 - 1)) << 4)] = raw
    return out.view(tile.dtype).reshape(tile.shape)


@every_schedule
@pytest.mark.parametrize(
    ("corner", "box"),
    [
        ((0, 0, 0, 0, 0), (1, 1, 1, 5, 16)),
        ((1, 2, 0, 3, 8), (1, 1, 2, 4, 8)),
        ((1, 1, 1, 5, 8), (2, 2, 2, 4, 16)),
        ((0, -1, 0, -2, -8), (1, 3, 1, 4, 16)),
        ((0, 0, 0, 100, 0), (1, 1, 1, 4, 16)),
    ],
)
def test_a_box_is_a_piece_of_the_tensor_with_zeros_around_it(corner, box, schedule, rng):
    array = aligned((2, 3, 2, 7, 16), np.uint16)
    array[...] = rng.integers(1, 2**16, array.shape)
    found = load_box(array, corner, box, schedule=schedule)
    np.testing.assert_array_equal(found, clipped(array, corner, box))


@pytest.mark.parametrize("width", [32, 64, 128])
def test_the_rows_of_a_box_are_swizzled(width, rng):
    array = aligned((1, 1, 3, 20, width // 2), np.uint16)
    array[...] = rng.integers(1, 2**16, array.shape)
    found = load_box(array, (0, 0, 0, 4, 0), (1, 1, 3, 24, width // 2), width)
    want = swizzle_rows(clipped(array, (0, 0, 0, 4, 0), (1, 1, 3, 24, width // 2)), width)
    np.testing.assert_array_equal(found, want)


def test_a_box_follows_the_strides(rng):
    base = aligned((5, 4, 3, 32), np.uint8)
    base[...] = rng.integers(1, 256, base.shape)
    view = base.transpose(2, 0, 1, 3)[None]  # as a tensor [batch, seqlen, heads, head_dim] is read by heads
    found = load_box(view, (0, 1, 1, 0, 0), (1, 1, 3, 4, 32))
    np.testing.assert_array_equal(found, clipped(view, (0, 1, 1, 0, 0), (1, 1, 3, 4, 32)))


STORE_BOX = body("""
    for (int i = thread; i < n; i += 128) ptx::store_shared(base + 4 * i, ptx::load_global(in + 8 + i));
    ptx::fence_async_proxy();
    ptx::barrier();
    if (thread) return;
    int corner[5];
    for (int axis = 0; axis < 5; ++axis) corner[axis] = int(ptx::load_global(in + axis));
    ptx::store_box(p.to, base, corner[0], corner[1], corner[2], corner[3], corner[4]);
    ptx::commit_stores();
    ptx::wait_stores_read<0>();
""")


@every_schedule
@pytest.mark.parametrize("width", [0, 64])
@pytest.mark.parametrize(
    ("corner", "box"), [((0, 1, 0, 4, 0), (1, 2, 1, 8, 32)), ((1, -1, 1, -3, 0), (1, 2, 1, 8, 32))]
)
def test_storing_a_box_leaves_out_what_is_outside(corner, box, width, schedule, rng):
    array = aligned((2, 2, 2, 7, 32), np.uint16, 7)
    tile = rng.integers(1, 2**16, box).astype(np.uint16)
    given = np.concatenate([np.array([*corner[::-1], 0, 0, 0], np.int32).view(np.uint32), tile.reshape(-1).view("u4")])
    if width:
        given[8:] = swizzle_rows(tile, width).reshape(-1).view(np.uint32)
    record = np.zeros((), PROBE)
    record["to"] = np.void(map_of(array, box, width))
    record["in"], record["which"], record["n"] = given.ctypes.data, STORE_BOX, tile.size // 2
    buffers = [(given, False), (array, True)]
    probes().launch(record, (1, 1, 1), 128, 65536 + 1024, buffers, schedule=schedule)
    want = np.full_like(array, 7)
    for at in np.ndindex(*box):
        place = tuple(np.add(at, corner))
        if all(0 <= i < size for i, size in zip(place, array.shape, strict=True)):
            want[place] = tile[at]
    np.testing.assert_array_equal(array, want)


# One thread, one row of 64 bytes; the default is what is right.
ONE_BOX = """
    init_mbarriers();
    if (thread == 0) {{
        {expect}
        ptx::load_box({to}, {map}, {barrier}, 0, 0, 0, 0, 0, {policy});
    }}
    {wait}
    ptx::store_global(out + thread, ptx::load_shared({read}));
"""
RIGHT = {
    "expect": "ptx::mbarrier_arrive_expect(mbarrier(0), 64);",
    "to": "base",
    "map": "p.from",
    "barrier": "mbarrier(0)",
    "policy": "ptx::kDropFromL2",
    "wait": "ptx::mbarrier_wait(mbarrier(0), 0);",
    "read": "base",
}
MOVED_MAP = "*(const TensorMap*)((const uint8*)&p.from + 16)"
WRONG_BOXES = [
    (body(ONE_BOX.format(**RIGHT | changes)), message)
    for changes, message in [
        ({}, None),
        ({"wait": ""}, r"load_shared: (nothing was ever|race on|shared address 0x400 is the destination of a box)"),
        ({"to": "base + 64"}, r"load_box: shared address 0x440 is not a multiple of 128"),
        ({"to": "base + 65536 + 1024"}, r"load_box: .* outside the block's"),
        ({"to": "base + 65536 + 1024 - 32"}, r"load_box: "),
        ({"barrier": "mbarrier(9)"}, r"load_box: there is no mbarrier at shared address 0x10448"),
        ({"expect": "ptx::mbarrier_arrive_expect(mbarrier(0), 32);"}, r"expects 32 bytes more, and the box has 64"),
        ({"expect": ""}, r"expects 0 bytes more, and the box has 64"),
        (
            {"expect": "ptx::mbarrier_arrive_expect(mbarrier(0), 96);"},
            r"deadlock: .*wait in mbarrier_wait at body:\d+ for parity 0 of the mbarrier at 0x10400",
        ),
        ({"map": MOVED_MAP}, r"load_box: the map's address is not a multiple of 64"),
        ({"map": "p.to"}, r"load_box: this is no map"),
        ({"policy": "5"}, r"load_box: this is no cache policy"),
        ({"to": "mbarrier(0)"}, r"load_box: shared address 0x10400 is part of an mbarrier"),
        ({"read": "mbarrier(0)"}, r"load_shared: shared address 0x10400 is part of an mbarrier"),
    ]
]


@every_schedule
@pytest.mark.parametrize(("which", "message"), WRONG_BOXES)
def test_one_box(which, message, schedule):
    array = aligned((1, 1, 1, 1, 16), np.uint32, 9)
    out = np.zeros(128, np.uint32)
    record = np.zeros((), PROBE)
    record["from"], record["out"], record["which"] = np.void(map_of(array, (1, 1, 1, 1, 16))), out.ctypes.data, which
    launch = functools.partial(probes().launch, record, (1, 1, 1), 128, 65536 + 1024, [(array, False), (out, True)])
    if message is None:
        launch(schedule=schedule)
        assert (out == 9).all()
    else:
        with pytest.raises(EmulatorError, match=message):
            launch(schedule=schedule)


MOVED_BOX = body("""
    init_mbarriers();
    if (thread) return;
    ptx::mbarrier_arrive_expect(mbarrier(0), 1024);
    ptx::load_box(base + 128, p.from, mbarrier(0), 0, 0, 0, 0, 0, ptx::kKeepInL2);
""")


def test_a_swizzled_box_starts_at_a_whole_tile():
    array = aligned((1, 1, 1, 8, 32), np.uint32)
    record = np.zeros((), PROBE)
    record["from"], record["which"] = np.void(map_of(array, (1, 1, 1, 8, 32), 128)), MOVED_BOX
    with pytest.raises(EmulatorError, match="load_box: shared address 0x480 is not a multiple of 1024"):
        probes().launch(record, (1, 1, 1), 128, 65536 + 1024, [(array, False)])


def test_a_box_of_a_tensor_that_the_launch_does_not_have():
    array = aligned((1, 1, 1, 1, 16), np.uint32)
    with pytest.raises(EmulatorError, match=r"load_box: 64 bytes at offset -?\d+ of buffer"):
        probe(WRONG_BOXES[0][0], from_map=map_of(array, (1, 1, 1, 1, 16)))


# n: 0 as it should be, 1 no fence_async_proxy, 2 no barrier, 3 the fence after the barrier, 4 no wait, 5 no commit,
#    6 written again before the wait
STORE_ROWS = body("""
    ptx::store_shared(base + 4 * thread, uint32(thread));
    if (n != 1 && n != 3) ptx::fence_async_proxy();
    if (n != 2) ptx::barrier();
    if (n == 3) ptx::fence_async_proxy();
    if (thread == 0) {
        ptx::store_box(p.to, base, 0, 0, 0, 0, 0);
        if (n != 5) ptx::commit_stores();
        if (n == 6) ptx::store_shared(base, 1u);
        if (n != 4) ptx::wait_stores_read<0>();
        ptx::store_shared(base, 1u);
    }
""")


@every_schedule
@pytest.mark.parametrize(
    ("n", "message"),
    [
        (0, None),
        (1, r"store_box: thread 0 stored to shared address 0x400, with no fence_async_proxy and barrier since"),
        (2, r"store_box: (race on shared address|nothing was ever written)"),
        (3, r"store_box: thread \d+ stored to shared address 0x\w+, with no fence_async_proxy and barrier since"),
        (4, r"store_shared: race on shared address 0x400, which was read by a box that thread 0 stores"),
        (5, r"store_shared: race on shared address 0x400, which was read by a box that thread 0 stores"),
        (6, r"store_shared: race on shared address 0x400, which was read by a box that thread 0 stores"),
    ],
)
def test_a_box_that_goes(n, message, schedule):
    array = aligned((1, 1, 1, 4, 32), np.uint32)
    record = np.zeros((), PROBE)
    record["to"], record["which"], record["n"] = np.void(map_of(array, (1, 1, 1, 4, 32))), STORE_ROWS, n
    launch = functools.partial(probes().launch, record, (1, 1, 1), 128, 65536 + 1024, [(array, True)])
    if message is None:
        launch(schedule=schedule)
        np.testing.assert_array_equal(array.reshape(-1), np.arange(128))
    else:
        with pytest.raises(EmulatorError, match=message):
            launch(schedule=schedule)


NEVER_WAITED = body("""
    if (thread == 0) ptx::store_shared(base, 1u, 2u, 3u, 4u);
    ptx::fence_async_proxy();
    if (thread == 0) ptx::store_box(p.to, base, 0, 0, 0, 0, 0);
""")


def test_a_thread_may_not_exit_with_boxes_that_go():
    array = aligned((1, 1, 1, 1, 4), np.uint32)
    record = np.zeros((), PROBE)
    record["to"], record["which"] = np.void(map_of(array, (1, 1, 1, 1, 4))), NEVER_WAITED
    with pytest.raises(EmulatorError, match="thread 0 has exited, and has not waited for boxes"):
        probes().launch(record, (1, 1, 1), 128, 65536 + 1024, [(array, True)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"address": 8}, "address must be a multiple of 16"),
        ({"itemsize": 3}, "itemsize must be"),
        ({"dims": (16, 0, 1, 1, 1)}, r"dims must be five numbers from 1 to 2\*\*32"),
        ({"strides": (32, 40, 16, 16)}, "strides must be four multiples of 16"),
        ({"strides": (32, 2**40, 16, 16)}, "strides must be four multiples of 16"),
        ({"box": (16, 257, 1, 1, 1)}, "box must be five numbers from 1 to 256"),
        ({"box": (4, 1, 1, 1, 1)}, "first row must have a multiple of 16 bytes"),
        ({"box": (32, 1, 1, 1, 1), "swizzle": 32}, "multiple of 16 bytes up to 32, the swizzle; found 64"),
        ({"swizzle": 16}, "swizzle must be 0, 32, 64 or 128"),
        ({"box": (64, 256, 8, 1, 1)}, "a box must fit into"),
    ],
)
def test_maps_that_the_driver_refuses(changes, message):
    usual = {"address": 0, "itemsize": 2, "dims": (16, 4, 1, 1, 1), "strides": (32, 32, 32, 32)}
    usual |= {"box": (16, 4, 1, 1, 1), "swizzle": 0}
    assert len(encode_map(**usual)) == 128
    with pytest.raises(ValueError, match=message):
        encode_map(**usual | changes)


# ---- Products ---------------------------------------------------------------------------------------

DEPTH_BYTES = 128  # of a row of both operands


def product_body(dtype, by_columns, columns, width, from_registers):
    """c = a b or c = 0.5 + a b, with a and b brought by TMA."""
    fragments = """
        uint32 a[4][4];
        const int g = lane / 4, t = lane % 4;
        for (int k = 0; k < 4; ++k)
            for (int i = 0; i < 4; ++i)
                a[k][i] = ptx::load_global(in + (16 * (warp % 4) + g + i % 2 * 8) * 32 + 8 * k + t + i / 2 * 4);
        ptx::hold(a);
    """
    depth = DEPTH_BYTES // (1 if dtype == "Float8" else 2)
    right_bytes = columns * DEPTH_BYTES
    left = "a[k]" if from_registers else f"descriptor(base + slab * 64 * {width} + rest, 16, {width})"
    right = f"descriptor(other + slab * {columns} * {width} + rest, 16, {width})"
    if by_columns:
        right = f"descriptor(other + k * 16 * {width}, {depth * width}, {width})"
    return body(f"""
        init_mbarriers();
        const uint32 other = base + 16384;
        if (thread == 0) {{
            ptx::mbarrier_arrive_expect(mbarrier(0), 64 * {DEPTH_BYTES} + {right_bytes});
            ptx::load_box(base, p.from, mbarrier(0), 0, 0, 0, 0, 0, ptx::kKeepInL2);
            ptx::load_box(other, p.to, mbarrier(0), 0, 0, 0, 0, 0, ptx::kKeepInL2);
        }}
        ptx::mbarrier_wait(mbarrier(0), 0);
        {fragments if from_registers else ""}
        float c[{columns // 8}][4];
        for (auto& block : c) for (float& sum : block) sum = 0.5f;
        ptx::hold(c);
        ptx::wgmma_fence();
        for (int k = 0; k < 4; ++k) {{
            const int slab = 32 * k / {width}, rest = 32 * k % {width};
            ptx::wgmma<{dtype}, {str(by_columns).lower()}>(c, {left}, {right}, n || k);
        }}
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>();
        ptx::hold(c);
        store_sums((float*)out, c);
    """)


PRODUCTS = {
    (dtype, by_columns, columns, width, from_registers): product_body(dtype, by_columns, columns, width, from_registers)
    for dtype, by_columns, columns, width in [
        ("Half", False, 64, 128),
        ("BFloat16", False, 256, 64),
        ("Half", False, 176, 32),
        ("BFloat16", True, 64, 128),
        ("Half", True, 160, 64),
        ("BFloat16", True, 16, 32),
        ("Float8", False, 128, 128),
        ("Float8", False, 48, 64),
    ]
    for from_registers in (False, True)
}


def slabs(matrix, width):
    """A matrix as TMA brings it: [1, 1, slabs, rows, width]."""
    rows, columns = matrix.shape
    per_slab = width // matrix.itemsize
    return matrix.reshape(rows, columns // per_slab, per_slab).transpose(1, 0, 2)[None, None]


@every_schedule
@pytest.mark.parametrize("case", PRODUCTS, ids=lambda case: "-".join(map(str, case)))
def test_a_product_is_one_of_matrices(case, schedule, rng):
    dtype, by_columns, columns, width, _ = case
    real = np.dtype(DTYPES[dtype])
    depth = DEPTH_BYTES // real.itemsize
    bits = np.uint8 if real.itemsize == 1 else np.uint16
    a, b = aligned((64, depth), bits), aligned((depth, columns) if by_columns else (columns, depth), bits)
    for matrix in (a, b):
        matrix[...] = rng.integers(-8, 9, matrix.shape).astype(real).view(bits)
    out = np.full((64, columns), np.nan, np.float32)
    maps = [map_of(slabs(matrix, width), slabs(matrix, width).shape, width) for matrix in (a, b)]
    record = np.zeros((), PROBE)
    record["from"], record["to"] = map(np.void, maps)
    record["in"], record["out"], record["which"] = a.ctypes.data, out.ctypes.data, PRODUCTS[case]
    buffers = [(a, False), (b, False), (out, True)]
    right = b.view(real).astype(np.float32)
    want = a.view(real).astype(np.float32) @ (right if by_columns else right.T)
    for accumulates in (0, 1):
        record["n"] = accumulates
        probes().launch(record, (1, 1, 1), 128, 65536 + 1024, buffers, schedule=schedule)
        np.testing.assert_array_equal(out, want + 0.5 * accumulates)


# Two products of zeros that threads store; the default is what is right.
ZEROS = """
    for (int i = thread; i < 1024; i += 128) ptx::store_shared(base + 4 * i, 0u);
    {proxy}
    {barrier}
    float c[2][4] = {{}}, d[2][4] = {{}};
    uint32 a[4] = {{}};
    {fence}
    {before}
    ptx::wgmma<Half, false>(c, {left}, {right}, {accumulate});
    ptx::wgmma<Half, false>(d, a, {right}, true);
    {between}
    ptx::wgmma_commit();
    {wait}
    {after}
    store_sums((float*)out, c);
"""
RIGHT_ZEROS = {
    "proxy": "ptx::fence_async_proxy();",
    "barrier": "ptx::barrier();",
    "fence": "ptx::wgmma_fence();",
    "before": "",
    "left": "descriptor(base, 16, 32)",
    "right": "descriptor(base + 2048, 16, 32)",
    "accumulate": "false",
    "between": "",
    "wait": "ptx::wgmma_wait<0>();",
    "after": "",
}
LATE = (1, 2)
WRONG_PRODUCTS = [
    (body(ZEROS.format(**RIGHT_ZEROS | changes)), message, schedules)
    for changes, message, schedules in [
        ({}, None, SCHEDULES),
        ({"proxy": ""}, r"wgmma: thread \d+ stored to .* with no fence_async_proxy and barrier since", SCHEDULES),
        ({"barrier": ""}, r"wgmma: (race on|nothing was ever)", SCHEDULES),
        ({"fence": ""}, r"wgmma: the warpgroup may have written registers, with no wgmma_fence since", SCHEDULES),
        ({"between": "c[1][2] = 1;"}, r"wgmma: an accumulator was written while the product was under way", LATE),
        ({"between": "c[1][2] = ptx::exp2(c[1][2]);"}, r"wgmma: an accumulator was written while", LATE),
        ({"between": "if (thread == 77) a[3] = 1;"}, r"wgmma: thread 77 of the warpgroup wrote its left operand", LATE),
        ({"wait": "ptx::wgmma_wait<1>();"}, r"warpgroup 0 has exited, and has not waited for its products", SCHEDULES),
        ({"accumulate": "lane == 3"}, r"the threads of the warpgroup do not agree", SCHEDULES),
        ({"left": "descriptor(base + 16 * warp, 16, 32)"}, r"the threads of the warpgroup do not agree", SCHEDULES),
        ({"left": "descriptor(base, 16, 32) | 1ull << 49"}, r"wgmma: the base offset of descriptor", SCHEDULES),
        ({"left": "descriptor(base, 16, 32) | 1ull << 14"}, r"wgmma: descriptor 0x\w+ has bits where", SCHEDULES),
        ({"right": "descriptor(base + 2048 + 32, 16, 32)"}, r"does not start in the first row", SCHEDULES),
        ({"right": "descriptor(base + 65536 + 1024, 16, 32)"}, r"wgmma: 16 bytes .* are outside", SCHEDULES),
        ({"right": "descriptor(base + 8192, 16, 32)"}, r"wgmma: nothing was ever written", SCHEDULES),
        ({"before": "if (warp == 2) ptx::wgmma_fence();"}, r"the warpgroup diverges: ", SCHEDULES),
        ({"before": "if (warp == 2) return;"}, r"deadlock: threads 0-63 wait in wgmma at body", SCHEDULES),
        ({"between": "if (lane) ptx::wgmma_fence();"}, r"the warp diverges: ", SCHEDULES),
        ({"between": "ptx::store_shared(base + 2048 + 4 * lane, 0u);"}, r"store_shared: race .* read by", SCHEDULES),
        ({"after": "ptx::store_shared(base + 4 * thread, 0u);"}, None, SCHEDULES),
    ]
]


@every_schedule
@pytest.mark.parametrize(("which", "message", "schedules"), WRONG_PRODUCTS)
def test_two_products(which, message, schedules, schedule):
    out = np.full((64, 16), np.nan, np.float32)
    if message is None:
        probe(which, out=out, schedule=schedule)
        assert (out == 0).all()
    elif schedule not in schedules:
        probe(which, out=out, schedule=schedule)
    else:
        with pytest.raises(EmulatorError, match=message):
            probe(which, out=out, schedule=schedule)


SUMS_TOO_EARLY = body("""
    for (int i = thread; i < 1024; i += 128) ptx::store_shared(base + 4 * i, 0u);
    ptx::fence_async_proxy();
    ptx::barrier();
    float c[2][4] = {};
    ptx::wgmma_fence();
    ptx::wgmma<Half, false>(c, descriptor(base, 16, 32), descriptor(base + 2048, 16, 32), true);
    ptx::wgmma_commit();
    ptx::store_global((float*)out + thread, c[0][0]);
    ptx::wgmma_wait<0>();
    ptx::store_global((float*)out + 128 + thread, c[0][0]);
""")


@every_schedule
def test_sums_that_were_not_waited_for_are_nan(schedule):
    early, late = probe(SUMS_TOO_EARLY, out=np.zeros((2, 128), np.float32), schedule=schedule)
    assert np.isnan(early).all() == (schedule > 0)
    assert (late == 0).all()


NO_WARPGROUP = body("ptx::wgmma_fence();")
REGISTERS = body("""
    if (ptx::warpgroup() == 0) {
        if (n == 4) ptx::fewer_registers<32>();
        else ptx::fewer_registers<24>();
    }
    else if (n == 0 || n == 4) ptx::more_registers<240>();
    else if (n == 1) ptx::more_registers<256>();
    else if (n == 2) ptx::more_registers<120>();
    else if (warp == 5) ptx::more_registers<240>();
""")


def test_a_warpgroup_has_four_warps():
    with pytest.raises(EmulatorError, match="wgmma_fence: the warpgroup of thread 0 has fewer than four warps"):
        probe(NO_WARPGROUP, threads=96)


@pytest.mark.parametrize(
    ("n", "message"),
    [
        (1, "more_registers waits forever: the warpgroups ask for 68608 registers, and the block has 64512"),
        (4, "more_registers waits forever: the warpgroups ask for 65536 registers, and the block has 64512"),
        (2, "more_registers: 120, and the warpgroup has 168"),
        (3, r"deadlock: .*threads 160-191 wait in more_registers at body:9"),
    ],
)
def test_registers_move_between_warpgroups(n, message):
    probe(REGISTERS, threads=384, n=0)
    with pytest.raises(EmulatorError, match=message):
        probe(REGISTERS, threads=384, n=n)


# ---- Mbarriers and named barriers ---------------------------------------------------------------------

PHASES = body("""
    init_mbarriers();
    for (int turn = 0; turn < 5; ++turn) {  // one warp writes, a lane of another reads
        if (warp == 1) {
            ptx::mbarrier_wait(mbarrier(1), turn + 1 & 1);
            if (lane == 0) ptx::store_shared(base, uint32(turn + 10));
            ptx::warp_barrier();
            if (lane == 3) ptx::mbarrier_arrive(mbarrier(0));
        }
        if (warp == 0 && lane == 7) {
            ptx::mbarrier_wait(mbarrier(0), turn & 1);
            ptx::store_global(out + turn, ptx::load_shared(base));
            ptx::mbarrier_arrive(mbarrier(1));
        }
    }
""")
ALL_ARRIVE = body("""
    init_mbarriers();
    ptx::store_shared(base + 4 * thread, uint32(thread));
    if (n == 0 || thread != 5) ptx::mbarrier_arrive(mbarrier(8));
    if (n < 2) ptx::mbarrier_wait(mbarrier(8), 0);
    ptx::store_global(out + thread, ptx::load_shared(base + 4 * (127 - thread)));
""")


@every_schedule
def test_phases_take_turns(schedule):
    found = probe(PHASES, schedule=schedule)
    np.testing.assert_array_equal(found[:5], 10 + np.arange(5))


@every_schedule
def test_what_came_before_arrivals_is_there_after_the_wait(schedule):
    np.testing.assert_array_equal(probe(ALL_ARRIVE, schedule=schedule), np.arange(128)[::-1])
    with pytest.raises(EmulatorError, match=r"deadlock: threads 0-127 wait in mbarrier_wait at body:5 for parity 0"):
        probe(ALL_ARRIVE, n=1, schedule=schedule)
    with pytest.raises(EmulatorError, match=r"load_shared: (race|nothing)"):
        probe(ALL_ARRIVE, n=2, schedule=schedule)


WRONG_MBARRIERS = [
    (body(text), message)
    for text, message in [
        ("ptx::mbarrier_wait(mbarrier(0), 0);", r"mbarrier_wait: there is no mbarrier at shared address 0x10400"),
        ("if (thread == 0) ptx::mbarrier_init(mbarrier(0) + 4, 1);", r"shared address 0x10404 is not a multiple of 8"),
        ("if (thread == 0) ptx::mbarrier_init(mbarrier(0), 0);", r"mbarrier_init: 0 arrivals"),
        (
            "init_mbarriers(); if (thread == 0) ptx::mbarrier_init(mbarrier(3), 1);",
            r"the mbarrier at 0x10418 is in use",
        ),
        ("init_mbarriers(); ptx::mbarrier_wait(mbarrier(0), 2);", r"mbarrier_wait: 2 is no parity"),
        (
            "init_mbarriers(); if (thread < 2) { ptx::mbarrier_arrive(mbarrier(0)); "
            "ptx::mbarrier_arrive_expect(mbarrier(0), 16); ptx::mbarrier_arrive(mbarrier(0)); }",
            r"mbarrier_arrive: all 1 arrivals at the mbarrier at 0x10400 have been",
        ),
        (
            "if (thread == 0) ptx::mbarrier_init(mbarrier(0), 1);\n"
            "ptx::barrier();\nptx::mbarrier_wait(mbarrier(0), 1);",
            r"thread 0 initialised the mbarrier at 0x10400, with no fence_mbarrier_init since",
        ),
        (
            "if (thread == 0) { ptx::mbarrier_init(mbarrier(0), 1); ptx::fence_mbarrier_init(); }\n"
            "if (thread % 32 == 0) ptx::mbarrier_wait(mbarrier(0), 1);",
            r"initialised the mbarrier at 0x10400, with no barrier since|there is no mbarrier",
        ),
        ("init_mbarriers(); ptx::store_shared(mbarrier(0), 1u);", r"store_shared: .* is part of an mbarrier"),
        (
            "init_mbarriers(); if (thread == 0) ptx::mbarrier_arrive_expect(mbarrier(0), 16);",
            r"all threads have exited, and the mbarrier at 0x10400 still expects 16 bytes",
        ),
        ("ptx::named_barrier(16, 128);", r"named_barrier: 16 is no number from 1 to 15"),
        ("ptx::named_barrier(0, 128);", r"named_barrier: 0 is no number from 1 to 15"),
        ("ptx::named_barrier(1, 100);", r"named_barrier: 100 threads are no warps"),
        ("ptx::named_barrier(1, 256);", r"named_barrier: 256 threads are no warps of this block"),
        ("ptx::named_barrier(1, warp ? 128 : 96);", r"named_barrier: \d+ threads at barrier 1, of which others say"),
        ("ptx::named_barrier(1 + lane % 2, 128);", r"named_barrier: \d here, while another thread of the warp says"),
        ("if (warp) ptx::named_barrier(3, 128);", r"threads 32-127 wait in named_barrier at body:1 for barrier 3"),
        ("ptx::pin(thread - 1.0f, base);", r"thread 0, body:1: pin: the value is negative"),
    ]
]


@every_schedule
@pytest.mark.parametrize(("which", "message"), WRONG_MBARRIERS)
def test_barriers_used_wrongly(which, message, schedule):
    with pytest.raises(EmulatorError, match=message):
        probe(which, schedule=schedule)


# Two warpgroups take turns; n: 1 the second does not wait for the first.
TURNS = body("""
    const int group = ptx::warpgroup();
    if (group == 0) ptx::named_barrier_arrive(1, 256);
    for (int turn = 0; turn < 3; ++turn) {
        if (n != 1 || group == 0) ptx::named_barrier(1 + group, 256);
        const uint32 before = turn || group ? ptx::load_shared(base + 4 * (thread % 128)) : 0;
        ptx::store_shared(base + 4 * (thread % 128), 10 * before + 1 + group);
        if (turn < 2 || group == 0) ptx::named_barrier_arrive(2 - group, 256);
    }
    if (group) ptx::store_global(out + thread % 128, ptx::load_shared(base + 4 * (thread % 128)));
""")


@every_schedule
def test_warpgroups_take_turns_at_named_barriers(schedule):
    for seed in range(3):
        found = probe(TURNS, out=np.zeros(128, np.uint32), threads=256, schedule=schedule, seed=seed)
        np.testing.assert_array_equal(found, 121212)
    with pytest.raises(EmulatorError, match=r"load_shared: (race on|nothing was)|deadlock"):
        probe(TURNS, out=np.zeros(128, np.uint32), threads=256, n=1, schedule=schedule)


# ---- Clusters -------------------------------------------------------------------------------------------

# Each block brings half of a row of 64 numbers to both; n: what is wrong.
SHARED_ROWS = body("""
    const int rank = ptx::cluster_rank();
    if (thread == 0) {
        ptx::mbarrier_init(mbarrier(0), 1);
        ptx::mbarrier_init(mbarrier(1), 2);
        ptx::fence_mbarrier_init();
    }
    if (n == 9) ptx::store_shared(base + 2048 + 4 * thread, 0u);
    if (n == 1) ptx::barrier(); else ptx::begin_cluster();
    if (n == 9) ptx::load_shared(base + 2048 + 4 * (thread ^ 64));
    for (int turn = 0; turn < 3; ++turn) {
        if (thread == 0) {
            if (turn && n != 2) ptx::mbarrier_wait(mbarrier(1), turn - 1 & 1);
            ptx::mbarrier_arrive_expect(mbarrier(0), n == 3 ? 128 : 256);
            ptx::load_box_for(n == 4 ? 1u << rank : n == 7 ? 7 : 3, base + 128 * rank, p.from, mbarrier(0),
                              32 * rank + 64 * turn, 0, 0, 0, 0, ptx::kKeepInL2);
        }
        ptx::mbarrier_wait(mbarrier(0), turn & 1);
        if (thread < 64)
            ptx::store_global(out + (3 * ptx::block_x() + turn) * 64 + thread, ptx::load_shared(base + 4 * thread));
        ptx::barrier();
        if (thread < 2 && (n != 5 || thread == rank)) ptx::mbarrier_arrive_at(mbarrier(1), n == 8 ? 2 : thread);
    }
    if (n != 6 && thread == 0) ptx::mbarrier_wait(mbarrier(1), 0);  // nobody arrives at a block that has exited
""")
WRONG_CLUSTERS = [
    (1, r"load_box_for: (there is no mbarrier|thread 0 of the cluster's block \d initialised|.* with no)"),
    (2, r"load_box_for: (race on shared address 0x4|.* is the destination of a box)"),
    (3, r"deadlock|still expects|race on|a box that is under way|nothing was ever written"),
    (4, r"deadlock: .* wait in mbarrier_wait"),
    (5, r"deadlock: .* wait in mbarrier_wait"),
    (6, r"may still be about to arrive at the mbarrier at 0x10408|the cluster's block \d has exited"),
    (7, r"load_box_for: the cluster has 2 blocks, and the box is for 0x7"),
    (8, r"mbarrier_arrive_at: the cluster has no block of rank 2"),
    (9, r"load_shared: race on shared address 0x"),
]


def shared_rows(n, schedule, seed=0):
    array = aligned((1, 1, 1, 1, 192), np.uint32)
    array[...] = np.arange(192)
    return array, probe(
        SHARED_ROWS, array, np.zeros((4, 3, 64), np.uint32), n, from_map=map_of(array, (1, 1, 1, 1, 32)),
        grid=(4, 1, 1), cluster=2, schedule=schedule, seed=seed,
    )  # fmt: skip


@every_schedule
def test_blocks_of_a_cluster_fill_each_others_shared_memory(schedule):
    for seed in range(3):
        array, found = shared_rows(0, schedule, seed)
        np.testing.assert_array_equal(found, np.broadcast_to(array.reshape(3, 64), (4, 3, 64)))


@every_schedule
@pytest.mark.parametrize(("n", "message"), WRONG_CLUSTERS)
def test_clusters_used_wrongly(n, message, schedule):
    with pytest.raises(EmulatorError, match=message):
        shared_rows(n, schedule)


@pytest.mark.parametrize("options", [{"grid": (3, 1, 1)}, {"threads": 96}, {"threads": 640}], ids=str)
def test_clusters_that_cannot_be(options):
    with pytest.raises(ValueError, match="no clusters of 2"):
        probe(SHARED_ROWS, **{"grid": (2, 1, 1), "cluster": 2} | options)


# ---- A pipeline of all of it ----------------------------------------------------------------------------

# c [64, 64] of two warpgroups, each its 64 rows of a, from four steps of a ring of two stages. a [128, 256] and
# b [64, 256] are of halves; warpgroup 0 brings them. n is what is wrong:
#     1 stages are released before the products are waited for   2 nobody waits for a stage to be free
#     3 the consumers do not wait for the stage   4 the wrong parity   5 one release too few
PIPELINE = body("""
    constexpr int kStages = 2, kSteps = 4;
    const uint32 a = base, b = base + kStages * 16384;
    const auto full = [](int stage) { return mbarrier(stage); };
    const auto empty = [](int stage) { return mbarrier(kStages + stage); };
    if (thread == 0) {
        for (int stage = 0; stage < kStages; ++stage) {
            ptx::mbarrier_init(full(stage), 1);
            ptx::mbarrier_init(empty(stage), 2);
        }
        ptx::fence_mbarrier_init();
    }
    ptx::barrier();
    const int group = ptx::warpgroup();
    if (group == 0) {
        ptx::fewer_registers<24>();
        if (thread) return;
        for (int step = 0; step < kSteps; ++step) {
            const int stage = step % kStages;
            if (n != 2) ptx::mbarrier_wait(empty(stage), (step / kStages & 1) ^ 1);
            ptx::mbarrier_arrive_expect(full(stage), 16384 + 8192);
            ptx::load_box(a + 16384 * stage, p.from, full(stage), 0, 0, step, 0, 0, ptx::kDropFromL2);
            ptx::load_box(b + 8192 * stage, p.to, full(stage), 0, 0, step, 0, 0, ptx::kKeepInL2);
        }
        return;
    }
    ptx::more_registers<240>();
    float c[8][4] = {};
    for (int step = 0; step < kSteps; ++step) {
        const int stage = step % kStages;
        if (n != 3) ptx::mbarrier_wait(full(stage), (step / kStages & 1) ^ (n == 4));
        ptx::wgmma_fence();
        for (int k = 0; k < 4; ++k)
            ptx::wgmma<Half, false>(c, descriptor(a + 16384 * stage + 8192 * (group - 1) + 32 * k, 16, 128),
                                    descriptor(b + 8192 * stage + 32 * k, 16, 128), true);
        ptx::wgmma_commit();
        if (n == 1 && thread % 128 == 0) ptx::mbarrier_arrive(empty(stage));
        ptx::wgmma_wait<0>();
        if (n != 1 && thread % 128 == 0 && !(n == 5 && group == 2)) ptx::mbarrier_arrive(empty(stage));
    }
    store_sums((float*)out + 64 * 64 * (group - 1), c);
""")


def run_pipeline(**options):
    rng = np.random.default_rng(SEED)
    a, b = aligned((128, 256), np.float16), aligned((64, 256), np.float16)
    for matrix in (a, b):
        matrix[...] = rng.integers(-8, 9, matrix.shape)
    out = np.full((128, 64), np.nan, np.float32)
    record = np.zeros((), PROBE)
    record["from"] = np.void(map_of(slabs(a, 128), (1, 1, 1, 128, 64), 128))
    record["to"] = np.void(map_of(slabs(b, 128), (1, 1, 1, 64, 64), 128))
    record["out"], record["which"], record["n"] = out.ctypes.data, PIPELINE, options.pop("n", 0)
    buffers = [(a, False), (b, False), (out, True)]
    probes().launch(record, (1, 1, 1), 384, 65536 + 1024, buffers, **options)
    return out, a.astype(np.float32) @ b.astype(np.float32).T


@every_schedule
def test_a_pipeline_of_boxes_and_products(schedule):
    for seed in range(4):
        np.testing.assert_array_equal(*run_pipeline(schedule=schedule, seed=seed))


@every_schedule
@pytest.mark.parametrize(
    ("n", "message"),
    [
        (1, r"load_box: race on shared address .* read by a product of warpgroup"),
        (2, r"load_box: (race on|shared address .* is the destination of a box)|have been"),
        (3, r"wgmma: (race on|nothing was ever|shared address)"),
        (4, r"wgmma: (race on|nothing was ever|shared address)|deadlock"),
        (5, r"deadlock: threads 0-0 wait in mbarrier_wait .* parity 0 of the mbarrier at 0x10410"),
    ],
)
def test_planted_bugs_of_a_pipeline(n, message, schedule):
    with pytest.raises(EmulatorError, match=message):
        run_pipeline(n=n, schedule=schedule)


@every_schedule
def test_without_race_checks_a_box_not_waited_for_shows_as_nan(schedule):
    array = aligned((1, 1, 1, 1, 16), np.uint32, 9)
    out = np.zeros(128, np.uint32)
    record = np.zeros((), PROBE)
    record["from"], record["out"] = np.void(map_of(array, (1, 1, 1, 1, 16))), out.ctypes.data
    record["which"] = WRONG_BOXES[1][0]
    with pytest.raises(EmulatorError, match="nobody waited for the last boxes of the mbarrier at 0x10400"):
        probes().launch(
            record, (1, 1, 1), 128, 65536 + 1024, [(array, False), (out, True)], schedule=schedule, check_races=False
        )
    assert out[0] == (0xFFFFFFFF if schedule else 9)


# ---- Matrices and numbers -------------------------------------------------------------------------------

STORE_MATRICES = body("""
    if (warp) return;
    uint32 x[4];
    for (int i = 0; i < 4; ++i) x[i] = ptx::load_global(in + 4 * lane + i);
    ptx::store_matrices(base + 16 * lane, x[0], x[1], x[2], x[3]);
    if (n) ptx::warp_barrier();
    uint32 found[4];
    ptx::load_matrices(found, base + 16 * lane);
    for (int i = 0; i < 4; ++i) ptx::store_global(out + 4 * lane + i, found[i] + ptx::load_shared(base + 512 - 512));
""")


@every_schedule
def test_storing_matrices_is_the_inverse_of_loading_them(schedule, rng):
    given = rng.integers(0, 2**16, (32, 4)).astype(np.uint32)
    found = probe(STORE_MATRICES, given, np.zeros((32, 4), np.uint32), n=1, schedule=schedule)
    np.testing.assert_array_equal(found, given + given[0, 0])
    with pytest.raises(EmulatorError, match="load_matrices: race on shared address"):
        probe(STORE_MATRICES, given, np.zeros((32, 4), np.uint32), schedule=schedule)


NUMBERS = body("""
    const float x = ptx::load_global((float*)in + thread), y = ptx::load_global((float*)in + 128 + thread);
    ptx::store_global((float*)out + thread, ptx::add_round_down(x, y));
    ptx::store_global(out + 128 + thread, ptx::permute_bytes(0x33221100, 0x77665544, 0x6420 + thread % 2 * 0x1111));
    ptx::store_global(out + 256 + thread, ptx::pack_float8(x, y, -x, 0));
    ptx::store_global((float*)out + 384 + thread, ptx::widen(Float8{uint8(n + thread)}));
    ptx::store_global(out + 512 + thread, ptx::probe_finite<Half>(ptx::pack<Half>(x, y), 0));
    ptx::store_global(out + 640 + thread, ptx::probe_finite<BFloat16>(ptx::pack<BFloat16>(x, y), 0x7fff));
""")


def numbers(x, y, n=0):
    return probe(NUMBERS, np.stack([x, y]).astype(np.float32), np.zeros((6, 128), np.uint32), n=n)


def test_sums_are_rounded_down(rng):
    x = rng.normal(size=128).astype(np.float32)
    y = (rng.normal(size=128) * 10.0 ** rng.integers(-9, 9, 128)).astype(np.float32)
    x[:3], y[:3] = [12582912, 3e38, 1], [-1e-30, 3e38, -1]
    found = numbers(x, y)[0].view(np.float32)
    exact = x.astype(np.longdouble) + y
    assert (found <= exact).all()
    assert (np.nextafter(found[2:], np.float32(np.inf)) > exact[2:]).all()
    assert found[0] == np.nextafter(np.float32(12582912), np.float32(0))
    assert found[1] == np.finfo(np.float32).max
    assert np.signbit(found[2])


def test_bytes_are_permuted():
    np.testing.assert_array_equal(numbers(np.zeros(128), np.zeros(128))[1][:2], [0x66442200, 0x77553311])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_eight_bits_are_rounded_to_nearest_even_and_saturate(rng):
    exact = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    ties = (exact[:-1] + exact[1:]) / 2
    tries = [exact, ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(500)), rng.normal(size=128)]
    tries += [[np.inf, 1e30, 464, 465, np.nan, 448, 0, 1e-12]]
    for x in tries:
        x = np.resize(np.asarray(x, np.float32), 128)
        found = numbers(x, 3 * x)[2]
        for place, given in enumerate((x, 3 * x, -x)):
            want = np.clip(given, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
            want = np.where(np.isnan(given), 0x7F, want)
            np.testing.assert_array_equal(found >> 8 * place & 0xFF, want)


@pytest.mark.parametrize("n", [0, 128])
def test_eight_bits_are_widened_exactly(n):
    found = numbers(np.zeros(128), np.zeros(128), n)[3].view(np.float32)
    np.testing.assert_array_equal(
        found, np.arange(n, n + 128, dtype="u1").view("V1").view(DTYPES["Float8"]).astype("f4")
    )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_probe_keeps_what_is_not_finite():
    x, y = np.zeros(128), np.full(128, -3.0)
    x[1], y[2], x[3], y[4] = np.inf, np.nan, 1e5, -1e39
    halves, bfloats = numbers(x, y)[4:]
    np.testing.assert_array_equal(halves[:6], [0, 0x7FFF, 0x7FFF0000, 0x7FFF, 0x7FFF0000, 0])
    np.testing.assert_array_equal(bfloats[:5] & 0xFFFF, 0x7FFF)
    np.testing.assert_array_equal(bfloats[:5] >> 16, [0, 0, 0x7FFF, 0, 0x7FFF])
