"""The site, built with warnings as errors, and read in a browser from the first page to the last."""

import subprocess
import sys
from pathlib import Path

import pytest
from browsing import PHONE, WIDE, Reader, broken_links, browser, served
from homes import needs

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site."""
    if not DOCS.is_dir():
        pytest.skip("docs/ is not here (it is not in the sdist)")
    for name in ("sphinx", "myst_parser", "numpydoc", "pydata_sphinx_theme", "sphinx_design", "sphinx_copybutton"):
        needs(name)
    folder = tmp_path_factory.mktemp("site")
    call = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", DOCS, folder]
    built = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def chromium():
    with browser() as found:
        yield found


@pytest.mark.parametrize(
    ("viewport", "scheme"), [(WIDE, "light"), (PHONE, "dark")], ids=["wide and light", "phone and dark"]
)
def test_every_page_can_be_reached_and_none_has_a_fault(site, chromium, viewport, scheme):
    with served(site) as home:
        pages = Reader(chromium, home, viewport, scheme).crawl()
    names = {address.rpartition("/")[2] for address in pages}
    assert {f"{path.stem}.html" for path in DOCS.glob("*.md")} <= names
    assert {f"cupyattn.{name}.html" for name in ("attention", "PagedCache", "explain")} <= names
    assert {address: page.faults for address, page in pages.items() if page.faults} == {}
    assert list(broken_links(pages)) == []
    assert {address: page.overflow for address, page in pages.items() if page.overflow > 0} == {}


def test_every_picture_is_shown_in_the_colours_of_the_page(site, chromium):
    with served(site) as home:
        for scheme in ("light", "dark"):
            reader = Reader(chromium, home, WIDE, scheme)
            reader.open(f"{home}masks.html")
            shown = reader.window.evaluate(
                "() => [...document.querySelectorAll('.panels img')].filter(x => x.offsetWidth).map(x => x.src)"
            )
            assert len(shown) > 10
            assert all(address.endswith(f"-{scheme}.svg") for address in shown)


FAULTY = """<html><body>
<a href="other.html#nowhere">a</a><div style="width: 3000px">wide</div><img src="none.png">
<script src="http://example.invalid/x.js"></script><script>console.error("a fault")</script>
</body></html>
"""


def test_faults_are_found(chromium, tmp_path):
    (tmp_path / "index.html").write_text(FAULTY)
    (tmp_path / "other.html").write_text("<html><body>nothing</body></html>")
    with served(tmp_path) as home:
        pages = Reader(chromium, home, WIDE).crawl()
    page = pages[f"{home}index.html"]
    assert len(pages) == 2
    assert page.overflow > 1000
    words = " ".join(page.faults)
    for fault in ("a fault", "not on this machine: http://example.invalid/x.js", "404"):
        assert fault in words
    assert len(list(broken_links(pages))) == 1


def test_a_class_is_shown_with_its_methods(site):
    """Those that it inherits, too, and whole."""
    page = (site / "api" / "cupyattn.DynamicCache.html").read_text()
    for name in ("append", "attend", "truncate", "reorder", "lengths"):
        assert f'id="cupyattn.DynamicCache.{name}"' in page
    assert "masks are aligned" in page
