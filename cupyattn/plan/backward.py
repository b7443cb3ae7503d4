"""How the gradients are worked out: the plan of a backward pass, and the tiles of its kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

from cupyattn.plan.choosing import choose
from cupyattn.plan.gpu import bytes_in_a_tile, padded
from cupyattn.plan.hopper import HOPPER_MEMORY, padded_dims
from cupyattn.plan.objections import objections_of_flash, objections_of_hopper, objections_of_numpy, only
from cupyattn.plan.tiling import num_tiles
from cupyattn.plan.values import BackwardTile, BackwardTiles, Plan
from cupyattn.problem import Device, Problem, Sizes

OF_QUERIES, OF_KEYS, OF_VALUES, OF_BIAS = 1, 2, 4, 8
"""Bits of ``Wanted`` in ``traits.cuh``."""


@lru_cache(maxsize=4096)
def choose_backward(
    problem: Problem, device: Device, without_hopper: bool = False, allowed: tuple[str, ...] | None = None
) -> Plan:
    """The plan for the gradients of a problem on a device; its kernel is "none" if nobody takes it.

    The implementations `allowed` are the call's (None: all), each with the kernels that are `KERNELS_OF` it.
    """
    plan = choose(problem, device)
    # Of the five products that there are: scores, dweights, dq, dk, dv.
    flops = problem.flops * 5 // 2
    reasons = _objections(objections_of_backward, "backward", problem, device, allowed)
    of_numpy = ("numpy", _objections(objections_of_numpy, "numpy", problem, device, allowed))
    if device.kind == "cpu" and not of_numpy[1]:
        return replace(plan, flops=flops, bytes=3 * problem.bytes, objections=(("backward", reasons),))
    bare = replace(plan, num_splits=1, split_size=0, num_slots=0, peers=(), instead=None, objections=(of_numpy,))
    on_hopper = _objections(objections_of_hopper_backward, "hopper_backward", problem, device, allowed)
    if not on_hopper and not without_hopper and not objections_of_backward(problem, device):
        instead = choose_backward(problem, device, True)  # has its share of every call, allowed or not
        tiles = hopper_backward_tiles(problem, device)
        notes, reason = _notes(problem, tiles), _reason(problem, tiles)
        return replace(instead, kernel="hopper_backward", tile=tiles, instead=instead, reason=reason, notes=notes)
    if reasons:
        others = () if allowed is None else (("hopper_backward", on_hopper or objections_of_backward(problem, device)),)
        return replace(
            bare, kernel="none", tile=None, num_workers=1, flops=flops, reason="every implementation objects",
            objections=(of_numpy, ("backward", reasons), *others), notes=(),
        )  # fmt: skip
    if on_hopper:
        bare = replace(bare, objections=(of_numpy, ("hopper_backward", on_hopper)))
    tiles = backward_tiles(problem, device)
    return replace(
        bare,
        kernel="backward",
        compute_dtype="float32",
        tile=tiles,
        num_workers=_blocks_of_queries(problem, tiles),
        flops=flops,
        bytes=3 * problem.bytes,
        reason=_reason(problem, tiles),
        notes=_notes(problem, tiles),
    )


KERNELS_OF = {"numpy": ("numpy",), "splitkv": ("backward",), "hopper": ("hopper_backward",), "flash": ("backward",)}
"""What has the gradients of what each implementation takes."""


def _objections(
    ask: Callable[[Problem, Device], tuple[str, ...]],
    kernel: str,
    problem: Problem,
    device: Device,
    allowed: tuple[str, ...] | None,
) -> tuple[str, ...]:
    """Those of a kernel, or that it may not be taken."""
    if allowed is not None and not any(kernel in KERNELS_OF[name] for name in allowed):
        return (only(allowed),)
    return ask(problem, device)


def _notes(problem: Problem, tiles: BackwardTiles) -> tuple[str, ...]:
    sizes = problem.sizes
    rows = 2 * sizes.num_heads * (sizes.total_q if problem.layout.ragged else sizes.batch * sizes.seqlen_q)
    found = [
        "deterministic: each number is the sum of one thread block, in one order",
        f"{4 * rows} bytes of memory besides the results, a delta and an lse for each row",
    ]
    for bit, name, heads, columns in (
        (OF_KEYS, "dk", sizes.num_heads_k, sizes.head_dim),
        (OF_VALUES, "dv", sizes.num_heads_v, sizes.head_dim_v),
    ):
        shared = _sharing(sizes, heads)
        parts = shared // math.gcd(shared, tiles.heads_of(bit))
        if parts > 1:
            size = 4 * parts * heads * sizes.batch * sizes.seqlen_k * columns
            found.append(f"{name} in {parts} parts, so that the GPU is full: {size} bytes, or less")
    return tuple(found)


def _reason(problem: Problem, tiles: BackwardTiles) -> str:
    (_, of_queries), (_, of_keys) = tiles.passes[:2]
    most = "up to " if problem.layout.ragged else ""
    blocks = _blocks_of_queries(problem, tiles)
    return f"{most}{blocks} tiles of {of_queries.stays} queries, then tiles of {of_keys.stays} keys"


def _blocks_of_queries(problem: Problem, tiles: BackwardTiles) -> int:
    """Of the first pass; of sequences end to end as many as their rows together make, whatever the longest is."""
    sizes, (_, tile) = problem.sizes, tiles.passes[0]
    total = sizes.total_q if problem.layout.ragged else None
    return num_tiles(sizes.batch, sizes.seqlen_q, tile.stays, total) * sizes.num_heads


def objections_of_hopper_backward(problem: Problem, device: Device) -> tuple[str, ...]:
    """What the Hopper kernel has against it, besides."""
    reasons = list(objections_of_hopper(problem, device))
    edits = problem.edits
    for wanted, what in (
        (edits.softcap != 0.0 and edits.alibi_slopes is not None, "softcap together with ALiBi slopes"),
        (edits.softmax_scale < 2.0**-126, "scale of zero or below"),
    ):
        if wanted:
            reasons.append(f"knows no {what}")
    return tuple(reasons)


def objections_of_backward(problem: Problem, device: Device) -> tuple[str, ...]:
    """What the kernels for gradients have against a problem."""
    reasons = list(objections_of_flash(problem, device))
    if problem.layout.page_size is not None or problem.layout.cached:
        reasons.append("has no gradients of keys in pages or in a cache")
    return tuple(reasons)


def backward_tiles(problem: Problem, device: Device) -> BackwardTiles:
    """The passes and their tiles."""
    head_dim, dtype, room = padded(problem.sizes), problem.dtype, device.shared_memory
    of_bias = (OF_BIAS,) if problem.edits.bias is not None else ()
    wanted = (*passes_of(head_dim, _are_shared_alike(problem.sizes)), *of_bias)
    passes = tuple((what, backward_tile(head_dim, dtype, room, what)) for what in wanted)
    return BackwardTiles(passes, tuple(heads_per_block(problem, device, *each) for each in passes))


def passes_of(head_dim: int, shared_alike: bool = True) -> tuple[int, ...]:
    """What is summed together: where the same heads share both, and as far as registers reach.

    head_dim is the larger of both.
    """
    together = shared_alike and head_dim <= 128
    return (OF_QUERIES, OF_KEYS | OF_VALUES) if together else (OF_QUERIES, OF_KEYS, OF_VALUES)


def _are_shared_alike(sizes: Sizes) -> bool:
    """Keys and values have as many heads."""
    return sizes.num_heads_k == sizes.num_heads_v


def _sharing(sizes: Sizes, heads: int) -> int:
    """Query heads that share one of so many; 1 where there are none of either."""
    return max(1, sizes.num_heads // max(1, heads))


def heads_per_block(problem: Problem, device: Device, wanted: int, tile: BackwardTile) -> int:
    """Of tiles of keys: all query heads that share them, or a share of them where that fills the GPU.

    Shares are summed in float32 in memory, in one order, too.
    """
    if not wanted & (OF_KEYS | OF_VALUES):
        return 1
    sizes = problem.sizes
    shared = _sharing(sizes, sizes.num_heads_k if wanted & OF_KEYS else sizes.num_heads_v)
    blocks = sizes.batch * sizes.num_heads // shared * math.ceil(sizes.seqlen_k / tile.stays)
    units = max(1, device.num_units)
    several = [x for x in range(1, shared + 1) if shared % x == 0 and (x == 1 or blocks * x <= 4 * units)]
    time = {x: math.ceil(blocks * x / units) / x for x in several}
    return shared // next(x for x in several if time[x] <= 1.1 * min(time.values()))


def hopper_backward_tiles(problem: Problem, device: Device) -> BackwardTiles:
    """Those of the Hopper kernel: 128 rows stay, for two warpgroups."""
    wide, wide_v = padded_dims(problem.sizes, problem.dtype)
    passes = passes_of(max(wide, wide_v), _are_shared_alike(problem.sizes))
    capped = problem.edits.softcap != 0.0
    tiles = tuple((wanted, hopper_backward_tile(wide, wide_v, wanted, capped)) for wanted in passes)
    return BackwardTiles(tiles, tuple(heads_per_block(problem, device, *each) for each in tiles))


def hopper_backward_tile(wide: int, wide_v: int, wanted: int, capped: bool = False) -> BackwardTile:
    """Of padded head_dims: as many rows move at once as registers allow, in as many stages as there is memory for.

    With a softcap weights are kept for dv beside what it lets through of them, and its arithmetic takes registers.
    """
    widest = max(wide, wide_v)
    if wanted == OF_QUERIES:
        moves = 128 if widest <= 128 and not capped else 64 if widest <= 192 else 32
    elif wanted == OF_KEYS | OF_VALUES:
        moves = 48 if capped and wide == wide_v == 128 else 64
    else:
        moves = 32 if widest > 192 and wanted == OF_KEYS else 64
    tiles = (BackwardTile(128, moves, 12, stages) for stages in (4, 3, 2))
    return next(tile for tile in tiles if hopper_shared_memory_of(wide, wide_v, tile, wanted) <= HOPPER_MEMORY)


def hopper_shared_memory_of(columns: int, columns_v: int, tile: BackwardTile, wanted: int) -> int:
    """Bytes of a block's shared memory, ``kSharedBytes`` of ``HopperBackwardTraits``."""
    staying = 2 * tile.stays * (columns + (columns_v if wanted != OF_VALUES else 0))
    moving = 2 * tile.moves * (columns + columns_v)
    facts = 8 * tile.moves if wanted & (OF_KEYS | OF_VALUES) else 0
    return staying + tile.num_stages * (moving + facts + 16) + 16


_SIXTEEN_BITS: tuple[BackwardTile, ...] = (
    BackwardTile(128, 64, 8, 2),
    BackwardTile(128, 32, 8, 2),
    BackwardTile(64, 32, 4, 2),
    BackwardTile(64, 32, 4, 1),
    BackwardTile(64, 16, 4, 1),
    BackwardTile(32, 16, 2, 1),
)
_FLOAT32: tuple[BackwardTile, ...] = (
    BackwardTile(64, 32, 4, 1),
    BackwardTile(64, 16, 4, 1),
    BackwardTile(32, 16, 2, 1),
    BackwardTile(16, 16, 1, 1),
)
"""From the largest down; the first that fits into shared memory, and whose sums fit into registers, is taken."""


def backward_tile(head_dim: int, dtype: str, shared_memory: int, wanted: int) -> BackwardTile:
    """Of a pass that sums what is `wanted`; head_dim is the larger of both, padded."""
    candidates = _FLOAT32 if dtype == "float32" else _SIXTEEN_BITS
    if head_dim > 128 and dtype != "float32":
        candidates = candidates[2:]  # sums of 16 rows and 256 columns take half of a thread's registers
    if 96 < head_dim <= 128 and dtype != "float32":
        candidates = (BackwardTile(128, 48, 8, 2), *candidates[1:])  # 64 that move leave loop invariants no registers
    if wanted == OF_BIAS:
        candidates = tuple(tile for tile in candidates if tile.stays <= 64)
    return next(
        tile for tile in candidates if shared_memory_of(head_dim, head_dim, dtype, tile, wanted) <= shared_memory
    )


def shared_memory_of(columns: int, columns_v: int, dtype: str, tile: BackwardTile, wanted: int) -> int:
    """Bytes of a block's shared memory, ``kSharedBytes`` of ``BackwardTraits``."""
    row = (columns + columns_v) * bytes_in_a_tile(dtype)
    table = 4 * tile.stays * tile.moves if wanted == OF_BIAS else 0
    facts = 8 * tile.moves if wanted & (OF_KEYS | OF_VALUES) else 0
    return max(tile.stays * row, table) + tile.num_stages * (tile.moves * row + facts)
