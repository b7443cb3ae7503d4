"""What these tests share: the GPU's door on the CPU."""

from driven import driver, torch

__all__ = ["driver", "torch"]
