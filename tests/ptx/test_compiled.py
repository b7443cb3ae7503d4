"""What NVRTC is asked, and a kernel from CUDA to its launch: what is reported of it, and what is refused."""

import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import ptx
from cupyattn.cuda.making import compiler
from ptx.compiled import CompilerError, Library, joined, load, options_for, ptx_of
from ptx.text import read

EMPTY = """.version 9.0
.target sm_80
.address_size 64
.visible .entry probe(.param .u64 out)
.maxntid 64, 1, 1
{
ret;
}
"""
PROBE = """template <int kPlus>
__global__ void probe(int* x, unsigned long long* y) {
    if (threadIdx.x == 40) x[1000] = 0;
    if (x[threadIdx.x] == -1) y[threadIdx.x] = 7;
    x[threadIdx.x] += kPlus;
}
"""
SOURCES = {"probe.cu": PROBE}


def run_probe(threads=32, **options):
    ptx.require_compiler()
    kernel = ptx.build("probe.cu", "probe<5>", sources=SOURCES, **options)
    x, y = np.arange(threads, dtype=np.int32), np.zeros(threads, np.uint64)
    record = x.ctypes.data.to_bytes(8, "little") + y.ctypes.data.to_bytes(8, "little")
    kernel.launch(record, (1, 1, 1), threads, 0, [(x, True), (y, True)], schedule=1, seed=3)
    return x, kernel


def test_a_kernel_of_cuda_runs():
    x, kernel = run_probe()
    np.testing.assert_array_equal(x, np.arange(32) + 5)
    assert kernel.module.target == "sm_80"
    assert any("probe.cu:4" in places for _, places in kernel.unvisited)


def test_an_error_names_the_instruction_and_where_it_is_from():
    with pytest.raises(ptx.ExecutorError, match=r"(?s)PTX line \d+, block .*thread 40.*st\.global.*of probe\.cu:3"):
        run_probe(threads=64)


def test_an_edit_is_of_the_compiled_text():
    x, _ = run_probe(edit=lambda text: re.sub(r"(add\.s32\s+\S+, \S+), 5;", r"\1, 6;", text))
    np.testing.assert_array_equal(x, np.arange(32) + 6)


def test_an_edit_that_changes_nothing_is_refused():
    with pytest.raises(ValueError, match="changes nothing"):
        run_probe(edit=lambda text: text)


def test_a_target_is_asked_of_the_compiler():
    assert run_probe(target="sm_90a")[1].module.target == "sm_90a"


def test_line_info_changes_no_instruction(monkeypatch):
    ptx.require_compiler()
    text, expression = joined("append.cu"), "cupyattn::append<cupyattn::Half>"
    with_lines = read(ptx_of(text, expression, "sm_80")[1])
    monkeypatch.setattr("ptx.compiled.options_for", lambda *given: options_for(*given)[:-1])
    without = read(ptx_of(text, expression, "sm_80")[1])
    assert with_lines.locations
    assert not without.locations
    statements = [[statement[1:] for statement in module.entry.statements] for module in (with_lines, without)]
    assert statements[0] == statements[1]


def test_another_nvrtc_is_a_path():
    """Here it is CuPy's own, found on disk."""
    ptx.require_compiler()
    spec = find_spec("nvidia")
    folders = spec.submodule_search_locations if spec else ()
    found = [path for folder in folders for path in Path(folder).rglob("libnvrtc.so*")]
    if not found:
        pytest.skip("NVRTC is not a package of Python's here")
    text = joined("probe.cu", SOURCES)
    assert ptx_of(text, "probe<5>", "sm_80", str(found[0])) == ptx_of(text, "probe<5>", "sm_80")
    with pytest.raises(CompilerError, match="no_such_name"):
        ptx_of("no_such_name;", "probe<5>", "sm_80", str(found[0]))
    assert Library(found[0]).getVersion()


def test_cupys_nvrtc_is_loaded_before_another(monkeypatch):
    """It would take the other one, if that were there already."""
    order = []

    class Other:
        def __init__(self, path):
            order.append(path)

        def getVersion(self):
            return 12, 4

    monkeypatch.setattr("ptx.compiled.Library", Other)
    monkeypatch.setattr(compiler, "version", lambda: order.append("CuPy's"))
    assert load.__wrapped__("another")[1] == "12.4"
    assert order == ["CuPy's", "another"]


def test_sources_take_the_place_of_files_by_their_path():
    text = joined("append.cu", {"instructions/common.cuh": "// nothing is here\n"})
    assert "// nothing is here" in text
    assert "// nothing is here" not in joined("append.cu")


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"record": b"1234"}, "parameters have 8 bytes"),
        ({"threads": 33}, "multiple of 32 up to 64"),
        ({"threads": 96}, "multiple of 32 up to 64"),
        ({"shared_memory": 8}, "multiple of 16"),
        ({"grid": (1, 1)}, "grid must be"),
        ({"schedule": 3}, "schedule must be"),
        ({"cluster": 2, "grid": (2, 1, 1)}, "clusters of 1"),
    ],
)
def test_a_launch_that_cannot_be(changed, why):
    ptx.require_compiler()
    kernel = ptx.assemble(EMPTY)
    launch = {"record": bytes(8), "grid": (1, 1, 1), "threads": 32, "shared_memory": 0, "buffers": []}
    kernel.launch(**launch)
    with pytest.raises(ValueError, match=why):
        kernel.launch(**launch | changed)


MAP = {
    "address": 4096,
    "itemsize": 2,
    "dims": (64, 3, 2, 1, 1),
    "strides": (128, 256, 0, 0),
    "box": (64, 2, 1, 1, 1),
    "swizzle": 128,
}


@pytest.mark.parametrize(
    "changed",
    [
        {"address": 4104},
        {"itemsize": 3},
        {"dims": (0, 1, 1, 1, 1)},
        {"dims": (1, 1, 1, 1)},
        {"strides": (8, 16, 0, 0)},
        {"strides": (2**40, 16, 0, 0)},
        {"box": (257, 1, 1, 1, 1)},
        {"box": (12, 1, 1, 1, 1)},
        {"box": (128, 1, 1, 1, 1)},
        {"swizzle": 16},
    ],
)
def test_a_map_that_the_driver_would_refuse(changed):
    assert len(ptx.encode_map(**MAP)) == 128
    with pytest.raises(ValueError):
        ptx.encode_map(**MAP | changed)
