"""How the CPU cuts a part of a problem: the rule for its tile."""

from __future__ import annotations

from functools import lru_cache

from cupyattn.plan.values import CpuTile
from cupyattn.problem import Problem, Sizes

BLOCK_Q, BLOCK_K = 512, 384
"""Rows and keys of a block of scores, the best of those tried: taller blocks make better matrix products and
wider ones fewer steps of Python, until they leave a core's second-level cache too far behind."""
SCORES_SIDE_BY_SIDE = 2**19
"""Scores a tile may hold when it takes several small heads or many keys at once, 4 MB of float64."""
NUMBERS_SIDE_BY_SIDE = 2**19
"""Numbers of q, k and v that a tile may hold when it takes several batches at once, 4 MB of float64."""
MOST_KEYS = 8192
FEWEST_ROWS = 128
"""Splitting rows further over more threads costs more than it gains."""
NARROW = 256
"""Keys of a window up to which short tiles gain more, by the scores that they leave out, than their steps cost."""
TILES_PER_WORKER = 2
"""So that nobody waits long for the last one; more were more steps of Python, which one thread takes at a time."""
SOON_OVER = 2**28
"""Cost of a forward pass up to which heads are set side by side until each worker has one tile: its steps of Python are
a larger part of it than waiting for the last one is.  Not of a few rows, whose keys are read rather than multiplied, by
whoever is there first."""
WORTH_THREADS = 75_000_000
"""Cost from which a second thread gains more than it takes to begin."""
COST_OF_A_NUMBER = 16
"""Multiplications that take as long as reading a number, or writing it."""


def cpu_cost(scores: int, numbers: int, head_dims: int) -> int:
    """Roughly, in floating-point operations: of `scores`, and of `numbers` of rows and keys of `head_dims` columns."""
    return 2 * (scores + COST_OF_A_NUMBER * numbers) * head_dims


def num_cpu_workers(problem: Problem, num_cores: int, live: float = 1.0) -> int:
    """Threads of a call, of whose keys a share is `live`, where a cache has room for more."""
    sizes = problem.sizes
    visible = problem.mask.count_visible(sizes.seqlen_q, sizes.seqlen_k)
    keys = min(visible, sizes.seqlen_k) * max(sizes.num_heads_k, sizes.num_heads_v)
    scores = sizes.batch * sizes.num_heads * visible
    numbers = sizes.batch * (sizes.num_heads * sizes.seqlen_q + live * keys)
    cost = cpu_cost(int(live * scores), int(numbers), sizes.head_dim + sizes.head_dim_v)
    return num_cores if cost >= WORTH_THREADS else 1


@lru_cache(maxsize=4096)
def cpu_tile(
    sizes: Sizes,
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    num_workers: int,
    band_width: int | None = None,
    gradients: bool = False,
) -> CpuTile:
    """How to cut a part: tall blocks of scores, and several heads or batches side by side if they are small.

    `band_width` is that of the mask.  All keys that any row of a tile sees are scored for all of its rows, so that a
    window narrower than a tall tile is cut into short ones: 128 rows behind 64 keys take a third of the scores of 512.

    Several workers get `TILES_PER_WORKER` tiles each, as far as there are rows to share out, and heads are stacked or
    set side by side only where every worker still has as many, or one, if the call is soon over.
    """
    group = sizes.queries_per_pair
    num_pairs = max(1, sizes.num_heads // group)
    enough = TILES_PER_WORKER * num_workers if num_workers > 1 else 1
    room_for_scores = SCORES_SIDE_BY_SIDE
    if gradients:  # which hold two blocks of scores at once, and walk over them more often
        room_for_scores //= 4
    block_q = max(1, min(seqlen_q, BLOCK_Q))
    if band_width is not None and band_width <= min(NARROW, seqlen_k - 1) and seqlen_q >= 2 * FEWEST_ROWS:
        block_q = FEWEST_ROWS
    elif group > 1 and band_width is not None:  # a few rows of each head: the band's edge cuts off more of their keys
        block_q = min(block_q, max(FEWEST_ROWS, min(BLOCK_Q // 2, seqlen_q // 4)))
    while block_q >= 2 * FEWEST_ROWS and batch * sizes.num_heads * -(-seqlen_q // block_q) < enough:
        block_q = -(-block_q // 2)
    tiles = batch * sizes.num_heads * -(-seqlen_q // block_q)
    heads = max(1, min(group, BLOCK_Q // block_q, tiles // num_workers))
    rows = block_q * heads
    block_k = max(1, min(seqlen_k, MOST_KEYS, max(BLOCK_K, room_for_scores // rows)))
    pairs = batches = 1
    each_has_its_keys = sizes.num_heads_k == sizes.num_heads_v == num_pairs
    if heads == group and each_has_its_keys and block_k == seqlen_k:
        scores, head_dims = batch * sizes.num_heads * seqlen_q * seqlen_k, sizes.head_dim + sizes.head_dim_v
        if not gradients and rows >= FEWEST_ROWS and cpu_cost(scores, 0, head_dims) <= SOON_OVER:
            enough = num_workers
        room = min(room_for_scores // (rows * block_k), num_pairs * batch // enough)
        pairs = max(1, min(num_pairs, room))
        numbers = sizes.num_heads * block_q * sizes.head_dim + num_pairs * seqlen_k * (
            sizes.head_dim + sizes.head_dim_v
        )
        if pairs == num_pairs:
            batches = max(1, min(batch, room // pairs, NUMBERS_SIDE_BY_SIDE // max(1, numbers)))
    return CpuTile(block_q, block_k, heads, pairs, batches)
