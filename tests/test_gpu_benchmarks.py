"""What `make gpu` times can be asked for: a section that raises there costs what a machine with a GPU is lent for."""

import sys
from pathlib import Path

import pytest

from cupyattn.plan.hopper import base_tile
from cupyattn.problem import NAMED_DEVICES

torch = pytest.importorskip("torch")
SUITE = Path(__file__).parents[1] / "asv_benchmarks"


@pytest.fixture
def suite(monkeypatch):
    """(gpu_hopper, gpu_tools)"""
    monkeypatch.setattr(sys, "path", [str(SUITE), *sys.path])
    import gpu_hopper
    import gpu_tools

    return gpu_hopper, gpu_tools


def operands(head_dim, dtype):
    return [torch.zeros((1, 256, 2, head_dim)).to(dtype) for _ in range(3)]


def test_every_variant_is_a_call(suite):
    gpu_hopper, gpu_tools = suite
    for (head_dim, reach), sizes in gpu_hopper.SIZES.items():
        causal = reach == gpu_hopper.RIGHT_EDGE
        for tile in gpu_hopper.variants(base_tile(head_dim, head_dim, reach, "bfloat16"), sizes).values():
            call = gpu_tools.with_tile(torch, *operands(head_dim, torch.bfloat16), tile, "hopper", causal=causal)
            assert callable(call)


@pytest.mark.parametrize("causal", [False, True])
def test_every_variant_of_float8_is_a_call(suite, causal):
    gpu_hopper, gpu_tools = suite
    planned = base_tile(128, 128, gpu_hopper.RIGHT_EDGE if causal else gpu_hopper.ALL_KEYS, gpu_hopper.FLOAT8)
    for tile in gpu_hopper.tiles_of_float8(planned).values():
        arrays = operands(128, torch.float8_e4m3fn)
        assert callable(gpu_tools.with_tile(torch, *arrays, tile, "hopper", causal=causal))


def test_every_kernel_that_is_timed_has_a_name(suite):
    gpu_hopper, _ = suite
    names = [found.expression for found in gpu_hopper.kernels()]
    assert len(names) == len(set(names)) > 50


def test_every_kernel_of_gradients_has_a_name_and_fits(suite):
    import gpu_gradients

    found = gpu_gradients.kernels()
    assert len({x.expression for x in found}) == len(found) > 20
    assert max(x.shared_memory for x in found) <= NAMED_DEVICES["H100"].shared_memory
