"""The form ``cpp``: a CMake project with loader and program, which loads ONNX Runtime when it starts (L8)."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from edgeq.packaging.manifest import MANIFEST, SUM
from edgeq.packaging.project import fill_templates, name_of, project, refuse_unread
from edgeq.packaging.record import Package
from edgeq.run.device.runners import NATIVE

INNER = "package"


def write_cpp(package: Package, out: Path, *, force: bool = False) -> Path:
    """A CMake project: a C++17 loader that checks itself, and a program; needs libonnxruntime when it runs."""
    refuse_unread(package, "cpp")
    out = out.resolve()
    with project(package, out, "cpp", INNER, force=force) as (folder, manifest):
        fill_templates("cpp", folder, {"NAME": name_of(package)})
        for source in NATIVE.iterdir():
            shutil.copyfile(source, folder / source.name)
        text = contents(manifest, folder / INNER)
        (folder / "contents.hpp").write_text(text, encoding="utf-8")
    return out


def contents(manifest: dict[str, Any], place: Path) -> str:
    """``contents.hpp``: the manifest as C++ tables."""
    own = {name: hashlib.sha256((place / name).read_bytes()).hexdigest() for name in (MANIFEST, SUM)}
    files = [[name, facts["sha256"], facts["needed"]] for name, facts in manifest["files"].items()]
    files += [[name, digest, name == MANIFEST] for name, digest in own.items()]
    before, canary, after = manifest["preprocessing"], manifest["canary"], manifest["postprocessing"]
    rows = {
        "std::vector<File> files": files,
        "std::vector<Variant> variants": [_variant(row) for row in manifest["variants"]],
        "std::vector<const char*> inputs": [row["name"] for row in manifest["inputs"]],
        "std::vector<const char*> outputs": [row["name"] for row in manifest["outputs"]],
        "std::vector<const char*> labels": manifest["labels"],
        "Preprocessing preprocessing": _preprocessing(before),
        "Canary canary": [canary["height"], canary["width"], canary["at"], canary["values"], canary["tolerance"]]
        if canary
        else [0, 0, [], [], 0.0],
        "Postprocessing postprocessing": [after["output"], after["activation"], after["top"], after["threshold"]]
        if after
        else ["", "none", 0, 0.0],
    }
    functions = "\n".join(
        f"inline const {kind.rpartition(' ')[0]}& {kind.rpartition(' ')[2]}() {{\n"
        f"  static const {kind.rpartition(' ')[0]} table{literal(value)};\n  return table;\n}}\n"
        for kind, value in rows.items()
    )
    return (
        "// Written by edgeq from package/manifest.json: the digests this program trusts.\n#pragma once\n"
        '#include "records.hpp"\n\nnamespace edgeq::contents {\n\n'
        f"inline constexpr const char* manifest_sha256 = {literal(own[MANIFEST])};\n"
        f"inline constexpr const char* golden = {literal(manifest['golden'])};\n\n"
        f"{functions}\n}}  // namespace edgeq::contents\n"
    )


def _variant(row: dict[str, Any]) -> list[Any]:
    needs, golden = row["requires"], row["golden"]
    runs = [
        [[[name, *reference.values()] for name, reference in run[kind].items()] for kind in ("inputs", "outputs")]
        for run in golden["runs"]
    ]
    isa = [entry.split("|") for entry in needs["isa"]]
    libraries = [list(pair) for pair in row["kernels"].items()]
    pairs = [list(pair) for pair in row["session"].items()], [list(pair) for pair in golden["tolerances"].items()]
    return [row["name"], row["model"], needs["provider"], isa, pairs[0], libraries, runs, pairs[1]]


def _preprocessing(how: dict[str, Any]) -> list[Any]:
    if not how:
        return [False, [], [], "bilinear", 1.0, [0.0], [1.0], "NCHW", "RGB", "float32"]
    resize = how["resize"] if isinstance(how["resize"], list) else [how["resize"]] if how["resize"] else []
    return [
        True, resize, how["crop"] or [], how["interpolation"], how["scale"], how["mean"], how["std"], how["layout"],
        how["channels"], how.get("dtype", "float32"),
    ]  # fmt: skip


def literal(value: Any) -> str:
    """Plain data as a C++ initializer; numbers with all their digits."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, Iterable):
        return "{" + ", ".join(map(literal, value)) + "}"
    return repr(value)
