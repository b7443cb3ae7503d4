"""The launch of ``merge.cu`` for states that did not come from splits of one call: a running one, and one more.

As in `launch`, arrays are addresses and strides, and what does not depend on addresses is remembered.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import NamedTuple

from cupyattn.cuda.launching import params
from cupyattn.cuda.launching.recipe import Recipe, Workspace
from cupyattn.cuda.making import catalogue
from cupyattn.plan import merging_blocks

PLACES = 2
"""Of a row: what it has come to, and what is to be merged into that."""
TOLD = 2 * PLACES
"""What ``merge.cu`` is told of each piece: twice the number of its splits, and that no value was taken for 0."""
_DESCALED = struct.Struct("<6i")
_MERGE = struct.Struct("<6if2i4x")


class Rows(NamedTuple):
    """Of all sequences and heads alike."""

    batch: int
    num_heads: int
    merged: int
    """How many are merged."""
    room: int
    """How many there are: from head to head, and from place to place."""
    head_dim_v: int

    @property
    def columns(self) -> int:
        """Of a row of partial results."""
        return catalogue.padded(self.head_dim_v)


def running(rows: Rows) -> tuple[params.Strides, int, int]:
    """Where a running state lies, of arrays (batch, num_heads, places, rows, columns), and its lse: batch, head."""
    head = PLACES * rows.room * rows.columns
    return params.Strides(rows.num_heads * head, rows.columns, head), rows.num_heads * rows.room, rows.room


@lru_cache(maxsize=4096)
def recipe_of(rows: Rows, dtype: str, out: params.Strides, lse_batch: int, lse_head: int) -> Recipe:
    """Both places of some rows into `out`, in `dtype`, and lse."""
    nothing, nowhere = params.Strides(), params.ScoreStrides()
    tail = params.Tail(
        q=nothing, k=nothing, v=nothing, out=out, mask=nowhere, bias=nowhere, lse_batch=lse_batch, lse_head=lse_head,
        block_table_row=0, alibi_slopes_batch=0, total_q=0, total_k=0, batch=rows.batch, num_heads=rows.num_heads,
        seqlen_q=rows.merged, seqlen_k=0, head_dim=rows.head_dim_v, head_dim_v=rows.head_dim_v, queries_per_k=1,
        queries_per_v=1, queries_per_pair=1, left=params.OPEN, right=params.OPEN, bottom_right=0, page_size=0,
        num_pages=0, num_places=params.NO_CACHE, seqlen_new=0, bias_dtype=0, split_size=0, num_splits=PLACES,
        num_slots=0, dropout_threshold=0, dropout_factor=1.0, softmax_scale=1.0, softcap=0.0,
        distance_step=1, distance_shift=0, float_step=1.0, inverse_scale=1.0,
    )  # fmt: skip
    blocks, together = merging_blocks(rows.batch * rows.num_heads * rows.merged, PLACES)
    specialisation = catalogue.merge(dtype, rows.columns, together)
    behind = _DESCALED.pack(*(0,) * 6) + _MERGE.pack(rows.room, rows.merged, 1, 1, rows.columns, 0, 1.0, 1, 1)
    return Recipe(specialisation, (blocks, 1, 1), tail.pack(), Workspace(), behind=behind)
