"""How it will be done: the decisions, as values.

`choose` asks every implementation for its objections to a problem on a device, takes the first that
has none, and returns a `Plan` that prints itself.  Nothing here touches an array or a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from cupyattn.problem import ITEMSIZE, Device, Problem, Sizes, Span

WORTH_THREADS = 100_000_000
"""Floating-point operations from which starting threads pays on a CPU: one or two milliseconds."""


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


@dataclass(frozen=True)
class Plan:
    """What will run, and why nothing else."""

    kernel: str
    """ "numpy", "flash" or "splitkv"; "none" if every implementation objects."""
    device: str
    compute_dtype: str
    tile: CpuTile | Tile | None
    num_splits: int
    """Pieces into which the keys of one row are cut, to be merged at the end."""
    num_workers: int
    """CPU threads, or thread blocks of the GPU's grid."""
    flops: int
    bytes: int
    reason: str
    objections: tuple[tuple[str, tuple[str, ...]], ...] = field(default=())
    """Each other implementation's reasons against it."""

    def __str__(self) -> str:
        lines = [
            f"{self.kernel} on {self.device}: {self.reason}",
            f"  tile       {self.tile}",
            f"  splits     {self.num_splits}",
            f"  workers    {self.num_workers}",
            f"  arithmetic {self.compute_dtype}, {self.flops:.3g} flop, {self.bytes:.3g} bytes",
        ]
        lines += [f"  not {name:<8}{reason}" for name, reasons in self.objections for reason in reasons]
        return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------
# The CPU
# ---------------------------------------------------------------------------------------------------

BLOCK_Q, BLOCK_K = 1024, 512
"""Rows and keys of a block of scores, the best of those tried: taller blocks make better matrix products and
wider ones fewer steps of Python, until they leave a core's second-level cache too far behind."""
SCORES_SIDE_BY_SIDE = 2**17
"""Scores a tile may hold when it takes several small heads or many keys at once: 1 MB of float64."""
MOST_KEYS = 8192
FEWEST_ROWS = 128
"""Splitting rows further over more threads costs more than it gains."""


@lru_cache(maxsize=4096)
def cpu_tile(sizes: Sizes, batch: int, seqlen_q: int, seqlen_k: int, num_workers: int) -> CpuTile:
    """How to cut a part: tall blocks of scores, and several heads or batches side by side if they are small.

    Several workers get three tiles each, as far as there are rows to share out, and heads are stacked or set
    side by side only where every worker still has one.
    """
    group = sizes.queries_per_pair
    num_pairs = max(1, sizes.num_heads // group)
    enough = 3 * num_workers if num_workers > 1 else 1
    block_q = max(1, min(seqlen_q, BLOCK_Q))
    while block_q >= 2 * FEWEST_ROWS and batch * sizes.num_heads * -(-seqlen_q // block_q) < enough:
        block_q = -(-block_q // 2)
    tiles = batch * sizes.num_heads * -(-seqlen_q // block_q)
    heads = max(1, min(group, BLOCK_Q // block_q, tiles // num_workers))
    rows = block_q * heads
    block_k = max(1, min(seqlen_k, MOST_KEYS, max(BLOCK_K, SCORES_SIDE_BY_SIDE // rows)))
    pairs = batches = 1
    each_has_its_keys = sizes.num_heads_k == sizes.num_heads_v == num_pairs
    if heads == group and each_has_its_keys and block_k == seqlen_k:
        room = min(SCORES_SIDE_BY_SIDE // (rows * block_k), num_pairs * batch // enough)
        pairs = max(1, min(num_pairs, room))
        batches = max(1, min(batch, room // pairs)) if pairs == num_pairs else 1
    return CpuTile(block_q, block_k, heads, pairs, batches)


def objections_of_numpy(problem: Problem, device: Device) -> tuple[str, ...]:
    if device.kind == "cpu":
        return ()
    return (f"works on the CPU, and the arrays are on {device.name}",)


# ---------------------------------------------------------------------------------------------------
# The GPU
# ---------------------------------------------------------------------------------------------------


def _objections_of_a_kernel(problem: Problem, device: Device) -> list[str]:
    """What every CUDA kernel asks for."""
    if device.kind != "cuda":
        return ["works on an NVIDIA GPU, and the arrays are on the CPU"]
    reasons = []
    if device.compute_capability is None or device.compute_capability < (8, 0):
        reasons.append("needs compute capability 8.0 or newer (Ampere)")
    if problem.dtype == "float64":
        reasons.append("has no float64 arithmetic")
    if problem.compute_dtype not in (None, "float32"):
        reasons.append(f"accumulates in float32, not in {problem.compute_dtype}")
    for name in ("head_dim", "head_dim_v"):
        size = getattr(problem.sizes, name)
        if size % 8 or not 0 < size <= 256:
            reasons.append(f"needs {name} to be a multiple of 8 from 8 to 256, not {size}")
    if len(problem.sizes.batch_shape) > 1:
        reasons.append("needs at most one batch axis")
    if problem.needs_dropout_mask:
        reasons.append("does not write out dropped weights (return_attn_probs with dropout)")
    return reasons


def objections_of_flash(problem: Problem, device: Device) -> tuple[str, ...]:
    reasons = _objections_of_a_kernel(problem, device)
    if device.kind == "cuda" and problem.layout.page_size is not None:
        reasons.append("reads k and v without a block_table")
    return tuple(reasons)


def objections_of_splitkv(problem: Problem, device: Device) -> tuple[str, ...]:
    reasons = _objections_of_a_kernel(problem, device)
    rows = problem.sizes.seqlen_q * problem.sizes.queries_per_pair
    if device.kind == "cuda" and rows > 64:
        reasons.append(f"is for decoding: at most 64 query rows per key head, not {rows}")
    if device.kind == "cuda" and problem.dropout_p > 0.0:
        reasons.append("has no dropout")
    return tuple(reasons)


def gpu_tile(problem: Problem, device: Device) -> Tile:
    """The largest mma.sync tile whose q, k and v fit in shared memory, one stage each."""
    head_dim = max(problem.sizes.head_dim, problem.sizes.head_dim_v)
    item = ITEMSIZE[problem.dtype]
    for block_q, block_k in ((128, 128), (128, 64), (64, 64), (64, 32)):
        if (block_q + 2 * block_k) * head_dim * item <= device.shared_memory and block_k * head_dim <= 128 * 128:
            return Tile(block_q, block_k, block_q // 16, 2)
    return Tile(64, 32, 4, 1)


def splits_by_wave_efficiency(blocks: int, units: int, key_blocks: int, most: int = 128) -> int:
    """The fewest splits within 85% of the best wave efficiency.

    `blocks` thread blocks on `units` multiprocessors run in waves; the last one may be nearly empty.
    48 blocks on 108 units: two splits fill 96/108 = 0.89 of a wave, three 144/216 = 0.67.
    Source: FlashAttention-3's rule, see flash_attn hopper/heuristics.h.
    """
    if blocks >= 0.8 * units or key_blocks <= 4:
        return 1

    def efficiency(splits: int) -> float:
        waves = blocks * splits / units
        return waves / math.ceil(waves)

    candidates = range(1, min(most, units, key_blocks) + 1)
    best = max(map(efficiency, candidates))
    return next(splits for splits in candidates if efficiency(splits) >= 0.85 * best)


# ---------------------------------------------------------------------------------------------------
# Choosing
# ---------------------------------------------------------------------------------------------------

IMPLEMENTATIONS: dict[str, Callable[[Problem, Device], tuple[str, ...]]] = {
    "numpy": objections_of_numpy,
    "splitkv": objections_of_splitkv,
    "flash": objections_of_flash,
}
"""In the order tried: splitkv before flash, since it takes only what it is better at."""


@lru_cache(maxsize=4096)
def choose(problem: Problem, device: Device) -> Plan:
    """The plan for a problem on a device; its kernel is "none" if every implementation objects."""
    asked = {name: objections(problem, device) for name, objections in IMPLEMENTATIONS.items()}
    kernel = next((name for name, reasons in asked.items() if not reasons), "none")
    against = dict(asked)
    against.pop(kernel, None)
    if kernel == "splitkv":
        against["flash"] = against["flash"] or ("would leave most of the GPU idle: too few query rows",)
    tile: CpuTile | Tile | None = None
    splits, workers, compute, reason = 1, 1, "float32", "every implementation objects"
    sizes = problem.sizes
    if kernel == "numpy":
        compute = problem.compute_dtype or "float64"
        workers = device.num_units if problem.flops >= WORTH_THREADS else 1
        batch = sizes.batch_shape[-1] if sizes.batch_shape else 1
        tile = cpu_tile(sizes, batch, sizes.seqlen_q, sizes.seqlen_k, workers)
        reason = f"{compute} reference arithmetic, " + (
            f"up to {workers} threads" if workers > 1 else "too little work for threads"
        )
    elif kernel != "none":
        tile = gpu_tile(problem, device)
        groups = sizes.batch * sizes.num_heads // sizes.queries_per_pair
        if kernel == "splitkv":
            seen = problem.mask.touched(Span(0, max(1, sizes.seqlen_q)), sizes.seqlen_q, sizes.seqlen_k)
            key_blocks = math.ceil(len(seen) / tile.block_k)
            splits = splits_by_wave_efficiency(groups, device.num_units, key_blocks)
            workers = groups * splits
            reason = f"{groups} key heads cannot fill {device.num_units} SMs; {splits} splits of the keys do better"
            if splits == 1:
                reason = f"{groups} key heads, no split: the SMs are busy or the keys are few"
        else:
            workers = sizes.batch * sizes.num_heads * math.ceil(sizes.seqlen_q / tile.block_q)
            reason = f"{workers} tiles of {tile.block_q} rows"
    return Plan(
        kernel,
        device.name,
        compute,
        tile,
        splits,
        workers,
        problem.flops,
        problem.bytes,
        reason,
        tuple((name, reasons) for name, reasons in against.items()),
    )
