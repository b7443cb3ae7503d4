"""How a public function is called: around torch.compile, and refusing unknown keywords in our words.

torch.compile would otherwise trace into NumPy.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec, TypeVar, cast

from cupyattn.reading import unknown_words

P = ParamSpec("P")
R = TypeVar("R")


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """Keep torch.compile from tracing into NumPy: it calls the function as it is, between two graphs."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            if "torch._dynamo" not in sys.modules:
                return function(*args, **kwargs)
            if function not in _beside_dynamo:
                _beside_dynamo[function] = sys.modules["torch"].compiler.disable(function)
            return cast(R, _beside_dynamo[function](*args, **kwargs))
        except TypeError:
            if words := _unknown_words(function, args, kwargs):
                raise TypeError(words) from None
            raise

    call._torchdynamo_disable = True  # type: ignore[attr-defined]  # what torch.compiler.disable sets
    return call


def _unknown_words(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """What to say of keywords that a function or method does not have; nothing if it has them all."""
    name, words = function.__name__, list(signature(function).parameters)
    strangers = [word for word in kwargs if word not in words]
    if words[0] == "self":
        name, words = f"{type(args[0]).__name__ if args else 'Cache'}.{name}", words[1:]
    return unknown_words(name, strangers, words) if strangers else ""


_beside_dynamo: dict[Callable[..., Any], Callable[..., Any]] = {}
