"""Gradients on a GPU beside torch's, the section "gradients" of gpu.py."""

import statistics

from gpu_tools import microseconds

import cupyattn
from cupyattn.cuda.making import catalogue
from cupyattn.plan import OF_BIAS, OF_KEYS, OF_QUERIES, OF_VALUES, backward_tile, hopper_backward_tile
from cupyattn.problem import NAMED_DEVICES

SHAPES = [
    (head_dim, seqlen, causal)
    for head_dim in (128, 64, 256)
    for seqlen in (8192, 2048, 4096, 16384)
    for causal in (False, True)
]
"""Head dimension, tokens of a sequence, causal; 16384 tokens and 2048 features in all, as in the papers.  The bar is
for heads of 128 at 8192 tokens, so these come first."""


def gradients(report, torch):
    """The backward pass alone: the time of torch.autograd.grad over a graph that is kept."""
    ratios = []
    for head_dim, seqlen, causal in SHAPES:
        if report.late("gradients"):
            break
        shape = (16384 // seqlen, seqlen, 2048 // head_dim, head_dim)
        inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
        calls = {"cupyattn": _graph(torch, cupyattn.attention(*inputs, causal=causal), inputs)}
        calls |= _of_torch(torch, inputs, causal)
        times = microseconds(calls, torch, repeats=3)
        flops = cupyattn.explain(*inputs, causal=causal, backward=True).flops
        rates = {f"{name}_tflops": flops / x * 1e-6 for name, x in times.items()}
        best = min((x for name, x in times.items() if name != "cupyattn"), default=float("nan"))
        ratios.append(best / times["cupyattn"])
        what = {"head_dim": head_dim, "seqlen": seqlen, "causal": causal}
        report.row(
            "gradients", **what, **rates, speed_over_best=ratios[-1], same_bits=_same_bits(torch, calls["cupyattn"])
        )
    if ratios:
        report.row("gradients", least=min(ratios), geometric_mean=statistics.geometric_mean(ratios))


def _graph(torch, out, inputs):
    dout = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)


def _of_torch(torch, inputs, causal):
    """By each of torch's back ends that takes the problem."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    found = {}
    turned = [x.transpose(1, 2) for x in inputs]
    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
        try:
            with sdpa_kernel(getattr(SDPBackend, name)):
                out = torch.nn.functional.scaled_dot_product_attention(*turned, is_causal=causal)
            call = _graph(torch, out, inputs)
            call()
            torch.cuda.synchronize()
        except (RuntimeError, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
            continue
        found[name.removesuffix("_ATTENTION").lower()] = call
    return found


def _same_bits(torch, call):
    """Whether another run gives the same: what is promised of every run."""
    return all(torch.equal(a, b) for a, b in zip(call(), call(), strict=True))


def kernels():
    """What this section and the tests of gradients launch on an H100, one of each kind."""
    room = NAMED_DEVICES["H100"].shared_memory
    found = [catalogue.backward_rows("bfloat16")]
    for head_dim in (64, 128, 256):
        passes = (OF_QUERIES, OF_BIAS, *((OF_KEYS | OF_VALUES,) if head_dim <= 128 else (OF_KEYS, OF_VALUES)))
        for wanted in passes:
            edits = catalogue.BIAS if wanted == OF_BIAS else 0
            tile = backward_tile(head_dim, "bfloat16", room, wanted)
            found.append(catalogue.backward("bfloat16", head_dim, head_dim, tile, wanted, True, edits))
            if wanted != OF_BIAS:
                tile = hopper_backward_tile(head_dim, head_dim, wanted)
                found.append(catalogue.hopper_backward("bfloat16", head_dim, head_dim, tile, wanted))
    return found
