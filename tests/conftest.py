"""What every test shares: one seed; and what pytest looks for them in."""

import os
import sys

import numpy as np
import pytest

SEED = 20261121


def pytest_ignore_collect(collection_path):
    """What is beside the tests has no doctests, and may import a peer that is not installed."""
    return True if collection_path.suffix == ".py" and not collection_path.name.startswith("test_") else None


def pytest_runtest_teardown(item):
    """A fault on a GPU is in all that its process does from then on: another worker has to do the rest."""
    if item.get_closest_marker("gpu") and "PYTEST_XDIST_WORKER" in os.environ and "cupy" in sys.modules:
        cupy = sys.modules["cupy"]
        try:
            if cupy.cuda.is_available():
                cupy.cuda.runtime.deviceSynchronize()
        except cupy.cuda.runtime.CUDARuntimeError:
            os._exit(70)


@pytest.fixture
def rng():
    return np.random.default_rng(SEED)
