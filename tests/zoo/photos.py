"""ImageNet photos with classes, for EfficientNet-Lite0 and MobileNetV2.

The 500 photos of ``EDGEQ_IMAGENET500``, shuffled once, serve calibration from the front and evaluation from the back.
Without them evaluation has foolbox's 20 photos (class in the file name) and calibration takes random crops of
scikit-image's colour photos, which need no class.
"""

from __future__ import annotations

import csv
import os
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.zoo.packages import package_file, wanted
from tests.zoo.score import only_output

SIZE = 224
SEED = 7
CALIBRATION, EVALUATION = 128, 372
UNLABELLED = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "motorcycle_right.png", "rocket.jpg")
MEAN, DEVIATION = (np.array(v, np.float32) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

Image = Any  # PIL.Image.Image; PIL is imported only where it is used
Sample = dict[str, Any]


def lite_calibration(count: int | None = None) -> Iterator[Sample]:
    return ({"image": _lite(image), "label": label} for image, label in calibration_photos(count))


def lite_evaluation(count: int | None = None) -> Iterator[Sample]:
    return ({"image": _lite(image), "label": label} for image, label in evaluation_photos(count))


def mobilenet_calibration(count: int | None = None) -> Iterator[Sample]:
    return ({"image": _torchvision(image), "label": label} for image, label in calibration_photos(count))


def mobilenet_evaluation(count: int | None = None) -> Iterator[Sample]:
    return ({"image": _torchvision(image), "label": label} for image, label in evaluation_photos(count))


def top1(values: Mapping[str, NDArray[Any]], label: int) -> float:
    """1.0 where the largest logit of f32[1, 1000] is the class."""
    return float(int(only_output(values).argmax()) == label)


def _public500() -> list[tuple[Path, int]]:
    """(photo, class) in a fixed shuffled order; empty when the folder isn't named."""
    folder = os.environ.get("EDGEQ_IMAGENET500")
    if not folder:
        return []
    with (Path(folder) / "labels.csv").open() as file:
        rows = [(Path(folder) / Path(row[0]).name, int(row[1])) for row in csv.reader(file)]
    random.Random(SEED).shuffle(rows)
    return rows


def calibration_photos(count: int | None = None) -> Iterator[tuple[Image, int]]:
    """``count`` photos with their class, -1 where none is known; those of a second round are mirrored."""
    from PIL import Image as Images

    count = wanted(count, CALIBRATION, "CALIBRATION")
    if photos := _public500():
        return (_opened(*photos[index % len(photos)], mirrored=index >= len(photos)) for index in range(count))
    draw = random.Random(SEED)
    return ((_random_crop(Images.open(_unlabelled(i)).convert("RGB"), draw), -1) for i in range(count))


def _opened(path: Path, label: int, *, mirrored: bool = False) -> tuple[Image, int]:
    from PIL import Image as Images

    image = Images.open(path).convert("RGB")
    return (image.transpose(Images.Transpose.FLIP_LEFT_RIGHT) if mirrored else image), label


def _unlabelled(index: int) -> Path:
    return package_file(f"skimage/data/{UNLABELLED[index % len(UNLABELLED)]}")


def _random_crop(image: Image, draw: random.Random) -> Image:
    """A square of 35–100 % of the short side, mirrored half of the time."""
    from PIL import Image as Images

    side = round(min(image.size) * draw.uniform(0.35, 1.0))
    left, top = (draw.randint(0, extent - side) for extent in image.size)
    crop = image.crop((left, top, left + side, top + side))
    return crop.transpose(Images.Transpose.FLIP_LEFT_RIGHT) if draw.random() < 0.5 else crop


def evaluation_photos(count: int | None = None) -> Iterator[tuple[Image, int]]:
    """Up to ``count`` labelled photos that no calibration of at most ``CALIBRATION`` photos has seen."""
    count = wanted(count, EVALUATION, "EVALUATION")
    photos = _public500()[CALIBRATION:]
    if not photos:
        files = sorted(package_file("foolbox/data/imagenet_00_243.jpg").parent.glob("imagenet_*.jpg"))
        photos = [(path, int(path.stem.rpartition("_")[2])) for path in files]
    return (_opened(path, label) for path, label in photos[:count])


def _lite(image: Image) -> NDArray[np.float32]:
    """EfficientNet-Lite's: crop with a border of 32 pixels, bicubic, (x - 127) / 128 -> f32[1, 3, s, s]."""
    from PIL import Image as Images

    width, height = image.size
    side = int(SIZE / (SIZE + 32) * min(width, height))
    left, top = (width - side + 1) // 2, (height - side + 1) // 2
    crop = image.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Images.Resampling.BICUBIC)
    pixels = (np.asarray(crop, np.float32) - 127) / 128
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])


def _torchvision(image: Image) -> NDArray[np.float32]:
    """torchvision's: short side 256, centre 224, ImageNet mean and deviation -> f32[1, 3, s, s]."""
    from PIL import Image as Images

    scale = round(SIZE / 0.875) / min(image.size)
    image = image.resize([round(extent * scale) for extent in image.size], Images.Resampling.BILINEAR)
    left, top = ((extent - SIZE) // 2 for extent in image.size)
    pixels = np.asarray(image.crop((left, top, left + SIZE, top + SIZE)), np.float32) / 255
    return np.ascontiguousarray(((pixels - MEAN) / DEVIATION).transpose(2, 0, 1)[None])
