"""Which calls of which kernels `make test` runs: chosen so that they cover what all of them cover, at the least cost.

What there is to cover: every instruction form that occurs in a default kernel, every value of every template argument
of a source, every architecture, every schedule.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

from proofs.calls import Kernel
from ptx.compiled import joined, ptx_of
from ptx.text import read

FILE = Path(__file__).with_name("share.json")


class Pair(NamedTuple):
    """A call of a kernel, in a schedule."""

    kernel: Kernel
    call: str
    schedule: int


class Measured(NamedTuple):
    """What a pair did when it was run."""

    pair: Pair
    forms: frozenset[str]
    seconds: float
    to_compile: float
    """Seconds for its kernel, once."""


def forms_of(text):
    """Opcodes with all modifiers of the instructions of a PTX text."""
    return {re.sub(r"^@!?[\w$%]+ ", "", x).partition(" ")[0] for x in read(text).instructions.values()}


def forms_of_kernel(kernel, nvrtc=None):
    """The same, of what NVRTC makes of a kernel."""
    return forms_of(ptx_of(joined(kernel.source), kernel.expression, kernel.target, nvrtc)[1])


def switches_of(kernel):
    """What is chosen by a kernel's template arguments, and for which architecture it is compiled."""
    return {f"{kernel.source} {name}={value}" for name, value in kernel.traits.items()} | {
        f"{kernel.source} for {kernel.target}",
        f"{kernel.source} again={kernel.is_again}",
    }


def candidates(kernels):
    """Kernels that have all template arguments of all of them, small ones for choice: those that are run to choose."""
    left, found = set().union(*map(_promised_by, kernels)), []
    while left:
        best = max(kernels, key=lambda kernel: len(_promised_by(kernel) & left) / _size(kernel))
        found.append(best)
        left -= _promised_by(best)
    return found


def _promised_by(kernel):
    """Switches, and where products have forms of their own for each width: how wide they are, and of which numbers."""
    x = kernel.traits
    wide = ("head_dim_v", "block_k", "cluster") if kernel.source == "hopper.cu" else ()
    return switches_of(kernel) | {f"hopper.cu {name}={x[name]} of {x['element']}" for name in wide}


def _size(kernel):
    """About how long its text is, and so how long it takes to compile."""
    x = kernel.traits
    planes = 3 if x["element"] == "float" else 1
    return 1.0 + planes * (x.get("head_dim", 0) + x.get("head_dim_v", 0)) / (
        256 if kernel.source == "hopper.cu" else 512
    )


def covered_by(measured):
    """Of what there is to cover."""
    pair = measured.pair
    return measured.forms | switches_of(pair.kernel) | {f"{pair.kernel.source} in schedule {pair.schedule}"}


def choose(measured):
    """A greedy set cover: again and again the pair that covers most that is new for a second of its costs."""
    left = frozenset().union(*map(covered_by, measured))
    covers = {each.pair: covered_by(each) for each in measured}
    chosen, compiled = [], set()
    while left:
        best = max(measured, key=lambda each: _worth(each, covers[each.pair] & left, compiled))
        left -= covers[best.pair]
        chosen.append(best)
        compiled.add(best.pair.kernel)
    # What came early may be covered by what came late.
    for each in list(chosen):
        others = [covers[other.pair] for other in chosen if other is not each]
        if covers[each.pair] <= frozenset().union(*others):
            chosen.remove(each)
    return chosen


def _worth(measured, new, compiled):
    """What is newly covered for a second."""
    cost = measured.seconds + (0.0 if measured.pair.kernel in compiled else measured.to_compile)
    return len(new) / (0.05 + cost)


def write(chosen, forms):
    """`forms` are all that any default kernel has."""
    pairs = [{**each.pair.kernel._asdict(), "call": each.pair.call, "schedule": each.pair.schedule} for each in chosen]
    pairs.sort(key=lambda pair: (pair["source"], pair["target"], pair["expression"], pair["call"]))
    FILE.write_text(json.dumps({"pairs": pairs, "forms": sorted(forms)}, indent=1) + "\n")


def load():
    """(pairs, forms)."""
    found = json.loads(FILE.read_text())
    pairs = [Pair(Kernel(x["target"], x["source"], x["expression"]), x["call"], x["schedule"]) for x in found["pairs"]]
    return pairs, frozenset(found["forms"])
