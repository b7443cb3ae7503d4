"""Decoding over keys that are shared out is attention over all of them, the same on every rank."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_correctly_rounded, assert_matches, assert_same_bits
from ranks import TIMEOUT, draw, drawn_options, on_one_device

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
