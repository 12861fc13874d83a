"""Drawn lines and pages for PP-OCR's recogniser, detector and direction classifier, and their metrics.

Calibration takes seeds from 100 000, evaluation from 0 (lines, directions) and 1000 (pages), so no drawing is shared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.zoo.boxes import Boxes, matched
from tests.zoo.drawn_text import Image, line, page, phrases
from tests.zoo.packages import float_model, wanted
from tests.zoo.score import only_output

CALIBRATION_SEED = 100_000
PAGE_SEED = 1_000
DIRECTION_SEED = 5_000
HEIGHT = 48  # of a text line, as both line models take it
DIRECTION_WIDTH = 192
INKED, BOX_SCORE, GROW, SMALLEST = 0.3, 0.5, 1.6, 3  # DBNet's own postprocessing: arXiv:1911.08947, PaddleOCR defaults

Array = NDArray[np.float32]
Values = dict[str, Array]
Sample = dict[str, Any]


def line_calibration(count: int | None = None) -> Iterator[Sample]:
    return _lines(wanted(count, 128, "CALIBRATION"), CALIBRATION_SEED)


def line_evaluation(count: int | None = None) -> Iterator[Sample]:
    return _lines(wanted(count, 300, "EVALUATION"), 0)


def _lines(count: int, seed: int) -> Iterator[Sample]:
    for index, text in enumerate(phrases(count, seed + 1)):
        image = line(text, seed + index)
        image = image.resize((max(16, round(image.width * HEIGHT / image.height)), HEIGHT), 2)  # 2: bilinear
        yield {"x": _planes(image), "label": text}


def _planes(image: Image) -> Array:
    """RGB image -> BGR f32[1, 3, h, w] in -1..1."""
    pixels = np.asarray(image, np.float32)[:, :, ::-1] / 127.5 - 1
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])


@cache
def _characters() -> tuple[str, ...]:
    """The recogniser's alphabet, kept in its metadata: blank first, space last."""
    import onnx

    model = onnx.load(float_model("OCR4r"), load_external_data=False)
    (text,) = (entry.value for entry in model.metadata_props if entry.key == "character")
    return ("", *text.splitlines(), " ")


def decoded(values: Values) -> str:
    """Greedy CTC: f32[1, t, characters] -> text; repeats merged, blanks (index 0) dropped."""
    scores = only_output(values)
    best = scores[0].argmax(1)
    first = np.concatenate(([True], best[1:] != best[:-1]))
    return "".join(_characters()[index] for index in best[first & (best != 0)])


def character_accuracy(values: Values, label: str) -> float:
    """1 - edits / characters of one line, spaces ignored."""
    truth = str(label).replace(" ", "")
    return max(0.0, 1 - edits(decoded(values).replace(" ", ""), truth) / len(truth))


def edits(a: str, b: str) -> int:
    """Levenshtein's distance, row by row."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


def page_calibration(count: int | None = None) -> Iterator[Sample]:
    return _pages(wanted(count, 32, "CALIBRATION"), CALIBRATION_SEED)


def page_evaluation(count: int | None = None) -> Iterator[Sample]:
    return _pages(wanted(count, 40, "EVALUATION"), PAGE_SEED)


def _pages(count: int, seed: int) -> Iterator[Sample]:
    mean, deviation = (np.array(v, np.float32) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for index in range(count):
        image, boxes = page(seed + index)
        pixels = (np.asarray(image, np.float32)[:, :, ::-1] / 255 - mean) / deviation
        yield {"x": np.ascontiguousarray(pixels.transpose(2, 0, 1)[None]), "label": np.array(boxes, np.float32)}


def text_boxes(values: Values) -> Boxes:
    """DBNet's probability map f32[1, 1, h, w] -> f32[n, 4]: islands of ink, grown back by what training shrank."""
    from scipy import ndimage

    scores = only_output(values)
    ink = scores[0, 0]
    islands, _ = ndimage.label(ink > INKED, structure=np.ones((3, 3)))
    found = []
    for rows, columns in ndimage.find_objects(islands):
        height, width = rows.stop - rows.start, columns.stop - columns.start
        if min(height, width) >= SMALLEST and ink[rows, columns].mean() >= BOX_SCORE:
            grow = width * height * GROW / (2 * (width + height))
            found.append((columns.start - grow, rows.start - grow, columns.stop + grow, rows.stop + grow))
    return np.array(found, np.float32).reshape(-1, 4)


def box_hmean(pages: Sequence[Values], labels: Sequence[Boxes]) -> float:
    """Harmonic mean of precision and recall over all pages, at an intersection over union of 0.5."""
    found = [text_boxes(values) for values in pages]
    hits = sum(matched(boxes, truth, 0.5) for boxes, truth in zip(found, labels, strict=True))
    return 2 * hits / max(1, sum(map(len, found)) + sum(map(len, labels)))


box_hmean.corpus = True  # type: ignore[attr-defined]


def direction_calibration(count: int | None = None) -> Iterator[Sample]:
    return _directions(wanted(count, 128, "CALIBRATION"), CALIBRATION_SEED)


def direction_evaluation(count: int | None = None) -> Iterator[Sample]:
    return _directions(wanted(count, 300, "EVALUATION"), DIRECTION_SEED)


def _directions(count: int, seed: int) -> Iterator[Sample]:
    """Lines, every second one upside down, padded with zeros on the right to f32[1, 3, 48, 192]."""
    for index, text in enumerate(phrases(count, seed + 2, 10, 32)):
        image = line(text, seed + index)
        if turned := index % 2:
            image = image.rotate(180)
        width = min(DIRECTION_WIDTH, math.ceil(HEIGHT * image.width / image.height))
        x = np.zeros((1, 3, HEIGHT, DIRECTION_WIDTH), np.float32)
        x[..., :width] = _planes(image.resize((width, HEIGHT)))
        yield {"x": x, "label": turned}


def direction_accuracy(values: Values, label: int) -> float:
    """1.0 where the larger of f32[1, 2] says whether the line is upside down."""
    scores = only_output(values)
    return float(int(scores.argmax()) == label)
