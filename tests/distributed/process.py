"""One rank of the tests of engines that have processes, run as a script: `process.py ENGINE WHAT`.

WHAT is "agree": compare with one device and say so; "raise" and "die": rank 1 does, and the others have to notice;
"differ": rank 1 asks for something else.
"""

import os
import sys
import time

import numpy as np

from cupyattn import attention, attention_backward
from cupyattn.distributed import (
    MpiComm,
    RankFailed,
    Sharding,
    TorchComm,
    ring_attention,
    ring_attention_backward,
    shard_sequence,
    sharded_decode,
    ulysses_attention,
)

TIMEOUT = 120.0


def engine(name):
    if name == "mpi":
        return MpiComm(timeout=TIMEOUT)
    import torch.distributed

    torch.distributed.init_process_group("gloo")
    return TorchComm(timeout=TIMEOUT)


def agree(comm):
    """Every function, in float64 and bfloat16's storage, is attention."""
    rng = np.random.default_rng(0)
    q, k, v, dout = rng.standard_normal((4, 1, 13, 4, 8))
    layout = Sharding("zigzag", comm.size, (13,))
    mine = [shard_sequence(x, layout, comm.rank) for x in (q, k, v)]
    options = {"comm": comm, "sharding": layout, "causal": True}
    out, whole = ring_attention(*mine, **options), attention(q, k, v, causal=True)
    np.testing.assert_allclose(out, shard_sequence(whole, layout, comm.rank), atol=1e-13)
    np.testing.assert_allclose(ulysses_attention(*mine, **options), out, atol=1e-13)
    gradients = ring_attention_backward(shard_sequence(dout, layout, comm.rank), *mine, **options)
    expected = attention_backward(dout, q, k, v, causal=True)
    for actual, wanted in zip(gradients[:3], expected[:3], strict=True):
        np.testing.assert_allclose(actual, shard_sequence(wanted, layout, comm.rank), atol=1e-12)
    found = sharded_decode(q[:, -1:], *mine[1:], comm=comm, sharding=layout)
    np.testing.assert_allclose(found, attention(q[:, -1:], k, v), atol=1e-13)
    one_head = [x[:, :, :1] for x in mine]  # all ranks but one have nothing to do
    found = ulysses_attention(*one_head, comm=comm, sharding=layout, causal=True)
    np.testing.assert_allclose(found, out[:, :, :1], atol=1e-13)
    assert comm.all_reduce(np.array([1.0]))[0] == comm.size


def fail(comm, how):
    """What the others say when rank 1 fails in the middle of a call."""
    x = np.ones((1, 4, 2, 8))
    if comm.rank == 1:
        send, sent = comm.send, []

        def failing(array, to):
            sent.append(to)
            if len(sent) > 2 * (comm.size - 1):  # behind what ranks agree by
                if how == "die":
                    os._exit(3)
                raise OSError("the cable is out")
            return send(array, to)

        comm.send = failing
    began = time.monotonic()
    try:
        ring_attention(x, x, x, comm=comm)
    except (RankFailed, OSError) as error:
        print(f"rank {comm.rank} after {time.monotonic() - began:.0f} s: {type(error).__name__}: {error}", flush=True)
        if comm.rank == 1:
            time.sleep(5.0)  # alive: it has to be heard of all the same
        os._exit(0)
    os._exit(4)


def differ(comm):
    """All raise the same, and go on."""
    x = np.ones((1, 4, 2, 8))
    try:
        ring_attention(x, x, x, comm=comm, causal=comm.rank == 1)
    except ValueError as error:
        print(f"rank {comm.rank}: {' '.join(str(error).split())}", flush=True)
    ring_attention(x, x, x, comm=comm)


if __name__ == "__main__":
    _, name, what = sys.argv
    ranks = engine(name)
    if what == "agree":
        agree(ranks)
    elif what == "differ":
        differ(ranks)
    else:
        fail(ranks, what)
    print(f"rank {ranks.rank} of {ranks.size} is done", flush=True)
    if name == "torch":
        import torch.distributed

        torch.distributed.destroy_process_group()
