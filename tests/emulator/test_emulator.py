"""The emulator itself: what its instructions mean, and that every error it can report is reported.

Bodies of small kernels stand beside the test that runs them. All are compiled into one library, as the cases of a
switch, and see: `in` and `out` (arrays of uint32 unless cast), `n`, `base` (shared memory), `thread`, `lane`, `warp`.
"""

import functools
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest

import emulator
from emulator import SCHEDULES, EmulatorError

SEED = 20261121
HALVES = {"Half": np.float16, "BFloat16": ml_dtypes.bfloat16}
BODIES = []


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


PROBE = np.dtype([("in", "u8"), ("out", "u8"), ("which", "i4"), ("n", "i4")], align=True)


@functools.cache
def probes():
    functions = "".join(
        f"DEVICE void body_{index}(uint32* in, uint32* out, int n, uint32 base, int thread, int lane, int warp) {{"
        f'\n#line 1 "body"\n{text}\n}}\n'
        for index, text in enumerate(BODIES)
    )
    cases = "".join(
        f"case {index}: return body_{index}(p.in, p.out, p.n, ptx::shared_memory(), ptx::thread(), ptx::lane(), "
        "ptx::warp());\n"
        for index in range(len(BODIES))
    )
    source = f"""
        #include "instructions/ptx.cuh"
        namespace cupyattn {{
        struct Probe {{ uint32 *in, *out; int which, n; }};
        {functions}
        __global__ void probe(const __grid_constant__ Probe p) {{ switch (p.which) {{ {cases} }} }}
        }}
    """
    return emulator.build("probe.cu", "cupyattn::probe", sources={"probe.cu": source}, flags=("-Wno-unused",))


def probe(which, given=None, out=None, n=0, grid=1, threads=32, shared_memory=4096, writable_input=False, **options):
    """Runs a body; `out` if given, else what came of zeros, one uint32 for each thread of the grid."""
    given = np.zeros(1, np.uint32) if given is None else given
    out = np.zeros(grid * threads, np.uint32) if out is None else out
    record = np.array((given.ctypes.data, out.ctypes.data, which, n), PROBE)
    buffers = [(given, writable_input), (out, True)]
    probes().launch(record, (grid, 1, 1), threads, shared_memory, buffers, **options)
    return out


def patterns(dtype, rng):
    """Float32 numbers that try the rounding to a 16-bit dtype: neighbours, ties, what lies beside a tie, and noise."""
    exact = np.arange(2**16, dtype=np.uint16).view(dtype).astype(np.float32)
    order = np.sort(exact[np.isfinite(exact)])
    ties = (order[:-1].astype(np.float64) + order[1:]).astype(np.float32) / np.float32(2)
    ties = np.where(np.isfinite(ties), ties, order[:-1])
    noise = rng.integers(0, 2**32, 50_000, np.uint64).astype(np.uint32).view(np.float32)
    sides = [np.nextafter(ties, np.float32(side), dtype=np.float32) for side in (-np.inf, np.inf)]
    extremes = np.array([65504, 65519.99, 65520, 65536, 3.4e38, np.inf, -np.inf, np.nan, 0.0, -0.0], np.float32)
    numbers = np.concatenate([exact, ties, *sides, noise, extremes])
    return np.concatenate([numbers, np.zeros(-len(numbers) % 128, np.float32)])


# ---- Numbers ----------------------------------------------------------------------------------------

WIDEN = {
    dtype: body(f"""
        const int i = ptx::block_x() * 128 + thread;
        ptx::store_global((float*)out + i, ptx::widen(ptx::load_global(({dtype}*)in + i)));
    """)
    for dtype in HALVES
}
PACK = {
    dtype: body(f"""
        const int i = ptx::block_x() * 128 + thread;
        const float x = ptx::load_global((float*)in + i);
        ptx::store_global(out + i, ptx::pack<{dtype}>(x, -x));
    """)
    for dtype in HALVES
}


@pytest.mark.parametrize("dtype", HALVES)
def test_widening_is_exact_for_every_half(dtype):
    halves = np.arange(2**16, dtype=np.uint16)
    found = probe(WIDEN[dtype], halves, np.empty(2**16, np.float32), grid=512, threads=128)
    np.testing.assert_array_equal(found, halves.view(HALVES[dtype]).astype(np.float32))
    np.testing.assert_array_equal(np.signbit(found), halves >= 0x8000)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", HALVES)
def test_packing_rounds_to_nearest_even(dtype, rng):
    numbers = patterns(HALVES[dtype], rng)
    found = probe(PACK[dtype], numbers, np.zeros(len(numbers), np.uint32), grid=len(numbers) // 128, threads=128)
    for half, want in ((found & 0xFFFF, numbers), (found >> 16, -numbers)):
        want = want.astype(HALVES[dtype]).view(np.uint16)
        np.testing.assert_array_equal(half, np.where(np.isnan(numbers), 0x7FFF, want))


FUNCTIONS = body("""
    const float x = ptx::load_global((float*)in + thread);
    const float y = ptx::load_global((float*)in + 32 + thread);
    ptx::store_global((float*)out + thread, ptx::exp2(x));
    ptx::store_global((float*)out + 32 + thread, ptx::log2(x));
    ptx::store_global((float*)out + 64 + thread, ptx::divide(x, y));
    ptx::store_global((float*)out + 96 + thread, ptx::max(x, y));
    ptx::store_global((float*)out + 128 + thread, ptx::fma(x, y, -1.0f));
    ptx::store_global(out + 160 + thread, ptx::multiply_high(ptx::bits(x), ptx::bits(y)));
    ptx::store_global((float*)out + 192 + thread, thread ? ptx::nan() : ptx::infinity());
""")


def test_functions_of_numbers(rng):
    x, y = rng.uniform(0.1, 20, (2, 32)).astype(np.float32)
    found = probe(FUNCTIONS, np.stack([x, y]), np.zeros((7, 32), np.float32))
    np.testing.assert_allclose(found[0], np.exp2(x), rtol=2**-22)
    np.testing.assert_allclose(found[1], np.log2(x), rtol=2**-22, atol=2**-22)
    np.testing.assert_allclose(found[2], x / y, rtol=2**-22)
    np.testing.assert_array_equal(found[3], np.maximum(x, y))
    np.testing.assert_array_equal(found[4], (x.astype(np.float64) * y - 1).astype(np.float32))
    product = x.view(np.uint32).astype(np.uint64) * y.view(np.uint32).astype(np.uint64)
    np.testing.assert_array_equal(found[5].view(np.uint32), product >> 32)
    assert found[6, 0] == np.inf
    assert np.isnan(found[6, 1])


def test_functions_of_numbers_at_their_edges():
    inf, nan, tiny = np.inf, np.nan, 1e-40
    x = np.array([-inf, inf, nan, tiny, -tiny, -126, -127, 128, 0, -1, 1] + [1.0] * 21, np.float32)
    y = np.array([1, 1, 3, 1, 1, nan, 1, -inf, 1, 1, 1.5e38] + [1.0] * 21, np.float32)
    exp2, log2, divide, larger = probe(FUNCTIONS, np.stack([x, y]), np.zeros((7, 32), np.float32))[:4]
    np.testing.assert_array_equal(exp2[:9], np.array([0, inf, nan, 1, 1, 2.0**-126, 0, inf, 1], np.float32))
    np.testing.assert_array_equal(log2[[0, 1, 3, 4, 8, 9, 10]], np.array([nan, inf, -inf, -inf, -inf, nan, 0]))
    np.testing.assert_array_equal(divide[[8, 10]], [0, 0])  # 1 / 1.5e38 is subnormal
    np.testing.assert_array_equal(larger[[2, 5, 7]], [3, -126, 128])


# ---- Between the lanes of a warp --------------------------------------------------------------------

SHUFFLES = body("""
    ptx::store_global((float*)out + thread, ptx::shuffle_xor(float(thread), 5));
    ptx::store_global(out + 64 + thread, ptx::shuffle(100 + thread, (lane * 3 + 1)));
""")
VOTES = body("""
    ptx::store_global(out + 4 * thread, uint32(ptx::any(lane == n)));
    ptx::store_global(out + 4 * thread + 1, uint32(ptx::all(lane == n)));
    ptx::store_global(out + 4 * thread + 2, uint32(ptx::all(warp == 1)));
    ptx::store_global(out + 4 * thread + 3, uint32(ptx::any(warp == 1)));
""")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_shuffles_stay_in_their_warp(schedule):
    thread = np.arange(64)
    found = probe(SHUFFLES, out=np.zeros((2, 64), np.uint32), threads=64, schedule=schedule)
    np.testing.assert_array_equal(found[0].view(np.float32), thread ^ 5)
    np.testing.assert_array_equal(found[1], 100 + thread // 32 * 32 + (thread % 32 * 3 + 1) % 32)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_votes_are_of_a_warp(schedule):
    found = probe(VOTES, out=np.zeros((64, 4), np.uint32), threads=64, n=7, schedule=schedule)
    np.testing.assert_array_equal(found, [[1, 0, 0, 0]] * 32 + [[1, 0, 1, 1]] * 32)


# ---- Matrices ---------------------------------------------------------------------------------------

FILL_SHARED = """
    for (int i = thread; i < 128; i += 32) ptx::store_shared(base + 4 * i, ptx::load_global(in + i));
    ptx::warp_barrier();
"""
LOAD_MATRICES, LOAD_MATRICES_TRANSPOSED = (
    body(f"""
        {FILL_SHARED}
        uint32 found[4];
        ptx::load_matrices{suffix}(found, base + 16 * lane);
        for (int i = 0; i < 4; ++i) ptx::store_global(out + 4 * thread + i, found[i]);
    """)
    for suffix in ("", "_transposed")
)
MULTIPLY = {
    dtype: body(f"""
        uint32 a[4], b[2];  // by the layouts in cuda/instructions/ptx.cuh, from the matrices themselves
        const int g = lane / 4, t = lane % 4;
        const auto* given = reinterpret_cast<const {dtype}*>(in);
        const auto pair = [&](int low, int high) {{
            return ptx::load_global(given + low).bits | uint32(ptx::load_global(given + high).bits) << 16;
        }};
        for (int i = 0; i < 4; ++i) {{
            const int first = 16 * (g + i % 2 * 8) + 2 * t + i / 2 * 8;
            a[i] = pair(first, first + 1);
        }}
        for (int i = 0; i < 2; ++i) {{
            const int first = 256 + 8 * (2 * t + 8 * i) + g;
            b[i] = pair(first, first + 8);
        }}
        float c[4] = {{1, 2, 3, 4}};
        ptx::multiply_add<{dtype}>(c, a, b[0], b[1]);
        for (int i = 0; i < 4; ++i)
            ptx::store_global((float*)out + 8 * (g + i / 2 * 8) + 2 * t + i % 2, c[i] - (i + 1));
    """)
    for dtype in HALVES
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("which", [LOAD_MATRICES, LOAD_MATRICES_TRANSPOSED], ids=["plain", "transposed"])
def test_matrices_are_dealt_to_lanes_by_rows_and_pairs(which, schedule):
    matrices = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    found = probe(which, matrices, np.zeros((32, 4), np.uint32), schedule=schedule).view(np.uint16).reshape(32, 4, 2)
    if which == LOAD_MATRICES_TRANSPOSED:
        matrices = matrices.swapaxes(1, 2)
    want = matrices.reshape(4, 32, 2).swapaxes(0, 1)  # lane 4 * row + pair
    np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", HALVES)
def test_multiply_add_is_a_matrix_product(dtype, schedule, rng):
    a, b = rng.integers(-8, 9, (16, 16)), rng.integers(-8, 9, (16, 8))
    given = np.concatenate([a.ravel(), b.ravel()]).astype(HALVES[dtype]).view(np.uint16)
    found = probe(MULTIPLY[dtype], given, np.zeros((16, 8), np.float32), schedule=schedule)
    np.testing.assert_array_equal(found, a @ b)


@functools.cache
def matmul(dtype, changes=(), flags=()):
    text = (emulator.HERE / "matmul.cu").read_text()
    for old, new in changes:
        assert text.count(old) == 1
        text = text.replace(old, new)
    return emulator.build("matmul.cu", f"cupyattn::matmul<cupyattn::{dtype}>", sources={"matmul.cu": text}, flags=flags)


def run_matmul(kernel, dtype, m, n, k, **options):
    """c and the exact product, of matrices of integers whose sums float32 holds."""
    rng = np.random.default_rng(SEED)
    a, b = rng.integers(-8, 9, (m, k)).astype(HALVES[dtype]), rng.integers(-8, 9, (k, n)).astype(HALVES[dtype])
    c = np.full((m, n), np.nan, np.float32)
    fields = [("a", "u8"), ("b", "u8"), ("c", "u8"), ("m", "i4"), ("n", "i4"), ("k", "i4")]
    record = np.array((a.ctypes.data, b.ctypes.data, c.ctypes.data, m, n, k), np.dtype(fields, align=True))
    buffers = [(a, False), (b, False), (c, True)]
    kernel.launch(record, (-(-n // 32), -(-m // 32), 1), 128, 4096, buffers, **options)
    return c, a.astype(np.float64) @ b.astype(np.float64)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("m", "n", "k"), [(32, 32, 16), (33, 40, 24), (7, 72, 200), (70, 8, 8)])
def test_a_kernel_with_all_of_it(dtype, schedule, m, n, k):
    for seed in range(3):
        found, want = run_matmul(matmul(dtype), dtype, m, n, k, schedule=schedule, seed=seed)
        np.testing.assert_array_equal(found, want)


def test_the_same_kernel_on_portable_fibers():
    kernel = matmul("Half", flags=("-DEMULATOR_UCONTEXT",))
    for schedule in SCHEDULES:
        found, want = run_matmul(kernel, "Half", 33, 40, 24, schedule=schedule)
        np.testing.assert_array_equal(found, want)


PLANTED = {
    "a wait too short": (("wait_copies<1>", "wait_copies<2>"),),
    "no barrier after the wait": (("        ptx::barrier();\n        uint32 a[4]", "        uint32 a[4]"),),
    "no barrier before the next copies": (
        ("        ptx::barrier();  // every warp has read", "        // every warp"),
    ),
    "a stage too few": (("int kStages = 2", "int kStages = 1"),),
    "one step too many": (("step + 1 < num_steps", "true"), ("row < p.k && ", "")),
    "a store past the last row": (("row < p.m && column < p.n) ptx::store", "column < p.n) ptx::store"),),
    "a store past the last column": (("row < p.m && column < p.n) ptx::store", "row < p.m) ptx::store"),),
    "a misaligned row": (("lane / 16 * 16);\n        ptx::load", "lane / 16 * 8);\n        ptx::load"),),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_reported_in_every_schedule(bug, schedule):
    with pytest.raises(EmulatorError, match=r"matmul\.cu:\d+"):
        run_matmul(matmul("Half", PLANTED[bug]), "Half", 70, 72, 40, schedule=schedule)


def test_planted_arithmetic_gives_another_result():
    kernel = matmul("Half", (("b[2], b[3]", "b[3], b[2]"),))
    found, want = run_matmul(kernel, "Half", 32, 32, 16)
    assert (found != want).any()


# ---- Copies -----------------------------------------------------------------------------------------

COPY = body("""
    ptx::copy_async(base + 16 * thread, (const void*)(in + 4 * thread), thread % 2 == 0);
    ptx::commit_copies();
    ptx::wait_copies<0>();
    uint32 found[4];
    ptx::load_shared(found, base + 16 * thread);
    ptx::store_global((void*)(out + 4 * thread), found);
""")
COPY_OF_WORDS = body("""
    ptx::copy_word_async(base + 4 * thread, (const void*)(in + thread + 1));
    ptx::commit_copies();
    if (n) ptx::wait_copies<0>();
    ptx::store_global(out + thread, ptx::load_shared(base + 4 * thread));
""")
COPY_OF_A_PART = body("""
    ptx::copy_async(base + 16 * thread, (const void*)(in + 4 * thread), static_cast<int>(4 * (thread % 5)));
    ptx::commit_copies();
    ptx::wait_copies<0>();
    uint32 pair[2];
    for (int i = 0; i < 2; ++i) {
        ptx::load_shared(pair, base + 16 * thread + 8 * i);
        for (int j = 0; j < 2; ++j) ptx::store_global(out + 4 * thread + 2 * i + j, pair[j]);
    }
""")
COPY_FROM_NOWHERE = body("""
    ptx::copy_async(base + 16 * thread, (const void*)16, false);
    ptx::commit_copies();
    ptx::wait_copies<0>();
    ptx::store_global(out + thread, ptx::load_shared(base + 16 * thread));
""")
COPY_UNWAITED = body("""
    ptx::copy_async(base + 16 * thread, (const void*)in, true);
    ptx::commit_copies();
    ptx::store_global(out + thread, ptx::load_shared(base + 16 * thread));
""")
COPY_UNCOMMITTED = body("""
    ptx::copy_async(base + 16 * thread, (const void*)in, true);
    ptx::wait_copies<0>();
    ptx::store_global(out + thread, ptx::load_shared(base + 16 * thread));
""")
COPIES_IN_GROUPS = body("""
    for (int group = 0; group < 3; ++group) {
        ptx::copy_async(base + 512 * group + 16 * thread, (const void*)(in + 4 * group), true);
        ptx::commit_copies();
    }
    ptx::wait_copies<1>();
    ptx::store_global(out + thread, ptx::load_shared(base + 512 * n + 16 * thread));
""")
COPY_ONTO_COPY = body("""
    for (int i = 0; i < 2; ++i) ptx::copy_async(base + 16 * thread, (const void*)in, true);
""")
STORE_ONTO_COPY = body("""
    ptx::copy_async(base + 16 * thread, (const void*)in, true);
    ptx::commit_copies();
    ptx::store_shared(base + 16 * thread, 1u);
""")
COPY_OF_ANOTHER = body("""
    ptx::copy_async(base + 16 * thread, (const void*)in, true);
    ptx::commit_copies();
    ptx::wait_copies<0>();
    if (n) ptx::warp_barrier();
    ptx::store_global(out + thread, ptx::load_shared(base + 16 * (thread ^ 1)));
""")
COPY_OF_ANOTHER_AFTER_A_BARRIER = body("""
    ptx::copy_async(base + 16 * thread, (const void*)in, true);
    ptx::commit_copies();
    ptx::barrier();
    ptx::wait_copies<0>();
    if (n) ptx::warp_barrier();
    if (thread % 2) ptx::load_shared(base + 16 * (thread - 1));
""")
SOURCE_CHANGES = body("""
    ptx::copy_async(base + 16 * thread, (const void*)(in + 4 * thread), true);
    ptx::commit_copies();
    ptx::store_global(in + 4 * thread, 99u);
    ptx::wait_copies<0>();
    ptx::store_global(out + thread, ptx::load_shared(base + 16 * thread));
""")


@pytest.fixture
def numbers():
    """128 numbers, as 16-byte loads want them."""
    return np.arange(1, 129, dtype=np.uint32)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_copy_brings_sixteen_bytes_or_zeros(schedule, numbers):
    found = probe(COPY, numbers, np.zeros((32, 4), np.uint32), schedule=schedule)
    want = numbers.reshape(32, 4) * (np.arange(32) % 2 == 0)[:, None]
    np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_copy_of_fewer_bytes_ends_in_zeros_and_reads_no_more(schedule, numbers):
    few = numbers[: 4 * 31 + 1]  # of the last lane one word is there, and it asks for no more
    found = probe(COPY_OF_A_PART, few, np.zeros((32, 4), np.uint32), schedule=schedule)
    want = np.where(np.arange(4) < np.arange(32)[:, None] % 5, numbers.reshape(32, 4), 0)
    np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_words_are_copied_beside_each_other(schedule, numbers):
    found = probe(COPY_OF_WORDS, numbers, n=1, schedule=schedule)
    np.testing.assert_array_equal(found, numbers[1:33])


def test_reading_a_word_that_was_not_waited_for(numbers):
    with pytest.raises(EmulatorError, match=r"destination of a copy that thread .* has not waited for"):
        probe(COPY_OF_WORDS, numbers)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_invalid_copy_does_not_touch_its_source(schedule):
    np.testing.assert_array_equal(probe(COPY_FROM_NOWHERE, schedule=schedule), 0)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("which", [COPY_UNWAITED, COPY_UNCOMMITTED], ids=["unwaited", "uncommitted"])
def test_reading_a_copy_that_was_not_waited_for(which, schedule, numbers):
    message = r"thread (\d+), body:4: load_shared: .* destination of a copy that thread \1 has not waited for"
    with pytest.raises(EmulatorError, match=message):
        probe(which, numbers, schedule=schedule)


@pytest.mark.parametrize("which", [COPY_UNWAITED, COPY_UNCOMMITTED], ids=["unwaited", "uncommitted"])
def test_without_race_checks_a_copy_not_waited_for_shows_as_nan(which, numbers):
    found = [probe(which, numbers, schedule=schedule, check_races=False) for schedule in SCHEDULES]
    assert (found[0] == 1).all()
    assert np.isnan(found[1].view(np.float32)).all()
    assert np.isnan(found[2].view(np.float32)).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_wait_leaves_the_latest_groups_under_way(schedule, numbers):
    for group in (0, 1):
        found = probe(COPIES_IN_GROUPS, numbers, n=group, schedule=schedule)
        np.testing.assert_array_equal(found, 1 + 4 * group)
    with pytest.raises(EmulatorError, match="has not waited for"):
        probe(COPIES_IN_GROUPS, numbers, n=2, schedule=schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("which", [COPY_ONTO_COPY, STORE_ONTO_COPY], ids=["copy", "store"])
def test_writing_where_a_copy_is_under_way(which, schedule, numbers):
    with pytest.raises(EmulatorError, match="has not waited for"):
        probe(which, numbers, schedule=schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_another_threads_copy_needs_a_barrier_after_its_wait(schedule, numbers):
    np.testing.assert_array_equal(probe(COPY_OF_ANOTHER, numbers, n=1, schedule=schedule), 1)
    with pytest.raises(EmulatorError, match=r"race on shared|has not waited for|nothing was ever written"):
        probe(COPY_OF_ANOTHER, numbers, n=0, schedule=schedule)


def test_a_barrier_before_the_wait_is_none_after_it(numbers):
    probe(COPY_OF_ANOTHER_AFTER_A_BARRIER, numbers, n=1)
    with pytest.raises(
        EmulatorError, match=r"thread 1, .* race on shared address 0x400, which was written by thread 0"
    ):
        probe(COPY_OF_ANOTHER_AFTER_A_BARRIER, numbers, n=0)


def test_a_late_copy_reads_its_source_late(numbers):
    found = [probe(SOURCE_CHANGES, numbers.copy(), writable_input=True, schedule=s) for s in SCHEDULES]
    np.testing.assert_array_equal(found[0], numbers[::4])
    np.testing.assert_array_equal(found[1:], 99)


# ---- Bounds -----------------------------------------------------------------------------------------

LOAD_AT = body("ptx::store_global(out + thread, ptx::load_global(in + n + thread));")
STORE_AT = body("ptx::store_global(out + n + thread, 1u);")
STORE_TO_INPUT = body("ptx::store_global(in + thread, 1u);")
ATOMIC_ON_INPUT = body("ptx::atomic_add((int*)in, 1);")
LOAD_BYTES_AT = body("ptx::load_global((uint32*)((uint8*)in + n));")
LOAD_WIDE_AT = body("uint32 found[4]; ptx::load_global(found, (const void*)(in + n));")
STORE_WIDE_AT = body("uint32 given[4] = {}; ptx::store_global((void*)(out + n), given);")
COPY_FROM = body("ptx::copy_async(base + 16 * thread, (const void*)(in + n), true);")
COPY_SIZE = body("ptx::copy_async(base + 16 * thread, (const void*)in, static_cast<int>(n));")
COPY_TO = body("ptx::copy_async(base + n, (const void*)in, thread == 0);")
STORE_SHARED_AT = body("if (thread == 0) ptx::store_shared(base + n, 1u);")
STORE_SHARED_WIDE_AT = body("if (thread == 0) ptx::store_shared(base + n, 1u, 2u, 3u, 4u);")
LOAD_SHARED_AT = body("ptx::load_shared(base + n);")
LOAD_SHARED_WIDE_AT = body("uint32 found[4]; ptx::load_shared(found, base + n);")
LOAD_MATRICES_AT = body("uint32 found[4]; ptx::load_matrices(found, base + n);")


@pytest.mark.parametrize(
    ("which", "n", "message"),
    [
        (LOAD_AT, 97, r"thread 31, body:1: load_global: 4 bytes at offset 512 of buffer 0, which has 512 bytes"),
        (LOAD_AT, -1, r"thread 0, body:1: load_global: 4 bytes at offset -4 of buffer"),
        (STORE_AT, 1, r"store_global: 4 bytes at offset 128 of buffer"),
        (STORE_TO_INPUT, 0, r"store_global: offset 0 of buffer 0, which is read-only"),
        (ATOMIC_ON_INPUT, 0, r"atomic_add: offset 0 of buffer 0, which is read-only"),
        (LOAD_BYTES_AT, 2, r"load_global: global address 0x\w+ is not a multiple of 4"),
        (LOAD_WIDE_AT, 1, r"load_global: global address 0x\w+ is not a multiple of 16"),
        (LOAD_WIDE_AT, 128, r"load_global: 16 bytes at offset 512 of buffer 0"),
        (STORE_WIDE_AT, 2, r"store_global: global address 0x\w+ is not a multiple of 16"),
        (COPY_FROM, 1, r"copy_async: global address 0x\w+ is not a multiple of 16"),
        (COPY_FROM, 128, r"copy_async: 16 bytes at offset 512 of buffer 0"),
        (COPY_SIZE, 20, r"copy_async: 20 of 16 bytes"),
        (COPY_TO, 8, r"copy_async: shared address 0x408 is not a multiple of 16"),
        (COPY_TO, 4096, r"copy_async: 16 bytes at shared address 0x1400 are outside the block's 4096 bytes from 0x400"),
        (STORE_SHARED_AT, 2, r"store_shared: shared address 0x402 is not a multiple of 4"),
        (STORE_SHARED_AT, 4096, r"store_shared: 4 bytes at shared address 0x1400 are outside"),
        (STORE_SHARED_AT, -4, r"store_shared: 4 bytes at shared address 0x3fc are outside"),
        (STORE_SHARED_WIDE_AT, 4, r"store_shared: shared address 0x404 is not a multiple of 16"),
        (STORE_SHARED_WIDE_AT, 4096, r"store_shared: 16 bytes at shared address 0x1400 are outside"),
        (LOAD_SHARED_AT, 1, r"load_shared: shared address 0x401 is not a multiple of 4"),
        (LOAD_SHARED_AT, 8192, r"load_shared: 4 bytes at shared address 0x2400 are outside"),
        (LOAD_SHARED_AT, 0, r"load_shared: nothing was ever written to shared address 0x400"),
        (LOAD_SHARED_WIDE_AT, 8, r"load_shared: shared address 0x408 is not a multiple of 16"),
        (LOAD_MATRICES_AT, 8, r"load_matrices: shared address 0x408 is not a multiple of 16"),
        (LOAD_MATRICES_AT, 4096, r"load_matrices: 16 bytes at shared address 0x1400 are outside"),
    ],
)
def test_accesses_out_of_bounds(which, n, message, numbers):
    with pytest.raises(EmulatorError, match=message):
        probe(which, numbers, n=n)


def test_accesses_at_the_last_place(numbers):
    np.testing.assert_array_equal(probe(LOAD_AT, numbers, n=96), numbers[96:])
    for which, n in ((LOAD_WIDE_AT, 124), (STORE_WIDE_AT, 28)):
        if n == 124:
            probe(which, numbers, n=n)
        else:
            with pytest.raises(EmulatorError, match="race"):  # all lanes store there
                probe(which, numbers, n=n)
    probe(STORE_SHARED_AT, numbers, n=4092)
    probe(STORE_SHARED_WIDE_AT, numbers, n=4080)


def test_a_launch_without_buffers_may_touch_nothing():
    record = np.array((64, 64, LOAD_AT, 0), PROBE)
    with pytest.raises(EmulatorError, match="no buffers"):
        probes().launch(record, (1, 1, 1), 32, 0, [])


# ---- Order within a block ---------------------------------------------------------------------------

# n: 0 nothing, 1 a warp barrier, 2 a block barrier, 3 a shuffle and a vote
ORDER = """
    if (n == 1) ptx::warp_barrier();
    if (n == 2) ptx::barrier();
    if (n == 3) ptx::shuffle(thread, 0), ptx::any(true);
"""
WRITE_THEN_READ = body(f"""
    ptx::store_shared(base + 4 * thread, uint32(thread));
    {ORDER}
    ptx::store_global(out + thread, ptx::load_shared(base + 4 * (thread ^ ptx::load_global(in))));
""")
READ_THEN_WRITE = body(f"""
    if (thread == 0) ptx::store_shared(base, 0u);
    ptx::barrier();
    if (thread == 0) ptx::load_shared(base);
    {ORDER}
    if (thread == int(ptx::load_global(in))) ptx::store_shared(base, 1u);
""")
WRITE_THEN_WRITE = body(f"""
    ptx::store_shared(base + 4 * thread, uint32(thread));
    {ORDER}
    ptx::store_shared(base + 4 * (thread ^ ptx::load_global(in)), 1u);
""")
WRITE_THEN_MATRICES = body(f"""
    for (int i = 0; i < 4; ++i) ptx::store_shared(base + 16 * thread + 4 * i, 1u);
    {ORDER}
    uint32 found[4];
    ptx::load_matrices(found, base + 16 * thread);
""")
MATRICES_THEN_WRITE = body(f"""
    for (int i = 0; i < 4; ++i) ptx::store_shared(base + 16 * thread + 4 * i, 1u);
    ptx::barrier();
    uint32 found[4];
    ptx::load_matrices(found, base + 16 * thread);
    {ORDER}
    if (lane == 31) ptx::store_shared(base + 16 * thread, 1u);
""")
GLOBAL_WRITE_THEN_READ = body(f"""
    ptx::store_global(out + thread, uint32(thread));
    {ORDER}
    ptx::load_global(out + (thread ^ ptx::load_global(in)));
""")
LAST_LANE_THEN_MATRICES = body(f"""
    for (int i = 0; i < 128; ++i)
        if (lane == 31) ptx::store_shared(base + 4 * i, 1u);
    {ORDER}
    uint32 found[4];
    ptx::load_matrices(found, base + 16 * thread);
""")
NOTHING, WARP_BARRIER, BLOCK_BARRIER, SHUFFLE = range(4)
ORDERED = {"read": WRITE_THEN_READ, "write after read": READ_THEN_WRITE, "write": WRITE_THEN_WRITE}
ORDERED |= {"global": GLOBAL_WRITE_THEN_READ}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("which", ORDERED.values(), ids=ORDERED)
def test_barriers_order_accesses_and_nothing_else_does(which, schedule):
    same, neighbour, other_warp = (np.array([distance], np.uint32) for distance in (0, 1, 32))
    run = functools.partial(probe, which, threads=64, schedule=schedule)
    for how in range(4):
        run(same, n=how)
    for how in (WARP_BARRIER, BLOCK_BARRIER):
        run(neighbour, n=how)
    run(other_warp, n=BLOCK_BARRIER)
    # A read may also come before the write it races with, and then finds that nothing was written.
    race = "race|nothing was ever written"
    for distance, how in [(neighbour, NOTHING), (neighbour, SHUFFLE), *((other_warp, how) for how in (0, 1, 3))]:
        with pytest.raises(EmulatorError, match=race):
            run(distance, n=how)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("which", "verb"),
    [
        (WRITE_THEN_MATRICES, "load_matrices"),
        (LAST_LANE_THEN_MATRICES, "load_matrices"),
        (MATRICES_THEN_WRITE, "store_shared"),
    ],
)
def test_the_lanes_of_a_warp_read_matrices_for_each_other(which, verb, schedule):
    for how in (WARP_BARRIER, BLOCK_BARRIER):
        probe(which, n=how, schedule=schedule)
    for how in (NOTHING, SHUFFLE):
        with pytest.raises(EmulatorError, match=f"{verb}: race on shared address"):
            probe(which, n=how, schedule=schedule)


@pytest.mark.parametrize(
    ("which", "who", "message"),
    [
        (
            WRITE_THEN_WRITE,
            32,
            "thread 32, body:2: store_shared: race on shared address 0x480, which was written by thread 0",
        ),
        (
            READ_THEN_WRITE,
            32,
            "thread 32, body:10: store_shared: race on shared address 0x400, which was read by warp 0",
        ),
        (
            READ_THEN_WRITE,
            1,
            "thread 1, body:10: store_shared: race on shared address 0x400, which was read by thread 0",
        ),
    ],
)
def test_a_race_names_both_sides(which, who, message):
    with pytest.raises(EmulatorError, match=f"{message} with no barrier since"):
        probe(which, np.array([who], np.uint32), threads=64)


BYTES_BESIDE_EACH_OTHER = body("ptx::store_global((uint8*)out + thread / n, uint8(thread));")


def test_bytes_beside_each_other_are_no_race_and_one_byte_is():
    found = probe(BYTES_BESIDE_EACH_OTHER, n=1, schedule=1)
    np.testing.assert_array_equal(found[:8].view("u1"), np.arange(32))
    with pytest.raises(EmulatorError, match=r"store_global at offset 0 of buffer 1: race: thread . wrote there"):
        probe(BYTES_BESIDE_EACH_OTHER, n=2)


# ---- Waiting for each other -------------------------------------------------------------------------

BARRIER_IN_A_BRANCH = body("if (warp == 0) ptx::barrier();")
BARRIERS_THAT_DO_NOT_MEET = body("if (warp == 0) ptx::barrier();\nptx::barrier();")
BARRIER_OF_HALF_A_WARP = body("if (lane < 16) ptx::barrier();\nelse ptx::warp_barrier();")
VOTE_OF_HALF_A_WARP = body("if (lane < 16) ptx::any(true);")
TWO_VOTES = body("if (lane < 16) ptx::any(true);\nelse ptx::all(true);")
TWO_VOTES_ON_A_LINE = body("lane < 16 ? ptx::any(true) : ptx::all(true);")
TWO_PLACES = body("if (lane < 16) ptx::any(true);\nelse\n ptx::any(true);")
MATRIX_IN_A_BRANCH = body("""
    float c[4] = {};
    uint32 a[4] = {};
    if (lane < 4) ptx::multiply_add<Half>(c, a, 0, 0);
    else ptx::warp_barrier();
""")
BARRIERS_OF_TWO_ROLES = body("""
    if (warp == 0)
        ptx::barrier();
    else
        ptx::barrier();
    ptx::store_global(out + thread, 1u);
""")


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("which", "message"),
    [
        (BARRIER_IN_A_BRANCH, "deadlock: threads 0-31 wait in barrier at body:1; threads 32-63 have exited"),
        (BARRIERS_THAT_DO_NOT_MEET, "deadlock: threads 0-31 wait in barrier at body:2; threads 32-63 have exited"),
        (BARRIER_OF_HALF_A_WARP, r"the warp diverges: (barrier|warp_barrier) here, while thread \d+ waits in "),
        (VOTE_OF_HALF_A_WARP, "deadlock: threads 0-15 wait in any at body:1; threads 16-31 have exited; "),
        (TWO_VOTES, r"the warp diverges: (any|all) here, while thread \d+ waits in (any|all) at body:"),
        (TWO_VOTES_ON_A_LINE, r"the warp diverges: (any|all) here, while thread \d+ waits in (any|all) at body:"),
        (TWO_PLACES, r"the warp diverges: any here, while thread \d+ waits in any at body:[13]"),
        (MATRIX_IN_A_BRANCH, r"the warp diverges: "),
    ],
)
def test_threads_that_do_not_meet(which, message, schedule):
    with pytest.raises(EmulatorError, match=message):
        probe(which, threads=64, schedule=schedule, seed=2)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warps_may_meet_at_barriers_of_their_own(schedule):
    np.testing.assert_array_equal(probe(BARRIERS_OF_TWO_ROLES, threads=64, schedule=schedule), 1)


VOTES_OF_A_BLOCK = body("""
    ptx::store_shared(base + 4 * thread, uint32(thread));
    for (int turn = 0; turn < 6; ++turn)  // in turns 1, 2 and 4 one thread votes
        ptx::store_global(out + 6 * thread + turn, uint32(ptx::barrier_any(thread == 33 && 0x16 >> turn & 1)));
    ptx::load_shared(base + 4 * (63 - thread));
""")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_barrier_carries_the_votes_of_its_block(schedule):
    found = probe(VOTES_OF_A_BLOCK, out=np.zeros((64, 6), np.uint32), threads=64, schedule=schedule)
    np.testing.assert_array_equal(found, [[0, 1, 1, 0, 1, 0]] * 64)


# ---- Between blocks ---------------------------------------------------------------------------------

# Each block leaves 32 numbers for the last one, which adds them up, as the merge of splits does.
# n: 0 as it should be, 1 no fence, 2 no atomic release, 3 loads through the first-level cache,
#    4 the fence before the stores, 5 a fence before the barrier, 6 one thread looks and there is no barrier after,
#    7 no barrier before, 8 every thread's fence and no barrier after them
LAST_BLOCK = body("""
    float* mine = (float*)in + 32 * ptx::block_x();
    int* counter = (int*)out;
    const int speaker = n == 8 ? 31 : 0;
    if (n == 4) ptx::fence_gpu();
    ptx::store_global_fresh(mine + thread, float(thread));
    if (n == 5 || n == 8) ptx::fence_gpu();
    if (n < 7) ptx::barrier();
    if (thread == speaker) {
        if (n != 1 && n != 4 && n != 5) ptx::fence_gpu();
        const int before = n == 2 ? int(ptx::block_x()) : ptx::atomic_add(counter, 1);
        if (n == 2 && ptx::block_x() == 0) ptx::atomic_add(counter, 0);
        ptx::store_shared(base, uint32(before));
    }
    if (n != 6) ptx::barrier();
    const uint32 before = n == 6 ? uint32(ptx::block_x()) : ptx::load_shared(base);
    if (before + 1 < uint32(ptx::grid_x())) return;
    float sum = 0;
    for (int block = 0; block < ptx::grid_x(); ++block) {
        const float* theirs = (float*)in + 32 * block + thread;
        sum += n == 3 ? ptx::load_global(theirs) : ptx::load_global_fresh(theirs);
    }
    ptx::store_global((float*)out + 1 + thread, sum);
    if (thread == 0) ptx::store_global(counter, 0);
""")
# Warps of two blocks meet without their blocks; n: 1 no barrier before the fence, 2 none after the look.
WARP_BY_WARP = body("""
    int* counter = (int*)out + warp;
    const int place = 64 * ptx::block_x() + thread;
    ptx::store_global_fresh((float*)in + place, 1.0f);
    if (n != 1) ptx::warp_barrier();
    int before = 0;
    if (lane == 0) {
        ptx::fence_gpu();
        before = ptx::atomic_add(counter, 1);
    }
    if (n != 2) ptx::warp_barrier();
    before = ptx::shuffle(before, 0);
    if (before == 1) ptx::load_global_fresh((float*)in + (place ^ 65));
""")
ONE_PLACE = body("ptx::store_global((uint8*)out + (thread == 0 ? 0 : 2 * (32 * ptx::block_x() + thread)), uint8(1));")
WHO_CAME_WHEN = body("if (thread == 0) ptx::store_global(out + ptx::atomic_add((int*)in, 1), uint32(ptx::block_x()));")
LOAD_COUNTER = body("""
    if (thread) return;
    if (n == 0) ptx::load_global(in);
    ptx::atomic_add((int*)in, 1);
    if (n == 1) ptx::load_global(in);
""")


def run_last_block(n, schedule=0, seed=0):
    return probe(
        LAST_BLOCK,
        np.zeros((5, 32), np.float32),
        np.zeros(33, np.uint32),
        n,
        grid=5,
        writable_input=True,
        schedule=schedule,
        seed=seed,
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("fence", [0, 5], ids=["one thread's fence", "every thread's fence"])
def test_the_last_block_sees_what_the_others_released(fence, schedule):
    for seed in range(4):
        found = run_last_block(fence, schedule, seed)
        assert found[0] == 0
        np.testing.assert_array_equal(found[1:].view(np.float32), 5 * np.arange(32))


@pytest.mark.parametrize(
    ("n", "message"),
    [
        (1, r"load_global_fresh at offset \d+ of buffer 0: thread 0 of block \(0, 0, 0\) wrote there, and fence_gpu"),
        (2, r"load_global_fresh at offset \d+ of buffer 0: thread 0 of block"),
        (3, r"load_global at offset 0 of buffer 0: block \(0, 0, 0\) wrote there .* first-level cache may be stale"),
        (4, r"load_global_fresh at offset \d+ of buffer 0: thread 0 of block"),
        (6, r"load_global_fresh at offset \d+ of buffer 0: thread \d+ of block"),
        (7, r"load_global_fresh at offset \d+ of buffer 0: thread 1 of block"),
        (8, r"load_global_fresh at offset \d+ of buffer 0: thread 0 of block"),
    ],
)
def test_the_last_block_may_not_look_earlier(n, message):
    with pytest.raises(EmulatorError, match=message):
        run_last_block(n)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_warp_may_release_what_another_looks_at(schedule):
    given = np.zeros((2, 64), np.float32)
    run = functools.partial(probe, WARP_BY_WARP, given, grid=2, threads=64, writable_input=True, schedule=schedule)
    run()
    for missing_barrier in (1, 2):
        with pytest.raises(EmulatorError, match="load_global_fresh at offset"):
            run(n=missing_barrier)


def test_two_blocks_may_not_store_to_one_place():
    with pytest.raises(EmulatorError, match=r"store_global at offset 0 of buffer 1: thread 0 of block \(0, 0, 0\)"):
        probe(ONE_PLACE, out=np.zeros(128, np.uint16), grid=2)


def test_a_counter_is_not_read_through_the_first_level_cache():
    probe(LOAD_COUNTER, n=0, grid=1, writable_input=True)
    for n, grid in ((0, 2), (1, 1)):
        with pytest.raises(EmulatorError, match="an atomic wrote there, and the first-level cache may be stale"):
            probe(LOAD_COUNTER, n=n, grid=grid, writable_input=True)


def test_atomic_additions_return_what_was_before():
    in_order = probe(WHO_CAME_WHEN, out=np.zeros(8, np.uint32), grid=8, writable_input=True)
    np.testing.assert_array_equal(in_order, np.arange(8))


def test_blocks_come_in_an_order_the_seed_decides():
    def order(**options):
        return probe(WHO_CAME_WHEN, out=np.zeros(8, np.uint32), grid=8, writable_input=True, **options).tolist()

    assert order(schedule=0, seed=1) == list(range(8))
    for schedule in (1, 2):
        orders = [order(schedule=schedule, seed=seed) for seed in range(6)]
        assert all(sorted(found) == list(range(8)) for found in orders)
        assert len(set(map(tuple, orders))) == 6
        assert orders[3] == order(schedule=schedule, seed=3)


ARRIVALS = body("ptx::store_global(out + ptx::atomic_add((int*)in, 1), uint32(thread));")


def test_threads_come_in_an_order_the_seed_decides():
    def order(**options):
        return probe(ARRIVALS, threads=64, writable_input=True, **options)

    np.testing.assert_array_equal(order(schedule=0, seed=5), np.arange(64))
    for schedule in (1, 2):
        assert not np.array_equal(order(schedule=schedule, seed=5), order(schedule=schedule, seed=6))
        np.testing.assert_array_equal(order(schedule=schedule, seed=5), order(schedule=schedule, seed=5))
    first = {(s, seed): set(order(schedule=s, seed=seed)[:32] // 32) for s in (1, 2) for seed in range(8)}
    assert {0, 1} in [first[1, seed] for seed in range(8)]
    assert [{0}, {1}] == sorted({min(first[2, seed]): first[2, seed] for seed in range(8)}.values(), key=min)


# ---- The door ---------------------------------------------------------------------------------------

WHERE = body("""
    const uint32 place[6] = {uint32(ptx::block_x()), uint32(ptx::block_y()), uint32(ptx::block_z()),
                             uint32(ptx::grid_x()), uint32(warp), uint32(lane)};
    const int block = ptx::block_x() + 2 * (ptx::block_y() + 3 * ptx::block_z());
    for (int i = 0; i < 6; ++i) ptx::store_global(out + 6 * (64 * block + thread) + i, place[i]);
""")


def test_every_thread_knows_its_place():
    out = np.zeros((4, 3, 2, 64, 6), np.uint32)
    record = np.array((0, out.ctypes.data, WHERE, 0), PROBE)
    probes().launch(record, (2, 3, 4), 64, 0, [(out, True)], schedule=1)
    z, y, x, thread = np.ogrid[:4, :3, :2, :64]
    want = np.broadcast_arrays(x, y, z, 2, thread // 32, thread % 32)
    np.testing.assert_array_equal(out, np.stack(want, -1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 48}, "threads must be a multiple of 32 up to 1024; found 48"),
        ({"threads": 1056}, "threads must be"),
        ({"shared_memory": 232464}, "shared_memory must be a multiple of 16 up to 232448; found 232464"),
        ({"grid": (1, 0, 1)}, "grid must be three numbers of at least 1"),
        ({"schedule": 4}, "schedule must be one of"),
        ({"record": b"short"}, "the kernel's parameters have 24 bytes; the record has 5"),
    ],
)
def test_refusals(options, message):
    usual = {"record": bytes(24), "grid": (1, 1, 1), "threads": 32, "shared_memory": 0, "buffers": []}
    with pytest.raises(ValueError, match=message):
        probes().launch(**usual | options)


def test_refusals_of_buffers(numbers):
    locked = numbers.copy()
    locked.flags.writeable = False
    arguments = (bytes(24), (1, 1, 1), 32, 0)
    with pytest.raises(ValueError, match="buffer 0 is to be written, and a read-only array"):
        probes().launch(*arguments, [(locked, True)])
    with pytest.raises(ValueError, match="buffers 0 and 1 overlap"):
        probes().launch(*arguments, [(numbers[:10], False), (numbers[9:], True)])


def test_views_count_with_all_they_span(numbers):
    view = numbers[::-2]
    record = np.array((numbers.ctypes.data, 0, LOAD_BYTES_AT, 4), PROBE)
    probes().launch(record, (1, 1, 1), 32, 0, [(view, False), (numbers[:0], True)])


def test_launches_from_several_threads_wait_for_each_other():
    kernel = matmul("Half")
    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(run_matmul, kernel, "Half", 70, 72, 40, schedule=s % 3, seed=s) for s in range(8)]
    for run in runs:
        np.testing.assert_array_equal(*run.result())


def test_a_launch_after_an_error_starts_afresh():
    with pytest.raises(EmulatorError, match="deadlock"):
        probe(BARRIER_IN_A_BRANCH, threads=64)
    np.testing.assert_array_equal(probe(BARRIERS_OF_TWO_ROLES, threads=64), 1)


TRIVIAL = """
    #include "mine.cuh"
    namespace cupyattn {
    struct Params { float* out; };
    __global__ void fill(const __grid_constant__ Params p) { ptx::store_global(p.out + ptx::thread(), kNumber); }
    }
"""


def test_a_library_is_built_again_only_when_something_changed(tmp_path):
    def built(number):
        sources = {
            "fill.cu": TRIVIAL,
            "mine.cuh": f'#include "instructions/ptx.cuh"\nconstexpr float kNumber = {number};',
        }
        kernel = emulator.build("fill.cu", "cupyattn::fill", tmp_path, sources)
        out = np.zeros(32, np.float32)
        kernel.launch(np.uint64(out.ctypes.data), (1, 1, 1), 32, 0, [(out, True)])
        assert (out == number).all()
        return kernel.path, kernel.path.stat().st_mtime_ns

    first = built(2.5)
    assert built(2.5) == first
    assert built(3.5) != first
    assert len(list(tmp_path.glob("*.so"))) == 2


def test_what_does_not_compile_says_why(tmp_path):
    with pytest.raises(emulator.BuildError, match="no_such_name"):
        emulator.build(
            "fill.cu", "no_such_name", tmp_path, {"fill.cu": TRIVIAL, "mine.cuh": '#include "instructions/ptx.cuh"'}
        )
    assert list(tmp_path.glob("*.so")) == []
