"""How far it is, and for how long: on a terminal alone.

tqdm draws it where it is installed: of the two libraries that everybody has, it is the one without dependencies, it
comes with torch's and transformers' worlds anyway, and it knows what a terminal does when its window changes.  (rich
would bring a Markdown parser and a syntax highlighter.)  Without it there is a plain line every two seconds.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, TextIO

EVERY = 2.0
"""Seconds between plain lines, and before the first one."""


class Progress:
    """Of something that takes seconds, a context.

    Parameters
    ----------
    total : float
        How much there is to do, in whatever unit; time left is reckoned by it.
    name : str
        What is done, in a word.
    stream : file, optional
        Default: ``sys.stderr``.  One that is no terminal is told nothing.
    """

    def __init__(self, total: float, name: str, stream: TextIO | None = None) -> None:
        self._total, self._name, self._done = total, name, 0.0
        self._stream = sys.stderr if stream is None else stream
        self._start = self._said = time.monotonic()
        self._bar = _bar(total, name, self._stream)
        self._plain = self._bar is None and self._stream.isatty()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def step(self, what: str, size: float = 1.0) -> None:
        """So much more is done, the latest being `what`."""
        self._done += size
        if self._bar is not None:
            self._bar.set_postfix_str(what, refresh=False)
            self._bar.update(size)
        elif self._plain and time.monotonic() >= self._said + EVERY:
            self._said = time.monotonic()
            self._stream.write(f"{self._name}: {self._words()}  {what}\n")
            self._stream.flush()

    def _words(self) -> str:
        share = min(1.0, self._done / self._total)
        left = (time.monotonic() - self._start) * (1 - share) / share
        return f"{share:.0%}, {_clock(left)} left"


def _bar(total: float, name: str, stream: TextIO) -> Any:
    """tqdm's; None without a terminal, or without tqdm."""
    if not stream.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    looks = "{desc}: {percentage:3.0f}%|{bar}| {remaining} left  {postfix}"
    return tqdm(total=total, desc=name, file=stream, leave=False, dynamic_ncols=True, bar_format=looks)


def _clock(seconds: float) -> str:
    """As on a clock, "01:05"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes:02}:{rest:02}"
