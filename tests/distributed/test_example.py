"""The example of training on shared-out tokens: it is the same as alone, and its check can fail."""

import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "context_parallel.py"


@pytest.fixture
def main():
    if not EXAMPLE.is_file():
        pytest.skip("examples/ is not here (it is not in the sdist)")
    return runpy.run_path(str(EXAMPLE))["main"]


def test_two_ranks_train_as_one_does(main, capsys):
    assert main(["--length", "60", "--steps", "3"]) == 0
    assert "3 steps" in capsys.readouterr().out


def test_gradients_that_are_wrong_are_noticed(main, monkeypatch):
    right = main.__globals__["ring_attention_backward"]

    def wrong(*rows, **options):
        found = right(*rows, **options)
        return found._replace(dk=1.001 * found.dk)

    monkeypatch.setitem(main.__globals__, "ring_attention_backward", wrong)
    assert main(["--length", "60", "--steps", "3"]) == 1
