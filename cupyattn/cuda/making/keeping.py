"""What the user's cache holds, to be listed and to be removed."""

from __future__ import annotations

import os
import re
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cupyattn.cuda.making import cache, elf


@dataclass(frozen=True, slots=True)
class Kept:
    """One cubin of some version of cupyattn's."""

    path: Path
    version: str
    """Of cupyattn."""
    kernel: str
    """The function's name, without its template arguments; "?" in a file that is none of ours, or broken."""
    target: str
    nvrtc: str
    num_bytes: int
    modified: float
    """Seconds since 1970."""


@dataclass(frozen=True, slots=True)
class Cleared:
    """What was removed, or would be."""

    num_files: int
    num_bytes: int
    left: tuple[str, ...] = ()
    """A sentence for each file that could not be removed, and each folder that was not looked into."""


def folders(all_versions: bool = False) -> list[Path]:
    """The folder of this version's cubins, or those of every version's, as far as there are any."""
    own = cache.user_folder()
    if own is None:
        return []
    if not all_versions:
        return [own] if own.is_dir() else []
    try:
        return sorted(each for each in own.parent.iterdir() if _is_a_version(each))
    except OSError:
        return []


def kept(folder: Path) -> list[Kept]:
    """The cubins in one folder, the latest first."""
    rows = [_look_at(path, status) for path, status in _cubins(folder)]
    return sorted(rows, key=lambda row: (-row.modified, row.path.name))


def clear(folder: Path, pretend: bool = False) -> Cleared:
    """Remove the cubins in one folder, what killed writers left there, and then the folder, if that leaves it empty.

    Only files that are named as ours are, and are no links, go; a folder that others may write to is left as it is.
    Processes that run have their kernels in memory, and those that compile at this moment keep what they compile.
    """
    if not cache.is_ours(folder):
        return Cleared(0, 0, (f"{folder}, or a folder above it, belongs to another user, or others may write to it",))
    count = num_bytes = 0
    left = []
    for path, status in _cubins(folder):
        try:
            if not pretend:
                path.unlink()
        except FileNotFoundError:  # another process clears it, too
            continue
        except OSError as error:
            left.append(f"{path}: {error.strerror}")
            continue
        count, num_bytes = count + 1, num_bytes + status.st_size
    if not pretend:
        cache.sweep(folder)
        with suppress(OSError):  # something else is in it, which is not ours to remove
            folder.rmdir()
    return Cleared(count, num_bytes, tuple(left))


def _is_a_version(folder: Path) -> bool:
    return re.fullmatch(r"\d+(\.\w+)+", folder.name) is not None and folder.is_dir() and not folder.is_symlink()


def _cubins(folder: Path) -> list[tuple[Path, os.stat_result]]:
    """The files in it that are named as ours are; no links, whose ends are somewhere else."""
    found = []
    for path in sorted(folder.glob("*.cubin")):
        try:
            status = path.lstat()
        except OSError:
            continue
        if cache.NAME.fullmatch(path.name) and stat.S_ISREG(status.st_mode):
            found.append((path, status))
    return found


def _look_at(path: Path, status: os.stat_result) -> Kept:
    match = cache.NAME.fullmatch(path.name)
    assert match is not None
    kernel, target = "?", "?"
    if status.st_size <= cache.LARGEST:
        try:
            image = path.read_bytes()
            ((name, _),) = elf.kernels(image).items()
            kernel, target = _function(name), f"sm_{elf.architecture(image)}"
        except (OSError, ValueError):
            pass
    return Kept(path, path.parent.name, kernel, target, match["nvrtc"], status.st_size, status.st_mtime)


def _function(mangled: str) -> str:
    """The function in a mangled name, "flash_forward" in "_ZN8cupyattn13flash_forwardI...": the last of its nested
    names, each of which follows its length."""
    rest, name = mangled.removeprefix("_ZN"), mangled
    while (length := re.match(r"\d+", rest)) is not None:
        end = length.end() + int(length[0])
        name, rest = rest[length.end() : end], rest[end:]
    return name
