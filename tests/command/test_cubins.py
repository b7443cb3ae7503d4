"""`cupyattn cache`."""

import os

import pytest

from cupyattn.command import main
from cupyattn.cuda.making import cache


def test_list_has_a_line_for_each_and_their_sum(filled, capsys):
    assert main(["cache", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["kernel", "for", "NVRTC", "made", "size"]
    assert sorted(line.split()[-2] for line in lines[1:3]) == ["1.0", "500"]
    assert lines[3] == f"2 cubins, 1.5 kB in {filled}"


def test_size_has_the_sum_alone(filled, capsys):
    assert main(["cache", "size"]) == 0
    assert capsys.readouterr().out == f"2 cubins, 1.5 kB in {filled}\n"


def test_clear_removes_them(filled, capsys):
    assert main(["cache", "clear"]) == 0
    assert capsys.readouterr().out == f"removed 2 cubins, 1.5 kB, of {filled}\n"
    assert not filled.exists()


def test_a_dry_run_removes_nothing(filled, capsys):
    assert main(["cache", "clear", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("would remove 2 cubins")
    assert len(list(filled.iterdir())) == 2


def test_other_versions_are_cleared_where_that_is_asked_for(filled, capsys):
    other = filled.rename(filled.with_name("0.0.9"))
    assert main(["cache", "clear"]) == 0
    assert len(list(other.iterdir())) == 2
    assert main(["cache", "clear", "--all-versions"]) == 0
    assert not other.exists()


@pytest.mark.parametrize("action", ["list", "size", "clear"])
def test_a_cache_that_is_not_there_is_empty(folder, action, capsys):
    assert main(["cache", action]) == 0
    assert capsys.readouterr().out == f"empty: {folder}\n"


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_a_cache_that_others_may_write_to_is_not_cleared_and_the_status_one(filled, capsys):
    filled.chmod(0o777)
    assert main(["cache", "clear"]) == 1
    assert "others may write to it" in capsys.readouterr().err
    assert len(list(filled.iterdir())) == 2


def test_without_a_home_the_status_is_one(monkeypatch, capsys):
    monkeypatch.setattr(cache, "user_folder", lambda: None)
    assert main(["cache", "size"]) == 1
    assert "CUPYATTN_CACHE_DIR can name another" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["list", "--dry-run"], ["tidy"], []], ids=" ".join)
def test_what_cannot_be_asked_is_status_two(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["cache", *arguments])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("cupyattn cache: ")
