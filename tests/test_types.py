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


def test_pyright_passes_what_is_right_and_finds_all_that_is_wrong():
    if shutil.which("pyright") is None:
        pytest.skip("needs pyright, which is not installed")
    found = subprocess.run(
        ["pyright", "--project", str(HERE), "--pythonpath", sys.executable], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
