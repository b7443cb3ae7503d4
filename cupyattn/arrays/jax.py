"""JAX's arrays: computed, or under a trace, where NumPy is called back; JAX itself is imported late."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast

import numpy as np

from cupyattn.arrays import sharing, xla
from cupyattn.arrays.library import Arrays, Job, Library, bits_of
from cupyattn.described import Call, text_of
from cupyattn.problem import FLOATS, Array, Shape, Spec
from cupyattn.reading import refusal


class Jax(Library):
    title = "jax.Array"
    when_deferred = "which under jit, grad and vmap are not known yet; call it outside of them"

    def is_traced(self, array: Any) -> bool:
        return isinstance(array, sys.modules["jax"].core.Tracer)

    def is_deferred(self, arrays: Arrays) -> bool:
        return any(map(self.is_traced, arrays.values()))

    def is_placed_later(self, arrays: Arrays) -> bool:
        return self.is_deferred(arrays)

    def index_dtype(self) -> str:
        """int32 unless the user has switched 64-bit types on."""
        return "int64" if sys.modules["jax"].config.jax_enable_x64 else "int32"

    def place(self, array: Any) -> tuple[str, Any]:
        if self.is_traced(array):
            return "cpu", "traced"
        device = next(iter(array.devices()))
        return {"gpu": "cuda"}.get(device.platform, device.platform), frozenset(array.devices())

    def refuses(self, array: Any) -> str | None:
        if all(isinstance(size, int) for size in array.shape):
            return None
        return "has a shape with symbols, as of jax.export; sizes have to be known: export a program for each, or pad"

    def to_numpy(self, array: Any) -> Array:
        return bits_of(np.asarray(array))

    def from_numpy(self, array: Array, dtype: str, like: Any) -> Any:
        import jax

        sharding = None if self.is_traced(like) else self._sharding(array.shape, like)
        return jax.device_put(self._with_dtype(array, dtype), sharding)

    def zeros(self, shape: Shape, like: Any) -> Any:
        import jax.numpy as jnp

        return jnp.zeros(shape, like.dtype, device=None if self.is_traced(like) else self._sharding(shape, like))

    def empty(self, shape: Shape, like: Any) -> Any:
        return self.zeros(shape, like)

    def put(self, array: Any, index: Any, values: Any) -> Any:
        return array.at[index].set(values)

    def places(self, pairs: Array, like: Any) -> Any:
        return tuple(pairs)

    def scatter(self, array: Any, places: Any, values: Any) -> Any:
        return array.at[places].set(values)

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

    def notes(self) -> tuple[str, ...]:
        reason = xla.objection_to_programs()
        if reason is None:
            return ("under jax.jit it is called by the compiled program itself",)
        return (f"under jax.jit it is a callback to the host: {reason}",)

    def check_writable(self, function: str, name: str, array: Any) -> None:
        rule = f"{name} cannot be overwritten: {self.title} is immutable"
        raise TypeError(refusal(function, rule, (name, self.shape(array))))

    def draw_seed(self, function: str) -> int:
        raise ValueError(refusal(function, "dropout of JAX arrays needs a dropout_seed: JAX has no global generator"))

    def run(self, job: Job, arrays: Arrays) -> Arrays:
        if not self.is_deferred(arrays):
            return super().run(job, arrays)
        arrays = dict(zip(arrays, _all_varying(arrays.values(), _axes_of(arrays.values())), strict=True))
        return self._call_back(job, arrays) if job.backward is None else self._differentiate(job, arrays)

    def _differentiate(self, job: Job, arrays: Arrays) -> Arrays:
        """With our own rule for gradients; whatever is still traced inside of it comes back to `run`."""
        import jax

        backward = job.backward
        assert backward is not None
        once = replace(job, backward=None)
        smooth = {
            name: Spec(name, self.shape(x), self.dtype(x)) for name, x in arrays.items() if self.dtype(x) in FLOATS
        }
        names = job.names + tuple(f"d{name}" for name in job.results)

        def of_everything(operands: Arrays) -> Arrays:
            count = len(job.names)
            return backward(*(({name: operands[name] for name in part}) for part in (names[:count], names[count:])))

        def call(*values: Any) -> tuple[Any, ...]:
            return tuple(self.run(once, dict(zip(job.names, values, strict=True))).values())

        def call_backward(values: Any, grads: Any) -> tuple[Any, ...]:
            asked = job.call and job.call._replace(results=smooth, known=names[len(job.names) :])
            pulled = Job(job.function, names, of_everything, None, smooth, call=asked)
            found = self.run(pulled, dict(zip(names, (*values, *grads), strict=True)))
            return tuple(found.get(name) for name in job.names)

        differentiable = jax.custom_vjp(call)
        differentiable.defvjp(lambda *values: (call(*values), values), call_backward)
        try:
            found = differentiable(*arrays.values())
        except TypeError as error:
            if "forward-mode" not in str(error):
                raise
            rule = "has no forward-mode derivative; jax.grad, jax.vjp and jax.jacrev have one"
            raise NotImplementedError(refusal(job.function, rule)) from error
        return dict(zip(job.results, found, strict=True))

    def _call_back(self, job: Job, arrays: Arrays) -> Arrays:
        """Under jit and vmap: called by the program itself, or by way of a callback to the host."""
        import jax

        struct: Any = jax.ShapeDtypeStruct
        shapes = [struct(spec.shape, self._jax_dtype(spec.dtype)) for spec in job.results.values()]

        def on_host(*values: Any) -> list[Array]:
            outcome = job.forward({name: self.to_numpy(x) for name, x in zip(job.names, values, strict=True)})
            return [self._with_dtype(outcome[name], spec.dtype) for name, spec in job.results.items()]

        def program(call: Call) -> Any:
            own = [struct(spec.shape, self._jax_dtype(spec.dtype)) for spec in call.results.values()]
            return lambda *values: xla.ffi(own, values, text_of(call))

        def on_devices(*values: Any) -> Any:
            """Of arrays on many devices a bare callback leaves results that JAX can do nothing more with."""
            if job.call is not None and xla.objection_to_programs() is None:
                by_parts = sharing.has_a_mesh() and not _axes_of(values) and not sharing.objects(job.call)
                found = (sharing.shared(job.call, program) if by_parts else program(job.call))(*values)
            else:
                called = jax.pure_callback(on_host, shapes, *values, vmap_method="sequential")
                found = cast(Any, jax.lax.optimization_barrier)(called)
            return tuple(_all_varying(found, _axes_of(values)))

        def derivative(primals: Any, tangents: Any) -> Any:
            rule = "has first derivatives only, by jax.grad, jax.vjp and jax.jacrev, and another was asked for"
            raise NotImplementedError(refusal(job.function, rule))

        underivable: Any = jax.custom_jvp(sharing.as_types_say(on_devices, job, arrays))
        underivable.defjvp(derivative)
        return dict(zip(job.results, jax.jit(underivable)(*arrays.values()), strict=True))


def _axes_of(values: Iterable[Any]) -> tuple[Any, ...]:
    """Of a mesh inside of `jax.shard_map`: along which any of these is different on each device."""
    return tuple(dict.fromkeys(axis for value in values for axis in _axes(value)))


def _axes(value: Any) -> Iterable[Any]:
    kind = sys.modules["jax"].typeof(value)
    mesh = getattr(kind, "manual_axis_type", None)  # until 0.9 the type had them itself
    return sorted(getattr(mesh, "varying", None) or getattr(kind, "vma", None) or (), key=str)


def _all_varying(values: Iterable[Any], axes: tuple[Any, ...]) -> list[Any]:
    """The same for JAX's types: what goes into one call, and comes out of it, varies along the same axes."""
    lax = cast(Any, sys.modules["jax"].lax)

    def varying(value: Any) -> Any:
        missing = tuple(axis for axis in axes if axis not in _axes(value))
        if not missing:
            return value
        return lax.pcast(value, missing, to="varying") if hasattr(lax, "pcast") else lax.pvary(value, missing)

    return [varying(value) for value in values] if axes else list(values)


JAX = Jax()
