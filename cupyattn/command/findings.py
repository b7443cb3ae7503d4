"""What is installed here, and what this process may have of the machine: a line each, some with advice."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cupyattn import numpy_ref
from cupyattn.api import attention
from cupyattn.command.table import of_bytes
from cupyattn.command.undisturbed import import_undisturbed
from cupyattn.cpu import memory_of_machine, num_cores
from cupyattn.explaining import explain

REQUIRED = {"numpy": "2.0", "array-api-compat": "1.11", "threadpoolctl": "3.5"}
"""The oldest versions, as in pyproject.toml."""
OPTIONAL = {
    "torch": ("2.6", "for torch tensors, and as a peer of `cupyattn bench`", "cupyattn[torch]"),
    "jax": ("0.5", "for JAX arrays", "cupyattn[jax]"),
    "dask": ("2025.1", "for dask arrays", "cupyattn[dask]"),
    "ml_dtypes": ("0.5", "for bfloat16 and float8 in NumPy", "ml_dtypes"),
    "transformers": ("5", "for cupyattn.integrations.transformers", "cupyattn[transformers]"),
    "tqdm": ("4.66", "for bars of progress", "cupyattn[cli]"),
    "matplotlib": ("3.10", "for `cupyattn bench --picture`", "cupyattn[cli]"),
}
"""{name: (oldest version, what for, what to ask pip for)}; CuPy is with the GPUs."""
THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "OMP_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
"""What limits a BLAS, and cupyattn with it."""
APART = 1e-13
"""Largest difference of a result from the definition that is not a bug."""

REPORT = "this is a bug: report it with what `cupyattn info` prints"


class Finding(NamedTuple):
    """One line of the doctor's."""

    what: str
    found: str
    advice: str = ""
    broken: bool = False


# ---------------------------------------------------------------------------------------------------
# Packages
# ---------------------------------------------------------------------------------------------------


def packages(step: Callable[[str], object]) -> Iterator[Finding]:
    """Python, cupyattn, what it needs, and whose arrays it may meet; each is imported, which is what can fail."""
    from cupyattn import __version__

    advice = "" if sys.version_info >= (3, 11) else "cupyattn needs Python 3.11 or newer"
    yield Finding("Python", f"{platform.python_version()}, {sys.executable}", advice, bool(advice))
    yield Finding("cupyattn", f"{__version__}, {Path(__file__).parents[1]}")
    for name, oldest in REQUIRED.items():
        step(name)
        yield _required(name, oldest)
    for name, (oldest, what_for, package) in OPTIONAL.items():
        step(name)
        yield _optional(name, oldest, what_for, package)


def _required(name: str, oldest: str) -> Finding:
    version = version_of(name)
    if version is None:
        return Finding(name, "not installed", f"pip install '{name}>={oldest}'", broken=True)
    if older(version, oldest):
        return Finding(name, version, f"too old: pip install --upgrade '{name}>={oldest}'", broken=True)
    return Finding(name, version)


def _optional(name: str, oldest: str, what_for: str, package: str) -> Finding:
    version = version_of(name)
    if version is None:
        return Finding(name, "not installed", f"{what_for}: pip install {package}")
    try:
        import_undisturbed(name)
    except Exception as error:  # whatever: it is the finding
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Finding(name, f"{version}, which cannot be imported: {reason}", f"pip install --upgrade {name}", True)
    if older(version, oldest):
        return Finding(name, version, f"older than was tested: pip install --upgrade '{name}>={oldest}'")
    return Finding(name, version)


def version_of(name: str) -> str | None:
    """The installed version of a distribution; None: there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def older(version: str, oldest: str) -> bool:
    """Whether a version comes before another one; "" is the oldest of all."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", text.partition("+")[0])]

    return numbers(version) < numbers(oldest)


# ---------------------------------------------------------------------------------------------------
# The CPU
# ---------------------------------------------------------------------------------------------------


def processor() -> Iterator[Finding]:
    """BLAS, cores, memory, and whether a small call comes out right."""
    yield blas()
    yield cores()
    yield Finding("memory", f"{of_bytes(memory_of_machine())} for this process at most")
    yield small_call()


def blas() -> Finding:
    """Whose matrix products NumPy calls."""
    from threadpoolctl import threadpool_info

    found = [library for library in threadpool_info() if library["user_api"] == "blas"]
    if not found:
        advice = "threadpoolctl does not know NumPy's BLAS: limit its threads to 1 where cupyattn is slow"
        return Finding("BLAS", "unknown", advice)
    words = (f"{one['internal_api']} {one['version']}, {one['num_threads']} threads" for one in found)
    return Finding("BLAS", "; ".join(words))


def cores() -> Finding:
    """How many there are, may be used, and are."""
    allowed, quota = num_cores(), cpu_quota()
    limits = {name: os.environ[name] for name in THREADS if name in os.environ}
    shape = (1, 4096, 32, 64)
    workers = explain(shape, shape, shape, device="cpu").num_workers
    parts = [f"{os.cpu_count()} in the machine", f"{allowed} for this process"]
    parts += [] if quota is None else [f"time of {quota:g} by its cgroup"]
    parts += [f"{name}={value}" for name, value in limits.items()]
    advice = ""
    if quota is not None and quota < workers:
        fewer = max(1, int(quota))
        advice = f"threads that get no time make others wait: set OPENBLAS_NUM_THREADS={fewer}"
    elif workers < allowed and limits:
        advice = f"{' and '.join(limits)} holds cupyattn to {workers} of {allowed} cores; unset it to use them all"
    return Finding("cores", f"{', '.join(parts)}; cupyattn takes {workers}", advice)


def cpu_quota(groups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """The cores whose time this process's control group, or one above it, may have; None: no limit."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    named = [line.split(":", 2)[2].strip("/") for line in lines if line.startswith("0::")]
    folder = groups / named[0] if named else groups
    quotas = []
    for each in (folder, *folder.parents):
        if each == groups or groups in each.parents:
            quotas += [each / "cpu.max"]
    found = [quota for path in quotas if (quota := _quota(path)) is not None]
    old = _quota(groups / "cpu" / "cpu.cfs_quota_us", groups / "cpu" / "cpu.cfs_period_us")
    return min([*found, *([] if old is None else [old])], default=None)


def _quota(*paths: Path) -> float | None:
    """Of "200000 100000" in one file, or in two: 2.0; of "max" or -1, and where there is no file, None."""
    try:
        quota, period = " ".join(path.read_text() for path in paths).split()
        return float(quota) / float(period) if float(quota) > 0 else None
    except (OSError, ValueError):
        return None


def small_call() -> Finding:
    """Attention of a few tokens, against the definition."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, 9, 8)) for _ in range(3))
    expected = numpy_ref.attention(q, k, v, scale=8**-0.5).out
    try:
        apart = float(np.abs(attention(q, k, v, layout="bhsd") - expected).max())
    except Exception as error:  # whatever: it is the finding
        return Finding("a small call", f"{type(error).__name__}: {error}", REPORT, broken=True)
    if apart <= APART:
        return Finding("a small call", f"right, to {apart:.0e}")
    return Finding("a small call", f"wrong by {apart:.0e}", REPORT, broken=True)
