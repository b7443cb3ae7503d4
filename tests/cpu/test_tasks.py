"""In which order tasks run, and add to sums that they have in common."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from oracle import assert_same_bits

import cupyattn
from cupyattn import plan
from cupyattn.cpu import flash
from cupyattn.cpu.tasks import BRIEF, LITTLE, InTurn, in_order


@pytest.fixture
def three_workers(monkeypatch):
    """Three threads for any problem, each task one of its own."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    monkeypatch.setattr("cupyattn.plan.cpu.WORTH_THREADS", 0)
    monkeypatch.setattr("cupyattn.cpu.tasks.LITTLE", 0)
    monkeypatch.setattr("cupyattn.cpu.threads._blas.num_threads", lambda: 3)
    plan.choose.cache_clear()
    yield torch
    torch.set_num_threads(before)
    plan.choose.cache_clear()


@pytest.fixture
def out_of_order(monkeypatch):
    """Tasks end in an order that differs from call to call."""
    delays, original = iter(()), flash.flash_backward

    def slow(*arguments):
        found = original(*arguments)
        time.sleep(next(delays, 0.0))
        return found

    monkeypatch.setattr(flash, "flash_backward", slow)

    def shuffle(rng):
        nonlocal delays
        delays = iter(rng.choice([0.0, 0.004, 0.008], 1000).tolist())

    return shuffle


def gradients(torch, rng, name):
    """A function that computes the gradients of what many tasks share."""
    q, k, v = (torch.from_numpy(rng.standard_normal((6, 40, 4, 8))) for _ in range(3))
    shared = {
        "bias": rng.standard_normal((40, 40)),
        "alibi_slopes": rng.standard_normal(4),
        "sinks": rng.standard_normal(4),
        "pages": rng.standard_normal((3, 16, 4, 8)),
        "a head of keys": rng.standard_normal((1, 300, 1, 8)),
    }[name]
    shared = torch.from_numpy(shared).requires_grad_()
    dout = torch.from_numpy(rng.standard_normal((6, 40, 4, 8)))

    def once():
        shared.grad = None
        if name == "pages":
            lengths = torch.arange(0, 241, 40, dtype=torch.int32)
            table = torch.tensor([[0, 1, 2]] * 6, dtype=torch.int32)
            out = cupyattn.flash_attn_varlen_func(
                *(q.reshape(240, 4, 8), shared, v.new_zeros(shared.shape), lengths, lengths, 40, 40),
                causal=True, block_table=table,
            )  # fmt: skip
            out = out + cupyattn.flash_attn_varlen_func(
                *(q.reshape(240, 4, 8), v.new_ones(shared.shape), shared, lengths, lengths, 40, 40),
                causal=True, block_table=table,
            )  # fmt: skip
        elif name == "a head of keys":
            out = cupyattn.attention(q.reshape(1, 960, 1, 8), shared, shared)
        else:
            out = cupyattn.attention(q, k, v, causal=True, **{name: shared})
        (out * dout.reshape(out.shape)).sum().backward()
        return shared.grad.numpy().copy()

    return once


@pytest.mark.parametrize("name", ["bias", "alibi_slopes", "sinks", "pages", "a head of keys"])
def test_gradients_of_what_tasks_share_have_the_same_bits_whichever_task_ends_first(
    name, three_workers, out_of_order, rng
):
    once = gradients(three_workers, rng, name)
    first = once()
    assert np.abs(first).max() > 0
    for _ in range(6):
        out_of_order(rng)
        assert_same_bits(once(), first)


def test_additions_come_in_turn():
    added, in_turn = [], InTurn()
    for turn in (2, 1, 4, 0, 3):
        in_turn.add(turn, lambda turn=turn: added.append(turn))
    assert added == [0, 1, 2, 3, 4]


def test_nobody_waits_for_a_turn():
    added, in_turn = [], InTurn()
    late = threading.Thread(target=in_turn.add, args=(1, lambda: added.append("late")))
    late.start()
    late.join(20)
    assert not late.is_alive()
    assert added == []


def test_a_sum_of_gradients_that_overflows_warns_nobody():
    """That of values which two sequences share: 1e308 and 1e308."""
    q, k = np.zeros((2, 1, 1, 1)), np.zeros((1, 1, 1, 1))
    with np.errstate(all="raise"):
        found = cupyattn.attention_backward(np.full(q.shape, 1e308), q, k, k, layout="bhsd")
    assert found.dv.item() == np.inf


def test_what_costs_little_shares_a_task_and_the_dearest_of_the_others_come_first():
    done = []

    def task(name):
        return lambda scratch: done.append(name)

    little, much = LITTLE, LITTLE + 1
    part = SimpleNamespace(cost=lambda tile: tile)  # here a tile is what it costs
    found = [
        (part, tiles, task(name))
        for name, tiles in (("c", [1]), ("b", [much]), ("d", [1, little - 1]), ("a", [much] * 2))
    ]
    tasks = in_order(found, num_workers=2)
    assert [len(group) for group in tasks] == [2, 1, 1]
    for group in tasks:
        for one in group:
            one(None)
    assert done == ["d", "c", "a", "b"]
    assert len(in_order(found, num_workers=1)) == 4


@pytest.fixture
def threads_of(three_workers, monkeypatch):
    """The threads that compute tiles of a call on a machine that is `crowded` or not."""
    found, original = set(), flash.flash

    def noted(*arguments):
        found.add(threading.get_ident())
        time.sleep(0.05)  # so that a helper gets a tile, on a busy machine, too
        return original(*arguments)

    monkeypatch.setattr(flash, "flash", noted)

    def run(rng, crowded):
        monkeypatch.setattr("cupyattn.cpu.tasks.is_crowded", lambda: crowded)
        found.clear()
        q, k, v = (rng.standard_normal((6, 40, 4, 8)) for _ in range(3))
        cupyattn.attention(q, k, v)
        return set(found)

    return run


def test_a_brief_call_on_a_crowded_machine_is_its_callers_alone(threads_of, rng):
    assert threads_of(rng, crowded=True) == {threading.get_ident()}
    assert len(threads_of(rng, crowded=False)) > 1


def test_a_long_call_has_helpers_on_a_crowded_machine_too(threads_of, rng, monkeypatch):
    monkeypatch.setattr("cupyattn.cpu.tasks.BRIEF", 0)
    assert BRIEF > 0
    assert len(threads_of(rng, crowded=True)) > 1
