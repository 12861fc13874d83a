"""``python -m tests.devices``: build what the device tests run on."""

from __future__ import annotations

import sys

from tests.devices import arm64

if __name__ == "__main__":
    lacking = arm64.lacking()
    sys.stdout.write(f"nothing is built: {lacking}\n" if lacking else f"{arm64.build()}\n")
