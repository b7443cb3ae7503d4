"""What a bug report says."""

import sys

import pytest

import cupyattn
from cupyattn.command import main
from cupyattn.cuda import info
from cupyattn.cuda.making import cache, compiler

pytestmark = pytest.mark.usefixtures("folder")


def rows():
    """{first word: the rest} of the report."""
    return {line[:10].strip(): line[10:] for line in info.report().splitlines()}


def test_the_command_prints_the_report(capsys):
    assert main(["info"]) == 0
    assert capsys.readouterr().out == f"{info.report()}\n"


def test_versions_and_folders_are_in_it(folder):
    assert rows()["cupyattn"] == cupyattn.__version__
    assert rows()["prebuilt"] == f"0 cubins, 0.0 MB in {cache.PREBUILT}"
    assert rows()["cache"] == f"0 cubins, 0.0 MB in {folder}"


def test_the_compiler_is_in_it(nvrtc):
    assert rows()["NVRTC"].startswith(f"{nvrtc}, knows sm_")


def test_a_missing_cupy_is_no_failure(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    assert info.devices() == []
    assert rows()["CuPy"].startswith("none")
    assert rows()["NVRTC"] == f"none: CuPy, through which kernels are compiled, cannot be imported: {compiler.INSTALL}"


def test_each_gpu_is_in_it_with_what_is_compiled_for_it(monkeypatch):
    monkeypatch.setattr(info, "devices", lambda: [("H100", (9, 0)), ("T4", (7, 5))])
    assert rows()["GPU 0"] == "H100, sm_90a"
    assert rows()["GPU 1"].startswith("T4, the kernels need compute capability 8.0")


def test_a_cache_that_is_not_used_is_in_it_with_the_reason(folder):
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    if cache.is_ours(folder):
        pytest.skip("needs POSIX permissions")
    assert rows()["cache"].startswith(f"not used: {folder}")


def test_a_user_without_a_home_is_told_what_can_be_done(monkeypatch):
    monkeypatch.setattr(cache, "user_folder", lambda: None)
    assert "CUPYATTN_CACHE_DIR" in rows()["cache"]
