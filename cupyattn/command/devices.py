"""What the doctor finds of GPUs, the compiler, and the kernels that are kept; and what would run where."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from cupyattn.command.findings import Finding, version_of
from cupyattn.command.table import of_bytes
from cupyattn.cuda import info
from cupyattn.cuda.making import cache, compiler, keeping
from cupyattn.explaining import explain

CALLS = {"prefill": (4096, 4096), "decode": (1, 4096)}
"""(queries, keys) of what would run."""
LITTLE = 1e9
"""Bytes free on a disk that will soon be full of other things."""


def gpus(step: Callable[[str], object]) -> Iterator[Finding]:
    """Driver, CuPy, GPUs and compiler."""
    driver = driver_version()
    yield Finding("driver", f"CUDA {driver[0]}.{driver[1]}" if driver else "none, or no NVIDIA GPU")
    step("cupy")
    devices, reason = seen_devices()
    yield cupy(driver, devices, reason)
    yield from (gpu(index, *device) for index, device in enumerate(devices))
    yield nvrtc(driver)


def driver_version() -> tuple[int, int] | None:
    """The version of CUDA that the driver supports, asked of the driver itself: CuPy need not be there."""
    name = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
    try:
        library: Any = ctypes.CDLL(name)
        version = ctypes.c_int()
        if library.cuDriverGetVersion(ctypes.byref(version)) != 0 or version.value == 0:
            return None
    except (OSError, AttributeError):
        return None
    return version.value // 1000, version.value % 1000 // 10


def seen_devices() -> tuple[list[tuple[str, tuple[int, int]]], str]:
    """Name and compute capability of the GPUs that CuPy sees, and what went wrong, if something did."""
    try:
        return info.devices(), ""
    except Exception as error:  # whatever a driver and a library make of each other
        return [], str(error).splitlines()[0] if str(error) else type(error).__name__


def cupy(driver: tuple[int, int] | None, devices: list[Any], reason: str) -> Finding:
    """Whether it is there, once, for this driver, and sees a GPU."""
    names = _distributions_of_cupy()
    install = f"pip install cupyattn[cuda{min(driver[0], 13)}]" if driver and driver[0] >= 12 else compiler.INSTALL
    if not names:
        advice = f"for kernels on the GPU: {install}" if driver else ""
        return Finding("CuPy", "not installed", advice)
    found = ", ".join(f"{name} {version_of(name)}" for name in names)
    if len(names) > 1:
        others = " ".join(names)
        return Finding("CuPy", found, f"one at a time: pip uninstall {others}, and then {install}", broken=True)
    if reason:
        return Finding("CuPy", f"{found}: {reason}", f"driver and CuPy do not go together: {install}", broken=True)
    if driver and not devices:
        return Finding("CuPy", f"{found}, which sees no GPU", f"CUDA_VISIBLE_DEVICES, permissions, or {install}", True)
    return Finding("CuPy", found if devices else f"{found}, no GPU")


def gpu(index: int, name: str, capability: tuple[int, int]) -> Finding:
    """What is compiled for it."""
    try:
        return Finding(f"GPU {index}", f"{name}, {compiler.target_for(capability)}")
    except ValueError as error:
        return Finding(f"GPU {index}", name, f"{error}; its arrays have to be moved to the CPU")


def nvrtc(driver: tuple[int, int] | None) -> Finding:
    """The compiler, and whether the driver can load what it makes."""
    try:
        _, version = compiler.load()
    except RuntimeError as error:
        if driver is None:
            return Finding("NVRTC", "not here, nor needed without a GPU")
        return Finding("NVRTC", "not to be loaded", str(error), broken=bool(_distributions_of_cupy()))
    major = int(version.partition(".")[0])
    if driver and major > driver[0]:
        advice = f"pip install 'nvidia-cuda-nvrtc=={driver[0]}.*' and CuPy for CUDA {driver[0]}, or a newer driver"
        return Finding("NVRTC", f"{version}, newer than the driver's CUDA {driver[0]}", advice, broken=True)
    return Finding("NVRTC", version)


def _distributions_of_cupy() -> list[str]:
    """By whatever names it is installed: "cupy-cuda13x", or "cupy" where somebody has built it."""
    names = {(one.name or "").lower() for one in metadata.distributions()}
    return sorted(name for name in names if name == "cupy" or name.startswith(("cupy-cuda", "cupy-rocm")))


# ---------------------------------------------------------------------------------------------------
# Kernels that are kept
# ---------------------------------------------------------------------------------------------------


def kept() -> Iterator[Finding]:
    """Those in the wheel, and the user's cache: where, whose, how large."""
    yield Finding("prebuilt", _counted(cache.PREBUILT) if cache.PREBUILT.is_dir() else "none in this installation")
    folder = cache.user_folder()
    if folder is None:
        advice = "kernels are compiled in each process: CUPYATTN_CACHE_DIR can name a folder"
        yield Finding("cache", "this user has no home folder", advice)
    elif not folder.exists():
        yield _to_be_made(folder)
    elif not cache.is_ours(folder):
        advice = f"it is neither read nor written: chmod go-w {folder} and the folders above it, or CUPYATTN_CACHE_DIR"
        yield Finding("cache", f"{folder}, which is another user's, or others may write to it", advice, broken=True)
    elif not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        yield Finding("cache", f"{folder}, which this user cannot write to", f"chmod u+rwx {folder}", broken=True)
    else:
        free = shutil.disk_usage(folder).free
        advice = f"only {of_bytes(free)} are free on its disk" if free < LITTLE else ""
        yield Finding("cache", f"{_counted(folder)}, mode {folder.stat().st_mode & 0o777:o}", advice)


def _to_be_made(folder: Path) -> Finding:
    above = next(each for each in folder.parents if os.path.lexists(each))
    if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        advice = f"{above} is no folder that this user can write to: CUPYATTN_CACHE_DIR can name another"
        return Finding("cache", f"{folder}, which cannot be made", advice, broken=True)
    if not cache.may_be_made(folder):
        advice = f"others may write to {above}: chmod go-w {above}, or CUPYATTN_CACHE_DIR"
        return Finding("cache", f"{folder}, which will not be made", advice, broken=True)
    return Finding("cache", f"{folder}, made when it is needed")


def _counted(folder: Path) -> str:
    rows = keeping.kept(folder)
    return f"{len(rows)} cubins, {of_bytes(sum(row.num_bytes for row in rows))} in {folder}"


# ---------------------------------------------------------------------------------------------------
# What would run where
# ---------------------------------------------------------------------------------------------------


def runs() -> Iterator[Finding]:
    """On the CPU, and on each GPU that CuPy sees."""
    shapes = {name: ((1, rows, 32, 128), *2 * ((1, keys, 8, 128),)) for name, (rows, keys) in CALLS.items()}
    plan = explain(*shapes["prefill"], device="cpu")
    words = f"NumPy, on up to {plan.num_workers} threads; float64 arithmetic, or compute_dtype='float32'"
    yield Finding("on the CPU", words)
    for index, (name, capability) in enumerate(seen_devices()[0]):
        if capability >= (8, 0):
            yield _run_on(index, name, shapes)


def _run_on(index: int, name: str, shapes: dict[str, Any]) -> Finding:
    import cupy

    try:
        with cupy.cuda.Device(index):
            kernels = {
                call: explain(*(cupy.empty(shape, cupy.float16) for shape in three)).kernel
                for call, three in shapes.items()
            }
    except Exception as error:  # no memory, a GPU that does not answer: it is the finding
        return Finding(f"on GPU {index}", f"{name}: {error}", "nvidia-smi may say more", broken=True)
    return Finding(f"on GPU {index}", ", ".join(f"{call}: {kernel}" for call, kernel in kernels.items()))
