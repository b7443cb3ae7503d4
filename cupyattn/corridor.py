"""The one way from a caller's arrays to the answer in the caller's library.

    arrays.enter   who are these arrays, where do they live             Visit
    reading.read   what is asked; every refusal that needs no values    Problem
    plan.choose    how it will be done                                  Plan
    cpu.run        the numbers                                          out, lse
    visit.run      home again: library, device, dtype, gradients

Each public function fills in the same two things, its arrays and its `Options`, and walks down here.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from cupyattn import cpu, lengths
from cupyattn.allowed import Allowed, currently_allowed
from cupyattn.arrays import NOWHERE, Arrays, Destinations, Visit, check_destinations, enter, put
from cupyattn.described import Call
from cupyattn.plan import Plan, choose, for_live_keys
from cupyattn.problem import FLOAT8, NAMED_DEVICES, Device, Problem, Spec
from cupyattn.reading import Options, check_lengths, check_sequences, read, refusal
from cupyattn.repeating import Done, tell

Named = Mapping[str, tuple[str, Any]]
"""{our word: (the caller's name for it, the array or None)}"""
NOTHING: Arrays = {}
Shared = Callable[[Hashable, Callable[[], Any]], Any]
"""What calls of the same lengths share on a GPU: `cuda.scheduling.Shared`."""


def under_our_names(**arrays: Any) -> dict[str, tuple[str, Any]]:
    """`Named`, where the caller's names are our words."""
    return {name: (name, array) for name, array in arrays.items()}


def answer(
    function: str,
    arrays: Named,
    options: Options,
    seed: int | None,
    fixed_split_size: int | None = None,
    allowed: Allowed | None = None,
    into: Destinations = NOWHERE,
    shared: Shared | None = None,
) -> Arrays:
    """The results of one attention call by name: "out", and "lse" and "dropout_mask" if asked for.

    The implementations `allowed` are the call's own; None: those that are allowed around it.  Results go `into` the
    caller's arrays where these are given.  A schedule is `shared` with other calls, or the call's own.
    """
    visit = enter(function, arrays)
    problem = read(function, visit.specs, options)
    allowed = allowed or currently_allowed()
    plan = _at_hand(visit, problem, lambda device: planned(problem, device, allowed, fixed_split_size))
    visit.before_work((problem, plan))
    if into:
        check_destinations(visit, into, problem.results)
    if problem.needs_dropout_mask and visit.kind == "cpu":
        _check_room(function, visit, problem)
    if problem.dropout_p > 0.0 and seed is None:
        seed = visit.library.draw_seed(function)
        if not isinstance(seed, int):
            visit.arrays = {**visit.arrays, "seed": seed}
            seed = None
    call = Call(function, problem, dict(visit.specs), problem.results, seed or 0, fixed_split_size, allowed)
    found = _run(visit, plan, call, into, shared)
    return put(visit, found, into) if into else found


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
    into: Destinations,
    scheduler_metadata: Any = None,
    waits: bool = False,
) -> Arrays:
    """The results by name, "out" and "lse", of a call whose keys are in a cache.

    `waits`: the host has looked at values of a GPU on the way here, and has to do so in each such call.

    On the CPU `append` checks all NumPy operands, puts new keys into the caches, and returns what `cpu.run` is asked.
    """
    if visit.kind == "cuda":
        from cupyattn import cuda

        found = visit.function, visit.library.title, visit.arrays, dict(visit.specs), plan, problem
        made = cuda.run_from_cache(*found, cache_seqlen, *rotation, _arrays(into), scheduler_metadata)
        if scheduler_metadata is None and not waits:
            seqlen = problem.sizes.seqlen_k if cache_seqlen is None else cache_seqlen
            tell(Done(visit, problem, plan, made, (seqlen, *rotation)))
        return put(visit, visit.of_their_kind(made, into), into)

    def forward(operands: Arrays) -> Arrays:
        asked = append(operands)
        return cpu.run(for_live_keys(plan, problem, int(asked["seqused_k"].sum())), problem, asked)

    return put(visit, visit.run(forward, None, problem.results), into)


def schedule_on_gpu(visit: Visit, specs: Mapping[str, Spec], problem: Problem, plan: Plan) -> Any:
    """What thread blocks have to do in calls of these specs, by the index arrays of a visit."""
    from cupyattn import cuda

    return cuda.make_schedule(visit.library.title, visit.arrays, specs, plan, problem)


def views_on_gpu(visit: Visit, words: tuple[str, ...]) -> list[Any]:
    """Where some of the arrays lie, as `cuda.launching.views.View` says it."""
    from cupyattn import cuda

    return list(
        cuda.views(visit.library.title, {word: visit.arrays[word] for word in words}, dict(visit.specs)).values()
    )


def _at_hand(visit: Visit, problem: Problem, plan_on: Callable[[Device], Plan]) -> Plan:
    """The plan where the arrays are.  Of a program, which may run elsewhere, one that objects is refused when it runs,
    unless no device there is could take it."""
    plan = plan_on(visit.device())
    if plan.kernel == "none" and visit.library.is_placed_later(visit.arrays):
        if any(found.kernel != "none" for found in map(plan_on, NAMED_DEVICES.values())):
            return plan
        plan = plan_on(NAMED_DEVICES["H200"])  # whose reasons say more than those of a CPU
    return _agreed(visit.function, problem, plan)


def plan_for(
    function: str, problem: Problem, device: Device, allowed: Allowed | None, fixed_split_size: int | None = None
) -> Plan:
    """The plan, or every implementation's objections at once."""
    return _agreed(function, problem, planned(problem, device, allowed, fixed_split_size))


def plan_for_gradients(function: str, problem: Problem, device: Device, allowed: Allowed | None) -> Plan:
    """The same of the gradients."""
    return _agreed(function, problem, planned_backward(problem, device, allowed))


def planned(problem: Problem, device: Device, allowed: Allowed | None, fixed_split_size: int | None = None) -> Plan:
    """The plan, whatever its kernel is; sequences with lengths of their own are worked on as packed ones."""
    whole = lengths.packed(problem) if problem.layout.seqlens else problem
    plan = choose(whole, device, fixed_split_size, None, allowed)
    if whole is problem:
        return plan
    return replace(plan, flops=problem.flops, bytes=problem.bytes, notes=(*plan.notes, lengths.NOTE))


def planned_backward(problem: Problem, device: Device, allowed: Allowed | None) -> Plan:
    """The same of the gradients."""
    from cupyattn.plan import choose_backward

    whole = lengths.packed(problem) if problem.layout.seqlens else problem
    plan = choose_backward(whole, device, allowed=allowed)
    if whole is problem:
        return plan
    flops = problem.flops * 5 // 2
    return replace(plan, flops=flops, bytes=3 * problem.bytes, notes=(*plan.notes, lengths.NOTE))


def weighed(plan: Plan, problem: Problem, specs: Mapping[str, Spec], gradients: bool = False) -> Plan:
    """The plan that says how much memory it takes, and how large the cache is that keys are in."""
    from cupyattn.plan import memory_of

    in_cache = problem.layout.cached or problem.layout.page_size is not None
    cache = sum(specs[name].nbytes for name in ("k", "v")) if in_cache else 0
    if plan.kernel == "none":
        return replace(plan, cache_bytes=cache)
    whole, turned = problem, 0
    if problem.layout.seqlens:
        whole, own = lengths.packed(problem), specs
        specs = lengths.packed_specs(problem, own)
        if plan.kernel == "numpy":  # which works on one of the three sequences that each is
            whole = replace(whole, sizes=replace(whole.sizes, batch_shape=(problem.sizes.batch,)))
        if problem.layout.axes == "bhsd":  # heads and rows change places
            turned = sum(own[name].nbytes for name in ("q", "k", "v"))
    return replace(plan, memory=turned + memory_of(plan, whole, specs, gradients), cache_bytes=cache)


class NoImplementation(NotImplementedError):
    """Every implementation objects."""

    because: tuple[Problem, Plan]
    """Of what, and what says so."""


def _agreed(function: str, problem: Problem, plan: Plan) -> Plan:
    if plan.kernel == "none":
        reasons = [(name, reason) for name, against in plan.objections for reason in against]
        rule = f"no implementation takes this problem\n    {problem}"
        error = NoImplementation(refusal(function, rule, *reasons))
        error.because = problem, plan
        raise error
    return plan


def _run(visit: Visit, plan: Plan, call: Call, into: Destinations, shared: Shared | None) -> Arrays:
    """The results; those of a GPU go `into` the caller's arrays where kernels can write there."""
    if visit.kind == "cuda":
        return _run_on_gpu(visit, plan, call, into, shared)
    kept = call.problem.state if _uses_results(plan, call.problem) else {}
    return visit.run(*in_numpy(plan, call), call.problem.results, kept, call)


def in_numpy(plan: Plan, call: Call) -> tuple[Callable[[Arrays], Arrays], Callable[[Arrays, Arrays], Arrays]]:
    """A call and its gradients as functions of NumPy operands, and of these and what is known, that keep no arrays.

    The seed is one of the operands where each of many calls at once has its own.
    """
    function, problem, specs, _, seed, *_ = call

    def forward(operands: Arrays) -> Arrays:
        _agreed(function, problem, plan)
        if problem.layout.ragged:
            check_sequences(function, specs, problem.sizes, operands)
        if problem.layout.seqlens:
            check_lengths(function, specs, problem.sizes, operands)
            return lengths.forward(lambda whole, arrays: cpu.run(plan, whole, arrays), problem, operands)
        return cpu.run(plan, problem, operands, int(operands.get("seed", seed)))

    def backward(operands: Arrays, known: Arrays) -> Arrays:
        _agreed(function, problem, plan)
        if problem.dtype == FLOAT8:
            rule = f"has no gradients of {FLOAT8}, nor of what comes with it, and one was asked for"
            raise NotImplementedError(refusal(function, rule))
        return gradients(plan, problem, operands, known, int(operands.get("seed", seed)))

    return forward, backward


def _run_on_gpu(visit: Visit, plan: Plan, call: Call, into: Destinations, shared: Shared | None) -> Arrays:
    """Without NumPy; where gradients may be asked for, out and lse are what is kept for them."""
    problem, specs, seed, allowed = call.problem, call.operands, call.seed, call.allowed
    if not visit.library.differentiates(visit.arrays):
        own = visit.function, visit.library.title, visit.arrays
        found = launched(*own, specs, plan, problem, seed, _arrays(into), shared)
        if shared is None and not problem.layout.seqlens and problem.dropout_p == 0.0:
            tell(Done(visit, problem, plan, found))
        return visit.of_their_kind(found, into)
    whole = replace(problem, needs_lse=True)
    if problem.dtype == FLOAT8:
        rule = f"has no gradients of {FLOAT8}, nor of what comes with it; call it under torch.no_grad()"
        raise NotImplementedError(refusal(visit.function, rule))
    device, bare = visit.device(), replace(visit, arrays={}, given={})  # a graph that keeps it keeps no arrays
    plan_for_gradients(visit.function, whole, device, allowed)  # refused now, not when it is too late

    def forward(operands: Arrays) -> Arrays:
        own, its_seed = _without_seed(operands, seed)
        return launched(bare.function, bare.library.title, own, specs, plan, whole, its_seed, {})

    def backward(operands: Arrays, known: Arrays) -> Arrays:
        own, its_seed = _without_seed(operands, seed)
        return gradients_on_gpu(bare, device, whole, own, known, allowed, its_seed)

    found = visit.run_at_home(forward, backward, whole.results, whole.state)
    return {name: found[name] for name in problem.results}


def launched(
    function: str,
    title: str,
    arrays: Arrays,
    specs: Mapping[str, Spec],
    plan: Plan,
    problem: Problem,
    seed: int,
    into: Arrays,
    shared: Shared | None = None,
) -> Arrays:
    """The results of a kernel, `into` the caller's arrays where it can."""
    from cupyattn import cuda

    if not problem.layout.seqlens:
        return cuda.run(function, title, arrays, specs, plan, problem, seed, into, shared)
    there = lengths.packed_specs(problem, specs)
    return lengths.forward(lambda whole, own: cuda.run(function, title, own, there, plan, whole, seed), problem, arrays)


def _arrays(into: Destinations) -> Arrays:
    return {word: array for word, (_, array) in into.items()}


def _without_seed(operands: Arrays, seed: int) -> tuple[Arrays, int]:
    own = {name: array for name, array in operands.items() if name != "seed"}
    return own, int(operands.get("seed", seed))


def gradients_on_gpu(
    visit: Visit,
    device: Device,
    problem: Problem,
    operands: Arrays,
    known: Arrays,
    allowed: Allowed | None,
    seed: int,
    into: Arrays = NOTHING,
) -> Arrays:
    """Gradients of all floating operands, where they are; the forward's `known` out and lse are made if they are not.

    `known` has, or has not or as None, ``dout``, ``out``, ``lse`` and ``dlse``.  Kernels write `into` arrays that are
    given, where they can.
    """
    from cupyattn import cuda

    specs, title = dict(visit.specs), visit.library.title
    if problem.layout.seqlens:
        packed = replace(visit, specs=tuple(lengths.packed_specs(problem, specs).items()))
        return lengths.backward(
            lambda whole, own, given: gradients_on_gpu(packed, device, whole, own, given, allowed, seed),
            problem, operands, known,
        )  # fmt: skip
    plan = plan_for_gradients(visit.function, problem, device, allowed)
    given = {name: array for name, array in known.items() if array is not None}
    if "out" not in given or "lse" not in given:
        forward = plan_for(visit.function, problem, device, allowed)
        given |= cuda.run(visit.function, title, operands, specs, forward, problem, seed)
    if "dout" not in given:
        given["dout"] = visit.library.zeros(problem.out_shape, operands["q"])
    results = problem.results
    of_known = {"dout": results["out"], "out": results["out"], "lse": results["lse"], "dlse": results["lse"]}
    return cuda.run_backward(visit.function, title, {**operands, **given}, specs | of_known, plan, problem, seed, into)


def answer_with_gradients(
    visit: Visit, problem: Problem, known: tuple[str, ...], allowed: Allowed | None, seed: int
) -> Arrays:
    """Gradients of a visit's floating operands, by name; those of its arrays that are `known` are none."""
    specs = dict(visit.specs)
    plan = _at_hand(visit, problem, lambda device: planned_backward(problem, device, allowed))
    visit.before_work((problem, plan))

    def backward(everything: Arrays) -> Arrays:
        known_here = {name: everything[name] for name in known if name in everything}
        operands = {name: array for name, array in everything.items() if name not in known}
        if visit.kind == "cuda":
            return gradients_on_gpu(visit, visit.device(), problem, operands, known_here, allowed, seed)
        _agreed(visit.function, problem, plan)
        if problem.layout.seqlens:
            check_lengths(visit.function, specs, problem.sizes, operands)
        return gradients(plan, problem, operands, known_here, seed)

    names = ("q", "k", "v", "bias", "sinks", "alibi_slopes")
    wanted: dict[str, Spec] = {name: specs[name] for name in names if name in specs}
    if visit.kind == "cuda":
        return visit.as_given(visit.run_at_home(backward, None, wanted))
    own = {name: spec for name, spec in specs.items() if name not in known}
    given = tuple(name for name in known if name in specs)
    call = Call(visit.function, problem, own, wanted, seed, None, allowed, given)
    return visit.as_given(visit.run(backward, None, wanted, call=call))


def gradients(plan: Plan, problem: Problem, operands: Arrays, known: Arrays, seed: int) -> Arrays:
    """Gradients of all floating operands."""
    if not _uses_results(plan, problem):
        known = {name: array for name, array in known.items() if name not in ("out", "lse")}
    if problem.layout.seqlens:
        return lengths.backward(
            lambda whole, own, given: cpu.run_backward(plan, whole, own, given), problem, operands, known
        )
    return cpu.run_backward(plan, problem, operands, known, seed)


def _uses_results(plan: Plan, problem: Problem) -> bool:
    """The backward pass uses out and lse where they were not rounded on the way, else it computes them again."""
    return problem.dtype == plan.compute_dtype
