"""Tensor maps as values, and what the driver is told of them."""

import ctypes

import numpy as np
import pytest

from cupyattn.cuda.launching import maps
from cupyattn.cuda.launching.maps import BoxMap, box_map, objection

SHAPE = (2, 100, 8, 64)  # batch, seqlen, heads, head_dim
STRIDES = (100 * 8 * 64, 8 * 64, 64)


def test_a_map_sees_columns_group_rows_heads_and_sequences():
    found = box_map("float16", 64, 128, SHAPE, STRIDES)
    assert found.dims == (64, 1, 100, 8, 2)
    assert found.strides[1:] == (8 * 64 * 2, 64 * 2, 100 * 8 * 64 * 2)
    assert found.box == (64, 1, 128, 1, 1)
    assert found.swizzle == 128


def test_a_group_of_heads_comes_with_each_row():
    found = box_map("bfloat16", 64, 32, SHAPE, STRIDES, group=4)
    assert found.dims == (64, 4, 100, 2, 2)
    assert found.strides == (64 * 2, 8 * 64 * 2, 4 * 64 * 2, 100 * 8 * 64 * 2)
    assert found.box == (64, 4, 32, 1, 1)


@pytest.mark.parametrize(
    ("columns", "dtype", "swizzle", "box"),
    [(64, "float16", 128, 64), (96, "float16", 64, 32), (192, "bfloat16", 128, 64), (96, "float8_e4m3fn", 32, 32),
     (64, "float8_e4m3fn", 64, 64), (256, "float8_e4m3fn", 128, 128)],
)  # fmt: skip
def test_a_box_is_as_wide_as_its_swizzle(columns, dtype, swizzle, box):
    found = box_map(dtype, columns, 64, SHAPE, STRIDES)
    assert (found.swizzle, found.box[0]) == (swizzle, box)


def test_an_axis_of_one_has_a_lawful_stride_whatever_the_arrays_is():
    assert box_map("float16", 64, 64, (1, 100, 1, 64), (7, 64, 3)).strides == (16, 128, 16, 16)


def test_of_no_rows_there_is_a_map_of_one():
    assert box_map("float16", 64, 64, (2, 0, 8, 64), STRIDES).dims[2] == 1


@pytest.mark.parametrize(
    ("strides", "aligned", "words"),
    [
        (STRIDES, True, None),
        (STRIDES, False, "k does not start at a multiple of 16 bytes"),
        ((51200, 516, 64), True, "steps of k are not multiples of 16 bytes"),
        ((0, 512, 64), True, "a step of k is 0 bytes"),
        ((51200, -512, 64), True, "a step of k is -1024 bytes"),
        ((2**40, 512, 64), True, "less than 2**40"),
    ],
    ids=str,
)
def test_why_there_can_be_no_map(strides, aligned, words):
    found = objection("k", box_map("float16", 64, 64, SHAPE, strides), aligned)
    assert found is None if words is None else words in found


class Driver:
    """What stands for cuTensorMapEncodeTiled: notes what it is asked, and writes the words 1 to 16."""

    def __init__(self):
        self.asked, self.error = [], 0

    def __call__(self, place, dtype, rank, address, dims, strides, box, steps, *modes):
        self.asked.append((place, dtype, rank, address, [*dims], [*strides], [*box], [*steps], *modes))
        (ctypes.c_uint64 * 16).from_address(place)[:] = range(1, 17)
        return self.error


@pytest.fixture
def driver(monkeypatch):
    found = Driver()
    monkeypatch.setattr(maps, "_encoder", lambda: found)
    maps.encode.cache_clear()
    yield found
    maps.encode.cache_clear()


WANTED = BoxMap("bfloat16", (64, 1, 100, 8, 2), (16, 1024, 128, 102400), (64, 1, 128, 1, 1), 128)


def test_the_driver_is_told_all_of_a_map(driver):
    maps.encode(WANTED, 4096)
    (asked,) = driver.asked
    bfloat16, not_interleaved, swizzle_of_128, promotion_to_256, zeros = 9, 0, 3, 3, 0  # of cuda.h
    assert asked[1:4] == (bfloat16, 5, 4096)
    assert asked[4:8] == ([*WANTED.dims], [*WANTED.strides], [*WANTED.box], [1] * 5)
    assert asked[8:] == (not_interleaved, swizzle_of_128, promotion_to_256, zeros)


def test_the_driver_writes_to_aligned_memory(driver):
    for address in range(0, 2048, 16):
        maps.encode(WANTED, address)
    assert [asked[0] % 64 for asked in driver.asked] == [0] * 128


def test_an_encoded_map_is_the_drivers_sixteen_words(driver):
    np.testing.assert_array_equal(np.frombuffer(maps.encode(WANTED, 4096), np.uint64), np.arange(1, 17))


def test_a_map_is_encoded_once(driver):
    assert maps.encode(WANTED, 4096) is maps.encode(WANTED, 4096)
    maps.encode(WANTED, 8192)
    assert len(driver.asked) == 2


def test_what_the_driver_refuses_is_an_error(driver):
    driver.error = 1
    with pytest.raises(RuntimeError, match=r"the driver does not encode BoxMap.* at 0x1000: CUDA error 1"):
        maps.encode(WANTED, 4096)


def test_without_a_driver_nothing_can_be_encoded(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert maps._encoder.__wrapped__() is None
