"""C++ against the runtime, made a library by g++ once for all processes, and launched.

library = ctypes.CDLL(made("#include ...", "-O0", folder))
error = launch(library, record, rows, visits, grid=(1, 1, 1), threads=32)
"""

import ctypes
import fcntl
import functools
import getpass
import hashlib
import os
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
RUNTIME = HERE / "runtime"
FLAGS = ("-std=c++17", "-fwrapv", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-w")
with suppress(OSError):
    _features = Path("/proc/cpuinfo").read_text().split()
    FLAGS += tuple(f"-m{name}" for name in ("avx2", "fma", "f16c") if name in _features)


class BuildError(Exception):
    """What g++ had to say."""


def folder_of_user():
    """One for all runs of this user."""
    return Path(tempfile.gettempdir()) / f"cupyattn-ptx-{getpass.getuser()}"


# ---- Launches --------------------------------------------------------------------------------------------------------


class Request(ctypes.Structure):
    """`Request` of runtime/machine.h."""

    _fields_ = (
        ("parameters", ctypes.c_char_p),
        ("parameter_bytes", ctypes.c_uint32),
        ("grid", ctypes.c_int32 * 3),
        ("threads", ctypes.c_int32),
        ("cluster", ctypes.c_int32),
        ("shared_bytes", ctypes.c_int64),
        ("buffers", ctypes.c_void_p),
        ("num_buffers", ctypes.c_int64),
        ("schedule", ctypes.c_int32),
        ("checks_races", ctypes.c_int32),
        ("seed", ctypes.c_uint64),
        ("message", ctypes.c_void_p),
        ("message_bytes", ctypes.c_int64),
        ("visits", ctypes.c_void_p),
    )


def launch(library, record, buffers, visits, grid, threads, cluster, shared_memory, schedule, seed, check_races):
    """What the runtime reports, or None.

    `buffers` are rows of address, bytes and writable; visits of each block are written to `visits`, of uint64.
    """
    table = np.array(buffers, np.uint64).reshape(-1, 3)
    message = ctypes.create_string_buffer(4096)
    request = Request(
        record, len(record), (ctypes.c_int32 * 3)(*grid), threads, cluster, shared_memory, table.ctypes.data,
        len(table), schedule, check_races, seed, ctypes.addressof(message), len(message), visits.ctypes.data,
    )  # fmt: skip
    failed = library.executor_launch(ctypes.byref(request))
    return message.value.decode() if failed else None


# ---- g++ -------------------------------------------------------------------------------------------------------------


def made(text, optimisation, folder=None):
    """The path of a library: the text compiled, and linked with the runtime."""
    folder = Path(folder or folder_of_user())
    runtime = _compiled(folder, "o", (*FLAGS, "-O2", "-c"), (RUNTIME / "runtime.cpp").read_text())
    flags = (*FLAGS, optimisation)
    # A third of the time went into reading headers.
    thread = _compiled(folder, "h.gch", (*flags, "-x", "c++-header"), '#include "thread.h"\n')
    thread.with_suffix("").touch()  # by whose name g++ finds it
    return _compiled(folder, "so", (*flags, "-shared", "-include", str(thread.with_suffix(""))), text, runtime)


def _compiled(folder, suffix, flags, text, *objects):
    """What g++ makes of a text, found again by all that it depends on; whole or not at all."""
    key = repr((text, flags, _headers(), _compiler_version(), list(map(str, objects))))
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.{suffix}"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other test processes may want it too, and one compiler is enough
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=folder) as here:
                (Path(here) / "text.cpp").write_text(text)
                command = ["g++", *flags, f"-I{RUNTIME}", "text.cpp", *map(str, objects), "-o", "made"]
                done = subprocess.run(command, cwd=here, capture_output=True, text=True)
                if done.returncode:
                    raise BuildError(done.stderr)
                os.replace(Path(here) / "made", path)
    return path


def _headers():
    """Of the runtime: what a kernel's text and the runtime depend on."""
    files = [*RUNTIME.glob("*.h"), *RUNTIME.glob("*.cpp"), HERE.parent / "emulator" / "fiber.h"]
    return sorted((file.name, file.read_text()) for file in files)


@functools.cache
def _compiler_version():
    return subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout
