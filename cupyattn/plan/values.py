"""The values that decisions are: a `Plan`, and the tiles by which the CPU and the kernels for Ampere cut a problem."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from cupyattn.plan.hopper import HopperTile
from cupyattn.problem import Problem


class CpuTile(NamedTuple):
    """How the CPU cuts a part: rows and keys of a block of scores, and how many heads and batches share it."""

    block_q: int
    block_k: int
    heads: int
    """Query heads of one group, stacked as rows."""
    pairs: int
    """Groups side by side; more than one only where whole groups fit."""
    batch: int


class Tile(NamedTuple):
    """How one thread block of a GPU cuts the problem."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    queries_in_registers: bool = False


class BackwardTile(NamedTuple):
    """How one thread block cuts the problem: the tile that stays in its shared memory, and those that pass by."""

    stays: int
    """Queries of dq and of a bias, keys of dk and dv."""
    moves: int
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        return f"{self.stays} rows stay, {self.moves} move, {self.num_warps} warps, {self.num_stages} stages"


class BackwardTiles(NamedTuple):
    """Of the kernels of one backward pass, each with what it sums: bits of OF_QUERIES, OF_KEYS, ..."""

    passes: tuple[tuple[int, BackwardTile], ...]
    heads: tuple[int, ...]
    """Query heads that a thread block of each pass takes one after the other, which share keys or values."""

    def heads_of(self, bit: int) -> int:
        """Of the pass that sums it; 1 if there is none."""
        return next((x for (wanted, _), x in zip(self.passes, self.heads, strict=True) if wanted & bit), 1)

    def __str__(self) -> str:
        return "; ".join(f"{_SUMS[wanted]}: {tile}" for wanted, tile in self.passes)


_SUMS = {1: "dq", 2: "dk", 4: "dv", 6: "dk and dv", 8: "dbias"}


@dataclass(frozen=True)
class Plan:
    """What will run, and why nothing else."""

    kernel: str
    """ "numpy", "hopper", "flash" or "splitkv", of gradients "numpy" or "backward"; "none" if all object."""
    device: str
    compute_dtype: str
    tile: CpuTile | Tile | HopperTile | BackwardTiles | None
    num_splits: int
    """Pieces into which the keys of one row are cut, to be merged at the end; the most, if lengths are data."""
    num_workers: int
    """CPU threads, or thread blocks of the GPU's grid."""
    flops: int
    bytes: int
    reason: str
    objections: tuple[tuple[str, tuple[str, ...]], ...] = field(default=())
    """Each other implementation's reasons against it."""
    split_size: int = 0
    """Keys of a split; where lengths are data, 0: found on the GPU, from those there; -1: even splits, as many as may
    be."""
    num_slots: int = 0
    """Thread blocks of a kernel that splits keys that the GPU runs at once."""
    peers: tuple[tuple[str, int], ...] = field(default=())
    """Splits that others would have made of it."""
    notes: tuple[str, ...] = field(default=())
    """What else is done: what float8 operands stand for, which of these very arrays are copied."""
    instead: Plan | None = field(default=None)
    """What runs where the arrays lie so that the kernel cannot read them, and are not copied for it."""
    memory: int | None = field(default=None, compare=False)
    """Bytes besides the operands, at the peak: results, and what is needed to make them; None: nobody has asked."""
    cache_bytes: int = field(default=0, compare=False)
    """Of the cache that keys are in, used or not."""

    def is_scheduled(self, problem: Problem) -> bool:
        """Whether a launch ahead of the kernel tells its thread blocks, from the lengths on the GPU, what is whose."""
        return self.kernel == "splitkv" and self.num_splits > 1 and problem.layout.lengths_are_data

    def __hash__(self) -> int:
        """Remembered: launches are looked up by their plan."""
        return self._hash

    def __getstate__(self) -> dict[str, Any]:
        """Without the hash: strings hash differently in every process."""
        return {name: value for name, value in self.__dict__.items() if name != "_hash"}

    @cached_property
    def _hash(self) -> int:
        return hash((self.kernel, self.device, self.tile, self.num_splits, self.split_size, self.flops, self.bytes))

    def __str__(self) -> str:
        lines = [
            f"{self.kernel} on {self.device}: {self.reason}",
            f"  tile       {self.tile}",
            f"  splits     {self.num_splits}",
            f"  workers    {self.num_workers}",
            f"  arithmetic {self.compute_dtype}, {self.flops:.3g} flop, {self.bytes:.3g} bytes",
        ]
        if self.memory is not None:
            lines.append(f"  memory     {self.memory:.3g} bytes besides the operands, results among them")
        if self.cache_bytes:
            lines.append(f"  cache      {self.cache_bytes:.3g} bytes")
        lines += [f"  {name} would make {splits} splits" for name, splits in self.peers]
        lines += [f"  {note}" for note in self.notes]
        width = max((len(name) for name, _ in self.objections), default=0) + 1
        lines += [f"  not {name:<{width}}{reason}" for name, reasons in self.objections for reason in reasons]
        return "\n".join(lines)
