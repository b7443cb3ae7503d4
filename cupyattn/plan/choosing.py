"""The choice: an implementation that objects to nothing, and by its rules the rest of the plan.

`choose` makes plans; `with_num_splits` and `for_live_keys` mend one, when more is known than its problem says.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from cupyattn.plan.cpu import cpu_tile, num_cpu_workers
from cupyattn.plan.gpu import blocks_per_unit, gpu_tile, padded
from cupyattn.plan.hopper import ALL_KEYS, HopperTile, hopper_tile
from cupyattn.plan.objections import IMPLEMENTATIONS, is_allowed, only
from cupyattn.plan.schedule import EVEN
from cupyattn.plan.splits import (
    FEWEST_KEYS,
    FEWEST_KEYS_OF_TILES,
    PEERS,
    blocks_of_splitkv,
    split,
    split_pieces,
)
from cupyattn.plan.tiling import MOST_ROUNDS, balanced_section, num_row_tiles, num_tiles
from cupyattn.plan.values import CpuTile, Plan, Tile
from cupyattn.problem import FLOAT8, Device, Problem, Span


@lru_cache(maxsize=4096)
def choose(
    problem: Problem,
    device: Device,
    fixed_split_size: int | None = None,
    without: str | None = None,
    allowed: tuple[str, ...] | None = None,
) -> Plan:
    """The plan for a problem on a device; its kernel is "none" if every implementation objects.

    With `fixed_split_size` keys to a split the result of a sequence does not depend on what else is in the batch.
    The implementation `without` is not considered; only those `allowed`, if that is not None, may be taken.
    """
    # What the others leave to the Hopper kernel they take where that may not be taken.
    seen = device if is_allowed("hopper", allowed) else replace(device, tensor_maps=False)
    asked = {
        name: objections(problem, seen) if is_allowed(name, allowed) else (only(allowed),)
        for name, objections in IMPLEMENTATIONS.items()
        if name != without
    }
    kernel = next((name for name, reasons in asked.items() if not reasons), "none")
    decided = _DECISIONS[kernel](problem, device, fixed_split_size)
    instead = None
    if kernel == "hopper":
        instead = choose(problem, replace(device, tensor_maps=False), fixed_split_size, "hopper", allowed)
    return Plan(
        kernel,
        device.name,
        decided.compute_dtype,
        decided.tile,
        decided.num_splits,
        decided.num_workers,
        problem.flops,
        problem.bytes,
        decided.reason,
        _against_others(kernel, asked),
        decided.split_size,
        decided.num_slots,
        decided.peers,
        _notes(problem),
        instead,
    )


def _against_others(kernel: str, asked: dict[str, tuple[str, ...]]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Why it is none of the others: what they object, or else what speaks for `kernel`."""
    against = dict(asked)
    against.pop(kernel, None)
    if kernel == "splitkv":
        for name, why in (
            ("flash", "would leave most of the GPU idle: too few query rows"),
            ("hopper", "has tiles of 128 rows or more: too few query rows"),
        ):
            if name in against:
                against[name] = against[name] or (why,)
    elif kernel == "hopper":
        against["flash"] = against["flash"] or ("takes what the Hopper kernel cannot: it is slower",)
    return tuple(against.items())


def _notes(problem: Problem) -> tuple[str, ...]:
    if problem.dtype != FLOAT8:
        return ()
    return (f"q, k and v are {problem.dtype}, times their descales if there are any; out is {problem.out_dtype}",)


class _Decision(NamedTuple):
    """What an implementation's own rules say; the fields of `Plan` that depend on it."""

    tile: CpuTile | Tile | HopperTile | None
    num_workers: int
    reason: str
    num_splits: int = 1
    compute_dtype: str = "float32"
    split_size: int = 0
    num_slots: int = 0
    peers: tuple[tuple[str, int], ...] = ()


def _by_nobody(problem: Problem, device: Device, fixed_split_size: int | None) -> _Decision:
    return _Decision(None, 1, "every implementation objects")


def _by_numpy(problem: Problem, device: Device, fixed_split_size: int | None) -> _Decision:
    sizes = problem.sizes
    compute, note = problem.compute_dtype or "float64", ""
    if compute == "float32" and not all(map(_fits_float32, (problem.edits.softmax_scale, problem.edits.softcap))):
        compute, note = "float64", ", since softmax_scale or softcap leave the range of float32"
    workers = num_cpu_workers(problem, device.num_units)
    batch = sizes.batch_shape[-1] if sizes.batch_shape else 1
    tile = cpu_tile(sizes, batch, sizes.seqlen_q, sizes.seqlen_k, workers, problem.mask.band_width(sizes.seqlen_k))
    reason = f"{compute} reference arithmetic{note}, " + (
        f"up to {workers} threads" if workers > 1 else "too little work for threads"
    )
    return _Decision(tile, workers, reason, compute_dtype=compute)


def _fits_float32(number: float) -> bool:
    return number == 0.0 or 1.2e-38 <= abs(number) <= 3.4e38


def _by_hopper(problem: Problem, device: Device, fixed_split_size: int | None) -> _Decision:
    tile = hopper_tile(problem)
    count = num_row_tiles(problem, tile.tokens) * (problem.sizes.num_heads // tile.heads_per_unit)
    workers = min(count, device.num_units // tile.cluster * tile.cluster) if tile.persistent else count
    reason = _tiles_of_rows(problem, count, tile.block_q)
    if tile.heads_per_unit > 1:
        reason += f", of {tile.heads_per_unit} heads side by side"
    size, splits, blocks, why = _split_tiles(problem, device, tile, fixed_split_size)
    if splits > 1:
        tile, units = tile._replace(persistent=False, cluster=1), device.num_units
        peers = _peers(problem, device)
        return _Decision(tile, blocks, f"{reason}; {why}", splits, split_size=size, num_slots=units, peers=peers)
    if tile.cluster > 1:
        reason += f", whose keys are loaded for {tile.cluster} of them at once"
    if tile.persistent and tile.reach != ALL_KEYS and not problem.layout.ragged:
        tile = tile._replace(units_per_section=_section(problem, tile, workers))
    return _Decision(tile, workers, reason)


AROUND_A_TILE = 1
"""What a tile takes besides its blocks of keys, in their like, as `asv_benchmarks/clocks.py` estimates it."""


def _section(problem: Problem, tile: HopperTile, blocks: int) -> int:
    """Units that take turns, of sequences of one length."""
    sizes, mask = problem.sizes, problem.mask
    units, tokens = sizes.batch * sizes.num_heads // tile.heads_per_unit, tile.tokens
    starts = range(0, sizes.seqlen_q, tokens)
    if units * len(starts) > MOST_ROUNDS * blocks:
        return tile.units_per_section
    work = []
    for start in starts:
        rows = Span(start, min(start + tokens, sizes.seqlen_q))
        keys = mask.touched(rows, sizes.seqlen_q, sizes.seqlen_k)
        work.append(-(-keys.stop // tile.block_k) - keys.start // tile.block_k + AROUND_A_TILE if len(keys) else 0)
    return balanced_section(tuple(work), units, tile.units_per_section, blocks)


def _split_tiles(
    problem: Problem, device: Device, tile: HopperTile, fixed_split_size: int | None
) -> tuple[int, int, int, str]:
    """What `split` says of the splits of the Hopper kernel, one of whose blocks fills a multiprocessor.

    Nobody asks how much else there is in the batch if splits are of a fixed size: then it is the few rows that are to
    be in one tile.  Where keys are split all sequences have the tiles of the longest.
    """
    sizes = problem.sizes
    count = num_tiles(sizes.batch, sizes.seqlen_q, tile.tokens) * (sizes.num_heads // tile.heads_per_unit)
    fixed = fixed_split_size is not None
    if not (sizes.seqlen_q <= tile.tokens if fixed else count < device.num_units):
        return 0, 1, count, ""
    return split_pieces(problem, count, device.num_units, tile.block_k, fixed_split_size, FEWEST_KEYS_OF_TILES)


def _by_flash(problem: Problem, device: Device, fixed_split_size: int | None) -> _Decision:
    tile = gpu_tile(problem, device)
    workers = num_row_tiles(problem, tile.block_q) * problem.sizes.num_heads
    return _Decision(tile, workers, _tiles_of_rows(problem, workers, tile.block_q))


def _tiles_of_rows(problem: Problem, count: int, block_q: int) -> str:
    return f"{'up to ' if problem.layout.ragged else ''}{count} tiles of {block_q} rows"


def _by_splitkv(problem: Problem, device: Device, fixed_split_size: int | None) -> _Decision:
    tile = gpu_tile(problem, device, "splitkv")
    side_by_side = blocks_per_unit(tile, padded(problem.sizes), problem.dtype, device.shared_memory)
    split_size, splits, workers, reason = split(
        problem, device, tile.block_q, tile.block_k, fixed_split_size, side_by_side
    )
    slots, peers = side_by_side * device.num_units, _peers(problem, device)
    return _Decision(tile, workers, reason, splits, split_size=split_size, num_slots=slots, peers=peers)


def _peers(problem: Problem, device: Device) -> tuple[tuple[str, int], ...]:
    return tuple((name, rule(problem, device)) for name, rule in PEERS.items())


_DECISIONS: dict[str, Callable[[Problem, Device, int | None], _Decision]] = {
    "none": _by_nobody,
    "numpy": _by_numpy,
    "hopper": _by_hopper,
    "flash": _by_flash,
    "splitkv": _by_splitkv,
}


ANY_NUMBER_OF_SLOTS = 2**30
"""Enough that `splits.live_split_blocks` gives a piece all the splits it may have."""


@lru_cache(maxsize=4096)
def with_num_splits(plan: Plan, problem: Problem, num_splits: int) -> Plan:
    """The plan with so many splits of a sequence at most, where lengths are data; 0: as it is.

    A sequence gets as many as it has `splits.FEWEST_KEYS` for, or those of tiles.
    """
    on_hopper = plan.kernel == "hopper" and plan.num_splits > 1
    if not (plan.kernel == "splitkv" or on_hopper) or num_splits == 0:
        return plan
    fewest = FEWEST_KEYS_OF_TILES if on_hopper else FEWEST_KEYS
    most = max(1, min(num_splits, math.ceil(problem.sizes.seqlen_k / fewest)))
    reason = f"up to {most} splits a sequence, as was asked"
    instead = None if plan.instead is None else with_num_splits(plan.instead, problem, num_splits)
    tiles = plan.num_workers // plan.num_splits
    plan = replace(plan, num_splits=most, reason=reason, instead=instead)
    if on_hopper:
        return replace(plan, num_workers=tiles * most, num_slots=ANY_NUMBER_OF_SLOTS)
    assert isinstance(plan.tile, Tile)
    workers = blocks_of_splitkv(problem, plan.tile.block_q, most, plan.num_slots)
    return replace(plan, split_size=EVEN, num_workers=workers)


def for_live_keys(plan: Plan, problem: Problem, live_keys: int) -> Plan:
    """The CPU's plan, made for all keys that a cache has room for, once those that are live are known."""
    room = problem.sizes.batch * problem.sizes.seqlen_k
    if plan.num_workers == 1 or room == 0:
        return plan
    workers = num_cpu_workers(problem, plan.num_workers, live_keys / room)
    return plan if workers == plan.num_workers else replace(plan, num_workers=workers)
