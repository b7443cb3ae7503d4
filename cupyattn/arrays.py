"""The only file that knows array libraries exist: NumPy, torch, JAX, dask, CuPy, and any other.

`enter` looks at the arrays of a call and returns a `Visit`: their specs, their library, the device they
live on.  `Visit.run` hands them to a function of NumPy arrays and brings the results home: to the
same library and device, with gradients where the library has them, lazily where the library is lazy.
A library is recognised only if the caller has imported it.
"""

from __future__ import annotations

import os
import reprlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar, cast

import array_api_compat
import numpy as np

from cupyattn.problem import ITEMSIZE, Array, Device, Shape, Spec
from cupyattn.reading import check_results, dtype_name, refusal
from cupyattn.threads import num_cores

Arrays = dict[str, Any]
Forward = Callable[[Arrays], Arrays]
"""NumPy operands by name to NumPy results by name."""
Backward = Callable[[Arrays, Arrays], Arrays]
"""NumPy operands and gradients of results (or None), by name, to gradients of operands by name.
Those of the forward's own results that were to be kept come along under their names, where they are at hand."""


@dataclass(eq=False, slots=True)
class Job:
    """What a library is to do with the arrays of a call."""

    function: str
    names: tuple[str, ...]
    """Of the operands, in order."""
    forward: Forward
    backward: Backward | None
    results: Mapping[str, Spec]
    kept: tuple[str, ...] = ()
    """Results that `backward` has a use for: a library may then refuse to have them overwritten."""


P = ParamSpec("P")
R = TypeVar("R")


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """Keep torch.compile from tracing into NumPy: it calls the function as it is, between two graphs."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if function not in _beside_dynamo:
            _beside_dynamo[function] = sys.modules["torch"].compiler.disable(function)
        return cast(R, _beside_dynamo[function](*args, **kwargs))

    call._torchdynamo_disable = True  # type: ignore[attr-defined]  # what torch.compiler.disable sets
    return call


_beside_dynamo: dict[Callable[..., Any], Callable[..., Any]] = {}


class Library:
    """What has to be known of a library; the base class serves any that follows the array API."""

    title = "array"
    when_deferred = ""
    """The end of a sentence about values: why they are not known, and what to do then."""

    def dtype(self, array: Any) -> str:
        """The dtype's plain name: "float32", "bfloat16", "bool", ..."""
        return dtype_name(getattr(array.dtype, "name", array.dtype))

    def shape(self, array: Any) -> tuple[int, ...]:
        return tuple(array.shape)

    def place(self, array: Any) -> tuple[str, Any]:
        """("cpu" or "cuda" or another kind, a value that is equal for arrays on one device)."""
        kind = int(array.__dlpack_device__()[0]) if hasattr(array, "__dlpack_device__") else 1
        return {1: "cpu", 2: "cuda", 3: "cpu", 13: "cuda"}.get(kind, f"device {kind}"), array_api_compat.device(array)

    def refuses(self, array: Any) -> str | None:
        """Why this very array cannot be taken."""
        return None if hasattr(array, "__dlpack__") else "has no __dlpack__, by which its values could be read"

    def to_numpy(self, array: Any) -> Array:
        """The same memory as a NumPy array; bfloat16 as its bits (see `rounding`)."""
        return _bits(np.from_dlpack(array))

    def values(self, array: Any) -> Array:
        """The same for a look at the values outside of `run`; they have to be there, see `is_deferred`."""
        return self.to_numpy(array)

    def from_numpy(self, array: Array, dtype: str, like: Any) -> Any:
        """A fresh NumPy array as one of this library, on the device of `like`."""
        xp = array_api_compat.array_namespace(like)
        return xp.asarray(array, device=array_api_compat.device(like))

    def zeros(self, shape: Shape, like: Any) -> Any:
        """In the dtype and at the home of `like`."""
        xp = array_api_compat.array_namespace(like)
        return xp.zeros(shape, dtype=like.dtype, device=array_api_compat.device(like))

    def draw_seed(self, function: str) -> int:
        return int.from_bytes(os.urandom(8), "little")

    def is_deferred(self, arrays: Arrays) -> bool:
        """Values are not to be had now: under a trace, or in a graph."""
        return False

    def index_dtype(self) -> str:
        return "int64"

    def write(self, function: str, name: str, array: Any, values: Any) -> None:
        """Overwrite the caller's own array, where the caller asked for that."""
        array[...] = values

    def as_it_is_now(self, name: str, arrays: Arrays) -> Any:
        """One of the arrays, which is going to be overwritten, with the values that gradients will ask for."""
        return arrays[name]

    def check_writable(self, function: str, name: str, array: Any) -> None:
        """Refuse before anything is computed."""

    def run(self, job: Job, arrays: Arrays) -> Arrays:
        outcome = job.forward({name: self.to_numpy(array) for name, array in arrays.items()})
        return {
            name: self.from_numpy(outcome[name], spec.dtype, _model(name, arrays)) for name, spec in job.results.items()
        }


def _model(name: str, arrays: Arrays) -> Any:
    """The array whose home a result is to share: the operand it is the gradient of, or the first one."""
    return arrays[name] if name in arrays else next(iter(arrays.values()))


@cache
def _name(dtype: Any) -> str:
    """A NumPy-like dtype's name; remembered, since NumPy spells it out anew each time."""
    return str(dtype.name)


def _bits(array: Array) -> Array:
    return array.view(np.uint16) if _name(array.dtype) == "bfloat16" else array


def _check_no_overlap(function: str, name: str, shape: Shape, strides: Shape, itemsize: int) -> None:
    """Refuse to write where two elements share memory; strides and the item size in one unit."""
    steps = sorted((abs(stride), size) for size, stride in zip(shape, strides, strict=True) if size > 1)
    reach, nested = itemsize, True
    for stride, size in steps:
        nested = nested and stride >= reach
        reach += stride * (size - 1)
    if nested or 0 in shape:
        return
    starts = np.zeros(1, np.int64)
    if steps[0][0] > 0:  # strides like 2 and 3 may interleave and not meet
        for stride, size in steps:
            starts = np.add.outer(starts, np.arange(size) * stride)
    if steps[0][0] == 0 or (np.diff(np.sort(starts, axis=None)) < itemsize).any():
        rule = f"{name} was to be overwritten, and its elements share memory"
        raise ValueError(refusal(function, rule, (name, shape, f"strides {strides}")))


class NumPy(Library):
    title = "numpy.ndarray"

    def dtype(self, array: Any) -> str:
        return _name(array.dtype)

    def place(self, array: Any) -> tuple[str, Any]:
        return "cpu", "cpu"

    def refuses(self, array: Any) -> str | None:
        if isinstance(array, (np.matrix, np.ma.MaskedArray)):
            return f"is a {type(array).__name__}; pass a plain array, and a mask as mask"
        return None

    def to_numpy(self, array: Any) -> Array:
        return _bits(np.asarray(array))

    def from_numpy(self, array: Array, dtype: str, like: Any) -> Any:
        return array.view(like.dtype) if dtype == "bfloat16" else array

    def check_writable(self, function: str, name: str, array: Any) -> None:
        if not array.flags.writeable:
            raise ValueError(refusal(function, f"{name} is read-only and was to be overwritten", (name, array.shape)))
        _check_no_overlap(function, name, array.shape, array.strides, array.itemsize)

    def run(self, job: Job, arrays: Arrays) -> Arrays:
        """A result has the byte order of the array it resembles; lse, which resembles none, the machine's."""
        found = super().run(job, arrays)
        for name, result in found.items():
            like = _model(name, arrays).dtype
            if name != "lse" and _name(like) == _name(result.dtype):
                found[name] = result.astype(like, copy=False)
        return found


class Torch(Library):
    title = "torch.Tensor"
    when_deferred = "which under vmap are those of many; call it outside of vmap"

    def dtype(self, array: Any) -> str:
        return str(array.dtype)[len("torch.") :]

    def place(self, array: Any) -> tuple[str, Any]:
        return array.device.type, array.device

    def refuses(self, array: Any) -> str | None:
        if _wraps_others(type(array)):  # type: ignore[arg-type]
            return f"is a {type(array).__name__}, which has no memory of its own; pass a plain tensor"
        layout = str(array.layout)
        if layout != "torch.strided" or array.is_nested:
            return f"is not a strided tensor ({'nested' if array.is_nested else layout})"
        return None

    def has_no_values(self, array: Any) -> bool:
        """On the meta device, or a FakeTensor."""
        return array.device.type == "meta" or type(array).__name__ == "FakeTensor"

    def is_deferred(self, arrays: Arrays) -> bool:
        """Under vmap."""
        import torch

        return any(torch._C._functorch.is_batchedtensor(_without_gradients(array)) for array in arrays.values())

    def to_numpy(self, array: Any) -> Array:
        import torch

        plain = array.detach().resolve_neg()
        if plain.dtype == torch.bfloat16:
            return np.asarray(plain.view(torch.int16).numpy()).view(np.uint16)
        return np.asarray(plain.numpy())

    def values(self, array: Any) -> Array:
        """Also under torch.func's transforms, which would wrap what we make of the array."""
        import torch

        with torch._C._DisableFuncTorch():
            return self.to_numpy(_without_gradients(array))

    def from_numpy(self, array: Array, dtype: str, like: Any) -> Any:
        import torch

        if dtype == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    def write(self, function: str, name: str, array: Any, values: Any) -> None:
        array.copy_(values)

    def as_it_is_now(self, name: str, arrays: Arrays) -> Any:
        return arrays[name].clone() if self._records(arrays) else arrays[name]

    def check_writable(self, function: str, name: str, array: Any) -> None:
        import torch

        if array.is_leaf and array.requires_grad and torch.is_grad_enabled():
            rule = f"{name} is a leaf that requires grad and was to be overwritten; pass inplace=False"
            raise ValueError(refusal(function, rule, (name, tuple(array.shape))))
        _check_no_overlap(function, name, tuple(array.shape), array.stride(), 1)

    def draw_seed(self, function: str) -> int:
        """From torch's own generator on the CPU, so that torch.manual_seed governs it."""
        import torch

        return int(torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device="cpu"))

    def run(self, job: Job, arrays: Arrays) -> Arrays:
        if self.is_transformed() or (job.backward is not None and self._records(arrays)):
            values = _torch_bridge().apply(job, *arrays.values())
            return dict(zip(job.results, values, strict=True))
        return super().run(job, arrays)

    def is_transformed(self) -> bool:
        """By torch.func or forward-mode differentiation: tensors may carry more than their values."""
        import torch

        return torch.autograd.forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()

    def _records(self, arrays: Arrays) -> bool:
        """Gradients may be asked for later."""
        import torch

        return torch.is_grad_enabled() and any(array.requires_grad for array in arrays.values())


@cache
def _wraps_others(kind: Any) -> bool:
    """A kind of tensor that has its own way with every operation: what is in its memory, if any, says nothing."""
    import torch

    return kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__


def _without_gradients(tensor: Any) -> Any:
    """What torch.func's grad and vjp have wrapped."""
    import torch

    functorch = torch._C._functorch
    while functorch.is_gradtrackingtensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


@cache
def _torch_bridge() -> Any:
    """The autograd.Function through which gradients flow; made on first use, since torch may be absent.

    The backward pass is a Function too: so its own derivative is refused and not zero, and torch.func, which
    wraps the tensors that a backward pass sees, unwraps them for it.
    """
    import torch

    class Step(torch.autograd.Function):
        """What both passes have in common; the operands are a job and tensors."""

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            rule = "has no forward-mode derivative; torch.autograd.grad and torch.func.grad, vjp and jacrev have one"
            raise NotImplementedError(refusal(ctx.job.function, rule))

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

    class Backwards(Step):
        """Of the operands, the kept results and the gradients of all results: gradients of floating operands."""

        @staticmethod
        def forward(job: Job, *tensors: Any) -> Any:
            operands = dict(zip(job.names, tensors, strict=False))
            gradients = dict(zip(job.results, tensors[-len(job.results) :], strict=True))
            if any(x is not None and torch._C._functorch.is_legacy_batchedtensor(x) for x in gradients.values()):
                rule = (
                    "takes one gradient at a time, not is_grads_batched=True or vectorize=True; torch.func.vmap works"
                )
                raise NotImplementedError(refusal(job.function, rule))
            known = {name: _TORCH.to_numpy(x) for name, x in zip(job.kept, tensors[len(operands) :], strict=False)} | {
                f"d{name}": None if x is None else _TORCH.to_numpy(x) for name, x in gradients.items()
            }
            assert job.backward is not None
            found = job.backward({name: _TORCH.to_numpy(x) for name, x in operands.items()}, known)
            return tuple(
                _TORCH.from_numpy(found[name], _TORCH.dtype(x), x)
                for name, x in operands.items()
                if x.is_floating_point()
            )

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.job = inputs[0]

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise RuntimeError(_no_second_derivative(ctx.job.function))

    backwards: Any = Backwards.apply

    class Forwards(Step):
        @staticmethod
        def forward(job: Job, *tensors: Any) -> Any:
            return tuple(Library.run(_TORCH, job, dict(zip(job.names, tensors, strict=True))).values())

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.job, *tensors = inputs
            results = dict(zip(ctx.job.results, output, strict=True))
            ctx.save_for_backward(*tensors, *(results[name] for name in ctx.job.kept))
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*(x for name, x in results.items() if name == "dropout_mask"))

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            count = len(ctx.job.names)
            if all(grad is None for grad in grads):
                return (None,) * (1 + count)
            if ctx.job.backward is None:
                raise RuntimeError(_no_second_derivative(ctx.job.function))
            saved = ctx.saved_tensors  # asked for once: recomputed checkpoints are given out once
            is_watched = torch.is_grad_enabled() or _TORCH.is_transformed()
            found = iter((backwards if is_watched else Backwards.forward)(ctx.job, *saved, *grads))
            return None, *(next(found) if x.is_floating_point() else None for x in saved[:count])

    return Forwards


def _no_second_derivative(function: str) -> str:
    return refusal(function, "has first derivatives only, and a gradient of one was asked for")


class Jax(Library):
    title = "jax.Array"
    when_deferred = "which under jit, grad and vmap are not known yet; call it outside of them"

    def is_traced(self, array: Any) -> bool:
        return isinstance(array, sys.modules["jax"].core.Tracer)

    def is_deferred(self, arrays: Arrays) -> bool:
        return any(map(self.is_traced, arrays.values()))

    def index_dtype(self) -> str:
        """int32 unless the user has switched 64-bit types on."""
        return "int64" if sys.modules["jax"].config.jax_enable_x64 else "int32"

    def place(self, array: Any) -> tuple[str, Any]:
        if self.is_traced(array):
            return "cpu", "traced"
        device = next(iter(array.devices()))
        return {"gpu": "cuda"}.get(device.platform, device.platform), frozenset(array.devices())

    def refuses(self, array: Any) -> str | None:
        return None

    def to_numpy(self, array: Any) -> Array:
        return _bits(np.asarray(array))

    def from_numpy(self, array: Array, dtype: str, like: Any) -> Any:
        import jax

        sharding = None if self.is_traced(like) else self._sharding(array.shape, like)
        return jax.device_put(self._with_dtype(array, dtype), sharding)

    def zeros(self, shape: Shape, like: Any) -> Any:
        import jax.numpy as jnp

        return jnp.zeros(shape, like.dtype, device=None if self.is_traced(like) else self._sharding(shape, like))

    def _sharding(self, shape: Shape, like: Any) -> Any:
        """That of `like` for an array of its shape; for another, whose axes are others, a copy on each device."""
        from jax.sharding import Mesh, NamedSharding, PartitionSpec

        own, on_each = like.sharding, cast(Any, PartitionSpec)()
        if isinstance(own, NamedSharding):
            return own if shape == like.shape else NamedSharding(own.mesh, on_each, memory_kind=own.memory_kind)
        if len(own.device_set) == 1:
            return own
        devices: Any = sorted(own.device_set, key=lambda device: device.id)  # what a callback leaves cannot be reused
        return NamedSharding(Mesh(np.array(devices), ("devices",)), on_each)

    def _with_dtype(self, array: Array, dtype: str) -> Array:
        return array.view(self._jax_dtype(dtype)) if dtype == "bfloat16" else array

    def _jax_dtype(self, dtype: str) -> Any:
        import jax.numpy as jnp

        return jnp.dtype(dtype)

    def check_writable(self, function: str, name: str, array: Any) -> None:
        rule = f"{name} cannot be overwritten: {self.title} is immutable"
        raise TypeError(refusal(function, rule, (name, self.shape(array))))

    def draw_seed(self, function: str) -> int:
        raise ValueError(refusal(function, "dropout of JAX arrays needs a dropout_seed: JAX has no global generator"))

    def run(self, job: Job, arrays: Arrays) -> Arrays:
        if not self.is_deferred(arrays):
            return super().run(job, arrays)
        return self._call_back(job, arrays) if job.backward is None else self._differentiate(job, arrays)

    def _differentiate(self, job: Job, arrays: Arrays) -> Arrays:
        """With our own rule for gradients; whatever is still traced inside of it comes back to `run`."""
        import jax

        backward = job.backward
        assert backward is not None
        once = replace(job, backward=None)
        smooth = {
            name: Spec(name, self.shape(x), self.dtype(x)) for name, x in arrays.items() if self.dtype(x) in ITEMSIZE
        }
        names = job.names + tuple(f"d{name}" for name in job.results)

        def of_everything(operands: Arrays) -> Arrays:
            count = len(job.names)
            return backward(*(({name: operands[name] for name in part}) for part in (names[:count], names[count:])))

        def call(*values: Any) -> tuple[Any, ...]:
            return tuple(self.run(once, dict(zip(job.names, values, strict=True))).values())

        def call_backward(values: Any, grads: Any) -> tuple[Any, ...]:
            pulled = Job(job.function, names, of_everything, None, smooth)
            found = self.run(pulled, dict(zip(names, (*values, *grads), strict=True)))
            return tuple(found.get(name) for name in job.names)

        differentiable = jax.custom_vjp(call)
        differentiable.defvjp(lambda *values: (call(*values), values), call_backward)
        return dict(zip(job.results, differentiable(*arrays.values()), strict=True))

    def _call_back(self, job: Job, arrays: Arrays) -> Arrays:
        """Under jit and vmap: a callback to the host."""
        import jax

        struct: Any = jax.ShapeDtypeStruct

        def on_host(*values: Any) -> list[Array]:
            outcome = job.forward({name: self.to_numpy(x) for name, x in zip(job.names, values, strict=True)})
            return [self._with_dtype(outcome[name], spec.dtype) for name, spec in job.results.items()]

        shapes = [struct(spec.shape, self._jax_dtype(spec.dtype)) for spec in job.results.values()]

        @jax.jit
        def call(*values: Any) -> Any:
            """Of arrays on many devices a bare callback leaves results that JAX can do nothing more with."""
            found = jax.pure_callback(on_host, shapes, *values, vmap_method="sequential")
            return cast(Any, jax.lax.optimization_barrier)(found)

        return dict(zip(job.results, call(*arrays.values()), strict=True))


class Dask(Library):
    title = "dask.array.Array"
    when_deferred = "which dask has not computed yet; call compute() on the arrays first"

    def place(self, array: Any) -> tuple[str, Any]:
        return "cpu", "cpu"

    def is_deferred(self, arrays: Arrays) -> bool:
        return True

    def refuses(self, array: Any) -> str | None:
        return "has chunks of unknown size" if any(size != size for size in array.shape) else None

    def check_writable(self, function: str, name: str, array: Any) -> None:
        rule = f"{name} cannot be overwritten: {self.title} is immutable"
        raise TypeError(refusal(function, rule, (name, self.shape(array))))

    def draw_seed(self, function: str) -> int:
        raise ValueError(refusal(function, "dropout of dask arrays needs a dropout_seed: a graph may run twice"))

    def run(self, job: Job, arrays: Arrays) -> Arrays:
        """One task over the whole arrays: a softmax needs all keys of a row, chunk by chunk would be wrong."""
        import dask.array
        from dask.delayed import delayed

        from_delayed: Any = dask.array.from_delayed
        forward, dtypes = job.forward, {}
        for name, spec in job.results.items():
            dtypes[name] = _model(name, arrays).dtype if spec.dtype == "bfloat16" else np.dtype(spec.dtype)

        def compute(values: Arrays) -> Arrays:
            outcome = forward({name: _bits(np.asarray(x)) for name, x in values.items()})
            return {name: outcome[name].view(dtype) for name, dtype in dtypes.items()}

        outcome = delayed(compute, pure=True)(arrays)
        return {name: from_delayed(outcome[name], spec.shape, dtypes[name]) for name, spec in job.results.items()}


class CuPy(Library):
    title = "cupy.ndarray"

    def place(self, array: Any) -> tuple[str, Any]:
        return "cuda", array.device


_NUMPY, _TORCH, _JAX, _DASK, _CUPY, _OTHER = NumPy(), Torch(), Jax(), Dask(), CuPy(), Library()


@cache
def _library_of_type(kind: Any) -> Library | None:
    """The library a type belongs to; None if its objects are not arrays."""
    if issubclass(kind, np.ndarray):
        return _NUMPY
    family = type.mro(kind)
    roots = {base.__module__.partition(".")[0] for base in family}
    for root, name, library in (
        ("torch", "Tensor", _TORCH),
        ("dask", "Array", _DASK),
        ("cupy", "ndarray", _CUPY),
    ):
        if root in roots and any(base.__name__ == name for base in family):
            return library
    if not hasattr(kind, "__array_namespace__") or issubclass(kind, np.generic):
        return None
    return _JAX if "jax" in sys.modules and (roots & {"jax", "jaxlib"}) else _OTHER


@dataclass
class Visit:
    """The arrays of one call: who they are and where they live."""

    function: str
    library: Library
    arrays: Arrays
    specs: tuple[tuple[str, Spec], ...]
    kind: str
    """ "cpu" or "cuda"."""

    def device(self) -> Device:
        """What the planner has to know of the arrays' device."""
        if self.kind == "cpu":
            return _cpu()
        from cupyattn import cuda

        return cuda.device_of(self.function, self.library.title, next(iter(self.arrays.values())))

    def run(
        self, forward: Forward, backward: Backward | None, results: Mapping[str, Spec], kept: tuple[str, ...] = ()
    ) -> Arrays:
        """Hand the arrays to `forward` as NumPy arrays and bring its results home; `backward` may use those `kept`."""
        if self.kind == "cuda":
            rule = "has no CUDA kernel; bring the arrays to the CPU"
            raise NotImplementedError(refusal(self.function, rule, *((x.name, x.shape) for _, x in self.specs)))
        check_results(self.function, dict(self.specs), results)
        return self.library.run(Job(self.function, tuple(self.arrays), forward, backward, results, kept), self.arrays)


@cache
def _cpu() -> Device:
    return Device("cpu", "cpu", num_cores())


OPTIONAL = frozenset(
    (
        "mask",
        "bias",
        "alibi_slopes",
        "sinks",
        "block_table",
        "out",
        "lse",
        "dlse",
        "cu_seqlens",
        "unused_mask",
    )
)
"""Our words for arguments that may be None."""


def enter(function: str, arrays: Mapping[str, tuple[str, Any]]) -> Visit:
    """Look at the arrays of a call, given as {our word: (the caller's name, array or None)}.

    Raises
    ------
    TypeError
        Something is not an array, or the arrays are of different libraries.
    ValueError
        The arrays are on different devices, or on one nothing here can work on.
    """
    present = {word: entry for word, entry in arrays.items() if entry[1] is not None or word not in OPTIONAL}
    specs, found, places = [], [], []
    for word, (name, array) in present.items():
        library = _library_of_type(type(array))  # type: ignore[arg-type]
        if library is None:
            came = (name, reprlib.repr(array), type(array).__name__)
            raise TypeError(refusal(function, f"{name} has to be an array", came))
        objection = library.refuses(array)
        if objection:
            raise TypeError(refusal(function, f"{name} {objection}", (name, type(array).__name__)))
        found.append(library)
        specs.append((word, Spec(name, library.shape(array), library.dtype(array))))
    library = found[0]
    if any(other is not library for other in found):
        shown = [(name, f"{type(x).__module__.partition('.')[0]}.{type(x).__name__}") for name, x in present.values()]
        raise TypeError(refusal(function, "all arrays have to be of one library", *shown))
    if library is _NUMPY:
        return Visit(function, library, {word: x for word, (_, x) in present.items()}, tuple(specs), "cpu")
    if library is _OTHER:
        try:
            array_api_compat.array_namespace(*(array for _, array in present.values()))
        except TypeError:
            shown = [(name, f"{type(x).__module__}.{type(x).__name__}") for name, x in present.values()]
            raise TypeError(refusal(function, "all arrays have to be of one library", *shown)) from None
    places = [library.place(array) for _, array in present.values()]
    if any(place != places[0] for place in places):
        known = [place for place in places if place[1] != "traced"]
        if any(place != known[0] for place in known):
            shown = [(name, place[1]) for (name, _), place in zip(present.values(), places, strict=True)]
            raise ValueError(refusal(function, "all arrays have to be on one device", *shown))
    kind = places[0][0]
    if kind not in ("cpu", "cuda"):
        name = next(iter(present.values()))[0]
        raise ValueError(refusal(function, "arrays have to be on the CPU or on a CUDA device", (name, places[0][1])))
    return Visit(function, library, {word: x for word, (_, x) in present.items()}, tuple(specs), kind)


def described(array: Any) -> tuple[Shape, str] | None:
    """Shape and dtype of what has these and no values; None for arrays, and for anything else.

    A jax.ShapeDtypeStruct, a tensor that is fake or on the meta device, any object with a shape and a dtype.
    """
    library = _library_of_type(type(array))  # type: ignore[arg-type]
    if library is None:
        is_one = isinstance(getattr(array, "shape", None), tuple) and hasattr(array, "dtype")
        is_one = is_one and not isinstance(array, np.generic)
    else:
        is_one = isinstance(library, Torch) and library.has_no_values(array)
    library = library or _OTHER
    return (library.shape(array), library.dtype(array)) if is_one else None
