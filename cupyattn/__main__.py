"""``python -m cupyattn``: kernels compiled ahead of time, and what a bug report should say."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from cupyattn.cuda import info
from cupyattn.cuda.making import cache, compiler, prebuild


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m cupyattn", description="Exact attention: the GPU's kernels.")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="command")
    commands.add_parser("info", help="versions, GPUs, compiler and cache: for bug reports")
    ahead = commands.add_parser(
        "prebuild",
        help="compile kernels before they are needed",
        description="Compile kernels before they are needed; no GPU has to be there, only NVRTC.",
    )
    ahead.add_argument("--arch", type=_targets, help="sm_80,sm_90a,...; without it, this machine's GPUs")
    ahead.add_argument("--output", type=Path, metavar="FOLDER", help="instead of the user's cache")
    ahead.add_argument("--jobs", type=_positive, metavar="N", help="threads; without it, one per core")
    ahead.add_argument("--gradients", action="store_true", help="those of training, too")
    ahead.add_argument("--list", action="store_true", help="only say what there is to compile")
    given = parser.parse_args(arguments)
    if given.command == "info":
        print(info.report())
        return 0
    if given.command is None:
        parser.print_help()
        return 0
    targets = given.arch or _own_targets()
    if not targets:
        ahead.error("there is no GPU here to compile for; name the architectures: --arch sm_80,sm_90a")
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
        print(f"{ahead.prog}: {error}", file=sys.stderr)
        return 1
    summary = prebuild.prebuild(jobs, folder, sys.stderr, given.jobs)
    print(f"{summary}\n{folder}")
    return 1 if summary.failures else 0


def _targets(text: str) -> tuple[str, ...]:
    for target in text.split(","):
        number = re.fullmatch(r"sm_(\d{2,3})[af]?", target)
        if number is None:
            raise argparse.ArgumentTypeError(f"{target!r} is no architecture; they look like sm_80 or sm_90a")
        if int(number[1]) < 80:
            raise argparse.ArgumentTypeError(f"{target}: the kernels need sm_80 or newer (Ampere)")
    return tuple(text.split(","))


def _own_targets() -> tuple[str, ...]:
    capabilities = (capability for _, capability in info.devices() if capability >= (8, 0))
    return tuple(dict.fromkeys(map(compiler.target_for, capabilities)))


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _writable(output: Path | None) -> Path:
    """The folder to fill, made if it is not there: a cache that would not be read is not filled either."""
    folder = output or cache.user_folder()
    if folder is None:
        raise RuntimeError("this user has no home folder for a cache: --output FOLDER")
    folder.mkdir(mode=0o777 if output else 0o700, parents=True, exist_ok=True)
    if output is None and not cache.is_ours(folder):
        raise RuntimeError(f"{folder} belongs to another user, or others may write to it")
    return folder


if __name__ == "__main__":
    sys.exit(main())
