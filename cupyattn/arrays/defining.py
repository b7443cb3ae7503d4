"""Operators as torch's, ``torch.ops.cupyattn``: their kernels, and what they are without values.

Where an operator runs it calls its function.  Where there are no values it calls it with outlines, which refuses what
can be refused, and gives tensors without values.  Its gradient is an operator as well, see `pulling`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from cupyattn.arrays.operators import Operator
from cupyattn.arrays.pulling import add_gradients
from cupyattn.arrays.registering import Registered, tensors_of

CAST = frozenset({"q", "k", "v", "query", "key", "value", "qkv", "kv", "bias", "attn_mask", "dout"}) | frozenset(
    {"k_prefix", "v_prefix"}
)
"""What torch.autocast casts, by the callers' names."""


@cache
def define(operator: Operator) -> str:
    """Make it one of torch's, once for a process; its name among torch.ops.cupyattn."""
    is_list = not operator.gives

    def forward(*args: Any) -> Any:
        found = _apart([x.contiguous() for x in operator.run(operator.named(args))], args)
        return found if is_list else _one_or_more(found)

    def without_values(*args: Any) -> Any:
        values = operator.named(args)
        operator.refuse(values)
        for word in operator.overwrites:
            _make_known(values[word])
        like = next(tensors_of(args))
        found = [like.new_empty(shape, dtype=dtype) for shape, dtype in operator.results(values)]
        return found if is_list else _one_or_more(found)

    made = Registered(operator.name, operator.schema, forward, without_values)
    if operator.has_gradients:
        add_gradients(operator, made)
    elif operator.no_gradients:
        words = [argument.word for argument in operator.arguments]
        made.refuse_transforms(operator.no_gradients, [words.index(word) for word in operator.overwrites])
    else:
        made.pass_autograd_by()
    for kind in ("CPU", "CUDA"):
        made.library.impl(operator.name, _under_autocast(operator, kind), f"Autocast{kind}")
    return operator.name


def _make_known(x: Any) -> None:
    """Where a view lies that is written to, a constant of the graph and not a symbol.

    For such a symbol torch's Inductor takes 0, and writes to the beginning of what it is a view of
    (https://github.com/pytorch/pytorch/issues/198068).  Sizes and strides are what it may be made of.
    """
    if not isinstance(x.storage_offset(), int):
        for number in (*x.shape, *x.stride(), x.storage_offset()):
            int(number)


def _apart(found: list[Any], args: tuple[Any, ...]) -> list[Any]:
    """Results in memory of their own, as those of operators have to be, but for what is overwritten anyway."""
    theirs = {x.untyped_storage()._cdata for x in tensors_of(args)}
    return [x.clone() if x.untyped_storage()._cdata in theirs else x for x in found]


def _one_or_more(found: list[Any]) -> Any:
    return found[0] if len(found) == 1 else tuple(found)


def _under_autocast(operator: Operator, kind: str) -> Callable[..., Any]:
    """As torch's own attention is called there: with its operands cast, unless they are float64."""
    import torch

    narrow = (torch.float16, torch.bfloat16, torch.float32)
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{kind}"))

    def call(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(kind.lower())
        if operator.casts_inside:
            told = operator.named(args) | {"autocast": str(dtype).removeprefix("torch.")}
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return getattr(torch.ops.cupyattn, operator.name)(*told.values())
        named = zip(operator.arguments, args, strict=False)
        cast = [
            x.to(dtype) if argument.name in CAST and x is not None and x.dtype in narrow else x for argument, x in named
        ]
        with torch._C._ExcludeDispatchKeyGuard(keys):
            found = getattr(torch.ops.cupyattn, operator.name)(*cast)
        if operator.gives:
            return found
        return [x.to(kind) for x, (_, kind) in zip(found, operator.results(operator.named(args)), strict=True)]

    return call
