"""torch's autograd through ranks: the gradients of attention of the whole, of every operand that has any."""

from itertools import pairwise

import numpy as np
import pytest
from oracle import assert_matches
from ranks import TIMEOUT, draw

from cupyattn import attention_backward
from cupyattn.distributed import Sharding, ring_attention, run_ranks, sharded_decode, ulysses_attention
from cupyattn.distributed import shard_sequence as shard
from cupyattn.distributed import unshard_sequence as unshard

FEW_UNITS = {"rtol": 1e-12, "atol": 1e-13}
EDITS = ("bias", "sinks", "alibi_slopes")
torch = pytest.importorskip("torch", reason="needs torch")


def drawn_edits(rng, seqlen_q, seqlen_k):
    return {
        "nothing": {},
        "bias": {"bias": rng.standard_normal((4, seqlen_q, seqlen_k))},
        "a bias of keys": {"bias": rng.standard_normal((1, seqlen_k))},
        "sinks": {"sinks": rng.standard_normal(4)},
        "slopes": {"alibi_slopes": rng.random((2, 4))},
        "all of them": {
            "bias": rng.standard_normal((4, seqlen_q, seqlen_k)),
            "sinks": rng.standard_normal(4),
            "alibi_slopes": rng.random(4),
        },
    }


NAMES = list(drawn_edits(np.random.default_rng(0), 1, 1))


def pulled(function, operands, dout, dlse, **options):
    """The gradient of each operand, by autograd."""
    leaves = {name: torch.from_numpy(np.array(x)).requires_grad_() for name, x in operands.items()}
    out, lse = function(**leaves, **options, return_lse=True)
    ((out * torch.from_numpy(dout)).sum() + (lse * torch.from_numpy(dlse)).sum()).backward()
    return {name: leaf.grad.numpy() for name, leaf in leaves.items()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("function", [ring_attention, ulysses_attention])
def test_gradients_of_own_rows_and_shares_of_the_rest(function, name, rng):
    q, k, v, dout = draw(rng, 13)
    dlse, edits = rng.standard_normal((2, 4, 13)), drawn_edits(rng, 13, 13)[name]
    layout = Sharding("zigzag", 2, (13,))
    of_rows = "bias" in edits and edits["bias"].shape[-2] > 1

    def rank(comm):
        own = {word: shard(x, layout, comm.rank) for word, x in (("q", q), ("k", k), ("v", v))} | edits
        if of_rows:
            own["bias"] = shard(edits["bias"], layout, comm.rank, axis=-2)
        known = shard(dout, layout, comm.rank), shard(dlse, layout, comm.rank, axis=2)
        return pulled(function, own, *known, comm=comm, sharding=layout, causal=True)

    found = run_ranks(rank, 2, timeout=TIMEOUT)
    expected = attention_backward(dout, q, k, v, dlse=dlse, causal=True, **edits)
    for word in found[0]:
        shares = [x[word] for x in found]
        if word in "qkv":
            whole = unshard(shares, layout)
        else:
            whole = unshard(shares, layout, axis=-2) if word == "bias" and of_rows else sum(shares)
        assert_matches(whole, getattr(expected, f"d{word}"), **FEW_UNITS)


@pytest.mark.parametrize("name", NAMES)
def test_a_decode_has_gradients_of_own_keys_and_the_whole_of_the_rest(name, rng):
    q, k, v, dout = draw(rng, 3, 13)
    dlse, edits = rng.standard_normal((2, 4, 3)), drawn_edits(rng, 3, 13)[name]
    layout, options = Sharding("striped", 3, (13,)), {"causal": True, "alignment": "bottom-right"}

    def rank(comm):
        own = {"q": q, "k": shard(k, layout, comm.rank), "v": shard(v, layout, comm.rank), **edits}
        return pulled(sharded_decode, own, dout, dlse, comm=comm, sharding=layout, **options)

    found = run_ranks(rank, 3, timeout=TIMEOUT)
    expected = attention_backward(dout, q, k, v, dlse=dlse, **options, **edits)
    for word in found[0]:
        wanted = getattr(expected, f"d{word}")
        for whole in [unshard([x[word] for x in found], layout)] if word in "kv" else [x[word] for x in found]:
            assert_matches(whole, wanted, **FEW_UNITS)


def test_packed_sequences_to_decode_have_gradients_of_own_keys_and_the_whole_of_the_rest(rng):
    seqlens_q, layout = (2, 0, 3), Sharding("zigzag", 3, (13, 4, 2))
    q, k, v, dout = (x[0] for x in draw(rng, 5, 19, batch=1))
    dlse, edits = rng.standard_normal((4, 5)), {"sinks": rng.standard_normal(4), "alibi_slopes": rng.random((3, 4))}
    options = {"causal": True, "alignment": "bottom-right"}

    def rank(comm):
        own = {"q": q, **{word: shard(x, layout, comm.rank, axis=0) for word, x in (("k", k), ("v", v))}, **edits}
        return pulled(sharded_decode, own, dout, dlse, comm=comm, sharding=layout, seqlens_q=seqlens_q, **options)

    found, of_sinks = run_ranks(rank, 3, timeout=TIMEOUT), 0.0
    of_keys = {word: unshard([x[word] for x in found], layout, axis=0) for word in "kv"}
    rows, keys = (pairwise(np.cumsum([0, *lengths])) for lengths in (seqlens_q, layout.seqlens))
    for i, (mine, there) in enumerate(zip(rows, keys, strict=True)):
        mine, there = slice(*mine), slice(*there)
        arrays = dout[None, mine], q[None, mine], k[None, there], v[None, there]
        own = {"dlse": dlse[None, :, mine], "sinks": edits["sinks"], "alibi_slopes": edits["alibi_slopes"][i]}
        expected = attention_backward(*arrays, **own, **options)
        of_sinks = of_sinks + expected.dsinks
        for word in "kv":
            assert_matches(of_keys[word][there], getattr(expected, f"d{word}")[0], **FEW_UNITS)
        for of_rank in found:
            assert_matches(of_rank["q"][mine], expected.dq[0], **FEW_UNITS)
            assert_matches(of_rank["alibi_slopes"][i], expected.dalibi_slopes, **FEW_UNITS)
    for of_rank in found:
        assert_matches(of_rank["sinks"], of_sinks, **FEW_UNITS)


@pytest.mark.parametrize("function", [ring_attention, ulysses_attention])
def test_packed_sequences_have_their_gradients(function, rng):
    lengths = (5, 0, 8)
    q, k, v, dout = (x[0] for x in draw(rng, sum(lengths), batch=1))
    dlse, slopes = rng.standard_normal((4, sum(lengths))), rng.random((3, 4))
    layout = Sharding("zigzag", 2, lengths)

    def rank(comm):
        own = {word: shard(x, layout, comm.rank, axis=0) for word, x in (("q", q), ("k", k), ("v", v))}
        known = shard(dout, layout, comm.rank, axis=0), shard(dlse, layout, comm.rank, axis=1)
        return pulled(function, own | {"alibi_slopes": slopes}, *known, comm=comm, sharding=layout, causal=True)

    found = run_ranks(rank, 2, timeout=TIMEOUT)
    whole = {word: unshard([x[word] for x in found], layout, axis=0) for word in "qkv"}
    of_slopes = sum(x["alibi_slopes"] for x in found)
    for i, (first, last) in enumerate(pairwise(np.cumsum([0, *lengths]))):
        mine = [x[None, first:last] for x in (dout, q, k, v)]
        own = {"dlse": dlse[None, :, first:last], "alibi_slopes": slopes[i]}
        expected = attention_backward(*mine, causal=True, **own)
        for word in "qkv":
            assert_matches(whole[word][first:last], getattr(expected, f"d{word}")[0], **FEW_UNITS)
        assert_matches(of_slopes[i], expected.dalibi_slopes, **FEW_UNITS)
