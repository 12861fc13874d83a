"""Export an ONNX file you were given, and run the result: a text detector with samples in ``.npz`` files.

You learn the plainest form of samples (arrays named as the model's inputs, the first axis counts them), that a file of
an old opset with dynamic sizes needs no preparation, and how an app loads the package without edgeq installed.

    pip install 'edgeq[images,zoo]'
    python samples/02_bring_your_own_onnx.py build/02

The file is PP-OCRv4's detector as rapidocr ships it (opset 12); the pages are drawn here.
"""

from __future__ import annotations

import random
import runpy
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console

import edgeq
from edgeq.report.text import render

MODEL = Path(sysconfig.get_path("purelib")) / "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx"
MEAN, DEVIATION = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
SIDE = 320
WORDS = ("calibration", "coverage", "kernel", "latency", "quantize", "tensor", "scale", "model", "package", "report")


def page(seed: int) -> NDArray[np.float32]:
    """A drawn page as the detector takes it -> f32[3, 320, 320]."""
    draw = random.Random(seed)
    image = Image.new("RGB", (SIDE, SIDE), (draw.randint(200, 255),) * 3)
    for y in range(10, SIDE - 40, 42):
        font = ImageFont.load_default(draw.randint(14, 28))
        text = " ".join(draw.choices(WORDS, k=draw.randint(1, 2)))
        ImageDraw.Draw(image).text((draw.randint(5, 60), y), text, font=font, fill=(draw.randint(0, 80),) * 3)
    pixels: NDArray[np.float32] = (np.asarray(image, np.float32) / np.float32(255) - MEAN) / DEVIATION
    return pixels.transpose(2, 0, 1)


def main(out: Path) -> edgeq.Report:
    """Export into ``out/detector.edgeq``."""
    out.mkdir(parents=True, exist_ok=True)
    np.savez(out / "calibration.npz", x=np.stack([page(seed) for seed in range(16)]))
    np.savez(out / "evaluation.npz", x=np.stack([page(seed) for seed in range(100, 116)]))
    return edgeq.export(
        MODEL,
        calibration=str(out / "calibration.npz"),
        evaluation=str(out / "evaluation.npz"),
        metric="cosine",
        threads=[1],
        out=out / "detector.edgeq",
        force=True,
    )


def run(package: Path) -> NDArray[Any]:
    """What an app does: the package's own loader checks every digest and gives an ONNX Runtime session."""
    session = runpy.run_path(str(package / "load.py"))["load"](package)
    (ink,) = session.run(None, {session.get_inputs()[0].name: page(200)[None]})
    return np.asarray(ink)


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build/02")
    Console().print(render(main(folder)))
    print(f"share of the page that is text: {run(folder / 'detector.edgeq').mean():.1%}")  # noqa: T201
