"""How much of each sequence is used: what such lengths go with, and their values where these can be seen."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cupyattn.problem import Array, Sizes, Spec
from cupyattn.reading.options import Options
from cupyattn.reading.refusals import LARGEST_SIZE, refusal, short

WORDS = ("seqlens_q", "seqlens_k")


def has_seqlens(specs: Mapping[str, Spec]) -> bool:
    return "seqlens_q" in specs or "seqlens_k" in specs


def check_seqlens(function: str, specs: Mapping[str, Spec], sizes: Sizes, options: Options) -> None:
    """Refuse lengths that are not one for each sequence, and what does not go with any."""
    given = [specs[word] for word in WORDS if word in specs]
    names = " and ".join(spec.name for spec in given)
    for spec in given:
        if spec.shape != (sizes.batch,):
            rule = f"{spec.name} has to hold one length per sequence, ({sizes.batch},)"
            raise ValueError(refusal(function, rule, (spec.name, spec.shape)))
    for word in ("q", "k", "v"):
        if options.axes != "thd" and specs[word].shape[0] != sizes.batch:
            rule = f"with {names} each of q, k and v has to have the whole batch, {sizes.batch}"
            raise ValueError(refusal(function, rule, (specs[word].name, specs[word].shape)))
    for word in ("mask", "bias"):
        if word in specs:
            rule = f"{names} and {specs[word].name} exclude each other: hide keys and rows by the {word}"
            raise ValueError(refusal(function, rule, (specs[word].name, specs[word].shape)))
    if options.dropout_p > 0.0:
        rule = f"{names} and dropout_p exclude each other"
        raise ValueError(refusal(function, rule, ("dropout_p", options.dropout_p)))
    if options.axes != "thd" and sizes.batch * max(sizes.seqlen_q, sizes.seqlen_k) > LARGEST_SIZE:
        rule = f"with {names} there may be at most {LARGEST_SIZE} rows, and keys, in all sequences together"
        raise ValueError(refusal(function, rule, *((specs[word].name, specs[word].shape) for word in ("q", "k"))))


def check_lengths(function: str, specs: Mapping[str, Spec], sizes: Sizes, operands: Mapping[str, Array]) -> None:
    """Check the values of seqlens_q and seqlens_k, on the host, before anything is computed."""
    for word, longest in zip(WORDS, (sizes.seqlen_q, sizes.seqlen_k), strict=True):
        if word not in specs:
            continue
        values, name, starts = operands[word].astype(np.int64), specs[word].name, f"cu_{word}"
        shown = (name, short(values))
        if starts in specs:
            room = np.diff(operands[starts].astype(np.int64))
            if (values < 0).any() or (values > room).any():
                rule = f"{name} have to be from 0 to the lengths of the sequences in {specs[starts].name}"
                raise ValueError(refusal(function, rule, shown, ("lengths", short(room))))
        elif values.size and (values.min() < 0 or values.max() > longest):
            array = specs["q" if word == "seqlens_q" else "k"]
            rule = f"{name} have to be from 0 to {longest}, the length of {array.name}"
            raise ValueError(refusal(function, rule, shown, (array.name, array.shape)))
