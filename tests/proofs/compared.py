"""The same calls by what two NVRTCs make of a kernel: the same bits wherever both texts do the same arithmetic.

PTX says how an add, a product or an fma rounds, and so do we of its approximations and of tensor cores; a compiler is
free to make one fma of a product and a sum, and to sum in another order.  So where both texts executed the same
instructions that round, equally often, everything that they write has to be the same to the last bit.  Where they did
not, it is told how far the results are from each other, and no more.
"""

import re
import time
import traceback
from collections import Counter

import numpy as np
import ptx
from proofs.calls import Kernel, calls_of
from proofs.executed import executed
from ptx.compiled import load

ROUNDS = re.compile(
    r"(add|sub|mul|fma|mad|div|rcp|sqrt|rsqrt|ex2|lg2|tanh|cvt|mma|wgmma)\b.*\.(f16x2|f16|bf16x2|bf16|f32|f64|e4m3x2)\b"
)
"""Instructions whose results depend on which of them are made, and not only on what they are made of."""


def compare_kernel(target, source, expression, nvrtc, other, folder=None):
    """A report of all calls of a kernel: by one NVRTC, by the other, and what they have in common."""
    kernel = Kernel(target, source, expression)
    begun = time.monotonic()
    versions = [load(path)[1] for path in (nvrtc, other)]
    rows = []
    for name, call in calls_of(kernel).items():
        try:
            rows.append({"call": name, **compare_call(kernel, call, nvrtc, other, folder)})
        except Exception as error:
            raised = "".join(traceback.format_exception_only(error))[:1500]
            rows.append({"call": name, "numbers": 0, "same": False, "ulps": None, "arithmetic": {}, "lost": raised})
    ptx.kernels.clear()
    lost = [f"{row['call']}: {row['lost']}" for row in rows if row["lost"]]
    seconds = time.monotonic() - begun
    return {**kernel._asdict(), "versions": versions, "compared": rows, "lost": lost, "seconds": seconds}


def compare_call(kernel, call, *compilers):
    """What one call wrote by either compiler; in order, so that nothing else can make a difference."""
    *compilers, folder = compilers
    watches = []
    for nvrtc in compilers:
        with executed(kernel.target, nvrtc=nvrtc, folder=folder, keeps=True) as watch:
            call(0, 7)
        watches.append(watch)
    return judged(*(watch.written for watch in watches), *(arithmetic_of(watch.forms) for watch in watches))


def arithmetic_of(forms):
    """Those of the executed instructions that round, and how often."""
    return Counter({form: number for form, number in forms.items() if ROUNDS.match(form)})


def judged(arrays, others, arithmetic, other_arithmetic):
    """Whether arrays are the same, how far they are from each other, and whether that may be."""
    same = all(one.tobytes() == other.tobytes() for one, other in zip(arrays, others, strict=True))
    ulps = max((ulps_between(one, other) for one, other in zip(arrays, others, strict=True)), default=0)
    forms = sorted(arithmetic.keys() | other_arithmetic.keys())
    differs = {x: (arithmetic[x], other_arithmetic[x]) for x in forms if arithmetic[x] != other_arithmetic[x]}
    lost = None if same or differs else f"other bits by the same arithmetic, up to {ulps} units in the last place"
    numbers = sum(array.size for array in arrays)
    return {"numbers": numbers, "same": same, "ulps": ulps, "arithmetic": differs, "lost": lost}


def ulps_between(one, other):
    """The largest difference of two arrays in units in the last place; infinite where only one is nan."""
    if one.dtype.kind in "iu":
        return int(np.abs(one.astype(np.int64) - other.astype(np.int64)).max(initial=0))
    is_nan, other_is_nan = (np.isnan(x.astype(np.float32)) for x in (one, other))
    if (is_nan != other_is_nan).any():
        return float("inf")
    places = [_places(x)[~is_nan] for x in (one, other)]
    return int(np.abs(places[0] - places[1]).max(initial=0))


def _places(array):
    """Where numbers stand among all of their kind, counted from zero."""
    bits = array.view(f"u{array.itemsize}").astype(np.int64)
    sign = 1 << (8 * array.itemsize - 1)
    return np.where(bits & sign, -(bits & (sign - 1)), bits)


def line_of(report, kernel):
    """One line for a kernel, and one for each call with other bits."""
    rows = report["compared"]
    same, numbers = sum(row["same"] for row in rows), sum(row["numbers"] for row in rows)
    worst = max((row["ulps"] for row in rows if row["ulps"] is not None), default=0)
    told = "same bits" if same == len(rows) else f"same bits in {same}, up to {worst} ulps"
    if not rows:  # the process died
        return f"{kernel!s:<78}{' '.join(report['lost'])}"
    seconds = f"{report['seconds']:>6.1f} s"
    lines = [f"{kernel!s:<78}{len(rows):>3} calls {numbers:>9,} numbers  {told} {seconds}"]
    for row in rows:
        if row["lost"] or not row["same"] or row["arithmetic"]:
            parts = ", ".join(f"{form} {a} and {b}" for form, (a, b) in row["arithmetic"].items())
            how = row["lost"] or ("same bits" if row["same"] else f"{row['ulps']} ulps")
            lines.append(f"    {row['call']}: {how}; {parts or 'the same arithmetic'}")
    return "\n".join(lines)


def summary(reports):
    """Says how many of what; returns what is wrong."""
    rows = [row for report in reports for row in report["compared"]]
    versions = sorted({" and ".join(report["versions"]) for report in reports if report["versions"]})
    same, alike = sum(row["same"] for row in rows), sum(not row["arithmetic"] and not row["lost"] for row in rows)
    print(f"{len(reports)} kernels by NVRTC {', '.join(versions)}")
    print(f"{len(rows)} calls, {sum(row['numbers'] for row in rows):,} numbers written")
    print(f"{same} calls with the same bits, {alike} by the same arithmetic")
    return sum(bool(report["lost"]) for report in reports)
