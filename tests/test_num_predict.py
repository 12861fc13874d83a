"""Predicted noise of every format, against rounding the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeq.num.fit import fit_range, fit_weight, params_of_range, scale_rows
from edgeq.num.histogram import Histogram
from edgeq.num.predict import LOSSLESS_DB, range_snr_db, shape_of, snr_db
from edgeq.num.quant import CHANNEL, TENSOR, fake_quant, parse_quant

RNG = np.random.default_rng(5)
SHAPE = (96, 256)


def _outlier_columns() -> NDArray[np.float64]:
    w = RNG.standard_normal(SHAPE)
    w[:, ::97] *= 30
    return w


TENSORS: dict[str, NDArray[np.float32]] = {
    name: np.asarray(w, np.float32)
    for name, w in {
        "gauss": RNG.standard_normal(SHAPE),
        "laplace": RNG.laplace(size=SHAPE),
        "t3": RNG.standard_t(3, SHAPE),
        "uniform": RNG.uniform(-1, 1, SHAPE),
        "outlier columns": _outlier_columns(),
        "one-sided": np.maximum(RNG.standard_normal(SHAPE), 0),
        "depthwise": RNG.standard_normal((96, 9)),
        "rows of all sizes": RNG.standard_normal(SHAPE) * np.exp(RNG.standard_normal((96, 1)) * 3),
        "sparse": RNG.standard_normal(SHAPE) * (RNG.random(SHAPE) < 0.1),
    }.items()
}
FORMATS = (
    "i8/tensor", "i8/channel", "u8/channel/asym", "i8/block32", "mxint8", "f8e4m3/tensor", "f8e4m3/channel", "mxfp8",
    "f8e5m2/channel", "mxfp6", "i4/tensor", "i4/channel", "i4/block32", "u4/block32/asym", "u4/block32/asym/f16",
    "mxfp4", "nvfp4", "i2/channel", "u2/block16/asym", "f16", "bf16",
)  # fmt: skip
WITHIN_DB = 1.0


def measured_db(w: NDArray[np.float32], text: str) -> float:
    quant = parse_quant(text)
    error = fake_quant(w, fit_weight(w, quant, 1 if quant.block > 0 else 0)).astype(np.float64) - w
    return float(10 * np.log10(np.square(w, dtype=np.float64).sum() / np.square(error).sum()))


@pytest.mark.parametrize("name", TENSORS)
def test_predicted_noise_is_what_rounding_makes(name: str) -> None:
    w = TENSORS[name]
    shapes = {
        block: shape_of(scale_rows(w, parse_quant(text), 1 if block > 0 else 0))
        for block, text in ((TENSOR, "i8"), (CHANNEL, "i8/channel"), (16, "i8/block16"), (32, "i8/block32"))
    }
    for text in FORMATS:
        quant = parse_quant(text)
        assert snr_db(shapes[quant.block], quant) == pytest.approx(measured_db(w, text), abs=WITHIN_DB), text


@pytest.mark.parametrize("name", ["gauss", "laplace", "t3", "uniform", "one-sided"])
@pytest.mark.parametrize("method", ["minmax", "mse", "percentile"])
def test_predicted_noise_of_activations(name: str, method: str) -> None:
    x, histogram, quant = TENSORS[name], Histogram(), parse_quant("u8/tensor/asym")
    histogram.add(x)
    params = params_of_range(*fit_range(method, histogram, float(x.min()), float(x.max()), quant), quant)
    error = fake_quant(x, params).astype(np.float64) - x
    found = 10 * np.log10(np.square(x, dtype=np.float64).sum() / np.square(error).sum())
    assert range_snr_db(histogram, params) == pytest.approx(found, abs=0.5)


def test_what_loses_nothing_and_what_is_nothing() -> None:
    signs = np.sign(RNG.standard_normal((8, 64))).astype(np.float32)
    assert snr_db(shape_of(signs), parse_quant("i8/channel")) == LOSSLESS_DB
    assert snr_db(shape_of(np.zeros((4, 8), np.float32)), parse_quant("mxfp4")) == LOSSLESS_DB


def test_a_scale_does_not_matter() -> None:
    shapes = [shape_of(TENSORS["laplace"] * np.float32(factor)) for factor in (1.0, 2.0**-20, 2.0**20)]
    for text in ("i8/channel", "u4/channel/asym", "f4e2m1/channel/e8m0"):
        first, *others = (snr_db(shape, parse_quant(text)) for shape in shapes)
        assert others == pytest.approx([first, first], abs=1e-9)
