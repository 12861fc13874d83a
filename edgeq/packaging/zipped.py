"""The form ``zip``: a package in one file (L8)."""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path

from edgeq.packaging.directory import fill
from edgeq.packaging.place import placed_file
from edgeq.packaging.record import Package

EPOCH = (1980, 1, 1, 0, 0, 0)  # the oldest date a zip can hold: the same package is the same bytes


def write_zip(package: Package, out: Path, *, force: bool = False) -> Path:
    """A zip file with what a folder would hold; `edgeq package` takes it as it is."""
    out = out.resolve()
    with placed_file(out, force=force) as partial, tempfile.TemporaryDirectory(prefix="edgeq-") as folder:
        fill(package, Path(folder))
        pack(Path(folder), partial)
    return out


def pack(folder: Path, out: Path) -> None:
    """Every file of ``folder`` in one archive, sorted and without dates."""
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            info = zipfile.ZipInfo(path.relative_to(folder).as_posix(), EPOCH)
            info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(info, path.read_bytes())
