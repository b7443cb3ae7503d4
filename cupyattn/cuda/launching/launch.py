"""From a plan and the places of its arrays to a launch: kernel, grid and parameter record.

Nothing here touches a GPU: arrays are `View` values, pointers and strides, so that the same launches run
under the emulator in the tests.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from cupyattn.cuda.launching import maps, params
from cupyattn.cuda.launching.maps import BoxMap
from cupyattn.cuda.making import catalogue
from cupyattn.cuda.making.module import Specialisation
from cupyattn.plan import Plan, Tile
from cupyattn.plan.hopper import HopperTile, padded_dims, rows_per_box
from cupyattn.problem import FLOAT8, ITEMSIZE, Problem, Shape

DESCALES = ("q_descale", "k_descale", "v_descale")
LARGEST_FLOAT32 = (2.0 - 2.0**-23) * 2.0**127


class View(NamedTuple):
    """Where an array lies: its address, and elements from step to step along each axis."""

    pointer: int
    shape: Shape
    strides: tuple[int, ...]
    dtype: str


class Workspace(NamedTuple):
    """Scratch memory a launch needs, in elements."""

    partial_out: int = 0
    """float32."""
    partial_lse: int = 0
    """float32."""
    counters: int = 0
    """int32, zero before and after every launch."""


@dataclass(frozen=True)
class Recipe:
    """All of a launch that does not depend on addresses."""

    specialisation: Specialisation
    grid: tuple[int, int, int]
    tail: bytes
    workspace: Workspace
    copies: tuple[str, ...] = ()
    """Operands that no kernel can read as they are; if there are any, the rest is empty."""
    maps: tuple[BoxMap, ...] = ()
    """Of q, k, v and out, in front of the record, if the kernel goes by tensor maps."""
    behind: bytes = b""
    """What such a kernel, or one that takes float8, is told besides, after the addresses of descales."""


Strides = tuple[int, ...]


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
        encode(wanted, pointers[name] or pointers["q"])
        for name, wanted in zip(("q", "k", "v", "out"), recipe.maps, strict=False)
    )
    fill = bytes(-(params.SIZE + len(descales) + len(recipe.behind)) % _ALIGNMENT)
    return params.record(pointers, tail + fill, head.ljust(4 * maps.SIZE, b"\0"))


def recipe_of(plan: Plan, problem: Problem, operands: Mapping[str, View]) -> Recipe:
    """The recipe, remembered by problem, strides and alignment; results are contiguous."""
    facts = tuple([(name, view[1:]) for name, view in operands.items()])
    return _recipe(plan, problem, facts, _are_aligned(operands))


def _are_aligned(operands: Mapping[str, View]) -> bool:
    """q, k and v start at multiples of 16 bytes."""
    return (operands["q"].pointer | operands["k"].pointer | operands["v"].pointer) % 16 == 0


def is_aligned(view: View) -> bool:
    """Every row starts at a multiple of 16 bytes."""
    return view.pointer % 16 == 0 and _steps_are_aligned(view.strides, view.dtype)


def _steps_are_aligned(strides: Strides, dtype: str) -> bool:
    return all(ITEMSIZE[dtype] * stride % 16 == 0 for stride in strides[:-1])


def contiguous_strides(shape: Shape) -> Strides:
    """Elements from step to step of a fresh array."""
    steps = [1]
    for size in reversed(shape[1:]):
        steps.append(steps[-1] * size)
    return tuple(reversed(steps))


Fact = tuple[str, tuple[Shape, Strides, str]]
"""An operand's name, and its view without the address."""


@lru_cache(maxsize=4096)
def _recipe(plan: Plan, problem: Problem, facts: tuple[Fact, ...], aligned: bool) -> Recipe:
    sizes, edits, layout = problem.sizes, problem.edits, problem.layout
    shapes = {name: shape for name, (shape, _, _) in facts}
    strides = {name: _broadcast_strides(shape, steps) for name, (shape, steps, _) in facts}
    dtypes = {name: dtype for name, (_, _, dtype) in facts}
    copies = tuple(
        name for name, (shape, steps, dtype) in facts if has_to_be_copied(name, shape, steps, dtype, sizes.batch_shape)
    )
    if copies:
        return Recipe(Specialisation("", "", 0, 0), (0, 0, 0), b"", Workspace(), copies)
    starts_are_aligned = aligned
    aligned = aligned and all(_steps_are_aligned(strides[name], dtypes[name]) for name in ("q", "k", "v"))
    one_batch = (sizes.batch,) if len(sizes.batch_shape) > 1 else sizes.batch_shape
    lead = len(sizes.batch_shape) if len(sizes.batch_shape) > 1 else 0
    for name, spec in problem.results.items():
        strides[name] = contiguous_strides((*one_batch, *spec.shape[lead:]) if lead else spec.shape)
    bits = catalogue.edits_of(problem)
    group = sizes.queries_per_pair
    batch, ragged = sizes.batch, layout.ragged
    groups = batch * sizes.num_heads // group
    if plan.kernel == "hopper" and objections_to_maps(problem, shapes, strides, starts_are_aligned):
        assert plan.instead is not None
        plan = plan.instead
    tile, num_splits = plan.tile, plan.num_splits
    box_maps: tuple[BoxMap, ...] = ()
    behind = b""
    workspace = Workspace()
    paged = layout.page_size is not None
    descale_steps = [x for name in DESCALES for x in (0, 0, *strides.get(name, ()))[-2:]]
    if isinstance(tile, HopperTile):
        box_maps = _maps(problem, shapes, strides, tile)
        specialisation = catalogue.hopper(
            problem.dtype, *padded_dims(sizes, problem.dtype), tile, len(box_maps) == 4, bits, paged
        )
        tiles = max(1, -(-sizes.seqlen_q // tile.tokens))
        count = tiles * (sizes.num_heads // tile.heads_per_unit) * (batch + ragged)
        grid = (min(count, plan.num_workers) if tile.persistent else count, 1, 1)
        per_box = rows_per_box(tile, layout.page_size or 0)
        numbers = (count, tiles, tile.tokens, tile.heads_per_unit, per_box, tile.units_per_section)
        behind = _DESCALED.pack(*descale_steps) + _HOPPER.pack(*numbers)
    elif plan.kernel == "flash":
        assert isinstance(tile, Tile)
        specialisation = catalogue.flash(problem.dtype, sizes.head_dim, sizes.head_dim_v, tile, aligned, bits, paged)
        # Rows behind the last sequence of a ragged problem are wiped by one sequence more.
        tiles = max(1, -(-sizes.seqlen_q // tile.block_q))
        grid = (tiles * sizes.num_heads * (batch + ragged), 1, 1)
    else:
        assert isinstance(tile, Tile)
        specialisation = catalogue.splitkv(problem.dtype, sizes.head_dim, sizes.head_dim_v, tile, aligned, bits, paged)
        row_tiles = max(1, -(-sizes.seqlen_q * group // tile.block_q))
        blocks = row_tiles * groups
        grid = (num_splits * row_tiles * (sizes.num_heads // group) * (batch + ragged), 1, 1)
        rows = blocks * num_splits * tile.block_q
        if problem.dtype == FLOAT8:
            behind = _DESCALED.pack(*descale_steps)
        if num_splits > 1:
            workspace = Workspace(rows * catalogue.padded(sizes.head_dim_v), 2 * rows, blocks)

    def operand(name: str) -> params.Strides:
        in_places = paged or layout.cached
        return _operand_strides(name, problem, strides[name], name in ("k", "v") and in_places)

    def over_scores(name: str) -> params.ScoreStrides:
        if name not in strides:
            return params.ScoreStrides()
        steps = (0,) * (4 - len(strides[name])) + strides[name]
        return params.ScoreStrides(*steps)

    p = problem.dropout_p
    mask = problem.mask
    lse = strides.get("lse", (0, 0, 0))
    slopes = strides.get("alibi_slopes", (0,))
    tail = params.Tail(
        q=operand("q"),
        k=operand("k"),
        v=operand("v"),
        out=operand("out"),
        mask=over_scores("mask"),
        bias=over_scores("bias"),
        lse_batch=0 if ragged or len(lse) < 3 else lse[0],
        lse_head=lse[-2],
        block_table_row=strides.get("block_table", (0,))[0],
        alibi_slopes_batch=slopes[0] if len(slopes) == 2 else 0,
        total_q=sizes.total_q,
        total_k=shapes["k"][0] if ragged else 0,
        batch=batch,
        num_heads=sizes.num_heads,
        seqlen_q=sizes.seqlen_q,
        seqlen_k=_longest_keys(problem, shapes),
        head_dim=sizes.head_dim,
        head_dim_v=sizes.head_dim_v,
        queries_per_k=sizes.num_heads // sizes.num_heads_k,
        queries_per_v=sizes.num_heads // sizes.num_heads_v,
        queries_per_pair=group,
        left=params.OPEN if mask.left is None else min(mask.left, params.OPEN),
        right=params.OPEN if mask.right is None else min(mask.right, params.OPEN),
        bottom_right=int(mask.alignment == "bottom-right"),
        page_size=layout.page_size or 0,
        num_pages=shapes["k"][0] if layout.page_size else 0,
        num_places=(batch if layout.page_size else shapes["k"][0]) if layout.cached else params.NO_CACHE,
        seqlen_new=shapes["k_new"][0 if "cu_seqlens_k_new" in shapes else 1] if "k_new" in shapes else 0,
        bias_dtype=params.BIAS_DTYPES.index(dtypes["bias"]) if "bias" in dtypes else 0,
        split_size=plan.split_size,
        num_splits=num_splits,
        num_slots=plan.num_slots,
        dropout_threshold=min(round(p * 2**32), 2**32 - 1),
        dropout_factor=0.0 if p == 1.0 else 1.0 / (1.0 - p),
        softmax_scale=max(-LARGEST_FLOAT32, min(edits.softmax_scale, LARGEST_FLOAT32)),
        # Beyond these it makes no difference, and a kernel's division would flush it to zero.
        softcap=min(max(edits.softcap, 2.0**-100), 2.0**100) if edits.softcap else 0.0,
    )
    return Recipe(specialisation, grid, tail.pack(), workspace, maps=box_maps, behind=behind)


_DESCALES = struct.Struct("<3Q")
_DESCALED = struct.Struct("<6i")
"""What ``DescaledParams`` has behind the record: addresses and numbers."""
_HOPPER = struct.Struct("<6i")
"""And ``HopperParams`` behind those."""
_ALIGNMENT = 64


def _map(
    name: str, problem: Problem, shapes: Mapping[str, Shape], strides: Strides, columns: int, rows: int, group: int = 1
) -> BoxMap:
    """The tensor map of q, k, v or out."""
    sizes, layout = problem.sizes, problem.layout
    heads = {"k": sizes.num_heads_k, "v": sizes.num_heads_v}.get(name, sizes.num_heads)
    head_dim = sizes.head_dim if name in ("q", "k") else sizes.head_dim_v
    in_places = (layout.cached or layout.page_size is not None) and name in ("k", "v")
    if in_places:
        lead = shapes[name][:2]
    elif layout.ragged:
        lead = 1, shapes["q" if name == "out" else name][0]
    else:
        lead = sizes.batch, sizes.seqlen_q if name in ("q", "out") else sizes.seqlen_k
    dtype = problem.out_dtype if name == "out" else problem.dtype
    steps = _operand_strides(name, problem, strides, in_places)
    return maps.box_map(dtype, columns, rows, (lead[0], lead[1], heads, head_dim), steps, group)


def _maps(
    problem: Problem, shapes: Mapping[str, Shape], strides: Mapping[str, Strides], tile: HopperTile
) -> tuple[BoxMap, ...]:
    """The maps of q, k and v, and of out if whole boxes of it belong to one sequence and to whole tokens."""
    wide, wide_v = padded_dims(problem.sizes, problem.dtype)
    group, page_size = tile.heads_per_unit, problem.layout.page_size
    rows = tile.block_k // tile.cluster if page_size is None else rows_per_box(tile, page_size)
    found = (
        _map("q", problem, shapes, strides["q"], wide, tile.tokens, group),
        _map("k", problem, shapes, strides["k"], wide, rows),
        _map("v", problem, shapes, strides["v"], wide_v, rows),
    )
    if problem.layout.ragged or 16 % group:
        return found
    parts = ITEMSIZE[problem.out_dtype] // ITEMSIZE[problem.dtype]  # ``kOutParts``
    return (*found, _map("out", problem, shapes, strides["out"], wide_v // parts, 16 // group, group))


def objections_to_maps(
    problem: Problem, shapes: Mapping[str, Shape], strides: Mapping[str, Strides], aligned: bool
) -> tuple[str, ...]:
    """Why TMA cannot read these arrays, if so."""
    wide, wide_v = padded_dims(problem.sizes, problem.dtype)
    found = (
        maps.objection(name, _map(name, problem, shapes, strides[name], wide_v if name == "v" else wide, 1), aligned)
        for name in ("q", "k", "v")
    )
    # Behind padding a box would begin anywhere in a page, and end in the next one.
    padded = problem.layout.page_size is not None and "cache_leftpad" in shapes
    return (
        *(reason for reason in found if reason),
        *(("there is padding on the left of keys in pages",) if padded else ()),
    )


def map_objections(problem: Problem, operands: Mapping[str, View]) -> tuple[str, ...]:
    """The same, from the operands' views."""
    three = {name: operands[name] for name in ("q", "k", "v")}
    if any(has_to_be_copied(name, *view[1:], problem.sizes.batch_shape) for name, view in three.items()):
        return ()  # copies are as they should be
    strides = {name: _broadcast_strides(view.shape, view.strides) for name, view in three.items()}
    shapes = {name: view.shape for name, view in three.items()}
    return objections_to_maps(problem, shapes, strides, _are_aligned(operands))


def _longest_keys(problem: Problem, shapes: Mapping[str, Shape]) -> int:
    """seqlen_k, but no more than a block_table has pages for: lengths on the device are cut to it."""
    page_size = problem.layout.page_size
    if page_size is None:
        return problem.sizes.seqlen_k
    room = shapes["block_table"][1] * page_size if shapes["k"][0] else 0
    return min(problem.sizes.seqlen_k, room)


def has_one_batch_axis(shape: Shape, batch_shape: Shape) -> bool:
    """Whether one stride leads from sequence to sequence, or the same array serves them all."""
    lead = shape[:-3]
    return len(batch_shape) < 2 or not lead or (len(lead) == 1 and lead[0] in (1, math.prod(batch_shape)))


def has_to_be_copied(name: str, shape: Shape, strides: Strides, dtype: str, batch_shape: Shape) -> bool:
    """Whether kernels cannot read an operand as it is."""
    if name in ("q", "k", "v", "mask", "bias") and not has_one_batch_axis(shape, batch_shape):
        return True
    if name in ("mask", "bias", "k_new", *DESCALES):  # of new keys only the number is looked at
        return False
    gaps = (
        bool(shape) and 0 not in shape and shape[-1] > 1 and strides[-1] != 1
    )  # NumPy gives empty arrays strides of 0
    return gaps or (name in ("alibi_slopes", "sinks") and dtype != "float32")


def _broadcast_strides(shape: Shape, strides: Strides) -> Strides:
    """Strides under which an axis of length one serves any index."""
    return tuple(0 if size == 1 else stride for size, stride in zip(shape, strides, strict=True))


def _operand_strides(name: str, problem: Problem, strides: Strides, in_places: bool) -> params.Strides:
    """(batch, row, head) of an array in the caller's layout, whose batch axes are one by now, or in a cache."""
    axes = problem.layout.axes
    if in_places:
        return params.Strides(strides[0], strides[1], strides[2])
    if axes == "thd":
        return params.Strides(0, strides[0], strides[1])
    lead = (0,) * (4 - len(strides)) + strides
    return params.Strides(lead[0], lead[1], lead[2]) if axes == "bshd" else params.Strides(lead[0], lead[2], lead[1])


def view_of_numpy(array: Any, dtype: str) -> View:
    """A NumPy array's view: what the emulator runs on."""
    strides = tuple(stride // array.itemsize for stride in array.strides)
    return View(array.ctypes.data, array.shape, strides, dtype)
