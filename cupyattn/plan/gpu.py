"""How the flash and the split-KV kernel cut a problem: their tiles, by the shared memory that there is."""

from __future__ import annotations

from cupyattn.plan.splits import BLOCKS_PER_UNIT
from cupyattn.plan.values import Tile
from cupyattn.problem import Device, Problem, Sizes


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
    item = bytes_in_a_tile(dtype)
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
    item = bytes_in_a_tile(dtype)
    needed = (tile.block_q + tile.num_warps * tile.num_stages * 2 * 16) * head_dim * item
    return min(BLOCKS_PER_UNIT, max(1, (shared_memory + 1024) // (needed + 1024)))  # 1 KB of each is the system's


def bytes_in_a_tile(dtype: str) -> int:
    """Of an element: float32 is kept as three numbers of 16 bits."""
    return 6 if dtype == "float32" else 2


def padded(sizes: Sizes) -> int:
    return -(-max(sizes.head_dim, sizes.head_dim_v) // 32) * 32


def gpu_tile(problem: Problem, device: Device, kernel: str = "flash") -> Tile:
    """How a kernel cuts a problem on a device."""
    sizes = problem.sizes
    head_dim = padded(sizes)
    if kernel == "flash":
        return flash_tile(head_dim, problem.dtype, device.shared_memory)
    return split_tile(head_dim, sizes.seqlen_q * sizes.queries_per_pair, problem.dtype, device.shared_memory)
