"""asv's dashboards: measured, published so that they need no network, and opened.

    python asv_benchmarks/dashboard.py [--commits N | --history N] [--bench REGEX] [--machine NAME] [--quick]
                                       [--publish-only] [--no-open]

The last N commits that have no results yet are measured, each in an environment that asv makes for it; --history takes
N that lie evenly over all of them, and only benchmarks that old commits can run.  results/MACHINE keeps what was found;
MACHINE is the host's name, or another one that this machine shall have.  asv's pages load scripts from elsewhere: npm
installs these, as package.json names them, and the pages are changed to load them from beside themselves.  Without npm
they stay as they are, and need a network.
"""

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
import threading
import webbrowser
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gpu_results  # beside this file

SUITE = Path(__file__).resolve().parent
PACKAGES = SUITE.parent / ".asv" / "npm"

ELSEWHERE = {
    "jquery-3.3.1.min.js": "jquery/dist/jquery.min.js",
    "jquery.flot.min.js": "flot/jquery.flot.js",
    "jquery.flot.time.min.js": "flot/jquery.flot.time.js",
    "jquery.flot.selection.min.js": "flot/jquery.flot.selection.js",
    "jquery.flot.categories.min.js": "flot/jquery.flot.categories.js",
    "jquery.flot.orderBars.js": "flot-orderbars/js/jquery.flot.orderBars.js",
    "stupidtable.min.js": "stupid-table-plugin/stupidtable.min.js",
    "md5.min.js": "blueimp-md5/js/md5.min.js",
    "bootstrap.min.js": "bootstrap/dist/js/bootstrap.min.js",
    "bootstrap.min.css": "bootstrap/dist/css/bootstrap.min.css",
}
"""What asv's page asks for, by the end of its address, and where it is in npm's packages."""
FONTS = "bootstrap/dist/fonts"
"""What that style sheet asks for, as ../fonts."""
EXTERNAL = re.compile(r'(src|href)="https://[^"]*/([^"/]+\.(?:js|css))"[^>]*>')


HISTORY = (
    r"^attention\.AgainstTorch\.track_time\(2048, .*, 'float(32|64)'\)",
    r"^attention\.AgainstNaive\.track_time\(2048, .*, 'float32'\)",
    r"^attention\.TrainingAgainstTorch\.track_time\(512, 'causal', 'float32'\)",
    r"^attention\.Rounding\.track_wrong\('causal', ",
    r"^decode\.DecodeAgainstTorch\.track_time\('enable_gqa', (1024|4096)\)",
    r"^caches\.Growth\.track_appends\('(dynamic|paged)'\)",
    r"^caches\.Decode\.track_attend\('(static|paged)', 1024\)",
    r"^memory\.Memory\.track_peak\('cupyattn', ",
    r"^overhead\.Rooms\.time_call\('(attention|naive)', ",
    r"^overhead\.Import\.track_import$",
    r"^ragged\.Varlen\.track_time\('equal', 'forward', 'float32', 'full'\)",
)
"""What --history measures, if --bench does not say it: what calls nothing but public functions, and takes a commit two
minutes in all, of which ten seconds build it."""
FAILED = 2
"""asv's status when some benchmarks failed; all others have their results."""


def asv(*arguments, config):
    """asv's status, which is 0 or `FAILED`."""
    command = [sys.executable, "-m", "asv", *arguments, "--config", str(config)]
    done = subprocess.run(command, cwd=config.parent)
    if done.returncode not in (0, FAILED):
        raise SystemExit(f"dashboard.py: asv {arguments[0]} ended with status {done.returncode}")
    return done.returncode


def first_parents(*more):
    """HEAD and its first parents, the last one first: the commits that asv's pages show."""
    log = ["git", "rev-list", "--first-parent", *more]
    return subprocess.run(log, cwd=SUITE, check=True, capture_output=True, text=True).stdout.split()


def last(count):
    return first_parents(f"--max-count={count}", "HEAD")


def spread(count):
    """Evenly over the commits that changed the package, the last one and the first that can be built among them."""
    found = first_parents("--no-merges", "HEAD", "--", ":/cupyattn")
    while found and not has_readme(found[-1]):
        found.pop()
    count = min(count, len(found))
    return [found[round(i * (len(found) - 1) / max(1, count - 1))] for i in range(count)]


def has_readme(commit):
    """pyproject.toml names it: without it there is no wheel."""
    return (
        subprocess.run(
            ["git", "cat-file", "-e", f"{commit}:README.md"], cwd=SUITE, stderr=subprocess.DEVNULL
        ).returncode
        == 0
    )


def introduce(name, results):
    """Tell asv what this machine is, under that name; its kernel has no version, or an update would begin new lines."""
    from asv.machine import Machine, MachineCollection

    found = Machine.get_defaults()
    ram = f"{int(found['ram']) / 2**30:.0f} GiB" if found["ram"] else ""
    described = {**found, "machine": name, "os": platform.system(), "ram": ram}
    file = results / name / "machine.json"
    if file.exists():
        known = json.loads(file.read_text())
        other = [f"{what} {known[what]}, not {value}" for what, value in described.items() if known[what] != value]
        if other:
            raise SystemExit(f"dashboard.py: {name} is another machine: {'; '.join(other)}")
    MachineCollection.save(name, described)


def measure(config, hashes, more, machine=None):
    """Results of the commits that have none yet."""
    if machine:
        introduce(machine, results_of(config))
        more = [*more, "--machine", machine]
    else:
        subprocess.run([sys.executable, "-m", "asv", "machine", "--yes"], cwd=config.parent, check=True)
    chosen = config.parent / "commits.txt"
    chosen.write_text("\n".join(hashes))
    try:
        status = asv("run", f"HASHFILE:{chosen}", "--skip-existing-successful", *more, config=config)
    finally:
        chosen.unlink()
    if status == FAILED:
        print("Some benchmarks failed, as asv said above: commits that lack a function have no result there")


def read(config):
    return json.loads(re.sub(r"^\s*//.*$", "", config.read_text(), flags=re.MULTILINE))


def results_of(config):
    return config.parent / read(config)["results_dir"]


def publish(config):
    """The folder of the pages, made of all results."""
    results = results_of(config)
    if not (results / "benchmarks.json").exists():  # which every `asv run` leaves
        raise SystemExit(f"dashboard.py: asv has left nothing in {results} yet: run `make dashboard` first")
    listed = results / "benchmarks.json"
    if on_gpus := gpu_results.benchmarks(results):
        listed.write_text(json.dumps(json.loads(listed.read_text()) | on_gpus, indent=4, sort_keys=True) + "\n")
    asv("publish", "--no-pull", config=config)
    return (config.parent / read(config)["html_dir"]).resolve()


def leave_out_what_was_never_run(html):
    """Benchmarks without any result, whose pictures asv's pages would look for in vain."""
    index = html / "index.json"
    found = json.loads(index.read_text())
    graphs = html / "graphs" / "summary"
    found["benchmarks"] = {
        name: about for name, about in found["benchmarks"].items() if (graphs / f"{name}.json").exists()
    }
    index.write_text(json.dumps(found))


def vendor(html, packages=PACKAGES):
    """Put what the pages load from elsewhere beside them; false where npm is not there to fetch it."""
    if not packages.joinpath("node_modules").is_dir():
        if shutil.which("npm") is None:
            return False
        packages.mkdir(parents=True, exist_ok=True)
        shutil.copy(SUITE / "package.json", packages)
        command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error"]
        subprocess.run(command, cwd=packages, check=True)
    modules, own = packages / "node_modules", html / "vendor"
    (own / "fonts").mkdir(parents=True, exist_ok=True)
    (own / "files").mkdir(exist_ok=True)

    def beside(found):
        attribute, name = found.groups()
        if name not in ELSEWHERE:
            raise SystemExit(f"dashboard.py: this asv loads {name}, which package.json does not name")
        shutil.copy(modules / ELSEWHERE[name], own / "files" / name)
        return f'{attribute}="vendor/files/{name}">'

    page = html / "index.html"
    page.write_text(EXTERNAL.sub(beside, page.read_text()))
    for font in (modules / FONTS).iterdir():
        shutil.copy(font, own / "fonts")
    return True


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *words):
        pass


def show(html, in_a_browser):
    """Serve the pages until somebody stops it: browsers do not let pages read files from a disk."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(html))) as server:
        address = f"http://127.0.0.1:{server.server_port}/"
        print(f"{address}  (Ctrl-C ends)")
        if in_a_browser:
            threading.Timer(0.5, webbrowser.open, [address]).start()
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--commits", type=int, default=1, metavar="N", help="that may be measured; default 1, the last")
    which.add_argument("--history", type=int, metavar="N", help="commits, evenly over all; two minutes for each")
    parser.add_argument("--machine", metavar="NAME", help="of this machine in results/ and in the dashboards")
    parser.add_argument("--quick", action="store_true", help="each benchmark once: shows that it works, and no more")
    parser.add_argument("--bench", metavar="REGEX", help="only benchmarks whose name this is found in")
    parser.add_argument("--publish-only", action="store_true", help="measure nothing")
    parser.add_argument("--no-open", action="store_true", help="neither serve the pages nor open them")
    parser.add_argument("--config", type=Path, default=SUITE / "asv.conf.json", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if not given.publish_only:
        more = ["--quick"] * given.quick
        benchmarks = [given.bench] if given.bench else HISTORY if given.history else []
        more += [f"--bench={benchmark}" for benchmark in benchmarks]
        hashes = spread(given.history) if given.history else last(given.commits)
        measure(given.config.resolve(), hashes, more, given.machine)
    html = publish(given.config.resolve())
    leave_out_what_was_never_run(html)
    if not vendor(html):
        print("npm is not here: the pages load their scripts from elsewhere, and need a network")
    print(html / "index.html")
    if not given.no_open:
        show(html, in_a_browser=True)


if __name__ == "__main__":
    main()
