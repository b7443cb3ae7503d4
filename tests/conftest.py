"""What every test shares: one seed; and what pytest looks for them in."""

import numpy as np
import pytest

SEED = 20261121


def pytest_ignore_collect(collection_path):
    """What is beside the tests has no doctests, and may import a peer that is not installed."""
    return True if collection_path.suffix == ".py" and not collection_path.name.startswith("test_") else None


@pytest.fixture
def rng():
    return np.random.default_rng(SEED)
