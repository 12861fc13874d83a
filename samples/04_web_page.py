"""Put a model on a web page that works offline: a picture from a file or the camera, the answer below it.

You learn that labels and preprocessing given to the export go all the way into the page, and that the page refuses a
package with a byte changed. Nothing that the camera sees leaves the browser.

    pip install 'edgeq[images,zoo]'
    python samples/04_web_page.py build/04
    cd build/04/web && npm install && npm start
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from upside_down import export


def main(out: Path) -> Path:
    """The npm package, in ``out/web``."""
    return export(out, "web", form="web")


if __name__ == "__main__":
    web = main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/04"))
    manifest = json.loads((web / "package/manifest.json").read_text(encoding="utf-8"))
    print(f"{web}: npm install && npm start")  # noqa: T201
    print(f"answers are {manifest['labels']}, from {manifest['postprocessing']}")  # noqa: T201
