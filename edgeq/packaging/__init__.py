"""What an app ships: package forms, a row each, and the manifest they share (L8)."""

from __future__ import annotations

from edgeq.packaging.directory import (
    check_free,
    check_writable,
    is_package,
    read_directory,
    read_manifest,
    verify_package,
    write_directory,
)
from edgeq.packaging.manifest import Golden, Package

PACKAGES = {"dir": write_directory}

__all__ = [
    "PACKAGES",
    "Golden",
    "Package",
    "check_free",
    "check_writable",
    "is_package",
    "read_directory",
    "read_manifest",
    "verify_package",
    "write_directory",
]
