"""Compiling many kernels ahead of time: into the user's cache, or into a folder for a wheel."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

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


class Progress:
    """How far it is: one line with a bar on a terminal, a line for every tenth in a log."""

    def __init__(self, total: int, stream: TextIO) -> None:
        self._total, self._stream, self._done = total, stream, 0
        self._terminal = stream.isatty()

    def step(self, what: str) -> None:
        """One more is done, the latest being `what`."""
        self._done += 1
        done, total = self._done, self._total
        count = f"{done:>{len(str(total))}}/{total}"
        if self._terminal:
            filled = 30 * done // total
            line = f"[{'#' * filled}{'-' * (30 - filled)}] {count}  {what}"
            width = shutil.get_terminal_size().columns - 1
            end = "\n" if done == total else ""
            self._stream.write(f"\r{line[:width]:<{width}}{end}")
        elif 10 * done // total > 10 * (done - 1) // total:
            self._stream.write(f"{count}  {what}\n")
        self._stream.flush()


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


def prebuild(jobs: Sequence[Job], folder: Path, stream: TextIO, workers: int | None = None) -> Summary:
    """Compile what is not in the folder yet, on several threads: NVRTC lets go of the GIL."""
    start = time.monotonic()
    progress = Progress(len(jobs), stream)
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
                progress.step(f"{wanted.source} for {target}")
        except BaseException:  # Ctrl-C: finish what is being compiled, and no more
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return Summary(compiled, kept, num_bytes, time.monotonic() - start, tuple(failures))


def _build(job: Job, folder: Path) -> tuple[cache.Entry, bool]:
    wanted, target = job
    return cache.build(wanted.source, wanted.expression, target, folder)
