"""Numbers, flags and choices of a call, checked one by one: from a Python value, or any library's array of shape ()."""

from __future__ import annotations

import math
import numbers
import operator
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cupyattn.reading.refusals import LARGEST_SIZE, refusal, span


def known(function: str, name: str, value: Any) -> Any:
    """The Python number in an array of shape (), of any library; whatever else came, as it came."""
    if getattr(value, "shape", None) != () or not hasattr(value, "dtype"):
        return value
    kind = dtype_name(getattr(value.dtype, "name", value.dtype))
    start = next((start for start in _CONVERSIONS if kind.startswith(start)), None)
    if start is None:
        return value
    if getattr(value, "requires_grad", False):
        rule = f"{name} requires grad, and no gradient of it is computed: multiply arrays by it, or pass its detach()"
        raise TypeError(refusal(function, rule, (name, kind, type(value).__name__)))
    try:
        return _CONVERSIONS[start](value)
    except Exception:  # traced, under vmap, without memory: each library has an error of its own for that
        rule = f"{name} has to be known now, as it is not under a trace (jit, grad, vmap) or without memory (meta)"
        raise TypeError(refusal(function, f"{rule}; pass a number", (name, kind, type(value).__name__))) from None


_CONVERSIONS: Mapping[str, Callable[[Any], Any]] = {
    "bool": bool,
    "int": operator.index,
    "uint": operator.index,
    "float": float,
    "bfloat": float,
}
"""By how a dtype's name starts."""


def number(function: str, name: str, value: Any, *, rule: str, ok: Callable[[float], bool] = math.isfinite) -> float:
    """A finite real number for which `ok` holds, from a number or an array of shape ()."""
    if type(value) is float and math.isfinite(value) and ok(value):
        return value
    real = value if isinstance(value, numbers.Real) else known(function, name, value)
    if isinstance(real, bool) or not isinstance(real, numbers.Real):
        came = (name, reprlib.repr(value), type(value).__name__)
        raise TypeError(refusal(function, f"{name} has to be a number, or an array of shape () with one", came))
    try:
        result = float(real)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result) or not ok(result):
        raise ValueError(refusal(function, f"{name} has to be {rule}", (name, reprlib.repr(value))))
    return result


def softmax_scale(function: str, name: str, value: Any) -> float | None:
    """The factor of the scores; None: head_dim ** -0.5, once head_dim is known."""
    return None if value is None else number(function, name, value, rule="finite")


def softcap(function: str, value: Any) -> float:
    return number(function, "softcap", value, rule="finite and not negative (0: off)", ok=lambda x: x >= 0)


def dropout_p(function: str, value: Any) -> float:
    return number(function, "dropout_p", value, rule="from 0 to 1", ok=lambda x: 0 <= x <= 1)


def integer(function: str, name: str, value: Any, *, low: int, high: int = LARGEST_SIZE) -> int:
    """An integer, from one of any type or an array of shape ()."""
    whole = value if type(value) is int else known(function, name, value)
    try:
        if isinstance(whole, bool) or getattr(whole, "shape", ()) != ():
            raise TypeError
        result = operator.index(whole)
    except TypeError:
        came = (name, reprlib.repr(value), type(value).__name__)
        raise TypeError(
            refusal(function, f"{name} has to be an integer, or an array of shape () with one", came)
        ) from None
    if not low <= result <= high:
        raise ValueError(refusal(function, f"{name} has to be {span(low, high)}", (name, reprlib.repr(result))))
    return result


def integers(function: str, name: str, values: Sequence[Any], *, high: int = LARGEST_SIZE) -> tuple[int, ...]:
    """Integers that are not negative, of a list or tuple: a shape, or lengths."""
    return tuple([integer(function, f"{name}[{i}]", value, low=0, high=high) for i, value in enumerate(values)])


def is_one_number(value: Any) -> bool:
    """What is for `integer` where an array of many may come as well."""
    return isinstance(value, numbers.Real) or getattr(value, "shape", None) == ()


def flag(function: str, name: str, value: Any) -> bool:
    """True or False, from one of Python or an array of shape ()."""
    if value is True or value is False:
        return bool(value)
    said = known(function, name, value)
    if not isinstance(said, bool):
        raise TypeError(refusal(function, f"{name} has to be True or False", (name, reprlib.repr(value))))
    return said


def choice(function: str, name: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    for option in allowed:
        if value is option:
            return value
    if not (isinstance(value, str) and value in allowed):
        text = ", ".join(repr(option) for option in allowed)
        raise ValueError(refusal(function, f"{name} has to be one of {text}", (name, repr(value))))
    return value


def window(function: str, name: str, value: Any) -> tuple[int | None, int | None]:
    """(left, right) keys around the diagonal; -1 or None: no limit."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(refusal(function, f"{name} has to be a pair (left, right)", (name, repr(value))))
    sides = []
    for side in value:
        size = None if side is None else integer(function, name, side, low=-1)
        sides.append(None if size == -1 else size)
    return sides[0], sides[1]


def compute_dtype(function: str, value: Any) -> str | None:
    """None, "float32" or "float64", from a name or any library's dtype."""
    if value is None:
        return None
    name = "float64" if value is float else dtype_name(value)
    if name not in ("float32", "float64"):
        raise ValueError(
            refusal(function, "compute_dtype has to be 'float64' or 'float32'", ("compute_dtype", repr(value)))
        )
    return name


def dtype_name(value: Any) -> str:
    """The plain name of a dtype, whether given by name, as a type, or as any library's object."""
    return value if isinstance(value, str) else getattr(value, "__name__", None) or str(value).rsplit(".", 1)[-1]


def split_size(function: str, value: Any) -> int | None:
    """Keys of a split of fixed size; None: the planner's choice."""
    return None if value is None else integer(function, "fixed_split_size", value, low=1)


def dropout_seed(function: str, value: Any) -> int | None:
    return None if value is None else integer(function, "dropout_seed", value, low=0, high=2**64 - 1)
