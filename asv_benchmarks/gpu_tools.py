"""Times on a GPU, and torch's attention by each of its back ends, for gpu.py and its parts."""

import os
import signal
import statistics
import subprocess
import time
from dataclasses import replace


def ended(command, seconds, **options):
    """(what it printed, its status).  Out of time it ends with all that it started: some may be stuck on the GPU."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, start_new_session=True, **pipes, **options) as run:
        try:
            return run.communicate(timeout=seconds)[0], run.returncode
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            return run.communicate()[0], "out of time"


def microseconds(calls, torch, repeats=5, budget=0.08):
    """The median time of each call: calls take turns, so that clocks and heat are the same for all."""
    samples = {name: [] for name in calls}
    counts = {}
    for name, call in calls.items():
        call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        counts[name] = max(1, min(200, round(budget / repeats / (time.perf_counter() - start))))
    for _ in range(repeats):
        for name, call in calls.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(counts[name]):
                call()
            end.record()
            end.synchronize()
            samples[name].append(1e3 * begin.elapsed_time(end) / counts[name])
    return {name: statistics.median(times) for name, times in samples.items()}


def in_a_graph(call, torch):
    """Replays of a call, without the host's time."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return graph.replay


def in_a_graph_if(call, torch):
    """The same of a call that others make; None where it cannot be captured."""
    try:
        return in_a_graph(call, torch)
    except RuntimeError:
        torch.cuda.synchronize()
        return None


BACK_ENDS = ("flash", "cudnn", "efficient", "math")
"""Of torch's attention. The last one has all scores in memory: of 32768 tokens they are 128 GB."""


def back_ends(torch, q, k, v, names=BACK_ENDS, **options):
    """{name: torch's attention by that back end}, of those that take the problem; (batch, heads, seqlen, dim)."""
    found = {}
    for name in names:

        def call(name=name):
            return back_ends_call(torch, name, q, k, v, **options)

        try:
            call()
            torch.cuda.synchronize()
        except (RuntimeError, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
            continue
        found[name] = call
    return found


def back_ends_call(torch, name, q, k, v, **options):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = SDPBackend.MATH if name == "math" else getattr(SDPBackend, f"{name.upper()}_ATTENTION")
    with sdpa_kernel(backend):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)


def with_tile(torch, q, k, v, tile, kernel, **options):
    """A call of `attention` with another tile than the planner's."""
    from cupyattn import cuda
    from cupyattn.arrays import enter
    from cupyattn.corridor import under_our_names
    from cupyattn.plan import choose
    from cupyattn.reading import attention_options, read

    settings = {"layout": "bshd", "causal": False, "alignment": "bottom-right", "window_size": (None, None)}
    settings |= {"softmax_scale": None, "softcap": 0.0, "dropout_p": 0.0, "compute_dtype": None, "return_lse": False}
    visit = enter("attention", under_our_names(q=q, k=k, v=v))
    problem = read("attention", visit.specs, attention_options("attention", **(settings | options), takes_float8=True))
    workers = visit.device().num_units if getattr(tile, "persistent", False) else 1
    plan = replace(choose(problem, visit.device()), kernel=kernel, tile=tile, num_workers=workers)
    specs = dict(visit.specs)
    return lambda: cuda.run("attention", visit.library.title, visit.arrays, specs, plan, problem, 0)


def skewed_starts(torch):
    """(starts, longest) of 64 packed sequences, 65536 tokens in all: one of 8192, and as many that are alike."""
    total, longest, batch = 65536, 8192, 64
    rest = torch.linspace(0, total - longest, batch, dtype=torch.float64).round().to(torch.int32)
    skewed = torch.cat([rest, torch.tensor([total], dtype=torch.int32)])
    return {
        "skewed": (skewed, longest),
        "alike": (torch.arange(0, total + 1, total // batch, dtype=torch.int32), total // batch),
    }
