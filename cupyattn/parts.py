"""Attention over keys that come in parts: the states of the parts, merged before anything is rounded.

A part has arrays and options of its own; rows are the same in all of them, in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import array_api_compat
import numpy as np

from cupyattn import cpu
from cupyattn.allowed import currently_allowed
from cupyattn.arrays import Arrays, enter
from cupyattn.corridor import Named, Shared, answer, plan_for
from cupyattn.numpy_ref import State, merge
from cupyattn.problem import Array, Problem
from cupyattn.reading import Options, read
from cupyattn.rounding import narrow


class Part(NamedTuple):
    """A call, over some of the keys."""

    named: Named
    options: Options
    shared: Shared | None = None
    """Where its schedule is, as for `answer`."""


def answer_in_parts(function: str, parts: Sequence[Part], needs_lse: bool) -> Arrays:
    """The results over all parts, in the shape of the first one; the parts may be shaped differently.

    cu_seqlens and block_table are those of our own callers: their values are not looked at.

    On a GPU each part is rounded once, and their merge once more.
    """
    visit = enter(function, {f"{word}{i}": x for i, part in enumerate(parts) for word, x in _given(part.named)})
    specs = dict(visit.specs)
    problems = [
        read(function, tuple((word, specs[f"{word}{i}"]) for word, _ in _given(named)), options)
        for i, (named, options, _) in enumerate(parts)
    ]
    device = visit.device()
    plans = [plan_for(function, problem, device, currently_allowed()) for problem in problems]
    visit.before_work(*zip(problems, plans, strict=True))
    exact = [replace(problem, dtype="float64", needs_lse=True) for problem in problems]
    first = problems[0]
    if visit.kind == "cuda":
        found = [
            answer(function, named, options._replace(needs_lse=True), None, shared=shared)
            for named, options, shared in parts
        ]
        return merged_at_home(found, problems)

    def own(everything: Arrays, i: int) -> Arrays:
        return {word: everything[f"{word}{i}"] for word, _ in _given(parts[i].named)}

    def merged(everything: Arrays) -> State:
        states = []
        for i, (problem, plan) in enumerate(zip(exact, plans, strict=True)):
            state = cpu.run(plan, problem, own(everything, i))
            states.append(State(_heads_first(state["out"], problem), _lse_heads_first(state["lse"], problem)))
        return merge(states)

    def forward(everything: Arrays) -> Arrays:
        whole = merged(everything)
        results = {"out": narrow(_as_asked(whole.out, first), first.dtype)}
        if needs_lse:
            results["lse"] = narrow(_lse_as_asked(whole.lse, first), first.lse_dtype)
        return results

    def backward(everything: Arrays, known: Arrays) -> Arrays:
        whole = merged(everything)
        gradients: Arrays = {}
        dout, dlse = known["dout"], known.get("dlse")
        for i, (problem, plan) in enumerate(zip(problems, plans, strict=True)):
            there: dict[str, Array | None] = {
                "out": _as_asked(whole.out, problem),
                "lse": _lse_as_asked(whole.lse, problem),
            }
            if dout is not None:
                there["dout"] = np.reshape(dout, problem.out_shape)
            if dlse is not None:
                there["dlse"] = _lse_as_asked(_lse_heads_first(dlse, first), problem)
            operands = own(everything, i)
            here = cpu.run_backward(plan, problem, operands, there)
            gradients |= {f"{word}{i}": gradient for word, gradient in here.items()}
        return gradients

    results = {name: spec for name, spec in first.results.items() if name == "out" or needs_lse}
    return visit.run(forward, backward, results)


def _given(named: Named) -> list[tuple[str, tuple[str, Array]]]:
    return [(word, entry) for word, entry in named.items() if entry[1] is not None]


def _heads_first(out: Array, problem: Problem) -> Array:
    """(heads, rows of all sequences, head_dim_v), of an "bshd" or "thd" output."""
    return out.reshape(math.prod(problem.out_shape[:-2]), *problem.out_shape[-2:]).swapaxes(0, 1)


def _as_asked(out: Array, problem: Problem) -> Array:
    return np.ascontiguousarray(out.swapaxes(0, 1)).reshape(problem.out_shape)


def _lse_heads_first(lse: Array, problem: Problem) -> Array:
    """(heads, rows of all sequences)."""
    if problem.layout.ragged:
        return lse
    batch, heads, rows = problem.lse_shape
    return lse.swapaxes(0, 1).reshape(heads, batch * rows)


def _lse_as_asked(lse: Array, problem: Problem) -> Array:
    if problem.layout.ragged:
        return np.ascontiguousarray(lse)
    batch, heads, rows = problem.lse_shape
    return np.ascontiguousarray(lse.reshape(heads, batch, rows).swapaxes(0, 1))


def merged_at_home(found: Sequence[Arrays], problems: Sequence[Problem]) -> Arrays:
    """`numpy_ref.merge` in the arithmetic of the arrays' own library, in the dtype of lse."""
    xp = array_api_compat.array_namespace(found[0]["out"])
    first = problems[0]
    outs, lses = [], []
    for state, problem in zip(found, problems, strict=True):
        lse = xp.permute_dims(state["lse"], (1, 0) if problem.layout.ragged else (0, 2, 1))
        lses.append(xp.reshape(lse, first.out_shape[:-1]))
        outs.append(xp.astype(xp.reshape(state["out"], first.out_shape), lse.dtype))
    lse = xp.stack(lses)
    highest = xp.max(lse, axis=0)
    weights = xp.exp(lse - xp.where(xp.isinf(highest), xp.zeros_like(highest), highest))
    weights = xp.where(highest == xp.inf, xp.astype(lse == xp.inf, lse.dtype), weights)  # outweighs all finite ones
    total = xp.sum(weights, axis=0)
    share = weights / xp.where(total == 0, xp.ones_like(total), total)
    out = sum(
        xp.where(share[i, ..., None] == 0, xp.zeros_like(part), share[i, ..., None] * part)
        for i, part in enumerate(outs)
    )
    whole = xp.where(xp.isinf(highest), highest, highest + xp.log(total))
    axes = (1, 0) if first.layout.ragged else (0, 2, 1)
    return {"out": xp.astype(out, found[0]["out"].dtype), "lse": xp.permute_dims(whole, axes)}
