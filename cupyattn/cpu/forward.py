"""The forward pass: a task for every tile."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import numpy as np

from cupyattn.cpu import flash
from cupyattn.cpu.bounded import rows_vanished
from cupyattn.cpu.cutting import cut_into_parts
from cupyattn.cpu.part import Part
from cupyattn.cpu.places import Rows
from cupyattn.cpu.scratch import Scratch
from cupyattn.cpu.tasks import Costly, run_in_order
from cupyattn.cpu.tiles import TileIndex
from cupyattn.cpu.views import tile_of
from cupyattn.numpy_ref import Array, State
from cupyattn.plan import Plan
from cupyattn.problem import Problem
from cupyattn.rounding import STORAGE, narrow


def run(plan: Plan, problem: Problem, operands: Mapping[str, Array], seed: int = 0) -> dict[str, Array]:
    """Compute ``out``, ``lse`` (and ``dropout_mask`` if wanted) in the caller's layout."""
    results = {
        "out": np.empty(problem.out_shape, STORAGE[problem.out_dtype]),
        "lse": np.empty(problem.lse_shape, problem.lse_dtype),
    }
    if problem.layout.ragged:  # rows after the last sequence belong to no tile
        results["out"].fill(0)
        results["lse"].fill(-np.inf)
    parts = [
        part
        for part in cut_into_parts(plan, problem, operands, seed)
        if part.out_size and part.num_heads  # an empty part has nothing to say
    ]
    tasks: list[Costly] = []
    for part in parts:
        out = part.of(results["out"])
        lse = part.lse_of(results["lse"])
        for tile in part.tiles:
            tasks.append((part, (tile,), partial(_forward_task, part, tile, out, lse)))
    run_in_order(tasks, plan.num_workers)
    if problem.needs_dropout_mask:
        with np.errstate(all="ignore"):
            results["dropout_mask"] = _dropout_mask(problem, parts)
    return results


def _forward_task(part: Part, where: TileIndex, out: Rows, lse: Rows, scratch: Scratch) -> None:
    state = attend(part, where, scratch)
    shape = (where.batch_size, where.num_heads, len(where.rows))
    problem = part.problem
    values = state.out.reshape(*shape, problem.sizes.head_dim_v)
    if problem.out_dtype == "bfloat16":
        values = narrow(values, problem.out_dtype)
    out.put(where, values)
    lse.put(where, state.lse.reshape(shape))


def attend(part: Part, where: TileIndex, scratch: Scratch) -> State:
    """Attention of one tile, whatever its values are; ``out`` is scratch memory."""
    tile, head_dim_v = tile_of(part, where, scratch), part.problem.sizes.head_dim_v
    state = flash.flash(tile, head_dim_v)
    finite = math.isfinite(np.add.reduce(state.out, axis=None))
    if not finite:  # maybe 0 * nan of a value that nobody may look at: once more, with care
        tile.suspicious = True
        state = flash.flash(tile, head_dim_v)
    if tile.bounded is None:
        return state
    # Maybe a product left the range because its weight is not that of a running maximum: such rows once more, with
    # one.  The others keep every bit.
    doubtful = rows_vanished(part, state, where, scratch)
    if not finite:
        overflown: Array = np.asarray(~np.isfinite(state.out).all(axis=-1))
        doubtful = overflown if doubtful is None else doubtful | overflown
    if doubtful is None or not (tile.bounded & doubtful).any():
        return state
    tile.bounded = tile.bounded & ~doubtful
    return flash.flash(tile, head_dim_v)


def _dropout_mask(problem: Problem, parts: list[Part]) -> Array:
    """flash-attn's S_dmask, (batch, heads, seqlen_q, seqlen_k): weights, negative where dropped."""
    sizes = problem.sizes
    weights = np.zeros((sizes.batch, sizes.num_heads, sizes.seqlen_q, sizes.seqlen_k), STORAGE[problem.out_dtype])
    for part in parts:
        ids = part.batch_ids
        for where in part.tiles:
            lse = attend(part, where, Scratch()).lse
            tile = tile_of(part, where, Scratch())
            origin = np.where(np.isneginf(lse), 0.0, lse)
            for block in tile.blocks():
                scores = tile.scores(block)
                found = np.where(np.isneginf(scores), 0.0, np.exp(scores - origin[..., block.rows, None]))
                by_head = tile.per_head(found)
                signed = np.where(block.keep == 0.0, -by_head, by_head)
                signed = narrow(signed, problem.out_dtype).reshape(
                    where.batch_size, where.num_heads, *signed.shape[-2:]
                )
                rows = range(where.rows.start, where.rows.stop)[block.rows]
                weights[ids[where.batches], where.heads, rows.start : rows.stop, block.keys] = signed
    return weights
