"""A call that was made, as a script by which it is made again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cupyattn.cuda import appending
from cupyattn.cuda.launching import append, script
from cupyattn.cuda.launching.launch import recipe_of
from cupyattn.cuda.launching.memory import CuPyMemory
from cupyattn.cuda.launching.params import POINTERS
from cupyattn.cuda.launching.script import Script, Step
from cupyattn.cuda.launching.views import View, contiguous_strides, has_to_be_copied
from cupyattn.cuda.making.module import kernel
from cupyattn.plan import Plan
from cupyattn.problem import Problem, Spec


def script_of(
    memory: CuPyMemory,
    index: int,
    operands: Mapping[str, Any],
    specs: Mapping[str, Spec],
    plan: Plan,
    problem: Problem,
    places: Mapping[str, int],
    into: Mapping[str, int],
    count: int,
    from_cache: tuple[int, bool, bool] | None,
) -> Script | None:
    """Of a call whose operands stand at `places` in a list of `count` addresses, and results that go `into` others.

    `from_cache` is what `run_from_cache` is told besides: cache_seqlen, each_row and interleaved.
    ``cache_seqlen`` is among the places where it is a number that changes from call to call.  None: something has to
    be copied first, or there is nothing to launch.
    """
    if not problem.sizes.num_heads or 0 in problem.out_shape:
        return None
    places, scratch, steps = dict(places), list[int](), list[Step]()
    like = places["q"]
    for name in problem.results:
        places[name], count = count, count + 1
    views = {name: memory.view(array, specs[name].dtype) for name, array in operands.items()}
    seqlen, *rotation = from_cache or (0, False, False)
    if "k_new" in operands:
        of_append = {name: views[name] for name in append.POINTERS if name in views}
        batch_shape = problem.sizes.batch_shape
        if any(has_to_be_copied("", *view[1:], batch_shape) for view in of_append.values()):
            return None
        own = dict(places)
        if "rotary_cos" in operands:
            q = specs["q"]
            rotated = View(0, q.shape, contiguous_strides(q.shape), q.dtype)
            of_append["q_rotated"] = views["q"] = rotated
            scratch.append(q.nbytes)
            own["q_rotated"] = places["q"] = count
            count += 1
        recipe = append.recipe_of(problem, of_append, *rotation)
        function = kernel(recipe.specialisation, index)
        steps.append(script.step_of_append(recipe, function, of_append, own))
        views = {name: view for name, view in views.items() if name not in appending.OPERANDS}
    whole = recipe_of(plan, problem, views)
    if whole.copies or whole.remade:
        return None
    for name, size in whole.workspace._asdict().items():
        if size:
            scratch.append(4 * size)  # float32 or int32
            places[name], count = count, count + 1
    words = script.words_of(POINTERS, places)
    for each in whole.launches:
        steps.append(script.step(each, kernel(each.specialisation, index), views, places, words))
    results = tuple((spec, into.get(name)) for name, spec in problem.results.items())
    return Script(memory, index, like, results, script.side_by_side(scratch), tuple(steps), seqlen)
