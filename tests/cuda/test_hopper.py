"""The Hopper kernel under the emulator, held to the definition: sizes, switches, packing, what nobody may see."""

from dataclasses import replace

import numpy as np
import pytest
from cases import DISTANCES, EDITS, HIDDEN, LAYOUTS, STRAYS, VISIBLE, turns
from emulated import (
    Call,
    check,
    marks_of,
    operands,
    options_of,
    paged,
    plan_of,
    problem_of,
    ragged_operands,
    ragged_options,
    run,
    without_pages,
)
from emulator import CUDA, ONE_IS_LATE, path_of
from oracle import assert_same_bits

from cupyattn.cuda.launching.launch import recipe_of, record_of
from cupyattn.cuda.launching.mapping import map_objections
from cupyattn.cuda.launching.views import view_of_numpy
from cupyattn.plan import choose
from cupyattn.plan.hopper import ALL_KEYS, BOTH_EDGES, HEAD_DIMS, RIGHT_EDGE, Switches, base_tile, hopper_tile
from cupyattn.problem import NAMED_DEVICES

SIZES = [
    ("float16", 8, 8),
    ("bfloat16", 40, 64),
    ("float16", 64, 64),
    ("bfloat16", 72, 72),
    ("float16", 96, 96),
    ("bfloat16", 128, 128),
    ("float16", 128, 40),
    ("bfloat16", 192, 128),
    ("float16", 160, 160),
    ("bfloat16", 256, 256),
]
SHAPES = [
    ((200, 300), {}),
    ((193, 390), {"causal": True, "alignment": "bottom-right"}),
    ((231, 265), {"window_size": (70, 20), "alignment": "top-left"}),
]
SWITCHES = [
    Switches(),
    Switches(ping_pong=False),
    Switches(overlap=False, pinned=False),
    Switches(ping_pong=False, overlap=False, pinned=False),
    Switches(pinned=False),
    Switches(rescale_first=True),
    Switches(lazy=True),
    Switches(lazy=True, rescale_first=True),
    Switches(weights_in_shared=True),
    Switches(overlap=False, pinned=False, weights_in_shared=True),
    Switches(polynomials=5),
]


def small(arrays, options, **edits):
    """The tile a call would get, but with blocks of 32 keys, so that a few keys make many blocks."""
    return hopper_tile(problem_of(arrays, options))._replace(block_q=128, block_k=32)._replace(**edits)


def held(arrays, options, schedule=0, num_workers=2, **edits):
    """`check` with such a tile."""
    return check(arrays, options, "hopper", schedule, tile=small(arrays, options, **edits), num_workers=num_workers)


def left(arrays, options, schedule=0, seed=0, **edits):
    """`run` with such a tile."""
    return run(arrays, options, "hopper", schedule, seed, tile=small(arrays, options, **edits))


# ---- Sizes and switches -----------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", range(3))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0][0]}x{shape[0][1]}")
@pytest.mark.parametrize("size", [pytest.param(size, marks=marks_of(size[1:]), id=str(size)) for size in SIZES])
def test_every_head_dim_meets_the_bar(rng, size, shape, schedule):
    dtype, *dims = size
    seqlens, options = shape
    check(operands(rng, dtype, "bshd", 1, (2, 1, 2), seqlens, dims), options_of(**options), "hopper", schedule)


@pytest.mark.parametrize("schedule", range(3))
@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_every_switch_meets_the_bar(rng, switches, schedule):
    arrays = operands(rng, "bfloat16", "bshd", 1, (1, 1, 1), [(130, 200), (256, 90), (257, 257)][schedule])
    options = options_of(**({"causal": True, "alignment": "bottom-right"} if schedule else {}))
    held(arrays, options, schedule, switches=switches)


@pytest.mark.parametrize(
    ("block_q", "block_k", "num_stages"), [(128, 16, 3), (192, 48, 2), (128, 176, 1), (192, 64, 4)]
)
def test_every_tile_meets_the_bar(rng, block_q, block_k, num_stages):
    arrays = operands(rng, "float16", "bshd", 1, (2, 2, 2), (200, 310), (64, 64))
    options = options_of(window_size=(100, 0), alignment="bottom-right")
    held(arrays, options, 2, block_q=block_q, block_k=block_k, num_stages=num_stages)


@pytest.mark.parametrize("workers", [1, 3, 100])
def test_blocks_take_one_tile_after_the_other(rng, workers):
    arrays = operands(rng, "float16", "bshd", 2, (2, 1, 1), (300, 130))
    held(arrays, options_of(), 1, workers, persistent=True)


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_rounds_forth_and_back_do_not_change_a_bit(rng, dtype, workers):
    """Queries of the next tile come while the output of this one is on its way."""
    arrays = operands(rng, dtype, "bshd", 1, (3, 3, 3), (400, 400), (128, 128))
    options = options_of(causal=True)
    expected = left(arrays, options, persistent=False)
    found = run(arrays, options, "hopper", 2, tile=small(arrays, options), num_workers=workers)
    assert np.array_equal(found.out, expected.out)
    assert np.array_equal(found.lse, expected.lse)


LATE = {
    "tiles one after the other": ("bfloat16", (400, 400), {"causal": True}, {}),
    "float8": ("float8_e4m3fn", (300, 330), {"causal": True, "alignment": "bottom-right"}, {}),
    "keys that nobody sees": ("float16", (300, 100), {"causal": True, "alignment": "bottom-right"}, {}),
    "clusters": ("bfloat16", (350, 150), {}, {"cluster": 2}),
}


@pytest.mark.parametrize("case", LATE)
def test_a_warp_may_be_as_late_as_can_be(rng, case):
    dtype, seqlens, options, edits = LATE[case]
    arrays = operands(rng, dtype, "bshd", 1, (2, 1, 1), seqlens)
    options = options_of(**options)
    tile = small(arrays, options, **edits)
    expected = run(arrays, options, "hopper", tile=tile)
    for late in range(12):
        assert_same_bits(run(arrays, options, "hopper", ONE_IS_LATE, late, tile=tile).out, expected.out)


@pytest.mark.parametrize("units", [1, 2, 3, 100])
def test_tiles_come_in_any_order_of_sections(rng, units):
    arrays = operands(rng, "bfloat16", "bshd", 1, (5, 5, 5), (270, 150))
    held(arrays, options_of(causal=True, alignment="top-left"), 1, units_per_section=units)


def growing(rng, dtype, dims=(64, 64)):
    """A call of which the largest scores come last."""
    arrays = operands(rng, dtype, "bshd", 1, (1, 1, 1), (128, 400), dims)
    arrays["k"] = (arrays["k"].astype("f4") * np.linspace(3.0, 0.1, 400)[:, None, None]).astype(arrays["k"].dtype)
    return arrays


@pytest.mark.parametrize("first", [True, False])
def test_a_weight_may_grow_while_sums_stay_as_they_are(rng, first):
    held(growing(rng, "float16"), options_of(), 1, switches=Switches(lazy=True, rescale_first=first))


def test_rows_that_see_nothing_meet_the_bar_beside_those_whose_sums_stay(rng):
    arrays = operands(rng, "bfloat16", "bshd", 1, (2, 1, 1), (150, 100))
    held(arrays, options_of(causal=True, alignment="bottom-right"), 2, switches=Switches(lazy=True, rescale_first=True))


def test_lazily_is_how_sums_of_sixteen_bits_shrink():
    for dtype in ("float16", "bfloat16", FLOAT8):
        for head_dim in HEAD_DIMS:
            for reach in (ALL_KEYS, RIGHT_EDGE, BOTH_EDGES):
                switches = base_tile(head_dim, head_dim, reach, dtype).switches
                assert (switches.lazy, switches.rescale_first) == ((dtype != FLOAT8,) * 2)


# ---- Clusters ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", range(3))
@pytest.mark.parametrize(
    ("dtype", "dims", "edits"),
    [
        ("bfloat16", (128, 128), {"block_k": 48, "num_stages": 3}),
        ("float16", (96, 64), {"block_k": 32, "num_stages": 1}),
        ("bfloat16", (192, 128), {"block_q": 192}),
        ("float8_e4m3fn", (64, 64), {}),
        ("bfloat16", (64, 64), {"switches": Switches(overlap=False, pinned=False, weights_in_shared=True)}),
    ],
    ids=str,
)
def test_blocks_that_load_for_each_other_meet_the_bar(rng, dtype, dims, edits, schedule):
    arrays = operands(rng, dtype, "bshd", 2, (4, 2, 1), (350, 150), dims)
    held(arrays, options_of(), schedule, cluster=2, **edits)


@pytest.mark.parametrize("schedule", range(3))
def test_clusters_do_not_change_a_bit(rng, schedule):
    arrays = operands(rng, "bfloat16", "bshd", 1, (2, 1, 1), (256, 200))
    alone, together = (left(arrays, options_of(), schedule, cluster=cluster) for cluster in (1, 2))
    assert_same_bits(alone.out, together.out)
    assert_same_bits(alone.lse, together.lse)


@pytest.mark.parametrize(("heads", "seqlen_q", "packed"), [((8, 2, 2), 50, 4), ((6, 2, 2), 84, 3), ((5, 1, 1), 49, 5)])
def test_clusters_of_packed_heads_meet_the_bar(rng, heads, seqlen_q, packed):
    arrays = operands(rng, "float16", "bshd", 2, heads, (seqlen_q, 77))
    held(arrays, options_of(), 1, heads_per_unit=packed, cluster=2)


@pytest.mark.parametrize("num_keys", [0, 5])
@pytest.mark.parametrize("alignment", ["top-left", "bottom-right"])
def test_clusters_of_few_keys_meet_the_bar(rng, num_keys, alignment):
    arrays = operands(rng, "float16", "bshd", 1, (1, 1, 1), (256, num_keys))
    held(arrays, options_of(alignment=alignment), 2, cluster=2)


@pytest.mark.parametrize(("make", "schedule"), turns(STRAYS))
def test_what_is_not_finite_shows_in_clusters_where_it_is_seen(rng, make, schedule):
    arrays, options, _ = make(rng, "float16")
    if problem_of(arrays, options).mask.right is None:
        arrays["q"] = np.concatenate([arrays["q"]] * -(-256 // arrays["q"].shape[1]), 1)[:, :256]
        held(arrays, options, schedule, cluster=2)


CLUSTERED = [
    ((256, 300), "bfloat16", 128, {}, 2),
    ((256, 300), "float16", 256, {}, 2),
    ((384, 300), "bfloat16", 128, {}, 1),
    ((256, 300), "bfloat16", 64, {}, 1),
    ((256, 300), "float8_e4m3fn", 128, {}, 1),
    ((256, 300), "bfloat16", 128, {"causal": True, "alignment": "top-left"}, 1),
]


@pytest.mark.parametrize(("seqlens", "dtype", "head_dim", "options", "cluster"), CLUSTERED)
def test_pairs_of_wide_tiles_that_see_all_keys_are_clusters(seqlens, dtype, head_dim, options, cluster):
    arrays = operands(np.random.default_rng(0), dtype, "bshd", 1, (1, 1, 1), seqlens, (head_dim, head_dim))
    assert hopper_tile(problem_of(arrays, options_of(**options))).cluster == cluster


def test_sequences_end_to_end_are_no_clusters(rng):
    arrays = ragged_operands(rng, "float16", (256, 256), (300, 300), dims=(128, 128))
    assert hopper_tile(problem_of(arrays, ragged_options(arrays))).cluster == 1


def test_a_grid_has_whole_clusters():
    arrays = operands(np.random.default_rng(0), "bfloat16", "bshd", 4, (8, 8, 8), (512, 512), (128, 128))
    problem = problem_of(arrays, options_of())
    assert choose(problem, replace(NAMED_DEVICES["H100"], num_units=101)).num_workers == 100


# ---- Who sees whom, edits, layouts ------------------------------------------------------------------


@pytest.mark.parametrize(("make", "schedule"), turns(VISIBLE))
def test_who_sees_whom_meets_the_bar(rng, make, schedule):
    arrays, options, _ = make(rng, "bfloat16")
    held(arrays, options, schedule)


KNOWN = ("scale", "scale 0", "scale of nearly 0", "scale -0", "scale below 0", "scale below 0, rows that see nothing",
         "scale below 0, sinks, softcap, window", "softcap 2", "softcap of nearly 0", "slopes by batch and head",
         "slopes, top-left", "sinks", "sinks of rows that see nothing", "sinks of infinity",
         "sinks of nan")  # fmt: skip


@pytest.mark.parametrize(("make", "schedule"), turns({name: EDITS[name] for name in KNOWN}))
def test_edited_scores_meet_the_bar(rng, make, schedule):
    arrays, options, _ = make(rng, "float16")
    held(arrays, options, schedule)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize(("make", "schedule"), turns(DISTANCES))
def test_slopes_by_distances_of_their_own_meet_the_bar(rng, make, schedule, dtype):
    arrays, options, _ = make(rng, dtype)
    held(arrays, options, schedule)


@pytest.mark.parametrize("name", ["every third token", "behind the mask's diagonal"])
def test_rows_of_a_group_of_heads_have_distances_of_their_own(rng, name):
    arrays, options, _ = DISTANCES[name](rng, "float16")
    assert held(arrays, options, 1, heads_per_unit=2).plan.tile.heads_per_unit == 2


READ = ("bhsd", "transposed", "every second row", "q, k and v in one array")


@pytest.mark.parametrize(("make", "schedule"), turns({name: LAYOUTS[name] for name in READ}))
def test_every_layout_meets_the_bar(rng, make, schedule):
    arrays, options, _ = make(rng, "float16")
    held(arrays, options, schedule)
    assert Call(arrays, options, "hopper").wanted.source == "hopper.cu"


@pytest.mark.parametrize("name", ["rows backwards", "one row repeated", "k at an odd address", "rows at odd addresses"])
def test_flash_runs_where_no_map_can_be_made(rng, name):
    arrays, options, _ = LAYOUTS[name](rng, "float16")
    assert Call(arrays, options, "hopper").wanted.source == "flash.cu"
    check(arrays, options, "hopper", 1)


# ---- Groups side by side ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "schedule"),
    [((8, 2, 2), 0), ((7, 1, 1), 1), ((6, 2, 3), 2), ((32, 2, 2), 1), ((5, 1, 1), 2)],
    ids=str,
)
def test_packed_heads_meet_the_bar(rng, heads, schedule):
    arrays = operands(rng, "float16", "bshd", 2, heads, (19, 77))
    options = options_of(causal=True, alignment="bottom-right")
    group = problem_of(arrays, options).sizes.queries_per_pair
    held(arrays, options, schedule, heads_per_unit=group)


@pytest.mark.parametrize("schedule", range(3))
def test_packed_heads_in_another_layout_meet_the_bar(rng, schedule):
    arrays = operands(rng, "bfloat16", "bhsd", 1, (6, 2, 2), (90, 130))
    arrays["sinks"] = rng.standard_normal(6).astype("f4")
    options = options_of(layout="bhsd", window_size=(30, 3), alignment="top-left")
    held(arrays, options, schedule, heads_per_unit=3)


def test_few_tokens_of_many_heads_are_packed():
    problem = problem_of(operands(np.random.default_rng(0), "float16", "bshd", 1, (32, 4, 4), (20, 512)), options_of())
    assert hopper_tile(problem).heads_per_unit == 8


# ---- Sequences end to end ---------------------------------------------------------------------------

RAGGED = {
    "equal lengths": ((20, 20), (20, 20), {}),
    "empty sequences": ((0, 17, 0, 5, 0), (4, 0, 9, 130, 0), {}),
    "causal": ((5, 164, 1, 77), (70, 64, 33, 12), {"causal": True, "alignment": "bottom-right"}),
    "windows": ((40, 3), (40, 150), {"window_size": (20, 4), "alignment": "bottom-right"}),
}


@pytest.mark.parametrize(("case", "schedule"), turns(RAGGED))
@pytest.mark.parametrize("behind", [(0, 0), (300, 9)], ids=["to the end", "rows behind"])
def test_sequences_end_to_end_meet_the_bar(rng, case, behind, schedule):
    lengths_q, lengths_k, options = case
    arrays = ragged_operands(rng, "float16", lengths_q, lengths_k, (4, 2, 2), behind=behind)
    held(arrays, ragged_options(arrays, **options), schedule)


def test_packed_sequences_end_to_end_meet_the_bar(rng):
    arrays = ragged_operands(rng, "bfloat16", (5, 0, 70), (33, 7, 90), (6, 2, 2), behind=(3, 0))
    held(arrays, ragged_options(arrays, 80, 100), 1, heads_per_unit=3)


def test_a_sequence_does_not_see_its_neighbours(rng):
    arrays = ragged_operands(rng, "float16", (30, 17, 9), (30, 70, 9), (2, 2, 2))
    options = ragged_options(arrays)
    clean = left(arrays, options)
    for name in "qkv":
        arrays[name][:30] = np.nan
        arrays[name][-9:] = np.nan
    found = left(arrays, options, 1)
    rows = slice(30, 47)
    assert_same_bits(found.out[rows], clean.out[rows])
    assert_same_bits(found.lse[:, rows], clean.lse[:, rows])


def test_lengths_that_lie_stay_inside_the_arrays(rng):
    arrays = ragged_operands(rng, "float16", (20, 20), (20, 20))
    options = ragged_options(arrays)
    arrays["cu_seqlens_q"][:] = [-5, 4, 2**31 - 1]
    arrays["cu_seqlens_k"][:] = [3, 1, 1000]
    Call(arrays, options, "hopper").run()


# ---- Pages ------------------------------------------------------------------------------------------

PAGED_ROWS, PAGED_KEYS = (170, 0, 5, 33), (230, 7, 0, 64)


@pytest.mark.parametrize(
    ("dtype", "page_size", "block_k"),
    [
        ("bfloat16", 8, 32),
        ("float16", 16, 48),
        ("bfloat16", 24, 64),
        ("float16", 64, 176),
        ("bfloat16", 256, 32),
        ("float8_e4m3fn", 16, 32),
        ("float8_e4m3fn", 64, 160),
    ],
)
def test_pages_give_the_bits_of_contiguous_keys(rng, dtype, page_size, block_k):
    dims = (64, 64) if dtype == "float8_e4m3fn" else (96, 40)
    arrays = ragged_operands(rng, dtype, PAGED_ROWS, PAGED_KEYS, (4, 2, 1), dims)
    options = ragged_options(arrays, window_size=(90, 0), alignment="bottom-right")
    straight, found = (
        left(x, options, page_size // 8 % 3, block_k=block_k) for x in (arrays, paged(rng, arrays, page_size))
    )
    assert_same_bits(found.out, straight.out)
    assert_same_bits(found.lse, straight.lse)


@pytest.mark.parametrize("schedule", range(3))
def test_pages_meet_the_bar(rng, schedule):
    arrays = ragged_operands(rng, "bfloat16", PAGED_ROWS, PAGED_KEYS, (4, 2, 2), behind=(3, 0))
    arrays["v"][[20, 229], 0, 3] = np.inf, np.nan
    options = ragged_options(arrays, causal=True, alignment="bottom-right")
    held(paged(rng, arrays, 16), options, schedule)
    held(paged(rng, arrays, 16), options, schedule, heads_per_unit=2)


@pytest.mark.parametrize("page_size", [8, 64])
def test_pages_that_do_not_exist_are_zeros(rng, page_size):
    arrays = paged(rng, ragged_operands(rng, "float16", (40, 20), (70, 31), (2, 1, 1)), page_size)
    lost, zeros = (left(x, ragged_options(arrays), 1) for x in without_pages(arrays, 0))
    assert_same_bits(lost.out, zeros.out)
    assert_same_bits(lost.lse, zeros.lse)


def test_a_table_without_room_for_the_longest_sequence_is_not_left(rng):
    arrays = paged(rng, ragged_operands(rng, "float16", (40, 20), (70, 31), (2, 1, 1)), 16)
    options = ragged_options(arrays, max_seqlen_k=1000)
    arrays["cu_seqlens_k"][1:] = [900, 1800]
    Call(arrays, options, "hopper").run()


@pytest.mark.parametrize(("page_size", "kernel"), [(16, "hopper"), (24, "hopper"), (1, "flash"), (100, "flash")])
def test_pages_of_whole_boxes_are_read_by_hopper(rng, page_size, kernel):
    arrays = paged(rng, ragged_operands(rng, "float16", (200, 90), (370, 131), (2, 1, 1)), page_size)
    assert choose(problem_of(arrays, ragged_options(arrays)), NAMED_DEVICES["H100"]).kernel == kernel


# ---- Values that are not finite ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["behind the band", "beside the window", "behind the last key", "behind the last query"]
)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_is_hidden_does_not_change_a_bit(rng, dtype, name):
    arrays, poisoned, options, _ = HIDDEN[name](rng, dtype)
    clean, found = left(arrays, options, 0), left(poisoned, options, 2)
    assert np.isfinite(found.out.astype(float)).all()
    assert_same_bits(found.out, clean.out)
    assert_same_bits(found.lse, clean.lse)


@pytest.mark.parametrize(("make", "schedule"), turns(STRAYS))
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_is_not_finite_shows_where_it_is_seen(rng, dtype, make, schedule):
    arrays, options, _ = make(rng, dtype)
    held(arrays, options, schedule)


def test_strays_of_packed_sequences_show_where_they_are_seen(rng):
    arrays = ragged_operands(rng, "float16", (5, 40), (33, 77), (6, 2, 2))
    arrays["v"][50, 1, 3], arrays["v"][20, 0, 5] = np.inf, np.nan
    held(arrays, ragged_options(arrays, causal=True, alignment="bottom-right"), 1, heads_per_unit=3)


# ---- Float8 ------------------------------------------------------------------------------------------

FLOAT8 = "float8_e4m3fn"
BY_HEAD = {"q": (2, 2), "k": (1, 2), "v": (2, 1)}


def descaled(rng, arrays, shapes):
    """The same call with factors of those shapes."""
    return arrays | {f"{name}_descale": rng.uniform(0.5, 2.0, shape).astype("f4") for name, shape in shapes.items()}


@pytest.mark.parametrize("schedule", range(3))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0][0]}x{shape[0][1]}")
@pytest.mark.parametrize("head_dim", [16, 64, 96, 128, 192, 256])
def test_float8_of_every_head_dim_meets_the_bar(rng, head_dim, shape, schedule):
    seqlens, options = shape
    arrays = operands(rng, FLOAT8, "bshd", 1, (2, 1, 2), seqlens, (head_dim, head_dim))
    check(arrays, options_of(**options), "hopper", schedule)


SWITCHES_OF_FLOAT8 = [
    *(x for x in SWITCHES if not (x.lazy or x.weights_in_shared)),
    Switches(two_level=True),
    Switches(two_level=True, overlap=False, pinned=False),
]


@pytest.mark.parametrize("schedule", range(3))
@pytest.mark.parametrize("switches", SWITCHES_OF_FLOAT8, ids=str)
def test_every_switch_of_float8_meets_the_bar(rng, switches, schedule):
    arrays = operands(rng, FLOAT8, "bshd", 1, (1, 1, 1), [(130, 200), (256, 90), (257, 257)][schedule], (64, 48))
    options = options_of(**({"causal": True, "alignment": "bottom-right"} if schedule else {}))
    held(arrays, options, schedule, switches=switches)


@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
def test_float8_sums_shrink_as_scores_grow(rng, head_dim):
    held(growing(rng, FLOAT8, (head_dim, head_dim)), options_of(), 2)


@pytest.mark.parametrize("head_dim", [64, 256])
def test_sums_of_many_float8_products_do_not_fall_behind(rng, head_dim):
    """They would in the tensor cores alone, which cut off all but 13 bits behind the point."""
    arrays = operands(rng, FLOAT8, "bshd", 1, (1, 1, 1), (64, 4096), (head_dim, head_dim))
    arrays["v"] = rng.uniform(0.5, 1.5, arrays["v"].shape).astype(arrays["v"].dtype)
    check(arrays, options_of(), "hopper", 1)
    tile = hopper_tile(problem_of(arrays, options_of()))
    with pytest.raises(AssertionError):
        check(arrays, options_of(), "hopper", 1, tile=tile._replace(switches=tile.switches._replace(two_level=False)))


@pytest.mark.parametrize(
    "shapes", [BY_HEAD, {"q": ()}, {"k": (2, 2), "v": (2,)}, {"v": (2, 2)}], ids=lambda x: " ".join(map(str, x.items()))
)
def test_float8_is_multiplied_by_its_descales(rng, shapes):
    arrays = operands(rng, FLOAT8, "bshd", 2, (4, 2, 2), (70, 90))
    held(descaled(rng, arrays, shapes), options_of(softcap=3.0 if "q" in shapes else 0.0), 1)


def test_float8_of_packed_sequences_meets_the_bar(rng):
    arrays = ragged_operands(rng, FLOAT8, (5, 0, 70), (33, 7, 90), (6, 2, 2), behind=(3, 0))
    arrays = descaled(rng, arrays, {"q": (3, 2), "k": (3, 2), "v": (3, 2)})
    held(arrays, ragged_options(arrays, 80, 100), 2, heads_per_unit=3)


@pytest.mark.parametrize("schedule", range(3))
def test_nan_of_float8_shows_where_it_is_seen(rng, schedule):
    arrays = operands(rng, FLOAT8, "bshd", 1, (1, 1, 1), (40, 77))
    arrays["v"][0, [3, 20, 76], 0, [5, 63, 0]] = np.nan
    held(arrays, options_of(causal=True, alignment="top-left"), schedule)


def mended(arrays, options, **call):
    """Which rows, of column 0, go through all their keys once more, value by value."""
    look = "if (row_sum * 0.f != 0.f) return;"
    path = path_of("store90.cuh")
    text = (CUDA / path).read_text()
    assert text.count(look) == 1
    told = "if (ptx::lane() % 2 == 0) ptx::store_shared(staged.address(its_row, 0), ~0u);\n return;"
    as_it_is, marked = (
        np.isnan(run(arrays, options, "hopper", sources=sources, **call).out[..., 0].astype(float))
        for sources in (None, {path: text.replace(look, f"{look} {told}")})
    )
    return marked & ~as_it_is


@pytest.mark.parametrize("found", [None, np.nan], ids=["finite", "nan"])
def test_rows_that_do_not_exist_call_for_no_care(rng, found):
    """Of groups of three, tiles have two rows to spare, where results were staged: bytes that as float8 may be nan."""
    arrays = operands(rng, FLOAT8, "bshd", 12, (3, 1, 1), (42, 384), (128, 128))
    if found is not None:
        arrays["v"][3, 5, 0, 7] = found
    tile = hopper_tile(problem_of(arrays, options_of()))._replace(heads_per_unit=3, cluster=1, persistent=True)
    assert mended(arrays, options_of(), tile=tile, num_workers=1).any() == (found is not None)


@pytest.mark.parametrize("dtype", ["bfloat16", FLOAT8])
def test_what_lies_behind_the_last_key_calls_for_no_care(rng, dtype):
    """In a box with the last keys, which are within the edge of what rows see."""
    arrays = ragged_operands(rng, dtype, (70,), (150,), behind=(0, 30))
    arrays["k"][150:] = arrays["v"][150:] = np.nan
    options = ragged_options(arrays, causal=True, alignment="bottom-right")
    assert not mended(arrays, options, num_workers=1).any()
    arrays["v"][149, 0, 3] = np.nan
    assert mended(arrays, options, num_workers=1).any()


@pytest.mark.parametrize("dtype", ["bfloat16", FLOAT8])
def test_places_of_a_page_that_are_not_used_call_for_no_care(rng, dtype):
    arrays = paged(rng, ragged_operands(rng, dtype, (70,), (150,)), 64)
    assert np.isnan(arrays["v"].astype(float)).any()
    options = ragged_options(arrays, causal=True, alignment="bottom-right")
    assert not mended(arrays, options, num_workers=1).any()


def test_a_query_that_is_nan_calls_for_no_care_of_its_neighbours(rng):
    arrays = operands(rng, "bfloat16", "bshd", 1, (1, 1, 1), (128, 200))
    arrays["q"][0, 5] = np.nan
    assert not mended(arrays, options_of(), num_workers=1).any()


def test_a_negative_descale_of_scores_gives_nan(rng):
    arrays = operands(rng, FLOAT8, "bshd", 1, (1, 1, 1), (40, 77))
    arrays["k_descale"] = np.array([[-1.0]], "f4")
    assert np.isnan(left(arrays, options_of()).out.astype(float)).all()


@pytest.mark.parametrize("schedule", range(3))
def test_a_negative_scale_takes_descales_of_any_sign(rng, schedule):
    arrays = operands(rng, FLOAT8, "bshd", 1, (2, 2, 2), (40, 77))
    arrays["k_descale"] = np.array([[-1.5, 0.5]], "f4")
    held(arrays, options_of(softmax_scale=-0.3, causal=True, alignment="bottom-right"), schedule)


def test_a_descale_of_zero_gives_the_mean(rng):
    arrays = operands(rng, FLOAT8, "bshd", 1, (1, 1, 1), (40, 77))
    arrays["q_descale"] = np.zeros((1, 1), "f4")
    held(arrays, options_of(causal=True, alignment="top-left"))


# ---- Being launched ---------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", range(3))
def test_a_second_launch_is_the_same_bit_for_bit(rng, schedule):
    arrays, options, _ = VISIBLE["window"](rng, "float16")
    once, again = (left(arrays, options, schedule, seed) for seed in (1, 2))
    assert_same_bits(once.out, again.out)
    assert_same_bits(once.lse, again.lse)


def test_a_launch_without_lse_is_the_same(rng):
    arrays = operands(rng, "float16", "bshd", 1, (2, 1, 1), (33, 70))
    found, other = (left(arrays, options_of(return_lse=wanted)) for wanted in (True, False))
    assert other.lse is None
    assert_same_bits(other.out, found.out)


@pytest.mark.parametrize(
    ("device", "kernel"), [("H100", "hopper"), ("H200", "hopper"), ("A100", "flash"), ("B200", "flash")]
)
def test_hopper_is_chosen_on_hopper_alone(device, kernel):
    arrays = operands(np.random.default_rng(0), "bfloat16", seqlens=(256, 256))
    assert choose(problem_of(arrays, options_of()), NAMED_DEVICES[device]).kernel == kernel


def test_float32_is_left_to_flash():
    arrays = operands(np.random.default_rng(0), "float32", seqlens=(256, 256))
    assert choose(problem_of(arrays, options_of()), NAMED_DEVICES["H100"]).kernel == "flash"


def test_a_plan_names_what_runs_instead():
    arrays = operands(np.random.default_rng(0), "float16", seqlens=(256, 256))
    chosen = choose(problem_of(arrays, options_of()), NAMED_DEVICES["H100"])
    assert chosen.instead.kernel == "flash"


def test_an_array_of_no_keys_lends_its_map_another_address(rng):
    arrays = operands(rng, "float8_e4m3fn", "bshd", 1, (1, 1, 1), (70, 0))
    problem = problem_of(arrays, options_of())
    views = {name: view_of_numpy(x, x.dtype.name) for name, x in arrays.items()}
    views |= {name: views[name]._replace(pointer=0) for name in "kv"}  # as torch has it
    asked = []
    recipe = recipe_of(plan_of(problem, "hopper"), problem, views)
    record_of(recipe, views, {"out": 4096}, encode=lambda wanted, address: asked.append(address) or bytes(128))
    assert asked == [views["q"].pointer] * 3 + [4096]


def test_splitkv_runs_where_no_map_of_float8_can_be_made(rng):
    arrays = operands(rng, "float8_e4m3fn", "bshd", 1, (2, 2, 2), (70, 90))
    arrays["k"] = np.pad(arrays["k"], ((0, 0),) * 3 + ((0, 8),))[..., :64]
    problem = problem_of(arrays, options_of())
    views = {name: view_of_numpy(x, x.dtype.name) for name, x in arrays.items()}
    assert map_objections(problem, views) == {"k": "the steps of k are not multiples of 16 bytes"}
    recipe = recipe_of(choose(problem, NAMED_DEVICES["H100"]), problem, views)
    assert recipe.specialisation.source == "splitkv.cu"
