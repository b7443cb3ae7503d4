"""What there is to say about the arrays of a call, before it is made."""

from __future__ import annotations

from collections.abc import Mapping

from cupyattn.cuda.launching.gradients import to_be_mapped
from cupyattn.cuda.launching.launch import map_objections
from cupyattn.cuda.launching.views import View, has_to_be_copied, is_aligned, why_copied
from cupyattn.plan import Plan
from cupyattn.problem import Problem


def notes(lie: Mapping[str, View], problem: Problem, plan: Plan) -> tuple[str, ...]:
    """Which are copied, how the others are read, and by which kernel."""
    found = []
    for name, view in lie.items():
        if has_to_be_copied(name, *view[1:], problem.sizes.batch_shape):
            found.append(f"{name} is copied: {why_copied(name, view, problem.sizes.batch_shape)}")
        elif name in ("q", "k", "v") and not is_aligned(view):
            found.append(f"{name} is read number by number: its rows do not start at multiples of 16 bytes")
    if plan.kernel == "hopper" and plan.instead is not None:
        reasons = map_objections(problem, lie)
        other = "nothing" if plan.instead.kernel == "none" else plan.instead.kernel
        found += [f"{other} runs instead: no tensor map, {reason}" for reason in reasons]
    copied = any(has_to_be_copied(name, *lie[name][1:], problem.sizes.batch_shape) for name in ("q", "k", "v"))
    if plan.kernel == "hopper_backward" and not copied:  # copies are as they should be
        found += [f"{name} is copied: no tensor map, {reason}" for name, reason in to_be_mapped(problem, lie).items()]
    return tuple(found)
