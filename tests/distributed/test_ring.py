"""Ring attention is attention: on any number of ranks, in any layout, with every argument; and so are its gradients."""

import threading
from itertools import pairwise
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_correctly_rounded, assert_matches, assert_same_bits
from ranks import TIMEOUT, draw, drawn_options, on_one_device, on_ranks

from cupyattn import attention, attention_backward
from cupyattn.distributed import (
    Sharding,
    ring_attention,
    ring_attention_backward,
    run_ranks,
    ulysses_attention,
    ulysses_attention_backward,
)
from cupyattn.distributed import shard_sequence as shard
from cupyattn.distributed import unshard_sequence as unshard
from cupyattn.distributed.work import Work

NAMES = list(drawn_options(np.random.default_rng(0)))
FEW_UNITS = {"rtol": 1e-12, "atol": 1e-13}


def assert_same(found, expected, **tolerance):
    """out, lse and every gradient."""
    for actual, wanted in zip(found[:2], expected[:2], strict=True):
        assert_matches(actual, wanted, **tolerance)
    assert found[2].keys() == expected[2].keys()
    for name, wanted in expected[2].items():
        assert_matches(found[2][name], wanted, **tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_with_every_argument_it_is_attention_to_a_few_units_and_so_are_gradients(name, rng):
    arrays, options = draw(rng), drawn_options(rng)[name]
    assert_same(on_ranks(arrays, 3, "zigzag", options), on_one_device(arrays, options), **FEW_UNITS)


@pytest.mark.parametrize(
    ("size", "kind"), [(1, "zigzag"), (2, "contiguous"), (2, "striped"), (4, "zigzag"), (8, "striped"), (8, "zigzag")]
)
def test_on_any_number_of_ranks_in_any_layout(size, kind, rng):
    arrays, options = draw(rng), drawn_options(rng)["softcap and sinks"]
    assert_same(on_ranks(arrays, size, kind, options), on_one_device(arrays, options), **FEW_UNITS)


@pytest.mark.parametrize("name", ["ALiBi", "ALiBi both ways"])
@pytest.mark.parametrize("lengths", [(21, 21), (13, 29)])
def test_striped_rows_are_as_far_from_keys_as_their_places_in_the_sequence(name, lengths, rng):
    options = {"alignment": "bottom-right", **drawn_options(rng)[name]}
    arrays = draw(rng, *lengths)
    assert_same(on_ranks(arrays, 3, "striped", options), on_one_device(arrays, options), **FEW_UNITS)


@pytest.mark.parametrize("alignment", ["top-left", "bottom-right"])
@pytest.mark.parametrize("lengths", [(13, 29), (29, 13), (5, 0)])
def test_queries_and_keys_of_different_lengths(alignment, lengths, rng):
    options = {"window_size": (6, 1), "alignment": alignment}
    arrays = draw(rng, *lengths)
    assert_same(on_ranks(arrays, 3, "zigzag", options), on_one_device(arrays, options), **FEW_UNITS)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.data())
def test_any_lengths_windows_and_shards(data):
    seqlen_q, seqlen_k = data.draw(st.integers(0, 17)), data.draw(st.integers(0, 17))
    side = st.one_of(st.none(), st.integers(0, 12))
    options = {
        "window_size": (data.draw(side), data.draw(side)),
        "causal": data.draw(st.booleans()),
        "alignment": data.draw(st.sampled_from(["top-left", "bottom-right"])),
    }
    kind = data.draw(st.sampled_from(["contiguous", "zigzag", "striped"]))
    arrays = draw(np.random.default_rng(seqlen_q), seqlen_q, seqlen_k, batch=1)
    size = data.draw(st.integers(1, 4))
    assert_same(on_ranks(arrays, size, kind, options), on_one_device(arrays, options), **FEW_UNITS)


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_low_precision_is_rounded_once(dtype, rng):
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    arrays = draw(rng, dtype=kind)
    options = {"causal": True}
    out, lse, gradients = on_ranks(arrays, 3, "zigzag", options)
    exact = on_one_device([x.astype(np.float64) for x in arrays], options)
    assert out.dtype == kind
    assert_correctly_rounded(out, exact[0], dtype)
    assert_correctly_rounded(lse, exact[1], "float32")
    for name, expected in exact[2].items():
        assert_correctly_rounded(gradients[name], expected, dtype, share=0.995)


def test_float32_arithmetic_is_within_its_error(rng):
    arrays, options = draw(rng, dtype=np.float32), {"causal": True, "compute_dtype": "float32"}
    exact = on_one_device([x.astype(np.float64) for x in arrays], {"causal": True})
    assert_same(on_ranks(arrays, 3, "zigzag", options), exact, rtol=1e-5, atol=1e-5)


def test_the_same_bits_in_every_run(rng):
    arrays, options = draw(rng, dtype=np.float32), {"causal": True}
    first, second = (on_ranks(arrays, 4, "zigzag", options) for _ in range(2))
    assert_same_bits(first[0], second[0])
    assert_same_bits(first[2]["dk"], second[2]["dk"])


@pytest.mark.parametrize("window_size", [(None, None), (3, 0)])
@pytest.mark.parametrize(
    ("slopes", "kind"),
    [(None, "zigzag"), (1, "zigzag"), (2, "zigzag"), (None, "striped"), (2, "striped"), (2, "uneven")],
)
def test_packed_sequences(window_size, slopes, kind, rng):
    lengths, uneven = (5, 0, 11, 1), ((4, 0, 0, 0), (0, 0, 9, 1), (1, 0, 2, 0))
    layout = Sharding("contiguous", 3, lengths, uneven) if kind == "uneven" else Sharding(kind, 3, lengths)
    q, k, v, dout = (x[0] for x in draw(rng, sum(lengths), batch=1))
    options = {"causal": True, "window_size": window_size}
    if slopes is not None:
        options["alibi_slopes"] = rng.random((len(lengths), 4)) if slopes == 2 else rng.random(4)

    def rank(comm):
        own = {**options, "comm": comm, "sharding": layout}
        mine = [shard(x, layout, comm.rank, axis=0) for x in (q, k, v, dout)]
        out, lse = ring_attention(*mine[:3], **own, return_lse=True)
        return out, lse, ring_attention_backward(mine[3], *mine[:3], out=out, lse=lse, **own)

    outs, lses, found = zip(*run_ranks(rank, 3, timeout=TIMEOUT), strict=True)
    out, lse = unshard(outs, layout, axis=0), unshard(lses, layout)
    starts, slope_shares = np.cumsum([0, *lengths]), []
    for i, (first, last) in enumerate(pairwise(starts)):
        mine = [x[None, first:last] for x in (q, k, v, dout)]
        own = {**options, "alibi_slopes": options["alibi_slopes"][i]} if slopes == 2 else options
        expected = on_one_device(mine, own)
        assert_matches(out[first:last], expected[0][0], **FEW_UNITS)
        assert_matches(lse[:, first:last], expected[1][0], **FEW_UNITS)
        for name in ("dq", "dk", "dv"):
            whole = unshard([getattr(x, name) for x in found], layout, axis=0)
            assert_matches(whole[first:last], expected[2][name][0], **FEW_UNITS)
        slope_shares.append(expected[2].get("dalibi_slopes"))
    if slopes is not None:
        expected = np.stack(slope_shares) if slopes == 2 else sum(slope_shares)
        assert_matches(sum(x.dalibi_slopes for x in found), expected, **FEW_UNITS)


@pytest.mark.parametrize(("method", "call"), [("attend", ring_attention), ("gradients", ring_attention_backward)])
def test_the_next_keys_are_on_their_way_while_these_are_attended(method, call, rng, monkeypatch):
    """At each step but the last: begun before, and waited for behind."""
    q, k, v, dout = draw(rng, 12)
    said = threading.local()
    attend = getattr(Work, method)

    def attending(*arguments):
        said.events.append("attend")
        return attend(*arguments)

    monkeypatch.setattr(Work, method, attending)

    def rank(comm):
        said.events = events = []
        receive = comm.receive

        def receiving(shape, dtype, source, like=None):
            message = receive(shape, dtype, source, like)
            from_behind = like is not None and like.ndim == 4 and source == (comm.rank - 1) % 3
            if not from_behind or events.count("begin") == 2:  # what ranks agree by; gradients, once all keys came
                return message
            events.append("begin")
            return SimpleNamespace(wait=lambda: (events.append("end"), message.wait())[1])

        comm.receive = receiving
        own = [shard(x, Sharding("contiguous", 3, (12,)), comm.rank) for x in (q, k, v, dout)]
        state = {"out": own[3], "lse": np.zeros((2, 4, 4))} if call is ring_attention_backward else {}
        call(*([own[3]] if state else []), *own[:3], comm=comm, **state)
        return events

    for events in run_ranks(rank, 3, timeout=TIMEOUT):
        assert events == ["begin", "attend", "end", "begin", "attend", "end", "attend"]


def test_heads_may_come_first(rng):
    q, k, v, _ = draw(rng, 10)
    layout = Sharding("zigzag", 2, (10,))

    def rank(comm):
        mine = [shard(x, layout, comm.rank).swapaxes(1, 2) for x in (q, k, v)]
        return ring_attention(*mine, comm=comm, causal=True, layout="bhsd").swapaxes(1, 2)

    assert_matches(unshard(run_ranks(rank, 2, timeout=TIMEOUT), layout), attention(q, k, v, causal=True), **FEW_UNITS)


def test_contiguous_shards_may_be_as_long_as_they_are(rng):
    q, k, v, _ = draw(rng, 10)
    cuts = [slice(0, 7), slice(7, 7), slice(7, 10)]

    def rank(comm):
        return ring_attention(
            *(x[:, cuts[comm.rank]] for x in (q, k, v)), comm=comm, sharding="contiguous", causal=True
        )

    out = np.concatenate(run_ranks(rank, 3, timeout=TIMEOUT), axis=1)
    assert_matches(out, attention(q, k, v, causal=True), **FEW_UNITS)


def test_a_gradient_of_lse_is_taken_along(rng):
    q, k, v, dout = draw(rng, 12)
    dlse = rng.standard_normal((2, 4, 12))

    def rank(comm):
        own = slice(6 * comm.rank, 6 * comm.rank + 6)
        return ring_attention_backward(*(x[:, own] for x in (dout, q, k, v)), dlse=dlse[:, :, own], comm=comm)

    found = run_ranks(rank, 2, timeout=TIMEOUT)
    expected = attention_backward(dout, q, k, v, dlse=dlse)
    for name in ("dq", "dk", "dv"):
        assert_matches(np.concatenate([getattr(x, name) for x in found], axis=1), getattr(expected, name), **FEW_UNITS)


def test_the_gradient_of_lse_goes_to_a_sink_of_infinity(rng):
    q, k, v, dout = draw(rng, 4)
    sinks, dlse = np.array([0.0, np.inf, 1.0, -np.inf]), rng.standard_normal((2, 4, 4))

    def rank(comm):
        return ring_attention_backward(dout, q, k, v, dlse=dlse, sinks=sinks, comm=comm)

    expected = attention_backward(dout, q, k, v, dlse=dlse, sinks=sinks)
    assert_matches(run_ranks(rank, 1)[0].dsinks, expected.dsinks, **FEW_UNITS)


def test_a_hidden_key_that_holds_nan_never_reaches_the_result(rng):
    arrays = draw(rng, 12, dtype=np.float64)
    arrays[1][:, 9] = arrays[2][:, 9] = np.nan
    out, _, _ = on_ranks(arrays, 3, "zigzag", {"causal": True})
    assert np.isfinite(out[:, :9]).all()
    assert np.isnan(out[:, 9:]).all()


def test_torch_has_gradients_by_its_autograd(rng):
    torch = pytest.importorskip("torch", reason="needs torch")
    arrays = draw(rng, dtype=np.float32)
    layout = Sharding("zigzag", 2, (21,))

    def rank(comm):
        q, k, v, dout = (torch.from_numpy(shard(x, layout, comm.rank)) for x in arrays)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = ring_attention(*leaves, comm=comm, causal=True)
        out.backward(dout)
        return [out.detach().numpy(), *(x.grad.numpy() for x in leaves)]

    found = [unshard(x, layout) for x in zip(*run_ranks(rank, 2, timeout=TIMEOUT), strict=True)]
    out, _, gradients = on_one_device([x.astype(np.float64) for x in arrays], {"causal": True})
    for actual, expected in zip(found, [out, *gradients.values()], strict=True):
        assert_correctly_rounded(actual, expected, "float32", share=0.99)


def test_what_torch_keeps_for_gradients_is_not_the_callers(rng):
    torch = pytest.importorskip("torch", reason="needs torch")
    x = torch.from_numpy(draw(rng, 6)[0]).transpose(1, 2)

    def gradient(attend, factor):
        leaves = [x.clone().requires_grad_() for _ in range(3)]
        out = attend(*leaves, layout="bhsd")
        loss = out.sum()
        with torch.no_grad():
            out.mul_(factor)
        loss.backward()
        return leaves[1].grad

    def rank(comm):
        return gradient(lambda *qkv, **options: ring_attention(*qkv, comm=comm, **options), 0.0)

    assert torch.allclose(run_ranks(rank, 1)[0], gradient(attention, 1.0))


@pytest.mark.parametrize("by", ["ring", "ulysses"])
def test_keys_of_one_sequence_serve_all_and_heads_of_values_may_be_others(by, rng):
    q, k, _, dout = draw(rng, 9)
    arrays = q, k[:1], rng.standard_normal((1, 9, 4, 6)), dout
    functions = {
        "ring": (ring_attention, ring_attention_backward),
        "ulysses": (ulysses_attention, ulysses_attention_backward),
    }
    options = {"causal": True}
    assert_same(on_ranks(arrays, 2, "zigzag", options, *functions[by]), on_one_device(arrays, options), **FEW_UNITS)
