"""What compiled programs ask for: calls that come without Python's arrays, from XLA on the CPU or on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from cupyattn.arrays import Arrays, Visit, cpu_device, serve_programs
from cupyattn.corridor import (
    gradients_on_gpu,
    in_numpy,
    launched,
    plan_for,
    plan_for_gradients,
    planned,
    planned_backward,
)
from cupyattn.described import Call, call_of
from cupyattn.problem import FLOAT8, Array


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
    asked = call.function, call.problem, cpu_device(), call.allowed
    if not call.known:
        return in_numpy(plan_for(*asked, call.fixed_split_size), call)[0]
    of_gradients = in_numpy(plan_for_gradients(*asked), call)[1]
    return lambda everything: of_gradients(*_parted(call, everything))


def _parted(call: Call, everything: Arrays) -> tuple[Arrays, Arrays]:
    """Operands, and what is known besides."""
    return {name: everything[name] for name in call.operands}, {name: everything[name] for name in call.known}


def on_gpu(text: str, operands: Sequence[Any], results: Sequence[Any], stream: int) -> None:
    """Queue a described call of CuPy arrays on a stream, its results to be written to given ones.

    What no kernel takes is computed on the host, for which that stream is waited for.
    """
    from cupyattn import cuda

    call = call_of(text)
    arrays, into = _named(call, operands), dict(zip(call.results, results, strict=True))
    with cuda.on_stream(arrays["q"], stream):
        cuda.put(_queued(text, call, arrays, into), into)


def _queued(text: str, call: Call, arrays: Arrays, into: Arrays) -> Arrays:
    from cupyattn import cuda
    from cupyattn.arrays import CUPY

    visit = Visit(call.function, CUPY, arrays, tuple(call.operands.items()), "cuda", arrays)
    device, problem, seed = visit.device(), call.problem, call.seed
    plan = planned(problem, device, call.allowed, call.fixed_split_size)
    of_gradients = planned_backward(problem, device, call.allowed) if call.known else plan
    if "none" in (plan.kernel, of_gradients.kernel) or problem.dtype == FLOAT8:  # which CuPy has no arrays of
        return cuda.on_host(_answer(text), arrays)
    if call.known:
        whole = replace(problem, needs_lse=True)
        return gradients_on_gpu(visit, device, whole, *_parted(call, arrays), call.allowed, seed, into)
    return launched(call.function, CUPY.title, arrays, call.operands, plan, problem, seed, into)


def begin() -> None:
    """From now on programs are answered."""
    serve_programs(on_cpu, on_gpu)
