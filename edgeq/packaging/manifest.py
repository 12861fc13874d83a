"""What a package says of itself: the Package record and its ``manifest.json`` (L8).

The manifest holds the sha256 of every other file and ``manifest.sha256`` holds the manifest's own, in the form
``sha256sum -c`` reads, so each byte of a package is covered and any language can check it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime

from edgeq.errors import PackageError
from edgeq.ir import io
from edgeq.report.record import Report
from edgeq.run.record import Array, Feed
from edgeq.target.detect import VNNI_FLAGS
from edgeq.version import __version__

SCHEMA = 1
MODEL = "model.onnx"
MANIFEST = "manifest.json"
SUM = "manifest.sha256"
NEEDED = (MODEL, "golden.npz")  # with external data: what running needs; an app may leave the other files out
OWN = (*NEEDED, MANIFEST, SUM, "preprocessing.json", "load.py", "report.json", "report.html")
OLDEST_RUNTIME = "1.24"  # the oldest ONNX Runtime edgeq itself installs with; older ones were never tried


@dataclass(frozen=True)
class Golden:
    """Sample runs that an installed package must repeat: ``outputs[i]`` came from ``inputs[i]``.

    ``tolerances``: output name -> largest absolute difference allowed, in the output's unit.
    """

    inputs: tuple[Feed, ...]
    outputs: tuple[Feed, ...]
    tolerances: Mapping[str, float]

    @property
    def compared(self) -> dict[str, float]:
        """The tolerances of outputs that are numbers; text has no distance and isn't compared."""
        first = self.outputs[0] if self.outputs else {}
        return {name: tolerance for name, tolerance in self.tolerances.items() if first[name].dtype.kind in "fiub"}

    def arrays(self) -> dict[str, Array]:
        """Keys and arrays of ``golden.npz``: ``0/input/x``, ``0/output/y``, … Outputs that aren't compared stay out."""
        found: dict[str, Array] = {}
        for index, (feed, results) in enumerate(zip(self.inputs, self.outputs, strict=True)):
            found |= {f"{index}/input/{name}": _storable(array) for name, array in feed.items()}
            found |= {f"{index}/output/{name}": results[name] for name in self.compared}
        return found


def _storable(array: Array) -> Array:
    """Strings come as objects, which numpy would pickle; fixed-width text is plain data."""
    return array.astype(str) if array.dtype == object else array


@dataclass(frozen=True)
class Package:
    """All an app ships. ``model`` is a file (its external data beside it); ``metadata`` are words on the model itself,
    of which ``licence`` is read."""

    model: Path
    report: Report
    golden: Golden
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)


def model_files(model: Path) -> Iterator[Path]:
    """Paths relative to the model's folder: the model and its external data. ModelError when it can't be read."""
    yield Path(model.name)
    graphs = io.read(model).graphs()
    tensors = (value.const_value for graph in graphs for value in graph.initializers.values())
    yield from sorted({Path(tensor.location) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)})


def manifest(package: Package, folder: Path) -> dict[str, Any]:
    """The manifest of a package whose files lie in ``folder`` already."""
    model = io.read(folder / MODEL)
    target = package.report.target
    external = {path.as_posix() for path in model_files(folder / MODEL)}
    return {
        "schema": SCHEMA,
        "versions": {"edgeq": __version__, "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__},
        "model": MODEL,
        "recipe": package.report.recipe,
        "target": target.get("name", ""),
        "requires": {
            "onnxruntime": OLDEST_RUNTIME,
            "provider": target.get("provider", "CPUExecutionProvider"),
            "isa": _needed_isa(package.report),
            "opset": model.opset_imports[""],
        },
        "session": dict(target.get("session", {})),
        "inputs": [_signature(value) for value in model.graph.inputs if value.name not in model.graph.initializers],
        "outputs": [_signature(value) for value in model.graph.outputs],
        "golden": {"count": len(package.golden.inputs), "tolerances": package.golden.compared},
        "preprocessing": "preprocessing.json",
        "labels": list(package.labels),
        "licence": {"model": package.metadata.get("licence", "not stated"), "load.py": "Apache-2.0"},
        "metadata": dict(package.metadata),
        "files": {
            path.relative_to(folder).as_posix(): _facts(
                path, path.relative_to(folder).as_posix() in {*NEEDED, *external}
            )
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        },
    }


def _needed_isa(report: Report) -> list[str]:
    """The target's CPU flags, less VNNI where the file is certified to give the same integers without it."""
    certified = report.saturation is not None and not report.saturation.flagged
    entries = report.target.get("isa", ())
    return [entry for entry in entries if not (certified and VNNI_FLAGS.issuperset(entry.split("|")))]


def _signature(value: ir.Value) -> dict[str, Any]:
    """Name, ONNX element type and shape; a dynamic dimension is its name, or null without one."""
    dims = [dim if isinstance(dim, int) else dim.value for dim in value.shape or ()]
    return {"name": value.name, "dtype": value.dtype.name if value.dtype else "UNDEFINED", "shape": dims}


def _facts(path: Path, needed: bool) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"sha256": digest, "bytes": path.stat().st_size, "needed": needed}


def refuse_other_schema(found: Mapping[str, Any], folder: Path) -> None:
    """PackageError when ``found`` is no manifest this version can read."""
    if found.get("schema") != SCHEMA:
        raise PackageError(
            f"{folder / MANIFEST} has schema {found.get('schema')!r}, expected {SCHEMA}",
            hint="use the edgeq version that wrote the package, or export again",
        )
