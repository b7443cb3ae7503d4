"""A call of a public function as a call of its operator.

torch.compile traces this, so that it is written for that: constants, loops, and nothing that it goes around.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from inspect import Parameter, signature
from typing import Any

import numpy as np

from cupyattn.arrays.defining import define
from cupyattn.arrays.library import NotNow
from cupyattn.arrays.operators import operator_of
from cupyattn.arrays.shapes import Finish
from cupyattn.reading import compute_dtype, known, refusal


def known_before(operator: str) -> tuple[Any, ...]:
    """Constants to torch.compile, which would guard what it found otherwise, and take numbers for variables."""
    found = operator_of(operator)
    define(found)
    parameters = signature(found.function).parameters
    positional = sum(x.kind is Parameter.POSITIONAL_OR_KEYWORD for x in parameters.values())
    arguments = tuple((x.word, x.kind.partition("(")[0], x.part) for x in found.arguments)
    defaults = tuple((word, x.default) for word, x in parameters.items() if x.default is not Parameter.empty)
    return tuple(parameters), defaults, arguments, found.destinations, positional, found.draws


known_before._dynamo_marked_constant = True  # type: ignore[attr-defined]  # what assume_constant_result sets


def record(name: str, finish: Finish, args: tuple[Any, ...], kwargs: Mapping[str, Any], otherwise: Any) -> Any:
    """A call as one of the operator of this name.

    `otherwise` is what torch.compile calls instead, between two graphs; others have an error there.
    """
    import torch

    names, defaults, arguments, destinations, positional, draws = known_before(name)
    values = {**dict(defaults), **dict(zip(names, args, strict=False)), **kwargs}
    in_dynamo = not isinstance(otherwise, NotNow)
    if in_dynamo and (len(args) > positional or len(values) != len(names)):
        return otherwise(*args, **kwargs)
    given: list[Any] = []
    for word, kind, part in arguments:
        value = _part(values[word], kind, part) if word in values else None
        first = _first(values[names[0]])
        if not in_dynamo:
            value = _plain(name, word, kind, value, first)
        elif isinstance(value, np.ndarray) and isinstance(first, torch.Tensor):
            value = torch.as_tensor(value, device=first.device)
        if not _fits(value, kind, in_dynamo and word != "dropout_seed"):  # which may be larger than an operator's
            if in_dynamo:
                return otherwise(*args, **kwargs)
            raise TypeError(refusal(name, f"{word} cannot be recorded", (word, repr(value), type(value).__name__)))
        given.append(value)
    if draws and values["dropout_p"] > 0.0 and values["dropout_seed"] is None:
        given[-1] = torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device="cpu")
    found = getattr(torch.ops.cupyattn, name)(*given)
    wanted = [values[word] for word in destinations]
    if all(x is None for x in wanted):
        results = finish(values, found)
        if not in_dynamo and isinstance(results, tuple) and any(type(x) is int for x in results):
            raise otherwise  # a number of this example's, where no symbols are traced
        return results
    if wanted[-1] is not None and not isinstance(finish(values, found), tuple):
        raise ValueError(refusal(name, f"{destinations[-1]} is for the lse, which has to be asked for"))
    there = [_put(name, word, x, y) for word, x, y in zip(destinations, wanted, found, strict=False)]
    return finish(values, (*there, *found[len(there) :]))


def _put(function: str, word: str, destination: Any, result: Any) -> Any:
    """The result, where the caller wants it; refused as `destinations` does it, where shapes and dtypes suffice."""
    import torch

    if destination is None:
        return result
    if destination.shape != result.shape:
        rule = f"{word} has to have the shape {tuple(result.shape)}"
        raise ValueError(refusal(function, rule, (word, tuple(destination.shape))))
    if destination.dtype != result.dtype:
        rule = f"{word} has to be {str(result.dtype).removeprefix('torch.')}"
        raise TypeError(refusal(function, rule, (word, tuple(destination.shape), str(destination.dtype))))
    if torch.is_grad_enabled() and (result.requires_grad or destination.requires_grad):
        rule = f"{word} cannot be differentiated through, as in torch; call it under torch.no_grad(), or without"
        raise ValueError(refusal(function, rule))
    return destination.copy_(result)


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, (list, tuple)) else value


def _part(value: Any, kind: str, part: str) -> Any:
    """What an operator's argument is of a function's."""
    import torch

    if part == "seed":
        return None
    if part == "number":
        return None if isinstance(value, torch.Tensor) else value
    if part == "mapping":
        return None if value is None else _as_json(value)
    if part == "count":
        return torch.arange(value) if isinstance(value, (int, torch.SymInt)) else value  # type: ignore[arg-type]
    if part == "flag":
        return int(value) if isinstance(value, bool) else value
    if part == "several":
        return list(value) if isinstance(value, tuple) else [value]
    if part == "array":
        return value if isinstance(value, torch.Tensor) else None
    if kind == "str?" and isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if kind == "str?" and isinstance(value, (list, tuple)):
        return ",".join([str(name) for name in value])
    if kind == "SymInt[2]" and isinstance(value, (list, tuple)):
        return [-1 if side is None else side for side in value]
    return value


def _as_json(mapping: Any) -> Any:
    """A mapping as text; as it is, which no operator takes, if it cannot be written so."""
    try:
        return json.dumps(dict(mapping))
    except (TypeError, ValueError):
        return mapping


_as_json._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as above


def _plain(function: str, word: str, kind: str, value: Any, like: Any) -> Any:
    """NumPy's companions as tensors, a dtype as its name, and the number in an array of one."""
    import torch

    if kind.startswith("Tensor"):
        return torch.as_tensor(value, device=like.device) if isinstance(value, np.ndarray) else value
    if word == "compute_dtype":
        return compute_dtype(function, value)
    return [known(function, word, x) for x in value] if isinstance(value, list) else known(function, word, value)


def _fits(value: Any, kind: str, in_dynamo: bool) -> bool:
    """Whether a schema takes it; in torch.compile, whether it is a tensor that means what is in its memory."""
    import torch

    if kind.endswith("?"):
        return value is None or _fits(value, kind[:-1], in_dynamo)
    if kind.startswith("Tensor["):
        return isinstance(value, (list, tuple)) and all(_fits(x, "Tensor", in_dynamo) for x in value)
    if kind == "Tensor":
        plain = type(value) in (torch.Tensor, torch.nn.Parameter) if in_dynamo else True
        return isinstance(value, torch.Tensor) and plain
    if kind == "SymInt[2]":
        return isinstance(value, list) and len(value) == 2 and all(_fits(x, "SymInt", in_dynamo) for x in value)
    if kind == "bool":
        return isinstance(value, bool)
    if kind == "str":
        return isinstance(value, str)
    if isinstance(value, bool):
        return False
    if kind == "float":
        return isinstance(value, (int, float, torch.SymInt, torch.SymFloat))
    # A number that depends on values cannot be compared while it is traced.
    return isinstance(value, torch.SymInt) or (isinstance(value, int) and (in_dynamo or -(2**63) <= value < 2**63))
