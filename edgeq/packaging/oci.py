"""The form ``oci``: an image layout with the package in one layer, for registries that hold containers (L8)."""

from __future__ import annotations

import hashlib
import json
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from edgeq.packaging.directory import fill
from edgeq.packaging.place import FORM, placed
from edgeq.packaging.project import name_of
from edgeq.packaging.record import Package

PLACE = "model"  # in the image: COPY --from=IMAGE /model /model
IMAGE = "application/vnd.oci.image"
ARCHITECTURES = ("amd64", "arm64")  # the files are the same: the loader picks a variant


def write_oci(package: Package, out: Path, *, force: bool = False) -> Path:
    """An OCI image layout for linux/amd64 and linux/arm64 that holds /model, to copy into images or push as it is."""
    out = out.resolve()
    with placed(out, force=force) as folder, tempfile.TemporaryDirectory(prefix="edgeq-") as staged:
        fill(package, Path(staged))
        layer = _layer(Path(staged), folder)
        manifests = [_image(architecture, layer, folder) for architecture in ARCHITECTURES]
        title = {"org.opencontainers.image.ref.name": name_of(package)}
        index = {
            "schemaVersion": 2,
            "mediaType": f"{IMAGE}.index.v1+json",
            "manifests": manifests,
            "annotations": title,
        }
        (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")
        (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}', encoding="utf-8")
        words = {"form": "oci", "archive": _path(layer["digest"]), "package": PLACE}
        (folder / FORM).write_text(json.dumps(words) + "\n", encoding="utf-8")
    return out


def _layer(staged: Path, folder: Path) -> dict[str, Any]:
    """All files as a tar, without dates and owners: the same package is the same layer."""
    path = folder / "layer.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for file in sorted(path for path in staged.rglob("*") if path.is_file()):
            info = tarfile.TarInfo(f"{PLACE}/{file.relative_to(staged).as_posix()}")
            info.size, info.mode = file.stat().st_size, 0o644
            with file.open("rb") as data:
                archive.addfile(info, data)
    with path.open("rb") as data:
        digest = f"sha256:{hashlib.file_digest(data, 'sha256').hexdigest()}"
    place = folder / _path(digest)
    place.parent.mkdir(parents=True)
    size = path.stat().st_size
    path.rename(place)
    return {"mediaType": f"{IMAGE}.layer.v1.tar", "digest": digest, "size": size}


def _image(architecture: str, layer: dict[str, Any], folder: Path) -> dict[str, Any]:
    config = {
        "architecture": architecture, "os": "linux", "config": {},
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
    }  # fmt: skip
    manifest = {
        "schemaVersion": 2, "mediaType": f"{IMAGE}.manifest.v1+json",
        "config": _blob(config, f"{IMAGE}.config.v1+json", folder), "layers": [layer],
    }  # fmt: skip
    platform = {"architecture": architecture, "os": "linux"}
    return {**_blob(manifest, f"{IMAGE}.manifest.v1+json", folder), "platform": platform}


def _blob(tree: dict[str, Any], kind: str, folder: Path) -> dict[str, Any]:
    data = json.dumps(tree).encode()
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    (folder / _path(digest)).write_bytes(data)
    return {"mediaType": kind, "digest": digest, "size": len(data)}


def _path(digest: str) -> str:
    return f"blobs/{digest.replace(':', '/')}"
