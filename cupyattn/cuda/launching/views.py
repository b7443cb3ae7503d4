"""Where operands lie, as values, and what kernels make of it: strides, alignment, what has to be copied first.

Nothing here touches a GPU, and the tests make views of NumPy's arrays for the emulator.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from cupyattn.cuda.launching import params
from cupyattn.problem import ITEMSIZE, Problem, Shape

DESCALES = ("q_descale", "k_descale", "v_descale")
Strides = tuple[int, ...]


class View(NamedTuple):
    """Where an array lies: its address, and elements from step to step along each axis."""

    pointer: int
    shape: Shape
    strides: tuple[int, ...]
    dtype: str


Fact = tuple[str, tuple[Shape, Strides, str]]
"""An operand's name, and its view without the address."""


def view_of_numpy(array: Any, dtype: str) -> View:
    """A NumPy array's view: what the emulator runs on."""
    strides = tuple(stride // array.itemsize for stride in array.strides)
    return View(array.ctypes.data, array.shape, strides, dtype)


def astray(operands: Mapping[str, View], names: Iterable[str] = ("q", "k", "v", "dout")) -> tuple[str, ...]:
    """Those of them that do not start at multiples of 16 bytes."""
    return tuple([name for name in names if name in operands and operands[name][0] % 16])


def is_aligned(view: View) -> bool:
    """Every row starts at a multiple of 16 bytes."""
    return view.pointer % 16 == 0 and steps_are_aligned(view.strides, view.dtype)


def steps_are_aligned(strides: Strides, dtype: str) -> bool:
    return all(ITEMSIZE[dtype] * stride % 16 == 0 for stride in strides[:-1])


def contiguous_strides(shape: Shape) -> Strides:
    """Elements from step to step of a fresh array."""
    steps = [1]
    for size in reversed(shape[1:]):
        steps.append(steps[-1] * size)
    return tuple(reversed(steps))


def lies_like_new(view: View) -> bool:
    """A kernel can write a result there as to a fresh array: numbers end to end, from a multiple of 16 bytes on."""
    return view.pointer % 16 == 0 and _is_contiguous(view)


def _is_contiguous(view: View) -> bool:
    steps = zip(view.shape, view.strides, contiguous_strides(view.shape), strict=True)
    return all(size < 2 or found == step for size, found, step in steps)


def has_one_batch_axis(shape: Shape, batch_shape: Shape) -> bool:
    """Whether one stride leads from sequence to sequence, or the same array serves them all."""
    lead = shape[:-3]
    return len(batch_shape) < 2 or not lead or (len(lead) == 1 and lead[0] in (1, math.prod(batch_shape)))


def has_to_be_copied(name: str, shape: Shape, strides: Strides, dtype: str, batch_shape: Shape) -> bool:
    """Whether kernels cannot read an operand as it is."""
    if name in ("q", "k", "v", "mask", "bias") and not has_one_batch_axis(shape, batch_shape):
        return True
    if name in ("mask", "bias", "k_new", *DESCALES):  # of new keys only the number is looked at
        return False
    gaps = (
        bool(shape) and 0 not in shape and shape[-1] > 1 and strides[-1] != 1
    )  # NumPy gives empty arrays strides of 0
    return gaps or (name in ("alibi_slopes", "sinks") and dtype != "float32")


def why_copied(name: str, view: View, batch_shape: Shape) -> str:
    """In words, of an operand that has to be."""
    if name not in ("alibi_slopes", "sinks") and not has_one_batch_axis(view.shape, batch_shape):
        return "kernels know one batch axis"
    if name in ("alibi_slopes", "sinks") and view.dtype != "float32":
        return "kernels read it in float32"
    return "its last axis is not contiguous"


def once_copied(name: str, view: View, batch_shape: Shape) -> View:
    """Where one of q, k, v and dout lies, once it is copied if it has to be: see `memory.copied`."""
    if not has_to_be_copied("q" if name == "dout" else name, *view[1:], batch_shape):
        return view
    lead, inner = view.shape[:-3], view.shape[-3:]
    if not has_one_batch_axis(view.shape, batch_shape):
        if math.prod(lead) > 1:
            shape = (math.prod(batch_shape), *inner)
            return View(0, shape, contiguous_strides(shape), view.dtype)
        lead = (1,)
    shape = (*lead, *inner)
    # Axes of one are dropped where the array lies, if that is all there is to be done.
    return View(view.pointer if _is_contiguous(view) else 0, shape, contiguous_strides(shape), view.dtype)


def broadcast_strides(shape: Shape, strides: Strides) -> Strides:
    """Strides under which an axis of length one serves any index."""
    return tuple(0 if size == 1 else stride for size, stride in zip(shape, strides, strict=True))


def operand_strides(name: str, problem: Problem, strides: Strides, in_places: bool) -> params.Strides:
    """(batch, row, head) of an array in the caller's layout, whose batch axes are one by now, or in a cache."""
    axes = problem.layout.axes
    if in_places:
        return params.Strides(strides[0], strides[1], strides[2])
    if axes == "thd":
        return params.Strides(0, strides[0], strides[1])
    lead = (0,) * (4 - len(strides)) + strides
    return params.Strides(lead[0], lead[1], lead[2]) if axes == "bshd" else params.Strides(lead[0], lead[2], lead[1])


def score_strides(strides: Strides) -> params.ScoreStrides:
    """(batch, head, row, key) of what is broadcast to the scores; of nothing, zeros."""
    return params.ScoreStrides(*(0,) * (4 - len(strides)), *strides)
