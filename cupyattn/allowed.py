"""Which implementations may be taken: by a call's own word, or by that of the `with` around it."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

from cupyattn.plan import IMPLEMENTATIONS
from cupyattn.problem import Implementation
from cupyattn.reading import in_our_words, refusal

Allowed = tuple[str, ...]
"""Names of implementations in the order in which they are asked: one choice is one key of what is remembered."""

_allowed: ContextVar[Allowed | None] = ContextVar("cupyattn.implementations", default=None)

currently_allowed = _allowed.get
"""Those of the innermost `with` in this thread or task; None: all."""


@in_our_words
def implementations(*names: Implementation) -> AbstractContextManager[None]:
    """Only these implementations may be taken by calls inside: torch's sdpa_kernel, for every function here.

    Parameters
    ----------
    *names : {"numpy", "splitkv", "hopper", "flash"}
        As plans call them: `Plan.kernel` of what `explain` returns.

    Returns
    -------
    context manager
        Also a decorator.  The innermost one counts, and `attention`'s own `implementation` before it.

    Raises
    ------
    ValueError
        No names, or unknown ones.
    TypeError
        A name is not a string.

    Notes
    -----
    Where none of them takes a problem, the call raises NotImplementedError and lists each one's reasons; nothing else
    runs in their place.  Of those that take it, the first in the order above does.

    Gradients on a GPU have kernels of their own, which go by the same names: ``hopper_backward`` (and ``backward`` for
    tiles and arrays that it cannot take) is what "hopper" has, and ``backward`` what "flash" and "splitkv" have.  A
    backward pass goes by what was allowed when its forward pass was called.

    It holds in this thread, or this asyncio task and those that are started inside; a new thread begins without.  What
    jax.jit has traced keeps what held then, and refuses where the program runs and none of them can; it is traced
    wherever that may be, unless there is no device on which any of them could take it.

    Only attention itself is chosen: merging states, rotary embedding and taking new keys into a cache are done in one
    way each.

    Examples
    --------
    >>> import cupyattn
    >>> shape = (1, 1, 32, 128), (1, 8192, 8, 128), (1, 8192, 8, 128)
    >>> with cupyattn.implementations("flash", "hopper"):
    ...     plan = cupyattn.explain(*shape, dtype="bfloat16", device="A100")
    >>> plan.kernel
    'flash'
    """
    if not names:
        rule = f"at least one of {', '.join(IMPLEMENTATIONS)} has to be named"
        raise ValueError(refusal("implementations", rule))
    return _only(_those_named("implementations", "names", names))


@contextmanager
def _only(names: Allowed) -> Iterator[None]:
    token = _allowed.set(names)
    try:
        yield
    finally:
        _allowed.reset(token)


def allowed_by(function: str, implementation: Any) -> Allowed | None:
    """What a call may take: a name or several of its own `implementation`, or what holds around it if that is None."""
    if implementation is None:
        return currently_allowed()
    names = (implementation,) if isinstance(implementation, str) else implementation
    if not isinstance(names, (tuple, list, set, frozenset)):
        rule = "implementation has to be a name, or a tuple of names"
        came = ("implementation", reprlib.repr(implementation), type(implementation).__name__)
        raise TypeError(refusal(function, rule, came))
    if not names:
        rule = f"implementation has to name at least one of {', '.join(IMPLEMENTATIONS)}"
        raise ValueError(refusal(function, rule, ("implementation", repr(implementation))))
    return _those_named(function, "implementation", tuple(names))


def _those_named(function: str, argument: str, names: tuple[Any, ...]) -> Allowed:
    for name in names:
        if not isinstance(name, str):
            came = (argument, reprlib.repr(name), type(name).__name__)
            raise TypeError(refusal(function, f"{argument} have to be strings", came))
        if name not in IMPLEMENTATIONS:
            rule = f"there is no implementation {name!r}; there are {', '.join(IMPLEMENTATIONS)}"
            raise ValueError(refusal(function, rule, (argument, ", ".join(map(repr, names)))))
    return tuple(name for name in IMPLEMENTATIONS if name in names)
