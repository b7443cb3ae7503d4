"""The command line, `cupyattn` or ``python -m cupyattn``; a room for each command.

- `parser`: which commands there are; `flags`: what their flags may say
- `explaining`: explain; `timing`: bench, `pictures` what it draws; `kernels`: prebuild; `cubins`: cache
- `doctor`: doctor, by `findings` about packages and cores and `devices` about GPUs and kernels
- `progress`: how far it is, on a terminal; `table`: numbers under each other; `undisturbed`: imports in one piece

Whatever happens, it ends in words and an exit status: 0 done, 1 not done, 2 a flag that cannot be, 130 after Ctrl-C,
141 where nobody reads what is printed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TextIO

__all__ = ["main"]

INTERRUPTED, UNREAD = 130, 141
"""What a shell says of a process that SIGINT or SIGPIPE has ended."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    arguments : sequence of str, optional
        What follows the program's name.  Default: ``sys.argv[1:]``.

    Returns
    -------
    int
        The exit status.

    Raises
    ------
    SystemExit
        A flag that cannot be, with status 2 after a sentence about it; or after ``--help`` and ``--version``.
    """
    try:
        try:
            from cupyattn.command import parser  # here, so that Ctrl-C during imports ends in words, too

            return parser.run(arguments)
        finally:
            if sys.stdout is not None:  # where it is closed, as by ``>&-``, there is none
                sys.stdout.flush()  # a closed pipe is found out here, not when the interpreter ends
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _say_no_more(sys.stdout, sys.stderr)
        return UNREAD
    except OSError as error:  # a full disk behind what is printed, for one
        with suppress(OSError):
            print(f"cupyattn: {error}", file=sys.stderr, flush=True)
        _say_no_more(sys.stdout)
        return 1


def _say_no_more(*streams: TextIO | None) -> None:
    """What is still to be flushed goes nowhere, instead of into the pipe once more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in filter(None, streams):
        os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
