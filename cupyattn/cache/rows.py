"""Rows of all sequences end to end, and results as the queries came."""

from __future__ import annotations

from typing import Any

import array_api_compat

from cupyattn import reading
from cupyattn.problem import Array, Shape


def axes_of(names: str, seqlens: object) -> tuple[str, str]:
    """Those of k, v and q, and what else could have been meant."""
    if seqlens is None:
        return "bshd", f"; for packed {names}, {reading.AXES['thd']}, give seqlens, the tokens of each sequence"
    return "thd", f", if seqlens are given, which are for packed {names}"


def packed(rows: Array) -> Array:
    """(batch, seqlen, heads, dim) as (tokens, heads, dim)."""
    if len(rows.shape) == 3:
        return rows
    xp = array_api_compat.array_namespace(rows)
    return xp.reshape(rows, (rows.shape[0] * rows.shape[1], *rows.shape[2:]))


def shaped(found: dict[str, Array], shape: Shape, return_lse: bool) -> Any:
    """Packed results as the queries came."""
    out, lse = found["out"], found.get("lse")
    if len(shape) == 4:
        xp = array_api_compat.array_namespace(out)
        out = xp.reshape(out, (*shape[:3], out.shape[-1]))
        if lse is not None:
            lse = xp.permute_dims(xp.reshape(lse, (lse.shape[0], *shape[:2])), (1, 0, 2))
    return (out, lse) if return_lse else out
