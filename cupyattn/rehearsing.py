"""`explain` of a call: it is made with sketches of its arrays, on any device, up to where the work would begin."""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from inspect import Parameter, signature
from typing import Any

import numpy as np

from cupyattn import reading
from cupyattn.allowed import allowed_by
from cupyattn.arrays import Rehearsed, Sketch, Sketches, Visit, alignment_meant, described, enter
from cupyattn.corridor import NoImplementation, planned_backward, weighed
from cupyattn.plan import Plan
from cupyattn.problem import FLOAT8, NAMED_DEVICES, Device, Problem, Spec
from cupyattn.reading import refusal

FUNCTION = "explain"
FUNCTIONS = (
    *("attention", "attention_backward", "scaled_dot_product_attention", "cascade_attention"),
    *("flash_attn_func", "flash_attn_qkvpacked_func", "flash_attn_kvpacked_func", "flash_attn_with_kvcache"),
    *("flash_attn_varlen_func", "flash_attn_varlen_qkvpacked_func", "flash_attn_varlen_kvpacked_func"),
)
"""What can be rehearsed, besides `attend` of caches."""
ARRAYS = ("A", "A | None", "Array", "Array | None", "int | Array | None")
"""Annotations of arguments that are arrays, and may be shapes here."""
OF_A_LAYER = ("alibi_slopes", "sinks", *reading.DESCALES)
"""Arrays that `LayeredCache.attend` hands on."""
OUR_WORDS = {"page_table": "block_table", "attn_mask": "mask", "seqused_q": "seqlens_q", "seqused_k": "seqlens_k"}
INDICES = (*reading.INDICES, "cu_seqlens", "page_table", "seqused_q", "seqused_k")
WITHOUT_GRADIENTS = ("flash_attn_with_kvcache", "cascade_attention", "attend")


def explain_call(
    function: Callable[..., Any],
    /,
    *args: Any,
    dtype: Any = None,
    device: str | None = None,
    backward: bool = False,
    **words: Any,
) -> Plan:
    """The plan of ``function(*args, **words)``, see `explain`."""
    name, owner = _named(function)
    check_device(FUNCTION, device)
    if reading.flag(FUNCTION, "backward", backward) and name in WITHOUT_GRADIENTS:
        rule = f"{name} has no gradients of its own to be explained"
        raise ValueError(refusal(FUNCTION, rule, ("backward", backward)))
    called = name if owner is None else f"{type(owner).__name__}.{name}"
    if text := reading.wrong_call(function, args, words, called):
        raise TypeError(text)
    arrays, others = _taken_apart(function, args, words)
    kind = None if owner is None else owner._kind
    visit = _visit_of(name, arrays, kind)
    there = device_meant(device, visit)
    library = Sketches()
    sketches = _sketches(arrays, visit, dtype, kind, there)
    call = function if owner is None else owner._sketched(there, library).attend
    try:
        call(**others, **sketches)
    except Rehearsed as rehearsed:
        specs, steps = rehearsed.specs, rehearsed.steps
    except NoImplementation as error:
        specs, steps = {}, [error.because]
    gradients = backward or name == "attention_backward"
    if backward and name != "attention_backward":
        allowed = allowed_by(FUNCTION, others.get("implementation"))
        steps = [(problem, planned_backward(problem, there, allowed)) for problem, _ in steps]
    plan = _together(steps, specs, gradients)
    if owner is not None:
        if any(step.is_scheduled(problem) for problem, step in steps):
            plan = replace(plan, notes=(*plan.notes, owner._about_schedules))
        made = None if plan.memory is None else plan.memory + library.nbytes_made
        plan = replace(plan, memory=made, cache_bytes=owner.nbytes)
    elif visit is not None and device is None:
        plan = replace(plan, notes=plan.notes + visit.library.notes())
    return plan


def _named(function: Callable[..., Any]) -> tuple[str, Any]:
    """A function's name, and the cache that it is a method of, if it is one."""
    owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
    if name == "attend" and hasattr(owner, "_sketched"):
        return name, owner
    if name in FUNCTIONS and function is getattr(sys.modules["cupyattn"], name):
        return name, None
    rule = f"only attention can be explained: {', '.join(FUNCTIONS)}, or attend of a cache"
    raise TypeError(refusal(FUNCTION, rule, ("function", reprlib.repr(function))))


def _taken_apart(
    function: Callable[..., Any], args: Sequence[Any], words: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A call's arrays by name, and its other arguments; results have no destination."""
    parameters = signature(function).parameters
    bound = signature(function).bind(*args, **words).arguments
    arrays: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for word, value in bound.items():
        if parameters[word].kind is Parameter.VAR_KEYWORD:
            arrays |= {name: x for name, x in value.items() if name in OF_A_LAYER}
            others |= {name: x for name, x in value.items() if name not in OF_A_LAYER}
        elif word in ("out", "lse_out") and "lse" not in parameters:
            continue
        elif parameters[word].annotation in ARRAYS and not _is_no_array(value):
            arrays[word] = value
        else:
            others[word] = value
    return {word: x for word, x in arrays.items() if x is not None}, others


def _is_no_array(value: Any) -> bool:
    """A number for all sequences, or a mask that says "causal"."""
    return reading.is_one_number(value) or (value is not None and alignment_meant(value) is not None)


def _shape_of(value: Any) -> tuple[Any, str | None] | None:
    """Shape and dtype, or None for that, of what has no values."""
    return (value, None) if isinstance(value, (tuple, list)) else described(value)


def _visit_of(name: str, arrays: Mapping[str, Any], kind: Any) -> Visit | None:
    """The arrays that have values, and where they are."""
    real = {OUR_WORDS.get(word, word): (word, x) for word, x in arrays.items() if _shape_of(x) is None}
    if kind is not None:
        real["kept"] = ("the cache", kind.anchor)
    return enter(name, real) if real else None


def _sketches(
    arrays: Mapping[str, Any], visit: Visit | None, dtype: Any, kind: Any, there: Device
) -> dict[str, Sketch]:
    """One for each array, or shape, of a call."""
    known = {} if visit is None else dict(visit.specs)
    given = {word: _shape_of(x) or _of_spec(known[OUR_WORDS.get(word, word)]) for word, x in arrays.items()}
    own = next((found for word, (_, found) in given.items() if found is not None and _is_operand(word)), None)
    own = own or (None if kind is None else kind.dtype)
    own = own or ("float32" if there.kind == "cpu" else "float16")
    own = own if dtype is None else reading.dtype_name(dtype)
    found = {}
    for word, (shape, its_dtype) in given.items():
        sizes = tuple(reading.integer(FUNCTION, word, size, low=0, high=2**63 - 1) for size in shape)
        found[word] = Sketch(sizes, its_dtype or unsaid_dtype(word, own), there)
    return found


def _of_spec(spec: Spec) -> tuple[Any, str | None]:
    return spec.shape, spec.dtype


def _is_operand(word: str) -> bool:
    return word in ("q", "k", "v", "query", "key", "value", "qkv", "kv", "k_cache", "v_cache")


def unsaid_dtype(word: str, own: str) -> str:
    """Of an argument of which only the shape is known, beside q, k and v in the dtype `own`."""
    if word in ("mask", "attn_mask"):
        return "bool"
    if word in INDICES:
        return "int32"
    if word in ("lse", "dlse"):
        return "float64" if own == "float64" else "float32"
    edits = ("bias", "sinks", "alibi_slopes", "rotary_cos", "rotary_sin")
    return "float32" if word in reading.DESCALES or (own == FLOAT8 and word in edits) else own


def _together(steps: Sequence[tuple[Problem, Plan]], specs: Mapping[str, Spec], gradients: bool) -> Plan:
    """One plan of all problems of a call, whose arrays are numbered where there may be several."""
    plans = []
    for i, (problem, plan) in enumerate(steps):
        own = {word: specs[f"{word}{i}"] for word in ("q", "k", "v")} if f"q{i}" in specs else specs
        plans.append(weighed(plan, problem, own, gradients))
    first, *others = plans
    if not others:
        return first
    return replace(
        first,
        flops=sum(plan.flops for plan in plans),
        bytes=sum(plan.bytes for plan in plans),
        memory=sum(plan.memory or 0 for plan in plans),
        cache_bytes=max(plan.cache_bytes for plan in plans),
        notes=(*first.notes, *(f"merged with keys that all have: {plan.kernel}, {plan.reason}" for plan in others)),
    )


def check_device(function: str, device: Any) -> None:
    if device is not None and not (isinstance(device, str) and (device == "cpu" or device in NAMED_DEVICES)):
        rule = f"device has to be 'cpu' or one of {', '.join(NAMED_DEVICES)}"
        raise ValueError(refusal(function, rule, ("device", repr(device))))


def device_meant(device: str | None, visit: Visit | None) -> Device:
    """The one that is named, or where the arrays are, or the CPU."""
    if device is not None:
        return _cpu_device() if device == "cpu" else NAMED_DEVICES[device]
    return _cpu_device() if visit is None else visit.device()


def _cpu_device() -> Device:
    return enter(FUNCTION, {"q": ("q", np.empty(0))}).device()
