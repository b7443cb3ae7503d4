"""`cupyattn explain` says what `explain` says."""

import json

import pytest

import cupyattn
from cupyattn.command import main

SIZES = ["explain", "--seqlen-q", "1", "--seqlen-k", "8192", "--num-heads-kv", "8", "--dtype", "bfloat16"]


def explained(*arguments, capsys):
    assert main([*SIZES, "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_each_device_is_what_explain_says_of_it(capsys):
    shapes = (1, 1, 32, 128), (1, 8192, 8, 128), (1, 8192, 8, 128)
    found = explained("--device", "cpu,H100", capsys=capsys)
    for one, device in zip(found, ("cpu", "H100"), strict=True):
        plan = cupyattn.explain(*shapes, dtype="bfloat16", device=device)
        assert (one["device"], one["implementation"], one["reason"]) == (device, plan.kernel, plan.reason)
        assert (one["num_splits"], one["peers"]) == (plan.num_splits, dict(plan.peers))


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        (["--causal", "--alignment", "bottom-right"], {"causal": True, "alignment": "bottom-right"}),
        (["--window-size", "64,0", "--alignment", "top-left"], {"window_size": (64, 0), "alignment": "top-left"}),
        (["--mask"], {"mask": (1, 8192)}),
        (["--bias"], {"bias": (1, 8192)}),
        (["--alibi", "--alignment", "top-left"], {"alibi_slopes": (32,), "alignment": "top-left"}),
        (["--sinks"], {"sinks": (32,)}),
        (
            ["--softcap", "30", "--alibi", "--alignment", "top-left", "--backward"],  # Hopper's gradients take not both
            {"softcap": 30.0, "alibi_slopes": (32,), "alignment": "top-left", "backward": True},
        ),
        (["--backward"], {"backward": True}),
    ],
    ids=lambda flags: flags[0] if isinstance(flags, list) else "",
)
def test_a_flag_means_what_the_argument_means(flags, options, capsys):
    shapes = (1, 1, 32, 128), (1, 8192, 8, 128), (1, 8192, 8, 128)
    plan = cupyattn.explain(*shapes, dtype="bfloat16", device="H100", **options)
    (found,) = explained("--device", "H100", *flags, capsys=capsys)
    assert (found["implementation"], found["flops"], found["reason"]) == (plan.kernel, plan.flops, plan.reason)
    assert found["objections"] == {name: list(reasons) for name, reasons in plan.objections}


def test_the_table_has_a_column_for_each_device(capsys):
    assert main([*SIZES, "--device", "A100,H100"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["A100", "H100"]
    assert lines[1].split() == ["implementation", "splitkv", "splitkv"]
    assert "  not hopper: needs compute capability 9.0 (Hopper)" in lines


def test_a_call_that_nothing_takes_is_status_one(capsys):
    assert main(["explain", "--seqlen-q", "8", "--device", "T4"]) == 1
    assert capsys.readouterr().out.splitlines()[1].split() == ["implementation", "none"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--num-heads", "6", "--num-heads-kv", "4"], "argument --num-heads-kv: has to divide --num-heads"),
        (["--causal"], "argument --alignment: has to say top-left or bottom-right"),
        (["--device", "cpu,GTX"], "argument --device: 'GTX' is none of"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    ],
    ids=lambda flags: flags[0] if isinstance(flags, list) else "",
)
def test_flags_that_do_not_go_together_are_named(flags, sentence, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*SIZES, *flags])
    assert caught.value.code == 2
    assert sentence in capsys.readouterr().err


def test_what_explain_refuses_is_status_two_in_its_own_words(capsys):
    with pytest.raises(SystemExit) as caught:
        main([*SIZES, "--batch", str(2**70)])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert "explain: " in said
    assert said.count("explain: ") == 1  # the command's name, not the function's after it


@pytest.mark.parametrize("window", ["-1,0", "-1,-1", "3,-1"])
def test_a_window_may_begin_with_all_keys_without_an_equals_sign(window, capsys):
    assert main(["explain", "--seqlen-q", "8", "--window-size", window]) == 0
    plain = capsys.readouterr().out
    assert main(["explain", "--seqlen-q", "8", f"--window-size={window}"]) == 0
    assert capsys.readouterr().out == plain
