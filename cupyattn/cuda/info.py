"""What the GPU's side finds on this machine, for bug reports."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np

from cupyattn.cuda.making import cache, compiler


def devices() -> list[tuple[str, tuple[int, int]]]:
    """Name and compute capability of each GPU; none without CuPy or a driver."""
    try:
        import cupy
    except (ImportError, OSError):
        return []
    if not cupy.cuda.is_available():
        return []
    runtime = cupy.cuda.runtime
    found = (runtime.getDeviceProperties(index) for index in range(runtime.getDeviceCount()))
    return [(properties["name"].decode(), (properties["major"], properties["minor"])) for properties in found]


def report() -> str:
    """One fact a line."""
    from cupyattn import __version__

    rows = [
        ("cupyattn", __version__),
        ("Python", f"{platform.python_version()}, {platform.platform()}"),
        ("NumPy", np.__version__),
        *_cupy(),
        *((f"GPU {index}", _gpu(name, capability)) for index, (name, capability) in enumerate(devices())),
        ("NVRTC", _nvrtc()),
        ("prebuilt", _folder(cache.PREBUILT)),
        ("cache", _cache()),
    ]
    return "\n".join(f"{name:<10}{value}" for name, value in rows)


def _cupy() -> list[tuple[str, str]]:
    try:
        import cupy
    except (ImportError, OSError) as error:
        return [("CuPy", f"none: {error}")]
    version = cupy.cuda.runtime.driverGetVersion()
    driver = f"CUDA {version // 1000}.{version % 1000 // 10}" if version else "none"
    return [("CuPy", cupy.__version__), ("driver", driver)]


def _gpu(name: str, capability: tuple[int, int]) -> str:
    try:
        target = compiler.target_for(capability)
    except ValueError as error:
        target = str(error)
    return f"{name}, {target}"


def _nvrtc() -> str:
    try:
        nvrtc, version = compiler.load()
    except RuntimeError as error:
        return f"none: {error}"
    return f"{version}, knows {' '.join(f'sm_{number}' for number in nvrtc.getSupportedArchs())}"


def _folder(folder: Path) -> str:
    sizes = [path.stat().st_size for path in folder.glob("*.cubin")]
    return f"{len(sizes)} cubins, {sum(sizes) / 1e6:.1f} MB in {folder}"


def _cache() -> str:
    folder = cache.user_folder()
    if folder is None:
        return "none: this user has no home folder; CUPYATTN_CACHE_DIR can name another"
    if folder.exists() and not cache.is_ours(folder):
        return f"not used: {folder}, or a folder above it, belongs to another user, or others may write to it"
    return _folder(folder)
