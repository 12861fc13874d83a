"""Imports go one way, and what is heavy is imported only where it is used."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import edgeq

ROOT = Path(edgeq.__file__).parent

# Part of edgeq (a package or a module) -> its layer. A part may import what lies below it, and itself. The halves order
# parts of one layer of the design.
LAYERS = {
    "errors": 0,
    "version": 0,
    "report": 0.5,
    "num": 1,
    "ir": 2,
    "source": 3,
    "target": 3,
    "run": 4,
    "analyse": 5,
    "rewrite": 6,
    "lower": 7,
    "validator": 8,
    "packaging": 8,
    "recipe": 9,
    "context": 9,
    "bucketing": 8.5,
    "halving": 9.2,
    "pixels": 9,
    "quantizer": 9.3,
    "steps": 9.5,
    "facts": 9,
    "given": 9,
    "search": 10,
    "ahead": 10,
    "advice": 10.5,
    "devices": 10,
    "apart": 10.2,
    "examine": 10.5,
    "observing": 10.5,
    "packages": 10.5,
    "pipeline": 10.5,
    "sizes": 10.5,
    "cli": 11,
    "__init__": 11,
    "__main__": 11.5,
}
HEAVY = {"PIL", "cryptography", "onnxscript", "plotly", "scipy", "sklearn", "tokenizers", "torch", "transformers"}
FILES = sorted(ROOT.rglob("*.py"))


def _part(names: tuple[str, ...]) -> str:
    return names[0] if names else "__init__"


def _imports(tree: ast.AST) -> Iterator[str]:
    """Absolute names of all modules a file imports, in functions too; ``from edgeq import x`` counts as ``edgeq.x``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer"
            names = (f"edgeq.{alias.name}" for alias in node.names)
            yield from names if node.module == "edgeq" else (node.module or "",)


def _runs_at_import(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported: no function bodies, nothing under TYPE_CHECKING."""
    waiting: list[ast.stmt] = list(tree.body)
    while waiting:
        statement = waiting.pop()
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.unparse(statement.test):
            waiting += statement.orelse
            continue
        yield statement
        waiting += [child for child in ast.iter_child_nodes(statement) if isinstance(child, ast.stmt)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_go_down(path: Path) -> None:
    own = _part(path.relative_to(ROOT).with_suffix("").parts)
    for name in _imports(ast.parse(path.read_text(encoding="utf-8"))):
        top, *rest = name.split(".")
        if top == "edgeq":
            other = _part(tuple(rest))
            assert other == own or LAYERS[other] < LAYERS[own], f"{own} (L{LAYERS[own]}) imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_heavy_modules_are_imported_in_functions(path: Path) -> None:
    for statement in _runs_at_import(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(statement, ast.Import | ast.ImportFrom):
            tops = {name.partition(".")[0] for name in _imports(statement)}
            assert not tops & HEAVY, f"line {statement.lineno} imports {tops & HEAVY} when the module is imported"


def test_every_part_has_a_layer() -> None:
    assert {_part(path.relative_to(ROOT).with_suffix("").parts) for path in FILES} <= set(LAYERS)


def test_help_loads_nothing_heavy() -> None:
    """What takes long to import must not stand between a person and ``edgeq --help``."""
    code = (
        "import sys; from edgeq.cli import main; import edgeq; status = main(['--help']);"
        "heavy = {'numpy', 'onnx', 'onnxruntime', 'rich', 'plotly', 'torch'} & set(sys.modules);"
        "sys.exit(status or ' '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_public_names_are_exact_and_lazy() -> None:
    assert set(edgeq.HOMES) | {"__version__"} == set(edgeq.__all__)
    for name in edgeq.__all__:
        assert getattr(edgeq, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'exprot'"):
        edgeq.exprot  # noqa: B018
