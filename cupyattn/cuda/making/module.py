"""Kernels loaded on a device, ready to be launched.

From memory, by what CuPy's RawModule is made of: a path would be opened again, and whoever is faster could have
another file there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from cupyattn.cuda.making.cache import find
from cupyattn.cuda.making.compiler import target_for


@dataclass(frozen=True, slots=True)
class Specialisation:
    """One kernel out of a source, and how its blocks are launched."""

    source: str
    """The file, "flash.cu"."""
    expression: str
    """The kernel's C++ name, as NVRTC is asked for it."""
    threads: int
    """Of a block."""
    shared_memory: int
    """Dynamic bytes of a block."""
    cluster: int = 1
    """Blocks of a cluster, as the kernel was compiled; a grid has whole ones."""


class Launch(NamedTuple):
    """A launch of which nothing is missing; called, it is queued."""

    function: Any
    grid: tuple[int, int, int]
    what: Specialisation
    record: Any
    stream: Any
    kept: list[Any]
    """Memory that has to stay until then."""

    def __call__(self) -> None:
        if self.grid[0]:
            self.function(self.grid, (self.what.threads, 1, 1), (self.record,), self.what.shared_memory, self.stream)


@cache
def kernel(specialisation: Specialisation, device_index: int) -> Any:
    """The kernel as a `cupy.cuda.function.Function`: ``kernel(grid, block, args, shared_memory, stream)``."""
    import cupy

    device = cupy.cuda.Device(device_index)
    capability = device.compute_capability  # "90", "120"
    target = target_for((int(capability[:-1]), int(capability[-1])))
    version = cupy.cuda.runtime.driverGetVersion() // 1000
    entry = find(specialisation.source, specialisation.expression, target, driver=version)
    with device:
        module = cupy.cuda.function.Module()
        module.load(entry.image)
        loaded = module.get_function(entry.name)
        driver = cupy.cuda.driver
        attribute = driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES  # above 48 KB it has to be asked for
        driver.funcSetAttribute(loaded.ptr, attribute, specialisation.shared_memory)
        return loaded
