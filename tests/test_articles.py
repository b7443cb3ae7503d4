"""Benchmarks behind the tables that circulate: both sides of a ratio compute the same, and pages show what is there."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def suite():
    """The suite's modules, and those that make tables of its results; neither is installed."""
    if not (ROOT / "asv_benchmarks").is_dir() or not (ROOT / "docs").is_dir():
        pytest.skip("asv_benchmarks/ and docs/ are not here (they are not in the sdist)")
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "asv_benchmarks")
        patch.syspath_prepend(ROOT / "docs")
        import table
        from benchmarks import articles
        from making import results

        yield articles, table, results
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("benchmarks", "decoder", "making", "table"):
            del sys.modules[name]


def smaller(owner, **sizes):
    """A benchmark of less work."""
    return type(owner.__name__, (owner,), sizes)()


def test_a_cache_changes_no_token(suite):
    bench = smaller(suite[0].Cached, new=3)
    bench.setup("with", 5)
    found = [bench.generate(cache) for cache in ("with", "without")]
    assert found[0].shape == (1, 8)
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("causal", ["full", "causal"])
def test_padding_changes_no_token(suite, causal):
    bench = smaller(suite[0].Padded, sequences=3, longest=40)
    bench.setup("16 to 512", causal)
    np.testing.assert_allclose(bench.attend_padded()[bench.real], bench.attend_packed(), rtol=0, atol=1e-5)
    assert bench.track_tokens("16 to 512", causal) == bench.counts.sum() / (3 * 40)


def test_a_ratio_is_of_sharing_keys_over_repeating_them(suite, monkeypatch):
    articles, _, _ = suite
    outs = []

    def one_call_each(*calls, turns):
        outs.extend(call() for call in calls)
        return range(1, 1 + len(calls))

    monkeypatch.setattr(articles, "fastest", one_call_each)
    bench = smaller(articles.Grouped, cases={"few": (3, 5)})
    for repeated in ("before", "in each call"):
        bench.setup("few", repeated)
        assert bench.track_time("few", repeated) == 0.5
    for other in outs[1:]:
        np.testing.assert_array_equal(outs[0], other)


def test_articles_are_measured_only_if_they_are_asked_for(suite):
    _, table, _ = suite

    def modules(only):
        return {table.module_of(method) for method, _ in table.cases(quick=False, only=only)}

    assert "articles" not in modules(None)
    assert modules(["articles"]) == {"articles"}
    assert modules(["decode", "caches"]) == {"decode", "caches"}


def test_a_module_that_there_is_not_is_refused(suite, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["table.py", "--only", "article"])
    with pytest.raises(SystemExit):
        suite[1].main()
    assert "--only takes articles, attention" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------
# Tables and pictures of results
# ---------------------------------------------------------------------------------------------------


def made_up(table):
    """A file as `table.py` writes it, of every row of the articles, with numbers that can be told apart."""
    rows = []
    for number, (method, params) in enumerate(table.cases(quick=False, only=["articles"])):
        names = table.class_of(method).param_names
        what = {"benchmark": method.__qualname__, "params": dict(zip(names, params, strict=True))}
        rows.append({**what, "value": 1 / (2 + number), "unit": method.unit})
    about = {"cpu": "a CPU", "cores": 2, "date": "2031-02-03T04:05:06", "numpy": "9.9"}
    return {"machine": about, "quick": False, "rows": rows}


def test_a_page_says_that_nothing_was_measured(suite, monkeypatch, tmp_path):
    _, _, results = suite
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    for name in ("articles", "gpu", "against_torch"):
        assert results.TABLES[name]().startswith("**Not measured yet.** The command is `make ")


def test_a_page_shows_every_number_of_the_newest_file(suite, monkeypatch, tmp_path):
    _, table, results = suite
    found = made_up(table)
    (tmp_path / "articles-2031-02-03.json").write_text(json.dumps(found))
    (tmp_path / "articles-2030-01-01.json").write_text(json.dumps({**found, "rows": []}))
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    page = results.articles()
    assert "2031-02-03: a CPU, 2 cores" in page
    values = {row["benchmark"]: [] for row in found["rows"]}
    for row in found["rows"]:
        values[row["benchmark"]].append(row["value"])
    for value in values["Standard.track_time"] + values["Grouped.track_time"]:
        assert f"{1 / value:.1f}×" in page
    for value in values["Padded.track_tokens"] + values["Padded.track_time"]:
        assert f"{100 * (1 - value):.0f} %" in page
    for value in values["Cached.track_rate"]:
        assert f" {1 / value:.0f} " in page or f" {1 / value:.1f} " in page


def test_a_quick_look_is_no_result(suite, monkeypatch, tmp_path):
    _, table, results = suite
    (tmp_path / "articles-2031-02-03.json").write_text(json.dumps({**made_up(table), "quick": True}))
    assert results.newest("articles-*.json", tmp_path) is None


@pytest.mark.parametrize(
    ("names", "last"),
    [
        (["gpu-nvidia-a100-20310203-0405", "gpu-nvidia-h100-20301231-2359"], "nvidia-a100-20310203-0405"),
        (["gpu-nvidia-a100-20310203-0406", "gpu-nvidia-h200-20310203-0405"], "nvidia-a100-20310203-0406"),
        (["gpu-nvidia-h100-20310203-0405", "gpu-by-hand-2031-02-04", "gpu-undated"], "by-hand-2031-02-04"),
        (["gpu-undated"], "undated"),
    ],
)
def test_the_newest_file_is_so_by_its_date_and_not_by_its_name(suite, tmp_path, names, last):
    _, _, results = suite
    for name in names:
        (tmp_path / f"{name}.json").write_text("{}")
    assert results.newest("gpu-*.json", tmp_path)["file"] == f"gpu-{last}.json"


def test_a_gpus_rows_are_shown_as_they_are(suite, monkeypatch, tmp_path):
    _, _, results = suite
    rows = [{"least": 1.0}, {"dtype": "float16", "seqlen": 512, "cupyattn_tflops": 123.456}]
    found = {"machine": {"device": "a GPU"}, "sections": {"prefill": rows, "host": rows}}
    (tmp_path / "gpu-a-20310203-0405.json").write_text(json.dumps(found))
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    page = results.gpu()
    assert "| float16 | 512 | 123 |" in page
    assert page.count("**prefill**") == 1
    assert "least" not in page  # a mean over all, and no row of the table
    assert "host" not in page
