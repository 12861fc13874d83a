"""What an app ships: package forms, a row each, and the manifest they share (L8)."""

from __future__ import annotations

from edgeq.packaging.android import write_android
from edgeq.packaging.cpp import write_cpp
from edgeq.packaging.delta import apply_delta, write_delta
from edgeq.packaging.directory import (
    check_files,
    combined,
    read_directory,
    read_manifest,
    verify_package,
    write_directory,
)
from edgeq.packaging.ios import write_ios
from edgeq.packaging.oci import write_oci
from edgeq.packaging.place import check_free, check_writable, is_package, package_in, unpacked
from edgeq.packaging.postprocess import Postprocessing, labels_of, postprocessing_of
from edgeq.packaging.record import Golden, Package, Variant
from edgeq.packaging.sign import create_key, read_public, sign
from edgeq.packaging.tensors import sharing_bytes
from edgeq.packaging.web import write_web
from edgeq.packaging.wheel import write_wheel
from edgeq.packaging.zipped import write_zip

PACKAGES = {
    "dir": write_directory,
    "zip": write_zip,
    "python": write_wheel,
    "cpp": write_cpp,
    "web": write_web,
    "oci": write_oci,
    "android": write_android,
    "ios": write_ios,
}

BUCKETED = ("dir", "zip", "python", "oci")  # those whose loader is load.py, which pads and cuts

__all__ = [
    "BUCKETED",
    "PACKAGES",
    "Golden",
    "Package",
    "Postprocessing",
    "Variant",
    "apply_delta",
    "check_files",
    "check_free",
    "check_writable",
    "combined",
    "create_key",
    "is_package",
    "labels_of",
    "package_in",
    "postprocessing_of",
    "read_directory",
    "read_manifest",
    "read_public",
    "sharing_bytes",
    "sign",
    "unpacked",
    "verify_package",
    "write_delta",
    "write_directory",
]
