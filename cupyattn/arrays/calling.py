"""Public functions as they are called: beside torch.compile, and as what they are operators, once somebody asks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from cupyattn.arrays.shapes import Results


class Declared(NamedTuple):
    """What `Operator` is made of."""

    function: Callable[..., Any]
    results: Results
    gives: tuple[str, ...]
    traits: dict[str, Any]


DECLARED: dict[str, Declared] = {}
"""Of all public functions that have been imported, by the names of their operators."""


def declare(function: Callable[..., Any], results: Results, gives: tuple[str, ...], traits: dict[str, Any]) -> str:
    """Note down an operator, for whoever makes a graph; its name."""
    name = str(traits.get("title") or function.__name__)
    DECLARED[name] = Declared(function, results, gives, traits)
    return name


def beside_dynamo(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, into which torch.compile does not look."""
    if "torch._dynamo" not in sys.modules:
        return function
    if function not in _BESIDE_DYNAMO:
        _BESIDE_DYNAMO[function] = sys.modules["torch"].compiler.disable(function)
    return _BESIDE_DYNAMO[function]


_BESIDE_DYNAMO: dict[Callable[..., Any], Callable[..., Any]] = {}
