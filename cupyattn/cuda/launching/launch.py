"""From a plan and the places of its arrays to a launch: kernel, grid and parameter record.

Nothing here touches a GPU: arrays are `View` values, pointers and strides, so that the same launches run
under the emulator in the tests.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import chain

import numpy as np

from cupyattn.cuda.launching import maps, params
from cupyattn.cuda.launching.mapping import are_remade, map_of, objections
from cupyattn.cuda.launching.maps import BoxMap
from cupyattn.cuda.launching.recipe import FactsOfArrays, Recipe, Workspace
from cupyattn.cuda.launching.views import (
    DESCALES,
    Fact,
    Strides,
    View,
    astray,
    broadcast_strides,
    contiguous_strides,
    has_to_be_copied,
    operand_strides,
    score_strides,
)
from cupyattn.cuda.making import catalogue
from cupyattn.cuda.making.module import Specialisation
from cupyattn.plan import (
    ALL_KEYS,
    BY_SHARES,
    FEWEST_KEYS,
    HopperTile,
    Plan,
    Tile,
    merging_blocks,
    num_row_tiles,
    num_sequences,
    num_words,
    padded_dims,
    rows_per_box,
    tiles_if_even,
)
from cupyattn.problem import FLOAT8, ITEMSIZE, Problem, Shape

MAPPED = ("q", "k", "v", "out")
"""Of which a kernel may have tensor maps, in this order in front of its record."""
LARGEST_FLOAT32 = (2.0 - 2.0**-23) * 2.0**127
OF_FLOAT8 = 256.0
"""``kOfFloat8`` in ``numbers.cuh``: what the halves that float8 is made by the split-KV kernel are multiplied by."""


def record_of(
    recipe: Recipe,
    operands: Mapping[str, View],
    results: Mapping[str, int],
    seed: int = 0,
    scratch: Mapping[str, int] | None = None,
    cache_seqlen: int = 0,
    encode: Callable[[BoxMap, int], bytes] | None = None,
) -> np.void:
    """The kernel's one parameter, from the operands' views and the results' addresses.

    `scratch` has the addresses that the recipe's workspace asks for; `cache_seqlen` is that of all sequences of
    a cache, where they have one; `encode` makes tensor maps, instead of the driver.
    """
    pointers = {name: view[0] for name, view in operands.items()}
    pointers.update(results)
    if scratch:
        pointers.update(scratch)
    pointers["dropout_seed"] = seed
    pointers["cache_seqlen"] = cache_seqlen
    if not recipe.behind:
        return params.record(pointers, recipe.tail)
    descales = _DESCALES.pack(*(pointers.get(f"{name}_descale", 0) for name in ("q", "k", "v")))
    tail = recipe.tail + descales + recipe.behind
    if not recipe.maps:
        return params.record(pointers, tail)
    encode = encode or maps.encode
    # Of no keys no box is ever asked for, but the driver wants an address.
    head = b"".join(
        encode(wanted, pointers[name] or pointers["q"]) for name, wanted in zip(MAPPED, recipe.maps, strict=False)
    )
    fill = bytes(-(params.SIZE + len(descales) + len(recipe.behind)) % maps.ALIGNMENT)
    return params.record(pointers, tail + fill, head.ljust(4 * maps.SIZE, b"\0"))


def place_of_addresses(recipe: Recipe) -> tuple[int, int]:
    """From where to where `params.POINTERS` lie in such a record."""
    start = 4 * maps.SIZE if recipe.maps else 0
    return start, start + 8 * len(params.POINTERS)


def recipe_of(plan: Plan, problem: Problem, operands: Mapping[str, View], remade: tuple[str, ...] = ()) -> Recipe:
    """The recipe, remembered by problem, strides and alignment; results are contiguous.

    Some operands may have been `remade` as another recipe asked; none is asked for twice.
    """
    facts = tuple([(name, view[1:]) for name, view in operands.items()])
    return _recipe(plan, problem, facts, astray(operands, ("q", "k", "v")), remade)


@lru_cache(maxsize=4096)
def _recipe(
    plan: Plan, problem: Problem, facts: tuple[Fact, ...], are_astray: tuple[str, ...], remade: tuple[str, ...]
) -> Recipe:
    batch_shape = problem.sizes.batch_shape
    copies = tuple(
        name for name, (shape, steps, dtype) in facts if has_to_be_copied(name, shape, steps, dtype, batch_shape)
    )
    if copies:
        return Recipe(_NOTHING, (0, 0, 0), b"", Workspace(), copies)
    arrays = arrays_of(problem, facts, not are_astray)
    if plan.kernel == "hopper" and (against := objections(problem, arrays.shapes, arrays.strides, are_astray)):
        if are_remade(plan, problem) and not set(against) & set(remade):
            return Recipe(_NOTHING, (0, 0, 0), b"", Workspace(), remade=tuple(against))
        assert plan.instead is not None
        plan = plan.instead
    tail = tail_of(plan, problem, arrays).pack()
    if isinstance(plan.tile, HopperTile):
        return _hopper(plan, plan.tile, problem, arrays, tail)
    assert isinstance(plan.tile, Tile)
    if plan.kernel == "flash":
        return _flash(plan.tile, problem, arrays, tail)
    return _splitkv(plan, plan.tile, problem, arrays, tail)


def arrays_of(problem: Problem, facts: tuple[Fact, ...], aligned: bool) -> FactsOfArrays:
    sizes = problem.sizes
    strides = {name: broadcast_strides(shape, steps) for name, (shape, steps, _) in facts}
    lead = len(sizes.batch_shape) if len(sizes.batch_shape) > 1 else 0
    for name, spec in problem.results.items():
        if name == "out" and name in strides:  # an operand of its gradients
            continue
        strides[name] = contiguous_strides((sizes.batch, *spec.shape[lead:]) if lead else spec.shape)
    shapes = {name: shape for name, (shape, _, _) in facts}
    return FactsOfArrays(shapes, strides, {name: dtype for name, (_, _, dtype) in facts}, aligned)


def _hopper(plan: Plan, tile: HopperTile, problem: Problem, arrays: FactsOfArrays, tail: bytes) -> Recipe:
    sizes, page_size = problem.sizes, problem.layout.page_size
    box_maps = _maps(problem, arrays.shapes, arrays.strides, tile)
    specialisation = catalogue.hopper(
        problem.dtype,
        *padded_dims(sizes, problem.dtype),
        tile,
        len(box_maps) == 4,
        catalogue.edits_of(problem),
        page_size is not None,
        plan.num_splits > 1,
    )
    units, longest = sizes.num_heads // tile.heads_per_unit, max(1, -(-sizes.seqlen_q // tile.tokens))
    tiles, per_unit = num_row_tiles(problem, tile.tokens), tiles_if_even(problem, tile.tokens)
    if plan.num_splits > 1:  # sequences are not cut into tiles of their own number, too
        tiles, per_unit = longest * _sequences(problem) * plan.num_splits, longest
    count = tiles * units
    grid = (min(count, plan.num_workers) if tile.persistent else count, 1, 1)
    per_box = rows_per_box(tile.block_k, page_size or 0)
    in_order = units * _sequences(problem) if per_unit else units
    section = min(tile.units_per_section, max(1, in_order))
    rising = -(-in_order // section) % 2 if tile.persistent and tile.reach != ALL_KEYS else -1
    whole, last = divmod(in_order, section)
    divisors = [divisor(max(1, x)) for x in (per_unit * section, section, last, units)]
    numbers = (count, per_unit, tiles, tile.tokens, tile.heads_per_unit, per_box, whole, rising)
    behind = _descaled(arrays) + _HOPPER.pack(*numbers, *chain.from_iterable(divisors))
    workspace, merge = Workspace(), None
    if plan.num_splits > 1:
        rows = (tile.block_q, tile.tokens * tile.heads_per_unit, tile.heads_per_unit, longest)
        workspace, merge = _merge(plan, problem, arrays, tail, padded_dims(sizes, problem.dtype)[1], rows)
    return Recipe(specialisation, grid, tail, workspace, maps=box_maps, behind=behind, merge=merge)


def _merge(
    plan: Plan, problem: Problem, arrays: FactsOfArrays, tail: bytes, columns: int, rows: tuple[int, int, int, int]
) -> tuple[Workspace, Recipe]:
    """What splits leave, of so many `columns`, and the launch that merges them; `rows` as ``MergeParams`` has them."""
    block_q, rows_per_piece, heads_per_unit, pieces_per_unit = rows
    pieces = problem.sizes.batch * (problem.sizes.num_heads // heads_per_unit) * pieces_per_unit
    blocks, together = merging_blocks(pieces * rows_per_piece, plan.num_splits)
    specialisation = catalogue.merge(problem.dtype, columns, together)
    places = 2 * plan.num_workers if _is_cut_by_shares(plan, problem) else pieces * plan.num_splits
    workspace = Workspace(places * block_q * columns, 2 * places * block_q, told=places)
    tiles, assumes_finite = plan.tile, plan.kernel == "hopper"
    assert isinstance(tiles, Tile | HopperTile)
    of_columns = OF_FLOAT8 if problem.dtype == FLOAT8 and not assumes_finite else 1.0
    numbers = (*rows, columns, assumes_finite, of_columns, tiles.block_k, FEWEST_KEYS)
    behind = _descaled(arrays) + _MERGE.pack(*numbers)
    return workspace, Recipe(specialisation, (blocks, 1, 1), tail, Workspace(), behind=behind)


def _is_cut_by_shares(plan: Plan, problem: Problem) -> bool:
    return plan.is_scheduled(problem) and plan.split_size == BY_SHARES


def _flash(tile: Tile, problem: Problem, arrays: FactsOfArrays, tail: bytes) -> Recipe:
    sizes, paged = problem.sizes, problem.layout.page_size is not None
    edits, aligned = catalogue.edits_of(problem), arrays.rows_are_aligned
    specialisation = catalogue.flash(problem.dtype, sizes.head_dim, sizes.head_dim_v, tile, aligned, edits, paged)
    grid = (num_row_tiles(problem, tile.block_q) * sizes.num_heads, 1, 1)
    return Recipe(specialisation, grid, tail, Workspace())


def _splitkv(plan: Plan, tile: Tile, problem: Problem, arrays: FactsOfArrays, tail: bytes) -> Recipe:
    sizes, paged, num_splits = problem.sizes, problem.layout.page_size is not None, plan.num_splits
    edits, aligned = catalogue.edits_of(problem), arrays.rows_are_aligned
    specialisation = catalogue.splitkv(problem.dtype, sizes.head_dim, sizes.head_dim_v, tile, aligned, edits, paged)
    group = sizes.queries_per_pair
    row_tiles = max(1, -(-sizes.seqlen_q * group // tile.block_q))
    grid = (num_splits * num_row_tiles(problem, tile.block_q, group) * (sizes.num_heads // group), 1, 1)
    workspace, schedule, merge = Workspace(), None, None
    if num_splits > 1:
        there = tile.block_q if row_tiles > 1 else min(tile.block_q, max(1, sizes.seqlen_q * group))
        rows = (tile.block_q, there, group, row_tiles)
        workspace, merge = _merge(plan, problem, arrays, tail, catalogue.padded(sizes.head_dim_v), rows)
        if plan.is_scheduled(problem):
            grid = (plan.num_workers, 1, 1)
            workspace = workspace._replace(schedule=num_words(_sequences(problem), plan.num_workers))
            schedule = replace(merge, specialisation=catalogue.schedule(), grid=(1, 1, 1))
    behind = _descaled(arrays) if problem.dtype == FLOAT8 else b""
    return Recipe(specialisation, grid, tail, workspace, behind=behind, schedule=schedule, merge=merge)


def _sequences(problem: Problem) -> int:
    """One more if ragged: it wipes the rows behind the last sequence."""
    return num_sequences(problem.layout, problem.sizes.batch)


def _descaled(arrays: FactsOfArrays) -> bytes:
    steps = [x for name in DESCALES for x in (0, 0, *arrays.strides.get(name, ()))[-2:]]
    return _DESCALED.pack(*steps)


def tail_of(plan: Plan, problem: Problem, arrays: FactsOfArrays) -> params.Tail:
    """The record behind its pointers."""
    sizes, edits, layout, mask = problem.sizes, problem.edits, problem.layout, problem.mask
    shapes, strides, dtypes = arrays.shapes, arrays.strides, arrays.dtypes
    in_places = layout.page_size is not None or layout.cached
    lse = strides.get("lse", (0, 0, 0))
    slopes = strides.get("alibi_slopes", (0,))
    p = problem.dropout_p
    step, shift = _distances(problem)
    return params.Tail(
        q=operand_strides("q", problem, strides["q"], False),
        k=operand_strides("k", problem, strides["k"], in_places),
        v=operand_strides("v", problem, strides["v"], in_places),
        out=operand_strides("out", problem, strides["out"], False),
        mask=score_strides(strides.get("mask", ())),
        bias=score_strides(strides.get("bias", ())),
        lse_batch=0 if layout.ragged or len(lse) < 3 else lse[0],
        lse_head=lse[-2],
        block_table_row=strides.get("block_table", (0,))[0],
        alibi_slopes_batch=slopes[0] if len(slopes) == 2 else 0,
        total_q=sizes.total_q,
        total_k=shapes["k"][0] if layout.ragged else 0,
        batch=sizes.batch,
        num_heads=sizes.num_heads,
        seqlen_q=sizes.seqlen_q,
        seqlen_k=_longest_keys(problem, shapes),
        head_dim=sizes.head_dim,
        head_dim_v=sizes.head_dim_v,
        queries_per_k=sizes.num_heads // sizes.num_heads_k,
        queries_per_v=sizes.num_heads // sizes.num_heads_v,
        queries_per_pair=sizes.queries_per_pair,
        left=params.OPEN if mask.left is None else min(mask.left, params.OPEN),
        right=params.OPEN if mask.right is None else min(mask.right, params.OPEN),
        bottom_right=int(mask.alignment == "bottom-right"),
        page_size=layout.page_size or 0,
        num_pages=shapes["k"][0] if layout.page_size else 0,
        num_places=(sizes.batch if layout.page_size else shapes["k"][0]) if layout.cached else params.NO_CACHE,
        seqlen_new=shapes["k_new"][0 if "cu_seqlens_k_new" in shapes else 1] if "k_new" in shapes else 0,
        bias_dtype=params.BIAS_DTYPES.index(dtypes["bias"]) if "bias" in dtypes else 0,
        split_size=plan.split_size,
        num_splits=plan.num_splits,
        num_slots=plan.num_workers if plan.is_scheduled(problem) else plan.num_slots,
        dropout_threshold=min(round(p * 2**32), 2**32 - 1),
        dropout_factor=0.0 if p == 1.0 else 1.0 / (1.0 - p),
        softmax_scale=max(-LARGEST_FLOAT32, min(edits.softmax_scale, LARGEST_FLOAT32)),
        # Beyond these it makes no difference, and a kernel's division would flush it to zero.
        softcap=min(max(edits.softcap, 2.0**-100), 2.0**100) if edits.softcap else 0.0,
        distance_step=step,
        distance_shift=shift,
        float_step=step,
        inverse_scale=1.0 / edits.softmax_scale if edits.softmax_scale >= catalogue.LEAST_DIVISOR else 0.0,
    )


def divisor(value: int) -> tuple[int, int, int]:
    """A number from 1 to 2**31 - 1, and by what the quotient of others below 2**31 is had without a division.

    ``x // value`` is ``x * multiplier >> 32 >> shift`` (but for 1): Granlund and Montgomery, Division by Invariant
    Integers using Multiplication, 1994, theorem 4.2.

    >>> value, multiplier, shift = divisor(7)
    >>> [x * multiplier >> 32 >> shift for x in (6, 7, 2**31 - 2, 2**31 - 1)]
    [0, 1, 306783378, 306783378]
    """
    if value == 1:
        return 1, 0, 0
    shift = (value - 1).bit_length() - 1
    return value, -(-(1 << 32 + shift) // value), shift


def _distances(problem: Problem) -> tuple[int, int]:
    """The step and the shift of ALiBi's distances, ``|step * (a row's diagonal - key) + shift|`` in a kernel."""
    apart = problem.edits.distances
    if apart is None:
        return 1, 0
    return apart.step, apart.first - apart.step * problem.offset


_NOTHING = Specialisation("", "", 0, 0)
"""What is launched before there are copies."""
_DESCALES = struct.Struct("<3Q")
_DESCALED = struct.Struct("<6i")
"""What ``DescaledParams`` has behind the record: addresses and numbers."""
_HOPPER = struct.Struct("<8i" + 4 * "iIi")
"""And ``HopperParams`` behind those."""
_MERGE = struct.Struct("<6if2i4x")
"""Or ``MergeParams``."""


def _maps(
    problem: Problem, shapes: Mapping[str, Shape], strides: Mapping[str, Strides], tile: HopperTile
) -> tuple[BoxMap, ...]:
    """The maps of q, k and v, and of out if whole boxes of it belong to one sequence and to whole tokens."""
    wide, wide_v = padded_dims(problem.sizes, problem.dtype)
    group, page_size = tile.heads_per_unit, problem.layout.page_size
    rows = tile.block_k // tile.cluster if page_size is None else rows_per_box(tile.block_k, page_size)
    found = (
        map_of("q", problem, shapes, strides["q"], wide, tile.tokens, group),
        map_of("k", problem, shapes, strides["k"], wide, rows),
        map_of("v", problem, shapes, strides["v"], wide_v, rows),
    )
    if problem.layout.ragged or 16 % group:
        return found
    parts = ITEMSIZE[problem.out_dtype] // ITEMSIZE[problem.dtype]  # ``kOutParts``
    return (*found, map_of("out", problem, shapes, strides["out"], wide_v // parts, 16 // group, group))


def _longest_keys(problem: Problem, shapes: Mapping[str, Shape]) -> int:
    """seqlen_k, but no more than a block_table has pages for: lengths on the device are cut to it."""
    page_size = problem.layout.page_size
    if page_size is None:
        return problem.sizes.seqlen_k
    room = shapes["block_table"][1] * page_size if shapes["k"][0] else 0
    return min(problem.sizes.seqlen_k, room)
