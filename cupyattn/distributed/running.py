"""A call on one rank, from the caller's arrays to his results: forward, and gradients of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from cupyattn.arrays import Arrays
from cupyattn.distributed import verbs
from cupyattn.distributed.agreement import together
from cupyattn.distributed.asked import Asked, Specs, states_of
from cupyattn.distributed.gpu import KNOWN, GpuWork
from cupyattn.distributed.work import Work
from cupyattn.distributed.working import AnyState, AnyWork
from cupyattn.numpy_ref import Array, State
from cupyattn.problem import Spec
from cupyattn.rounding import narrow, widen

Forward = Callable[[Asked, Arrays], tuple[AnyWork, AnyState]]
"""Operands into the state of this rank's rows over all keys."""
Backward = Callable[[Any, Arrays], Arrays]
"""What is known of all rows, dout, dlse, out and lse, heads first in the dtype of the arithmetic, into gradients of q,
k and v, and of bias and slopes where there are any, likewise."""


def run(asked: Asked, forward: Forward, backward: Backward) -> Arrays:
    """The results by name; where gradients may be asked for later, with a rule for them."""
    if asked.visit.kind == "cuda":
        return _run_on_gpu(asked, forward, backward)
    visit, problem = asked.visit, asked.problem
    bare = replace(asked, visit=replace(visit, arrays={}, given={}))  # a graph that keeps it keeps no arrays
    kept = {}
    if visit.library.differentiates(visit.arrays):
        sizes, dtype = problem.sizes, asked.compute_dtype
        rows = (sizes.batch, sizes.num_heads, sizes.seqlen_q)
        kept = {"whole_out": Spec("out", (*rows, sizes.head_dim_v), dtype), "whole_lse": Spec("lse", rows, dtype)}

    def numbers(operands: Arrays) -> Arrays:
        work, whole = forward(bare, operands)
        found: Arrays = work.rounded(whole)
        if kept:  # in memory of their own: the caller may write to his results
            found |= {"whole_out": np.array(whole.out, work.dtype), "whole_lse": np.array(whole.lse, work.dtype)}
        return found

    def gradients(operands: Arrays, known: Arrays) -> Arrays:
        return _gradients(bare, forward, backward, operands, known)

    results = states_of(asked.problem, asked.packed)
    if not asked.returns_lse:
        del results["lse"]
    return _by_all(asked, visit.run, numbers, gradients, results, kept)


def _by_all(
    asked: Asked, go: Callable[..., Arrays], numbers: Any, gradients: Any, results: Specs, kept: Specs
) -> Arrays:
    """Both passes; where one of them fails on a rank, all others are told."""

    def backward(operands: Arrays, known: Arrays) -> Arrays:
        found: Arrays = together(asked.comm, lambda: gradients(operands, known))
        return found

    return together(asked.comm, lambda: go(numbers, backward, results, kept))


def run_backward(asked: Asked, forward: Forward, backward: Backward) -> Arrays:
    """Gradients of a call's floating operands, by name; its arrays include what they come with."""
    visit = asked.visit
    specs = dict(visit.specs)

    def numbers(everything: Arrays) -> Arrays:
        known: Arrays = {name: everything[name] for name in KNOWN if name in everything}
        operands = {name: array for name, array in everything.items() if name not in known}
        if asked.problem.dtype != asked.compute_dtype:  # they have been rounded
            known = {name: array for name, array in known.items() if name in ("dout", "dlse")}
        return _gradients(asked, forward, backward, operands, known)

    def on_gpu(everything: Arrays) -> Arrays:
        known = {name: x for name, x in everything.items() if name in KNOWN}
        operands = {name: x for name, x in everything.items() if name not in KNOWN}
        return _gradients_on_gpu(asked, forward, backward, operands, known)

    names = ("q", "k", "v", "bias", "sinks", "alibi_slopes")
    wanted = {name: specs[name] for name in names if name in specs}
    here, go = (on_gpu, visit.run_at_home) if visit.kind == "cuda" else (numbers, visit.run)
    return together(asked.comm, lambda: visit.as_given(go(here, None, wanted)))


def _run_on_gpu(asked: Asked, forward: Forward, backward: Backward) -> Arrays:
    """The same of a GPU's arrays: out and lse are what is kept for gradients."""
    visit, results = asked.visit, states_of(asked.problem, asked.packed)
    bare = replace(asked, visit=replace(visit, arrays={}, given={}))
    kept = results if visit.library.differentiates(visit.arrays) else {}

    def numbers(operands: Arrays) -> Arrays:
        work, whole = forward(bare, operands)
        found: Arrays = work.rounded(whole)
        return found

    def gradients(operands: Arrays, known: Arrays) -> Arrays:
        present = {name: array for name, array in known.items() if array is not None}
        return _gradients_on_gpu(bare, forward, backward, operands, present)

    if not (asked.returns_lse or kept):
        del results["lse"]
    return _by_all(asked, visit.run_at_home, numbers, gradients, results, kept)


def _gradients_on_gpu(asked: Asked, forward: Forward, backward: Backward, operands: Arrays, known: Arrays) -> Arrays:
    work = GpuWork(asked, operands)
    if "out" not in known or "lse" not in known:
        known = {**known, **work.rounded(forward(asked, operands)[1])}
    if "dout" not in known:
        known["dout"] = verbs.zeros(tuple(known["out"].shape), known["out"].dtype, known["out"])
    dlse = work.lse_first(known["dlse"]) if "dlse" in known else None
    rows = {"dlse": dlse, "lse": work.lse_first(known["lse"])}
    rows |= {name: work.heads_first(known[name]) for name in ("dout", "out")}
    found = backward(work, rows)
    if work.sinks is not None:
        found["sinks"] = work.sinks_gradient(rows)
    return work.gradients_as_asked(found, operands)


def _gradients(asked: Asked, forward: Forward, backward: Backward, operands: Arrays, known: Arrays) -> Arrays:
    """In the shapes and dtypes of the operands."""
    present = {name: array for name, array in known.items() if array is not None}
    work = Work(asked, operands, asked.visit.device())
    dtype = work.dtype
    if "whole_out" in present:
        whole = State(present["whole_out"], present["whole_lse"])
    elif "out" in present and "lse" in present:
        whole = State(work.heads_first(present["out"]), work.lse_first(present["lse"]))
    else:
        _, whole = forward(asked, operands)
    dout = np.zeros(whole.out.shape, dtype)
    if "dout" in present:
        dout = widen(work.heads_first(present["dout"]), dtype)
    dlse = widen(work.lse_first(present["dlse"]), dtype) if "dlse" in present else None
    rows = {"dout": dout, "dlse": dlse, "out": whole.out.astype(dtype), "lse": whole.lse.astype(dtype)}
    found = backward(work, rows)
    if work.sinks is not None:
        found["sinks"] = work.sinks_gradient(rows)
    tokens = {name: np.ascontiguousarray(work.as_asked(found[name])) for name in ("q", "k", "v")}
    return {name: narrow(array, _dtype_name(operands[name])) for name, array in (found | tokens).items()}


def _dtype_name(array: Array) -> str:
    return "bfloat16" if array.dtype == np.uint16 else str(array.dtype.name)
