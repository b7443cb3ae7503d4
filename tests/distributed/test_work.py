"""What a rank asks of the arithmetic."""

from dataclasses import replace

from cupyattn.plan import choose
from cupyattn.problem import NAMED_DEVICES, Distances, Layout, Mask, Problem, ScoreEdits, Sizes

SIZES = Sizes((1,), 4, 2, 2, 64, 64, 64, 64)
PROBLEM = Problem(SIZES, Layout("bhsd"), "float16", Mask(right=0, alignment="top-left"), ScoreEdits(0.1))


def test_no_kernel_takes_distances_that_are_not_from_its_diagonal():
    """Which only the CPU has."""
    shifted = replace(PROBLEM, edits=replace(PROBLEM.edits, alibi_slopes=(4,), distances=Distances(3, 1)))
    assert choose(PROBLEM, NAMED_DEVICES["A100"]).kernel == "flash"
    assert choose(shifted, NAMED_DEVICES["A100"]).kernel == "none"
