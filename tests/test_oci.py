"""The form oci: every descriptor says the truth of its blob, and the layer holds the package."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgeq.cli import main
from edgeq.packaging import PACKAGES, write_directory
from tests.packaged import classifier, files


def _descriptors(tree: Any) -> Iterator[dict[str, Any]]:
    if isinstance(tree, dict):
        if "digest" in tree:
            yield tree
        for branch in tree.values():
            yield from _descriptors(branch)
    elif isinstance(tree, list):
        for branch in tree:
            yield from _descriptors(branch)


def test_every_digest_is_that_of_its_blob(tmp_path: Path) -> None:
    folder = write_directory(classifier(tmp_path / "made"), tmp_path / "net.edgeq")
    out = PACKAGES["oci"](classifier(tmp_path / "made"), tmp_path / "image")
    assert json.loads((out / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    index = json.loads((out / "index.json").read_text())
    assert [row["platform"]["architecture"] for row in index["manifests"]] == ["amd64", "arm64"]
    seen: dict[str, bytes] = {}
    waiting = [*_descriptors(index)]
    while waiting:
        row = waiting.pop()
        kind, _, code = row["digest"].partition(":")
        data = (out / "blobs" / kind / code).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (code, row["size"])
        seen[row["mediaType"]] = data
        if row["mediaType"].endswith("manifest.v1+json"):
            waiting += _descriptors(json.loads(data))
    assert len(list((out / "blobs" / "sha256").iterdir())) == 5  # a layer; of each platform two
    layer = seen["application/vnd.oci.image.layer.v1.tar"]
    config = json.loads(seen["application/vnd.oci.image.config.v1+json"])
    assert config["rootfs"]["diff_ids"] == [f"sha256:{hashlib.sha256(layer).hexdigest()}"]
    with tarfile.open(fileobj=io.BytesIO(layer)) as archive:
        found = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    assert found == {f"model/{name}": data for name, data in files(folder).items()}
    assert files(PACKAGES["oci"](classifier(tmp_path / "made"), tmp_path / "again")) == files(out)


def test_an_image_becomes_a_folder_again(tmp_path: Path) -> None:
    out = PACKAGES["oci"](classifier(tmp_path / "made"), tmp_path / "image")
    assert main(["package", str(out), "-o", str(tmp_path / "back")]) == 0
    assert files(tmp_path / "back") == files(write_directory(classifier(tmp_path / "made"), tmp_path / "net.edgeq"))
