"""`explain`: what a call would do, as a value."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import wraps
from typing import Any, Literal, overload

from cupyattn import reading
from cupyattn.allowed import allowed_by
from cupyattn.arrays import described, enter, untraced
from cupyattn.corridor import planned, planned_backward, under_our_names, weighed
from cupyattn.plan import Plan
from cupyattn.problem import Alignment, Implementation, Spec
from cupyattn.reading import attention_options, read, refusal
from cupyattn.rehearsing import check_device, device_meant, explain_call, unsaid_dtype


def _or_a_call(of_arrays: Callable[..., Plan]) -> Callable[..., Plan]:
    """`explain` that takes a function and its arguments as well."""

    @wraps(of_arrays)
    def either(*args: Any, **words: Any) -> Plan:
        if args and callable(args[0]):
            return explain_call(*args, **words)
        return of_arrays(*args, **words)

    return either


# fmt: off
@overload
def explain(
    function: Callable[..., Any], /, *args: Any, dtype: Any = ..., device: str | None = ..., backward: bool = ...,
    **words: Any,
) -> Plan: ...
@overload
def explain(
    q: Any, k: Any, v: Any, *, dtype: Any = ..., device: str | None = ..., layout: Literal["bshd", "bhsd"] = ...,
    causal: bool = ..., alignment: Alignment | None = ..., window_size: tuple[int | None, int | None] = ...,
    mask: Any = ..., bias: Any = ..., softmax_scale: float | None = ..., softcap: float = ..., alibi_slopes: Any = ...,
    sinks: Any = ..., q_descale: Any = ..., k_descale: Any = ..., v_descale: Any = ..., seqlens_q: Any = ...,
    seqlens_k: Any = ..., dropout_p: float = ..., dropout_seed: int | None = ..., compute_dtype: Any = ...,
    fixed_split_size: int | None = ..., return_lse: bool = ...,
    implementation: Implementation | Collection[Implementation] | None = ..., backward: bool = ...,
) -> Plan: ...
# fmt: on
@_or_a_call
@untraced
def explain(
    q: Any,
    k: Any,
    v: Any,
    *,
    dtype: Any = None,
    device: str | None = None,
    layout: Literal["bshd", "bhsd"] = "bshd",
    causal: bool = False,
    alignment: Alignment | None = None,
    window_size: tuple[int | None, int | None] = (None, None),
    mask: Any = None,
    bias: Any = None,
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    sinks: Any = None,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    seqlens_q: Any = None,
    seqlens_k: Any = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    compute_dtype: Any = None,
    fixed_split_size: int | None = None,
    return_lse: bool = False,
    implementation: Implementation | Collection[Implementation] | None = None,
    backward: bool = False,
) -> Plan:
    """How a call would be done, or its gradients, and why not otherwise; nothing is computed.

    ``explain(q, k, v, ...)`` is about `attention`.  ``explain(function, ...)`` is about ``function(...)``, one of the
    attention functions here, or `attend` of a cache: the call as it is, with `explain` in front of it.

    Parameters
    ----------
    function : callable
        `attention`, `attention_backward`, `scaled_dot_product_attention`, `cascade_attention`, `flash_attn_func` and
        its kind, `flash_attn_with_kvcache`, or a cache's ``cache.attend``; its own arguments follow.  Arrays may be
        given by their shapes, as below; lengths and tables of int32 as well, whose values no plan depends on.  `out`
        and `lse_out` are not looked at.
    q, k, v, mask, bias, alibi_slopes, sinks, seqlens_q, ... : array or tuple of int
        Arrays as `attention` takes them, or their shapes alone; or what has a shape and a dtype and no values,
        like a jax.ShapeDtypeStruct or a torch.Tensor on the meta device.
    dtype : str or dtype, optional
        Of q, k and v where only shapes are given.  Default float32 on the CPU, float16 on a GPU; a cache's own.
    device : str, optional
        "cpu", or a GPU by name: one of the names in the error that an unknown name gives.  Default: where the
        arrays are; "cpu" where none has values.
    implementation : str or tuple of str, optional
        As for `attention`, and as `implementations` says what gradients make of it.
    backward : bool
        Explain the gradients of q, k and v, and of what else has any, instead of the call itself.

    Returns
    -------
    Plan
        Prints itself: implementation, tile, splits, workers, flops, bytes, the memory it takes besides the operands,
        the size of a cache, the reason for it, and each other implementation's reasons against it.  Its `kernel` is
        "none" if all object.

    Raises
    ------
    TypeError, ValueError
        As the call would before it looks at values; also for an unknown `device`, for a function that is none of those,
        for gradients of what has none, and for a `fixed_split_size` of gradients, which are not split.

    Notes
    -----
    For a decode on a GPU the plan also says into how many splits flash-attn 2 and 3 would have cut the keys.

    `Plan.memory` has the results in it.  On a GPU it is what is asked of the library's allocator, but for arrays that
    have to be copied, which the plan names.  On a CPU it is an estimate: within a factor of 1.6, up or down, of what
    NumPy allocates at the peak, in the tests.  Where lengths are data it is for the longest.  Operands of gradients are
    dout, out and lse as well.  The memory of a compiled program of JAX is not counted.

    A cascade is two problems, whose plans are one: the first one's, with what both take, but for their merge on a GPU.

    Examples
    --------
    >>> import cupyattn
    >>> shape = (1, 1, 32, 128), (1, 8192, 8, 128), (1, 8192, 8, 128)
    >>> plan = cupyattn.explain(*shape, dtype="bfloat16", device="H100")
    >>> plan.kernel, plan.num_splits > 1
    ('splitkv', True)

    A call as it is, of arrays or shapes; and of a cache:

    >>> pages = (1024, 64, 8, 128)
    >>> call = cupyattn.flash_attn_with_kvcache, (8, 1, 32, 128), pages, pages
    >>> plan = cupyattn.explain(*call, block_table=(8, 128), cache_seqlens=(8,), dtype="bfloat16", device="H100")
    >>> plan.kernel, plan.cache_bytes
    ('splitkv', 268435456)
    >>> import numpy as np
    >>> cache, x = cupyattn.DynamicCache(), np.ones((1, 9, 2, 8), np.float32)
    >>> cache.append(x, x)
    >>> cupyattn.explain(cache.attend, x[:, -1:]).cache_bytes == cache.nbytes
    True
    """
    function = "explain"
    reading.dropout_seed(function, dropout_seed)
    size = reading.split_size(function, fixed_split_size)
    _check_backward(function, backward, size)
    allowed = allowed_by(function, implementation)
    options = attention_options(
        function, layout, causal, alignment, window_size, softmax_scale, softcap, dropout_p, compute_dtype, return_lse,
        takes_float8=not backward,
    )  # fmt: skip
    given = under_our_names(
        q=q, k=k, v=v, mask=mask, bias=bias, alibi_slopes=alibi_slopes, sinks=sinks,
        q_descale=q_descale, k_descale=k_descale, v_descale=v_descale, seqlens_q=seqlens_q, seqlens_k=seqlens_k,
    )  # fmt: skip
    shapes: dict[str, tuple[Any, str | None]] = {}
    for name, (_, what) in given.items():
        found = (what, None) if isinstance(what, (tuple, list)) else described(what)
        if found is not None:
            shapes[name] = found
    present = {name: entry for name, entry in given.items() if entry[1] is not None or name in ("q", "k", "v")}
    arrays = {name: entry for name, entry in present.items() if name not in shapes}
    check_device(function, device)
    visit = enter(function, arrays) if arrays else None
    specs = dict(visit.specs) if visit else {}
    specs |= _specs_of_shapes(function, shapes, specs, dtype, device)
    problem = read(function, tuple((name, specs[name]) for name in given if name in specs), options)
    there = device_meant(device, visit)
    plan = planned_backward(problem, there, allowed) if backward else planned(problem, there, allowed, size)
    plan = weighed(plan, problem, specs, backward)
    as_they_lie = device is None and visit is not None and not problem.layout.seqlens
    return replace(plan, notes=plan.notes + visit.notes(problem, plan)) if visit and as_they_lie else plan


def _check_backward(function: str, backward: Any, size: int | None) -> None:
    if reading.flag(function, "backward", backward) and size is not None:
        rule = "fixed_split_size is about the call itself: gradients are not split"
        raise ValueError(refusal(function, rule, ("fixed_split_size", size), ("backward", backward)))


def _specs_of_shapes(
    function: str,
    shapes: Mapping[str, tuple[Any, str | None]],
    of_arrays: Mapping[str, Spec],
    dtype: Any,
    device: str | None,
) -> dict[str, Spec]:
    """Of arguments that have a shape, and a dtype or None, and no values; beside those that are arrays."""
    known = {name: spec.dtype for name, spec in of_arrays.items()}
    known |= {name: kind for name, (_, kind) in shapes.items() if kind is not None}
    own = next((known[name] for name in ("q", "k", "v") if name in known), None)
    name_of_dtype = own or ("float32" if device in (None, "cpu") else "float16")
    if dtype is not None:
        name_of_dtype = reading.dtype_name(dtype)
        if own is not None and name_of_dtype != own and {"q", "k", "v"} <= set(known):
            raise TypeError(refusal(function, f"dtype has to be that of the arrays, {own}", ("dtype", name_of_dtype)))
    specs = {}
    for name, (shape, kind) in shapes.items():
        sizes = reading.integers(function, name, shape, high=2**63 - 1)
        specs[name] = Spec(name, sizes, kind or unsaid_dtype(name, name_of_dtype))
    return specs
