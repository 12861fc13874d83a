"""Judge by what your users see: a text recogniser held to the characters it reads right.

You learn to yield samples from Python (dicts of inputs and a label, of any length), to write a metric (a function of a
sample's values and its label, higher is better), and to set the limit that decides whether an export passes.

    pip install 'edgeq[images,zoo]'
    python samples/03_custom_metric.py build/03

The recogniser is PP-OCRv4's as rapidocr ships it; naive INT8 reads nothing with it. The lines are drawn here.
"""

from __future__ import annotations

import difflib
import random
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console

import edgeq
from edgeq.report.text import render

MODEL = Path(sysconfig.get_path("purelib")) / "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx"
HEIGHT = 48
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


def lines(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Drawn lines of 5 to 12 random characters: ``x`` f32[1, 3, 48, width], the text as ``label``."""
    draw = random.Random(seed)
    for _ in range(count):
        text = "".join(draw.choices(LETTERS, k=draw.randint(5, 12)))
        font = ImageFont.load_default(draw.randint(26, 34))
        image = Image.new("RGB", (round(font.getlength(text)) + 16, HEIGHT), (draw.randint(190, 255),) * 3)
        ImageDraw.Draw(image).text((8, 4), text, font=font, fill=(draw.randint(0, 60),) * 3)
        pixels = np.asarray(image, np.float32) / 127.5 - 1
        yield {"x": np.ascontiguousarray(pixels.transpose(2, 0, 1)[None]), "label": text}


def calibration() -> Iterator[dict[str, Any]]:
    return lines(32, seed=1)


def evaluation() -> Iterator[dict[str, Any]]:
    return lines(64, seed=2)


@cache
def alphabet() -> list[str]:
    """What each class stands for: nothing, the characters in the file's metadata, a space."""
    metadata = {entry.key: entry.value for entry in onnx.load(MODEL).metadata_props}
    return ["", *metadata["character"].splitlines(), " "]


def read(scores: NDArray[np.float32]) -> str:
    """f32[steps, classes] -> text: the best class of each step, repeats once."""
    best = scores.argmax(1)
    return "".join(alphabet()[now] for now, before in zip(best, [-1, *best[:-1]], strict=True) if now != before)


def character_accuracy(values: Mapping[str, NDArray[Any]], label: str) -> float:
    """The share of the label's characters that are read, in order. ``values``: inputs, then outputs, by name."""
    *_, scores = values.values()
    blocks = difflib.SequenceMatcher(None, read(scores[0]), label, autojunk=False).get_matching_blocks()
    return sum(block.size for block in blocks) / len(label)


def main(out: Path) -> edgeq.Report:
    """Export into ``out/recogniser.edgeq``, losing at most half a point of accuracy."""
    return edgeq.export(
        MODEL,
        calibration=f"{__name__}:calibration",
        evaluation=f"{__name__}:evaluation",
        metric=f"{__name__}:character_accuracy",
        max_drop=0.005,
        threads=[1],
        out=out / "recogniser.edgeq",
        force=True,
    )


if __name__ == "__main__":
    report = main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/03"))
    Console().print(render(report))
    sys.exit(0 if report.passed else 1)
