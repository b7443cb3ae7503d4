"""``cupyattn doctor``: what is here, what would run where, and what is broken."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from cupyattn.command import devices, findings
from cupyattn.command.findings import Finding
from cupyattn.command.progress import Progress


def add(parser: argparse.ArgumentParser) -> None:
    """The flags: none."""


def run(parser: argparse.ArgumentParser, given: argparse.Namespace) -> int:
    """Print all findings; 1 if something is broken."""
    with Progress(len(findings.REQUIRED) + len(findings.OPTIONAL) + 1, "importing") as progress:
        sections = {
            "Packages": list(findings.packages(progress.step)),
            "CPU": list(findings.processor()),
            "GPU": list(devices.gpus(progress.step)),
            "Compiled kernels": list(devices.kept()),
            "What runs where": list(devices.runs()),
        }
    width = max(len(finding.what) for section in sections.values() for finding in section)
    for name, section in sections.items():
        print("\n".join([name, *(_said(finding, width) for finding in section), ""]))
    everything = [finding for section in sections.values() for finding in section]
    print(verdict(everything))
    return int(any(finding.broken for finding in everything))


def verdict(everything: Iterable[Finding]) -> str:
    """The last line."""
    broken = [finding.what for finding in everything if finding.broken]
    return f"Broken: {', '.join(broken)}." if broken else "Nothing is broken."


def _said(finding: Finding, width: int) -> str:
    mark = "BROKEN" if finding.broken else "note" if finding.advice else "ok"
    line = f"  {mark:<6}  {finding.what:<{width}}  {finding.found}"
    return f"{line}\n{'':<{width + 12}}-> {finding.advice}" if finding.advice else line
