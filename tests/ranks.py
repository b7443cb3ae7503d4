"""What these tests share: a call on all ranks, and the same on one device."""

import numpy as np

from cupyattn import attention, attention_backward
from cupyattn.distributed import Sharding, ring_attention, ring_attention_backward, run_ranks
from cupyattn.distributed import shard_sequence as shard
from cupyattn.distributed import unshard_sequence as unshard

TIMEOUT = 120.0


def draw(rng, seqlen_q=21, seqlen_k=None, *, batch=2, heads=(4, 2), head_dim_v=6, dtype=np.float64):
    """q, k, v and dout of the whole sequence."""
    seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
    shapes = (
        (batch, seqlen_q, heads[0], 8),
        (batch, seqlen_k, heads[1], 8),
        (batch, seqlen_k, heads[1], head_dim_v),
        (batch, seqlen_q, heads[0], head_dim_v),
    )
    return [(rng.standard_normal(shape) + 0.25).astype(dtype) for shape in shapes]


def on_ranks(arrays, size, kind, options, forward=ring_attention, backward=ring_attention_backward, gives_state=True):
    """(out, lse, gradients) of the whole, by all ranks; replicated gradients as their sum."""
    q, k, v, dout = arrays
    rows, keys = (Sharding(kind, size, (x.shape[1],)) for x in (q, k))

    def rank(comm):
        mine = [shard(x, layout, comm.rank) for x, layout in ((q, rows), (k, keys), (v, keys))]
        own = {**options, "comm": comm, "sharding": kind}
        for word in ("mask", "bias"):
            if word in own and own[word].shape[-2] > 1:
                own[word] = shard(own[word], rows, comm.rank, axis=-2)
        out, lse = forward(*mine, **own, return_lse=True)
        state = {"out": out, "lse": lse} if gives_state else {}
        return out, lse, backward(shard(dout, rows, comm.rank), *mine, **state, **own)

    outs, lses, found = zip(*run_ranks(rank, size, timeout=TIMEOUT), strict=True)
    gradients = {
        name: unshard([getattr(x, name) for x in found], layout)
        for name, layout in (("dq", rows), ("dk", keys), ("dv", keys))
    }
    if found[0].dbias is not None:
        of_rows = found[0].dbias.shape[-2] > 1
        shares = [x.dbias for x in found]
        gradients["dbias"] = unshard(shares, rows, axis=-2) if of_rows else sum(shares)
    for name in ("dsinks", "dalibi_slopes"):
        if getattr(found[0], name) is not None:
            gradients[name] = sum(getattr(x, name) for x in found)
    return unshard(outs, rows), unshard(lses, rows, axis=2), gradients


def on_one_device(arrays, options):
    q, k, v, dout = arrays
    out, lse = attention(q, k, v, return_lse=True, **options)
    found = attention_backward(dout, q, k, v, **options)
    return out, lse, {name: x for name, x in found._asdict().items() if x is not None}


def drawn_options(rng, seqlen_q=21, seqlen_k=21):
    """Every argument of `attention` that there is here, by a name for each set of them."""
    slopes = np.array([0.1, 0.2, 0.3, 0.4])
    return {
        "nothing": {},
        "causal": {"causal": True},
        "a window": {"window_size": (3, 2)},
        "a causal window": {"causal": True, "window_size": (5, None)},
        "a window that sees little": {"window_size": (0, 0)},
        "softcap and sinks": {"causal": True, "softcap": 2.0, "sinks": np.array([0.0, 1.0, -1.0, np.inf])},
        "ALiBi": {"causal": True, "alibi_slopes": slopes},
        "ALiBi both ways": {"window_size": (4, 7), "alibi_slopes": np.stack([slopes, 2 * slopes])},
        "mask and bias": {
            "mask": rng.random((2, 1, seqlen_q, seqlen_k)) < 0.7,
            "bias": rng.standard_normal((4, seqlen_q, seqlen_k)),
        },
        "a mask of keys, a bias of rows": {
            "mask": rng.random((2, 1, 1, seqlen_k)) < 0.7,
            "bias": rng.standard_normal((seqlen_q, 1)),
        },
        "a scale": {"softmax_scale": -0.3, "causal": True},
    }
