"""A call on one rank, from the caller's arrays to his results: forward, and gradients of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from cupyattn.arrays import Arrays
from cupyattn.distributed.agreement import together
from cupyattn.distributed.asked import Asked
from cupyattn.distributed.work import Work
from cupyattn.numpy_ref import Array, State
from cupyattn.problem import Spec
from cupyattn.reading import expect
from cupyattn.rounding import narrow, widen

Forward = Callable[[Asked, Arrays], tuple[Work, State]]
"""Operands in NumPy into the state of this rank's rows over all keys."""
Backward = Callable[[Work, Arrays], Arrays]
"""What is known of all rows, dout, dlse, out and lse, heads first in the dtype of the arithmetic, into gradients of q,
k and v, and of bias and slopes where there are any, likewise."""


def run(asked: Asked, forward: Forward, backward: Backward, needs_lse: bool) -> Arrays:
    """The results by name; where gradients may be asked for later, with a rule for them."""
    visit, problem = asked.visit, asked.problem
    bare = replace(asked, visit=replace(visit, arrays={}, given={}))  # a graph that keeps it keeps no arrays
    kept = {}
    if visit.library.differentiates(visit.arrays):
        sizes, dtype = problem.sizes, asked.compute_dtype
        rows = (sizes.batch, sizes.num_heads, sizes.seqlen_q)
        kept = {"whole_out": Spec("out", (*rows, sizes.head_dim_v), dtype), "whole_lse": Spec("lse", rows, dtype)}

    def numbers(operands: Arrays) -> Arrays:
        work, whole = forward(bare, operands)
        found = work.rounded(whole)
        if kept:  # in memory of their own: the caller may write to his results
            found |= {"whole_out": np.array(whole.out, work.dtype), "whole_lse": np.array(whole.lse, work.dtype)}
        return found

    def gradients(operands: Arrays, known: Arrays) -> Arrays:
        return _gradients(bare, forward, backward, operands, known)

    results = result_specs(asked)
    if not needs_lse:
        del results["lse"]
    return visit.run(
        lambda operands: together(asked.comm, lambda: numbers(operands)),
        lambda operands, known: together(asked.comm, lambda: gradients(operands, known)),
        results,
        kept,
    )


def run_backward(asked: Asked, forward: Forward, backward: Backward) -> Arrays:
    """Gradients of a call's floating operands, by name; its arrays include what they come with."""
    visit = asked.visit
    specs, results = dict(visit.specs), result_specs(asked)
    for name, like in (("dout", "out"), ("out", "out"), ("lse", "lse"), ("dlse", "lse")):
        if name in specs:
            expect(visit.function, specs[name], results[like].shape, results[like].dtype)

    def numbers(everything: Arrays) -> Arrays:
        known: Arrays = {name: everything[name] for name in ("dout", "out", "lse", "dlse") if name in everything}
        operands = {name: array for name, array in everything.items() if name not in known}
        if asked.problem.dtype != asked.compute_dtype:  # they have been rounded
            known = {name: array for name, array in known.items() if name in ("dout", "dlse")}
        return _gradients(asked, forward, backward, operands, known)

    names = ("q", "k", "v", "bias", "sinks", "alibi_slopes")
    wanted = {name: specs[name] for name in names if name in specs}
    found = visit.run(lambda everything: together(asked.comm, lambda: numbers(everything)), None, wanted)
    return visit.as_given(found)


def result_specs(asked: Asked) -> dict[str, Spec]:
    """In the caller's layout."""
    return {
        name: spec._replace(shape=spec.shape[1:]) if asked.packed else spec
        for name, spec in asked.problem.state.items()
    }


def _gradients(asked: Asked, forward: Forward, backward: Backward, operands: Arrays, known: Arrays) -> Arrays:
    """In the shapes and dtypes of the operands."""
    present = {name: array for name, array in known.items() if array is not None}
    work = Work(asked, operands, asked.visit.device())
    dtype = work.dtype
    if "whole_out" in present:
        whole = State(present["whole_out"], present["whole_lse"])
    elif "out" in present and "lse" in present:
        whole = State(work.heads_first(present["out"]), _lse_first(asked, present["lse"]))
    else:
        _, whole = forward(asked, operands)
    dout = np.zeros(whole.out.shape, dtype)
    if "dout" in present:
        dout = widen(work.heads_first(present["dout"]), dtype)
    dlse = widen(_lse_first(asked, present["dlse"]), dtype) if "dlse" in present else None
    rows = {"dout": dout, "dlse": dlse, "out": whole.out.astype(dtype), "lse": whole.lse.astype(dtype)}
    found = backward(work, rows)
    if work.sinks is not None:
        found["sinks"] = work.sinks_gradient(rows)
    tokens = {name: work.as_asked(found[name]) for name in ("q", "k", "v")}
    return {name: narrow(array, _dtype_name(operands[name])) for name, array in (found | tokens).items()}


def _lse_first(asked: Asked, lse: Array) -> Array:
    return lse[None] if asked.packed else lse


def _dtype_name(array: Array) -> str:
    return "bfloat16" if array.dtype == np.uint16 else str(array.dtype.name)
