"""The launch of ``append.cu``: new keys and values into a cache, and queries rotated beside it.

As in `launch`, arrays are `View` values, and what does not depend on addresses is remembered.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from cupyattn.cuda.launching import params
from cupyattn.cuda.launching.views import Fact, View
from cupyattn.cuda.making.catalogue import append as append_kernel
from cupyattn.cuda.making.module import Specialisation
from cupyattn.problem import Problem, Shape

POINTERS = (
    *("k_new", "v_new", "q", "k", "v", "q_rotated", "rotary_cos", "rotary_sin"),
    *("cache_seqlens", "cache_batch_idx", "rotary_seqlens", "cu_seqlens_q", "cu_seqlens_k_new", "block_table"),
    "cache_seqlen",
)
_POINTERS = struct.Struct(f"<{len(POINTERS)}Q")
_TAIL = struct.Struct("<18q3q22i")
SIZE = _POINTERS.size + _TAIL.size
THREADS = 128


class Tail(NamedTuple):
    """All fields behind the pointers, in the order of ``AppendParams``."""

    k_new_steps: params.Strides
    v_new_steps: params.Strides
    q_steps: params.Strides
    k_steps: params.Strides
    v_steps: params.Strides
    q_rotated_steps: params.Strides
    cos_row: int
    sin_row: int
    block_table_row: int
    batch: int
    seqlen_new: int
    seqlen_q: int
    num_new: int
    num_rows: int
    num_heads: int
    num_heads_k: int
    num_heads_v: int
    head_dim: int
    head_dim_v: int
    capacity: int
    num_places: int
    page_size: int
    num_pages: int
    half: int
    positions: int
    interleaved: int
    each_row: int
    table_dtype: int
    parts_k: int
    parts_v: int
    parts_q: int

    def pack(self) -> bytes:
        values: list[int] = []
        for field in self:
            values.extend(field if isinstance(field, tuple) else (field,))
        return _TAIL.pack(*values)


class Recipe(NamedTuple):
    """All of a launch that does not depend on addresses; a grid of nothing is not launched."""

    specialisation: Specialisation
    grid: tuple[int, int, int]
    tail: bytes


def recipe_of(problem: Problem, operands: Mapping[str, View], each_row: bool, interleaved: bool) -> Recipe:
    """Remembered by problem and strides; "q_rotated" is among the operands if there are tables."""
    facts = tuple([(name, view[1:]) for name, view in operands.items()])
    return _recipe(problem, facts, each_row, interleaved)


def record_of(recipe: Recipe, operands: Mapping[str, View], cache_seqlen: int = 0) -> np.void:
    """The kernel's one parameter."""
    pointers = {name: view.pointer for name, view in operands.items()}
    pointers["cache_seqlen"] = cache_seqlen
    head = _POINTERS.pack(*[pointers.get(name, 0) for name in POINTERS])
    void: np.void = np.frombuffer(head + recipe.tail, f"V{SIZE}")[0]
    return void


@lru_cache(maxsize=4096)
def _recipe(problem: Problem, facts: tuple[Fact, ...], each_row: bool, interleaved: bool) -> Recipe:
    sizes, layout = problem.sizes, problem.layout
    shapes: dict[str, Shape] = {name: shape for name, (shape, _, _) in facts}
    strides = {name: its_steps for name, (_, its_steps, _) in facts}
    dtypes = {name: dtype for name, (_, _, dtype) in facts}
    rotates = "rotary_cos" in shapes
    packed_new = "cu_seqlens_k_new" in shapes
    seqlen_new = 0 if packed_new else shapes["k_new"][1]
    num_new = shapes["k_new"][0] if packed_new else sizes.batch * seqlen_new
    num_rows = (sizes.total_q if layout.ragged else sizes.batch * sizes.seqlen_q) if rotates else 0

    def parts(num_heads: int, head_dim: int) -> int:
        return max(1, -(-num_heads * head_dim // (2 * THREADS)))

    def steps(name: str) -> params.Strides:
        """(batch, row, head), of a packed array without a batch."""
        found = strides.get(name, ())
        return params.Strides(*((0,) * (4 - len(found)) + found)[:3])

    parts_k, parts_v = parts(sizes.num_heads_k, sizes.head_dim), parts(sizes.num_heads_v, sizes.head_dim_v)
    parts_q = parts(sizes.num_heads, sizes.head_dim)
    tail = Tail(
        k_new_steps=steps("k_new"),
        v_new_steps=steps("v_new"),
        q_steps=steps("q"),
        k_steps=steps("k"),
        v_steps=steps("v"),
        q_rotated_steps=steps("q_rotated"),
        cos_row=strides["rotary_cos"][0] if rotates else 0,
        sin_row=strides["rotary_sin"][0] if rotates else 0,
        block_table_row=strides["block_table"][0] if layout.page_size else 0,
        batch=sizes.batch,
        seqlen_new=seqlen_new,
        seqlen_q=0 if layout.ragged else sizes.seqlen_q,
        num_new=num_new,
        num_rows=num_rows,
        num_heads=sizes.num_heads,
        num_heads_k=sizes.num_heads_k,
        num_heads_v=sizes.num_heads_v,
        head_dim=sizes.head_dim,
        head_dim_v=sizes.head_dim_v,
        capacity=sizes.seqlen_k,
        num_places=sizes.batch if layout.page_size else shapes["k"][0],
        page_size=layout.page_size or 0,
        num_pages=shapes["k"][0] if layout.page_size else 0,
        half=shapes["rotary_cos"][1] if rotates else 0,
        positions=shapes["rotary_cos"][0] if rotates else 0,
        interleaved=int(interleaved),
        each_row=int(each_row),
        table_dtype=params.BIAS_DTYPES.index(dtypes["rotary_cos"]) if rotates else 0,
        parts_k=parts_k,
        parts_v=parts_v,
        parts_q=parts_q,
    )
    blocks = num_new * (parts_k + parts_v) + num_rows * parts_q
    return Recipe(append_kernel(problem.dtype), (blocks, 1, 1), tail.pack())
