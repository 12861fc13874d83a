"""The form ios: what can be told without a Swift compiler, which no registry has: structure, digests, balance."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from edgeq.packaging import PACKAGES, verify_package
from tests.packaged import classifier


def test_the_package_is_laid_out_as_swift_wants_it(tmp_path: Path) -> None:
    out = PACKAGES["ios"](classifier(tmp_path / "made"), tmp_path / "ios")
    verify_package(out)
    sources = out / "Sources" / "NetModel"
    assert {path.name for path in sources.glob("*.swift")} == {"Model.swift", "Pictures.swift", "Records.swift"}
    manifest = (sources / "package" / "manifest.json").read_bytes()
    assert f'"{hashlib.sha256(manifest).hexdigest()}"' in (sources / "Model.swift").read_text()
    described = (out / "Package.swift").read_text()
    assert 'targets: ["NetModel"]' in described
    assert '.copy("package")' in described
    for path in (out / "Package.swift", *sources.glob("*.swift")):
        text = path.read_text()
        assert not re.search(r"@[A-Z_]+@", text), path.name
        code = re.sub(r'"(\\.|[^"\\])*"|//.*', "", text)
        for opening, closing in ("()", "[]", "{}"):
            assert code.count(opening) == code.count(closing), (path.name, opening)


def test_keys_that_swift_decodes_are_in_the_manifest(tmp_path: Path) -> None:
    """Every stored property of the records that are read as JSON is a key of it."""
    out = PACKAGES["ios"](classifier(tmp_path / "made"), tmp_path / "ios")
    manifest = verify_package(out)
    variant = manifest["variants"][0]
    run = variant["golden"]["runs"][0]
    records = {
        "Manifest": manifest, "Variant": variant, "Needs": variant["requires"], "Golden": variant["golden"], "Run": run,
        "Reference": run["inputs"]["image"], "Canary": manifest["canary"], "Signature": manifest["inputs"][0],
        "Preprocessing": manifest["preprocessing"], "Postprocessing": manifest["postprocessing"],
        "FileFacts": manifest["files"]["model.onnx"],
    }  # fmt: skip
    text = (out / "Sources" / "NetModel" / "Records.swift").read_text()
    decoded = re.findall(r"struct (\w+): Decodable \{(.*?)(?:\n\}|\}\n|enum )", text, re.DOTALL)
    assert {name for name, _ in decoded} == set(records)
    for name, body in decoded:
        keys = set(re.findall(r"let (\w+):", body))
        assert keys
        assert keys <= set(records[name]), name
