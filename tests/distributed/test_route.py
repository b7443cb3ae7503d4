"""What goes round the ring: all that somebody further along sees, and nothing else; the same work for all."""

import pytest

from cupyattn.distributed import Sharding
from cupyattn.distributed.rectangles import Band
from cupyattn.distributed.route import count, joined, route_of
from cupyattn.problem import Span

CAUSAL = Band(None, 0, True)


def route(kind, size, seqlen, band):
    sharding = Sharding(kind, size, (seqlen,))
    return route_of(sharding, sharding, band)


@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("band", [CAUSAL, Band(9, 0, True), Band(3, 4, True), Band(None, None, True)], ids=str)
def test_what_a_rank_sees_is_carried_to_it(kind, band):
    way = route(kind, 4, 50, band)
    for rank in range(4):
        for step in range(4):
            owner = way.owner(rank, step)
            carried = way.carried(owner, step)
            for rectangle in way.seen(rank, owner):
                assert any(x.start <= rectangle.keys.start and rectangle.keys.stop <= x.stop for x in carried)


def test_without_a_window_all_keys_go_all_the_way():
    way = route("contiguous", 4, 40, Band(None, None, True))
    assert [way.keys_sent(1, step) for step in range(4)] == [10, 10, 10, 0]


def test_with_a_window_only_who_is_seen_goes_on():
    way = route("contiguous", 4, 40, Band(3, 0, True))
    assert [way.keys_sent(1, step) for step in range(4)] == [3, 0, 0, 0]
    assert [way.keys_sent(3, step) for step in range(4)] == [0, 0, 0, 0]  # nobody is behind it


def test_causal_zigzag_is_the_same_work_for_all():
    pairs = [route("zigzag", 8, 8192, CAUSAL).pairs(rank) for rank in range(8)]
    assert max(pairs) <= 1.05 * sum(pairs) / 8


def test_causal_contiguous_is_not():
    pairs = [route("contiguous", 8, 8192, CAUSAL).pairs(rank) for rank in range(8)]
    assert max(pairs) > 1.8 * sum(pairs) / 8


def test_stretches_that_touch_are_one():
    assert joined([Span(4, 6), Span(0, 2), Span(2, 3), Span(5, 9), Span(7, 7)]) == (Span(0, 3), Span(4, 9))
    assert count((Span(0, 3), Span(4, 9))) == 8
