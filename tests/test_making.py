"""What pages show that is made when the site is built: it is what the package says, and pages ask for what there is."""

import re
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from homes import needs

import cupyattn
import cupyattn.distributed
from cupyattn.plan import IMPLEMENTATIONS, choose

DOCS = Path(__file__).parents[1] / "docs"
PAGES = {path.stem: path.read_text() for path in DOCS.glob("*.md")}


@pytest.fixture(scope="module")
def making():
    """(pictures, tables, results)"""
    if not PAGES:
        pytest.skip("docs/ is not here (it is not in the sdist)")
    needs("matplotlib")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DOCS)
        from making import pictures, results, tables

        yield pictures, tables, results
    for name in ("making", "making.pictures", "making.results", "making.tables"):
        del sys.modules[name]


def asked_for(directive):
    return {name for text in PAGES.values() for name in re.findall(rf":::\{{{directive}\}} (\S+)", text)}


def test_pages_ask_for_every_table_and_for_no_other(making):
    _, tables, results = making
    assert asked_for("generated") == tables.TABLES.keys() | results.TABLES.keys()


def test_pages_ask_for_every_picture_and_for_no_other(making):
    assert asked_for("picture") == {name for name, _ in making[0].all_pictures()}


def test_every_page_is_in_the_contents():
    listed = re.findall(
        r"^([\w-]+)$", "\n".join(re.findall(r"```{toctree}\n(.*?)```", PAGES["index"], re.DOTALL)), re.M
    )
    assert set(listed) | {"index"} == PAGES.keys()


def test_every_public_name_is_in_the_reference():
    listed = re.findall(r"^   (\w+)$", PAGES["api"], re.MULTILINE)
    assert sorted(listed) == sorted(set(cupyattn.__all__) - {"__version__"})
    listed = re.findall(r"^   distributed\.(\w+)$", PAGES["api"], re.MULTILINE)
    assert sorted(listed) == sorted(cupyattn.distributed.__all__)


def test_what_a_page_includes_is_there():
    """Between two lines of a file, each of which it has once."""
    asked = r'```{include} (\S+)\n:start-after: "(.+)"\n:end-before: "(.+)"\n```'
    included = [(DOCS / path, start, end) for text in PAGES.values() for path, start, end in re.findall(asked, text)]
    assert len(included) == sum(text.count("{include}") for text in PAGES.values())
    for path, start, end in included:
        lines = path.read_text().splitlines()
        assert (lines.count(start), lines.count(end)) == (1, 1)
        assert lines.index(start) < lines.index(end)


def test_every_command_has_a_section():
    from cupyattn.command.parser import COMMANDS

    sections = re.findall(r"^## ([a-z]+)$", PAGES["command"], re.MULTILINE)
    assert sorted(sections) == sorted([*COMMANDS, "info"])


def test_the_extras_of_the_page_are_those_of_pyproject():
    project = tomllib.loads((DOCS.parent / "pyproject.toml").read_text())["project"]
    rows = re.findall(r"^\| `(\w+)` \| (`.+?`) \|", PAGES["install"], re.MULTILINE)
    listed = {name: re.findall(r"`(.+?)`", brings) for name, brings in rows}
    for_us = {"test", "types", "bench", "docs", "release", "demo"}
    assert listed == {name: what for name, what in project["optional-dependencies"].items() if name not in for_us}


# ---------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------


def row_of(table, name):
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_a_tick_is_what_an_implementation_says(making, monkeypatch):
    _, tables, _ = making
    assert [cell[0] for cell in row_of(tables.capabilities(), "boolean mask")] == ["✓", "✓", "✗", "✓", "✓"]
    monkeypatch.setitem(IMPLEMENTATIONS, "flash", lambda problem, device: ("has no time",))
    choose.cache_clear()
    try:
        table = tables.capabilities()
    finally:
        choose.cache_clear()
    assert [cell[0] for cell in row_of(table, "boolean mask")][:4] == ["✓", "✗", "✗", "✓"]
    assert "has no time" in table


def notes_of(table, name):
    """The footnotes of each cell of a row."""
    notes = dict(re.findall(r"^(\d+)\. (.+)$", table, re.MULTILINE))
    return [notes[found[1]] if (found := re.search(r"<sup>(\d+)<", cell)) else "" for cell in row_of(table, name)]


def test_float8_on_a_gpu_is_ticked_for_torch_only(making):
    table = making[1].capabilities()
    assert [cell[0] for cell in row_of(table, "float8_e4m3fn")] == ["✓", "✗", "✓", "✓", "✗"]
    on_cpu, _, *on_gpu, gradients = notes_of(table, "float8_e4m3fn")
    assert (on_cpu, on_gpu) == ("", ["from torch only"] * 2)
    assert gradients == "there are no gradients of float8_e4m3fn"


def test_no_footnote_allows_what_another_row_refuses(making):
    table = making[1].capabilities()
    assert [note for note in notes_of(table, "float64") if note] == ["has no float64 arithmetic"] * 4
    assert table.count("float64") == 2  # its row, and that


def test_one_long_sequence_is_split_by_the_rules_that_look_at_lengths(making):
    assert list(making[1].splits_of_ragged()) == [("flash-attn 2", 1, 1), ("flash-attn 3", 12, 1), ("cupyattn", 14, 1)]


@pytest.mark.parametrize(
    ("model", "config"), [("Llama 2 7B", "LlamaConfig"), ("Mistral 7B", "MistralConfig"), ("Falcon 7B", "FalconConfig")]
)
def test_a_models_sizes_are_those_of_its_configuration(making, model, config):
    """Of the models whose sizes are what transformers has for default."""
    made = getattr(needs("transformers"), config)()
    heads = made.num_attention_heads
    key_heads = 1 if getattr(made, "multi_query", False) else getattr(made, "num_key_value_heads", heads)
    sizes = made.num_hidden_layers, heads, key_heads, made.hidden_size // heads
    assert making[1].MODELS[model] == sizes


def test_bars_in_cells_do_not_end_them(making):
    assert making[1].markdown(["a"], [["x|y"]]).splitlines()[-1] == "| x\\|y |"


# ---------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------


def test_masks_are_drawn_as_attention_sees_them(making):
    pictures, _, _ = making
    triangle = np.tri(4, 8)
    np.testing.assert_allclose(
        pictures.weights(4, 8, causal=True, alignment="top-left"), triangle / triangle.sum(axis=1, keepdims=True)
    )
    assert (pictures.weights(8, 4, causal=True, alignment="bottom-right")[:4] == 0).all()
    documents = pictures.weights_of_documents([0, 3, 5, 8])
    assert documents[4].tolist() == [0, 0, 0, 0.5, 0.5, 0, 0, 0]


def test_curves_are_of_the_planner(making):
    pictures, _, _ = making
    shapes = (4, 1, 32, 128), (4, 8192, 8, 128), (4, 8192, 8, 128)
    plan = cupyattn.explain(*shapes, dtype="bfloat16", device="A100")
    assert pictures.splits("A100", 4, 8192, 8) == (plan.num_splits, *dict(plan.peers).values())


def test_a_picture_for_dark_pages_has_no_colour_of_a_light_one(making):
    pictures, _, _ = making
    light, dark = pictures.SCHEMES["light"], pictures.SCHEMES["dark"]
    panel = pictures.masks()["sinks"][1]
    svg = pictures.paint(panel)
    turned = pictures.for_dark_pages(svg)
    for of_light, of_dark in ((light.text, dark.text), (light.ours, dark.ours), (light.hidden, dark.hidden)):
        assert of_light in svg
        assert of_light not in turned
        assert of_dark in turned


def test_a_picture_is_the_same_whenever_it_is_made(making):
    pictures, _, _ = making
    panel = pictures.masks()["documents"][0]
    assert pictures.paint(panel) == pictures.paint(panel)


def test_what_was_measured_becomes_a_panel_each(making):
    rows = [
        {"benchmark": "Standard.track_time", "params": {"seqlen": seqlen, "causal": causal}, "value": 0.25}
        for seqlen in (512, 1024)
        for causal in ("full", "causal")
    ]
    panels = making[0].measured({"rows": rows})
    assert [panel.title for panel in panels] == ["time, no mask", "time, causal"]
    assert making[0].paint(panels[0]).count("<svg") == 1
