"""The kernels for gradients under the emulator, held to the dense derivative: sizes, tiles, edits, layouts, strays."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from cases import DISTANCES, DROPPED, EDITS, HIDDEN, LAYOUTS, STRAYS, VISIBLE, additive, call, slopes, strays, turns
from emulated import definition, operands, options_of, problem_of, ragged_operands, ragged_options
from emulated_backward import A100, Call, check, hold, run, with_dout
from oracle import assert_same_bits

from cupyattn.plan import OF_BIAS, OF_KEYS, OF_QUERIES, OF_VALUES, BackwardTile, choose_backward
from cupyattn.problem import NAMED_DEVICES

BOTTOM = {"alignment": "bottom-right"}
CAUSAL = {"causal": True, **BOTTOM}


def together(tile):
    """dq, and dk with dv, by one tile."""
    return (OF_QUERIES, tile), (OF_KEYS | OF_VALUES, tile)


def assert_same_gradients(found, clean):
    for name in clean.grads:
        assert_same_bits(found.grads[name], clean.grads[name])


# ---- Sizes and tiles --------------------------------------------------------------------------------

SIZES = [
    ("float32", 64, 64, None),
    ("bfloat16", 128, 128, None),
    ("bfloat16", 192, 128, None),
    ("float16", 256, 256, None),
    ("bfloat16", 24, 40, BackwardTile(128, 32, 8, 2)),
    ("float16", 8, 8, BackwardTile(64, 32, 4, 1)),
    ("bfloat16", 40, 200, BackwardTile(64, 16, 2, 2)),
    ("float32", 40, 8, BackwardTile(16, 16, 1, 1)),
]
"""dtype, head_dim, head_dim_v, and a tile in the plan's place."""
SHAPES = [
    ((1, 1), {}),
    ((40, 145), CAUSAL),
    ((150, 65), {"window_size": (70, 20), "alignment": "top-left"}),
]


@pytest.mark.parametrize(
    ("size", "shape", "schedule"),
    [
        pytest.param(size, shape, (i + j) % 3, id=f"{'-'.join(map(str, size[:3]))}-{shape[0][0]}x{shape[0][1]}")
        for i, size in enumerate(SIZES)
        for j, shape in enumerate(SHAPES)
    ],
)
def test_every_dtype_and_head_dim_meets_the_bar(rng, size, shape, schedule):
    dtype, head_dim, head_dim_v, tile = size
    seqlens, options = shape
    arrays = operands(rng, dtype, "bshd", 1, (2, 1, 1), seqlens, (head_dim, head_dim_v))
    arrays = with_dout(rng, arrays, options_of(**options))
    check(arrays, options_of(**options), schedule, passes=tile and together(tile))


# ---- Who sees whom, edits, layouts ------------------------------------------------------------------


@pytest.mark.parametrize(("make", "schedule"), turns(VISIBLE))
def test_who_sees_whom_meets_the_bar(rng, make, schedule):
    arrays, options, _ = make(rng, "float16")
    check(with_dout(rng, arrays, options, dlse=True), options, schedule)


@pytest.mark.parametrize("schedule", range(3))
@pytest.mark.parametrize(
    "shape",
    [
        ((300, 290), CAUSAL),
        ((290, 300), {"causal": True, "alignment": "top-left"}),
        ((300, 130), {"window_size": (90, 3), **BOTTOM}),
        ((130, 300), {"window_size": (3, 90), "alignment": "top-left"}),
    ],
    ids=lambda shape: f"{shape[0][0]}x{shape[0][1]}",
)
def test_many_tiles_meet_the_bar_in_any_order(rng, shape, schedule):
    seqlens, options = shape
    arrays = operands(rng, "float16", "bshd", 1, (2, 1, 1), seqlens)
    check(with_dout(rng, arrays, options_of(**options)), options_of(**options), schedule, seed=3)


@pytest.mark.parametrize("heads", [(12, 2, 3), (12, 4, 2), (6, 6, 1), (6, 1, 6)], ids=str)
@pytest.mark.parametrize("dims", [(64, 64), (192, 128)], ids=["together", "apart"])
def test_keys_and_values_may_have_heads_of_their_own(rng, heads, dims):
    arrays = operands(rng, "float16" if dims == (64, 64) else "bfloat16", "bhsd", 2, heads, (33, 70), dims)
    options = options_of(layout="bhsd", **CAUSAL)
    check(with_dout(rng, arrays, options), options, 1)


@pytest.mark.parametrize(("make", "schedule"), turns(EDITS))
def test_edited_scores_meet_the_bar(rng, make, schedule):
    arrays, options, seed = make(rng, "float16")
    check(with_dout(rng, arrays, options, dlse=schedule == 1), options, schedule, dropout_seed=seed)


@pytest.mark.parametrize(("make", "schedule"), turns(DISTANCES))
def test_slopes_by_distances_of_their_own_meet_the_bar(rng, make, schedule):
    arrays, options, _ = make(rng, "float16")
    check(with_dout(rng, arrays, options, dlse=schedule == 1), options, schedule)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 4, 150, 70), "float16"),
        ((150, 70), "float64"),
        ((2, 1, 1, 70), "bfloat16"),
        ((4, 150, 1), "float32"),
        ((2, 4, 1, 1), "float64"),
        ((1, 1, 1, 1), "float16"),
        ((70,), "float32"),
    ],
    ids=str,
)
def test_a_bias_is_summed_over_what_repeats_it(rng, shape, dtype):
    arrays, options, _ = call(rng, "float16", seqlens=(150, 70), bias=additive(rng, shape, dtype), options=CAUSAL)
    check(with_dout(rng, arrays, options), options, 1)


def test_all_edits_together_meet_the_bar_over_many_tiles(rng):
    options = {"softcap": 3.0, "dropout_p": 0.3, "window_size": (90, 9), **BOTTOM}
    arrays, asked, seed = call(
        rng, "float16", seqlens=(150, 170), options=options, bias=additive(rng, (4, 1, 170), "bfloat16"),
        mask=rng.random((2, 1, 150, 170)) < 0.8, alibi_slopes=slopes(4), sinks=np.array([-1.0, 0.0, 1.0, 2.0], "f4"),
    )  # fmt: skip
    check(with_dout(rng, arrays, asked, dlse=True), asked, 2, dropout_seed=seed)


@pytest.mark.parametrize(("make", "schedule"), turns(LAYOUTS))
def test_every_layout_meets_the_bar(rng, make, schedule):
    arrays, options, seed = make(rng, "float16")
    check(with_dout(rng, arrays, options), options, schedule, dropout_seed=seed)


def test_a_gradient_in_any_layout_meets_the_bar(rng):
    arrays, options, _ = call(rng, "float16", seqlens=(40, 77))
    arrays = with_dout(rng, arrays, options)
    plain = check(arrays, options, 1)
    for dout in (
        np.ascontiguousarray(arrays["dout"].transpose(2, 0, 1, 3)).transpose(1, 2, 0, 3),
        np.repeat(arrays["dout"][:, ::-1], 2, axis=1)[:, ::-2],
        np.concatenate([arrays["dout"]] * 2, axis=-1)[..., 64:],
    ):
        assert_same_gradients(run({**arrays, "dout": dout}, options, 2), plain)


def test_an_odd_address_of_the_gradient_does_not_change_a_bit(rng):
    arrays, options, _ = call(rng, "float16", seqlens=(40, 77))
    arrays = with_dout(rng, arrays, options)
    odd = np.zeros(arrays["dout"].size + 1, np.float16)[1:].reshape(arrays["dout"].shape)
    odd[...] = arrays["dout"]
    assert_same_gradients(run({**arrays, "dout": odd}, options), run(arrays, options))


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_an_operand_that_serves_all_sequences_has_the_sum_of_their_gradients(rng, name):
    arrays, options, _ = call(rng, "float16", batch=3, seqlens=(40, 77))
    arrays[name] = arrays[name][1:2]
    check(with_dout(rng, arrays, options), options, 1)


@pytest.mark.parametrize("schedule", [1, 2])
def test_another_order_of_events_is_the_same_bit_for_bit(rng, schedule):
    arrays, options, seed = EDITS["everything"](rng, "float16")
    arrays = with_dout(rng, arrays, options)
    once, again = (run(arrays, options, s, 5, dropout_seed=seed) for s in (0, schedule))
    assert_same_gradients(again, once)


def test_who_sees_nothing_and_who_is_not_seen_have_zeros(rng):
    arrays, options, _ = VISIBLE["causal, more rows, bottom-right"](rng, "float16")
    blind = run(with_dout(rng, arrays, options, dlse=True), options, 1).grads["q"][:, : 90 - 23]
    assert_same_bits(blind, np.zeros_like(blind))
    arrays, options, _ = VISIBLE["causal, more keys, top-left"](rng, "float16")
    found = run(with_dout(rng, arrays, options, dlse=True), options, 1)
    for name in "kv":
        unseen = found.grads[name][:, 19:]
        assert_same_bits(np.abs(unseen), np.zeros_like(unseen))


# ---- What is not finite -----------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "schedule"), turns(HIDDEN))
def test_what_is_hidden_does_not_change_a_bit(rng, make, schedule):
    arrays, poisoned, options, _ = make(rng, "float16")
    arrays = with_dout(rng, arrays, options)
    clean, found = (run({**arrays, **x}, options, schedule) for x in (arrays, poisoned))
    assert all(np.isfinite(x.astype(float)).all() for x in found.grads.values())
    assert_same_gradients(found, clean)


def test_rows_that_see_nothing_may_hold_anything(rng):
    arrays, options, _ = call(rng, "float16", seqlens=(90, 23), options=CAUSAL)
    arrays = with_dout(rng, arrays, options, dlse=True)
    poisoned = {name: x.copy() for name, x in arrays.items()}
    for name in ("q", "dout"):
        poisoned[name][:, 5:40] = np.nan
        poisoned[name][:, 40:50] = np.inf
    poisoned["dlse"][..., 7] = np.nan
    clean, found = (run(x, options, 1) for x in (arrays, poisoned))
    assert_same_gradients(found, clean)


@pytest.mark.parametrize(("make", "schedule"), turns(STRAYS))
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_is_not_finite_shows_where_it_is_seen(rng, dtype, make, schedule):
    if dtype == "float32" and make is STRAYS["a query of inf"]:
        pytest.skip("a score of -inf, which hides a key, is nan where a plane of the key is 0")
    arrays, options, _ = make(rng, dtype)
    check(with_dout(rng, arrays, options), options, schedule)


@pytest.mark.parametrize(("make", "schedule"), turns(DROPPED))
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_not_finite_is_nan_where_its_weight_is_dropped(rng, dtype, make, schedule):
    arrays, options, seed = make(rng, dtype)
    check(with_dout(rng, arrays, options), options, schedule, dropout_seed=seed)


OF_DOUT = {
    "inf": [(20, 3, np.inf)],
    "-inf": [(39, 63, -np.inf)],
    "nan": [(0, 0, np.nan)],
    "inf and -inf in one tile": [(17, 5, np.inf), (30, 5, -np.inf)],
    "inf and -inf apart": [(3, 5, np.inf), (139, 5, -np.inf)],
    "inf in every row": [(row, 9, np.inf) for row in range(150)],
}


@pytest.mark.parametrize(("found", "schedule"), turns(OF_DOUT))
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_gradient_that_is_not_finite_shows_where_its_row_sees(rng, dtype, found, schedule):
    asked = {"window_size": (30, 9), "alignment": "top-left"}
    arrays, options, _ = call(rng, dtype, (2, 1, 1), (150, 77), batch=1, options=asked)
    arrays = with_dout(rng, arrays, options)
    for row, column, what in found:
        arrays["dout"][0, row, 1, column] = what
    check(arrays, options, schedule)


@pytest.mark.parametrize("p", [0.5, 1.0])
def test_a_gradient_that_is_not_finite_is_nan_where_its_weight_is_dropped(rng, p):
    arrays, options, seed = call(rng, "float16", (2, 1, 1), (150, 77), batch=1, options={"dropout_p": p})
    arrays = with_dout(rng, arrays, options)
    for row, column, what in (*OF_DOUT["inf"], *OF_DOUT["-inf"], *OF_DOUT["nan"]):
        arrays["dout"][0, row, 1, column] = what
    check(arrays, options, 1, dropout_seed=seed)


@pytest.mark.parametrize("name", ["q", "k"])
@pytest.mark.parametrize("what", [np.inf, -np.inf, np.nan])
def test_a_score_of_infinity_under_a_softcap_shows_as_nan_where_it_is_seen(rng, name, what):
    """The score is finite then, and does not change with the product: 0 * inf."""
    make = strays((name, 30, 5, what), softcap=2.0, window_size=(20, 9), **BOTTOM)
    arrays, options, _ = make(rng, "float16")
    found = check(with_dout(rng, arrays, options), options, 1)
    other = found.grads["qk"["kq".index(name)]].astype(float)
    assert np.isnan(other).any()
    assert np.isnan(other[..., 5]).sum() == np.isnan(other).sum() or np.isnan(what)


@pytest.mark.parametrize("heads", [(4, 1, 1), (4, 2, 1), (12, 2, 3)], ids=str)
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_blocks_that_share_the_heads_of_a_key_come_to_the_same(rng, layout, heads):
    arrays = operands(rng, "bfloat16", layout, 2, heads, (40, 70), (64, 64))
    options = options_of(layout=layout, causal=True, alignment="bottom-right")
    call = Call(with_dout(rng, arrays, options, dlse=True), options, device=NAMED_DEVICES["A100"])
    assert call.asked["k"].parts == heads[0] // heads[1]
    hold(call.arrays, call.run(1))


def test_shares_of_heads_write_sequences_end_to_end(rng):
    arrays = ragged_operands(rng, "bfloat16", (40, 1, 20), (30, 9, 80), (4, 1, 1), behind=(3, 5))
    options = ragged_options(arrays)
    call = Call(with_dout(rng, arrays, options), options, device=NAMED_DEVICES["A100"])
    assert call.asked["k"].parts == 4
    hold(call.arrays, call.run(1))


def test_slopes_are_counted_once_where_strays_are(rng):
    arrays, options, seed = EDITS["everything"](rng, "float16")
    arrays = with_dout(rng, arrays, options)
    poisoned = {name: x.copy() for name, x in arrays.items()}
    poisoned["mask"][:, :, 5] = arrays["mask"][:, :, 5] = False
    poisoned["k"][:, 5] = np.nan
    clean, found = (run(x, options, 1, dropout_seed=seed) for x in (arrays, poisoned))
    assert_same_gradients(found, clean)


@pytest.mark.parametrize("dims", [(192, 128), (256, 256)], ids=str)
def test_wide_heads_keep_strays_apart(rng, dims):
    dtype = "bfloat16" if dims == (192, 128) else "float16"
    arrays, options, _ = call(rng, dtype, (2, 1, 1), (40, 60), dims, 1, options=CAUSAL)
    arrays = with_dout(rng, arrays, options)
    arrays["k"][0, 50], arrays["v"][0, 55], arrays["dout"][0, 3, 1, 5] = np.nan, np.nan, np.inf
    check(arrays, options, 1)


# ---- Sequences end to end ---------------------------------------------------------------------------

RAGGED = {
    "equal lengths": ((20, 20), (20, 20), {}),
    "one sequence": ((70,), (90,), CAUSAL),
    "empty sequences": ((0, 17, 0, 5, 0), (4, 0, 9, 130, 0), {}),
    "causal": ((5, 64, 1, 77), (70, 64, 33, 12), CAUSAL),
    "causal, top-left": ((5, 64, 1, 77), (70, 64, 33, 12), {"causal": True, "alignment": "top-left"}),
    "windows": ((40, 150), (150, 3), {"window_size": (20, 4), **BOTTOM}),
    "no sequences": ((), (), {}),
}


def ragged(rng, lengths_q, lengths_k, behind=(0, 0), longest=(None, None), more=None, **options):
    arrays = {**ragged_operands(rng, "float16", lengths_q, lengths_k, (4, 2, 2), behind=behind), **(more or {})}
    asked = ragged_options(arrays, *longest, **options)
    return with_dout(rng, arrays, asked, dlse=True), asked


@pytest.mark.parametrize(("case", "schedule"), turns(RAGGED))
@pytest.mark.parametrize("behind", [(0, 0), (70, 9)], ids=["to the end", "rows behind"])
def test_sequences_end_to_end_meet_the_bar(rng, case, behind, schedule):
    lengths_q, lengths_k, options = case
    arrays, asked = ragged(rng, lengths_q, lengths_k, behind, **options)
    rows, keys = sum(lengths_q), sum(lengths_k)
    for name, used in (("q", rows), ("dout", rows), ("k", keys), ("v", keys)):
        arrays[name][used:] = np.nan  # nobody's
    check(arrays, asked, schedule)


@pytest.mark.parametrize("device", [A100, replace(NAMED_DEVICES["H100"], num_units=1)], ids=lambda x: x.name)
def test_sequences_of_their_own_tiles_have_the_bits_that_each_has_alone(rng, device):
    """Those of the kernels of dense batches; one sequence begins with a tile, and two are empty."""
    lengths_q, lengths_k = (5, 0, 251, 17, 0, 120), (40, 9, 3, 260, 5, 30)
    arrays = ragged_operands(rng, "bfloat16", lengths_q, lengths_k, (4, 2, 2))
    options = ragged_options(arrays, **CAUSAL)
    packed = Call(with_dout(rng, arrays, options, dlse=True), options, device=device)
    found = packed.run(1).grads
    assert all("_packed<" in step.specialisation.expression for *_, step in packed.launches[1:])
    for rows, keys in zip(spans(lengths_q), spans(lengths_k), strict=True):
        places = {"q": rows, "dout": rows, "k": keys, "v": keys}
        alone = {name: packed.arrays[name][None, place] for name, place in places.items()}
        forward = packed.arrays["out"][None, rows], packed.arrays["lse"][None, :, rows]
        alone["dlse"] = packed.arrays["dlse"][None, :, rows]
        alone = {name: np.ascontiguousarray(x) for name, x in alone.items()}
        dense = Call(alone, options_of(**CAUSAL), device=device, forward=forward).run(1).grads
        for name in "qkv":
            assert_same_bits(found[name][places[name]], dense[name][0])


def spans(lengths):
    ends = np.cumsum([0, *lengths])
    return [slice(start, stop) for start, stop in itertools.pairwise(ends)]


def test_longest_lengths_may_be_longer_than_any(rng):
    arrays, options = ragged(rng, (5, 20), (33, 7), longest=(300, 1000))
    check(arrays, options, 1)


@pytest.mark.parametrize("edit", ["slopes", "sinks", "dropout"])
def test_edits_of_sequences_end_to_end_meet_the_bar(rng, edit):
    more = {"slopes": {"alibi_slopes": slopes(3, 4)}, "sinks": {"sinks": np.array([-1, 0, 1, 2], "f4")}}.get(edit)
    options = {"dropout_p": 0.4} if edit == "dropout" else {}
    arrays, asked = ragged(rng, (9, 0, 40), (70, 5, 40), (3, 0), more=more, **BOTTOM, **options)
    check(arrays, asked, 2, dropout_seed=77)


@pytest.mark.parametrize(
    "starts",
    [
        ([-5, 4, 2**31 - 1], [3, 1, 1000]),
        ([2**31 - 1, -(2**31), 7], [9, -3, 2**31 - 1]),
        ([0, 40, 10], [30, 0, 40]),
    ],
    ids=["beyond", "extreme", "not in order"],
)
def test_lengths_that_lie_stay_inside_the_arrays(rng, starts):
    arrays, options = ragged(rng, (20, 20), (20, 20))
    given = {name: x for name, x in arrays.items() if name not in ("dout", "dlse")}
    forward = definition(given, problem_of(given, options))
    for name, numbers in zip(("cu_seqlens_q", "cu_seqlens_k"), starts, strict=True):
        arrays[name] = np.array(numbers, np.int32)
    Call(arrays, options, forward=forward).run(1)


# ---- The passes -------------------------------------------------------------------------------------


def test_a_pass_leaves_its_own_gradient_and_no_other(rng):
    arrays, options, _ = call(rng, "float16", bias=additive(rng, (13, 77), "float32"))
    arrays = with_dout(rng, arrays, options)
    passes = choose_backward(problem_of({x: arrays[x] for x in ("q", "k", "v", "bias")}, options), A100).tile.passes
    assert [wanted for wanted, _ in passes] == [OF_QUERIES, OF_KEYS | OF_VALUES, OF_BIAS]
    for one, names in zip(passes, ({"q"}, {"k", "v"}, {"bias"}), strict=True):
        found = run(arrays, options, 1, passes=(one,))
        assert set(found.grads) == names
        hold(arrays, found)
