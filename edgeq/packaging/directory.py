"""The form ``dir``: a folder, written, read back and verified; all other forms hold one (L8)."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgeq.errors import PackageError, RuntimeUnavailableError
from edgeq.ir import io
from edgeq.packaging import loader
from edgeq.packaging.golden import GOLDEN, GoldenWriter, read_golden
from edgeq.packaging.manifest import (
    LOADER,
    MANIFEST,
    MODEL,
    OWN,
    PAGE,
    REPORT,
    SUM,
    manifest,
    refuse_other_schema,
)
from edgeq.packaging.place import is_package, package_in, placed
from edgeq.packaging.record import Package, Variant
from edgeq.packaging.sign import sign
from edgeq.packaging.tensors import write_sharing
from edgeq.report import codec, html
from edgeq.run import buckets, pictures
from edgeq.run.session import RUNTIME_ERRORS
from edgeq.target.provider import first_line


def write_directory(package: Package, out: Path, *, force: bool = False) -> Path:
    """A folder: models, manifest, golden runs, reports and a loader of its own.

    Returns its absolute path. OutputError when ``out`` can't be written or holds something else.
    """
    out = out.resolve()
    with placed(out, force=force) as folder:
        fill(package, folder)
    return out


def fill(package: Package, folder: Path) -> dict[str, Any]:
    """All files of a package into an empty folder; returns the manifest."""
    models = _write_models(package.variants, folder)
    writer = GoldenWriter(folder / GOLDEN)
    golden = [writer.add(variant.golden) for variant in package.variants]
    libraries = [_write_kernels(variant, folder) for variant in package.variants]
    (folder / LOADER).write_text(loader_text(), encoding="utf-8")
    for variant, model in zip(package.variants, models, strict=True):
        report = replace(
            variant.report, artifact=variant.report.artifact and replace(variant.report.artifact, path=model)
        )
        (folder / report_file(model)).write_text(codec.to_json(report), encoding="utf-8")
        if model == MODEL:
            (folder / PAGE).write_text(html.render(report), encoding="utf-8")
    found = codec.encode(manifest(package, folder, models, golden, libraries))
    text = json.dumps(found, indent=2, ensure_ascii=False) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    (folder / SUM).write_bytes(f"{hashlib.sha256(text.encode()).hexdigest()}  {MANIFEST}\n".encode())
    if package.key is not None:
        sign(folder, package.key)
    return dict(found)


def loader_text() -> str:
    """``load.py``: the loader with the code it imports from edgeq in place of the import."""
    text = inspect.getsource(loader)
    for module in (buckets, pictures):
        before, line, after = text.partition(f"from {module.__name__} import ")
        assert line, f"the loader imports {module.__name__} in one line"
        held = inspect.getsource(module).partition("import numpy as np\n")[2].strip()
        text = before + held + "\n" + after.partition("\n")[2]
    return text


def report_file(model: str) -> str:
    """``model.onnx`` -> ``report.json``, ``NAME.onnx`` -> ``NAME.report.json``."""
    return REPORT if model == MODEL else f"{model.removesuffix('.onnx')}.{REPORT}"


def _write_models(variants: tuple[Variant, ...], folder: Path) -> list[str]:
    """File names by variant. One model keeps the form it has; several share what they have in common."""
    if len(variants) == 1 and not variants[0].buckets:
        _copy_model(variants[0].model, folder)
        return [MODEL]
    names = [MODEL, *(f"{re.sub(r'[^A-Za-z0-9._-]', '-', variant.name)}.onnx" for variant in variants[1:])]
    places = [file for one, name in zip(variants, names, strict=True) for file in one.beside(folder / name)]
    write_sharing([file for variant in variants for file in variant.files], places)
    return names


def _write_kernels(variant: Variant, folder: Path) -> dict[str, str]:
    """System -> the file of its library; variants that were made with the same one share it."""
    names = {system: f"kernels-{system}-{io.file_digest(path)[:8]}.so" for system, path in variant.kernels.items()}
    for system, name in names.items():
        shutil.copyfile(variant.kernels[system], folder / name)
    return names


def _copy_model(model: Path, folder: Path) -> None:
    """Model as ``model.onnx`` and its external data under the names it knows them by."""
    model_file, *external = io.model_files(model)
    shutil.copyfile(model.parent / model_file, folder / MODEL)
    for relative in external:
        if relative.as_posix() in OWN:
            raise PackageError(
                f"external data {relative.as_posix()!r} of {str(model)!r} has the name of a package's own file",
                hint="save the model with another name for its external data",
            )
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(model.parent / relative, folder / relative)


def read_directory(folder: Path) -> Package:
    """A package in a folder, or in a project that holds one; artifacts' paths are made absolute. PackageError when it
    is altered."""
    folder = package_in(folder).resolve()
    found = read_manifest(folder)
    try:
        first, *others = (_read_variant(folder, row, found["golden"]) for row in found["variants"])
        return Package(
            first.model, first.report, first.golden, found["preprocessing"], tuple(found["labels"]), found["metadata"],
            found["postprocessing"], tuple(others), kernels=first.kernels,
        )  # fmt: skip
    except (OSError, ValueError, KeyError) as error:
        raise _altered(folder, error) from error


def _read_variant(folder: Path, row: dict[str, Any], golden: str) -> Variant:
    model = folder / row["model"]
    report = codec.from_json((folder / report_file(row["model"])).read_text(encoding="utf-8"))
    report = replace(report, artifact=report.artifact and replace(report.artifact, path=str(model)))
    libraries = {system: folder / name for system, name in row.get("kernels", {}).items()}
    return Variant(row["name"], model, report, read_golden(folder / golden, row["golden"]), libraries)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a package. PackageError when ``folder`` isn't one or its manifest can't be read."""
    if not is_package(folder):
        raise PackageError(
            f"{str(folder)!r} is no edgeq package: no {MANIFEST} in it", hint="make one with edgeq export"
        )
    try:
        found: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
    except ValueError as error:
        raise _altered(folder, ValueError(f"{MANIFEST} is altered: it isn't JSON any more, {error}")) from error
    except OSError as error:
        raise _altered(folder, error) from error
    refuse_other_schema(found, folder)
    return found


def check_files(folder: str | Path) -> None:
    """PackageError unless every byte of a package is what it was; for what runs elsewhere."""
    folder = package_in(Path(folder))
    found = read_manifest(folder)
    try:
        loader.read_manifest(folder)
        loader.check_files(folder, found)
    except (ValueError, KeyError, OSError) as error:
        raise _altered(folder, error) from error


def verify_package(folder: str | Path, *, trust: bytes = b"") -> dict[str, Any]:
    """Check digests, machine and golden outputs as the package's own loader does, and the signature by the Ed25519 key
    ``trust`` when one is given; returns the manifest.

    PackageError when a byte is altered, an output differs or the signature is another's, RuntimeUnavailableError when
    this machine can't run it.
    """
    folder = package_in(Path(folder))
    found = read_manifest(folder)
    try:
        loader.load(folder, fresh=True, trust=trust)
    except (ValueError, KeyError, OSError) as error:
        raise _altered(folder, error) from error
    except RUNTIME_ERRORS as error:
        raise PackageError(f"{str(folder)!r} can't be opened: {first_line(error)}", hint="export it again") from error
    except RuntimeError as error:
        raise RuntimeUnavailableError(str(error), hint="run it on the target, or export for this machine") from error
    return found


def _altered(folder: Path, error: Exception) -> PackageError:
    return PackageError(f"package {str(folder)!r}: {error}", hint="copy it again, or export it again")


def combined(packages: list[Package]) -> Package:
    """Several packages of one model as the variants of one; the first is preferred. PackageError unless inputs and
    outputs are the same."""
    first, *others = packages
    for other in others:
        for kind in ("inputs", "outputs"):
            found, wanted = _signatures(other, kind), _signatures(first, kind)
            if found != wanted:
                raise PackageError(
                    f"{str(other.model)!r} has the {kind} {found}, the first package {wanted}",
                    hint="combine packages made from the same model",
                )
    rows = tuple(variant for other in others for variant in other.variants)
    return replace(first, others=(*first.others, *rows))


def _signatures(package: Package, kind: str) -> dict[str, tuple[str, int]]:
    """Name -> dtype and rank, as the golden runs have them."""
    arrays: dict[str, Any] = getattr(package.golden, kind)[0] if package.golden.inputs else {}
    return {name: (np.asarray(array).dtype.name, np.ndim(array)) for name, array in arrays.items()}
