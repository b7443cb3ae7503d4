"""The one way from a caller's arrays to the answer in the caller's library.

    arrays.enter   who are these arrays, where do they live             Visit
    reading.read   what is asked; every refusal that needs no values    Problem
    plan.choose    how it will be done                                  Plan
    cpu.run        the numbers                                          out, lse
    visit.run      home again: library, device, dtype, gradients

Each public function fills in the same two things, its arrays and its `Options`, and walks down here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from cupyattn import cpu
from cupyattn.arrays import Arrays, Visit, enter
from cupyattn.plan import Plan, choose, for_live_keys
from cupyattn.problem import FLOAT8, Device, Problem
from cupyattn.reading import Options, check_sequences, read, refusal

Named = Mapping[str, tuple[str, Any]]
"""{our word: (the caller's name for it, the array or None)}"""


def under_our_names(**arrays: Any) -> dict[str, tuple[str, Any]]:
    """`Named`, where the caller's names are our words."""
    return {name: (name, array) for name, array in arrays.items()}


def answer(
    function: str, arrays: Named, options: Options, seed: int | None, fixed_split_size: int | None = None
) -> Arrays:
    """The results of one attention call by name: "out", and "lse" and "dropout_mask" if asked for."""
    visit = enter(function, arrays)
    problem = read(function, visit.specs, options)
    plan = plan_for(function, problem, visit.device(), fixed_split_size)
    if problem.needs_dropout_mask and visit.kind == "cpu":
        _check_room(function, visit, problem)
    if problem.dropout_p > 0.0 and seed is None:
        seed = visit.library.draw_seed(function)
        if not isinstance(seed, int):
            visit.arrays = {**visit.arrays, "seed": seed}
            seed = None
    return _run(visit, problem, plan, seed or 0)


def _check_room(function: str, visit: Visit, problem: Problem) -> None:
    """Refuse what the system would promise memory for, and end the process when it is used."""
    spec, most = problem.results["dropout_mask"], cpu.memory_of_machine()
    if spec.nbytes > most:
        rule = f"{spec.name} would be larger than this machine's memory, {spec.shape} of {spec.dtype}:"
        rule += f" {spec.nbytes / 2**30:.1f} GiB of {most / 2**30:.1f}"
        raise ValueError(refusal(function, rule, *((given.name, given.shape) for _, given in visit.specs)))


class Rotation(NamedTuple):
    """How q and new keys are rotated, where there are tables."""

    each_row: bool
    """Each row of q has a position of its own, not its sequence's first."""
    interleaved: bool


def answer_from_cache(
    visit: Visit,
    problem: Problem,
    plan: Plan,
    cache_seqlen: int | None,
    rotation: Rotation,
    append: Callable[[Arrays], Arrays],
) -> Arrays:
    """The results by name, "out" and "lse", of a call whose keys are in a cache.

    On the CPU `append` checks all NumPy operands, puts new keys into the caches, and returns what `cpu.run` is asked.
    """
    if visit.kind == "cuda":
        from cupyattn import cuda

        found = visit.function, visit.library.title, visit.arrays, dict(visit.specs), plan, problem
        return cuda.run_from_cache(*found, cache_seqlen, *rotation)

    def forward(operands: Arrays) -> Arrays:
        asked = append(operands)
        return cpu.run(for_live_keys(plan, problem, int(asked["seqused_k"].sum())), problem, asked)

    return visit.run(forward, None, problem.results)


def views_on_gpu(visit: Visit, words: tuple[str, ...]) -> list[Any]:
    """Where some of the arrays lie, as `cuda.launching.views.View` says it."""
    from cupyattn import cuda

    return list(
        cuda.views(visit.library.title, {word: visit.arrays[word] for word in words}, dict(visit.specs)).values()
    )


def plan_for(function: str, problem: Problem, device: Device, fixed_split_size: int | None = None) -> Plan:
    """The plan, or every implementation's objections at once."""
    plan = choose(problem, device, fixed_split_size)
    if plan.kernel == "none":
        reasons = [(name, reason) for name, against in plan.objections for reason in against]
        raise NotImplementedError(refusal(function, f"no implementation takes this problem\n    {problem}", *reasons))
    return plan


def _run(visit: Visit, problem: Problem, plan: Plan, seed: int) -> Arrays:
    """The results; the seed is one of the operands where each of many calls at once has its own."""
    specs = dict(visit.specs)

    def forward(operands: Arrays) -> Arrays:
        if problem.layout.ragged:
            check_sequences(visit.function, specs, problem.sizes, operands)
        return cpu.run(plan, problem, operands, int(operands.get("seed", seed)))

    def backward(operands: Arrays, known: Arrays) -> Arrays:
        if problem.dtype == FLOAT8:
            rule = f"has no gradients of {FLOAT8}, nor of what comes with it, and one was asked for"
            raise NotImplementedError(refusal(visit.function, rule))
        return gradients(plan, problem, operands, known, int(operands.get("seed", seed)))

    if visit.kind == "cuda":
        from cupyattn import cuda

        return cuda.run(visit.function, visit.library.title, visit.arrays, specs, plan, problem, seed)
    return visit.run(forward, backward, problem.results, problem.state if _uses_results(plan, problem) else {})


def gradients(plan: Plan, problem: Problem, operands: Arrays, known: Arrays, seed: int) -> Arrays:
    """Gradients of all floating operands."""
    if not _uses_results(plan, problem):
        known = {name: array for name, array in known.items() if name not in ("out", "lse")}
    return cpu.run_backward(plan, problem, operands, known, seed)


def _uses_results(plan: Plan, problem: Problem) -> bool:
    """The backward pass uses out and lse where they were not rounded on the way, else it computes them again."""
    return problem.dtype == plan.compute_dtype
