"""Decoding on the CPU: one query, the heads of Qwen2-7B, over the keys of a context.

float32 arrays and arithmetic, one sequence.  Time is that of reading the keys and values once, if all
goes well.
"""

import numpy as np

import cupyattn

from .common import Benchmark, as_tensors, fastest, named, tracked

QUERY_HEADS, KEY_HEADS, HEAD_DIM = 28, 4, 128


def draw_step(context):
    """Standard normal q of one token, k and v of `context`, "bhsd"."""
    rng = np.random.default_rng(context)
    shapes = (QUERY_HEADS, 1), (KEY_HEADS, context), (KEY_HEADS, context)
    return [rng.standard_normal((1, *shape, HEAD_DIM), np.float32) for shape in shapes]


def with_cupyattn(q, k, v):
    return lambda: cupyattn.attention(q, k, v, layout="bhsd", compute_dtype="float32")


def with_enable_gqa(q, k, v):
    """torch's kernel, told that key heads are shared."""
    torch, tensors = as_tensors(q, k, v)
    return lambda: torch.nn.functional.scaled_dot_product_attention(*tensors, enable_gqa=True)


def with_repeated_keys(q, k, v):
    """torch's kernel on a key head for each query head; that they were repeated is not in the time."""
    group = QUERY_HEADS // KEY_HEADS
    torch, tensors = as_tensors(q, k.repeat(group, axis=1), v.repeat(group, axis=1))
    return lambda: torch.nn.functional.scaled_dot_product_attention(*tensors)


PEERS = {"enable_gqa": with_enable_gqa, "repeated keys": with_repeated_keys}
CONTENDERS = {"cupyattn": with_cupyattn, **PEERS}


class Step(Benchmark):
    """Time of one step."""

    params = (list(CONTENDERS), [1024, 4096, 16384])
    param_names = ("contender", "context")
    rounds, repeat, warmup_time = 1, (3, 7, 5.0), 0.2

    def setup(self, contender, context):
        self.call = CONTENDERS[contender](*draw_step(context))
        self.call()

    @named("Decode: time of a step")
    def time_call(self, contender, context):
        self.call()


class DecodeAgainstTorch(Benchmark):
    """Time of one step over that of torch's scaled_dot_product_attention, both on the same tensors."""

    params = (list(PEERS), [1024, 4096, 16384])
    param_names = ("peer", "context")
    slow = (16384,)

    def setup(self, peer, context):
        arrays = draw_step(context)
        self.ours, self.peer = with_cupyattn(*as_tensors(*arrays)[1]), PEERS[peer](*arrays)

    @tracked("time / torch", lambda _, context: 1.0 if context == 4096 else None, "Decode: time over torch's")
    def track_time(self, peer, context):
        mine, theirs = fastest(self.ours, self.peer, turns=self.turns)
        return mine / theirs
