"""Threads as ranks: messages, and what all of them do together."""

import numpy as np
import pytest

from cupyattn.distributed import RankFailed, run_ranks


def test_a_message_is_what_it_was_when_it_was_sent():
    def rank(comm):
        if comm.rank == 0:
            array = np.arange(3)
            sent = comm.send(array, 1)
            sent.wait()
            array[:] = 0
            comm.send(array, 1).wait()
            return None
        return [comm.receive((3,), np.int64, 0).wait().tolist() for _ in range(2)]

    assert run_ranks(rank, 2)[1] == [[0, 1, 2], [0, 0, 0]]


def test_a_message_of_another_shape_is_an_error():
    def rank(comm):
        if comm.rank == 0:
            comm.send(np.arange(3), 1)
        else:
            comm.receive((4,), np.int64, 0).wait()

    with pytest.raises(RankFailed, match=r"rank 0 sent \(3,\) of int64, and \(4,\) of int64 was expected"):
        run_ranks(rank, 2)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_all_to_all_is_a_transposition(size):
    def rank(comm):
        going = [np.full((to + 1,), 10 * comm.rank + to) for to in range(size)]
        return comm.all_to_all(going, [(comm.rank + 1,)] * size)

    for to, came in enumerate(run_ranks(rank, size)):
        assert [x.tolist() for x in came] == [[10 * source + to] * (to + 1) for source in range(size)]


def test_all_gather_is_in_the_order_of_ranks():
    found = run_ranks(lambda comm: comm.all_gather(np.array([comm.rank])), 4)
    assert all(np.concatenate(x).tolist() == [0, 1, 2, 3] for x in found)


def test_all_reduce_adds_up_in_the_order_of_ranks_everywhere():
    values = [1e16, 1.0, -1e16, 1.0]
    found = run_ranks(lambda comm: comm.all_reduce(np.array([values[comm.rank]])), 4)
    assert {float(x[0]) for x in found} == {((1e16 + 1.0) - 1e16) + 1.0}


def test_what_a_rank_raises_is_raised():
    def rank(comm):
        raise KeyError(comm.rank)

    with pytest.raises(KeyError):
        run_ranks(rank, 3)


@pytest.mark.parametrize("arguments", [{"size": 0}, {"size": 2, "timeout": 0.0}, {"size": 2, "timeout": -1.0}])
def test_sizes_and_timeouts_that_are_none_are_refused(arguments):
    with pytest.raises(ValueError, match=r"run_ranks: (size|timeout) has to be"):
        run_ranks(lambda comm: None, **arguments)
