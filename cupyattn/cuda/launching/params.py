"""The parameter record of a launch, field for field the structs of ``params.cuh``.

What changes from call to call, the pointers, comes first: a record is those 22 words and a tail that is
made once for a problem and the strides of its arrays.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from cupyattn.plan import LONGEST

POINTERS = (
    "q",
    "k",
    "v",
    "out",
    "lse",
    "mask",
    "bias",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "block_table",
    "cache_seqlens",
    "cache_batch_idx",
    "cache_leftpad",
    "cu_seqlens_k_new",
    "cache_seqlen",
    "alibi_slopes",
    "sinks",
    "partial_out",
    "partial_lse",
    "told",
    "schedule",
    "dropout_seed",
)
_POINTERS = struct.Struct(f"<{len(POINTERS)}Q")
_TAIL = struct.Struct("<12q8q6q20iIfff2i2f")
OPEN = LONGEST
"""A side of a window that hides nothing: kernels count no further."""
NO_CACHE = -1
BIAS_DTYPES = ("float16", "bfloat16", "float32", "float64")
SIZE = _POINTERS.size + _TAIL.size


class Strides(NamedTuple):
    """Elements from sequence to sequence (or page to page), row to row, head to head."""

    batch: int = 0
    row: int = 0
    head: int = 0


class ScoreStrides(NamedTuple):
    """Elements from step to step along the axes of the scores; 0 where the array is repeated."""

    batch: int = 0
    head: int = 0
    row: int = 0
    key: int = 0


class Tail(NamedTuple):
    """All fields behind the pointers, in order."""

    q: Strides
    k: Strides
    v: Strides
    out: Strides
    mask: ScoreStrides
    bias: ScoreStrides
    lse_batch: int
    lse_head: int
    block_table_row: int
    alibi_slopes_batch: int
    total_q: int
    total_k: int
    batch: int
    num_heads: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    queries_per_k: int
    queries_per_v: int
    queries_per_pair: int
    left: int
    right: int
    bottom_right: int
    page_size: int
    num_pages: int
    num_places: int
    seqlen_new: int
    bias_dtype: int
    split_size: int
    num_splits: int
    num_slots: int
    dropout_threshold: int
    dropout_factor: float
    softmax_scale: float
    softcap: float
    distance_step: int
    distance_shift: int
    float_step: float
    inverse_scale: float

    def pack(self) -> bytes:
        return _TAIL.pack(*_flat(self))


GRADIENT_POINTERS = (
    "dout",
    "dlse",
    "lse_log2",
    "delta",
    "sink_rows",
    "slope_parts",
    "flags",
    "dq",
    "dk",
    "dv",
    "dbias",
)
_GRADIENTS = struct.Struct("<11Q12q4q11i4x")


class GradientTail(NamedTuple):
    """All fields of ``Gradients`` behind its pointers, in order."""

    of_dout: Strides
    of_dq: Strides
    of_dk: Strides
    of_dv: Strides
    of_dbias: ScoreStrides
    bias_batch: int = 0
    bias_heads: int = 0
    bias_rows: int = 0
    bias_keys: int = 0
    heads_per_block: int = 1
    queries_per_dk: int = 1
    queries_per_dv: int = 1
    dq_dtype: int = 0
    """In which it is written: a place in `BIAS_DTYPES`."""
    dk_dtype: int = 0
    dv_dtype: int = 0
    dbias_dtype: int = 0

    def pack(self, pointers: Mapping[str, int]) -> bytes:
        addresses = [pointers.get(name, 0) for name in GRADIENT_POINTERS]
        return _GRADIENTS.pack(*addresses, *_flat(self))


def _flat(fields: Iterable[Any]) -> list[float]:
    values: list[float] = []
    for field in fields:
        values.extend(field if isinstance(field, tuple) else (field,))
    return values


def record(pointers: dict[str, int], tail: bytes, head: bytes = b"") -> np.void:
    """A record as a kernel takes it: by value, as one scalar of raw bytes, behind what has to come first."""
    whole = head + _POINTERS.pack(*[pointers.get(name, 0) for name in POINTERS]) + tail
    void: np.void = np.frombuffer(whole, f"V{len(whole)}")[0]
    return void
