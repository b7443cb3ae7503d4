"""A long prompt in chunks, as servers compute it between the decoding steps of others.

    python examples/chunked_prefill.py

Each chunk's queries see all keys so far, and of their own chunk those up to themselves: a causal mask whose diagonal
ends in the last key of the last row. That is one keyword, alignment="bottom-right", and what a cache's `attend` means
anyway. "top-left" puts the diagonal at key 0 instead, which is right for the first chunk alone. Exit status 1 if the
chunks are not what the whole prompt at once is.
"""

from __future__ import annotations

import sys

import numpy as np

import cupyattn

SEQLEN, CHUNK = 1000, 256
NUM_HEADS, NUM_HEADS_KV, HEAD_DIM = 8, 2, 64
TOLERANCE = 1e-12


def in_chunks(q: np.ndarray, k: np.ndarray, v: np.ndarray, alignment: str) -> np.ndarray:
    """Attention of a prompt, CHUNK queries at a time."""
    parts = []
    for start in range(0, q.shape[1], CHUNK):
        stop = min(start + CHUNK, q.shape[1])
        parts.append(cupyattn.attention(q[:, start:stop], k[:, :stop], v[:, :stop], causal=True, alignment=alignment))
    return np.concatenate(parts, axis=1)


def through_a_cache(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The same, with the keys and values so far in a cache."""
    cache, parts = cupyattn.StaticCache(q.shape[1]), []
    for start in range(0, q.shape[1], CHUNK):
        chunk = slice(start, start + CHUNK)
        cache.append(k[:, chunk], v[:, chunk])
        parts.append(cache.attend(q[:, chunk]))
    return np.concatenate(parts, axis=1)


def main() -> int:
    rng = np.random.default_rng(0)
    q = rng.standard_normal((1, SEQLEN, NUM_HEADS, HEAD_DIM))
    k, v = rng.standard_normal((2, 1, SEQLEN, NUM_HEADS_KV, HEAD_DIM))
    whole = cupyattn.attention(q, k, v, causal=True)
    right, cached, mistaken = (
        float(np.abs(out - whole).max())
        for out in (in_chunks(q, k, v, "bottom-right"), through_a_cache(q, k, v), in_chunks(q, k, v, "top-left"))
    )
    print(f"{SEQLEN} tokens, {CHUNK} at a time: largest difference from the whole prompt at once")
    print(f'  alignment="bottom-right"        {right:.1e}')
    print(f"  StaticCache, append and attend  {cached:.1e}")
    print(f'  alignment="top-left", a mistake {mistaken:.1e}')
    return int(not (max(right, cached) < TOLERANCE < mistaken))


if __name__ == "__main__":
    sys.exit(main())
