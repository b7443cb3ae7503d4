"""Reading what a caller asked for into a `Problem`, and refusing what cannot be meant.

Every refusal names the function, the argument as the caller knows it, the rule, and what came, with
shapes aligned.  Values of index arrays are checked by `check_sequences`, where they can be seen.
"""

from __future__ import annotations

import math
import numbers
import operator
import reprlib
from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from cupyattn.problem import (
    FLOAT8,
    FLOATS,
    Alignment,
    Array,
    Axes,
    Layout,
    Mask,
    Problem,
    ScoreEdits,
    Shape,
    Sizes,
    Spec,
)

LARGEST_SIZE = 2**31 - 1
"""Of any axis: index arrays are int32, and random numbers are counted in 32-bit words."""
LARGEST_RESULT = 2**47
"""Bytes; the memory a process can address."""

AXES = {
    "bshd": "(batch, seqlen, num_heads, head_dim)",
    "bhsd": "(batch, num_heads, seqlen, head_dim)",
    "thd": "(tokens, num_heads, head_dim)",
}


INDICES = (
    *("cu_seqlens_q", "cu_seqlens_k", "block_table"),
    *("cache_seqlens", "cache_batch_idx", "cache_leftpad", "cu_seqlens_k_new", "rotary_seqlens"),
)
"""Our words for arrays of int32, whose values are lengths and places."""


def refusal(function: str, rule: str, *shown: tuple[str, object] | tuple[str, object, str]) -> str:
    """The text of an error: function and rule, then what came, one argument a line, aligned."""
    names = max((len(row[0]) for row in shown), default=0)
    values = max((len(str(row[1])) for row in shown), default=0)
    lines = [f"{function}: {rule}"]
    for name, value, *note in shown:
        lines.append(f"    {name:<{names}}  {value!s:<{values}}  {note[0] if note else ''}".rstrip())
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------
# Scalars
# ---------------------------------------------------------------------------------------------------


def number(function: str, name: str, value: Any, *, rule: str, ok: Any) -> float:
    """A finite real number for which `ok` holds."""
    if type(value) is float and math.isfinite(value) and ok(value):
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(refusal(function, f"{name} has to be a number", (name, repr(value), type(value).__name__)))
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result) or not ok(result):
        raise ValueError(refusal(function, f"{name} has to be {rule}", (name, reprlib.repr(value))))
    return result


def softmax_scale(function: str, name: str, value: Any) -> float | None:
    """The factor of the scores; None: head_dim ** -0.5, once head_dim is known."""
    return None if value is None else number(function, name, value, rule="finite", ok=lambda x: True)


def softcap(function: str, value: Any) -> float:
    return number(function, "softcap", value, rule="finite and not negative (0: off)", ok=lambda x: x >= 0)


def dropout_p(function: str, value: Any) -> float:
    return number(function, "dropout_p", value, rule="from 0 to 1", ok=lambda x: 0 <= x <= 1)


def integer(function: str, name: str, value: Any, *, low: int, high: int = LARGEST_SIZE) -> int:
    if isinstance(value, bool):
        raise TypeError(refusal(function, f"{name} has to be an integer", (name, value, "bool")))
    try:
        result = operator.index(value)
    except TypeError:
        raise TypeError(
            refusal(function, f"{name} has to be an integer", (name, repr(value), type(value).__name__))
        ) from None
    if not low <= result <= high:
        raise ValueError(refusal(function, f"{name} has to be from {low} to {high}", (name, reprlib.repr(result))))
    return result


def flag(function: str, name: str, value: Any) -> bool:
    if value is True or value is False:
        return bool(value)
    if not isinstance(value, np.bool_):
        raise TypeError(refusal(function, f"{name} has to be True or False", (name, repr(value))))
    return bool(value)


def choice(function: str, name: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    for option in allowed:
        if value is option:
            return value
    if not (isinstance(value, str) and value in allowed):
        text = ", ".join(repr(option) for option in allowed)
        raise ValueError(refusal(function, f"{name} has to be one of {text}", (name, repr(value))))
    return value


def window(function: str, name: str, value: Any) -> tuple[int | None, int | None]:
    """(left, right) keys around the diagonal; -1 or None: no limit."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(refusal(function, f"{name} has to be a pair (left, right)", (name, repr(value))))
    sides = []
    for side in value:
        size = None if side is None else integer(function, name, side, low=-1)
        sides.append(None if size == -1 else size)
    return sides[0], sides[1]


def compute_dtype(function: str, value: Any) -> str | None:
    """None, "float32" or "float64", from a name or any library's dtype."""
    if value is None:
        return None
    name = "float64" if value is float else dtype_name(value)
    if name not in ("float32", "float64"):
        raise ValueError(
            refusal(function, "compute_dtype has to be 'float64' or 'float32'", ("compute_dtype", repr(value)))
        )
    return name


def dtype_name(value: Any) -> str:
    """The plain name of a dtype, whether given by name, as a type, or as any library's object."""
    return value if isinstance(value, str) else getattr(value, "__name__", None) or str(value).rsplit(".", 1)[-1]


def split_size(function: str, value: Any) -> int | None:
    """Keys of a split of fixed size; None: the planner's choice."""
    return None if value is None else integer(function, "fixed_split_size", value, low=1)


def dropout_seed(function: str, value: Any) -> int | None:
    return None if value is None else integer(function, "dropout_seed", value, low=0, high=2**64 - 1)


# ---------------------------------------------------------------------------------------------------
# The whole call
# ---------------------------------------------------------------------------------------------------


class Options(NamedTuple):
    """The scalars of a call, checked one by one; together with the specs they make the Problem."""

    axes: Axes = "bshd"
    causal: bool = False
    alignment: Alignment | None = "bottom-right"
    window: tuple[int | None, int | None] = (None, None)
    softmax_scale: float | None = None
    softcap: float = 0.0
    dropout_p: float = 0.0
    compute_dtype: str | None = None
    needs_lse: bool = False
    needs_dropout_mask: bool = False
    grouped_heads: bool = True
    """Key heads may be fewer than query heads.  If not, they may only be equal or one."""
    any_rank: bool = False
    """Any number of leading axes, broadcast against each other (torch)."""
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    takes_float8: bool = False
    """q, k and v may be FLOAT8, and then have descales."""
    cached: bool = False
    """k and v are a cache, or the pages of one."""

    def edits(self, head_dim: int, specs: Mapping[str, Spec]) -> ScoreEdits:
        scale = self.softmax_scale
        slopes, bias = specs.get("alibi_slopes"), specs.get("bias")
        return ScoreEdits(
            (float(head_dim) ** -0.5 if head_dim else 1.0) if scale is None else scale,
            self.softcap,
            None if slopes is None else slopes.shape,
            None if bias is None else bias.shape,
            "sinks" in specs,
        )

    def mask(self, function: str, specs: Mapping[str, Spec], sizes: Sizes) -> Mask:
        left, right = self.window
        if self.causal:
            right = 0
        alignment = self.alignment
        has_diagonal = left is not None or right is not None or "alibi_slopes" in specs
        if alignment is None:
            if has_diagonal and sizes.seqlen_q != sizes.seqlen_k:
                raise ValueError(
                    refusal(
                        function,
                        "alignment has to be chosen where seqlen_q and seqlen_k differ: 'top-left' puts the diagonal "
                        "at key 0 of row 0 (torch), 'bottom-right' at the last key of the last row (flash-attn)",
                        (specs["q"].name, specs["q"].shape, f"seqlen_q = {sizes.seqlen_q}"),
                        (specs["k"].name, specs["k"].shape, f"seqlen_k = {sizes.seqlen_k}"),
                    )
                )
            alignment = "bottom-right"
        array = specs.get("mask")
        return Mask(left, right, alignment, None if array is None else array.shape)


def read(function: str, specs: tuple[tuple[str, Spec], ...], options: Options) -> Problem:
    """The problem that arrays of these shapes and dtypes ask for.

    Raises
    ------
    TypeError
        A dtype is not one that can be computed with, or two that have to agree differ.
    ValueError
        Shapes do not fit together.
    """
    return _read(function, specs, options)


@lru_cache(maxsize=4096)
def _read(function: str, spec_items: tuple[tuple[str, Spec], ...], options: Options) -> Problem:
    specs = dict(spec_items)
    _check_dtypes(function, specs, options.takes_float8)
    for spec in specs.values():
        if any(size > LARGEST_SIZE for size in spec.shape):
            rule = f"no axis may be longer than {LARGEST_SIZE}"
            raise ValueError(refusal(function, rule, (spec.name, spec.shape)))
    if options.cached:
        sizes = _cached_sizes(function, specs, options)
    else:
        sizes = _ragged_sizes(function, specs, options) if options.axes == "thd" else _sizes(function, specs, options)
    _check_edits(function, specs, sizes)
    _check_descales(function, specs, sizes)
    k = specs["k"].shape
    problem = Problem(
        sizes,
        Layout(options.axes, k[1] if "block_table" in specs else None, options.cached),
        specs["q"].dtype,
        options.mask(function, specs, sizes),
        options.edits(sizes.head_dim, specs),
        options.dropout_p,
        options.compute_dtype,
        options.needs_lse,
        options.needs_dropout_mask and options.dropout_p > 0.0,
    )
    check_results(function, specs, problem.results)
    return problem


def check_results(function: str, specs: Mapping[str, Spec], results: Mapping[str, Spec]) -> None:
    """Refuse to make what no memory holds; views with strides of zero can ask for anything."""
    for spec in results.values():
        if spec.nbytes > LARGEST_RESULT:
            rule = f"{spec.name} would be larger than memory can be, {spec.shape} of {spec.dtype}"
            raise ValueError(refusal(function, rule, *((given.name, given.shape) for given in specs.values())))


DESCALES = ("q_descale", "k_descale", "v_descale")
"""Of FLOAT8 operands: the factor that each head's numbers were divided by before they were rounded."""


def _check_dtypes(function: str, specs: Mapping[str, Spec], takes_float8: bool) -> None:
    operands = [specs[name] for name in ("q", "k", "v")]
    allowed = (*FLOATS, FLOAT8) if takes_float8 else FLOATS
    for spec in operands:
        if spec.dtype not in allowed:
            rule = f"{spec.name} has to be one of {', '.join(allowed)}"
            if spec.dtype == FLOAT8:
                rule += f"; {FLOAT8} is for attention, flash-attn's functions and caches, and has no gradients"
            raise TypeError(refusal(function, rule, (spec.name, spec.shape, spec.dtype)))
    if len({spec.dtype for spec in operands}) > 1:
        rule = f"{', '.join(spec.name for spec in operands)} have to be of one dtype"
        raise TypeError(refusal(function, rule, *((spec.name, spec.shape, spec.dtype) for spec in operands)))
    for name, spec in specs.items():
        if name == "mask" and spec.dtype != "bool":
            rule = f"{spec.name} has to be boolean, True where a key may be seen"
        elif name in ("bias", "alibi_slopes", "sinks") and spec.dtype not in FLOATS:
            rule = f"{spec.name} has to be one of {', '.join(FLOATS)}"
        elif name in DESCALES and spec.dtype != "float32":
            rule = f"{spec.name} has to be float32"
        elif name in DESCALES and operands[0].dtype != FLOAT8:
            rule = f"{spec.name} is for operands of {FLOAT8}, and {operands[0].name} is {operands[0].dtype}"
        elif name in INDICES and spec.dtype != "int32":
            rule = f"{spec.name} has to be int32"
        else:
            continue
        raise TypeError(refusal(function, rule, (spec.name, spec.shape, spec.dtype)))


def _check_rank(function: str, specs: Mapping[str, Spec], ranks: Mapping[str, tuple[int, str]]) -> None:
    for name, (rank, axes) in ranks.items():
        spec = specs[name]
        if len(spec.shape) != rank:
            rule = f"{spec.name} has to have {rank} axes, {axes}"
            raise ValueError(refusal(function, rule, (spec.name, spec.shape)))


def _heads(function: str, specs: Mapping[str, Spec], heads: tuple[int, int, int], grouped: bool) -> int:
    """The number of query heads, once the heads of q, k and v are known to fit."""
    rows = [specs[name] for name in ("q", "k", "v")]
    notes = ("num_heads = {}", "num_heads_k = {}", "num_heads_v = {}")
    shown = [(spec.name, spec.shape, note.format(n)) for spec, note, n in zip(rows, notes, heads, strict=True)]
    if grouped:
        for spec, count in zip(rows[1:], heads[1:], strict=True):
            if count != heads[0] and (count == 0 or heads[0] % count):
                rule = f"the number of heads of {spec.name} has to divide that of {rows[0].name}"
                raise ValueError(refusal(function, rule, *shown))
        return heads[0]
    if len({count for count in heads if count != 1}) > 1:
        rule = "the numbers of heads have to be equal (or one); enable_gqa=True lets key heads serve groups"
        raise ValueError(refusal(function, rule, *shown))
    return 0 if 0 in heads else max(heads)


def _sizes(function: str, specs: Mapping[str, Spec], options: Options) -> Sizes:
    q, k, v = (specs[name] for name in ("q", "k", "v"))
    if options.any_rank:
        for spec in (q, k, v):
            if len(spec.shape) < 2:
                rule = f"{spec.name} has to have at least 2 axes, (..., heads, seqlen, head_dim)"
                raise ValueError(refusal(function, rule, (spec.name, spec.shape)))
    else:
        _check_rank(function, specs, dict.fromkeys(("q", "k", "v"), (4, AXES[options.axes])))
    head_axis, row_axis = (-2, -3) if options.axes == "bshd" else (-3, -2)
    if q.shape[-1] != k.shape[-1]:
        hint = "; k looks transposed" if q.shape[-1] in k.shape[-2:] and not options.any_rank else ""
        rule = f"{q.name} and {k.name} have different head_dim; expected {AXES[options.axes]}{hint}"
        raise ValueError(refusal(function, rule, (q.name, q.shape), (k.name, k.shape)))
    if k.shape[row_axis] != v.shape[row_axis]:
        rule = f"{k.name} and {v.name} have different seqlen_k; expected {AXES[options.axes]}"
        raise ValueError(refusal(function, rule, (k.name, k.shape), (v.name, v.shape)))
    heads = tuple(spec.shape[head_axis] if len(spec.shape) > 2 else 1 for spec in (q, k, v))
    num_heads = _heads(function, specs, (heads[0], heads[1], heads[2]), options.grouped_heads)
    leads = [spec.shape[:-3] for spec in (q, k, v)]
    try:
        batch_shape = _broadcast(*leads)
    except ValueError:
        rule = f"the batch axes of {q.name}, {k.name} and {v.name} do not fit together"
        raise ValueError(refusal(function, rule, *((spec.name, spec.shape) for spec in (q, k, v)))) from None
    return Sizes(
        batch_shape,
        num_heads,
        heads[1],
        heads[2],
        q.shape[row_axis],
        k.shape[row_axis],
        q.shape[-1],
        v.shape[-1],
    )


def _ragged_sizes(function: str, specs: Mapping[str, Spec], options: Options) -> Sizes:
    q, k, v = (specs[name] for name in ("q", "k", "v"))
    starts_q, starts_k = specs["cu_seqlens_q"], specs["cu_seqlens_k"]
    paged = "block_table" in specs
    keys = (4, "(num_pages, page_size, num_heads_kv, head_dim), with a block_table") if paged else (3, AXES["thd"])
    starts = (1, "(batch + 1,)")
    ranks = {"q": (3, AXES["thd"]), "k": keys, "v": keys, "cu_seqlens_q": starts, "cu_seqlens_k": starts}
    _check_rank(function, specs, ranks)
    if starts_q.shape != starts_k.shape or starts_q.shape[0] < 1:
        rule = f"{starts_q.name} and {starts_k.name} have to have batch + 1 entries each"
        raise ValueError(refusal(function, rule, (starts_q.name, starts_q.shape), (starts_k.name, starts_k.shape)))
    batch = starts_q.shape[0] - 1
    if q.shape[-1] != k.shape[-1]:
        rule = f"{q.name} and {k.name} have different head_dim"
        raise ValueError(refusal(function, rule, (q.name, q.shape), (k.name, k.shape)))
    if k.shape[:-2] != v.shape[:-2]:
        rule = f"{k.name} and {v.name} have to hold the same {'pages' if paged else 'tokens'}"
        raise ValueError(refusal(function, rule, (k.name, k.shape), (v.name, v.shape)))
    if paged:
        table = specs["block_table"]
        _check_rank(function, specs, {"block_table": (2, "(batch, pages of a sequence)")})
        if table.shape[0] != batch:
            rule = f"{table.name} has to have one row per sequence, {batch}"
            raise ValueError(refusal(function, rule, (table.name, table.shape), (starts_q.name, starts_q.shape)))
        if k.shape[1] < 1:
            raise ValueError(refusal(function, "a page has to hold at least one key", (k.name, k.shape)))
    heads = (q.shape[-2], k.shape[-2], v.shape[-2])
    num_heads = _heads(function, specs, heads, grouped=True)
    return Sizes(
        (batch,),
        num_heads,
        heads[1],
        heads[2],
        options.max_seqlen_q,
        options.max_seqlen_k,
        q.shape[-1],
        v.shape[-1],
        total_q=q.shape[0],
    )


def _cached_sizes(function: str, specs: Mapping[str, Spec], options: Options) -> Sizes:
    """Of q before a cache; seqlen_k is the longest that a sequence can get there."""
    q, k, v = (specs[name] for name in ("q", "k", "v"))
    paged, ragged = "block_table" in specs, options.axes == "thd"
    places = "(num_pages, page_size, num_heads_kv, head_dim)" if paged else "(batch, seqlen, num_heads_kv, head_dim)"
    ranks = {"q": (3 if ragged else 4, AXES[options.axes]), "k": (4, places), "v": (4, places)}
    if ragged:
        ranks["cu_seqlens_q"] = (1, "(batch + 1,)")
    _check_rank(function, specs, ranks)
    if ragged and not specs["cu_seqlens_q"].shape[0]:
        starts = specs["cu_seqlens_q"]
        raise ValueError(refusal(function, f"{starts.name} has to be (batch + 1,)", (starts.name, starts.shape)))
    batch = specs["cu_seqlens_q"].shape[0] - 1 if ragged else q.shape[0]
    if q.shape[-1] != k.shape[-1]:
        rule = f"{q.name} and {k.name} have different head_dim"
        raise ValueError(refusal(function, rule, (q.name, q.shape), (k.name, k.shape)))
    if k.shape[:2] != v.shape[:2]:
        rule = f"{k.name} and {v.name} have to hold the same {'pages' if paged else 'sequences and places for keys'}"
        raise ValueError(refusal(function, rule, (k.name, k.shape), (v.name, v.shape)))
    for name in ("cache_seqlens", "cache_batch_idx", "cache_leftpad", "rotary_seqlens"):
        if name in specs and specs[name].shape != (batch,):
            rule = f"{specs[name].name} has to have one entry per sequence, ({batch},)"
            raise ValueError(refusal(function, rule, (specs[name].name, specs[name].shape), (q.name, q.shape)))
    longest = k.shape[1]
    if paged:
        table = specs["block_table"]
        _check_rank(function, specs, {"block_table": (2, "(batch, pages of a sequence)")})
        if table.shape[0] != batch:
            rule = f"{table.name} has to have one row per sequence, {batch}"
            raise ValueError(refusal(function, rule, (table.name, table.shape), (q.name, q.shape)))
        if k.shape[1] < 1:
            raise ValueError(refusal(function, "a page has to hold at least one key", (k.name, k.shape)))
        if "cache_batch_idx" in specs:
            rule = f"{table.name} and {specs['cache_batch_idx'].name} exclude each other: a table says where keys lie"
            raise ValueError(refusal(function, rule, *((specs[x].name, specs[x].shape) for x in ("block_table", "k"))))
        longest *= table.shape[1]
        if longest > LARGEST_SIZE:
            rule = f"no sequence may have room for more than {LARGEST_SIZE} keys"
            raise ValueError(refusal(function, rule, (table.name, table.shape), (k.name, k.shape)))
    elif "cache_batch_idx" not in specs and k.shape[0] != batch:
        rule = f"{k.name} has to hold as many sequences as {q.name}, {batch}, if there is no cache_batch_idx"
        raise ValueError(refusal(function, rule, (q.name, q.shape), (k.name, k.shape)))
    heads = (q.shape[-2], k.shape[-2], v.shape[-2])
    return Sizes(
        (batch,),
        _heads(function, specs, heads, grouped=True),
        heads[1],
        heads[2],
        options.max_seqlen_q if ragged else q.shape[1],
        longest,
        q.shape[-1],
        v.shape[-1],
        total_q=q.shape[0] if ragged else 0,
    )


def _check_edits(function: str, specs: Mapping[str, Spec], sizes: Sizes) -> None:
    """Masks, biases, slopes and sinks against the sizes they edit."""
    scores = (*sizes.batch_shape, sizes.num_heads, sizes.seqlen_q, sizes.seqlen_k)
    for name in ("mask", "bias"):
        if name in specs:
            spec = specs[name]
            if not _broadcasts_to(spec.shape, scores):
                rule = f"{spec.name} does not broadcast to the scores, (..., num_heads, seqlen_q, seqlen_k)"
                raise ValueError(refusal(function, rule, (spec.name, spec.shape), ("scores", scores)))
    if "alibi_slopes" in specs:
        spec = specs["alibi_slopes"]
        allowed = ((sizes.num_heads,), (sizes.batch, sizes.num_heads))
        if spec.shape not in allowed:
            rule = f"{spec.name} has to be (num_heads,) or (batch, num_heads), {allowed[0]} or {allowed[1]}"
            raise ValueError(refusal(function, rule, (spec.name, spec.shape)))
    if "sinks" in specs and specs["sinks"].shape != (sizes.num_heads,):
        spec = specs["sinks"]
        rule = f"{spec.name} has to hold one logit per query head, ({sizes.num_heads},)"
        raise ValueError(refusal(function, rule, (spec.name, spec.shape)))


def _check_descales(function: str, specs: Mapping[str, Spec], sizes: Sizes) -> None:
    """Each against the batch and the key heads it belongs to; that of q goes by the heads of k."""
    for name, heads in zip(DESCALES, (sizes.num_heads_k, sizes.num_heads_k, sizes.num_heads_v), strict=True):
        if name in specs and not _broadcasts_to(specs[name].shape, (sizes.batch, heads)):
            spec = specs[name]
            rule = f"{spec.name} does not broadcast to (batch, num_heads_kv), {(sizes.batch, heads)}"
            raise ValueError(refusal(function, rule, (spec.name, spec.shape)))


def _broadcast(*shapes: Shape) -> Shape:
    rank = max(map(len, shapes))
    result = []
    for sizes in zip(*((1,) * (rank - len(shape)) + shape for shape in shapes), strict=True):
        different = {size for size in sizes if size != 1}
        if len(different) > 1:
            raise ValueError
        result.append(different.pop() if different else 1)
    return tuple(result)


def _broadcasts_to(shape: Shape, target: Shape) -> bool:
    if len(shape) > len(target):
        return False
    return all(a in (1, b) for a, b in zip(reversed(shape), reversed(target), strict=False))


# ---------------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------------


def check_sequences(function: str, specs: Mapping[str, Spec], sizes: Sizes, operands: Mapping[str, Array]) -> None:
    """Check the values of cu_seqlens and block_table, on the host, before anything is computed.

    Entries of the block_table past the last page of a sequence are not looked at.
    """
    lengths = {}
    for name, total, longest in (
        ("cu_seqlens_q", sizes.total_q, sizes.seqlen_q),
        ("cu_seqlens_k", None if "block_table" in specs else specs["k"].shape[0], sizes.seqlen_k),
    ):
        starts, shown = operands[name].tolist(), specs[name].name
        steps = [b - a for a, b in pairwise(starts)]
        lengths[name] = steps
        values = short(starts)
        if starts[0] != 0:
            raise ValueError(refusal(function, f"{shown} has to start with 0", (shown, values)))
        if min(steps, default=0) < 0:
            raise ValueError(refusal(function, f"{shown} must not decrease", (shown, values)))
        if total is not None and starts[-1] > total:
            array = specs["q" if name == "cu_seqlens_q" else "k"]
            rule = f"{shown} ends after the last row of {array.name}"
            raise ValueError(refusal(function, rule, (shown, values), (array.name, array.shape)))
        if max(steps, default=0) > longest:
            rule = f"a sequence of {shown} is longer than {name.replace('cu_seqlens', 'max_seqlen')}"
            raise ValueError(refusal(function, rule, (shown, values), ("longest", max(steps)), ("allowed", longest)))
    if "block_table" in specs:
        _check_pages(function, specs, lengths["cu_seqlens_k"], operands["block_table"])


def _check_pages(function: str, specs: Mapping[str, Spec], lengths: list[int], table: Array) -> None:
    num_pages, page_size = specs["k"].shape[:2]
    name = specs["block_table"].name
    for index, length in enumerate(lengths):
        used = -(-length // page_size)
        if used > table.shape[1]:
            rule = f"sequence {index} needs {used} pages of {page_size} keys for its {length} keys"
            raise ValueError(refusal(function, rule, (name, table.shape, "(batch, pages of a sequence)")))
        pages = table[index, :used].tolist()
        wrong = [page for page in pages if not 0 <= page < num_pages]
        if wrong:
            rule = f"{name} of sequence {index} names page {wrong[0]}, and there are {num_pages}"
            raise ValueError(refusal(function, rule, (name, short(pages)), (specs["k"].name, specs["k"].shape)))


def short(values: list[int]) -> str:
    return str(values) if len(values) <= 12 else f"[{', '.join(map(str, values[:10]))}, ... {len(values)} entries]"
