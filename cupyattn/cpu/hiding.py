"""Hiding keys from rows: their scores become minus infinity."""

from __future__ import annotations

import numpy as np

from cupyattn.cpu.scratch import Scratch
from cupyattn.numpy_ref import Array

SAMPLED, SCATTERED = 64, 20
"""One row of so many is looked at; where one key of so many differs from the one before it in being hidden or not, they
are scattered: choosing number by number is then slower than arithmetic on all of them, for no processor can guess."""

AT_ONCE = 2**16
"""Limits of scores that there are at the same time: they stay in a core's second-level cache."""


def hide(scores: Array, hidden: Array, scratch: Scratch) -> None:
    """Minus infinity where a key is hidden, whatever its score is, nan too; `hidden` broadcasts to the scores."""
    if 2 * hidden.size > scores.size and not _is_scattered(hidden):
        np.copyto(scores, -np.inf, where=hidden)
        return
    rows = hidden.shape[-2]
    height = max(1, AT_ONCE * rows // max(1, hidden.size))
    with np.errstate(invalid="ignore"):
        for first in range(0, rows, height):
            some = slice(first, first + height)
            _limit(scores if rows == 1 else scores[..., some, :], hidden[..., some, :], scratch)


def _limit(scores: Array, hidden: Array, scratch: Scratch) -> None:
    limits = scratch.array("limits", hidden.shape, scores.dtype)
    np.multiply(hidden, scores.dtype.type(-np.inf), out=limits)  # nan where it is seen, which fmin passes over
    np.fmin(scores, limits, out=scores)


def _is_scattered(hidden: Array) -> bool:
    some = hidden[..., ::SAMPLED, :]
    return bool(SCATTERED * np.count_nonzero(some[..., 1:] != some[..., :-1]) > some.size)
