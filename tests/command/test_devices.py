"""What the doctor finds of GPUs, the compiler and the cache, on machines that it is told of."""

import os
from types import SimpleNamespace

import pytest

from cupyattn.command import devices
from cupyattn.cuda import info
from cupyattn.cuda.making import cache, compiler

H100 = [("H100", (9, 0))]
posix = pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")


@pytest.fixture
def installed(monkeypatch):
    """What of CuPy is installed; a list to be changed."""
    names = ["cupy-cuda13x"]
    monkeypatch.setattr(devices, "_distributions_of_cupy", lambda: names)
    monkeypatch.setattr(devices, "version_of", lambda name: "14.2.0")
    return names


@pytest.mark.parametrize(
    ("names", "driver", "seen", "reason", "broken", "words"),
    [
        (["cupy-cuda13x"], (13, 0), H100, "", False, "cupy-cuda13x 14.2.0"),
        (["cupy-cuda13x"], None, [], "", False, "cupy-cuda13x 14.2.0, no GPU"),
        ([], None, [], "", False, "not installed"),
        ([], (12, 4), [], "", False, "for kernels on the GPU: pip install cupyattn[cuda12]"),
        (["cupy-cuda12x", "cupy-cuda13x"], (13, 0), H100, "", True, "pip uninstall cupy-cuda12x cupy-cuda13x"),
        (["cupy-cuda13x"], (12, 4), [], "insufficient driver", True, "insufficient driver"),
        (["cupy-cuda13x"], (13, 0), [], "", True, "sees no GPU"),
        ([], (14, 1), [], "", False, "pip install cupyattn[cuda13]"),
    ],
)
def test_cupy_and_the_driver_have_to_go_together(installed, names, driver, seen, reason, broken, words):
    installed[:] = names
    finding = devices.cupy(driver, seen, reason)
    assert finding.broken is broken
    assert words in f"{finding.found} {finding.advice}"


def test_a_gpu_is_found_with_what_is_compiled_for_it():
    assert devices.gpu(0, "H100", (9, 0)) == devices.Finding("GPU 0", "H100, sm_90a")


def test_a_gpu_that_is_too_old_gets_advice_and_is_not_broken():
    finding = devices.gpu(1, "T4", (7, 5))
    assert "8.0 or newer (Ampere)" in finding.advice
    assert not finding.broken


@pytest.mark.parametrize(("driver", "broken"), [(None, False), ((12, 9), True), ((13, 0), False), ((14, 0), False)])
def test_a_compiler_that_is_newer_than_the_driver_is_broken(monkeypatch, driver, broken):
    monkeypatch.setattr(compiler, "load", lambda: (None, "13.5"))
    finding = devices.nvrtc(driver)
    assert finding.broken is broken
    assert ("or a newer driver" in finding.advice) is broken


@pytest.mark.parametrize(
    ("driver", "names", "broken"), [(None, ["cupy-cuda13x"], False), ((13, 0), [], False), ((13, 0), ["cupy"], True)]
)
def test_a_missing_compiler_is_broken_where_there_is_a_gpu_and_cupy(monkeypatch, installed, driver, names, broken):
    def load():
        raise RuntimeError("NVRTC cannot be loaded: pip install it")

    installed[:] = names
    monkeypatch.setattr(compiler, "load", load)
    assert devices.nvrtc(driver).broken is broken


@pytest.mark.parametrize(("answer", "number", "expected"), [(0, 13020, (13, 2)), (0, 0, None), (3, 13020, None)])
def test_the_driver_is_asked_for_its_version(monkeypatch, answer, number, expected):
    def ask(version):
        version._obj.value = number
        return answer

    monkeypatch.setattr(devices.ctypes, "CDLL", lambda name: SimpleNamespace(cuDriverGetVersion=ask))
    assert devices.driver_version() == expected


def test_without_a_drivers_library_there_is_no_driver(monkeypatch):
    def nowhere(name):
        raise OSError(name)

    monkeypatch.setattr(devices.ctypes, "CDLL", nowhere)
    assert devices.driver_version() is None


def test_what_goes_wrong_while_gpus_are_looked_for_is_a_reason(monkeypatch):
    def fail():
        raise RuntimeError("cudaErrorUnknown\nand more")

    monkeypatch.setattr(info, "devices", fail)
    assert devices.seen_devices() == ([], "cudaErrorUnknown")


# ---- The cache --------------------------------------------------------------------------------------


def cache_found():
    return list(devices.kept())[1]


def test_a_cache_in_order_is_counted(filled):
    assert cache_found() == devices.Finding("cache", f"2 cubins, 1.5 kB in {filled}, mode 700")


def test_a_cache_that_is_not_there_will_be_made(folder):
    folder.parents[1].chmod(0o700)
    assert cache_found() == devices.Finding("cache", f"{folder}, made when it is needed")


@posix
def test_a_cache_that_others_may_write_to_is_broken(filled):
    filled.chmod(0o777)
    assert cache_found().broken
    assert f"chmod go-w {filled}" in cache_found().advice


@posix
def test_a_cache_that_would_lie_where_others_may_write_is_broken(folder):
    folder.parent.mkdir(mode=0o700)
    folder.parent.chmod(0o777)
    assert cache_found().found == f"{folder}, which will not be made"
    assert cache_found().broken


def test_a_file_in_the_place_of_a_folder_is_broken(folder):
    folder.parent.touch()
    assert cache_found().found == f"{folder}, which cannot be made"
    assert cache_found().broken


def test_a_user_without_a_home_gets_advice(folder, monkeypatch):
    monkeypatch.setattr(cache, "user_folder", lambda: None)
    assert "CUPYATTN_CACHE_DIR" in cache_found().advice
    assert not cache_found().broken


def test_a_disk_that_is_nearly_full_gets_advice(filled, monkeypatch):
    monkeypatch.setattr(devices.shutil, "disk_usage", lambda path: SimpleNamespace(free=5e6))
    assert cache_found().advice == "only 5.0 MB are free on its disk"


# ---- What would run where ---------------------------------------------------------------------------


def test_without_a_gpu_there_is_one_line_about_the_cpu(monkeypatch):
    monkeypatch.setattr(devices, "seen_devices", lambda: ([], ""))
    (finding,) = devices.runs()
    assert finding.what == "on the CPU"
    assert finding.found.startswith("NumPy, on up to ")


def test_a_gpu_that_does_not_answer_is_broken(monkeypatch):
    pytest.importorskip("cupy")
    monkeypatch.setattr(devices, "seen_devices", lambda: (H100, ""))
    *_, finding = devices.runs()  # where there is none, CuPy says so
    if not finding.broken:
        pytest.skip("there is a GPU")
    assert finding.what == "on GPU 0"
    assert finding.found.startswith("H100: ")
