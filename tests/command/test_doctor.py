"""`cupyattn doctor`: its lines, and what its status says."""

import pytest

from cupyattn.command import devices, findings, main
from cupyattn.command.findings import Finding

pytestmark = pytest.mark.usefixtures("folder")


@pytest.fixture
def told(monkeypatch):
    """What is found; a list to be changed."""
    found = [Finding("jax", "not installed", "pip install jax")]
    monkeypatch.setattr(findings, "packages", lambda step: iter(found))
    monkeypatch.setattr(findings, "processor", lambda: iter([Finding("cores", "64")]))
    monkeypatch.setattr(devices, "gpus", lambda step: iter(()))
    return found


def test_advice_stands_under_its_line_and_makes_it_a_note(told, capsys):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("  note    jax         not installed")
    assert lines[at + 1].strip() == "-> pip install jax"
    assert lines[at + 1].index("->") == lines[at].index("not installed")
    assert "  ok      cores       64" in lines
    assert lines[-1] == "Nothing is broken."


def test_what_is_broken_makes_the_status_one_and_is_named_at_the_end(told, capsys):
    told.append(Finding("CuPy", "two of them", "one at a time", broken=True))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "  BROKEN  CuPy        two of them" in out
    assert out.endswith("\nBroken: CuPy.\n")


def test_of_this_machine_every_section_has_lines(monkeypatch, capsys):
    monkeypatch.setattr(findings, "OPTIONAL", {})  # whose imports take seconds
    status = main(["doctor"])
    out = capsys.readouterr().out
    sections = [part.splitlines() for part in out.split("\n\n")]
    assert [section[0] for section in sections[:-1]] == [
        "Packages",
        "CPU",
        "GPU",
        "Compiled kernels",
        "What runs where",
    ]
    assert all(len(section) > 1 for section in sections[:-1])
    assert status == int("BROKEN" in out)
