"""States of attention merged step by step on a GPU: `RunningState`, in float32, by ``merge.cu``."""

from __future__ import annotations

import math
from typing import Any

from cupyattn.cuda.launching import params, states
from cupyattn.cuda.launching.launch import record_of
from cupyattn.cuda.launching.memory import CuPyMemory
from cupyattn.cuda.launching.recipe import Recipe
from cupyattn.cuda.launching.states import Rows, running
from cupyattn.cuda.making.module import Launch, kernel
from cupyattn.problem import Spec

LOG2E = 1.0 / math.log(2.0)
"""``merge.cu`` knows a row by a power of two."""


class RunningState:
    """What rows have come to over the keys that were attended so far.  Everything is queued on the current stream.

    Each row has two places in memory, and ``merge.cu`` merges what is put into the second into the first, in float32:
    a warp reads a row before it writes it.

    Parameters
    ----------
    memory : CuPyMemory
        Whose arrays they are.
    index : int
        The CUDA ordinal of the device.
    batch, num_heads, count, head_dim_v : int
        Of the rows.
    like : array
        Of the library, on the device.
    """

    def __init__(
        self, memory: CuPyMemory, index: int, batch: int, num_heads: int, count: int, head_dim_v: int, like: Any
    ) -> None:
        self.memory, self.index, self._like = memory, index, like
        self.rows = Rows(batch, num_heads, count, count, head_dim_v)
        lead = (batch, num_heads)
        self._out = memory.empty((*lead, states.PLACES, count, self.rows.columns), "float32", like)
        self._sums = memory.empty((*lead, states.PLACES, count, 2), "float32", like)
        self._lse = memory.empty((*lead, count), "float32", like)
        self._told = memory.empty((*lead, states.PLACES), "int32", like)
        memory.zero(self._out)  # a weight of 0 is no use where memory holds nan
        memory.write(self._sums[..., 0], -math.inf)
        memory.write(self._sums[..., 1], 1.0)
        memory.write(self._lse, -math.inf)
        memory.write(self._told, states.TOLD)

    def merge(self, rows: slice, out: Any, lse: Any) -> None:
        """Merge in what some rows, evenly spaced, found in other keys: heads first, lse in float32.

        Twin: `numpy_ref.merge`, but that a value which is not finite counts however little it weighs.
        """
        first, last = rows.start, rows.stop
        if rows.step != 1:  # those in between find nothing
            self._clear(slice(first, last))
        memory, columns = self.memory, self.rows.head_dim_v
        memory.write(self._out[:, :, 1, rows, :columns], out)
        memory.write(self._sums[:, :, 1, rows, 0], lse, LOG2E)
        own = self.rows._replace(merged=len(range(first, min(last, self.rows.room))))
        self._launch(states.recipe_of(own, "float32", *running(own)), first, self._out, self._lse, None)
        here = slice(first, first + own.merged)
        memory.write(self._sums[:, :, 0, here, 0], self._lse[:, :, here], LOG2E)

    def rounded(self, spec: Spec, axes: str, sinks: Any) -> tuple[Any, Any]:
        """(out, lse), rounded once: the first as `spec` says, in the layout `axes`; `sinks` are one for each head."""
        self._clear(slice(0, self.rows.room))
        memory, (batch, heads, _, room, dim) = self.memory, self.rows
        out = memory.result(spec, self._like)
        lse = memory.empty((batch, heads, room), "float32", self._like)
        row, head = (heads * dim, dim) if axes == "bshd" else (dim, room * dim)
        steps = params.Strides(heads * room * dim, row, head)
        wide = None if sinks is None else memory.as_float32(sinks)
        self._launch(states.recipe_of(self.rows, spec.dtype, steps, *running(self.rows)[1:]), 0, out, lse, wide)
        return out, lse

    def unrounded(self) -> tuple[Any, Any]:
        """Views of (out, lse), in float32."""
        return self._out[:, :, 0, :, : self.rows.head_dim_v], self._lse

    def _clear(self, rows: slice) -> None:
        self.memory.write(self._sums[:, :, 1, rows, 0], -math.inf)
        self.memory.write(self._out[:, :, 1, rows], 0.0)

    def _launch(self, recipe: Recipe, first: int, out: Any, lse: Any, sinks: Any) -> None:
        """From row `first` of the partial results on, and of a running state as well."""
        memory, where = self.memory, {"out": out, "lse": lse, "partial_out": self._out, "partial_lse": self._sums}
        skipped = {"partial_out": 4 * first * self.rows.columns, "partial_lse": 8 * first}
        if out is self._out:
            skipped |= {"out": skipped["partial_out"], "lse": 4 * first}
        addresses = {name: memory.pointer(array) + skipped.get(name, 0) for name, array in where.items()}
        addresses["told"] = memory.pointer(self._told)
        if sinks is not None:
            addresses["sinks"] = memory.pointer(sinks)
        what = recipe.specialisation
        record, stream = record_of(recipe, {}, addresses), memory.stream(self.index)
        Launch(kernel(what, self.index), recipe.grid, what, record, stream, [])()
