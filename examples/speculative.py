"""Speculative decoding: a small model guesses some tokens ahead, a large one checks them all in one step.

    python examples/speculative.py

What the large model would not have said is taken back by `truncate`, of both models' caches. The tokens are those of
plain greedy decoding, whatever the small model guesses; only the number of the large model's steps depends on it. Here
the "small" model is the large one with weights of 3 bits of fraction, as a quantised copy has them. Exit status 1 if
the tokens differ.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import numpy as np
from decoder import Decoder, Sizes, draw_weights, generate

import cupyattn

AHEAD = 4
"""Tokens that are guessed before they are checked."""
PROMPT, NUM_TOKENS = 16, 48
SIZES = Sizes(num_heads_kv=2, num_heads=8, hidden_size=128, intermediate_size=256, num_layers=4, vocab_size=200)


class Run(NamedTuple):
    """What came of it."""

    tokens: np.ndarray
    """(1, num_tokens)"""
    steps: int
    """Of the large model, the prompt's among them."""
    accepted: int
    """Guesses that were right."""


def new_caches(decoder: Decoder) -> list[Any]:
    return [cupyattn.DynamicCache() for _ in range(decoder.sizes.num_layers)]


def guess(draft: Decoder, caches: list[Any], known: np.ndarray, count: int) -> np.ndarray:
    """The next tokens by the small model, (1, count), whose caches have not seen all of `known` yet."""
    ids, found = known[:, len(caches[0]) :], []
    for _ in range(count):
        ids = np.argmax(draft(ids, caches), axis=-1, keepdims=True)
        found.append(ids)
    return np.concatenate(found, axis=1)


def speculate(target: Decoder, draft: Decoder, prompt: np.ndarray, num_tokens: int, ahead: int = AHEAD) -> Run:
    """Greedy decoding by `target`, some steps of which `draft` saves."""
    of_target, of_draft = new_caches(target), new_caches(draft)
    known = np.concatenate([prompt, np.argmax(target(prompt, of_target), axis=-1, keepdims=True)], axis=1)
    steps, accepted = 1, 0
    while known.shape[1] < prompt.shape[1] + num_tokens:
        guesses = guess(draft, of_draft, known, ahead)
        # The last known token has not been seen yet. What it says, and what each guess says, is known after one step.
        ids = np.concatenate([known[:, -1:], guesses], axis=1)
        said = np.argmax(target.after_each(ids, of_target, ahead + 1), axis=-1)
        right = int(np.cumprod(guesses[0] == said[0, :-1]).sum())
        known = np.concatenate([known, said[:, : right + 1]], axis=1)
        for cache in (*of_target, *of_draft):
            cache.truncate(min(len(cache), known.shape[1] - 1))  # all but the last token, and no wrong guess
        steps, accepted = steps + 1, accepted + right
    return Run(known[:, prompt.shape[1] :][:, :num_tokens], steps, accepted)


def coarser(decoder: Decoder, bits: int = 3) -> Decoder:
    """The same with weights that are rounded to so many bits of fraction."""
    weights = {}
    for name, weight in decoder.weights.items():
        fraction, exponent = np.frexp(weight)
        weights[name] = np.ldexp(np.round(fraction * 2.0**bits) / 2.0**bits, exponent).astype(weight.dtype)
    return Decoder(weights, decoder.sizes)


def main() -> int:
    target = Decoder(draw_weights(SIZES), SIZES)
    prompt = np.random.default_rng(1).integers(0, SIZES.vocab_size, (1, PROMPT))
    expected, _ = generate(target, prompt, NUM_TOKENS)
    run = speculate(target, coarser(target), prompt, NUM_TOKENS)
    same = bool((run.tokens == expected).all())
    print(f"{NUM_TOKENS} tokens in {run.steps} steps of the large model; {run.accepted} guesses were right")
    print("the same tokens as without guesses" if same else "FAILED: other tokens than without guesses")
    return int(not same)


if __name__ == "__main__":
    sys.exit(main())
