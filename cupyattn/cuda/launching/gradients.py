"""From a plan of gradients and the places of its arrays to launches: kernels, grids, one record.

As `launch`, whose record this one goes on from: nothing here touches a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from cupyattn.cuda.launching import maps, params
from cupyattn.cuda.launching.launch import arrays_of, tail_of
from cupyattn.cuda.launching.mapping import READ, are_remade, map_of, objections
from cupyattn.cuda.launching.maps import BoxMap
from cupyattn.cuda.launching.recipe import FactsOfArrays
from cupyattn.cuda.launching.views import (
    Fact,
    View,
    astray,
    contiguous_strides,
    has_to_be_copied,
    operand_strides,
    score_strides,
    steps_are_aligned,
)
from cupyattn.cuda.making import catalogue
from cupyattn.cuda.making.module import Specialisation
from cupyattn.plan import OF_BIAS, OF_KEYS, OF_VALUES, BackwardTile, BackwardTiles, Plan, num_tiles, padded_dims
from cupyattn.problem import Problem, Shape

NAMES = ("q", "k", "v", "bias", "sinks", "alibi_slopes")
"""Operands that have gradients."""
ROWS_OF_A_BLOCK = 8
"""Of ``backward_rows``."""


class Written(NamedTuple):
    """A gradient as a kernel writes it."""

    shape: Shape
    dtype: str
    is_whole: bool
    """It is the operand's own; if not, it is to be summed over what repeats the operand."""
    parts: int = 1
    """Of each head of keys or values, by several blocks, to be summed."""
    axis_of_parts: int = 0
    """From the end."""


class Step(NamedTuple):
    """One launch."""

    specialisation: Specialisation
    grid: int
    heads_per_block: int = 1
    maps: tuple[BoxMap, ...] = ()
    """Of q, k, v and dout, in front of the record, if the kernel goes by tensor maps."""
    flags: int | None = None
    """Where, among the flags of all passes, those of this one begin, if it raises them or looks at them."""


@dataclass(frozen=True)
class BackwardRecipe:
    """All of the launches that does not depend on addresses."""

    steps: tuple[Step, ...]
    tail: bytes
    gradients: params.GradientTail
    written: Mapping[str, Written]
    """By operand; those of sinks are there for every row, and those of slopes for every 16 rows."""
    num_rows: int
    """Of all heads together: numbers of an lse."""
    num_flags: int = 0
    """int32, zero before the first launch."""
    copies: tuple[str, ...] = ()
    """Operands that no kernel can read as they are; if there are any, the rest is empty."""
    remade: tuple[str, ...] = ()
    """Operands that are worth a copy, in memory of its own and as large as all repetitions; likewise."""

    def record_of(
        self,
        step: Step,
        operands: Mapping[str, View],
        results: Mapping[str, int],
        seed: int = 0,
        encode: Callable[[BoxMap, int], bytes] | None = None,
    ) -> np.void:
        """A step's one parameter; `results` has addresses by the names of `params.GRADIENT_POINTERS`.

        `encode` makes tensor maps, instead of the driver.
        """
        pointers = {name: view.pointer for name, view in operands.items()}
        pointers["dropout_seed"] = seed
        flags = 0 if step.flags is None else results["flags"] + 4 * step.flags
        shared, per_k, per_v = step.heads_per_block, self.gradients.queries_per_dk, self.gradients.queries_per_dv
        grads = self.gradients._replace(
            heads_per_block=shared, queries_per_dk=math.gcd(shared, per_k), queries_per_dv=math.gcd(shared, per_v)
        )
        behind = grads.pack({**pointers, **results, "flags": flags})
        if not step.maps:
            return params.record(pointers, self.tail + behind)
        encode = encode or maps.encode
        head = b"".join(encode(x, pointers[n] or pointers["q"]) for n, x in zip(READ, step.maps, strict=True))
        fill = bytes(-(params.SIZE + len(behind)) % maps.ALIGNMENT)
        return params.record(pointers, self.tail + behind + fill, head)


def backward_recipe(
    plan: Plan, problem: Problem, operands: Mapping[str, View], remade: tuple[str, ...] = ()
) -> BackwardRecipe:
    """Of operands, among them ``dout``, the forward's ``out`` and ``lse``, and perhaps ``dlse``.

    Some may have been `remade` as another recipe asked; none is asked for twice.
    """
    facts = tuple([(name, view[1:]) for name, view in operands.items()])
    return _recipe(plan, problem, facts, astray(operands), remade)


def to_be_copied(name: str, view: View | Fact, problem: Problem) -> bool:
    """Whether kernels cannot read an operand as it is."""
    shape, strides, dtype = view[-3:] if isinstance(view, View) else view[1]
    if name in ("lse", "dlse"):
        # No library copies an array for the stride of an axis of one.
        steps = zip(shape, strides, contiguous_strides(shape), strict=True)
        return 0 not in shape and any(size > 1 and found != step for size, found, step in steps)
    word = "q" if name in ("dout", "out") else name
    return has_to_be_copied(word, shape, strides, dtype, problem.sizes.batch_shape)


@lru_cache(maxsize=4096)
def _recipe(
    plan: Plan, problem: Problem, facts: tuple[Fact, ...], are_astray: tuple[str, ...], remade: tuple[str, ...]
) -> BackwardRecipe:
    copies = tuple(fact[0] for fact in facts if to_be_copied(fact[0], fact, problem))
    if copies:
        return BackwardRecipe((), b"", _NOTHING, {}, 0, copies=copies)
    arrays = arrays_of(problem, facts, not are_astray)
    rows_are_aligned = arrays.rows_are_aligned and steps_are_aligned(arrays.strides["dout"], problem.dtype)
    on_hopper = plan.kernel == "hopper_backward"
    if on_hopper and (against := objections(problem, arrays.shapes, arrays.strides, are_astray)):
        if are_remade(plan, problem) and not set(against) & set(remade):
            return BackwardRecipe((), b"", _NOTHING, {}, 0, remade=tuple(against))
        assert plan.instead is not None
        plan = plan.instead
    assert isinstance(plan.tile, BackwardTiles)
    written = {name: written_of(name, problem, arrays.shapes, plan.tile) for name in NAMES if name in arrays.shapes}
    steps, num_flags = [_rows(problem)], 0
    if plan.kernel == "hopper_backward":
        more, num_flags = _on_hopper(plan, problem, rows_are_aligned, arrays)
        steps += more
    if plan.kernel == "backward":
        for (wanted, tile), heads in zip(plan.tile.passes, plan.tile.heads, strict=True):
            packed = _is_packed(problem, tile, wanted, arrays)
            steps.append(_step(problem, tile, wanted, heads, rows_are_aligned, arrays, packed))
    return BackwardRecipe(
        tuple(step for step in steps if step.grid),
        tail_of(plan, problem, arrays).pack(),
        _tail(problem, arrays, written),
        written,
        math.prod(problem.lse_shape),
        num_flags,
    )


def _on_hopper(plan: Plan, problem: Problem, aligned: bool, arrays: FactsOfArrays) -> tuple[list[Step], int]:
    """Each pass, and behind it the same by the other kernel, of those of its tiles that were flagged."""
    assert isinstance(plan.tile, BackwardTiles)
    assert plan.instead is not None
    assert isinstance(plan.instead.tile, BackwardTiles)
    steps, num_flags = [], 0
    passes = zip(plan.tile.passes, plan.tile.heads, plan.instead.tile.passes, strict=True)
    for (wanted, tile), heads, (_, other) in passes:
        # Flags are found by both alike, whatever the other one's tiles would be better off with.
        packed = _is_packed(problem, tile, wanted, arrays)
        grid, edits, sizes = _grid(problem, tile, wanted, heads, arrays, packed), _edits(problem), problem.sizes
        dims = padded_dims(sizes, problem.dtype)
        what = catalogue.hopper_backward(problem.dtype, *dims, tile, wanted, edits, packed)
        steps.append(Step(what, grid, heads, _maps(problem, arrays, tile, wanted), num_flags))
        what = catalogue.backward(
            problem.dtype, sizes.head_dim, sizes.head_dim_v, other, wanted, aligned, edits, packed, again=True
        )
        steps.append(Step(what, blocks_again(grid), heads, flags=num_flags))
        num_flags += grid
    return steps, num_flags


LOOKING = 256
"""Blocks that look at flags, where there are as many: enough to fill a GPU if all are raised."""
FLAGS_OF_A_BLOCK = 32
"""At most."""


def blocks_again(num_flags: int) -> int:
    return max(min(num_flags, LOOKING), -(-num_flags // FLAGS_OF_A_BLOCK))


def _maps(problem: Problem, arrays: FactsOfArrays, tile: BackwardTile, wanted: int) -> tuple[BoxMap, ...]:
    wide, wide_v = padded_dims(problem.sizes, problem.dtype)
    keys, rows = (tile.stays, tile.moves) if wanted & (OF_KEYS | OF_VALUES) else (tile.moves, tile.stays)
    shapes, strides = arrays.shapes, arrays.strides
    return (
        map_of("q", problem, shapes, strides["q"], wide, rows),
        map_of("k", problem, shapes, strides["k"], wide, keys),
        map_of("v", problem, shapes, strides["v"], wide_v, keys),
        map_of("out", problem, shapes, strides["dout"], wide_v, rows),
    )


def _rows(problem: Problem) -> Step:
    return Step(catalogue.backward_rows(problem.dtype), -(-math.prod(problem.lse_shape) // ROWS_OF_A_BLOCK))


def _step(
    problem: Problem,
    tile: BackwardTile,
    wanted: int,
    heads_per_block: int,
    aligned: bool,
    arrays: FactsOfArrays,
    packed: bool,
) -> Step:
    sizes = problem.sizes
    edits = _edits(problem)
    what = catalogue.backward(problem.dtype, sizes.head_dim, sizes.head_dim_v, tile, wanted, aligned, edits, packed)
    if wanted == OF_BIAS:
        batch, heads, rows, keys = _four(arrays.shapes["bias"])
        return Step(what, batch * heads * -(-rows // tile.stays) * -(-keys // tile.moves))
    return Step(what, _grid(problem, tile, wanted, heads_per_block, arrays, packed), heads_per_block)


def _is_packed(problem: Problem, tile: BackwardTile, wanted: int, arrays: FactsOfArrays) -> bool:
    """Whether there are fewer tiles by where sequences begin than if each had those of the longest."""
    if wanted == OF_BIAS:
        return False
    packed, as_the_longest = (_tiles(problem, tile, wanted, arrays, x) for x in (True, False))
    return packed < as_the_longest


def _tiles(problem: Problem, tile: BackwardTile, wanted: int, arrays: FactsOfArrays, packed: bool) -> int:
    sizes, of_keys = problem.sizes, bool(wanted & (OF_KEYS | OF_VALUES))
    total = arrays.shapes["k" if of_keys else "q"][0] if packed and problem.layout.ragged else None
    return num_tiles(sizes.batch, sizes.seqlen_k if of_keys else sizes.seqlen_q, tile.stays, total)


def _grid(
    problem: Problem, tile: BackwardTile, wanted: int, heads_per_block: int, arrays: FactsOfArrays, packed: bool
) -> int:
    return _tiles(problem, tile, wanted, arrays, packed) * (problem.sizes.num_heads // heads_per_block)


def _edits(problem: Problem) -> int:
    """Those of scores one by one: what they have in common is no matter of gradients."""
    return catalogue.edits_of(problem) & ~catalogue.CAUSAL_ALIBI


def _four(shape: Shape) -> Shape:
    """(batch, heads, rows, keys) of a bias."""
    return (1,) * (4 - len(shape)) + shape


def written_of(name: str, problem: Problem, shapes: Mapping[str, Shape], tiles: BackwardTiles) -> Written:
    """Of an operand whose batch axes are one by now."""
    sizes, shape = problem.sizes, shapes[name]
    if name == "sinks":
        return Written(problem.lse_shape, "float32", False)
    if name == "alibi_slopes":
        parts = 8 * max(1, -(-sizes.seqlen_q // 128))
        return Written((sizes.batch, sizes.num_heads, parts), "float32", False)
    batch_shape = sizes.batch_shape
    if name == "bias":
        # As it is read, or as it was repeated for the kernels; of one batch axis or none there is no other.
        inner = _four(shape)[1:]
        lead = batch_shape if len(batch_shape) > 1 and _four(shape)[0] > 1 else (_four(shape)[0],)
        return Written((*lead, *inner), "", True)
    whole = Written(shape if problem.layout.ragged else (*batch_shape, *shape[-3:]), problem.dtype, True)
    for bit, letter, heads in ((OF_KEYS, "k", sizes.num_heads_k), (OF_VALUES, "v", sizes.num_heads_v)):
        if name == letter:
            shared = sizes.num_heads // heads
            parts = shared // math.gcd(shared, tiles.heads_of(bit))
            return whole if parts == 1 else _in_parts(whole, parts, problem)
    return whole


def _in_parts(whole: Written, parts: int, problem: Problem) -> Written:
    axis = 3 if problem.layout.axes == "bhsd" else 2
    shape = whole.shape[: 1 - axis]
    return Written((*shape, parts, *whole.shape[1 - axis :]), "float32", False, parts, axis)


def as_asked(written: Written, shape: Shape, dtype: str) -> Written:
    """The same for an operand that has this shape in the caller's hands: float32 where there is something to sum."""
    is_whole = written.is_whole and math.prod(written.shape) == math.prod(shape)
    return written._replace(dtype=dtype if is_whole else "float32", is_whole=is_whole)


def _tail(problem: Problem, arrays: FactsOfArrays, written: Mapping[str, Written]) -> params.GradientTail:
    strides, sizes = arrays.strides, problem.sizes

    def of_operand(name: str) -> params.Strides:
        found = written[name]
        shape = found.shape
        if found.parts > 1:  # a kernel sees as many heads more
            place = len(shape) - found.axis_of_parts
            shape = (*shape[: place - 1], shape[place - 1] * found.parts, *shape[place + 1 :])
        lead = len(sizes.batch_shape) if len(sizes.batch_shape) > 1 else 0
        steps = contiguous_strides((sizes.batch, *shape[lead:]) if lead else shape)
        return operand_strides(name, problem, steps, False)

    tail = params.GradientTail(
        operand_strides("out", problem, strides["dout"], False),
        of_operand("q"),
        of_operand("k"),
        of_operand("v"),
        params.ScoreStrides(),
        queries_per_dk=sizes.num_heads // sizes.num_heads_k,
        queries_per_dv=sizes.num_heads // sizes.num_heads_v,
    )
    if "bias" not in written:
        return tail
    batch, heads, rows, keys = shape = _four(arrays.shapes["bias"])
    return tail._replace(
        of_dbias=score_strides(contiguous_strides(shape)),
        bias_batch=batch,
        bias_heads=heads,
        bias_rows=rows,
        bias_keys=keys,
    )


def with_dtypes(recipe: BackwardRecipe, dtypes: Mapping[str, str]) -> BackwardRecipe:
    """The recipe whose kernels write these dtypes, by operand."""
    q, k, v, bias = (params.BIAS_DTYPES.index(dtypes[x]) if x in dtypes else 0 for x in ("q", "k", "v", "bias"))
    grads = recipe.gradients._replace(dq_dtype=q, dk_dtype=k, dv_dtype=v, dbias_dtype=bias)
    return replace(recipe, gradients=grads)


_NOTHING = params.GradientTail(*(params.Strides(),) * 4, params.ScoreStrides())
