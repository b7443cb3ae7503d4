"""Index arrays by their values, where these can be seen: sequences and pages."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cupyattn.problem import Array, Sizes, Spec
from cupyattn.reading.refusals import refusal, short


def check_sequences(function: str, specs: Mapping[str, Spec], sizes: Sizes, operands: Mapping[str, Array]) -> None:
    """Check the values of cu_seqlens, lengths and block_table, on the host, before anything is computed.

    Entries of the block_table past the last page of a sequence are not looked at.
    """
    lengths: dict[str, Array] = {}
    for name, total, longest in (
        ("cu_seqlens_q", sizes.total_q, sizes.seqlen_q),
        ("cu_seqlens_k", None if "block_table" in specs else specs["k"].shape[0], sizes.seqlen_k),
    ):
        if name not in specs:
            lengths[name] = _lengths_in_pages(function, specs, sizes, operands["cache_seqlens"])
            continue
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


def _lengths_in_pages(function: str, specs: Mapping[str, Spec], sizes: Sizes, used: Array) -> Array:
    """How many keys each sequence has, which is at most so many."""
    lengths, shown = used.astype(np.int64), specs["cache_seqlens"].name
    if lengths.min(initial=0) < 0:
        raise ValueError(refusal(function, f"{shown} must not be negative", (shown, short(lengths))))
    if lengths.max(initial=0) > sizes.seqlen_k:
        rule = f"a sequence of {shown} is longer than max_seqlen_k"
        raise ValueError(refusal(function, rule, (shown, short(lengths)), ("allowed", sizes.seqlen_k)))
    return lengths


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
