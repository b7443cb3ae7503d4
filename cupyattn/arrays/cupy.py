"""CuPy's arrays, which are on a GPU; CuPy itself is never imported here."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np

from cupyattn.arrays.library import Library, check_no_overlap
from cupyattn.problem import Array


class CuPy(Library):
    title = "cupy.ndarray"

    def place(self, array: Any) -> tuple[str, Any]:
        return "cuda", array.device

    def surroundings(self, array: Any) -> Hashable | None:
        return ()

    def glance(self, array: Any) -> tuple[Hashable, int] | None:
        data = array.data
        address = data.ptr
        return (array.shape, array.strides, array.dtype, address & 15 == 0, data.device_id), address

    def places(self, pairs: Array, like: Any) -> Any:
        return tuple(self.index(pairs, like))

    def scatter(self, array: Any, places: Any, values: Any) -> Any:
        array[places] = values
        return array

    def values(self, array: Any) -> Array:
        return np.asarray(array.get())

    def check_writable(self, function: str, name: str, array: Any) -> None:
        check_no_overlap(function, name, array.shape, array.strides, array.itemsize)

    def check_in_place(self, function: str, name: str, array: Any) -> None:
        """Kernels write to the array's own memory."""


CUPY = CuPy()
