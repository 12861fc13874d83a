"""Measure a package on the device it is for: accuracy, latency, what ran where, and whether it slows down.

You learn the one call that measures anywhere, and what its report says of the device. This machine plays the device
unless you name another: a board over SSH, an Android phone over adb, the browser of a phone, which scans an address.

    pip install 'edgeq[device,images,zoo]'
    python samples/07_on_a_device.py build/07
    python samples/07_on_a_device.py build/07 ssh://pi@raspberrypi.local
    python samples/07_on_a_device.py build/07 'web://wasm?browser=phone'
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from upside_down import export

import edgeq
from edgeq.report.text import render


def main(out: Path, device: str) -> edgeq.Report:
    """The report of a package measured on ``device``."""
    package = export(out, "net.edgeq")
    return edgeq.validate(
        package, evaluation=str(out / "evaluation"), metric="top1", threads=[1], on=device, divergence=True, sustained=3
    )


if __name__ == "__main__":
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "build/07")
    report = main(out, sys.argv[2] if len(sys.argv) > 2 else "local")
    Console().print(render(report))
    for window in report.sustained["windows"]:
        print(f"{window['at_s']:5.1f} s  {window['p50_ms']:.3f} ms")  # noqa: T201
