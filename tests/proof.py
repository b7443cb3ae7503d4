"""The kernels that plans choose by default, as NVRTC compiles them, executed on the CPU and held to float64.

    make proof ARGS='--only hopper --target sm_90a --jobs 2'
    python tests/proof.py --nvrtc /somewhere/libnvrtc.so.12      # by another compiler than the installed one
    python tests/proof.py --same-as /somewhere/libnvrtc.so.12    # by both, whose results have to be the same bits
    python tests/proof.py --choose                               # what of it `make test` runs, see proofs/share.py

`proofs/calls.py` says which kernels and which calls, `tests/ptx` executes them, `proofs/fences.py` looks at what no
run can show, and `proofs/planted.py` plants bugs that all this has to catch.  A line for each kernel: its calls, the
instructions executed, the largest error as a share of its bar.  Then which instruction forms of all kernels were
executed.  It fails if a number is wrong, a rule is broken, a form is not executed or a bug not caught.
"""

import argparse
import concurrent.futures
import json
import queue
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from proofs import compared, planted, running, share
from proofs.calls import DEVICES, Kernel, kernels

FAMILIES = ("flash", "splitkv", "hopper", "schedule", "merge", "append", "backward", "backward_rows", "hopper_backward")


def main():
    options = parsed()
    if options.worker:
        out = sys.stdout
        sys.stdout = sys.stderr
        running.work(sys.stdin, lambda found: print(json.dumps(found), file=out, flush=True))
        return 0
    if options.measured:
        return chosen([json.loads(line) for line in options.measured.read_text().splitlines()])
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cupyattn-proof-") as folder:
        todo = tasks(options, str(options.folder or folder))
        print(f"{len(todo)} tasks, {options.jobs} at once", flush=True)
        found = list(done(todo, options.jobs, options.json))
    if options.same_as:
        print(f"{time.monotonic() - begun:.0f} s")
        return int(bool(compared.summary(found)))
    wrong = summary([report for report in found if "bug" not in report], options)
    missed = [report["bug"] for report in found if report.get("bug") and not report["how"]]
    if any("bug" in report for report in found):
        count = sum("bug" in report for report in found)
        print(f"{count - len(missed)} of {count} planted bugs caught")
    print(f"{time.monotonic() - begun:.0f} s")
    if options.choose:
        wrong += chosen(found)
    return int(bool(wrong or missed))


def parsed():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join((*FAMILIES, "planted")), help="some of: %(default)s")
    parser.add_argument("--target", default=",".join(DEVICES), help="some of: %(default)s")
    parser.add_argument("--words", default="", help="only kernels, or planted bugs, with these words in their names")
    parser.add_argument("--prebuilt", action="store_true", help="only the kernels that a wheel brings")
    parser.add_argument("--share", type=float, default=1.0, help="of the kernels, drawn at random")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--nvrtc", help="the library of another NVRTC")
    parser.add_argument(
        "--same-as", help="the library of another one, whose results are compared; see proofs/compared.py"
    )
    parser.add_argument("--folder", type=Path, help="where compiled kernels are kept; else nowhere")
    parser.add_argument("--json", type=Path, help="a file for all that was found, a line of JSON each")
    parser.add_argument("--choose", action="store_true", help="write tests/proofs/share.json")
    parser.add_argument("--measured", type=Path, help="such a file, to choose from without running anything")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def tasks(options, folder):
    """One for each specialisation, for all architectures that have it, and one for each planted bug.

    In random order: what is done when somebody stops it is a sample.
    """
    only, words = options.only.split(","), options.words.split()
    every = [kernel for target in options.target.split(",") for kernel in kernels(target, options.prebuilt)]
    wanted = share.candidates(every) if options.choose else every
    targets = {}
    for kernel in wanted:
        if kernel.family in only and all(word in str(kernel) for word in words):
            targets.setdefault((kernel.source, kernel.expression), []).append(kernel.target)
    draw = random.Random(0)
    if options.same_as:
        given = {"nvrtc": options.nvrtc, "other": options.same_as, "folder": folder}
        todo = [
            {"compared": {"target": target, "source": source, "expression": expression, **given}}
            for (source, expression), x in targets.items()
            for target in x
            if draw.random() < options.share
        ]
        draw.shuffle(todo)
        return todo
    todo = [
        {"kernels": {"targets": x, "source": source, "expression": expression, "nvrtc": options.nvrtc,
                     "folder": folder}}
        for (source, expression), x in targets.items()
        if draw.random() < options.share
    ]  # fmt: skip
    if "planted" in only:
        names = [bug.name for bug in planted.BUGS if all(word in bug.name for word in words)]
        todo += [{"planted": {"name": name, "folder": folder}} for name in names]
    draw.shuffle(todo)
    return todo


def done(todo, jobs, file):
    """What came of the tasks, told as they end."""
    workers = queue.SimpleQueue()
    for _ in range(jobs):
        workers.put(running.Worker(__file__))

    def run(task):
        worker = workers.get()
        try:
            return task, worker.run(task)
        finally:
            workers.put(worker)

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for ended in concurrent.futures.as_completed([pool.submit(run, task) for task in todo]):
            for report in reports_of(*ended.result()):
                print(line_of(report), flush=True)
                if file:
                    with file.open("a") as out:
                        out.write(json.dumps(report) + "\n")
                yield report
    for _ in range(jobs):
        workers.get().close()


def reports_of(task, answer):
    if "planted" in task:
        how = answer.get("done")
        return [how or {"bug": task["planted"]["name"], "how": None, "seconds": 0.0, "lost": [answer["raised"]]}]
    if "compared" in task:
        given = {name: task["compared"][name] for name in Kernel._fields}
        lost = {**given, "versions": [], "compared": [], "lost": [answer.get("raised")], "seconds": 0.0}
        return [answer.get("done") or lost]
    if "done" in answer:
        return answer["done"]
    given = task["kernels"]
    kernel = Kernel(given["targets"][0], given["source"], given["expression"])
    return [{**kernel._asdict(), "forms": [], "calls": [], "lost": [answer["raised"]]}]


def line_of(report):
    if "bug" in report:
        how = " ".join((report["how"] or "NOT CAUGHT").split())[:110]
        return f"{report['bug']:<60}{report['seconds']:>6.1f} s   {how}"
    kernel = Kernel(report["target"], report["source"], report["expression"])
    if "compared" in report:
        return compared.line_of(report, kernel)
    if "as" in report:
        return f"{kernel!s:<78}the text of {report['as']}"
    executed = sum(call["instructions"] for call in report["calls"]) / 1e6
    worst = max((call.get("of_bar", 0.0) for call in report["calls"]), default=0.0)
    seconds = report.get("seconds", 0.0) + sum(call["seconds"] for call in report["calls"])
    lines = [
        f"{kernel!s:<78}{len(report['calls']):>3} calls {executed:>8.1f} M {worst:>6.2f} of the bar {seconds:>6.1f} s"
    ]
    return "\n".join([*lines, *("    " + lost for lost in report["lost"])])


def summary(reports, options):
    """How many of what; returns what is wrong."""
    if not reports:
        return 0
    lost = [report for report in reports if report["lost"]]
    calls = [call for report in reports for call in report["calls"]]
    had = set().union(*(report["forms"] for report in reports))
    executed = set().union(*(call["forms"] for call in calls))
    of_text = sum(report.get("instructions_of_text", 0) for report in reports)
    visited = sum(report.get("visited", 0) for report in reports)
    worst = max((call.get("of_bar", 0.0) for call in calls), default=0.0)
    print(f"{len(reports)} kernels, {sum('as' in report for report in reports)} of them with another's text")
    print(f"{len(calls)} calls, {sum(call['instructions'] for call in calls):,} instructions executed")
    print(f"the largest error is {worst:.2f} of its bar; {len(lost)} kernels lost")
    print(f"{visited:,} of {of_text:,} instructions of the texts were visited")
    missing = sorted(had - executed)
    print(f"{len(had & executed)} of {len(had)} instruction forms executed; missing: {', '.join(missing) or 'none'}")
    unshared = sorted(had - share.load()[1]) if share.FILE.exists() else []
    if unshared:
        print(f"not among what `make test` covers (run --choose again): {', '.join(unshared)}")
    some = options.words or options.prebuilt or options.choose or options.share < 1.0
    if some or not {*FAMILIES} <= {*options.only.split(",")} or {*options.target.split(",")} != {*DEVICES}:
        missing = unshared = []  # by these kernels alone
    return len(lost) + len(missing) + len(unshared)


def chosen(reports):
    """Writes the share that is run by `make test`; returns what is wrong."""
    measured, forms = [], set()
    of_kernels = [report for report in reports if "bug" not in report]
    by_kernel = {(x["target"], x["source"], x["expression"]): x for x in of_kernels}
    for (target, source, expression), report in by_kernel.items():
        run = by_kernel[report["as"], source, expression] if "as" in report else report  # the same text
        forms |= set(run["forms"])
        for call in run["calls"]:
            pair = share.Pair(Kernel(target, source, expression), call["call"], call["schedule"])
            if call["lost"] is None:
                executed = frozenset(call["forms"])
                measured.append(share.Measured(pair, executed, call["seconds"], run["seconds"]))
    found = share.choose(measured)
    compiled = {each.pair.kernel: each.to_compile for each in found}
    seconds = sum(each.seconds for each in found) + sum(compiled.values())
    share.write(found, forms)
    print(f"{len(found)} calls of {len(compiled)} kernels, {seconds:.0f} s on one core, cover it all")
    return len(forms - frozenset().union(*(each.forms for each in measured)))


if __name__ == "__main__":
    sys.exit(main())
