"""Arrays whose heads and sequence are exchanged: what gives them away, and what their owner can do."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from cupyattn.problem import Axes, Spec
from cupyattn.reading.options import Options
from cupyattn.reading.refusals import AXES

MOST_HEADS = {"bshd": 256, "bhsd": 1024}
"""More than any model has: Falcon 180B has 232.  Where heads come first, windows or a batch may be among them."""
MOST_ODD_HEADS = 71
"""Falcon 7B's; an odd number above that is the length of a sequence, as 77 of CLIP and 197 of ViT are."""


def is_turned(specs: Mapping[str, Spec], options: Options) -> bool:
    """Whether heads and sequence are exchanged for certain, though all fits: for a warning.

    The axis of heads is longer than any model's, or odd and longer than any that is odd; that of the sequence is
    shorter and may be heads: those of k and v divide those of q.  Nothing is certain of short sequences: 5 tokens of
    32 heads are as usual as 5 heads of 32 tokens.  Who says layout="bhsd" knows that there is a choice.
    """
    shapes = _exchangeable(specs, options)
    is_chosen = options.axes == "bhsd" and not options.any_rank
    return shapes is not None and not is_chosen and _are_no_heads(shapes, options.axes)


def may_be_turned(specs: Mapping[str, Spec], options: Options) -> bool:
    """The same for a hint where something does not fit: besides, key heads that are more than query heads, or queries
    that are more than keys and a multiple of them, are signs."""
    shapes = _exchangeable(specs, options)
    if shapes is None:
        return False
    (heads_q, rows_q), (heads_k, rows_k), _ = shapes
    return heads_k > heads_q or rows_q > rows_k or _are_no_heads(shapes, options.axes)


def _exchangeable(specs: Mapping[str, Spec], options: Options) -> list[tuple[int, int]] | None:
    """(heads, rows) of q, k and v as they are read, if they would fit the other way round as well."""
    if options.axes == "thd" or "block_table" in specs or any(len(specs[word].shape) != 4 for word in ("q", "k", "v")):
        return None
    head_axis, row_axis = (2, 1) if options.axes == "bshd" else (1, 2)
    shapes = [(specs[word].shape[head_axis], specs[word].shape[row_axis]) for word in ("q", "k", "v")]
    (_, rows_q), (heads_k, rows_k), (heads_v, rows_v) = shapes
    fits = heads_k == heads_v and min(rows_k, rows_v) > 0 and rows_q % rows_k == rows_q % rows_v == 0
    return shapes if fits and rows_q <= MOST_HEADS["bshd"] and not _is_odd(rows_q) else None


def _is_odd(heads: int) -> bool:
    return heads > MOST_ODD_HEADS and heads % 2 == 1


def _are_no_heads(shapes: list[tuple[int, int]], axes: Axes) -> bool:
    too_many = any(heads > MOST_HEADS[axes] or (axes == "bshd" and _is_odd(heads)) for heads, _ in shapes)
    return too_many and max(rows for _, rows in shapes) < max(heads for heads, _ in shapes)


def how_to_turn(function: str, axes: Axes) -> str:
    """What to do with arrays whose heads and sequence are exchanged."""
    other: Axes = "bhsd" if axes == "bshd" else "bshd"
    if function in ("attention", "attention_backward", "explain"):
        remedy = f'say layout="{other}"'
    elif axes == "bshd":
        remedy = f"pass swapaxes(1, 2) of each: flash-attn's layout, and that of caches, is {AXES[axes]}"
    else:
        remedy = "call attention, or flash_attn_func, which take them; torch's layout is the other one"
    return f"    if the arrays are {AXES[other]}, {remedy}"


_PACKAGE = __name__.partition(".")[0]


def level_outside() -> int:
    """The stacklevel, seen from the caller, of the line that called the package."""
    level, outside = 1, 1
    frame = sys._getframe(1)
    while frame.f_back is not None:
        level, frame = level + 1, frame.f_back
        if frame.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE:
            outside = level
    return outside + 1
