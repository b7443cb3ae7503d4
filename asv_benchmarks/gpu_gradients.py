"""Gradients on a GPU beside torch's, the section "gradients" of gpu.py."""

import statistics
from functools import partial

from gpu_tools import microseconds, skewed_starts

import cupyattn
from cupyattn.cuda.making import catalogue
from cupyattn.plan import (
    OF_BIAS,
    OF_KEYS,
    OF_QUERIES,
    OF_VALUES,
    RIGHT_EDGE,
    backward_tile,
    base_tile,
    hopper_backward_tile,
)
from cupyattn.problem import NAMED_DEVICES

LOW_CAP = catalogue.SOFTCAP | catalogue.LOW_CAP
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
    if not report.late("gradients"):
        edits(report, torch)
        shares(report, torch)
        packed(report, torch)


def edits(report, torch):
    """What a softcap and slopes cost, forward and backward: times over those of the same call without them."""
    slopes = torch.rand(16, device="cuda")
    inputs = [torch.randn((2, 8192, 16, 128), device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "qkv"]
    given, calls = [x.detach() for x in inputs], {}
    for name, edit in {"plain": {}, "softcap": {"softcap": 50.0}, "slopes": {"alibi_slopes": slopes}}.items():
        calls[f"{name} forward"] = partial(cupyattn.attention, *given, causal=True, **edit)
        calls[f"{name} backward"] = _graph(torch, cupyattn.attention(*inputs, causal=True, **edit), inputs)
    times = microseconds(calls, torch, repeats=3)
    for name in ("softcap", "slopes"):
        over = {way: times[f"{name} {way}"] / times[f"plain {way}"] for way in ("forward", "backward")}
        report.row("edits", edit=name, **{f"{way}_over_plain": x for way, x in over.items()})


def shares(report, torch):
    """32 query heads of one sequence over one key head, of whose tiles blocks have shares; over as many key heads."""
    times = {}
    for heads_kv in (1, 32):
        shapes = [(1, 4096, heads, 128) for heads in (32, heads_kv, heads_kv)]
        inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
        call = _graph(torch, cupyattn.attention(*inputs, causal=True), inputs)
        times[heads_kv] = microseconds({"cupyattn": call}, torch, repeats=3)["cupyattn"]
    report.row("shares", heads=32, seqlen=4096, one_key_head_over_as_many=times[1] / times[32])


def packed(report, torch):
    """The backward pass over packed sequences of which one is long, beside as many that are alike."""
    starts, calls = skewed_starts(torch), {}
    total = int(starts["alike"][0][-1])
    inputs = [torch.randn((total, 16, 128), device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "qkv"]
    for name, (found, longest) in starts.items():
        its = found.cuda()
        out = cupyattn.flash_attn_varlen_func(*inputs, its, its, longest, longest, causal=True)
        calls[name] = _graph(torch, out, inputs)
    times = microseconds(calls, torch, repeats=3)
    pairs = {name: (found.diff().double() ** 2).sum().item() / 2 for name, (found, _) in starts.items()}
    rates = {f"{name}_tflops": 10 * 16 * 128 * pairs[name] / took / 1e6 for name, took in times.items()}
    report.row("packed gradients", **rates)


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
            if wanted == OF_BIAS:
                continue
            for edits in (0, LOW_CAP, catalogue.ALIBI) if head_dim == 128 else (0,):
                tile = hopper_backward_tile(head_dim, head_dim, wanted, edits == LOW_CAP)
                found.append(catalogue.hopper_backward("bfloat16", head_dim, head_dim, tile, wanted, edits))
    causal = base_tile(128, 128, RIGHT_EDGE, "bfloat16")
    for edits in (LOW_CAP, catalogue.ALIBI | catalogue.CAUSAL_ALIBI):
        found.append(catalogue.hopper("bfloat16", 128, 128, causal, True, edits))
    return found
