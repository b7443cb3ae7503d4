"""What NVRTC makes of the kernels of `cupyattn/cuda`, executed: PTX on the CPU.

    kernel = build("flash.cu", "cupyattn::flash_forward<cupyattn::FlashTraits<...>>", target="sm_80")
    kernel.launch(record, grid=(3, 2, 1), threads=128, shared_memory=49152,
                  buffers=[(q, False), (k, False), (v, False), (out, True)], schedule=1, seed=5)
    kernel.visited_forms     # Counter: which instructions were executed, how often

`compiled` asks NVRTC, `translation` turns its PTX into C++ that calls `runtime/`, g++ compiles that, and each CUDA
thread is a fiber. The interface is that of `tests/emulator`, which compiles the source with g++ and shares nothing with
this but what a fiber is: an error of both would prove nothing. ``install()`` lets `tests/emulated.py` run with this.
"""

import ctypes
import functools
import hashlib
import re
import shutil
import struct
import threading
from collections import Counter
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from cupyattn.cuda.making import compiler
from ptx import library
from ptx.compiled import joined, ptx_of
from ptx.library import BuildError
from ptx.text import Unknown
from ptx.translation import translate

__all__ = ["BuildError", "ExecutorError", "Kernel", "Unknown", "assemble", "build", "encode_map", "install"]

SCHEDULES = (0, 1, 2)
MAX_SHARED_MEMORY = 232448
MAP_MARK = 0x70616D2D78747000
"""By which the runtime knows a tensor map: "map-ptx", backwards."""

kernels: dict[str, "Kernel"] = {}
"""All that were built in this process, by their key, so that what was visited of them adds up."""


class ExecutorError(Exception):
    """What a kernel did that it must not do."""


def require_compiler():
    """Skips the calling test where there is no g++ or no NVRTC."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    if compiler.version() is None:
        pytest.skip("needs NVRTC")


def build(source, expression, folder=None, sources=None, flags=(), target=None, edit=None, nvrtc=None):
    """A kernel of the file `source`, named by a C++ `expression`, ready to launch.

    `sources` maps paths to texts that take the place of, or come beside, those in `cupyattn/cuda`. Libraries are kept
    in `folder`, by default one for all runs of this user. `flags` are the emulator's, for g++, and mean nothing here.
    `target` is an architecture, by default the oldest that has all instructions; `edit` a function of the PTX text, to
    plant a bug; `nvrtc` the path of another NVRTC than CuPy's.
    """
    folder = Path(folder or library.folder_of_user())
    text = joined(source, sources)
    target = target or ("sm_90a" if '#line 1 "instructions/ptx90.cuh"' in text else "sm_80")
    name, ptx = ptx_of(text, expression, target, nvrtc, folder)
    if edit is not None:
        edited = edit(ptx)
        if edited == ptx:
            raise ValueError(f"the edit of {expression} changes nothing")
        ptx = edited
    kernel = assemble(ptx, folder, expression)
    if kernel.module.entry.name != name:
        raise ValueError(f"{expression} is {name}, and the text has {kernel.module.entry.name}")
    return kernel


def assemble(ptx, folder=None, expression=None):
    """A kernel of PTX text; `expression` is what it is called in reports."""
    name = hashlib.sha256(ptx.encode()).hexdigest()
    if name not in kernels:
        translated = translate(ptx)
        # A kernel has thousands of registers, and is best compiled without optimisation.
        kernels[name] = Kernel(library.made(translated.source, "-O0", folder), translated, expression)
    return kernels[name]


class Launch(NamedTuple):
    """One that was done."""

    grid: tuple[int, int, int]
    threads: int
    cluster: int
    schedule: int
    seed: int
    instructions: int
    """Executed by all threads together; with a guard, those whose guard held."""
    error: str | None


class Kernel:
    """A compiled kernel. It holds one machine, so that launches from several threads wait for each other."""

    def __init__(self, path, translated, expression=None):
        self.path, self.expression = path, expression
        self.module, _, self.blocks = translated
        self._library = ctypes.CDLL(str(path))
        self._lock = threading.Lock()
        if self._library.executor_num_blocks() != len(self.blocks):
            raise BuildError(f"{path} is of another text")
        entry = self.module.entry
        self.parameter_bytes = 0
        """Of the kernel's parameters, which lie behind each other."""
        for parameter in entry.parameters:
            self.parameter_bytes = _round_up(self.parameter_bytes, parameter.alignment) + parameter.bytes
        self.most_threads = prod(map(int, entry.directives.get("maxntid", "1024").split(",")))
        self.cluster = int(entry.directives.get("reqnctapercluster", "1").split(",")[0])
        self.visits = np.zeros(len(self.blocks), np.uint64)
        """Of each block, by all threads of all launches."""
        self.launches: list[Launch] = []

    @property
    def forms(self):
        """Opcodes with all their modifiers, and how many instructions the text has of each."""
        return sum((block.forms for block in self.blocks), Counter())

    @property
    def visited_forms(self):
        """The same of those that were executed, and how often."""
        found = Counter()
        for block, visits in zip(self.blocks, self.visits, strict=True):
            for form, number in block.forms.items():
                found[form] += number * int(visits)
        return +found

    @property
    def unvisited(self):
        """Blocks with instructions where no thread came by, and where they are from in the source."""
        pairs = zip(self.blocks, self.visits, strict=True)
        return [(block, self.module.places(block.line)) for block, visits in pairs if not visits and block.forms]

    def launch(self, record, grid, threads, shared_memory, buffers, schedule=0, seed=0, check_races=True, cluster=1):
        """Runs all blocks, one after another; those of a `cluster` side by side.

        schedule 0: copies, boxes and products happen when issued; threads and blocks run in order.
        schedule 1: they happen when waited for, and their destinations are poison until then; threads run in random
            order and change at accesses to memory, one warp waits while others go on, and blocks come in random order.
        schedule 2: the same, but boxes and products happen at random times.
        check_races: whether accesses to shared memory must be in order.
        """
        record = record if isinstance(record, bytes) else record.tobytes()
        self._check(record, grid, threads, shared_memory, schedule, cluster)
        rows = _rows_of(buffers)
        visits = np.zeros(len(self.blocks), np.uint64)
        with self._lock:
            message = library.launch(
                self._library, record, rows, visits, grid, threads, cluster, shared_memory, schedule, seed, check_races
            )
            self.visits += visits
        error = self._explained(message) if message is not None else None
        executed = sum(int(n) * block.forms.total() for n, block in zip(visits, self.blocks, strict=True))
        self.launches.append(Launch(tuple(grid), threads, cluster, schedule, seed, executed, error))
        if error:
            raise ExecutorError(error)

    def _check(self, record, grid, threads, shared_memory, schedule, cluster):
        if len(record) != self.parameter_bytes:
            raise ValueError(f"the kernel's parameters have {self.parameter_bytes} bytes; the record has {len(record)}")
        if threads % 32 or not 0 < threads <= self.most_threads:
            raise ValueError(f"threads must be a multiple of 32 up to {self.most_threads}; found {threads}")
        if shared_memory % 16 or not 0 <= shared_memory <= MAX_SHARED_MEMORY:
            raise ValueError(f"shared_memory must be a multiple of 16 up to {MAX_SHARED_MEMORY}; found {shared_memory}")
        if len(grid) != 3 or min(grid) < 1 or grid[0] % cluster:
            raise ValueError(f"grid must be three numbers of at least 1, whole clusters of {cluster}; found {grid}")
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {SCHEDULES}; found {schedule}")
        if cluster != self.cluster:
            raise ValueError(f"the kernel was compiled for clusters of {self.cluster}; found {cluster}")

    def _explained(self, message):
        """With the instruction, and where in the source it is from."""
        found = re.search(r"\bline (\d+)", message)
        if not found:
            return message
        line = int(found[1])
        places = self.module.places(line)
        text = f"{message}\n  {self.module.instructions.get(line, '')}"
        return text + (f"\n  of {', in '.join(places)}" if places else "")


def encode_map(address, itemsize, dims, strides, box, swizzle):
    """A tensor map's 128 bytes, for the runtime; refuses what the driver's cuTensorMapEncodeTiled refuses.

    `dims` and `box` are five numbers of elements, fastest first, `strides` the bytes of a step along each but the
    first; `swizzle` is the bytes of a tile's row, 32, 64 or 128, or 0 for none.
    """
    if itemsize not in (1, 2, 4, 8) or swizzle not in (0, 32, 64, 128) or address % 16:
        raise ValueError(f"no map of items of {itemsize} bytes at {address:#x} with a swizzle of {swizzle}")
    if len(dims) != 5 or not all(1 <= size < 2**32 for size in dims):
        raise ValueError(f"dims must be five numbers from 1 to 2**32 - 1; found {dims}")
    if len(strides) != 4 or not all(stride % 16 == 0 and 0 <= stride < 2**40 for stride in strides):
        raise ValueError(f"strides must be four multiples of 16 below 2**40; found {strides}")
    if len(box) != 5 or not all(1 <= size <= 256 for size in box) or prod(box) * itemsize > MAX_SHARED_MEMORY:
        raise ValueError(f"box must be five numbers from 1 to 256 that fit into shared memory; found {box}")
    if box[0] * itemsize % 16 or (swizzle and box[0] * itemsize > swizzle):
        raise ValueError(f"a box's row must be a multiple of 16 bytes within the swizzle; found {box[0] * itemsize}")
    sizes = (*dims, *strides, *box)
    return struct.pack("<QQII5I4x4Q5H", MAP_MARK, address, itemsize, swizzle, *sizes).ljust(128, b"\0")


def install(**defaults):
    """Puts the executor in the emulator's place for `tests/emulated.py`; `defaults` are given to each `build`."""
    import emulator

    emulator.build = functools.partial(build, **defaults) if defaults else build
    emulator.encode_map, emulator.require_compiler = encode_map, require_compiler
    emulator.EmulatorError, emulator.BuildError = ExecutorError, BuildError


def _round_up(number, multiple):
    return -(-number // multiple) * multiple


def _rows_of(buffers):
    """Address, bytes and writable of each array."""
    rows = []
    for index, (array, writable) in enumerate(buffers):
        if writable and not array.flags.writeable:
            raise ValueError(f"buffer {index} is to be written, and a read-only array")
        low, high = np.lib.array_utils.byte_bounds(array) if array.size else (array.ctypes.data,) * 2
        for other, (start, size, either) in enumerate(rows):
            if (writable or either) and low < start + size and start < high:
                raise ValueError(f"buffers {other} and {index} overlap, and one is to be written: give their base once")
        rows.append((low, high - low, writable))
    return rows
