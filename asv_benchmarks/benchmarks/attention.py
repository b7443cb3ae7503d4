"""attention() on the CPU: its time against torch and the naive formula, and its rounding.

One batch, eight heads of size 64.  Ratios are taken in one process; less is better everywhere, so that
asv's one-sided step detection sees what gets worse.
"""

import numpy as np

import cupyattn

from .common import (
    CAUSAL,
    CONTENDERS,
    HEAD_DIM,
    Benchmark,
    as_tensors,
    draw,
    fastest,
    named,
    tracked,
    with_cupyattn,
    with_naive,
    with_torch,
)


class Forward(Benchmark):
    """Time of one call, each contender in the dtype of the arrays."""

    params = (list(CONTENDERS), [256, 2048], CAUSAL, ["float32", "float64"])
    param_names = ("contender", "seqlen", "causal", "dtype")
    rounds, repeat, warmup_time = 1, (3, 7, 5.0), 0.2

    def setup(self, contender, seqlen, causal, dtype):
        self.call = CONTENDERS[contender](*draw(seqlen, dtype), causal, dtype)
        self.call()  # the first one imports and asks for memory

    @named("Prefill: time")
    def time_call(self, contender, seqlen, causal, dtype):
        self.call()


BARS = {"float64": 1.1, "float32": 1.15, "float32 q,k x10": 1.35}


class AgainstTorch(Benchmark):
    """Time over that of torch's scaled_dot_product_attention, both on the same tensors and in their dtype.

    Standard normal q and k have scores whose exponential needs no running maximum; ten times larger
    q and k need it.
    """

    params = ([2048, 8192], CAUSAL, list(BARS))
    param_names = ("seqlen", "causal", "arrays")

    def setup(self, seqlen, causal, arrays):
        dtype, _, sharp = arrays.partition(" ")
        self.arrays, self.dtype = draw(seqlen, dtype, 10.0 if sharp else 1.0), dtype
        self.peer = with_torch(*self.arrays, causal)

    @tracked(
        "time / torch",
        lambda _, __, arrays: BARS[arrays],
        "Prefill: time over torch's",
    )
    def track_time(self, seqlen, causal, arrays):
        ours = with_cupyattn(*as_tensors(*self.arrays)[1], causal, self.dtype)
        mine, theirs = fastest(ours, self.peer, turns=min(self.turns, 3) if seqlen > 4096 else self.turns)
        return mine / theirs


class TrainingAgainstTorch(Benchmark):
    """Time of forward and backward over torch's, both through torch's autograd and in the dtype of the tensors.

    A batch of two, eight query heads over two key heads; lse is not asked for.
    """

    params = ([512, 2048], CAUSAL, ["float32", "float64"])
    param_names = ("seqlen", "causal", "dtype")

    def setup(self, seqlen, causal, dtype):
        torch, _ = as_tensors()
        rng = np.random.default_rng(seqlen)
        q, dout, k, v = (
            torch.from_numpy(rng.standard_normal((2, heads, seqlen, HEAD_DIM), dtype)) for heads in (8, 8, 2, 2)
        )
        leaves = [x.requires_grad_() for x in (q, k, v)]
        is_causal = causal == "causal"

        def ours():
            out = cupyattn.attention(*leaves, layout="bhsd", causal=is_causal, compute_dtype=dtype)
            torch.autograd.grad(out, leaves, dout)

        def theirs():
            sdpa = torch.nn.functional.scaled_dot_product_attention
            torch.autograd.grad(sdpa(*leaves, is_causal=is_causal, enable_gqa=True), leaves, dout)

        self.calls = ours, theirs

    @tracked("time / torch", 1.2, "Training: time over torch's")
    def track_time(self, seqlen, causal, dtype):
        mine, theirs = fastest(*self.calls, turns=self.turns)
        return mine / theirs


def bar_against_naive(seqlen, causal, compute_dtype):
    """Never slower, and at 2048 twice or four times as fast; float64 is there to be seen beside it."""
    if compute_dtype == "float64":
        return None
    if seqlen < 2048:
        return 1.0
    return {"full": 1 / 2, "causal": 1 / 4}[causal]


class AgainstNaive(Benchmark):
    """Time over that of the naive formula in float32, float32 arrays."""

    params = ([256, 512, 1024, 2048], CAUSAL, ["float32", "float64"])
    param_names = ("seqlen", "causal", "compute_dtype")

    def setup(self, seqlen, causal, compute_dtype):
        self.arrays = draw(seqlen, "float32")

    @tracked("time / naive", bar_against_naive, "Prefill: time over the naive formula's")
    def track_time(self, seqlen, causal, compute_dtype):
        ours = with_cupyattn(*self.arrays, causal, compute_dtype)
        mine, theirs = fastest(ours, with_naive(*self.arrays, causal), turns=self.turns)
        return mine / theirs


class Rounding(Benchmark):
    """Float32 arrays, default arithmetic: is the result the exact one, rounded once?

    "Exact" is the formula in extended precision; its own error moves a rounding once in thousands.
    """

    params = (CAUSAL, [1.0, 10.0])
    param_names = ("causal", "factor of q and k")
    seqlen = 512

    def setup(self, causal, factor):
        if np.finfo(np.longdouble).nmant < 63:
            raise NotImplementedError("needs a longdouble that is longer than a double")
        q, k, v = draw(self.seqlen, "float32", factor)
        self.exact = with_naive(*(x.astype(np.longdouble) for x in (q, k, v)), causal)()
        self.out = with_cupyattn(q, k, v, causal)()

    @tracked("share not correctly rounded", 0.001, "Rounding: share that is wrong")
    def track_wrong(self, causal, factor):
        return float(np.mean(self.out != self.exact.astype(np.float32)))

    @tracked("ulp, largest error", 1.0, "Rounding: largest error")
    def track_largest(self, causal, factor):
        ulp = np.spacing(np.abs(self.exact).astype(np.float32))
        return float(np.max(np.abs(self.out - self.exact) / ulp))
