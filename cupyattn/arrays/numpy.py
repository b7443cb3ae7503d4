"""NumPy's arrays: what everything is computed with, so that nothing has to be converted."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from cupyattn.arrays.library import (
    Arrays,
    Job,
    Library,
    bits_of,
    check_no_overlap,
    dtype_of_result,
    model_of,
    name_of,
)
from cupyattn.problem import Array
from cupyattn.reading import refusal


class NumPy(Library):
    title = "numpy.ndarray"

    def dtype(self, array: Any) -> str:
        return name_of(array.dtype)

    def place(self, array: Any) -> tuple[str, Any]:
        return "cpu", "cpu"

    def refuses(self, array: Any) -> str | None:
        kind: Any = type(array)
        return None if kind is np.ndarray else _way_of_its_own(kind)

    def to_numpy(self, array: Any) -> Array:
        return bits_of(np.asarray(array))

    def from_numpy(self, array: Array, dtype: str, like: Any) -> Any:
        return array.view(dtype_of_result(dtype, like.dtype)) if dtype == "bfloat16" else array

    def places(self, pairs: Array, like: Any) -> Any:
        return tuple(pairs)

    def scatter(self, array: Any, places: Any, values: Any) -> Any:
        array[places] = values
        return array

    def check_writable(self, function: str, name: str, array: Any) -> None:
        if not array.flags.writeable:
            raise ValueError(refusal(function, f"{name} is read-only and was to be overwritten", (name, array.shape)))
        check_no_overlap(function, name, array.shape, array.strides, array.itemsize)

    def run(self, job: Job, arrays: Arrays) -> Arrays:
        """A result has the byte order of the array it resembles; lse, which resembles none, the machine's."""
        found = super().run(job, arrays)
        for name, result in found.items():
            like = model_of(name, arrays).dtype
            if name != "lse" and not like.isnative and name_of(like) == name_of(result.dtype):
                found[name] = result.astype(like, copy=False)
        return found


@cache
def _way_of_its_own(kind: Any) -> str | None:
    """What to say of a subclass whose numbers mean something that its memory does not say; None of another."""
    name = kind.__name__
    if issubclass(kind, (np.matrix, np.ma.MaskedArray)):
        return f"is a {name}; pass a plain array, and a mask as mask"
    for word in ("__array_ufunc__", "__array_function__", "__array_finalize__", "__array_wrap__"):
        if getattr(kind, word) not in [getattr(known, word) for known in (np.ndarray, np.memmap, np.recarray)]:
            return f"is a {name}, which says by {word} what it means; pass numpy.asarray of it, a plain array"
    return None


NUMPY = NumPy()
