"""Device functions alone, as NVRTC compiles them: a launch with a thread for each of many tuples of arguments.

    PROBE = '''#include "algorithm/mask.cuh"
    template <int> __global__ void probe(int count, const int* given, int* found) { ... found[i] = f(given[i]) ... }'''
    run(built(PROBE, "probe<0>", "sm_80"), [given], found)

g++, and so the emulator, computes a guarded difference where the guard lets it; NVVM may compute it anywhere. Plain
Python, whose numbers never wrap, says what is right.
"""

import struct

import numpy as np

import ptx
from cupyattn.cuda.launching import params
from cupyattn.cuda.making.source import FOLDER

TARGETS = ("sm_80", "sm_90a")
THREADS = 64
BEGIN = """
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
"""
"""Of a probe: which tuple is this thread's."""


def built(text, expression, target, sources=None):
    """A probe's kernel; `sources` as for `ptx.build`, to plant a fault."""
    ptx.require_compiler()
    return ptx.build("alone.cu", expression, sources={"alone.cu": text, **(sources or {})}, target=target)


def planted(path, old, new):
    """`sources` with a fault: the header of that path with another text in one place."""
    text = (FOLDER / path).read_text()
    assert text.count(old) == 1, f"{old!r} has to be there once, and is {text.count(old)} times"
    return {path: text.replace(old, new)}


def run(kernel, given, found, reached=(), threads=THREADS, grid=None, shared_memory=0, **options):
    """Fills `found`, with a row for each tuple, from arrays `given`; `reached` are those that they point to."""
    assert all(x.flags.c_contiguous for x in (*given, found))
    count = len(found)
    record = struct.pack(f"<i4x{len(given) + 1}Q", count, *(x.ctypes.data for x in (*given, found)))
    buffers = [*((x, False) for x in (*given, *reached)), (found, True)]
    blocks = -(-count // threads) if grid is None else grid
    kernel.launch(record, (blocks, 1, 1), threads, shared_memory, buffers, **{"check_races": False, **options})
    return found


# ---- Arguments -------------------------------------------------------------------------------------------------------

INT32 = (-(2**31), 2**31 - 1)


def numbers(rng, count, low=INT32[0], high=INT32[1]):
    """Whole numbers of a range, at random and at its ends, about zero and about the longest length."""
    marks = np.array([low, high, 0, params.OPEN, 2**30, low, high])
    near = marks[rng.integers(0, len(marks), count)] + rng.integers(-3, 4, count)
    small = np.trunc(2.0 ** rng.uniform(0.0, 31.0, count)).astype(np.int64) * rng.choice([-1, 1], count)
    found = np.choose(rng.integers(0, 4, count), [near, near, small, rng.integers(low, high + 1, count)])
    return np.clip(found, low, high)


def _params_dtype():
    wide = ("lse_batch", "lse_head", "block_table_row", "alibi_slopes_batch", "total_q", "total_k")
    kinds = {"dropout_threshold": "u4", "dropout_factor": "f4", "softmax_scale": "f4", "softcap": "f4"}
    kinds |= {"float_step": "f4", "inverse_scale": "f4"}
    kinds |= dict.fromkeys(wide, "i8") | dict.fromkeys(("q", "k", "v", "out"), (np.int64, 3))
    kinds |= dict.fromkeys(("mask", "bias"), (np.int64, 4))
    kind = np.dtype(
        [("at", [(name, "i8" if name == "cache_seqlen" else "u8") for name in params.POINTERS])]
        + [(name, kinds.get(name, "i4")) for name in params.Tail._fields]
    )
    assert kind.itemsize == params.SIZE
    return kind


PARAMS = _params_dtype()
"""`Params` of params.cuh."""


def rows_of(array):
    """The address of each row of an array."""
    return array.ctypes.data + np.arange(len(array), dtype=np.uint64) * np.uint64(array.strides[0])
