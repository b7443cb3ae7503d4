"""What was measured, as a picture."""

import sys

import pytest

from cupyattn.command.pictures import save_picture

FOUND = {
    "sizes": {"num_heads": 8, "head_dim": 64},
    "dtype": "float32",
    "causal": True,
    "processor": "a processor",
    "rows": [
        {"seqlen": 8, "seconds": {"cupyattn float32": 0.002, "naive float32": 0.004}},
        {"seqlen": 16, "seconds": {"cupyattn float32": 1.25}},
    ],
}


def test_a_picture_names_every_contender_and_the_machine(tmp_path):
    pytest.importorskip("matplotlib")
    save_picture(tmp_path / "picture.svg", FOUND)
    text = (tmp_path / "picture.svg").read_text()
    for words in ("cupyattn float32", "naive float32", "8 heads of 64, causal, float32", "a processor"):
        assert f"<!-- {words} -->" in text


def test_a_picture_needs_no_window(tmp_path):
    pytest.importorskip("matplotlib")
    before = "matplotlib.pyplot" in sys.modules
    save_picture(tmp_path / "picture.png", FOUND)
    assert ("matplotlib.pyplot" in sys.modules) == before
