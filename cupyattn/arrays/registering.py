"""An operator as torch knows it: its kernels, its gradients, vmap.

Written by hand where torch.library.custom_op would do it, since gradients made by that are none under torch.func.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cupyattn.reading import refusal

Remember = Callable[[Any, list[Any], tuple[Any, ...]], None]
"""Of a context, an operator's arguments and its results."""
PullBack = Callable[[Any, tuple[Any, ...]], Sequence[Any]]
"""Of a context and gradients of results: gradients of all tensors among the arguments."""


class Place:
    """Where a tensor was among arguments."""


PLACE = Place()


def tensors_of(args: Sequence[Any]) -> Iterator[Any]:
    """Every tensor among the arguments, in order."""
    import torch

    for value in args:
        yield from (x for x in (value if isinstance(value, (list, tuple)) else (value,)) if isinstance(x, torch.Tensor))


def with_tensors(args: Sequence[Any], tensors: Iterator[Any]) -> list[Any]:
    """The arguments, with others for their tensors."""
    import torch

    def instead(value: Any) -> Any:
        return next(tensors) if isinstance(value, (torch.Tensor, Place)) else value

    return [[instead(x) for x in value] if isinstance(value, (list, tuple)) else instead(value) for value in args]


@dataclass(eq=False)
class Call:
    """What an autograd.Function is told besides tensors."""

    args: Sequence[Any]
    keys: Any
    """With which torch came to autograd."""


class Registered:
    """An operator of torch, without a rule for autograd yet."""

    def __init__(self, name: str, schema: str, forward: Callable[..., Any], without_values: Callable[..., Any]) -> None:
        import torch

        self.name, self.no_transforms = name, ""
        kind: Any = torch.library.Library
        self.library: Any = kind("cupyattn", "FRAGMENT")
        _LIBRARIES.append(self.library)
        self.library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
        self.library.impl(name, forward, "CompositeExplicitAutograd")
        self.operator = getattr(torch.ops.cupyattn, name).default
        torch.library.register_fake(f"cupyattn::{name}", without_values, lib=self.library)
        torch.library.register_vmap(f"cupyattn::{name}", self._one_after_the_other, lib=self.library)

    def _below_autograd(self, keys: Any, args: Sequence[Any]) -> Any:
        """Its results, as if autograd did not look on."""
        import torch

        with torch._C._AutoDispatchBelowAutograd():
            return self.operator.redispatch(keys & torch._C._after_autograd_keyset, *args)

    def pass_autograd_by(self) -> None:
        """Results have no gradients, and nobody is told."""

        def call(keys: Any, *args: Any) -> Any:
            return self._below_autograd(keys, args)

        self.library.impl(self.name, call, "Autograd", with_keyset=True)

    def refuse_transforms(self, rule: str, overwritten: Sequence[int]) -> None:
        """Refuse what would lose gradients, before anything is overwritten; those arguments that are have a version."""
        import torch

        self.no_transforms = rule

        def call(keys: Any, *args: Any) -> Any:
            watched = torch.is_grad_enabled() and any(x.requires_grad for x in tensors_of(args))
            if watched or torch._C._are_functorch_transforms_active():
                raise NotImplementedError(refusal(self.name, rule))
            return self._below_autograd(keys, args)

        def overwrite(keys: Any, *args: Any) -> Any:
            for i in overwritten:
                if not args[i].is_inference():
                    torch.autograd.graph.increment_version(args[i])
            with torch._C._AutoDispatchBelowADInplaceOrView():
                return self.operator.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *args)

        self.library.impl(self.name, call, "Autograd", with_keyset=True)
        self.library.impl(self.name, overwrite, "ADInplaceOrView", with_keyset=True)

    def differentiate(self, remember: Remember, pull_back: PullBack, is_list: bool = False) -> None:
        """By gradients that `pull_back` makes of what was remembered; there is no other way."""
        import torch
        from torch._functorch.utils import enable_single_level_autograd_function

        step = _step(self._below_autograd, remember, pull_back, no_forward_derivative(self.name.removesuffix("_vjp")))

        def call(keys: Any, *args: Any) -> Any:
            watched = torch.is_grad_enabled() and any(x.requires_grad for x in tensors_of(args))
            if not watched:
                return self._below_autograd(keys, args)
            with enable_single_level_autograd_function():
                found = step.apply(Call(args, keys), *tensors_of(args))
            return list(found) if is_list else found

        self.library.impl(self.name, call, "Autograd", with_keyset=True)

    def _one_after_the_other(self, info: Any, in_dims: Any, *args: Any) -> Any:
        """How vmap calls it."""

        def pick(value: Any, axis: Any, i: int) -> Any:
            if isinstance(axis, (list, tuple)):
                return [pick(x, its_axis, i) for x, its_axis in zip(value, axis, strict=True)]
            return value if axis is None else value.select(axis, i)

        if self.no_transforms:
            raise NotImplementedError(refusal(self.name, self.no_transforms))
        if info.batch_size == 0:
            raise ValueError(refusal(self.name.removesuffix("_vjp"), "vmap has to be over at least one"))
        return _stacked(
            [
                self.operator(*(pick(x, axis, i) for x, axis in zip(args, in_dims, strict=True)))
                for i in range(info.batch_size)
            ]
        )


_LIBRARIES: list[Any] = []
"""torch forgets what they define once they are gone."""


def no_forward_derivative(function: str) -> str:
    rule = "has no forward-mode derivative; torch.autograd.grad and torch.func.grad, vjp and jacrev have one"
    return refusal(function, rule)


def no_second_derivative(function: str) -> str:
    return refusal(function, "has first derivatives only, and a gradient of one was asked for")


def _stacked(calls: Sequence[Any]) -> tuple[Any, Any]:
    """Results of many calls as those of one, and the axes along which they lie."""
    import torch

    if isinstance(calls[0], torch.Tensor):
        return torch.stack(list(calls)), 0
    kind = type(calls[0])
    stacked = kind(torch.stack(results) for results in zip(*calls, strict=True))
    return stacked, kind(0 for _ in stacked)


def _step(
    below_autograd: Callable[[Any, Sequence[Any]], Any], remember: Remember, pull_back: PullBack, no_tangents: str
) -> Any:
    """An autograd.Function of one level, since torch has taken torch.func's transforms apart before it comes here."""
    import torch

    function: Any = torch.autograd.function._SingleLevelFunction

    class Step(function):  # type: ignore[misc]  # torch may not be there when this is checked
        @staticmethod
        def forward(ctx: Any, call: Call, *tensors: Any) -> Any:
            args = with_tensors(call.args, iter(tensors))
            found = below_autograd(call.keys, args)
            results = (found,) if isinstance(found, torch.Tensor) else tuple(found)
            ctx.set_materialize_grads(False)
            remember(ctx, args, results)
            return found if isinstance(found, torch.Tensor) else results

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return None, *pull_back(ctx, grads)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise NotImplementedError(no_tangents)

    return Step
