"""The CUDA kernels of `cupyattn/cuda` on the CPU: compiled by g++, every CUDA thread a coroutine.

What is in `instructions/` here takes the place of the files of these names there, where every instruction and every
access to memory is a function. So each access is checked, and copies, blocks and threads come in an order that the
caller chooses.

    kernel = build("flash.cu", "cupyattn::flash_forward<cupyattn::FlashTraits<...>>")
    kernel.launch(record, grid=(3, 2, 1), threads=128, shared_memory=49152,
                  buffers=[(q, False), (k, False), (v, False), (out, True)], schedule=1, seed=5)

`record` is the kernel's parameter struct, as bytes or as a NumPy record, with addresses of host arrays as pointers;
`buffers` are the arrays it may touch, and whether it may write them. Whatever is wrong raises `EmulatorError`.
`encode_map` makes the record's TensorMaps.
"""

import ctypes
import fcntl
import functools
import getpass
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import threading
from contextlib import suppress
from math import prod
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
CUDA = HERE.parents[1] / "cupyattn" / "cuda"
FLAGS = ("-O0", "-std=c++17", "-Wall", "-Wno-unknown-pragmas", "-Wno-psabi", "-fPIC", "-fvisibility=hidden")
# A kernel is compiled more often than it runs, and what all kernels call is compiled once, optimised.
FLAGS += ("-ffp-contract=off",)  # so that sums do not depend on what the machine can fuse
with suppress(OSError):
    if " avx2 " in Path("/proc/cpuinfo").read_text():
        FLAGS += ("-mavx2",)  # for the products of warpgroups
SCHEDULES = (0, 1, 2)
ONE_IS_LATE = 3
MAX_SHARED_MEMORY = 232448


_MAP_MARK = 0x50414D54  # `Map::kMark` of boxes.h


def path_of(name):
    """Where the source with this file name lies, as others include it."""
    (found,) = CUDA.rglob(name)
    return found.relative_to(CUDA).as_posix()


class EmulatorError(Exception):
    """What a kernel did that it must not do."""


class BuildError(Exception):
    """What the compiler had to say."""


def require_compiler():
    """Skips the calling test where there is no g++."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")


def build(source, expression, folder=None, sources=None, flags=()):
    """A kernel of the file `source`, named by a C++ `expression`, ready to launch.

    `sources` maps file names to texts that take the place of, or come beside, those in `cupyattn/cuda`.
    Libraries are kept in `folder`, by default one for all runs of this user.
    """
    texts = _texts(source, sources or {})
    main = f'#include "{source}"\n#include "launch.h"\nstatic constexpr auto kernel = {expression};\n'
    texts["main.cpp"] = main + "EMULATED_KERNEL(kernel)\n"
    flags = (*FLAGS, *flags)
    folder = Path(folder or Path(tempfile.gettempdir()) / f"cupyattn-emulator-{getpass.getuser()}")
    library = folder / f"{Path(source).stem}-{_key(texts, flags)}.so"
    _once(library, lambda: _compile(texts, flags, library))
    return Kernel(library)


def _key(texts, flags):
    return hashlib.sha256(repr((sorted(texts.items()), flags, _compiler_version())).encode()).hexdigest()[:24]


def _once(path, make):
    """Has it made, unless it is there: other test processes may want it too, and one compiler is enough."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            make()


class Kernel:
    """A compiled kernel. It holds one machine, so that launches from several threads wait for each other."""

    def __init__(self, path):
        self.path = path
        self._library = ctypes.CDLL(str(path))
        self._library.emulator_parameter_bytes.restype = ctypes.c_ulong
        self._lock = threading.Lock()

    @property
    def parameter_bytes(self):
        """sizeof of the kernel's parameter struct."""
        return self._library.emulator_parameter_bytes()

    def launch(self, record, grid, threads, shared_memory, buffers, schedule=0, seed=0, check_races=True, cluster=1):
        """Runs all blocks, one after another; those of a `cluster` side by side.

        schedule 0: copies, boxes and products happen when issued; threads and blocks run in order.
        schedule 1: they happen when waited for, and their destinations hold NaNs until then; threads run in random
            order, and so do blocks. Sources are read when the copies happen.
        schedule 2: the same, but copies waited for together come in random order, boxes one by one in random order when
            no thread can run, and a warp runs as far as it can before another does.
        schedule 3: as 1, but the warp of number `seed` runs only where nothing else can.
        check_races: whether accesses must be in order. Without it a copy that nobody waited for shows as NaNs.
        """
        record = record if isinstance(record, bytes) else record.tobytes()
        if len(record) != self.parameter_bytes:
            raise ValueError(f"the kernel's parameters have {self.parameter_bytes} bytes; the record has {len(record)}")
        if threads % 32 or not 0 < threads <= 1024:
            raise ValueError(f"threads must be a multiple of 32 up to 1024; found {threads}")
        if shared_memory % 16 or not 0 <= shared_memory <= MAX_SHARED_MEMORY:
            raise ValueError(f"shared_memory must be a multiple of 16 up to {MAX_SHARED_MEMORY}; found {shared_memory}")
        if len(grid) != 3 or min(grid) < 1:
            raise ValueError(f"grid must be three numbers of at least 1; found {grid}")
        if schedule not in (*SCHEDULES, ONE_IS_LATE):
            raise ValueError(f"schedule must be one of {(*SCHEDULES, ONE_IS_LATE)}; found {schedule}")
        if not 1 <= cluster <= 8 or grid[0] % cluster or cluster * threads > 1024 or (cluster > 1 and threads % 128):
            raise ValueError(f"no clusters of {cluster} in a grid of {grid} with {threads} threads a block")
        table = _buffer_table(buffers)
        message = ctypes.create_string_buffer(4096)
        request = _Request(
            ctypes.cast(ctypes.c_char_p(record), ctypes.c_void_p),
            (ctypes.c_int32 * 3)(*grid),
            threads,
            cluster,
            shared_memory,
            table.ctypes.data,
            len(table),
            schedule,
            check_races,
            seed,
            ctypes.cast(message, ctypes.c_void_p),
            len(message),
        )
        with self._lock:
            failed = self._library.emulator_launch(ctypes.byref(request))
        if failed:
            raise EmulatorError(message.value.decode())


class _Request(ctypes.Structure):
    """`LaunchRequest` of launch.h."""

    _fields_ = (
        ("parameters", ctypes.c_void_p),
        ("grid", ctypes.c_int32 * 3),
        ("num_threads", ctypes.c_int32),
        ("cluster", ctypes.c_int32),
        ("shared_bytes", ctypes.c_int64),
        ("buffers", ctypes.c_void_p),
        ("num_buffers", ctypes.c_int64),
        ("schedule", ctypes.c_int32),
        ("check_races", ctypes.c_int32),
        ("seed", ctypes.c_uint64),
        ("message", ctypes.c_void_p),
        ("message_bytes", ctypes.c_int64),
    )


def encode_map(address, itemsize, dims, strides, box, swizzle):
    """A TensorMap's 128 bytes, for the emulator's own ptx90.cuh; refuses what the driver refuses.

    `dims` and `box` are five numbers of elements, fastest first, `strides` the bytes of a step along each but the
    first; `swizzle` is the bytes of a tile's row, 32, 64 or 128, or 0 for none.
    """
    if itemsize not in (1, 2, 4, 8):
        raise ValueError(f"itemsize must be 1, 2, 4 or 8; found {itemsize}")
    if address % 16:
        raise ValueError(f"address must be a multiple of 16; found {address:#x}")
    if len(dims) != 5 or not all(1 <= dim <= 2**32 for dim in dims):
        raise ValueError(f"dims must be five numbers from 1 to 2**32; found {dims}")
    if len(strides) != 4 or not all(stride % 16 == 0 and 0 <= stride < 2**40 for stride in strides):
        raise ValueError(f"strides must be four multiples of 16 below 2**40; found {strides}")
    if len(box) != 5 or not all(1 <= size <= 256 for size in box):
        raise ValueError(f"box must be five numbers from 1 to 256; found {box}")
    if swizzle not in (0, 32, 64, 128):
        raise ValueError(f"swizzle must be 0, 32, 64 or 128; found {swizzle}")
    row = box[0] * itemsize
    if row % 16 or (swizzle and row > swizzle):
        limit = f" up to {swizzle}, the swizzle" if swizzle else ""
        raise ValueError(f"the box's first row must have a multiple of 16 bytes{limit}; found {row}")
    if prod(box) * itemsize > MAX_SHARED_MEMORY:
        raise ValueError(f"a box must fit into {MAX_SHARED_MEMORY} bytes; found {box} of {itemsize} bytes")
    words = np.zeros(16, np.uint64)
    words[0] = address
    words[1] = _MAP_MARK << 32 | swizzle << 8 | itemsize
    words[2:7] = dims
    words[7:11] = strides
    words[11] = sum((size - 1) << 8 * axis for axis, size in enumerate(box))
    return words.tobytes()


def _buffer_table(buffers):
    """Address, bytes and writable of each array; rows of uint64."""
    rows = []
    for index, (array, writable) in enumerate(buffers):
        if writable and not array.flags.writeable:
            raise ValueError(f"buffer {index} is to be written, and a read-only array")
        low, high = np.lib.array_utils.byte_bounds(array) if array.size else (array.ctypes.data,) * 2
        for other, (address, size, either) in enumerate(rows):
            if (writable or either) and low < address + size and address < high:
                raise ValueError(f"buffers {other} and {index} overlap, and one is to be written: give their base once")
        rows.append((low, high - low, writable))
    return np.array(rows, np.uint64).reshape(-1, 3)


def _texts(source, overrides):
    """Every file that `source` includes, itself among them, by name."""
    return _included([source, "launch.h"], overrides, {"prelude.h": (HERE / "prelude.h").read_text()})


def _included(names, overrides, texts):
    """`texts`, and besides them these files and what they include."""
    while names:
        name = names.pop()
        if name in texts:
            continue
        if name in overrides:
            texts[name] = overrides[name]
        else:
            here = HERE / name
            texts[name] = (here if here.exists() else CUDA / name).read_text()
        names += re.findall(r'^\s*#\s*include\s+"([^"]+)"', texts[name], re.MULTILINE)
    return texts


def _compile(texts, flags, library):
    """Writes `library`, whole or not at all."""
    runtime = _runtime(texts, flags, library.parent)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        _write({name: text for name, text in texts.items() if not (runtime / name).exists()}, folder)
        places = ("-I.", f"-I{runtime}", "-include", "whole.h")
        _run(folder, "g++", *flags, "-shared", *places, "main.cpp", str(runtime / "runtime.o"), "-o", "kernel.so")
        os.replace(Path(folder) / "kernel.so", library)


def _runtime(texts, flags, folder):
    """A folder with what all kernels have in common: its headers, precompiled, and what they declare, compiled."""
    own = _included(["launch.h"], texts, {"prelude.h": texts["prelude.h"]})
    path = folder / f"runtime-{_key(own, flags)}"
    _once(path, lambda: _compile_runtime(own, flags, path))
    return path


def _compile_runtime(texts, flags, path):
    whole = '#include "prelude.h"\n#include "launch.h"\n'
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        _write({**texts, "whole.h": whole, "runtime.cpp": "#define EMULATOR_RUNTIME\n" + whole}, folder)
        _run(folder, "g++", *flags, "-O2", "-c", "runtime.cpp", "-o", "runtime.o")
        _run(folder, "g++", *flags, "-x", "c++-header", "whole.h", "-o", "whole.h.gch")
        os.rename(folder, path)
        os.mkdir(folder)  # which its context takes away


def _write(texts, folder):
    for name, text in texts.items():
        path = Path(folder) / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def _run(folder, *command):
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(done.stderr)


@functools.cache
def _compiler_version():
    return subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout
