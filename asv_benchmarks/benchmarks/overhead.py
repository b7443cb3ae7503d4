"""What the way through the package costs where there is nearly nothing to compute, and what importing it costs.

The package's own rooms are imported where they are entered: old commits, which asv measures by this file too, have
others, and are measured in what all have.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import cupyattn

from .common import HEAD_DIM, Benchmark, draw, fastest, named, num_cores, tracked, with_cupyattn, with_naive

SEQLEN = 16


WHOLE = {"attention": with_cupyattn, "naive": with_naive}


def rooms(dtype):
    """{room: a call of it alone}, for the way of one small problem, and its arithmetic beside them."""
    from cupyattn import cpu
    from cupyattn.arrays import enter
    from cupyattn.plan import choose
    from cupyattn.reading import Options, read

    q, k, v = draw(SEQLEN, dtype)
    named = {"q": ("q", q), "k": ("k", k), "v": ("v", v)}
    options = Options(axes="bhsd", alignment=None, takes_float8=True)  # as attention has them
    visit = enter("attention", named)
    problem = read("attention", visit.specs, options)
    plan = choose(problem, visit.device())
    return {
        "enter": lambda: enter("attention", named),
        "read": lambda: read("attention", visit.specs, options),
        "choose": lambda: choose(problem, visit.device()),
        "cpu.run": lambda: cpu.run(plan, problem, visit.arrays),
        "arithmetic": arithmetic(plan, problem, visit.arrays),
    }


def arithmetic(plan, problem, operands):
    """`flash.flash` on the one tile, operands brought into the compute dtype: what nobody could do without."""
    from cupyattn.cpu import flash
    from cupyattn.cpu.cutting import cut_into_parts
    from cupyattn.cpu.scratch import Scratch
    from cupyattn.cpu.views import scaled_queries, tile_of

    (part,) = cut_into_parts(plan, problem, operands, 0)
    (where,) = part.tiles
    scratch = Scratch()
    tile = tile_of(part, where, scratch)
    pairs = where.pairs.stop - where.pairs.start

    def attend():
        scaled_queries(part, where, pairs, scratch)
        return flash.flash(tile, HEAD_DIM)

    return attend


class Corridor(Benchmark):
    """One call of attention() on 16 rows, less its arithmetic: the way there and back."""

    params = (["float32", "float64"],)
    param_names = ("dtype",)

    def setup(self, dtype):
        self.calls = with_cupyattn(*draw(SEQLEN, dtype), "full"), rooms(dtype)["arithmetic"]

    @tracked("us over the arithmetic", 60, "Overhead: the way through the package")
    def track_overhead(self, dtype):
        whole, bare = fastest(*self.calls, turns=self.turns)
        return 1e6 * (whole - bare)


class Rooms(Benchmark):
    """Time in each room of the corridor, of the whole, and of the naive formula."""

    params = (["attention", "enter", "read", "choose", "cpu.run", "arithmetic", "naive"], ["float32", "float64"])
    param_names = ("room", "dtype")
    rounds, warmup_time = 1, 0.05

    def setup(self, room, dtype):
        self.call = WHOLE[room](*draw(SEQLEN, dtype), "full") if room in WHOLE else rooms(dtype)[room]
        self.call()

    @named("Overhead: time in each room")
    def time_call(self, room, dtype):
        self.call()


class Import(Benchmark):
    """`import cupyattn` where NumPy is imported already, in fresh processes.

    A package that was installed by pip has its bytecode; in a checkout under PYTHONDONTWRITEBYTECODE each of these
    processes compiles all that it imports, which takes three times as long.
    """

    code = "import time, numpy; start = time.perf_counter(); import cupyattn; print(time.perf_counter() - start)"

    @tracked("ms on top of NumPy", 60, "Overhead: import")
    def track_import(self):
        environment = {**os.environ, "PYTHONPATH": str(Path(cupyattn.__file__).parents[1])}
        command = [sys.executable, "-c", self.code]
        runs = [subprocess.run(command, env=environment, check=True, capture_output=True) for _ in range(self.turns)]
        return 1e3 * min(float(run.stdout) for run in runs)


class Busy(Benchmark):
    """The median call of 256 tokens while four other processes want each core, over that of a quiet machine.

    A process that rests between calls may run at once when it wakes, until the others' turn, which comes about when
    such a call ends; one that never rests gets its share of the cores, whatever it does.
    """

    version = "2"  # float32 is the arithmetic's dtype, too
    params = (["every 20 ms", "back to back"], ["float32", "float64"])
    param_names = ("calls", "dtype")
    calls, rest, per_core = 200, 0.02, 4

    def setup(self, calls, dtype):
        self.call = with_cupyattn(*draw(256, dtype), "full", compute_dtype=dtype)
        self.call()

    @tracked("of a quiet machine's", lambda calls, dtype: 2 if calls == "every 20 ms" else None,
             "Overhead: calls on a busy machine")  # fmt: skip
    def track_busy(self, calls, dtype):
        rest = self.rest if calls == "every 20 ms" else 0.0
        quiet = self.median(rest)
        others = [
            subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(self.per_core * num_cores())
        ]
        try:
            time.sleep(1)
            return self.median(rest) / quiet
        finally:
            for other in others:
                other.kill()
                other.wait()

    def median(self, rest):
        seconds = []
        for _ in range(self.calls):
            if rest:  # a sleep of no time would be a rest too
                time.sleep(rest)
            start = time.perf_counter()
            self.call()
            seconds.append(time.perf_counter() - start)
        return float(np.median(seconds))
