"""A share of `make proof`: calls that cover every instruction form and every template argument, and a dozen bugs."""

import functools
import re

import numpy as np
import proof
import pytest
from proofs import calls, compared, fences, running, share

import ptx
from ptx import alone
from ptx.text import read

PAIRS, FORMS = share.load()
SAMPLE = 8
"""Kernels whose PTX is looked at for instructions that the share does not cover."""
BUGS = (
    "halves of pack swapped, f16",
    "registers of A swapped in mma.sync",
    "operands b of mma.sync swapped",
    "ldmatrix not transposed",
    "cp.async of what is not valid",
    "cp.async: wait for one group less",
    "no __syncthreads",
    "a predicate the other way",
    "shuffle of another lane",
    "a barrier is gone",
    "copies waited for behind the barrier that tells of them",
    "the smaller of unsigned numbers",
)
"""Of those that are quickest to compile."""


@pytest.fixture(autouse=True)
def _compilers():
    ptx.require_compiler()
    yield
    ptx.kernels.clear()


@functools.cache
def _calls_of(kernel):
    return calls.calls_of(kernel)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair.kernel}, {pair.call}, schedule {pair.schedule}")
def test_numbers_are_right_and_no_rule_is_broken(pair):
    found = running.run_call(pair.kernel, _calls_of(pair.kernel)[pair.call], pair.schedule)
    assert found["lost"] is None, found["lost"]


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_caught(name):
    assert running.run_planted(name)["how"] is not None


def test_the_share_names_kernels_and_calls_that_there_are():
    for pair in PAIRS:
        assert pair.kernel in calls.kernels(pair.kernel.target)
        assert pair.call in _calls_of(pair.kernel)


def test_the_share_covers_all_switches_of_the_default_kernels():
    all_of_them = {kernel for target in calls.DEVICES for kernel in calls.kernels(target)}
    switches = set().union(*map(share.switches_of, all_of_them))
    assert set().union(*(share.switches_of(pair.kernel) for pair in PAIRS)) == switches


def _sample():
    """Of each source and architecture, in turn."""
    groups = {}
    for target in calls.DEVICES:
        for kernel in calls.kernels(target):
            groups.setdefault((target, kernel.source), []).append(kernel)
    return [group[len(group) * 2 // 3] for group in groups.values()][:SAMPLE]


@pytest.mark.parametrize("kernel", _sample(), ids=str)
def test_no_kernel_has_an_instruction_that_the_share_does_not_cover(kernel):
    assert share.forms_of_kernel(kernel) <= FORMS


PRODUCT = """\
.version 8.8
.target sm_90a
.address_size 64
.entry kernel()
{
.reg .f32 %f<4>;
.reg .b32 %r<4>;
.reg .b64 %d<2>;
mov.f32 %f1, 0f00000000;
mov.f32 %f2, 0f00000000;
mov.f32 %f3, 0f00000000;
$again:
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f0, %f1, %f2, %f3}, %d0, %d1, 1, 1, 1, 0, 0;
wgmma.commit_group.sync.aligned;
wgmma.wait_group.sync.aligned 0;
add.f32 %f1, %f1, %f2;
ret;
}
"""


def _rules(text):
    return {violation.rule for violation in fences.violations(read(text))}


def test_a_fence_between_writing_and_multiplying_is_enough():
    assert _rules(PRODUCT) == set()


def test_registers_that_are_written_behind_the_fence_are_found():
    assert _rules(PRODUCT.replace("wgmma.fence.sync.aligned;\n", "")) == {fences.WRITTEN}


def test_registers_that_are_touched_before_the_wait_are_found():
    assert _rules(PRODUCT.replace("wgmma.wait_group.sync.aligned 0;", "wgmma.wait_group.sync.aligned 1;")) == {
        fences.TOUCHED
    }


def test_paths_that_go_round_are_followed():
    fence = "wgmma.fence.sync.aligned;\n"
    looped = PRODUCT.replace("$again:\n" + fence, fence + "$again:\n").replace("ret;", "bra $again;")
    assert _rules(looped) == {fences.WRITTEN}


def _measured(name, forms, seconds, to_compile=0.0):
    kernel = calls.Kernel("sm_80", "append.cu", "cupyattn::append<float>")
    return share.Measured(share.Pair(kernel, name, 1), frozenset(forms), seconds, to_compile)


def test_what_is_cheap_and_covers_much_is_chosen():
    offered = [_measured("all", "abcd", 9.0), _measured("some", "abc", 1.0), _measured("last", "d", 1.0)]
    assert [each.pair.call for each in share.choose(offered)] == ["some", "last"]


def test_a_crash_is_a_finding(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text("import os; input(); os._exit(3)")
    worker = running.Worker(script)
    assert "ended with 3" in worker.run({"kernels": {}})["raised"]


def test_what_is_lost_is_told_and_fails(monkeypatch, capsys):
    given = {"target": "sm_80", "source": "append.cu", "expression": "cupyattn::append<float>"}
    lost = {**given, "forms": ["ret"], "calls": [], "lost": ["in one piece: off"]}
    monkeypatch.setattr(proof, "done", lambda *_: iter([lost]))
    monkeypatch.setattr("sys.argv", ["proof.py", "--only", "append", "--share", "0.01"])
    assert proof.main() == 1
    assert "1 kernels lost" in capsys.readouterr().out


# ---- Two compilers ---------------------------------------------------------------------------------------------------

SUMS = f"""
template <int>
__global__ void sums(int count, const float2* given, float* found) {{
    {alone.BEGIN}
    found[i] = given[i].x * given[i].x + given[i].y;
}}
"""


def _sums(rng, edit=None):
    """What a kernel writes, and its arithmetic."""
    kernel = ptx.build("alone.cu", "sums<0>", sources={"alone.cu": SUMS}, target="sm_80", edit=edit)
    given, before = rng.standard_normal((1000, 2)).astype(np.float32), kernel.visited_forms
    found = alone.run(kernel, [given], np.zeros(1000, np.float32))
    return [found], compared.arithmetic_of(kernel.visited_forms - before)


def _judged(edit, seed=3):
    (one, ones), (other, others) = (_sums(np.random.default_rng(seed), each) for each in (None, edit))
    return compared.judged(one, other, ones, others)


def test_a_text_has_the_bits_of_itself():
    assert _judged(None) == {"numbers": 1000, "same": True, "ulps": 0, "arithmetic": {}, "lost": None}


def test_a_product_and_a_sum_for_an_fma_are_told_and_may_have_other_bits():
    apart = r"mul.ftz.f32 \1, \2, \3;\n add.ftz.f32 \1, \1, \4;"
    found = _judged(lambda text: re.sub(r"fma\.rn\.ftz\.f32 *\s(\S+), (\S+), (\S+), (\S+);", apart, text))
    assert found["lost"] is None
    assert found["ulps"] > 0
    assert found["arithmetic"].keys() == {"add.ftz.f32", "fma.rn.ftz.f32", "mul.ftz.f32"}


def test_other_bits_by_the_same_arithmetic_are_lost():
    found = _judged(lambda text: re.sub(r"(fma\.rn\.ftz\.f32 *\s\S+, \S+, )(\S+), (\S+);", r"\1\3, \2;", text))
    assert found["arithmetic"] == {}
    assert "same arithmetic" in found["lost"]


@pytest.mark.parametrize(
    ("dtype", "one", "other", "ulps"),
    [
        (np.float32, 1.0, 1.0 + 2.0**-22, 2),
        (np.float16, -0.0, 0.0, 0),
        (np.float16, -(2.0**-24), 2.0**-24, 2),
        (np.float32, np.nan, -np.nan, 0),
        (np.float32, np.nan, 1.0, np.inf),
        (np.float32, np.finfo(np.float32).max, np.inf, 1),
        (np.int32, -(2**31), 2**31 - 1, 2**32 - 1),
    ],
)
def test_ulps_are_counted(dtype, one, other, ulps):
    assert compared.ulps_between(np.array([one], dtype), np.array([other], dtype)) == ulps


def test_all_that_a_call_writes_is_compared():
    kernel, name, _ = next(pair for pair in PAIRS if pair.kernel.family == "splitkv")
    found = compared.compare_call(kernel, _calls_of(kernel)[name], None, None, None)
    assert found["same"]
    assert found["lost"] is None
    assert found["numbers"] > 0


def test_a_kernel_that_could_not_be_compared_is_told_and_fails(monkeypatch, capsys):
    given = {"target": "sm_80", "source": "append.cu", "expression": "cupyattn::append<float>"}
    task = {"compared": {**given, "nvrtc": None, "other": "libnvrtc.so", "folder": None}}
    monkeypatch.setattr(proof, "done", lambda *_: iter(proof.reports_of(task, {"raised": "ended with 3"})))
    monkeypatch.setattr("sys.argv", ["proof.py", "--same-as", "libnvrtc.so", "--only", "append"])
    assert proof.main() == 1
    assert "1 kernels" in capsys.readouterr().out
    assert "ended with 3" in proof.line_of(proof.reports_of(task, {"raised": "ended with 3"})[0])
