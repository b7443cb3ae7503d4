"""What a release would be, made and tried.

    python tools/release.py [--only ready,build,sdist,wheel] [--python PATH,...]

ready   what a person has to do first; `RELEASING.md` says more
build   sdist and wheel into dist/, `twine check`, and dist/meta.yaml for conda-forge
sdist   some tests, from the unpacked sdist
wheel   the wheel in a fresh environment of each Python from 3.11 to 3.14: imported, called, and its command run

Exit status 1 if something of it fails.  Without --only, what is not ready is said, and fails nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEPS = ("ready", "build", "sdist", "wheel")
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
NARROW = (
    "tests/test_numpy_ref.py",
    "tests/test_problem.py",
    "tests/test_release.py",
    "tests/command/test_explaining.py",
)
"""Of an unpacked sdist: some that need no peer, and take seconds."""
SMOKE = """
import numpy as np, cupyattn, sys
from pathlib import Path
assert "site-packages" in cupyattn.__file__, cupyattn.__file__
x = np.random.default_rng(0).standard_normal((1, 5, 2, 8))
scores = np.einsum("bqhd,bkhd->bhqk", x, x) / np.sqrt(8)
weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
expected = np.einsum("bhqk,bkhd->bqhd", weights, x)
assert np.abs(cupyattn.attention(x, x, x) - expected).max() < 1e-14
assert (Path(cupyattn.__file__).parent / "cuda" / "flash.cu").exists()
assert cupyattn.__version__ == sys.argv[1], cupyattn.__version__
"""


def version() -> str:
    """The version in the package's own text."""
    text = (ROOT / "cupyattn" / "__init__.py").read_text()
    return re.search(r'^__version__ = "(.+)"', text, re.MULTILINE)[1]


def missing(root: Path = ROOT) -> list[str]:
    """What a person has to do before a release: a sentence each."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    headings = re.findall(r"^## \[(.+?)\] - (.+)$", (root / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = (root / "CITATION.cff").read_text()
    found = []
    if not project.get("urls"):
        found.append("pyproject.toml has no [project.urls]")
    if headings[0][0] != version():
        found.append(f"the first version in CHANGELOG.md is {headings[0][0]}, not {version()}")
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", headings[0][1]):
        found.append(f"CHANGELOG.md says {headings[0][1]!r} where the date belongs")
    if f"\nversion: {version()}\n" not in citation:
        found.append(f"CITATION.cff is not of version {version()}")
    if "\ndate-released:" not in citation:
        found.append("CITATION.cff has no date-released")
    return found


def recipe(text: str, sdist: Path) -> str:
    """The recipe for conda-forge, whose source is an sdist of the index."""
    name = sdist.name.replace(version(), "{{ version }}")
    digest = hashlib.sha256(sdist.read_bytes()).hexdigest()
    source = f"source:\n  url: https://pypi.org/packages/source/c/cupyattn/{name}\n  sha256: {digest}\n"
    changed, count = re.subn(r"source:\n  path: \.\.\n", lambda _: source, text)
    assert count == 1, "recipe/meta.yaml has another source than the checkout"
    return changed


def run(*call: str | Path, cwd: Path = ROOT) -> None:
    print("$", Path(call[0]).name, *(word for word in call[1:] if "\n" not in str(word)), flush=True)
    subprocess.run([str(word) for word in call], cwd=cwd, check=True, env=_environment())


def _environment() -> dict[str, str]:
    """Without what would show this checkout to an environment that is to have the wheel alone."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def built(suffix: str) -> Path:
    """The file in dist/ that ends so."""
    found = list((ROOT / "dist").glob(f"cupyattn-{version()}*{suffix}"))
    if len(found) != 1:
        raise SystemExit(
            f"dist/ has {len(found)} files of version {version()} that end in {suffix}: --only build first"
        )
    return found[0]


def build() -> None:
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    run(sys.executable, "-m", "build")
    run(sys.executable, "-m", "twine", "check", "--strict", built(".whl"), built(".tar.gz"))
    text = recipe((ROOT / "recipe" / "meta.yaml").read_text(), built(".tar.gz"))
    (ROOT / "dist" / "meta.yaml").write_text(text)


def try_sdist() -> None:
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(built(".tar.gz")) as archive:
            archive.extractall(folder, filter="data")
        (inside,) = Path(folder).iterdir()
        there = "import cupyattn, pathlib; assert pathlib.Path(cupyattn.__file__).is_relative_to(pathlib.Path.cwd())"
        run(sys.executable, "-c", there, cwd=inside)
        run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *NARROW, cwd=inside)


def try_wheel(python: str) -> None:
    """In an environment of its own."""
    with tempfile.TemporaryDirectory() as folder:
        run(python, "-m", "venv", folder)
        scripts = Path(folder) / ("Scripts" if os.name == "nt" else "bin")
        inside = scripts / "python"
        run(inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", built(".whl"))
        run(inside, "-I", "-W", "error", "-c", SMOKE, version(), cwd=Path(folder))
        for arguments in (["--version"], ["explain", "--seqlen-q", "1", "--seqlen-k", "8192"], ["doctor"]):
            run(scripts / "cupyattn", *arguments, cwd=Path(folder))


def pythons() -> list[str]:
    """Those of the versions that are here and run."""
    found = []
    for number in PYTHONS:
        path = shutil.which(f"python{number}")
        if path and subprocess.run([path, "-c", "import venv, ensurepip"], capture_output=True).returncode == 0:
            found.append(path)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Make and try what a release would be.")
    parser.add_argument("--only", type=lambda text: text.split(","), metavar="STEP,...", help=", ".join(STEPS))
    parser.add_argument("--python", type=lambda text: text.split(","), metavar="PATH,...", help="to try the wheel with")
    given = parser.parse_args()
    if unknown := set(given.only or ()) - set(STEPS):
        parser.error(f"argument --only: no such step: {', '.join(sorted(unknown))}; there are {', '.join(STEPS)}")
    steps = given.only or STEPS
    try:
        if "ready" in steps and (sentences := missing()):
            print("\n".join(["not ready:", *(f"  {sentence}" for sentence in sentences)]))
            if given.only:
                return 1
        if "build" in steps:
            build()
        if "sdist" in steps:
            try_sdist()
        if "wheel" in steps:
            for python in (wanted := given.python or pythons()):
                try_wheel(python)
            print(f"the wheel works with {len(wanted)} Pythons: {', '.join(wanted)}")
    except subprocess.CalledProcessError as error:
        print(f"failed: {' '.join(map(str, error.cmd[:6]))} ...", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
