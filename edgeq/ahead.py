"""Ahead-of-time compilation: one model, a context for each of several devices (L10)."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from edgeq.errors import OutputError, UsageError
from edgeq.given import model_file
from edgeq.target.context import Compiled, compile_context
from edgeq.target.load import load_target


def compile_for(model: str | Path, targets: Sequence[str], out: str | Path, *, force: bool = False) -> list[Compiled]:
    """A context of ``model`` (a file or a package) for each of ``targets``, in the folder ``out``: ``TARGET.onnx`` and
    the binary it names. All of them or, on an error, none. Raises ModelError, TargetError and OutputError."""
    chosen = [load_target(name) for name in targets]
    if len({target.name for target in chosen}) != len(chosen) or not chosen:
        raise UsageError(f"targets must differ, found {list(targets)}", hint="name each once")
    source, folder = model_file(Path(model)), Path(out)
    taken = [target.name for target in chosen if (folder / f"{target.name}.onnx").exists()]
    if taken and not force:
        raise OutputError(f"{folder / taken[0]}.onnx exists", hint="add --force to replace it, or choose another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".edgeq-", dir=folder) as name:
            made = [compile_context(source, target, Path(name) / f"{target.name}.onnx") for target in chosen]
            for path in Path(name).iterdir():
                shutil.move(path, folder / path.name)
    except OSError as error:
        raise OutputError(f"can't write {str(folder)!r}: {error.strerror}", hint="choose another --out") from error
    return [Compiled(folder / one.path.name, one.made_for, one.nodes) for one in made]
