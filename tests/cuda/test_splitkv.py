"""The split-KV kernel under the emulator, held to the definition: splits, pages, lengths that are data, all edits,
float8."""

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
from oracle import assert_matches, assert_same_bits

from cupyattn import numpy_ref
from cupyattn.plan import Tile
from cupyattn.plan.schedule import places_of, schedule_of, shortest_share
from cupyattn.problem import Device

DECODE = (4, 2, 2)
BOTTOM = {"causal": True, "alignment": "bottom-right"}
SIZES = [
    ("float16", 8, 8),
    ("bfloat16", 40, 40),
    ("float16", 64, 64),
    ("bfloat16", 64, 64),
    ("float32", 64, 64),
    ("float16", 96, 96),
    ("float32", 72, 72),
    ("bfloat16", 128, 128),
    ("float32", 128, 128),
    ("float16", 160, 160),
    ("bfloat16", 192, 192),
    ("float16", 256, 256),
    ("float32", 256, 256),
    ("bfloat16", 192, 128),
    ("float16", 64, 256),
    ("float32", 128, 8),
]
TILES = [
    ("float16", Tile(16, 64, 4, 2)),
    ("bfloat16", Tile(16, 128, 8, 3)),
    ("float16", Tile(16, 16, 1, 2)),
    ("float16", Tile(32, 64, 4, 3)),
    ("bfloat16", Tile(64, 32, 2, 2)),
    ("float32", Tile(32, 64, 4, 2)),
]
SPLITS = [1, 2, 3, 5, 17]
SMALL = Tile(16, 32, 2, 2)
"""Two warps: many splits of few keys."""


@pytest.mark.parametrize(
    ("size", "lengths", "schedule"),
    [
        pytest.param(
            size,
            lengths,
            (i + j) % 3,
            marks=marks_of(size[1:]),
            id=f"{'-'.join(map(str, size))}-{lengths[0]}x{lengths[1]}",
        )
        for i, size in enumerate(SIZES)
        for j, lengths in enumerate([(1, 1), (1, 700), (5, 83)])
    ],
)
def test_every_dtype_and_head_dim_meets_the_bar(rng, size, lengths, schedule):
    dtype, *dims = size
    arrays = operands(rng, dtype, "bshd", 1, (4, 2, 1), lengths, dims)
    check(arrays, options_of(**BOTTOM), "splitkv", schedule)


@pytest.mark.parametrize("schedule", range(3))
@pytest.mark.parametrize(("dtype", "tile"), TILES, ids=lambda x: "-".join(map(str, x)) if isinstance(x, tuple) else x)
def test_every_tile_meets_the_bar(rng, dtype, tile, schedule):
    seqlens = [(1, 300), (9, 131), (50, 129)][schedule]
    arrays = operands(rng, dtype, "bshd", 1, DECODE, seqlens, (64, 40))
    check(arrays, options_of(**BOTTOM), "splitkv", schedule, tile=tile, num_splits=2)


@pytest.mark.parametrize(("make", "schedule"), turns(VISIBLE))
def test_who_sees_whom_meets_the_bar(rng, make, schedule):
    arrays, options, _ = make(rng, "bfloat16")
    check(arrays, options, "splitkv", schedule, tile=SMALL, num_splits=1 + schedule)


@pytest.mark.parametrize(("make", "schedule"), turns(EDITS))
def test_edited_scores_meet_the_bar(rng, make, schedule):
    arrays, options, seed = make(rng, "float16")
    check(arrays, options, "splitkv", schedule, dropout_seed=seed, tile=SMALL, num_splits=3)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float8_e4m3fn"])
@pytest.mark.parametrize(("make", "schedule"), turns(DISTANCES))
def test_slopes_by_distances_of_their_own_meet_the_bar(rng, make, schedule, dtype):
    arrays, options, _ = make(rng, dtype)
    check(arrays, options, "splitkv", schedule, tile=SMALL, num_splits=3)


@pytest.mark.parametrize("edit", ["softcap 50", "everything"])
def test_edited_scores_meet_the_bar_of_float32(rng, edit):
    arrays, options, seed = EDITS[edit](rng, "float32")
    check(arrays, options, "splitkv", 1, dropout_seed=seed, tile=SMALL, num_splits=2)


@pytest.mark.parametrize(("make", "schedule"), turns(LAYOUTS))
def test_every_layout_meets_the_bar(rng, make, schedule):
    arrays, options, seed = make(rng, "float16")
    check(arrays, options, "splitkv", schedule, dropout_seed=seed, tile=SMALL, num_splits=2)


@pytest.mark.parametrize(("make", "schedule"), turns(HIDDEN))
def test_what_is_hidden_does_not_change_a_bit(rng, make, schedule):
    arrays, poisoned, options, _ = make(rng, "float16")
    clean, found = (run(x, options, "splitkv", schedule, tile=SMALL, num_splits=3) for x in (arrays, poisoned))
    assert np.isfinite(found.out.astype(float)).all()
    assert_same_bits(found.out, clean.out)
    assert_same_bits(found.lse, clean.lse)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_hidden_does_not_change_a_bit_of_other_dtypes(rng, dtype):
    arrays, poisoned, options, _ = HIDDEN["behind the mask"](rng, dtype)
    clean, found = (run(x, options, "splitkv", 1, tile=SMALL) for x in (arrays, poisoned))
    assert np.isfinite(found.out.astype(float)).all()
    assert_same_bits(found.out, clean.out)


@pytest.mark.parametrize(("make", "schedule"), turns(STRAYS))
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_what_is_not_finite_shows_where_it_is_seen(rng, dtype, make, schedule):
    arrays, options, _ = make(rng, dtype)
    check(arrays, options, "splitkv", schedule, tile=SMALL, num_splits=1 + schedule)


@pytest.mark.parametrize(("make", "schedule"), turns(DROPPED))
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_not_finite_is_nan_where_its_weight_is_dropped(rng, dtype, make, schedule):
    arrays, options, seed = make(rng, dtype)
    check(arrays, options, "splitkv", schedule, dropout_seed=seed, tile=SMALL, num_splits=1 + schedule)


def test_a_query_of_nan_spoils_its_own_row_alone(rng):
    arrays, options, _ = call(rng, "bfloat16", seqlens=(4, 200))
    clean = run(arrays, options, "splitkv", tile=SMALL, num_splits=2)
    arrays["q"][1, 2, 2, 7] = np.nan
    found = run(arrays, options, "splitkv", tile=SMALL, num_splits=2)
    assert np.isnan(found.out[1, 2, 2].astype(float)).all()
    assert np.isnan(found.lse[1, 2, 2])
    found.out[1, 2, 2] = clean.out[1, 2, 2]
    assert_same_bits(found.out, clean.out)


def test_rows_that_see_nothing_are_zeros_without_a_sign(rng):
    arrays, options, _ = VISIBLE["causal, more rows, bottom-right"](rng, "float16")
    found = run(arrays, options, "splitkv", tile=SMALL)
    assert_same_bits(found.out[:, : 90 - 23], np.zeros_like(found.out[:, : 90 - 23]))
    assert np.isneginf(found.lse[..., : 90 - 23]).all()


@pytest.mark.parametrize("splits", [1, 3])
def test_dropout_drops_what_the_reference_drops(rng, splits):
    arrays, _, seed = call(rng, "float16", heads=(2, 1, 1), seqlens=(7, 64))
    arrays["v"][...] = np.eye(64)[:, None]
    options = options_of(dropout_p=0.5)
    found = run(arrays, options, "splitkv", 2, dropout_seed=seed, tile=SMALL, num_splits=splits)
    batch, head = np.arange(2)[:, None, None], np.arange(2)[:, None]
    keep = numpy_ref.dropout_keep(0.5, seed, batch, head, np.arange(7), range(64))
    np.testing.assert_array_equal(found.out.swapaxes(1, 2) != 0.0, keep)


# ---- Splits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", range(3))
@pytest.mark.parametrize("splits", SPLITS)
def test_any_number_of_splits_meets_the_bar(rng, splits, schedule):
    arrays = operands(rng, "float16", "bshd", 2, DECODE, (1, 589), (64, 64))
    found = check(arrays, options_of(), "splitkv", schedule, tile=SMALL, num_splits=splits)
    assert found.plan.num_splits == splits


@pytest.mark.parametrize("rows", [1, 3, 8, 15, 16, 17, 33, 64])
def test_any_number_of_packed_rows_meets_the_bar(rng, rows):
    arrays = operands(rng, "bfloat16", "bshd", 1, (rows, 1, 1), (1, 200), (64, 64))
    check(arrays, options_of(), "splitkv", rows % 3, tile=SMALL, num_splits=3)


@pytest.mark.parametrize("seqlen_q", [2, 7, 23])
def test_several_tiles_of_rows_under_a_band_meet_the_bar(rng, seqlen_q):
    arrays = operands(rng, "float16", "bshd", 2, (6, 2, 2), (seqlen_q, 230), (64, 64))
    options = options_of(window_size=(101, 0), alignment="bottom-right")
    check(arrays, options, "splitkv", seqlen_q % 3, tile=SMALL, num_splits=4)


def test_splits_that_get_no_keys_add_nothing(rng):
    arrays = operands(rng, "float16", "bshd", 1, DECODE, (1, 100), (64, 64))
    check(arrays, options_of(), "splitkv", 1, tile=SMALL, num_splits=9, split_size=32)


@pytest.mark.parametrize("schedule", range(3))
def test_splits_come_in_any_order_to_the_same_bits(rng, schedule):
    arrays = operands(rng, "float16", "bshd", 2, DECODE, (1, 300), (64, 64))
    calls = [run(arrays, options_of(), "splitkv", schedule, seed, tile=SMALL, num_splits=5) for seed in (1, 2, 3)]
    for other in calls[1:]:
        assert_same_bits(other.out, calls[0].out)
        assert_same_bits(other.lse, calls[0].lse)


def test_a_second_launch_in_the_same_memory_is_the_same(rng):
    arrays = operands(rng, "float16", "bshd", 2, DECODE, (1, 300), (64, 64))
    again = Call(arrays, options_of(), "splitkv", tile=SMALL, num_splits=5)
    first = again.run(1).out.copy()
    again.results["out"][...] = np.nan
    assert_same_bits(again.run(2, seed=9).out, first)


FIXED = 64


@pytest.mark.parametrize("batch", [2, 5])
def test_splits_of_fixed_size_do_not_depend_on_the_batch(rng, batch):
    arrays = operands(rng, "float16", "bshd", batch, DECODE, (1, 300), (64, 64))
    together = run(arrays, options_of(), "splitkv", 1, tile=SMALL, fixed_split_size=FIXED)
    for index in range(batch):
        one = {name: x[index : index + 1] for name, x in arrays.items()}
        alone = run(one, options_of(), "splitkv", tile=SMALL, fixed_split_size=FIXED)
        assert_same_bits(alone.out[0], together.out[index])
        assert_same_bits(alone.lse[0], together.lse[index])


def test_splits_of_fixed_size_do_not_depend_on_the_place_among_sequences(rng):
    lengths = (300, 70, 1, 222)
    arrays = ragged_operands(rng, "float16", (1, 1, 1, 1), lengths, DECODE)
    fixed = {"tile": SMALL, "fixed_split_size": FIXED}
    together = run(arrays, ragged_options(arrays, 1, 1000), "splitkv", 1, **fixed)
    for index, start in enumerate(arrays["cu_seqlens_k"][:-1]):
        one = {name: arrays[name][start : start + lengths[index]] for name in "kv"}
        starts = {"cu_seqlens_q": np.array([0, 1], "i4"), "cu_seqlens_k": np.array([0, lengths[index]], "i4")}
        one = {"q": arrays["q"][index : index + 1], **one, **starts}
        alone = run(one, ragged_options(one), "splitkv", **fixed)
        assert_same_bits(alone.out[0], together.out[index])
        assert_same_bits(alone.lse[:, 0], together.lse[:, index])


# ---- Lengths that are data --------------------------------------------------------------------------

RAGGED = {
    "one long among short": ((1,) * 5, (700, 3, 64, 65, 0), {}),
    "empty sequences": ((0, 1, 0, 2), (4, 0, 0, 130), {}),
    "several rows": ((3, 0, 7, 16), (400, 12, 7, 90), {"causal": True, "alignment": "bottom-right"}),
    "windows": ((2, 2, 2), (500, 40, 1), {"window_size": (50, 0), "alignment": "bottom-right"}),
    "no sequences": ((), (), {}),
}


@pytest.mark.parametrize(("case", "schedule"), turns(RAGGED))
@pytest.mark.parametrize("behind", [(0, 0), (70, 9)], ids=["to the end", "rows behind"])
def test_sequences_end_to_end_meet_the_bar(rng, case, behind, schedule):
    lengths_q, lengths_k, options = case
    arrays = ragged_operands(rng, "float16", lengths_q, lengths_k, DECODE, behind=behind)
    check(arrays, ragged_options(arrays, **options), "splitkv", schedule, tile=SMALL)


@pytest.mark.parametrize("num_splits", [2, 3, 7])
def test_even_splits_by_live_lengths_meet_the_bar(rng, num_splits):
    arrays = ragged_operands(rng, "bfloat16", (1, 2, 1), (1500, 0, 600), DECODE)
    check(arrays, ragged_options(arrays), "splitkv", num_splits % 3, tile=SMALL, num_splits=num_splits)


SMALL_GPU = Device("small", "cuda", 4, (9, 0), 227 * 1024)
"""Eight thread blocks run at once."""


@pytest.mark.parametrize("lengths", [(3000, 5, 0), (900, 900, 900), (3000, 2000, 64)])
def test_pieces_are_cut_where_the_planner_cuts_them(rng, lengths):
    """Its rule, from lengths that only the device knows."""
    arrays = ragged_operands(rng, "float16", (1, 1, 1), lengths, (2, 1, 1))
    launched = Call(arrays, ragged_options(arrays), "splitkv", device=SMALL_GPU, tile=SMALL)
    launched.run()
    assert [grid for _, _, grid, what in launched.launches if what.source == "splitkv.cu"] == [(8, 1, 1)]
    blocks = [-(-length // SMALL.block_k) for length in lengths]
    made = schedule_of([1, 1, 1, 0], [*blocks, 0], 8, shortest_share(256, SMALL.block_k))
    places = [places_of(made, *each) for each in zip(made.starts, blocks, strict=False)]
    expected = sorted(place for its in places if len(its) > 1 for place in its)
    sums = launched.scratch["partial_lse"].reshape(16, SMALL.block_q, 2)
    np.testing.assert_array_equal(np.flatnonzero(~np.isnan(sums[:, 0, 1])), expected)


@pytest.mark.parametrize("later", [(0, 3000, 700), (1, 1, 1), (3000, 3000, 3000)])
def test_a_schedule_of_other_lengths_gives_the_same_results(rng, later):
    """Numbers made for lengths of the step before, or of none: other cuts, and nothing else."""
    arrays = ragged_operands(rng, "float16", (1, 1, 1), (3000, 3000, 3000), (2, 1, 1))
    ends = arrays["cu_seqlens_k"].copy()
    made = []
    for lengths in ((2000, 0, 5), later):
        arrays["cu_seqlens_k"][1:] = np.cumsum(lengths)
        launched = Call(arrays, ragged_options(arrays, 1, 3000), "splitkv", device=SMALL_GPU, tile=SMALL)
        launched.run()
        made.append(launched)
    first, second = made
    assert ends[-1] == 9000
    fresh = second.results["out"].copy()
    second.scratch["schedule"][...] = first.scratch["schedule"]
    second.results["out"][...] = np.nan
    second.launches = [each for each in second.launches if each[3].source != "schedule.cu"]
    found = second.run(1)
    np.testing.assert_allclose(found.out.astype("f4"), fresh.astype("f4"), atol=2e-3)


def test_words_that_are_no_schedule_lead_nobody_out_of_memory(rng):
    """Of a buffer that was kept for calls of other sizes, or never written: the emulator knows all memory there is."""
    arrays = ragged_operands(rng, "float16", (1, 1, 1), (3000, 5, 900), (2, 1, 1))
    nobody, far = [1, *[2**40] * 5], [2**40, *[-(2**63)] * 5]
    by_shares, even = {}, {"num_splits": 2}
    for asked, words in ((even, nobody), (by_shares, far), (even, far), (by_shares, [-5, 7, 3, 2**62, -1, 2**62])):
        launched = Call(arrays, ragged_options(arrays), "splitkv", device=SMALL_GPU, tile=SMALL, **asked)
        launched.launches = [each for each in launched.launches if each[3].source != "schedule.cu"]
        assert len(launched.launches) == 2
        launched.scratch["schedule"][: 2 * len(words)].view(np.int64)[...] = words
        launched.scratch["schedule"][2 * len(words) :] = 0
        launched.run(1)


def test_rows_of_no_sequence_are_wiped_where_none_is_expected(rng):
    arrays = ragged_operands(rng, "float16", (0, 0), (5, 3), behind=(40, 0))
    check(arrays, ragged_options(arrays), "splitkv", tile=SMALL)


@pytest.mark.parametrize("heads", [DECODE, (7, 1, 1), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("lengths", [(1, 1, 40, 1, 0, 1), (40, 1, 1, 1, 1, 2), (0, 0, 1, 0, 33, 0)], ids=str)
def test_uneven_rows_over_few_keys_have_tiles_by_where_they_begin(rng, lengths, heads):
    arrays = ragged_operands(rng, "float16", lengths, (9, 40, 51, 3, 7, 0), heads, behind=(5, 0))
    options = ragged_options(arrays, **BOTTOM)
    launched = Call(arrays, options, "splitkv", tile=SMALL)
    group, sequences = heads[0] // heads[1], len(lengths) + 1
    as_the_longest = sequences * -(-max(lengths) * group // SMALL.block_q) * heads[1]
    assert launched.launches[0][2][0] < as_the_longest
    check(arrays, options, "splitkv", tile=SMALL)


@pytest.mark.parametrize("edit", ["slopes", "sinks", "dropout"])
def test_edits_of_sequences_end_to_end_meet_the_bar(rng, edit):
    arrays = ragged_operands(rng, "float16", (2, 0, 4), (700, 5, 40), DECODE, behind=(3, 0))
    options = {"alignment": "bottom-right"}
    if edit == "slopes":
        arrays["alibi_slopes"] = rng.standard_normal((3, 4)).astype("f4")
    elif edit == "sinks":
        arrays["sinks"] = rng.standard_normal(4).astype("f4")
    else:
        options["dropout_p"] = 0.4
    check(arrays, ragged_options(arrays, **options), "splitkv", 2, dropout_seed=77, tile=SMALL, num_splits=2)


def test_lengths_that_lie_stay_inside_the_arrays(rng):
    """On a GPU nobody looks at cu_seqlens before the kernel does; the emulator refuses every other address."""
    arrays = ragged_operands(rng, "float16", (20, 20), (20, 20))
    options = ragged_options(arrays)
    arrays["cu_seqlens_q"][:] = [-5, 4, 2**31 - 1]
    arrays["cu_seqlens_k"][:] = [3, 1, 1000]
    Call(arrays, options, "splitkv", tile=SMALL).run()


def test_starts_that_lie_stay_inside_the_arrays_where_tiles_go_by_them(rng):
    arrays = ragged_operands(rng, "float16", (1, 1, 40, 1, 1), (9, 40, 51, 3, 7), DECODE)
    options = ragged_options(arrays)
    arrays["cu_seqlens_q"][:] = [-(2**31), 4, 4, 9, 2**31 - 1, 2**31 - 1]
    Call(arrays, options, "splitkv", tile=SMALL).run()


# ---- Pages ------------------------------------------------------------------------------------------

LENGTHS = (70, 0, 257, 16, 48)


@pytest.mark.parametrize("page_size", [1, 3, 16, 48, 256])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_pages_of_any_size_give_the_bits_of_contiguous_keys(rng, dtype, page_size):
    arrays = ragged_operands(rng, dtype, (1, 2, 1, 3, 1), LENGTHS, DECODE)
    options = ragged_options(arrays, window_size=(200, 0), alignment="bottom-right")
    in_pages = paged(rng, arrays, page_size)
    found, straight = (run(x, options, "splitkv", page_size % 3, tile=SMALL) for x in (in_pages, arrays))
    assert_same_bits(found.out, straight.out)
    assert_same_bits(found.lse, straight.lse)


@pytest.mark.parametrize("page_size", [7, 16])
def test_pages_meet_the_bar(rng, page_size):
    arrays = paged(rng, ragged_operands(rng, "bfloat16", (1, 20, 1, 3, 1), LENGTHS, DECODE, behind=(2, 0)), page_size)
    check(arrays, ragged_options(arrays), "splitkv", page_size % 3, tile=SMALL, num_splits=3)


def test_pages_may_lie_at_odd_addresses(rng):
    arrays = paged(rng, ragged_operands(rng, "float16", (1, 2), (70, 31), DECODE), 5)
    for name in "kv":
        wide = np.full((*arrays[name].shape[:-1], 67), np.nan, np.float16)
        wide[..., 1:65] = arrays[name]
        arrays[name] = wide[..., 1:65]
    check(arrays, ragged_options(arrays), "splitkv", tile=SMALL)


@pytest.mark.parametrize("page_size", [3, 16])
def test_pages_that_do_not_exist_are_not_read(rng, page_size):
    """On a GPU nobody looks at the table before the kernel does; the emulator refuses every other address."""
    arrays = paged(rng, ragged_operands(rng, "float16", (1, 2), (70, 31), DECODE), page_size)
    arrays["block_table"][0] = 2**31 - 1
    arrays["block_table"][1] = -(2**31)
    Call(arrays, ragged_options(arrays), "splitkv", tile=SMALL).run()


@pytest.mark.parametrize("page_size", [3, 16])
def test_pages_that_do_not_exist_are_zeros(rng, page_size):
    arrays = paged(rng, ragged_operands(rng, "float16", (1, 2), (70, 31), DECODE), page_size)
    lost, zeros = (run(x, ragged_options(arrays), "splitkv", 1, tile=SMALL) for x in without_pages(arrays, 0))
    assert_same_bits(lost.out, zeros.out)
    assert_same_bits(lost.lse, zeros.lse)


@pytest.mark.parametrize("page_size", [3, 16])
def test_a_table_without_room_for_the_longest_sequence_is_not_left(rng, page_size):
    """As above, for lengths."""
    arrays = paged(rng, ragged_operands(rng, "float16", (1, 2), (70, 31), DECODE), page_size)
    options = ragged_options(arrays, max_seqlen_k=1000)
    arrays["cu_seqlens_k"][1:] = [900, 1800]
    Call(arrays, options, "splitkv", tile=SMALL).run()


@pytest.mark.parametrize("first", range(1, 257, 32))
def test_every_page_size_gives_the_bits_of_contiguous_keys(rng, first):
    arrays = ragged_operands(rng, "float16", (1, 2), (300, 37), (2, 1, 1))
    options = ragged_options(arrays, causal=True, alignment="bottom-right")
    call = {"tile": Tile(16, 32, 2, 2), "num_splits": 2}
    contiguous = run(arrays, options, "splitkv", **call)
    for page_size in range(first, first + 32):
        found = run(paged(rng, arrays, page_size), options, "splitkv", page_size % 3, **call)
        assert_same_bits(found.out, contiguous.out)
        assert_same_bits(found.lse, contiguous.lse)


# ---- Float8 ------------------------------------------------------------------------------------------

FLOAT8 = "float8_e4m3fn"


def descaled(rng, arrays, shapes):
    """The same call with factors of those shapes."""
    return arrays | {f"{name}_descale": rng.uniform(0.5, 2.0, shape).astype("f4") for name, shape in shapes.items()}


@pytest.mark.parametrize("lengths", [(1, 1), (1, 700), (5, 83)], ids=lambda x: f"{x[0]}x{x[1]}")
@pytest.mark.parametrize("dims", [(8, 8), (24, 40), (64, 64), (96, 96), (128, 128), (256, 256), (192, 128), (64, 256)])
def test_float8_of_every_head_dim_meets_the_bar(rng, dims, lengths):
    arrays = operands(rng, FLOAT8, "bshd", 1, (4, 2, 1), lengths, dims)
    arrays = descaled(rng, arrays, {"q": (1, 2), "k": (1, 2), "v": (1, 1)})
    check(arrays, options_of(**BOTTOM), "splitkv", (dims[0] + lengths[1]) % 3)


@pytest.mark.parametrize("schedule", range(3))
@pytest.mark.parametrize("tile", [Tile(16, 128, 8, 3), Tile(32, 64, 4, 2)], ids=str)
def test_every_tile_of_float8_meets_the_bar(rng, tile, schedule):
    arrays = operands(rng, FLOAT8, "bshd", 1, DECODE, [(1, 300), (9, 131), (50, 129)][schedule], (64, 40))
    check(arrays, options_of(**BOTTOM), "splitkv", schedule, tile=tile, num_splits=2)


@pytest.mark.parametrize(
    "shapes",
    [{"q": (2, 2), "k": (1, 2), "v": (2, 1)}, {"q": ()}, {"k": (2, 2), "v": (2,)}, {"v": (2, 2)}],
    ids=lambda x: " ".join(map(str, x.items())),
)
def test_float8_is_multiplied_by_its_descales(rng, shapes):
    arrays = descaled(rng, operands(rng, FLOAT8, "bshd", 2, (4, 2, 2), (3, 90)), shapes)
    check(arrays, options_of(softcap=3.0 if "q" in shapes else 0.0), "splitkv", 1, tile=SMALL, num_splits=2)


@pytest.mark.parametrize("edit", EDITS)
def test_edited_scores_of_float8_meet_the_bar(rng, edit):
    arrays, options, seed = EDITS[edit](rng, FLOAT8)
    arrays = descaled(rng, arrays, dict.fromkeys("qkv", (1, 1)))
    check(arrays, options, "splitkv", 1, dropout_seed=seed, tile=SMALL, num_splits=3)


@pytest.mark.parametrize("page_size", [1, 3, 16, 48])
def test_pages_of_float8_give_the_bits_of_contiguous_keys(rng, page_size):
    arrays = ragged_operands(rng, FLOAT8, (1, 2, 1, 3, 1), LENGTHS, DECODE, behind=(2, 0))
    arrays = descaled(rng, arrays, dict.fromkeys("qkv", (5, 2)))
    options = ragged_options(arrays, window_size=(200, 0), alignment="bottom-right")
    call = {"schedule": page_size % 3, "tile": SMALL, "num_splits": 2}
    straight = check(arrays, options, "splitkv", **call)
    found = run(paged(rng, arrays, page_size), options, "splitkv", **call)
    assert_same_bits(found.out, straight.out)
    assert_same_bits(found.lse, straight.lse)


@pytest.mark.parametrize("dims", [(24, 40), (40, 8)])
def test_float8_ends_at_the_last_column_though_its_rows_go_on(rng, dims):
    """Sixteen bytes come at a time: of the last ones of a row half are nobody's."""
    arrays = behind_the_last_column(operands(rng, FLOAT8, "bshd", 2, DECODE, (3, 130), dims))
    check(arrays, options_of(**BOTTOM), "splitkv", 1, tile=SMALL, num_splits=2)


def behind_the_last_column(arrays):
    """The same q, k and v in rows of 48 columns, aligned, with nan behind."""
    wide = {name: np.full((*arrays[name].shape[:-1], 48), np.nan, arrays[name].dtype) for name in "qkv"}
    for name, x in wide.items():
        x[..., : arrays[name].shape[-1]] = arrays[name]
    return arrays | {name: x[..., : arrays[name].shape[-1]] for name, x in wide.items()}


@pytest.mark.parametrize("name", ["k at an odd address", "rows at odd addresses"])
def test_float8_at_odd_addresses_meets_the_bar(rng, name):
    arrays, options, _ = LAYOUTS[name](rng, FLOAT8)
    check(arrays, options, "splitkv", 1, tile=SMALL)


@pytest.mark.parametrize(("make", "schedule"), turns(HIDDEN))
def test_what_is_hidden_does_not_change_a_bit_of_float8(rng, make, schedule):
    arrays, poisoned, options, _ = make(rng, FLOAT8)
    clean, found = (run(x, options, "splitkv", schedule, tile=SMALL, num_splits=3) for x in (arrays, poisoned))
    assert np.isfinite(found.out.astype(float)).all()
    assert_same_bits(found.out, clean.out)
    assert_same_bits(found.lse, clean.lse)


@pytest.mark.parametrize("schedule", range(3))
def test_nan_of_float8_shows_where_it_is_seen(rng, schedule):
    arrays = operands(rng, FLOAT8, "bshd", 1, (1, 1, 1), (40, 77))
    arrays["v"][0, [3, 20, 76], 0, [5, 63, 0]] = np.nan
    arrays["k"][0, 60, 0, 7] = np.nan
    check(arrays, options_of(causal=True, alignment="top-left"), "splitkv", schedule, tile=SMALL, num_splits=2)


def test_every_pattern_of_float8_is_taken_for_what_it_is(rng):
    """A key of its own for each: out is its value."""
    patterns = np.arange(256, dtype=np.uint8)
    arrays = operands(rng, FLOAT8, "bshd", 256, (1, 1, 1), (1, 1), (8, 8))
    arrays["v"] = np.repeat(patterns, 8).reshape(256, 1, 1, 8).view(arrays["q"].dtype)
    found = run(arrays, options_of(), "splitkv", tile=SMALL)
    assert_matches(found.out, arrays["v"])


def test_a_negative_descale_of_scores_gives_nan(rng):
    arrays = operands(rng, FLOAT8, "bshd", 1, (1, 1, 1), (4, 77))
    arrays["k_descale"] = np.array([[-1.0]], "f4")
    assert np.isnan(run(arrays, options_of(), "splitkv", tile=SMALL).out.astype(float)).all()


@pytest.mark.parametrize("schedule", range(3))
def test_a_negative_scale_takes_descales_of_any_sign(rng, schedule):
    arrays = operands(rng, FLOAT8, "bshd", 1, (2, 2, 2), (4, 77))
    arrays["k_descale"] = np.array([[-1.5, 0.5]], "f4")
    options = options_of(softmax_scale=-0.3, **BOTTOM)
    check(arrays, options, "splitkv", schedule, tile=SMALL, num_splits=2)


def test_a_descale_of_zero_gives_the_mean(rng):
    arrays = operands(rng, FLOAT8, "bshd", 1, (1, 1, 1), (4, 77))
    arrays["q_descale"] = np.zeros((1, 1), "f4")
    check(arrays, options_of(**BOTTOM), "splitkv", tile=SMALL)
