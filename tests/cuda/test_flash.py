"""The flash kernel under the emulator, held to the definition: sizes, tiles, edits, layouts, what nobody may see."""

import emulated
import numpy as np
import pytest
from cases import DISTANCES, DROPPED, EDITS, HIDDEN, LAYOUTS, STRAYS, VISIBLE, call, turns
from emulated import (
    Call,
    check,
    marks_of,
    operands,
    options_of,
    paged,
    ragged_operands,
    ragged_options,
    run,
    without_pages,
)
from oracle import assert_same_bits

from cupyattn import numpy_ref
from cupyattn.plan import Tile
from cupyattn.problem import Distances

SIZES = [
    ("float16", 8, 8),
    ("float32", 8, 8),
    ("bfloat16", 40, 40),
    ("float16", 64, 64),
    ("bfloat16", 64, 64),
    ("float32", 64, 64),
    ("bfloat16", 72, 72),
    ("float16", 96, 96),
    ("float32", 96, 96),
    ("bfloat16", 128, 128),
    ("float32", 128, 128),
    ("float16", 160, 160),
    ("bfloat16", 192, 192),
    ("float32", 192, 192),
    ("float16", 256, 256),
    ("float32", 256, 256),
    ("float16", 192, 128),
    ("bfloat16", 64, 256),
    ("float32", 40, 136),
]
SHAPES = [
    ((1, 1), {}),
    ((17, 83), {"causal": True, "alignment": "bottom-right"}),
    ((131, 65), {"window_size": (70, 20), "alignment": "top-left"}),
]
TILES = [
    ("float16", Tile(64, 64, 4, 2)),
    ("bfloat16", Tile(64, 64, 4, 1, True)),
    ("float16", Tile(64, 32, 4, 2, True)),
    ("bfloat16", Tile(128, 64, 4, 1)),
    ("float16", Tile(128, 32, 4, 2, True)),
    ("float16", Tile(128, 64, 8, 1)),
    ("bfloat16", Tile(128, 32, 8, 2)),
    ("float16", Tile(16, 16, 1, 1)),
    ("float16", Tile(32, 96, 2, 2)),
    ("float32", Tile(64, 32, 4, 2, True)),
    ("float32", Tile(64, 16, 2, 1)),
]


@pytest.mark.parametrize(
    ("size", "shape", "schedule"),
    [
        pytest.param(
            size,
            shape,
            (i + j) % 3,
            marks=marks_of(size[1:]),
            id=f"{'-'.join(map(str, size))}-{shape[0][0]}x{shape[0][1]}",
        )
        for i, size in enumerate(SIZES)
        for j, shape in enumerate(SHAPES)
    ],
)
def test_every_dtype_and_head_dim_meets_the_bar(rng, size, shape, schedule):
    dtype, *dims = size
    seqlens, options = shape
    arrays = operands(rng, dtype, "bshd", 1, (2, 1, 2), seqlens, dims)
    check(arrays, options_of(**options), "flash", schedule)


@pytest.mark.parametrize("schedule", range(3))
@pytest.mark.parametrize(("dtype", "tile"), TILES, ids=lambda x: "-".join(map(str, x)) if isinstance(x, tuple) else x)
def test_every_tile_meets_the_bar(rng, dtype, tile, schedule):
    seqlens = [(1, 70), (64, 200), (145, 129)][schedule]
    arrays = operands(rng, dtype, "bshd", 1, (2, 2, 1), seqlens, (64, 40))
    options = options_of(causal=schedule != 1, alignment="bottom-right")
    check(arrays, options, "flash", schedule, tile=tile)


@pytest.mark.parametrize(("make", "schedule"), turns(VISIBLE))
def test_who_sees_whom_meets_the_bar(rng, make, schedule):
    arrays, options, _ = make(rng, "bfloat16")
    check(arrays, options, "flash", schedule)


@pytest.mark.parametrize(("make", "schedule"), turns(EDITS))
def test_edited_scores_meet_the_bar(rng, make, schedule):
    arrays, options, seed = make(rng, "float16")
    check(arrays, options, "flash", schedule, dropout_seed=seed)


@pytest.mark.parametrize(("make", "schedule"), turns(DISTANCES))
def test_slopes_by_distances_of_their_own_meet_the_bar(rng, make, schedule):
    arrays, options, _ = make(rng, "bfloat16")
    check(arrays, options, "flash", schedule)


@pytest.mark.parametrize("name", ["every third token", "on the mask's diagonal, every second token"])
def test_slopes_by_distances_of_their_own_meet_the_bar_of_float32(rng, name):
    arrays, options, _ = DISTANCES[name](rng, "float32")
    check(arrays, options, "flash", 1)


def test_distances_of_sequences_end_to_end_are_those_of_each(rng):
    arrays = ragged_operands(rng, "float16", (9, 0, 40), (70, 5, 40), (4, 2, 2), behind=(3, 0))
    arrays["alibi_slopes"] = rng.standard_normal((3, 4)).astype("f4")
    check(arrays, ragged_options(arrays, alignment="top-left", distances=Distances(25, 2)), "flash", 2)


@pytest.mark.parametrize("edit", ["softcap 50", "everything", "scale below 0, sinks, softcap, window"])
def test_edited_scores_meet_the_bar_of_float32(rng, edit):
    arrays, options, seed = EDITS[edit](rng, "float32")
    check(arrays, options, "flash", 1, dropout_seed=seed)


@pytest.mark.parametrize(("make", "schedule"), turns(LAYOUTS))
def test_every_layout_meets_the_bar(rng, make, schedule):
    arrays, options, seed = make(rng, "float16")
    check(arrays, options, "flash", schedule, dropout_seed=seed)


@pytest.mark.parametrize(("make", "schedule"), [turns(LAYOUTS)[i] for i in (2, 8, 10)])
def test_float32_in_odd_layouts_meets_the_bar(rng, make, schedule):
    arrays, options, seed = make(rng, "float32")
    check(arrays, options, "flash", schedule, dropout_seed=seed)


@pytest.mark.parametrize("odd", ["k at an odd address", "rows at odd addresses"])
def test_odd_addresses_do_not_change_a_bit(rng, odd):
    arrays, options, _ = LAYOUTS[odd](rng, "bfloat16")
    here = {name: np.ascontiguousarray(x) for name, x in arrays.items()}
    assert_same_bits(run(arrays, options, "flash").out, run(here, options, "flash").out)


@pytest.mark.parametrize(("make", "schedule"), turns(HIDDEN))
def test_what_is_hidden_does_not_change_a_bit(rng, make, schedule):
    arrays, poisoned, options, _ = make(rng, "float16")
    clean, found = (run(x, options, "flash", schedule) for x in (arrays, poisoned))
    assert np.isfinite(found.out.astype(float)).all()
    assert_same_bits(found.out, clean.out)
    assert_same_bits(found.lse, clean.lse)


@pytest.mark.parametrize("make", [HIDDEN["behind the band"], HIDDEN["behind the mask"]])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_hidden_does_not_change_a_bit_of_other_dtypes(rng, dtype, make):
    arrays, poisoned, options, _ = make(rng, dtype)
    clean, found = (run(x, options, "flash", 1) for x in (arrays, poisoned))
    assert np.isfinite(found.out.astype(float)).all()
    assert_same_bits(found.out, clean.out)


@pytest.mark.parametrize(("make", "schedule"), turns(STRAYS))
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_what_is_not_finite_shows_where_it_is_seen(rng, dtype, make, schedule):
    arrays, options, _ = make(rng, dtype)
    check(arrays, options, "flash", schedule)


@pytest.mark.parametrize(("make", "schedule"), turns(DROPPED))
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_not_finite_is_nan_where_its_weight_is_dropped(rng, dtype, make, schedule):
    arrays, options, seed = make(rng, dtype)
    check(arrays, options, "flash", schedule, dropout_seed=seed)


def test_a_query_of_nan_spoils_its_own_row_alone(rng):
    arrays, options, _ = call(rng, "bfloat16", seqlens=(40, 77))
    clean = run(arrays, options, "flash")
    arrays["q"][1, 25, 2, 7] = np.nan
    found = run(arrays, options, "flash")
    assert np.isnan(found.out[1, 25, 2].astype(float)).all()
    found.out[1, 25, 2] = clean.out[1, 25, 2]
    assert_same_bits(found.out, clean.out)


def test_rows_that_see_nothing_are_zeros_without_a_sign(rng):
    arrays, options, _ = VISIBLE["causal, more rows, bottom-right"](rng, "float16")
    found = run(arrays, options, "flash")
    assert_same_bits(found.out[:, : 90 - 23], np.zeros_like(found.out[:, : 90 - 23]))
    assert np.isneginf(found.lse[..., : 90 - 23]).all()


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_dropout_drops_what_the_reference_drops(rng, p):
    arrays, _, seed = call(rng, "float16", heads=(2, 2, 2), seqlens=(37, 64))
    arrays["v"][...] = np.eye(64)[:, None]
    found = run(arrays, options_of(dropout_p=p), "flash", 2, dropout_seed=seed)
    batch, head = np.arange(2)[:, None, None], np.arange(2)[:, None]
    keep = numpy_ref.dropout_keep(p, seed, batch, head, np.arange(37), range(64))
    np.testing.assert_array_equal(found.out.swapaxes(1, 2) != 0.0, keep)


def test_sums_that_are_cut_off_as_tensor_cores_do_are_smaller_and_near():
    """By which `make gpu` holds float32 on a GPU; the emulator rounds after each term."""
    a, b = np.float32(1.0) + np.zeros((1, 16), np.float32), np.full((1, 16), 1.0 + 1.5 * 2.0**-20, np.float32)
    start, exact = np.full((1, 1), 2.0**8, np.float32), 2.0**8 + 16.0 * (1.0 + 1.5 * 2.0**-20)
    cut, near = (float(emulated._add_product(start, a, b, cores)[0, 0]) for cores in (True, False))
    assert cut < exact
    assert exact - cut < 2.0**-14
    assert abs(near - exact) < 2.0**-11
    assert float(emulated._add_product(-start, -a, b, True)[0, 0]) == -cut


def test_a_launch_without_lse_is_the_same(rng):
    arrays = operands(rng, "float16", "bshd", 1, (2, 1, 1), (33, 70))
    found, other = (run(arrays, options_of(return_lse=wanted), "flash") for wanted in (True, False))
    assert other.lse is None
    assert_same_bits(other.out, found.out)


@pytest.mark.parametrize("schedule", range(3))
def test_a_second_launch_is_the_same_bit_for_bit(rng, schedule):
    arrays, options, _ = VISIBLE["window"](rng, "float16")
    once, again = (run(arrays, options, "flash", schedule, seed) for seed in (1, 2))
    assert_same_bits(once.out, again.out)
    assert_same_bits(once.lse, again.lse)


# ---- Sequences end to end ---------------------------------------------------------------------------

RAGGED = {
    "equal lengths": ((20, 20), (20, 20), {}),
    "rows before the keys": ((3, 20, 90), (1, 4, 70), {"alignment": "bottom-right"}),
    "one sequence": ((70,), (90,), {"causal": True, "alignment": "bottom-right"}),
    "empty sequences": ((0, 17, 0, 5, 0), (4, 0, 9, 130, 0), {}),
    "causal": ((5, 64, 1, 77), (70, 64, 33, 12), {"causal": True, "alignment": "bottom-right"}),
    "causal, top-left": ((5, 64, 1, 77), (70, 64, 33, 12), {"causal": True, "alignment": "top-left"}),
    "windows": ((40, 3), (40, 150), {"window_size": (20, 4), "alignment": "bottom-right"}),
    "no sequences": ((), (), {}),
}


@pytest.mark.parametrize(("case", "schedule"), turns(RAGGED))
@pytest.mark.parametrize("behind", [(0, 0), (70, 9)], ids=["to the end", "rows behind"])
def test_sequences_end_to_end_meet_the_bar(rng, case, behind, schedule):
    lengths_q, lengths_k, options = case
    arrays = ragged_operands(rng, "float16", lengths_q, lengths_k, (4, 2, 2), behind=behind)
    check(arrays, ragged_options(arrays, **options), "flash", schedule)


def test_longest_lengths_may_be_longer_than_any(rng):
    arrays = ragged_operands(rng, "bfloat16", (5, 20), (33, 7), (2, 1, 1))
    check(arrays, ragged_options(arrays, 300, 1000), "flash", 1)


def test_rows_of_no_sequence_are_wiped_where_none_is_expected(rng):
    arrays = ragged_operands(rng, "float16", (0, 0), (5, 3), behind=(40, 0))
    check(arrays, ragged_options(arrays), "flash")


@pytest.mark.parametrize("edit", ["slopes", "sinks", "dropout"])
def test_edits_of_sequences_end_to_end_meet_the_bar(rng, edit):
    arrays = ragged_operands(rng, "float16", (9, 0, 40), (70, 5, 40), (4, 2, 2), behind=(3, 0))
    options = {"alignment": "bottom-right"}
    if edit == "slopes":
        arrays["alibi_slopes"] = rng.standard_normal((3, 4)).astype("f4")
    elif edit == "sinks":
        arrays["sinks"] = rng.standard_normal(4).astype("f4")
    else:
        options["dropout_p"] = 0.4
    check(arrays, ragged_options(arrays, **options), "flash", 2, dropout_seed=77)


def test_a_sequence_does_not_see_its_neighbours(rng):
    arrays = ragged_operands(rng, "float16", (30, 17, 9), (30, 70, 9), (2, 2, 2))
    options = ragged_options(arrays)
    clean = run(arrays, options, "flash")
    for name in "qkv":
        arrays[name][:30] = np.nan
    found = run(arrays, options, "flash")
    assert_same_bits(found.out[30:], clean.out[30:])


def test_lengths_that_lie_stay_inside_the_arrays(rng):
    """On a GPU nobody looks at cu_seqlens before the kernel does; the emulator refuses every other address."""
    arrays = ragged_operands(rng, "float16", (20, 20), (20, 20))
    options = ragged_options(arrays)
    arrays["cu_seqlens_q"][:] = [-5, 4, 2**31 - 1]
    arrays["cu_seqlens_k"][:] = [3, 1, 1000]
    Call(arrays, options, "flash").run()


# ---- Pages ------------------------------------------------------------------------------------------

PAGED_ROWS, PAGED_KEYS = (70, 0, 5, 33), (130, 7, 0, 64)


@pytest.mark.parametrize("page_size", [1, 7, 16, 64, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_pages_of_any_size_give_the_bits_of_contiguous_keys(rng, dtype, page_size):
    arrays = ragged_operands(rng, dtype, PAGED_ROWS, PAGED_KEYS, (4, 2, 1), (64, 40))
    options = ragged_options(arrays, window_size=(90, 0), alignment="bottom-right")
    straight, found = (run(x, options, "flash", page_size % 3) for x in (arrays, paged(rng, arrays, page_size)))
    assert_same_bits(found.out, straight.out)
    assert_same_bits(found.lse, straight.lse)


@pytest.mark.parametrize("page_size", [5, 16])
def test_pages_meet_the_bar(rng, page_size):
    arrays = ragged_operands(rng, "float16", PAGED_ROWS, PAGED_KEYS, (4, 2, 1), behind=(3, 0))
    arrays["v"][20, 0, 3] = np.inf
    options = ragged_options(arrays, causal=True, alignment="bottom-right")
    check(paged(rng, arrays, page_size), options, "flash", page_size % 3)


@pytest.mark.parametrize("page_size", [3, 16])
def test_pages_that_do_not_exist_are_zeros(rng, page_size):
    arrays = paged(rng, ragged_operands(rng, "float16", (40, 20), (70, 31), (2, 1, 1)), page_size)
    lost, zeros = (run(x, ragged_options(arrays), "flash", 1) for x in without_pages(arrays, 0))
    assert_same_bits(lost.out, zeros.out)
    assert_same_bits(lost.lse, zeros.lse)


@pytest.mark.parametrize("kernel", ["flash", "splitkv"])
def test_a_row_whose_keys_all_have_the_lowest_bias_is_their_mean(rng, kernel):
    # the way transformers writes masks: it hides a key beside others, and nothing by itself
    arrays = operands(rng, "float16", seqlens=(5, 70))
    arrays["bias"] = np.zeros((5, 70), np.float32)
    arrays["bias"][3] = np.finfo(np.float32).min
    arrays["bias"][4, 10:] = np.finfo(np.float32).min
    out = check(arrays, options_of(), kernel).out
    np.testing.assert_allclose(out[0, 3, 0], arrays["v"][0, :, 0].astype(np.float64).mean(axis=0), atol=1e-3)


@pytest.mark.parametrize("tile", [Tile(64, 64, 4, 1), Tile(64, 64, 4, 2)], ids=["one stage", "two stages"])
def test_blocks_that_a_boolean_mask_hides_are_not_loaded(rng, tile):
    arrays = operands(rng, "float16", "bhsd", seqlens=(70, 320))
    arrays["mask"] = np.ones((70, 320), bool)
    arrays["mask"][:, 64:128] = arrays["mask"][:, 192:256] = False
    launch = Call(arrays, options_of(layout="bhsd"), "flash", tile=tile)
    given = [(x, writable) for x, writable in launch.buffers if x is not arrays["k"] and x is not arrays["v"]]
    seen = [arrays[name][:, :, span] for name in "kv" for span in (slice(0, 64), slice(128, 192), slice(256, 320))]
    launch.buffers = given + [(x, False) for x in seen]  # any other access is an error
    launch.run()
