"""What the tests of the compile side share: a throw-away kernel, folders of their own, and NVRTC if it is there."""

import zlib
from collections import defaultdict
from pathlib import Path

import pytest
from driven import copies_pay, driver, torch  # noqa: F401

from cupyattn.cuda.making import cache, compiler

FACTOR = """\
#pragma once
namespace test {
constexpr float kFactor = 2.0f;
}
"""
SCALE = """\
#include "factor.cuh"
namespace test {
template <int kPower>
__global__ void scale(float* x) {
    for (int i = 0; i < kPower; ++i) x[threadIdx.x] *= kFactor;
}
}
"""

EMULATED = {
    *("test_flash.py", "test_splitkv.py", "test_hopper.py", "test_append.py", "test_merge.py"),
    *("test_backward.py", "test_hopper_backward.py"),
}
"""Whose cases are more than there are minutes for."""
EVERY = 8
"""`make test` runs one of so many cases of each emulated test, and one of each; `make proof` runs all."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    tests = defaultdict(list)
    for item in items:
        if item.path.parent == Path(__file__).parent and item.path.name in EMULATED:
            tests[item.path, item.originalname].append(item)
    for (path, name), cases in tests.items():
        first = zlib.crc32(f"{path.name}::{name}".encode()) % min(EVERY, len(cases))
        for place, case in enumerate(cases):
            if place % EVERY != first:
                case.add_marker(pytest.mark.long)


@pytest.fixture
def nvrtc():
    """NVRTC's version; 12.9 or newer, which knows every architecture and gives the same bytes every time."""
    version = compiler.version()
    if version is None or tuple(map(int, version.split("."))) < (12, 9):
        pytest.skip("needs CuPy and NVRTC 12.9 or newer (nvidia-cuda-nvrtc)")
    return version


@pytest.fixture
def sources(tmp_path):
    """A folder of CUDA files: scale.cu, which includes factor.cuh."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "factor.cuh").write_text(FACTOR)
    (folder / "scale.cu").write_text(SCALE)
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The user's cache, empty; nothing is prebuilt, and nothing kept for this process."""
    monkeypatch.setenv("CUPYATTN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "PREBUILT", tmp_path / "prebuilt")
    monkeypatch.setattr(cache, "_in_memory", {})
    return cache.user_folder()


@pytest.fixture
def compiled(monkeypatch):
    """The expressions that were compiled, one by one."""
    expressions = []
    real = compiler.compile_cubin

    def compile_cubin(text, expression, target):
        expressions.append(expression)
        return real(text, expression, target)

    monkeypatch.setattr(compiler, "compile_cubin", compile_cubin)
    return expressions
