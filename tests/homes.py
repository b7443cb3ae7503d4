"""The homes arrays come from: a library, a dtype and a device each, and the way there.

A test written once, with NumPy operands, runs in every home: `make` carries an operand there, `call` calls
a function as that library's users would (jitted, for one), `check` finds whether a result belongs there.
"""

import warnings
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest

DTYPES = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
    "float64": np.float64,
}


def needs(module):
    """The module, or a skip that says what is missing.  What it warns of while it is imported is its own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(module, reason=f"needs {module}")


def dtype_name(array):
    return str(array.dtype).rsplit(".", 1)[-1]


@dataclass(frozen=True)
class Home:
    """NumPy, and what the others change."""

    dtype: str
    lazy = False
    immutable = False

    def __str__(self):
        return f"numpy-{self.dtype}"

    def make(self, array):
        return array.copy()

    def call(self, function, operands):
        return function(**operands)

    def check(self, result, like):
        """Does `result` live where `like` does?"""
        assert type(result) is type(like)
        assert result.flags.writeable

    def name_of(self, dtype):
        """What this library makes of a NumPy dtype."""
        return str(dtype)


@dataclass(frozen=True)
class BigEndian(Home):
    def __str__(self):
        return f"numpy-big-endian-{self.dtype}"

    def make(self, array):
        return array.astype(array.dtype.newbyteorder(">"))

    def name_of(self, dtype):
        return dtype.name


@dataclass(frozen=True)
class Torch(Home):
    def __str__(self):
        return f"torch-{self.dtype}"

    def make(self, array):
        torch = needs("torch")
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
        if array.dtype == ml_dtypes.float8_e4m3fn:
            return torch.from_numpy(array.view(np.uint8).copy()).view(torch.float8_e4m3fn)
        return torch.from_numpy(array.copy())

    def check(self, result, like):
        assert type(result) is needs("torch").Tensor
        assert result.device == like.device


@dataclass(frozen=True)
class Jax(Home):
    jit: bool = False
    immutable = True

    def __str__(self):
        return f"jax{'-jit' if self.jit else ''}-{self.dtype}"

    @property
    def lazy(self):
        return self.jit

    def make(self, array):
        return needs("jax.numpy").asarray(array)

    def call(self, function, operands):
        return (needs("jax").jit(function) if self.jit else function)(**operands)

    def check(self, result, like):
        assert isinstance(result, needs("jax").Array)
        assert result.devices() == like.devices()

    def name_of(self, dtype):
        return {"int64": "int32"}.get(str(dtype), str(dtype))


@dataclass(frozen=True)
class Strict(Home):
    device: str = "CPU_DEVICE"

    def __str__(self):
        return f"strict-{self.device}-{self.dtype}"

    def make(self, array):
        xp = needs("array_api_strict")
        return xp.asarray(array.copy(), device=xp.Device(self.device))

    def check(self, result, like):
        assert type(result) is type(like)
        assert result.device == like.device


@dataclass(frozen=True)
class Dask(Home):
    """Every axis in chunks of two, those of rows and keys and features too."""

    lazy = True
    immutable = True

    def __str__(self):
        return f"dask-{self.dtype}"

    def make(self, array):
        return needs("dask.array").from_array(array.copy(), chunks=2)

    def check(self, result, like):
        assert type(result) is type(like)


@dataclass(frozen=True)
class HostBackedCuPy(Home):
    """CuPy arrays whose memory is the host's: they have all that a dispatcher looks at, and need no GPU."""

    def __str__(self):
        return f"cupy-{self.dtype}"

    def make(self, array):
        cupy = needs("cupy")
        if cupy.cuda.is_available():
            pytest.skip("needs a machine without a GPU")
        array = array.copy()
        memory = cupy.cuda.UnownedMemory(array.ctypes.data, array.nbytes, array, device_id=0)
        return cupy.ndarray(array.shape, array.dtype, cupy.cuda.MemoryPointer(memory, 0))


HOMES = [
    *(Home(dtype) for dtype in DTYPES),
    *(BigEndian(dtype) for dtype in ("float16", "float32", "float64")),
    *(Torch(dtype) for dtype in DTYPES),
    *(Jax(dtype) for dtype in ("float16", "bfloat16", "float32")),
    *(Jax(dtype, jit=True) for dtype in ("bfloat16", "float32")),
    Strict("float32"),
    Strict("float64"),
    Strict("float32", "device1"),
    Dask("float32"),
    Dask("bfloat16"),
]
"""float64 of JAX is tested on its own: it is off unless the user switches it on."""
