"""Work that torch's FlopCounterMode is told of: it sees operators, and an eager call of a public function is none."""

from __future__ import annotations

import sys

from cupyattn.described import Call


def count(flops: int, word: str = "cupyattn.attention") -> None:
    """Add to what counters around this call have counted, in each module that they are in."""
    torch = sys.modules["torch"]
    if not torch._C._len_torch_dispatch_stack() or "torch.utils.flop_counter" not in sys.modules:
        return
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    for mode in _get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", mode)  # until torch 2.6 it was the mode itself
        if isinstance(counter, sys.modules["torch.utils.flop_counter"].FlopCounterMode):
            for module in set(counter.mod_tracker.parents):
                counter.flop_counts[module][word] += flops


def count_backward(call: Call | None) -> None:
    """The same of gradients, as plans count them: five products where the call has two."""
    if call is not None:
        count(call.problem.flops * 5 // 2, "cupyattn.attention_backward")
