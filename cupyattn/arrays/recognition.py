"""Whose an object is: its array library by its type, and what has shape and dtype but is no array.

A library is recognised only if the caller has imported it.
"""

from __future__ import annotations

import reprlib
import sys
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np

from cupyattn.arrays.library import Library
from cupyattn.arrays.numpy import NUMPY
from cupyattn.problem import Alignment, Shape
from cupyattn.reading import refusal

OTHER = Library()
"""Any that follows the array API."""


def library_of(function: str, name: str, array: Any) -> Library:
    """The library an argument belongs to.

    Raises
    ------
    TypeError
        It is not an array.
    """
    library = library_of_type(type(array))  # type: ignore[arg-type]
    if library is None:
        rule, shown = f"{name} has to be an array", reprlib.repr(array)
        if isinstance(array, (list, tuple)):
            rule, shown = f"{rule}; numpy.asarray makes one of a {type(array).__name__}", f"of length {len(array)}"
        raise TypeError(refusal(function, rule, (name, shown, type(array).__name__)))
    return library


@cache
def library_of_type(kind: Any) -> Library | None:
    """The library a type belongs to; None if its objects are not arrays."""
    if issubclass(kind, np.ndarray):
        return NUMPY
    family = type.mro(kind)
    roots = {base.__module__.partition(".")[0] for base in family}
    for root, name, room in _ROOMS:
        if root in roots and any(base.__name__ == name for base in family):
            return _library_in(room)
    if not hasattr(kind, "__array_namespace__") or issubclass(kind, np.generic):
        return None
    return _library_in("jax") if "jax" in sys.modules and (roots & {"jax", "jaxlib"}) else OTHER


_ROOMS = (
    ("cupyattn", "Outline", "outlines"),
    ("cupyattn", "Sketch", "sketches"),
    ("torch", "Tensor", "torch"),
    ("dask", "Array", "dask"),
    ("cupy", "ndarray", "cupy"),
)
"""The root of a type's module, its name, and in which room its library is."""


def _library_in(room: str) -> Library:
    """That of a room, which is imported when the first of its arrays comes."""
    library: Library = getattr(import_module(f"cupyattn.arrays.{room}"), room.upper())
    return library


def alignment_meant(mask: Any) -> tuple[Alignment, Shape] | None:
    """Of a mask that says "causal" and has no values: where the diagonal lies, and between what lengths."""
    library = library_of_type(type(mask))  # type: ignore[arg-type]
    return None if library is None else library.alignment_meant(mask)


def described(array: Any) -> tuple[Shape, str] | None:
    """Shape and dtype of what has these and no values; None for arrays, and for anything else.

    A jax.ShapeDtypeStruct, a tensor that is fake or on the meta device, any object with a shape and a dtype.
    """
    library = library_of_type(type(array))  # type: ignore[arg-type]
    if library is None:
        is_one = isinstance(getattr(array, "shape", None), tuple) and hasattr(array, "dtype")
        is_one = is_one and not isinstance(array, np.generic)
    else:
        is_one = library.has_no_values(array)
    library = library or OTHER
    return (library.shape(array), library.dtype(array)) if is_one else None
