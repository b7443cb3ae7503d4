"""A release: what says a version says the same one, and everything that it is made of is there."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import cupyattn

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.fixture(scope="module")
def release():
    """tools/release.py as a module."""
    spec = importlib.util.spec_from_file_location("release", ROOT / "tools" / "release.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_file_says_the_same_version(release):
    assert release.version() == cupyattn.__version__
    unfinished = ("[project.urls]", "where the date belongs", "no date-released")
    assert [sentence for sentence in release.missing() if not any(word in sentence for word in unfinished)] == []
    recipe = (ROOT / "recipe" / "meta.yaml").read_text()
    assert f'{{% set version = "{cupyattn.__version__}" %}}' in recipe


def test_what_a_person_has_to_do_is_found_out(release, tmp_path):
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "CHANGELOG.md").write_text("## [0.0.1] - unreleased\n")
    (tmp_path / "CITATION.cff").write_text("version: 0.0.1\n")
    assert len(release.missing(tmp_path)) == 5


def test_nothing_is_left_to_do_when_all_is_done(release, tmp_path):
    (tmp_path / "pyproject.toml").write_text('[project.urls]\nRepository = "https://example.org"\n')
    (tmp_path / "CHANGELOG.md").write_text(f"## [{release.version()}] - 2027-01-31\n")
    (tmp_path / "CITATION.cff").write_text(f"\nversion: {release.version()}\ndate-released: 2027-01-31\n")
    assert release.missing(tmp_path) == []


def test_the_recipe_of_a_release_has_the_sdists_address_and_digest(release, tmp_path):
    sdist = tmp_path / f"cupyattn-{release.version()}.tar.gz"
    sdist.write_bytes(b"bytes")
    text = release.recipe((ROOT / "recipe" / "meta.yaml").read_text(), sdist)
    assert "path: .." not in text
    assert "/c/cupyattn/cupyattn-{{ version }}.tar.gz\n" in text
    assert "  sha256: 277089d91c0bdf4f2e6862ba7e4a07605119431f5d13f726dd352b06f1b206a9\n" in text


def test_the_recipe_needs_what_the_package_needs():
    text = (ROOT / "recipe" / "meta.yaml").read_text()
    run = text.partition("  run:\n")[2].partition("  run_constrained:")[0]
    wanted = {one.replace(">=", " >=") for one in PROJECT["project"]["dependencies"]}
    assert set(re.findall(r"- (.+)", run)) == {*wanted, "python >={{ python_min }}"}


def test_all_has_every_extra_for_users():
    extras = PROJECT["project"]["optional-dependencies"]
    named = set(re.search(r"cupyattn\[(.+)\]", extras["all"][0])[1].split(","))
    for_others = {"all", "cuda12", "cuda13", "test", "types", "bench", "release", "demo", "docs", "dashboard", "mpi"}
    assert named == extras.keys() - for_others


def test_the_command_is_the_modules_own():
    assert PROJECT["project"]["scripts"] == {"cupyattn": "cupyattn.command:main"}


def test_an_sdist_has_what_the_tests_look_at():
    if not (ROOT / ".git").exists():
        pytest.skip("this is no checkout")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    tops = {name.partition("/")[0] for name in tracked if name}
    included = {name.strip("/") for name in PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]}
    markdown = {name for name in tops if name.endswith(".md")}
    only_here = {"pyproject.toml", ".ci", ".pre-commit-config.yaml"}  # the first is always in it
    assert tops - included - markdown == only_here


def test_every_environment_variable_that_the_package_reads_is_in_the_readme():
    read = set()
    for path in Path(cupyattn.__file__).parent.rglob("*.py"):
        read |= set(re.findall(r"""environ(?:\.get\(|\[)["'](\w+)""", path.read_text()))
    from cupyattn.command.findings import THREADS

    table = (ROOT / "README.md").read_text().partition("## Environment variables")[2].partition("\n## ")[0]
    named = set(re.findall(r"`([A-Z_]+)`", table))
    assert {"CUPYATTN_CACHE_DIR"} <= read
    assert read | set(THREADS) <= named


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_is_yaml_with_jobs_of_steps(path):
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert {"runs-on", "steps"} <= job.keys()
        assert all(len({"uses", "run"} & step.keys()) == 1 for step in job["steps"])


CHECKED = (
    *((path, "vendor.github-workflows") for path in WORKFLOWS),
    *((path, "custom.github-workflows-require-timeout") for path in WORKFLOWS),
    (ROOT / "CITATION.cff", "vendor.citation-file-format"),
)


@pytest.mark.parametrize(("path", "schema"), CHECKED, ids=[f"{path.name}, {schema}" for path, schema in CHECKED])
def test_what_others_read_is_as_their_schema_has_it(path, schema):
    pytest.importorskip("check_jsonschema")
    call = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, str(path)]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_workflows_hand_no_secret_to_anybody():
    tool = Path(sys.executable).with_name("zizmor")
    if not tool.exists():
        pytest.skip("needs zizmor")
    config = ROOT / ".github" / "zizmor.yml"
    call = [str(tool), "--offline", "--no-progress", "--config", str(config), str(WORKFLOWS[0].parent)]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_python_that_is_classified_is_tried():
    yaml = pytest.importorskip("yaml")
    classified = {found[1] for one in PROJECT["project"]["classifiers"] if (found := re.search(r":: (3\.\d+)$", one))}
    for name, job in (("tests", "pythons"), ("release", "wheel")):
        workflow = yaml.safe_load((ROOT / ".github" / "workflows" / f"{name}.yml").read_text())
        assert set(workflow["jobs"][job]["strategy"]["matrix"]["python"]) == classified


def test_targets_of_make_that_workflows_run_are_there():
    makefile = (ROOT / "Makefile").read_text()
    run = {target for path in WORKFLOWS for target in re.findall(r"run: make (\w+)", path.read_text())}
    assert "test" in run
    run -= set() if (ROOT / "docs").exists() else {"docs"}
    assert [target for target in run if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


def test_workflows_that_install_torch_hand_the_repositorys_index_to_pip():
    yaml = pytest.importorskip("yaml")
    texts = [path.read_text() for path in WORKFLOWS]
    found = [yaml.safe_load(text) for text in texts if re.search(r"run: make (?:test|pages)$", text, re.MULTILINE)]
    assert len(found) == 2
    assert {workflow["env"]["PIP_EXTRA_INDEX_URL"] for workflow in found} == {"${{ vars.PIP_EXTRA_INDEX_URL }}"}


def test_what_is_long_beside_the_wings_is_read_each_week():
    long = re.compile(r"^(?:@|pytestmark = )pytest\.mark\.long$", re.MULTILINE)
    found = {f"tests/{path.name}" for path in (ROOT / "tests").glob("test_*.py") if long.search(path.read_text())}
    recipe = (ROOT / "Makefile").read_text().partition("\npages:")[2].partition("\n\n")[0]
    assert "tests/test_site.py" in found
    assert found == set(re.findall(r"tests/\w+\.py", recipe))


def installed_by(target, folder):
    """What `make` would ask pip for, for this target alone, where nothing is installed yet."""
    if shutil.which("make") is None:
        pytest.skip("there is no make here")
    call = ["make", "--dry-run", "--always-make", f"VENV={folder}", target]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=True)
    asked = [line.partition("pip install")[2].partition(" || ")[0] for line in done.stdout.splitlines()]
    return {word.strip("'") for line in asked for word in line.split() if not word.startswith("--")}


@pytest.mark.parametrize(("target", "peers"), [("generate", {"torch", "transformers"}), ("train", {"torch"})])
def test_an_example_installs_what_it_imports_and_nothing_else(target, peers, tmp_path):
    packages = {re.split("[=>]", word)[0] for word in installed_by(target, tmp_path)}
    assert packages - {"pip"} == {".", "matplotlib", *peers}


def test_the_tests_install_the_peers_of_the_examples_too(tmp_path):
    words = installed_by("test", tmp_path)
    assert {"matplotlib", ".[test]", ".[demo]", "jax", "cupy-cuda13x"} <= words


def test_a_wheel_that_was_not_built_gets_a_sentence(release, tmp_path, monkeypatch):
    monkeypatch.setattr(release, "ROOT", tmp_path)
    monkeypatch.setattr(release, "version", lambda: "9.9")
    with pytest.raises(SystemExit, match=r"dist/ has 0 files of version 9\.9 that end in \.whl: --only build first"):
        release.built(".whl")


def test_a_step_that_is_not_there_is_status_two():
    call = [sys.executable, str(ROOT / "tools" / "release.py"), "--only", "publish"]
    done = subprocess.run(call, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 2
    assert "argument --only: no such step: publish" in done.stderr
