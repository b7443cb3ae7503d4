"""A small share of `make attack`; calls interrupted at every instruction are in `test_cache_interrupted.py`."""

import attack
import numpy as np
import pytest
from attacks.witness import share_of

SHARES = {
    "interrupted": 1500,
    "fuzz": 1500,
    "caches": 20,
    "elsewhere": 100,
    "processes": 4,
    "folders": 5,
    "sanitized": 2,
}
"""Cases."""


@pytest.mark.parametrize("name", attack.ATTACKS)
def test_nothing_is_lost(name):
    _, found = attack.run(name, seed=20261129, cases=SHARES[name])
    assert found["lost"] == []
    assert found["tried"] > 0 or found["notes"]


def test_a_crash_is_a_finding(monkeypatch):
    monkeypatch.setattr(attack, "__file__", "no such file")
    _, found = attack.run("fuzz", seed=0, cases=1)
    assert "ended with 2" in found["lost"][0]


def test_a_hang_is_a_finding(monkeypatch):
    monkeypatch.setattr(attack, "SECONDS", 0.01)
    _, found = attack.run("caches", seed=0, cases=1)
    assert found["lost"] == ["did not end within 0.01 s"]


def test_what_is_lost_is_told_and_fails(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["attack.py", "--only", "fuzz", "--seed", "5", "--share", "0.001"])
    monkeypatch.setattr(
        attack, "run", lambda name, seed, cases: (1.0, {"tried": 3, "lost": ["seed 5: x"], "notes": ""})
    )
    assert attack.main()
    assert "seed 5: x" in capsys.readouterr().out


def test_a_share_that_is_hardly_a_number_is_none_of_zero():
    gap = np.array([-800.0, -740.0, 0.0, 740.0])
    assert share_of(gap, np.zeros(4)).tolist() == [0.0, np.exp(-740.0), 0.5, 1.0]
