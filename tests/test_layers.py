"""Who may import whom, and what an import of the package brings with it."""

import ast
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import cupyattn

PACKAGE = Path(cupyattn.__file__).parent

CORRIDOR = {"arrays", "corridor", "plan", "problem", "reading"}
"""What a public function walks through; no further in."""

MAY_IMPORT = {
    "problem": set(),
    "rounding": set(),
    "scratch": set(),
    "threads": {"scratch"},
    "numpy_ref": {"scratch"},
    "reading": {"problem"},
    "splits": {"problem"},
    "hopper": {"problem"},
    "plan": {"hopper", "problem", "splits"},
    "tiles": {"numpy_ref", "plan", "problem", "rounding", "scratch", "threads"},
    "cutting": {"numpy_ref", "plan", "problem", "rounding", "tiles"},
    "cpu": {"cutting", "numpy_ref", "plan", "problem", "rounding", "scratch", "threads", "tiles"},
    "library": {"problem", "reading"},
    "torch_arrays": {"library", "problem", "reading"},
    "jax_arrays": {"library", "problem", "reading"},
    "arrays": {"jax_arrays", "library", "problem", "reading", "threads", "torch_arrays"},
    "corridor": {"arrays", "cpu", "plan", "problem", "reading"},
    "cuda": {"hopper", "plan", "problem", "reading", "splits"},
    "padding": {"arrays", "problem", "reading"},
    "rotary": {"arrays", "problem", "reading", "rounding"},
    "appending": {"problem", "reading", "rotary"},
    "kvcache": {"appending", *CORRIDOR},
    "peers": {"arrays", "corridor", "problem", "reading"},
    "parts": {"arrays", "corridor", "cpu", "numpy_ref", "problem", "reading", "rounding"},
    "cascade": {"arrays", "parts", "problem", "reading"},
    "cache": {"arrays", "corridor", "parts", "problem", "reading"},
    "api": {*CORRIDOR, "numpy_ref", "rounding"},
    "integrations": {"api", "reading"},
    "__init__": {"api", "cache", "cascade", "kvcache", "padding", "peers", "plan", "rotary"},
    "__main__": {"cuda"},
}
"""The modules that a module may import from the package, and no others: nothing looks back up."""

MAY_IMPORT_LATE = {"arrays": {"cuda"}, "corridor": {"cuda"}, "cuda": {"__version__"}}
"""Besides, inside a function only: the GPU's door is opened when an array lives there."""

LIBRARIES = {"cupy", "cupyx", "dask", "jax", "jaxlib", "torch", "transformers"}
KNOW_LIBRARIES = {"arrays", "jax_arrays", "torch_arrays", "cuda", "integrations"}

PUBLIC = {
    *("attention", "attention_backward", "explain", "merge_states", "Gradients", "Plan"),
    *("scaled_dot_product_attention", "flash_attn_func", "flash_attn_qkvpacked_func", "flash_attn_kvpacked_func"),
    *("flash_attn_varlen_func", "flash_attn_varlen_qkvpacked_func", "flash_attn_varlen_kvpacked_func"),
    "flash_attn_with_kvcache",
    *("apply_rotary_emb", "unpad_input", "pad_input", "__version__"),
    *("Cache", "DynamicCache", "StaticCache", "SlidingWindowCache", "PagedCache", "OffloadedCache"),
    "cascade_attention",
}


class Import(NamedTuple):
    path: str
    """The dotted name, "cupyattn.arrays" for ``from cupyattn.arrays import enter``."""
    late: bool
    """Inside a function."""


def module_of(file):
    """The name under which the tables above have a file: "cuda" for all that is in that folder, "cache" likewise."""
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(tree, late=False):
    """Every import in a syntax tree."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the package"
            whole = node.module == "cupyattn"
            yield from (Import(f"{node.module}.{alias.name}" if whole else node.module, late) for alias in node.names)
        else:
            yield from imports_of(node, late or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))


FILES = sorted(PACKAGE.rglob("*.py"))
every_file = pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))


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


@pytest.mark.parametrize("name", ["problem", "plan"])
def test_nouns_and_decisions_need_no_arrays(name):
    imported = {found.path.partition(".")[0] for found in imports_of(ast.parse((PACKAGE / f"{name}.py").read_text()))}
    assert imported - sys.stdlib_module_names == {"cupyattn"} & imported


def test_every_module_has_a_row():
    assert {module_of(file) for file in FILES} == MAY_IMPORT.keys()


def test_no_row_leads_back_to_itself():
    graph = {name: may | MAY_IMPORT_LATE.get(name, set()) for name, may in MAY_IMPORT.items()}
    while graph:
        leaves = {name for name, may in graph.items() if not may & graph.keys()}
        assert leaves, f"each of {sorted(graph)} leads to another"
        graph = {name: may for name, may in graph.items() if name not in leaves}


@pytest.mark.parametrize("name", ["api", "kvcache", "peers", "rotary", "padding", "cascade", "cache"])
def test_public_functions_know_no_implementation(name):
    assert MAY_IMPORT[name] & {"cpu", "cuda", "tiles", "scratch", "threads"} == set()
    assert name not in MAY_IMPORT_LATE


def test_the_public_names_are_these():
    assert set(cupyattn.__all__) == PUBLIC
    assert len(cupyattn.__all__) == len(PUBLIC)
    assert all(hasattr(cupyattn, name) for name in PUBLIC)


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
