"""What the doctor finds of packages, cores and a small call."""

import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest

from cupyattn.command import findings

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def nothing(what):
    pass


def found_of(name):
    return next(finding for finding in findings.packages(nothing) if finding.what == name)


def test_the_oldest_versions_are_those_of_pyproject():
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    wanted = (re.fullmatch(r"([\w-]+)>=([\d.]+)", one) for one in project["dependencies"])
    assert {one[1]: one[2] for one in wanted} == findings.REQUIRED


def test_the_oldest_versions_of_what_is_optional_are_those_of_pyproject():
    extras = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    wanted = {name: set() for name in findings.OPTIONAL}
    for one in (one for extra in extras.values() for one in extra):
        found = re.fullmatch(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", one)
        if found and found[1] in wanted:
            wanted[found[1]].add(found[2])
    assert {name: {oldest} for name, (oldest, *_) in findings.OPTIONAL.items()} == wanted


def test_the_extra_that_is_advised_brings_what_is_missing():
    extras = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    for name, (_, _, package) in findings.OPTIONAL.items():
        extra = re.fullmatch(r"cupyattn\[(\w+)\]", package)
        assert package == name if extra is None else any(re.match(rf"{name}\b", one) for one in extras[extra[1]])


def test_what_is_installed_is_found_with_its_version():
    assert found_of("numpy") == findings.Finding("numpy", importlib.metadata.version("numpy"))


def test_a_library_that_is_missing_is_a_note_and_nothing_broken(monkeypatch):
    monkeypatch.setattr(findings, "version_of", lambda name: None)
    assert findings._optional("jax", *findings.OPTIONAL["jax"]) == findings.Finding(
        "jax", "not installed", "for JAX arrays: pip install cupyattn[jax]"
    )


@pytest.mark.parametrize(
    ("version", "advice"), [(None, "pip install 'numpy>=2.0'"), ("1.26.4", "too old: pip install")]
)
def test_what_is_needed_and_missing_or_too_old_is_broken(version, advice, monkeypatch):
    monkeypatch.setattr(findings, "version_of", lambda name: version)
    finding = findings._required("numpy", "2.0")
    assert finding.broken
    assert finding.advice.startswith(advice)


def test_a_library_that_cannot_be_imported_is_broken(monkeypatch, tmp_path):
    (tmp_path / "cupyattn_broken.py").write_text("raise OSError('libsomething.so: no such file\\nand more')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(findings, "version_of", lambda name: "1.0")
    finding = findings._optional("cupyattn_broken", "", "for tests", "nothing")
    assert finding.broken
    assert finding.found == "1.0, which cannot be imported: libsomething.so: no such file"
    assert "cupyattn_broken" not in sys.modules


@pytest.mark.parametrize(
    ("version", "oldest", "expected"),
    [
        ("2.13.0+cpu", "2.6", False),
        ("2.5.1", "2.6", True),
        ("5.0.0rc1", "5", False),
        ("1.0", "", False),
        ("10", "9", False),
    ],
)
def test_versions_are_compared_by_their_numbers(version, oldest, expected):
    assert findings.older(version, oldest) is expected


# ---- Cores ------------------------------------------------------------------------------------------


@pytest.fixture
def groups(tmp_path):
    """Control groups, /outer/inner, and this process in the inner one."""
    root = tmp_path / "groups"
    (root / "outer" / "inner").mkdir(parents=True)
    membership = tmp_path / "membership"
    membership.write_text("0::/outer/inner\n")
    return root, membership


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, None),
        ({"outer/inner": "max 100000"}, None),
        ({"outer/inner": "250000 100000"}, 2.5),
        ({"outer": "100000 100000", "outer/inner": "300000 100000"}, 1.0),
        ({".": "50000 100000"}, 0.5),
    ],
)
def test_the_smallest_quota_on_the_way_up_counts(groups, limits, expected):
    root, membership = groups
    for place, text in limits.items():
        (root / place / "cpu.max").write_text(f"{text}\n")
    assert findings.cpu_quota(root, membership) == expected


@pytest.mark.parametrize(("quota", "expected"), [("400000", 4.0), ("-1", None)])
def test_groups_of_the_first_version_are_read_too(tmp_path, quota, expected):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota)
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
    membership = tmp_path / "membership"
    membership.write_text("4:cpu,cpuacct:/somewhere\n")
    assert findings.cpu_quota(tmp_path, membership) == expected


def test_more_threads_than_time_gets_advice(monkeypatch):
    monkeypatch.setattr(findings, "cpu_quota", lambda: 0.5)
    assert findings.cores().advice.endswith("set OPENBLAS_NUM_THREADS=1")


def test_a_limit_that_leaves_cores_idle_gets_advice(monkeypatch):
    monkeypatch.setattr(findings, "cpu_quota", lambda: None)
    monkeypatch.setattr(findings, "num_cores", lambda: 64)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")
    assert "OPENBLAS_NUM_THREADS holds cupyattn to" in findings.cores().advice.replace(" and OMP_NUM_THREADS", "")


def test_the_blas_is_named_with_its_threads():
    finding = findings.blas()
    assert re.match(r"\w+ \S+, \d+ threads", finding.found) or finding.advice


# ---- A small call -----------------------------------------------------------------------------------


def test_a_small_call_is_right():
    assert not findings.small_call().broken


def wrong(q, k, v, **options):
    return v


def raising(q, k, v, **options):
    raise RuntimeError("no arithmetic")


@pytest.mark.parametrize(("call", "words"), [(wrong, "wrong by "), (raising, "RuntimeError: no arithmetic")])
def test_a_small_call_that_is_wrong_or_raises_is_broken(call, words, monkeypatch):
    monkeypatch.setattr(findings, "attention", call)
    finding = findings.small_call()
    assert finding.broken
    assert finding.found.startswith(words)
