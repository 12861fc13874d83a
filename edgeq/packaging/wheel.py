"""The form ``python``: a wheel that pip installs with numpy and onnxruntime (L8)."""

from __future__ import annotations

import base64
import hashlib
import json
import tempfile
from pathlib import Path

from edgeq.packaging.directory import fill
from edgeq.packaging.manifest import MANIFEST, OLDEST_RUNTIME
from edgeq.packaging.place import FORM, placed
from edgeq.packaging.project import fill_templates, name_of
from edgeq.packaging.record import Package
from edgeq.packaging.zipped import pack
from edgeq.version import __version__


def write_wheel(package: Package, out: Path, *, force: bool = False) -> Path:
    """A folder with a wheel: `pip install`, then `import NAME; NAME.pipeline()`."""
    out = out.resolve()
    module = name_of(package).replace("-", "_")
    with placed(out, force=force) as folder, tempfile.TemporaryDirectory(prefix="edgeq-") as staged:
        inner = Path(staged) / module / "package"
        inner.mkdir(parents=True)
        fill(package, inner)
        fill_templates("python", inner.parent, {"MODULE": module})
        # The same version of edgeq makes many models: the manifest's digest tells them apart, for pip too.
        version = f"{__version__}+{hashlib.sha256((inner / MANIFEST).read_bytes()).hexdigest()[:12]}"
        _write_metadata(Path(staged), module, version)
        name = f"{module}-{version}-py3-none-any.whl"
        pack(Path(staged), folder / name)
        words = {"form": "python", "archive": name, "package": f"{module}/package"}
        (folder / FORM).write_text(json.dumps(words) + "\n", encoding="utf-8")
    return out


def _write_metadata(folder: Path, module: str, version: str) -> None:
    """``dist-info`` as the wheel format asks for: what it is, what it needs, the digest of each file."""
    place = folder / f"{module}-{version}.dist-info"
    place.mkdir()
    (place / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {module}\nVersion: {version}\n"
        "Summary: A model by edgeq that checks itself.\nRequires-Python: >=3.11\n"
        f"Requires-Dist: numpy>=1.26\nRequires-Dist: onnxruntime>={OLDEST_RUNTIME}\n",
        encoding="utf-8",
    )
    (place / "WHEEL").write_text(
        f"Wheel-Version: 1.0\nGenerator: edgeq {__version__}\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        encoding="utf-8",
    )
    record = place / "RECORD"
    rows = [_row(path, folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    record.write_text("".join(rows) + f"{record.relative_to(folder).as_posix()},,\n", encoding="utf-8")


def _row(path: Path, folder: Path) -> str:
    data = path.read_bytes()
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    return f"{path.relative_to(folder).as_posix()},sha256={digest},{len(data)}\n"
