"""The site in docs/: every block of code in it runs, and prints what the page says it prints.

A page's ``python`` blocks run in their order, in one namespace; a ``text`` block right after one is its output.  A line
``% needs: torch`` before a block is a library without which it is left out, and such blocks have a namespace of their
own; ``% not run: ...`` says why a block is not.  Both are comments, which readers of the page do not see.  The ``sh``
blocks of a page are a test of their own, which Windows skips.
"""

import contextlib
import io
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest
from homes import needs

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
if not PAGES:
    pytest.skip("docs/ is not here (it is not in the sdist)", allow_module_level=True)

RUN = {"python", "sh"}
EXCERPTS = {"text", "console"}
"""Output, and what is there to be read only; every other language has to run, or to say why not."""


class Block(NamedTuple):
    """Code between two fences, the number of its first line, and what was said before and after it."""

    language: str
    code: str
    line: int
    needs: str
    why_not: str
    output: str | None

    @property
    def runs(self):
        return self.language in RUN and not self.why_not


def blocks_of(text):
    """Every fenced block that is no directive, outputs with the block before them."""
    found, remarks, inside, after_code = [], {}, None, False
    for number, line in enumerate(text.splitlines(), 1):
        fence = re.fullmatch(r"\s*```(\{?\w*).*", line)
        remark = re.fullmatch(r"\s*% (needs|not run): (.+)", line)
        if inside is not None and not fence:
            inside.append(line)
        elif fence and inside is None:
            language, start, inside = fence[1] or "text", number + 1, []
        elif fence:
            code = textwrap.dedent("\n".join(inside))
            if language == "text" and after_code:
                found[-1] = found[-1]._replace(output=code)
            elif not language.startswith("{"):
                found.append(Block(language, code, start, remarks.get("needs", ""), remarks.get("not run", ""), None))
            inside, remarks, after_code = None, {}, language in RUN
        elif remark:
            remarks[remark[1]] = remark[2]
        elif line.strip():
            after_code = False
    assert inside is None, f"a fence is open at the end, from line {start - 1} on"
    return found


def run(block, path, namespace):
    """Run a block, and hold what it prints against what the page says."""
    if block.language == "sh":
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        environment["PYTHONPATH"] = str(ROOT)
        call = ["bash", "-euo", "pipefail", "-c", block.code]
        printed = subprocess.run(call, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout
    else:
        compiled = compile("\n" * (block.line - 1) + block.code, str(path), "exec")  # its lines are the page's
        with contextlib.redirect_stdout(io.StringIO()) as stream:
            exec(compiled, namespace)
        printed = stream.getvalue()
    if block.output is not None:
        assert tidy(printed) == tidy(block.output), f"{path.name}, line {block.line}"
    elif block.language == "python":
        assert printed == "", f"{path.name}, line {block.line}: it prints, and the page does not say what"


def needs_bash():
    """Skip on Windows: what is called bash there is WSL's, another system, which has not this Python."""
    if sys.platform == "win32":
        pytest.skip("bash is WSL's on Windows, and has not this Python")


def tidy(text):
    return [line.rstrip() for line in text.strip().splitlines()]


def require(library):
    """Skip where a library, or a GPU, is missing."""
    if library == "gpu":
        cupy = needs("cupy")
        try:
            cupy.cuda.runtime.getDeviceCount()
        except cupy.cuda.runtime.CUDARuntimeError:
            pytest.skip("needs an NVIDIA GPU")
    else:
        for name in library.split(", "):
            needs(name)


CASES = [
    (path, *kind)
    for path in PAGES
    for kind in dict.fromkeys((block.language, block.needs) for block in blocks_of(path.read_text()) if block.runs)
]
NAMES = [f"{path.stem}-{language}-{library or 'everywhere'}" for path, language, library in CASES]


@pytest.mark.parametrize(("path", "language", "library"), CASES, ids=NAMES)
def test_the_blocks_of_a_page_run_and_print_what_it_says(path, language, library):
    if language == "sh":
        needs_bash()
    if library:
        require(library)
    namespace = {"__name__": "page"}
    for block in blocks_of(path.read_text()):
        if block.runs and (block.language, block.needs) == (language, library):
            run(block, path, namespace)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_block_that_is_not_run_says_why(path):
    for block in blocks_of(path.read_text()):
        assert block.runs or block.why_not or block.language in EXCERPTS, f"{path.name}, line {block.line}"


PAGE = """Words.

```python
print(1 + 1)
```

```text
2
```

% needs: torch

    ```python
    import torch
    ```

Words again.

```text
no output of anything
```
% not run: it would install something
```sh
pip install cupyattn
```

```{note}
A directive.
```
"""


def test_blocks_are_found_with_what_is_said_of_them():
    first, second, third, fourth = blocks_of(PAGE)
    assert first == Block("python", "print(1 + 1)", 4, "", "", "2")
    assert second == Block("python", "import torch", 14, "torch", "", None)
    assert third == Block("text", "no output of anything", 20, "", "", None)
    assert fourth.why_not == "it would install something"
    assert not fourth.runs


@pytest.mark.parametrize(
    ("code", "output"),
    [("print(1)", "2"), ("print(1)", None), ("assert False", None), ("x = 1", "1"), ("1 / 0", None)],
)
def test_a_block_that_is_wrong_fails(code, output):
    with pytest.raises((AssertionError, ZeroDivisionError)):
        run(Block("python", code, 1, "", "", output), Path("page.md"), {})


def test_a_command_that_fails_fails():
    needs_bash()
    with pytest.raises(subprocess.CalledProcessError):
        run(Block("sh", "false", 1, "", "", None), Path("page.md"), {})
