"""The package as a directory: written whole or not at all, read back, verified (L8).

Files are made in a hidden sibling and renamed into place, so nobody ever sees half a package; ``force`` swaps an older
*package* out and refuses to touch anything else.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgeq.errors import OutputError, PackageError, RuntimeUnavailableError
from edgeq.packaging import loader
from edgeq.packaging.manifest import (
    MANIFEST,
    MODEL,
    OWN,
    SUM,
    Golden,
    Package,
    manifest,
    model_files,
    refuse_other_schema,
)
from edgeq.report import codec, html
from edgeq.run.session import RUNTIME_ERRORS
from edgeq.target.provider import first_line


def write_directory(package: Package, out: Path, *, force: bool = False) -> Path:
    """A directory: model, manifest, golden runs, reports and a loader of its own.

    Returns its absolute path. OutputError when ``out`` can't be written or holds something else.
    """
    out = out.resolve()
    check_free(out, force=force)
    with _staged(out) as folder:
        _copy_model(package.model, folder)
        np.savez_compressed(folder / "golden.npz", allow_pickle=False, **package.golden.arrays())
        _write_json(folder / "preprocessing.json", dict(package.preprocessing))
        shutil.copyfile(loader.__file__, folder / "load.py")
        artifact = package.report.artifact and replace(package.report.artifact, path=MODEL)
        report = replace(package.report, artifact=artifact)
        (folder / "report.json").write_text(codec.to_json(report), encoding="utf-8")
        (folder / "report.html").write_text(html.render(report), encoding="utf-8")
        _write_json(folder / MANIFEST, manifest(package, folder))
        digest = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
        (folder / SUM).write_bytes(f"{digest}  {MANIFEST}\n".encode())
        _swap(folder, out)
    return out


def check_free(out: Path, *, force: bool = False) -> None:
    """OutputError unless ``out`` is free, an empty folder or, with ``force``, a package, in a place that can be
    written. Ask before hours of work."""
    taken = out.exists() and not (out.is_dir() and not any(out.iterdir()))
    if taken and not is_package(out):
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
    """Whether ``folder`` looks like a package, whole or not."""
    return (folder / MANIFEST).is_file() and (folder / SUM).is_file()


@contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """A new hidden folder beside ``out`` that is gone afterwards, whatever happens (Ctrl-C too)."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise _unwritable(out, error) from error
    try:
        folder.chmod(0o755)  # mkdtemp's 0700 would keep a package from others
        yield folder
    except OSError as error:
        raise _unwritable(out, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unwritable(out: Path, error: OSError) -> OutputError:
    return OutputError(
        f"can't write {str(out)!r}: {error.strerror or error}", hint="choose another --out or free space"
    )


def _swap(folder: Path, out: Path) -> None:
    """Rename ``folder`` to ``out``; what was there is moved aside first, and back if the rename fails."""
    if not out.exists():
        folder.rename(out)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent)) / "replaced"
    out.rename(aside)
    try:
        folder.rename(out)
    except BaseException:
        aside.rename(out)
        raise
    finally:
        shutil.rmtree(aside.parent, ignore_errors=True)


def _copy_model(model: Path, folder: Path) -> None:
    """Model as ``model.onnx`` and its external data under the names it knows them by."""
    model_file, *external = model_files(model)
    shutil.copyfile(model.parent / model_file, folder / MODEL)
    for relative in external:
        if relative.as_posix() in OWN:
            raise PackageError(
                f"external data {relative.as_posix()!r} of {str(model)!r} has the name of a package's own file",
                hint="save the model with another name for its external data",
            )
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(model.parent / relative, folder / relative)


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(codec.encode(tree), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_directory(folder: Path) -> Package:
    """A package written by ``write_directory``, its artifact's path made absolute. PackageError when it is altered."""
    found = read_manifest(folder)
    try:
        report = codec.from_json((folder / "report.json").read_text(encoding="utf-8"))
        preprocessing = json.loads((folder / found["preprocessing"]).read_text(encoding="utf-8"))
        golden = _read_golden(folder, found)
    except (OSError, ValueError, KeyError) as error:
        raise _altered(folder, error) from error
    model = folder.resolve() / found["model"]
    report = replace(report, artifact=report.artifact and replace(report.artifact, path=str(model)))
    return Package(model, report, golden, preprocessing, tuple(found["labels"]), found["metadata"])


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a package. PackageError when ``folder`` isn't one or its manifest can't be read."""
    if not is_package(folder):
        raise PackageError(
            f"{str(folder)!r} is no edgeq package: no {MANIFEST} in it", hint="make one with edgeq export"
        )
    try:
        found: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError) as error:
        raise _altered(folder, error) from error
    refuse_other_schema(found, folder)
    return found


def _read_golden(folder: Path, found: dict[str, Any]) -> Golden:
    indices = range(found["golden"]["count"])
    with np.load(folder / "golden.npz", allow_pickle=False) as stored:
        inputs, outputs = (
            tuple(
                {key.split("/", 2)[2]: stored[key] for key in stored.files if key.startswith(f"{index}/{kind}/")}
                for index in indices
            )
            for kind in ("input", "output")
        )
    return Golden(inputs, outputs, found["golden"]["tolerances"])


def verify_package(folder: str | Path) -> dict[str, Any]:
    """Check digests, machine and golden outputs as the package's own loader does; returns the manifest.

    PackageError when a byte is altered or an output differs, RuntimeUnavailableError when this machine can't run it.
    """
    folder = Path(folder)
    found = read_manifest(folder)
    try:
        loader.load(folder)
    except (ValueError, KeyError, OSError) as error:
        raise _altered(folder, error) from error
    except RUNTIME_ERRORS as error:
        raise PackageError(f"{str(folder)!r} can't be opened: {first_line(error)}", hint="export it again") from error
    except RuntimeError as error:
        raise RuntimeUnavailableError(str(error), hint="run it on the target, or export for this machine") from error
    return found


def _altered(folder: Path, error: Exception) -> PackageError:
    return PackageError(f"package {str(folder)!r}: {error}", hint="copy it again, or export it again")
