"""`cupyattn bench`: what it measures, and what it says of it."""

import json
import re
import sys

import pytest

from cupyattn.command import contenders, main, timing

QUICK = ["bench", "--seqlen", "8,16", "--turns", "1", "--num-heads", "2", "--head-dim", "8", "--against", "naive"]


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    monkeypatch.setattr(timing, "PAUSE", 0.0)
    monkeypatch.setattr(timing, "TURN", 0.001)
    monkeypatch.setattr(timing, "SAMPLE", 1e-5)


def measured(*flags, capsys):
    assert main([*QUICK, "--json", "-", *flags]) == 0
    return json.loads(capsys.readouterr().out)


def test_each_length_has_a_time_and_a_difference_for_each_contender(capsys):
    found = measured(capsys=capsys)
    names = {"cupyattn float64", "cupyattn float32", "naive float32"}
    assert [row["seqlen"] for row in found["rows"]] == [8, 16]
    for row in found["rows"]:
        assert row["seconds"].keys() == row["largest_difference"].keys() == names
        assert all(0 < seconds < 1 for seconds in row["seconds"].values())
        assert row["largest_difference"]["cupyattn float64"] == 0
        assert 0 < row["largest_difference"]["naive float32"] < 1e-5


def test_what_was_measured_and_where_is_in_it(capsys):
    found = measured("--causal", "--dtype", "float64", "--num-heads-kv", "1", capsys=capsys)
    assert found["sizes"] == {"batch": 1, "seqlen": [8, 16], "num_heads": 2, "num_heads_kv": 1, "head_dim": 8}
    assert (found["dtype"], found["causal"], found["against"]) == ("float64", True, "naive")
    assert {"when", "cupyattn", "numpy", "processor", "cores", "load"} <= found.keys()


@pytest.mark.parametrize("present", [False, True])
def test_the_peer_is_torch_where_it_is_installed(present, monkeypatch, capsys):
    if present:
        pytest.importorskip("torch")
    monkeypatch.setattr(timing, "find_spec", lambda name: name if present else None)
    assert main([*QUICK[:-2], "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["against"] == ("torch" if present else "naive")


@pytest.fixture
def broken_torch(tmp_path, monkeypatch):
    """A torch that is installed, and whose import raises."""
    (tmp_path / "torch.py").write_text("raise OSError('libtorch.so: no such file\\nand more')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("torch", "torch._dynamo"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_a_torch_that_is_broken_is_named_and_the_formula_measured(broken_torch, capsys):
    assert main([*QUICK[:-2], "--json", "-"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["against"] == "naive"
    assert "torch cannot be imported (libtorch.so: no such file), see cupyattn doctor" in said.err


@pytest.mark.parametrize("flags", [["--against", "torch"], ["--device", "cuda"]], ids=str)
def test_a_torch_that_is_broken_is_refused_where_it_is_asked_for(flags, broken_torch, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*QUICK[:-2], *flags])
    assert caught.value.code == 2
    assert "needs torch, which cannot be imported (libtorch.so: no such file)" in capsys.readouterr().err


def test_measuring_beside_the_formula_does_not_import_torch(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    assert main(QUICK) == 0


def test_the_table_has_times_and_a_ratio(capsys):
    assert main([*QUICK, "--causal"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("batch 1, 2 heads of 8, float32, causal; ")
    heads = re.split(r"  +", lines[2].strip())
    assert heads == [
        "seqlen",
        *(f"{one}, ms" for one in ("cupyattn float64", "cupyattn float32", "naive float32")),
        "over naive float32",
    ]
    row = lines[3].split()
    assert row[0] == "8"
    assert float(row[4]) == pytest.approx(float(row[2]) / float(row[3]), abs=0.02 * float(row[4]) + 0.01)


FOUND = {
    "sizes": {"batch": 1, "seqlen": [8, 16], "num_heads": 8, "num_heads_kv": 2, "head_dim": 64},
    "dtype": "float32",
    "causal": False,
    "processor": "a processor",
    "cores": 2,
    "against": "naive",
    "rows": [
        {
            "seqlen": 8,
            "seconds": {"cupyattn float32": 0.002, "naive float32": 0.004},
            "largest_difference": {"cupyattn float32": 1e-7, "naive float32": 2e-7},
            "skipped": {},
        },
        {
            "seqlen": 16,
            "seconds": {"cupyattn float32": 1.25},
            "largest_difference": {"cupyattn float32": 3e-7},
            "skipped": {"naive float32": "too large"},
        },
    ],
}


def test_who_was_left_out_is_a_dash_and_a_reason():
    lines = timing.show(FOUND)
    assert lines[0] == "batch 1, 8 heads on 2 key heads of 64, float32, no mask; a processor, 2 cores"
    table = lines[2].splitlines()
    assert [line.split() for line in table[1:]] == [["8", "2", "4", "0.50"], ["16", "1250", "-", "-"]]
    assert "  cupyattn float32: 3.0e-07" in lines
    assert lines[-1] == "naive float32 at 16: too large"


def test_files_are_written_where_they_are_wanted(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    numbers, picture = tmp_path / "numbers.json", tmp_path / "picture.png"
    assert main([*QUICK, "--json", str(numbers), "--picture", str(picture)]) == 0
    assert len(json.loads(numbers.read_text())["rows"]) == 2
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.startswith("batch 1")


def test_a_file_that_cannot_be_written_is_status_one_after_the_table(tmp_path, capsys):
    assert main([*QUICK, "--json", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert "seqlen" in out
    assert str(tmp_path) in err


def test_a_machine_that_is_busy_is_remarked_on(monkeypatch, capsys):
    monkeypatch.setattr(timing.os, "getloadavg", lambda: (99.0, 0.0, 0.0), raising=False)
    assert main(QUICK) == 0
    assert "others keep this machine busy (load 99.0)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--num-heads-kv", "3"], "argument --num-heads-kv: has to divide --num-heads"),
        (["--device", "cuda"], "argument --device cuda: needs torch, which is not installed"),
        (["--dtype", "bfloat16"], "argument --dtype: bfloat16 goes with --device cuda"),
        (["--picture", "x.png"], "argument --picture: needs matplotlib, which is not installed"),
        (["--json", "nowhere/x.json"], "argument --json: there is no folder"),
        (["--seqlen", "8,0"], "argument --seqlen: '0' is not a positive number"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_measured_is_said_before_anything_is(flags, sentence, monkeypatch, capsys):
    monkeypatch.setattr(timing, "find_spec", lambda name: None)
    monkeypatch.setattr(contenders, "calls", None)
    with pytest.raises(SystemExit) as caught:
        main([*QUICK, *flags])
    assert caught.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "gpu", "sentence"),
    [
        (["--device", "cuda"], False, "argument --device: cuda needs an NVIDIA GPU, and torch finds none"),
        (["--device", "cuda", "--against", "naive"], True, "argument --against: naive is NumPy's formula"),
        (
            ["--device", "cuda", "--against", "torch", "--dtype", "float64"],
            True,
            "argument --dtype: float64 goes with --device cpu",
        ),
        (["--picture", "x.bmp"], False, "argument --picture: has to end in .png, .svg or .pdf, not '.bmp'"),
    ],
)
def test_what_this_gpu_or_no_gpu_cannot_do_is_said(flags, gpu, sentence, monkeypatch, capsys):
    monkeypatch.setattr(timing, "_objection_to", lambda package: None)
    monkeypatch.setattr(contenders, "torch_sees_a_gpu", lambda: gpu)
    with pytest.raises(SystemExit):
        main([*QUICK[:-2], *flags])
    assert sentence in capsys.readouterr().err


def test_only_the_best_sample_counts(monkeypatch):
    times = iter([5.0, 3.0, 1.0, 2.0])
    monkeypatch.setattr(timing, "_sample", lambda call, number: next(times))
    monkeypatch.setattr(timing, "TURN", -1.0)
    call = contenders.Call(lambda: 1.0, lambda: 1.0)
    steps = []
    found = timing.measure({"one": call}, 3, steps.append)
    assert found["seconds"] == {"one": 1.0}
    assert steps == ["one"] * 3
