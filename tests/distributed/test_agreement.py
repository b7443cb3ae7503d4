"""Bad input, and ranks that differ, die or go away: an error on every rank, in time, that says what came."""

import time

import numpy as np
import pytest

from cupyattn.distributed import (
    RankFailed,
    Sharding,
    ring_attention,
    ring_attention_backward,
    run_ranks,
    sharded_decode,
    sharded_decode_backward,
    ulysses_attention,
)

X = np.ones((1, 4, 2, 8))


def errors_of(function, size=3, timeout=120.0):
    """What each rank raises; no rank may return."""

    def rank(comm):
        try:
            function(comm)
        except Exception as error:
            return error
        return None

    began = time.monotonic()
    found = run_ranks(rank, size, timeout=timeout)
    assert time.monotonic() - began < timeout + 60.0
    assert None not in found
    return found


def call(comm, at=None, **changes):
    """A call that is right; on rank `at`, or on all, with other arguments."""
    arguments = {"q": X, "k": X, "v": X, "comm": comm}
    if at is None or comm.rank == at:
        arguments |= changes
    return ring_attention(**arguments)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"q": np.ones((1, 4, 2, 16)), "k": np.ones((1, 4, 2, 16))}, "agree about the shape of q"),
        ({name: X.astype(np.float32) for name in "qkv"}, "agree about the dtype of q"),
        ({"causal": True}, "agree about causal"),
        ({"softcap": 3.0}, "agree about softcap"),
        ({"window_size": (2, 3)}, "agree about window_size"),
        ({"sharding": "striped"}, "agree about sharding"),
        ({"sinks": np.ones(2)}, "agree about the dtype of sinks"),
        ({"k": np.ones((1, 4, 1, 8))}, "agree about the shape of k"),
    ],
    ids=lambda x: x if isinstance(x, str) else " ".join(x),
)
def test_a_rank_that_differs_is_an_error_on_all(changes, said):
    for error in errors_of(lambda comm: call(comm, at=1, **changes)):
        assert type(error) is ValueError
        assert said in str(error)
        assert "rank 1" in str(error)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dout": np.ones((1, 4, 3, 8))}, "dout has to have the shape (1, 4, 2, 8)"),
        ({"dlse": np.ones((1, 2, 5))}, "dlse has to have the shape (1, 2, 4)"),
    ],
    ids=lambda x: x if isinstance(x, str) else " ".join(x),
)
def test_what_gradients_come_with_on_one_rank_is_an_error_on_all(changes, said):
    def function(comm):
        given = {"dout": X, "dlse": np.ones((1, 2, 4))} | (changes if comm.rank == 1 else {})
        with pytest.raises(ValueError, match="ring_attention_backward") as found:
            ring_attention_backward(q=X, k=X, v=X, comm=comm, **given)
        np.testing.assert_allclose(call(comm), X)  # nobody is in another call than the others
        raise found.value

    for rank, error in enumerate(errors_of(function)):
        assert said in str(error)
        assert rank == 1 or "rank 1 was refused its arguments" in str(error)


def test_a_flag_that_is_none_on_one_rank_is_an_error_on_all():
    def function(comm):
        with pytest.raises((TypeError, ValueError), match="return_lse has to be True or False") as found:
            call(comm, at=1, return_lse=3)
        np.testing.assert_allclose(call(comm), X)
        raise found.value

    errors_of(function)


@pytest.mark.parametrize("change", ["a word more", "an array less"])
def test_arguments_that_are_none_of_the_functions_on_one_rank_are_heard_of_by_all(change):
    """Its next call would be taken for this one, with the numbers of that."""

    def function(comm):
        if comm.rank != 1:
            return call(comm)
        with pytest.raises(TypeError):
            ring_attention(X, X, X, comm=comm, casual=True) if change == "a word more" else ring_attention(
                X, X, comm=comm
            )
        return call(comm)

    for error in errors_of(function):
        assert type(error) is RankFailed
        assert "rank 1 gave up: TypeError: ring_attention" in str(error)


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"q": [[1.0]]}, TypeError, "q has to be an array"),
        ({"softcap": -1.0}, ValueError, "softcap has to be"),
        ({"window_size": 3}, TypeError, "window_size has to be a pair"),
        ({"sharding": "spiral"}, ValueError, "sharding has to be a Sharding"),
        ({"sharding": Sharding("zigzag", 2, (12,))}, ValueError, "as many ranks as there are, 3"),
        ({"implementation": "magic"}, ValueError, "no implementation 'magic'"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, dict) else None,
)
def test_what_one_rank_is_refused_all_others_hear_of(changes, kind, said):
    errors = errors_of(lambda comm: call(comm, at=2, **changes))
    assert type(errors[2]) is kind
    assert all(said in str(error) for error in errors)
    for error in errors[:2]:
        assert "rank 2 was refused" in str(error)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mask": np.ones((4, 13), bool)}, "mask does not broadcast"),
        ({"bias": np.ones((5, 12))}, "bias does not broadcast"),
        ({"k": np.ones((1, 4, 3, 8)), "v": np.ones((1, 4, 3, 8))}, "divide"),
        ({"v": np.ones((1, 5, 2, 8))}, "k and v"),
        ({"sinks": np.ones(3)}, "sinks has to hold one logit"),
        ({"q": np.ones((4, 2, 8))}, "q has to have 4 axes"),
        ({"sharding": Sharding("zigzag", 3, (13,))}, "not as long as the layout says"),
        ({"sharding": Sharding("zigzag", 3, (6, 6))}, "has one length"),
        ({"k": X[:, :3], "v": X[:, :3], "causal": True, "sharding": "contiguous"}, "alignment has to be chosen"),
    ],
    ids=lambda x: x if isinstance(x, str) else " ".join(x),
)
def test_what_cannot_be_meant_is_refused_on_all_ranks(changes, said):
    for error in errors_of(lambda comm: call(comm, **changes)):
        assert type(error) is ValueError
        assert said in str(error)


@pytest.mark.parametrize("shape", [(6, 6, 4), (6, 3, 4)])
@pytest.mark.parametrize("function", [ring_attention, ulysses_attention, sharded_decode])
def test_packed_sequences_with_heads_first_are_refused_on_all_ranks(function, shape):
    """As many heads as tokens would be attended as each other, in silence."""
    x, layout = np.ones(shape), Sharding("contiguous", 3, (8, 10))
    for error in errors_of(lambda comm: function(x, x, x, comm=comm, sharding=layout, layout="bhsd")):
        assert type(error) is ValueError
        assert f"{function.__name__}: packed sequences are (tokens, num_heads, head_dim), and layout is" in str(error)


LAYOUT = Sharding("contiguous", 3, (6, 9))
DECODE = {"q": np.ones((3, 2, 4)), **dict.fromkeys("kv", np.ones((5, 2, 4))), "sharding": LAYOUT, "seqlens_q": (1, 2)}
"""Of packed sequences, and right."""
ALIGNED = {"alignment": "bottom-right"}


def decode(comm, at=None, **changes):
    """The same, on rank `at` or on all with other arguments; or its gradients, where they come with something."""
    arguments = {**DECODE, "comm": comm} | (changes if at is None or comm.rank == at else {})
    return (sharded_decode_backward if "dout" in arguments else sharded_decode)(**arguments)


def test_packed_sequences_to_decode_are_right_before_they_are_changed():
    run_ranks(decode, 3)
    run_ranks(lambda comm: decode(comm, dout=np.ones((3, 2, 4)), dlse=np.ones((2, 3))), 3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seqlens_q": None}, "seqlens_q has to be given where 2 packed sequences do not have a query each"),
        ({"seqlens_q": (3,)}, "seqlens_q has to be one length for each of 2 sequences"),
        ({"seqlens_q": (1, 1, 1)}, "seqlens_q has to be one length for each of 2 sequences"),
        ({"seqlens_q": (1, 1)}, "and to add up to the queries"),
        ({"seqlens_q": (4, -1)}, "seqlens_q[1] has to be"),
        ({"mask": np.ones((3, 15), bool)}, "mask does not go with packed sequences"),
        ({"bias": np.ones((3, 15))}, "bias does not go with packed sequences"),
        (
            {"alibi_slopes": np.ones((3, 2)), **ALIGNED},
            "alibi_slopes have to be (num_heads,) or (sequences, num_heads), with 2",
        ),
        ({"alibi_slopes": np.ones(3), **ALIGNED}, "alibi_slopes"),
        ({"k": np.ones((4, 2, 4)), "v": np.ones((4, 2, 4))}, "k of rank 0 is not as long as the layout says, 5"),
        ({"v": np.ones((4, 2, 4))}, "k and v"),
        ({"sharding": "contiguous"}, "where sharding is a Sharding"),
        ({"sharding": Sharding("contiguous", 3, (6, 9, 0))}, "seqlens_q has to be one length for each of 3 sequences"),
        ({"causal": True}, "alignment has to be chosen where seqlen_q and seqlen_k differ"),
        ({"window_size": (3, None)}, "alignment has to be chosen where seqlen_q and seqlen_k differ"),
        ({"alibi_slopes": np.ones(2)}, "alignment has to be chosen where seqlen_q and seqlen_k differ"),
        ({"dout": np.ones((3, 2, 5))}, "dout has to have the shape (3, 2, 4)"),
        ({"dout": np.ones((3, 2, 4)), "dlse": np.ones((1, 2, 3))}, "dlse has to have the shape (2, 3)"),
        (
            {"q": np.ones((1, 3, 2, 4)), **dict.fromkeys("kv", np.ones((1, 5, 2, 4))), "sharding": "contiguous"},
            "seqlens_q is for packed sequences",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else " ".join(x),
)
def test_packed_sequences_that_cannot_be_decoded_are_refused_on_all_ranks(changes, said):
    for error in errors_of(lambda comm: decode(comm, **changes)):
        assert type(error) is ValueError
        assert said in str(error)


@pytest.mark.parametrize(
    ("changes", "kind", "said"),
    [
        ({"seqlens_q": (2, 1)}, ValueError, "agree about seqlens_q"),
        ({"seqlens_q": None}, ValueError, "agree about seqlens_q"),
        ({"seqlens_q": 3}, TypeError, "seqlens_q has to be a tuple or list of integers"),
        ({"seqlens_q": (1, "a")}, TypeError, "seqlens_q[1] has to be an integer"),
        ({"q": np.ones((2, 2, 4)), "seqlens_q": (1, 2)}, ValueError, "all ranks have to have the same queries"),
        ({"sharding": Sharding("contiguous", 3, (9, 6))}, ValueError, "agree about sharding"),
    ],
    ids=lambda x: x if isinstance(x, str) else " ".join(x) if isinstance(x, dict) else None,
)
def test_packed_sequences_that_one_rank_decodes_otherwise_are_an_error_on_all(changes, kind, said):
    errors = errors_of(lambda comm: decode(comm, at=1, **changes))
    assert type(errors[1]) is kind
    assert all(said in str(error) for error in errors)


def test_an_alignment_has_to_be_chosen_though_all_queries_are_as_many_as_all_keys():
    layout = Sharding("contiguous", 3, (2, 4))

    def own(comm, seqlens_q):
        keys = np.ones((layout.length(comm.rank), 2, 4))
        changes = {"q": np.ones((6, 2, 4)), "k": keys, "v": keys, "sharding": layout, "causal": True}
        decode(comm, **changes, seqlens_q=seqlens_q)

    for error in errors_of(lambda comm: own(comm, (4, 2))):
        assert "alignment has to be chosen" in str(error)
    run_ranks(lambda comm: own(comm, (2, 4)), 3)


@pytest.mark.parametrize("name", ["dout", "out", "lse", "dlse"])
def test_gradients_of_another_shape_are_refused_on_all_ranks(name):
    known = {"dout": X, name: np.ones((1, 4, 3, 8))}
    for error in errors_of(lambda comm: ring_attention_backward(q=X, k=X, v=X, comm=comm, **known)):
        assert type(error) is ValueError
        assert f"{name} has to have the shape" in str(error)


def test_what_is_no_comm_is_refused():
    with pytest.raises(
        TypeError, match=r"comm has to be one of .* inside of jax.shard_map a JaxComm\n    comm  3  int"
    ):
        ring_attention(X, X, X, comm=3)
    with pytest.raises(TypeError, match=r"comm has to be one of .*; gradients inside of jax.shard_map are"):
        ring_attention_backward(X, X, X, X, comm=3)


def test_a_rank_that_raises_is_heard_of_at_once():
    def rank(comm):
        if comm.rank == 1:
            raise MemoryError("no room")
        call(comm)

    began = time.monotonic()
    with pytest.raises(MemoryError):
        run_ranks(rank, 3, timeout=600.0)
    assert time.monotonic() - began < 300.0


def test_the_others_are_told_which_rank_raised_and_what():
    heard = []

    def rank(comm):
        if comm.rank == 1:
            raise MemoryError("no room")
        try:
            call(comm)
        except RankFailed as error:
            heard.append(str(error))
            raise

    with pytest.raises(MemoryError):
        run_ranks(rank, 3)
    assert sorted(heard) == [f"rank {rank}: rank 1 gave up: MemoryError: no room" for rank in (0, 2)]


def test_a_rank_that_says_nothing_is_an_error_within_the_timeout():
    def rank(comm):
        if comm.rank == 0:
            time.sleep(1.5)  # alive, and elsewhere
            raise RankFailed
        call(comm)

    for error in errors_of(rank, timeout=0.3):
        assert type(error) is RankFailed


def test_a_rank_that_has_returned_is_not_waited_for():
    def rank(comm):
        if comm.rank != 0:
            call(comm)
        else:
            comm.size = 1
            raise RankFailed

    began = time.monotonic()
    for error in errors_of(rank, timeout=600.0)[1:]:
        assert "rank 0 has returned and said nothing" in str(error)
    assert time.monotonic() - began < 300.0


def test_a_rank_that_fails_while_keys_are_on_their_way_is_heard_of(monkeypatch):
    def rank(comm):
        if comm.rank == 2:
            monkeypatch.setattr(comm, "send", _failing_after(comm.send, 4))
        call(comm)

    errors = errors_of(rank)
    assert type(errors[2]) is OSError
    for error in errors[:2]:
        assert type(error) is RankFailed
        assert "cable" in str(error)


def _failing_after(send, count):
    """What the first few messages, by which ranks agree, do not need."""
    sent = []

    def failing(array, to):
        sent.append(to)
        if len(sent) > count:
            raise OSError("the cable is out")
        return send(array, to)

    return failing


def test_a_keyword_of_others_is_told_what_it_is_called_here():
    for error in errors_of(lambda comm: call(comm, is_causal=True)):
        assert type(error) is TypeError
        assert "is_causal  here it is causal" in str(error)
