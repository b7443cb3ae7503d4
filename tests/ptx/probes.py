"""Small kernels in C++ against `runtime/instructions.h`, so that the runtime is tested without PTX or a translator.

    probes = Probes()
    twice = probes.body("array(0)[thread.number] *= 2;")
    probes.run(twice, numbers, threads=64)

All bodies of one `Probes` are compiled into one library. They see `thread`, `argument(i)` (the integer, or the address
of the array that was given there), `array<T>(i)` (the same as a pointer, unchecked), `tensor_map(i)`, and `load` and
`store` of words at an offset into shared memory.
"""

import ctypes
import functools
import shutil

import numpy as np
import pytest

from ptx import library

MOST_ARGUMENTS = 16
MAP_BYTES = 128
PRELUDE = """
#include "thread.h"
static const u32 kConstant[2] = {5, 7};
static u64 argument(u32 index) { return read<u64>(launch.parameters + 8 * index); }
template <typename T = u32> static T* array(u32 index) { return (T*)argument(index); }
static u64 tensor_map(u32 index) { return (u64)launch.parameters + 128 * (index + 1); }
static u32 load(Thread& thread, u32 offset) { return read<u32>(shared_memory(thread, kSharedBase + offset, 4, false)); }
static void store(Thread& thread, u32 offset, u32 value) {
    write(shared_memory(thread, kSharedBase + offset, 4, true), value);
}
"""


class ProbeError(Exception):
    """What the runtime reported."""


class Probes:
    """Bodies of kernels, by number, and the library that they become when one of them is run first."""

    def __init__(self):
        self._bodies = []

    def body(self, text):
        self._bodies.append(text)
        return len(self._bodies) - 1

    def run(self, body, *arguments, maps=(), grid=(1, 1, 1), threads=32, cluster=1, shared_memory=4096, **options):
        """Runs it; arrays among the arguments are buffers, writable if NumPy says so."""
        buffers = [argument for argument in arguments if isinstance(argument, np.ndarray)]
        rows = [(buffer.ctypes.data, buffer.nbytes, buffer.flags.writeable) for buffer in buffers]
        self.launch(_record(body, arguments, maps), rows, grid, threads, cluster, shared_memory, **options)

    def launch(self, record, rows, grid, threads, cluster, shared_memory, schedule=0, seed=0, check_races=True):
        visits = np.zeros(1, np.uint64)
        message = library.launch(
            self._library, record, rows, visits, grid, threads, cluster, shared_memory, schedule, seed, check_races
        )
        if message is not None:
            raise ProbeError(message)

    @functools.cached_property
    def _library(self):
        if shutil.which("g++") is None:
            pytest.skip("needs g++")
        functions = [
            f'static void body_{index}(Thread& thread) {{\n#line 1 "body {index}"\n{text}\n}}\n'
            for index, text in enumerate(self._bodies)
        ]
        names = ", ".join(f"body_{index}" for index in range(len(functions)))
        text = PRELUDE + "".join(functions)
        text += f"static void (*const bodies[])(Thread&) = {{{names}}};\n"
        text += "void kernel(Thread& thread) { ++visits[0]; bodies[read<u64>(launch.parameters + 120)](thread); }\n"
        text += "const int kNumBlocks = 1;\n"
        text += "static const Region region = {(u64)kConstant, (u64)(kConstant + 2)};\n"
        text += "const Region* constants(int* count) { *count = 1; return &region; }\n"
        return ctypes.CDLL(str(library.made(text, "-O2")))


def _record(body, arguments, maps):
    words = [argument.ctypes.data if isinstance(argument, np.ndarray) else argument for argument in arguments]
    assert len(words) < MOST_ARGUMENTS
    words += [0] * (MOST_ARGUMENTS - 1 - len(words)) + [body]
    return np.array(words, np.uint64).tobytes() + b"".join(maps)
