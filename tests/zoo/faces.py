"""Faces pasted at known places onto photos, for BlazeFace: scikit-image's LFW subset on scikit-image's photos.

Calibration uses the first 30 faces and evaluation the other 70.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.zoo.boxes import Boxes, matched, suppressed
from tests.zoo.packages import package_file, wanted

SIZE = 128
CANVAS = 256
FACES, CALIBRATION_FACES = 100, 30  # the file's first 100 pictures are faces
BACKGROUNDS = ("brick.png", "chelsea.png", "coffee.png", "grass.png", "gravel.png", "motorcycle_left.png", "rocket.jpg")
SCORES, OFFSETS = ("Identity:0", "Identity_1:0"), ("Identity_2:0", "Identity_3:0")  # of the two grids of anchors
ANCHOR_GRIDS = ((16, 2), (8, 6))  # cells a side, anchors a cell: arXiv:1907.05047
SURE, SAME = 0.6, 0.3  # least score of a face; overlap at which two boxes are one

Array = NDArray[np.float32]
Sample = dict[str, Any]


def calibration(count: int | None = None) -> Iterator[Sample]:
    return _samples(wanted(count, 128, "CALIBRATION"), 100_000, range(CALIBRATION_FACES))


def evaluation(count: int | None = None) -> Iterator[Sample]:
    return _samples(wanted(count, 200, "EVALUATION"), 0, range(CALIBRATION_FACES, FACES))


def _samples(count: int, seed: int, faces: range) -> Iterator[Sample]:
    for index in range(count):
        image, boxes = _composite(seed + index, faces)
        pixels = np.asarray(image.resize((SIZE, SIZE)), np.float32) / 127.5 - 1
        yield {"input:0": pixels[None], "label": np.array(boxes, np.float32) / CANVAS}


@cache
def _face_pictures() -> Array:
    """f32[100, 25, 25] in 0..1."""
    return np.asarray(np.load(package_file("skimage/data/lfw_subset.npy"))[:FACES], np.float32)


def _composite(seed: int, faces: range) -> tuple[Any, list[tuple[int, int, int, int]]]:
    """One or two faces on a grey background; two stand in different halves."""
    from PIL import Image as Images

    draw = random.Random(seed)
    canvas = Images.open(package_file(f"skimage/data/{draw.choice(BACKGROUNDS)}")).convert("L").resize((CANVAS,) * 2)
    boxes: list[tuple[int, int, int, int]] = []
    for number in draw.sample(faces, draw.randint(1, 2)):
        side = draw.randint(CANVAS // 4, round(CANVAS * 0.42))
        x = draw.randint(0, CANVAS // 2 - side) if not boxes else draw.randint(CANVAS // 2, CANVAS - side)
        y = draw.randint(0, CANVAS - side)
        face = Images.fromarray((_face_pictures()[number] * 255).astype(np.uint8))
        canvas.paste(face.resize((side, side), Images.Resampling.BICUBIC), (x, y))
        boxes.append((x, y, x + side, y + side))
    return canvas.convert("RGB"), boxes


@cache
def _anchors() -> Array:
    """Centres of the anchors f32[896, 2], as shares of the picture's sides."""
    grids = [
        np.repeat([((x + 0.5) / cells, (y + 0.5) / cells) for y in range(cells) for x in range(cells)], each, axis=0)
        for cells, each in ANCHOR_GRIDS
    ]
    return np.concatenate(grids).astype(np.float32)


def detected(values: Mapping[str, Array]) -> Boxes:
    """Scores f32[1, 512 and 384, 1] and offsets f32[1, 512 and 384, 16] -> faces f32[n, 4] in 0..1."""
    scores, offsets = (np.concatenate([values[name] for name in names], axis=1)[0] for names in (SCORES, OFFSETS))
    scores, offsets = scores[:, 0], offsets / SIZE
    centre, extent = offsets[:, :2] + _anchors(), offsets[:, 2:4]
    boxes = np.concatenate([centre - extent / 2, centre + extent / 2], axis=1)
    sure = scores > np.log(SURE / (1 - SURE))  # the score is a logit
    return suppressed(boxes[sure], scores[sure], SAME)


def f1(pictures: Sequence[Mapping[str, Array]], labels: Sequence[Boxes]) -> float:
    """F1 of faces over all pictures, at an intersection over union of 0.3 (LFW crops hold more than the face)."""
    found = [detected(values) for values in pictures]
    hits = sum(matched(boxes, truth, SAME) for boxes, truth in zip(found, labels, strict=True))
    return 2 * hits / max(1, sum(map(len, found)) + sum(map(len, labels)))


f1.corpus = True  # type: ignore[attr-defined]
