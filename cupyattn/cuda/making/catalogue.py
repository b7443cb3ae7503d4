"""The C++ names of kernels: a plan's decisions as one template argument list."""

from __future__ import annotations

from cupyattn.cuda.making.module import Specialisation
from cupyattn.plan import (
    HEAD_DIMS,
    OF_BIAS,
    RIGHT_EDGE,
    BackwardTile,
    HopperTile,
    Tile,
    backward_tile,
    base_cluster,
    base_tile,
    bytes_in_a_ring,
    bytes_of_a_query,
    flash_tile,
    hopper_backward_tile,
    hopper_shared_memory_of,
    passes_of,
    query_stages,
    shared_memory_of,
    split_tile,
)
from cupyattn.problem import FLOAT8, ITEMSIZE, Problem

ELEMENT = {
    "float16": "cupyattn::Half",
    "bfloat16": "cupyattn::BFloat16",
    "float32": "float",
    FLOAT8: "cupyattn::Float8",
}
SCALE_FIRST, SOFTCAP, ALIBI, BIAS, MASK_ARRAY, DROPOUT, LOW_CAP, CAUSAL_ALIBI = 1, 2, 4, 8, 16, 32, 64, 128
"""Bits of ``Edit`` in ``params.cuh``."""


def padded(head_dim: int) -> int:
    """Columns of a tile in shared memory: whole slabs of 32."""
    return -(-head_dim // 32) * 32


def edits_of(problem: Problem) -> int:
    """What happens to scores, as the bits of a trait."""
    edits, mask = problem.edits, problem.mask
    bits = 0
    for bit, wanted in (
        # 0 in float32, and 0 * -inf inside the exponential would be nan; or negative, and the largest product is not
        # the largest score.
        (SCALE_FIRST, edits.softmax_scale < 2.0**-126),
        (SOFTCAP, edits.softcap != 0.0),
        (ALIBI, edits.alibi_slopes is not None),
        (BIAS, edits.bias is not None),
        (MASK_ARRAY, mask.array is not None),
        (DROPOUT, problem.dropout_p > 0.0),
        (LOW_CAP, 2.0**-20 <= edits.softcap <= HIGHEST_LOW_CAP[problem.dtype]),
    ):
        bits |= bit if wanted else 0
    # Slopes are divided by the scale then, and what float8 is a multiple of is data.
    if bits & ~DROPOUT == ALIBI and _sees_only_behind(problem) and edits.softmax_scale >= LEAST_DIVISOR:
        bits |= CAUSAL_ALIBI if problem.dtype != FLOAT8 else 0
    return bits


def _sees_only_behind(problem: Problem) -> bool:
    """Whether no key that is seen comes behind its row, as ALiBi counts them."""
    right, apart = problem.mask.right, problem.edits.distances
    if apart is None:
        return right is not None and right <= 0
    furthest = problem.sizes.seqlen_k - 1  # from key to row, of what is seen
    if right is not None:
        furthest = min(furthest, right + problem.offset)
    return apart.first >= apart.step * furthest


LEAST_DIVISOR = 2.0**-20
"""Scales that slopes can be divided by."""
HIGHEST_LOW_CAP = {"float16": 128.0, "bfloat16": 128.0, FLOAT8: 128.0, "float32": 0.0}
"""Softcaps up to which an error of cap * 2^-22 in a score is little beside the rounding of its weight."""


def flash(
    dtype: str, head_dim: int, head_dim_v: int, tile: Tile, aligned: bool, edits: int, paged: bool = False
) -> Specialisation:
    """The flash kernel of a tile, ``flash.cu``."""
    columns, columns_v = padded(head_dim), padded(head_dim_v)
    arguments = (
        ELEMENT[dtype],
        columns,
        columns_v,
        tile.block_q,
        tile.block_k,
        tile.num_warps,
        tile.num_stages,
        tile.queries_in_registers,
        paged,
        aligned,
        edits,
    )
    planes = 2 * _planes(dtype)
    queries = max(tile.block_q * columns * planes, tile.block_q * columns_v * 2)
    keys_and_values = tile.num_stages * tile.block_k * (columns + columns_v) * planes
    return Specialisation(
        "flash.cu",
        f"cupyattn::flash_forward<cupyattn::FlashTraits<{', '.join(map(_literal, arguments))}>>",
        32 * tile.num_warps,
        queries + keys_and_values,
    )


def splitkv(
    dtype: str, head_dim: int, head_dim_v: int, tile: Tile, aligned: bool, edits: int, paged: bool
) -> Specialisation:
    """The split-KV kernel of a tile, ``splitkv.cu``."""
    columns, columns_v = padded(head_dim), padded(head_dim_v)
    arguments = (
        ELEMENT[dtype],
        columns,
        columns_v,
        tile.block_q,
        tile.num_warps,
        tile.num_stages,
        paged,
        aligned,
        edits,
    )
    widest = max(columns, columns_v)
    row = bytes_in_a_ring(columns, dtype, widest) + bytes_in_a_ring(columns_v, dtype, widest)
    ring = tile.num_warps * tile.num_stages * 16 * row
    queries = tile.block_q * bytes_of_a_query(columns, dtype)
    states = tile.num_warps * tile.block_q * (columns_v + 2) * 4
    return Specialisation(
        "splitkv.cu",
        f"cupyattn::split_forward<cupyattn::SplitTraits<{', '.join(map(_literal, arguments))}>>",
        32 * tile.num_warps,
        queries + max(ring, states) + 32,
    )


def hopper(
    dtype: str,
    head_dim: int,
    head_dim_v: int,
    tile: HopperTile,
    stores_boxes: bool,
    edits: int,
    paged: bool = False,
    splits: bool = False,
) -> Specialisation:
    """The Hopper kernel of a tile and padded head_dims, ``hopper.cu``; whether it `splits` the keys of a tile."""
    arguments = (
        ELEMENT[dtype],
        head_dim,
        head_dim_v,
        tile.block_q,
        tile.block_k,
        tile.num_stages,
        tile.cluster,
        tile.reach,
        paged,
        tile.heads_per_unit > 1,
        stores_boxes,
        edits,
        f"cupyattn::HopperSwitches<{', '.join(map(_literal, tile.switches))}>",
        *((True,) if splits else ()),
    )
    item = ITEMSIZE[dtype]
    queries = tile.block_q * head_dim * item
    values = 2 * head_dim_v if dtype == FLOAT8 else head_dim_v  # as they come, and turned
    keys_and_values = tile.num_stages * tile.block_k * (head_dim + values) * item
    weights = tile.block_q * tile.block_k * item if tile.switches.weights_in_shared else 0
    beside = keys_and_values + weights
    stages = query_stages(queries, beside)
    barriers = 5 * 16 * tile.num_stages + 16 * stages
    kernel = "hopper_forward" if tile.cluster == 1 else "hopper_forward_in_clusters"
    return Specialisation(
        "hopper.cu",
        f"cupyattn::{kernel}<cupyattn::HopperTraits<{', '.join(map(_literal, arguments))}>>",
        32 * tile.num_warps,
        stages * queries + beside + barriers + (16 if splits else 0),
        tile.cluster,
    )


def merge(dtype: str, columns: int, together: bool) -> Specialisation:
    """The kernel that merges splits, of partial results of so many columns, ``merge.cu``.

    `together` all warps of a block have a row, else each has one of its own.
    """
    chunks = -(-columns // 128)
    arguments = ", ".join(map(_literal, (ELEMENT[dtype], chunks, together)))
    shared_memory = 3 * (512 * chunks + 16) if together else 0
    return Specialisation("merge.cu", f"cupyattn::merge_splits<cupyattn::MergeTraits<{arguments}>>", 128, shared_memory)


def schedule() -> Specialisation:
    """The kernel that makes work of lengths, ``schedule.cu``."""
    return Specialisation("schedule.cu", "cupyattn::make_schedule<256>", 256, 8 * 256 // 32)


def backward(
    dtype: str,
    head_dim: int,
    head_dim_v: int,
    tile: BackwardTile,
    wanted: int,
    aligned: bool,
    edits: int,
    packed: bool = False,
    again: bool = False,
) -> Specialisation:
    """A kernel that sums the gradients `wanted`, ``backward.cu`` or ``backward_bias.cu``.

    `packed`: each sequence has the tiles of its own rows, not those of the longest.  `again`: of tiles that the kernel
    on Hopper has flagged.
    """
    columns, columns_v = padded(head_dim), padded(head_dim_v)
    arguments = (ELEMENT[dtype], columns, columns_v, *tile, wanted, aligned, edits)
    source = "backward_bias" if wanted == OF_BIAS else "backward"
    name = source + "_again" * again + "_packed" * packed
    return Specialisation(
        f"{source}.cu",
        f"cupyattn::{name}<cupyattn::BackwardTraits<{', '.join(map(_literal, arguments))}>>",
        32 * tile.num_warps,
        shared_memory_of(columns, columns_v, dtype, tile, wanted),
    )


def hopper_backward(
    dtype: str, head_dim: int, head_dim_v: int, tile: BackwardTile, wanted: int, edits: int = 0, packed: bool = False
) -> Specialisation:
    """The same on Hopper, of padded head_dims, ``hopper_backward.cu``."""
    arguments = (ELEMENT[dtype], head_dim, head_dim_v, *tile, wanted, edits)
    name = "hopper_backward_packed" if packed else "hopper_backward"
    return Specialisation(
        "hopper_backward.cu",
        f"cupyattn::{name}<cupyattn::HopperBackwardTraits<{', '.join(map(_literal, arguments))}>>",
        32 * tile.num_warps,
        hopper_shared_memory_of(head_dim, head_dim_v, tile, wanted),
    )


def backward_rows(dtype: str) -> Specialisation:
    """The kernel before them, ``backward_rows.cu``."""
    return Specialisation("backward_rows.cu", f"cupyattn::backward_rows<{ELEMENT[dtype]}>", 256, 0)


def append(dtype: str) -> Specialisation:
    """The kernel that puts new keys into a cache, ``append.cu``."""
    return Specialisation("append.cu", f"cupyattn::append<{ELEMENT[dtype]}>", 128, 0)


def shared_memory(kernel: str, dtype: str, head_dim: int, head_dim_v: int, tile: Tile) -> int:
    """Dynamic shared memory of a kernel's block in bytes."""
    if kernel == "flash":
        return flash(dtype, head_dim, head_dim_v, tile, True, 0).shared_memory
    return splitkv(dtype, head_dim, head_dim_v, tile, True, 0, False).shared_memory


def _planes(dtype: str) -> int:
    """16-bit planes in which a tile keeps its elements."""
    return {1: 1, 2: 1, 4: 3}[ITEMSIZE[dtype]]


def _literal(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


DECODE_ROWS = (1, 32)
"""Packed rows of a decode for which there are different tiles."""


def specialisations(target: str) -> list[Specialisation]:
    """The kernels most calls need on an architecture: q, k and v aligned, of equal head_dim, scores not edited.

    All others are compiled when they are first called.
    """
    limit = _SHARED_MEMORY.get(target.rstrip("af"), 99 * 1024)
    found = []
    for dtype in ("float16", "bfloat16", "float32"):
        for head_dim in HEAD_DIMS:
            found.append(flash(dtype, head_dim, head_dim, flash_tile(head_dim, dtype, limit), True, 0))
            for rows in DECODE_ROWS:
                tile = split_tile(head_dim, rows, dtype, limit)
                found += [splitkv(dtype, head_dim, head_dim, tile, True, 0, paged) for paged in (False, True)]
    if target == "sm_90a":
        for dtype in ("float16", "bfloat16", FLOAT8):
            for head_dim, head_dim_v in (*((x, x) for x in HEAD_DIMS), (192, 128)):
                if dtype == FLOAT8 and head_dim != head_dim_v:
                    continue
                for reach in range(3):
                    cut = base_tile(head_dim, head_dim_v, reach, dtype)
                    found.append(hopper(dtype, head_dim, head_dim_v, cut, True, 0))
                    cut = cut._replace(cluster=base_cluster(head_dim, reach, dtype))
                    found.append(hopper(dtype, head_dim, head_dim_v, cut, True, 0))
                if dtype == FLOAT8:
                    continue
                # Of few rows behind many keys, which a group of heads shares.
                cut = base_tile(head_dim, head_dim_v, RIGHT_EDGE, dtype)._replace(heads_per_unit=2)
                found.append(hopper(dtype, head_dim, head_dim_v, cut, True, 0, splits=True))
    found += [merge(dtype, head_dim, each) for dtype in ELEMENT for head_dim in HEAD_DIMS for each in (False, True)]
    found += [schedule(), *(append(dtype) for dtype in ELEMENT)]
    return [wanted for wanted in dict.fromkeys(found) if wanted.shared_memory <= limit]


def of_gradients(target: str) -> list[Specialisation]:
    """The kernels that most gradients need on an architecture, beside those of `specialisations`."""
    limit = _SHARED_MEMORY.get(target.rstrip("af"), 99 * 1024)
    found = []
    for dtype in ("float16", "bfloat16", "float32"):
        found.append(backward_rows(dtype))
        for head_dim in HEAD_DIMS:
            for wanted in passes_of(head_dim):
                tile = backward_tile(head_dim, dtype, limit, wanted)
                found.append(backward(dtype, head_dim, head_dim, tile, wanted, True, 0))
                if target == "sm_90a" and dtype != "float32":
                    found.append(backward(dtype, head_dim, head_dim, tile, wanted, True, 0, again=True))
                    tile = hopper_backward_tile(head_dim, head_dim, wanted)
                    found.append(hopper_backward(dtype, head_dim, head_dim, tile, wanted))
    return found


_SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_87": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
"""Bytes one block may use; 99 KB elsewhere."""
