"""The Hopper kernel's part of gpu.py: what the machine can do, what others make of it, and every switch in turn."""

import statistics
from concurrent.futures import ThreadPoolExecutor

from gpu_tools import back_ends, microseconds, with_tile

import cupyattn
from cupyattn.cuda.making import catalogue
from cupyattn.plan import ALL_KEYS, RIGHT_EDGE, Switches, base_cluster, base_tile

FLOAT8 = "float8_e4m3fn"
TOKENS, FEATURES = 16384, 2048
"""Of a whole batch, and of all heads of a token, as in the papers."""
SHAPES = [
    (head_dim, head_dim, seqlen, causal)
    for head_dim in (128, 64, 96, 192, 256)
    for causal in (False, True)
    for seqlen in ((1024, 4096, 8192, 16384, 32768) if head_dim == 128 else (4096, 16384))
] + [(192, 128, 8192, causal) for causal in (False, True)]
SHORT = [(batch, seqlen, causal) for seqlen in (512, 1024, 2048) for batch in (1, 2, 8) for causal in (False, True)]
"""32 query heads of 128 over 4 key heads."""
NUM_TOKENS = (1024, 4096, 16384, 32768)

DEFAULT = Switches()
VARIANTS = {
    "no turns": {"ping_pong": False},
    "no overlap": {"overlap": False, "pinned": False},
    "neither": {"ping_pong": False, "overlap": False, "pinned": False},
    "no pin": {"pinned": False},
    "rescale last": {"rescale_first": False},
    "not lazy": {"lazy": False},
    "not lazy, rescale last": {"lazy": False, "rescale_first": False},
    "no turns, not lazy": {"ping_pong": False, "lazy": False},
    "4 polynomials": {"polynomials": 4},
}
SIZES = {  # block_q, block_k, stages, weights in shared memory
    (64, ALL_KEYS): [(192, 192, 2, True), (192, 112, 2, False), (128, 128, 3, False), (192, 128, 3, False)],
    (64, RIGHT_EDGE): [(192, 112, 2, False), (128, 128, 3, False), (192, 128, 3, False)],
    (128, ALL_KEYS): [(128, 128, 2, False), (128, 160, 2, False), (192, 80, 2, False), (192, 128, 1, True)],
    (128, RIGHT_EDGE): [(128, 176, 2, False), (128, 112, 2, False), (192, 80, 2, False), (128, 96, 3, False)],
    (256, ALL_KEYS): [(128, 64, 2, False), (128, 96, 1, False)],
    (256, RIGHT_EDGE): [(128, 64, 2, False), (128, 96, 1, False)],
}


def variants(tile, sizes):
    """{name: tile}: the one that is planned, then one thing changed at a time, and other sizes."""
    found = {"default": tile, "other order": tile._replace(persistent=not tile.persistent)}
    for name, changes in VARIANTS.items():
        found[name] = tile._replace(switches=tile.switches._replace(**changes))
    if tile.reach == ALL_KEYS:
        found["other cluster"] = tile._replace(cluster=3 - tile.cluster)
    for block_q, block_k, num_stages, shared in sizes:
        switches = tile.switches._replace(weights_in_shared=shared)
        cluster = 1 if block_q > tile.block_q else tile.cluster  # one way or the other of reading fewer keys
        cut = tile._replace(block_q=block_q, block_k=block_k, num_stages=num_stages, cluster=cluster, switches=switches)
        found[f"{block_q}x{block_k}, {num_stages} stages"] = cut
    return found


def kernels():
    """Every kernel that these sections time."""
    found = []
    for (head_dim, reach), sizes in SIZES.items():
        planned = base_tile(head_dim, head_dim, reach, "bfloat16")
        planned = planned._replace(cluster=base_cluster(head_dim, reach, "bfloat16"))
        for tile in variants(planned, sizes).values():
            found.append(catalogue.hopper("bfloat16", head_dim, head_dim, tile, True, 0))
    for head_dim in (64, 128, 256):
        for reach in (ALL_KEYS, RIGHT_EDGE):
            planned = base_tile(head_dim, head_dim, reach, FLOAT8)
            for tile in (planned, *(tiles_of_float8(planned).values() if head_dim == 128 else ())):
                found.append(catalogue.hopper(FLOAT8, head_dim, head_dim, tile, True, 0))
    return list(dict.fromkeys(found))


def prepare():
    """Compile them all, on all cores."""
    from cupyattn.cuda.making.cache import find

    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda found: find(found.source, found.expression, "sm_90a"), kernels()))


def roof(torch):
    """Teraflops of a bfloat16 product of 8192 x 8192 matrices."""
    a, b = (torch.randn((8192, 8192), device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / microseconds({"product": lambda: a @ b}, torch)["product"] * 1e-6


def made(torch, batch, seqlen, heads, heads_kv, head_dim, head_dim_v):
    """q, k and v in bfloat16, (batch, seqlen, heads, head_dim)."""
    sizes = ((heads, head_dim), (heads_kv, head_dim), (heads_kv, head_dim_v))
    return [torch.randn((batch, seqlen, *size), device="cuda", dtype=torch.bfloat16) for size in sizes]


def hopper(report, torch):
    """Beside torch's back ends, and beside the machine's own matrix product."""
    if torch.cuda.get_device_capability() != (9, 0):
        report.row("hopper", result="this is no Hopper")
        return
    prepare()
    product = roof(torch)
    report.row("hopper", product_tflops=product)
    for head_dim, head_dim_v, seqlen, causal in SHAPES:
        if report.late("hopper"):
            return
        q, k, v = made(
            torch, max(1, TOKENS // seqlen), seqlen, FEATURES // head_dim, FEATURES // head_dim, head_dim, head_dim_v
        )
        calls = {"cupyattn": lambda q=q, k=k, v=v, causal=causal: cupyattn.attention(q, k, v, causal=causal)}
        calls |= rivals(torch, q, k, v, causal)
        what = {"head_dim": head_dim, "head_dim_v": head_dim_v, "seqlen": seqlen, "causal": causal}
        plan = cupyattn.explain(q, k, v, causal=causal)
        compared(report, torch, what, calls, plan, product)
    ratios = []
    for batch, seqlen, causal in SHORT:
        if report.late("hopper"):
            break
        q, k, v = made(torch, batch, seqlen, 32, 4, 128, 128)
        calls = {"cupyattn": lambda q=q, k=k, v=v, causal=causal: cupyattn.attention(q, k, v, causal=causal)}
        calls |= rivals(torch, q, k, v, causal, enable_gqa=True)
        what = {"short": True, "batch": batch, "seqlen": seqlen, "causal": causal}
        ratios.append(compared(report, torch, what, calls, cupyattn.explain(q, k, v, causal=causal), product))
    if ratios:
        report.row("hopper", short_geometric_mean=statistics.geometric_mean(ratios))
    for seqlen in (8192, 16384):
        for causal in (False, True):
            if report.late("hopper"):
                return
            wide = made(torch, TOKENS // seqlen, seqlen, 16, 16, 128, 128)
            narrow = [x.to(torch.float8_e4m3fn) for x in wide]
            calls = {
                "cupyattn": lambda narrow=narrow, causal=causal: cupyattn.attention(*narrow, causal=causal),
                "bfloat16": lambda wide=wide, causal=causal: cupyattn.attention(*wide, causal=causal),
            }
            plan = cupyattn.explain(*narrow, causal=causal)
            variants_of_it = tiles_of_float8(plan.tile)
            for name, tile in variants_of_it.items():
                calls[name] = with_tile(torch, *narrow, tile, "hopper", causal=causal)
            what = {"dtype": FLOAT8, "seqlen": seqlen, "causal": causal}
            compared(report, torch, what, calls, plan, product, variants_of_it)


def tiles_of_float8(planned):
    """Another way to have sums in two levels beside scores, and what it would be without."""
    return {
        "nothing queued": planned._replace(
            block_k=192, switches=planned.switches._replace(overlap=False, pinned=False)
        ),
        "one level": planned._replace(block_k=192, switches=planned.switches._replace(two_level=False)),
    }


def rivals(torch, q, k, v, causal, **options):
    """torch's fast back ends, in their own layout."""
    return back_ends(torch, *(x.transpose(1, 2) for x in (q, k, v)), ("flash", "cudnn"), is_causal=causal, **options)


def compared(report, torch, what, calls, plan, product, ours=()):
    """A row of rates; how much faster we are than the best of the others, those that are no variants of `ours`."""
    times = microseconds(calls, torch)
    rates = {f"{name}_tflops": plan.flops / took * 1e-6 for name, took in times.items()}
    others = [took for name, took in times.items() if name not in ("cupyattn", *ours)]
    ratio = min(others) / times["cupyattn"] if others else float("nan")
    share = rates["cupyattn_tflops"] / product
    report.row("hopper", **what, kernel=plan.kernel, **rates, share_of_product=share, speed_over_best=ratio)
    return ratio


def switches(report, torch):
    """One thing changed at a time, all variants of a shape taking turns."""
    if torch.cuda.get_device_capability() != (9, 0):
        return
    prepare()
    for seqlen in NUM_TOKENS:
        for (head_dim, reach), sizes in SIZES.items():
            if report.late("switches"):
                return
            causal = reach == RIGHT_EDGE
            q, k, v = made(
                torch, max(1, TOKENS // seqlen), seqlen, FEATURES // head_dim, FEATURES // head_dim, head_dim, head_dim
            )
            calls = {}
            for name, tile in variants(cupyattn.explain(q, k, v, causal=causal).tile, sizes).items():
                if -(-seqlen // tile.block_q) % tile.cluster:
                    continue  # a cluster's tiles would not see the same keys
                call = with_tile(torch, q, k, v, tile, "hopper", causal=causal)
                try:
                    call()
                    torch.cuda.synchronize()
                except Exception as error:  # one bad variant must not end the sweep; it is reported
                    report.row("switches", head_dim=head_dim, causal=causal, variant=name, error=repr(error)[:200])
                    continue
                calls[name] = call
            flops = cupyattn.explain(q, k, v, causal=causal).flops
            times = microseconds(calls, torch, repeats=3, budget=0.03)
            for name, took in sorted(times.items(), key=lambda entry: entry[1]):
                over_default = times.get("default", float("nan")) / took
                report.row("switches", head_dim=head_dim, causal=causal, seqlen=seqlen, variant=name,
                           tflops=flops / took * 1e-6, over_default=over_default)  # fmt: skip
