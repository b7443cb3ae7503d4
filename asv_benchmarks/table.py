"""Every bar in one table, measured here and now.

    python asv_benchmarks/table.py [--quick] [--only MODULES] [--save NAME]

The benchmarks are asv's, run in this process one after the other.  --quick takes fewer turns and leaves
the long ones out; --only takes modules of benchmarks/, with commas between them, and is the only way to
`articles`, which has no bars; --save writes results/NAME.json as well.
"""

import argparse
import json
import os
import platform
import sys
import time
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path

from benchmarks import SUITE, articles, attention, caches, decode, memory, overhead, ragged, repeated
from benchmarks.common import fastest

from cupyattn.cpu import num_cores

WANTED = (
    attention.AgainstTorch.track_time,
    attention.TrainingAgainstTorch.track_time,
    attention.AgainstNaive.track_time,
    decode.DecodeAgainstTorch.track_time,
    memory.Memory.track_peak,
    attention.Rounding.track_wrong,
    attention.Rounding.track_largest,
    caches.Growth.track_appends,
    caches.Decode.track_attend,
    caches.Cascade.track_attend,
    ragged.Varlen.track_time,
    overhead.Busy.track_busy,
    overhead.Corridor.track_overhead,
    overhead.Rooms.time_call,
    overhead.Import.track_import,
    repeated.Repeated.track_read,
    repeated.Repeated.track_again,
)
FOR_ARTICLES = (
    articles.Standard.track_time,
    articles.StandardMemory.track_peak,
    articles.Grouped.track_time,
    articles.Cached.track_rate,
    articles.Padded.track_tokens,
    articles.Padded.track_time,
)
ALL = (*WANTED, *FOR_ARTICLES)
QUICK_TURNS = 2
QUIET = 0.1
"""Cores that others may keep busy without a remark."""


def class_of(method):
    """The class a benchmark was taken from."""
    return getattr(sys.modules[method.__module__], method.__qualname__.partition(".")[0])


def module_of(method):
    """The name of the module that a benchmark is in."""
    return method.__module__.rpartition(".")[2]


def cases(quick, only=None):
    """(benchmark, parameters) of every row; those of some modules."""
    for method in WANTED if only is None else [each for each in ALL if module_of(each) in only]:
        owner = class_of(method)
        for params in product(*getattr(owner, "params", ())):
            if not (quick and any(param in owner.slow for param in params)):
                yield method, params


def measure(method, params, quick):
    """One row: what was measured, in which unit, and the bar if there is one; a reason if it was not."""
    benchmark = class_of(method)()
    if quick:
        benchmark.turns = QUICK_TURNS
    names = getattr(benchmark, "param_names", ())
    row = {"benchmark": method.__qualname__, "params": dict(zip(names, params, strict=True))}
    try:
        if hasattr(benchmark, "setup"):
            benchmark.setup(*params)
    except NotImplementedError as reason:
        return {**row, "skipped": str(reason)}
    if not method.__name__.startswith("track_"):
        (seconds,) = fastest(lambda: method(benchmark, *params), turns=benchmark.turns)
        return {**row, "value": 1e6 * seconds, "unit": "us", "bar": None}
    bar = method.bar(*params) if callable(method.bar) else method.bar
    return {**row, "value": method(benchmark, *params), "unit": method.unit, "bar": bar}


class Neighbours:
    """The cores that other processes kept busy since this was made: what spoils a time the most."""

    def __init__(self):
        self.start = self.now()

    @staticmethod
    def now():
        """(seconds since some point, core seconds of all processes, those of this one and its children)."""
        try:
            user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
        except OSError:
            return None
        return time.perf_counter(), (user + nice + system) / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4])

    def cores(self):
        if self.start is None:
            return None
        elapsed, everybody, own = (now - then for now, then in zip(self.now(), self.start, strict=True))
        return round(max(0.0, everybody - own) / elapsed, 2)


def verdict(row):
    if "skipped" in row:
        return f"skipped: {row['skipped']}"
    if row["bar"] is None:
        return ""
    return "met" if row["value"] <= row["bar"] else "MISSED"


def machine():
    """What the numbers depend on."""

    def installed(package):
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    return {
        "cpu": cpu_model(),
        "cores": num_cores(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        **{package: installed(package) for package in ("numpy", "torch")},
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def cpu_model():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def show(machine, rows):
    """The table, as lines."""
    yield ", ".join(f"{name} {value}" for name, value in machine.items())
    title = None
    for row in rows:
        if row["benchmark"] != title:
            title = row["benchmark"]
            unit = f", {row['unit']}" if "unit" in row else ""
            yield f"\n{title}{unit}"
        what = ", ".join(f"{value}" for value in row["params"].values())
        value = f"{row['value']:.4g}" if "value" in row else ""
        bar = "" if row.get("bar") is None else f"<= {row['bar']:.4g}"
        busy = row["cores busy with others"] or 0.0
        noise = f"({busy:.1f} cores busy with others)" if busy > QUIET else ""
        yield f"    {what:<32}{value:>10}   {bar:<10}{verdict(row):<8}{noise}".rstrip()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer turns, without the long ones")
    parser.add_argument("--only", metavar="MODULES", help="of benchmarks/, with commas between them")
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json as well")
    arguments = parser.parse_args()
    only, modules = arguments.only and arguments.only.split(","), sorted(set(map(module_of, ALL)))
    if only and not set(only) <= set(modules):
        parser.error(f"--only takes {', '.join(modules)}")
    found = {"machine": machine(), "quick": arguments.quick, "rows": []}
    wanted = list(cases(arguments.quick, only))
    for number, (method, params) in enumerate(wanted, 1):
        words = " ".join(map(str, (method.__qualname__, *params)))
        print(f"[{number}/{len(wanted)}] {words}", end=" ", file=sys.stderr, flush=True)
        neighbours = Neighbours()
        row = measure(method, params, arguments.quick)
        row["cores busy with others"] = neighbours.cores()
        found["rows"].append(row)
        print(f"{row['value']:.4g} {row['unit']}" if "value" in row else "skipped", file=sys.stderr)
    print("\n".join(show(found["machine"], found["rows"])))
    if arguments.save:
        path = SUITE / "results" / f"{arguments.save}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
