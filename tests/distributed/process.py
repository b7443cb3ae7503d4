"""One rank of the tests of engines that have processes, run as a script: `process.py ENGINE WHAT`.

WHAT is "agree": compare with one device and say so; "raise" and "die": rank 1 does, and the others have to notice;
"differ": rank 1 asks for something else; "tensors": messages go as those of a GPU do, by torch itself.
"""

import os
import sys
import time

import numpy as np
import pytest

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
        comm.send = failing_after(comm.send, 2 * (comm.size - 1), how)
    began = time.monotonic()
    try:
        ring_attention(x, x, x, comm=comm)
    except (RankFailed, OSError) as error:
        print(f"rank {comm.rank} after {time.monotonic() - began:.0f} s: {type(error).__name__}: {error}", flush=True)
        if comm.rank == 1:
            time.sleep(5.0)  # alive: it has to be heard of all the same
        os._exit(0)
    os._exit(4)


def again(comm):
    """After a failure that left messages behind, and one by the clock, a new `TorchComm` is as good as the first."""
    x, late = np.ones((1, 400, 4, 64)), 1.0
    for number in range(2):
        mine = TorchComm(timeout=TIMEOUT if number == 0 else late)
        if comm.rank == 1:
            mine.send = failing_after(mine.send, 2 * (comm.size - 1), "raise" if number == 0 else "sleep")
        try:
            ring_attention(x, x, x, comm=mine)
        except (RankFailed, OSError) as error:
            print(f"rank {comm.rank}, {number}: {type(error).__name__}: {error}", flush=True)
    agree(TorchComm(timeout=TIMEOUT))
    time.sleep(2 * late)  # what nobody took is not what ends the connections
    agree(TorchComm(timeout=TIMEOUT))


def failing_after(send, count, how):
    """`send`, but for the `count` messages by which ranks agree."""
    sent = []

    def failing(array, to):
        sent.append(to)
        if len(sent) > count:
            if how == "die":
                os._exit(3)
            if how == "sleep":
                time.sleep(3.0)
            else:
                raise OSError("the cable is out")
        return send(array, to)

    return failing


def differ(comm):
    """All raise the same, and go on."""
    x = np.ones((1, 4, 2, 8))
    try:
        ring_attention(x, x, x, comm=comm, causal=comm.rank == 1)
    except ValueError as error:
        print(f"rank {comm.rank}: {' '.join(str(error).split())}", flush=True)
    ring_attention(x, x, x, comm=comm)


def tensors(comm):
    """Torch's own exchange of tensors, here by gloo: as of a GPU, where it is NCCL's."""
    import torch

    def of(rank, to, dtype=torch.bfloat16):
        return torch.full((rank + 1, 2, to), 10.0 * rank + to, dtype=dtype)

    rank, ranks = comm.rank, range(comm.size)
    came = comm.all_to_all([of(rank, to) for to in ranks], [tuple(of(source, rank).shape) for source in ranks])
    assert all(torch.equal(x, of(source, rank)) for source, x in enumerate(came))  # one has no numbers
    own = torch.arange(6, dtype=torch.float32).reshape(2, 3).T + rank
    assert all(torch.equal(x, own - rank + source) for source, x in enumerate(comm.all_gather(own)))
    assert torch.equal(comm.all_reduce(own.clone()), sum(own - rank + source for source in ranks))
    others = [to for to in ranks if to != rank]
    with comm.grouped():  # received first, everywhere
        coming = [comm.receive((4,), torch.float64, source, own) for source in others]
        going = [comm.send(torch.full((4,), float(rank), dtype=torch.float64), to) for to in others]
        with pytest.raises(RuntimeError, match="inside of its own group"):
            coming[0].wait()
    assert [message.wait()[0].item() for message in coming] == [float(source) for source in others]
    for message in going:
        message.wait()
    with pytest.raises(ValueError, match="nothing that sends arrays of meta"):
        comm.send(torch.empty(3, device="meta"), others[0])
    assert comm.all_reduce(np.array([1.0]))[0] == comm.size  # NumPy's beside them


if __name__ == "__main__":
    _, name, what = sys.argv
    ranks = engine(name)
    if what == "agree":
        agree(ranks)
    elif what == "differ":
        differ(ranks)
    elif what == "again":
        again(ranks)
    elif what == "tensors":
        tensors(ranks)
    else:
        fail(ranks, what)
    print(f"rank {ranks.rank} of {ranks.size} is done", flush=True)
    if name == "torch":
        import torch.distributed

        torch.distributed.destroy_process_group()
