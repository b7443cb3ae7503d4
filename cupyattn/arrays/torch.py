"""torch's tensors, and the autograd.Function through which gradients flow; torch itself is imported late."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from cupyattn.arrays import counting, plainness
from cupyattn.arrays.library import CAST, Arrays, Job, Library, Traced, check_no_overlap, reach_of
from cupyattn.arrays.registering import no_forward_derivative, no_second_derivative
from cupyattn.cpu import lent_by_torch
from cupyattn.problem import Alignment, Array, Shape, Spec
from cupyattn.reading import refusal


class Torch(Library):
    title = "torch.Tensor"
    when_deferred = "which under vmap are those of many; call it outside of vmap"

    def dtype(self, array: Any) -> str:
        return _name_of(array.dtype)

    def place(self, array: Any) -> tuple[str, Any]:
        return array.device.type, array.device

    def check_call(self, function: str) -> None:
        """Refuse to become a constant of somebody's graph.  In the implementation of an operator nothing is traced."""
        by = plainness.tracer()
        if by is None:
            return
        rule = (
            f"cannot be traced by {by}, whose graph would hold the numbers of this example for all others. "
            f"{plainness.TRACEABLE}"
        )
        raise Traced(refusal(function, rule))

    def before_work(self, specs: Any, steps: Any) -> None:
        counting.count(sum(plan.flops for _, plan in steps))

    def surroundings(self, array: Any) -> Hashable | None:
        return plainness.surroundings(array)

    def glance(self, array: Any) -> tuple[Hashable, int] | None:
        return plainness.glance(array)

    def reach(self, array: Any) -> tuple[int, int]:
        return reach_of(array.shape, array.stride(), array.itemsize, array.itemsize)

    def refuses(self, array: Any) -> str | None:
        said = plainness.way_of_its_own(type(array))  # type: ignore[arg-type]
        if said:
            return said
        if array.is_nested:
            return plainness.NESTED
        if array.layout is not sys.modules["torch"].strided:
            return f"is not a strided tensor ({array.layout}); pass its to_dense()"
        try:
            held = array.untyped_storage().nbytes()
        except (NotImplementedError, RuntimeError):  # under a transform, where memory is that of what is inside
            return None
        if held < array.nbytes and held < plainness.reach(array):
            return f"has no memory of its own any more: its storage was resized to {held} bytes, as FSDP does"
        return None

    def has_no_values(self, array: Any) -> bool:
        """On the meta device, or a FakeTensor."""
        kind: Any = type(array)
        return kind.__name__ in plainness.FAKE or (array.device.type == "meta" and not plainness.way_of_its_own(kind))

    def as_called(self, arrays: Arrays, kind: str, in_place: tuple[str, ...]) -> Arrays:
        """Under torch.autocast as torch's own function has them: q, k, v and a bias, unless they are float64."""
        torch = sys.modules["torch"]
        if not torch.is_autocast_enabled(kind):
            return arrays
        dtype, narrow = torch.get_autocast_dtype(kind), (torch.float16, torch.bfloat16, torch.float32)

        def is_cast(word: str, array: Any) -> bool:
            return array.dtype in narrow and word not in in_place and word.rstrip("0123456789") in CAST

        return {word: array.to(dtype) if is_cast(word, array) else array for word, array in arrays.items()}

    def check_kinds(self, function: str, arrays: Arrays) -> None:
        if plainness.kind_of_results(arrays) is None:
            rule = "results would be of the type of one of these tensors, and none is a subclass of all the others"
            raise TypeError(refusal(function, rule, *((name, type(array).__name__) for name, array in arrays.items())))

    def of_their_kind(self, arrays: Arrays, results: Arrays) -> Arrays:
        return plainness.of_their_kind(arrays, results)

    def as_given(self, results: Arrays, given: Arrays) -> Arrays:
        return {name: result.to(given[name].dtype) for name, result in results.items()}

    def alignment_meant(self, mask: Any) -> tuple[Alignment, Shape] | None:
        """Of torch's causal_upper_left and causal_lower_right."""
        bias = sys.modules.get("torch.nn.attention.bias")
        if bias is None or not isinstance(mask, bias.CausalBias):
            return None
        is_left = mask.variant == bias.CausalVariant.UPPER_LEFT
        return "top-left" if is_left else "bottom-right", (mask.seq_len_q, mask.seq_len_kv)

    def num_threads(self) -> int | None:
        return int(sys.modules["torch"].get_num_threads())

    def is_deferred(self, arrays: Arrays) -> bool:
        """Under vmap."""
        import torch

        return any(torch._C._functorch.is_batchedtensor(_without_gradients(array)) for array in arrays.values())

    def to_numpy(self, array: Any) -> Array:
        import torch

        plain = array.detach().resolve_neg()
        if plain.dtype == torch.bfloat16:
            return np.asarray(plain.view(torch.int16).numpy(force=True)).view(np.uint16)
        if plain.dtype == torch.float8_e4m3fn:
            return np.asarray(plain.view(torch.uint8).numpy(force=True))
        return np.asarray(plain.numpy(force=True))  # or what is zero by a flag is refused

    def values(self, array: Any) -> Array:
        """Also under torch.func's transforms, which would wrap what we make of the array."""
        import torch

        with torch._C._DisableFuncTorch():
            return self.to_numpy(_without_gradients(array).cpu())

    def from_numpy(self, array: Array, dtype: str, like: Any) -> Any:
        import torch

        if dtype == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    def empty(self, shape: Shape, like: Any) -> Any:
        """Not an inference tensor, which could only be written to where it was made."""
        import torch

        with torch.inference_mode(False):
            return torch.empty(shape, dtype=like.dtype, device=like.device)

    def bring(self, values: Array, like: Any) -> Any:
        return super().bring(values, like).to(like.device)

    def take(self, array: Any, places: Array) -> Any:
        return array.index_select(0, self.index(places, array))

    def places(self, pairs: Array, like: Any) -> Any:
        return tuple(self.index(pairs, like))

    def scatter(self, array: Any, places: Any, values: Any) -> Any:
        array[places] = values
        return array

    def check_keepable(self, function: str, arrays: Arrays) -> None:
        super().check_keepable(function, arrays)
        if self._records(arrays) or self.is_transformed():
            rule = f"keeps {' and '.join(arrays)} without their gradients; call it under torch.no_grad()"
            raise ValueError(refusal(function, rule))

    def write(self, function: str, name: str, array: Any, values: Any) -> None:
        array.copy_(values)

    def as_it_is_now(self, name: str, arrays: Arrays) -> Any:
        return arrays[name].clone() if self._records(arrays) else arrays[name]

    def check_writable(self, function: str, name: str, array: Any) -> None:
        import torch

        if array.is_leaf and array.requires_grad and torch.is_grad_enabled():
            rule = f"{name} is a leaf that requires grad and was to be overwritten; pass inplace=False"
            raise ValueError(refusal(function, rule, (name, tuple(array.shape))))
        if array.is_inference() and not torch.is_inference_mode_enabled():
            rule = f"{name} was to be overwritten, and is an inference tensor, which can be only in inference mode"
            raise ValueError(refusal(function, rule, (name, tuple(array.shape))))
        check_no_overlap(function, name, tuple(array.shape), array.stride(), 1)

    def check_in_place(self, function: str, name: str, array: Any) -> None:
        if not plainness.is_literal(array):
            rule = f"{name} was to be overwritten, and is negated or zero by a flag; pass its resolve_neg() or clone()"
            raise ValueError(refusal(function, rule, (name, tuple(array.shape))))

    def note_overwritten(self, array: Any) -> None:
        import torch

        if not array.is_inference():
            torch.autograd.graph.increment_version(array)

    def differentiates(self, arrays: Arrays) -> bool:
        return self.is_transformed() or self._records(arrays)

    def draw_seed(self, function: str) -> Any:
        """From torch's own generator on the CPU, so that torch.manual_seed governs it, as vmap's randomness does."""
        import torch

        seed = torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device="cpu")
        return seed if self.is_deferred({"seed": seed}) else int(seed)

    def run(self, job: Job, arrays: Arrays) -> Arrays:
        if self.is_transformed() or (job.backward is not None and self._records(arrays)):
            found = dict(zip(job.results, _forwards().apply(job, *arrays.values()), strict=False))
        else:
            found = self.run_forward(job, arrays)
        return self.of_their_kind(arrays, found)

    def run_forward(self, job: Job, arrays: Arrays) -> Arrays:
        """The numbers alone, whether or not anybody records the call."""
        if job.at_home:
            return super().run(job, arrays)
        with lent_by_torch(sys.modules["torch"].get_num_threads()):
            return super().run(job, arrays)

    def is_transformed(self) -> bool:
        """By torch.func or forward-mode differentiation: tensors may carry more than their values."""
        return plainness.is_transformed()

    def _records(self, arrays: Arrays) -> bool:
        """Gradients may be asked for later."""
        import torch

        return torch.is_grad_enabled() and any(array.requires_grad for array in arrays.values())


@cache
def _name_of(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _without_gradients(tensor: Any) -> Any:
    """What torch.func's grad and vjp have wrapped."""
    import torch

    functorch = torch._C._functorch
    while functorch.is_gradtrackingtensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


@cache
def _step() -> Any:
    """An autograd.Function, made on first use as the two below are, since torch may be absent."""
    import torch

    function: Any = torch.autograd.Function

    class Step(function):  # type: ignore[misc]  # torch may not be there when this is checked
        """What both passes have in common; the operands are a job and tensors."""

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise NotImplementedError(no_forward_derivative(ctx.job.function))

        @classmethod
        def vmap(cls: Any, info: Any, in_dims: Any, job: Job, *tensors: Any) -> Any:
            """One call after the other."""
            if info.batch_size == 0:
                raise ValueError(refusal(job.function, "vmap has to be over at least one"))
            axes = in_dims[1:]
            calls = [
                cls.apply(
                    job, *(x if axis is None else x.select(axis, i) for x, axis in zip(tensors, axes, strict=True))
                )
                for i in range(info.batch_size)
            ]
            stacked = tuple(torch.stack(results) for results in zip(*calls, strict=True))
            return stacked, (0,) * len(stacked)

    return Step


@cache
def _backwards() -> Any:
    """The backward pass, which is a Function too.

    So its own derivative is refused and not zero, and torch.func, which wraps the tensors that a backward pass sees,
    unwraps them for it.
    """
    import torch

    step: Any = _step()

    class Backwards(step):  # type: ignore[misc]
        """Of the operands, the kept results and the gradients of all results: gradients of floating operands."""

        @staticmethod
        def forward(job: Job, *tensors: Any) -> Any:
            operands = dict(zip(job.names, tensors, strict=False))
            results = job.all_results
            gradients = dict(zip(results, tensors[-len(results) :], strict=True))
            if any(x is not None and torch._C._functorch.is_legacy_batchedtensor(x) for x in gradients.values()):
                rule = (
                    "takes one gradient at a time, not is_grads_batched=True or vectorize=True; torch.func.vmap works"
                )
                raise NotImplementedError(refusal(job.function, rule))
            assert job.backward is not None
            counting.count_backward(job.call)
            handed: Any = (lambda x: x) if job.at_home else TORCH.to_numpy
            known = {name: handed(x) for name, x in zip(job.kept, tensors[len(operands) :], strict=False)} | {
                f"d{name}": None if x is None else handed(x) for name, x in gradients.items()
            }
            with nullcontext() if job.at_home else lent_by_torch(torch.get_num_threads()):
                found = job.backward({name: handed(x) for name, x in operands.items()}, known)
            return tuple(
                found[name] if job.at_home else TORCH.from_numpy(found[name], TORCH.dtype(x), x)
                for name, x in operands.items()
                if x.is_floating_point()
            )

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.job = inputs[0]

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise RuntimeError(no_second_derivative(ctx.job.function))

    return Backwards


@cache
def _forwards() -> Any:
    """The autograd.Function through which gradients flow."""
    import torch

    step: Any = _step()
    backwards: Any = _backwards()

    class Forwards(step):  # type: ignore[misc]
        @staticmethod
        def forward(job: Job, *tensors: Any) -> Any:
            whole, at_hand = replace(job, results=job.all_results), _AT_HAND.get()
            if at_hand is not None:
                return tuple(_at_hand(spec, at_hand.get(name), tensors[0]) for name, spec in whole.results.items())
            found = TORCH.run_forward(whole, dict(zip(job.names, tensors, strict=True)))
            return tuple(found[name] for name in whole.results)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.job, *tensors = inputs
            job, results = ctx.job, dict(zip(ctx.job.all_results, output, strict=True))
            ours = {name for name in job.kept if job.keeps_its_own and name in job.results}
            kept = [results[name].clone() if name in ours else results[name] for name in job.kept]
            ctx.save_for_backward(*tensors, *kept)
            ctx.set_materialize_grads(False)
            smooth = set(job.results) - {"dropout_mask"}
            ctx.mark_non_differentiable(*(x for name, x in results.items() if name not in smooth))

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            count = len(ctx.job.names)
            if all(grad is None for grad in grads):
                return (None,) * (1 + count)
            if ctx.job.backward is None:
                raise RuntimeError(no_second_derivative(ctx.job.function))
            saved = ctx.saved_tensors  # asked for once: recomputed checkpoints are given out once
            is_watched = torch.is_grad_enabled() or TORCH.is_transformed()
            found = iter((backwards.apply if is_watched else backwards.forward)(ctx.job, *saved, *grads))
            return None, *(next(found) if x.is_floating_point() else None for x in saved[:count])

    return Forwards


_AT_HAND: ContextVar[Arrays | None] = ContextVar("results of a forward pass that was run before", default=None)


@contextmanager
def results_at_hand(found: Arrays | None) -> Iterator[None]:
    """Forward passes under autograd are only remembered, not computed: their results, by name, are these.

    Of a result that its backward pass has no use for, memory that nobody has written to will do.
    """
    before = _AT_HAND.set(found)
    try:
        yield
    finally:
        _AT_HAND.reset(before)


def _at_hand(spec: Spec, result: Any, like: Any) -> Any:
    import torch

    if result is None:
        return torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=like.device)
    return result.detach().view(spec.shape)


TORCH = Torch()
