"""Working on packages that are there: verify and write again, combine, update (L10)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from edgeq.errors import OutputError, UsageError
from edgeq.given import check_form
from edgeq.packaging import (
    PACKAGES,
    apply_delta,
    check_free,
    combined,
    is_package,
    labels_of,
    package_in,
    postprocessing_of,
    read_directory,
    read_public,
    sign,
    unpacked,
    verify_package,
    write_delta,
)
from edgeq.report import codec
from edgeq.report import html as page
from edgeq.report.compare import Comparison
from edgeq.report.compare import compare as side_by_side
from edgeq.report.record import Check, Notice, Report


def package(
    packages: Sequence[str | Path],
    *,
    out: str | Path | None = None,
    form: str = "dir",
    labels: str | Path | None = None,
    postprocessing: str | Path | None = None,
    key: str | Path | None = None,
    trust: str | Path | None = None,
    force: bool = False,
) -> Report:
    """Verify packages; with ``out``, write them there as one, their models as variants, the first preferred.

    ``key`` signs it (without ``out``, in place), ``trust`` is a public key that must have signed what is read. Returns
    the first package's report. Raises an EdgeqError for what the caller can mend.
    """
    check_form(form)
    if out is None and (len(packages) > 1 or labels or postprocessing):
        raise UsageError("nowhere to write to", hint="add -o PLACE")
    if out is not None:
        check_free(Path(out), force=force)
    trusted = read_public(None if trust is None else Path(trust))
    with ExitStack() as stack:
        folders = [stack.enter_context(unpacked(Path(path))) for path in packages]
        words = []
        for path, folder in zip(packages, folders, strict=True):
            verify_package(folder, trust=trusted)
            what = "every digest, this machine, the golden runs" + (", the signature" if trusted else "")
            words.append(Notice("info", "verified", f"verified {path}: {what}"))
        found = combined([read_directory(folder) for folder in folders])
        if labels or postprocessing:
            names = labels_of(labels) or found.labels
            answers = postprocessing_of(postprocessing, names, found.golden)
            found = replace(found, labels=names, postprocessing=answers)
        if out is not None:
            found = replace(found, key=None if key is None else Path(key))
            words.append(Notice("info", "written", f"written {PACKAGES[form](found, Path(out), force=force)}"))
        elif key is not None:
            if not is_package(Path(packages[0])):
                raise UsageError(f"{str(packages[0])!r} can't be signed in place", hint="add -o PLACE to sign a copy")
            sign(Path(packages[0]), Path(key))
            words.append(Notice("info", "signed", f"signed {packages[0]} with {key}"))
    return replace(found.report, notices=(*found.report.notices, *words))


def compare(
    first: str | Path, second: str | Path, *, html: str | Path | None = None, force: bool = False
) -> Comparison:
    """Two packages, or reports as JSON, side by side; ``html`` is where a page of it is written."""
    if html is not None and Path(html).exists() and not force:
        raise OutputError(f"{str(html)!r} exists", hint="add --force to replace it, or choose another --html")
    found = side_by_side((str(first), str(second)), _report(Path(first)), _report(Path(second)))
    if html is not None:
        try:
            Path(html).write_text(page.render_comparison(found), encoding="utf-8")
        except OSError as error:
            raise OutputError(f"can't write {str(html)!r}: {error.strerror}", hint="choose another --html") from error
    return found


def _report(path: Path) -> Report:
    if path.is_dir() or path.suffix != ".json":
        with unpacked(path) as folder:
            return read_directory(folder).report
    try:
        return codec.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"can't read report {str(path)!r}: {error}", hint="give a report.json or a package") from error


def make_update(old: str | Path, new: str | Path, out: str | Path) -> Report:
    """An update from one package to the next at ``out``: what changed and nothing else."""
    sizes = write_delta(Path(old), Path(new), Path(out))
    checks = (
        Check("delta_bytes", sizes["delta"], "bytes", note=f"written {out}"),
        Check("delta_ratio", sizes["delta"] / sizes["package"], note="to the whole package"),
    )
    return Report(source={"origin": [str(old), str(new)]}, target={}, recipe="delta", checks=checks)


def update(delta: str | Path, place: str | Path, *, trust: str | Path | None = None) -> Report:
    """Apply an update to the package at ``place``, whole or not at all; returns the report of what is there then."""
    trusted = read_public(None if trust is None else Path(trust))
    done = apply_delta(Path(delta), Path(place), trust=trusted)
    found = read_directory(package_in(Path(place))).report
    words = f"updated {place}: every digest, this machine, the golden runs" if done else f"{place} is that one already"
    return replace(found, notices=(*found.notices, Notice("info", "updated", words)))
