"""Who may import whom, and what an import of the package brings with it."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import cupyattn

PACKAGE = Path(cupyattn.__file__).parent
CONTRIBUTING = Path(__file__).parents[1] / "CONTRIBUTING.md"
KERNELS = PACKAGE / "cuda"
ALTITUDES = ("instructions", "tiles", "algorithm", "")
"""Of CUDA's headers, and of the kernels above them: each includes what is of its own altitude or a lower one."""
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 400, 60
"""Of a file; of a function's code, its docstring not counted."""


class Row(NamedTuple):
    """Of a table in CONTRIBUTING: whom a room or a wing may import, and whom besides, inside a function only."""

    early: set[str]
    late: set[str]


def rows_of(text):
    """Every row of the tables that end with a column "may import", by dotted name: "plan", "plan.splits".

    The first header of a wing's own table is the wing, `` `plan/` ``; its door is ``__init__.py``.
    """
    found, wing = {}, None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if not line.startswith("|"):
            wing = None
        elif cells[-1] == "may import":
            wing = "".join(f"{name.replace('/', '.')}" for name in re.findall(r"`([\w/]+/)`", cells[0]))
        elif wing is not None and set(line) != {"|", "-"}:
            parts = cells[-1].partition("late: ")[::2]
            row = Row(*({name for name in re.findall(r"[\w.]+", part) if name != "nothing"} for part in parts))
            for name in re.findall(r"`([\w/.]+)`", cells[0]):
                found[wing + name.removesuffix(".py").rstrip("/")] = row
    return found


ROWS = rows_of(CONTRIBUTING.read_text())
MAY_IMPORT = {name: row.early for name, row in ROWS.items() if "." not in name}
"""The modules that a module may import from the package, and no others: nothing looks back up."""
MAY_IMPORT_LATE = {name: row.late for name, row in ROWS.items() if "." not in name and row.late}
"""Besides, inside a function only: the GPU's door is opened when an array lives there."""

LIBRARIES = {"cupy", "cupyx", "dask", "jax", "jaxlib", "torch", "transformers"}
KNOW_LIBRARIES = {"arrays", "command", "cuda", "distributed", "integrations"}

PUBLIC = {
    *("attention", "attention_backward", "explain", "merge_states", "Gradients", "Plan"),
    *("scaled_dot_product_attention", "flash_attn_func", "flash_attn_qkvpacked_func", "flash_attn_kvpacked_func"),
    *("flash_attn_varlen_func", "flash_attn_varlen_qkvpacked_func", "flash_attn_varlen_kvpacked_func"),
    *("flash_attn_with_kvcache", "get_scheduler_metadata"),
    *("apply_rotary_emb", "rotary_tables", "unpad_input", "pad_input", "__version__"),
    *("Cache", "DynamicCache", "StaticCache", "SlidingWindowCache", "PagedCache", "OffloadedCache"),
    *("LayeredCache", "PrefixCache"),
    "kv_cache_bytes",
    *("linear_attention", "linear_attention_backward", "LinearGradients"),
    "cascade_attention",
    "implementations",
}


class Import(NamedTuple):
    path: str
    """The dotted name, "cupyattn.arrays" for ``from cupyattn.arrays import enter``."""
    late: bool
    """Inside a function."""


def name_of(file):
    """The dotted name of a file: "plan.splits", and "plan.__init__" for the door of a wing."""
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts)


def module_of(file):
    """The name under which the first table has a file: that of its wing, if it is in one."""
    return name_of(file).partition(".")[0]


def is_module(path):
    place = PACKAGE.parent / path.replace(".", "/")
    return place.with_suffix(".py").exists() or (place / "__init__.py").exists()


def imports_of(tree, late=False):
    """Every import in a syntax tree."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the package"
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                yield Import(inside if node.module == "cupyattn" or is_module(inside) else node.module, late)
        else:
            yield from imports_of(node, late or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))


FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS = [file for file in FILES if file.parent != PACKAGE]
SOURCES = sorted(KERNELS.rglob("*.cu*"))
every_file = pytest.mark.parametrize("file", FILES, ids=name_of)


@every_file
def test_a_module_imports_only_what_its_row_names(file):
    name = module_of(file)
    early, late = set(), set()
    for imported in imports_of(ast.parse(file.read_text())):
        root, _, rest = imported.path.partition(".")
        if root == "cupyattn":
            (late if imported.late else early).add(rest.partition(".")[0])
    assert early - MAY_IMPORT[name] - {name} == set()
    assert late - MAY_IMPORT[name] - MAY_IMPORT_LATE.get(name, set()) - {name} == set()


def is_named(path, row):
    """Whether a row names this module, or a wing that it is in."""
    parts = path.split(".")
    return any(".".join(parts[:count]) in row for count in range(1, len(parts) + 1))


@every_file
def test_a_wing_is_entered_by_its_door(file):
    """Or by a room that a row names, as ``cuda.making`` is by the commands."""
    if file == PACKAGE / "__init__.py":
        return  # it says where the lazy names are
    allowed = {
        name for name in MAY_IMPORT[module_of(file)] | MAY_IMPORT_LATE.get(module_of(file), set()) if "." in name
    }
    for imported in imports_of(ast.parse(file.read_text())):
        root, _, rest = imported.path.partition(".")
        if root == "cupyattn" and "." in rest and rest.partition(".")[0] != module_of(file):
            assert is_named(rest, allowed), f"{imported.path} is inside of a wing"


@pytest.mark.parametrize("file", ROOMS, ids=name_of)
def test_a_room_imports_only_those_of_its_wing_that_its_row_names(file):
    """By their names in its own folder, or from the wing's."""
    folder, wing = name_of(file).rpartition(".")[0], module_of(file)
    early, late = ROWS[name_of(file)]
    for imported in imports_of(ast.parse(file.read_text())):
        path = imported.path.removeprefix("cupyattn.")
        if path.startswith(f"{wing}."):
            allowed = early | late if imported.late else early
            near, far = path.removeprefix(f"{folder}."), path.removeprefix(f"{wing}.")
            assert is_named(near, allowed) or is_named(far, allowed), path


def test_every_room_has_a_row_and_every_row_a_room():
    assert {name_of(file) for file in ROOMS} == {name for name in ROWS if "." in name}


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.name)
def test_a_header_includes_what_lies_no_higher(file):
    def altitude(name):
        return ALTITUDES.index(name.rpartition("/")[0])

    own = file.relative_to(KERNELS).as_posix()
    for included in re.findall(r'#include "([^"]+)"', file.read_text()):
        assert altitude(included) <= altitude(own)
        assert included.endswith(".cuh")


@every_file
def test_only_who_is_at_a_door_imports_array_libraries(file):
    mentioned = {imported.path.partition(".")[0] for imported in imports_of(ast.parse(file.read_text()))} & LIBRARIES
    assert mentioned == set() or module_of(file) in KNOW_LIBRARIES


@every_file
def test_array_libraries_are_imported_late(file):
    early = {
        imported.path.partition(".")[0] for imported in imports_of(ast.parse(file.read_text())) if not imported.late
    }
    assert early & LIBRARIES == set() or module_of(file) == "cuda"


DECISIONS = [file for file in FILES if module_of(file) in ("problem", "plan")]


@pytest.mark.parametrize("file", [file for file in DECISIONS if file.stem != "splits"], ids=name_of)
def test_nouns_and_decisions_need_no_arrays(file):
    """`plan.splits` reckons in float32, to agree with its peers."""
    imported = {found.path.partition(".")[0] for found in imports_of(ast.parse(file.read_text()))}
    assert imported - sys.stdlib_module_names == {"cupyattn"} & imported


def test_every_module_has_a_row():
    assert {module_of(file) for file in FILES} == MAY_IMPORT.keys()


WINGS = sorted({name_of(file).rpartition(".")[0] for file in ROOMS})


@pytest.mark.parametrize("wing", ["", *WINGS])
def test_no_row_leads_back_to_itself(wing):
    graph = {
        name.rpartition(".")[2]: row.early | row.late for name, row in ROWS.items() if name.rpartition(".")[0] == wing
    }
    while graph:
        leaves = {name for name, may in graph.items() if not may & graph.keys()}
        assert leaves, f"each of {sorted(graph)} leads to another"
        graph = {name: may for name, may in graph.items() if name not in leaves}


@pytest.mark.parametrize("name", ["api", "explaining", "peers", "cache"])
def test_public_functions_know_no_implementation(name):
    assert MAY_IMPORT[name] & {"cpu", "cuda", "tiles", "scratch", "threads"} == set()
    assert name not in MAY_IMPORT_LATE


@pytest.mark.parametrize("file", [*FILES, *SOURCES], ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_no_file_is_longer_than_a_sitting(file):
    assert len(file.read_text().splitlines()) <= MOST_LINES


@every_file
def test_no_function_is_longer_than_a_page(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            has_words = ast.get_docstring(node) is not None
            words = node.body[0].end_lineno - node.body[0].lineno + 1 if has_words else 0
            assert node.end_lineno - node.lineno + 1 - words <= MOST_LINES_OF_A_FUNCTION, node.name


def test_the_public_names_are_these():
    assert set(cupyattn.__all__) == PUBLIC
    assert len(cupyattn.__all__) == len(PUBLIC)
    assert all(hasattr(cupyattn, name) for name in PUBLIC)


def test_dir_shows_what_users_may_use_and_nothing_else():
    assert dir(cupyattn) == sorted(PUBLIC)


IMPORTED = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy, array_api_compat
before = set(sys.modules)
import cupyattn
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_importing_the_package_imports_numpy_and_array_api_compat_and_nothing_else():
    call = [sys.executable, "-W", "error", "-c", IMPORTED, str(PACKAGE.parent)]
    fresh = subprocess.run(call, capture_output=True, text=True, check=True)
    new, everything = (set(line.split()) for line in fresh.stdout.splitlines())
    assert "cupyattn" in new
    assert new - sys.stdlib_module_names - {"cupyattn", "numpy", "array_api_compat"} == set()
    assert everything & {*LIBRARIES, "scipy", "threadpoolctl", "ml_dtypes", "array_api_strict"} == set()


MOST_MODULES = 44
"""Of ours that ``import cupyattn`` may bring: each costs about a millisecond where no bytecode is kept."""
NOT_NEEDED = {
    *("explaining", "rehearsing", "merging", "linear", "cache", "distributed", "integrations", "command", "parts"),
    *("arrays.torch", "arrays.jax", "arrays.xla", "arrays.dask", "arrays.cupy", "arrays.sketches", "arrays.outlines"),
    *("arrays.operators", "arrays.defining", "arrays.registering", "arrays.pulling", "arrays.recording"),
    *("cpu.forward", "cpu.backward", "cpu.flash", "numpy_ref", "rounding", "cuda", "plan.backward", "plan.memory"),
    *("peers", "peers.torch", "peers.flash_attn", "peers.varlen", "peers.rotary", "peers.tables", "peers.padding"),
}
"""What one function, one library of arrays, one device or one pass needs, and comes with the first of them."""
NOT_NEEDED_OF_PYTHON = {"array_api_compat", "json", "threading", "asyncio", "subprocess"}

BROUGHT = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy
before = set(sys.modules)
{}
print(*(name for name in sys.modules if name not in before))
"""


def brought_by(code):
    """The modules that come with some lines of Python in a fresh process that has NumPy; ours without "cupyattn."."""
    call = [sys.executable, "-W", "error", "-c", BROUGHT.format(code), str(PACKAGE.parent)]
    fresh = subprocess.run(call, capture_output=True, text=True, check=True)
    return fresh.stdout.split()


def ours(modules):
    return {name.removeprefix("cupyattn.") for name in modules if name.startswith("cupyattn.")}


def test_importing_the_package_brings_what_every_call_needs_and_no_more():
    brought = brought_by("import cupyattn")
    assert ours(brought) & NOT_NEEDED == set()
    assert set(brought) & NOT_NEEDED_OF_PYTHON == set()
    assert len(ours(brought)) <= MOST_MODULES


def test_names_of_what_importing_the_package_does_not_bring_are_those_of_modules():
    assert NOT_NEEDED - {name_of(file).removesuffix(".__init__") for file in FILES} == set()


def test_a_call_of_numpy_arrays_brings_no_room_of_other_libraries_or_gradients():
    brought = ours(brought_by("import cupyattn; x = numpy.ones((1, 3, 2, 4)); cupyattn.attention(x, x, x)"))
    assert "cpu.forward" in brought
    others = {name for name in NOT_NEEDED if name.partition(".")[0] in ("arrays", "peers", "cuda")}
    assert brought & (others | {"cpu.backward", "plan.backward", "explaining"}) == set()


WORKED = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np, cupyattn
x = np.ones((1, 3, 2, 4), np.float32)
cupyattn.attention(x, x, x, causal=True)
cupyattn.explain(x.shape, x.shape, x.shape, device="H100")
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


def test_working_on_numpy_arrays_imports_no_other_library():
    call = [sys.executable, "-W", "error", "-c", WORKED, str(PACKAGE.parent)]
    fresh = subprocess.run(call, capture_output=True, text=True, check=True)
    assert set(fresh.stdout.split()) & {*LIBRARIES, "scipy", "ml_dtypes", "array_api_strict"} == set()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch", [("torch", False)]),
        ("def f():\n    import jax.numpy as jnp", [("jax.numpy", True)]),
        ("from cupyattn import cpu, plan", [("cupyattn.cpu", False), ("cupyattn.plan", False)]),
        ("class A:\n    def f(self):\n        from cupyattn.cuda import run", [("cupyattn.cuda", True)]),
        ("if True:\n    from cupyattn.plan import Plan", [("cupyattn.plan", False)]),
    ],
)
def test_imports_are_found_wherever_they_stand(source, expected):
    assert list(imports_of(ast.parse(source))) == expected
