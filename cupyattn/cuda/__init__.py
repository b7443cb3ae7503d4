"""The GPU's only door: arrays on a CUDA device, a plan, and the results in the caller's library.

memory      whose arrays these are, and where they lie
launch      kernel, grid and parameter record
mapping     which arrays tensor maps read, and which are copied for it
append      the same for new keys and values on their way into a cache
script      the launches of a call, to be made again with other addresses
gradients   the same for gradients: several launches, and sums over what repeats an operand
states      the same for states that are merged one after the other
module      the kernel, from the cache of cubins or from NVRTC
lanes       copies to the host and back, beside the caller's stream
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import numpy as np

from cupyattn.cuda import appending, backward, copying, noting, scheduling, scripting
from cupyattn.cuda.launching import maps
from cupyattn.cuda.launching.lanes import CuPyLane, TorchLane
from cupyattn.cuda.launching.launch import recipe_of, record_of
from cupyattn.cuda.launching.mapping import are_remade, map_objections
from cupyattn.cuda.launching.memory import NOTHING, CuPyMemory, JaxMemory, TorchMemory
from cupyattn.cuda.launching.script import Script
from cupyattn.cuda.launching.views import View, has_to_be_copied, lies_like_new
from cupyattn.cuda.making.compiler import FOLDER_OF_CUPY, INSTALL
from cupyattn.cuda.making.module import Launch, kernel
from cupyattn.cuda.merging import RunningState
from cupyattn.plan import Plan
from cupyattn.problem import FLOAT8, Device, Problem, Spec
from cupyattn.reading import refusal

Arrays = Mapping[str, Any]


def device_of(function: str, title: str, array: Any) -> Device:
    """The GPU an array is on, as the planner needs it.

    Raises
    ------
    ImportError
        CuPy, through which kernels are launched, is not installed.
    RuntimeError
        CuPy finds no driver or no device, or no folder to write to.
    """
    try:
        import cupy
    except ImportError as error:
        rule = f"the arrays are on a CUDA device ({title}) and CuPy cannot be imported: {INSTALL}"
        raise ImportError(refusal(function, rule)) from error
    except OSError as error:  # it makes a folder in the user's home
        raise RuntimeError(refusal(function, f"CuPy cannot make its folder ({error}): {FOLDER_OF_CUPY}")) from error
    if not cupy.cuda.is_available():
        rule = f"the arrays are on a CUDA device ({title}) and CuPy finds no NVIDIA driver or GPU on this machine"
        runtime = cupy.cuda.runtime
        own, driver = runtime.runtimeGetVersion() // 1000, runtime.driverGetVersion() // 1000
        if 0 < driver < own:
            rule = f"CuPy here is for CUDA {own}, and the driver for CUDA {driver}: uninstall it, and {INSTALL}"
        raise RuntimeError(refusal(function, rule))
    return _device(index_of(array))


@functools.cache
def _device(index: int) -> Device:
    import cupy

    device = cupy.cuda.Device(index)
    numbers = device.attributes
    return Device(
        cupy.cuda.runtime.getDeviceProperties(index)["name"].decode(),
        "cuda",
        numbers["MultiProcessorCount"],
        (numbers["ComputeCapabilityMajor"], numbers["ComputeCapabilityMinor"]),
        numbers["MaxSharedMemoryPerBlockOptin"],
        maps.can_be_encoded(),
    )


def index_of(array: Any) -> int:
    """The CUDA ordinal of a CuPy, torch or JAX array."""
    device = getattr(array, "device", None)
    for name in ("local_hardware_id", "id", "index"):  # JAX's id counts the devices of all processes
        index = getattr(device, name, None)
        if isinstance(index, int):
            return index
    return int(array.__dlpack_device__()[1])


def running_state(title: str, like: Any, batch: int, num_heads: int, count: int, head_dim_v: int) -> RunningState:
    """The state of rows that have seen no key yet, where `like` is; see `RunningState`."""
    return RunningState(_memory(title), index_of(like), batch, num_heads, count, head_dim_v, like)


def current(array: Any) -> Any:
    """Where an array is, as the current device; a context."""
    return _current(index_of(array))


@functools.cache
def _memory(title: str) -> CuPyMemory:
    """The adapter of a library, by its title in `arrays`."""
    if title == "cupy.ndarray":
        return CuPyMemory()
    if title == "torch.Tensor":
        return TorchMemory()
    if title == "jax.Array":
        return JaxMemory()
    raise NotImplementedError(f"arrays of type {title} on a CUDA device: only CuPy, torch and JAX are known there")


def run(
    function: str,
    title: str,
    arrays: Arrays,
    specs: Mapping[str, Spec],
    plan: Plan,
    problem: Problem,
    seed: int,
    into: Arrays = MappingProxyType({}),
    shared: scheduling.Shared | None = None,
) -> dict[str, Any]:
    """Launch the planned kernel on the caller's stream, and return its results by name without waiting for them.

    The caller's arrays that these are to go `into` are written to by the kernel, and returned, where it can.
    A schedule may be `shared` with other calls.

    The values of cu_seqlens and block_table are not looked at on the host: what lies outside the arrays is
    cut off on the device.

    Raises
    ------
    NotImplementedError
        Gradients are wanted, or the library is not known on a GPU, or not for float8 arrays.
    RuntimeError
        The kernel has to be compiled and cannot be.
    """
    memory = _memory(title)
    if memory.gradients_wanted(arrays):
        rule = "has no gradients on the GPU; call it under torch.no_grad(), or on the CPU"
        raise NotImplementedError(refusal(function, rule))
    _check_float8(function, memory, problem)
    index = index_of(arrays["q"])
    with _current(index):
        operands = memory.bring(arrays)
        results = _results(memory, problem.results, arrays["q"], into)
        try:
            if problem.sizes.num_heads and 0 not in problem.out_shape:
                for launch in _ready(
                    function, memory, index, operands, specs, results, plan, problem, seed, shared=shared
                ):
                    launch()
        finally:  # copies may be under way
            memory.launched(operands, results)
        return memory.home(results)


def run_backward(
    function: str,
    title: str,
    arrays: Arrays,
    specs: Mapping[str, Spec],
    plan: Plan,
    problem: Problem,
    seed: int,
    into: Arrays = MappingProxyType({}),
) -> dict[str, Any]:
    """Gradients of the floating operands by their names, queued on the caller's stream.

    Among the arrays are ``dout``, the forward's ``out`` and ``lse``, and ``dlse`` if there is one.  `into` is as for
    `run`.

    Raises
    ------
    RuntimeError
        A kernel has to be compiled and cannot be.
    """
    memory = _memory(title)
    index = index_of(arrays["q"])
    with _current(index):
        operands = memory.bring(arrays)
        results = _results(memory, {x: specs[x] for x in backward.NAMES if x in specs}, arrays["q"], into)
        try:
            backward.queue(memory, index, operands, specs, results, plan, problem, seed)
        finally:  # copies may be under way
            memory.launched(operands, results)
        return memory.home(results)


def run_from_cache(
    function: str,
    title: str,
    arrays: Arrays,
    specs: Mapping[str, Spec],
    plan: Plan,
    problem: Problem,
    cache_seqlen: int | None,
    each_row: bool,
    interleaved: bool,
    into: Arrays,
    scheduler_metadata: Any = None,
) -> dict[str, Any]:
    """Append what is new to a cache, in place, and attend over it, in launches one after the other.

    `cache_seqlen` is that of all sequences, where they have no cache_seqlens; if neither, all places are taken.
    `each_row` and `interleaved` are about the rotation of q, `into` is as for `run`.  `scheduler_metadata`, of
    `make_schedule`, is not made again.

    Raises
    ------
    NotImplementedError
        The library is not known on a GPU, or not for float8 arrays.
    ValueError
        Kernels cannot reach the numbers of a cache where they lie.
    RuntimeError
        A kernel has to be compiled and cannot be.
    """
    memory = _memory(title)
    _check_float8(function, memory, problem)
    index = index_of(arrays["q"])
    with _current(index):
        operands = dict(memory.bring(arrays))
        for name in ("k", "v"):
            view = memory.view(operands[name], specs[name].dtype)
            if has_to_be_copied(name, *view[1:], problem.sizes.batch_shape):
                rule = f"{specs[name].name} has to be contiguous along its last axis: a cache is not copied"
                raise ValueError(refusal(function, rule, (specs[name].name, view.shape, f"strides {view.strides}")))
        results = _results(memory, problem.results, arrays["q"], into)
        seqlen = problem.sizes.seqlen_k if cache_seqlen is None else cache_seqlen
        launches = []
        if "k_new" in operands:
            launches.append(appending.ready(memory, index, operands, specs, problem, seqlen, each_row, interleaved))
        if problem.sizes.num_heads and 0 not in problem.out_shape:
            of_attention = {name: array for name, array in operands.items() if name not in appending.OPERANDS}
            made = None if scheduler_metadata is None else memory.bring({"": scheduler_metadata})[""]
            launches += _ready(function, memory, index, of_attention, specs, results, plan, problem, 0, seqlen, made)
        for launch in launches:  # nothing is written unless all are ready
            launch()
        return memory.home(results)


def script_of(title: str, arrays: Arrays, *asked: Any) -> Script | None:
    """A call that was made, as what makes it `again`; the arguments are those of `scripting.script_of`."""
    return scripting.script_of(_memory(title), index_of(arrays["q"]), arrays, *asked)


def again(script: Script, arrays: Sequence[Any], addresses: list[int]) -> list[Any]:
    """The results of the same call of other arrays."""
    return script.queue(arrays, addresses, _current)


def make_schedule(title: str, arrays: Arrays, specs: Mapping[str, Spec], plan: Plan, problem: Problem) -> Any:
    """What `run_from_cache` takes as scheduler_metadata, for calls of these specs by these index arrays."""
    memory, index = _memory(title), index_of(arrays["cache_seqlens"])
    with _current(index):
        operands = memory.bring(arrays)
        found, launches = scheduling.made(memory, index, operands, specs, plan, problem)
        for launch in launches:
            launch()
        return memory.home({scheduling.WORD: found})[scheduling.WORD]


def _results(memory: CuPyMemory, specs: Mapping[str, Spec], like: Any, into: Arrays) -> dict[str, Any]:
    """Memory for the results: the caller's, where a kernel can write there, or else new."""

    def is_like_new(array: Any, spec: Spec) -> bool:
        view = memory.view(array, spec.dtype)
        return memory.is_plain(array) and lies_like_new(view)

    return {
        name: into[name] if name in into and is_like_new(into[name], spec) else memory.result(spec, like)
        for name, spec in specs.items()
    }


@contextmanager
def on_stream(array: Any, stream: int) -> Iterator[None]:
    """What is queued meanwhile, is so on a stream of the array's device that somebody else made."""
    import cupy

    with _current(index_of(array)), cupy.cuda.ExternalStream(stream):
        yield


def on_host(function: Callable[[dict[str, Any]], Mapping[str, Any]], arrays: Arrays) -> dict[str, Any]:
    """What no kernel does: a function of NumPy arrays, of CuPy's, whose results stay NumPy's."""
    memory = _memory("cupy.ndarray")
    with _current(index_of(arrays["q"])):
        return dict(function({name: memory.to_host(array) for name, array in arrays.items()}))


def put(found: Arrays, into: Arrays) -> None:
    """Results that are not there yet, into CuPy arrays."""
    memory = _memory("cupy.ndarray")
    for name, array in into.items():
        if isinstance(found[name], np.ndarray):
            memory.from_host(array, np.ascontiguousarray(found[name]))
        elif found[name] is not array:
            array[...] = found[name]


def _check_float8(function: str, memory: CuPyMemory, problem: Problem) -> None:
    if problem.dtype == FLOAT8 and not isinstance(memory, TorchMemory):
        rule = "float8 arrays on a CUDA device are taken from torch only: CuPy has no such dtype"
        raise NotImplementedError(refusal(function, rule))


def _ready(
    function: str,
    memory: CuPyMemory,
    index: int,
    operands: Arrays,
    specs: Mapping[str, Spec],
    results: Arrays,
    plan: Plan,
    problem: Problem,
    seed: int,
    cache_seqlen: int = 0,
    schedule: Any = None,
    shared: scheduling.Shared | None = None,
) -> list[Launch]:
    """That of the planned kernel, and around it those of its schedule, unless that is there, and of the merge."""
    views = {name: memory.view(array, specs[name].dtype) for name, array in operands.items()}
    _check_instead(function, plan, problem, views)
    stream = memory.stream(index)
    with memory.temporaries(stream):
        asked = functools.partial(recipe_of, plan, problem)
        now, views, recipe = copying.readable(memory, operands, views, specs, problem, asked)
        if schedule is not None:
            recipe = scheduling.going_by(function, recipe, memory.view(schedule, "int32"))
        elif shared is not None:
            schedule = scheduling.shared_among(shared, memory, index, stream, recipe, views, operands["q"])
            recipe = recipe if schedule is None else scheduling.without(recipe)
        scratch, workspace = memory.scratch(recipe.workspace, operands["q"])
        if schedule is not None and recipe.merge is not None and recipe.schedule is None:
            scratch["schedule"] = memory.pointer(schedule)
            workspace.append(schedule)
    addresses = {name: memory.pointer(array) for name, array in results.items()}
    launches = []
    for each in recipe.launches:
        record, what = record_of(each, views, addresses, seed, scratch, cache_seqlen), each.specialisation
        launches.append(Launch(kernel(what, index), each.grid, what, record, stream, [*now.values(), workspace]))
    return launches


def _check_instead(function: str, plan: Plan, problem: Problem, views: Mapping[str, View]) -> None:
    """Refuse arrays that the Hopper kernel cannot read and that are not copied, where nothing else may read them."""
    if plan.instead is None or plan.instead.kernel != "none" or are_remade(plan, problem):
        return
    if reasons := map_objections(problem, views):
        against = [("hopper", f"has no tensor map, {reason}") for reason in reasons.values()]
        against += [(name, reason) for name, others in plan.instead.objections for reason in others]
        rule = f"no implementation takes arrays that lie like these\n    {problem}"
        raise NotImplementedError(refusal(function, rule, *against))


def lane(function: str, title: str, like: Any) -> CuPyLane | TorchLane:
    """Copies between the GPU of `like` and the host.

    Raises
    ------
    NotImplementedError
        The library is not known on a GPU, or cannot be written to.
    """
    if title == "cupy.ndarray":
        return CuPyLane(index_of(like))
    if title == "torch.Tensor":
        return TorchLane(like)
    raise NotImplementedError(refusal(function, f"cannot keep arrays of {title} on the host"))


def _current(index: int) -> Any:
    """Make a device the current one, if it is not."""
    import cupy

    return NOTHING if cupy.cuda.runtime.getDevice() == index else cupy.cuda.Device(index)


def views(title: str, arrays: Arrays, specs: Mapping[str, Spec]) -> dict[str, View]:
    """Where the arrays lie."""
    memory = _memory(title)
    return {name: memory.view(array, specs[name].dtype) for name, array in memory.bring(arrays).items()}


def notes(title: str, arrays: Arrays, specs: Mapping[str, Spec], problem: Problem, plan: Plan) -> tuple[str, ...]:
    """What `explain` says about these very arrays."""
    return noting.notes(views(title, arrays, specs), problem, plan)
