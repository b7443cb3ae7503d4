"""Gradients of operators: an operator each, ``..._vjp``.

It calls the public function once more, under autograd and with the forward's results at hand, and pulls gradients back
through it: they are those of a call that was not recorded, to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from cupyattn.arrays.operators import Operator
from cupyattn.arrays.registering import PLACE, Registered, no_second_derivative, tensors_of, with_tensors
from cupyattn.arrays.shapes import Values
from cupyattn.arrays.torch import results_at_hand


def add_gradients(operator: Operator, made: Registered) -> None:
    """Define the operator of the gradients, and call it where those of `made` are asked for."""
    import torch

    name = f"{operator.name}_vjp"

    def pull_back(douts: Sequence[Any], results: Sequence[Any], *args: Any) -> list[Any]:
        tensors = [x.detach().requires_grad_() if x.is_floating_point() else x for x in tensors_of(args)]
        leaves = [x for x in tensors if x.requires_grad]
        at_hand = dict(zip(operator.gives, results, strict=False)) if operator.is_one_job else None
        with _autograd_again():
            with results_at_hand(at_hand):
                outs = operator.run(operator.named(with_tensors(args, iter(tensors))))
            pairs = zip(outs, douts, strict=True)
            asked = [(out, dout) for out, dout in pairs if dout is not None and out.requires_grad]
            found: Any = [None] * len(leaves)
            if asked:
                ends, slopes = zip(*asked, strict=True)
                found = torch.autograd.grad(ends, leaves, slopes, allow_unused=True)
        pairs = zip(leaves, found, strict=True)
        return [leaf.new_zeros(leaf.shape) if slope is None else slope.contiguous() for leaf, slope in pairs]

    def without_values(douts: Sequence[Any], results: Sequence[Any], *args: Any) -> list[Any]:
        return [x.new_empty(x.shape) for x in tensors_of(args) if x.is_floating_point()]

    given = ", ".join(f"{argument.kind} {argument.name}" for argument in operator.arguments)
    schema = f"(Tensor?[] douts, Tensor[] results, {given}) -> Tensor[]"
    gradients = Registered(name, schema, pull_back, without_values)

    def refuse(ctx: Any, grads: Any) -> Any:
        raise RuntimeError(no_second_derivative(operator.name))

    gradients.differentiate(lambda ctx, args, results: None, refuse, is_list=True)

    def remember(ctx: Any, args: list[Any], results: tuple[Any, ...]) -> None:
        tensors = list(tensors_of(args))
        uses_results = operator.is_one_job and _uses_results(tensors[0], operator.named(args))
        ctx.save_for_backward(*tensors, *(results[:2] if uses_results else ()))
        ctx.count, ctx.args = len(tensors), with_tensors(args, iter([PLACE] * len(tensors)))
        ctx.mark_non_differentiable(*results[operator.smooth :])

    def differentiate(ctx: Any, grads: tuple[Any, ...]) -> Sequence[Any]:
        saved = ctx.saved_tensors
        tensors, kept = saved[: ctx.count], saved[ctx.count :]
        args = operator.named(with_tensors(ctx.args, iter(tensors)))
        found = iter(gradients.operator(list(grads), list(kept), *args.values()))
        return [next(found) if x.is_floating_point() else None for x in tensors]

    made.differentiate(remember, differentiate, is_list=not operator.gives)


def _uses_results(first: Any, values: Values) -> bool:
    """The backward pass uses out and lse where they were not rounded on the way; see `corridor.gradients`."""
    if "compute_dtype" not in values:
        return False
    compute = values["compute_dtype"] or "float64"
    return bool(first.device.type != "cpu" or str(first.dtype) == f"torch.{compute}")


@contextmanager
def _autograd_again() -> Iterator[None]:
    """Below autograd, where operators run, record for it once more, and cast nothing."""
    import torch

    key, own = torch._C.DispatchKey, torch._C
    excluded = own._dispatch_tls_local_exclude_set()
    for name in ("AutogradFunctionality", "AutogradOther", "AutogradCPU", "AutogradCUDA", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(key, name))
    for name in ("AutocastCPU", "AutocastCUDA"):
        excluded = excluded.add(getattr(key, name))
    with torch.enable_grad(), own._ForceDispatchKeyGuard(own._dispatch_tls_local_include_set(), excluded):
        yield
