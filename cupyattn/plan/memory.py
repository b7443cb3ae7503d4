"""How much memory a plan takes besides the operands, at the peak: results, and what is needed to make them.

On a GPU it is what the launcher asks for, to the byte.  On a CPU it is a model of what `cpu` allocates: results, the
scratch memory of each thread, by the largest of its tiles, and gradients in the compute dtype until they are rounded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from cupyattn.plan.backward import OF_KEYS, OF_VALUES
from cupyattn.plan.cpu import cpu_tile
from cupyattn.plan.hopper import HopperTile, padded_dims
from cupyattn.plan.schedule import BY_SHARES, num_sequences, num_words
from cupyattn.plan.tiling import num_tiles
from cupyattn.plan.values import BackwardTiles, CpuTile, Plan, Tile
from cupyattn.problem import FLOAT8, ITEMSIZE, Problem, Shape, Span, Spec

Specs = Mapping[str, Spec]
"""Of a call's arrays, by our words for them."""


def memory_of(plan: Plan, problem: Problem, specs: Specs, gradients: bool = False) -> int:
    """Bytes at the peak besides the operands, among which are dout, out and lse where `gradients` are asked for."""
    differentiated = [specs[name] for name in DIFFERENTIATED if name in specs]
    results = differentiated if gradients else list(problem.results.values())
    total = sum(spec.nbytes for spec in results)
    if plan.kernel == "numpy":
        return total + (_gradients_on_cpu(plan, problem, specs) if gradients else _on_cpu(plan, problem))
    return total + (_gradients_on_gpu(plan, problem, specs) if gradients else _workspace(plan, problem))


DIFFERENTIATED = ("q", "k", "v", "bias", "sinks", "alibi_slopes")


def _workspace(plan: Plan, problem: Problem) -> int:
    """What splits leave, `Workspace` of the launcher."""
    sizes, tile = problem.sizes, plan.tile
    if plan.num_splits == 1:
        return 0
    if isinstance(tile, HopperTile):
        pieces = sizes.batch * (sizes.num_heads // tile.heads_per_unit) * max(1, -(-sizes.seqlen_q // tile.tokens))
        return 4 * pieces * plan.num_splits * (tile.block_q * (padded_dims(sizes, problem.dtype)[1] + 2) + 1)
    assert isinstance(tile, Tile)
    pieces = sizes.batch * (sizes.num_heads // sizes.queries_per_pair)
    pieces *= max(1, -(-sizes.seqlen_q * sizes.queries_per_pair // tile.block_q))
    columns = -(-sizes.head_dim_v // 32) * 32
    scheduled = problem.layout.lengths_are_data
    places = 2 * plan.num_workers if scheduled and plan.split_size == BY_SHARES else pieces * plan.num_splits
    words = num_words(num_sequences(problem.layout, sizes.batch), plan.num_workers) if scheduled else 0
    return 4 * (places * (tile.block_q * (columns + 2) + 1) + words)


def _gradients_on_gpu(plan: Plan, problem: Problem, specs: Specs) -> int:
    """A delta and an lse of each row, and gradients that have to be summed up."""
    assert isinstance(plan.tile, BackwardTiles)
    sizes, layout, tiles = problem.sizes, problem.layout, plan.tile
    total = 2 * math.prod(problem.lse_shape)
    shared = {"k": (OF_KEYS, sizes.num_heads_k), "v": (OF_VALUES, sizes.num_heads_v)}
    for name in DIFFERENTIATED:
        if name not in specs:
            continue
        shape, parts = specs[name].shape, 1
        whole = shape if layout.ragged or name == "bias" else (*sizes.batch_shape, *shape[-3:])
        if name in shared:
            bit, heads = shared[name]
            together = sizes.num_heads // heads
            parts = together // math.gcd(together, tiles.heads_of(bit))
        if name == "sinks":
            total += math.prod(problem.lse_shape)
        elif name == "alibi_slopes":
            total += sizes.batch * sizes.num_heads * 8 * max(1, -(-sizes.seqlen_q // 128))
        elif parts > 1 or math.prod(whole) != math.prod(shape):
            total += parts * math.prod(whole)
    if plan.kernel == "hopper_backward":  # a flag for each of its tiles
        for (wanted, tile), heads in zip(tiles.passes, tiles.heads, strict=True):
            name, longest = ("k", sizes.seqlen_k) if wanted & (OF_KEYS | OF_VALUES) else ("q", sizes.seqlen_q)
            end_to_end = specs[name].shape[0] if layout.ragged else None
            total += num_tiles(sizes.batch, longest, tile.stays, end_to_end) * (sizes.num_heads // heads)
    return 4 * total


class _Cut(NamedTuple):
    """The numbers of a tile's arrays on a CPU."""

    rows: int
    """Of all heads and sequences of the tile."""
    keys: int
    """Of a block."""
    pairs: int
    """Key heads, of all sequences."""
    height: int
    """Rows that one matrix product has."""
    tiles: int
    """Of the whole problem."""


EDGE = 128
"""Keys of a block where a band ends, and rows of the tallest tile that is not cut so: `cpu.tiles`."""
STRETCH = 512
"""Keys that are looked at together, `cpu.facts`."""
FEW_ROWS, MANY_KEYS, LIKED = 32, 128, 4
"""Rows up to which, and keys from which, products are shaped for a decode, and how many they are made: `cpu.flash`."""
SHORT = 2**17
"""Numbers of a sequence up to which it goes together with others: `cpu.cutting`, as the next."""
SHARE = 4
"""Parts per worker from which a part is not shared out."""
LIMITS = 2**16
"""Numbers that hide scores at the same time: `cpu.hiding`."""
SEVERAL_ROWS = 64
"""Rows per key from which their bound is worth knowing: `cpu.bounded`."""


def _cuts(plan: Plan, problem: Problem, gradients: bool) -> tuple[_Cut, ...]:
    """That of the plan's tile; or, where parts are cut by lengths of their own, those of one and of all sequences."""
    sizes, tile = problem.sizes, plan.tile
    batch = sizes.batch_shape[-1] if sizes.batch_shape else 1
    lengths, band = (sizes.seqlen_q, sizes.seqlen_k), problem.mask.band_width(sizes.seqlen_k)
    workers = plan.num_workers
    if problem.layout.lengths_are_data:  # long ones are parts by themselves, of which many are one worker's each
        heads_kv = sizes.num_heads_k * sizes.head_dim + sizes.num_heads_v * sizes.head_dim_v
        numbers = sizes.seqlen_q * sizes.num_heads * (sizes.head_dim + sizes.head_dim_v) + sizes.seqlen_k * heads_kv
        together = sizes.batch if numbers <= SHORT else 1
        several = {(together, workers), (1, 1 if sizes.batch >= SHARE * workers else workers)}
        tiles = [cpu_tile(sizes, count, *lengths, each, band, gradients) for count, each in several]
    elif gradients:
        tiles = [cpu_tile(sizes, batch, *lengths, workers, band, True)]
    else:
        assert isinstance(tile, CpuTile)
        tiles = [tile]
    found = []
    for one in tiles:
        pairs, height = one.batch * one.pairs, one.heads * min(one.block_q, max(1, sizes.seqlen_q))
        count = sizes.batch * sizes.num_heads * -(-sizes.seqlen_q // one.block_q) // max(1, pairs * one.heads)
        found.append(_Cut(pairs * height, _widest_block(one, problem), pairs, height, max(1, count)))
    return tuple(found)


def _widest_block(cut: CpuTile, problem: Problem) -> int:
    """Keys; a band is cut finer where it ends inside a tile, see `cpu.tiles.band_cuts`."""
    sizes, mask = problem.sizes, problem.mask
    widest = max(1, min(cut.block_k, sizes.seqlen_k))
    if not mask.has_band:
        return widest
    starts = range(0, sizes.seqlen_q, cut.block_q)
    tiles = [Span(start, min(sizes.seqlen_q, start + cut.block_q)) for start in starts]
    touched = max((len(mask.touched(rows, sizes.seqlen_q, sizes.seqlen_k)) for rows in tiles), default=0)
    whole = max((len(mask.whole(rows, sizes.seqlen_q, sizes.seqlen_k)) for rows in tiles), default=0)
    stacked = cut.heads > 1 or mask.array is not None or problem.edits.bias is not None
    if stacked or cut.block_q <= EDGE or not whole:
        return max(1, min(widest, touched))
    return min(widest, max(EDGE, whole))


def _on_cpu(plan: Plan, problem: Problem) -> int:
    """An lse that nobody asked for, scratch memory of each thread, what is known of keys."""
    item = ITEMSIZE[plan.compute_dtype]
    unasked = 0 if problem.needs_lse else math.prod(problem.lse_shape) * ITEMSIZE[problem.lse_dtype]
    scratch = max(
        min(plan.num_workers, cut.tiles) * _scratch(cut, problem, item) for cut in _cuts(plan, problem, False)
    )
    sizes = problem.sizes
    norms = sizes.batch * (sizes.num_heads // sizes.queries_per_pair) * sizes.seqlen_k
    return unasked + scratch + (norms * item if _is_bounded(problem) and problem.mask.has_band else 0)


def _is_bounded(problem: Problem) -> bool:
    mask, edits, sizes = problem.mask, problem.edits, problem.sizes
    edited = mask.array is not None or edits.bias is not None or edits.alibi_slopes is not None or edits.sinks
    return not edited and mask.left is None and sizes.seqlen_q * sizes.queries_per_pair >= SEVERAL_ROWS


def _scratch(cut: _Cut, problem: Problem, item: int) -> int:
    """Bytes of one thread while it works on a tile, forward."""
    sizes, rows, keys = problem.sizes, cut.rows, cut.keys
    dim, dim_v = sizes.head_dim, sizes.head_dim_v
    numbers = rows * (dim + dim_v) + rows * keys  # q, out, scores
    if keys < sizes.seqlen_k or problem.mask.has_band:
        numbers += rows * dim_v  # the product of one block
    if 1 < cut.height <= FEW_ROWS and keys >= MANY_KEYS:
        numbers += rows * dim_v  # the addend
        if more := -cut.height % LIKED:
            padded = rows // cut.height * (cut.height + more)
            numbers += (padded - rows) * keys + padded * (dim + dim_v)
    if _is_bounded(problem):
        numbers += rows * dim_v
    total = item * (numbers + 8 * rows) + _keys(cut, problem, item)
    if problem.out_dtype == "bfloat16":
        total += 3 * item * rows * dim_v
    return total + _edits(cut, problem, item)


def _keys(cut: _Cut, problem: Problem, item: int) -> int:
    """Keys and values of a block, where they are not taken from the caller's memory, and on their way."""
    sizes, layout = problem.sizes, problem.layout
    gathered = layout.page_size is not None or layout.cached
    if not gathered and ITEMSIZE[problem.dtype] == item:
        return 0
    stretch = min(STRETCH, sizes.seqlen_k) if _is_bounded(problem) else 0
    k = max(cut.keys, stretch) * max(sizes.head_dim, sizes.head_dim_v if stretch else 0)
    total = cut.pairs * item * (k + cut.keys * sizes.head_dim_v)
    widest = cut.pairs * max(k, cut.keys * sizes.head_dim_v)
    if problem.dtype in ("bfloat16", FLOAT8):
        total += (item + 4) * widest
    return total + (widest * ITEMSIZE[problem.dtype] if gathered else 0)


def _edits(cut: _Cut, problem: Problem, item: int) -> int:
    """Pieces of masks and biases, distances and dropout's random words, of one block."""
    sizes, edits, total = problem.sizes, problem.edits, 0
    scores = cut.rows * cut.keys
    in_head = min(cut.height, max(1, sizes.seqlen_q)) * cut.keys

    def piece(shape: Shape) -> int:
        """Numbers of a tile's piece."""
        heads = len(shape) > 2 and shape[-3] > 1
        return scores if heads else in_head

    hidden = 0
    if problem.mask.array is not None:
        hidden = max(hidden, piece(problem.mask.array))
        total += 3 * piece(problem.mask.array)
    if edits.bias is not None:
        hidden = max(hidden, piece(edits.bias))
        total += (2 * item + 3) * piece(edits.bias)  # that of the block before is still there
    total += item * min(hidden, LIMITS)
    if edits.alibi_slopes is not None:
        total += max(24 * in_head, 16 * in_head + item * scores)
    if problem.dropout_p > 0.0:
        total += 24 * scores
    return total


def _gradients_on_cpu(plan: Plan, problem: Problem, specs: Specs) -> int:
    """Gradients before they are rounded, and of each thread scratch memory and its sums over tiles that share keys."""
    sizes, item = problem.sizes, ITEMSIZE[plan.compute_dtype]
    dim, dim_v = sizes.head_dim, sizes.head_dim_v
    collected = 0
    for name in DIFFERENTIATED:
        if name in specs:
            shape = specs[name].shape
            batch = math.prod(sizes.batch_shape) if not problem.layout.ragged and name in ("q", "k", "v") else 0
            collected += item * (batch * math.prod(shape[-3:]) if batch else math.prod(shape))
    rounded = 0 if ITEMSIZE[problem.dtype] == item else 1
    own = sum(specs[name].nbytes for name in DIFFERENTIATED if name in specs)
    most = 0
    for cut in _cuts(plan, problem, True):
        rows, keys = cut.rows, cut.keys
        scores = 1 + bool(problem.edits.softcap) + (problem.dropout_p > 0.0) + (problem.edits.bias is not None)
        numbers = rows * (2 * dim + 2 * dim_v) + scores * rows * keys + cut.pairs * keys * (dim + dim_v)
        numbers += cut.pairs * sizes.seqlen_k * (dim + dim_v)  # the sums
        each = _scratch(cut, problem, item) + item * numbers
        most = max(most, min(plan.num_workers, cut.tiles) * each)
    return collected + most - (0 if rounded else own)
