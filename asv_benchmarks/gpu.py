"""Everything there is to learn on a machine with a GPU, in one command: `make gpu`.

    python asv_benchmarks/gpu.py [--dry-run] [--minutes 9] [--only tests,hopper,switches]

Tests, compute-sanitizer, then our kernels beside torch's back ends in one process, then sweeps of switches and tiles.
Writes
results/gpu-<name>-<date>.json and .txt (and copies into $OUT, if that is set).  Needs CuPy, torch with CUDA and
pytest, and no network.  --dry-run makes every plan and compiles every kernel instead, where there is no GPU.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

SUITE = Path(__file__).resolve().parent
CHECKOUT = SUITE.parent
sys.path[:0] = [str(CHECKOUT), str(SUITE)]

import gpu_articles  # noqa: E402 - beside this file
import gpu_caches  # noqa: E402
import gpu_gradients  # noqa: E402
import gpu_hopper  # noqa: E402
from gpu_tools import BACK_ENDS, back_ends, back_ends_call, ended, in_a_graph_if, microseconds, with_tile  # noqa: E402

import cupyattn  # noqa: E402 - the checkout, installed or not
from cupyattn.cuda.making import catalogue  # noqa: E402
from cupyattn.plan import Tile  # noqa: E402
from cupyattn.problem import NAMED_DEVICES  # noqa: E402

SECTIONS = (
    *("tests", "sanitizer", "hopper", "switches", "prefill", "gradients"),
    *("decode", "caches", "articles", "host", "tuning"),
)
SHARE = {
    "tests": 0.33,
    "sanitizer": 0.45,
    "hopper": 0.57,
    "switches": 0.71,
    "prefill": 0.76,
    "gradients": 0.84,
    "decode": 0.88,
    "caches": 0.92,
    "articles": 0.94,
    "host": 0.95,
    "tuning": 0.97,
}
"""The part of the time at which each section has to be over; what is left then is said to be left out."""

PREFILL = [
    (dtype, head_dim, seqlen, causal)
    for head_dim in (64, 128)
    for causal in (False, True)
    for seqlen in (2048, 4096, 8192, 16384)
    for dtype in (("bfloat16", "float16") if seqlen == 4096 else ("bfloat16",))
]
"""16384 tokens, 2048 features, as in the papers."""
DECODE = [  # batch, heads, key heads, keys, page size
    (16, 32, 8, 8192, None),
    (64, 32, 8, 4096, None),
    (16, 32, 8, 8192, 16),
    (8, 32, 32, 4096, None),
    (8, 32, 32, 4096, 16),
    (1, 32, 8, 2048, None),
    (1, 32, 8, 8192, None),
    (1, 32, 8, 16384, None),
]
TILES = {
    64: [
        *((64, 64, 4, stages, in_registers) for stages in (1, 2) for in_registers in (False, True)),
        *((128, 64, 4, stages, False) for stages in (1, 2)),
        *((128, 64, 8, 1, True), (128, 64, 8, 2, False)),
    ],
    128: [
        *((64, 64, 4, stages, False) for stages in (1, 2)),
        *((64, 32, 4, 2, in_registers) for in_registers in (False, True)),
        *((128, 64, 8, stages, False) for stages in (1, 2)),
        *((128, 64, 4, 1, False), (128, 32, 4, 2, False)),
    ],
}
SPLIT_TILES = [(16, 64, 4, 2), (16, 64, 4, 3), (16, 64, 4, 4), (16, 64, 4, 6), (16, 128, 8, 2), (16, 128, 8, 3)]


class Report:
    """Rows as they come, on the screen and in the end on disk."""

    def __init__(self, minutes):
        self.start, self.seconds = time.monotonic(), 60 * minutes
        self.found = {"machine": {}, "sections": {}}
        self.lines = []
        self.logs = {}

    def say(self, line):
        print(line, flush=True)
        self.lines.append(line)

    def row(self, section, **values):
        self.found["sections"].setdefault(section, []).append(values)
        self.say("  " + "  ".join(f"{name} {_short(value)}" for name, value in values.items()))

    def late(self, section):
        late = time.monotonic() - self.start > SHARE[section] * self.seconds
        if late:
            self.say(f"  {section}: out of time, the rest was left out")
        return late

    def left(self, section):
        """Seconds this section may still take."""
        return max(20.0, SHARE[section] * self.seconds - (time.monotonic() - self.start))


def _short(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---------------------------------------------------------------------------------------------------
# Sections
# ---------------------------------------------------------------------------------------------------


GPU_TESTS = ("tests/test_gpu.py", "tests/test_gpu_hopper.py", "tests/test_gpu_gradients.py")


def tests(report, torch):
    command = [sys.executable, "-m", "pytest", "-v", "--maxfail=100", "-W", "default", "-m", "gpu", *GPU_TESTS]
    if importlib.util.find_spec("xdist"):  # kernels are compiled by several processes
        command += ["-n", str(min(8, os.cpu_count() or 1))]
        if importlib.util.find_spec("pytest_timeout"):  # a kernel that hangs costs a worker, and has a name
            command += ["--timeout", "60", "--timeout-method", "thread"]
    _run_pytest(report, "tests", [*command, "-p", "no:cacheprovider"])


def sanitizer(report, torch):
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        report.row("sanitizer", result="compute-sanitizer is not installed")
        return
    for kind in ("memcheck", "racecheck"):
        command = [tool, "--tool", kind, "--error-exitcode", "9"]
        command += ["--report-api-errors", "no"] if kind == "memcheck" else []  # libraries ask what they may not
        command += [sys.executable, "-m", "pytest", "-v", "-W", "default"]
        command += ["-m", "gpu"]
        command += ["-p", "no:cacheprovider", *GPU_TESTS, "-k", "sanitizer"]
        _run_pytest(report, "sanitizer", command, tool=kind)


def _run_pytest(report, section, command, **more):
    start = time.monotonic()
    alone = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"), "2")  # of several workers
    environment = {**os.environ, **alone, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # JAX would take most of the memory
    text, status = ended(command, report.left(section), cwd=CHECKOUT, env=environment)
    report.logs[" ".join((section, *map(str, more.values())))] = text
    verdicts = [line for line in text.splitlines() if re.search(r"\d+ (passed|failed|skipped)|ERROR SUMMARY", line)]
    report.row(section, **more, status=status, seconds=time.monotonic() - start, result=" | ".join(verdicts[-2:]))
    if status != 0:
        report.say("\n".join(text.splitlines()[-60:]))


def prefill(report, torch):
    ratios = []
    for dtype, head_dim, seqlen, causal in PREFILL:
        if report.late("prefill"):
            break
        batch, heads = 16384 // seqlen, 2048 // head_dim
        q, k, v = (
            torch.randn((batch, seqlen, heads, head_dim), device="cuda", dtype=getattr(torch, dtype)) for _ in range(3)
        )
        theirs = [x.transpose(1, 2) for x in (q, k, v)]
        calls = {"cupyattn": lambda q=q, k=k, v=v, causal=causal: cupyattn.attention(q, k, v, causal=causal)}
        calls |= back_ends(torch, *theirs, BACK_ENDS if seqlen <= 4096 else BACK_ENDS[:-1], is_causal=causal)
        times = microseconds(calls, torch)
        flops = cupyattn.explain(q, k, v, causal=causal).flops
        rates = {name: flops / x * 1e-6 for name, x in times.items()}
        ratio = times["flash"] / times["cupyattn"] if "flash" in times else float("nan")
        ratios.append(ratio)
        what = {"dtype": dtype, "head_dim": head_dim, "seqlen": seqlen, "causal": causal}
        report.row("prefill", **what, **{f"{n}_tflops": r for n, r in rates.items()}, speed_over_flash=ratio)
    if ratios:
        report.row("prefill", least=min(ratios), geometric_mean=statistics.geometric_mean(ratios))


hopper, switches, caches = gpu_hopper.hopper, gpu_hopper.switches, gpu_caches.caches
gradients, articles = gpu_gradients.gradients, gpu_articles.articles


def copy_bandwidth(torch):
    """Terabytes per second of a large copy, read and written."""
    source = torch.empty(2**29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / microseconds({"copy": lambda: target.copy_(source)}, torch)["copy"] * 1e-6


def decode(report, torch):
    bandwidth = copy_bandwidth(torch)
    report.row("decode", copy_tb_per_s=bandwidth)
    for batch, heads, heads_kv, seqlen, page_size in DECODE:
        if report.late("decode"):
            break
        size = 2 * batch * seqlen * heads_kv * 128 * 2
        copies = max(1, min(32, -(-256 * 2**20 // size)))  # so that no cache holds all of them
        q = torch.randn((batch, 1, heads, 128), device="cuda", dtype=torch.bfloat16)
        sets = [
            [torch.randn((batch, seqlen, heads_kv, 128), device="cuda", dtype=torch.bfloat16) for _ in range(2)]
            for _ in range(copies)
        ]
        calls = {"cupyattn": lambda q=q, sets=sets: [cupyattn.attention(q, k, v) for k, v in sets]}
        if page_size:
            calls["cupyattn"] = _paged(torch, q, sets, page_size)
        turned = [[x.transpose(1, 2) for x in pair] for pair in sets]
        for name in back_ends(torch, q.transpose(1, 2), *turned[0], enable_gqa=True):
            calls[name] = lambda name=name, q=q, turned=turned: [
                back_ends_call(torch, name, q.transpose(1, 2), k, v, enable_gqa=True) for k, v in turned
            ]
        calls = {name: graph for name, call in calls.items() if (graph := in_a_graph_if(call, torch))}
        times = {name: x / copies for name, x in microseconds(calls, torch).items()}
        best = min((x for name, x in times.items() if name != "cupyattn"), default=float("nan"))
        what = {"batch": batch, "heads": f"{heads}/{heads_kv}", "keys": seqlen, "page": page_size, "kv_mb": size / 1e6}
        share = size / times["cupyattn"] * 1e-6 / bandwidth
        report.row(
            "decode",
            **what,
            **{f"{name}_us": x for name, x in times.items()},
            share_of_copy=share,
            speed_over_best=best / times["cupyattn"],
        )


def _paged(torch, q, sets, page_size):
    """Decoding from shuffled pages, by flash_attn_varlen_func."""
    batch, _, heads, head_dim = q.shape
    seqlen = sets[0][0].shape[1]
    pages = batch * seqlen // page_size
    table = torch.randperm(pages, device="cuda").to(torch.int32).reshape(batch, -1)
    starts_q = torch.arange(batch + 1, device="cuda", dtype=torch.int32)
    starts_k = starts_q * seqlen
    packed = q.reshape(batch, heads, head_dim)
    sets = [[x.reshape(pages, page_size, *x.shape[2:]) for x in pair] for pair in sets]
    return lambda: [
        cupyattn.flash_attn_varlen_func(packed, k, v, starts_q, starts_k, 1, seqlen, block_table=table) for k, v in sets
    ]


def host(report, torch):
    """Microseconds of the host's time per call, small arrays, kernels cached; and a first call."""
    import cupy

    q = torch.randn((1, 16, 8, 64), device="cuda", dtype=torch.float16)
    x = cupy.zeros((1, 16, 8, 64), "float16")
    y = q.transpose(1, 2)
    calls = {
        "cupyattn_cupy": lambda: cupyattn.attention(x, x, x),
        "cupyattn_torch": lambda: cupyattn.attention(q, q, q),
        "torch_sdpa": lambda: torch.nn.functional.scaled_dot_product_attention(y, y, y),
    }
    times = {}
    for name, call in calls.items():
        for _ in range(200):
            call()
        torch.cuda.synchronize()
        best = float("inf")
        for _ in range(10):
            start = time.perf_counter()
            for _ in range(100):
                call()
            best = min(best, (time.perf_counter() - start) / 100)
            torch.cuda.synchronize()
        times[name] = 1e6 * best
    report.row("host", **times, ratio_to_torch=times["cupyattn_torch"] / times["torch_sdpa"])
    path = os.pathsep.join(filter(None, (str(CHECKOUT), os.environ.get("PYTHONPATH"))))
    for kind in ("first_call", "first_call_from_disk"):
        code = (
            "import time, cupy, cupyattn; x = cupy.zeros((1, 64, 2, 112), 'float16'); cupy.cuda.Device().synchronize();"
            "s = time.perf_counter(); cupyattn.attention(x, x, x); cupy.cuda.Device().synchronize();"
            "print(time.perf_counter() - s)"
        )
        environment = {**os.environ, "PYTHONPATH": path, "CUPYATTN_CACHE_DIR": str(SUITE / "cubins")}
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
        seconds = float(run.stdout) if run.returncode == 0 else float("nan")
        report.row("host", **{f"{kind}_s": seconds}, error=run.stderr[-300:])
    shutil.rmtree(SUITE / "cubins", ignore_errors=True)


def tuning(report, torch):
    for head_dim, tiles in TILES.items():
        for causal in (False, True):
            q = torch.randn((4, 4096, 2048 // head_dim, head_dim), device="cuda", dtype=torch.bfloat16)
            flops = cupyattn.explain(q, q, q, causal=causal).flops
            for tile in tiles:
                if report.late("tuning"):
                    return
                try:
                    call = with_tile(torch, q, q, q, Tile(*tile), "flash", causal=causal)
                    took = microseconds({"x": call}, torch, repeats=3, budget=0.03)["x"]
                except Exception as error:  # one bad tile must not end the sweep; it is reported
                    report.row("tuning", kernel="flash", head_dim=head_dim, tile=tile, error=repr(error)[:200])
                    continue
                rate = flops / took * 1e-6
                report.row("tuning", kernel="flash", head_dim=head_dim, causal=causal, tile=tile, tflops=rate)
    q = torch.randn((16, 1, 32, 128), device="cuda", dtype=torch.bfloat16)
    k = torch.randn((16, 8192, 8, 128), device="cuda", dtype=torch.bfloat16)
    for tile in SPLIT_TILES:
        if report.late("tuning"):
            return
        call = with_tile(torch, q, k, k.clone(), Tile(*tile), "splitkv")
        took = microseconds({"x": call}, torch, repeats=3, budget=0.03)["x"]
        report.row("tuning", kernel="splitkv", tile=tile, tb_per_s=2 * k.nbytes / took * 1e-6)


# ---------------------------------------------------------------------------------------------------
# The whole
# ---------------------------------------------------------------------------------------------------


def machine(torch):
    import cupy

    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        state = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].split(", ")
    except (OSError, subprocess.CalledProcessError, IndexError):
        state = []
    return {
        **dict(zip(query.split(","), state, strict=False)),
        "device": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "cupy": cupy.__version__,
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def commit():
    """What the checkout is, with a mark if it was changed since; None where there is no git to tell."""
    try:
        command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
        return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def dry_run():
    """Every kernel of this script, compiled for an H100."""
    from cupyattn.cuda.making import compiler, source

    device = NAMED_DEVICES["H100"]
    wanted = {}
    for head_dim, tiles in TILES.items():
        for tile in tiles:
            found = catalogue.flash("bfloat16", head_dim, head_dim, Tile(*tile), True, 0)
            wanted[found.expression] = found
    for tile in SPLIT_TILES:
        found = catalogue.splitkv("bfloat16", 128, 128, Tile(*tile), True, 0, False)
        wanted[found.expression] = found
    for found in (*gpu_gradients.kernels(), *gpu_hopper.kernels()):
        wanted[found.expression] = found
    for seqlen_q in (1, 4096):
        print(cupyattn.explain((1, seqlen_q, 8, 128), *[(1, 4096, 8, 128)] * 2, dtype="bfloat16", device="H100"))
    text = {name: source.join(name) for name in {found.source for found in wanted.values()}}

    def compiled(found):
        assert found.shared_memory <= device.shared_memory, found
        return found, compiler.compile_cubin(text[found.source], found.expression, "sm_90a")

    with ThreadPoolExecutor() as pool:
        for found, cubin in pool.map(compiled, wanted.values()):
            what = f"{cubin.resources.registers} registers, {cubin.spills} bytes spilled"
            print(f"{what}: {found.expression}", flush=True)


@contextmanager
def guarded(report, section):
    """A section that fails is reported, and the next ones still run."""
    try:
        yield
    except Exception as error:
        report.row(section, error=repr(error)[:500])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="compile instead, without a GPU")
    parser.add_argument("--minutes", type=float, default=9.0, help="to be over in; default 9")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, with commas between them")
    arguments = parser.parse_args()
    sections = arguments.only.split(",")
    if not set(sections) <= set(SECTIONS):
        parser.error(f"--only takes {', '.join(SECTIONS)}")
    if arguments.dry_run:
        dry_run()
        return
    try:
        import cupy
        import torch
    except ImportError as error:
        raise SystemExit(f"gpu.py needs CuPy and torch: {error}") from None
    if not importlib.util.find_spec("array_api_compat"):
        raise SystemExit("gpu.py needs array-api-compat, as CONTRIBUTING's section on benchmarks says; not run.")
    if not (cupy.cuda.is_available() and torch.cuda.is_available()):
        raise SystemExit("gpu.py needs an NVIDIA GPU, and CuPy and torch have to find it; not run.")
    report = Report(arguments.minutes)
    report.found["machine"] = machine(torch)
    report.say(", ".join(f"{name} {value}" for name, value in report.found["machine"].items()))
    name = re.sub(r"[^a-z0-9]+", "-", report.found["machine"]["device"].lower()).strip("-")
    stem = f"gpu-{name}-{datetime.now(UTC):%Y%m%d-%H%M}"
    for section in sections:
        report.say(f"\n{section}")
        watch = threading.Timer(report.left(section) + 45, give_up, (report, section, stem))
        watch.daemon = True
        watch.start()
        with guarded(report, section):
            globals()[section](report, torch)
        watch.cancel()
        write(report, stem)
    print(f"\nwritten: {SUITE / 'results' / stem}.json and .txt")


def write(report, stem):
    """What is known so far, so that nothing is lost if a later section never ends."""
    for folder in filter(None, (SUITE / "results", os.environ.get("OUT"))):
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{stem}.json").write_text(json.dumps(report.found, indent=1) + "\n")
        (Path(folder) / f"{stem}.txt").write_text("\n".join(report.lines) + "\n")
    if os.environ.get("OUT"):  # which test was the last one says more than how many there were
        for name, text in report.logs.items():
            (Path(os.environ["OUT"]) / f"{name.replace(' ', '-')}.log").write_text(text)


def give_up(report, section, stem):
    """A kernel that hangs cannot be stopped from within its process."""
    report.row(section, error="this section hangs; all that came after it was left out")
    write(report, stem)
    os._exit(3)


if __name__ == "__main__":
    main()
