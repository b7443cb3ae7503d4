"""The arithmetic of one rank on the CPU: rectangles attended by `cupyattn.cpu`, merged, and the same of gradients.

Arrays are NumPy's here.  States are merged in the order in which
rectangles come, in float64, or what the arithmetic is in otherwise; they are rounded once, at the end.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import numpy as np

from cupyattn import cpu
from cupyattn.arrays import Arrays
from cupyattn.corridor import plan_for, plan_for_gradients
from cupyattn.distributed.asked import Asked
from cupyattn.distributed.rank import OfRank
from cupyattn.distributed.rectangles import Rectangle
from cupyattn.numpy_ref import Array, State, merge
from cupyattn.problem import Device, Problem, Spec
from cupyattn.reading import Options, read
from cupyattn.rounding import are_bits, narrow, widen


class Work(OfRank):
    """One rank's arithmetic on the CPU."""

    def __init__(self, asked: Asked, operands: Arrays, device: Device) -> None:
        super().__init__(asked, operands)
        self.device = device

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
        found, rows = self.answer(*self.attended(rectangle, self.q, k, v)), rectangle.rows
        before, after = State(whole.out[:, :, rows], whole.lse[:, :, rows]), State(found["out"], found["lse"])
        if not np.isneginf(before.lse).all():
            after = merge([before, after])
        whole.out[:, :, rows], whole.lse[:, :, rows] = after.out, after.lse

    def gradients(self, totals: Arrays, known: Arrays, rectangle: Rectangle, k: Array, v: Array) -> tuple[Array, Array]:
        """(dk, dv) of a rectangle's keys; what its rows and their edits have of it is added to `totals`.

        `known` has dout, out and lse, and dlse or None, of all rows, in the dtype of the arithmetic.
        """
        rows = rectangle.rows
        here = {name: None if x is None else x[:, :, rows] for name, x in known.items()}
        found = self.pull(*self.attended(rectangle, self.wide_q, k, v), here)
        totals["q"][:, :, rows] += found["q"]
        self.add_edits(totals, found, rectangle)
        return found["k"], found["v"]

    @cached_property
    def wide_q(self) -> Array:
        return widen(self.q, self.dtype)

    def for_gradients(self, array: Array) -> Array:
        """Keys or values as `gradients` wants them: in the dtype of the arithmetic."""
        return widen(array, self.dtype)

    def message(self, whole: State) -> Array:
        """A state as one array."""
        return np.concatenate([whole.out, whole.lse[..., None]], axis=-1)

    def merged(self, messages: list[Array]) -> State:
        """The states of several messages as one."""
        return merge([State(x[..., :-1], x[..., -1]) for x in messages])

    def answer(self, operands: Arrays, options: Options) -> Arrays:
        """out and lse of a call of `attention`, in float64."""
        problem = problem_of(self.asked.function, operands, options)
        plan = plan_for(self.asked.function, problem, self.device, self.asked.allowed)
        return cpu.run(plan, replace(problem, dtype="float64", needs_lse=True), operands)

    def pull(self, operands: Arrays, options: Options, known: Arrays) -> Arrays:
        """Gradients of its operands, given dout, out and lse, and dlse or None."""
        problem = problem_of(self.asked.function, operands, options)
        plan = plan_for_gradients(self.asked.function, problem, self.device, self.asked.allowed)
        return cpu.run_backward(plan, problem, operands, known)

    def state_of(self, out: Array, lse: Array) -> State:
        """What `answer` has found of all rows, sinks included."""
        return State(out, lse)

    @property
    def state_dtypes(self) -> tuple[str, str]:
        """Of out and lse, as `answer` has them."""
        return "float64", "float64"

    def rounded(self, whole: State) -> Arrays:
        """The results in the caller's layout and dtypes."""
        problem = self.asked.problem
        lse = narrow(whole.lse, problem.lse_dtype)
        return {
            "out": narrow(np.ascontiguousarray(self.as_asked(whole.out)), problem.out_dtype),
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
