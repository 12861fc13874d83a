"""The form ``android``: a Gradle module with assets, a Kotlin loader and the operators a small runtime needs (L8)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeq.ir import io
from edgeq.packaging.manifest import MANIFEST, OLDEST_RUNTIME
from edgeq.packaging.project import fill_templates, name_of, project, refuse_unread
from edgeq.packaging.record import Package

ORT_ANDROID = "1.24.0"
ASSETS = "src/main/assets"


def write_android(package: Package, out: Path, *, force: bool = False) -> Path:
    """A Gradle module: assets, a Kotlin loader that checks itself, operators for a smaller runtime."""
    refuse_unread(package, "android")
    out, name = out.resolve(), name_of(package)
    inner = f"{ASSETS}/edgeq/{name}"
    with project(package, out, "android", inner, force=force) as (folder, manifest):
        words = {"NAME": name, "MODULE": name.replace("-", "_"), "ORT_ANDROID": ORT_ANDROID}
        fill_templates("android", folder, words)
        digest = hashlib.sha256((folder / inner / MANIFEST).read_bytes()).hexdigest()
        tables = folder / "src/main/kotlin/edgeq/Contents.kt"
        tables.write_text(contents(manifest, digest, f"edgeq/{name}"), encoding="utf-8")
        text = required_operators([folder / inner / row["model"] for row in manifest["variants"]])
        (folder / "required_operators.config").write_text(text, encoding="utf-8")
    return out


def contents(manifest: Mapping[str, Any], digest: str, assets: str) -> str:
    """``Contents.kt``: the manifest as Kotlin tables."""
    before, canary, after = manifest["preprocessing"], manifest["canary"], manifest["postprocessing"]
    files = [_call("FileFacts", name, facts["sha256"], facts["needed"]) for name, facts in manifest["files"].items()]
    files.append(_call("FileFacts", MANIFEST, digest, True))
    rows = {
        "files": _list(files),
        "variants": _list([_variant(row) for row in manifest["variants"]]),
        "inputs": literal([row["name"] for row in manifest["inputs"]]),
        "labels: List<String>": literal(manifest["labels"]),
        "preprocessing: Preprocessing?": _preprocessing(before) if before else "null",
        "canary": _call("Canary", *canary.values()) if canary else "Canary(0, 0, listOf(), listOf(), 0.0)",
        "postprocessing: Postprocessing?": _call("Postprocessing", *after.values()) if after else "null",
    }
    # `canary` holds height, width, at, values, tolerance and `postprocessing` output, activation, top, threshold: the
    # order of the records' parameters.
    constants = {"MANIFEST_SHA256": digest, "GOLDEN": manifest["golden"], "ASSETS": assets}
    lines = [f"    const val {name} = {literal(value)}" for name, value in constants.items()]
    lines += [f"    val {name} = {text}" for name, text in rows.items()]
    return (
        "// Written by edgeq from manifest.json: the digests this app trusts.\npackage edgeq\n\nobject Contents {\n"
        + "\n".join(lines)
        + "\n}\n"
    )


def _variant(row: Mapping[str, Any]) -> str:
    golden = row["golden"]
    runs = [
        f"GoldenRun({', '.join(_list([_reference(*item) for item in run[kind].items()]) for kind in run)})"
        for run in golden["runs"]
    ]
    isa = [entry.split("|") for entry in row["requires"]["isa"]]
    words = [row["name"], row["model"], row["requires"]["provider"], isa, row["session"]]
    return f"Variant({', '.join(map(literal, words))}, {_list(runs)}, {literal(golden['tolerances'])})"


def _reference(name: str, facts: Mapping[str, Any]) -> str:
    shape = "listOf<Long>(" + ", ".join(f"{side}L" for side in facts["shape"]) + ")"
    return f"Reference({literal(name)}, {literal(facts['dtype'])}, {shape}, {facts['offset']}, {facts['bytes']})"


def _preprocessing(how: Mapping[str, Any]) -> str:
    resize = how["resize"] if isinstance(how["resize"], list) else [how["resize"]] if how["resize"] else []
    floats = (f"listOf({', '.join(f'{value!r}f' for value in how[key])})" for key in ("mean", "std"))
    return (
        f"Preprocessing({literal(resize)}, {literal(how['crop'] or [])}, {literal(how['interpolation'])}, "
        f"{how['scale']!r}f, {', '.join(floats)}, {literal(how['layout'])}, {literal(how['channels'])}, "
        f"{literal(how.get('dtype', 'float32'))})"
    )


def _call(name: str, *values: Any) -> str:
    return f"{name}({', '.join(map(literal, values))})"


def _list(texts: list[str]) -> str:
    return f"listOf({', '.join(texts)})"


def literal(value: Any) -> str:
    """Plain data as a Kotlin expression."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("$", "\\$")
    if isinstance(value, Mapping):
        return "mapOf(" + ", ".join(f"{literal(k)} to {literal(v)}" for k, v in value.items()) + ")"
    if isinstance(value, list | tuple):
        return _list([literal(item) for item in value])
    return repr(value)


def required_operators(models: list[Path]) -> str:
    """Operators by domain and opset, as ONNX Runtime's build script takes them to leave out all others.

    Of the models as they are: what the runtime fuses them into when it loads them must be built in as well, so build
    with the operators of ``com.microsoft``, or convert to ``.ort`` first."""
    found: dict[tuple[str, int], set[str]] = {}
    for path in models:
        model = io.read(path)
        for graph in model.graphs():
            for node in graph:
                found.setdefault((node.domain or "ai.onnx", model.opset_imports[node.domain]), set()).add(node.op_type)
    lines = [f"{domain};{opset};{','.join(sorted(ops))}" for (domain, opset), ops in sorted(found.items())]
    return "\n".join((f"# for onnxruntime >= {OLDEST_RUNTIME}: build.sh --include_ops_by_config", *lines, ""))
