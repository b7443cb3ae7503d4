"""Who is measured against whom: all of them compute the same."""

import numpy as np
import pytest

from cupyattn.command import contenders
from cupyattn.command.contenders import Sizes

SIZES = Sizes(batch=2, seqlen=9, num_heads=4, num_heads_kv=2, head_dim=8)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("against", ["naive", "torch"])
def test_all_compute_the_same(causal, against):
    if against == "torch":
        pytest.importorskip("torch")
    calls, skipped = contenders.calls(SIZES, "float32", causal, "cpu", against)
    assert list(calls) == ["cupyattn float64", "cupyattn float32", f"{against} float32"]
    assert skipped == {}
    for call in calls.values():
        np.testing.assert_allclose(call.result(), call.exact(), rtol=0, atol=1e-5)


def test_against_torch_all_take_tensors():
    torch = pytest.importorskip("torch")
    calls, _ = contenders.calls(SIZES, "float32", False, "cpu", "torch")
    assert all(isinstance(call.run(), torch.Tensor) for call in calls.values())


def test_in_float64_there_is_one_of_ours():
    calls, _ = contenders.calls(SIZES, "float64", False, "cpu", "naive")
    assert list(calls) == ["cupyattn float64", "naive float64"]


def test_the_naive_formula_is_left_out_where_its_scores_would_fill_the_memory(monkeypatch):
    monkeypatch.setattr(contenders, "memory_of_machine", lambda: 1000.0)
    calls, skipped = contenders.calls(SIZES, "float32", False, "cpu", "naive")
    assert list(calls) == ["cupyattn float64", "cupyattn float32"]
    assert skipped["naive float32"].startswith("its scores would take")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_on_a_gpu_both_take_the_same_tensors(dtype):
    """Here on torch's CPU device: there is one way for both."""
    pytest.importorskip("torch")
    arrays = [np.random.default_rng(0).standard_normal((1, 2, 9, 8), np.float32) for _ in range(3)]
    calls = contenders._on_a_gpu(arrays, dtype, True, device="cpu")
    assert list(calls) == [f"cupyattn {dtype}", f"torch {dtype}"]
    tolerance = 0.02 if dtype == "bfloat16" else 1e-5
    for call in calls.values():
        np.testing.assert_allclose(call.result(), call.exact(), rtol=0, atol=tolerance)
