"""``cupyattn prebuild``: kernels compiled ahead of time."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cupyattn.command import flags
from cupyattn.command.progress import Progress
from cupyattn.cuda import info
from cupyattn.cuda.making import cache, compiler, prebuild


def add(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    parser.add_argument(
        "--arch",
        type=flags.several(flags.target),
        metavar="TARGET,...",
        help="sm_80,sm_90a,...; without it, this machine's GPUs",
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="instead of the user's cache")
    parser.add_argument("--jobs", type=flags.positive, metavar="N", help="threads; without it, one per core")
    parser.add_argument("--gradients", action="store_true", help="those of training, too")
    parser.add_argument("--list", action="store_true", help="only say what there is to compile")


def run(parser: argparse.ArgumentParser, given: argparse.Namespace) -> int:
    """Compile; 1 if one could not be."""
    targets = given.arch or _own_targets()
    if not targets:
        parser.error("there is no GPU here to compile for; name the architectures: --arch sm_80,sm_90a")
    jobs = prebuild.jobs_for(targets, given.gradients)
    if given.list:
        for wanted, target in jobs:
            shape = f"{wanted.threads} threads, {wanted.shared_memory} bytes shared"
            print(f"{target:<8} {wanted.source}  {wanted.expression}  {shape}")
        return 0
    try:
        for target in targets:
            compiler.check(target)
        folder = _writable(given.output)
    except (RuntimeError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    with Progress(len(jobs), "compiling") as progress:
        summary = prebuild.prebuild(jobs, folder, progress.step, given.jobs)
    print(f"{summary}\n{folder}")
    return 1 if summary.failures else 0


def _own_targets() -> tuple[str, ...]:
    capabilities = (capability for _, capability in info.devices() if capability >= (8, 0))
    return tuple(dict.fromkeys(map(compiler.target_for, capabilities)))


def _writable(output: Path | None) -> Path:
    """The folder to fill, made if it is not there: a cache that would not be read is not filled either."""
    folder = output or cache.user_folder()
    if folder is None:
        raise RuntimeError("this user has no home folder for a cache: --output FOLDER")
    folder.mkdir(mode=0o777 if output else 0o700, parents=True, exist_ok=True)
    if output is None and not cache.is_ours(folder):
        raise RuntimeError(f"{folder} belongs to another user, or others may write to it")
    return folder
