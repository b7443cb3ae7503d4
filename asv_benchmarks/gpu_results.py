"""What `make gpu` found, as results of asv: in the dashboards a GPU is a machine of its own.

    python asv_benchmarks/gpu_results.py results/gpu-NAME-DATE.json [--commit HASH]

Ratios to torch only; less is better.  --commit is for a file that does not say what it was measured at, as on a machine
without git.
"""

import argparse
import json
import math
import re
import subprocess
from pathlib import Path

SUITE = Path(__file__).resolve().parent

SECTIONS = {
    "prefill": ("Prefill on a GPU: time over flash attention's", "time / flash", "speed_over_flash"),
    "decode": ("Decode on a GPU: time over torch's best", "time / best of torch", "speed_over_best"),
}
"""Of `make gpu`'s: the name in the dashboards, the unit, and the column whose inverse it is."""
WORDS = ("dtype", "head_dim", "seqlen", "causal", "batch", "heads", "keys", "page")
"""Columns that say what was measured; all others are what was found."""
VERSION = "1"
ENDING = "-gpu.json"


def ratios(rows, column):
    """{case: time over the peer's}, of the rows that have one."""
    found = {}
    for row in rows:
        speed = row.get(column)
        if speed is not None and math.isfinite(speed):
            found[", ".join(f"{word} {row[word]}" for word in WORDS if row.get(word) is not None)] = 1 / speed
    return found


def name_of(section):
    return f"gpu.{section}"


def results(found, commit, date):
    """(the machine, its results of that commit), both as asv has them."""
    about = found["machine"]
    name = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    machine = {"machine": name, "os": "Linux", "arch": "", "cpu": about["device"], "num_cpu": "", "ram": ""}
    peers = {package: about[package] for package in ("torch", "cupy")}
    columns = {}
    for section, (_, _, column) in SECTIONS.items():
        cases = ratios(found["sections"].get(section, []), column)
        if cases:
            columns[name_of(section)] = [list(cases.values()), [list(map(repr, cases))], VERSION]
    measured = {
        "commit_hash": commit,
        "env_name": "gpu",
        "date": date,
        "params": {**machine, **peers},
        "python": "",
        "requirements": peers,
        "env_vars": {},
        "result_columns": ["result", "params", "version"],
        "results": columns,
        "durations": {},
        "version": 2,
    }
    return {**machine, "version": 1}, measured


def benchmarks(folder):
    """What asv's list of benchmarks has to say of the GPUs' results in a folder, since `asv run` finds none of them."""
    cases = {}
    for path in sorted(folder.glob(f"*/*{ENDING}")):
        for name, (_, (words,), _) in json.loads(path.read_text())["results"].items():
            cases.setdefault(name, {}).update(dict.fromkeys(words))
    listed = {}
    for section, (title, unit, _) in SECTIONS.items():
        name = name_of(section)
        if name in cases:
            about = {"name": name, "pretty_name": title, "unit": unit, "type": "track", "version": VERSION, "code": ""}
            listed[name] = {**about, "param_names": ["case"], "params": [list(cases[name])], "timeout": 60}
    return listed


def git(*words):
    return subprocess.run(["git", *words], cwd=SUITE, check=True, capture_output=True, text=True).stdout.strip()


def main(arguments=None, folder=SUITE / "results"):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="that `make gpu` wrote")
    parser.add_argument("--commit", help="that it was measured at, if the file does not say so")
    given = parser.parse_args(arguments)
    found = json.loads(given.file.read_text())
    said = found["machine"].get("commit") or given.commit
    if not said:
        raise SystemExit(f"gpu_results.py: {given.file.name} does not say which commit it is of: --commit does")
    if said.endswith("-dirty"):
        raise SystemExit(f"gpu_results.py: {given.file.name} was measured at no commit, but at {said}")
    commit = git("rev-parse", f"{said}^{{commit}}")
    machine, measured = results(found, commit, 1000 * int(git("show", "--no-patch", "--format=%at", commit)))
    if not measured["results"]:
        raise SystemExit(f"gpu_results.py: {given.file.name} has no ratio to torch in {' or '.join(SECTIONS)}")
    place = folder / machine["machine"]
    place.mkdir(parents=True, exist_ok=True)
    (place / "machine.json").write_text(json.dumps(machine, indent=4) + "\n")
    path = place / f"{commit[:8]}{ENDING}"
    path.write_text(json.dumps(measured) + "\n")
    print(path)


if __name__ == "__main__":
    main()
