"""The text of errors."""

import pytest

from cupyattn.reading import refusal


def test_what_came_is_aligned_and_may_be_nothing():
    assert refusal("f", "a rule") == "f: a rule"
    assert refusal("f", "a rule", ("q", 1, "a note"), ("longer", "22")).splitlines() == [
        "f: a rule",
        "    q       1   a note",
        "    longer  22",
    ]


def test_torch_compile_can_follow_it():
    torch = pytest.importorskip("torch")

    def refused(x):
        return x, refusal("f", "a rule", ("q", 1))

    torch._dynamo.reset()
    assert torch.compile(refused, fullgraph=True, backend="eager")(torch.ones(1))[1] == "f: a rule\n    q  1"
    torch._dynamo.reset()
