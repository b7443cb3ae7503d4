"""Fixtures of what stands in for a GPU."""

from driven import driver, torch

__all__ = ["driver", "torch"]
