"""The same model again, written to be believed: float64 NumPy, one sentence at a time, no padding, no mask.

It shares no code with `encoder`, so that a mistake in one of them shows as a difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

_erf = np.vectorize(math.erf, otypes=[np.float64])


def widen(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights in float64, which holds every float32 exactly."""
    return {name: weight.astype(np.float64) for name, weight in weights.items()}


def embed(weights: Mapping[str, np.ndarray], config: Mapping[str, Any], ids: np.ndarray) -> np.ndarray:
    """Embed the tokens of one sentence: (seqlen,) to (hidden_size,), of length 1."""

    def dense(name: str, x: np.ndarray) -> np.ndarray:
        return np.einsum("sc,dc->sd", x, weights[name + ".weight"], optimize=True) + weights[name + ".bias"]

    def normalize(name: str, x: np.ndarray) -> np.ndarray:
        deviation = np.sqrt(x.var(axis=-1) + config["layer_norm_eps"])
        return ((x.T - x.mean(axis=-1)) / deviation).T * weights[name + ".weight"] + weights[name + ".bias"]

    hidden = (
        weights["embeddings.word_embeddings.weight"][ids]
        + weights["embeddings.position_embeddings.weight"][np.arange(len(ids))]
        + weights["embeddings.token_type_embeddings.weight"][0]
    )
    hidden = normalize("embeddings.LayerNorm", hidden)
    for layer in range(config["num_hidden_layers"]):
        name = f"encoder.layer.{layer}"
        q, k, v = (
            np.split(dense(f"{name}.attention.self.{part}", hidden), config["num_attention_heads"], axis=-1)
            for part in ("query", "key", "value")
        )
        attended = np.concatenate([attention(*head) for head in zip(q, k, v, strict=True)], axis=-1)
        attended = dense(f"{name}.attention.output.dense", attended)
        hidden = normalize(f"{name}.attention.output.LayerNorm", hidden + attended)
        wide = dense(f"{name}.intermediate.dense", hidden)
        wide = wide * (1 + _erf(wide / np.sqrt(2))) / 2
        hidden = normalize(f"{name}.output.LayerNorm", hidden + dense(f"{name}.output.dense", wide))
    mean = hidden.mean(axis=0)
    return mean / np.linalg.norm(mean)


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The formula for one head: softmax(q k^T / sqrt(head_dim)) v."""
    scores = q @ k.T / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True) @ v
