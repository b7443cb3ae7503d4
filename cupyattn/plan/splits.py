"""When decoding splits its keys: our rule, and those of flash-attn 2 and 3 to compare it with.

A decode has few query rows, so that one thread block per group of heads leaves most of a GPU idle, and each of
them walks all keys alone.  Cutting the keys into splits makes more blocks, at the price of partial results
that have to be written, read and merged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from cupyattn.plan.schedule import BY_SHARES, most_cuts, num_sequences, shortest_share
from cupyattn.plan.tiling import num_row_tiles
from cupyattn.problem import ITEMSIZE, Device, Problem, Span

FEWEST_KEYS = 256
"""Keys of a split, unless there are fewer: below, starting and merging cost more than they gain."""
FEWEST_KEYS_OF_TILES = 512
"""The same of the Hopper kernel, whose splits leave more rows to be merged."""
BLOCKS_PER_UNIT = 2
"""Split-KV blocks that run side by side on a multiprocessor."""

MERGED_TOGETHER = 5
"""Splits from which all warps of a block merge those of one row, if rows are few: one of them would wait for memory
twice."""
FEW_ROWS_TO_MERGE = 1056
"""Eight thread blocks for each multiprocessor of an H100 or H200, which all run at once."""


def merging_blocks(rows: int, num_splits: int) -> tuple[int, bool]:
    """Thread blocks that merge so many splits of so many rows, and whether all four warps of one share a row.

    >>> merging_blocks(32, 32), merging_blocks(8192, 32), merging_blocks(32, 2)
    ((32, True), (2048, False), (8, False))
    """
    together = num_splits >= MERGED_TOGETHER and rows <= FEW_ROWS_TO_MERGE
    return (rows if together else -(-rows // 4)), together


def live_split_blocks(total: int, pieces: int, slots: int, block_k: int, fewest_keys: int = FEWEST_KEYS) -> int:
    """Key blocks of a split, so that the splits of all pieces run at once, in one wave.

    A piece is the rows that share keys; `total` counts the key blocks all of them see, after windows and live
    lengths, and `slots` the thread blocks that the GPU runs at once.  Every piece may have one split that
    is not full; where pieces take more than half of the slots, half are shared out all the same, for the sake
    of one that is much longer than the others, and up to half a wave more is the price.
    Twin of ``live_split_blocks`` in ``splits.cuh``, which knows lengths that are data.

    One sequence of 65536 keys beside 31 of 512, eight key heads, 264 slots: blocks of 64 keys are 10176 in
    all, and 132 slots are shared out, so a split has 78 blocks: 14 splits for each head of the long sequence,
    one for each of the others.

    >>> live_split_blocks(total=8 * (65536 + 31 * 512) // 64, pieces=256, slots=264, block_k=64)
    78
    """
    room = max(slots - pieces, slots // 2, 1)
    return max(-(-total // room), -(-fewest_keys // block_k))


def by_wave_efficiency(
    blocks: int, units: int, key_blocks: int, eligible: Callable[[int], bool] = lambda splits: True
) -> int:
    """The fewest eligible splits within 85% of the best wave efficiency; 1 where there is no work.

    `blocks` thread blocks on `units` places run in waves; the last one may be nearly empty.
    48 blocks on 108 places: two splits fill 96/108 = 0.89 of a wave, three 144/216 = 0.67.
    """
    if blocks == 0 or key_blocks == 0:
        return 1

    def efficiency(splits: int) -> float:
        waves = np.float32(blocks * splits) / np.float32(units)  # in the precision of the peers, to agree with them
        return float(waves / np.ceil(waves))

    candidates = [splits for splits in range(1, min(128, units, key_blocks) + 1) if eligible(splits)]
    best = max(map(efficiency, candidates))
    return next(splits for splits in candidates if efficiency(splits) >= 0.85 * best)


def flash_attn_2(problem: Problem, device: Device) -> int:
    """Splits that flash-attn 2 would choose by itself; it does not look at windows or live lengths.

    Source: flash-attn 2, csrc/flash_attn/flash_api.cpp, num_splits_heuristic and its callers.
    """
    sizes, mask = problem.sizes, problem.mask
    heads, rows = sizes.num_heads, sizes.seqlen_q
    if problem.dropout_p:
        return 1
    sees_all = _open(mask.left, sizes.seqlen_k) is None and _open(mask.right, sizes.seqlen_k) in (None, 0)
    if rows == 1 and heads > sizes.num_heads_k and sees_all and problem.edits.alibi_slopes is None:
        heads, rows = sizes.num_heads_k, heads // sizes.num_heads_k
    elif problem.layout.ragged and problem.layout.page_size is None:
        return 1
    block_k = 256 if sizes.head_dim <= 64 else 128 if sizes.head_dim <= 128 else 64
    key_blocks = math.ceil(sizes.seqlen_k / block_k)
    blocks, slots = sizes.batch * heads * math.ceil(rows / 64), 2 * device.num_units
    if blocks >= 0.8 * slots:
        return 1

    def shrinks(splits: int) -> bool:
        return splits == 1 or math.ceil(key_blocks / splits) != math.ceil(key_blocks / (splits - 1))

    return by_wave_efficiency(blocks, slots, key_blocks, shrinks)


def flash_attn_3(problem: Problem, device: Device, lengths: Sequence[int] | None = None) -> int:
    """Splits that flash-attn 3 would choose (with num_splits = 0); of the first sequence, given live `lengths`.

    Without them, where lengths are data: the most that a sequence may get.

    Source: flash-attn 3, hopper/heuristics.h, tile_size.h, flash_api.cpp and flash_prepare_scheduler.cu.
    """
    sizes = problem.sizes
    left = _open(problem.mask.left, sizes.seqlen_k - 1)
    right = _open(problem.mask.right, sizes.seqlen_q - 1)  # one query: causal or not is the same
    local = left is not None or right not in (None, 0)
    block_q, block_k = _tile_of_flash_attn_3(problem, local, local or right == 0)
    seen = sizes.seqlen_k
    if local:
        before = sizes.seqlen_k - 1 if left is None else left
        after = sizes.seqlen_q - 1 if right is None else right
        seen = max(0, min(seen, before + after + 1 + block_q))
    key_blocks = math.ceil(seen / block_k)
    row_blocks = math.ceil(sizes.seqlen_q * (sizes.num_heads // max(1, sizes.num_heads_k)) / block_q)
    batch = 1 if lengths is not None or problem.layout.lengths_are_data else sizes.batch
    blocks, units = batch * sizes.num_heads_k * row_blocks, device.num_units
    ceiling = 1
    if blocks >= 0.8 * units:
        in_cache = 50 * 2**20
        size = sizes.seqlen_k * (sizes.head_dim + sizes.head_dim_v) * ITEMSIZE[problem.dtype]
        if size > in_cache and row_blocks >= 2 * units and not local and right is None:
            ceiling = min(math.ceil(size / in_cache), 128)
    elif key_blocks > 4:
        ceiling = by_wave_efficiency(blocks, units, key_blocks)
    if lengths is None:
        return ceiling
    live = [math.ceil(length / block_k) for length in lengths]
    share = math.ceil(1.1 * sum(live) * row_blocks * sizes.num_heads_k / units)
    return max(1, min(math.ceil(live[0] / max(1, share)), ceiling))


def _open(keys: int | None, enough: int) -> int | None:
    """One side of a window; None if it hides nothing."""
    return None if keys is None or keys >= enough else keys


def _tile_of_flash_attn_3(problem: Problem, local: bool, banded: bool) -> tuple[int, int]:
    """(rows, keys) of its Hopper tile for 16-bit dtypes."""
    head_dim, head_dim_v = problem.sizes.head_dim, problem.sizes.head_dim_v
    paged = problem.layout.page_size is not None  # a decode reads pages without TMA
    if head_dim <= 64:
        return 192, 128 if banded or paged else 192
    if head_dim <= 96:
        return 192, 128 if local or paged else 144
    if head_dim <= 128:
        return 128, 128 if banded or paged else 176
    if head_dim <= 192:
        return 128, 96 if local or paged else 128 if head_dim_v <= 128 else 112
    return 128, 64 if local else 80


PEERS: dict[str, Callable[[Problem, Device], int]] = {"flash-attn 2": flash_attn_2, "flash-attn 3": flash_attn_3}


def split(
    problem: Problem,
    device: Device,
    block_q: int,
    block_k: int,
    fixed_split_size: int | None,
    blocks_per_unit: int = BLOCKS_PER_UNIT,
) -> tuple[int, int, int, str]:
    """(split_size, most splits of a piece, thread blocks, reason) of the split-KV kernel."""
    pieces, slots = pieces_of_splitkv(problem, block_q), blocks_per_unit * device.num_units
    if not problem.layout.lengths_are_data:
        return split_pieces(problem, pieces * problem.sizes.batch, slots, block_k, fixed_split_size)
    size, blocks = BY_SHARES, math.ceil(problem.sizes.seqlen_k / block_k)  # a window may lie anywhere
    if fixed_split_size is not None:
        size = math.ceil(fixed_split_size / block_k) * block_k
        splits, reason = max(1, math.ceil(blocks * block_k / size)), f"splits of {size} keys, as was asked"
    else:
        splits = most_cuts(blocks, pieces, slots, shortest_share(FEWEST_KEYS, block_k))
        reason = f"up to {splits} splits a sequence, by the lengths on the device"
    return size, splits, blocks_of_splitkv(problem, block_q, splits, slots), reason


def pieces_of_splitkv(problem: Problem, block_q: int) -> int:
    """Of a sequence: rows that share keys, as many as a tile has at most."""
    sizes, group = problem.sizes, problem.sizes.queries_per_pair
    return (sizes.num_heads // group) * max(1, math.ceil(sizes.seqlen_q * group / block_q))


def blocks_of_splitkv(problem: Problem, block_q: int, splits: int, slots: int) -> int:
    """Thread blocks for sequences whose lengths are data: those that run at once, if keys are cut, or one a piece."""
    if splits == 1:
        group = problem.sizes.queries_per_pair
        return num_row_tiles(problem, block_q, group) * (problem.sizes.num_heads // group)
    pieces = num_sequences(problem.layout, problem.sizes.batch) * pieces_of_splitkv(problem, block_q)
    return min(slots, pieces * splits)


def split_pieces(
    problem: Problem,
    pieces: int,
    slots: int,
    block_k: int,
    fixed_split_size: int | None,
    fewest_keys: int = FEWEST_KEYS,
) -> tuple[int, int, int, str]:
    """The same of any kernel, `slots` of whose thread blocks run at once.

    Sequences of one length get as many splits as run at once, over the keys that their window leaves: a decode is
    bound by memory, which one wave keeps busy, and a second one, however full, would only start over.
    Sequences whose lengths are data are cut by `live_split_blocks`, on the device.
    """
    sizes = problem.sizes
    lengths_are_data = problem.layout.lengths_are_data
    touched = problem.mask.touched(Span(0, max(1, sizes.seqlen_q)), sizes.seqlen_q, sizes.seqlen_k)
    blocks = math.ceil(touched.stop / block_k) - touched.start // block_k if problem.flops else 0
    if lengths_are_data:  # its own lengths may put a sequence's window anywhere
        blocks = math.ceil(sizes.seqlen_k / block_k)
    if fixed_split_size is not None:
        size = math.ceil(fixed_split_size / block_k)
        splits = max(1, math.ceil(blocks / size))
        return size * block_k, splits, pieces * splits, f"splits of {size * block_k} keys, as was asked"
    if lengths_are_data:  # all other sequences may be empty
        size = live_split_blocks(blocks * (pieces // max(1, sizes.batch)), pieces, slots, block_k, fewest_keys)
        splits = max(1, math.ceil(blocks / size))
        return 0, splits, pieces * splits, f"up to {splits} splits a sequence, by the lengths on the device"
    splits = max(1, min(slots // max(1, pieces), blocks * block_k // fewest_keys))
    size = max(1, math.ceil(blocks / splits))  # even
    splits = max(1, math.ceil(blocks / size))
    full = pieces * splits / slots
    reason = f"{pieces} pieces on {slots} slots: {splits} splits of {size * block_k} keys fill {full:.0%} of one wave"
    if splits == 1:
        reason = f"{pieces} pieces, no split: the GPU is busy or the keys are few"
    return size * block_k, splits, pieces * splits, reason
