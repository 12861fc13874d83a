"""What samples from 04 on share: a small classifier, pictures for it, and the export into a package.

The model is PP-OCR's text direction classifier as rapidocr ships it: is a line of text upright or upside down?
"""

from __future__ import annotations

import json
import random
import sysconfig
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

import edgeq

MODEL = Path(sysconfig.get_path("purelib")) / "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx"
PREPROCESSING = {"resize": [48, 192], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "channels": "BGR"}
LABELS = ("upright", "upside down")
WORDS = ("calibration", "coverage", "kernel", "latency", "quantize", "tensor", "scale", "model", "package", "report")


def line(seed: int) -> tuple[Image.Image, int]:
    """A drawn line of text, and whether it is upside down."""
    draw = random.Random(seed)
    image = Image.new("RGB", (240, 60), (draw.randint(190, 255),) * 3)
    font = ImageFont.load_default(draw.randint(24, 34))
    ImageDraw.Draw(image).text(
        (draw.randint(4, 24), 10), draw.choice(WORDS), font=font, fill=(draw.randint(0, 60),) * 3
    )
    turned = draw.random() < 0.5
    return (image.rotate(180) if turned else image), int(turned)


def write_pictures(folder: Path, count: int, seed: int) -> None:
    """Pictures and ``labels.csv``, a row ``file,class`` each."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = ["file,class"]
    for index in range(count):
        image, turned = line(seed + index)
        image.save(folder / f"{index}.png")
        rows.append(f"{index}.png,{turned}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")


def export(out: Path, name: str, *, form: str = "dir", calibration: int = 16) -> Path:
    """A package of the classifier at ``out / name``, with its preprocessing and labels."""
    write_pictures(out / "calibration", calibration, seed=1)
    write_pictures(out / "evaluation", 24, seed=1000)
    (out / "preprocessing.json").write_text(json.dumps(PREPROCESSING), encoding="utf-8")
    (out / "labels.txt").write_text("\n".join(LABELS), encoding="utf-8")
    edgeq.export(
        MODEL,
        calibration=str(out / "calibration"),
        evaluation=str(out / "evaluation"),
        preprocessing=out / "preprocessing.json",
        labels=out / "labels.txt",
        metric="top1",
        threads=[1],
        form=form,
        out=out / name,
        force=True,
    )
    return out / name
