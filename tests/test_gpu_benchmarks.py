"""What `make gpu` times can be asked for: a section that raises there costs what a machine with a GPU is lent for."""

import os
import re
import sys
import time
from pathlib import Path

import pytest

from cupyattn.plan.hopper import base_tile
from cupyattn.problem import NAMED_DEVICES

torch = pytest.importorskip("torch")
SUITE = Path(__file__).parents[1] / "asv_benchmarks"


@pytest.fixture
def suite(monkeypatch):
    """(gpu_hopper, gpu_tools)"""
    monkeypatch.setattr(sys, "path", [str(SUITE), *sys.path])
    import gpu_hopper
    import gpu_tools

    return gpu_hopper, gpu_tools


def operands(head_dim, dtype):
    return [torch.zeros((1, 256, 2, head_dim)).to(dtype) for _ in range(3)]


def test_every_variant_is_a_call(suite):
    gpu_hopper, gpu_tools = suite
    for (head_dim, reach), sizes in gpu_hopper.SIZES.items():
        causal = reach == gpu_hopper.RIGHT_EDGE
        for tile in gpu_hopper.variants(base_tile(head_dim, head_dim, reach, "bfloat16"), sizes).values():
            call = gpu_tools.with_tile(torch, *operands(head_dim, torch.bfloat16), tile, "hopper", causal=causal)
            assert callable(call)


@pytest.mark.parametrize("causal", [False, True])
def test_every_variant_of_float8_is_a_call(suite, causal):
    gpu_hopper, gpu_tools = suite
    planned = base_tile(128, 128, gpu_hopper.RIGHT_EDGE if causal else gpu_hopper.ALL_KEYS, gpu_hopper.FLOAT8)
    for tile in gpu_hopper.tiles_of_float8(planned).values():
        arrays = operands(128, torch.float8_e4m3fn)
        assert callable(gpu_tools.with_tile(torch, *arrays, tile, "hopper", causal=causal))


def test_every_kernel_that_is_timed_has_a_name(suite):
    gpu_hopper, _ = suite
    names = [found.expression for found in gpu_hopper.kernels()]
    assert len(names) == len(set(names)) > 50


def test_every_kernel_of_gradients_has_a_name_and_fits(suite):
    import gpu_gradients

    found = gpu_gradients.kernels()
    assert len({x.expression for x in found}) == len(found) > 20
    assert max(x.shared_memory for x in found) <= NAMED_DEVICES["H100"].shared_memory


def test_who_is_out_of_time_ends_with_all_that_it_started(suite):
    """Workers of pytest may be stuck in a kernel: what is timed after them would share the GPU with it."""
    _, gpu_tools = suite
    child = f"import subprocess; subprocess.run([{sys.executable!r}, '-c', 'import time; time.sleep(600)'])"
    start = f"import subprocess; print(subprocess.Popen([{sys.executable!r}, '-c', {child!r}]).pid, flush=True)"
    text, status = gpu_tools.ended([sys.executable, "-c", start + "; import time; time.sleep(600)"], 3.0)
    assert status == "out of time"
    pid, ends = int(text), time.monotonic() + 20
    while _runs(pid) and time.monotonic() < ends:
        time.sleep(0.05)
    assert not _runs(pid)


def _runs(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return state.rpartition(")")[2].split()[0] != "Z"


def test_what_ends_in_time_says_how(suite):
    _, gpu_tools = suite
    code = "import os, sys; print(os.getcwd(), os.environ['WHAT'], file=sys.stderr); raise SystemExit(5)"
    text, status = gpu_tools.ended([sys.executable, "-c", code], 60, cwd="/", env={**os.environ, "WHAT": "so"})
    assert (text, status) == ("/ so\n", 5)


@pytest.mark.parametrize("names", [(), ("math",), ("flash", "math")])
def test_back_ends_of_torch_are_those_asked_for_that_take_the_problem(suite, names, monkeypatch):
    _, gpu_tools = suite
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    q = torch.randn(1, 2, 5, 8)
    found = gpu_tools.back_ends(torch, q, q, q, names, is_causal=True)
    assert set(found) <= set(names)
    assert ("math" in found) == ("math" in names)
    for call in found.values():
        torch.testing.assert_close(call(), torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True))


ARTICLES = {
    "standard": ("standard", {"seqlen": 70, "causal": False}),
    "standard, causal": ("standard", {"seqlen": 70, "causal": True}),
    "grouped heads": ("grouped", {"seqlen_q": 9, "seqlen_k": 40}),
    "a token": ("cached", {"prompt": 40}),
    "packed": ("packed", {"causal": False, "sequences": 3, "longest": 90}),
    "packed, causal": ("packed", {"causal": True, "sequences": 3, "longest": 90}),
}


@pytest.mark.parametrize(("made", "sizes"), ARTICLES.values(), ids=ARTICLES)
def test_all_sides_of_what_articles_compare_compute_the_same(suite, made, sizes):
    import gpu_articles

    first, *others = (call() for call in getattr(gpu_articles, made)(torch, device="cpu", **sizes).values())
    assert others
    for other in others:
        torch.testing.assert_close(other, first, atol=2e-2, rtol=2e-2)


def test_articles_end_with_a_row_of_each(suite, monkeypatch):
    import gpu_articles

    def small(made, **sizes):
        return lambda torch, *args: getattr(original, made)(torch, *(min(x, 64) for x in args), device="cpu", **sizes)

    class Report:
        rows = []  # noqa: RUF012 - of this test alone

        def late(self, section):
            return False

        def row(self, section, **values):
            self.rows.append(values)

    original = type("original", (), {name: staticmethod(getattr(gpu_articles, name)) for name in dir(gpu_articles)})
    for made, sizes in (("standard", {}), ("grouped", {}), ("cached", {}), ("packed", {"sequences": 3, "longest": 90})):
        monkeypatch.setattr(gpu_articles, made, small(made, **sizes))
    monkeypatch.setattr(gpu_articles, "peak", lambda torch, call: 1.0)
    monkeypatch.setattr(gpu_articles, "microseconds", lambda calls, torch, **_: dict.fromkeys(calls, 2.0))
    gpu_articles.articles(Report(), torch)
    assert [row["what"] for row in Report.rows].count("standard") == 8
    assert all(row[name] == 1.0 for row in Report.rows for name in row if name.startswith("speed_over_"))
    assert all("naive_mb" in row for row in Report.rows if row["what"] == "standard")


def test_a_run_says_which_commit_it_is_of(suite, monkeypatch):
    import gpu

    assert gpu.commit() is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", gpu.commit())
    monkeypatch.setenv("PATH", "")
    assert gpu.commit() is None
