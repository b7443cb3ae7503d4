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


def misplaced(mutants):
    """Names of those whose text is not there once, since the source has changed: `make test` asks for all."""
    return [x.name for x in mutants if (CUDA / path_of(x.source)).read_text().count(x.old) != 1]


def assert_caught(mutant, groups):
    """Fail unless a group, a function of changed sources, raises with the mutant in its source."""
    path = path_of(mutant.source)
    text = (CUDA / path).read_text()
    assert text.count(mutant.old) == 1, "the text to replace has to be there once"
    with pytest.raises((AssertionError, EmulatorError)):
        groups[mutant.group]({path: text.replace(mutant.old, mutant.new)})


EVERY = 12
"""`make test` plants one of so many, `make proof` all."""


def some_of_them(mutants):
    """Parameters of a test: those that `make test` does not plant are marked."""
    return [
        pytest.param(mutant, id=mutant.name, marks=pytest.mark.long if place % EVERY else ())
        for place, mutant in enumerate(mutants)
    ]


def groups_of(groups, mutants):
    """The same of the groups of calls: `make test` runs those that notice what it plants."""
    asked = {mutant.group for mutant in mutants[::EVERY]}
    return [pytest.param(group, marks=() if group in asked else pytest.mark.long) for group in groups]
