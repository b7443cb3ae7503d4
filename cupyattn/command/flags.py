"""What flags may say: each takes a flag's text, and says what it has to be where it is not that."""

from __future__ import annotations

import re
from argparse import ArgumentTypeError
from collections.abc import Callable
from typing import TypeVar

from cupyattn.problem import NAMED_DEVICES

T = TypeVar("T")


def positive(text: str) -> int:
    """A whole number, 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def number(text: str) -> float:
    """A number, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ArgumentTypeError(f"{text!r} is not a number that is 0 or more")
    return value


def several(read: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    """Of what `read` reads, with commas between them, and each but once."""

    def split(text: str) -> tuple[T, ...]:
        return tuple(dict.fromkeys(read(part) for part in text.split(",")))

    return split


def target(text: str) -> str:
    """An architecture, "sm_90a"."""
    found = re.fullmatch(r"sm_(\d{2,3})[af]?", text)
    if found is None:
        raise ArgumentTypeError(f"{text!r} is no architecture; they look like sm_80 or sm_90a")
    if int(found[1]) < 80:
        raise ArgumentTypeError(f"{text}: the kernels need sm_80 or newer (Ampere)")
    return text


def device(text: str) -> str:
    """ "cpu", or a GPU by name."""
    by_lower = {name.lower(): name for name in ("cpu", *NAMED_DEVICES)}
    if text.lower() not in by_lower:
        raise ArgumentTypeError(f"{text!r} is none of {', '.join(by_lower.values())}")
    return by_lower[text.lower()]


def window(text: str) -> tuple[int | None, int | None]:
    """Keys before and after the diagonal, "512,0"; -1 for all of them, as in flash-attn."""
    found = re.fullmatch(r"(-1|\d+),(-1|\d+)", text)
    if found is None:
        raise ArgumentTypeError(f"{text!r} is not LEFT,RIGHT, like 512,0; -1 stands for all keys on a side")
    left, right = (None if side == "-1" else int(side) for side in found.groups())
    return left, right
