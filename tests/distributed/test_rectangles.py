"""Rectangles: together they are who sees whom, pair by pair, and `attention` can be asked for each."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cupyattn.distributed import Sharding
from cupyattn.distributed.rectangles import Band, rectangles_of, shifts_of

sides = st.one_of(st.none(), st.integers(0, 12))


def seen_by(rectangle):
    """(row, key) pairs of a rectangle, by what it says to `attention`: a band, top-left."""
    left, right = rectangle.window
    rows = range(rectangle.rows.start, rectangle.rows.stop, rectangle.rows.step)
    for i, row in enumerate(rows):
        for j in range(len(rectangle.keys)):
            if (left is None or i - j <= left) and (right is None or j - i <= right):
                yield row, rectangle.keys.start + j, rectangle.places[j]


def apart(rectangle, row, key):
    """Tokens from a key to a row's diagonal, as the CPU counts them."""
    rows, step = row - rectangle.rows.start, rectangle.places.step
    return rectangle.diagonal + step * (rows // rectangle.rows.step - (key - rectangle.keys.start))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.sampled_from(["contiguous", "zigzag", "striped"]),
    st.integers(1, 5),
    st.integers(0, 25),
    st.integers(0, 25),
    sides,
    sides,
    st.booleans(),
)
def test_rectangles_are_who_sees_whom(kind, size, seqlen_q, seqlen_k, left, right, bottom_right):
    rows, keys = Sharding(kind, size, (seqlen_q,)), Sharding(kind, size, (seqlen_k,))
    band = Band(left, right, bottom_right)
    seen, ahead = np.zeros((seqlen_q, seqlen_k), int), (seqlen_k - seqlen_q) * bottom_right
    for mine, of_rows in enumerate(rows.pieces):
        for owner, of_keys in enumerate(keys.pieces):
            for rectangle in rectangles_of(of_rows, of_keys, shifts_of(rows, keys, band), band):
                assert all(side is None or side >= 0 for side in rectangle.window)
                pairs = list(seen_by(rectangle))
                assert len(pairs) == rectangle.count_visible > 0
                for row, key, place in pairs:
                    assert keys.positions(owner)[key] == place
                    assert apart(rectangle, row, key) == rows.positions(mine)[row] + ahead - place
                    seen[rows.positions(mine)[row], place] += 1
    distance = np.arange(seqlen_k) - (np.arange(seqlen_q) + (seqlen_k - seqlen_q) * bottom_right)[:, None]
    expected = np.ones(seen.shape, bool)
    expected &= True if left is None else distance >= -left
    expected &= True if right is None else distance <= right
    assert (seen == expected).all()


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 5), st.integers(0, 6), st.integers(0, 25), sides, sides)
def test_neighbours_see_striped_keys_too(size, seqlen_q, seqlen_k, left, right):
    """Queries that are on every rank, as of a decode, over keys of which each rank has every size-th."""
    rows, keys = Sharding("contiguous", 1, (seqlen_q,)), Sharding("striped", size, (seqlen_k,))
    band = Band(left, right, True)
    seen = np.zeros((seqlen_q, seqlen_k), int)
    for of_keys in keys.pieces:
        for rectangle in rectangles_of(rows.pieces[0], of_keys, (seqlen_k - seqlen_q,), band):
            for row, _, place in seen_by(rectangle):
                seen[row, place] += 1
    distance = np.arange(seqlen_k) - (np.arange(seqlen_q) + seqlen_k - seqlen_q)[:, None]
    expected = np.ones(seen.shape, bool)
    expected &= True if left is None else distance >= -left
    expected &= True if right is None else distance <= right
    assert (seen == expected).all()


def test_sequences_that_are_packed_do_not_see_each_other():
    packed = Sharding("zigzag", 2, (5, 7))
    band = Band(None, None, True)
    found = rectangles_of(packed.pieces[0], packed.pieces[1], (0, 0), band)
    assert {x.sequence for x in found} == {0, 1}
    of_sequence = [[sum(len(x) for x in pieces if x.sequence == i) for i in range(2)] for pieces in packed.pieces]
    assert sum(x.count_visible for x in found) == sum(rows * keys for rows, keys in zip(*of_sequence, strict=True))
