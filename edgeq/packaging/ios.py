"""The form ``ios``: a Swift package with the model as its resources (L8)."""

from __future__ import annotations

import hashlib
from pathlib import Path

from edgeq.packaging.manifest import MANIFEST
from edgeq.packaging.project import fill_templates, name_of, project, refuse_unread
from edgeq.packaging.record import Package

ORT_IOS = "1.24.0"


def write_ios(package: Package, out: Path, *, force: bool = False) -> Path:
    """A Swift package: resources and a loader that checks itself; generated, never compiled by edgeq's tests."""
    refuse_unread(package, "ios")
    out = out.resolve()
    module = "".join(word.capitalize() for word in name_of(package).split("-")) + "Model"
    inner = f"Sources/{module}/package"
    with project(package, out, "ios", inner, force=force) as (folder, _):
        digest = hashlib.sha256((folder / inner / MANIFEST).read_bytes()).hexdigest()
        fill_templates("ios", folder, {"MODULE": module, "DIGEST": digest, "ORT_IOS": ORT_IOS})
    return out
