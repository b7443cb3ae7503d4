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
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar, cast

import array_api_compat
import numpy as np

from cupyattn.problem import Array, Device, Spec
from cupyattn.reading import check_results, refusal
from cupyattn.threads import num_cores

Arrays = dict[str, Any]
Forward = Callable[[Arrays], Arrays]
"""NumPy operands by name to NumPy results by name."""
Backward = Callable[[Arrays, Arrays], Arrays]
"""NumPy operands and gradients of results (or None), by name, to gradients of operands by name.
Where the forward's own results are at hand they come along as "out" and "lse"."""


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

    def dtype(self, array: Any) -> str:
        """The dtype's plain name: "float32", "bfloat16", "bool", ..."""
        return str(getattr(array.dtype, "name", array.dtype)).rsplit(".", 1)[-1]

    def shape(self, array: Any) -> tuple[int, ...]:
        return tuple(array.shape)

    def place(self, array: Any) -> tuple[str, Any]:
        """("cpu" or "cuda" or another kind, a value that is equal for arrays on one device)."""
        kind = int(array.__dlpack_device__()[0]) if hasattr(array, "__dlpack_device__") else 1
        return {1: "cpu", 2: "cuda", 3: "cpu", 13: "cuda"}.get(kind, f"device {kind}"), array_api_compat.device(array)

    def refuses(self, array: Any) -> str | None:
        """Why this very array cannot be taken."""
        return None

    def to_numpy(self, array: Any) -> Array:
        """The same memory as a NumPy array; bfloat16 as its bits (see `rounding`)."""
        return _bits(np.from_dlpack(array))

    def from_numpy(self, array: Array, dtype: str, like: Any) -> Any:
        """A fresh NumPy array as one of this library, on the device of `like`."""
        xp = array_api_compat.array_namespace(like)
        return xp.asarray(array, device=array_api_compat.device(like))

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

    def as_it_is_now(self, array: Any) -> Any:
        """The array with its present values, for gradients, if it is going to be overwritten."""
        return array

    def check_writable(self, function: str, name: str, array: Any) -> None:
        """Refuse before anything is computed."""

    def run(self, forward: Forward, backward: Backward | None, arrays: Arrays, results: Mapping[str, Spec]) -> Arrays:
        outcome = forward({name: self.to_numpy(array) for name, array in arrays.items()})
        like = next(iter(arrays.values()))
        return {name: self.from_numpy(outcome[name], spec.dtype, like) for name, spec in results.items()}


@cache
def _name(dtype: Any) -> str:
    """A NumPy-like dtype's name; remembered, since NumPy spells it out anew each time."""
    return str(dtype.name)


def _bits(array: Array) -> Array:
    return array.view(np.uint16) if _name(array.dtype) == "bfloat16" else array


def _check_no_overlap(function: str, name: str, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    if any(stride == 0 and size > 1 for size, stride in zip(shape, strides, strict=True)):
        rule = f"{name} was to be overwritten, and its elements share memory (a stride of 0)"
        raise ValueError(refusal(function, rule, (name, shape)))


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
        if dtype == _name(like.dtype):
            return array.view(like.dtype) if dtype == "bfloat16" else array.astype(like.dtype, copy=False)
        return array

    def check_writable(self, function: str, name: str, array: Any) -> None:
        if not array.flags.writeable:
            raise ValueError(refusal(function, f"{name} is read-only and was to be overwritten", (name, array.shape)))
        _check_no_overlap(function, name, array.shape, array.strides)


class Torch(Library):
    title = "torch.Tensor"

    def dtype(self, array: Any) -> str:
        return str(array.dtype)[len("torch.") :]

    def place(self, array: Any) -> tuple[str, Any]:
        return array.device.type, array.device

    def refuses(self, array: Any) -> str | None:
        if type(array).__name__ == "FakeTensor":
            return "is a FakeTensor, which has no values"
        layout = str(array.layout)
        if layout != "torch.strided" or array.is_nested:
            return f"is not a strided tensor ({'nested' if array.is_nested else layout})"
        return None

    def to_numpy(self, array: Any) -> Array:
        import torch

        plain = array.detach().resolve_neg()
        if plain.dtype == torch.bfloat16:
            return np.asarray(plain.view(torch.int16).numpy()).view(np.uint16)
        return np.asarray(plain.numpy())

    def from_numpy(self, array: Array, dtype: str, like: Any) -> Any:
        import torch

        if dtype == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    def write(self, function: str, name: str, array: Any, values: Any) -> None:
        array.copy_(values)

    def as_it_is_now(self, array: Any) -> Any:
        return array.clone()

    def check_writable(self, function: str, name: str, array: Any) -> None:
        import torch

        if array.is_leaf and array.requires_grad and torch.is_grad_enabled():
            rule = f"{name} is a leaf that requires grad and was to be overwritten; pass inplace=False"
            raise ValueError(refusal(function, rule, (name, tuple(array.shape))))
        _check_no_overlap(function, name, tuple(array.shape), array.stride())

    def draw_seed(self, function: str) -> int:
        """From torch's own generator, so that torch.manual_seed governs it."""
        import torch

        return int(torch.randint(0, 2**63 - 1, (), dtype=torch.int64))

    def run(self, forward: Forward, backward: Backward | None, arrays: Arrays, results: Mapping[str, Spec]) -> Arrays:
        import torch

        if backward is not None and torch.is_grad_enabled() and any(array.requires_grad for array in arrays.values()):
            bridge = _torch_bridge()
            values = bridge.apply(self, forward, backward, tuple(arrays), dict(results), *arrays.values())
            return dict(zip(results, values, strict=True))
        return super().run(forward, backward, arrays, results)


@cache
def _torch_bridge() -> Any:
    """The autograd.Function through which gradients flow; made on first use, since torch may be absent."""
    import torch

    class Final(torch.autograd.Function):
        """Passes a gradient on, and refuses to be differentiated."""

        @staticmethod
        def forward(ctx: Any, gradient: Any, *sources: Any) -> Any:
            return gradient.view_as(gradient)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise RuntimeError("cupyattn has first derivatives only, and a gradient of one was asked for")

    final: Any = Final.apply

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(
            library: Torch, forward: Forward, backward: Backward, names: Any, results: Any, *tensors: Any
        ) -> Any:
            arrays = dict(zip(names, tensors, strict=True))
            return tuple(Library.run(library, forward, None, arrays, results).values())

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.library, _, ctx.backward_function, ctx.names, ctx.results, *tensors = inputs
            ctx.save_for_backward(*tensors, *output)
            ctx.set_materialize_grads(False)
            unsmooth = [x for x, name in zip(output, ctx.results, strict=True) if name == "dropout_mask"]
            ctx.mark_non_differentiable(*unsmooth)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            count = len(ctx.names)
            if all(grad is None for grad in grads):
                return (None,) * (5 + count)
            saved = ctx.saved_tensors  # asked for once: recomputed checkpoints are given out once
            tensors, outputs = saved[:count], saved[count:]
            operands = {name: ctx.library.to_numpy(x) for name, x in zip(ctx.names, tensors, strict=True)}
            known = {name: ctx.library.to_numpy(x) for name, x in zip(ctx.results, outputs, strict=True)}
            for name, grad in zip(ctx.results, grads, strict=True):
                known[f"d{name}"] = None if grad is None else ctx.library.to_numpy(grad)
            gradients = ctx.backward_function(operands, known)
            brought = [
                ctx.library.from_numpy(gradients[name], ctx.library.dtype(x), x) if name in gradients else None
                for name, x in zip(ctx.names, tensors, strict=True)
            ]
            if torch.is_grad_enabled():  # create_graph=True: they must not look like constants
                brought = [None if x is None else final(x, *tensors, *grads) for x in brought]
            return (None,) * 5 + tuple(brought)

    return Attention


class Jax(Library):
    title = "jax.Array"

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

    def to_numpy(self, array: Any) -> Array:
        return _bits(np.asarray(array))

    def from_numpy(self, array: Array, dtype: str, like: Any) -> Any:
        import jax

        return jax.device_put(self._with_dtype(array, dtype), None if self.is_traced(like) else like.sharding)

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

    def run(self, forward: Forward, backward: Backward | None, arrays: Arrays, results: Mapping[str, Spec]) -> Arrays:
        if self.is_deferred(arrays):
            return self._run_traced(forward, backward, arrays, results)
        return super().run(forward, backward, arrays, results)

    def _run_traced(
        self, forward: Forward, backward: Backward | None, arrays: Arrays, results: Mapping[str, Spec]
    ) -> Arrays:
        """Under jit, grad and vmap: a callback to the host, with its own rule for gradients."""
        import jax

        names = tuple(arrays)

        def described(specs: Mapping[str, Any]) -> list[Any]:
            struct: Any = jax.ShapeDtypeStruct
            return [struct(spec.shape, self._jax_dtype(spec.dtype)) for spec in specs.values()]

        def on_host(*values: Any) -> list[Array]:
            outcome = forward({name: self.to_numpy(x) for name, x in zip(names, values, strict=True)})
            return [self._with_dtype(outcome[name], spec.dtype) for name, spec in results.items()]

        def call(*values: Any) -> Any:
            return jax.pure_callback(on_host, described(results), *values, vmap_method="sequential")

        if backward is None:
            return dict(zip(results, call(*arrays.values()), strict=True))
        smooth = {
            name: Spec(name, self.shape(x), self.dtype(x))
            for name, x in arrays.items()
            if self.dtype(x) in ("float16", "bfloat16", "float32", "float64")
        }

        def gradients_on_host(values: Any, grads: Any) -> list[Array]:
            operands = {name: self.to_numpy(x) for name, x in zip(names, values, strict=True)}
            known = {f"d{name}": self.to_numpy(g) for name, g in zip(results, grads, strict=True)}
            outcome = backward(operands, known)
            return [self._with_dtype(outcome[name], spec.dtype) for name, spec in smooth.items()]

        def call_backward(values: Any, grads: Any) -> Any:
            found = jax.pure_callback(gradients_on_host, described(smooth), values, grads, vmap_method="sequential")
            by_name = dict(zip(smooth, found, strict=True))
            return tuple(by_name.get(name) for name in names)

        differentiable = jax.custom_vjp(call)
        differentiable.defvjp(lambda *values: (call(*values), values), call_backward)
        return dict(zip(results, differentiable(*arrays.values()), strict=True))


class Dask(Library):
    title = "dask.array.Array"

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

    def run(self, forward: Forward, backward: Backward | None, arrays: Arrays, results: Mapping[str, Spec]) -> Arrays:
        """One task over the whole arrays: a softmax needs all keys of a row, chunk by chunk would be wrong."""
        import dask.array
        from dask.delayed import delayed

        from_delayed: Any = dask.array.from_delayed
        like = next(iter(arrays.values()))

        def compute(values: Arrays) -> Arrays:
            outcome = forward({name: _bits(np.asarray(x)) for name, x in values.items()})
            return {n: outcome[n].view(like.dtype) if s.dtype == "bfloat16" else outcome[n] for n, s in results.items()}

        outcome = delayed(compute, pure=True)(arrays)
        return {
            name: from_delayed(
                outcome[name], spec.shape, like.dtype if spec.dtype == "bfloat16" else np.dtype(spec.dtype)
            )
            for name, spec in results.items()
        }


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
    if "jax" in sys.modules and (roots & {"jax", "jaxlib"}):
        return _JAX
    is_array = hasattr(kind, "__array_namespace__") and not issubclass(kind, np.generic)
    return _OTHER if is_array else None


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

    def run(self, forward: Forward, backward: Backward | None, results: Mapping[str, Spec]) -> Arrays:
        """Hand the arrays to `forward` as NumPy arrays and bring its results home."""
        check_results(self.function, dict(self.specs), results)
        return self.library.run(forward, backward, self.arrays, results)


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
