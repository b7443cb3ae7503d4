"""The model of a Hopper kernel's clocks, `asv_benchmarks/clocks.py`: what is around its loop."""

import sys
from pathlib import Path

import pytest

SUITE = Path(__file__).parents[1] / "asv_benchmarks"
TENSOR = 2048
"""Clocks of the tensor cores for a block of 128 keys, 128 rows and columns."""


@pytest.mark.parametrize(("seqlen", "bar"), [(2048, 0.9), (4096, 0.94), (16384, 0.98)])
def test_the_busiest_block_is_in_its_loop_for_most_of_the_time(seqlen, bar, monkeypatch):
    if not SUITE.is_dir():
        pytest.skip("asv_benchmarks/ is not here (it is not in the sdist)")
    monkeypatch.setattr(sys, "path", [str(SUITE), *sys.path])
    import clocks

    share, by_itself = clocks.around(TENSOR)[seqlen]
    assert by_itself < bar <= share < 1
