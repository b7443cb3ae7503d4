"""Ranks whose arrays are on a GPU: torch's tensors in host memory that say so, and kernels under the emulator.  What
they find is attention of the whole, as close as one kernel's own rounding."""

import numpy as np
import pytest
from ranks import TIMEOUT

import cupyattn
from cupyattn.distributed import (
    Sharding,
    ring_attention,
    ring_attention_backward,
    run_ranks,
    sharded_decode,
    sharded_decode_backward,
    ulysses_attention,
    ulysses_attention_backward,
)
from cupyattn.distributed import shard_sequence as shard
from cupyattn.distributed import unshard_sequence as unshard

SEQLEN, HEADS, DIM = 70, (4, 2), 32
UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-11}
"""Of float32 operands kernels make TF32 at best."""


def drawn(torch, rng, dtype, seqlen_q=SEQLEN, seqlen_k=SEQLEN, heads=HEADS):
    shapes = [(1, n, h, DIM) for n, h in ((seqlen_q, heads[0]), (seqlen_k, heads[1]), (seqlen_k, heads[1]))]
    return [torch.from_numpy(rng.standard_normal(x)).to(getattr(torch, dtype)) for x in (*shapes, shapes[0])]


def wide(array):
    return None if array is None else array.double().numpy()


def in_float64(arrays, options):
    """out, lse and gradients on the CPU."""
    q, k, v, dout = map(wide, arrays)
    options = {name: wide(x) if hasattr(x, "double") and x.is_floating_point() else x for name, x in options.items()}
    options = {name: x.numpy() if hasattr(x, "numpy") else x for name, x in options.items()}
    out, lse = cupyattn.attention(q, k, v, return_lse=True, **options)
    return out, lse, cupyattn.attention_backward(dout, q, k, v, **options)


def assert_near(actual, wanted, unit, units=8):
    """Within some units of the largest number: of float16 weights, say, and of the result."""
    assert (np.abs(wide(actual) - wanted) <= units * unit * np.abs(wanted).max(initial=1.0)).all()


RING, ULYSSES = (ring_attention, ring_attention_backward), (ulysses_attention, ulysses_attention_backward)


def on_ranks(arrays, kind, size, options, forward=ring_attention, backward=ring_attention_backward):
    q, k, v, dout = arrays
    layout = Sharding(kind, size, (q.shape[1],))

    def rank(comm):
        mine = [shard(x, layout, comm.rank) for x in (q, k, v)]
        own = {**options, "comm": comm, "sharding": layout}
        for word in ("mask", "bias"):
            if word in own and own[word].shape[-2] > 1:
                own[word] = shard(own[word], layout, comm.rank, axis=-2)
        out, lse = forward(*mine, **own, return_lse=True)
        return out, lse, backward(shard(dout, layout, comm.rank), *mine, out=out, lse=lse, **own)

    outs, lses, found = zip(*run_ranks(rank, size, timeout=TIMEOUT), strict=True)
    return unshard(outs, layout), unshard(lses, layout, axis=2), found, layout


CASES = {
    "zigzag float16": ("float16", "zigzag", {"causal": True}),
    "contiguous bfloat16": ("bfloat16", "contiguous", {}),
    "striped float16": ("float16", "striped", {"causal": True, "window_size": (20, None)}),
    "zigzag float32": ("float32", "zigzag", {"causal": True, "softcap": 3.0}),
}
marked = [pytest.param(name, marks=() if name == "zigzag float16" else pytest.mark.long) for name in CASES]


@pytest.mark.parametrize("name", marked)
def test_a_ring_is_attention_of_the_whole(gpu, driver, rng, name):
    dtype, kind, options = CASES[name]
    arrays = drawn(gpu, rng, dtype)
    out, lse, found, layout = on_ranks(arrays, kind, 2, options)
    exact, exact_lse, gradients = in_float64(arrays, options)
    assert (out.dtype, lse.dtype) == (getattr(gpu, dtype), gpu.float32)
    assert_near(out, exact, UNIT[dtype])
    assert_near(lse, exact_lse, UNIT[dtype])
    for word in ("dq", "dk", "dv"):
        assert getattr(found[0], word).dtype == out.dtype
        whole = unshard([getattr(x, word) for x in found], layout)
        assert_near(whole, getattr(gradients, word), UNIT[dtype], 16)


EXCHANGED = {
    "zigzag float16": ("float16", "zigzag", 2, {"causal": True}),
    "contiguous bfloat16": ("bfloat16", "contiguous", 2, {"window_size": (20, 9)}),
    "striped float32": ("float32", "striped", 2, {"causal": True, "softcap": 3.0}),
    "a rank without heads": ("float16", "zigzag", 5, {"causal": True}),
}
exchanged = [pytest.param(name, marks=() if name == "zigzag float16" else pytest.mark.long) for name in EXCHANGED]


@pytest.mark.parametrize("name", exchanged)
def test_heads_for_tokens_are_attention_of_the_whole(gpu, driver, rng, name):
    dtype, kind, size, options = EXCHANGED[name]
    arrays = drawn(gpu, rng, dtype)
    out, lse, found, layout = on_ranks(arrays, kind, size, options, *ULYSSES)
    exact, exact_lse, gradients = in_float64(arrays, options)
    assert (out.dtype, lse.dtype) == (getattr(gpu, dtype), gpu.float32)
    assert_near(out, exact, UNIT[dtype])
    assert_near(lse, exact_lse, UNIT[dtype])
    for word in ("dq", "dk", "dv"):
        assert getattr(found[0], word).dtype == out.dtype
        assert_near(unshard([getattr(x, word) for x in found], layout), getattr(gradients, word), UNIT[dtype], 16)


@pytest.mark.long
def test_heads_of_one_rank_may_use_key_heads_unequally(gpu, driver, rng):
    """Heads 2, 3 and 4 of 8 use key heads 0, 0 and 1 of 2."""
    arrays = drawn(gpu, rng, "float16", 20, 20, heads=(8, 2))
    out, _, found, layout = on_ranks(arrays, "contiguous", 3, {"causal": True}, *ULYSSES)
    exact, _, gradients = in_float64(arrays, {"causal": True})
    assert_near(out, exact, UNIT["float16"])
    assert_near(unshard([x.dk for x in found], layout), gradients.dk, UNIT["float16"], 16)


def test_heads_for_tokens_are_what_the_kernel_rounds(gpu, driver, rng):
    """The same bits as its own of the whole: nothing is merged, and nothing rounded again."""
    arrays = drawn(gpu, rng, "float16")
    out, lse, _, _ = on_ranks(arrays, "zigzag", 2, {"causal": True}, *ULYSSES)
    whole, whole_lse = cupyattn.attention(*arrays[:3], causal=True, return_lse=True)
    assert gpu.equal(out, whole)
    assert gpu.equal(lse, whole_lse)
    assert not [x for x in driver.launches if x[0].source == "merge.cu"]


SLOPED = {
    "zigzag": ("zigzag", {"causal": True}),
    "striped": ("striped", {"causal": True}),
    "striped, all keys": ("striped", {}),
    "contiguous, all keys": ("contiguous", {}),
    "contiguous, a window": ("contiguous", {"window_size": (20, 9)}),
    "zigzag, more behind": ("zigzag", {"window_size": (None, 5), "softcap": 3.0}),
}
sloped = [pytest.param(x, y, id=f"{x}, {z}", marks=() if x == "striped" and z == "ring" else pytest.mark.long)
          for x in SLOPED for y, z in ((RING, "ring"), (ULYSSES, "ulysses"))]  # fmt: skip


@pytest.mark.parametrize(("name", "functions"), sloped)
def test_distances_are_those_of_the_whole(gpu, driver, rng, name, functions):
    """ALiBi's, wherever the tokens of two ranks lie."""
    kind, options = SLOPED[name]
    options = options | {"alibi_slopes": gpu.tensor([0.1, 0.2, 0.4, -0.01])}
    arrays = drawn(gpu, rng, "float16")
    out, lse, found, layout = on_ranks(arrays, kind, 3, options, *functions)
    exact, exact_lse, gradients = in_float64(arrays, options)
    assert_near(out, exact, UNIT["float16"])
    assert_near(lse, exact_lse, UNIT["float16"])
    for word in ("dq", "dk", "dv"):
        assert_near(unshard([getattr(x, word) for x in found], layout), getattr(gradients, word), UNIT["float16"], 16)
    assert_near(sum(x.dalibi_slopes for x in found), gradients.dalibi_slopes, UNIT["float16"], 16)


def test_what_rows_have_come_to_is_merged_by_the_kernel(gpu, driver, rng):
    on_ranks(drawn(gpu, rng, "float16"), "zigzag", 2, {"causal": True})
    merged = [x[0].expression for x in driver.launches if x[0].source == "merge.cu"]
    assert sum("float," in x for x in merged) >= 2
    assert sum("Half," in x for x in merged) == 2  # rounded once on each rank


@pytest.mark.long
@pytest.mark.parametrize("functions", [RING, ULYSSES], ids=["ring", "ulysses"])
def test_what_edits_scores(gpu, driver, rng, functions):
    options = {
        "causal": True,
        "sinks": gpu.tensor([0.0, 1.0, -1.0, 2.0]).half(),
        "bias": gpu.from_numpy(rng.standard_normal((1, 4, SEQLEN, SEQLEN))).half(),
        "mask": gpu.from_numpy(rng.random((1, 1, SEQLEN, SEQLEN)) < 0.7),
    }
    arrays = drawn(gpu, rng, "float16")
    out, lse, found, layout = on_ranks(arrays, "zigzag", 2, options, *functions)
    exact, exact_lse, gradients = in_float64(arrays, options)
    assert_near(out, exact, UNIT["float16"])
    assert_near(lse, exact_lse, UNIT["float16"])
    assert_near(unshard([x.dbias for x in found], layout, axis=-2), gradients.dbias, UNIT["float16"], 16)
    assert_near(sum(x.dsinks.float() for x in found), gradients.dsinks, UNIT["float16"], 16)


@pytest.mark.parametrize("slopes", [False, True], ids=["plain", "ALiBi"])
@pytest.mark.parametrize("kind", [pytest.param("contiguous", marks=pytest.mark.long), "striped"])
def test_a_decode_is_attention_of_the_whole(gpu, driver, rng, kind, slopes):
    arrays = drawn(gpu, rng, "float16", 3)
    q, k, v, dout = arrays
    layout, options = Sharding(kind, 2, (SEQLEN,)), {"causal": True, "alignment": "bottom-right"}
    options |= {"alibi_slopes": gpu.tensor([0.1, 0.2, 0.4, -0.01])} if slopes else {}

    def rank(comm):
        mine, own = [shard(x, layout, comm.rank) for x in (k, v)], {**options, "comm": comm, "sharding": layout}
        out, lse = sharded_decode(q, *mine, return_lse=True, **own)
        return out, lse, sharded_decode_backward(dout, q, *mine, out=out, lse=lse, **own)

    outs, lses, found = zip(*run_ranks(rank, 2, timeout=TIMEOUT), strict=True)
    exact, exact_lse, gradients = in_float64(arrays, options)
    assert gpu.equal(*outs)
    assert_near(outs[0], exact, UNIT["float16"])
    assert_near(lses[0], exact_lse, UNIT["float16"])
    assert_near(found[1].dq, gradients.dq, UNIT["float16"], 16)
    assert_near(unshard([x.dk for x in found], layout), gradients.dk, UNIT["float16"], 16)
    assert_near(unshard([x.dv for x in found], layout), gradients.dv, UNIT["float16"], 16)
    if slopes:  # all ranks have the whole
        assert_near(found[0].dalibi_slopes, gradients.dalibi_slopes, UNIT["float16"], 16)


@pytest.mark.parametrize("slopes", [None, [[0.1, 0.2, 0.4, -0.01], [0.5, 0.25, 0.0, 0.1], [0.3, 0.2, 0.1, 0.05]]],
                         ids=["plain", "ALiBi"])  # fmt: skip
@pytest.mark.parametrize("kind", [pytest.param("zigzag", marks=pytest.mark.long), "striped"])
def test_packed_sequences_are_decoded(gpu, driver, rng, kind, slopes):
    seqlens_q, layout = (2, 1, 4), Sharding(kind, 2, (40, 0, 30))
    q, k, v, dout = (x[0] for x in drawn(gpu, rng, "float16", 7))
    options, sinks = {"causal": True, "alignment": "bottom-right"}, gpu.tensor([0.0, 1.0, -1.0, 2.0]).half()
    edits = {"sinks": sinks} | ({} if slopes is None else {"alibi_slopes": gpu.tensor(slopes)})

    def rank(comm):
        mine = [q, *(shard(x, layout, comm.rank, axis=0) for x in (k, v))]
        own = {"comm": comm, "sharding": layout, "seqlens_q": seqlens_q, **options, **edits}
        out, lse = sharded_decode(*mine, return_lse=True, **own)
        return out, lse, sharded_decode_backward(dout, *mine, out=out, lse=lse, **own)

    outs, lses, found = zip(*run_ranks(rank, 2, timeout=TIMEOUT), strict=True)
    of_keys = {name: unshard([getattr(x, name) for x in found], layout, axis=0) for name in ("dk", "dv")}
    assert gpu.equal(*outs)
    of_sinks = 0.0
    for i, (rows, keys) in enumerate([((0, 2), (0, 40)), ((2, 3), (40, 40)), ((3, 7), (40, 70))]):
        rows, keys = slice(*rows), slice(*keys)
        own = {**options, "sinks": sinks} | ({} if slopes is None else {"alibi_slopes": gpu.tensor(slopes[i])})
        exact, exact_lse, gradients = in_float64(
            [x[None, y] for x, y in ((q, rows), (k, keys), (v, keys), (dout, rows))], own
        )
        assert_near(outs[0][None, rows], exact, UNIT["float16"])
        assert_near(lses[0][None, :, rows], exact_lse, UNIT["float16"])
        assert_near(found[1].dq[None, rows], gradients.dq, UNIT["float16"], 16)
        for name, whole in of_keys.items():
            assert_near(whole[None, keys], getattr(gradients, name), UNIT["float16"], 16)
        if slopes is not None:  # all ranks have the whole
            assert_near(found[0].dalibi_slopes[i], gradients.dalibi_slopes, UNIT["float16"], 16)
        of_sinks = of_sinks + gradients.dsinks
    assert_near(found[1].dsinks, of_sinks, UNIT["float16"], 16)


@pytest.mark.parametrize("attend", [ring_attention, pytest.param(ulysses_attention, marks=pytest.mark.long)])
def test_autograd_goes_where_the_keys_went(gpu, driver, rng, attend):
    arrays = drawn(gpu, rng, "float16")
    q, k, v, dout = arrays
    layout = Sharding("zigzag", 2, (SEQLEN,))

    def rank(comm):
        mine = [shard(x, layout, comm.rank).requires_grad_() for x in (q, k, v)]
        attend(*mine, comm=comm, sharding=layout, causal=True).backward(shard(dout, layout, comm.rank))
        return [x.grad for x in mine]

    found = list(zip(*run_ranks(rank, 2, timeout=TIMEOUT), strict=True))
    exact = in_float64(arrays, {"causal": True})[2]
    for shards, wanted in zip(found, exact, strict=False):
        assert_near(unshard(shards, layout), wanted, UNIT["float16"], 16)


@pytest.mark.parametrize("slopes", [None, [[0.1, 0.2, 0.3, 0.4], [0.5, 0.25, 0.0, 0.1]]], ids=["plain", "ALiBi"])
@pytest.mark.parametrize("attend", [ring_attention, pytest.param(ulysses_attention, marks=pytest.mark.long)])
def test_packed_sequences(gpu, driver, rng, attend, slopes):
    layout = Sharding("zigzag", 2, (40, 30))
    q, k, v, _ = (x[0] for x in drawn(gpu, rng, "float16"))
    edits = {} if slopes is None else {"alibi_slopes": gpu.tensor(slopes)}

    def rank(comm):
        mine = [shard(x, layout, comm.rank, axis=0) for x in (q, k, v)]
        return attend(*mine, comm=comm, sharding=layout, causal=True, return_lse=True, **edits)

    outs, lses = zip(*run_ranks(rank, 2, timeout=TIMEOUT), strict=True)
    out, lse = unshard(outs, layout, axis=0), unshard(lses, layout, axis=1)
    for place, rows in enumerate((slice(0, 40), slice(40, 70))):
        own = {"causal": True} | ({} if slopes is None else {"alibi_slopes": np.array(slopes[place])})
        exact, exact_lse = cupyattn.attention(*(wide(x[None, rows]) for x in (q, k, v)), return_lse=True, **own)
        assert_near(out[None, rows], exact, UNIT["float16"])
        assert_near(lse[None, :, rows], exact_lse, UNIT["float16"])


def test_what_no_kernel_takes_is_refused_before_anything_is_sent(gpu, driver):
    x = gpu.zeros(1, 8, 2, 32, dtype=gpu.float64)
    said = []

    def rank(comm):
        send, comm.send = comm.send, lambda array, to: said.append(array.nbytes) or send(array, to)
        with pytest.raises(NotImplementedError, match="ring_attention: no implementation"):
            ring_attention(x, x, x, comm=comm)

    run_ranks(rank, 2, timeout=TIMEOUT)
    assert len(said) == 4  # a length and a text, by which ranks agree


def test_ranks_on_a_gpu_and_on_the_host_do_not_agree(gpu, driver):
    x = np.zeros((1, 8, 2, 32), np.float16)

    def rank(comm):
        mine = gpu.from_numpy(x) if comm.rank else x
        with pytest.raises(ValueError, match="all ranks have to agree about device"):
            ring_attention(mine, mine, mine, comm=comm)

    run_ranks(rank, 2, timeout=TIMEOUT)
