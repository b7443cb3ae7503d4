"""Launches of the gradients, as values: what has to be copied, who sums what, one record."""

from dataclasses import replace

import numpy as np
import pytest
from emulated import STORED, operands, options_of, problem_of, ragged_operands, ragged_options
from emulated_backward import A100

from cupyattn.cuda.backward import axes_of
from cupyattn.cuda.launching import params
from cupyattn.cuda.launching.gradients import as_asked, backward_recipe, blocks_again, to_be_copied, with_dtypes
from cupyattn.cuda.launching.views import View, contiguous_strides, view_of_numpy
from cupyattn.plan import OF_KEYS, OF_QUERIES, OF_VALUES, choose_backward
from cupyattn.problem import NAMED_DEVICES


def recipe_of(arrays, options, device=A100, **known):
    """(recipe, problem) of operands; `known` take the place of a contiguous dout, out and lse."""
    problem = problem_of(arrays, options)
    made = {name: np.zeros(problem.out_shape, STORED[problem.dtype]) for name in ("dout", "out")}
    made["lse"] = np.zeros(problem.lse_shape, np.float32)
    views = {name: view_of_numpy(x, x.dtype.name) for name, x in {**arrays, **made, **known}.items()}
    return backward_recipe(choose_backward(problem, device), problem, views), problem


def dense(rng, dtype="float16", heads=(4, 2, 2), seqlens=(70, 90), dims=(64, 64), batch=2, **arrays):
    return {**operands(rng, dtype, "bshd", batch, heads, seqlens, dims), **arrays}, options_of()


def batches(arrays, options, *shape):
    """The same with several batch axes."""
    asked = options._replace(any_rank=True)
    return {name: x.reshape(*shape, *x.shape[1:]) for name, x in arrays.items()}, asked


# ---- What has to be copied --------------------------------------------------------------------------


def test_nothing_is_copied_that_kernels_can_read(rng):
    arrays, options = dense(rng)
    arrays = {name: np.repeat(x, 2, axis=1)[:, ::-2] for name, x in arrays.items()}
    wide = np.zeros((2, 70, 4, 128), np.float16)
    recipe, _ = recipe_of(arrays, options, dout=wide[..., 64:], out=wide[..., :64])
    assert recipe.copies == ()
    assert recipe.steps


@pytest.mark.parametrize("name", ["q", "dout", "out"])
def test_rows_that_are_not_contiguous_are_copied(rng, name):
    arrays, options = dense(rng)
    recipe, _ = recipe_of(arrays, options, **{name: np.zeros((2, 70, 4, 128), np.float16)[..., ::2]})
    assert recipe.copies == (name,)
    assert recipe.steps == ()


def test_a_gradient_that_is_one_number_repeated_is_copied(rng):
    arrays, options = dense(rng)
    recipe, _ = recipe_of(arrays, options, dout=np.broadcast_to(np.float16(1.0), (2, 70, 4, 64)))
    assert recipe.copies == ("dout",)


@pytest.mark.parametrize("name", ["lse", "dlse"])
def test_numbers_of_rows_are_copied_unless_they_lie_side_by_side(rng, name):
    arrays, options = dense(rng)
    recipe, _ = recipe_of(arrays, options, **{name: np.zeros((2, 4, 140), np.float32)[..., ::2]})
    assert recipe.copies == (name,)


def test_an_axis_of_one_may_have_any_stride(rng):
    """To copy it would not help: torch and CuPy call it contiguous, and leave it as it is."""
    arrays, options = dense(rng, heads=(1, 1, 1), batch=1)
    problem = problem_of(arrays, options)
    odd = View(16, (1, 1, 70), (999, 7, 1), "float32")
    assert not to_be_copied("lse", odd, problem)
    assert not to_be_copied("dlse", odd, problem)
    assert not to_be_copied("lse", View(16, (1, 1, 1), (5, 5, 5), "float32"), problem)
    assert to_be_copied("lse", View(16, (1, 2, 70), (999, 80, 1), "float32"), problem)


def test_numbers_of_another_dtype_are_copied(rng):
    arrays, options = dense(rng, seqlens=(70, 70), sinks=np.zeros(4, np.float16), alibi_slopes=np.zeros(4))
    assert recipe_of(arrays, options)[0].copies == ("sinks", "alibi_slopes")


def test_several_batch_axes_are_made_one(rng):
    arrays, options = batches(*dense(rng, batch=6), 2, 3)
    assert set(recipe_of(arrays, options)[0].copies) == {"q", "k", "v", "dout", "out"}


def test_of_several_batch_axes_gradients_have_the_callers_shape(rng):
    arrays, options = batches(*dense(rng, batch=6), 2, 3)
    problem = problem_of(arrays, options)
    one = {name: x.reshape(6, *x.shape[2:]) for name, x in arrays.items()}
    one |= {name: np.zeros((6, 70, 4, 64), np.float16) for name in ("dout", "out")}
    one["lse"] = np.zeros((2, 3, 4, 70), np.float32)
    views = {name: view_of_numpy(x, x.dtype.name) for name, x in one.items()}
    recipe = backward_recipe(choose_backward(problem, A100), problem, views)
    assert recipe.copies == ()
    assert {name: x.shape for name, x in recipe.written.items()} == {name: arrays[name].shape for name in "qkv"}
    assert recipe.gradients.of_dq == params.Strides(70 * 4 * 64, 4 * 64, 64)


# ---- Who sums what ----------------------------------------------------------------------------------


def test_what_repeats_an_operand_is_summed_in_float32(rng):
    arrays, options = dense(rng)
    arrays["k"] = arrays["k"][:1]
    recipe, _ = recipe_of(arrays, options)
    asked = {name: as_asked(x, arrays[name].shape, "float16") for name, x in recipe.written.items()}
    assert (asked["k"].shape, asked["k"].dtype, asked["k"].is_whole) == ((2, 90, 2, 64), "float32", False)
    assert (asked["v"].shape, asked["v"].dtype, asked["v"].is_whole) == ((2, 90, 2, 64), "float16", True)
    tail = with_dtypes(recipe, {name: x.dtype for name, x in asked.items()}).gradients
    assert (tail.dq_dtype, tail.dk_dtype, tail.dv_dtype) == (0, 2, 0)


@pytest.mark.parametrize("shape", [(2, 4, 70, 90), (1, 4, 1, 90), (4, 70, 1), (1,), ()], ids=str)
def test_a_bias_is_summed_by_its_kernel(rng, shape):
    arrays, options = dense(rng, bias=np.zeros(shape, np.float32))
    recipe, _ = recipe_of(arrays, options)
    four = (1,) * (4 - len(shape)) + shape
    assert recipe.written["bias"].shape == four
    assert as_asked(recipe.written["bias"], shape, "float32").is_whole
    tile = choose_backward(problem_of(arrays, options), A100).tile.passes[-1][1]
    tiles = -(-four[2] // tile.stays) * -(-four[3] // tile.moves)
    assert recipe.steps[-1].grid == four[0] * four[1] * tiles


@pytest.mark.parametrize(
    ("heads", "shared"), [((4, 4, 4), 1), ((4, 2, 2), 2), ((12, 2, 2), 6), ((12, 3, 3), 4), ((4, 1, 1), 4)]
)
def test_one_block_sums_all_heads_that_share_keys_or_values(rng, heads, shared):
    arrays, options = dense(rng, heads=heads)
    recipe, _ = recipe_of(arrays, options)
    rows, of_queries, of_keys = recipe.steps
    assert rows.grid == -(-2 * heads[0] * 70 // 8)
    assert (of_queries.grid, of_queries.heads_per_block) == (2 * heads[0], 1)
    assert (of_keys.grid, of_keys.heads_per_block) == (2 * heads[0] // shared, shared)


@pytest.mark.parametrize("dims", [(64, 64), (192, 128)], ids=str)
def test_heads_that_share_keys_and_values_otherwise_have_a_pass_for_either(rng, dims):
    arrays, options = dense(rng, heads=(12, 2, 3), dims=dims)
    recipe, problem = recipe_of(arrays, options)
    assert [wanted for wanted, _ in choose_backward(problem, A100).tile.passes] == [OF_QUERIES, OF_KEYS, OF_VALUES]
    assert [step.heads_per_block for step in recipe.steps] == [1, 1, 6, 4]


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_where_blocks_are_few_they_share_the_heads_of_a_key_and_what_they_write_is_summed(rng, layout):
    arrays = operands(rng, "float16", layout, 2, (12, 2, 3), (70, 90), (64, 64))
    recipe, problem = recipe_of(arrays, options_of(layout=layout), NAMED_DEVICES["A100"])
    step = recipe.steps[-1]
    assert (step.grid, step.heads_per_block) == (2 * 12, 1)
    dk, dv = (recipe.written[name] for name in "kv")
    assert (dk.parts, dv.parts, dk.dtype, dk.is_whole) == (6, 4, "float32", False)
    assert dk.shape == ((2, 90, 2, 6, 64) if layout == "bshd" else (2, 2, 6, 90, 64))
    asked = as_asked(dk, arrays["k"].shape, "float16")
    assert (asked.dtype, asked.parts) == ("float32", 6)
    assert axes_of("k", asked, arrays["k"].shape, problem) == ((3,) if layout == "bshd" else (2,))
    once = (1, *arrays["k"].shape[1:])
    assert axes_of("k", asked, once, problem) == ((0, 3) if layout == "bshd" else (0, 2))
    seen = contiguous_strides((2, 90, 12, 64) if layout == "bshd" else (2, 12, 90, 64))
    batch, row, head = seen[0], seen[1 if layout == "bshd" else 2], seen[2 if layout == "bshd" else 1]
    assert recipe.gradients.of_dk == params.Strides(batch, row, head)


def test_parts_of_heads_that_do_not_divide_each_other_are_of_what_divides_both(rng):
    arrays, options = dense(rng, heads=(12, 2, 3))
    recipe, _ = recipe_of(arrays, options, replace(A100, num_units=7))
    assert (recipe.steps[-1].grid, recipe.steps[-1].heads_per_block) == (2 * 3, 4)
    assert [recipe.written[name].parts for name in "kv"] == [3, 1]


def test_what_is_empty_is_not_launched(rng):
    arrays = ragged_operands(rng, "float16", (), (), behind=(5, 5))
    recipe, _ = recipe_of(arrays, ragged_options(arrays))
    assert [step.specialisation.source for step in recipe.steps] == ["backward_rows.cu"]


@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
def test_an_odd_address_of_any_operand_is_known(rng, name):
    arrays, options = dense(rng)
    memory = np.zeros(2 * 90 * 4 * 64 + 1, np.float16)
    shape = (2, 90, 2, 64) if name in "kv" else (2, 70, 4, 64)
    odd = memory[1 : 1 + np.prod(shape)].reshape(shape)
    even, _ = recipe_of(arrays, options)
    found, _ = recipe_of(arrays, options, **{name: odd})
    assert all("true" in step.specialisation.expression for step in even.steps[1:])
    assert not any("true" in step.specialisation.expression for step in found.steps[1:])


def test_rows_of_dout_that_are_not_aligned_are_known(rng):
    arrays, options = dense(rng)
    found, _ = recipe_of(arrays, options, dout=np.zeros((2, 70, 4, 67), np.float16)[..., :64])
    assert not any("true" in step.specialisation.expression for step in found.steps[1:])


def test_results_lie_contiguously_in_the_callers_layout(rng):
    arrays = operands(rng, "float16", "bhsd", 2, (4, 2, 2), (70, 90), (64, 32))
    recipe, _ = recipe_of(arrays, options_of(layout="bhsd"))
    batch, head, row, _ = contiguous_strides((2, 2, 90, 32))
    assert recipe.gradients.of_dv == params.Strides(batch, row, head)


@pytest.mark.parametrize(("num_flags", "blocks"), [(1, 1), (200, 200), (300, 256), (8192, 256), (8193, 257)])
def test_each_flag_is_looked_at_by_a_lane_of_a_warp(num_flags, blocks):
    assert blocks_again(num_flags) == blocks
    assert num_flags <= 32 * blocks


def test_behind_each_pass_on_hopper_few_blocks_look_at_its_flags(rng):
    recipe, _ = recipe_of(*dense(rng, heads=(32, 16, 16), seqlens=(1024, 1024), batch=4), NAMED_DEVICES["H100"])
    _, *passes = recipe.steps
    for on_hopper, again in zip(passes[::2], passes[1::2], strict=True):
        assert "_again" in again.specialisation.expression
        assert (again.grid, again.flags) == (256, on_hopper.flags)
        assert again.grid < on_hopper.grid
