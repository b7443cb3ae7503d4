"""Which operands tensor maps read as they lie, and which are copied for it."""

from dataclasses import replace

import numpy as np
import pytest
from emulated import operands, options_of, paged, problem_of, ragged_operands, ragged_options

from cupyattn.cuda.launching.launch import recipe_of
from cupyattn.cuda.launching.mapping import MANY, are_remade, map_objections
from cupyattn.cuda.launching.views import view_of_numpy
from cupyattn.plan import choose, choose_backward
from cupyattn.problem import NAMED_DEVICES

H100 = NAMED_DEVICES["H100"]


def asked(rng, seqlens=(MANY, MANY), batch=2, heads=(2, 2, 2), **arrays):
    """(problem, views) of dense operands in float16, of which `arrays` replace some."""
    given = {**operands(rng, "float16", "bshd", batch, heads, seqlens), **arrays}
    return problem_of(given, options_of()), views_of(given)


def views_of(arrays):
    """Each starts at a multiple of 16 bytes."""
    views = {name: view_of_numpy(x, x.dtype.name) for name, x in arrays.items()}
    return {name: view._replace(pointer=view.pointer // 16 * 16) for name, view in views.items()}


def zeros(*shape):
    return np.zeros(shape, np.float16)


@pytest.mark.parametrize("seqlens", [(MANY, MANY), (MANY - 1, MANY), (MANY, MANY - 1)], ids=str)
def test_forward_and_gradients_copy_from_the_same_number_of_tokens_on(rng, seqlens):
    problem, _ = asked(rng, seqlens)
    for plan in (choose(problem, H100), choose_backward(problem, H100)):
        assert are_remade(plan, problem) == (min(seqlens) == MANY)


def test_where_nothing_may_run_instead_however_few_are_copied(rng):
    problem, _ = asked(rng, (20, 30))
    assert are_remade(choose(problem, H100, allowed=("hopper",)), problem)
    assert not are_remade(choose(problem, H100, allowed=("hopper", "flash")), problem)


@pytest.mark.parametrize("allowed", [None, ("hopper",)])
def test_caches_and_pages_are_never_copied(rng, allowed):
    problem, _ = asked(rng)
    for changes in ({"cached": True}, {"axes": "thd", "page_size": 16}):
        held = replace(problem, layout=replace(problem.layout, **changes))
        assert not are_remade(choose(held, H100, allowed=allowed), held)


LIE = {
    "keys that batches share": (2, "k", lambda: np.broadcast_to(zeros(1, MANY, 2, 64), (2, MANY, 2, 64))),
    "keys of a batch of one": (2, "k", lambda: zeros(1, MANY, 2, 64)),
    "keys of one head repeated": (1, "k", lambda: np.broadcast_to(zeros(1, MANY, 1, 64), (1, MANY, 2, 64))),
    "rows of values off 16 bytes": (1, "v", lambda: zeros(1, MANY, 2, 68)[..., :64]),
}


@pytest.mark.parametrize(("batch", "name", "make"), LIE.values(), ids=LIE)
def test_a_recipe_asks_for_a_copy_of_what_no_map_reads_and_of_nothing_else(rng, batch, name, make):
    problem, views = asked(rng, batch=batch, **{name: make()})
    recipe = recipe_of(choose(problem, H100), problem, views)
    assert recipe.remade == (name,) == tuple(map_objections(problem, views))
    assert recipe.copies == ()


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_an_array_off_16_bytes_is_copied_alone(rng, name):
    problem, views = asked(rng)
    views[name] = views[name]._replace(pointer=views[name].pointer + 2)
    assert recipe_of(choose(problem, H100), problem, views).remade == (name,)


def test_an_axis_of_one_needs_no_copy_whatever_its_stride(rng):
    problem, views = asked(rng, batch=1, heads=(2, 1, 1))
    views["k"] = views["k"]._replace(strides=(0, 64, 3, 1))
    views["v"] = views["v"]._replace(strides=(7, 64, 0, 1))
    recipe = recipe_of(choose(problem, H100), problem, views)
    assert recipe.specialisation.source == "hopper.cu"


def test_packed_keys_are_copied_too(rng):
    arrays = ragged_operands(rng, "float16", (MANY,), (MANY,))
    problem, views = problem_of(arrays, ragged_options(arrays)), views_of({**arrays, "k": zeros(MANY, 1, 68)[..., :64]})
    assert recipe_of(choose(problem, H100), problem, views).remade == ("k",)


def test_pages_that_no_map_reads_are_read_by_flash(rng):
    arrays = paged(rng, ragged_operands(rng, "float16", (MANY,), (MANY,)), 16)
    problem = problem_of(arrays, ragged_options(arrays))
    arrays["k"] = np.pad(arrays["k"], ((0, 0),) * 3 + ((0, 4),))[..., :64]
    recipe = recipe_of(choose(problem, H100), problem, views_of(arrays))
    assert (recipe.remade, recipe.specialisation.source) == ((), "flash.cu")


def test_few_rows_are_not_worth_a_copy(rng):
    problem, views = asked(rng, (MANY - 1, MANY), batch=1, k=zeros(1, MANY, 2, 68)[..., :64])
    recipe = recipe_of(choose(problem, H100), problem, views)
    assert (recipe.remade, recipe.specialisation.source) == ((), "flash.cu")


def test_none_is_copied_twice(rng):
    problem, views = asked(rng, k=zeros(1, MANY, 2, 64))
    assert recipe_of(choose(problem, H100), problem, views, ("k",)).specialisation.source == "flash.cu"


def test_the_others_are_looked_at_beside_one_that_is_copied_for_all_kernels(rng):
    problem, views = asked(rng, k=zeros(2, MANY, 2, 128)[..., ::2], v=zeros(1, MANY, 2, 64))
    assert recipe_of(choose(problem, H100), problem, views).copies == ("k",)
    assert tuple(map_objections(problem, views)) == ("v",)
