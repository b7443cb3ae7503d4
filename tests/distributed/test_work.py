"""What a rank asks of the arithmetic."""

from dataclasses import replace

from cupyattn.plan import choose
from cupyattn.problem import NAMED_DEVICES, Layout, Mask, Problem, ScoreEdits, Sizes

SIZES = Sizes((1,), 4, 2, 2, 64, 64, 64, 64)
PROBLEM = Problem(SIZES, Layout("bhsd"), "float16", Mask(right=0, alignment="top-left"), ScoreEdits(0.1))


def test_no_kernel_takes_a_diagonal_that_is_a_number():
    """Which only the CPU counts distances from."""
    shifted = replace(PROBLEM, mask=Mask(right=0, alignment=3))
    assert choose(PROBLEM, NAMED_DEVICES["A100"]).kernel == "flash"
    assert choose(shifted, NAMED_DEVICES["A100"]).kernel == "none"
