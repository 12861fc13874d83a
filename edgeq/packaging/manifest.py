"""What a package says of itself: its ``manifest.json`` (L8).

The manifest holds the sha256 of every other file and ``manifest.sha256`` holds the manifest's own, in the form
``sha256sum -c`` reads, so each byte of a package is covered and any language can check it. ``manifest.sig``, where
there is one, is a signature of the manifest and so of all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from edgeq.errors import PackageError
from edgeq.ir import io
from edgeq.packaging.golden import GOLDEN
from edgeq.packaging.record import Package, Variant
from edgeq.report.record import Report
from edgeq.run.pictures import canary_picture, preprocess
from edgeq.target.detect import VNNI_FLAGS
from edgeq.version import __version__

SCHEMA = 2
MODEL = "model.onnx"
TENSORS = "tensors.bin"
MANIFEST = "manifest.json"
SUM = "manifest.sha256"
SIGNATURE = "manifest.sig"
REPORT, PAGE, LOADER = "report.json", "report.html", "load.py"
OWN = (MODEL, TENSORS, GOLDEN, MANIFEST, SUM, SIGNATURE, REPORT, PAGE, LOADER)
OLDEST_RUNTIME = "1.24"  # the oldest ONNX Runtime edgeq itself installs with; older ones were never tried
CANARY_SIDES, CANARY_VALUES, CANARY_TOLERANCE = (61, 83), 64, 1e-5


def manifest(
    package: Package,
    folder: Path,
    models: Sequence[str],
    golden: Sequence[dict[str, Any]],
    libraries: Sequence[dict[str, str]],
) -> dict[str, Any]:
    """The manifest of a package whose files lie in ``folder`` already: ``models[i]`` is the file, ``golden[i]`` the
    golden runs and ``libraries[i]`` the libraries of kernels of variant i."""
    first = io.read(folder / models[0])
    files = [file for one, name in zip(package.variants, models, strict=True) for file in one.beside(folder / name)]
    needed = {GOLDEN, *(path.as_posix() for file in files for path in io.model_files(file))}
    inputs = [value for value in first.graph.inputs if value.name not in first.graph.initializers]
    opened = _open_axes(package.variants[0])
    return {
        "schema": SCHEMA,
        "versions": {"edgeq": __version__, "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__},
        "variants": [_variant(*row, folder) for row in zip(package.variants, models, golden, libraries, strict=True)],
        "inputs": [_signature(value, opened) for value in inputs],
        "outputs": [_signature(value, opened) for value in first.graph.outputs],
        "golden": GOLDEN,
        "preprocessing": dict(package.preprocessing),
        "canary": canary(package.preprocessing),
        "postprocessing": dict(package.postprocessing),
        "labels": list(package.labels),
        "metadata": dict(package.metadata),
        "components": _components(package),
        "files": {
            path.relative_to(folder).as_posix(): _facts(path, path.relative_to(folder).as_posix() in needed)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        },
    }


def _variant(
    variant: Variant, model: str, golden: dict[str, Any], libraries: dict[str, str], folder: Path
) -> dict[str, Any]:
    target, coverage = variant.report.target, variant.report.coverage
    return {
        "name": variant.name,
        "model": model,
        "recipe": variant.report.recipe,
        "target": target.get("name", ""),
        "requires": {
            "onnxruntime": OLDEST_RUNTIME,
            "provider": target.get("provider", "CPUExecutionProvider"),
            **{key: target[key] for key in ("library", "options") if target.get(key)},
            "isa": _needed_isa(variant.report),
            "opset": io.read(folder / model).opset_imports[""],
        },
        "session": dict(target.get("session", {})),
        "golden": golden,
        "kernels": libraries,
        **({"buckets": _buckets(variant, model)} if variant.buckets else {}),
        "checks": {check.name: check.value for check in variant.report.checks},
        "decisions": {
            "kernels": {} if coverage is None else dict(coverage.kernels),
            "float": [] if coverage is None else [[row.node, row.op, row.reason] for row in coverage.float_islands],
            "formats": {str(row["name"]): str(row.get("format", "")) for row in variant.report.layers},
        },
    }


def _buckets(variant: Variant, model: str) -> dict[str, Any]:
    """What the loader needs to choose a file, pad its inputs and cut its outputs."""
    return {"models": [file.name for file in variant.beside(Path(model))], **variant.buckets}


def _open_axes(variant: Variant) -> dict[tuple[str, int], str | None]:
    """Axes of inputs and outputs that have any size up to the largest bucket's, and the dimension's name."""
    if not variant.buckets:
        return {}
    named = variant.buckets["open"].items()
    inputs = {(name, axis): dim for name, dims in named for axis, dim in enumerate(dims) if dim}
    return {**inputs, **{(row["output"], row["axis"]): None for row in variant.buckets["cuts"]}}


def canary(preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """What the loaders' preprocessing must make of a picture any language can draw; {} without preprocessing."""
    if not preprocessing:
        return {}
    height, width = CANARY_SIDES
    values = preprocess(canary_picture(height, width), dict(preprocessing)).ravel()
    at = np.linspace(0, values.size - 1, CANARY_VALUES).astype(int).tolist()
    tolerance = CANARY_TOLERANCE * max(1.0, float(np.abs(values).max()))
    return {
        "height": height, "width": width, "at": at, "values": [float(values[i]) for i in at], "tolerance": tolerance,
    }  # fmt: skip


def _components(package: Package) -> list[dict[str, Any]]:
    """What an app ships or needs, with its licence: the bill of materials."""
    made = package.report.source
    licence = package.metadata.get("licence", "not stated")
    return [
        {"name": "model", "licence": licence, "made_from": {"kind": made.get("kind"), "digest": made.get("digest")}},
        {"name": LOADER, "version": __version__, "licence": "Apache-2.0"},
        {"name": "onnxruntime", "version": f">={OLDEST_RUNTIME}", "licence": "MIT", "shipped": False},
        {"name": "numpy", "version": ">=2.0", "licence": "BSD-3-Clause", "shipped": False},
    ]


def _needed_isa(report: Report) -> list[str]:
    """The target's CPU flags, less VNNI where the file is certified to give the same integers without it."""
    certified = report.saturation is not None and not report.saturation.flagged
    entries = report.target.get("isa", ())
    return [entry for entry in entries if not (certified and VNNI_FLAGS.issuperset(entry.split("|")))]


def _signature(value: ir.Value, opened: Mapping[tuple[str, int], str | None]) -> dict[str, Any]:
    """Name, ONNX element type and shape; a dynamic dimension, such as those in ``opened``, is its name, or null."""
    dims = [dim if isinstance(dim, int) else dim.value for dim in value.shape or ()]
    dims = [opened.get((str(value.name), axis), dim) for axis, dim in enumerate(dims)]
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
