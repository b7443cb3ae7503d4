"""XLA's foreign function interface, by ctypes: programs that JAX compiles call us without going through JAX's arrays.

`ffi` makes a call part of a program; XLA calls `_answered` when the program gets there, with the addresses of operands
and of memory for results, on a CPU or on the stream of a GPU.  What the call is, travels in the program as a text, so
that a program that is kept, exported or run in another process asks for the same.

Of the interface only what follows is used; XLA promises not to change it without a new major version, and each of its
structures says how long it is.  Whether all that holds here is tried once (`objection_to_programs`); where it does not,
JAX calls back.

Source   openxla/xla, xla/ffi/api/c_api.h, API 0.1 to 0.3.
"""

from __future__ import annotations

import atexit
import ctypes
import math
import os
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from ctypes import POINTER, Structure, c_char_p, c_int, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from functools import cache
from typing import Any, cast

import numpy as np

from cupyattn.arrays.servers import SERVERS
from cupyattn.problem import FLOAT8, Array

TARGET = "cupyattn"
MAJOR, MINOR = 0, 1
"""The oldest version that has all this."""
PROBE = "is anybody there?"

# ---- XLA's structures ------------------------------------------------------------------------------------------------


class _Version(Structure):
    _fields_ = (("struct_size", c_size_t), ("extension", c_void_p), ("major", c_int), ("minor", c_int))


class _Extension(Structure):
    _fields_ = (("struct_size", c_size_t), ("kind", c_int), ("next", c_void_p))


class _Metadata(Structure):
    _fields_ = (("struct_size", c_size_t), ("version", _Version), ("traits", c_uint32))


class _MetadataExtension(Structure):
    _fields_ = (("base", _Extension), ("metadata", POINTER(_Metadata)))


class _Buffer(Structure):
    _fields_ = (
        *(("struct_size", c_size_t), ("extension", c_void_p)),
        *(("dtype", c_int), ("data", c_void_p), ("rank", c_int64), ("dims", POINTER(c_int64))),
    )


class _Buffers(Structure):
    """Arguments, or results."""

    _fields_ = (
        *(("struct_size", c_size_t), ("extension", c_void_p), ("size", c_int64)),
        *(("kinds", POINTER(c_int)), ("buffers", POINTER(POINTER(_Buffer)))),
    )


class _Span(Structure):
    _fields_ = (("start", c_void_p), ("size", c_size_t))


class _Attributes(Structure):
    _fields_ = (
        *(("struct_size", c_size_t), ("extension", c_void_p), ("size", c_int64)),
        *(("kinds", POINTER(c_int)), ("names", POINTER(POINTER(_Span))), ("values", POINTER(POINTER(_Span)))),
    )


class _Api(Structure):
    _fields_ = (
        *(("struct_size", c_size_t), ("extension", c_void_p), ("version", _Version), ("internal", c_void_p)),
        *(("error_create", c_void_p), ("error_get_message", c_void_p), ("error_destroy", c_void_p)),
        *(("handler_register", c_void_p), ("stream_get", c_void_p)),
    )


class _CallFrame(Structure):
    _fields_ = (
        *(("struct_size", c_size_t), ("extension", POINTER(_MetadataExtension))),
        *(("api", POINTER(_Api)), ("context", c_void_p), ("stage", c_int)),
        *(("arguments", _Buffers), ("results", _Buffers), ("attributes", _Attributes)),
    )


class _ErrorCreate(Structure):
    _fields_ = (("struct_size", c_size_t), ("extension", c_void_p), ("message", c_char_p), ("code", c_int32))


class _StreamGet(Structure):
    _fields_ = (("struct_size", c_size_t), ("extension", c_void_p), ("context", c_void_p), ("stream", c_void_p))


_Handler = ctypes.CFUNCTYPE(c_void_p, POINTER(_CallFrame))
_Api_Function = ctypes.CFUNCTYPE(c_void_p, c_void_p)
_METADATA, _EXECUTE, _STRING = 1, 3, 4
"""A kind of extension, a stage, and a kind of attribute."""
_INVALID_ARGUMENT, _UNIMPLEMENTED, _INTERNAL = 3, 12, 13
_DTYPES = {
    **dict(enumerate(("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"), 1)),
    **dict(enumerate(("float16", "float32", "float64"), 10)),
    16: "bfloat16",
    20: FLOAT8,
}
"""By XLA's numbers, as the package calls them."""


def _is_known(frame: _CallFrame) -> bool:
    """Everything lies where it is expected."""
    parts = frame.arguments, frame.results, frame.attributes
    return (
        frame.struct_size >= ctypes.sizeof(_CallFrame)
        and all(part.struct_size == ctypes.sizeof(part) for part in parts)
        and frame.api.contents.struct_size >= ctypes.sizeof(_Api)
        and frame.api.contents.version.major == MAJOR
    )


# ---- XLA calls -------------------------------------------------------------------------------------------------------


def _handler(platform: str) -> Any:
    """For `platform`, as XLA calls it; an exception becomes an error of the program."""

    def answered(pointer: Any) -> int | None:
        frame = pointer.contents
        if frame.extension and frame.extension.contents.base.kind == _METADATA:
            metadata = frame.extension.contents.metadata.contents
            is_known = not frame.api or _is_known(frame)  # before jax 0.7 there is nothing yet to be looked at
            metadata.version.major, metadata.version.minor = (MAJOR, MINOR) if is_known else (-1, 0)
            return None
        try:
            if frame.stage == _EXECUTE:
                if not _is_known(frame):
                    raise RuntimeError("XLA calls in a way that is not known here")
                _answer(platform, frame)
        except BaseException as error:  # into C nothing can be raised
            return _error_of(frame, error)
        return None

    return _Handler(answered)


def _answer(platform: str, frame: _CallFrame) -> None:
    text = _text(frame.attributes)
    if platform == "cpu":
        operands, results = _on_cpu(frame.arguments), _on_cpu(frame.results)
        for array in operands:
            array.flags.writeable = False
        if text == PROBE:
            results[0][...] = operands[0]
            return
        SERVERS[platform](text, operands, results)
        return
    SERVERS[platform](text, _on_gpu(frame.arguments), _on_gpu(frame.results), _stream_of(frame))


def _text(attributes: _Attributes) -> str:
    """The only attribute."""
    if attributes.size != 1 or attributes.kinds[0] != _STRING:
        raise RuntimeError("XLA calls without the text that the call was described by")
    span = attributes.values[0].contents
    return ctypes.string_at(span.start, span.size).decode()


def _facts(buffers: _Buffers) -> list[tuple[int, tuple[int, ...], str]]:
    """Address, shape and dtype of each."""
    found = (buffers.buffers[i].contents for i in range(buffers.size))
    return [(x.data or 0, tuple(x.dims[: x.rank]), _DTYPES[x.dtype]) for x in found]


class _Memory:
    """What NumPy makes an array of."""

    def __init__(self, address: int, shape: tuple[int, ...], kind: str) -> None:
        self.__array_interface__ = {"version": 3, "data": (address, False), "shape": shape, "typestr": kind}


def _on_cpu(buffers: _Buffers) -> list[Array]:
    """NumPy's arrays; bfloat16 and float8 as their bits."""
    return [
        np.asarray(_Memory(address, shape, _BITS[dtype])) if 0 not in shape else np.empty(shape, _BITS[dtype])
        for address, shape, dtype in _facts(buffers)
    ]


_BITS = {name: np.dtype({"bfloat16": "uint16", FLOAT8: "uint8"}.get(name, name)).str for name in _DTYPES.values()}


def _on_gpu(buffers: _Buffers) -> list[Any]:
    """CuPy's arrays, of memory that is XLA's."""
    import cupy
    import ml_dtypes

    found = []
    for address, shape, name in _facts(buffers):
        dtype = np.dtype(np.uint8 if name == FLOAT8 else getattr(ml_dtypes, name, name))  # CuPy has no float8
        size = math.prod(shape) * dtype.itemsize
        memory = cupy.cuda.UnownedMemory(address, size, None) if size else cupy.cuda.Memory(0)
        found.append(cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0)))
    return found


def _stream_of(frame: _CallFrame) -> int:
    asked = _StreamGet(ctypes.sizeof(_StreamGet), None, frame.context, None)
    error = _Api_Function(frame.api.contents.stream_get)(ctypes.addressof(asked))
    if error:
        raise RuntimeError("XLA has no stream for this call")
    return asked.stream or 0


def _error_of(frame: _CallFrame, error: BaseException) -> int:
    code = _INTERNAL
    if isinstance(error, (ValueError, TypeError)):
        code = _INVALID_ARGUMENT
    elif isinstance(error, NotImplementedError):
        code = _UNIMPLEMENTED
    message = f"{type(error).__name__}: {error}".encode()
    given = _ErrorCreate(ctypes.sizeof(_ErrorCreate), None, message, code)
    return int(_Api_Function(frame.api.contents.error_create)(ctypes.addressof(given)) or 0)


# ---- JAX calls -------------------------------------------------------------------------------------------------------


def ffi(results: Sequence[Any], values: Sequence[Any], text: str) -> Any:
    """The call as part of a program; `results` have shapes and dtypes."""
    import jax

    return jax.ffi.ffi_call(TARGET, results, vmap_method="sequential")(*values, text=text)


_handlers = {platform: _handler(platform) for platform in ("cpu", "CUDA")}
"""As long as programs call them."""
_trying = threading.Lock()


def objection_to_programs() -> str | None:
    """Why a program of this JAX cannot call us, on one of the platforms that it may run on."""
    with _trying:
        return _objection()


@cache
def _objection() -> str | None:
    import jax

    if not hasattr(jax, "ffi"):
        return f"jax {jax.__version__} has no jax.ffi"
    platforms = {device.platform: device.client.platform_version for device in jax.devices()}
    unknown = [name for name, version in platforms.items() if name not in ("cpu", "gpu") or "rocm" in version.lower()]
    if unknown:
        return f"nothing here is for the platform {unknown[0]}"
    if "gpu" in platforms and not _can_import("cupy"):
        return "CuPy, through which kernels are launched, cannot be imported"
    try:
        for platform, handler in _handlers.items():
            capsule = cast(Any, jax.ffi).pycapsule(ctypes.cast(handler, c_void_p))
            jax.ffi.register_ffi_target(TARGET, capsule, platform=platform)
        with ThreadPoolExecutor(1) as elsewhere:  # where no mesh is set, whose devices would all have to take part
            comes_back = elsewhere.submit(_comes_back).result()
            elsewhere.submit(_wait_at_exit).result()
        return None if comes_back else f"jax {jax.__version__} does not bring what was computed"
    except Exception as error:
        return f"jax {jax.__version__} does not call as expected: {str(error).splitlines()[0]}"


def _wait_at_exit() -> None:
    """For programs whose results nobody has waited for, while Python can still answer them.

    A call that came later would end one of XLA's threads, for which others of the program, and JAX's own end, would
    wait for ever.  There is no way to ask what is under way, but programs on all devices follow each other, and so do
    those on one device that one thread has called: these wait for what was called before.
    """
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    last: list[tuple[Any, Any]] = []
    for platform in {jax.default_backend(), "cpu"}:
        devices = jax.local_devices(backend=platform)
        for some in (devices[:1], devices)[: len(devices)]:
            axes = cast(Any, PartitionSpec)("devices")
            sharding = NamedSharding(Mesh(np.array(some), ("devices",)), axes)
            given: Any = jax.device_put(np.zeros(len(some), np.float32), sharding)
            last.append((jax.jit(lambda x: x + 1).lower(given).compile(), given))

    def wait(process: int = os.getpid()) -> None:
        if os.getpid() == process:  # a forked child has none of XLA's threads
            for program, given in last:
                with suppress(Exception):  # what has failed is over, too
                    program(given).block_until_ready()

    atexit.register(wait)


def _comes_back() -> bool:
    """Two numbers that a program has copied here."""
    import jax

    struct: Any = jax.ShapeDtypeStruct
    with jax.ensure_compile_time_eval():
        given = jax.device_put(np.array([1.5, -2.0], np.float32), jax.devices("cpu")[0])
        found = jax.jit(lambda x: ffi([struct(x.shape, x.dtype)], [x], PROBE)[0])(given)
        return np.array_equal(np.asarray(found), np.asarray(given))


def _can_import(name: str) -> bool:
    try:
        __import__(name)
    except ImportError:
        return False
    return name in sys.modules
