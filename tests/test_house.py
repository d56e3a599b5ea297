"""How the code is laid out: imports point down, private names of torch stand in one file, files are short."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
FILES = sorted([*(ROOT / "slimfit_fx").rglob("*.py"), *(ROOT / "passes").rglob("*.py")])

# The floors, the highest first; a floor may import those below it, and itself. Those in one row do not know each other.
FLOORS = [
    {"integrations"},
    {"__init__"},
    {"entry_point"},
    {"api"},
    {"inspection"},
    {"runtime"},
    {"scheduling"},
    {"model", "compiler"},
    {"passes"},
    {"analysis"},
    {"graph"},
    {"config"},
    {"presets", "policies"},
    {"config_options"},
    {"module_paths"},
    {"codecs"},
    {"roles"},
    {"torch_internals", "sizes"},
    {"errors", "hints"},
]
HEIGHT = {name: -place for place, row in enumerate(FLOORS) for name in row}


def floor_of(module: str) -> str:
    """The floor of a module, `slimfit_fx.graph.nodes` say."""
    return module.split(".")[1] if "." in module else "__init__"


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("slimfit_fx", *parts) if parts[0] == "passes" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> Iterator[str]:
    """The modules of ours that a file imports, also within functions and for types only."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "slimfit_fx")
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            if base.split(".")[0] == "slimfit_fx":
                yield from (f"{base}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_of(path))
def test_imports_point_down(path):
    own = floor_of(module_of(path))
    for imported in imports_of(path):
        other = floor_of(imported)
        assert other in HEIGHT, f"{imported} is on no floor: add it to FLOORS and docs/architecture.md"
        assert other == own or HEIGHT[other] < HEIGHT[own], f"{module_of(path)} imports {imported}"


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES}), ids=lambda folder: folder.name)
def test_no_circles_within_a_folder(folder):
    names = {module_of(path) for path in folder.glob("*.py")}
    arrows = {
        module_of(path): {
            target
            for imported in imports_of(path)
            for target in (imported, imported.rpartition(".")[0])
            if target in names
        }
        - {module_of(path), module_of(folder / "__init__.py")}
        for path in folder.glob("*.py")
        if path.name != "__init__.py"
    }
    while leaves := {name for name, targets in arrows.items() if not targets & arrows.keys()}:
        arrows = {name: targets for name, targets in arrows.items() if name not in leaves}
    assert not arrows


def test_the_docs_name_every_floor():
    text = (ROOT / "docs" / "architecture.md").read_text()
    for name in HEIGHT.keys() - {"__init__"}:
        assert re.search(rf"`{name}(/|\.py)?`", text), name


PRIVATE = re.compile(r"(from|import) torch(\.\w+)*\._\w+|\btorch(\.\w+)*\._(?!_|foreach_|check\b)\w+")


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_of(path))
def test_private_names_of_torch_stand_in_one_file(path):
    if path.name == "torch_internals.py":
        return
    tree = ast.parse(path.read_text())
    texts = {id(node) for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    code = ast.unparse(_without(tree, texts))
    found = [match.group() for match in PRIVATE.finditer(code)]
    assert all(name.startswith("torch.ops.") for name in found), found
    assert "unittest" not in code


def _without(tree: ast.AST, texts: set[int]) -> ast.AST:
    class Blank(ast.NodeTransformer):
        def visit_Constant(self, node: ast.Constant) -> ast.Constant:
            return ast.Constant("") if id(node) in texts else node

    return Blank().visit(tree)


def test_every_private_name_says_what_for():
    lines = (ROOT / "slimfit_fx" / "torch_internals.py").read_text().splitlines()
    names = [line for line in lines if re.match(r"    \w+ = |    \(\S+, \"_?\w+\"\)", line)]
    assert len(names) > 40
    assert all("  # " in line for line in names)


@pytest.mark.parametrize(
    "taken",
    ["torch._inductor.memory.get_freeable_input_buf", "torch._dynamo.utils.counters", "torch.nn.Module._call_impl"],
)
def test_a_missing_private_name_is_a_version_error(taken):
    owner, _, name = taken.rpartition(".")
    code = f"""
import torch, torch._inductor.memory, torch._dynamo.utils, slimfit_fx
model = torch.nn.Linear(2, 2)
delattr({owner}, {name!r})
try:
    slimfit_fx.transform(model)
except slimfit_fx.VersionError as error:
    print(error)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"torch {torch.__version__} lacks what slimfit_fx builds on" in found.stdout, found.stderr
    assert name in found.stdout


def test_importing_the_library_is_cheap():
    code = """
import sys, torch
before = set(sys.modules)
import slimfit_fx
slimfit_fx.Config(), slimfit_fx.codecs.Quantize(8), slimfit_fx.Scheduler, slimfit_fx.verify
new = set(sys.modules) - before
print(len(new), *sorted(name for name in new if name.startswith(("torch._dynamo", "torch._inductor", "sympy"))))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, *heavy = found.stdout.split()
    assert not heavy
    assert int(count) < 150  # 51 when this was written; 1,495 before


@pytest.mark.parametrize("folder", ["slimfit_fx", "passes", "tests", "examples", "benchmarks"])
def test_files_are_short(folder):
    lengths = {path.name: len(path.read_text().splitlines()) for path in (ROOT / folder).rglob("*.py")}
    assert not {name: length for name, length in lengths.items() if length > 300}
