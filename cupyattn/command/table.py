"""Numbers under each other."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], left: int = 1, indent: str = "") -> str:
    """Lines of columns that are as wide as they need to be; the first row is their heads.

    Parameters
    ----------
    rows : sequence of sequence of str
        All of one length.
    left : int
        So many columns begin on the left, like words; the others end on the right, like numbers.
    indent : str
        What each line begins with.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = (
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append(f"{indent}{'  '.join(cells)}".rstrip())
    return "\n".join(lines)


def of_bytes(count: float) -> str:
    """A number of bytes as people say it, "12.3 MB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
