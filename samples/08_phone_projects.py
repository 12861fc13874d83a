"""Take a model into a phone's app: a Gradle module for Android and a Swift package for iOS, from one package.

You learn what an app's project gets: the model and its labels as assets, preprocessing and the answer in the loader's
own language, golden runs that it repeats on first start, and the operators that a reduced runtime has to have.

    pip install 'edgeq[images,zoo]'
    python samples/08_phone_projects.py build/08
"""

from __future__ import annotations

import sys
from pathlib import Path

from upside_down import export

import edgeq


def main(out: Path) -> list[Path]:
    """The two projects."""
    package = export(out, "net.edgeq")
    for form in ("android", "ios"):
        edgeq.package([package], out=out / form, form=form, force=True)
    return [out / "android", out / "ios"]


if __name__ == "__main__":
    for project in main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/08")):
        print(project)  # noqa: T201
        for path in sorted(path for path in project.rglob("*") if path.suffix in (".kt", ".kts", ".swift", ".config")):
            print(f"    {path.relative_to(project)}")  # noqa: T201
