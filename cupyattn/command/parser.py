"""Which commands there are."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from cupyattn.command import cubins, doctor, explaining, kernels, timing
from cupyattn.cuda import info

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

COMMANDS = {
    "explain": (
        explaining,
        "what attention would do, and why not otherwise",
        "What `attention` would do; no GPU needed.",
    ),
    "bench": (
        timing,
        "measure this machine",
        "Measure attention on this machine, beside torch's or the naive formula.",
    ),
    "doctor": (
        doctor,
        "what is here, what would run where, what is broken",
        "What is installed and found here, with a line of advice where something could be better; 1 if it is broken.",
    ),
    "prebuild": (
        kernels,
        "compile kernels before they are needed",
        "Compile kernels before they are needed; no GPU has to be there, only NVRTC.",
    ),
    "cache": (
        cubins,
        "the compiled kernels that are kept: list, size, clear",
        "The compiled kernels that are kept on disk. To remove them costs nothing but compiling them again.",
    ),
}


class Parser(argparse.ArgumentParser):
    """An error is one sentence, not a page of flags before it; a window may begin with -1."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._negative_number_matcher = re.compile(r"-\d+(,-?\d+)?")  # or argparse takes "-1,0" for a flag

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")

    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        """Unlike argparse's, which says nothing of a pipe that is closed where nothing is buffered."""
        if message:
            (file or sys.stderr).write(message)


def run(arguments: Sequence[str] | None) -> int:
    """Run one command; the exit status."""
    from cupyattn import __version__

    parser = Parser(prog="cupyattn", description="Exact attention for any array.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"cupyattn {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="say which kernels are compiled, and when")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="command")
    rooms = {}
    for name, (room, help_, description) in COMMANDS.items():
        own = commands.add_parser(name, help=help_, description=description, allow_abbrev=False)
        room.add(own)
        rooms[name] = (room, own)
    commands.add_parser("info", help="versions, GPUs, compiler and cache, a fact a line: for bug reports")
    given = parser.parse_args(arguments)
    if given.verbose:
        logging.basicConfig(format="%(message)s")
        logging.getLogger("cupyattn").setLevel(logging.INFO)
    if given.command is None:
        parser.print_help()
        return 0
    if given.command == "info":
        print(info.report())
        return 0
    room, own = rooms[given.command]
    status: int = room.run(own, given)
    return status
