"""Hopper's kernel for gradients under the emulator; what it has in common with the other is in `test_backward.py`."""

from dataclasses import replace

import numpy as np
import pytest
from cases import DISTANCES, slopes, turns
from emulated import marks_of, operands, options_of, ragged_operands, ragged_options
from emulated_backward import Call, hold, with_dout
from emulator import ONE_IS_LATE

from cupyattn.cuda.launching import gradients
from cupyattn.problem import NAMED_DEVICES

H100 = replace(NAMED_DEVICES["H100"], num_units=1)  # full with one block
BOTTOM = {"alignment": "bottom-right"}
CAUSAL = {"causal": True, **BOTTOM}
SIZES = [
    ("bfloat16", 64, 64),
    ("float16", 24, 40),
    ("float16", 96, 96),
    ("bfloat16", 128, 128),
    ("bfloat16", 192, 128),
    ("float16", 192, 192),
    ("bfloat16", 256, 256),
]
SHAPES = [
    ((150, 170), {}),
    ((300, 290), CAUSAL),
    ((190, 290), {"window_size": (40, 9), **BOTTOM}),
]


def made(
    rng, dtype="bfloat16", heads=(2, 1, 1), seqlens=(150, 170), dims=(64, 64), layout="bshd", more=None, **options
):
    options = options_of(layout=layout, **options)
    arrays = operands(rng, dtype, layout, 2, heads, seqlens, dims) | (more or {})
    return with_dout(rng, arrays, options, dlse=True), options


def check(arrays, options, schedule=0):
    """Runs it and holds it; the call."""
    call = Call(arrays, options, device=H100)
    assert call.plan.kernel == "hopper_backward"
    hold(arrays, call.run(schedule, 3))
    return call


@pytest.mark.parametrize("schedule", range(3))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0][0]}x{shape[0][1]}")
@pytest.mark.parametrize("size", [pytest.param(size, marks=marks_of(size[1:]), id=str(size)) for size in SIZES])
def test_every_head_dim_meets_the_bar(rng, size, shape, schedule):
    dtype, *dims = size
    seqlens, options = shape
    call = check(*made(rng, dtype, seqlens=seqlens, dims=dims, **options), schedule)
    assert not call.scratch["flags"].any()


@pytest.mark.parametrize("heads", [(8, 1, 1), (4, 4, 4), (6, 3, 2), (4, 1, 2), (4, 2, 1)], ids=str)
def test_heads_that_share_keys_or_values(rng, heads):
    check(*made(rng, heads=heads, seqlens=(70, 150), **CAUSAL), 1)


def test_blocks_that_share_the_heads_of_a_key_come_to_the_same(rng):
    arrays, options = made(rng, heads=(4, 2, 1), seqlens=(70, 150), **CAUSAL)
    arrays["v"][0, 140] = np.inf
    call = Call(arrays, options, device=NAMED_DEVICES["H100"])
    assert (call.plan.kernel, call.asked["k"].parts, call.asked["v"].parts) == ("hopper_backward", 2, 4)
    hold(arrays, call.run(1, 3))
    assert call.scratch["flags"].any()


@pytest.mark.parametrize("seqlens", [(1, 1), (1, 200), (200, 1), (190, 30), (128, 128), (256, 384)], ids=str)
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_lengths_meet_the_bar(rng, seqlens, layout):
    check(*made(rng, seqlens=seqlens, layout=layout, **CAUSAL), 2)


CAPPED = {"softcap": 1.5}
EDITED_SIZES = [size for size in SIZES if size[1:] not in ((24, 40), (192, 192))]


@pytest.mark.parametrize("schedule", range(3), ids=lambda x: f"{SHAPES[x][0]}, schedule {x}")
@pytest.mark.parametrize("size", [pytest.param(size, marks=marks_of(size[1:]), id=str(size)) for size in EDITED_SIZES])
@pytest.mark.parametrize("edit", ["softcap", "slopes"])
def test_edits_of_scores_meet_the_bar(rng, edit, size, schedule):
    dtype, *dims = size
    seqlens, options = SHAPES[schedule]
    more = {"alibi_slopes": slopes(2, 4)} if edit == "slopes" else {}
    options = BOTTOM | options | (CAPPED if edit == "softcap" else {})
    call = check(*made(rng, dtype, (4, 2, 2), seqlens, dims, more=more, **options), schedule)
    assert not call.scratch["flags"].any()


@pytest.mark.parametrize(("make", "schedule"), turns(DISTANCES))
def test_slopes_by_distances_of_their_own_meet_the_bar(rng, make, schedule):
    arrays, options, _ = make(rng, "bfloat16")
    if not options.softcap:  # slopes under one have the other kernel
        check(with_dout(rng, arrays, options, dlse=schedule == 1), options, schedule)


def test_slopes_of_sequences_end_to_end_meet_the_bar(rng):
    check(*ragged(rng, more={"alibi_slopes": slopes(4)}, **CAUSAL), 1)


@pytest.mark.parametrize("lengths", [(256, 16, 16, 16), (16, 16, 16, 250)], ids=str)
def test_a_tile_behind_its_sequence_leaves_nothing_of_a_slope(rng, lengths):
    """By where they begin sequences have tiles that the longest one of them all has not."""
    arrays = ragged_operands(rng, "bfloat16", lengths, lengths, (2, 1, 1)) | {"alibi_slopes": slopes(2)}
    options = ragged_options(arrays, **CAUSAL)
    check(with_dout(rng, arrays, options, dlse=True), options, 1)


def test_slopes_of_a_tile_that_is_made_again_are_written_once(rng):
    arrays, options = made(rng, seqlens=(140, 170), more={"alibi_slopes": slopes(2)}, **CAUSAL)
    arrays["k"][0, 160], arrays["v"][0, 165] = np.nan, np.inf
    assert check(arrays, options, 1).scratch["flags"].any()


@pytest.mark.parametrize("seqlens", [(64, 64), (140, 170)], ids=str)
def test_an_infinite_score_under_a_softcap_shows_as_nan(rng, seqlens):
    arrays, options = made(rng, seqlens=seqlens, dims=(128, 128), **CAPPED, **CAUSAL)
    arrays["k"][0, 20, 0, 3] = np.inf
    assert check(arrays, options, 2).scratch["flags"].any()


def test_a_weight_that_underflows_beside_a_row_of_nan_is_not_taken_for_a_hidden_one(rng):
    """0 * nan is nan in dk of the key, too."""
    arrays, options = made(rng, seqlens=(140, 170), **CAUSAL)
    arrays["q"][0, 100, 0], arrays["k"][0, 30, 0] = 40.0, -40.0
    arrays["v"][0, 50, 0, 7] = np.nan
    check(arrays, options, 1)


def test_sinks_join_the_weights(rng):
    sinks = np.array([0.5, -np.inf, np.inf, 2.0], np.float32)
    check(*made(rng, heads=(4, 2, 2), seqlens=(190, 70), more={"sinks": sinks}, **CAUSAL), 1)


RAGGED = (170, 1, 0, 33), (20, 140, 5, 90)


def ragged(rng, value=None, more=None, **options):
    """Sequences end to end, and behind them rows and keys of none."""
    arrays = ragged_operands(rng, "bfloat16", *RAGGED, (4, 2, 2), behind=(3, 5)) | (more or {})
    options = ragged_options(arrays, **options)
    arrays = with_dout(rng, arrays, options, dlse=True)
    if value is not None:
        for name, rows in (("q", 3), ("dout", 3), ("k", 5), ("v", 5)):
            arrays[name][-rows:] = value
    return arrays, options


@pytest.mark.parametrize("schedule", range(3))
def test_sequences_end_to_end_meet_the_bar(rng, schedule):
    check(*ragged(rng, **CAUSAL), schedule)


def test_rows_of_no_sequence_that_are_nan_are_met_and_left_out(rng):
    call = check(*ragged(rng, np.nan, **CAUSAL), 1)
    assert call.scratch["flags"].any()


@pytest.mark.parametrize("schedule", range(3))
def test_what_is_hidden_or_not_finite_shows_where_it_is_seen(rng, schedule):
    arrays, options = made(rng, seqlens=(140, 170), **CAUSAL)
    arrays["k"][0, 160], arrays["v"][0, 165] = np.nan, np.inf
    arrays["dout"][0, 3, 1, 5] = np.inf
    call = check(arrays, options, schedule)
    flags = call.scratch["flags"]
    assert flags.any()
    assert not flags.all()


def test_a_block_makes_all_tiles_again_whose_flags_it_finds(rng, monkeypatch):
    """Of sequences end to end, too."""
    monkeypatch.setattr(gradients, "LOOKING", 1)
    gradients._recipe.cache_clear()
    call = check(*ragged(rng, np.nan, **CAUSAL), 1)
    arrays, options = made(rng, seqlens=(140, 170), **CAUSAL)
    arrays["dout"][0, 3, 1, 5] = np.inf
    more = check(arrays, options, 2)
    gradients._recipe.cache_clear()
    for each in (call, more):
        assert [step.grid for *_, step in each.launches[2::2]] == [1, 1]
        assert each.scratch["flags"].sum() > 1


def test_flags_are_not_needed_where_all_is_finite(rng):
    """What the other kernel is launched behind it for is done by nobody: its results are these very bits."""
    arrays, options = made(rng)
    whole, alone = Call(arrays, options, device=H100), Call(arrays, options, device=H100)
    alone.launches = [x for x in alone.launches if x[2].specialisation.source != "backward.cu"]
    for name, gradient in whole.run().grads.items():
        np.testing.assert_array_equal(gradient.view(np.uint16), alone.run().grads[name].view(np.uint16))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x | {"k": np.broadcast_to(x["k"][:1], x["k"].shape)},
        lambda x: x | {"dout": x["dout"].repeat(2, axis=1)[:, ::2][:, :, :, :40]} | {n: x[n][..., :40] for n in "qkv"},
    ],
    ids=["a shared batch", "rows of 80 bytes"],
)
def test_what_no_tensor_map_reads_goes_to_the_other_kernel(rng, change):
    arrays, options = made(rng, dims=(64, 64))
    call = Call(change(arrays), options, device=H100)
    sources = [step.specialisation.source for _, _, step in call.launches]
    assert ("hopper_backward.cu" in sources) == all(x.strides[0] for x in call.arrays.values() if x.ndim == 4)
    hold(call.arrays, call.run())


@pytest.mark.parametrize("heads", [(4, 4, 1), (4, 2, 1), (4, 1, 4)], ids=str)
def test_no_warp_is_so_late_that_it_misses_a_round(rng, heads):
    """Keys that nobody sees: nothing but rings holds the warps of their block together."""
    arrays, options = made(rng, heads=heads, seqlens=(10, 300), causal=True, alignment="top-left")
    call = Call(arrays, options, device=H100)
    for late in range(12):
        hold(arrays, call.run(ONE_IS_LATE, late))
