"""Between padded batches and packed tokens, as flash-attn's bert_padding has it.

Written in the caller's own library, so that its gradients and devices simply apply.
"""

from __future__ import annotations

import math
from typing import Any

import array_api_compat
import numpy as np

from cupyattn import reading
from cupyattn.arrays import Visit, enter, recorded, shapes
from cupyattn.problem import A, Array
from cupyattn.reading import LARGEST_RESULT, refusal


@recorded(
    shapes.of_unpadded,
    ("rows", "indices", "cu_seqlens", "longest", "seqused"),
    finish=lambda _, found: (*found[:3], found[3].shape[0], found[4]),
    is_one_job=False,
    smooth=1,
)
def unpad_input(
    hidden_states: A, attention_mask: Array, unused_mask: Array | None = None
) -> tuple[A, Array, Array, int, Array]:
    """Pack the rows of a padded batch that a mask keeps.

    Parameters
    ----------
    hidden_states : array, shape (batch, seqlen, ...)
    attention_mask : array of bool or int, shape (batch, seqlen)
        True or 1: a token; False or 0: padding.
    unused_mask : array of bool or int, shape (batch, seqlen), optional
        Tokens that are kept in the packing but are not used.

    Returns
    -------
    hidden_states : array, shape (total, ...)
        The rows of tokens (and of unused ones), in order.
    indices : array of int, shape (total,)
        Their positions in the flattened (batch * seqlen) rows, for `pad_input`.
    cu_seqlens : array of int32, shape (batch + 1,)
        Where each sequence starts in the packing.
    max_seqlen : int
        Length of the longest sequence.
    seqused : array of int32, shape (batch,)
        Tokens of each sequence that are used.

    Raises
    ------
    TypeError
        Not arrays of one library, masks that are neither boolean nor integer, or masks whose values are not
        known yet: of dask, or under jax.jit.
    ValueError
        Shapes do not fit, or a mask's values are neither 0 nor 1.

    Notes
    -----
    In a graph of torch the rows are as many, and the longest sequence as long, as a mask says that has no values yet.
    torch.compile has such sizes once ``torch._dynamo.config.capture_dynamic_output_shape_ops`` is switched on; without
    it, the call is between two graphs, and an error with ``fullgraph=True``.
    """
    function = "unpad_input"
    named = {
        "hidden_states": ("hidden_states", hidden_states),
        "attention_mask": ("attention_mask", attention_mask),
        "unused_mask": ("unused_mask", unused_mask),
    }
    visit = _enter(function, named, "the number of rows", needed=("attention_mask", "unused_mask"))
    specs = dict(visit.specs)
    shape = specs["hidden_states"].shape
    if len(shape) < 2:
        rule = "hidden_states has to be (batch, seqlen, ...)"
        raise ValueError(refusal(function, rule, ("hidden_states", shape)))
    masks = {}
    for name in ("attention_mask", "unused_mask"):
        if name in specs:
            spec = specs[name]
            if spec.shape != shape[:2]:
                rule = f"{name} has to be (batch, seqlen), {shape[:2]}"
                raise ValueError(refusal(function, rule, (name, spec.shape), ("hidden_states", shape)))
            if not (spec.dtype == "bool" or spec.dtype.startswith(("int", "uint"))):
                rule = f"{name} has to be boolean or integer"
                raise TypeError(refusal(function, rule, (name, spec.shape, spec.dtype)))
            values = np.asarray(visit.library.values(visit.arrays[name]))
            if spec.dtype != "bool" and not np.isin(values, (0, 1)).all():
                raise ValueError(
                    refusal(function, f"{name} has to hold 0 and 1", (name, reading.short(np.unique(values).tolist())))
                )
            masks[name] = values.astype(bool)
    used = masks["attention_mask"]
    kept = used | masks["unused_mask"] if "unused_mask" in masks else used
    lengths = kept.sum(axis=-1, dtype=np.int32)
    starts = np.zeros(shape[0] + 1, np.int32)
    np.cumsum(lengths, out=starts[1:])
    indices = np.flatnonzero(kept)
    xp = array_api_compat.array_namespace(hidden_states)
    here = _index(visit, indices)
    rows = xp.take(xp.reshape(hidden_states, (shape[0] * shape[1], *shape[2:])), here, axis=0)
    longest = int(lengths.max(initial=0))
    counts = _home(visit, used.sum(axis=-1, dtype=np.int32))
    made = visit.of_their_kind({"rows": rows, "indices": here, "starts": _home(visit, starts), "counts": counts})
    return made["rows"], made["indices"], made["starts"], longest, made["counts"]


@recorded(shapes.of_padded, ("padded",), finish=lambda _, found: found, is_one_job=False)
def pad_input(hidden_states: A, indices: Array, batch: int, seqlen: int) -> A:
    """Put packed rows back into a padded batch; the padding is zero.

    Parameters
    ----------
    hidden_states : array, shape (total, ...)
    indices : array of int, shape (total,)
        As `unpad_input` returned them: positions in the flattened (batch * seqlen) rows, each once.
    batch, seqlen : int

    Returns
    -------
    array, shape (batch, seqlen, ...)

    Raises
    ------
    TypeError
        Not arrays of one library, indices that are not integers, or whose values are not known yet.
    ValueError
        Shapes do not fit, or an index is out of range or comes twice.
    """
    function = "pad_input"
    batch = reading.integer(function, "batch", batch, low=0)
    seqlen = reading.integer(function, "seqlen", seqlen, low=0)
    named = {"hidden_states": ("hidden_states", hidden_states), "indices": ("indices", indices)}
    visit = _enter(function, named, "the place of a row", needed=("indices",))
    specs = dict(visit.specs)
    shape, index = specs["hidden_states"].shape, specs["indices"]
    if math.prod((batch, seqlen, *shape[1:])) > LARGEST_RESULT:
        rule = "the result would be larger than memory can be"
        raise ValueError(refusal(function, rule, ("batch", batch), ("seqlen", seqlen), ("hidden_states", shape)))
    if index.dtype not in ("int32", "int64"):
        raise TypeError(refusal(function, "indices has to be int32 or int64", ("indices", index.shape, index.dtype)))
    if not shape or index.shape != shape[:1]:
        rule = "indices has to hold one position per row of hidden_states"
        raise ValueError(refusal(function, rule, ("indices", index.shape), ("hidden_states", shape)))
    places = np.asarray(visit.library.values(visit.arrays["indices"])).astype(np.int64)
    total = batch * seqlen
    if places.size and (places.min() < 0 or places.max() >= total):
        rule = f"indices have to be from 0 to batch * seqlen - 1 = {total - 1}"
        raise ValueError(refusal(function, rule, ("indices", f"{places.min()} to {places.max()}")))
    if np.unique(places).size != places.size:
        raise ValueError(refusal(function, "indices have to be different", ("indices", index.shape)))
    source = np.full(total, places.size, np.int64)  # padding takes the row of zeros after the last one
    source[places] = np.arange(places.size)
    xp = array_api_compat.array_namespace(hidden_states)
    zeros = visit.library.zeros((1, *shape[1:]), hidden_states)
    rows = xp.take(xp.concat([hidden_states, zeros], axis=0), _index(visit, source), axis=0)
    if rows.dtype != hidden_states.dtype:  # NumPy joins arrays of a foreign byte order in its own
        rows = xp.astype(rows, hidden_states.dtype)
    padded: A = visit.of_their_kind({"out": xp.reshape(rows, (batch, seqlen, *shape[1:]))})["out"]
    return padded


def _enter(function: str, named: dict[str, tuple[str, Any]], what: str, needed: tuple[str, ...]) -> Visit:
    """Look at the arrays; the values of those `needed` have to be there, since they decide `what`."""
    visit = enter(function, named)
    deciding = {name: visit.arrays[name] for name in needed if name in visit.arrays}
    if visit.library.is_deferred(deciding):
        rule = f"{what} depends on the values of {' and '.join(deciding)}, {visit.library.when_deferred}"
        raise TypeError(refusal(function, rule, *((name, spec.shape) for name, spec in visit.specs)))
    if visit.kind == "cuda":
        visit.device()
    return visit


def _home(visit: Visit, values: Array) -> Array:
    return visit.library.from_numpy(values, values.dtype.name, visit.arrays["hidden_states"])


def _index(visit: Visit, values: Array) -> Array:
    """Indices in the library's own index dtype."""
    return _home(visit, values.astype(visit.library.index_dtype()))
