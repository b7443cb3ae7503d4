"""What a call of linear attention asks: checked, and as arrays of heads for the arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupyattn import reading
from cupyattn.linear.tokens import Derivatives, Tokens
from cupyattn.problem import FLOATS, Array, Axes, Shape, Spec
from cupyattn.reading import refusal
from cupyattn.rounding import narrow, widen

RULES = {"linear": (), "gated": ("decay",), "delta": ("beta",), "gated_delta": ("decay", "beta")}
"""What each rule needs; it forbids what it does not need."""


@dataclass(frozen=True)
class Asked:
    """A call without its arrays."""

    specs: Mapping[str, Spec]
    layout: Axes
    scale: float
    chunk_size: int | None

    @property
    def results(self) -> dict[str, Spec]:
        q, v = self.specs["q"], self.specs["v"]
        kind = "float64" if q.dtype == "float64" else "float32"
        kind = self.specs["state"].dtype if "state" in self.specs else kind
        return {
            "out": Spec("out", (*q.shape[:-1], v.shape[-1]), q.dtype),
            "state": Spec("state", _state_shape(self.specs, self.layout), kind),
        }

    def heads_first(self, array: Array) -> Array:
        """(batch, heads, seqlen, ...) in float64."""
        array = widen(array, "float64")
        return array.swapaxes(1, 2) if self.layout == "bshd" else array

    def tokens(self, operands: Mapping[str, Array]) -> Tokens:
        found = {
            name: self.heads_first(operands[name]) for name in operands if name in ("q", "k", "v", "decay", "beta")
        }
        keep, beta = found.get("decay"), found.get("beta")
        if keep is not None:
            keep = np.exp(keep if keep.ndim == 4 else keep[..., None])
        if beta is not None:
            beta = np.broadcast_to(beta, found["k"].shape[:-1])[..., None]
        return Tokens(self.in_groups(found["q"]) * self.scale, found["k"], found["v"], keep, beta)

    def in_groups(self, rows: Array) -> Array:
        """(batch, num_heads, ...) as (batch, num_heads_kv, group, ...)."""
        heads = _heads(self.specs["k"], self.layout)
        return rows.reshape(rows.shape[0], heads, rows.shape[1] // heads, *rows.shape[2:])

    def state(self, operands: Mapping[str, Array], word: str = "state") -> Array:
        if operands.get(word) is None:
            return np.zeros(_state_shape(self.specs, self.layout))
        return widen(operands[word], "float64").copy()

    def home(self, name: str, array: Array) -> Array:
        """Heads as they came, and rounded once."""
        spec = self.specs[name] if name in self.specs and name != "state" else self.results[name]
        if name in ("out", "q"):
            array = array.reshape(array.shape[0], array.shape[1] * array.shape[2], *array.shape[3:])
        if name == "beta":
            array = array[..., 0]
            if array.shape[1] != _heads(spec, self.layout):
                array = array.sum(axis=1, keepdims=True)
        if name == "decay" and len(spec.shape) == 3:
            array = array[..., 0]
        array = array.swapaxes(1, 2) if self.layout == "bshd" and name != "state" else array
        return np.ascontiguousarray(narrow(array, spec.dtype))

    def gradients(self, found: Derivatives, dstate: Array) -> dict[str, Array]:
        named = {"q": found.q * self.scale, "k": found.k, "v": found.v, "decay": found.keep, "beta": found.beta}
        named["state"] = dstate if "state" in self.specs else None
        return {name: self.home(name, array) for name, array in named.items() if array is not None}


def read(function: str, specs: Mapping[str, Spec], rule: Any, layout: Any, scale: Any, chunk_size: Any) -> Asked:
    """Everything that can be refused without values."""
    layout = reading.choice(function, "layout", layout, ("bshd", "bhsd"))
    rule = reading.choice(function, "rule", rule, tuple(RULES))
    for word in ("decay", "beta"):
        if (word in specs) != (word in RULES[rule]):
            says = f"rule {rule!r} {'needs' if word in RULES[rule] else 'has no'} {word}"
            raise ValueError(refusal(function, says, (word, specs[word].shape if word in specs else None)))
    _check_dtypes(function, specs)
    _check_shapes(function, specs, layout)
    if scale is not None:
        scale = reading.number(function, "scale", scale, rule="finite")
    if chunk_size is not None:
        chunk_size = reading.integer(function, "chunk_size", chunk_size, low=1)
    head_dim = specs["q"].shape[-1]
    return Asked(dict(specs), layout, max(1, head_dim) ** -0.5 if scale is None else scale, chunk_size)


def _check_dtypes(function: str, specs: Mapping[str, Spec]) -> None:
    for spec in specs.values():
        if spec.dtype not in FLOATS:
            says = f"{spec.name} has to be one of {', '.join(FLOATS)}"
            raise TypeError(refusal(function, says, (spec.name, spec.shape, spec.dtype)))
    operands = [specs[name] for name in ("q", "k", "v")]
    if len({spec.dtype for spec in operands}) > 1:
        shown = ((spec.name, spec.shape, spec.dtype) for spec in operands)
        raise TypeError(refusal(function, "q, k, v have to be of one dtype", *shown))


def _check_shapes(function: str, specs: Mapping[str, Spec], layout: Axes) -> None:
    q, k, v = (specs[name] for name in ("q", "k", "v"))
    for spec in (q, k, v):
        if len(spec.shape) != 4:
            raise ValueError(
                refusal(function, f"{spec.name} has to be {reading.AXES[layout]}", (spec.name, spec.shape))
            )
    shown = tuple((spec.name, spec.shape) for spec in (q, k, v))
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(refusal(function, "k and v have to be alike up to head_dim", *shown))
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(refusal(function, "q and k have to have the same head_dim", *shown))
    row = 1 if layout == "bshd" else 2
    if q.shape[0] != k.shape[0] or q.shape[row] != k.shape[row]:
        raise ValueError(refusal(function, "q and k have to have the same batch and seqlen", *shown))
    heads = _heads(k, layout)
    if heads == 0 or _heads(q, layout) % heads:
        says = f"the heads of k have to divide those of q: num_heads_kv = {heads}, num_heads = {_heads(q, layout)}"
        raise ValueError(refusal(function, says, *shown))
    of_one = tuple(1 if axis == 3 - row else size for axis, size in enumerate(k.shape[:-1]))
    axes = "(batch, seqlen, num_heads_kv{})" if layout == "bshd" else "(batch, num_heads_kv, seqlen{})"
    state = _state_shape(specs, layout)
    for word, allowed, said in (
        ("decay", (k.shape[:-1], k.shape), f"{axes.format('')} or {axes.format(', head_dim')}"),
        ("beta", (k.shape[:-1], of_one), f"{axes.format('')}, or of one head"),
        ("state", (state,), "(batch, num_heads_kv, head_dim, head_dim_v)"),
    ):
        if word in specs and specs[word].shape not in allowed:
            says = f"{specs[word].name} has to be {said}, {' or '.join(map(str, dict.fromkeys(allowed)))}"
            raise ValueError(refusal(function, says, (specs[word].name, specs[word].shape), *shown[1:]))


def _heads(spec: Spec, layout: Axes) -> int:
    return spec.shape[2 if layout == "bshd" else 1]


def _state_shape(specs: Mapping[str, Spec], layout: Axes) -> Shape:
    k, v = specs["k"], specs["v"]
    return k.shape[0], _heads(k, layout), k.shape[-1], v.shape[-1]
