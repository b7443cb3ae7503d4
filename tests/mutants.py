"""Planted bugs: a piece of text in one CUDA source, and what takes its place."""

from typing import NamedTuple

import pytest
from emulator import CUDA, EmulatorError, path_of


class Mutant(NamedTuple):
    name: str
    source: str
    """The file's name, wherever it lies."""
    old: str
    """Has to be there exactly once."""
    new: str
    group: str
    """The calls that have to notice."""


def assert_caught(mutant, groups):
    """Fail unless a group, a function of changed sources, raises with the mutant in its source."""
    path = path_of(mutant.source)
    text = (CUDA / path).read_text()
    assert text.count(mutant.old) == 1, "the text to replace has to be there once"
    with pytest.raises((AssertionError, EmulatorError)):
        groups[mutant.group]({path: text.replace(mutant.old, mutant.new)})


def some_of_them(mutants):
    """Parameters of a test: `make test` plants every sixth one, `make proof` all."""
    return [
        pytest.param(mutant, id=mutant.name, marks=pytest.mark.long if place % 6 else ())
        for place, mutant in enumerate(mutants)
    ]
