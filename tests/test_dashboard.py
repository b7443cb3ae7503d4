"""asv's dashboards: measured, published, and read in a browser that has no network."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from browsing import MOST_MILLISECONDS, WIDE, Reader, browser, served
from homes import needs

ROOT = Path(__file__).parents[1]
SUITE = ROOT / "asv_benchmarks"


@pytest.fixture
def dashboard(monkeypatch):
    """The script as a module."""
    if not SUITE.is_dir():
        pytest.skip("asv_benchmarks/ is not here (it is not in the sdist)")
    monkeypatch.syspath_prepend(SUITE)
    import dashboard

    yield dashboard
    del sys.modules["dashboard"]


PAGE = """<script src="https://code.jquery.com/jquery-3.3.1.min.js" integrity="x" onerror="failed()"></script>
<script src="asv.js"></script>
<link rel="stylesheet" href="https://cdn.jsdelivr.net/npm/bootstrap@3.1.1/dist/css/bootstrap.min.css" integrity="y">
<a href="https://github.com/airspeed-velocity/asv/">asv</a>
"""


def packages_in(folder, dashboard):
    for place in [*dashboard.ELSEWHERE.values(), f"{dashboard.FONTS}/a.woff"]:
        path = folder / "node_modules" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(place)
    return folder


def test_pages_load_their_scripts_from_beside_themselves(dashboard, tmp_path):
    (tmp_path / "index.html").write_text(PAGE)
    assert dashboard.vendor(tmp_path, packages_in(tmp_path / "npm", dashboard))
    text = (tmp_path / "index.html").read_text()
    assert '<script src="vendor/files/jquery-3.3.1.min.js"></script>\n<script src="asv.js">' in text
    assert '<link rel="stylesheet" href="vendor/files/bootstrap.min.css">' in text
    assert "https://github.com" in text
    assert (tmp_path / "vendor/files/jquery-3.3.1.min.js").read_text() == "jquery/dist/jquery.min.js"
    assert (tmp_path / "vendor/fonts/a.woff").exists()


def test_a_script_that_no_package_has_is_refused(dashboard, tmp_path):
    (tmp_path / "index.html").write_text(PAGE.replace("jquery-3.3.1", "jquery-4.0.0"))
    with pytest.raises(SystemExit, match=r"jquery-4\.0\.0\.min\.js"):
        dashboard.vendor(tmp_path, packages_in(tmp_path / "npm", dashboard))


def test_without_npm_pages_stay_as_they_are(dashboard, tmp_path, monkeypatch):
    (tmp_path / "index.html").write_text(PAGE)
    monkeypatch.setattr(dashboard.shutil, "which", lambda name: None)
    assert not dashboard.vendor(tmp_path, tmp_path / "npm")
    assert (tmp_path / "index.html").read_text() == PAGE


def test_what_was_never_run_is_left_out(dashboard, tmp_path):
    (tmp_path / "graphs" / "summary").mkdir(parents=True)
    (tmp_path / "graphs" / "summary" / "a.json").write_text("[]")
    (tmp_path / "index.json").write_text(json.dumps({"project": "x", "benchmarks": {"a": 1, "b": 2}}))
    dashboard.leave_out_what_was_never_run(tmp_path)
    assert json.loads((tmp_path / "index.json").read_text()) == {"project": "x", "benchmarks": {"a": 1}}


def test_every_package_has_a_version_of_its_own(dashboard):
    named = json.loads((SUITE / "package.json").read_text())["dependencies"]
    assert named.keys() == {place.partition("/")[0] for place in dashboard.ELSEWHERE.values()}
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in named.values())


def test_without_results_publishing_ends_in_a_sentence(dashboard, tmp_path):
    config = tmp_path / "asv.conf.json"
    config.write_text('{\n    // a comment\n    "results_dir": "results", "html_dir": "html"\n}')
    call = [sys.executable, str(SUITE / "dashboard.py"), "--publish-only", "--no-open", "--config", str(config)]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 1
    nothing = f"dashboard.py: asv has left nothing in {tmp_path / 'results'} yet: run `make dashboard` first\n"
    assert (done.stdout, done.stderr) == ("", nothing)


# ---------------------------------------------------------------------------------------------------
# The whole way
# ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Pages with results of the last two commits, by this interpreter; both measure what is here."""
    if not SUITE.is_dir():
        pytest.skip("asv_benchmarks/ is not here (it is not in the sdist)")
    needs("asv")
    git = ["git", "-C", str(ROOT), "rev-list", "--first-parent", "--max-count=2", "HEAD"]
    hashes = subprocess.run(git, capture_output=True, text=True).stdout.split()
    if len(hashes) < 2:
        pytest.skip("needs a git repository with two commits")
    folder = tmp_path_factory.mktemp("dashboard")
    said = re.sub(r"^\s*//.*$", "", (SUITE / "asv.conf.json").read_text(), flags=re.MULTILINE)
    places = {"repo": str(ROOT), "benchmark_dir": str(SUITE / "benchmarks")}
    places |= {"results_dir": "results", "html_dir": "html", "env_dir": "env"}
    (folder / "asv.conf.json").write_text(json.dumps({**json.loads(said), **places}))

    def call(*command, **environment):
        environment = {**os.environ, **environment}
        done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    home = {"HOME": str(folder)}  # where asv writes down what this machine is
    call("-m", "asv", "machine", "--yes", **home)
    for commit in hashes:
        call("-m", "asv", "run", "--python=same", "--quick", "--bench", "Rooms|Import|track_tokens",
             "--set-commit-hash", commit, **home)  # fmt: skip
    call(str(SUITE / "dashboard.py"), "--publish-only", "--no-open", "--config", str(folder / "asv.conf.json"))
    if not (folder / "html" / "vendor").is_dir():
        pytest.skip("no npm here, which the pages' scripts come from")
    return folder / "html"


@pytest.mark.long
def test_grid_list_and_graph_are_shown_without_a_network(published):
    with browser() as chromium, served(published) as home:
        reader = Reader(chromium, home, WIDE)
        window = reader.window
        window.set_default_timeout(MOST_MILLISECONDS)
        reader.open(f"{home}index.html")
        window.wait_for_selector("text=Overhead: time in each room")
        window.goto(f"{home}index.html#/summarylist")
        window.wait_for_selector("#summarylist-body a:has-text('Packed sequences: tokens')")
        window.goto(f"{home}index.html#overhead.Rooms.time_call")
        window.wait_for_function("() => window.jQuery && jQuery('#main-graph').data('plot')")
        lengths = window.evaluate(
            "() => jQuery('#main-graph').data('plot').getData().map(s => s.data.filter(p => p[1] !== null).length)"
        )
        assert lengths
        assert min(lengths) == 2  # two commits: a line
        assert reader.faults == []
