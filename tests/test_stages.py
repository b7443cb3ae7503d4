"""The model of stages of keys and values, `asv_benchmarks/stages.py`."""

import sys
from pathlib import Path

import pytest

SUITE = Path(__file__).parents[1] / "asv_benchmarks"


@pytest.fixture
def stages(monkeypatch):
    if not SUITE.is_dir():
        pytest.skip("asv_benchmarks/ is not here (it is not in the sdist)")
    monkeypatch.setattr(sys, "path", [str(SUITE), *sys.path])
    import stages

    return stages


TENSOR = 32
"""Clocks of tensor cores for each key of 256 columns."""


def test_what_is_planned_keeps_the_tensor_cores_busy(stages):
    for memory in stages.MEMORIES.values():
        assert stages.clocks_a_key(stages.Tile(80, 2, 2), memory) == pytest.approx(TENSOR, rel=0.02)


@pytest.mark.parametrize("tile", [(96, 2, 1), (96, 1, 2), (96, 1, 1)])
def test_one_stage_lasts_as_long_as_its_products_and_its_way_here(stages, tile):
    memory = stages.Memory(latency=2000, rate=64)
    found = stages.clocks_a_key(stages.Tile(*tile), memory)
    products = TENSOR / 2
    box = stages.HEAD_DIM * stages.ITEM
    assert found >= products + memory.latency / 96 + box / memory.rate


def test_no_number_of_stages_makes_tensor_cores_faster(stages):
    at_once = stages.Memory(latency=0, rate=1e9)
    for tile in stages.TILES:
        assert stages.clocks_a_key(tile, at_once) >= 0.99 * TENSOR  # the first block has no product of weights


def test_a_slow_way_is_what_binds(stages):
    memory = stages.Memory(latency=0, rate=16)
    found = stages.clocks_a_key(stages.Tile(80, 2, 2), memory)
    assert found == pytest.approx(2 * stages.HEAD_DIM * stages.ITEM / memory.rate, rel=0.02)


def test_tiles_fit_into_shared_memory(stages):
    assert all(tile.shared_bytes <= 227 * 1024 for tile in stages.TILES)
