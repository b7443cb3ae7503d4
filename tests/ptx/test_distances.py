"""What NVRTC makes of kernels that count ALiBi's distances from elsewhere than the mask's diagonal, executed.

No plan chooses these by default, so that `make proof` does not meet them otherwise.
"""

import emulated
import emulated_backward
import numpy as np
import pytest
from cases import DISTANCES
from proofs.executed import executed

import ptx
from cupyattn.problem import NAMED_DEVICES

CASES = ("every third token", "behind one aligned elsewhere")
"""One whose signs change inside of a tile, and one of which slopes are added to products."""
FORWARD = {"flash": "sm_80", "splitkv": "sm_80", "hopper": "sm_90a"}
BACKWARD = {"backward": ("A100", "sm_80"), "hopper_backward": ("H100", "sm_90a")}


@pytest.fixture(autouse=True)
def _compilers():
    ptx.require_compiler()
    yield
    ptx.kernels.clear()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kernel", ["flash", *(pytest.param(x, marks=pytest.mark.long) for x in ("splitkv", "hopper"))])
def test_numbers_are_right_and_no_rule_is_broken(kernel, name):
    arrays, options, _ = DISTANCES[name](np.random.default_rng(5), "float16")
    with executed(FORWARD[kernel]) as watch:
        emulated.check(arrays, options, kernel, 1, 3)
    assert {source for source, _, _ in watch.built} >= {f"{kernel}.cu"}


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kernel", BACKWARD)
def test_gradients_are_right_and_no_rule_is_broken(kernel, name):
    device, target = BACKWARD[kernel]
    arrays, options, _ = DISTANCES[name](np.random.default_rng(5), "float16")
    arrays = emulated_backward.with_dout(np.random.default_rng(6), arrays, options, dlse=True)
    with executed(target) as watch:
        found = emulated_backward.run(arrays, options, 1, 3, device=NAMED_DEVICES[device])
    emulated_backward.hold(arrays, found)
    assert {source for source, _, _ in watch.built} >= {f"{kernel}.cu"}
