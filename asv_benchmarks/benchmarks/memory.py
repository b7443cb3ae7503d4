"""Peak memory of one call, over the arrays that exist anyway; each number from a fresh process."""

import os
import re
import subprocess
import sys
from pathlib import Path

from . import SUITE
from .common import CONTENDERS, Benchmark, draw, tracked, with_torch

BARS = {"float32": 60, "float64": 170}


class Memory(Benchmark):
    """Growth of the resident set above q, k and v; the result, 17 MB of float32, counts.

    Not asv's peakmem_: that would count the interpreter, torch and the arrays.
    """

    params = (list(CONTENDERS), ["float32", "float64"])
    param_names = ("contender", "dtype")
    seqlen = 8192
    slow = ("naive",)

    def setup(self, contender, dtype):
        check_that_peaks_are_told()
        if contender == "torch":
            with_torch(*draw(1, dtype), "full")

    @tracked(
        "MB",
        lambda contender, dtype: BARS[dtype] if contender == "cupyattn" else None,
        "Memory: peak of a call",
    )
    def track_peak(self, contender, dtype):
        return peak_in_a_process(contender, self.seqlen, dtype) / 1e6


def check_that_peaks_are_told():
    if not os.access("/proc/self/clear_refs", os.W_OK):
        raise NotImplementedError("the system does not let a process reset its peak")


def peak_in_a_process(contender, seqlen, dtype):
    """`peak_of_one_call` in a process of its own."""
    command = [sys.executable, "-m", f"{__package__}.memory", contender, str(seqlen), dtype]
    return int(subprocess.run(command, cwd=SUITE, check=True, capture_output=True).stdout)


def resident(field):
    """Bytes of this process's memory: "VmRSS" now, "VmHWM" at most."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s*(\d+) kB", status)[1])


def peak_of_one_call(contender, seqlen, dtype):
    """Bytes by which one call raises the peak."""
    CONTENDERS[contender](*draw(16, dtype), "full", dtype)()  # imports and the threads' stacks are not the call's
    call = CONTENDERS[contender](*draw(seqlen, dtype), "full", dtype)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of drawing the arrays
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


if __name__ == "__main__":
    print(peak_of_one_call(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
