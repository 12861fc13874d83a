"""Ranges by reader: the error counts where it is read, not where it is made."""

from __future__ import annotations

import numpy as np

from edgeq.analyse.readers import by_readers
from edgeq.num.fit import METHODS, fit_range, params_of_range
from edgeq.num.quant import fake_quant
from tests.graphs import normal
from tests.placed import placed, samples_of

POINT = "Conv<kernel_shape=[1,1]>"
TEXT = f"(float[1,8,16,16] x) => (float[1,8,16,16] z) {{ y = {POINT}(x, v) z = {POINT}(y, w) }}"


def spiky(count: int) -> list[dict[str, np.ndarray]]:
    """Inputs whose channel 0 is 50 times as large as the others."""
    feeds = [{"x": normal(1, 8, 16, 16)} for _ in range(count)]
    for feed in feeds:
        feed["x"][:, 0] *= 50
    return feeds


def test_a_range_is_chosen_by_the_product_behind_it() -> None:
    """With the large channel multiplied by 0, clipping it costs nothing; with it alone multiplied, all counts."""
    v = np.eye(8, dtype=np.float32)[:, :, None, None]
    deaf, only = np.ones((8, 8, 1, 1), np.float32), np.zeros((8, 8, 1, 1), np.float32)
    deaf[:, 0], only[:, 0] = 0, 1
    feeds = spiky(4)
    for w in (deaf, only):
        made = placed(TEXT, {"v": v, "w": w}, feeds=feeds)
        found = by_readers(made.source, made.plan, made.stats, samples_of(feeds), made.target, threads=1)
        assert set(found) == {"x", "y"}
        assert found["y"] == brute_force(made, "y", w, [feed["x"] for feed in feeds])


def brute_force(made, name: str, w: np.ndarray, arrays: list[np.ndarray]) -> str:
    """The method with the least squared error of ``w @ tensor``, by numpy."""
    stats, quant, lost = made.stats[name], made.plan.tensors[name], {}
    for method in METHODS:
        params = params_of_range(*fit_range(method, stats.histogram, stats.min, stats.max, quant), quant)
        errors = [np.einsum("oc,nchw->nohw", w[:, :, 0, 0], fake_quant(array, params) - array) for array in arrays]
        exact = [np.einsum("oc,nchw->nohw", w[:, :, 0, 0], array) for array in arrays]
        lost[method] = sum(float((e**2).sum() / (x**2).sum()) for e, x in zip(errors, exact, strict=True))
    return min(lost, key=lost.__getitem__)
