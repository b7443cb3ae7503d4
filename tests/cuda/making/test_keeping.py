"""The user's cache, listed and cleared: what is ours, and nothing else."""

import os

import pytest

from cupyattn.cuda.making import cache, keeping
from cupyattn.cuda.making.cache import find

WANTED = ("scale.cu", "test::scale<3>", "sm_90a")
posix = pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")

NAME = "0" * 32 + "-nvrtc13.5-" + "1" * 32 + ".cubin"


@pytest.fixture
def entry(nvrtc, sources, folder):
    """A cubin in the user's cache."""
    return find(*WANTED, sources=sources)


@pytest.fixture
def place(folder):
    """The user's cache, with a file of ours by its name."""
    folder.mkdir(parents=True, mode=0o700)
    (folder / NAME).write_bytes(b"nonsense")
    return folder


def test_a_cubin_is_listed_by_kernel_architecture_and_compiler(entry, folder, nvrtc):
    (row,) = keeping.kept(folder)
    assert (row.kernel, row.target, row.nvrtc) == ("scale", "sm_90", nvrtc)
    assert (row.path, row.version, row.num_bytes) == (entry.path, folder.name, len(entry.image))


def test_what_is_in_a_broken_file_is_not_known(place):
    (row,) = keeping.kept(place)
    assert (row.kernel, row.target, row.num_bytes) == ("?", "?", 8)


def test_a_cleared_cache_is_gone_and_the_next_call_compiles_again(entry, folder, sources, compiled):
    cleared = keeping.clear(folder)
    assert (cleared.num_files, cleared.num_bytes, cleared.left) == (1, len(entry.image), ())
    assert not folder.exists()
    assert find(*WANTED, sources=sources).path == entry.path
    assert len(compiled) == 1


def test_to_pretend_removes_nothing(place):
    assert keeping.clear(place, pretend=True).num_files == 1
    assert [path.name for path in place.iterdir()] == [NAME]


def test_what_is_not_named_as_ours_stays(place):
    others = {"notes.txt", "mine.cubin", NAME.replace("nvrtc", "clang")}
    for name in others:
        (place / name).touch()
    assert keeping.clear(place).num_files == 1
    assert {path.name for path in place.iterdir()} == others


@posix
def test_a_link_that_is_named_as_ours_stays_and_so_does_its_end(place, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("words")
    link = place / NAME.replace("0" * 32, "2" * 32)
    link.symlink_to(precious)
    assert keeping.clear(place).num_files == 1
    assert link.is_symlink()
    assert precious.read_text() == "words"


def test_a_folder_that_is_named_as_ours_stays(place):
    (place / NAME).unlink()
    (place / NAME).mkdir()
    assert keeping.clear(place).num_files == 0
    assert (place / NAME).is_dir()


@posix
def test_a_folder_that_others_may_write_to_is_left_as_it_is(place):
    place.chmod(0o777)
    cleared = keeping.clear(place)
    assert (cleared.num_files, len(cleared.left)) == (0, 1)
    assert "others may write to it" in cleared.left[0]
    assert (place / NAME).exists()


@posix
def test_what_a_killed_writer_left_goes_and_what_a_living_one_writes_stays(place):
    (place / "1-dead.part").touch()
    with open(place / "2-alive.part", "wb") as file:
        assert cache._lock(file.fileno())
        keeping.clear(place)
        assert [path.name for path in place.iterdir()] == ["2-alive.part"]


def test_a_file_that_cannot_be_removed_is_named(place, monkeypatch):
    def refuse(path, missing_ok=False):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(place), "unlink", refuse)
    cleared = keeping.clear(place)
    assert (cleared.num_files, cleared.left) == (0, (f"{place / NAME}: Permission denied",))


def test_of_other_versions_there_are_those_folders_that_are_named_like_versions(place):
    other = place.parent / "0.0.9"
    for folder in (other, place.parent / "1.2.0rc1", place.parent / "something"):
        folder.mkdir()
    if os.name == "posix":
        (place.parent / "0.0.8").symlink_to(other)  # which leads to where it says itself
    assert keeping.folders() == [place]
    assert keeping.folders(all_versions=True) == sorted([place, other, place.parent / "1.2.0rc1"])


def test_without_a_cache_there_are_no_folders(folder, monkeypatch):
    assert keeping.folders() == keeping.folders(all_versions=True) == []
    monkeypatch.setattr(cache, "user_folder", lambda: None)
    assert keeping.folders(all_versions=True) == []


@pytest.mark.parametrize(
    ("mangled", "name"),
    [
        ("_ZN8cupyattn13flash_forwardINS_11FlashTraitsIfEEEEvNS_6ParamsE", "flash_forward"),
        ("_ZN4test5scaleILi3EEEvPf", "scale"),
        ("plain", "plain"),
    ],
)
def test_a_function_is_found_in_its_mangled_name(mangled, name):
    assert keeping._function(mangled) == name
