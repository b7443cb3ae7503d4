"""``cupyattn bench``: attention on this machine, beside a peer's."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from cupyattn.command import contenders, flags
from cupyattn.command.contenders import Call, Sizes
from cupyattn.command.pictures import save_picture
from cupyattn.command.progress import Progress
from cupyattn.command.table import aligned
from cupyattn.command.undisturbed import import_undisturbed
from cupyattn.cpu import num_cores

SAMPLE, TURN = 0.001, 0.05
"""Seconds over which short calls are averaged, and for which one contender is called before the next."""
PAUSE = 0.2
"""Seconds between turns: the threads of a BLAS and of OpenMP spin for a while after their last work."""
FLOPS = 3e10
"""A second, of a core or two: by it only the time left is reckoned."""


def add(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    parser.add_argument(
        "--seqlen",
        type=flags.several(flags.positive),
        default=(256, 512, 1024, 2048),
        metavar="N,...",
        help="queries, and as many keys; default: 256,512,1024,2048",
    )
    parser.add_argument("--batch", type=flags.positive, default=1, metavar="N", help="default: 1")
    parser.add_argument("--num-heads", type=flags.positive, default=8, metavar="N", help="default: 8")
    parser.add_argument("--num-heads-kv", type=flags.positive, metavar="N", help="default: as many as query heads")
    parser.add_argument("--head-dim", type=flags.positive, default=64, metavar="N", help="default: 64")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32", "float64"), help="default: float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: tensors of torch; default: cpu")
    parser.add_argument("--against", choices=("torch", "naive"), help="default: torch if it is installed")
    parser.add_argument(
        "--turns", type=flags.positive, default=5, metavar="N", help="of which the best counts; default: 5"
    )
    parser.add_argument("--json", metavar="FILE", help="the numbers; - prints them instead of the table")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="a PNG or SVG; needs matplotlib")


def run(parser: argparse.ArgumentParser, given: argparse.Namespace) -> int:
    """Measure and print; 1 if a file could not be written."""
    _check(parser, given)
    against = given.against or _peer_here()
    dtype = given.dtype or "float32"
    found = {"when": datetime.now().astimezone().isoformat(timespec="seconds"), **_machine(given.device, against)}
    if found["load"] is not None and found["load"] > num_cores() / 2:
        print(f"others keep this machine busy (load {found['load']}): times will be too long", file=sys.stderr)
    sizes = [
        Sizes(given.batch, seqlen, given.num_heads, given.num_heads_kv or given.num_heads, given.head_dim)
        for seqlen in given.seqlen
    ]
    seconds_of = [max(TURN, 4.0 * each.num_scores * given.head_dim / FLOPS) + PAUSE for each in sizes]
    with Progress(given.turns * sum(seconds_of), "measuring") as progress:
        rows = []
        for each, seconds in zip(sizes, seconds_of, strict=True):
            calls, skipped = contenders.calls(each, dtype, given.causal, given.device, against)

            def step(what: str, size: float = seconds, seqlen: int = each.seqlen) -> None:
                progress.step(f"{what}, {seqlen} tokens", size)

            rows.append({"seqlen": each.seqlen, **measure(calls, given.turns, step), "skipped": skipped})
    found |= {"sizes": sizes[0]._asdict() | {"seqlen": list(given.seqlen)}, "dtype": dtype, "causal": given.causal}
    found |= {"against": against, "rows": rows}
    return _say(parser, given, found)


def measure(calls: dict[str, Call], turns: int, step: Callable[[str], object]) -> dict[str, Any]:
    """Seconds of a call by each contender, and how far its numbers are from those of float64 arithmetic.

    They take turns in one process, so that a noisy neighbour hits them all, and the best sample is one without a
    neighbour.  The first call of each is not timed: it meets cold caches, and compiles.
    """
    results = {name: call.result() for name, call in calls.items()}
    exact = next(call.exact() for call in calls.values())
    numbers = {name: max(1, round(SAMPLE / _sample(call, 1))) for name, call in calls.items()}
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(turns):
        for name, call in calls.items():
            time.sleep(PAUSE)
            over = time.perf_counter() + TURN
            while True:
                best[name] = min(best[name], _sample(call, numbers[name]))
                if time.perf_counter() >= over:
                    break
        step(name)
    apart = {name: float(np.abs(result - exact).max()) for name, result in results.items()}
    return {"seconds": best, "largest_difference": apart}


def _sample(call: Call, number: int) -> float:
    start = time.perf_counter()
    for _ in range(number):
        call.run()
    call.wait()
    return (time.perf_counter() - start) / number


# ---------------------------------------------------------------------------------------------------
# What is asked, and where
# ---------------------------------------------------------------------------------------------------


def _check(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """Everything that can be wrong, before anything is measured."""
    if given.num_heads_kv and given.num_heads % given.num_heads_kv:
        rule = f"has to divide --num-heads: {given.num_heads} query heads cannot share {given.num_heads_kv}"
        parser.error(f"argument --num-heads-kv: {rule}")
    needs_torch = "torch" in (given.against, "torch" if given.device == "cuda" else None)
    if needs_torch and (objection := _objection_to("torch")):
        flag = "--against torch" if given.against == "torch" else "--device cuda"
        parser.error(f"argument {flag}: needs torch, which {objection}: pip install cupyattn[torch]")
    if given.device == "cuda" and not contenders.torch_sees_a_gpu():
        parser.error("argument --device: cuda needs an NVIDIA GPU, and torch finds none")
    if given.device == "cuda" and given.against == "naive":
        parser.error("argument --against: naive is NumPy's formula, and goes with --device cpu")
    if given.device == "cpu" and given.dtype in ("float16", "bfloat16"):
        parser.error(f"argument --dtype: {given.dtype} goes with --device cuda; the CPU computes in float32 or float64")
    if given.device == "cuda" and given.dtype == "float64":
        parser.error("argument --dtype: float64 goes with --device cpu; no kernel takes it")
    if given.picture and (objection := _objection_to("matplotlib")):
        parser.error(f"argument --picture: needs matplotlib, which {objection}: pip install cupyattn[cli]")
    if given.picture and given.picture.suffix.lower() not in (".png", ".svg", ".pdf"):
        parser.error(f"argument --picture: has to end in .png, .svg or .pdf, not {given.picture.suffix!r}")
    for flag, path in (("--json", given.json), ("--picture", given.picture)):
        if path not in (None, "-") and not Path(path).absolute().parent.is_dir():
            parser.error(f"argument {flag}: there is no folder {Path(path).absolute().parent}")


def _objection_to(package: str) -> str | None:
    """Why it cannot be used; an installation may be broken, too."""
    if not find_spec(package):
        return "is not installed"
    try:
        import_undisturbed(package)
    except Exception as error:  # whatever: it is what is said
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"cannot be imported ({reason})"
    return None


def _peer_here() -> str:
    """torch where it is installed; of one that is broken there is a word, and the formula instead."""
    objection = _objection_to("torch")
    if objection and find_spec("torch"):
        print(f"torch {objection}, see cupyattn doctor: the naive formula is measured instead", file=sys.stderr)
    return "naive" if objection else "torch"


def _machine(device: str, against: str) -> dict[str, Any]:
    """What a reader of these numbers has to know."""
    from cupyattn import __version__

    return {
        "cupyattn": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        **contenders.versions(device, against),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": num_cores(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


# ---------------------------------------------------------------------------------------------------
# What is said
# ---------------------------------------------------------------------------------------------------


def _say(parser: argparse.ArgumentParser, given: argparse.Namespace, found: dict[str, Any]) -> int:
    print(json.dumps(found, indent=1) if given.json == "-" else "\n".join(show(found)))
    try:
        if given.json not in (None, "-"):
            Path(given.json).write_text(json.dumps(found, indent=1) + "\n")
            print(f"saved {given.json}", file=sys.stderr)
        if given.picture:
            save_picture(given.picture, found)
            print(f"saved {given.picture}", file=sys.stderr)
    except OSError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


def show(found: dict[str, Any]) -> list[str]:
    """The lines of a table, and what it needs to be understood."""
    sizes, rows = found["sizes"], found["rows"]
    names = list(dict.fromkeys(name for row in rows for name in (*row["seconds"], *row["skipped"])))
    ours, peer = names[-2], names[-1]
    shared = "" if sizes["num_heads"] == sizes["num_heads_kv"] else f" on {sizes['num_heads_kv']} key heads"
    mask = "causal" if found["causal"] else "no mask"
    head = (
        f"batch {sizes['batch']}, {sizes['num_heads']} heads{shared} of {sizes['head_dim']}, {found['dtype']}, {mask}"
    )
    where = found.get("gpu") or f"{found['processor']}, {found['cores']} cores"
    table: list[Sequence[str]] = [("seqlen", *(f"{name}, ms" for name in names), f"over {peer}")]
    for row in rows:
        times = [_ms(row["seconds"][name]) if name in row["seconds"] else "-" for name in names]
        both = peer in row["seconds"]
        table.append(
            (str(row["seqlen"]), *times, f"{row['seconds'][ours] / row['seconds'][peer]:.2f}" if both else "-")
        )
    meaning = f"over {peer}: the time of {ours} over that; below 1 is faster."
    lines = [f"{head}; {where}", "", aligned(table, left=0), "", meaning, "Largest difference from float64 arithmetic:"]
    for name in names:
        apart = [row["largest_difference"][name] for row in rows if name in row["largest_difference"]]
        lines.append(f"  {name}: {max(apart):.1e}" if apart else f"  {name}: not run")
    reasons = {f"{name} at {row['seqlen']}: {why}" for row in rows for name, why in row["skipped"].items()}
    return [*lines, *sorted(reasons)]


def _ms(seconds: float) -> str:
    """Three digits of milliseconds, or all of them before the point."""
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"
