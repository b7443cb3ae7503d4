"""What compiled programs ask for: calls that come without Python's arrays, from XLA on the CPU or on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from cupyattn import cpu
from cupyattn.arrays import Arrays, cpu_device, serve_programs
from cupyattn.corridor import gradients, plan_for, plan_for_gradients
from cupyattn.described import Call, call_of
from cupyattn.plan import choose, choose_backward
from cupyattn.problem import Array
from cupyattn.reading import check_sequences


def on_cpu(text: str, operands: Sequence[Array], results: Sequence[Array]) -> None:
    """Compute a described call of NumPy arrays, and write its results."""
    call = call_of(text)
    found = _answer(text)(_named(call, operands))
    for name, result in zip(call.results, results, strict=True):
        result[...] = found[name]


def _named(call: Call, arrays: Sequence[Any]) -> Arrays:
    return dict(zip((*call.operands, *call.known), arrays, strict=True))


@lru_cache(maxsize=4096)
def _answer(text: str) -> Callable[[Arrays], Arrays]:
    """The function of NumPy arrays that a text describes."""
    call = call_of(text)
    problem, device = call.problem, cpu_device()
    if not call.known:
        plan = plan_for(call.function, problem, device, call.allowed, call.fixed_split_size)

        def forward(operands: Arrays) -> Arrays:
            if problem.layout.ragged:
                check_sequences(call.function, call.operands, problem.sizes, operands)
            return cpu.run(plan, problem, operands, call.seed)

        return forward
    plan = plan_for_gradients(call.function, problem, device, call.allowed)

    def backward(everything: Arrays) -> Arrays:
        operands = {name: everything[name] for name in call.operands}
        return gradients(plan, problem, operands, {name: everything[name] for name in call.known}, call.seed)

    return backward


CUPY = "cupy.ndarray"


def on_gpu(text: str, operands: Sequence[Any], results: Sequence[Any], stream: int) -> None:
    """Queue a described call of CuPy arrays on a stream, its results to be written to given ones.

    What no kernel takes is computed on the host, for which that stream is waited for.
    """
    from cupyattn import cuda

    call = call_of(text)
    arrays = _named(call, operands)
    with cuda.on_stream(arrays["q"], stream):
        _queue(text, call, arrays, dict(zip(call.results, results, strict=True)))


def _queue(text: str, call: Call, arrays: Arrays, given: Arrays) -> None:
    from cupyattn import cuda

    device = cuda.device_of(call.function, CUPY, arrays["q"])
    problem = replace(call.problem, needs_lse=True) if call.known else call.problem
    plan = choose(problem, device, call.fixed_split_size, allowed=call.allowed)
    of_gradients = choose_backward(problem, device, allowed=call.allowed) if call.known else plan
    if "none" in (plan.kernel, of_gradients.kernel):
        cuda.on_host(_answer(text), arrays, given)
    elif not call.known:
        cuda.run(call.function, CUPY, arrays, call.operands, plan, problem, call.seed, given)
    else:
        operands_alone = {name: arrays[name] for name in call.operands}
        state = cuda.run(call.function, CUPY, operands_alone, call.operands, plan, problem, call.seed)
        specs = {**call.operands, **problem.state, "dout": problem.state["out"], "dlse": problem.state["lse"]}
        cuda.run_backward(call.function, CUPY, {**arrays, **state}, specs, of_gradients, problem, call.seed, given)


def begin() -> None:
    """From now on programs are answered."""
    serve_programs(on_cpu, on_gpu)
