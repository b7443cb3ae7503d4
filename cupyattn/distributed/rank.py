"""What one rank has of a call, wherever its arrays are: rows, keys, and what edits their scores.

Arrays are heads first here: (batch, num_heads, rows, head_dim).
"""

from __future__ import annotations

from typing import Any

from cupyattn.arrays import Arrays
from cupyattn.distributed import verbs
from cupyattn.distributed.asked import Asked
from cupyattn.distributed.rectangles import Rectangle
from cupyattn.problem import Array, Distances
from cupyattn.reading import Options


class OfRank:
    """Views of one rank's arrays, and of what a rectangle needs of them."""

    def __init__(self, asked: Asked, operands: Arrays) -> None:
        self.asked = asked
        self.q, self.k, self.v = (self.heads_first(operands[word]) for word in ("q", "k", "v"))
        self.mask, self.bias = operands.get("mask"), operands.get("bias")
        self.slopes, self.sinks = operands.get("alibi_slopes"), operands.get("sinks")

    @property
    def dtype(self) -> str:
        """Of the arithmetic, and of totals."""
        return self.asked.compute_dtype

    def heads_first(self, array: Array) -> Array:
        """A view of an array of tokens in the caller's layout."""
        if self.asked.packed:
            array = array[None]
        return array.swapaxes(1, 2) if self.asked.options.axes == "bshd" else array

    def as_asked(self, array: Array) -> Array:
        """A view of the same, back again."""
        array = array.swapaxes(1, 2) if self.asked.options.axes == "bshd" else array
        return array[0] if self.asked.packed else array

    def lse_first(self, lse: Array) -> Array:
        return lse[None] if self.asked.packed else lse

    def totals(self) -> Arrays:
        """Zeros, to which gradients are added, in the dtype of the arithmetic."""
        arrays = {"q": self.q, "k": self.k, "v": self.v, "bias": self.bias, "alibi_slopes": self.slopes}
        return {name: verbs.zeros(tuple(x.shape), self.dtype, x) for name, x in arrays.items() if x is not None}

    def attended(self, rectangle: Rectangle, q: Array, k: Array, v: Array) -> tuple[Arrays, Options]:
        """The call of `attention` that a rectangle is."""
        operands = {"q": q[:, :, rectangle.rows], "k": k, "v": v}
        for word, array in (("mask", self.mask), ("bias", self.bias)):
            if array is not None:
                operands[word] = array[self._edited(array, rectangle)]
        if self.slopes is not None:
            per_sequence = self.asked.packed and self.slopes.ndim == 2
            operands["alibi_slopes"] = self.slopes[rectangle.sequence] if per_sequence else self.slopes
        options = self.asked.options._replace(
            axes="bhsd", causal=False, window=rectangle.window, alignment="top-left", needs_lse=True,
            distances=Distances(rectangle.diagonal, rectangle.places.step) if self.slopes is not None else None,
        )  # fmt: skip
        return operands, options

    def add_edits(self, totals: Arrays, found: Arrays, rectangle: Rectangle) -> None:
        """Gradients of what edits the scores of a rectangle, where there are any."""
        if "bias" in found:
            verbs.add(totals["bias"][self._edited(totals["bias"], rectangle)], found["bias"])
        if "alibi_slopes" in found:
            total = totals["alibi_slopes"]
            total = total[rectangle.sequence] if self.asked.packed and total.ndim == 2 else total
            verbs.add(total, found["alibi_slopes"].reshape(total.shape))

    def _edited(self, array: Array, rectangle: Rectangle) -> tuple[Any, ...]:
        """A rectangle's place in an array of this rank's rows and all keys, either of which may be one for all."""
        places = rectangle.places
        rows = rectangle.rows if array.ndim > 1 and array.shape[-2] > 1 else slice(None)
        keys = slice(places.start, places.stop, places.step) if array.shape[-1] > 1 else slice(None)
        return (..., rows, keys) if array.ndim > 1 else (keys,)
