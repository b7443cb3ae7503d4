"""Splits of the Hopper kernel and their merge, under the emulator, held to the definition."""

import numpy as np
import pytest
from cases import HIDDEN, STRAYS, VISIBLE, turns
from emulated import (
    Call,
    check,
    marks_of,
    operands,
    options_of,
    paged,
    problem_of,
    ragged_operands,
    ragged_options,
    run,
)
from oracle import assert_same_bits

from cupyattn.cuda.launching import launch
from cupyattn.plan.hopper import hopper_tile
from cupyattn.plan.splits import FEWEST_KEYS_OF_TILES, live_split_blocks
from cupyattn.problem import Device

CAUSAL = {"causal": True, "alignment": "bottom-right"}
HEADS = (4, 2, 2)


def small(arrays, options, **edits):
    """The tile a call would get, but of 128 rows and blocks of 32 keys, so that a few keys make many blocks."""
    made = hopper_tile(problem_of(arrays, options))
    return made._replace(block_q=128, block_k=32, persistent=False, cluster=1)._replace(**edits)


def held(arrays, options, schedule=0, num_splits=3, tile=None, **call):
    """`check` with such a tile, and so many splits."""
    return check(
        arrays, options, "hopper", schedule, tile=tile or small(arrays, options), num_splits=num_splits, **call
    )


def left(arrays, options, schedule=0, seed=0, **call):
    """`run` with such a tile."""
    return run(arrays, options, "hopper", schedule, seed, tile=small(arrays, options), **{"num_splits": 3} | call)


# ---- How many splits --------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_splits", "schedule"), [(2, 0), (3, 1), (5, 2), (13, 1), (40, 2)])
def test_any_number_of_splits_meets_the_bar(rng, num_splits, schedule):
    arrays = operands(rng, "bfloat16", "bshd", 2, HEADS, (17, 1300))
    found = held(arrays, options_of(**CAUSAL), schedule, num_splits)
    assert found.plan.num_splits == num_splits


@pytest.mark.parametrize(
    ("dtype", "dims"),
    [
        pytest.param("float16", dims, marks=marks_of(dims), id=str(dims))
        for dims in ((8, 8), (96, 96), (128, 128), (192, 128), (256, 256))
    ],
)
def test_every_head_dim_meets_the_bar(rng, dtype, dims):
    arrays = operands(rng, dtype, "bshd", 1, HEADS, (20, 400), dims)
    tile = hopper_tile(problem_of(arrays, options_of(**CAUSAL)))
    held(arrays, options_of(**CAUSAL), 1, tile=tile)


@pytest.mark.parametrize(("dtype", "dims"), [("bfloat16", (64, 64)), ("float16", (256, 256))], ids=str)
def test_many_splits_of_many_rows_are_a_warps_for_each_row(rng, monkeypatch, dtype, dims):
    monkeypatch.setattr("cupyattn.plan.splits.FEW_ROWS_TO_MERGE", 0)
    launch._recipe.cache_clear()
    arrays = operands(rng, dtype, "bshd", 2, HEADS, (17, 1300), dims)
    options = options_of(**CAUSAL)
    made = Call(arrays, options, "hopper", tile=small(arrays, options), num_splits=7)
    assert made.launches[-1][3].shared_memory == 0
    held(arrays, options, 1, num_splits=7)
    launch._recipe.cache_clear()


def test_splits_that_get_no_keys_add_nothing(rng):
    arrays = operands(rng, "float16", "bshd", 1, HEADS, (20, 100))
    held(arrays, options_of(**CAUSAL), 1, num_splits=9, split_size=32)


def test_keys_of_one_split_give_the_bits_of_a_kernel_that_does_not_split(rng):
    arrays = operands(rng, "bfloat16", "bshd", 2, HEADS, (17, 300))
    whole = left(arrays, options_of(**CAUSAL), num_splits=1)
    found = left(arrays, options_of(**CAUSAL), 1, split_size=320)
    assert_same_bits(found.out, whole.out)
    assert_same_bits(found.lse, whole.lse)


def test_splits_come_in_any_order_to_the_same_bits(rng):
    arrays = operands(rng, "bfloat16", "bshd", 2, HEADS, (17, 1300))
    once, *others = (left(arrays, options_of(**CAUSAL), 1 + seed % 2, seed) for seed in (1, 2, 3))
    for other in others:
        assert_same_bits(other.out, once.out)
        assert_same_bits(other.lse, once.lse)


def test_blocks_that_take_several_splits_give_the_same_bits(rng):
    arrays = operands(rng, "bfloat16", "bshd", 2, HEADS, (17, 1300))
    options = options_of(**CAUSAL)
    once = left(arrays, options, 1)
    tile = small(arrays, options, persistent=True)
    again = run(arrays, options, "hopper", 2, tile=tile, num_splits=3, num_workers=5)
    assert_same_bits(again.out, once.out)
    assert_same_bits(again.lse, once.lse)


def test_splits_of_fixed_size_do_not_depend_on_the_batch(rng):
    arrays = operands(rng, "bfloat16", "bshd", 3, HEADS, (17, 700))
    options, fixed = options_of(**CAUSAL), {"fixed_split_size": 160}
    together = run(arrays, options, "hopper", 1, tile=small(arrays, options), **fixed)
    assert together.plan.num_splits == 5
    for index in range(3):
        one = {name: x[index : index + 1] for name, x in arrays.items()}
        alone = run(one, options, "hopper", tile=small(one, options), **fixed)
        assert_same_bits(alone.out[0], together.out[index])
        assert_same_bits(alone.lse[0], together.lse[index])


# ---- Lengths that are data --------------------------------------------------------------------------

RAGGED = {
    "one long among short": ((5, 1, 17, 3), (1900, 64, 65, 0), {}),
    "several tiles": ((5, 164, 0, 77), (700, 164, 33, 12), CAUSAL),
    "windows": ((40, 3), (40, 1500), {"window_size": (900, 4), "alignment": "bottom-right"}),
}


@pytest.mark.parametrize(("case", "schedule"), turns(RAGGED))
@pytest.mark.parametrize("behind", [(0, 0), (300, 9)], ids=["to the end", "rows behind"])
def test_sequences_end_to_end_meet_the_bar(rng, case, behind, schedule):
    lengths_q, lengths_k, options = case
    arrays = ragged_operands(rng, "float16", lengths_q, lengths_k, HEADS, behind=behind)
    held(arrays, ragged_options(arrays, **options), schedule, num_splits=4)


@pytest.mark.parametrize(("lengths", "units"), [((3000, 5, 0), 4), ((100, 2000, 2000), 40)])
def test_splits_by_live_lengths_are_those_of_the_planner(rng, lengths, units):
    """Its rule, from lengths that only the device knows; on a small GPU, and where splits have the fewest keys."""
    device = Device("small", "cuda", units, (9, 0), 227 * 1024)
    arrays = ragged_operands(rng, "float16", (3, 1, 2), lengths, (2, 1, 1))
    options = ragged_options(arrays)
    tile = small(arrays, options, heads_per_unit=2)
    launched = Call(arrays, options, "hopper", device=device, tile=tile, num_splits=6)
    launched.run()
    blocks = [-(-length // tile.block_k) for length in lengths]
    size = live_split_blocks(sum(blocks), 3, device.num_units, tile.block_k, FEWEST_KEYS_OF_TILES)
    expected = [max(1, -(-count // size)) for count in blocks]
    assert max(expected) > 1
    told = launched.scratch["told"].reshape(3, 6)
    np.testing.assert_array_equal(told[:, 0], [2 * count for count in expected])


@pytest.mark.parametrize("page_size", [8, 64])
def test_pages_give_the_bits_of_contiguous_keys(rng, page_size):
    arrays = ragged_operands(rng, "bfloat16", (17, 0, 5, 33), (1300, 7, 0, 64), HEADS)
    arrays["v"][[20, 1200], 0, 3] = np.inf, np.nan
    options = ragged_options(arrays, **CAUSAL)
    straight, found = (left(x, options, page_size % 3) for x in (arrays, paged(rng, arrays, page_size)))
    assert_same_bits(found.out, straight.out)
    assert_same_bits(found.lse, straight.lse)


# ---- Who sees whom, and what is not finite ----------------------------------------------------------


@pytest.mark.parametrize(("make", "schedule"), turns(VISIBLE))
def test_who_sees_whom_meets_the_bar(rng, make, schedule):
    arrays, options, _ = make(rng, "bfloat16")
    held(arrays, options, schedule)


@pytest.mark.parametrize(("make", "schedule"), turns(STRAYS))
def test_what_is_not_finite_shows_where_it_is_seen(rng, make, schedule):
    arrays, options, _ = make(rng, "float16")
    held(arrays, options, schedule)


@pytest.mark.parametrize("name", ["behind the band", "beside the window", "behind the last key"])
def test_what_is_hidden_does_not_change_a_bit(rng, name):
    arrays, poisoned, options, _ = HIDDEN[name](rng, "float16")
    clean, found = left(arrays, options, 0), left(poisoned, options, 2)
    assert np.isfinite(found.out.astype(float)).all()
    assert_same_bits(found.out, clean.out)
    assert_same_bits(found.lse, clean.lse)


@pytest.mark.parametrize("first", [0.5, np.nan])
@pytest.mark.parametrize("seen", [0, 5, 90])
def test_rows_of_sinks_that_see_nothing_and_something_meet_the_bar(rng, seen, first):
    arrays = operands(rng, "bfloat16", "bshd", 1, HEADS, (90, seen))
    arrays["sinks"] = np.array([first, np.inf, -np.inf, 3.0], "f4")
    held(arrays, options_of(**CAUSAL), 1)


def test_packed_heads_meet_the_bar(rng):
    arrays = operands(rng, "float16", "bhsd", 2, (7, 1, 1), (19, 500))
    arrays["v"][1, 0, 300, 5] = np.inf
    options = options_of(layout="bhsd", softcap=5.0, **CAUSAL)
    held(arrays, options, 2, tile=small(arrays, options, heads_per_unit=7))


def test_float8_is_multiplied_by_its_descales(rng):
    arrays = operands(rng, "float8_e4m3fn", "bshd", 2, HEADS, (20, 400))
    arrays["v"][0, 330, 1, 5] = np.nan
    arrays |= {f"{name}_descale": rng.uniform(0.5, 2.0, (2, 2)).astype("f4") for name in "qkv"}
    held(arrays, options_of(**CAUSAL), 1)


def test_a_launch_without_lse_is_the_same(rng):
    arrays = operands(rng, "bfloat16", "bshd", 2, HEADS, (17, 1300))
    found, other = (left(arrays, options_of(return_lse=wanted, **CAUSAL)) for wanted in (True, False))
    assert other.lse is None
    assert_same_bits(other.out, found.out)
