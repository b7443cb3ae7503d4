"""Where a cache lies, and which of its tokens share bytes with tokens of another.

Both caches of a call may be views of one buffer.  What is written to one may then be memory of the other, which is
told here from addresses and strides alone, on the CPU and on a GPU alike.
"""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import numpy as np

from cupyattn.problem import ITEMSIZE, Array, Shape

Pages = tuple[Array, Array]
"""Of some places: the page of each, or its sequence of a cache without pages, and its slot there."""


class Memory(NamedTuple):
    """Where a cache lies: the address of its first number, and bytes from step to step along each axis."""

    address: int
    shape: Shape
    strides: tuple[int, ...]
    itemsize: int

    @classmethod
    def of(cls, array: Array) -> Memory:
        return cls(array.__array_interface__["data"][0], array.shape, array.strides, array.itemsize)

    @classmethod
    def of_view(cls, address: int, shape: Shape, steps: tuple[int, ...], dtype: str) -> Memory:
        """From steps in numbers, as the GPU's kernels have them."""
        item = ITEMSIZE[dtype]
        return cls(address, shape, tuple(step * item for step in steps), item)

    @property
    def lowest(self) -> int:
        return self.address + sum((size - 1) * min(0, step) for size, step in self._steps())

    @property
    def reach(self) -> int:
        """Bytes from the lowest one to the end."""
        return self.itemsize + sum((size - 1) * abs(step) for size, step in self._steps())

    def _steps(self) -> list[tuple[int, int]]:
        return list(zip(self.shape, self.strides, strict=True))

    def is_near(self, other: Memory) -> bool:
        """One lies in the other's bounds, or reaches into them."""
        if 0 in self.shape or 0 in other.shape:
            return False
        return self.lowest < other.lowest + other.reach and other.lowest < self.lowest + self.reach

    def piece(self) -> int:
        """Bytes of a token that lie together, in order."""
        length = self.itemsize
        for size, step in reversed(self._steps()[2:]):
            if size > 1 and step != length:
                break
            length *= size
        return length

    def pieces(self, places: Pages, length: int) -> Array:
        """The addresses of all pieces, of so many bytes, of the tokens at some places."""
        (_, page_step), (_, slot_step), (heads, head_step), (dim, step) = self._steps()
        within = np.add.outer(np.arange(heads) * head_step, np.arange(dim) * step).ravel()[:: length // self.itemsize]
        page, slot = places
        return np.add.outer(self.address + page.astype(np.int64) * page_step + slot * slot_step, within).ravel()

    def places(self, addresses: Array) -> Pages | None:
        """Those of the tokens that have a byte at one of the addresses; None: steps do not nest, and nobody can say."""
        offset = addresses - self.lowest
        inside = (offset >= 0) & (offset < self.reach)
        offset = offset[inside]
        found = {0: np.zeros_like(offset), 1: np.zeros_like(offset)}
        reach, held = self.reach, np.ones(offset.size, bool)
        for axis, (size, step) in sorted(enumerate(self._steps()), key=lambda entry: -abs(entry[1][1])):
            if size > 1:
                reach -= (size - 1) * abs(step)
                if abs(step) < reach:
                    return None
                index, offset = np.divmod(offset, abs(step))
                held &= index < size
                found[axis] = index if step > 0 else size - 1 - index
        held &= offset < self.itemsize
        return found[0][held], found[1][held]


def touched(one: Memory, places: Pages, other: Memory) -> Pages | None:
    """The tokens of `other` that share bytes with those of `one` at some places; None where `Memory.places` is."""
    length = gcd(one.piece(), other.piece())
    pieces = one.pieces(places, length)
    # pieces are as long in both: where two of them meet, an end of one lies in the other
    return other.places(np.concatenate([pieces, pieces + (length - 1)]))
