"""How the flash and the split-KV kernel cut a problem: their tiles, by the shared memory that there is."""

from __future__ import annotations

from cupyattn.plan.splits import BLOCKS_PER_UNIT
from cupyattn.plan.values import Tile
from cupyattn.problem import ITEMSIZE, Device, Problem, Sizes


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
    block_q = 32 if rows > 16 and head_dim <= 64 and dtype != "float32" else 16
    stage = 2 * 16 * bytes_in_a_ring(head_dim, dtype, head_dim)
    room = shared_memory // 2 if bytes_in_a_ring(head_dim, dtype, head_dim) <= 256 else shared_memory  # for two blocks
    queries = block_q * bytes_of_a_query(head_dim, dtype)
    num_warps = 4
    while num_warps > 1 and queries + 2 * num_warps * stage > shared_memory:
        num_warps //= 2
    stages = max(2, min(4, (room - queries - 1024) // (num_warps * stage)))
    return Tile(block_q, 16 * num_warps, num_warps, stages)


def blocks_per_unit(tile: Tile, head_dim: int, dtype: str, shared_memory: int) -> int:
    """Split-KV blocks that one multiprocessor runs side by side: their registers let it be two."""
    ring = tile.num_warps * tile.num_stages * 2 * 16 * bytes_in_a_ring(head_dim, dtype, head_dim)
    needed = tile.block_q * bytes_of_a_query(head_dim, dtype) + ring
    return min(BLOCKS_PER_UNIT, max(1, (shared_memory + 1024) // (needed + 1024)))  # 1 KB of each is the system's


def bytes_in_a_ring(columns: int, dtype: str, widest: int) -> int:
    """Of a row of keys or values of the split-KV kernel, as it comes from memory, in whole slabs of 64.

    Of float32 in heads of more than 128 columns, k's or v's, the three numbers that it becomes.
    """
    if dtype == "float32" and widest > 128:
        return columns * bytes_in_a_tile(dtype)
    return -(-columns * ITEMSIZE[dtype] // 64) * 64


def bytes_of_a_query(columns: int, dtype: str) -> int:
    """Of a row of queries there, which are read many times and are made planes first."""
    return columns * bytes_in_a_tile(dtype) if dtype == "float32" else bytes_in_a_ring(columns, dtype, columns)


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
