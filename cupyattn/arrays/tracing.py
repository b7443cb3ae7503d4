"""How a public function is called: as it is, or recorded as an operator where others write down what is done.

A call is recorded where torch.compile or torch.export traces, under torch.jit.trace and make_fx, and where tensors have
no values.  An eager call finds out nothing about all that: a function is called as it is, and says by an error of its
own that it cannot be.  Arguments that it does not take are refused in our words.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec, TypeVar, cast

from cupyattn.arrays.calling import DECLARED, beside_dynamo, declare
from cupyattn.arrays.library import NotNow
from cupyattn.arrays.shapes import Finish, Results
from cupyattn.reading import wrong_call

P = ParamSpec("P")
R = TypeVar("R")


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """Keep torch.compile from tracing into NumPy: it calls the function as it is, between two graphs."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return cast(R, _as_it_is(function, args, kwargs))

    call._torchdynamo_disable = True  # type: ignore[attr-defined]  # what torch.compiler.disable sets, as the next
    if next(iter(signature(function).parameters), "") == "self":
        call._torchdynamo_disable_msg = _OF_A_CACHE  # type: ignore[attr-defined]
    return call


_OF_A_CACHE = (
    "a cache keeps its lengths and where its tokens are in Python, which no graph does: it is called between two "
    "graphs. In one graph flash_attn_with_kvcache takes the same steps, over the caller's k_cache and v_cache, "
    "(batch, capacity, num_heads_kv, head_dim), and his cache_seqlens, a tensor of int32 to which each step adds"
)


def recorded(
    results: Results, gives: tuple[str, ...], finish: Finish, **traits: Any
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A public function that is an operator of torch where a graph is made; the arguments are `Operator`'s."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        name, around = declare(function, results, gives, traits), untraced(function)

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if _has_dynamo():
                import torch

                if torch.compiler.is_dynamo_compiling():
                    from cupyattn.arrays.recording import record

                    return cast(R, record(name, finish, args, kwargs, around))
            try:
                return cast(R, _as_it_is(function, args, kwargs))
            except NotNow as error:
                from cupyattn.arrays.recording import record

                return cast(R, record(name, finish, args, kwargs, error))

        return call

    return decorate


def _has_dynamo() -> bool:
    return "torch._dynamo" in sys.modules


# What assume_constant_result sets: torch.compile would walk through all of sys.modules, and what it touches there may
# import more meanwhile.
_has_dynamo._dynamo_marked_constant = True  # type: ignore[attr-defined]


def define_operators() -> None:
    """Those of all public functions that have been imported; each is defined by itself where it is first recorded."""
    from cupyattn.arrays.defining import define
    from cupyattn.arrays.operators import operator_of

    for name in tuple(DECLARED):
        define(operator_of(name))


def _as_it_is(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    try:
        return beside_dynamo(function)(*args, **kwargs)
    except TypeError:
        if text := wrong_call(function, args, kwargs):
            raise TypeError(text) from None
        raise
