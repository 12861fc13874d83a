"""What all forms that are projects share: a name, templates filled in, the package inside, a note where it lies (L8).

Templates are real files under ``templates/``: they can be read, linted and compiled as they are, but for words between
``@`` that a package fills in. What would be no Python with such words has the suffix ``.in``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgeq.errors import PackageError
from edgeq.packaging.directory import fill
from edgeq.packaging.golden import TEXT
from edgeq.packaging.place import FORM, placed
from edgeq.packaging.record import Package
from edgeq.version import __version__

TEMPLATES = Path(__file__).parent / "templates"


def name_of(package: Package) -> str:
    """A name that is one in every language: the source's, in small letters, digits and hyphens."""
    origin = str(package.report.source.get("origin", "")).rpartition(":")[2]
    word = re.sub(r"[^a-z0-9]+", "-", Path(origin).stem.lower()).strip("-") or "model"
    return word if word[0].isalpha() else f"model-{word}"


@contextmanager
def project(
    package: Package, out: Path, form: str, inner: str, *, force: bool = False
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A folder that becomes ``out``, with the package at ``inner`` already, and its manifest."""
    with placed(out, force=force) as folder:
        place = folder / inner
        place.mkdir(parents=True)
        manifest = fill(package, place)
        (folder / FORM).write_text(json.dumps({"form": form, "package": inner}) + "\n", encoding="utf-8")
        yield folder, manifest


def fill_templates(form: str, folder: Path, words: Mapping[str, str]) -> None:
    """The templates of ``form`` into ``folder``; ``@WORD@`` in names and texts becomes ``words["WORD"]``."""
    words = {"VERSION": __version__, **words}
    for template in sorted(path for path in (TEMPLATES / form).rglob("*") if path.is_file()):
        place = folder / _filled(template.relative_to(TEMPLATES / form).as_posix(), words).removesuffix(".in")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(_filled(template.read_text(encoding="utf-8"), words), encoding="utf-8")


def _filled(text: str, words: Mapping[str, str]) -> str:
    return re.sub(r"@([A-Z_]+)@", lambda found: words[found[1]], text)


def refuse_unread(package: Package, form: str) -> None:
    """PackageError for what the loaders of apps don't read: text as a golden input, buckets."""
    if any(variant.buckets for variant in package.variants):
        raise PackageError(
            f"the package has shape buckets, the loader of the form {form!r} takes models of one shape",
            hint="use the form dir, zip, python or oci, or export with --input instead of --bucket",
        )
    for name, array in (package.golden.inputs[0] if package.golden.inputs else {}).items():
        if array.dtype.kind in "OU":
            raise PackageError(
                f"input {name!r} takes text ({TEXT}), the loader of the form {form!r} takes numbers",
                hint="use the form dir, zip or python, or move the tokenizer out of the model",
            )
