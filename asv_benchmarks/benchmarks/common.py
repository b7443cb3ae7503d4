"""The contenders, their arrays, and a fair way to time them against each other."""

import time

import numpy as np

import cupyattn

try:
    from cupyattn.cpu import num_cores
except ImportError:  # asv has these files measure old commits, too
    from cupyattn.threads import num_cores

HEADS, HEAD_DIM = 8, 64

CAUSAL = ["full", "causal"]
"""The parameter as the tables show it."""

SAMPLE, TURN = 0.001, 0.05
"""Seconds over which short calls are averaged, and for which one contender is called before the next."""
PAUSE = 0.2
"""Seconds between turns: the BLAS's and OpenMP's threads spin on a core for a while after their last work,
and would take it from whoever comes next.  A contender's own spinning stays in its own time."""


class Benchmark:
    """What all benchmarks here share; `turns` is lowered where a rough number will do."""

    version = "1"
    timeout = 300
    turns = 7
    slow = (8192,)
    """Parameters that a quick look leaves out."""


def tracked(unit, bar=None, name=None):
    """Mark a track_ benchmark with its unit and its bar: the most it may be, None, or a function of the parameters.

    And with its name in asv's dashboards.
    """

    def mark(function):
        function.unit, function.bar = unit, bar
        return named(name)(function) if name else function

    return mark


def named(name):
    """Mark any benchmark with its name in asv's dashboards."""

    def mark(function):
        function.pretty_name = name
        return function

    return mark


def draw(seqlen, dtype, factor=1.0):
    """Standard normal q, k, v, "bhsd"; q and k times `factor`.

    In place: memory given back here would be taken up by the call whose memory is measured.
    """
    rng = np.random.default_rng(seqlen)
    q, k, v = (rng.standard_normal((1, HEADS, seqlen, HEAD_DIM), dtype) for _ in range(3))
    q *= factor
    k *= factor
    return q, k, v


def with_cupyattn(q, k, v, causal, compute_dtype=None):
    return lambda: cupyattn.attention(q, k, v, layout="bhsd", causal=causal == "causal", compute_dtype=compute_dtype)


def as_tensors(*arrays):
    """torch, and the arrays in it; it works on as many cores as cupyattn may take."""
    try:
        import torch
    except ImportError:
        raise NotImplementedError("torch is not installed") from None
    torch.set_num_threads(num_cores())
    return torch, [torch.from_numpy(x) for x in arrays]


def with_torch(q, k, v, causal, compute_dtype=None):
    """torch's own kernel, in the dtype of the arrays."""
    torch, tensors = as_tensors(q, k, v)
    return lambda: torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=causal == "causal")


def with_naive(q, k, v, causal, compute_dtype=None):
    """The formula with all its scores in memory, once and in place where that is easy; in the arrays' dtype."""

    def attend():
        scores = q @ k.swapaxes(-1, -2)
        scores *= q.shape[-1] ** -0.5
        if causal == "causal":
            scores = np.where(np.tri(q.shape[-2], k.shape[-2], dtype=bool), scores, -np.inf)
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        return scores @ v

    return attend


CONTENDERS = {"cupyattn": with_cupyattn, "torch": with_torch, "naive": with_naive}


def fastest(*calls, turns):
    """Seconds per call of each contender, the best sample of `turns` turns.

    They take turns in one process, so that a noisy neighbour hits them all, and the best sample is one
    without a neighbour.  The first call of each is not timed: it meets cold caches and fresh memory.
    """
    numbers = []
    for call in calls:
        call()
        numbers.append(max(1, round(SAMPLE / _sample(call, 1))))
    best = [np.inf] * len(calls)
    for _ in range(turns):
        for i, call in enumerate(calls):
            time.sleep(PAUSE)
            over = time.perf_counter() + TURN
            while True:
                best[i] = min(best[i], _sample(call, numbers[i]))
                if time.perf_counter() >= over:
                    break
    return best


def _sample(call, number):
    start = time.perf_counter()
    for _ in range(number):
        call()
    return (time.perf_counter() - start) / number
