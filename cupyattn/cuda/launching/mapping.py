"""Which operands tensor maps read as they lie, and when the others are copied for it: forward and gradients alike."""

from __future__ import annotations

from collections.abc import Mapping

from cupyattn.cuda.launching import maps
from cupyattn.cuda.launching.maps import BoxMap
from cupyattn.cuda.launching.views import (
    Strides,
    View,
    astray,
    broadcast_strides,
    once_copied,
    operand_strides,
)
from cupyattn.plan import Plan, padded_dims
from cupyattn.problem import Problem, Shape

READ = ("q", "k", "v", "dout")
"""Operands that are read by tensor maps, dout by those of gradients only."""
MANY = 512
"""Queries and keys from which arrays are copied for tensor maps to read them: that grows as they do, and what is gained
as their product."""


def map_of(
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
    steps = operand_strides(name, problem, strides, in_places)
    return maps.box_map(dtype, columns, rows, (lead[0], lead[1], heads, head_dim), steps, group)


def objections(
    problem: Problem, shapes: Mapping[str, Shape], strides: Mapping[str, Strides], are_astray: tuple[str, ...]
) -> dict[str, str]:
    """Why TMA cannot read these arrays, by the name of the one that it is about.

    Some of them `are_astray`: see `views.astray`.
    """
    wide, wide_v = padded_dims(problem.sizes, problem.dtype)
    found = {}
    for name in READ:
        if name not in strides:
            continue
        word, columns = "out" if name == "dout" else name, wide if name in ("q", "k") else wide_v
        wanted = map_of(word, problem, shapes, strides[name], columns, 1)
        if reason := maps.objection(name, wanted, name not in are_astray):
            found[name] = reason
    # Behind padding a box would begin anywhere in a page, and end in the next one.
    if problem.layout.page_size is not None and "cache_leftpad" in shapes:
        found["cache_leftpad"] = "there is padding on the left of keys in pages"
    return found


def map_objections(problem: Problem, operands: Mapping[str, View]) -> dict[str, str]:
    """The same from the operands' views, of which some may have to be copied for all kernels: then of the copies."""
    lie = {name: once_copied(name, operands[name], problem.sizes.batch_shape) for name in READ if name in operands}
    strides = {name: broadcast_strides(view.shape, view.strides) for name, view in lie.items()}
    shapes = {name: view.shape for name, view in {**operands, **lie}.items()}
    return objections(problem, shapes, strides, astray(lie))


def are_remade(plan: Plan, problem: Problem) -> bool:
    """Whether arrays that TMA cannot read are copied for it; of caches and pages, which are large, none ever is.

    Where nothing else may run instead, they are however few there are.
    """
    if problem.layout.cached or problem.layout.page_size is not None:
        return False
    alone = plan.instead is not None and plan.instead.kernel == "none"
    return alone or min(problem.sizes.seqlen_q, problem.sizes.seqlen_k) >= MANY
