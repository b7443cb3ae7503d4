"""Cubins on disk, found by what they were made of.

A cubin's file is named ``<key>-nvrtc<version>-<digest>.cubin``.  The key says what was compiled, the digest
what came out, and the rest is in the ELF file, so that one file is all there is: it appears whole by a
rename, and a file that does not match its name is not loaded.  What is loaded are the bytes that were looked
at, never the file once more.  Looked for in this order:

1. ``prebuilt/``, in the wheel;
2. the user's cache: ``$CUPYATTN_CACHE_DIR``, or where the platform keeps caches;
3. NVRTC, whose cubin is then kept in the user's cache, or for as long as this process lives if there is none.

Machine code is as good as a program, so a cache that others could have written to, or could put another in the
place of, is neither read nor written.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cupyattn.cuda.making import compiler, elf, source

FORMAT = 1
"""Goes into every key; to be raised when the same key would mean something else."""
PREBUILT = source.FOLDER / "prebuilt"
LARGEST = 2**28
"""Bytes of a file that may be a cubin: some hundred times the largest there is."""
LOG = logging.getLogger("cupyattn")
WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH

NAME = re.compile(r"(?P<key>[0-9a-f]{32})-nvrtc(?P<nvrtc>\d+\.\d+)-(?P<digest>[0-9a-f]{32})\.cubin")


@dataclass(frozen=True)
class Entry:
    """One compiled kernel."""

    image: bytes = field(repr=False)
    """The cubin: what is to be loaded."""
    path: Path | None
    """Where it is kept; None: in the memory of this process alone."""
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
        folder = user_folder()
        if folder and is_ours(folder):
            found = _look(folder, key, loads if own is None else lambda nvrtc: nvrtc == own, _is_nobody_elses)
            if found:
                return found
        if key not in _in_memory:
            entry = _keep(key, _compiled_when_needed(text, expression, target))
            if entry.path is not None:
                return entry
            _in_memory[key] = entry
        return _in_memory[key]


def _compiled_when_needed(text: str, expression: str, target: str) -> compiler.Cubin:
    """Compiled while a caller waits, who is told through logging what for."""
    LOG.info("compiling %s for %s, once; `cupyattn prebuild` does so ahead of time", expression, target)
    start = time.perf_counter()
    cubin = compiler.compile_cubin(text, expression, target)
    LOG.info("compiled it by NVRTC %s in %.1f s", cubin.nvrtc, time.perf_counter() - start)
    return cubin


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
    except (RuntimeError, OSError):  # a user without a home, or a folder that is gone
        return None
    if sys.platform == "win32":
        caches = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        caches = home / "Library" / "Caches"
    else:
        xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
        caches = xdg if xdg.is_absolute() else home / ".cache"
    return caches / "cupyattn" / __version__


def is_ours(folder: Path) -> bool:
    """Whether it exists, and nobody but this user and root can have written to it or can put another in its place."""
    if os.name != "posix":
        return folder.exists()
    try:
        return _is_led_to_safely(folder) and _is_nobody_elses(folder.stat())
    except OSError:  # it does not exist, or nobody may look
        return False


MOST_LINKS = 40
"""As many as Linux follows."""


def _is_led_to_safely(path: Path) -> bool:
    """Nobody else can put another in the place of this path, of a folder above it, or of a link on the way."""
    ahead, here, links = list(path.parts[::-1]), Path(path.anchor), 0
    while ahead:
        step = here / ahead.pop()
        status = step.lstat()
        if stat.S_ISLNK(status.st_mode):
            links += 1
            if links > MOST_LINKS or not _is_owned(status):
                return False
            target = step.readlink()
            ahead += target.parts[::-1]
        elif step.name == "..":
            here = here.parent
        elif ahead and not _is_a_safe_way(status):
            return False
        else:
            here = step
    return True


def _is_nobody_elses(status: os.stat_result) -> bool:
    """Only this user and root can have written to it."""
    return os.name != "posix" or (_is_owned(status) and not status.st_mode & WRITABLE_BY_OTHERS)


def _is_a_safe_way(status: os.stat_result) -> bool:
    """Nobody else can rename what lies in this folder; where all may write, the sticky bit sees to that."""
    return _is_owned(status) and (bool(status.st_mode & stat.S_ISVTX) or not status.st_mode & WRITABLE_BY_OTHERS)


def _is_owned(status: os.stat_result) -> bool:
    return status.st_uid in (os.geteuid(), 0)


def may_be_made(folder: Path) -> bool:
    """What there is of the way to a folder leads to where nobody else decides."""
    existing = next(each for each in (folder, *folder.parents) if os.path.lexists(each))
    return os.name != "posix" or (_is_led_to_safely(existing) and _is_a_safe_way(existing.stat()))


def _make(folder: Path) -> None:
    """The folder and those above it, for their owner alone."""
    for each in (*reversed(folder.parents), folder):
        if not each.exists():
            each.mkdir(mode=0o700, exist_ok=True)


_in_memory: dict[str, Entry] = {}
"""What could be kept nowhere else, by key."""


# ---------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------


def _look(
    folder: Path, key: str, accept: Callable[[str], bool], trust: Callable[[os.stat_result], bool] = lambda _: True
) -> Entry | None:
    """The whole and untouched cubin with this key by the latest compiler that is accepted."""
    named = [(path, match) for path in folder.glob(f"{key}-*.cubin") if (match := NAME.fullmatch(path.name))]
    named.sort(key=lambda row: tuple(map(int, row[1]["nvrtc"].split("."))), reverse=True)
    for path, match in named:
        image = _read(path, trust) if accept(match["nvrtc"]) else None
        if image is not None and _digest(image) == match["digest"]:
            try:
                ((name, resources),) = elf.kernels(image).items()
            except ValueError:  # somebody's file under such a name
                continue
            return Entry(image, path, name, resources, match["nvrtc"])
    return None


def _read(path: Path, trust: Callable[[os.stat_result], bool]) -> bytes | None:
    """What is in a file, if it is one and can be trusted; the file that is read is the file that was looked at."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError:
        return None
    try:
        status = os.fstat(handle)
        if not (stat.S_ISREG(status.st_mode) and status.st_size <= LARGEST and trust(status)):
            return None
        with open(handle, "rb", closefd=False) as file:
            return file.read()
    except OSError:
        return None
    finally:
        os.close(handle)


def _keep(key: str, cubin: compiler.Cubin) -> Entry:
    """In the user's cache, or where that is not to be had in memory."""
    folder = user_folder()
    try:
        if folder is not None and may_be_made(folder):
            _make(folder)
            if is_ours(folder):
                return _store(folder, key, cubin)
    except OSError:  # no permission, no space, a read-only disk: the kernel can run all the same
        pass
    return Entry(cubin.image, None, cubin.name, cubin.resources, cubin.nvrtc)


def _store(folder: Path, key: str, cubin: compiler.Cubin) -> Entry:
    _make(folder)
    sweep(folder)
    path = folder / f"{key}-nvrtc{cubin.nvrtc}-{_digest(cubin.image)}.cubin"
    handle, name = _part(folder)
    try:
        with open(handle, "wb") as file:
            file.write(cubin.image)
            file.flush()
            os.fsync(handle)
            if os.name == "posix":
                os.fchmod(handle, 0o644)  # whether others get this far is the folder's to say
                os.replace(name, path)  # while it is locked: nobody else takes it for what a killed writer left
        if os.name != "posix":  # where an open file cannot be renamed, nor removed by others
            os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return Entry(cubin.image, path, cubin.name, cubin.resources, cubin.nvrtc)


MOST_PARTS = 8
"""Files that are begun one after the other while others sweep them; so many only where nothing can be locked."""


def _part(folder: Path) -> tuple[int, str]:
    """A new file to write to, open and locked: what another process sweeps before that is begun again."""
    for left in reversed(range(MOST_PARTS)):
        handle, name = tempfile.mkstemp(prefix=f"{os.getpid()}-", suffix=".part", dir=folder)
        if (_lock(handle) and (os.name != "posix" or os.fstat(handle).st_nlink)) or not left:
            break
        os.close(handle)
        Path(name).unlink(missing_ok=True)
    return handle, name


def sweep(folder: Path) -> None:
    """Remove what killed writers left behind: files that nobody has locked, whatever the clock says."""
    for path in folder.glob("*.part"):
        try:
            with open(os.open(path, os.O_RDWR | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
                if os.name != "posix" or _lock(file.fileno()):
                    path.unlink()
        except OSError:  # another process was faster, or is still at it
            pass


def _lock(handle: int) -> bool:
    """Whether a file could be locked, which its closing undoes, and a process's end."""
    if os.name != "posix":
        return True
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # somebody else has it, or this file system knows no locks
        return False
    return True


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
