"""Where a caller wants results to be: checked before anything is computed, written to once everything is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cupyattn.arrays.library import Arrays
from cupyattn.arrays.recognition import library_of
from cupyattn.arrays.visit import Visit
from cupyattn.problem import ITEMSIZE, Array, Shape, Spec
from cupyattn.reading import refusal

Destinations = Mapping[str, tuple[str, Any]]
"""{our word for the result: (the caller's name for the array, the array)}"""
NOWHERE: Destinations = {}
MOST_WORK: Any = 10**6
"""Steps that NumPy may take to tell whether two arrays have an element in common: some milliseconds."""


def destinations_of(
    function: str, out: Any, lse_out: Any, needs_lse: bool, asking: str = "return_lse=True"
) -> Destinations:
    """Those of a call, which asks for an lse by saying `asking`."""
    if out is None and lse_out is None:
        return NOWHERE
    if lse_out is not None and not needs_lse:
        raise ValueError(refusal(function, f"lse_out is for the lse, which is asked for by {asking}"))
    given = {"out": ("out", out), "lse": ("lse_out", lse_out)}
    return {word: entry for word, entry in given.items() if entry[1] is not None}


def check_destinations(visit: Visit, into: Destinations, results: Mapping[str, Spec]) -> None:
    """Refuse arrays that the results do not fit into, that cannot be written to, or that share memory.

    Raises
    ------
    TypeError
        An array is not of the operands' library, or of the result's dtype, or its library's arrays are immutable.
    ValueError
        It has another shape, is on another device, is read-only, overlaps an operand, another result or itself; or
        gradients could be asked for.
    """
    function, library = visit.function, visit.library
    for word, (name, array) in into.items():
        if library_of(function, name, array) is not library:
            came = (name, f"{type(array).__module__.partition('.')[0]}.{type(array).__name__}")
            raise TypeError(refusal(function, f"{name} has to be of the operands' library, {library.title}", came))
        _check_fit(visit, name, array, results[word])
    if library.differentiates({**visit.arrays, **{word: array for word, (_, array) in into.items()}}):
        names = " and ".join(name for name, _ in into.values())
        rule = f"{names} cannot be differentiated through, as in torch; call it under torch.no_grad(), or without"
        raise ValueError(refusal(function, f"{rule}, and outside of torch.func's transforms"))
    for name, array in into.values():
        library.check_writable(function, name, array)
        if not hasattr(type(array), "__setitem__"):
            raise TypeError(refusal(function, f"{name} cannot be written to: {library.title} is immutable"))
    _check_apart(visit, into, results)


def _check_fit(visit: Visit, name: str, array: Any, result: Spec) -> None:
    function, library = visit.function, visit.library
    if objection := library.refuses(array):
        raise TypeError(refusal(function, f"{name} {objection}", (name, type(array).__name__)))
    shape, dtype = library.shape(array), library.dtype(array)
    if shape != result.shape:
        raise ValueError(refusal(function, f"{name} has to have the shape {result.shape}", (name, shape)))
    if dtype != result.dtype:
        raise TypeError(refusal(function, f"{name} has to be {result.dtype}", (name, shape, dtype)))
    place, there = (library.place(x) for x in (array, next(iter(visit.arrays.values()))))
    if place != there and "traced" not in (place[1], there[1]):
        rule = f"{name} has to be on the operands' device, {there[1]}"
        raise ValueError(refusal(function, rule, (name, place[1])))


def _check_apart(visit: Visit, into: Destinations, results: Mapping[str, Spec]) -> None:
    """Refuse a result that lies where an operand does, or another result.

    A kernel writes to it while others of its blocks read; and what an overlap means is nobody's wish.
    """
    specs = dict(visit.specs)
    own = {word: results[word]._replace(name=name) for word, (name, _) in into.items()}
    theirs = {f"into {word}": array for word, (_, array) in into.items()}
    memory = _memory(visit, {**visit.arrays, **theirs}, {**specs, **{f"into {word}": own[word] for word in own}})
    names = list(own)
    for i, word in enumerate(names):
        for other in (*visit.arrays, *(f"into {name}" for name in names[:i])):
            if _share(memory[f"into {word}"], memory[other]):
                spec = specs.get(other) or own[other.removeprefix("into ")]
                rule = f"{own[word].name} shares memory with {spec.name}"
                shown = ((x.name, x.shape) for x in (own[word], spec))
                raise ValueError(refusal(visit.function, rule, *shown))


def _memory(visit: Visit, arrays: Arrays, specs: Mapping[str, Spec]) -> dict[str, Array]:
    """Where arrays lie, as NumPy's, which on a GPU nobody may look into."""
    if visit.kind == "cpu":
        return {word: visit.library.to_numpy(array) for word, array in arrays.items()}
    from cupyattn import cuda

    views = cuda.views(visit.library.title, arrays, specs)
    sizes = {"bool": 1, "int32": 4, **ITEMSIZE}
    return {
        word: np.asarray(_Elsewhere(view.pointer, view.shape, view.strides, sizes[view.dtype]))
        for word, view in views.items()
    }


def check_pair_apart(visits: Sequence[Visit], word: str, arrays: Sequence[Any]) -> None:
    """Refuse to overwrite two arrays, by the same word of two visits, that have an element in common.

    Where arrays have no values they have no memory either, and nothing is found out.
    """
    one, other = visits
    if one.kind != other.kind or any(x.library.has_no_values(y) for x, y in zip(visits, arrays, strict=True)):
        return
    specs = [dict(visit.specs)[word] for visit in visits]
    there = [
        _memory(visit, {word: array}, {word: spec})[word]
        for visit, array, spec in zip(visits, arrays, specs, strict=True)
    ]
    if _share(*there):
        rule = f"{specs[0].name} shares memory with {specs[1].name}, and both were to be overwritten"
        raise ValueError(refusal(one.function, rule, *((spec.name, spec.shape) for spec in specs)))


class _Elsewhere:
    """Memory of a GPU, by address."""

    def __init__(self, address: int, shape: Shape, steps: tuple[int, ...], itemsize: int) -> None:
        self.__array_interface__ = {
            "version": 3,
            "typestr": f"|V{itemsize}",
            "data": (address, True),
            "shape": shape,
            "strides": tuple(step * itemsize for step in steps),
        }


def _share(one: Array, other: Array) -> bool:
    """Whether two arrays have an element in common; where that cannot be told in time, yes."""
    try:
        return bool(np.shares_memory(one, other, max_work=MOST_WORK))
    except np.exceptions.TooHardError:
        return True


def put(visit: Visit, found: Arrays, into: Destinations) -> Arrays:
    """The results, those that have a destination there, and the array itself in their place."""
    for word, (name, array) in into.items():
        if found[word] is array:
            visit.library.note_overwritten(array)
        else:
            visit.library.write(visit.function, name, array, found[word])
    return {**found, **{word: array for word, (_, array) in into.items()}}
