"""The arithmetic of one rank on a GPU: rectangles attended by the kernels, merged in float32 by ``merge.cu``.

Arrays are CuPy's or torch's.  Everything is queued on the current stream.  What the kernels find in a rectangle is
rounded to the dtype of `q`, as theirs is; what rows have come to stays in float32 from rectangle to rectangle and from
rank to rank, and is rounded once more at the end.  So do gradients.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import array_api_compat

from cupyattn.arrays import Arrays, enter
from cupyattn.corridor import answer, answer_with_gradients, under_our_names
from cupyattn.distributed import verbs
from cupyattn.distributed.rank import OfRank
from cupyattn.distributed.rectangles import Rectangle
from cupyattn.problem import Array, Spec
from cupyattn.reading import Options, read

KNOWN = ("dout", "out", "lse", "dlse")


class Answered(NamedTuple):
    """A state that is the result: rounded by the kernel that found it, heads first, with its sinks."""

    out: Array
    lse: Array

    def rounded(self, spec: Spec, axes: str, sinks: Any) -> tuple[Array, Array]:
        """As `RunningState.rounded`."""
        return (verbs.copied(self.out.swapaxes(1, 2)) if axes == "bshd" else self.out), self.lse


class GpuWork(OfRank):
    """One rank's arithmetic on a GPU."""

    def begin(self, with_sinks: bool = True) -> Any:
        """Of no keys: a `RunningState`.  Sinks, if any, come in when it is rounded."""
        from cupyattn import cuda

        sizes = self.asked.problem.sizes
        rows = sizes.batch, sizes.num_heads, sizes.seqlen_q, sizes.head_dim_v
        return cuda.running_state(self.asked.visit.library.title, self.q, *rows)

    def attend(self, whole: Any, rectangle: Rectangle, k: Array, v: Array) -> None:
        """Merge what the rows of a rectangle find in its keys into the state of all rows."""
        found = self.answer(*self.attended(rectangle, self.q, k, v))
        whole.merge(rectangle.rows, found["out"], found["lse"])

    def message(self, whole: Any) -> Array:
        """A state as one array."""
        out, lse = whole.unrounded()
        found = verbs.empty((*lse.shape, out.shape[-1] + 1), "float32", lse)
        verbs.write(found[..., :-1], out)
        verbs.write(found[..., -1], lse)
        return found

    def merged(self, messages: list[Array]) -> Any:
        """The states of several messages as one."""
        whole = self.begin()
        for message in messages:
            whole.merge(slice(0, message.shape[2], 1), message[..., :-1], message[..., -1])
        return whole

    def rounded(self, whole: Any) -> Arrays:
        """The results in the caller's layout and dtypes."""
        problem, packed = self.asked.problem, self.asked.packed
        spec = Spec("out", problem.out_shape, problem.out_dtype)
        out, lse = whole.rounded(spec, self.asked.options.axes, self.sinks)
        return {"out": out[0] if packed else out, "lse": lse[0] if packed else lse}

    def for_gradients(self, array: Array) -> Array:
        """Keys or values as `gradients` wants them: as they are."""
        return array

    def gradients(self, totals: Arrays, known: Arrays, rectangle: Rectangle, k: Array, v: Array) -> tuple[Array, Array]:
        """(dk, dv) of a rectangle's keys; what its rows and their edits have of it is added to `totals`.

        `known` has dout, out and lse, and dlse or None, of all rows.
        """
        rows = rectangle.rows
        here = {name: None if x is None else x[:, :, rows] for name, x in known.items()}
        found = self.pull(*self.attended(rectangle, self.q, k, v), here)
        verbs.add(totals["q"][:, :, rows], found["q"])
        self.add_edits(totals, found, rectangle)
        return found["k"], found["v"]

    def answer(self, operands: Arrays, options: Options) -> Arrays:
        """out and lse of a call of `attention`, as its kernel rounds them."""
        return answer(self.asked.function, under_our_names(**operands), options, None, None, self.asked.allowed)

    def pull(self, operands: Arrays, options: Options, known: Arrays) -> Arrays:
        """Gradients of its operands, given dout, out and lse, and dlse or None; rounded likewise."""
        here = {name: x for name, x in known.items() if x is not None}
        visit = enter(self.asked.function, under_our_names(**operands, **here))
        problem = read(visit.function, tuple(x for x in visit.specs if x[0] in operands), options)
        return answer_with_gradients(visit, problem, KNOWN, self.asked.allowed, 0)

    def state_of(self, out: Array, lse: Array) -> Answered:
        """What `answer` has found of all rows, sinks included."""
        return Answered(out, lse)

    @property
    def state_dtypes(self) -> tuple[str, str]:
        """Of out and lse, as `answer` has them."""
        return self.asked.problem.out_dtype, "float32"

    def sinks_gradient(self, known: Arrays) -> Array:
        """Of each head's sink, over all rows, in float32."""
        xp: Any = array_api_compat.array_namespace(self.q)
        out, lse, dout, dlse = (known[name] for name in ("out", "lse", "dout", "dlse"))
        delta = xp.sum(xp.astype(dout, xp.float32) * xp.astype(out, xp.float32), axis=-1)
        if dlse is not None:
            delta = delta - dlse
        sinks = xp.astype(self.sinks, xp.float32)[:, None]
        nothing, everything = lse == -math.inf, (sinks == math.inf) & (lse == math.inf)
        share = xp.exp(sinks - xp.where(nothing, xp.zeros_like(lse), lse))
        share = xp.where(everything, xp.ones_like(share), share)
        found: Array = xp.sum(xp.where(nothing, xp.zeros_like(share), -share * delta), axis=(0, -1))
        return found

    def gradients_as_asked(self, found: Arrays, operands: Arrays) -> Arrays:
        """In the shapes and dtypes of the operands."""
        tokens = {name: self.as_asked(found[name]) for name in ("q", "k", "v")}
        results = {}
        for name, array in (found | tokens).items():
            like = operands[name]
            results[name] = verbs.empty(tuple(like.shape), like.dtype, like)
            verbs.write(results[name], array)
        return results
