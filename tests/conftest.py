"""What every test shares: one seed."""

import numpy as np
import pytest

SEED = 20261121


@pytest.fixture
def rng():
    return np.random.default_rng(SEED)
