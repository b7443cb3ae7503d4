"""``cupyattn cache``: the compiled kernels that are kept on disk, listed, counted and removed."""

from __future__ import annotations

import argparse
import sys
from datetime import datetime
from pathlib import Path

from cupyattn.command.table import aligned, of_bytes
from cupyattn.cuda.making import cache, keeping


def add(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    parser.add_argument("action", choices=("list", "size", "clear"), help="what to do with them")
    parser.add_argument("--all-versions", action="store_true", help="those of other versions of cupyattn, too")
    parser.add_argument("--dry-run", action="store_true", help="clear: only say what would be removed")


def run(parser: argparse.ArgumentParser, given: argparse.Namespace) -> int:
    """Do it; 1 if something could not be removed, or there is no place for a cache."""
    if given.dry_run and given.action != "clear":
        parser.error("argument --dry-run: goes with clear; list and size remove nothing anyway")
    own = cache.user_folder()
    if own is None:
        print(f"{parser.prog}: this user has no home folder; CUPYATTN_CACHE_DIR can name another", file=sys.stderr)
        return 1
    folders = keeping.folders(given.all_versions)
    if not folders:
        print(f"empty: {own.parent if given.all_versions else own}")
        return 0
    if given.action == "clear":
        return _clear(folders, given.dry_run)
    for folder in folders:
        rows = keeping.kept(folder)
        if given.action == "list":
            print(_listed(rows))
        print(f"{len(rows)} cubins, {of_bytes(sum(row.num_bytes for row in rows))} in {folder}")
    return 0


def _listed(rows: list[keeping.Kept]) -> str:
    heads = ("kernel", "for", "NVRTC", "made", "size")
    cells = (
        (
            row.kernel,
            row.target,
            row.nvrtc,
            f"{datetime.fromtimestamp(row.modified):%Y-%m-%d %H:%M}",
            of_bytes(row.num_bytes),
        )
        for row in rows
    )
    return aligned([heads, *cells], left=4)


def _clear(folders: list[Path], pretend: bool) -> int:
    status = 0
    for folder in folders:
        cleared = keeping.clear(folder, pretend)
        word = "would remove" if pretend else "removed"
        print(f"{word} {cleared.num_files} cubins, {of_bytes(cleared.num_bytes)}, of {folder}")
        for sentence in cleared.left:
            print(f"left: {sentence}", file=sys.stderr)
            status = 1
    return status
