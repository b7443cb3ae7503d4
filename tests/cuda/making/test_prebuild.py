"""Compiling ahead of time, by function and by command."""

import re
import threading

import pytest

from cupyattn.command import main
from cupyattn.cuda import info
from cupyattn.cuda.making import cache, compiler, prebuild
from cupyattn.cuda.making.cache import find
from cupyattn.cuda.making.module import Specialisation
from cupyattn.cuda.making.prebuild import jobs_for
from cupyattn.cuda.making.source import join

pytestmark = pytest.mark.usefixtures("folder")
needs_nvrtc = pytest.mark.usefixtures("nvrtc")


def scale(power):
    return Specialisation("scale.cu", f"test::scale<{power}>", 128, 1024)


@pytest.fixture
def catalogue(monkeypatch, sources):
    """What there is to compile: three kernels, out of the throw-away source."""
    wanted = [scale(power) for power in (1, 2, 3)]
    monkeypatch.setattr(prebuild, "specialisations", lambda target: list(wanted))
    monkeypatch.setattr(prebuild, "of_gradients", lambda target: [scale(4)])
    monkeypatch.setattr(cache.source, "join", lambda name, folder: join(name, sources))
    return wanted


def ignore(what):
    pass


# ---- The function -----------------------------------------------------------------------------------


@needs_nvrtc
def test_every_kernel_is_then_in_the_folder_and_found_without_compiling(catalogue, sources, tmp_path, monkeypatch):
    jobs = jobs_for(["sm_80", "sm_90a"])
    summary = prebuild.prebuild(jobs, cache.PREBUILT, ignore, 2)
    assert (summary.compiled, summary.kept, summary.failures) == (6, 0, ())
    assert summary.num_bytes == sum(path.stat().st_size for path in cache.PREBUILT.glob("*.cubin")) > 0
    monkeypatch.setattr(compiler, "compile_cubin", None)
    for wanted, target in jobs:
        assert find(wanted.source, wanted.expression, target, sources=sources).path.parent == cache.PREBUILT


@needs_nvrtc
def test_what_is_there_already_is_kept(catalogue, tmp_path, compiled):
    first, second = (prebuild.prebuild(jobs_for(["sm_80"]), tmp_path / "out", ignore, 2) for _ in range(2))
    assert (first.compiled, first.kept) == (3, 0)
    assert (second.compiled, second.kept) == (0, 3)
    assert len(compiled) == 3


@needs_nvrtc
def test_one_that_fails_is_named_and_the_others_are_compiled(catalogue, tmp_path):
    catalogue.insert(1, Specialisation("scale.cu", "test::nonsense<1>", 128, 0))
    catalogue.append(Specialisation("nowhere.cu", "test::scale<1>", 128, 0))
    summary = prebuild.prebuild(jobs_for(["sm_80"]), tmp_path / "out", ignore, 2)
    assert summary.compiled == 3
    assert len(summary.failures) == 2
    assert "failed: scale.cu test::nonsense<1> for sm_80\nNVRTC" in str(summary)
    assert "no CUDA source nowhere.cu" in str(summary)
    assert re.search(r"^3 compiled, 0 there already, 2 failed; 0\.0 MB in \d+\.\d s$", str(summary), re.MULTILINE)


@needs_nvrtc
def test_each_that_is_done_is_told(catalogue, tmp_path):
    told = []
    prebuild.prebuild(jobs_for(["sm_80", "sm_90a"]), tmp_path / "out", told.append, 2)
    assert sorted(told) == ["scale.cu for sm_80"] * 3 + ["scale.cu for sm_90a"] * 3


def test_several_are_compiled_at_once(catalogue, tmp_path, monkeypatch):
    together = threading.Barrier(3, timeout=20)

    def build(*_, **__):
        together.wait()  # three that wait for each other are on three threads
        raise RuntimeError("met")

    monkeypatch.setattr(cache, "build", build)
    summary = prebuild.prebuild(jobs_for(["sm_80"]), tmp_path, ignore, 3)
    assert [reason for _, reason in summary.failures] == ["met"] * 3


def test_after_ctrl_c_nothing_more_is_started(catalogue, tmp_path, monkeypatch):
    catalogue[:] = [scale(power) for power in range(50)]
    started = []

    def press(what):
        raise KeyboardInterrupt

    def build(*_, **__):
        started.append(1)
        threading.Event().wait(0.01)
        raise RuntimeError

    monkeypatch.setattr(cache, "build", build)
    with pytest.raises(KeyboardInterrupt):
        prebuild.prebuild(jobs_for(["sm_80"]), tmp_path, press, 1)
    assert len(started) < 20


def test_a_kernel_that_is_launched_in_two_ways_is_compiled_once(catalogue):
    catalogue[:] = [Specialisation("scale.cu", "test::scale<1>", threads, 0) for threads in (64, 128)]
    assert len(jobs_for(["sm_80"])) == 1
    assert len(jobs_for(["sm_80", "sm_86"])) == 2


# ---- The command ------------------------------------------------------------------------------------


@needs_nvrtc
def test_the_command_fills_the_users_cache(catalogue, sources, folder, capsys):
    assert main(["prebuild", "--arch", "sm_80,sm_90a", "--jobs", "2"]) == 0
    assert len(list(folder.glob("*.cubin"))) == 6
    out, err = capsys.readouterr()
    assert out.startswith("6 compiled, 0 there already, 0 failed")
    assert out.endswith(f"{folder}\n")
    assert err == ""  # which is no terminal


@needs_nvrtc
def test_output_names_another_folder(catalogue, folder, tmp_path):
    assert main(["prebuild", "--arch", "sm_80", "--output", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").glob("*.cubin"))) == 3
    assert not folder.exists()


@needs_nvrtc
def test_a_kernel_that_fails_makes_the_status_one(catalogue, capsys):
    catalogue.append(Specialisation("scale.cu", "test::nonsense<1>", 128, 0))
    assert main(["prebuild", "--arch", "sm_80"]) == 1
    assert "3 compiled, 0 there already, 1 failed" in capsys.readouterr().out


def test_list_says_what_there_is_and_compiles_nothing(catalogue, folder, capsys, compiled):
    assert main(["prebuild", "--arch", "sm_80,sm_80,sm_86", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[0] == "sm_80    scale.cu  test::scale<1>  128 threads, 1024 bytes shared"
    assert compiled == []
    assert not folder.exists()


def test_gradients_are_compiled_where_they_are_asked_for(catalogue, capsys):
    assert main(["prebuild", "--arch", "sm_80", "--gradients", "--list"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[2] == "test::scale<4>"


def test_without_arch_it_is_for_the_gpus_that_are_there(catalogue, monkeypatch, capsys):
    gpus = [("old", (7, 5)), ("H100", (9, 0)), ("L40", (8, 9)), ("H100", (9, 0))]
    monkeypatch.setattr(info, "devices", lambda: gpus)
    assert main(["prebuild", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["sm_90a"] * 3 + ["sm_89"] * 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["prebuild"], "there is no GPU here to compile for; name the architectures: --arch sm_80,sm_90a"),
        (["prebuild", "--arch", "hopper"], "'hopper' is no architecture; they look like sm_80 or sm_90a"),
        (["prebuild", "--arch", "sm_80,"], "'' is no architecture"),
        (["prebuild", "--arch", "sm_75"], "sm_75: the kernels need sm_80 or newer (Ampere)"),
        (["prebuild", "--arch", "sm_80", "--jobs", "0"], "'0' is not a positive number"),
        (["prebuild", "--arch", "sm_80", "--jobs", "many"], "'many' is not a positive number"),
        (["tidy"], "invalid choice: 'tidy'"),
    ],
)
def test_a_bad_argument_gets_a_sentence_and_status_two(catalogue, monkeypatch, capsys, arguments, sentence):
    monkeypatch.setattr(info, "devices", list)
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert sentence in capsys.readouterr().err


@needs_nvrtc
def test_an_architecture_that_nvrtc_does_not_know_gets_a_sentence_and_status_one(catalogue, capsys):
    assert main(["prebuild", "--arch", "sm_999"]) == 1
    assert "does not know sm_999; install one that does" in capsys.readouterr().err


@needs_nvrtc
@pytest.mark.parametrize("option", ["--output", "CUPYATTN_CACHE_DIR"])
def test_a_folder_that_cannot_be_filled_gets_a_sentence_and_status_one(
    catalogue, tmp_path, monkeypatch, capsys, option
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CUPYATTN_CACHE_DIR", str(tmp_path / "file"))
    output = ["--output", str(tmp_path / "file")] if option == "--output" else []
    assert main(["prebuild", "--arch", "sm_80", *output]) == 1
    assert str(tmp_path / "file") in capsys.readouterr().err


@needs_nvrtc
def test_a_cache_that_others_may_write_to_is_not_filled(catalogue, folder, capsys):
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    if cache.is_ours(folder):
        pytest.skip("needs POSIX permissions")
    assert main(["prebuild", "--arch", "sm_80"]) == 1
    assert "others may write to it" in capsys.readouterr().err


def test_without_a_command_there_is_help(capsys):
    assert main([]) == 0
    assert "prebuild" in capsys.readouterr().out
