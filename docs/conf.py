"""The site's configuration; `make docs` builds it.

Two directives are our own: ``generated`` puts a table of `making.tables` or `making.results` where it stands, and
``picture`` one of `making.pictures`, for light and for dark pages.
"""

import sys
from pathlib import Path

from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from making import pictures, results, tables  # noqa: E402

import cupyattn  # noqa: E402 - the checkout, installed or not

project = "cupyattn"
copyright = "the cupyattn authors; Apache-2.0"
release = version = cupyattn.__version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build", "making"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
default_role = "py:obj"
autosummary_generate = True
autodoc_typehints = "none"  # docstrings say types in words, and shapes
templates_path = ["_templates"]
numpydoc_show_class_members = False  # the template of classes has them, whole
nitpicky = False

html_theme = "pydata_sphinx_theme"
html_title = "cupyattn"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["_generated/extra"]
html_show_sourcelink = False
html_context = {"default_mode": "auto"}  # light or dark, as the reader's system is
FLAT = [page.stem for page in HERE.glob("*.md") if page.stem != "api"]
html_sidebars = {name: [] for name in (*FLAT, "search", "genindex")}  # these have no pages under them
html_theme_options = {
    "show_prev_next": True,
    "navbar_align": "left",
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": ["theme-version"],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}

PICTURES = HERE / "_generated" / "pictures"
TABLES = {**tables.TABLES, **results.TABLES}
painted = pictures.paint_all(PICTURES)
"""Titles of each picture's panels."""
extra = HERE / "_generated" / "extra" / "results"
extra.mkdir(parents=True, exist_ok=True)
for file in results.files():
    (extra / file.name).write_bytes(file.read_bytes())


class Generated(SphinxDirective):
    """A table by its name, read as if it stood in the page."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        node = nodes.container(classes=["generated"])
        lines = TABLES[self.arguments[0]]().splitlines()
        self.state.nested_parse(StringList(lines, self.arguments[0]), self.content_offset, node)
        return [node]


class Picture(SphinxDirective):
    """The panels of a picture by its name, side by side where there is room."""

    required_arguments = 1
    option_spec = {"alt": directives.unchanged_required}  # noqa: RUF012 - as docutils has it

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        node = nodes.container(classes=["panels"])
        for number, title in enumerate(painted[name]):
            for scheme in pictures.SCHEMES:
                uri = f"/_generated/pictures/{name}-{number}-{scheme}.svg"
                node += nodes.image(uri=uri, alt=f"{title}. {self.options['alt']}", classes=[f"only-{scheme}"])
        return [node]


def setup(app: Sphinx) -> None:
    app.add_directive("generated", Generated)
    app.add_directive("picture", Picture)
