"""One kernel with all its calls, or one planted bug, run in this process; and processes that do so for others.

A worker reads tasks as lines of JSON and answers each with a line, so that a crash or a hang of what it runs is one of
the findings and not the end.
"""

import json
import os
import re
import subprocess
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path

import ptx
from proofs import fences, planted
from proofs.calls import Kernel, calls_of, schedules_of
from proofs.compared import compare_kernel
from proofs.executed import executed
from ptx.compiled import joined, ptx_of

ONE_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
SECONDS = 600
"""For one task; longer is a hang."""


def run_kernels(targets, source, expression, nvrtc=None, folder=None):
    """Reports of one kernel for each architecture; where NVRTC gives two of them the same text, one is run."""
    reports, met = [], {}
    for target in targets:
        kernel = Kernel(target, source, expression)
        begun = time.monotonic()
        _, text = ptx_of(joined(source), expression, target, nvrtc, folder)
        plain = re.sub(r"^\.(target|version) .*$", "", text, flags=re.MULTILINE)
        if plain in met:
            reports.append({**kernel._asdict(), "as": met[plain], "forms": [], "lost": [], "calls": []})
            continue
        met[plain] = target
        reports.append(run_kernel(kernel, begun, nvrtc, folder))
        ptx.kernels.clear()
    return reports


def run_kernel(kernel, begun, nvrtc=None, folder=None):
    """What all calls of a kernel came to."""
    built = ptx.build(kernel.source, kernel.expression, folder, target=kernel.target, nvrtc=nvrtc)
    report = {
        **kernel._asdict(),
        "seconds": time.monotonic() - begun,
        "forms": sorted(built.forms),
        "lost": [str(violation) for violation in fences.violations(built.module)],
        "calls": [],
    }
    for place, (name, call) in enumerate(calls_of(kernel).items()):
        for schedule in schedules_of(place):
            row = run_call(kernel, call, schedule, nvrtc, folder)
            if row["lost"]:
                report["lost"].append(f"{name}, schedule {schedule}: {row['lost']}")
            report["calls"].append({"call": name, "schedule": schedule, **row})
    of_all = sum(block.forms.total() for block in built.blocks)
    visited = sum(block.forms.total() for block, n in zip(built.blocks, built.visits, strict=True) if n)
    return {**report, "instructions_of_text": of_all, "visited": visited}


def run_call(kernel, call, schedule, nvrtc=None, folder=None):
    """What one call came to; it is lost if it raised, or if the launcher chose another kernel."""
    begun, held, lost = time.monotonic(), None, None
    with executed(kernel.target, nvrtc=nvrtc, folder=folder) as watch:
        try:
            held = call(schedule, 7)
            # Gradients of sequences end to end are by the same traits' kernel that goes by where these begin.
            names = kernel.expression, re.sub(r"(backward|again)<", r"\1_packed<", kernel.expression)
            if not any(watch.was_launched(kernel.source, name) for name in names):
                lost = "another kernel was launched"
        except Exception as error:
            lost = "".join(traceback.format_exception_only(error))[:1500]
    return {
        "seconds": time.monotonic() - begun,
        "instructions": watch.instructions,
        "forms": sorted(watch.forms),
        "lost": lost,
        **(held._asdict() if held else {}),
    }


def run_planted(name, folder=None):
    """How a planted bug was caught, or None."""
    bug = next(bug for bug in planted.BUGS if bug.name == name)
    begun = time.monotonic()
    how = planted.caught_by(bug, folder)
    ptx.kernels.clear()
    return {"bug": name, "how": how, "seconds": time.monotonic() - begun}


# ---------------------------------------------------------------------------------------------------
# Workers
# ---------------------------------------------------------------------------------------------------


RUNS = {"kernels": run_kernels, "planted": run_planted, "compared": compare_kernel}


def work(lines, answer):
    """The loop of a worker: a task is {"kernels": arguments}, or of another of `RUNS`."""
    for line in lines:
        task = json.loads(line)
        ((kind, arguments),) = task.items()
        try:
            answer({"done": RUNS[kind](**arguments)})
        except BaseException as error:
            answer({"raised": "".join(traceback.format_exception(error))[-3000:]})


class Worker:
    """A process that works, started again after it died."""

    def __init__(self, script):
        self.command = [sys.executable, str(Path(script).resolve()), "--worker"]
        self.process = None

    def run(self, task):
        """The answer; {"raised": words} also of a crash and of a hang."""
        if self.process is None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            # One thread each: others of the BLAS would wait, busily, on the cores of other workers.
            self.process = subprocess.Popen(self.command, env=os.environ | ONE_THREAD, **pipes)
        timer = threading.Timer(SECONDS, self.process.kill)
        timer.start()
        try:
            self.process.stdin.write(json.dumps(task) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            return {"raised": f"ended with {self.close()}, or did not end within {SECONDS} s"}
        return json.loads(line)

    def close(self):
        """Its exit status, once it has none to work for."""
        if self.process is None:
            return 0
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        status, self.process = self.process.wait(), None
        return status
