"""Imports point one way: no module of gptcore imports one of a layer above its own (docs/architecture.md)."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def layers() -> list[list[str]]:
    """Return the modules and folders of the diagram, layer by layer from the bottom up."""
    diagram = (ROOT / "docs/architecture.md").read_text(encoding="utf-8").split("```")[1]
    found: list[list[str]] = []
    for layer in diagram.split("\n   ^\n"):
        found.append([])
        for line in re.findall(r"(?m)^\S.*", layer):
            first, *others = line.split("  ")[0].split(", ")
            folder = first.rpartition("/")[0] + "/" if first.startswith("gptcore/") else ""
            found[-1] += [first, *(folder + name for name in others)]
    built = {"csrc": ["gptcore/_C", "gptcore/_simt"], "kernels/triton": ["gptcore/kernels"]}
    return [[name.replace("/", ".") for row in rows for name in built.get(row, [row])] for rows in found]


LAYERS = layers()
FILES = [*sorted(ROOT.glob("gptcore/**/*.py")), *sorted(ROOT.glob("kernels/triton/*.py"))]


def module_name(path: Path) -> str:
    if path.parent == ROOT / "kernels" / "triton":
        path = ROOT / "gptcore" / "kernels" / path.name
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path) for path in FILES} | {"gptcore._C", "gptcore._simt"}


def layer(module: str) -> int:
    rows = [(len(name), row) for row, names in enumerate(LAYERS) for name in names
            if module == name or (module.startswith(name + ".") and name != "gptcore")]  # fmt: skip
    assert rows, f"{module} is in no layer: add it to the diagram in docs/architecture.md"
    return max(rows)[1]


def imports(path: Path) -> set[str]:
    """The modules of gptcore that a file imports, also inside of functions, but not for type checkers alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for child in block.body
        for node in ast.walk(child)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{path} has a relative import, expected an absolute one"
            assert node.level == 0, f"{path} has a relative import, expected an absolute one"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return found & MODULES


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_no_module_imports_upward(path: Path) -> None:
    module = module_name(path)
    upward = sorted(name for name in imports(path) if layer(name) > layer(module))
    assert not upward, f"{module} imports {', '.join(upward)} from a layer above it"


def test_the_check_would_notice(tmp_path: Path) -> None:
    page = tmp_path / "page.py"
    page.write_text("def f():\n    from gptcore.cli import main\n    from gptcore import ops, GPT\n")
    assert imports(page) == {"gptcore.cli", "gptcore.ops", "gptcore"}
    assert layer("gptcore.cli.train") > layer("gptcore") > layer("gptcore.training.trainer") > layer("gptcore.ops.gelu")
