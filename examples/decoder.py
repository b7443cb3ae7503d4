"""A decoder in the shape of Qwen2 for any array library, and a cache of keys and values for it.

The weights are random, under the names that transformers gives them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from array_api_compat import array_namespace

import cupyattn

Array: TypeAlias = Any


class Sizes(NamedTuple):
    """How many of everything, and two constants."""

    num_heads_kv: int
    num_heads: int = 16
    hidden_size: int = 512
    intermediate_size: int = 1024
    num_layers: int = 4
    vocab_size: int = 1000
    rope_theta: float = 1e6
    norm_eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


def draw_weights(sizes: Sizes, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights by name, float32; large enough for attention to be far from uniform."""
    generator = np.random.default_rng(seed)

    def normal(*shape: int, spread: float) -> np.ndarray:
        return spread * generator.standard_normal(shape, dtype=np.float32)

    hidden, wide = sizes.hidden_size, sizes.intermediate_size
    weights = {}
    for layer in range(sizes.num_layers):
        name = f"model.layers.{layer}"
        for part, heads in (("q", sizes.num_heads), ("k", sizes.num_heads_kv), ("v", sizes.num_heads_kv)):
            rows = heads * sizes.head_dim
            weights[f"{name}.self_attn.{part}_proj.weight"] = normal(rows, hidden, spread=1.5 * hidden**-0.5)
            weights[f"{name}.self_attn.{part}_proj.bias"] = normal(rows, spread=0.1)
        weights[f"{name}.self_attn.o_proj.weight"] = normal(hidden, hidden, spread=2.0 * hidden**-0.5)
        for part, shape in (("gate", (wide, hidden)), ("up", (wide, hidden)), ("down", (hidden, wide))):
            weights[f"{name}.mlp.{part}_proj.weight"] = normal(*shape, spread=shape[1] ** -0.5)
        for part in ("input", "post_attention"):
            weights[f"{name}.{part}_layernorm.weight"] = 1.0 + normal(hidden, spread=0.1)
    weights["model.embed_tokens.weight"] = normal(sizes.vocab_size, hidden, spread=1.0)
    weights["model.norm.weight"] = 1.0 + normal(hidden, spread=0.1)
    weights["lm_head.weight"] = normal(sizes.vocab_size, hidden, spread=hidden**-0.5)
    return weights


PAGE_SIZE = 16


def paged_cache(num_tokens: int) -> cupyattn.PagedCache:
    """The cache of one layer, with room for so many tokens of all sequences."""
    return cupyattn.PagedCache(-(-num_tokens // PAGE_SIZE), PAGE_SIZE)


@dataclass(frozen=True)
class Decoder:
    """Qwen2, in the array library that its weights are in."""

    weights: Mapping[str, Array]
    sizes: Sizes
    compute_dtype: str | None = None
    """Of the arithmetic inside attention."""

    def __call__(self, ids: Array, caches: Sequence[Any]) -> Array:
        """Logits of the token after the last one, (batch, vocab_size); the caches, one a layer, grow by `ids`."""
        return self.after_each(ids, caches, 1)[:, 0, :]

    def after_each(self, ids: Array, caches: Sequence[Any], count: int) -> Array:
        """The same of the token after each of the last `count` ones, (batch, count, vocab_size)."""
        xp = array_namespace(ids)
        words = self.weights["model.embed_tokens.weight"]
        hidden = xp.reshape(xp.take(words, xp.reshape(ids, (-1,)), axis=0), (*ids.shape, -1))
        angles = self._angles(xp, len(caches[0]), ids.shape[1])
        for layer, cache in enumerate(caches):
            hidden = self._layer(f"model.layers.{layer}", hidden, angles, cache)
        return self._normalize("model.norm", hidden[:, -count:, :]) @ self.weights["lm_head.weight"].T

    def _layer(self, name: str, hidden: Array, angles: tuple[Array, Array], cache: Any) -> Array:
        xp = array_namespace(hidden)
        inputs = self._normalize(f"{name}.input_layernorm", hidden)
        by_head = (*hidden.shape[:2], -1, self.sizes.head_dim)
        q, k, v = (xp.reshape(self._dense(f"{name}.self_attn.{part}_proj", inputs), by_head) for part in "qkv")
        cache.append(rotate(k, *angles), v)
        attended = cache.attend(rotate(q, *angles), compute_dtype=self.compute_dtype)
        hidden = hidden + xp.reshape(attended, hidden.shape) @ self.weights[f"{name}.self_attn.o_proj.weight"].T
        inputs = self._normalize(f"{name}.post_attention_layernorm", hidden)
        gate, up = (inputs @ self.weights[f"{name}.mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        return hidden + (gate / (1.0 + xp.exp(-gate)) * up) @ self.weights[f"{name}.mlp.down_proj.weight"].T

    def _dense(self, name: str, inputs: Array) -> Array:
        return inputs @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def _normalize(self, name: str, inputs: Array) -> Array:
        xp = array_namespace(inputs)
        square = xp.mean(inputs * inputs, axis=-1, keepdims=True)
        return inputs / xp.sqrt(square + self.sizes.norm_eps) * self.weights[f"{name}.weight"]

    def _angles(self, xp: Any, start: int, count: int) -> tuple[Array, Array]:
        """Cosine and sine of each position's rotations, (count, 1, head_dim / 2)."""
        half = xp.arange(0, self.sizes.head_dim, 2, dtype=xp.float32) / self.sizes.head_dim
        turns = xp.arange(start, start + count, dtype=xp.float32)[:, None] / self.sizes.rope_theta**half
        return xp.cos(turns)[:, None, :], xp.sin(turns)[:, None, :]


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotary positions: the pairs are features i and i + head_dim / 2."""
    xp = array_namespace(x)
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return xp.concat([a * cos - b * sin, a * sin + b * cos], axis=-1)


def generate(
    decoder: Decoder, prompt: Array, num_tokens: int, new_cache: Callable[[int], Any] = paged_cache
) -> tuple[Array, list[Any]]:
    """The most likely tokens after a prompt, (batch, num_tokens), and the caches, a new one for each layer."""
    xp = array_namespace(prompt)
    batch, seqlen = prompt.shape
    caches = [new_cache(batch * (seqlen + num_tokens)) for _ in range(decoder.sizes.num_layers)]
    ids, tokens = prompt, []
    for _ in range(num_tokens):
        ids = xp.argmax(decoder(ids, caches), axis=-1, keepdims=True)
        tokens.append(ids)
    return xp.concat(tokens, axis=1), caches
