"""Which arithmetic a rank has: that of the CPU, or of a GPU."""

from __future__ import annotations

from typing import Any, TypeAlias

from cupyattn.arrays import Arrays
from cupyattn.distributed.asked import Asked
from cupyattn.distributed.gpu import GpuWork
from cupyattn.distributed.work import Work

AnyWork: TypeAlias = Work | GpuWork
AnyState: TypeAlias = Any
"""What rows have come to, as the work has it."""


def work_of(asked: Asked, operands: Arrays) -> AnyWork:
    """Of operands where the caller's arrays are."""
    if asked.visit.kind == "cuda":
        return GpuWork(asked, operands)
    return Work(asked, operands, asked.visit.device())
