"""A whole call: its options and the shapes and dtypes of its arrays, read into a `Problem`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import lru_cache

from cupyattn.problem import FLOAT8, FLOATS, Layout, Problem, Sizes, Spec
from cupyattn.reading.options import Options
from cupyattn.reading.refusals import DESCALES, INDICES, LARGEST_RESULT, LARGEST_SIZE, int32_rule, refusal
from cupyattn.reading.seqlens import check_seqlens, has_seqlens
from cupyattn.reading.sizes import broadcasts_to, cached_sizes_of, ragged_sizes_of, sizes_of
from cupyattn.reading.turned import how_to_turn, is_turned, level_outside, may_be_turned


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
        if may_be_turned(specs, options):
            raise ValueError(f"{error}\n{how_to_turn(function, options.axes)}") from None
        raise
    if is_turned(specs, options):
        shown = [(specs[word].name, specs[word].shape) for word in ("q", "k", "v")]
        text = refusal(function, "heads and sequence look exchanged", *shown)
        warnings.warn(f"{text}\n{how_to_turn(function, options.axes)}", UserWarning, stacklevel=level_outside())
    return problem


def _problem(function: str, specs: Mapping[str, Spec], options: Options) -> Problem:
    _check_dtypes(function, specs, options.takes_float8)
    for spec in specs.values():
        if any(size > LARGEST_SIZE for size in spec.shape):
            rule = f"no axis may be longer than {LARGEST_SIZE}"
            raise ValueError(refusal(function, rule, (spec.name, spec.shape)))
    if options.cached:
        sizes = cached_sizes_of(function, specs, options)
    else:
        sizes = (
            ragged_sizes_of(function, specs, options) if options.axes == "thd" else sizes_of(function, specs, options)
        )
    _check_edits(function, specs, sizes)
    _check_descales(function, specs, sizes)
    if has_seqlens(specs):
        check_seqlens(function, specs, sizes, options)
    k = specs["k"].shape
    problem = Problem(
        sizes,
        Layout(
            options.axes,
            k[1] if "block_table" in specs else None,
            options.cached or "cache_seqlens" in specs,
            has_seqlens(specs),
        ),
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


def _check_edits(function: str, specs: Mapping[str, Spec], sizes: Sizes) -> None:
    """Masks, biases, slopes and sinks against the sizes they edit."""
    scores = (*sizes.batch_shape, sizes.num_heads, sizes.seqlen_q, sizes.seqlen_k)
    for name in ("mask", "bias"):
        if name in specs:
            spec = specs[name]
            if not broadcasts_to(spec.shape, scores):
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
        if name in specs and not broadcasts_to(specs[name].shape, (sizes.batch, heads)):
            spec = specs[name]
            rule = f"{spec.name} does not broadcast to (batch, num_heads_kv), {(sizes.batch, heads)}"
            raise ValueError(refusal(function, rule, (spec.name, spec.shape)))
