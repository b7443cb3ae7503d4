"""Cubins on disk: compiled once, found again, and never loaded if anything about them is wrong."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from cupyattn.cuda.making import cache, compiler
from cupyattn.cuda.making.cache import build, find, is_ours, key_of

WANTED = ("scale.cu", "test::scale<3>", "sm_90a")
WAIT = 60
PACKAGE = Path(cache.__file__).parents[3]

pytestmark = pytest.mark.usefixtures("folder")
posix = pytest.mark.skipif(os.name != "posix", reason="POSIX owners, permissions and processes")


def cubins(folder):
    return sorted(folder.glob("*.cubin"))


def refuse(*_):
    raise RuntimeError("nothing is to be compiled")


@pytest.fixture
def kept(nvrtc, sources, folder, compiled):
    """A cubin in the user's cache; what is compiled from now on is counted."""
    entry = find(*WANTED, sources=sources)
    compiled.clear()
    return entry


def run_python(text, *arguments, env=None, **options):
    """A script in a process of its own."""
    head = f"import sys; sys.path.insert(0, {str(PACKAGE)!r})\nfrom pathlib import Path\n"
    call = [sys.executable, "-W", "error", "-c", head + text, *map(str, arguments)]
    environment = {**os.environ, **(env or {})}
    return subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options)


FIND = """
from cupyattn.cuda.making.cache import find
print(find("scale.cu", "test::scale<3>", "sm_90a", sources=Path(sys.argv[1])).path)
"""


def finished(process):
    out, err = process.communicate(timeout=WAIT)
    assert process.returncode == 0, err
    return out.strip()


# ---- Found again ------------------------------------------------------------------------------------


def test_the_first_time_it_is_compiled_into_the_users_cache(nvrtc, sources, folder, compiled):
    entry = find(*WANTED, sources=sources)
    assert compiled == ["test::scale<3>"]
    assert cubins(folder) == [entry.path]
    assert entry.nvrtc == nvrtc


def test_the_second_time_it_is_not_compiled(kept, sources, compiled):
    assert find(*WANTED, sources=sources) == kept
    assert compiled == []


def test_compiling_while_a_caller_waits_is_said_through_logging(nvrtc, sources, caplog):
    with caplog.at_level("INFO", logger="cupyattn"):
        find(*WANTED, sources=sources)
        first = [record.getMessage() for record in caplog.records]
        find(*WANTED, sources=sources)
    assert first[0].startswith("compiling test::scale<3> for sm_90a, once; ")
    assert first[1].startswith(f"compiled it by NVRTC {nvrtc} in ")
    assert len(caplog.records) == 2  # of what was found nothing is said


def test_the_file_is_the_cubin(kept, sources):
    fresh = compiler.compile_cubin(cache.source.join("scale.cu", sources), *WANTED[1:])
    assert kept.path.read_bytes() == fresh.image
    assert (kept.name, kept.resources) == (fresh.name, fresh.resources)


def test_an_edited_header_is_compiled_again_and_its_old_text_is_not(kept, sources, compiled):
    header = sources / "factor.cuh"
    before = header.read_text()
    header.write_text(before.replace("2.0f", "3.0f"))
    assert find(*WANTED, sources=sources).path != kept.path
    assert compiled == ["test::scale<3>"]
    header.write_text(before)
    assert find(*WANTED, sources=sources) == kept
    assert compiled == ["test::scale<3>"]


@pytest.mark.parametrize("other", [("text", "k<2>", "sm_80"), ("text", "k<1>", "sm_86"), ("text ", "k<1>", "sm_80")])
def test_text_expression_and_architecture_are_in_the_key(other):
    assert key_of(*other) != key_of("text", "k<1>", "sm_80") == key_of("text", "k<1>", "sm_80")


@pytest.mark.parametrize(("module", "name", "value"), [(cache, "FORMAT", -1), (compiler, "OPTIONS", ("-G",))])
def test_format_and_options_are_in_the_key(monkeypatch, module, name, value):
    before = key_of("text", "k<1>", "sm_80")
    monkeypatch.setattr(module, name, value)
    assert key_of("text", "k<1>", "sm_80") != before


def test_where_the_sources_are_is_not_in_the_key(kept, sources, compiled, tmp_path):
    elsewhere = sources.rename(tmp_path / "elsewhere")
    assert find(*WANTED, sources=elsewhere) == kept
    assert compiled == []


def test_a_cubin_by_another_nvrtc_is_compiled_again(kept, sources, compiled, monkeypatch):
    older = kept.path.rename(kept.path.with_name(kept.path.name.replace(f"nvrtc{kept.nvrtc}", "nvrtc1.0")))
    assert find(*WANTED, sources=sources).path == kept.path != older
    assert compiled == ["test::scale<3>"]


# ---- Without a compiler -----------------------------------------------------------------------------


@pytest.fixture
def no_compiler(monkeypatch):
    def use():
        monkeypatch.setattr(compiler, "version", lambda: None)
        monkeypatch.setattr(compiler, "compile_cubin", refuse)

    return use


def test_a_prebuilt_cubin_comes_first_and_needs_no_compiler(kept, sources, no_compiler):
    built, is_new = build(*WANTED, cache.PREBUILT, sources=sources)
    no_compiler()
    assert is_new
    assert find(*WANTED, sources=sources) == built != kept


def test_a_cubin_in_the_users_cache_needs_no_compiler(kept, sources, no_compiler):
    no_compiler()
    assert find(*WANTED, sources=sources) == kept


def test_of_two_cubins_that_were_prebuilt_the_later_compilers_is_taken(kept, sources, no_compiler):
    built, _ = build(*WANTED, cache.PREBUILT, sources=sources)
    for version in ("9.9", "10.1"):
        copy = built.path.with_name(built.path.name.replace(f"nvrtc{built.nvrtc}", f"nvrtc{version}"))
        copy.write_bytes(built.path.read_bytes())
    built.path.unlink()
    no_compiler()
    assert find(*WANTED, sources=sources).nvrtc == "10.1"


def test_a_prebuilt_cubin_that_is_too_new_for_the_driver_is_passed_over(kept, sources):
    built, _ = build(*WANTED, cache.PREBUILT, sources=sources)
    major = int(built.nvrtc.partition(".")[0])
    assert find(*WANTED, sources=sources, driver=major - 1) == kept
    assert find(*WANTED, sources=sources, driver=major) == built


def test_neither_cubin_nor_compiler_says_what_to_install(sources, folder, monkeypatch):
    def missing():
        raise ImportError("no NVRTC")

    monkeypatch.setattr(compiler, "version", lambda: None)
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    with pytest.raises(RuntimeError, match=r"pip install (cupyattn|.*nvidia-cuda-nvrtc.*built before)"):
        find(*WANTED, sources=sources)


def test_building_into_a_folder_says_whether_it_was_new(nvrtc, sources, folder, tmp_path):
    first, second = (build(*WANTED, tmp_path / "out", sources=sources) for _ in range(2))
    assert (first[1], second[1]) == (True, False)
    assert first[0] == second[0]
    assert cubins(tmp_path / "out") == [first[0].path]


@posix
def test_what_is_built_into_a_folder_may_be_read_by_everybody(nvrtc, sources, tmp_path):
    entry, _ = build(*WANTED, tmp_path / "out", sources=sources)
    assert entry.path.stat().st_mode & 0o777 == 0o644


# ---- What is wrong is not loaded --------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        lambda image: image[:-1],
        lambda image: image[: len(image) // 2],
        lambda image: b"",
        lambda image: image + b"\0",
        lambda image: image[:2000] + bytes([image[2000] ^ 1]) + image[2001:],
    ],
    ids=["last byte lost", "half", "empty", "a byte more", "a bit flipped"],
)
def test_a_damaged_cubin_is_compiled_again_and_mended(kept, sources, compiled, damage):
    image = kept.path.read_bytes()
    kept.path.write_bytes(damage(image))
    assert find(*WANTED, sources=sources) == kept
    assert compiled == ["test::scale<3>"]
    assert kept.path.read_bytes() == image


@posix
@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
def test_a_folder_that_others_may_write_to_is_neither_read_nor_written(kept, sources, folder, compiled, mode):
    kept.path.unlink()
    folder.chmod(mode)
    found = find(*WANTED, sources=sources)
    assert found == replace(kept, path=None)
    assert cubins(folder) == []
    folder.chmod(0o700)
    kept.path.write_bytes(found.image)
    folder.chmod(mode)
    assert find(*WANTED, sources=sources) is found


@posix
@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_nor_is_a_folder_inside_of_one_where_others_could_put_another_in_its_place(kept, sources, folder, mode):
    folder.parent.chmod(mode)
    assert find(*WANTED, sources=sources).path is None


@posix
def test_where_all_may_write_and_nobody_rename_what_is_others_a_folder_is_safe(kept, sources, folder):
    folder.parent.chmod(0o1777)
    assert find(*WANTED, sources=sources) == kept


@posix
def test_a_link_to_a_folder_is_as_safe_as_where_it_leads(kept, sources, folder, tmp_path):
    (tmp_path / "open").mkdir()
    real = folder.parent.rename(tmp_path / "open" / "cache")
    folder.parent.symlink_to(real)
    assert find(*WANTED, sources=sources).path == kept.path
    (tmp_path / "open").chmod(0o777)
    assert find(*WANTED, sources=sources).path is None


@posix
def test_a_link_to_a_link_is_as_safe_as_both(kept, sources, folder, tmp_path):
    """Whoever can change the one on the way decides where the first one leads."""
    (tmp_path / "open").mkdir()
    real = folder.parent.rename(tmp_path / "real")
    (tmp_path / "open" / "way").symlink_to("../real")
    folder.parent.symlink_to(tmp_path / "open" / "way")
    assert find(*WANTED, sources=sources).path == kept.path
    assert real.is_dir()
    (tmp_path / "open").chmod(0o777)
    assert find(*WANTED, sources=sources).path is None


@posix
def test_links_in_a_circle_lead_nowhere(nvrtc, sources, tmp_path, monkeypatch):
    (tmp_path / "one").symlink_to("other")
    (tmp_path / "other").symlink_to("one")
    monkeypatch.setenv("CUPYATTN_CACHE_DIR", str(tmp_path / "one"))
    assert find(*WANTED, sources=sources).path is None


@posix
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs to be root to be somebody else")
def test_nothing_is_made_where_a_link_of_somebody_else_leads(nvrtc, sources, tmp_path, monkeypatch):
    """In a folder where all may write, like /tmp."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o1777)
    (tmp_path / "shared" / "cache").symlink_to(tmp_path / "mine")
    os.lchown(tmp_path / "shared" / "cache", 12345, 12345)
    monkeypatch.setenv("CUPYATTN_CACHE_DIR", str(tmp_path / "shared" / "cache"))
    assert find(*WANTED, sources=sources).path is None
    assert list((tmp_path / "mine").iterdir()) == []


@posix
def test_a_folder_in_the_place_of_a_cubin_is_none(kept, sources, compiled):
    kept.path.unlink()
    kept.path.mkdir()
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    found = find(*WANTED, sources=sources)
    assert (found.image, found.path) == (kept.image, None)
    assert compiled == ["test::scale<3>"]
    assert before is None or len(os.listdir("/proc/self/fd")) == before


def test_a_file_too_large_for_a_cubin_is_not_read(kept, sources, compiled, monkeypatch):
    monkeypatch.setattr(cache, "LARGEST", len(kept.image) - 1)
    assert find(*WANTED, sources=sources).image == kept.image
    assert compiled == ["test::scale<3>"]


@posix
def test_where_the_working_folder_is_gone_there_is_no_cache_in_it(nvrtc, sources, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    monkeypatch.setenv("CUPYATTN_CACHE_DIR", "relative")
    assert cache.user_folder() is None
    assert find(*WANTED, sources=sources.absolute()).path is None


@posix
def test_what_is_loaded_is_what_was_looked_at_though_another_file_takes_its_place(kept, sources, monkeypatch):
    real = cache._digest

    def replaced_meanwhile(image):
        kept.path.unlink()
        kept.path.write_bytes(b"somebody else's")
        return real(image)

    monkeypatch.setattr(cache, "_digest", replaced_meanwhile)
    assert find(*WANTED, sources=sources).image == kept.image


@posix
def test_a_pipe_in_the_cache_is_no_cubin_and_nobody_waits_for_it(kept, sources, compiled):
    kept.path.unlink()
    os.mkfifo(kept.path)
    assert find(*WANTED, sources=sources) == kept
    assert compiled == ["test::scale<3>"]


@pytest.mark.parametrize(
    "image",
    [b"", b"somebody's notes", b"\x7fELF\x02\x01" + b"\xff" * 500, b"\x7fELF\x02\x01" + bytes(500)],
    ids=["nothing", "text", "tables anywhere", "no tables"],
)
def test_what_has_the_name_of_a_cubin_and_its_digest_and_is_none_is_passed_over(kept, sources, compiled, image):
    digest = hashlib.sha256(image).hexdigest()[:32]
    kept.path.with_name(f"{kept.path.name.rpartition('-')[0]}-{digest}.cubin").write_bytes(image)
    kept.path.unlink()
    assert find(*WANTED, sources=sources) == kept
    assert compiled == ["test::scale<3>"]


def test_of_two_cubins_one_that_is_none_does_not_hide_the_other(kept, sources, compiled):
    digest = hashlib.sha256(b"").hexdigest()[:32]
    kept.path.with_name(f"{kept.path.name.rpartition('-')[0]}-{digest}.cubin").touch()
    assert find(*WANTED, sources=sources) == kept
    assert compiled == []


@posix
@pytest.mark.parametrize("mode", [0o664, 0o646])
def test_a_file_that_others_may_write_to_is_not_loaded(kept, sources, compiled, mode):
    kept.path.chmod(mode)
    assert find(*WANTED, sources=sources) == kept
    assert compiled == ["test::scale<3>"]
    assert kept.path.stat().st_mode & 0o022 == 0


@posix
@pytest.mark.parametrize(
    ("owner", "mode", "ours"),
    [("me", 0o700, True), ("root", 0o755, True), ("me", 0o755, True), ("other", 0o700, False), ("me", 0o720, False)],
)
@pytest.mark.parametrize("above", [False, True])
def test_ours_is_what_only_this_user_and_root_can_write(folder, monkeypatch, owner, mode, ours, above):
    folder.mkdir(parents=True)
    looked_at, real = folder.parent if above else folder, Path.stat
    status = SimpleNamespace(st_uid={"me": 1000, "root": 0, "other": 1001}[owner], st_mode=mode)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(Path, "stat", lambda self, **how: status if self == looked_at else real(self, **how))
    assert is_ours(folder) == ours


def test_what_does_not_exist_is_not_ours(tmp_path):
    assert not is_ours(tmp_path / "nothing")


@posix
def test_the_cache_is_made_for_its_owner_alone(kept, folder):
    assert folder.stat().st_mode & 0o777 == 0o700


@posix
def test_so_are_the_folders_above_it_whatever_the_umask(nvrtc, sources, tmp_path, monkeypatch):
    chosen = tmp_path / "a" / "b"
    monkeypatch.setenv("CUPYATTN_CACHE_DIR", str(chosen))
    before = os.umask(0)
    try:
        path = find(*WANTED, sources=sources).path
    finally:
        os.umask(before)
    assert {each.stat().st_mode & 0o777 for each in (path.parent, chosen, chosen.parent)} == {0o700}


# ---- Killed, crowded, full, read-only ---------------------------------------------------------------


@posix
@pytest.mark.parametrize("age", [0, 2 * 86400, -2 * 86400], ids=["now", "two days ago", "in two days"])
def test_what_a_killed_writer_left_is_not_loaded_and_goes_with_the_next_one(kept, sources, folder, compiled, age):
    left = folder / "123-abc.part"
    left.write_bytes(kept.image[:100])
    os.utime(left, (time.time() - age,) * 2)
    kept.path.unlink()
    assert find(*WANTED, sources=sources) == kept
    assert compiled == ["test::scale<3>"]
    assert not left.exists()


WRITING = """
from cupyattn.cuda.making import cache
from cupyattn.cuda.making.cache import find
real = cache.os.fsync
def slowly(handle):
    print("writing", flush=True)
    sys.stdin.readline()
    real(handle)
cache.os.fsync = slowly
print(find("scale.cu", "test::scale<5>", "sm_90a", sources=Path(sys.argv[1])).path)
"""


@posix
@pytest.mark.usefixtures("nvrtc")
def test_what_another_process_is_writing_is_left_to_it_whatever_the_clock_says(sources, folder):
    writer = run_python(WRITING, sources, stdin=subprocess.PIPE)
    assert writer.stdout.readline() == "writing\n"
    (part,) = folder.glob("*.part")
    os.utime(part, (0, 0))
    find(*WANTED, sources=sources)
    assert part.exists()
    out, err = writer.communicate("go on\n", timeout=WAIT)
    assert writer.returncode == 0, err
    assert Path(out.strip()).exists()
    assert len(cubins(folder)) == 2


KILLED = """
import os, signal
def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)
os.replace = killed
"""


@posix
@pytest.mark.usefixtures("nvrtc")
def test_a_writer_killed_on_the_way_leaves_nothing_that_is_found(sources, folder, compiled):
    process = run_python(KILLED + FIND, sources)
    process.communicate(timeout=WAIT)
    assert process.returncode == -signal.SIGKILL
    assert cubins(folder) == []
    assert len(list(folder.glob("*.part"))) == 1
    assert find(*WANTED, sources=sources).path.parent == folder
    assert compiled == ["test::scale<3>"]


@posix
@pytest.mark.parametrize("times", [1, 2])
def test_a_file_that_another_process_sweeps_before_it_is_locked_is_made_again(
    nvrtc, sources, folder, monkeypatch, times
):
    real, made = cache.tempfile.mkstemp, []

    def mkstemp(**options):
        found = real(**options)
        made.append(found)
        if len(made) <= times:
            cache.sweep(options["dir"])
        return found

    monkeypatch.setattr(cache.tempfile, "mkstemp", mkstemp)
    entry = find(*WANTED, sources=sources)
    assert [entry.path] == cubins(folder)
    assert len(made) == times + 1


@pytest.mark.usefixtures("nvrtc")
def test_eight_processes_at_once_end_with_one_cubin(sources, folder):
    processes = [run_python(FIND, sources) for _ in range(8)]
    paths = {finished(process) for process in processes}
    assert paths == {str(find(*WANTED, sources=sources).path)}
    assert [path.name for path in folder.iterdir()] == [Path(paths.pop()).name]


def test_eight_threads_at_once_compile_once(nvrtc, sources, folder, compiled):
    everybody = threading.Barrier(8, timeout=WAIT)
    found = []

    def work():
        everybody.wait()
        found.append(find(*WANTED, sources=sources))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert len(found) == 8
    assert len(set(found)) == 1
    assert compiled == ["test::scale<3>"]


FORKED = """
import os
from cupyattn.cuda.making import cache
with cache.lock_of("key"):
    child = os.fork()
    if child == 0:
        os._exit(0 if cache.lock_of("key").acquire(timeout=1) else 1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_does_not_wait_for_a_thread_it_does_not_have():
    assert finished(run_python(FORKED)) == "0"


def test_without_a_usable_cache_a_kernel_is_compiled_once_and_kept_in_memory(
    nvrtc, sources, tmp_path, compiled, monkeypatch
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CUPYATTN_CACHE_DIR", str(tmp_path / "file"))
    found = find(*WANTED, sources=sources)
    assert found.path is None
    assert find(*WANTED, sources=sources) is found
    assert compiled == ["test::scale<3>"]


@posix
@pytest.mark.usefixtures("nvrtc")
def test_a_read_only_cache_is_read_and_not_written(kept, sources, folder, compiled):
    folder.chmod(0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write everywhere")
    assert find(*WANTED, sources=sources) == kept
    assert find("scale.cu", "test::scale<5>", "sm_90a", sources=sources).path is None
    folder.chmod(0o700)


def test_a_full_disk_leaves_nothing_behind_and_the_kernel_works(nvrtc, sources, folder, compiled, monkeypatch):
    real, calls = os.fsync, []

    def full_at_first(handle):
        calls.append(handle)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, "no space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full_at_first)
    found = find(*WANTED, sources=sources)
    assert found.path is None
    assert list(folder.iterdir()) == []
    assert find(*WANTED, sources=sources) == found
    assert compiled == ["test::scale<3>"]


# ---- Where it is ------------------------------------------------------------------------------------

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="XDG folders")


@pytest.fixture
def home(tmp_path, monkeypatch):
    for name in ("CUPYATTN_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@linux
def test_the_cache_is_in_the_home_folder(home):
    assert cache.user_folder().parent == home / ".cache" / "cupyattn"


@linux
def test_xdg_cache_home_moves_it(home, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "xdg"))
    assert cache.user_folder().parent == home / "xdg" / "cupyattn"


@linux
def test_a_relative_xdg_cache_home_is_no_place(home, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "xdg")
    assert cache.user_folder().parent == home / ".cache" / "cupyattn"


def test_cupyattn_cache_dir_moves_it(home, monkeypatch, nvrtc, sources):
    monkeypatch.setenv("CUPYATTN_CACHE_DIR", str(home / "chosen"))
    assert cache.user_folder().parent == home / "chosen"
    assert home / "chosen" in find(*WANTED, sources=sources).path.parents


@linux
def test_a_user_without_a_home_has_no_cache(home, monkeypatch, nvrtc, sources):
    def homeless():
        raise RuntimeError("could not determine home directory")

    monkeypatch.setattr(Path, "home", homeless)
    assert cache.user_folder() is None
    assert find(*WANTED, sources=sources).path is None
