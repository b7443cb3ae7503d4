"""asv's dashboards: measured, published so that they need no network, and opened.

    python asv_benchmarks/dashboard.py [--commits N] [--quick] [--bench REGEX] [--publish-only] [--no-open]

The last N commits that have no results yet are measured, each in an environment that asv makes for it; results/ keeps
what was found.  asv's pages load scripts from elsewhere: npm installs these, as package.json names them, and the pages
are changed to load them from beside themselves.  Without npm they stay as they are, and need a network.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import threading
import webbrowser
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

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


def asv(*arguments, config):
    subprocess.run([sys.executable, "-m", "asv", *arguments, "--config", str(config)], cwd=config.parent, check=True)


def measure(config, commits, more):
    """Results of the last commits that have none yet."""
    subprocess.run([sys.executable, "-m", "asv", "machine", "--yes"], cwd=config.parent, check=True)
    log = ["git", "rev-list", "--first-parent", f"--max-count={commits}", "HEAD"]
    hashes = subprocess.run(log, cwd=SUITE, check=True, capture_output=True, text=True).stdout
    chosen = config.parent / "commits.txt"
    chosen.write_text(hashes)
    try:
        asv("run", f"HASHFILE:{chosen}", "--skip-existing-successful", *more, config=config)
    finally:
        chosen.unlink()


def publish(config):
    """The folder of the pages, made of all results."""
    said = json.loads(re.sub(r"^\s*//.*$", "", config.read_text(), flags=re.MULTILINE))
    results = config.parent / said["results_dir"]
    if not (results / "benchmarks.json").exists():  # which every `asv run` leaves
        raise SystemExit(f"dashboard.py: asv has left nothing in {results} yet: run `make dashboard` first")
    asv("publish", "--no-pull", config=config)
    return (config.parent / said["html_dir"]).resolve()


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
    parser.add_argument("--commits", type=int, default=1, metavar="N", help="that may be measured; default 1, the last")
    parser.add_argument("--quick", action="store_true", help="each benchmark once: shows that it works, and no more")
    parser.add_argument("--bench", metavar="REGEX", help="only benchmarks whose name this is found in")
    parser.add_argument("--publish-only", action="store_true", help="measure nothing")
    parser.add_argument("--no-open", action="store_true", help="neither serve the pages nor open them")
    parser.add_argument("--config", type=Path, default=SUITE / "asv.conf.json", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if not given.publish_only:
        more = ["--quick"] * given.quick + (["--bench", given.bench] if given.bench else [])
        measure(given.config.resolve(), given.commits, more)
    html = publish(given.config.resolve())
    leave_out_what_was_never_run(html)
    if not vendor(html):
        print("npm is not here: the pages load their scripts from elsewhere, and need a network")
    print(html / "index.html")
    if not given.no_open:
        show(html, in_a_browser=True)


if __name__ == "__main__":
    main()
