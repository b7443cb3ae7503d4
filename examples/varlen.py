"""Two sequences of different lengths in one call, without padding.

    python examples/varlen.py

They lie end to end, (total_q, num_heads, head_dim), and `cu_seqlens` says where each one begins. The right reference
is attention of *each sequence alone*: a causal mask over the whole of the packed rows would let the second sequence see
the first one, and gives other numbers. Exit status 1 if the call disagrees with the reference, or agrees with the wrong
one.
"""

from __future__ import annotations

import sys
from itertools import pairwise

import numpy as np

import cupyattn

LENGTHS = (300, 45)
NUM_HEADS, NUM_HEADS_KV, HEAD_DIM = 8, 2, 64
TOLERANCE = 1e-12


def alone(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Causal attention of one sequence by the formula, (seqlen, num_heads, head_dim)."""
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
    scores = np.where(np.tri(len(q), dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("hqk,khd->qhd", weights / weights.sum(axis=-1, keepdims=True), v)


def main() -> int:
    rng = np.random.default_rng(0)
    q = rng.standard_normal((sum(LENGTHS), NUM_HEADS, HEAD_DIM))
    k, v = rng.standard_normal((2, sum(LENGTHS), NUM_HEADS_KV, HEAD_DIM))
    cu_seqlens = np.array([0, *np.cumsum(LENGTHS)], np.int32)

    out = cupyattn.flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max(LENGTHS), max(LENGTHS), causal=True)

    parts = [slice(start, stop) for start, stop in pairwise(cu_seqlens)]
    expected = np.concatenate([alone(q[part], k[part], v[part]) for part in parts])
    apart, mistaken = (float(np.abs(out - other).max()) for other in (expected, alone(q, k, v)))
    print(f"cu_seqlens                                {cu_seqlens.tolist()}")
    print(f"from each sequence alone, the reference   {apart:.1e}")
    print(f"from one sequence of all rows, a mistake  {mistaken:.1e}")
    return int(not (apart < TOLERANCE < mistaken))


if __name__ == "__main__":
    sys.exit(main())
