"""The arithmetic of one rank: rectangles attended by `cupyattn.cpu`, merged, and the same of gradients.

Arrays are NumPy's here, heads first: (batch, num_heads, rows, head_dim).  States are merged in the order in which
rectangles come, in float64, or what the arithmetic is in otherwise; they are rounded once, at the end.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from cupyattn import cpu
from cupyattn.arrays import Arrays
from cupyattn.corridor import plan_for, plan_for_gradients
from cupyattn.distributed.asked import Asked
from cupyattn.distributed.rectangles import Rectangle
from cupyattn.numpy_ref import Array, State, merge
from cupyattn.problem import Device, Problem, Spec
from cupyattn.reading import Options, read
from cupyattn.rounding import are_bits, narrow, widen


class Work:
    """What one rank has of a call: its rows, and what edits their scores."""

    def __init__(self, asked: Asked, operands: Arrays, device: Device) -> None:
        self.asked, self.device = asked, device
        self.q, self.k, self.v = (self.heads_first(operands[word]) for word in ("q", "k", "v"))
        self.mask, self.bias = operands.get("mask"), operands.get("bias")
        self.slopes, self.sinks = operands.get("alibi_slopes"), operands.get("sinks")

    def heads_first(self, array: Array) -> Array:
        """A view of an array of tokens in the caller's layout."""
        if self.asked.packed:
            array = array[None]
        return array.swapaxes(1, 2) if self.asked.options.axes == "bshd" else array

    def as_asked(self, array: Array) -> Array:
        """The same back again, in memory of its own."""
        array = array.swapaxes(1, 2) if self.asked.options.axes == "bshd" else array
        return np.ascontiguousarray(array[0] if self.asked.packed else array)

    @cached_property
    def dtype(self) -> str:
        return self.asked.compute_dtype

    def begin(self, with_sinks: bool = True) -> State:
        """Of no keys: all that there is are the sinks."""
        sizes = self.asked.problem.sizes
        shape = (sizes.batch, sizes.num_heads, sizes.seqlen_q)
        lse = np.full(shape, -np.inf)
        if with_sinks and self.sinks is not None:
            lse[...] = widen(self.sinks, "float64")[:, None]
        return State(np.zeros((*shape, sizes.head_dim_v)), lse)

    def attend(self, whole: State, rectangle: Rectangle, k: Array, v: Array) -> None:
        """Merge what the rows of a rectangle find in its keys into the state of all rows."""
        operands, problem = self._rectangle(rectangle, self.q, k, v)
        plan = plan_for(self.asked.function, problem, self.device, self.asked.allowed)
        found = cpu.run(plan, replace(problem, dtype="float64", needs_lse=True), operands)
        rows = rectangle.rows
        before, after = State(whole.out[:, :, rows], whole.lse[:, :, rows]), State(found["out"], found["lse"])
        if not np.isneginf(before.lse).all():
            after = merge([before, after])
        whole.out[:, :, rows], whole.lse[:, :, rows] = after.out, after.lse

    def gradients(self, totals: Arrays, known: Arrays, rectangle: Rectangle, k: Array, v: Array) -> tuple[Array, Array]:
        """(dk, dv) of a rectangle's keys; what its rows and their edits have of it is added to `totals`.

        `known` has dout, out and lse, and dlse or None, of all rows, in the dtype of the arithmetic.
        """
        rows = rectangle.rows
        operands, problem = self._rectangle(rectangle, self.wide_q, k, v)
        plan = plan_for_gradients(self.asked.function, problem, self.device, self.asked.allowed)
        here = {name: None if x is None else x[:, :, rows] for name, x in known.items()}
        found = cpu.run_backward(plan, problem, operands, here)
        totals["q"][:, :, rows] += found["q"]
        if "bias" in found:
            totals["bias"][self._edited(totals["bias"], rectangle)] += found["bias"]
        if "alibi_slopes" in found:
            total = totals["alibi_slopes"]
            total = total[rectangle.sequence] if self.asked.packed and total.ndim == 2 else total
            total += found["alibi_slopes"].reshape(total.shape)
        return found["k"], found["v"]

    def totals(self) -> Arrays:
        """Zeros, to which gradients are added, in the dtype of the arithmetic."""
        sizes = self.asked.problem.sizes
        shapes = {"q": (sizes.batch, *self.q.shape[1:]), "k": self.k.shape, "v": self.v.shape}
        for name, array in (("bias", self.bias), ("alibi_slopes", self.slopes)):
            if array is not None:
                shapes[name] = array.shape
        return {name: np.zeros(shape, self.dtype) for name, shape in shapes.items()}

    @cached_property
    def wide_q(self) -> Array:
        return widen(self.q, self.dtype)

    @cached_property
    def wide_k(self) -> Array:
        return widen(self.k, self.dtype)

    @cached_property
    def wide_v(self) -> Array:
        return widen(self.v, self.dtype)

    def _rectangle(self, rectangle: Rectangle, q: Array, k: Array, v: Array) -> tuple[Arrays, Problem]:
        operands = {"q": q[:, :, rectangle.rows], "k": k, "v": v}
        alignment: Any = "top-left"
        window = rectangle.window
        for word, array in (("mask", self.mask), ("bias", self.bias)):
            if array is not None:
                operands[word] = array[self._edited(array, rectangle)]
        if self.slopes is not None:  # distances are from the true diagonal, wherever it is
            per_sequence = self.asked.packed and self.slopes.ndim == 2
            operands["alibi_slopes"] = self.slopes[rectangle.sequence] if per_sequence else self.slopes
            alignment, band = rectangle.diagonal, self.asked.band
            window = band.left, band.right
        options = self.asked.options._replace(
            axes="bhsd", causal=False, window=window, alignment=alignment, needs_lse=True
        )
        return operands, problem_of(self.asked.function, operands, options)

    def _edited(self, array: Array, rectangle: Rectangle) -> tuple[Any, ...]:
        """A rectangle's place in an array of this rank's rows and all keys, either of which may be one for all."""
        places = rectangle.places
        rows = rectangle.rows if array.ndim > 1 and array.shape[-2] > 1 else slice(None)
        keys = slice(places.start, places.stop, places.step) if array.shape[-1] > 1 else slice(None)
        return (..., rows, keys) if array.ndim > 1 else (keys,)

    def rounded(self, whole: State) -> Arrays:
        """The results in the caller's layout and dtypes."""
        problem = self.asked.problem
        lse = narrow(whole.lse, problem.lse_dtype)
        return {
            "out": narrow(self.as_asked(whole.out), problem.out_dtype),
            "lse": np.ascontiguousarray(lse[0] if self.asked.packed else lse),
        }

    def sinks_gradient(self, known: Arrays) -> Array:
        """Of each head's sink, over all rows: what `cpu.flash.flash_backward` makes of its own rows."""
        assert self.sinks is not None
        out, lse, dout, dlse = (known[name] for name in ("out", "lse", "dout", "dlse"))
        delta = np.einsum("...d,...d->...", dout, out)
        if dlse is not None:
            delta = delta - dlse
        sinks = widen(self.sinks, self.dtype)[:, None]
        with np.errstate(all="ignore"):
            share = np.exp(sinks - np.where(np.isneginf(lse), 0.0, lse))
            share = np.where(np.isposinf(sinks) & np.isposinf(lse), 1.0, share)
            found: Array = np.where(np.isneginf(lse), 0.0, -share * delta).sum(axis=(0, -1))
        return found


def problem_of(function: str, operands: Arrays, options: Options) -> Problem:
    """Of arrays, as their shapes and dtypes ask for it."""
    specs = []
    for word, array in operands.items():
        kind = "bfloat16" if are_bits(array) else array.dtype.name
        specs.append((word, Spec(word, array.shape, kind)))
    return read(function, tuple(specs), options)
