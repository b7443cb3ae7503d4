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
        raise TypeError(refusal(function, f"{name} has to be an array{_way_in(array)}", (name, *came(array))))
    return library


def came(array: Any) -> tuple[str, str]:
    """What an error shows of an argument that is not what it should be: its shape if it has one, and its type."""
    kind = type(array)
    root = kind.__module__.partition(".")[0]
    title = kind.__name__ if root == "builtins" else f"{root}.{kind.__name__}"
    if isinstance(array, (list, tuple)):
        return f"of length {len(array)}", title
    if not isinstance(array, (np.generic, type)):
        try:
            return str(tuple(array.shape)), title
        except Exception:  # there is none, or, of a nested tensor, none that could be said
            pass
    return " ".join(reprlib.repr(array).split()), title


def _way_in(array: Any) -> str:
    """How an array could be made of what is none, for the end of a sentence."""
    kind = type(array)
    if isinstance(array, (list, tuple, memoryview)):
        return f"; numpy.asarray makes one of a {kind.__name__}"
    if isinstance(array, (np.generic, type)):
        return ""
    if hasattr(kind, "__array__") or hasattr(kind, "__array_interface__"):
        return f"; numpy.asarray makes one of a {kind.__name__}"
    if hasattr(kind, "__dlpack__"):
        return f"; numpy.from_dlpack makes one of a {kind.__name__}"
    return "; its toarray() is one" if hasattr(kind, "toarray") else ""


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
