"""`step_cost`: what a ring would take on links and kernels of given speeds.  A model, with its inputs, which measures
nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cupyattn import reading
from cupyattn.distributed.explaining import DistributedPlan
from cupyattn.reading import refusal


@dataclass(frozen=True)
class StepCost:
    """Seconds of each step of a ring, by a model.  Prints itself, with what it was told."""

    attention: tuple[float, ...]
    """Of the busiest rank, step by step."""
    transfer: tuple[float, ...]
    """Of the busiest link, step by step."""
    tflops: float
    gigabytes_per_second: float
    latency: float

    @property
    def seconds(self) -> float:
        """Of all steps, each as long as the longer of the two: what is sent travels while keys are attended.  Beside
        what is sent at the end of the last step, as gradients are, nothing is attended."""
        last = self.attention[-1] + self.transfer[-1]
        return sum(map(max, self.attention[:-1], self.transfer[:-1])) + last

    @property
    def efficiency(self) -> float:
        """Attention alone over attention with what of the transfer does not fit beside it."""
        return sum(self.attention) / self.seconds if self.seconds else 1.0

    def __str__(self) -> str:
        told = f"{self.tflops:g} TFLOP/s, {self.gigabytes_per_second:g} GB/s, {1e6 * self.latency:g} us a message"
        lines = [f"a model, not a measurement: {told}", "step   attention, us   transfer, us"]
        steps = enumerate(zip(self.attention, self.transfer, strict=True))
        lines += [f"{step:<6} {1e6 * x:<15.1f} {1e6 * y:.1f}" for step, (x, y) in steps]
        return "\n".join([*lines, f"{1e6 * self.seconds:.1f} us, {100 * self.efficiency:.1f} % of attention alone"])


def step_cost(plan: DistributedPlan, *, tflops: float, gigabytes_per_second: float, latency: float = 1e-5) -> StepCost:
    """What a ring would take, each step as long as the longer of attention and transfer.

    Parameters
    ----------
    plan : DistributedPlan
        Of `explain`, by "ring", for the `device` that the speeds are of: GPUs send fewer bytes of gradients.
    tflops : float
        What a rank's kernel is assumed to do, in 10^12 operations a second.
    gigabytes_per_second : float
        What a rank is assumed to send, in 10^9 bytes a second, while it receives as much.
    latency : float
        Seconds that a message takes besides, if there is one.

    Returns
    -------
    StepCost
        Prints itself, with these inputs.

    Raises
    ------
    TypeError, ValueError
        `plan` is none, or not of a ring; a speed is not a positive number, or the latency a negative one.

    Notes
    -----
    A rank's work is taken to be the same at each step, as in a zigzag it nearly is.  Not in the model: launches,
    merging, packing of messages, what kernels lose on shorter pieces, and what sending takes from them.

    Examples
    --------
    >>> from cupyattn.distributed import explain, step_cost
    >>> shape = (1, 65536, 32, 128), (1, 65536, 8, 128), (1, 65536, 8, 128)
    >>> plan = explain(*shape, size=8, causal=True, dtype="bfloat16", device="H100")
    >>> round(step_cost(plan, tflops=600, gigabytes_per_second=20).efficiency, 1)
    0.6
    """
    function = "step_cost"
    if not isinstance(plan, DistributedPlan):
        rule = "plan has to be a DistributedPlan, of explain"
        raise TypeError(refusal(function, rule, ("plan", repr(plan), type(plan).__name__)))
    if plan.by != "ring":
        raise ValueError(refusal(function, "plan has to be of a ring, whose steps overlap", ("plan", plan.by)))
    tflops = _positive(function, "tflops", tflops)
    speed = _positive(function, "gigabytes_per_second", gigabytes_per_second)
    rule = "a number of seconds, not negative"
    latency = reading.number(function, "latency", latency, rule=rule, ok=lambda x: x >= 0)
    steps = len(plan.flops)
    sent = [max(of_step) for of_step in zip(*plan.bytes_sent, strict=True)]
    # Where gradients begin with the forward pass, its are two of seven products.
    rounds = (2 / 7, 5 / 7) if plan.forward_again else (1.0,)
    attention = tuple(share * max(plan.flops) / steps / (1e12 * tflops) for share in rounds for _ in range(steps))
    transfer = tuple(latency + size / (1e9 * speed) if size else 0.0 for size in sent)
    return StepCost(attention, transfer, tflops, speed, latency)


def _positive(function: str, name: str, value: Any) -> float:
    return reading.number(function, name, value, rule="a positive number", ok=lambda x: x > 0)
