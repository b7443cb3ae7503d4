"""What the tests of the commands share: a cache of their own."""

import pytest

from cupyattn.cuda.making import cache

NAME = "{}-nvrtc13.5-" + "1" * 32 + ".cubin"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The user's cache, which is not there yet; nothing is prebuilt."""
    monkeypatch.setenv("CUPYATTN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "PREBUILT", tmp_path / "prebuilt")
    return cache.user_folder()


@pytest.fixture
def filled(folder):
    """With two files that are named as ours are, of 1000 and 500 bytes."""
    folder.mkdir(parents=True, mode=0o700)
    for digit, size in (("a", 1000), ("b", 500)):
        (folder / NAME.format(digit * 32)).write_bytes(bytes(size))
    return folder
