"""Attacks on what the package promises, for longer than `make test` has time.

    make attack ARGS='--only fuzz,interrupted --seed 7 --share 0.1 --jobs 2'

Each attack runs in a process of its own, so that a crash or a hang is one of its findings, and says how many cases it
tried and what was lost.  The seed is printed; the same one tries the same cases.
"""

import argparse
import concurrent.futures
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

ATTACKS = {
    "interrupted": (300_000, "calls of caches and of threads, interrupted at every instruction of the package"),
    "caches": (4_000, "caches through any sequence of calls, among them ones that fail or are interrupted"),
    "fuzz": (60_000, "the public API, forward and backward, against an oracle in float64"),
    "elsewhere": (4_000, "the same in JAX and dask, float8, and gradients of queries over a cache"),
    "processes": (400, "16 threads, forks and other children, memory that runs out"),
    "folders": (200, "hostile cache folders, writers that are killed"),
    "sanitized": (60, "the kernels, emulated, under the address and undefined-behaviour sanitizers"),
}
"""The cases of a whole run, and what they are."""
SECONDS = 1500
"""For one attack; longer is a hang."""


def run(name, seed, cases):
    """(seconds, what came of an attack in a process of its own)."""
    begun = time.monotonic()
    command = [sys.executable, __file__, "--inside", name, "--seed", str(seed), "--cases", str(cases)]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        found = json.loads(ran.stdout.splitlines()[-1]) if ran.returncode == 0 else None
        if found is None:
            found = {"tried": 0, "lost": [f"ended with {ran.returncode}: {ran.stderr[-2000:]}"], "notes": ""}
    except subprocess.TimeoutExpired:
        found = {"tried": 0, "lost": [f"did not end within {SECONDS} s"], "notes": ""}
    return time.monotonic() - begun, found


def inside(name, seed, cases):
    outcome = importlib.import_module(f"attacks.{name}").attack(seed, cases)
    print(json.dumps(outcome._asdict()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(ATTACKS), help="some of: %(default)s")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--share", type=float, default=1.0, help="of the cases of a whole run")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--cases", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        inside(options.inside, options.seed, options.cases)
        return 0
    seed = int.from_bytes(os.urandom(4), "little") if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    lost = tried = 0
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        names = options.only.split(",")
        runs = {pool.submit(run, x, seed, max(1, round(ATTACKS[x][0] * options.share))): x for x in names}
        for done in concurrent.futures.as_completed(runs):
            name, (seconds, found) = runs[done], done.result()
            counts = f"{found['tried']:>9} tried {len(found['lost']):>5} lost {seconds:>7.0f} s"
            print(f"{name:<12}{counts}   {ATTACKS[name][1]}")
            for line in found["lost"][:40]:
                print("   ", line)
            if found["notes"]:
                print("   ", found["notes"])
            sys.stdout.flush()
            tried, lost = tried + found["tried"], lost + len(found["lost"])
    print(f"{'all':<12}{tried:>9} tried {lost:>5} lost")
    return lost > 0


if __name__ == "__main__":
    sys.exit(main())
