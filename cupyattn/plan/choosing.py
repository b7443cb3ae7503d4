"""How it will be done: the decisions, as values.

`choose` asks every implementation for its objections to a problem on a device, takes the first that
has none, and returns a `Plan` that prints itself.  Nothing here touches an array or a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from cupyattn.plan.hopper import KEYS_IN_A_BOX, HopperTile, hopper_tile, num_tiles
from cupyattn.plan.splits import BLOCKS_PER_UNIT, FEWEST_KEYS, PEERS, split
from cupyattn.problem import FLOAT8, Device, Problem, Sizes

WORTH_THREADS = 100_000_000
"""Floating-point operations from which starting threads pays on a CPU: two or three milliseconds."""


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


@dataclass(frozen=True)
class Plan:
    """What will run, and why nothing else."""

    kernel: str
    """ "numpy", "hopper", "flash" or "splitkv"; "none" if every implementation objects."""
    device: str
    compute_dtype: str
    tile: CpuTile | Tile | HopperTile | None
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
    """Keys of a split; 0: found on the GPU, from the lengths there."""
    num_slots: int = 0
    """Thread blocks of the split-KV kernel that the GPU runs at once."""
    peers: tuple[tuple[str, int], ...] = field(default=())
    """Splits that others would have made of it."""
    notes: tuple[str, ...] = field(default=())
    """What else is done: what float8 operands stand for, which of these very arrays are copied."""
    instead: Plan | None = field(default=None)
    """What runs where the arrays lie so that the kernel cannot read them."""

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
        lines += [f"  {name} would make {splits} splits" for name, splits in self.peers]
        lines += [f"  {note}" for note in self.notes]
        lines += [f"  not {name:<8}{reason}" for name, reasons in self.objections for reason in reasons]
        return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------
# The CPU
# ---------------------------------------------------------------------------------------------------

BLOCK_Q, BLOCK_K = 1024, 384
"""Rows and keys of a block of scores, the best of those tried: taller blocks make better matrix products and
wider ones fewer steps of Python, until they leave a core's second-level cache too far behind."""
SCORES_SIDE_BY_SIDE = 2**18
"""Scores a tile may hold when it takes several small heads or many keys at once, 2 MB of float64; twice as many where
only one thread works."""
NUMBERS_SIDE_BY_SIDE = 2**19
"""Numbers of q, k and v that a tile may hold when it takes several batches at once, 4 MB of float64."""
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
    room_for_scores = SCORES_SIDE_BY_SIDE * (1 if num_workers > 1 else 2)
    block_q = max(1, min(seqlen_q, BLOCK_Q))
    while block_q >= 2 * FEWEST_ROWS and batch * sizes.num_heads * -(-seqlen_q // block_q) < enough:
        block_q = -(-block_q // 2)
    tiles = batch * sizes.num_heads * -(-seqlen_q // block_q)
    heads = max(1, min(group, BLOCK_Q // block_q, tiles // num_workers))
    rows = block_q * heads
    block_k = max(1, min(seqlen_k, MOST_KEYS, max(BLOCK_K, room_for_scores // rows)))
    pairs = batches = 1
    each_has_its_keys = sizes.num_heads_k == sizes.num_heads_v == num_pairs
    if heads == group and each_has_its_keys and block_k == seqlen_k:
        room = min(room_for_scores // (rows * block_k), num_pairs * batch // enough)
        pairs = max(1, min(num_pairs, room))
        numbers = sizes.num_heads * block_q * sizes.head_dim + num_pairs * seqlen_k * (
            sizes.head_dim + sizes.head_dim_v
        )
        if pairs == num_pairs:
            batches = max(1, min(batch, room // pairs, NUMBERS_SIDE_BY_SIDE // max(1, numbers)))
    return CpuTile(block_q, block_k, heads, pairs, batches)


def objections_of_numpy(problem: Problem, device: Device) -> tuple[str, ...]:
    if device.kind == "cpu":
        return ()
    return (f"works on the CPU, and the arrays are on {device.name}",)


# ---------------------------------------------------------------------------------------------------
# The GPU
# ---------------------------------------------------------------------------------------------------


LONGEST = 2**30 - 2**10
"""Rows or keys that a kernel counts, ``kOpen`` there: the sum of two such numbers and a tile fits an int of 32 bits."""


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
    longest = max(problem.sizes.seqlen_q, problem.sizes.seqlen_k, problem.sizes.total_q)
    if longest > LONGEST:
        reasons.append(f"counts rows and keys in 32 bits, at most {LONGEST}, not {longest}")
    for name in ("head_dim", "head_dim_v"):
        size = getattr(problem.sizes, name)
        if size % 8 or not 0 < size <= 256:
            reasons.append(f"needs {name} to be a multiple of 8 from 8 to 256, not {size}")
    if problem.needs_dropout_mask:
        reasons.append("does not write out dropped weights (return_attn_probs with dropout)")
    return reasons


def objections_of_flash(problem: Problem, device: Device) -> tuple[str, ...]:
    reasons = _objections_of_a_kernel(problem, device)
    if device.kind == "cuda" and problem.dtype == FLOAT8:
        reasons.append("reads no float8; hopper and splitkv do")
    return tuple(reasons)


MOST_PACKED_ROWS = 64
"""Query rows per key head up to which decoding in splits beats tiles of rows."""


def objections_of_splitkv(problem: Problem, device: Device) -> tuple[str, ...]:
    reasons = _objections_of_a_kernel(problem, device)
    rows = problem.sizes.seqlen_q * problem.sizes.queries_per_pair
    alone = problem.dtype == FLOAT8 and bool(objections_of_hopper(problem, device))  # nobody else reads float8
    if device.kind == "cuda" and rows > MOST_PACKED_ROWS and not alone:
        reasons.append(f"is for decoding: at most {MOST_PACKED_ROWS} query rows per key head, not {rows}")
    if device.kind == "cuda" and rows > LONGEST:
        reasons.append(f"counts packed rows in 32 bits, at most {LONGEST}, not {rows}")
    least = 5 * 16 * _padded(problem.sizes) * _bytes_in_a_tile(problem.dtype)  # queries, and two stages of one warp
    if device.kind == "cuda" and least > device.shared_memory:
        reasons.append(f"needs {least} bytes of shared memory for such heads; a block has {device.shared_memory}")
    return tuple(reasons)


def objections_of_hopper(problem: Problem, device: Device) -> tuple[str, ...]:
    reasons = _objections_of_a_kernel(problem, device)
    if device.kind != "cuda":
        return tuple(reasons)
    if device.compute_capability != (9, 0):
        reasons.append("needs compute capability 9.0 (Hopper)")
    elif not device.tensor_maps:
        reasons.append("needs a driver for CUDA 12 or newer, to encode tensor maps")
    if problem.dtype == "float32":
        reasons.append("has no float32 arithmetic")
    for name in ("head_dim", "head_dim_v"):
        size = getattr(problem.sizes, name)
        if problem.dtype == FLOAT8 and size % 16:
            reasons.append(f"needs {name} to be a multiple of 16 in float8, not {size}")
    page_size = problem.layout.page_size
    if page_size is not None and page_size % KEYS_IN_A_BOX:
        reasons.append(f"needs pages of a multiple of {KEYS_IN_A_BOX} keys, not {page_size}")
    for wanted, what in (
        (problem.mask.array is not None, "boolean mask"),
        (problem.edits.bias is not None, "bias"),
        (problem.dropout_p > 0.0, "dropout"),
    ):
        if wanted:
            reasons.append(f"knows no {what}")
    return tuple(reasons)


def flash_tile(head_dim: int, dtype: str, shared_memory: int) -> Tile:
    """The tile of the flash kernel, as large as registers allow; what spills all the same is in
    ``tests/cuda/resources.json``."""
    if dtype == "float32":  # three planes an element
        rows = 64 if head_dim <= 128 else 32
        wide = head_dim <= 64 and shared_memory >= 100 * 1024
        return Tile(rows, 64 if wide else 32 if head_dim <= 128 else 16, rows // 16, 1)
    if head_dim <= 128:
        return Tile(64, 64, 4, 1)
    if head_dim <= 192:
        return Tile(64, 32, 4, 1)
    return Tile(128, 32, 8, 1) if shared_memory >= 100 * 1024 else Tile(64, 16, 4, 1)


def split_tile(head_dim: int, rows: int, dtype: str, shared_memory: int) -> Tile:
    """The tile of the split-KV kernel: 16 packed rows or 32, warps of 16 keys, and the stages of their rings.

    Four warps, or fewer where the two stages that each needs would not fit.
    """
    item = _bytes_in_a_tile(dtype)
    block_q = 32 if rows > 16 and head_dim <= 64 and item == 2 else 16
    stage = 2 * 16 * head_dim * item
    room = shared_memory // 2 if head_dim * item <= 256 else shared_memory  # two blocks to a multiprocessor
    queries = block_q * head_dim * item
    num_warps = 4
    while num_warps > 1 and queries + 2 * num_warps * stage > shared_memory:
        num_warps //= 2
    stages = max(2, min(4, (room - queries - 1024) // (num_warps * stage)))
    return Tile(block_q, 16 * num_warps, num_warps, stages)


def blocks_per_unit(tile: Tile, head_dim: int, dtype: str, shared_memory: int) -> int:
    """Split-KV blocks that one multiprocessor runs side by side: their registers let it be two."""
    item = _bytes_in_a_tile(dtype)
    needed = (tile.block_q + tile.num_warps * tile.num_stages * 2 * 16) * head_dim * item
    return min(BLOCKS_PER_UNIT, max(1, (shared_memory + 1024) // (needed + 1024)))  # 1 KB of each is the system's


def _bytes_in_a_tile(dtype: str) -> int:
    """Of an element: float32 is kept as three numbers of 16 bits."""
    return 6 if dtype == "float32" else 2


def _padded(sizes: Sizes) -> int:
    return -(-max(sizes.head_dim, sizes.head_dim_v) // 32) * 32


def gpu_tile(problem: Problem, device: Device, kernel: str = "flash") -> Tile:
    """How a kernel cuts a problem on a device."""
    sizes = problem.sizes
    head_dim = _padded(sizes)
    if kernel == "flash":
        return flash_tile(head_dim, problem.dtype, device.shared_memory)
    return split_tile(head_dim, sizes.seqlen_q * sizes.queries_per_pair, problem.dtype, device.shared_memory)


# ---------------------------------------------------------------------------------------------------
# Choosing
# ---------------------------------------------------------------------------------------------------

IMPLEMENTATIONS: dict[str, Callable[[Problem, Device], tuple[str, ...]]] = {
    "numpy": objections_of_numpy,
    "splitkv": objections_of_splitkv,
    "hopper": objections_of_hopper,
    "flash": objections_of_flash,
}
"""In the order tried: splitkv first, since it takes only what it is better at, and flash last, which takes the most."""


def _fits_float32(number: float) -> bool:
    return number == 0.0 or 1.2e-38 <= abs(number) <= 3.4e38


def _notes(problem: Problem) -> tuple[str, ...]:
    if problem.dtype != FLOAT8:
        return ()
    return (f"q, k and v are {problem.dtype}, times their descales if there are any; out is {problem.out_dtype}",)


@lru_cache(maxsize=4096)
def choose(problem: Problem, device: Device, fixed_split_size: int | None = None, without: str | None = None) -> Plan:
    """The plan for a problem on a device; its kernel is "none" if every implementation objects.

    With `fixed_split_size` keys to a split the result of a sequence does not depend on what else is in the batch.
    The implementation `without` is not considered.
    """
    asked = {name: objections(problem, device) for name, objections in IMPLEMENTATIONS.items() if name != without}
    kernel = next((name for name, reasons in asked.items() if not reasons), "none")
    against = dict(asked)
    against.pop(kernel, None)
    if kernel == "splitkv":
        for name in ("flash", "hopper"):
            if name in against:
                against[name] = against[name] or ("would leave most of the GPU idle: too few query rows",)
    elif kernel == "hopper":
        against["flash"] = against["flash"] or ("takes what the Hopper kernel cannot: it is slower",)
    instead: Plan | None = None
    tile: CpuTile | Tile | HopperTile | None = None
    splits, workers, compute, reason, split_size = 1, 1, "float32", "every implementation objects", 0
    peers: tuple[tuple[str, int], ...] = ()
    num_slots = 0
    sizes = problem.sizes
    if kernel == "numpy":
        compute, note = problem.compute_dtype or "float64", ""
        if compute == "float32" and not all(map(_fits_float32, (problem.edits.softmax_scale, problem.edits.softcap))):
            compute, note = "float64", ", since softmax_scale or softcap leave the range of float32"
        workers = device.num_units if problem.flops >= WORTH_THREADS else 1
        batch = sizes.batch_shape[-1] if sizes.batch_shape else 1
        tile = cpu_tile(sizes, batch, sizes.seqlen_q, sizes.seqlen_k, workers)
        reason = f"{compute} reference arithmetic{note}, " + (
            f"up to {workers} threads" if workers > 1 else "too little work for threads"
        )
    elif kernel == "hopper":
        tile = hopper_tile(problem)
        count = num_tiles(tile, sizes)
        workers = min(count, device.num_units // tile.cluster * tile.cluster) if tile.persistent else count
        reason = f"{count} tiles of {tile.block_q} rows"
        if tile.heads_per_unit > 1:
            reason += f", of {tile.heads_per_unit} heads side by side"
        if tile.cluster > 1:
            reason += f", whose keys are loaded for {tile.cluster} of them at once"
        instead = choose(problem, replace(device, tensor_maps=False), fixed_split_size, "hopper")
    elif kernel == "flash":
        tile = gpu_tile(problem, device)
        workers = sizes.batch * sizes.num_heads * math.ceil(sizes.seqlen_q / tile.block_q)
        reason = f"{workers} tiles of {tile.block_q} rows"
    elif kernel == "splitkv":
        tile = gpu_tile(problem, device, "splitkv")
        side_by_side = blocks_per_unit(tile, _padded(sizes), problem.dtype, device.shared_memory)
        num_slots = side_by_side * device.num_units
        split_size, splits, workers, reason = split(
            problem, device, tile.block_q, tile.block_k, fixed_split_size, side_by_side
        )
        peers = tuple((name, rule(problem, device)) for name, rule in PEERS.items())
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
        split_size,
        num_slots,
        peers,
        _notes(problem),
        instead,
    )


ANY_NUMBER_OF_SLOTS = 2**30
"""Enough that `splits.live_split_blocks` gives a piece all the splits it may have."""


@lru_cache(maxsize=4096)
def with_num_splits(plan: Plan, problem: Problem, num_splits: int) -> Plan:
    """The plan with so many splits of a sequence at most, where lengths are data; 0: as it is.

    A sequence gets as many as it has `splits.FEWEST_KEYS` for.
    """
    if plan.kernel != "splitkv" or num_splits == 0:
        return plan
    most = max(1, min(num_splits, math.ceil(problem.sizes.seqlen_k / FEWEST_KEYS)))
    pieces = plan.num_workers // plan.num_splits
    reason = f"up to {most} splits a sequence, as was asked"
    return replace(plan, num_splits=most, num_workers=pieces * most, num_slots=ANY_NUMBER_OF_SLOTS, reason=reason)


def for_live_keys(plan: Plan, problem: Problem, live_keys: int) -> Plan:
    """The CPU's plan, made for all keys that a cache has room for, once those that are live are known."""
    room = problem.sizes.batch * problem.sizes.seqlen_k
    if plan.num_workers == 1 or problem.flops * live_keys >= WORTH_THREADS * room:
        return plan
    return replace(plan, num_workers=1)
