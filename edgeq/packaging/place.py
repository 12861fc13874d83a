"""Putting a package into its place: whole or not at all, and never over what is no package (L8).

Files are made in a hidden sibling and renamed into place, so nobody ever sees half a package. What was there is
exchanged for it in one step where the system can (``renameat2`` on Linux), so that a process killed at any moment
leaves the old one or the new one; elsewhere two renames come as near as they can.
"""

from __future__ import annotations

import json
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgeq.errors import OutputError, PackageError
from edgeq.packaging.manifest import MANIFEST, SUM
from edgeq.packaging.update import swap

FORM = "edgeq-form.json"  # in a project that holds a package: which form it has, and where the package lies in it


def check_free(out: Path, *, force: bool = False) -> None:
    """OutputError unless ``out`` is free, an empty folder or, with ``force``, a package, in a place that can be
    written. Ask before hours of work."""
    taken = out.exists() and not (out.is_dir() and not any(out.iterdir()))
    if taken and not holds_package(out):
        raise OutputError(f"{str(out)!r} exists and is no edgeq package", hint="choose another --out")
    if taken and not force:
        raise OutputError(
            f"{str(out)!r} holds a package already", hint="add --force to replace it, or choose another --out"
        )
    check_writable(out)


def check_writable(out: Path) -> None:
    """OutputError unless something can be made at ``out``. It is tried: permission bits say nothing to root, nor of a
    read-only file system."""
    beside = next(parent for parent in out.absolute().parents if parent.exists())
    try:
        Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=beside)).rmdir()
    except OSError as error:
        raise _unwritable(out, error) from error


def is_package(folder: Path) -> bool:
    """Whether ``folder`` looks like a package of the form ``dir``, whole or not."""
    return (folder / MANIFEST).is_file() and (folder / SUM).is_file()


def holds_package(path: Path) -> bool:
    """Whether ``path`` is a package of any form."""
    if path.is_file():
        return zipfile.is_zipfile(path) and MANIFEST in zipfile.ZipFile(path).namelist()
    return is_package(path) or (path / FORM).is_file()


def package_in(path: Path) -> Path:
    """The folder with the manifest: ``path`` itself, or a place inside a project. PackageError without one."""
    return path if is_package(path) else path / _form(path).get("package", "")


def _form(path: Path) -> dict[str, str]:
    """What a project says of the package in it: ``form``, ``package`` and, where that is packed, ``archive``."""
    if not (path / FORM).is_file():
        return {}
    try:
        return {str(key): str(value) for key, value in json.loads((path / FORM).read_text(encoding="utf-8")).items()}
    except (ValueError, AttributeError) as error:
        raise PackageError(f"{path / FORM} can't be read: {error}", hint="write the package again") from error


@contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """The folder with the manifest of a package of any form; a zip is unpacked for as long as it is looked at."""
    form = _form(path)
    archive, inner = (path / form["archive"], form["package"]) if "archive" in form else (path, "")
    if not archive.is_file() or not holds_package(path):
        yield package_in(path)
        return
    with tempfile.TemporaryDirectory(prefix="edgeq-") as folder:
        try:
            # Both drop absolute and upward paths.
            if zipfile.is_zipfile(archive):
                shutil.unpack_archive(archive, folder, "zip")
            else:
                shutil.unpack_archive(archive, folder, "tar", filter="data")
        except (zipfile.BadZipFile, tarfile.TarError, zlib.error, shutil.ReadError, OSError) as error:
            raise PackageError(f"{str(archive)!r} is damaged: {error}", hint="copy it again") from error
        yield Path(folder) / inner


@contextmanager
def placed(out: Path, *, force: bool = False) -> Iterator[Path]:
    """A new hidden folder that becomes ``out`` when the block ends well, and is gone otherwise (Ctrl-C too)."""
    check_free(out, force=force)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise _unwritable(out, error) from error
    try:
        folder.chmod(0o755)  # mkdtemp's 0700 would keep a package from others
        yield folder
        swap(folder, out)
    except OSError as error:
        raise _unwritable(out, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def placed_file(out: Path, *, force: bool = False) -> Iterator[Path]:
    """A new hidden file that becomes ``out`` when the block ends well, and is gone otherwise."""
    check_free(out, force=force)
    partial = out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(out)
    except OSError as error:
        raise _unwritable(out, error) from error
    finally:
        partial.unlink(missing_ok=True)


def _unwritable(out: Path, error: OSError) -> OutputError:
    return OutputError(
        f"can't write {str(out)!r}: {error.strerror or error}", hint="choose another --out or free space"
    )
