"""Cubins on disk, found by what they were made of.

A cubin's file is named ``<key>-nvrtc<version>-<digest>.cubin``.  The key says what was compiled, the digest
what came out, and the rest is in the ELF file, so that one file is all there is: it appears whole by a
rename, and a file that does not match its name is not loaded.  Looked for in this order:

1. ``prebuilt/``, in the wheel;
2. the user's cache: ``$CUPYATTN_CACHE_DIR``, or where the platform keeps caches;
3. NVRTC, whose cubin is then kept in the user's cache, or for as long as this process lives if there is none.

Machine code is as good as a program, so a cache that others could have written to is neither read nor written.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cupyattn.cuda import compiler, elf, source

FORMAT = 1
"""Goes into every key; to be raised when the same key would mean something else."""
PREBUILT = source.FOLDER / "prebuilt"
A_DAY = 86400.0

_NAME = re.compile(r"(?P<key>[0-9a-f]{32})-nvrtc(?P<nvrtc>\d+\.\d+)-(?P<digest>[0-9a-f]{32})\.cubin")


@dataclass(frozen=True)
class Entry:
    """One compiled kernel on disk."""

    path: Path
    name: str
    """The kernel's name in the file, mangled."""
    resources: elf.Resources
    nvrtc: str
    """The version of the compiler that made it."""


def key_of(text: str, expression: str, target: str) -> str:
    """What a cubin is made of, as 32 hexadecimal digits.

    The compiler's version is not in it but beside it, since prebuilt cubins are used without a compiler.
    """
    made_of = json.dumps([FORMAT, text, expression, target, compiler.OPTIONS])
    return hashlib.sha256(made_of.encode()).hexdigest()[:32]


def find(
    source_name: str, expression: str, target: str, *, sources: Path = source.FOLDER, driver: int | None = None
) -> Entry:
    """The kernel's cubin, compiled if it has to be.

    Parameters
    ----------
    source_name, expression, target : str
        ``"flash.cu"``, the kernel's C++ name, ``"sm_90a"``.
    sources : Path
        The folder of the CUDA files.
    driver : int, optional
        The major version of CUDA that the driver supports; cubins of a later one are passed over.

    Raises
    ------
    RuntimeError
        It has to be compiled and cannot be.
    """
    text = source.join(source_name, sources)
    key = key_of(text, expression, target)

    def loads(nvrtc: str) -> bool:
        return driver is None or int(nvrtc.partition(".")[0]) <= driver

    if found := _look(PREBUILT, key, loads):
        return found
    own = compiler.version()
    with lock_of(key):
        for folder in (user_folder(), _process_folders.get(os.getpid())):
            if folder and is_ours(folder):
                found = _look(folder, key, loads if own is None else lambda nvrtc: nvrtc == own, is_ours)
                if found:
                    return found
        return _keep(key, compiler.compile_cubin(text, expression, target))


def build(
    source_name: str, expression: str, target: str, folder: Path, *, sources: Path = source.FOLDER
) -> tuple[Entry, bool]:
    """The kernel's cubin in this folder, by this NVRTC, and whether it had to be compiled.

    Raises
    ------
    RuntimeError
        It has to be compiled and cannot be.
    OSError
        The folder cannot be written to.
    """
    text = source.join(source_name, sources)
    key = key_of(text, expression, target)
    with lock_of(key):
        _, own = compiler.load()
        if found := _look(folder, key, lambda nvrtc: nvrtc == own):
            return found, False
        return _store(folder, key, compiler.compile_cubin(text, expression, target)), True


# ---------------------------------------------------------------------------------------------------
# Folders
# ---------------------------------------------------------------------------------------------------


def user_folder() -> Path | None:
    """Where this user's cubins of this version of cupyattn are kept; it need not exist.  None: nowhere."""
    from cupyattn import __version__

    try:
        if chosen := os.environ.get("CUPYATTN_CACHE_DIR"):
            return Path(chosen).expanduser().absolute() / __version__
        home = Path.home()
    except RuntimeError:  # a user without a home
        return None
    if sys.platform == "win32":
        caches = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        caches = home / "Library" / "Caches"
    else:
        xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
        caches = xdg if xdg.is_absolute() else home / ".cache"
    return caches / "cupyattn" / __version__


def is_ours(path: Path) -> bool:
    """Whether it exists, and nobody but this user and root can have written to it."""
    try:
        status = path.stat()
    except OSError:
        return False
    return os.name != "posix" or (status.st_uid in (os.geteuid(), 0) and not status.st_mode & 0o022)


_process_folders: dict[int, Path] = {}
"""The last resort, by process number: a forked child gets its own."""


def _process_folder() -> Path:
    """A folder that goes with this process; made anew where a cleaner of temporary files has taken it away."""
    pid = os.getpid()
    if pid not in _process_folders or not is_ours(_process_folders[pid]):
        _process_folders[pid] = Path(tempfile.mkdtemp(prefix="cupyattn-"))  # of mode 0700
        atexit.register(_remove, _process_folders[pid], pid)
    return _process_folders[pid]


def _remove(folder: Path, pid: int) -> None:
    if os.getpid() == pid:
        shutil.rmtree(folder, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------


def _look(
    folder: Path, key: str, accept: Callable[[str], bool], trust: Callable[[Path], bool] = Path.is_file
) -> Entry | None:
    """The whole and untouched cubin with this key by the latest compiler that is accepted."""
    named = [(path, match) for path in folder.glob(f"{key}-*.cubin") if (match := _NAME.fullmatch(path.name))]
    named.sort(key=lambda row: tuple(map(int, row[1]["nvrtc"].split("."))), reverse=True)
    for path, match in named:
        if accept(match["nvrtc"]) and trust(path):
            try:
                image = path.read_bytes()
            except OSError:
                continue
            if _digest(image) == match["digest"]:
                ((name, resources),) = elf.kernels(image).items()
                return Entry(path, name, resources, match["nvrtc"])
    return None


def _keep(key: str, cubin: compiler.Cubin) -> Entry:
    """In the user's cache, or where that is not to be had in a folder of this process."""
    folder = user_folder()
    try:
        if folder is not None:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if is_ours(folder):
                return _store(folder, key, cubin)
    except OSError:  # no permission, no space, a read-only disk: the kernel can run all the same
        pass
    return _store(_process_folder(), key, cubin)


def _store(folder: Path, key: str, cubin: compiler.Cubin) -> Entry:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _sweep(folder)
    path = folder / f"{key}-nvrtc{cubin.nvrtc}-{_digest(cubin.image)}.cubin"
    handle, name = tempfile.mkstemp(prefix=f"{os.getpid()}-", suffix=".part", dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(cubin.image)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # whether others get this far is the folder's to say
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return Entry(path, cubin.name, cubin.resources, cubin.nvrtc)


def _sweep(folder: Path) -> None:
    """Remove what killed writers left behind."""
    for path in folder.glob("*.part"):
        try:
            if time.time() - path.stat().st_mtime > A_DAY:
                path.unlink()
        except OSError:  # another process was faster
            pass


def _digest(image: bytes) -> str:
    return hashlib.sha256(image).hexdigest()[:32]


# ---------------------------------------------------------------------------------------------------
# Threads
# ---------------------------------------------------------------------------------------------------


class _Locks:
    """One lock for each key, so that threads wait for a cubin instead of compiling it twice."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_key: dict[str, threading.Lock] = {}

    def of(self, key: str) -> threading.Lock:
        with self._lock:
            return self._by_key.setdefault(key, threading.Lock())


_locks = _Locks()


def lock_of(key: str) -> threading.Lock:
    return _locks.of(key)


def _forget_other_threads() -> None:
    """In a forked child nobody compiles any more, and a lock may have been taken."""
    global _locks
    _locks = _Locks()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_other_threads)
