"""Public functions as operators: what a graph calls that was recorded, said so that `defining` can tell torch.

An operator has the name and the arguments of its function, and always gives all results.  Its schema is read off the
function's signature, so that an argument more is an argument of the operator, too.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, NamedTuple

from cupyattn.arrays.calling import DECLARED, beside_dynamo
from cupyattn.arrays.outlines import ValuesAsked, outline
from cupyattn.arrays.shapes import Results, Values

KINDS = {
    "Array": "Tensor",
    "Array | None": "Tensor?",
    "A": "Tensor",
    "A | None": "Tensor?",
    "Sequence[A]": "Tensor[]",
    "Array | tuple[Array, Array]": "Tensor[]",
    "bool": "bool",
    "bool | None": "bool?",
    "int | bool": "SymInt",
    "float": "float",
    "float | None": "float?",
    "int": "SymInt",
    "int | None": "SymInt?",
    "Array | int": "Tensor",
    "int | Array": "Tensor?",
    "int | Array | None": "Tensor?",
    "Alignment | None": "str?",
    "Implementation | Collection[Implementation] | None": "str?",
    "Axes": "str",
    "Rule": "str",
    "Mapping[str, Any] | None": "str?",
    "Literal['bshd', 'bhsd']": "str",
    "Any": "str?",
    "tuple[int | None, int | None]": "SymInt[2]",
}
"""How a schema says what an annotation says: a compute_dtype, which may be anything, by its name, several names as
one, with commas, and a mapping as JSON."""


class Argument(NamedTuple):
    """One of an operator's."""

    word: str
    """Of the function's."""
    kind: str
    """In the words of schemas."""
    default: Any = inspect.Parameter.empty
    part: str = ""
    """ "array" or "number" where the function takes either, "several" where it takes an array or a pair, "flag" where a
    number may be a bool, "count" where one stands for all before it, "mapping", "seed" for one that was drawn."""

    @property
    def name(self) -> str:
        return {"number": f"{self.word}_number", "seed": "seed"}.get(self.part, self.word)

    @property
    def holds_tensors(self) -> bool:
        return self.kind.startswith("Tensor")

    @property
    def declared(self) -> str:
        shown = f"{self.kind} {self.name}"
        if self.default is inspect.Parameter.empty:
            return shown
        return f'{shown}="{self.default}"' if isinstance(self.default, str) else f"{shown}={self.default}"


@dataclass(eq=False)
class Operator:
    """A public function, and what has to be known of it besides."""

    function: Callable[..., Any]
    results: Results
    gives: tuple[str, ...]
    """Names of its results; none if their number depends on what it is given, as that of gradients does."""
    always: Mapping[str, Any] = field(default_factory=dict)
    """Arguments with which the function is called in any case, and that the operator does not have."""
    destinations: tuple[str, ...] = ()
    """Arguments that the caller wants results in, in their order: they are copied there, once the operator is done."""
    overwrites: tuple[str, ...] = ()
    """Arguments that are written to."""
    is_one_job: bool = True
    """The function hands its arrays over once, and gives back what comes: its backward needs no values of results."""
    has_gradients: bool = True
    no_gradients: str = ""
    """What to say where gradients are wanted and there are none."""
    smooth: int = 2
    """So many results have gradients, the first ones."""
    casts_inside: bool = False
    """Under torch.autocast it is told so, and its function casts what it casts by itself: not all that is like q."""
    title: str = ""
    """Its name, if another one has its function's."""

    @property
    def name(self) -> str:
        return self.title or self.function.__name__

    @property
    def draws(self) -> bool:
        """A seed of dropout comes along as a tensor, drawn where the call is recorded."""
        return self.has_gradients and "dropout_seed" in inspect.signature(self.function).parameters

    @cached_property
    def arguments(self) -> tuple[Argument, ...]:
        found = []
        for word, parameter in inspect.signature(self.function).parameters.items():
            if word in self.always or word in self.destinations:
                continue
            kind = KINDS[str(parameter.annotation).replace('"', "'")]
            if word in self.overwrites:
                kind = f"Tensor({'ab'[self.overwrites.index(word)]}!)"
            default = [-1, -1] if kind == "SymInt[2]" else parameter.default
            if "int | Array" in str(parameter.annotation):
                found += [Argument(word, kind, None, "array"), Argument(word, "SymInt?", default, "number")]
            else:
                found.append(Argument(word, kind, default, _part_of(str(parameter.annotation))))
        seed = [Argument("dropout_seed", "Tensor?", None, "seed")] if self.draws else []
        autocast = [Argument("autocast", "str?", None, "autocast")] if self.casts_inside else []
        return (*found, *seed, *autocast)

    @property
    def schema(self) -> str:
        given = ", ".join(argument.declared for argument in self.arguments)
        taken = "(" + ", ".join(f"Tensor {name}" for name in self.gives) + ")" if self.gives else "Tensor[]"
        return f"({given}) -> {taken}"

    def named(self, args: Sequence[Any]) -> dict[str, Any]:
        """All arguments by name; torch leaves out those at the end that are what they are by default."""
        rest = self.arguments[len(args) :]
        return dict(zip((x.name for x in self.arguments), (*args, *(x.default for x in rest)), strict=True))

    def asked(self, values: Values) -> dict[str, Any]:
        """The same as the function is asked."""
        found = dict(self.always)
        for argument in self.arguments:
            value = values[argument.name]
            if argument.part == "autocast":
                continue
            if argument.part == "seed" and value is not None:
                value = int(value)
            if argument.part == "several":
                value = tuple(value) if len(value) > 1 else value[0]
            if argument.part == "mapping" and value is not None:
                value = json.loads(value)
            if argument.word == "implementation" and value is not None:
                value = tuple(value.split(","))
            if argument.part not in ("array", "number", "several", "seed") or (
                value is not None and found.get(argument.word) is None
            ):
                found[argument.word] = tuple(value) if argument.kind == "SymInt[2]" else value
        return found

    def run(self, values: Values) -> list[Any]:
        """Its results: all of them, and each of them a tensor; a number is the length of one."""
        with _under(values.get("autocast"), values[self.arguments[0].name]):
            found = beside_dynamo(self.function)(**self.asked(values))
        given = [x for x in (found if isinstance(found, (tuple, list)) else (found,)) if x is not None]
        tensors = [given[0].new_zeros(x) if isinstance(x, int) else x for x in given]
        return [*tensors, *(tensors[0].new_empty(0) for _ in self.gives[len(tensors) :])]

    def refuse(self, values: Values) -> None:
        """Raise what the function raises of such shapes, dtypes and options, if they are known."""
        import torch
        from torch.utils._python_dispatch import _disable_current_modes

        with _disable_current_modes():
            try:
                outlines = {name: 0 if name == "seed" else _as_known(value) for name, value in values.items()}
                self.function(**self.asked(outlines))
            except (_Unknown, ValuesAsked):
                return
            except NotImplementedError:  # of implementations, and an outline has those of the CPU
                if all(x.device.type == "cpu" for x in values.values() if isinstance(x, torch.Tensor)):
                    raise


@cache
def operator_of(name: str) -> Operator:
    """The one of this name, of a public function that has been imported."""
    function, results, gives, traits = DECLARED[name]
    return Operator(function, results, gives, **traits)


def _under(dtype: str | None, like: Any) -> AbstractContextManager[Any]:
    """torch.autocast to a dtype, on the device of a tensor; nothing if that is None."""
    if dtype is None:
        return nullcontext()
    torch = sys.modules["torch"]
    return torch.autocast(like.device.type, dtype=getattr(torch, dtype))  # type: ignore[no-any-return]


def _part_of(annotation: str) -> str:
    known = {"int | bool": "flag", "Array | int": "count", "Mapping[str, Any] | None": "mapping"}
    return "several" if "tuple[Array" in annotation else known.get(annotation, "")


class _Unknown(Exception):
    """The size of something depends on values."""


def _as_known(value: Any) -> Any:
    """An outline of a tensor, the number that a symbol stands for in this example."""
    import torch

    if isinstance(value, torch.Tensor):
        sizes, strides = (tuple(map(_as_known, x)) for x in (value.shape, value.stride()))
        return outline(sizes, strides, value.dtype)
    if isinstance(value, (list, tuple)):
        return type(value)(map(_as_known, value))
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        if not value.node.has_hint():
            raise _Unknown
        hint = value.node.hint
        return int(hint) if isinstance(value, torch.SymInt) else float(hint)
    return value
