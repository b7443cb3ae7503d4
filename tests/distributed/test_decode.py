"""Decoding over keys that are shared out is attention over all of them, the same on every rank."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_correctly_rounded, assert_matches, assert_same_bits
from ranks import TIMEOUT, draw, drawn_options, on_one_device

from cupyattn import attention, attention_backward
from cupyattn.distributed import Sharding, run_ranks, sharded_decode, sharded_decode_backward
from cupyattn.distributed import shard_sequence as shard
from cupyattn.distributed import unshard_sequence as unshard

FEW_UNITS = {"rtol": 1e-12, "atol": 1e-13}
NAMES = [name for name in drawn_options(np.random.default_rng(0)) if name != "nothing"]


def on_ranks(arrays, size, kind, options):
    """(out, lse, gradients) of each rank, those of keys put together."""
    q, k, v, dout = arrays
    keys = Sharding(kind, size, (k.shape[1],))

    def rank(comm):
        own = {**options, "comm": comm, "sharding": kind}
        mine = [q, shard(k, keys, comm.rank), shard(v, keys, comm.rank)]
        out, lse = sharded_decode(*mine, **own, return_lse=True)
        return out, lse, sharded_decode_backward(dout, *mine, out=out, lse=lse, **own)

    found = run_ranks(rank, size, timeout=TIMEOUT)
    of_keys = {name: unshard([getattr(x[2], name) for x in found], keys) for name in ("dk", "dv")}
    return [(out, lse, {**gradients._asdict(), **of_keys}) for out, lse, gradients in found]


def assert_same(arrays, size, kind, options):
    expected = on_one_device(arrays, options)
    for found in on_ranks(arrays, size, kind, options):
        for actual, wanted in zip(found[:2], expected[:2], strict=True):
            assert_matches(actual, wanted, **FEW_UNITS)
        for name, wanted in expected[2].items():
            assert_matches(found[2][name], wanted, **FEW_UNITS)


@pytest.mark.parametrize("name", NAMES)
def test_with_every_argument_all_ranks_have_attention_and_its_gradients(name, rng):
    options = {"alignment": "bottom-right", **drawn_options(rng, 3, 21)[name]}
    assert_same(draw(rng, 3, 21), 3, "zigzag", options)


@pytest.mark.parametrize("name", ["ALiBi", "ALiBi both ways"])
def test_striped_keys_are_as_far_from_rows_as_their_places_in_the_sequence(name, rng):
    assert_same(draw(rng, 4, 21), 3, "striped", {"alignment": "bottom-right", **drawn_options(rng, 4, 21)[name]})


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.data())
def test_any_lengths_and_shards(data):
    side = st.one_of(st.none(), st.integers(0, 12))
    options = {"window_size": (data.draw(side), data.draw(side)), "alignment": "bottom-right"}
    lengths = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 17))
    kind = data.draw(st.sampled_from(["contiguous", "zigzag", "striped"]))
    assert_same(draw(np.random.default_rng(1), *lengths, batch=1), data.draw(st.integers(1, 4)), kind, options)


@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "striped"])
def test_eight_ranks_have_attention_and_its_gradients(kind, rng):
    name = "ALiBi both ways"
    assert_same(draw(rng, 3, 21), 8, kind, {"alignment": "bottom-right", **drawn_options(rng, 3, 21)[name]})


def test_all_ranks_have_the_same_bits_rounded_once(rng):
    arrays = draw(rng, 2, 30, dtype=np.float32)
    exact = on_one_device([x.astype(np.float64) for x in arrays], {})
    first, *others = on_ranks(arrays, 4, "striped", {})
    assert_correctly_rounded(first[0], exact[0], "float32")
    for other in others:
        assert_same_bits(other[0], first[0])


def test_a_rank_may_have_no_keys(rng):
    q, k, v, _ = draw(rng, 1, 5)

    def rank(comm):
        own = slice(0, 5 if comm.rank == 1 else 0)
        return sharded_decode(q, k[:, own], v[:, own], comm=comm)

    for out in run_ranks(rank, 3, timeout=TIMEOUT):
        assert_matches(out, on_one_device((q, k, v, q[..., :6]), {})[0], **FEW_UNITS)


def test_other_queries_on_another_rank_are_refused(rng):
    q, k, v, _ = draw(rng, 4, 4)

    def rank(comm):
        with pytest.raises(ValueError, match="all ranks have to have the same queries"):
            sharded_decode(q[:, : 1 + comm.rank], k, v, comm=comm)
        return True

    assert run_ranks(rank, 2, timeout=TIMEOUT) == [True, True]


# ---- Packed sequences ---------------------------------------------------------------------------


SEQLENS_Q, SEQLENS_K = (2, 0, 3, 1, 4), (13, 4, 0, 7, 2)
"""A sequence without queries, one without keys, and one with more queries than keys."""
SLOPES = np.array([0.1, 0.2, 0.4, -0.01])
OF_PACKED = {
    "nothing": {},
    "causal": {"causal": True},
    "a window": {"window_size": (4, 1)},
    "a window that sees little": {"window_size": (0, 0)},
    "softcap and a scale": {"causal": True, "softcap": 2.0, "softmax_scale": -0.3},
    "sinks": {"causal": True, "sinks": np.array([0.0, 1.0, -1.0, np.inf])},
    "ALiBi": {"causal": True, "alibi_slopes": SLOPES},
    "ALiBi both ways, of each sequence": {"alibi_slopes": np.arange(1.0, 6.0)[:, None] * SLOPES},
    "ALiBi in a window": {"window_size": (5, 3), "alibi_slopes": SLOPES, "sinks": np.ones(4)},
}


def packed(rng, seqlens_q=SEQLENS_Q, seqlens_k=SEQLENS_K, dtype=np.float64):
    """q, k, v, dout and dlse of sequences end to end."""
    arrays = [x[0] for x in draw(rng, sum(seqlens_q), sum(seqlens_k), batch=1, dtype=dtype)]
    return [*arrays, rng.standard_normal((4, sum(seqlens_q))).astype(dtype)]


def packed_on_ranks(arrays, seqlens_q, layout, options):
    """(out, lse, gradients) of each rank, those of keys put together."""
    q, k, v, dout, dlse = arrays

    def rank(comm):
        own = {**options, "comm": comm, "sharding": layout, "seqlens_q": seqlens_q}
        mine = [q, *(shard(x, layout, comm.rank, axis=0) for x in (k, v))]
        out, lse = sharded_decode(*mine, **own, return_lse=True)
        return out, lse, sharded_decode_backward(dout, *mine, out=out, lse=lse, dlse=dlse, **own)

    found = run_ranks(rank, layout.size, timeout=TIMEOUT)
    of_keys = {name: unshard([getattr(x[2], name) for x in found], layout, axis=0) for name in ("dk", "dv")}
    return [(out, lse, {**gradients._asdict(), **of_keys}) for out, lse, gradients in found]


def each_alone(arrays, seqlens_q, seqlens_k, options):
    """The same of one sequence after the other, by `attention`, end to end again."""
    q, k, v, dout, dlse = arrays
    slopes = options.get("alibi_slopes", np.zeros(4))
    parts = []
    for i, (rows, keys) in enumerate(zip(pieces_of(seqlens_q), pieces_of(seqlens_k), strict=True)):
        own = options if slopes.ndim == 1 else {**options, "alibi_slopes": slopes[i]}
        mine = [q[None, rows], k[None, keys], v[None, keys]]
        out, lse = attention(*mine, **own, return_lse=True)
        found = attention_backward(dout[None, rows], *mine, dlse=dlse[None, :, rows], **own)
        parts.append((out[0], lse[0], found))
    gradients = {name: np.concatenate([getattr(x[2], name)[0] for x in parts]) for name in ("dq", "dk", "dv")}
    if "sinks" in options:
        gradients["dsinks"] = sum(x[2].dsinks for x in parts)
    if "alibi_slopes" in options:
        shares = [x[2].dalibi_slopes for x in parts]
        gradients["dalibi_slopes"] = sum(shares) if slopes.ndim == 1 else np.stack(shares)
    outs, lses = ([x[i] for x in parts] for i in range(2))
    return np.concatenate(outs), np.concatenate(lses, axis=1), gradients


def pieces_of(seqlens):
    return [slice(first, last) for first, last in pairwise(np.cumsum([0, *seqlens]))]


def assert_each_is_alone(arrays, seqlens_q, layout, options):
    expected = each_alone(arrays, seqlens_q, layout.seqlens, options)
    for found in packed_on_ranks(arrays, seqlens_q, layout, options):
        for actual, wanted in zip(found[:2], expected[:2], strict=True):
            assert_matches(actual, wanted, **FEW_UNITS)
        assert {name for name, x in found[2].items() if x is not None} == expected[2].keys()
        for name, wanted in expected[2].items():
            assert_matches(found[2][name], wanted, **FEW_UNITS)


@pytest.mark.parametrize("alignment", ["bottom-right", "top-left"])
@pytest.mark.parametrize("kind", ["zigzag", "striped"])
@pytest.mark.parametrize("name", OF_PACKED)
def test_packed_sequences_are_attention_and_its_gradients_of_each_alone(name, kind, alignment, rng):
    options = {"alignment": alignment, **OF_PACKED[name]}
    assert_each_is_alone(packed(rng), SEQLENS_Q, Sharding(kind, 3, SEQLENS_K), options)


@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_packed_sequences_on_any_number_of_ranks(size, kind, rng):
    options = {"alignment": "bottom-right", **OF_PACKED["ALiBi in a window"]}
    assert_each_is_alone(packed(rng), SEQLENS_Q, Sharding(kind, size, SEQLENS_K), options)


def test_ranks_may_have_as_much_of_each_packed_sequence_as_they_do(rng):
    layout = Sharding("contiguous", 3, SEQLENS_K, ((13, 1, 0, 0, 0), (0, 0, 0, 7, 1), (0, 3, 0, 0, 1)))
    options = {"alignment": "bottom-right", **OF_PACKED["ALiBi"]}
    assert_each_is_alone(packed(rng), SEQLENS_Q, layout, options)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_any_lengths_of_packed_sequences_and_shards(data):
    size, count = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 4))
    side, lengths = (
        st.one_of(st.none(), st.integers(0, 12)),
        st.lists(st.integers(0, 9), min_size=count, max_size=count),
    )
    kind, seqlens_q = data.draw(st.sampled_from(["contiguous", "zigzag", "striped", "uneven"])), data.draw(lengths)
    if kind == "uneven":
        of_ranks = tuple(tuple(data.draw(lengths)) for _ in range(size))
        layout = Sharding("contiguous", size, tuple(map(sum, zip(*of_ranks, strict=True))), of_ranks)
    else:
        layout = Sharding(kind, size, tuple(data.draw(lengths)))
    options = {
        "window_size": (data.draw(side), data.draw(side)),
        "alignment": data.draw(st.sampled_from(["top-left", "bottom-right"])),
        "alibi_slopes": data.draw(st.sampled_from([SLOPES, np.arange(count)[:, None] * SLOPES])),
    }
    if count:
        assert_each_is_alone(packed(np.random.default_rng(1), seqlens_q, layout.seqlens), seqlens_q, layout, options)
    else:
        no_rows = packed_on_ranks(packed(np.random.default_rng(1), (), ()), (), layout, options)
        assert [(out.shape, lse.shape) for out, lse, _ in no_rows] == [((0, 4, 6), (4, 0))] * size


def test_packed_sequences_have_a_query_each_where_nothing_is_said(rng):
    layout = Sharding("zigzag", 2, SEQLENS_K)
    arrays, options = packed(rng, (1,) * 5), {"causal": True, "alignment": "bottom-right"}
    for found, said in zip(
        packed_on_ranks(arrays, None, layout, options), packed_on_ranks(arrays, [1] * 5, layout, options), strict=True
    ):
        assert_same_bits(found[0], said[0])
        assert_same_bits(found[2]["dk"], said[2]["dk"])
    assert_matches(found[0], each_alone(arrays, (1,) * 5, SEQLENS_K, options)[0], **FEW_UNITS)


def test_rows_of_packed_sequences_that_see_no_key_are_zero(rng):
    layout, options = Sharding("striped", 3, SEQLENS_K), {"causal": True, "alignment": "bottom-right"}
    for out, lse, gradients in packed_on_ranks(packed(rng), SEQLENS_Q, layout, options):
        for blind in (slice(2, 5), slice(6, 8)):  # of the sequence without keys; the first rows of the last
            assert not out[blind].any()
            assert np.isneginf(lse[:, blind]).all()
            assert not gradients["dq"][blind].any()
        assert np.isfinite(lse[:, [0, 1, 5, 8, 9]]).all()


def test_numbers_that_are_none_stay_in_their_own_packed_sequence(rng):
    arrays = packed(rng)
    arrays[1][13:17] = arrays[2][17:20] = np.nan  # keys of the second, values of the fourth
    options = {"causal": True, "alignment": "bottom-right"}
    for out, _, gradients in packed_on_ranks(arrays, SEQLENS_Q, Sharding("zigzag", 3, SEQLENS_K), options):
        assert np.isnan(out).any(axis=(1, 2)).tolist() == [False] * 5 + [True] + [False] * 4
        assert np.isfinite(gradients["dk"][[*range(13), 24, 25]]).all()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_packed_sequences_are_rounded_once_and_the_same_on_all_ranks(dtype, rng):
    lengths = (2, 0, 1, 4), (13, 4, 7, 6)
    arrays, layout, options = packed(rng, *lengths, dtype), Sharding("striped", 4, lengths[1]), {"softcap": 2.0}
    exact = each_alone([x.astype(np.float64) for x in arrays], *lengths, options)
    first, *others = packed_on_ranks([*arrays[:4], arrays[4].astype(np.float32)], lengths[0], layout, options)
    assert (first[0].dtype, first[1].dtype) == (dtype, np.float32)
    assert_correctly_rounded(first[0], exact[0], dtype)
    assert_correctly_rounded(first[1], exact[1], "float32")
    for name in ("dq", "dk", "dv"):
        assert_correctly_rounded(first[2][name], exact[2][name], dtype, share=0.995)
    for other in others:
        assert_same_bits(other[0], first[0])
        assert_same_bits(other[2]["dq"], first[2]["dq"])
