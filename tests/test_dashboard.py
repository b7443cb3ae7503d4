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
    del sys.modules["dashboard"], sys.modules["gpu_results"]


@pytest.fixture
def table(dashboard):
    """The table of all benchmarks, as a module."""
    import table

    yield table
    del sys.modules["table"]


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
# Which commits, and on which machine
# ---------------------------------------------------------------------------------------------------


@pytest.fixture
def git(tmp_path, dashboard, monkeypatch):
    """git in a repository of its own, which the script takes for ours."""
    monkeypatch.setattr(dashboard, "SUITE", tmp_path)
    who = {f"GIT_{role}_{what}": "nobody" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}

    def call(*words):
        done = subprocess.run(["git", *words], cwd=tmp_path, env={**os.environ, **who}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    call("init", "--quiet")
    (tmp_path / "cupyattn").mkdir()
    return call


@pytest.fixture
def commit(git, tmp_path):
    """A commit that changes a file, and its hash."""

    def make(name):
        path = tmp_path / name
        path.write_text(path.read_text() + "." if path.exists() else ".")
        git("add", name)
        git("commit", "--quiet", "--message", name)
        return git("rev-parse", "HEAD")

    return make


def test_history_is_spread_over_what_changed_the_package_and_can_be_built(dashboard, git, commit):
    commit("cupyattn/a.py")  # there is no README.md yet
    commit("README.md")
    found = []
    for _ in range(5):
        found.append(commit("cupyattn/a.py"))
        commit("docs.md")
    assert dashboard.spread(3) == [found[4], found[2], found[0]]
    assert dashboard.spread(1) == [found[4]]
    assert dashboard.spread(100) == found[::-1]
    assert len(dashboard.last(2)) == 2


def test_history_has_no_merges(dashboard, git, commit):
    commit("README.md")
    first = commit("cupyattn/a.py")
    git("checkout", "--quiet", "-b", "other")
    commit("cupyattn/b.py")
    git("checkout", "--quiet", "-")
    second = commit("cupyattn/a.py")
    git("merge", "--quiet", "--no-edit", "other")
    assert dashboard.spread(9) == [second, first]


def test_every_pattern_of_the_history_finds_a_benchmark(dashboard, table):
    wanted = [
        f"{table.module_of(method)}.{method.__qualname__}" + (f"({', '.join(map(repr, params))})" if params else "")
        for method, params in table.cases(quick=False)
    ]
    assert [pattern for pattern in dashboard.HISTORY if not any(re.search(pattern, name) for name in wanted)] == []


def test_every_benchmark_has_a_name_and_a_unit_in_the_dashboards(table):
    names = [method.pretty_name for method in table.ALL]
    assert len(set(names)) == len(names)
    assert all(method.unit for method in table.ALL if method.__name__.startswith("track_"))


@pytest.fixture
def introduced(dashboard, monkeypatch):
    """What asv is told, instead of a file in somebody's home."""
    needs("asv")
    from asv.machine import Machine, MachineCollection

    told = {}
    found = {"machine": "host", "os": "Linux 6.1", "arch": "x86_64", "cpu": "A", "num_cpu": "2", "ram": 25276510208}
    monkeypatch.setattr(Machine, "get_defaults", staticmethod(lambda: dict(found)))
    monkeypatch.setattr(MachineCollection, "save", told.__setitem__)
    monkeypatch.setattr(dashboard.platform, "system", lambda: "Linux")
    return told


def test_a_named_machine_has_no_host_and_no_kernel(dashboard, introduced, tmp_path):
    dashboard.introduce("a-2-cores", tmp_path)
    known = {"machine": "a-2-cores", "os": "Linux", "arch": "x86_64", "cpu": "A", "num_cpu": "2", "ram": "24 GiB"}
    assert introduced == {"a-2-cores": known}


def test_a_name_of_another_machine_is_refused(dashboard, introduced, tmp_path):
    (tmp_path / "a-2-cores").mkdir()
    known = {"machine": "a-2-cores", "os": "Linux", "arch": "x86_64", "cpu": "A", "num_cpu": "8", "ram": "24 GiB"}
    (tmp_path / "a-2-cores" / "machine.json").write_text(json.dumps({**known, "version": 1}))
    with pytest.raises(SystemExit, match=r"a-2-cores is another machine: num_cpu 8, not 2"):
        dashboard.introduce("a-2-cores", tmp_path)
    assert introduced == {}


@pytest.mark.parametrize("status", [0, 2])
def test_benchmarks_that_fail_do_not_end_the_others(dashboard, monkeypatch, status):
    monkeypatch.setattr(dashboard.subprocess, "run", lambda command, cwd: subprocess.CompletedProcess(command, status))
    assert dashboard.asv("run", config=SUITE / "asv.conf.json") == status


def test_asv_that_cannot_run_ends_in_a_sentence(dashboard, monkeypatch):
    monkeypatch.setattr(dashboard.subprocess, "run", lambda command, cwd: subprocess.CompletedProcess(command, 1))
    with pytest.raises(SystemExit, match="asv run ended with status 1"):
        dashboard.asv("run", config=SUITE / "asv.conf.json")


# ---------------------------------------------------------------------------------------------------
# What is committed
# ---------------------------------------------------------------------------------------------------

RESULTS = SUITE / "results"
MACHINES = sorted(path.parent for path in RESULTS.glob("*-*-cores/machine.json"))
IMPORT = "overhead.Import.track_import"


@pytest.fixture
def clone(tmp_path):
    """A clone of what is committed, and nothing else."""
    needs("asv")
    made = tmp_path / "clone"
    done = subprocess.run(["git", "clone", "--quiet", "--shared", str(ROOT), str(made)], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"needs a git repository: {done.stderr}")
    return made


def points_of(clone, benchmark):
    """{machine: revisions that a line has} of what the clone publishes."""
    config = clone / "asv_benchmarks" / "asv.conf.json"
    command = [sys.executable, SUITE / "dashboard.py", "--publish-only", "--no-open", "--config", config]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    html = clone / ".asv" / "html"
    graphs = [path for path in html.glob(f"graphs/**/{benchmark}.json") if path.parent.name != "summary"]
    machines = [next(part for part in path.parts if part.startswith("machine-")) for path in graphs]
    lines = [json.loads(path.read_text()) for path in graphs]
    return {
        machine.removeprefix("machine-"): {revision for revision, value in line if value is not None}
        for machine, line in zip(machines, lines, strict=True)
    }


def record(folder, commit, value):
    """A result of the import's time, as asv writes one."""
    machine = {"machine": folder.name, "os": "Linux", "arch": "x86_64", "cpu": "A", "num_cpu": "2", "ram": "1 GiB"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "machine.json").write_text(json.dumps({**machine, "version": 1}))
    result = {
        "commit_hash": commit,
        "env_name": "virtualenv-py3.11",
        "date": 1_800_000_000_000 + int(value),
        "params": {**machine, "python": "3.11"},
        "python": "3.11",
        "requirements": {},
        "env_vars": {},
        "result_columns": ["result", "params", "version"],
        "results": {IMPORT: [[value], [], "1"]},
        "durations": {},
        "version": 2,
    }
    (folder / f"{commit[:8]}-virtualenv-py3.11.json").write_text(json.dumps(result))


def test_results_are_a_line_and_those_of_unknown_commits_do_no_harm(clone):
    log = ["git", "-C", str(clone), "rev-list", "--first-parent", "--max-count=3", "HEAD"]
    commits = subprocess.run(log, check=True, capture_output=True, text=True).stdout.split()
    if len(commits) < 3:
        pytest.skip("needs a git repository with three commits")
    results = clone / "asv_benchmarks" / "results"
    for number, commit in enumerate([*commits, "0123456789abcdef0123456789abcdef01234567"]):
        record(results / "made-up", commit, 10.0 + number)
    about = {"name": IMPORT, "param_names": [], "params": [], "pretty_name": "Overhead: import", "timeout": 300}
    about |= {"type": "track", "unit": "ms", "version": "1", "code": ""}
    (results / "benchmarks.json").write_text(json.dumps({IMPORT: about, "version": 2}))
    assert len(points_of(clone, IMPORT)["made-up"]) == 3


ON_A_GPU = {  # made up, as gpu.py writes it
    "machine": {"device": "NVIDIA Test 1", "torch": "2.13.0", "cupy": "14.2.0"},
    "sections": {
        "prefill": [
            {"dtype": "bfloat16", "head_dim": 64, "seqlen": 2048, "causal": False, "speed_over_flash": 0.5},
            {"dtype": "bfloat16", "head_dim": 64, "seqlen": 2048, "causal": True, "speed_over_flash": float("nan")},
            {"least": 0.5, "geometric_mean": 0.5},
        ],
        "decode": [
            {"copy_tb_per_s": 3.0},
            {"batch": 1, "heads": "32/8", "keys": 2048, "page": None, "kv_mb": 8.4, "speed_over_best": 2.0},
        ],
        "tests": [{"status": 0}],
    },
}


def test_what_make_gpu_wrote_is_a_machine_of_its_own(clone, dashboard, tmp_path):
    log = ["git", "-C", str(clone), "rev-list", "--first-parent", "--max-count=2", "HEAD"]
    commits = subprocess.run(log, check=True, capture_output=True, text=True).stdout.split()
    if len(commits) < 2:
        pytest.skip("needs a git repository with two commits")
    results = clone / "asv_benchmarks" / "results"
    (results / "benchmarks.json").write_text(json.dumps({"version": 2}))
    (tmp_path / "gpu.json").write_text(json.dumps(ON_A_GPU))
    for commit in commits:
        dashboard.gpu_results.main([str(tmp_path / "gpu.json"), "--commit", commit], results)
    assert len(points_of(clone, "gpu.prefill")["nvidia-test-1"]) == 2
    (written,) = results.glob(f"nvidia-test-1/{commits[0][:8]}-gpu.json")
    assert json.loads(written.read_text())["results"] == {
        "gpu.prefill": [[2.0], [["'dtype bfloat16, head_dim 64, seqlen 2048, causal False'"]], "1"],
        "gpu.decode": [[0.5], [["'batch 1, heads 32/8, keys 2048'"]], "1"],
    }
    listed = json.loads((results / "benchmarks.json").read_text())
    assert listed["gpu.decode"]["pretty_name"] == "Decode on a GPU: time over torch's best"


@pytest.mark.parametrize(
    ("commit", "message"), [(None, "does not say which commit"), ("1234-dirty", "at no commit, but at 1234-dirty")]
)
def test_a_gpus_results_are_of_a_commit(dashboard, tmp_path, commit, message):
    machine = {**ON_A_GPU["machine"], "commit": commit}
    (tmp_path / "gpu.json").write_text(json.dumps({**ON_A_GPU, "machine": machine}))
    with pytest.raises(SystemExit, match=message):
        dashboard.gpu_results.main([str(tmp_path / "gpu.json")], tmp_path)


@pytest.mark.skipif(not MACHINES, reason="no results of asv are here")
@pytest.mark.parametrize("benchmark", [IMPORT, "attention.AgainstTorch.track_time", "caches.Decode.track_attend"])
def test_a_clone_shows_a_history(clone, benchmark):
    found = points_of(clone, benchmark)
    for machine in MACHINES:
        assert len(found[machine.name]) >= 8


@pytest.mark.parametrize("machine", MACHINES, ids=[machine.name for machine in MACHINES])
def test_committed_results_say_what_they_were_measured_on_and_not_where(machine):
    known = json.loads((machine / "machine.json").read_text())
    assert known.keys() == {"machine", "os", "arch", "cpu", "num_cpu", "ram", "version"}
    assert known["machine"] == machine.name
    assert known["os"] in ("Linux", "Darwin", "Windows")
    texts = [path.read_text() for path in machine.glob("*.json")]
    assert [text for text in texts if re.search(r"[/\\]", text)] == []
    assert sum(map(len, texts)) < 500_000


@pytest.mark.skipif(not MACHINES, reason="no results of asv are here")
def test_the_committed_list_of_benchmarks_is_todays(table):
    text = (RESULTS / "benchmarks.json").read_text()
    assert re.findall(r"/(?:home|root|tmp|work|Users|opt)\b", text) == []
    known = json.loads(text)
    for method in table.ALL:
        owner = table.class_of(method)
        about = known[f"{table.module_of(method)}.{method.__qualname__}"]
        assert about["pretty_name"] == method.pretty_name
        assert about["unit"] == getattr(method, "unit", "seconds")
        assert about["version"] == owner.version
        assert about["params"] == [list(map(repr, values)) for values in getattr(owner, "params", ())]


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
