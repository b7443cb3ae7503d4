"""What there is to say about the arrays of a call, before it is made."""

from __future__ import annotations

from collections.abc import Mapping

from cupyattn.cuda.launching.mapping import are_remade, map_objections
from cupyattn.cuda.launching.views import View, has_to_be_copied, is_aligned, why_copied
from cupyattn.plan import Plan
from cupyattn.problem import Problem


def notes(lie: Mapping[str, View], problem: Problem, plan: Plan) -> tuple[str, ...]:
    """Which are copied, how the others are read, and by which kernel."""
    found = []
    against = map_objections(problem, lie) if plan.kernel in ("hopper", "hopper_backward") else {}
    remade = tuple(against) if are_remade(plan, problem) else ()
    for name, view in lie.items():
        if has_to_be_copied(name, *view[1:], problem.sizes.batch_shape):
            found.append(f"{name} is copied: {why_copied(name, view, problem.sizes.batch_shape)}")
        elif name in ("q", "k", "v") and name not in remade and not is_aligned(view):
            found.append(f"{name} is read number by number: its rows do not start at multiples of 16 bytes")
    found += [f"{name} is copied: no tensor map, {against[name]}" for name in remade]
    if plan.kernel == "hopper" and plan.instead is not None and not remade:
        other = "nothing" if plan.instead.kernel == "none" else plan.instead.kernel
        found += [f"{other} runs instead: no tensor map, {reason}" for reason in against.values()]
    return tuple(found)
