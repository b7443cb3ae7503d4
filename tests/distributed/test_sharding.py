"""The layout as a value: every token is somebody's, once, and what was cut is put together again."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cupyattn.distributed import Sharding, shard_sequence, unshard_sequence

KINDS = ("contiguous", "zigzag", "striped")
shardings = st.builds(
    Sharding,
    st.sampled_from(KINDS),
    st.integers(1, 9),
    st.lists(st.integers(0, 40), min_size=1, max_size=4).map(tuple),
)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(shardings)
def test_every_token_is_of_one_rank(sharding):
    places = [place for rank in range(sharding.size) for place in sharding.positions(rank)]
    assert sorted(places) == list(range(sum(sharding.seqlens)))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(shardings)
def test_unshard_is_the_inverse_of_shard(sharding):
    whole = np.arange(2 * sum(sharding.seqlens)).reshape(2, -1)
    shards = [shard_sequence(whole, sharding, rank) for rank in range(sharding.size)]
    assert (unshard_sequence(shards, sharding) == whole).all()


@settings(max_examples=50, deadline=None, derandomize=True)
@given(shardings)
def test_pieces_lie_end_to_end_on_their_rank(sharding):
    for rank, pieces in enumerate(sharding.pieces):
        lengths = [len(piece) for piece in pieces]
        assert [piece.local.start for piece in pieces] == [sum(lengths[:i]) for i in range(len(pieces))]
        assert sum(lengths) == sharding.length(rank)


def test_a_contiguous_sequence_may_have_lengths_of_its_own():
    sharding = Sharding("contiguous", 3, (9,), (4, 0, 5))
    assert [sharding.positions(rank) for rank in range(3)] == [(0, 1, 2, 3), (), (4, 5, 6, 7, 8)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("spiral", 2, (8,)), "kind has to be one of"),
        (("zigzag", 0, (8,)), "size has to be"),
        (("zigzag", 2, (4, -1)), r"seqlens\[1\] has to be"),
        (("contiguous", 2, (4,), (5, -1)), r"lengths\[1\] has to be"),
        (("zigzag", 2, (8,), (4, 4)), "lengths are for the contiguous"),
        (("contiguous", 2, (8,), (4, 5)), "add up"),
    ],
)
def test_what_is_no_layout_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        Sharding(*arguments)


def test_seqlens_that_are_no_tuple_are_refused():
    with pytest.raises(TypeError, match="seqlens have to be a tuple"):
        Sharding("zigzag", 2, [8])


def test_an_array_of_another_length_is_not_cut():
    with pytest.raises(ValueError, match="as long as the layout says, 8"):
        shard_sequence(np.ones((1, 9)), Sharding("zigzag", 2, (8,)), 0)


def test_a_rank_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="rank has to be"):
        shard_sequence(np.ones((1, 8)), Sharding("zigzag", 2, (8,)), 2)


@pytest.mark.parametrize(("count", "said"), [(1, "one of each rank, 2"), (2, "rank 1's has to be as long")])
def test_shards_that_are_not_those_of_the_layout_are_refused(count, said):
    with pytest.raises(ValueError, match=said):
        unshard_sequence([np.ones((1, 4)), np.ones((1, 5))][:count], Sharding("zigzag", 2, (8,)))
