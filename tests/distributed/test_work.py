"""What a rank asks of the arithmetic."""

from dataclasses import replace

import pytest

from cupyattn.plan import choose, choose_backward
from cupyattn.problem import NAMED_DEVICES, Distances, Layout, Mask, Problem, ScoreEdits, Sizes

SIZES = Sizes((1,), 4, 2, 2, 64, 64, 64, 64)
PROBLEM = Problem(SIZES, Layout("bhsd"), "float16", Mask(right=0, alignment="top-left"), ScoreEdits(0.1))
DECODE = replace(PROBLEM, sizes=replace(SIZES, seqlen_q=1, seqlen_k=4096))


def shifted(problem, first=3, step=1):
    return replace(problem, edits=replace(problem.edits, alibi_slopes=(4,), distances=Distances(first, step)))


@pytest.mark.parametrize(
    ("problem", "device", "kernel"),
    [(PROBLEM, "A100", "flash"), (PROBLEM, "H100", "hopper"), (DECODE, "A100", "splitkv")],
    ids=["flash", "hopper", "splitkv"],
)
def test_kernels_take_distances_that_are_not_from_their_diagonal(problem, device, kernel):
    assert choose(problem, NAMED_DEVICES[device]).kernel == kernel
    assert choose(shifted(problem), NAMED_DEVICES[device]).kernel == kernel
    gradients = choose_backward(replace(problem, edits=shifted(problem).edits, needs_lse=True), NAMED_DEVICES[device])
    assert gradients.kernel == ("hopper_backward" if device == "H100" else "backward")


@pytest.mark.parametrize(("first", "step"), [(2**31, 1), (-(2**31), 1), (0, 2**21), (2**31 - 2**12, 1)])
def test_no_kernel_counts_distances_beyond_32_bits(first, step):
    plan = choose(shifted(PROBLEM, first, step), NAMED_DEVICES["A100"])
    assert plan.kernel == "none"
    assert "distances in 32 bits" in str(plan.objections)


@pytest.mark.parametrize(("alignment", "kernel"), [("top-left", "flash"), ("bottom-right", "none")])
def test_distances_go_with_lengths_that_are_data_where_their_beginning_is_known(alignment, kernel):
    """A kernel finds the diagonal of a sequence, and counts from that."""
    packed = replace(shifted(PROBLEM), layout=Layout("thd"), mask=Mask(right=0, alignment=alignment))
    assert choose(packed, NAMED_DEVICES["A100"]).kernel == kernel
