"""NCCL's rules are kept, by a stand-in that checks them; nothing here has run on a GPU."""

import sys
import threading
from types import SimpleNamespace

import nccl_stand_in as fake
import numpy as np
import pytest

from cupyattn.distributed import (
    NcclComm,
    RankFailed,
    Sharding,
    ring_attention,
    ring_attention_backward,
    sharded_decode,
    sharded_decode_backward,
    ulysses_attention,
    ulysses_attention_backward,
    verbs,
)
from cupyattn.distributed import shard_sequence as shard
from cupyattn.distributed import unshard_sequence as unshard


@pytest.fixture
def gpu(torch, monkeypatch):
    """torch's tensors and CuPy's streams, in host memory; and what runs on as many ranks."""
    cupy = fake.Cupy(torch)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "cupy.cuda", cupy.cuda)
    monkeypatch.setattr(verbs, "synchronize", lambda array: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=0))

    def on_ranks(function, size, timeout=60.0):
        world, found, errors = fake.World(size), [None] * size, []

        def run(rank):
            try:
                found[rank] = function(NcclComm(fake.Communicator(world, rank), timeout=timeout))
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return found, world

    return SimpleNamespace(torch=torch, on_ranks=on_ranks)


def test_messages_of_a_group_do_not_wait_for_each_other(gpu):
    def rank(comm):
        with comm.grouped():
            coming = comm.receive((3,), "float32", (comm.rank - 1) % 3, gpu.torch.zeros(1))
            going = comm.send(gpu.torch.full((3,), float(comm.rank)), (comm.rank + 1) % 3)
        going.wait()
        return coming.wait().tolist()

    found, _ = gpu.on_ranks(rank, 3)
    assert found == [[2.0] * 3, [0.0] * 3, [1.0] * 3]


def test_what_is_received_is_not_there_before_it_is_waited_for(gpu):
    def rank(comm):
        with comm.grouped():
            coming = comm.receive((2,), "uint8", 1 - comm.rank, gpu.torch.zeros(1))
            going = comm.send(gpu.torch.ones(2, dtype=gpu.torch.uint8), 1 - comm.rank)
        before = coming.array.tolist()
        going.wait()
        return before, coming.wait().tolist()

    for before, after in gpu.on_ranks(rank, 2)[0]:
        assert before == [fake.POISON] * 2
        assert after == [1, 1]


def test_memory_under_way_is_held_until_the_caller_s_stream_waits(gpu):
    def rank(comm):
        with comm.grouped():
            coming = comm.receive((2,), "uint8", 1 - comm.rank, gpu.torch.zeros(1))
            comm.send(gpu.torch.ones(2, dtype=gpu.torch.uint8), 1 - comm.rank)
        held = [len(batch.arrays) for batch in comm._under_way]
        coming.wait()
        return held, comm._under_way

    assert gpu.on_ranks(rank, 2)[0] == [([2], [])] * 2


@pytest.mark.parametrize("on_host", [False, True])
def test_only_memory_of_the_caller_s_stream_waits_for_it(gpu, on_host):
    """What stands first on the stream of messages is an event of the caller's, and then the group."""

    def rank(comm):
        like = np.ones(2, np.uint8) if on_host else gpu.torch.ones(2, dtype=gpu.torch.uint8)
        with comm.grouped():
            coming = comm.receive((2,), "uint8", 1 - comm.rank, like)
            comm.send(like, 1 - comm.rank)
        waits = [getattr(work, "__self__", None) for work in comm.stream.work]
        awaited = [x.stream for x in waits if isinstance(x, fake.Event)]
        first = isinstance(waits[0], fake.Event)
        coming.wait()
        return first, awaited == [sys.modules["cupy"].current()]

    assert gpu.on_ranks(rank, 2)[0] == [(not on_host, not on_host)] * 2


def test_a_message_inside_of_its_own_group_is_not_there(gpu):
    def rank(comm):
        with comm.grouped(), pytest.raises(RuntimeError, match="inside of its own group"):
            comm.receive((0,), "uint8", 1 - comm.rank, gpu.torch.zeros(1)).wait()

    gpu.on_ranks(rank, 2)


def test_collectives_of_both_homes(gpu):
    def rank(comm):
        own = gpu.torch.full((2,), comm.rank + 1.0)
        gathered = [x.tolist() for x in comm.all_gather(own)]
        total, of_host = comm.all_reduce(own).tolist(), comm.all_reduce(np.array([1.0, comm.rank]))
        numbers = comm.all_to_all([np.array([comm.rank, to]) for to in range(3)], [(2,)] * 3)
        return gathered, total, of_host.tolist(), [x.tolist() for x in numbers]

    for number, (gathered, total, of_host, numbers) in enumerate(gpu.on_ranks(rank, 3)[0]):
        assert gathered == [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]
        assert (total, of_host) == ([6.0, 6.0], [3.0, 3.0])
        assert numbers == [[source, number] for source in range(3)]


@pytest.mark.parametrize(
    ("forward", "backward"),
    [
        (ring_attention, ring_attention_backward),
        pytest.param(ulysses_attention, ulysses_attention_backward, marks=pytest.mark.long),
    ],
)
def test_attention_and_its_gradients_are_those_of_the_whole(gpu, driver, rng, forward, backward):
    torch, size = gpu.torch, 3
    q, k, v, dout = (torch.from_numpy(rng.standard_normal((1, 24, 3, 32))).half() for _ in range(4))
    layout = Sharding("zigzag", size, (24,))

    def rank(comm):
        mine = [shard(x, layout, comm.rank) for x in (q, k, v)]
        out, lse = forward(*mine, comm=comm, sharding=layout, causal=True, return_lse=True)
        options = {"comm": comm, "sharding": layout, "causal": True, "out": out, "lse": lse}
        return out, backward(shard(dout, layout, comm.rank), *mine, **options)

    found, world = gpu.on_ranks(rank, size)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    whole = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in exact), is_causal=True)
    whole = whole.transpose(1, 2)
    whole.backward(dout.double())
    np.testing.assert_allclose(unshard([x[0] for x in found], layout).double(), whole.detach(), atol=4e-3)
    for name, wanted in zip(("dq", "dk", "dv"), exact, strict=True):
        shards = [getattr(x[1], name) for x in found]
        np.testing.assert_allclose(unshard(shards, layout).double(), wanted.grad, atol=2e-2)
    assert all(set(kinds) == {"send", "recv"} for _, kinds in world.groups)


def test_packed_sequences_are_decoded_and_so_are_gradients(gpu, driver, rng):
    torch, size, seqlens_q, layout = gpu.torch, 3, (2, 3), Sharding("striped", 3, (20, 9))
    q, k, v, dout = (torch.from_numpy(rng.standard_normal((n, 3, 32))).half() for n in (5, 29, 29, 5))

    def rank(comm):
        mine = [q, *(shard(x, layout, comm.rank, axis=0) for x in (k, v))]
        options = {"comm": comm, "sharding": layout, "seqlens_q": seqlens_q}
        out, lse = sharded_decode(*mine, **options, return_lse=True)
        return out, sharded_decode_backward(dout, *mine, **options, out=out, lse=lse)

    found, _ = gpu.on_ranks(rank, size)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    alone = zip(
        *(x.split(lengths) for x, lengths in zip(exact, (seqlens_q, (20, 9), (20, 9)), strict=True)), strict=True
    )
    attend = torch.nn.functional.scaled_dot_product_attention
    whole = torch.cat([attend(*(x.transpose(0, 1) for x in arrays)).transpose(0, 1) for arrays in alone])
    whole.backward(dout.double())
    of_keys = {name: unshard([getattr(x[1], name) for x in found], layout, axis=0) for name in ("dk", "dv")}
    for out, gradients in found:
        np.testing.assert_allclose(out.double(), whole.detach(), atol=4e-3)
        np.testing.assert_allclose(gradients.dq.double(), exact[0].grad, atol=2e-2)
    for name, wanted in zip(of_keys, exact[1:], strict=True):
        np.testing.assert_allclose(of_keys[name].double(), wanted.grad, atol=2e-2)


def test_who_waits_too_long_gives_up_and_says_so(gpu, monkeypatch):
    monkeypatch.setattr(fake.Event, "done", False)

    def rank(comm):
        with pytest.raises(RankFailed, match=r"others said nothing for 0\.2 seconds"):
            comm.all_gather(np.ones(1))
        with pytest.raises(RankFailed, match=r"others said nothing"):
            comm.check()

    gpu.on_ranks(rank, 2, timeout=0.2)


def test_what_is_no_communicator_is_refused():
    with pytest.raises(TypeError, match=r"NcclComm: communicator has to be a cupy\.cuda\.nccl\.NcclCommunicator"):
        NcclComm(3)


def test_the_stand_in_notices_messages_that_are_not_grouped(gpu, monkeypatch):
    """As NCCL would hang, were they to wait for each other on one stream."""
    monkeypatch.setattr(fake, "SECONDS", 0.5)

    def rank(comm):
        coming = comm.receive((2,), "uint8", 1 - comm.rank, gpu.torch.zeros(1))
        comm.send(gpu.torch.ones(2, dtype=gpu.torch.uint8), 1 - comm.rank)
        coming.wait()

    with pytest.raises(fake.Broken, match="deadlock"):
        gpu.on_ranks(rank, 2)


def test_the_stand_in_notices_counts_that_do_not_match(gpu):
    def rank(comm):
        with comm.grouped():
            coming = comm.receive((3 if comm.rank else 2,), "uint8", 1 - comm.rank, gpu.torch.zeros(1))
            comm.send(gpu.torch.ones(2, dtype=gpu.torch.uint8), 1 - comm.rank)
        coming.wait()

    with pytest.raises(fake.Broken, match="were sent"):
        gpu.on_ranks(rank, 2)


def test_the_stand_in_sends_what_stands_there_when_somebody_waits(gpu):
    def rank(comm):
        data = gpu.torch.ones(2, dtype=gpu.torch.uint8)
        with comm.grouped():
            coming = comm.receive((2,), "uint8", 1 - comm.rank, gpu.torch.zeros(1))
            comm.send(data, 1 - comm.rank)
        data.fill_(7)
        coming.wait()
        return coming.array.tolist()

    found, _ = gpu.on_ranks(rank, 2)
    assert found == [[7, 7]] * 2  # so whoever writes before the wait is found out by wrong numbers
