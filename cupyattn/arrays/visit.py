"""Arrays are touched here and in the three files beside it: NumPy's, torch's, JAX's, dask's, CuPy's, and any other's.

`enter` looks at the arrays of a call and returns a `Visit`: their specs, their library, the device they
live on.  `Visit.run` hands them to a function of NumPy arrays and brings the results home: to the
same library and device, with gradients where the library has them, lazily where the library is lazy.
A library is recognised only if the caller has imported it.
"""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, wraps
from inspect import signature
from typing import Any, ParamSpec, TypeVar, cast

import array_api_compat
import numpy as np

from cupyattn.arrays.jax import JAX
from cupyattn.arrays.library import (
    Arrays,
    Backward,
    Forward,
    Job,
    Library,
    bits_of,
    check_no_overlap,
    dtype_of_result,
    model_of,
    name_of,
)
from cupyattn.arrays.torch import TORCH, Torch
from cupyattn.cpu.threads import num_cores
from cupyattn.problem import Alignment, Array, Device, Problem, Shape, Spec
from cupyattn.reading import check_results, refusal, unknown_words

__all__ = ["OPTIONAL", "Arrays", "Visit", "alignment_meant", "cuda_lane", "described", "enter", "untraced"]

P = ParamSpec("P")
R = TypeVar("R")


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """Keep torch.compile from tracing into NumPy: it calls the function as it is, between two graphs."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            if "torch._dynamo" not in sys.modules:
                return function(*args, **kwargs)
            if function not in _beside_dynamo:
                _beside_dynamo[function] = sys.modules["torch"].compiler.disable(function)
            return cast(R, _beside_dynamo[function](*args, **kwargs))
        except TypeError:
            if words := _unknown_words(function, args, kwargs):
                raise TypeError(words) from None
            raise

    call._torchdynamo_disable = True  # type: ignore[attr-defined]  # what torch.compiler.disable sets
    return call


def _unknown_words(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """What to say of keywords that a function or method does not have; nothing if it has them all."""
    name, words = function.__name__, list(signature(function).parameters)
    strangers = [word for word in kwargs if word not in words]
    if words[0] == "self":
        name, words = f"{type(args[0]).__name__ if args else 'Cache'}.{name}", words[1:]
    return unknown_words(name, strangers, words) if strangers else ""


_beside_dynamo: dict[Callable[..., Any], Callable[..., Any]] = {}


class NumPy(Library):
    title = "numpy.ndarray"

    def dtype(self, array: Any) -> str:
        return name_of(array.dtype)

    def place(self, array: Any) -> tuple[str, Any]:
        return "cpu", "cpu"

    def refuses(self, array: Any) -> str | None:
        if isinstance(array, (np.matrix, np.ma.MaskedArray)):
            return f"is a {type(array).__name__}; pass a plain array, and a mask as mask"
        return None

    def to_numpy(self, array: Any) -> Array:
        return bits_of(np.asarray(array))

    def from_numpy(self, array: Array, dtype: str, like: Any) -> Any:
        return array.view(dtype_of_result(dtype, like.dtype)) if dtype == "bfloat16" else array

    def places(self, pairs: Array, like: Any) -> Any:
        return tuple(pairs)

    def scatter(self, array: Any, places: Any, values: Any) -> Any:
        array[places] = values
        return array

    def check_writable(self, function: str, name: str, array: Any) -> None:
        if not array.flags.writeable:
            raise ValueError(refusal(function, f"{name} is read-only and was to be overwritten", (name, array.shape)))
        check_no_overlap(function, name, array.shape, array.strides, array.itemsize)

    def run(self, job: Job, arrays: Arrays) -> Arrays:
        """A result has the byte order of the array it resembles; lse, which resembles none, the machine's."""
        found = super().run(job, arrays)
        for name, result in found.items():
            like = model_of(name, arrays).dtype
            if name != "lse" and name_of(like) == name_of(result.dtype):
                found[name] = result.astype(like, copy=False)
        return found


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
        forward = job.forward
        dtypes = {name: dtype_of_result(spec.dtype, model_of(name, arrays).dtype) for name, spec in job.results.items()}

        def compute(values: Arrays) -> Arrays:
            outcome = forward({name: bits_of(np.asarray(x)) for name, x in values.items()})
            return {name: outcome[name].view(dtype) for name, dtype in dtypes.items()}

        outcome = delayed(compute, pure=True)(arrays)
        return {name: from_delayed(outcome[name], spec.shape, dtypes[name]) for name, spec in job.results.items()}


class CuPy(Library):
    title = "cupy.ndarray"

    def place(self, array: Any) -> tuple[str, Any]:
        return "cuda", array.device

    def places(self, pairs: Array, like: Any) -> Any:
        return tuple(self.index(pairs, like))

    def scatter(self, array: Any, places: Any, values: Any) -> Any:
        array[places] = values
        return array

    def values(self, array: Any) -> Array:
        return np.asarray(array.get())

    def check_writable(self, function: str, name: str, array: Any) -> None:
        check_no_overlap(function, name, array.shape, array.strides, array.itemsize)

    def check_in_place(self, function: str, name: str, array: Any) -> None:
        """Kernels write to the array's own memory."""


_NUMPY, _DASK, _CUPY, _OTHER = NumPy(), Dask(), CuPy(), Library()


@cache
def _library_of_type(kind: Any) -> Library | None:
    """The library a type belongs to; None if its objects are not arrays."""
    if issubclass(kind, np.ndarray):
        return _NUMPY
    family = type.mro(kind)
    roots = {base.__module__.partition(".")[0] for base in family}
    for root, name, library in (
        ("torch", "Tensor", TORCH),
        ("dask", "Array", _DASK),
        ("cupy", "ndarray", _CUPY),
    ):
        if root in roots and any(base.__name__ == name for base in family):
            return library
    if not hasattr(kind, "__array_namespace__") or issubclass(kind, np.generic):
        return None
    return JAX if "jax" in sys.modules and (roots & {"jax", "jaxlib"}) else _OTHER


@dataclass
class Visit:
    """The arrays of one call: who they are and where they live."""

    function: str
    library: Library
    arrays: Arrays
    specs: tuple[tuple[str, Spec], ...]
    kind: str
    """ "cpu" or "cuda"."""
    given: Arrays
    """The arrays as they came, before torch.autocast."""

    def device(self) -> Device:
        """What the planner has to know of the arrays' device."""
        if self.kind == "cpu":
            return _cpu(self.library.num_threads())
        from cupyattn import cuda

        return cuda.device_of(self.function, self.library.title, next(iter(self.arrays.values())))

    def notes(self, problem: Problem, plan: Any) -> tuple[str, ...]:
        """What is done with these very arrays besides the plan."""
        if self.kind == "cpu":
            return ()
        from cupyattn import cuda

        return cuda.notes(self.library.title, self.arrays, dict(self.specs), problem, plan)

    def run(
        self, forward: Forward, backward: Backward | None, results: Mapping[str, Spec], kept: tuple[str, ...] = ()
    ) -> Arrays:
        """Hand the arrays to `forward` as NumPy arrays and bring its results home; `backward` may use those `kept`."""
        if self.kind == "cuda":
            rule = "has no CUDA kernel; bring the arrays to the CPU"
            raise NotImplementedError(refusal(self.function, rule, *((x.name, x.shape) for _, x in self.specs)))
        check_results(self.function, dict(self.specs), results)
        return self.library.run(Job(self.function, tuple(self.arrays), forward, backward, results, kept), self.arrays)

    def as_given(self, gradients: Arrays) -> Arrays:
        """Gradients, by their arguments' names, in the dtypes in which these came."""
        return gradients if self.given is self.arrays else self.library.as_given(gradients, self.given)


@cache
def _cpu(most_threads: int | None) -> Device:
    return Device("cpu", "cpu", num_cores() if most_threads is None else min(num_cores(), most_threads))


OPTIONAL = frozenset(
    (
        "mask",
        "bias",
        "alibi_slopes",
        "sinks",
        "q_descale",
        "k_descale",
        "v_descale",
        "block_table",
        "out",
        "lse",
        "dlse",
        "cu_seqlens",
        "unused_mask",
    )
)
"""Our words for arguments that may be None."""

COMPANIONS = frozenset(
    (
        *("mask", "bias", "alibi_slopes", "sinks", "q_descale", "k_descale", "v_descale", "block_table"),
        *("cu_seqlens", "cu_seqlens_q", "cu_seqlens_k", "cu_seqlens_k_new", "cache_seqlens", "cache_batch_idx"),
        *("cache_leftpad", "rotary_seqlens", "offsets", "cos", "sin", "rotary_cos", "rotary_sin"),
        *("attention_mask", "unused_mask", "indices"),
    )
)
"""Our words for what may be NumPy's beside arrays of another library."""


def enter(function: str, arrays: Mapping[str, tuple[str, Any]], in_place: tuple[str, ...] = ()) -> Visit:
    """Look at the arrays of a call, given as {our word: (the caller's name, array or None)}.

    What goes with q, k and v may be NumPy's: it is copied to where they are.  Arrays that are written to, those
    `in_place`, stay what they are under torch.autocast, too.

    Raises
    ------
    TypeError
        Something is not an array, or the arrays are of different libraries.
    ValueError
        The arrays are on different devices, or on one nothing here can work on.
    NotImplementedError
        The call is being traced, and its results would be constants of the trace.
    """
    present = {word: entry for word, entry in arrays.items() if entry[1] is not None or word not in OPTIONAL}
    found = [_library_of(function, name, array) for name, array in present.values()]
    library = found[0]
    if any(other is not library for other in found):
        return enter(function, _gathered(function, present, found), in_place)
    library.check_call(function)
    for name, array in present.values():
        _check(function, library, name, array)
    given = {word: array for word, (_, array) in present.items()}
    if library is _NUMPY:
        return Visit(function, library, given, _specs(library, present, given), "cpu", given)
    kind = _place(function, library, present)
    called = library.as_called(given, kind, in_place)
    return Visit(function, library, called, _specs(library, present, called), kind, given)


Present = Mapping[str, tuple[str, Any]]


def _library_of(function: str, name: str, array: Any) -> Library:
    library = _library_of_type(type(array))  # type: ignore[arg-type]
    if library is None:
        rule, shown = f"{name} has to be an array", reprlib.repr(array)
        if isinstance(array, (list, tuple)):
            rule, shown = f"{rule}; numpy.asarray makes one of a {type(array).__name__}", f"of length {len(array)}"
        raise TypeError(refusal(function, rule, (name, shown, type(array).__name__)))
    return library


def _check(function: str, library: Library, name: str, array: Any) -> None:
    objection = library.refuses(array)
    if objection:
        raise TypeError(refusal(function, f"{name} {objection}", (name, type(array).__name__)))


def _specs(library: Library, present: Present, arrays: Arrays) -> tuple[tuple[str, Spec], ...]:
    return tuple(
        [(word, Spec(present[word][0], library.shape(array), library.dtype(array))) for word, array in arrays.items()]
    )


def _gathered(function: str, present: Present, found: list[Library]) -> Present:
    """Arrays of two libraries as those of one: NumPy's that go with others, copied to where these are."""
    strangers = {
        word: array
        for (word, (_, array)), library in zip(present.items(), found, strict=True)
        if library is _NUMPY and word.rstrip("0123456789") in COMPANIONS
    }
    if len(set(found) - {_NUMPY}) > 1 or len(strangers) < found.count(_NUMPY):
        shown = [(name, f"{type(x).__module__.partition('.')[0]}.{type(x).__name__}") for name, x in present.values()]
        raise TypeError(refusal(function, "all arrays have to be of one library", *shown))
    visit = enter(function, {word: entry for word, entry in present.items() if word not in strangers})
    if visit.kind == "cuda":
        visit.device()  # or CuPy would say in its own words what is missing
    values, brought = list(visit.arrays.values()), {}
    like = next((array for array in values if visit.library.place(array)[1] != "traced"), values[0])
    for word, array in strangers.items():
        name = present[word][0]
        _check(function, _NUMPY, name, array)
        try:
            brought[word] = visit.library.bring(array.astype(array.dtype.newbyteorder("=")), like)
        except (TypeError, ValueError) as error:
            rule = f"{name} is of a dtype that {visit.library.title} does not have"
            raise TypeError(refusal(function, rule, (name, array.shape, str(array.dtype)))) from error
        kind = visit.library.dtype(brought[word])
        if array.dtype.kind in "iu" and kind != array.dtype.name and (array.astype(kind) != array).any():
            rule = f"{name} holds numbers that are too large for {kind}, as which {visit.library.title} takes it"
            raise ValueError(refusal(function, rule, (name, array.shape, str(array.dtype))))
    return {word: (name, brought.get(word, array)) for word, (name, array) in present.items()}


def _place(function: str, library: Library, present: Present) -> str:
    """ "cpu" or "cuda", where all of them are."""
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
    return kind


def alignment_meant(mask: Any) -> tuple[Alignment, Shape] | None:
    """Of a mask that says "causal" and has no values: where the diagonal lies, and between what lengths."""
    library = _library_of_type(type(mask))  # type: ignore[arg-type]
    return None if library is None else library.alignment_meant(mask)


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


def cuda_lane(function: str, library: Library, like: Any) -> Any:
    """Between the memory of a GPU, where `like` is, and the host's; see `cuda.lanes`."""
    from cupyattn import cuda

    return cuda.lane(function, library.title, like)
