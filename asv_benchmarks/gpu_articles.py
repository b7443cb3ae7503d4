"""What articles have tables of, for gpu.py: standard against flash attention, GQA, a cache, packed batches; bfloat16.

Its twin on the CPU is benchmarks/articles.py.
"""

from gpu_tools import microseconds

import cupyattn

LENGTHS = (512, 1024, 2048, 4096)
BATCH, HEADS, HEADS_KV, HEAD_DIM = 4, 32, 8, 128


def articles(report, torch):
    for seqlen in LENGTHS:
        for causal in (False, True):
            if report.late("articles"):
                return
            calls = standard(torch, seqlen, causal)
            memory = {f"{name}_mb": peak(torch, call) for name, call in calls.items()}
            _row(report, torch, {"what": "standard", "seqlen": seqlen, "causal": causal}, calls, "naive", **memory)
    for name, seqlens in {"prefill": (2048, 2048), "decode": (1, 8192)}.items():
        _row(report, torch, {"what": f"grouped heads, {name}"}, grouped(torch, *seqlens), "repeated")
    for prompt in (1024, 4096):
        _row(report, torch, {"what": "a token", "prompt": prompt}, cached(torch, prompt), "without_cache")
    for causal in (False, True):
        _row(report, torch, {"what": "packed", "causal": causal}, packed(torch, causal), "padded")


def _row(report, torch, what, calls, peer, **more):
    times = microseconds(calls, torch, budget=0.04)
    speed = times[peer] / times["cupyattn"]
    report.row("articles", **what, **{f"{n}_us": x for n, x in times.items()}, **more, **{f"speed_over_{peer}": speed})


def peak(torch, call):
    """Megabytes that a call takes at most of torch's allocator, its result included."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def _draw(torch, seqlen, heads, device, batch=BATCH):
    return torch.randn((batch, seqlen, heads, HEAD_DIM), device=device, dtype=torch.bfloat16)


def naive(torch, q, k, v, hidden):
    """The formula, which keeps all scores: (batch, seqlen, heads, dim)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) * HEAD_DIM**-0.5
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    return (scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype) @ v).transpose(1, 2)


def standard(torch, seqlen, causal, device="cuda"):
    q, k, v = (_draw(torch, seqlen, HEADS, device) for _ in range(3))
    hidden = torch.ones((seqlen, seqlen), device=device, dtype=torch.bool).triu(1) if causal else None
    return {
        "cupyattn": lambda: cupyattn.attention(q, k, v, causal=causal),
        "naive": lambda: naive(torch, q, k, v, hidden),
        "sdpa": lambda: torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal
        ).transpose(1, 2),
    }


def grouped(torch, seqlen_q, seqlen_k, device="cuda"):
    """8 key heads for 32 query heads, and the same on keys repeated for each query head, in each call and before."""
    q = _draw(torch, seqlen_q, HEADS, device)
    k, v = (_draw(torch, seqlen_k, HEADS_KV, device) for _ in range(2))
    options = {"causal": True, "alignment": "bottom-right"}

    def whole():
        return tuple(x.repeat_interleave(HEADS // HEADS_KV, dim=2) for x in (k, v))

    before = whole()
    return {
        "cupyattn": lambda: cupyattn.attention(q, k, v, **options),
        "repeated": lambda: cupyattn.attention(q, *whole(), **options),
        "repeated_before": lambda: cupyattn.attention(q, *before, **options),
    }


def cached(torch, prompt, device="cuda"):
    """Attention of one new token: over a cache, and of all tokens again."""
    q, k, v = (_draw(torch, prompt, heads, device, batch=1) for heads in (HEADS, HEADS_KV, HEADS_KV))
    options = {"causal": True, "alignment": "bottom-right"}
    return {
        "cupyattn": lambda: cupyattn.attention(q[:, -1:], k, v, **options),
        "without_cache": lambda: cupyattn.attention(q, k, v, **options)[:, -1:],
    }


def packed(torch, causal, device="cuda", sequences=32, longest=2048):
    """Sequences of 64 to 2048 tokens end to end, and in a padded batch whose mask hides the padding."""
    counts = torch.linspace(64, longest, sequences).round().to(torch.int32)
    starts = torch.cat([torch.zeros(1, dtype=torch.int32), counts.cumsum(0, dtype=torch.int32)]).to(device)
    real = (torch.arange(longest) < counts[:, None]).to(device)
    padded = [_draw(torch, longest, heads, device, sequences) for heads in (HEADS, HEADS_KV, HEADS_KV)]
    q, k, v = (x[real] for x in padded)
    mask = real[:, None, None, :]
    return {
        "cupyattn": lambda: cupyattn.flash_attn_varlen_func(q, k, v, starts, starts, longest, longest, causal=causal),
        "padded": lambda: cupyattn.attention(*padded, mask=mask, causal=causal)[real],
    }
