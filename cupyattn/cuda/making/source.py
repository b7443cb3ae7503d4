"""One self-contained text out of a kernel's source and its headers.

NVRTC is given no include path and no other header exists for it, so the text is all that a kernel depends
on: the cache's key covers every header.  ``#line`` at each seam makes errors name the file and the line.
"""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = Path(__file__).parents[1]
"""Of the kernels; headers lie in folders of it, one for each altitude, and are included by their path from here."""

_INCLUDE = re.compile(r'\s*#\s*include\b\s*(?:"(?P<name>[^"]+)")?')
_ONCE = re.compile(r"\s*#\s*pragma\s+once\b")


def sources(folder: Path = FOLDER) -> tuple[str, ...]:
    """The names of all CUDA files, kernels (.cu) and headers (.cuh)."""
    return tuple(sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.cu*")))


def join(name: str, folder: Path = FOLDER) -> str:
    """The file `name`, with every quoted include in its place the first time it is met and left out afterwards.

    Raises
    ------
    FileNotFoundError
        A file is not there; the message says who asked for it.
    ValueError
        A file includes itself, by whatever detour, or includes something other than a file of ours.
    """
    met: set[str] = set()
    return "\n".join(_lines(name, folder, (), met)) + "\n"


def _lines(name: str, folder: Path, asked_by: tuple[str, ...], met: set[str]) -> list[str]:
    if name in asked_by:
        detour = " -> ".join((*asked_by[asked_by.index(name) :], name))
        raise ValueError(f"{name} includes itself: {detour}")
    if name in met:
        return []
    met.add(name)
    try:
        text = (folder / name).read_text(encoding="utf-8")
    except FileNotFoundError:
        by = f", which {asked_by[-1]} includes" if asked_by else ""
        raise FileNotFoundError(f"no CUDA source {name} in {folder}{by}") from None
    lines = [f'#line 1 "{name}"']
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        if include := _INCLUDE.match(line):
            header = include["name"]
            if header is None:
                rule = "only headers of this folder, in quotes, may be included"
                raise ValueError(f"{name}, line {number}: {rule}: {line.strip()}")
            lines += _lines(header, folder, (*asked_by, name), met)
            lines.append(f'#line {number + 1} "{name}"')
        elif _ONCE.match(line):
            lines.append("")  # an empty line, so that the next ones keep their numbers
        else:
            lines.append(line)
    return lines
