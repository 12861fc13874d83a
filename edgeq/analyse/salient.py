"""Which inputs of products to scale so that rounding their weights hurts least, activations staying float (L5).

AWQ (Lin et al. 2024, arXiv 2306.00978): weights that large activations meet count most, so the rows they lie in are
multiplied by ``s_k = mean|x_k|^alpha`` before rounding and the activation is divided by it. alpha is searched for each
tensor by the error of the products, as ``smoothing`` does for activations that are rounded too.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from edgeq.analyse.smoothing import COLUMNS, F32, TINY, Smoothing, groups, rows_read, rows_snr
from edgeq.ir import query
from edgeq.num.fit import fit_weight
from edgeq.num.quant import QParams, Quant, fake_quant
from edgeq.run.record import Samples
from edgeq.target.record import Target

ALPHAS = tuple(step / 20 for step in range(1, 20))
LEAST_GAIN_DB = 0.5  # a scale that no normalization takes up costs a pass over the tensor


def search(
    model: ir.Model, wanted: Mapping[tuple[str, int], QParams], samples: Samples, target: Target, *, threads: int = 2
) -> list[Smoothing]:
    """The scalings worth doing of MatMuls whose weights, and those of all that share their input, are ``wanted``."""
    found = {
        tensor: readers
        for tensor, readers in groups(model).items()
        if all((str(node.name), 1) in wanted for node in readers)
    }
    rows, _ = rows_read(model, list(found), samples, target, threads=threads)
    chosen = []
    for tensor, readers in found.items():
        if tensor not in rows:
            continue
        weights = [w.astype(np.float32) for node in readers if (w := query.constant(node.inputs[1])) is not None]
        quants = [wanted[str(node.name), 1] for node in readers]
        best = _best(rows[tensor], [(w, params.quant, params.axis) for w, params in zip(weights, quants, strict=True)])
        if best[1] >= best[0] + LEAST_GAIN_DB:
            chosen.append(Smoothing(tensor, tuple(str(node.name) for node in readers), best[3], best[2], *best[:2]))
    return chosen


def _best(x: F32, weights: list[tuple[F32, Quant, int | None]]) -> tuple[float, float, float, F32]:
    """SNR of the products as they are and at the best alpha, which that is, and its scale f32[K]."""
    some = [(w[:, :: -(-w.shape[1] // COLUMNS)], quant, axis) for w, quant, axis in weights]
    exact = x @ np.concatenate([w for w, _, _ in some], axis=1)
    plain = np.ones(x.shape[1], np.float32)
    scales = {0.0: plain, **{alpha: _scale(x, alpha) for alpha in ALPHAS}}
    snr = {alpha: _snr(x, some, scale, exact) for alpha, scale in scales.items()}
    alpha = max(snr, key=snr.__getitem__)
    return snr[0.0], snr[alpha], alpha, scales[alpha]


def _scale(x: F32, alpha: float) -> F32:
    size = np.abs(x).mean(axis=0)
    log = alpha * np.log(np.maximum(size, 1e-4 * max(float(size.max()), TINY)))
    return np.asarray(np.exp(log - (log.max() + log.min()) / 2), np.float32)


def _snr(x: F32, weights: list[tuple[F32, Quant, int | None]], scale: F32, exact: F32) -> float:
    rounded = []
    for w, quant, axis in weights:
        scaled = w * scale[:, None]
        rounded.append(fake_quant(scaled, fit_weight(scaled, quant, axis)))
    return rows_snr((x / scale) @ np.concatenate(rounded, axis=1), exact)
