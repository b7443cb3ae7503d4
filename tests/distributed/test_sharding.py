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


def test_packed_sequences_may_have_lengths_of_their_own_on_each_rank():
    sharding = Sharding("contiguous", 3, (9, 0, 4), ((4, 0, 1), (0, 0, 3), (5, 0, 0)))
    assert [sharding.positions(rank) for rank in range(3)] == [(0, 1, 2, 3, 9), (10, 11, 12), (4, 5, 6, 7, 8)]


def test_lengths_of_one_sequence_may_be_said_as_those_of_several():
    one, several = (Sharding("contiguous", 2, (9,), lengths) for lengths in ((4, 5), ((4,), (5,))))
    assert one.pieces == several.pieces


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 5), st.lists(st.integers(0, 20), max_size=3))
def test_a_striped_sequence_grows_on_one_rank_behind_what_it_has(size, seqlens):
    """As a cache does: the next key goes to rank n % size, as the docs say."""
    for sequence, seqlen in enumerate(seqlens):
        grown = [n + (i == sequence) for i, n in enumerate(seqlens)]
        before, after = (Sharding("striped", size, tuple(lengths)) for lengths in (seqlens, grown))
        for rank in range(size):
            own, then = (
                [place for x in layout.pieces[rank] if x.sequence == sequence for place in range(*x[1:4])]
                for layout in (before, after)
            )
            new = [seqlen] if rank == seqlen % size else []
            assert then == own + new


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("spiral", 2, (8,)), "kind has to be one of"),
        (("zigzag", 0, (8,)), "size has to be"),
        (("zigzag", 2, (4, -1)), r"seqlens\[1\] has to be"),
        (("contiguous", 2, (4,), (5, -1)), r"lengths\[1\] has to be"),
        (("zigzag", 2, (8,), (4, 4)), "lengths are for the contiguous"),
        (("contiguous", 2, (8,), (4, 5)), "add up"),
        (("striped", 2, (8, 1), ((4, 1), (4, 0))), "lengths are for the contiguous"),
        (("contiguous", 2, (8, 2), ((4, 1), (4, -1))), r"lengths\[1\]\[1\] has to be"),
        (("contiguous", 2, (8, 2), ((4, 1), (4, 0))), "add up"),
        (("contiguous", 2, (8, 2), ((4, 1), (4, 1), (0, 0))), "one for each rank and sequence"),
        (("contiguous", 2, (8, 2), ((4, 1), (4, 1, 0))), "one for each rank and sequence"),
        (("contiguous", 2, (8, 0), ((4,), (4,))), "one for each rank and sequence"),
    ],
)
def test_what_is_no_layout_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        Sharding(*arguments)


def test_seqlens_that_are_no_tuple_are_refused():
    with pytest.raises(TypeError, match="seqlens have to be a tuple"):
        Sharding("zigzag", 2, [8])


@pytest.mark.parametrize("lengths", [(4, 4), [(4, 1), (4, 1)], ([4, 1], [4, 1])])
def test_lengths_of_several_sequences_that_are_no_tuples_are_refused(lengths):
    with pytest.raises(TypeError, match="lengths have to be a tuple of tuples, or None"):
        Sharding("contiguous", 2, (8, 2), lengths)


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
