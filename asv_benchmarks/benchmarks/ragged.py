"""Many short sequences on the CPU, packed, against the same work as a batch.

One head of size 16, float32 arrays.  Equal lengths are 16, the others drawn from 8 to 64 alike for q and k; the batch
has as many sequences, all of the mean length, which is harder to keep up with than the longest.
"""

import numpy as np

import cupyattn

from .common import CAUSAL, Benchmark, fastest, tracked

SEQUENCES, HEAD_DIM = 10_000, 16


def draw_lengths(kind):
    return np.full(SEQUENCES, 16) if kind == "equal" else np.random.default_rng(0).integers(8, 65, SEQUENCES)


def draw(*shape):
    """Standard normal q, k and v."""
    return np.random.default_rng(0).standard_normal((3, *shape, 1, HEAD_DIM), np.float32)


BARS = {"equal": 2.0, "drawn": 4.0}


class Varlen(Benchmark):
    """Time of flash_attn_varlen_func over that of attention() on the batch."""

    params = (["equal", "drawn"], ["forward", "backward"], ["float64", "float32"], CAUSAL)
    param_names = ("lengths", "direction", "compute_dtype", "causal")
    slow = ("backward",)

    def setup(self, lengths, direction, compute_dtype, causal):
        counts = draw_lengths(lengths)
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        packed, batch = draw(starts[-1]), draw(SEQUENCES, round(counts.mean()))
        options = {"causal": causal == "causal", "compute_dtype": compute_dtype}

        def varlen(q, k, v, starts):
            longest = int(counts.max())
            return cupyattn.flash_attn_varlen_func(q, k, v, starts, starts, longest, longest, **options)

        def dense(*arrays):
            return cupyattn.attention(*arrays, **options)

        going = forwards if direction == "forward" else backwards
        self.calls = going(varlen, (*packed, starts)), going(dense, batch)

    @tracked(
        "time / batch",
        lambda lengths, *_: BARS[lengths],
        "Packed sequences: time over a batch's",
    )
    def track_time(self, lengths, direction, compute_dtype, causal):
        packed, batch = fastest(*self.calls, turns=min(self.turns, 3))
        return packed / batch


def forwards(function, arrays):
    return lambda: function(*arrays)


def backwards(function, arrays):
    """Gradients of q, k and v, with out and lse kept where the arithmetic is in the arrays' dtype."""
    try:
        import torch
    except ImportError:
        raise NotImplementedError("torch is not installed") from None
    tensors = [torch.from_numpy(x) for x in arrays]
    leaves = [x.requires_grad_() for x in tensors[:3]]
    out = function(*tensors)
    dout = torch.from_numpy(np.ones(out.shape, np.float32))
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)
