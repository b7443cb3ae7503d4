"""Schedules: every piece's blocks of keys are somebody's, once, whatever lengths there are."""

from dataclasses import replace

import numpy as np
import pytest

from cupyattn.plan import choose
from cupyattn.plan.schedule import (
    OVERHEAD,
    cuts_of,
    most_cuts,
    places_of,
    schedule_of,
    shortest_share,
    splits_of,
)
from cupyattn.problem import NAMED_DEVICES, Layout, Mask, Problem, ScoreEdits, Sizes

H200 = NAMED_DEVICES["H200"]


def made(rng):
    """(pieces, lengths, blocks, shortest) of a batch, with sequences of none and sequences of very many."""
    count = int(rng.integers(0, 12))
    lengths = np.trunc(2.0 ** rng.uniform(0.0, rng.choice([3.0, 8.0, 24.0]), count)).astype(int) - 1
    pieces = rng.choice([0, 1, 1, 8, 40], count)
    return pieces.tolist(), lengths.tolist(), int(rng.integers(1, 30)), int(rng.integers(1, 9))


def walked(schedule, pieces, blocks):
    """What all thread blocks have of each piece: (thread block, start, stop, split, is it whole)."""
    found = {}
    for block in range(blocks):
        for sequence, piece, start, stop, split, is_whole in cuts_of(schedule, pieces, block):
            found.setdefault((sequence, piece), []).append((block, start, stop, split, is_whole))
    return found


@pytest.mark.parametrize("when", ["as they were", "as they have become"])
def test_cuts_of_a_piece_are_one_behind_the_other_from_its_first_block_to_its_end(rng, when):
    for _ in range(300):
        pieces, lengths, blocks, shortest = made(rng)
        schedule = schedule_of(pieces, lengths, blocks, shortest)
        if when == "as they have become":  # other rows, in the same memory
            pieces = rng.integers(0, 5, len(pieces)).tolist()
        found = walked(schedule, pieces, blocks)
        assert set(found) == {(index, piece) for index, count in enumerate(pieces) for piece in range(count)}
        for cuts in found.values():
            assert [split for *_, split, _ in cuts] == list(range(len(cuts)))
            assert [block for block, *_ in cuts] == list(range(cuts[0][0], cuts[0][0] + len(cuts)))
            assert [start for _, start, *_ in cuts] == [0, *(stop for _, _, stop, *_ in cuts[:-1])]
            assert cuts[-1][2] is None
            assert {is_whole for *_, is_whole in cuts} == {len(cuts) == 1}


def test_no_two_partial_results_have_one_place_and_all_places_are_there(rng):
    for _ in range(300):
        pieces, lengths, blocks, shortest = made(rng)
        schedule = schedule_of(pieces, lengths, blocks, shortest)
        taken = []
        for index, count in enumerate(pieces):
            for piece in range(count):
                places = places_of(
                    schedule, schedule.starts[index] + piece * (lengths[index] + OVERHEAD), lengths[index]
                )
                cuts = walked(schedule, pieces, blocks)[index, piece] if len(pieces) < 4 else None
                assert cuts is None or len(cuts) == len(places)
                taken += places if len(places) > 1 else []
        assert len(set(taken)) == len(taken)
        assert all(0 <= place < 2 * blocks for place in taken)


def test_splits_by_a_pieces_own_length_are_each_one_blocks(rng):
    for _ in range(300):
        pieces, lengths, blocks, shortest = made(rng)
        schedule = schedule_of(pieces, np.minimum(lengths, 300).tolist(), blocks, shortest)
        cut = [[(int(rng.integers(1, 9)), int(rng.integers(0, 50))) for _ in range(count)] for count in pieces]
        found = [item for block in range(blocks) for item in splits_of(schedule, pieces, block, cut)]
        expected = [
            (sequence, piece, split)
            for sequence, count in enumerate(pieces)
            for piece in range(count)
            for split in range(cut[sequence][piece][0])
        ]
        assert sorted(found) == expected


def test_no_share_is_longer_than_needed_or_shorter_than_is_worth_it(rng):
    for _ in range(300):
        pieces, lengths, blocks, shortest = made(rng)
        schedule = schedule_of(pieces, lengths, blocks, shortest)
        assert schedule.share >= shortest
        assert (
            schedule.share == shortest or (schedule.share - 1) * blocks < schedule.starts[-1] <= schedule.share * blocks
        )


def test_a_piece_gets_no_more_cuts_than_the_planner_says(rng):
    for _ in range(300):
        pieces, length, blocks = (int(rng.integers(1, x)) for x in (9, 3000, 300))
        shortest = shortest_share(256, 64)
        most = most_cuts(length, pieces, blocks, shortest)
        schedule = schedule_of([0, pieces, 0], [0, length, 0], blocks, shortest)
        cuts = walked(schedule, [0, pieces, 0], blocks).values()
        assert most == 1 or max(map(len, cuts)) <= most <= blocks


CACHED = Problem(
    Sizes((256,), 32, 8, 8, 1, 32768, 128, 128),
    Layout("bshd", cached=True),
    "float16",
    Mask(right=0, alignment="bottom-right"),
    ScoreEdits(0.1),
)


@pytest.mark.parametrize(
    ("batch", "capacity", "fixed"), [(256, 32768, None), (256, 32768, 2048), (512, 131072, None), (1, 32768, None)]
)
def test_a_step_over_a_cache_has_no_more_thread_blocks_than_the_gpu_runs_at_once(batch, capacity, fixed):
    problem = replace(CACHED, sizes=replace(CACHED.sizes, batch_shape=(batch,), seqlen_k=capacity))
    chosen = choose(problem, H200, fixed)
    assert chosen.kernel == "splitkv"
    assert chosen.num_splits > 1
    assert chosen.num_workers == chosen.num_slots == 2 * 132
    assert "workers    264" in str(chosen)
