"""What has to be known of an array library, and what any that follows the array API has in common.

`recognition` finds the library of a call; `numpy`, `dask`, `cupy`, `torch` and `jax` have what is special about these.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from cupyattn.described import Call
from cupyattn.problem import FLOAT8, Alignment, Array, Device, Problem, Shape, Spec
from cupyattn.reading import dtype_name, refusal

Arrays = dict[str, Any]
Specs = tuple[tuple[str, Spec], ...]
"""Of a call's arrays, by our words for them."""
Forward = Callable[[Arrays], Arrays]
"""NumPy operands by name to NumPy results by name."""
Backward = Callable[[Arrays, Arrays], Arrays]
"""NumPy operands and gradients of results (or None), by name, to gradients of operands by name.
Those of the forward's own results that were to be kept come along under their names, where they are at hand."""


class NotNow(Exception):
    """A call has no numbers to work with now: somebody writes down what is done, or its arrays have no values."""


class Traced(NotNow, NotImplementedError):
    """The first of these."""


class Valueless(NotNow, TypeError):
    """The second, said by an array's type."""


class Nowhere(NotNow, ValueError):
    """The second, said by its device."""


@dataclass(eq=False, slots=True)
class Job:
    """What a library is to do with the arrays of a call."""

    function: str
    names: tuple[str, ...]
    """Of the operands, in order."""
    forward: Forward
    backward: Backward | None
    results: Mapping[str, Spec]
    kept: Mapping[str, Spec] = field(default_factory=dict)
    """Results that `backward` has a use for.  Where the caller gets all of them, a library may refuse to have them
    overwritten; where he does not, `backward` has its own, of which he knows nothing."""
    at_home: bool = False
    """Both passes take the library's own arrays, and give back such, instead of NumPy's."""
    call: Call | None = None
    """What the two functions are in words, for programs that may outlive them."""

    @property
    def all_results(self) -> dict[str, Spec]:
        """Those of the caller's, and those of `backward`'s alone."""
        return {**self.results, **self.kept}

    @property
    def keeps_its_own(self) -> bool:
        return any(name not in self.results for name in self.kept)


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
        return {1: "cpu", 2: "cuda", 3: "cpu", 13: "cuda"}.get(kind, f"device {kind}"), home_of(array)[1]

    def notes(self) -> tuple[str, ...]:
        """What `explain` says of how the library is served."""
        return ()

    def imagined(self, array: Any) -> Device | None:
        """The device that an array is said to be on, where it is on none."""
        return None

    def before_work(self, specs: Specs, steps: Sequence[tuple[Problem, Any]]) -> None:
        """Told what is going to be computed, each problem with its plan, once nothing more is refused."""

    def check_call(self, function: str) -> None:
        """Refuse any call there is now, where nothing that is computed would be right later."""

    def refuses(self, array: Any) -> str | None:
        """Why this very array cannot be taken."""
        for name, what in (
            ("__dlpack__", "by which its values could be read"),
            ("device", "on which results could be"),
        ):
            if not hasattr(array, name):
                return f"has no {name}, {what}; pass what numpy.asarray makes of it"
        try:
            self.place(array)
        except Exception as error:  # ndonnx's: ONNX knows no devices
            return f"cannot say where it is ({error}); pass a NumPy array of its values"
        return None

    def surroundings(self, array: Any) -> Hashable | None:
        """What counts besides the arguments of a call, of which one is an array; None: it may be another call now."""
        return None

    def glance(self, array: Any) -> tuple[Hashable, int] | None:
        """All of an array that decides how a kernel takes it, but its address, and this; None: it has to be looked at.

        Of arrays that `refuses` has nothing against, and that gradients are not asked of.
        """
        return None

    def reach(self, array: Any) -> tuple[int, int]:
        """From its first byte to behind its last one, counted from its address."""
        return reach_of(self.shape(array), array.strides, 1, array.itemsize)

    def has_no_values(self, array: Any) -> bool:
        """Only shape and dtype are known of it, and are what a graph is made of."""
        return False

    def as_called(self, arrays: Arrays, kind: str, in_place: tuple[str, ...]) -> Arrays:
        """The arrays of a call, cast where the library casts them by itself; those `in_place` are written to."""
        return arrays

    def check_kinds(self, function: str, arrays: Arrays) -> None:
        """Refuse arrays, by the callers' names, whose types disagree about what results are."""

    def of_their_kind(self, arrays: Arrays, results: Arrays) -> Arrays:
        """Results of a call as objects of the type that the library's own functions return for these arrays."""
        return results

    def as_given(self, results: Arrays, given: Arrays) -> Arrays:
        """Gradients in the dtypes in which their arguments came, before `as_called`."""
        return results

    def alignment_meant(self, mask: Any) -> tuple[Alignment, Shape] | None:
        """Of a mask that says "causal" and has no values: where the diagonal lies, and between what lengths."""
        return None

    def num_threads(self) -> int | None:
        """How many the user has told the library to use."""
        return None

    def to_numpy(self, array: Any) -> Array:
        """The same memory as a NumPy array; bfloat16 and float8 as their bits (see `rounding`)."""
        try:
            return bits_of(np.from_dlpack(array))
        except ValueError:
            return bits_of(np.from_dlpack(_OldDLPack(array)))

    def values(self, array: Any) -> Array:
        """The same for a look at the values outside of `run`; they have to be there, see `is_deferred`."""
        return self.to_numpy(array)

    def from_numpy(self, array: Array, dtype: str, like: Any) -> Any:
        """A fresh NumPy array as one of this library, on the device of `like`."""
        xp, device = home_of(like)
        return xp.asarray(array, device=device)

    def zeros(self, shape: Shape, like: Any) -> Any:
        """In the dtype and at the home of `like`."""
        xp, device = home_of(like)
        return xp.zeros(shape, dtype=like.dtype, device=device)

    def empty(self, shape: Shape, like: Any) -> Any:
        """Memory that nobody has written to, in the dtype and at the home of `like`."""
        xp, device = home_of(like)
        return xp.empty(shape, dtype=like.dtype, device=device)

    def bring(self, values: Array, like: Any) -> Any:
        """Numbers that were worked out on the host, to the home of `like`."""
        return self.from_numpy(values, values.dtype.name, like)

    def index(self, places: Array, like: Any) -> Any:
        """Integers as an index into arrays at the home of `like`."""
        return self.bring(places.astype(self.index_dtype()), like)

    def take(self, array: Any, places: Array) -> Any:
        """The rows of the first axis at `places`, in that order, in memory of their own."""
        xp, _ = home_of(array)
        return xp.take(array, self.index(places, array), axis=0)

    def put(self, array: Any, index: Any, values: Any) -> Any:
        """The array with `values` at an index of slices: itself, or a new one where arrays are immutable."""
        array[index] = values
        return array

    def places(self, pairs: Array, like: Any) -> Any:
        """Places of the first two axes, (2, count), in the form that `scatter` wants at the home of `like`."""
        return pairs.T.tolist()

    def scatter(self, array: Any, places: Any, values: Any) -> Any:
        """The array with a row of `values` at each of the `places`: itself, or a new one as for `put`."""
        for i, (first, second) in enumerate(places):
            array[first, second, ...] = values[i, ...]
        return array

    def check_keepable(self, function: str, arrays: Arrays) -> None:
        """Refuse arrays whose values cannot be kept beyond the call, by `put`."""
        names = " and ".join(arrays)
        if self.is_deferred(arrays):
            raise TypeError(refusal(function, f"keeps the values of {names}, {self.when_deferred}"))
        for name, array in arrays.items():
            if not hasattr(type(array), "__setitem__"):
                rule = f"{name} cannot be kept: arrays of {type(array).__name__} are immutable"
                raise TypeError(refusal(function, rule, (name, self.shape(array))))

    def draw_seed(self, function: str) -> Any:
        """An int; or, where a call stands for many and each is to have a seed of its own, an array of this library."""
        return int.from_bytes(os.urandom(8), "little")

    def is_deferred(self, arrays: Arrays) -> bool:
        """Values are not to be had now: under a trace, or in a graph."""
        return False

    def is_placed_later(self, arrays: Arrays) -> bool:
        """Where the call will be done is not known now: it becomes part of a program."""
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

    def check_in_place(self, function: str, name: str, array: Any) -> None:
        """Refuse an array that is not overwritten when what `to_numpy` makes of it is."""
        if not self.to_numpy(array).flags.writeable:
            rule = f"{name} cannot be overwritten: {self.title} gives its memory for reading only"
            raise TypeError(refusal(function, rule, (name, self.shape(array))))

    def note_overwritten(self, array: Any) -> None:
        """Tell the library that an array has other values than before, where it wants to know."""

    def differentiates(self, arrays: Arrays) -> bool:
        """Derivatives of the call's results may be asked for later, or are computed along with it."""
        return False

    def run(self, job: Job, arrays: Arrays) -> Arrays:
        if job.at_home:
            return job.forward(arrays)
        outcome = job.forward({name: self.to_numpy(array) for name, array in arrays.items()})
        return {
            name: self.from_numpy(outcome[name], spec.dtype, model_of(name, arrays))
            for name, spec in job.results.items()
        }


class _OldDLPack:
    """An array of a library that knows the DLPack of 2022, without the arguments that came later."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __dlpack__(self, **arguments: Any) -> Any:
        return self._array.__dlpack__()

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()


def home_of(array: Any) -> tuple[Any, Any]:
    """Namespace and device, by array-api-compat, which NumPy's arrays can do without."""
    import array_api_compat

    return array_api_compat.array_namespace(array), array_api_compat.device(array)


def model_of(name: str, arrays: Arrays) -> Any:
    """The array whose home a result is to share: the operand it is the gradient of, or the first one."""
    return arrays[name] if name in arrays else next(iter(arrays.values()))


@cache
def name_of(dtype: Any) -> str:
    """A NumPy-like dtype's name; remembered, since NumPy spells it out anew each time."""
    return str(dtype.name)


def bits_of(array: Array) -> Array:
    """What NumPy has no dtype of its own for, as its bits; integers in the machine's byte order, for NumPy's clip."""
    if array.dtype.isbuiltin == 1:
        return array
    if array.dtype.kind in "iu" and not array.dtype.isnative:
        return array.astype(array.dtype.newbyteorder("="))
    bits = BITS.get(name_of(array.dtype))
    return array if bits is None else array.view(bits)


CAST = frozenset({"q", "k", "v", "k_new", "v_new", "k_prefix", "v_prefix", "bias", "dout"})
"""Our words for what torch.autocast casts: what its own function is given, by any name."""

BITS = {"bfloat16": np.uint16, FLOAT8: np.uint8}


def dtype_of_result(name: str, like: Any) -> Any:
    """The NumPy dtype of a result, in a call with an array of dtype `like`; NumPy's bfloat16 is somebody else's."""
    if name != "bfloat16":
        return np.dtype(name)
    if name_of(like) == name:
        return like
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


def reach_of(shape: Shape, strides: Shape, unit: int, itemsize: int) -> tuple[int, int]:
    """Of an array whose strides are so many units of bytes."""
    if 0 in shape:
        return 0, 0
    steps = [(size - 1) * stride * unit for size, stride in zip(shape, strides, strict=True)]
    return sum(min(0, step) for step in steps), sum(max(0, step) for step in steps) + itemsize


def check_no_overlap(function: str, name: str, shape: Shape, strides: Shape, itemsize: int) -> None:
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
