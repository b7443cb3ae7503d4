"""One rank of the tests of engines that have processes, run as a script: `process.py ENGINE WHAT`.

WHAT is "agree": compare with one device and say so; "raise" and "die": rank 1 does, and the others have to notice;
"again": the same, and then new ranks of the same processes agree; "differ": rank 1 asks for something else; "tensors":
messages go as those of a GPU do, by torch itself.
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
    sharded_decode_backward,
    ulysses_attention,
    ulysses_attention_backward,
)

TIMEOUT = 120.0


def engine(name):
    if name == "mpi":
        return MpiComm(timeout=TIMEOUT)
    import torch.distributed

    torch.distributed.init_process_group("gloo")
    return TorchComm(timeout=TIMEOUT)


def agree(comm):
    """Every function and its gradients in float64, causal or with edits, is attention."""
    rng = np.random.default_rng(0)
    q, k, v, dout = rng.standard_normal((4, 1, 13, 4, 8))
    edits = {
        "mask": rng.random((1, 1, 13, 13)) < 0.7,
        "bias": rng.standard_normal((4, 13, 13)),
        "sinks": rng.standard_normal(4),
        "alibi_slopes": rng.random(4),
    }
    calls = [(ring_attention, ring_attention_backward), (ulysses_attention, ulysses_attention_backward)]
    for calls_of in calls:
        compare(comm, *calls_of, (q, k, v, dout), causal=True)
        compare(comm, *calls_of, (q, k, v, dout), **edits)
        one_head = [x[:, :, :1] for x in (q, k, v, dout)]  # in Ulysses all ranks but one have nothing to do
        compare(comm, *calls_of, one_head, causal=True)
    compare_decode(comm, (q[:, -1:], k, v, dout[:, -1:]), alignment="bottom-right")
    of_last = {name: x[..., -1:, :] if name in ("mask", "bias") else x for name, x in edits.items()}
    compare_decode(comm, (q[:, -1:], k, v, dout[:, -1:]), alignment="bottom-right", **of_last)
    compare_packed_decode(comm, rng)
    assert comm.all_reduce(np.array([1.0]))[0] == comm.size


def compare(comm, forward, backward, arrays, **options):
    """Own rows of out and lse, and of all gradients; shares of what all ranks have, added up."""
    layout = Sharding("zigzag", comm.size, (13,))

    def own(array, axis=1):
        return shard_sequence(array, layout, comm.rank, axis=axis)

    (q, k, v, dout), close = arrays, {"atol": 1e-12, "rtol": 1e-12}
    mine = {name: own(x, -2) if name in ("mask", "bias") else x for name, x in options.items()}
    mine |= {"comm": comm, "sharding": layout}
    out, lse = forward(*map(own, (q, k, v)), **mine, return_lse=True)
    whole, whole_lse = attention(q, k, v, **options, return_lse=True)
    np.testing.assert_allclose(out, own(whole), **close)
    np.testing.assert_allclose(lse, own(whole_lse, 2), **close)
    found = backward(*map(own, (dout, q, k, v)), out=out, lse=lse, **mine)
    expected = attention_backward(dout, q, k, v, **options)
    for actual, wanted in zip(found[:3], expected[:3], strict=True):
        np.testing.assert_allclose(actual, own(wanted), **close)
    if "bias" in options:
        np.testing.assert_allclose(found.dbias, own(expected.dbias, -2), **close)
        np.testing.assert_allclose(comm.all_reduce(found.dsinks), expected.dsinks, **close)
        np.testing.assert_allclose(comm.all_reduce(found.dalibi_slopes), expected.dalibi_slopes, **close)


def compare_decode(comm, arrays, **options):
    """out, lse and all gradients, which are whole but for those of own keys."""
    layout, (q, k, v, dout) = Sharding("zigzag", comm.size, (13,)), arrays
    keys, close = [shard_sequence(x, layout, comm.rank) for x in (k, v)], {"atol": 1e-12, "rtol": 1e-12}
    own = {"comm": comm, "sharding": layout, **options}
    out, lse = sharded_decode(q, *keys, **own, return_lse=True)
    whole, whole_lse = attention(q, k, v, **options, return_lse=True)
    np.testing.assert_allclose(out, whole, **close)
    np.testing.assert_allclose(lse, whole_lse, **close)
    found = sharded_decode_backward(dout, q, *keys, out=out, lse=lse, **own)._asdict()
    for name, wanted in attention_backward(dout, q, k, v, **options)._asdict().items():
        if wanted is None:
            assert found[name] is None
        else:
            expected = shard_sequence(wanted, layout, comm.rank) if name in ("dk", "dv") else wanted
            np.testing.assert_allclose(found[name], expected, **close)


def compare_packed_decode(comm, rng):
    """The same of packed sequences, each of them alone."""
    layout, seqlens_q = Sharding("striped", comm.size, (13, 0, 6)), (2, 1, 3)
    q, k, v, dout = (rng.standard_normal((count, heads, 8)) for count, heads in ((6, 4), (19, 2), (19, 2), (6, 4)))
    options, close = {"causal": True, "alignment": "bottom-right"}, {"atol": 1e-12, "rtol": 1e-12}
    keys = [shard_sequence(x, layout, comm.rank, axis=0) for x in (k, v)]
    own = {"comm": comm, "sharding": layout, "seqlens_q": seqlens_q, **options}
    out, lse = sharded_decode(q, *keys, **own, return_lse=True)
    found = sharded_decode_backward(dout, q, *keys, out=out, lse=lse, **own)
    of_keys = {"dk": np.zeros_like(k), "dv": np.zeros_like(v)}
    for rows, there in ((slice(0, 2), slice(0, 13)), (slice(2, 3), slice(13, 13)), (slice(3, 6), slice(13, 19))):
        alone = q[None, rows], k[None, there], v[None, there]
        whole, whole_lse = attention(*alone, **options, return_lse=True)
        expected = attention_backward(dout[None, rows], *alone, **options)
        np.testing.assert_allclose(out[rows], whole[0], **close)
        np.testing.assert_allclose(lse[:, rows], whole_lse[0], **close)
        np.testing.assert_allclose(found.dq[rows], expected.dq[0], **close)
        for name, array in of_keys.items():
            array[there] = getattr(expected, name)[0]
    for name, array in of_keys.items():
        expected = shard_sequence(array, layout, comm.rank, axis=0)
        np.testing.assert_allclose(getattr(found, name), expected, **close)


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
    print(f"rank {comm.rank} has a result", flush=True)
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
