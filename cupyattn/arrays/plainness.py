"""Which tensors of torch are plain, whose numbers are what their memory says, and when a call of them is.

Plain calls can be recognised at a glance; the others have to be looked at, and are refused or understood.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Mapping
from functools import cache
from operator import attrgetter
from typing import Any

FAKE = ("FakeTensor", "FunctionalTensor")
TRACEABLE = "torch.compile goes around the call; functions of q, k and v, and flash_attn_with_kvcache, are recorded"

NESTED = (
    "is a nested tensor; flash_attn_varlen_func takes sequences of different lengths: values() of one with "
    "layout=torch.jagged, and as cu_seqlens its offsets().int()"
)


def tracer() -> str | None:
    """Who writes down what is done, instead of having it done."""
    own = sys.modules["torch"]._C
    if own._is_tracing():
        return "torch.jit.trace"
    if (proxies := sys.modules.get("torch.fx.experimental.proxy_tensor")) and proxies.get_proxy_mode():
        return "make_fx or torch.export"
    if own._len_torch_dispatch_stack() and own._get_dispatch_mode(own._TorchDispatchModeKey.FAKE):
        return "whoever switched FakeTensorMode on"  # what torch.func has wrapped does not say that it is fake
    return None


def is_transformed() -> bool:
    """By torch.func or forward-mode differentiation: tensors may carry more than their values."""
    import torch

    return bool(torch.autograd.forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active())


_is_on_gpu = attrgetter("is_cuda")


def surroundings(array: Any) -> Hashable | None:
    """As `Library.surroundings`: nobody traces, casts, transforms or intercepts."""
    if not _is_on_gpu(array):
        return None
    torch = sys.modules["torch"]
    own = torch._C
    if own._len_torch_dispatch_stack() or own._len_torch_function_stack() or tracer() is not None:
        return None
    if is_transformed() or torch.is_autocast_enabled("cuda"):
        return None
    return bool(torch.is_inference_mode_enabled())


def glance(array: Any) -> tuple[Hashable, int] | None:
    """As `Library.glance`."""
    torch = sys.modules["torch"]
    if not _is_on_gpu(array) or not is_tensor_itself(type(array)):
        return None
    if array.layout is not torch.strided or array.is_nested or not is_literal(array):
        return None
    if array.requires_grad and torch.is_grad_enabled():
        return None
    try:
        if array.untyped_storage().nbytes() < array.nbytes:
            return None
        address = array.data_ptr()
    except (NotImplementedError, RuntimeError):  # what has left a transform, and is still wrapped
        return None
    fact = (array.shape, array.stride(), array.dtype, address & 15 == 0, array.device, array.is_inference())
    return fact, address


def is_literal(array: Any) -> bool:
    """Neither negated nor zero by a flag: its numbers are what lies in its memory; one that is zero has none."""
    return not (array.is_neg() or array._is_zerotensor())


def reach(array: Any) -> int:
    """Bytes of storage up to the last element."""
    last = sum((size - 1) * step for size, step in zip(array.shape, array.stride(), strict=True))
    return int((array.storage_offset() + last + 1) * array.itemsize) if array.numel() else 0


def is_tensor_itself(kind: Any) -> bool:
    """Or one of torch's that only says what a tensor is for."""
    torch = sys.modules["torch"]
    return kind in (torch.Tensor, torch.nn.Parameter)


def kind_of_results(arrays: Mapping[str, Any]) -> Any:
    """Of a call with such tensors, as torch's own functions choose it; None where these have an error."""
    torch = sys.modules["torch"]
    plain = torch.Tensor
    for array in arrays.values():
        if type(array) is not plain:
            break
    else:
        return plain
    return _kind_of_all(frozenset(map(type, arrays.values()))) if torch._C._is_torch_function_enabled() else plain


@cache
def _kind_of_all(kinds: frozenset[Any]) -> Any:
    """The one that is all of them, by inheritance, those left out that say nothing of results."""
    import torch

    silent = torch._C._disabled_torch_function_impl
    own = [kind for kind in kinds if kind is not torch.Tensor and kind.__torch_function__ is not silent]
    whole = [kind for kind in own if all(issubclass(kind, other) for other in own)]
    return next(iter(whole), None) if own else torch.Tensor


def of_their_kind(arrays: Mapping[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """Results as what torch's own functions return for such tensors, where these are not just tensors."""
    plain, kind = sys.modules["torch"].Tensor, kind_of_results(arrays)
    if kind is plain:
        return results
    return {name: x.as_subclass(kind) if isinstance(x, plain) else x for name, x in results.items()}


@cache
def way_of_its_own(kind: Any) -> str:
    """What to say of a kind of tensor that has its own way with operations: what is in its memory says nothing."""
    import torch

    plain, name = (torch.Tensor, torch.nn.Parameter), kind.__name__
    if name in FAKE:
        return f"is a {name}, which has no values: that of a graph which is being traced, perhaps. {TRACEABLE}"
    if name == "NestedTensor":
        return NESTED
    if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return f"is a {name}, which has no memory of its own; pass a plain tensor"
    own = (getattr(x.__torch_function__, "__func__", x.__torch_function__) for x in (kind, *plain))
    if next(own) in own:
        return ""
    if name == "CausalBias":
        return "is a CausalBias, which has no values; pass causal=True and its alignment, 'top-left' or 'bottom-right'"
    return f"is a {name}, which says by __torch_function__ what it means; pass a plain tensor"
