"""Compiling many kernels ahead of time: into the user's cache, or into a folder for a wheel."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from cupyattn.cuda.making import cache
from cupyattn.cuda.making.catalogue import of_gradients, specialisations
from cupyattn.cuda.making.module import Specialisation

Job = tuple[Specialisation, str]
"""What to compile, and for which architecture."""


@dataclass(frozen=True)
class Summary:
    """What came of it."""

    compiled: int
    kept: int
    """Cubins that were there already."""
    num_bytes: int
    seconds: float
    failures: tuple[tuple[Job, str], ...]

    def __str__(self) -> str:
        size = f"{self.num_bytes / 1e6:.1f} MB"
        counts = f"{self.compiled} compiled, {self.kept} there already, {len(self.failures)} failed"
        lines = [
            f"failed: {wanted.source} {wanted.expression} for {target}\n{reason}"
            for (wanted, target), reason in self.failures
        ]
        return "\n".join([*lines, f"{counts}; {size} in {self.seconds:.1f} s"])


def jobs_for(targets: Iterable[str], gradients: bool = False) -> list[Job]:
    """What there is to compile for these architectures; launched in two ways, a kernel is compiled once."""
    jobs = {
        (wanted.source, wanted.expression, target): (wanted, target)
        for target in targets
        for wanted in (*specialisations(target), *(of_gradients(target) if gradients else ()))
    }
    return list(jobs.values())


def num_workers() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prebuild(jobs: Sequence[Job], folder: Path, step: Callable[[str], object], workers: int | None = None) -> Summary:
    """Compile what is not in the folder yet, on several threads: NVRTC lets go of the GIL.

    `step` is told of each that is done, "flash.cu for sm_90a".
    """
    start = time.monotonic()
    compiled = kept = num_bytes = 0
    failures: list[tuple[Job, str]] = []
    with ThreadPoolExecutor(workers or num_workers(), "cupyattn") as pool:
        running = {pool.submit(_build, job, folder): job for job in jobs}
        try:
            for future in as_completed(running):
                wanted, target = job = running[future]
                if error := future.exception():
                    failures.append((job, str(error) or type(error).__name__))
                else:
                    entry, is_new = future.result()
                    compiled, kept = compiled + is_new, kept + (not is_new)
                    num_bytes += len(entry.image)
                step(f"{wanted.source} for {target}")
        except BaseException:  # Ctrl-C: finish what is being compiled, and no more
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return Summary(compiled, kept, num_bytes, time.monotonic() - start, tuple(failures))


def _build(job: Job, folder: Path) -> tuple[cache.Entry, bool]:
    wanted, target = job
    return cache.build(wanted.source, wanted.expression, target, folder)
