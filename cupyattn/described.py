"""A call as a text that travels inside a compiled program, which may outlive the process that made it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from typing import Any, NamedTuple

from cupyattn.problem import Layout, Mask, Problem, ScoreEdits, Sizes, Spec


class Call(NamedTuple):
    """An attention call, or its gradients, without arrays."""

    function: str
    problem: Problem
    operands: Mapping[str, Spec]
    """In the order in which the arrays come."""
    results: Mapping[str, Spec]
    seed: int = 0
    fixed_split_size: int | None = None
    allowed: tuple[str, ...] | None = None
    """The implementations that may be taken, if not all."""
    known: tuple[str, ...] = ()
    """Of gradients: what comes behind the operands, "dout" and what else the forward pass has left; "" is nothing.
    A call for them has at least one."""


def text_of(call: Call) -> str:
    """What `call_of` understands.

    >>> from cupyattn.problem import *
    >>> sizes = Sizes((1,), 2, 2, 2, 3, 3, 4, 4)
    >>> problem = Problem(sizes, Layout("bshd"), "float32", Mask(right=0), ScoreEdits(0.5))
    >>> call = Call("attention", problem, {"q": Spec("q", (1, 3, 2, 4), "float32")}, problem.results)
    >>> call_of(text_of(call)) == call
    True
    """
    import json  # which takes longer than all else here, and which only programs need

    return json.dumps({**call._asdict(), "problem": asdict(call.problem)})


@lru_cache(maxsize=4096)
def call_of(text: str) -> Call:
    import json

    found = _thawed(json.loads(text))
    parts = found["problem"]
    parts["sizes"], parts["layout"] = Sizes(**parts["sizes"]), Layout(**parts["layout"])
    parts["mask"], parts["edits"] = Mask(**parts["mask"]), ScoreEdits(**parts["edits"])
    for name in ("operands", "results"):
        found[name] = {word: Spec(*spec) for word, spec in found[name].items()}
    return Call(**{**found, "problem": Problem(**parts)})


def _thawed(value: Any) -> Any:
    """JSON has no tuples, and we have no lists."""
    if isinstance(value, list):
        return tuple(map(_thawed, value))
    if isinstance(value, dict):
        return {name: _thawed(x) for name, x in value.items()}
    return value
