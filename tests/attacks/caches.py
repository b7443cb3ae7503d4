"""Caches through any sequence of calls, among them ones that fail or are interrupted, for longer than the tests do."""

import traceback

import hypothesis
from attacks.outcome import Outcome
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

STEPS = 40


def attack(seed, cases):
    """So many sequences of `STEPS` calls, as many for each kind of cache."""
    from cache.test_cache_stateful import MACHINES
    from cache.test_layered import Layers
    from cache.test_prefix import Requests

    machines = (*MACHINES, Layers, Requests)
    lost, each = [], max(1, cases // len(machines))
    for machine in machines:
        asked = settings(
            database=None,
            deadline=None,
            max_examples=each,
            stateful_step_count=STEPS,
            suppress_health_check=list(HealthCheck),
        )
        try:
            run_state_machine_as_test(hypothesis.seed(seed)(machine), settings=asked)
        except Exception:
            lost.append(f"{machine.__name__} of seed {seed}: {traceback.format_exc()[-3000:]}")
    return Outcome(each * len(machines) * STEPS, lost)
