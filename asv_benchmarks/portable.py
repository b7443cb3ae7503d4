"""Name asv's new results after the Python version, not after the place where that Python lies.

    python asv_benchmarks/portable.py        after `asv run`, with the interpreter that ran it

asv writes the interpreter's path into each result and its file name: results from another machine or
virtual environment would not continue a series, and a published one would name folders of this machine.
"""

import json
import platform
from pathlib import Path

VERSION = ".".join(platform.python_version_tuple()[:2])


def main():
    for path in (Path(__file__).parent / "results").glob("*/*-existing-py_*.json"):
        result = json.loads(path.read_text())
        environment = f"existing-py{VERSION}"
        result["python"] = result["params"]["python"] = VERSION
        result["env_name"] = environment
        path.with_name(f"{result['commit_hash'][:8]}-{environment}.json").write_text(json.dumps(result))
        path.unlink()


if __name__ == "__main__":
    main()
