"""The record Python packs is the struct C++ reads, field for field."""

import re
import struct
from typing import get_type_hints

import emulator
import numpy as np
import pytest

from cupyattn.cuda.launching import launch, params
from cupyattn.cuda.making import catalogue

TAIL = {name: getattr(kind, "_fields", None) for name, kind in get_type_hints(params.Tail).items()}
"""Each field behind the pointers, and its own fields if it is a struct."""
FIELDS = [f"at.{name}" for name in params.POINTERS]
"""All C++ names, in the order in which Python packs them."""
for name, parts in TAIL.items():
    FIELDS += [f"{name}.{part}" for part in parts] if parts else [name]


DESCALES = ("q_descale", "k_descale", "v_descale")
DESCALED = [*DESCALES, *(f"{name}_{axis}" for name in DESCALES for axis in ("batch", "head"))]
"""Those of ``DescaledParams``, behind the others."""


def numbered():
    """A record whose fields are 1, 2, 3 and so on."""
    numbers = iter(range(1, len(FIELDS) + 1))
    pointers = {name: next(numbers) for name in params.POINTERS}
    tail = {name: tuple(next(numbers) for _ in parts) if parts else next(numbers) for name, parts in TAIL.items()}
    return params.record(pointers, params.Tail(**tail).pack())


@pytest.fixture(scope="module")
def probe():
    return probe_of("Params", FIELDS)


def probe_of(kind, fields):
    """A kernel that writes every field, read by its name, as a float64."""
    emulator.require_compiler()
    writes = "\n".join(f"write({index}, (double)(uint64)given.params.{name});" for index, name in enumerate(fields))
    source = f"""
        #include "algorithm/params.cuh"
        #include "instructions/ptx.cuh"
        namespace cupyattn {{
        struct Given {{ {kind} params; double* out; }};
        void probe(Given given) {{
            if (ptx::thread()) return;
            const auto write = [&](int index, double value) {{ ptx::store_global(given.out + index, value); }};
            {writes}
        }}
        }}
    """
    return emulator.build("probe.cu", "cupyattn::probe", sources={"probe.cu": source})


def test_every_field_is_where_the_kernel_reads_it(probe):
    out = np.zeros(len(FIELDS))
    record = numbered().tobytes() + struct.pack("<Q", out.ctypes.data)
    probe.launch(record, (1, 1, 1), 32, 0, [(out, True)])
    np.testing.assert_array_equal(out, np.arange(1, len(FIELDS) + 1))


def test_descales_are_where_the_kernel_reads_them():
    fields = [*FIELDS, *DESCALED]
    out = np.zeros(len(fields))
    pointers = [len(FIELDS) + i for i in (1, 2, 3)]
    behind = launch._DESCALES.pack(*pointers) + launch._DESCALED.pack(*range(len(FIELDS) + 4, len(fields) + 1))
    record = numbered().tobytes() + behind + struct.pack("<Q", out.ctypes.data)
    probe_of("DescaledParams", fields).launch(record, (1, 1, 1), 32, 0, [(out, True)])
    np.testing.assert_array_equal(out, np.arange(1, len(fields) + 1))


OF_MERGES = [
    *("block_q", "rows_per_piece", "heads_per_unit", "pieces_per_unit", "columns", "mends", "of_columns"),
    *("block_k", "fewest_keys"),
]
"""Those of ``MergeParams``, behind those of ``DescaledParams``."""


def test_what_merges_are_told_is_where_the_kernel_reads_it():
    fields = [*FIELDS, *DESCALED, *OF_MERGES]
    out = np.zeros(len(fields))
    pointers = [len(FIELDS) + i for i in (1, 2, 3)]
    numbers = range(len(FIELDS) + 4, len(fields) + 1)
    behind = launch._DESCALES.pack(*pointers) + launch._DESCALED.pack(*numbers[:6]) + launch._MERGE.pack(*numbers[6:])
    record = numbered().tobytes() + behind + struct.pack("<Q", out.ctypes.data)
    probe_of("MergeParams", fields).launch(record, (1, 1, 1), 32, 0, [(out, True)])
    np.testing.assert_array_equal(out, np.arange(1, len(fields) + 1))


def test_both_have_the_same_size(probe):
    assert probe.parameter_bytes - 8 == params.SIZE


GRADIENTS = [f"grad.{name}" for name in params.GRADIENT_POINTERS]
"""C++ names of ``Gradients``, in the order in which Python packs them."""
GRADIENT_TAIL = {name: getattr(kind, "_fields", None) for name, kind in get_type_hints(params.GradientTail).items()}
for name, parts in GRADIENT_TAIL.items():
    GRADIENTS += [f"grad.{name}.{part}" for part in parts] if parts else [f"grad.{name}"]


@pytest.fixture(scope="module")
def probe_of_gradients():
    return probe_of("BackwardParams", [*FIELDS, *GRADIENTS])


def numbered_gradients():
    numbers = iter(range(len(FIELDS) + 1, len(FIELDS) + len(GRADIENTS) + 1))
    pointers = {name: next(numbers) for name in params.GRADIENT_POINTERS}
    tail = {n: tuple(next(numbers) for _ in parts) if parts else next(numbers) for n, parts in GRADIENT_TAIL.items()}
    return params.GradientTail(**tail).pack(pointers)


def test_every_field_of_gradients_is_where_the_kernels_read_it(probe_of_gradients):
    out = np.zeros(len(FIELDS) + len(GRADIENTS))
    record = numbered().tobytes() + numbered_gradients() + struct.pack("<Q", out.ctypes.data)
    probe_of_gradients.launch(record, (1, 1, 1), 32, 0, [(out, True)])
    np.testing.assert_array_equal(out, np.arange(1, len(out) + 1))


def test_the_record_of_gradients_has_the_size_of_the_struct(probe_of_gradients):
    assert probe_of_gradients.parameter_bytes - 8 == params.SIZE + len(numbered_gradients())


def test_an_open_side_of_a_band_is_what_the_kernel_takes_for_it():
    text = (emulator.CUDA / "algorithm/params.cuh").read_text()
    assert eval(re.search(r"kOpen = (.+?);", text)[1]) == params.OPEN


def test_bits_of_edits_are_those_of_the_kernel():
    text = (emulator.CUDA / "algorithm/params.cuh").read_text()
    bits = {name: int(value) for name, value in re.findall(r"k(\w+) = (\d+),", text)}
    names = {name: re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).upper() for name in bits}
    assert bits == {name: getattr(catalogue, names[name]) for name in bits}
    assert len(bits) == 8
