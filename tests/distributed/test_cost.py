"""The model of a ring's time: its arithmetic, by hand."""

import pytest

from cupyattn.distributed import DistributedPlan, Sharding, explain, step_cost

LAYOUT = Sharding("zigzag", 2, (8,))
PLAN = DistributedPlan("ring", LAYOUT, (4 * 10**12, 2 * 10**12), ((3 * 10**9, 0), (10**9, 0)))
SPEEDS = {"tflops": 2.0, "gigabytes_per_second": 2.0, "latency": 0.25}


def test_a_step_takes_the_longer_of_attention_and_transfer():
    cost = step_cost(PLAN, **SPEEDS)
    assert cost.attention == (1.0, 1.0)  # 4e12 operations of the busiest rank in two steps, 2e12 a second
    assert cost.transfer == (1.75, 0.0)  # 3e9 bytes of the busiest link, 2e9 a second, and what a message takes
    assert cost.seconds == 1.75 + 1.0
    assert cost.efficiency == 2.0 / 2.75


def test_what_is_sent_at_the_end_is_beside_nothing():
    plan = DistributedPlan("ring", LAYOUT, PLAN.flops, ((0, 3 * 10**9), (0, 0)))
    assert step_cost(plan, **SPEEDS).seconds == 1.0 + 1.0 + 1.75


def test_one_rank_sends_nothing_and_loses_nothing():
    plan = explain((1, 64, 2, 8), (1, 64, 2, 8), (1, 64, 2, 8), size=1, causal=True)
    cost = step_cost(plan, tflops=1, gigabytes_per_second=1)
    assert (cost.transfer, cost.efficiency) == ((0.0,), 1.0)


def test_where_the_forward_pass_comes_first_its_steps_are_two_of_seven_products():
    plan = DistributedPlan("ring", LAYOUT, (14 * 10**12,) * 2, ((0,) * 4,) * 2, forward_again="rounded")
    assert step_cost(plan, **SPEEDS).attention == pytest.approx((1.0, 1.0, 2.5, 2.5))


def test_links_of_gpus_carry_what_gpus_send():
    shape = (1, 8, 1, 16)
    plan = explain(shape, shape, shape, size=2, dtype="float16", backward=True, device="H100")
    cost = step_cost(plan, tflops=1, gigabytes_per_second=1e-9, latency=0)
    assert cost.transfer == (4 * 2 * 16 * 2, 4 * 2 * 16 * 4)  # 4 keys and values in float16, their gradients in float32


def test_of_no_work_nothing_is_lost():
    assert step_cost(DistributedPlan("ring", LAYOUT, (0, 0), ((0, 0), (0, 0))), **SPEEDS).efficiency == 1.0


def test_it_says_what_it_was_told_and_that_it_is_a_model():
    said = str(step_cost(PLAN, **SPEEDS)).splitlines()
    assert said[0] == "a model, not a measurement: 2 TFLOP/s, 2 GB/s, 250000 us a message"
    assert said[2].split() == ["0", "1000000.0", "1750000.0"]
    assert said[-1] == "2750000.0 us, 72.7 % of attention alone"


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"plan": 3}, TypeError, "plan has to be a DistributedPlan"),
        (
            {"plan": DistributedPlan("ulysses", LAYOUT, (1, 1), ((1, 1), (1, 1)))},
            ValueError,
            "plan has to be of a ring",
        ),
        ({"tflops": 0}, ValueError, "tflops has to be a positive number"),
        ({"gigabytes_per_second": "a"}, TypeError, "gigabytes_per_second has to be a number"),
        ({"latency": -1}, ValueError, "latency has to be a number of seconds"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes, error, said):
    with pytest.raises(error, match=f"step_cost: {said}"):
        step_cost(**{"plan": PLAN, **SPEEDS, **changes})
