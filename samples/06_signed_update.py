"""Update a model that is installed already: sign it, send what changed, apply it whole or not at all.

You learn to make a key, to sign packages, to make an update of what differs, and to apply it where only your key is
trusted. Where edgeq isn't installed, `python new.delta PACKAGE` applies it.

    pip install 'edgeq[images,sign,zoo]'
    python samples/06_signed_update.py build/06
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from upside_down import export

import edgeq
from edgeq.packaging import create_key


def main(out: Path) -> tuple[edgeq.Report, edgeq.Report]:
    """The update's sizes, and the report of the package it was applied to."""
    out.mkdir(parents=True, exist_ok=True)
    key, public = out / "team.pem", out / "team.pem.pub"
    if not key.exists():
        create_key(key)
    for name, calibration in (("old", 16), ("new", 20)):  # more pictures to calibrate on
        edgeq.package([export(out, f"{name}.edgeq", calibration=calibration)], key=key)
    installed = out / "installed.edgeq"
    shutil.rmtree(installed, ignore_errors=True)
    shutil.copytree(out / "old.edgeq", installed)
    made = edgeq.make_update(out / "old.edgeq", out / "new.edgeq", out / "new.delta")
    return made, edgeq.update(out / "new.delta", installed, trust=public)


if __name__ == "__main__":
    made, report = main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/06"))
    print(f"the update is {made.check('delta_ratio').value:.1%} of the package")  # noqa: T201
    print(report.notices[-1].message)  # noqa: T201
