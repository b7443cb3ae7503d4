"""What checkers of types make of right and wrong uses: every right one passes, and every wrong one is found."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cupyattn

HERE = Path(__file__).parent / "typed"
ROOT = Path(cupyattn.__file__).parents[1]


def test_mypy_passes_what_is_right_and_finds_all_that_is_wrong(tmp_path):
    pytest.importorskip("mypy")
    options = ["--config-file", str(HERE / "mypy.ini"), "--cache-dir", str(tmp_path)]
    call = [sys.executable, "-m", "mypy", *options, str(HERE / "uses.py")]
    found = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("checker", ["pyright", "basedpyright"])
def test_pyright_passes_what_is_right_and_finds_all_that_is_wrong(checker):
    """Pyright's wheel fetches node when it first runs; basedpyright's, which is its twin, comes with one."""
    beside = str(Path(sys.executable).parent)  # the environment's own tools, whether or not it is activated
    program = shutil.which(checker, path=beside) or shutil.which(checker)
    if program is None:
        pytest.skip(f"needs {checker}, which is not installed")
    call = [program, "--project", str(HERE), "--pythonpath", sys.executable]
    found = subprocess.run(call, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
