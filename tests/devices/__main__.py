"""``python -m tests.devices``: build what the device tests run on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from edgeq.errors import RuntimeUnavailableError
from edgeq.run.device.web import distribution
from tests.devices import arm64

ONNXRUNTIME_WEB = "onnxruntime-web@1.30.0"


def web() -> None:
    """onnxruntime-web, where edgeq looks for it; npm runs none of its scripts, which download things."""
    try:
        distribution()
    except RuntimeUnavailableError:
        place = Path(os.environ.get("EDGEQ_CACHE") or Path.home() / ".cache/edgeq") / "web"
        command = ["npm", "install", "--silent", "--ignore-scripts", "--prefix", str(place), ONNXRUNTIME_WEB]
        if shutil.which("npm"):
            subprocess.run(command, check=True)


if __name__ == "__main__":
    lacking = arm64.lacking()
    web()
    sys.stdout.write(f"nothing is built: {lacking}\n" if lacking else f"{arm64.build()}\n")
