"""A share of `make proof`: calls that cover every instruction form and every template argument, and a dozen bugs."""

import functools

import proof
import pytest
from proofs import calls, fences, running, share

import ptx
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
    "splits: counter added twice",
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
