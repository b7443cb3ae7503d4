"""The README: its snippets run as they are printed, its install lines name what there is, its links lead somewhere."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def tiny_model(folder):
    """The folder of a model of transformers, for `name`: the one thing that no snippet makes itself."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 8}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).save_pretrained(folder)
    return str(folder)


def run(snippets, names):
    for number, snippet in enumerate(snippets):
        exec(compile(snippet, f"README.md, snippet {number}", "exec"), names)
    return names


def needs_transformers(snippet):
    return "transformers" in snippet


def test_every_snippet_runs_in_order_as_it_is_printed(capsys):
    names = run([snippet for snippet in SNIPPETS if not needs_transformers(snippet)], {})
    assert names["Y"].shape == (2, 8, 8, 64)
    assert capsys.readouterr().out.startswith("splitkv on H100: ")


def test_the_snippet_for_transformers_runs_as_it_is_printed(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers", minversion="5.0")
    names = run(filter(needs_transformers, SNIPPETS), {"name": tiny_model(tmp_path)})
    assert names["model"].config._attn_implementation == "cupyattn"


def test_a_snippet_that_raises_is_noticed():
    with pytest.raises(ZeroDivisionError):
        run(["x = 0", "1 / x"], {})


def test_the_extras_that_install_lines_name_are_there():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = set(re.findall(r"\[(\w+)\]['`]", README)) - {""}
    assert {"cuda12", "cuda13", "cli", "all", "torch", "jax", "dask", "transformers"} <= named
    assert named <= extras.keys()


def test_a_line_for_a_checkout_stands_beside_each_line_for_the_index():
    lines = re.findall(r"`pip install '?(\.|cupyattn)(\[\w+\])?'?`", README)
    assert sorted(extra for where, extra in lines if where == ".") == sorted(
        extra for where, extra in lines if where == "cupyattn"
    )
    assert len(lines) == 8


def test_links_are_absolute():
    """It is shown where the files beside it are not."""
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert [link for link in links if not link.startswith(("https://", "#"))] == []


def test_files_that_it_names_are_there():
    if not (ROOT / "asv_benchmarks").is_dir():
        pytest.skip("asv_benchmarks/ is not here (it is not in the sdist)")
    named = re.findall(r"`((?:asv_benchmarks|tests|examples|docs)/[\w./-]+)`", README)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []
