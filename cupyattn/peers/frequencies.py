"""How fast each pair of features turns with the position: the rules that models name in their ``rope_parameters``."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from cupyattn import reading
from cupyattn.problem import Array
from cupyattn.reading import refusal

DEFAULT_THETA = 10000.0


class Rule(NamedTuple):
    """A rule of `rotary_tables`, read."""

    name: str
    dim: int
    """Features of a head that rotate; for "proportional" all of them, those that stand still, too."""
    theta: float
    said: Mapping[str, Any]
    """What else the rule is told, by the words of ``rope_parameters``."""

    def of_length(self, length: int) -> tuple[Array, float]:
        """Angles per position, (dim / 2,), and the factor of cosines and sines; of sequences of `length` tokens."""
        inverse = _COMPUTED[self.name](self, length)
        return inverse, self.said.get("attention_factor", 1.0)

    def plain(self, theta: float | None = None) -> Array:
        """Wavelengths over 2 pi of the embedding as it was first published."""
        return (self.theta if theta is None else theta) ** (np.arange(0, self.dim, 2) / self.dim)


def _linear(rule: Rule, length: int) -> Array:
    return 1.0 / rule.plain() / rule.said["factor"]


def _dynamic(rule: Rule, length: int) -> Array:
    """NTK-aware: a larger theta, so that the slowest pair turns as if positions were divided by the growth."""
    factor, trained = rule.said["factor"], rule.said["max_position_embeddings"]
    growth = factor * max(length, trained) / trained - (factor - 1)
    return 1.0 / rule.plain(rule.theta * growth ** (rule.dim / (rule.dim - 2)))


def _yarn(rule: Rule, length: int) -> Array:
    """Fast pairs as they are, slow ones divided by the factor, a ramp between; section 3.2 of the paper."""
    said, dim = rule.said, rule.dim

    def pair_with(rotations: float) -> float:
        """The (fractional) pair that makes so many rotations over the trained length."""
        over = said["original_max_position_embeddings"] / (rotations * 2 * math.pi)
        return dim * math.log(over) / (2 * math.log(rule.theta))

    low, high = pair_with(said["beta_fast"]), pair_with(said["beta_slow"])
    if said["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    plain = rule.plain()
    return ramp / (said["factor"] * plain) + (1 - ramp) / plain


def _longrope(rule: Rule, length: int) -> Array:
    is_long = length > rule.said["original_max_position_embeddings"]
    return 1.0 / (np.array(rule.said["long_factor" if is_long else "short_factor"]) * rule.plain())


def _llama3(rule: Rule, length: int) -> Array:
    """By how often a pair turns over the trained length: as it is, divided by the factor, or between the two."""
    said = rule.said
    inverse = 1.0 / rule.plain()
    turns = said["original_max_position_embeddings"] * inverse / (2 * math.pi)
    low, high = said["low_freq_factor"], said["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 - smooth) * inverse / said["factor"] + smooth * inverse


def _proportional(rule: Rule, length: int) -> Array:
    """The first pairs as they would turn if all did; the others stand still."""
    inverse = 1.0 / rule.plain() / rule.said["factor"]
    inverse[int(rule.said["partial_rotary_factor"] * rule.dim // 2) :] = 0.0
    return inverse


_COMPUTED: Mapping[str, Callable[[Rule, int], Array]] = {
    "default": lambda rule, length: 1.0 / rule.plain(),
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
    "proportional": _proportional,
}
_TRAINED = "original_max_position_embeddings"
_NEEDED: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "max_position_embeddings"),
    "yarn": ("factor", _TRAINED),
    "longrope": ("short_factor", "long_factor", _TRAINED),
    "llama3": ("factor", _TRAINED, "low_freq_factor", "high_freq_factor"),
    "proportional": (),
}
_OPTIONAL: Mapping[str, tuple[str, ...]] = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("attention_factor", "factor"),
    "proportional": ("factor",),
}
_EVERYWHERE = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def read_rule(function: str, dim: Any, theta: Any, scaling: Any, max_position_embeddings: Any) -> Rule:
    """What `rotary_tables` was told, checked."""
    dim = reading.integer(function, "dim", dim, low=2)
    given, name = _given(function, scaling)
    said: dict[str, Any] = {}
    if max_position_embeddings is not None:
        most = reading.integer(function, "max_position_embeddings", max_position_embeddings, low=2)
        said["max_position_embeddings"] = most
        said[_TRAINED] = most
    for key, value in given.items():
        if key in _READ:
            said[key] = _READ[key](function, f"scaling[{key!r}]", value)
    if "factor" not in said and name in ("yarn", "longrope") and "max_position_embeddings" in said:
        said["factor"] = said["max_position_embeddings"] / said[_TRAINED]
    missing = [key for key in _NEEDED[name] if key not in said and key not in given]
    missing += ["factor"] if name == "longrope" and not said.keys() & {"factor", "attention_factor"} else []
    if missing:
        rule = f"{name!r} needs {', '.join(_how_to_say(name, key) for key in missing)}"
        raise ValueError(refusal(function, rule, ("scaling", reprlib.repr(dict(given)))))
    theta = _theta(function, theta, given)
    dim = _rotating(function, name, dim, said)
    for key in ("short_factor", "long_factor"):
        if key in given:
            said[key] = _factors(function, f"scaling[{key!r}]", given[key], dim // 2)
    _complete(function, name, said)
    return Rule(name, dim, theta, said)


def _given(function: str, scaling: Any) -> tuple[Mapping[str, Any], str]:
    """What a model's ``rope_parameters`` say, without what they leave open; and the name of the rule."""
    if scaling is None:
        return {}, "default"
    if not isinstance(scaling, Mapping):
        rule = "scaling has to be a dict, as rope_parameters of transformers, or None"
        raise TypeError(refusal(function, rule, ("scaling", reprlib.repr(scaling), type(scaling).__name__)))
    given = {key: value for key, value in scaling.items() if value is not None}
    names = [given[key] for key in ("rope_type", "type") if key in given]
    name = reading.choice(function, "scaling['rope_type']", names[0] if names else "default", tuple(_COMPUTED))
    if names and names[-1] != name:
        rule = "rope_type and type have to be the same"
        raise ValueError(refusal(function, rule, ("rope_type", repr(name)), ("type", reprlib.repr(names[-1]))))
    words = (*_NEEDED[name], *_OPTIONAL.get(name, ()))
    strangers = [key for key in given if key not in words and key not in _EVERYWHERE]
    if "max_position_embeddings" in given:
        strangers.append("max_position_embeddings")  # an argument of its own
    if strangers:
        rule = f"{name!r} is told nothing by {', '.join(map(str, strangers))}"
        raise ValueError(refusal(function, rule, ("scaling", reprlib.repr(scaling)), ("takes", ", ".join(words))))
    return given, name


def _how_to_say(name: str, key: str) -> str:
    """What a rule is not told, and how else it could be."""
    if key == "max_position_embeddings":
        return f"{key} (an argument)"
    derived = key == _TRAINED or (key == "factor" and name in ("yarn", "longrope"))
    return f"{key} (or max_position_embeddings)" if derived else key


def _theta(function: str, theta: Any, given: Mapping[str, Any]) -> float:
    bound: dict[str, Any] = {"rule": "finite and larger than 1", "ok": lambda x: x > 1}
    own = reading.number(function, "theta", theta, **bound) if theta is not None else None
    if "rope_theta" not in given:
        return DEFAULT_THETA if own is None else own
    models = reading.number(function, "scaling['rope_theta']", given["rope_theta"], **bound)
    if own is not None and own != models:
        rule = "theta and scaling['rope_theta'] have to be the same where both are given"
        raise ValueError(refusal(function, rule, ("theta", own), ("scaling['rope_theta']", models)))
    return models


def _rotating(function: str, name: str, dim: int, said: dict[str, Any]) -> int:
    """Features that have a place in the tables."""
    part = said.setdefault("partial_rotary_factor", 1.0)
    rotating = dim if name == "proportional" else int(dim * part)
    least = 4 if name == "dynamic" else 2
    if rotating % 2 or rotating < least:
        rule = f"dim has to be even and at least {least}, after partial_rotary_factor too"
        raise ValueError(refusal(function, rule, ("dim", dim), ("of these rotate", rotating)))
    return rotating


def _complete(function: str, name: str, said: dict[str, Any]) -> None:
    """What follows from the rest, where it was not said."""
    said.setdefault("factor", 1.0)
    if name == "yarn":
        for key, usual in (("beta_fast", 32.0), ("beta_slow", 1.0), ("truncate", True)):
            said.setdefault(key, usual)
        factor, numerator, denominator = said["factor"], said.get("mscale", 0.0), said.get("mscale_all_dim", 0.0)
        if not (numerator and denominator):
            numerator, denominator = 1.0, 0.0
        growth = 0.1 * math.log(max(1.0, factor))
        said.setdefault("attention_factor", (1 + numerator * growth) / (1 + denominator * growth))
    if name == "longrope":
        grown = math.log(max(1.0, said["factor"])) / math.log(said[_TRAINED])
        said.setdefault("attention_factor", math.sqrt(1 + grown))
    if name == "llama3" and said["high_freq_factor"] <= said["low_freq_factor"]:
        rule = "high_freq_factor has to be larger than low_freq_factor"
        shown = [(f"scaling[{key!r}]", said[key]) for key in ("high_freq_factor", "low_freq_factor")]
        raise ValueError(refusal(function, rule, *shown))


def _factors(function: str, name: str, values: Any, count: int) -> list[float]:
    if not isinstance(values, (list, tuple)) or len(values) != count:
        rule = f"{name} has to be a list of {count} numbers, one for each pair of features"
        length = len(values) if isinstance(values, (list, tuple)) else reprlib.repr(values)
        raise ValueError(refusal(function, rule, (name, f"{length}", type(values).__name__)))
    return [_positive(function, f"{name}[{i}]", value) for i, value in enumerate(values)]


def _positive(function: str, name: str, value: Any) -> float:
    return reading.number(function, name, value, rule="finite and positive", ok=lambda x: x > 0)


def _not_negative(function: str, name: str, value: Any) -> float:
    return reading.number(function, name, value, rule="finite and not negative", ok=lambda x: x >= 0)


_READ: Mapping[str, Callable[[str, str, Any], Any]] = {
    "factor": lambda *said: reading.number(*said, rule="finite and at least 1", ok=lambda x: x >= 1),
    _TRAINED: lambda *said: reading.integer(*said, low=2),
    "attention_factor": _positive,
    "beta_fast": _positive,
    "beta_slow": _positive,
    "low_freq_factor": _positive,
    "high_freq_factor": _positive,
    "mscale": _not_negative,
    "mscale_all_dim": _not_negative,
    "truncate": reading.flag,
    "partial_rotary_factor": lambda *said: reading.number(
        *said, rule="more than 0 and at most 1", ok=lambda x: 0 < x <= 1
    ),
}
