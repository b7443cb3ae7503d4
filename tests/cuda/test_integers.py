"""Integers of the kernels as NVRTC compiles them, executed for extreme numbers and held to Python's, which never wrap.

g++, and so the emulator, computes a guarded difference where the guard lets it; NVVM may compute it anywhere.
"""

import struct
from pathlib import Path

import numpy as np
import pytest
from ptx.integers import compile_ptx

from cupyattn.cuda.launching import params
from cupyattn.cuda.making.source import FOLDER, join, sources
from cupyattn.plan import LONGEST
from cupyattn.plan.splits import live_split_blocks
from cupyattn.problem import Mask, Span

pytestmark = pytest.mark.usefixtures("nvrtc")

PROBES = """
namespace probe {
using namespace cupyattn;
template <int>
__global__ void band(const __grid_constant__ Band band, int first, int last, int* found) {
    const Span spans[3] = {band.visible_keys(first), band.touched(first, last), band.whole(first, last)};
    for (int i = 0; i < 3; ++i) found[2 * i] = spans[i].start, found[2 * i + 1] = spans[i].stop;
}
template <int>
__global__ void turned(const __grid_constant__ Band band, int first, int last, int* found) {
    const Span spans[3] = {band.seeing_rows(first), band.touching(first, last), band.seeing_all(first, last)};
    for (int i = 0; i < 3; ++i) found[2 * i] = spans[i].start, found[2 * i + 1] = spans[i].stop;
}
template <int>
__global__ void sequence(const __grid_constant__ Params params, int index, int64* found) {
    const Sequence at = sequence_at(index, params);
    found[0] = at.first_row, found[1] = at.first_key;
    found[2] = at.band.seqlen_q, found[3] = at.band.seqlen_k, found[4] = at.band.offset;
}
template <int>
__global__ void splits(int total, int groups, int pieces, int slots, int* found) {
    *found = live_split_blocks(capped(int64(total) * groups), pieces, slots, 64);
}
}
"""


def probe(folder, name, **changed):
    """A probe beside the sources, some of which are `changed`."""
    for file in sources():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(changed.get(Path(file).stem, (FOLDER / file).read_text()))
    return compile_ptx(join("splitkv.cu", folder) + PROBES, f"probe::{name}<0>")


def extremes(rng, high, count):
    """Numbers from 0 to `high`, many of them at one of its ends."""
    near = rng.integers(0, 4, count)
    anywhere = (high * rng.random(count) ** 4).astype(np.int64)
    return [
        int(x)
        for x in np.choose(rng.integers(0, 3, count), [np.minimum(near, high), high - near % (high + 1), anywhere])
    ]


def hold_bands(rng, kernel, open_=params.OPEN, count=300):
    """Spans of bands and rows of all kinds, those of `problem.Mask`."""
    found = np.zeros(6, np.int32)
    for case in range(count):
        seqlen_q, seqlen_k, left, right = extremes(rng, LONGEST, 4)
        left, right = (None if rng.random() < 0.3 else side for side in (left, right))
        mask = Mask(left, right, ("top-left", "bottom-right")[case % 2])
        seqlen_q = max(1, seqlen_q)
        first, last = sorted(extremes(rng, seqlen_q - 1, 2))
        sides = [open_ if side is None else side for side in (left, right)]
        band = struct.pack("<5i", seqlen_q, seqlen_k, *sides, mask.offset(seqlen_q, seqlen_k))
        kernel.run((band, first, last, found), [found])
        rows = Span(first, last + 1)
        expected = [mask.visible_keys(first, seqlen_q, seqlen_k), mask.touched(rows, seqlen_q, seqlen_k)]
        expected.append(mask.whole(rows, seqlen_q, seqlen_k))
        assert found.tolist() == [x for span in expected for x in span], (mask, seqlen_q, seqlen_k, first, last)


def test_bands_of_any_lengths_and_windows_do_not_wrap(rng, tmp_path):
    hold_bands(rng, probe(tmp_path, "band"))


def seeing(mask, key, seqlen_q, seqlen_k):
    """The queries that see a key, in numbers that never wrap."""
    diagonal = key - mask.offset(seqlen_q, seqlen_k)
    start = 0 if mask.right is None else max(0, diagonal - mask.right)
    return start, seqlen_q if mask.left is None else min(seqlen_q, diagonal + mask.left + 1)


def test_queries_that_see_a_key_are_those_that_see_it(rng):
    for case in range(50):
        seqlen_q, seqlen_k, left, right = (int(x) for x in rng.integers(1, 9, 4))
        left, right = (None if rng.random() < 0.3 else side for side in (left, right))
        mask = Mask(left, right, ("top-left", "bottom-right")[case % 2])
        for key in range(seqlen_k):
            spans = (mask.visible_keys(row, seqlen_q, seqlen_k) for row in range(seqlen_q))
            rows = [row for row, span in enumerate(spans) if span.start <= key < span.stop]
            assert rows == list(range(*seeing(mask, key, seqlen_q, seqlen_k)))


def test_queries_of_any_keys_do_not_wrap(rng, tmp_path):
    kernel, found = probe(tmp_path, "turned"), np.zeros(6, np.int32)
    for case in range(300):
        seqlen_q, seqlen_k, left, right = extremes(rng, LONGEST, 4)
        left, right = (None if rng.random() < 0.3 else side for side in (left, right))
        mask = Mask(left, right, ("top-left", "bottom-right")[case % 2])
        seqlen_k = max(1, seqlen_k)
        first, last = sorted(extremes(rng, seqlen_k - 1, 2))
        sides = [params.OPEN if side is None else side for side in (left, right)]
        band = struct.pack("<5i", seqlen_q, seqlen_k, *sides, mask.offset(seqlen_q, seqlen_k))
        kernel.run((band, first, last, found), [found])
        of_first, of_last = (seeing(mask, key, seqlen_q, seqlen_k) for key in (first, last))
        expected = [*of_first, of_first[0], of_last[1], of_last[0], of_first[1]]
        assert found.tolist() == expected, (mask, seqlen_q, seqlen_k, first, last)


def test_a_guarded_difference_wraps_as_compiled(rng, tmp_path):
    """What mask.cuh had: right in every test of the emulator, and zeros for whole tiles on a GPU."""
    text, largest = (FOLDER / "algorithm/mask.cuh").read_text(), 2**31 - 1
    for new, old in (
        ("larger(diagonal - left, 0)", "diagonal > left ? diagonal - left : 0"),
        ("right == kOpen ? seqlen_k", "right == kLargest ? seqlen_k"),
    ):
        assert text.count(new) == 1, "the text to replace has to be there once"
        text = text.replace(new, old)
    with pytest.raises(AssertionError, match="Mask"):
        hold_bands(rng, probe(tmp_path, "band", mask=text), open_=largest)


def cut(starts, index, total, longest):
    start = min(max(starts[index], 0), total)
    return start, min(min(max(starts[index + 1], start), total), start + min(longest, total - start))


@pytest.mark.parametrize("paged", [False, True])
def test_sequences_of_any_numbers_lie_within_the_arrays(rng, tmp_path, paged):
    kernel, found, table = probe(tmp_path, "sequence"), np.zeros(5, np.int64), np.zeros((2, 4), np.int32)
    for _ in range(200):
        starts = rng.choice([-(2**31), -1, 0, 1, 7, LONGEST, 2**31 - 2, 2**31 - 1], (2, 3)).astype(np.int32)
        total_q, longest_q, longest_k = extremes(rng, LONGEST, 3)
        (total_k,) = extremes(rng, 2**31 - 1, 1)
        none = params.Strides()
        tail = params.Tail(
            *(none,) * 4, *(params.ScoreStrides(),) * 2, 0, 0, 4, 0, total_q, total_k, 2, 1, longest_q, longest_k,
            *(8, 8, 1, 1, 1), params.OPEN, params.OPEN, 1, 16 * paged, 3, params.NO_CACHE, *(0,) * 6, 1.0, 1.0, 0.0,
        )  # fmt: skip
        pointers = {"cu_seqlens_q": starts[0].ctypes.data, "cu_seqlens_k": starts[1].ctypes.data}
        if paged:
            pointers["block_table"] = table.ctypes.data
        for index in range(2):
            record = params.record(pointers, tail.pack()).tobytes()
            kernel.run((record, index, found), [starts, table, found])
            rows = cut(starts[0].tolist(), index, total_q, longest_q)
            keys = cut(starts[1].tolist(), index, 2**31 - 1 if paged else total_k, longest_k)
            lengths = rows[1] - rows[0], keys[1] - keys[0]
            expected = [rows[0], 0 if paged else keys[0], *lengths, lengths[1] - lengths[0]]
            assert found.tolist() == expected


def test_blocks_of_any_number_are_split_as_the_planner_does(rng, tmp_path):
    kernel, found = probe(tmp_path, "splits"), np.zeros(1, np.int32)
    for _ in range(200):
        total, slots = extremes(rng, 2**30, 2)
        groups, pieces = extremes(rng, 256, 1)[0] + 1, extremes(rng, 2**31 - 1, 1)[0]
        kernel.run((total, groups, pieces, slots, found), [found])
        assert found[0] == live_split_blocks(min(total * groups, 2**30), pieces, slots, 64)


# ---- What executes them -----------------------------------------------------------------------------


def executed(expression, *numbers):
    arguments = ", ".join(f"int {name}" for name in "abcd"[: len(numbers)])
    text = f"template <int> __global__ void f({arguments}, long long* found) {{ *found = {expression}; }}"
    found = np.zeros(1, np.int64)
    compile_ptx(text, "f<0>").run((*numbers, found), [found])
    return found[0]


@pytest.mark.parametrize(
    ("expression", "numbers", "expected"),
    [
        ("a + b", (2**31 - 1, 1), -(2**31)),
        ("(long long)a + b", (2**31 - 1, 1), 2**31),
        ("(unsigned)a", (-1,), 2**32 - 1),
        ("a / b", (-7, 2), -3),
        ("a % b", (-7, 2), -1),
        ("a >> b", (-8, 1), -4),
        ("(unsigned)a >> b", (-8, 1), 2**31 - 4),
        ("(long long)a * b", (2**30, -8), -(2**33)),
        ("(a ^ b) & ~c", (12, 10, 2), 4),
        ("a < b ? c : d", (-1, 1, 5, 6), 5),
        ("(unsigned)a < (unsigned)b ? c : d", (-1, 1, 5, 6), 6),
    ],
)
def test_integers_are_executed_as_a_gpu_does(expression, numbers, expected):
    assert executed(expression, *numbers) == expected


def test_an_instruction_that_is_not_known_is_an_error():
    with pytest.raises(NotImplementedError, match="popc"):
        executed("__popc(a)", 3)


def test_an_access_outside_of_the_arrays_is_an_error():
    kernel = compile_ptx("template <int> __global__ void f(int* x) { x[3] = 1; }", "f<0>")
    few = np.zeros(3, np.int32)
    with pytest.raises(IndexError, match="nobody's"):
        kernel.run((few,), [few])
