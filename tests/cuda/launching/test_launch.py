"""What a launch is told of a problem."""

import numpy as np
import pytest
from emulated import operands, options_of, plan_of, problem_of

from cupyattn.cuda.launching.launch import divisor, recipe_of
from cupyattn.cuda.launching.views import view_of_numpy
from cupyattn.problem import Distances


def told(rng, distances, **options):
    """(step, shift, step) of ALiBi's distances, as the record has them."""
    arrays = operands(rng, "float16", heads=(2, 1, 1), seqlens=(10, 40))
    arrays["alibi_slopes"] = np.ones(2, np.float32)
    problem = problem_of(arrays, options_of(**options)._replace(distances=distances))
    views = {name: view_of_numpy(x, x.dtype.name) for name, x in arrays.items()}
    tail = recipe_of(plan_of(problem, "flash"), problem, views).tail
    return (*np.frombuffer(tail[-16:-8], np.int32), *np.frombuffer(tail[-8:-4], np.float32))


@pytest.mark.parametrize("alignment", ["top-left", "bottom-right"])
def test_distances_are_from_the_diagonal_if_nothing_else_is_asked_for(rng, alignment):
    assert told(rng, None, alignment=alignment) == (1, 0, 1.0)


def test_distances_are_counted_from_the_diagonal_that_a_kernel_finds(rng):
    """Which is 30 keys on where the mask is aligned at the end."""
    assert told(rng, Distances(7, 3), alignment="top-left") == (3, 7, 3.0)
    assert told(rng, Distances(7, 3), alignment="bottom-right") == (3, 7 - 90, 3.0)


def test_a_launch_that_is_remembered_is_not_that_of_another_diagonal(rng):
    found = [told(rng, Distances(first, 1), alignment="top-left")[1] for first in (5, 6, 5)]
    assert found == [5, 6, 5]


@pytest.mark.parametrize("value", [1, 2, 3, 5, 7, 33, 128, 1000, 65535, 65536, 65537, 2**30 - 1, 2**30, 2**31 - 1])
def test_a_multiplication_divides_by_a_divisor(value):
    value, multiplier, shift = divisor(value)
    assert 0 <= multiplier < 2**32
    near = [n * value + rest for n in (0, 1, 2, 1000, (2**31 - 1) // value) for rest in (-1, 0, 1)]
    dividends = [x for x in (*near, 0, 1, 2**31 - 2, 2**31 - 1, *range(0, 2**31, 9_999_991)) if 0 <= x < 2**31]
    quotients = [x if value == 1 else x * multiplier >> 32 >> shift for x in dividends]
    assert quotients == [x // value for x in dividends]
