"""Figures that the README gives of measurements are those of the result file that it names."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "asv_benchmarks" / "results"
README = " ".join((ROOT / "README.md").read_text().split())
NAMED = sorted(set(re.findall(r"`asv_benchmarks/results/([\w.-]+)`", README)))


def figures():
    """{benchmark: {parameters: value}} of the CPU's."""
    (name,) = (name for name in NAMED if name.startswith("cpu-"))
    if not RESULTS.is_dir():
        pytest.skip("asv_benchmarks/ is not here (it is not in the sdist)")
    found = {}
    for row in json.loads((RESULTS / name).read_text())["rows"]:
        if "value" in row:
            found.setdefault(row["benchmark"], {})[tuple(row["params"].values())] = row["value"]
    return found


def sentences():
    """As they stand in the README."""
    found = figures()
    torch, naive, memory = (
        found["AgainstTorch.track_time"],
        found["AgainstNaive.track_time"],
        found["Memory.track_peak"],
    )
    for seqlen in (2048, 8192):
        for mask, name in (("none", "full"), ("causal", "causal")):
            times = (torch[seqlen, name, kind] for kind in ("float64", "float32", "float32 q,k x10"))
            yield f"| {seqlen} | {mask} | " + " | ".join(f"{x:.2f}" for x in times) + " |"
    least = {key: naive[key] for key in naive if key[2] == "float32"}
    yield (
        f"it takes {least[256, 'full', 'float32']:.0%} of the time at 256 tokens"
        f" (causal {least[256, 'causal', 'float32']:.0%}), {least[2048, 'full', 'float32']:.0%} at 2048"
        f" (causal {least[2048, 'causal', 'float32']:.0%})"
    )
    yield (
        f"needs {memory['cupyattn', 'float32']:.0f} MB besides its operands in float32"
        f" and {memory['cupyattn', 'float64']:.0f} MB in float64, result included; the naive formula needs"
        f" {memory['naive', 'float32'] / 1e3:.1f} and {memory['naive', 'float64'] / 1e3:.1f} GB"
    )
    corridor = found["Corridor.track_overhead"]
    yield (
        f"takes {corridor[('float32',)]:.0f} us in float32 and {corridor[('float64',)]:.0f} us in float64,"
        f" and importing it {found['Import.track_import'][()]:.0f} ms on top of NumPy"
    )
    assert set(found["Rounding.track_wrong"].values()) == {0.0}
    yield "gave the correctly rounded result in every element measured"
    read, again = found["Repeated.track_read"], found["Repeated.track_again"]
    calls = [key for key in again if not key[0].startswith("flash_attn_with_kvcache")]
    caches = [key for key in again if key not in calls]
    yield f"takes {_span(again, calls)} us of a processor instead of {_span(read, calls)} for `attention` and its kind"
    yield f"and {_span(again, caches)} instead of {_span(read, caches)} for `flash_attn_with_kvcache`"
    decode = found["DecodeAgainstTorch.track_time"]
    yield f"float32, takes {decode['enable_gqa', 4096]:.2f} of the time of torch's"
    yield (
        f"{decode['enable_gqa', 16384]:.2f} at 16,384 tokens,"
        f" and {decode['repeated keys', 4096]:.2f} of what repeated keys take"
    )
    training = found["TrainingAgainstTorch.track_time"]
    for seqlen, of_torch in ((2048, " of torch's time in float32"), (512, "")):
        full, causal = (
            [f"{training[seqlen, mask, dtype]:.2f}" for dtype in ("float32", "float64")] for mask in ("full", "causal")
        )
        in_float64 = " in float64" if of_torch else ""
        yield f"at {seqlen} tokens {full[0]}{of_torch} and {full[1]}{in_float64} (causal {causal[0]} and {causal[1]})"
    yield f"take {found['Growth.track_appends'][('dynamic',)]:.1f} times those to a preallocated one"
    busy = found["Busy.track_busy"]
    yield (
        f"has a median of {busy['every 20 ms', 'float32']:.1f} of a quiet machine's in float32"
        f" and of {busy['every 20 ms', 'float64']:.1f} in float64"
    )
    rest = sorted(busy["back to back", dtype] for dtype in ("float32", "float64"))
    yield f"its median is {rest[0]:.0f} to {rest[1]:.0f} times a quiet machine's"


def _span(values, keys):
    some = sorted(values[key] for key in keys)
    return f"{some[0]:.0f} to {some[-1]:.0f}"


def test_figures_of_the_readme_are_those_of_the_file_it_names():
    assert [sentence for sentence in sentences() if sentence not in README] == []


def test_the_ring_of_two_processes_is_that_of_its_file():
    (name,) = (name for name in NAMED if name.startswith("processes-"))
    if not RESULTS.is_dir():
        pytest.skip("asv_benchmarks/ is not here (it is not in the sdist)")
    ratios = [row["value"] for row in json.loads((RESULTS / name).read_text())["rows"]]
    assert f"takes {min(ratios):.2f} to {max(ratios):.2f} of the time of one process" in README


def test_every_file_that_the_readme_names_is_there():
    if RESULTS.is_dir():
        assert [name for name in NAMED if not (RESULTS / name).exists()] == []
        assert len(NAMED) >= 2


def test_what_is_said_of_the_proof_is_what_it_found():
    if not RESULTS.is_dir():
        pytest.skip("asv_benchmarks/ is not here (it is not in the sdist)")
    page = " ".join((ROOT / "docs" / "gpu.md").read_text().split())
    (name,) = re.findall(r"`asv_benchmarks/results/(proof-[\w.-]+)`", page)
    found = json.loads((RESULTS / name).read_text())
    assert found["wrong"] == 0
    assert found["forms"] == found["forms_executed"]
    kernels, calls = f"{found['kernels']:,} kernels that plans choose by default", f"{found['calls']:,} calls"
    planted = f"{found['planted_bugs_caught']} of {found['planted_bugs']} planted bugs caught"
    for sentence in (kernels, calls, planted):
        assert sentence in page
        assert sentence in README
    assert f"({found['texts']} texts" in page
    assert f"{found['instructions'] / 1e9:.1f} billion instructions" in page
    assert f"the largest error {found['largest_error_of_its_bar']:.2f} of its bar" in page
    assert f"the {found['forms']} forms of instructions" in page
