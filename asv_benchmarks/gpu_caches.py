"""Inference's part of gpu.py: ragged batches, pages, and a step of decoding in one call or in three."""

from gpu_tools import in_a_graph, microseconds, skewed_starts

import cupyattn

HEADS, HEADS_KV, HEAD_DIM = 32, 8, 128


def caches(report, torch):
    for part in (ragged, few_rows, many, narrow, skewed, pages, chunks, step):
        if report.late("caches"):
            return
        part(report, torch)


def cache(torch, batch, seqlen, page_size=None):
    """Keys, values and, if paged, a shuffled block_table."""
    count = batch * seqlen // page_size if page_size else batch
    shape = (count, page_size or seqlen, HEADS_KV, HEAD_DIM)
    k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    table = torch.randperm(count, device="cuda").to(torch.int32).reshape(batch, -1) if page_size else None
    return k, v, table


def query(torch, batch):
    return torch.randn((batch, 1, HEADS, HEAD_DIM), device="cuda", dtype=torch.bfloat16)


def ragged(report, torch):
    """One sequence of 65536 keys and 31 of 512, with our splits and with one, as flash-attn 2 would take."""
    longest, page_size, batch = 65536, 64, 32
    lengths = torch.full((batch,), 512, device="cuda", dtype=torch.int32)
    lengths[0] = longest
    used = (lengths // page_size).tolist()
    k, v, _ = cache(torch, 1, sum(used) * page_size, page_size)
    table = torch.zeros((batch, longest // page_size), device="cuda", dtype=torch.int32)
    order = torch.randperm(sum(used), device="cuda").to(torch.int32)
    for index, count in enumerate(used):
        table[index, :count], order = order[:count], order[count:]
    q = query(torch, batch)

    def call(num_splits):
        return in_a_graph(
            lambda: cupyattn.flash_attn_with_kvcache(
                q, k, v, cache_seqlens=lengths, block_table=table, causal=True, num_splits=num_splits
            ),
            torch,
        )

    times = microseconds({"cupyattn": call(0), "one_split": call(1)}, torch)
    report.row("caches", what="ragged", **{f"{name}_us": took for name, took in times.items()},
               speed_over_one_split=times["one_split"] / times["cupyattn"])  # fmt: skip


def few_rows(report, torch):
    """32 tokens behind 65536 keys, as a draft is checked, with our splits and with one."""
    k, v, _ = cache(torch, 1, 65536)
    q = torch.randn((1, 32, HEADS, HEAD_DIM), device="cuda", dtype=torch.bfloat16)
    lengths = torch.full((1,), 65536, device="cuda", dtype=torch.int32)

    def call(num_splits):
        return in_a_graph(
            lambda: cupyattn.flash_attn_with_kvcache(
                q, k, v, cache_seqlens=lengths, causal=True, num_splits=num_splits
            ),
            torch,
        )

    times = microseconds({"cupyattn": call(0), "one_split": call(1)}, torch)
    report.row("caches", what="few rows", **{f"{name}_us": took for name, took in times.items()},
               speed_over_one_split=times["one_split"] / times["cupyattn"])  # fmt: skip


def many(report, torch):
    """256 sequences of 2048 tokens, each with room for 32768: a schedule in every call, and one for all layers."""
    if report.late("caches"):
        return
    batch, seqlen, room, page_size = 256, 2048, 32768, 64
    k, v, used = cache(torch, batch, seqlen, page_size)
    table = torch.zeros((batch, room // page_size), device="cuda", dtype=torch.int32)
    table[:, : used.shape[1]] = used
    q, lengths = query(torch, batch), torch.full((batch,), seqlen, device="cuda", dtype=torch.int32)
    sizes = (batch, 1, room, HEADS, HEADS_KV, HEAD_DIM)
    made = cupyattn.get_scheduler_metadata(*sizes, lengths, torch.bfloat16, page_size=page_size)

    def call(its_table, metadata=None):
        return in_a_graph(
            lambda: cupyattn.flash_attn_with_kvcache(
                q, k, v, cache_seqlens=lengths, block_table=its_table, scheduler_metadata=metadata
            ),
            torch,
        )

    calls = {"cupyattn": call(table), "scheduled_before": call(table, made), "no_room": call(used)}
    times = microseconds(calls, torch)
    report.row("caches", what="256 sequences", **{f"{name}_us": took for name, took in times.items()},
               gigabytes_a_second=(k.nbytes + v.nbytes) / times["cupyattn"] / 1e3)  # fmt: skip


def narrow(report, torch):
    """A decode whose keys and values are float8, beside bfloat16 of twice the bytes."""
    if report.late("caches"):
        return
    batch, seqlen = 64, 8192
    k, v, _ = cache(torch, batch, seqlen)
    wide = (query(torch, batch), k, v)
    lengths = torch.full((batch,), seqlen, device="cuda", dtype=torch.int32)

    def call(arrays):
        return in_a_graph(lambda: cupyattn.flash_attn_with_kvcache(*arrays, cache_seqlens=lengths), torch)

    times = microseconds({"wide": call(wide), "float8": call([x.to(torch.float8_e4m3fn) for x in wide])}, torch)
    rates = {f"{name}_gigabytes_a_second": count * k.numel() / times[name] / 1e3
             for name, count in (("wide", 4), ("float8", 2))}  # fmt: skip
    report.row("caches", what="float8", **{f"{name}_us": took for name, took in times.items()}, **rates)


def skewed(report, torch):
    """Packed sequences of which one is long, beside as many that are alike."""
    if report.late("caches"):
        return
    starts = skewed_starts(torch)
    total = int(starts["alike"][0][-1])
    q = torch.randn((total, HEADS, HEAD_DIM), device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn((total, HEADS_KV, HEAD_DIM), device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def call(its_starts, its_longest):
        its = its_starts.cuda()
        return in_a_graph(
            lambda: cupyattn.flash_attn_varlen_func(q, k, v, its, its, its_longest, its_longest, causal=True), torch
        )

    times = microseconds({name: call(*found) for name, found in starts.items()}, torch)
    pairs = {name: (x.diff().double() ** 2).sum().item() / 2 for name, (x, _) in starts.items()}
    rates = {f"{name}_tflops": 4 * HEADS * HEAD_DIM * pairs[name] / took / 1e6 for name, took in times.items()}
    report.row("caches", what="packed", **{f"{name}_us": took for name, took in times.items()}, **rates)


def pages(report, torch):
    """Uniform decoding over more keys than a cache holds, as a share of what a copy moves."""
    source = torch.empty(2**29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / microseconds({"copy": lambda: target.copy_(source)}, torch)["copy"]
    for page_size in (None, 16, 64, 256):
        for batch, seqlen in ((16, 8192), (64, 4096)):
            if report.late("caches"):
                return
            k, v, table = cache(torch, batch, seqlen, page_size)
            q, lengths = query(torch, batch), torch.full((batch,), seqlen, device="cuda", dtype=torch.int32)
            call = in_a_graph(
                lambda q=q, k=k, v=v, lengths=lengths, table=table: cupyattn.flash_attn_with_kvcache(
                    q, k, v, cache_seqlens=lengths, block_table=table
                ),
                torch,
            )
            took = microseconds({"x": call}, torch)["x"]
            rate = (k.nbytes + v.nbytes) / took
            report.row("caches", what="uniform", page=page_size, batch=batch, keys=seqlen, us=took,
                       share_of_copy=rate / copy)  # fmt: skip


def chunks(report, torch):
    """A chunk of a prompt behind what is cached already: in pages, and contiguous."""
    if report.late("caches"):
        return
    batch, seqlen, chunk = 4, 12800, 2048
    q = torch.randn((batch, chunk, HEADS, HEAD_DIM), device="cuda", dtype=torch.bfloat16)
    lengths = torch.full((batch,), seqlen, device="cuda", dtype=torch.int32)
    calls = {}
    for page_size in (None, 16, 64, 100, 128, 256):
        k, v, table = cache(torch, batch, seqlen, page_size)

        def call(k=k, v=v, table=table):
            return cupyattn.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, block_table=table, causal=True)

        calls[f"pages_of_{page_size}" if page_size else "contiguous"] = call
    times = microseconds(calls, torch)
    ratios = {f"{name}_over_contiguous": took / times["contiguous"] for name, took in times.items()}
    report.row("caches", what="chunk of a prompt", us=times["contiguous"], **ratios)


def step(report, torch):
    """New keys, rotary embedding and attention: one call, or three."""
    batch, seqlen = 16, 4096
    k, v, table = cache(torch, batch, seqlen, 64)
    q, lengths = query(torch, batch), torch.full((batch,), seqlen - 1, device="cuda", dtype=torch.int32)
    new = [torch.randn((batch, 1, HEADS_KV, HEAD_DIM), device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    angles = torch.rand((seqlen, HEAD_DIM // 2), device="cuda")
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    rows = torch.arange(batch, device="cuda")

    def turned(x):
        """Rotary embedding by torch: halves, at the last place of each sequence."""
        left, right = x.float().chunk(2, dim=-1)
        c, s = (part[lengths.long()][:, None, None].float() for part in (cos, sin))
        return torch.cat([left * c - right * s, right * c + left * s], dim=-1).bfloat16()

    def apart():
        page, place = table[rows, lengths.long() // 64].long(), lengths.long() % 64
        k[page, place], v[page, place] = turned(new[0])[:, 0], new[1][:, 0]
        return cupyattn.flash_attn_with_kvcache(turned(q), k, v, cache_seqlens=lengths + 1, block_table=table)

    def together():
        return cupyattn.flash_attn_with_kvcache(
            q, k, v, *new, rotary_cos=cos, rotary_sin=sin, cache_seqlens=lengths, block_table=table,
            rotary_interleaved=False,
        )  # fmt: skip

    calls = {"together": in_a_graph(together, torch), "apart": in_a_graph(apart, torch)}
    times = microseconds(calls, torch)
    report.row("caches", what="append, rotate, attend", **{f"{name}_us": took for name, took in times.items()},
               speed_over_apart=times["apart"] / times["together"])  # fmt: skip
