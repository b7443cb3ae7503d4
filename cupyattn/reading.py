"""Reading what a caller asked for into a `Problem`, and refusing what cannot be meant.

Every refusal names the function, the argument as the caller knows it, the rule, and what came, with
shapes aligned.  Values of index arrays are checked by `check_sequences`, where they can be seen.
"""

from __future__ import annotations

import math
import numbers
import operator
import reprlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
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
# Words
# ---------------------------------------------------------------------------------------------------

SAME = (
    *(("q", "query"), ("k", "key"), ("v", "value")),
    ("causal", "is_causal"),
    ("softmax_scale", "scale"),
    ("mask", "attn_mask"),
    ("bias", "attn_mask"),
    ("window_size", "local_window_size"),
    ("sinks", "learnable_sink"),
    ("block_table", "page_table"),
    ("return_lse", "return_softmax_lse", "return_residual"),
    ("cu_seqlens", "cu_seqlens_q", "cu_seqlens_k"),
    ("max_seqlen", "max_seqlen_q", "max_seqlen_k"),
)
"""Words of torch, JAX, flash-attn and ours for one thing."""

ELSEWHERE = {
    "attention takes it": (
        *("softmax_scale", "softcap", "window_size", "alibi_slopes", "sinks", "mask", "bias", "alignment", "layout"),
        *("dropout_p", "dropout_seed", "fixed_split_size", "compute_dtype", "causal", "return_lse"),
        *("q_descale", "k_descale", "v_descale"),
    ),
    "flash_attn_func and its kind return lse and weights": ("return_attn_probs",),
    "flash_attn_varlen_func takes sequences of different lengths, packed as by unpad_input": (
        *("cu_seqlens", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen", "max_seqlen_q", "max_seqlen_k"),
        *("query_seq_lengths", "key_value_seq_lengths", "seqused_q", "seqused_k"),
    ),
    "flash_attn_varlen_func, flash_attn_with_kvcache and PagedCache have pages": ("block_table", "page_table"),
    "flash_attn_with_kvcache takes it": (
        *("k_cache", "v_cache", "cache_seqlens", "cache_batch_idx", "cache_leftpad", "cu_seqlens_k_new", "num_splits"),
        *("rotary_cos", "rotary_sin", "rotary_interleaved", "rotary_seqlens", "check_indices"),
    ),
    "fewer key heads than query heads serve groups anyway: leave it out": ("enable_gqa",),
    "results are the same in every run: leave it out": ("deterministic",),
    "what runs is chosen by shapes and devices, see explain: leave it out": (
        *("implementation", "backend", "pack_gqa", "sm_margin", "scheduler_metadata"),
    ),
}
"""What to do with a word, where a function has none for the same."""


def unknown_words(function: str, strangers: Sequence[str], words: Sequence[str]) -> str:
    """The text of an error about keywords that a function does not have, but maybe another of its kind."""
    shown = []
    for stranger in strangers:
        others = dict.fromkeys(word for group in SAME if stranger in group for word in group)
        here = " or ".join(word for word in others if word in words)
        there = [(text, word) for word in (stranger, *others) for text, those in ELSEWHERE.items() if word in those]
        if here:
            shown.append((stranger, f"here it is {here}"))
        elif there:
            text, word = there[0]
            shown.append((stranger, text if word == stranger else f"{text}, as {word}"))
        else:
            shown.append((stranger, "nobody has one of this name"))
    rule = f"has no argument {', '.join(strangers)}; it has {', '.join(words)}"
    return refusal(function, rule, *shown)


# ---------------------------------------------------------------------------------------------------
# Scalars
# ---------------------------------------------------------------------------------------------------


def known(function: str, name: str, value: Any) -> Any:
    """The Python number in an array of shape (), of any library; whatever else came, as it came."""
    if getattr(value, "shape", None) != () or not hasattr(value, "dtype"):
        return value
    kind = dtype_name(getattr(value.dtype, "name", value.dtype))
    start = next((start for start in _CONVERSIONS if kind.startswith(start)), None)
    if start is None:
        return value
    if getattr(value, "requires_grad", False):
        rule = f"{name} requires grad, and no gradient of it is computed: multiply arrays by it, or pass its detach()"
        raise TypeError(refusal(function, rule, (name, kind, type(value).__name__)))
    try:
        return _CONVERSIONS[start](value)
    except Exception:  # traced, under vmap, without memory: each library has an error of its own for that
        rule = f"{name} has to be known now, as it is not under a trace (jit, grad, vmap) or without memory (meta)"
        raise TypeError(refusal(function, f"{rule}; pass a number", (name, kind, type(value).__name__))) from None


_CONVERSIONS: Mapping[str, Callable[[Any], Any]] = {
    "bool": bool,
    "int": operator.index,
    "uint": operator.index,
    "float": float,
    "bfloat": float,
}
"""By how a dtype's name starts."""


def number(function: str, name: str, value: Any, *, rule: str, ok: Callable[[float], bool] = math.isfinite) -> float:
    """A finite real number for which `ok` holds, from a number or an array of shape ()."""
    if type(value) is float and math.isfinite(value) and ok(value):
        return value
    real = value if isinstance(value, numbers.Real) else known(function, name, value)
    if isinstance(real, bool) or not isinstance(real, numbers.Real):
        came = (name, reprlib.repr(value), type(value).__name__)
        raise TypeError(refusal(function, f"{name} has to be a number, or an array of shape () with one", came))
    try:
        result = float(real)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result) or not ok(result):
        raise ValueError(refusal(function, f"{name} has to be {rule}", (name, reprlib.repr(value))))
    return result


def softmax_scale(function: str, name: str, value: Any) -> float | None:
    """The factor of the scores; None: head_dim ** -0.5, once head_dim is known."""
    return None if value is None else number(function, name, value, rule="finite")


def softcap(function: str, value: Any) -> float:
    return number(function, "softcap", value, rule="finite and not negative (0: off)", ok=lambda x: x >= 0)


def dropout_p(function: str, value: Any) -> float:
    return number(function, "dropout_p", value, rule="from 0 to 1", ok=lambda x: 0 <= x <= 1)


def integer(function: str, name: str, value: Any, *, low: int, high: int = LARGEST_SIZE) -> int:
    """An integer, from one of any type or an array of shape ()."""
    whole = value if type(value) is int else known(function, name, value)
    try:
        if isinstance(whole, bool) or getattr(whole, "shape", ()) != ():
            raise TypeError
        result = operator.index(whole)
    except TypeError:
        came = (name, reprlib.repr(value), type(value).__name__)
        raise TypeError(
            refusal(function, f"{name} has to be an integer, or an array of shape () with one", came)
        ) from None
    if not low <= result <= high:
        raise ValueError(refusal(function, f"{name} has to be {span(low, high)}", (name, reprlib.repr(result))))
    return result


def span(low: int, high: int) -> str:
    """What an integer has to be, in words."""
    return f"from {low} to {high}" if low <= high else "one of those that there are, and there are none"


def is_one_number(value: Any) -> bool:
    """What is for `integer` where an array of many may come as well."""
    return isinstance(value, int) or getattr(value, "shape", None) == ()


def flag(function: str, name: str, value: Any) -> bool:
    """True or False, from one of Python or an array of shape ()."""
    if value is True or value is False:
        return bool(value)
    said = known(function, name, value)
    if not isinstance(said, bool):
        raise TypeError(refusal(function, f"{name} has to be True or False", (name, reprlib.repr(value))))
    return said


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
    try:
        problem = _problem(function, specs, options)
    except ValueError as error:
        if _may_be_turned(specs, options):
            raise ValueError(f"{error}\n{_turn(function, options.axes)}") from None
        raise
    if _is_turned(specs, options):
        shown = [(specs[word].name, specs[word].shape) for word in ("q", "k", "v")]
        text = refusal(function, "heads and sequence look exchanged", *shown)
        warnings.warn(f"{text}\n{_turn(function, options.axes)}", UserWarning, stacklevel=_level_outside())
    return problem


def _problem(function: str, specs: Mapping[str, Spec], options: Options) -> Problem:
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


def int32_rule(name: str) -> str:
    """Other integers are not converted: on a GPU that would be one more launch, and too large ones would go unseen."""
    return f"{name} has to be int32, as flash-attn has it; pass {name}.astype(np.int32), in torch .to(torch.int32)"


MOST_HEADS = {"bshd": 256, "bhsd": 1024}
"""More than any model has: Falcon 180B has 232.  Where heads come first, windows or a batch may be among them."""
MOST_ODD_HEADS = 71
"""Falcon 7B's; an odd number above that is the length of a sequence, as 77 of CLIP and 197 of ViT are."""


def _is_turned(specs: Mapping[str, Spec], options: Options) -> bool:
    """Whether heads and sequence are exchanged for certain, though all fits: for a warning.

    The axis of heads is longer than any model's, or odd and longer than any that is odd; that of the sequence is
    shorter and may be heads: those of k and v divide those of q.  Nothing is certain of short sequences: 5 tokens of
    32 heads are as usual as 5 heads of 32 tokens.  Who says layout="bhsd" knows that there is a choice.
    """
    shapes = _exchangeable(specs, options)
    is_chosen = options.axes == "bhsd" and not options.any_rank
    return shapes is not None and not is_chosen and _are_no_heads(shapes, options.axes)


def _may_be_turned(specs: Mapping[str, Spec], options: Options) -> bool:
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


def _turn(function: str, axes: Axes) -> str:
    """What to do with arrays whose heads and sequence are exchanged."""
    other: Axes = "bhsd" if axes == "bshd" else "bshd"
    if function in ("attention", "attention_backward", "explain"):
        remedy = f'say layout="{other}"'
    elif axes == "bshd":
        remedy = f"pass swapaxes(1, 2) of each: flash-attn's layout, and that of caches, is {AXES[axes]}"
    else:
        remedy = "call attention, or flash_attn_func, which take them; torch's layout is the other one"
    return f"    if the arrays are {AXES[other]}, {remedy}"


def _level_outside() -> int:
    """The stacklevel, seen from the caller, of the line that called the package."""
    level, outside = 1, 1
    frame = sys._getframe(1)
    while frame.f_back is not None:
        level, frame = level + 1, frame.f_back
        if frame.f_globals.get("__name__", "").partition(".")[0] == __package__:
            outside = level
    return outside + 1


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
            rule = f"{spec.name} has to be boolean, True where a key may be seen; what is added to scores is a bias"
        elif name in ("bias", "alibi_slopes", "sinks") and spec.dtype not in FLOATS:
            rule = f"{spec.name} has to be one of {', '.join(FLOATS)}"
        elif name in DESCALES and spec.dtype != "float32":
            rule = f"{spec.name} has to be float32"
        elif name in DESCALES and operands[0].dtype != FLOAT8:
            rule = f"{spec.name} is for operands of {FLOAT8}, and {operands[0].name} is {operands[0].dtype}"
        elif name in INDICES and spec.dtype != "int32":
            rule = int32_rule(spec.name)
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
    lengths: dict[str, Array] = {}
    for name, total, longest in (
        ("cu_seqlens_q", sizes.total_q, sizes.seqlen_q),
        ("cu_seqlens_k", None if "block_table" in specs else specs["k"].shape[0], sizes.seqlen_k),
    ):
        starts, shown = operands[name].astype(np.int64), specs[name].name
        steps = lengths[name] = np.diff(starts)
        values = short(starts)
        if starts[0] != 0:
            raise ValueError(refusal(function, f"{shown} has to start with 0", (shown, values)))
        if steps.min(initial=0) < 0:
            raise ValueError(refusal(function, f"{shown} must not decrease", (shown, values)))
        if total is not None and starts[-1] > total:
            array = specs["q" if name == "cu_seqlens_q" else "k"]
            rule = f"{shown} ends after the last row of {array.name}"
            raise ValueError(refusal(function, rule, (shown, values), (array.name, array.shape)))
        if steps.max(initial=0) > longest:
            rule = f"a sequence of {shown} is longer than {shown.replace('cu_seqlens', 'max_seqlen')}"
            raise ValueError(refusal(function, rule, (shown, values), ("longest", steps.max()), ("allowed", longest)))
    if "block_table" in specs:
        _check_pages(function, specs, lengths["cu_seqlens_k"], operands["block_table"])


def _check_pages(function: str, specs: Mapping[str, Spec], lengths: Array, table: Array) -> None:
    num_pages, page_size = specs["k"].shape[:2]
    name = specs["block_table"].name
    used = -(-lengths // page_size)
    if used.max(initial=0) > table.shape[1]:
        index = int(np.argmax(used > table.shape[1]))
        rule = f"sequence {index} needs {used[index]} pages of {page_size} keys for its {lengths[index]} keys"
        raise ValueError(refusal(function, rule, (name, table.shape, "(batch, pages of a sequence)")))
    wrong = (np.arange(table.shape[1]) < used[:, None]) & ((table < 0) | (table >= num_pages))
    if wrong.any():
        index, entry = (int(i) for i in np.argwhere(wrong)[0])
        rule = f"{name} of sequence {index} names page {table[index, entry]}, and there are {num_pages}"
        pages = short(table[index, : used[index]])
        raise ValueError(refusal(function, rule, (name, pages), (specs["k"].name, specs["k"].shape)))


def short(values: Sequence[int] | Array) -> str:
    first = [int(value) for value in values[:12]]
    return str(first) if len(values) <= 12 else f"[{', '.join(map(str, first[:10]))}, ... {len(values)} entries]"
