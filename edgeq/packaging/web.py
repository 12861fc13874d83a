"""The form ``web``: an npm package and a page that works without a network (L8)."""

from __future__ import annotations

import hashlib
from pathlib import Path

from edgeq.packaging.manifest import MANIFEST
from edgeq.packaging.project import fill_templates, name_of, project, refuse_unread
from edgeq.packaging.record import Package

INNER = "package"
ORT_WEB = "1.30.0"  # the newest onnxruntime-web that packages were opened with


def write_web(package: Package, out: Path, *, force: bool = False) -> Path:
    """An npm package for browsers: a loader that checks itself, a demo page with file and camera, offline too."""
    refuse_unread(package, "web")
    out = out.resolve()
    with project(package, out, "web", INNER, force=force) as (folder, _):
        digest = hashlib.sha256((folder / INNER / MANIFEST).read_bytes()).hexdigest()
        fill_templates("web", folder, {"NAME": name_of(package), "DIGEST": digest, "ORT_WEB": ORT_WEB})
    return out
