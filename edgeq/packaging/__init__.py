"""What an app ships: package forms, a row each, and the manifest they share (L8)."""

from __future__ import annotations

from edgeq.packaging.directory import combined, read_directory, read_manifest, verify_package, write_directory
from edgeq.packaging.place import check_free, check_writable, is_package, package_in
from edgeq.packaging.postprocess import Postprocessing, labels_of, postprocessing_of
from edgeq.packaging.record import Golden, Package, Variant

PACKAGES = {"dir": write_directory}

__all__ = [
    "PACKAGES",
    "Golden",
    "Package",
    "Postprocessing",
    "Variant",
    "check_free",
    "check_writable",
    "combined",
    "is_package",
    "labels_of",
    "package_in",
    "postprocessing_of",
    "read_directory",
    "read_manifest",
    "verify_package",
    "write_directory",
]
