"""``python -m tests.size``: how large the code is, file by file, and its longest functions."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LONGEST = 15


def main() -> None:
    """Print lines of each file of edgeq, the sum, and the longest functions."""
    files = sorted((ROOT / "edgeq").rglob("*.py"))
    texts = {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}
    lines = {name: len(text.splitlines()) for name, text in texts.items()}
    rows = [f"{count:6} {name}" for name, count in sorted(lines.items(), key=lambda item: -item[1])]
    functions = sorted((row for name, text in texts.items() for row in _functions(name, text)), reverse=True)
    longest = [f"{count:6} {name}" for count, name in functions[:LONGEST]]
    out = [*rows, f"{sum(lines.values()):6} in {len(files)} files, {len(functions)} functions; the longest:", *longest]
    sys.stdout.write("\n".join(out) + "\n")


def _functions(name: str, text: str) -> list[tuple[int, str]]:
    """(lines, ``file:line function``) of each function, docstring included."""
    return [
        ((node.end_lineno or node.lineno) - node.lineno + 1, f"{name}:{node.lineno} {node.name}")
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


if __name__ == "__main__":
    main()
