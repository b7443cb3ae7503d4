"""What these tests share: the GPU's door on the CPU."""

import pytest
from driven import driver, torch

from cupyattn.distributed import verbs

__all__ = ["driver", "gpu", "torch"]


@pytest.fixture
def gpu(torch, monkeypatch):
    """torch, whose tensors are on a GPU; a stream there has nothing to be waited for."""
    monkeypatch.setattr(verbs, "synchronize", lambda array: None)
    return torch
