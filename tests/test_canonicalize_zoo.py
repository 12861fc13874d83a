"""Real models from four exporters keep what they compute on real samples, and come out in the expected ops."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from edgeq.rewrite.canonicalize import canonicalize
from edgeq.source import read_model
from tests.graphs import ops
from tests.zoo import ZOO
from tests.zoo.packages import data, source

LEFT: dict[str, tuple[int, set[str]]] = {
    "EFL0": (94, set()),
    "MBV2": (100, set()),
    "OCR4d": (167, {"BatchNormalization", "Div"}),
    "OCR4r": (173, {"BatchNormalization", "Div", "Sub", "Shape", "Sqrt"}),
    "OCRcls": (125, {"BatchNormalization", "Div", "Shape"}),
    "MAGIKA": (26, {"Sqrt", "Tanh", "Exp", "Sub", "Div"}),
    "VAD": (36, {"If", "Identity", "Shape"}),
}
"""Most nodes that may be left, and op types of which none may: written-out forms and what should have folded."""


@pytest.mark.zoo
@pytest.mark.parametrize("name", LEFT)
def test_real_models_keep_their_outputs(name: str) -> None:
    entry = ZOO[name]
    samples = [
        {key: np.asarray(value) for key, value in sample.items() if key != "label"}
        for sample in data(entry.calibration, 2)
    ]
    pins = {key: array.shape for key, array in samples[0].items() if name == "VAD" and array.ndim}
    model, _ = read_model(source(entry), opset=21, example=samples[0], pins=pins)
    result, changes = canonicalize(model, feeds=samples)
    assert [change for change in changes if change.rolled_back] == []
    most, none_of = LEFT[name]
    found = Counter(ops(result))
    assert sum(found.values()) <= most and not none_of & set(found), found
