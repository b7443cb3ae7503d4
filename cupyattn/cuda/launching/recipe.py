"""A launch as a value: what of it does not depend on addresses, and what is known of the arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from cupyattn.cuda.launching.maps import BoxMap
from cupyattn.cuda.launching.views import Strides, steps_are_aligned
from cupyattn.cuda.making.module import Specialisation
from cupyattn.problem import Shape


class Workspace(NamedTuple):
    """Scratch memory a launch needs, in elements."""

    partial_out: int = 0
    """float32."""
    partial_lse: int = 0
    """float32."""
    told: int = 0
    """int32."""
    schedule: int = 0
    """int32."""


@dataclass(frozen=True)
class Recipe:
    """All of a launch that does not depend on addresses."""

    specialisation: Specialisation
    grid: tuple[int, int, int]
    tail: bytes
    workspace: Workspace
    copies: tuple[str, ...] = ()
    """Operands that no kernel can read as they are; if there are any, the rest is empty."""
    remade: tuple[str, ...] = ()
    """Operands that are worth a copy, in memory of its own and as large as all repetitions; likewise."""
    maps: tuple[BoxMap, ...] = ()
    """Of q, k, v and out, in front of the record, if the kernel goes by tensor maps."""
    behind: bytes = b""
    """What such a kernel, or one that takes float8, is told besides, after the addresses of descales."""
    schedule: Recipe | None = None
    """Of the launch in front of it, which makes a schedule."""
    merge: Recipe | None = None
    """Of the launch behind it, which merges its splits."""

    @property
    def launches(self) -> tuple[Recipe, ...]:
        """All of a call, one behind the other."""
        return tuple(x for x in (self.schedule, self, self.merge) if x is not None)


class FactsOfArrays(NamedTuple):
    """What is known of operands and results besides their addresses, by name."""

    shapes: Mapping[str, Shape]
    strides: Mapping[str, Strides]
    dtypes: Mapping[str, str]
    starts_are_aligned: bool
    """q, k and v start at multiples of 16 bytes."""

    @property
    def rows_are_aligned(self) -> bool:
        """So does every row of them."""
        steps = (steps_are_aligned(self.strides[name], self.dtypes[name]) for name in ("q", "k", "v"))
        return self.starts_are_aligned and all(steps)
