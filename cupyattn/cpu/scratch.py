"""Memory that is used again: fresh pages from the system cost more than the arithmetic of a small block."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

LARGEST_KEPT = 32 * 2**20
"""Bytes of one scratch that are kept between calls."""
MOST_SPARE = os.cpu_count() or 1
MOST_VIEWS = 256


class Scratch:
    """Named arrays of one worker; each name has one buffer, which grows to the largest array asked for."""

    def __init__(self) -> None:
        self._buffers: dict[str, Array] = {}
        self.views: dict[tuple[str, tuple[int, ...], Any], Array] = {}
        self.nbytes = 0

    def array(self, name: str, shape: tuple[int, ...], dtype: Any) -> Array:
        """Uninitialised memory, valid until the same name is asked for again."""
        key = (name, shape, dtype)
        view = self.views.get(key)
        if view is None:
            size = math.prod(shape) * np.dtype(dtype).itemsize
            buffer = self._buffers.get(name)
            if buffer is None or buffer.nbytes < size:
                buffer = self._buffers[name] = np.empty(-(-size // 64) * 64, np.uint8)
                self.views = {key: view for key, view in self.views.items() if key[0] != name}
                self.nbytes = sum(each.nbytes for each in self._buffers.values())
            view = self.views[key] = buffer[:size].view(dtype).reshape(shape)
        return view


class Shelf:
    """Scratches between calls; a worker takes one and puts it back."""

    def __init__(self) -> None:
        self._spare: list[Scratch] = []

    def take(self) -> Scratch:
        try:
            return self._spare.pop()
        except IndexError:
            return Scratch()

    def put_back(self, scratch: Scratch) -> None:
        if len(self._spare) < MOST_SPARE and scratch.nbytes <= LARGEST_KEPT and len(scratch.views) < MOST_VIEWS:
            self._spare.append(scratch)
