"""Hiding keys from rows: their scores become minus infinity."""

from __future__ import annotations

import numpy as np

from cupyattn.cpu.scratch import Scratch
from cupyattn.numpy_ref import Array

SAMPLED, SCATTERED = 64, 20
"""One row of so many is looked at; where one key of so many differs from the one before it in being hidden or not, they
are scattered: choosing number by number is then slower than arithmetic on all of them, for no processor can guess."""

MIXED = 8
"""The same for exponentials: so many are scattered that it is faster to keep infinities away from NumPy's exp."""
LOWEST = float(np.finfo(np.float64).min)

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


def exponentials(scores: Array, hidden: Array | None, scratch: Scratch) -> None:
    """Of float64 scores, in place; the same bits as `numpy.exp`, where scores of hidden keys are minus infinity.

    NumPy's exp (for AVX-512) has its fast way for eight numbers without an infinity alone: where most eights have one
    it takes seven times as long.  So hidden scores are made 0, and their exponentials 0 afterwards.
    """
    if hidden is None or scores.dtype != np.float64 or not _is_scattered(hidden, MIXED):
        np.exp(scores, out=scores)
        return
    height = max(1, AT_ONCE * hidden.shape[-2] // max(1, hidden.size))
    for first in range(0, hidden.shape[-2], height):
        rows = slice(first, first + height)
        seen, some = ~hidden[..., rows, :], scores[..., rows, :] if hidden.shape[-2] > 1 else scores
        limits = scratch.array("limits", seen.shape, scores.dtype)
        np.multiply(seen, LOWEST, out=limits)
        np.maximum(some, limits, out=some)
        np.exp(some, out=some)
        np.multiply(some, seen, out=some)


def _is_scattered(hidden: Array, one_in: int = SCATTERED) -> bool:
    some = hidden[..., ::SAMPLED, :]
    return bool(one_in * np.count_nonzero(some[..., 1:] != some[..., :-1]) > some.size)
