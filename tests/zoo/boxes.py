"""Boxes f32[n, 4] as left, top, right, bottom: overlap, matching and suppression, for both detectors."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Boxes = NDArray[np.float32]


def overlaps(a: Boxes, b: Boxes) -> NDArray[np.float32]:
    """Intersection over union of every pair -> f32[len(a), len(b)]."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    both = np.clip(high - low, 0, None).prod(-1)
    area_a, area_b = ((boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (a, b))
    return np.asarray(both / np.maximum(area_a[:, None] + area_b[None] - both, 1e-9), np.float32)


def matched(found: Boxes, truth: Boxes, least: float) -> int:
    """How many true boxes get a found one of their own with an overlap of at least ``least``, taken greedily."""
    if not len(found) or not len(truth):
        return 0
    scores = overlaps(truth, found)
    hits = 0
    for row in scores:
        if row.max() >= least:
            hits += 1
            scores[:, row.argmax()] = -1
    return hits


def suppressed(boxes: Boxes, scores: NDArray[np.float32], most: float) -> Boxes:
    """Non-maximum suppression: the best boxes, none overlapping a better one by ``most`` or more."""
    kept: list[int] = []
    cross = overlaps(boxes, boxes)
    for index in np.argsort(-scores):
        if all(cross[index, other] < most for other in kept):
            kept.append(int(index))
    return boxes[kept]
