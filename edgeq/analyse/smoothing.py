"""Which inputs of matrix products to smooth, by how much, and what it gains - before any edit (L5).

SmoothQuant (Xiao et al. 2023, arXiv 2211.10438): divide channel j of an activation by
``s_j = a_j^alpha / w_j^(1-alpha)`` and multiply row j of the weights behind it by the same, so that outlier channels no
longer set the scale of all others. Instead of one alpha for the model, alpha is searched for each tensor by the error
of the products themselves, on rows taken from calibration; what gains less than ``LEAST_GAIN_DB`` is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.analyse.saturation import unsaturated
from edgeq.ir import query
from edgeq.num import fit
from edgeq.num.metrics import snr_db
from edgeq.num.quant import fake_quant
from edgeq.run.record import Samples
from edgeq.run.session import open_session, run_session
from edgeq.target.record import Target

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
LEAST_GAIN_DB = 1.0
ROWS = 256  # rows kept of each tensor; the error of a product is settled well before
ROW_SAMPLES = 16

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Smoothing:
    """Divide ``tensor`` by ``scale`` f32[K] before ``readers`` (MatMul nodes). SNR of the products in dB."""

    tensor: str
    readers: tuple[str, ...]
    scale: F32
    alpha: float
    before_db: float
    after_db: float


def groups(model: ir.Model) -> dict[str, list[ir.Node]]:
    """Tensor -> the MatMuls that multiply it with a constant [K, N] and give it K columns."""
    found: dict[str, list[ir.Node]] = {}
    for node in model.graph:
        if node.op_type != "MatMul" or query.is_constant(node.inputs[0]) or not query.is_constant(node.inputs[1]):
            continue
        if len(query.dims(node.inputs[1]) or ()) == 2 and query.is_float(node.inputs[0]):
            found.setdefault(str(node.inputs[0].name), []).append(node)  # type: ignore[union-attr]
    return found


def search(model: ir.Model, samples: Samples, target: Target, *, threads: int = 2) -> list[Smoothing]:
    """The smoothings worth doing, in graph order."""
    found = groups(model)
    rows, peaks = _rows(model, list(found), samples, target, threads)
    chosen = []
    for tensor, readers in found.items():
        if tensor not in rows:
            continue
        weights = [w for node in readers if (w := query.constant(node.inputs[1])) is not None]
        best = _search_group(rows[tensor], peaks[tensor], weights, target)
        if best is not None:
            scale, alpha, before, after = best
            chosen.append(Smoothing(tensor, tuple(str(n.name) for n in readers), scale, alpha, before, after))
    return chosen


def _search_group(x: F32, peak: F32, weights: Sequence[F32], target: Target) -> tuple[F32, float, float, float] | None:
    """Scale, alpha and SNR before and after, or None when nothing gains enough. ``x`` [rows, K], ``peak`` [K]."""
    joined = np.concatenate([w.astype(np.float32) for w in weights], axis=1)  # [K, sum of N]
    exact = x @ joined
    plain = np.ones_like(peak)
    before = _product_snr(x, peak, joined, plain, exact, target)
    w_peak = np.maximum(np.abs(joined).max(axis=1), 1e-5)
    tried = []
    for alpha in ALPHAS:
        scale = np.maximum(peak, 1e-5) ** alpha / w_peak ** (1 - alpha)
        scale = np.clip(scale / np.exp(np.log(scale).mean()), 1e-3, 1e3).astype(np.float32)
        tried.append((_product_snr(x, peak, joined, scale, exact, target), alpha, scale))
    after, alpha, scale = max(tried, key=lambda row: row[0])
    return (scale, alpha, before, after) if after >= before + LEAST_GAIN_DB else None


def _product_snr(x: F32, peak: F32, w: F32, scale: F32, exact: F32, target: Target) -> float:
    """SNR in dB of ``x @ w`` when both are quantized as the target does, after dividing ``x`` by ``scale``."""
    small = x / scale
    top = float((peak / scale).max())
    lo, hi = max(float(small.min()), -top), top
    codes_x = fit.params_of_range(min(lo, 0.0), max(hi, 0.0), target.activations)
    scaled = w * scale[:, None]
    codes_w = unsaturated(scaled.T, fit.fit_weight(scaled, target.weights, 1), target)
    return float(np.mean(snr_db(exact[None], (fake_quant(small, codes_x) @ fake_quant(scaled, codes_w))[None])))


def _rows(
    model: ir.Model, tensors: list[str], samples: Samples, target: Target, threads: int
) -> tuple[dict[str, F32], dict[str, F32]]:
    """Evenly taken rows f32[<= ROWS, K] of each tensor and its channels' largest magnitudes f32[K]."""
    tapped = model.clone()
    values = {str(value.name): value for node in tapped.graph for value in node.outputs}
    wanted = [name for name in tensors if name in values]
    shown = {str(value.name) for value in tapped.graph.outputs}
    tapped.graph.outputs.extend(values[name] for name in wanted if name not in shown)
    session = open_session(tapped, threads=threads, provider=target.simulation, level="basic")
    kept: dict[str, list[F32]] = {name: [] for name in wanted}
    peaks: dict[str, F32] = {}
    count = min(len(samples), ROW_SAMPLES)
    for index in np.linspace(0, len(samples) - 1, count).astype(int):
        feed = samples.read(int(index))
        for name, array in run_session(session, feed, wanted).items():
            rows = unpadded(array, feed)
            peak = np.abs(rows).max(axis=0)
            peaks[name] = np.maximum(peaks[name], peak) if name in peaks else peak
            step = max(1, len(rows) * count // ROWS)
            kept[name].append(rows[::step])
    return {name: np.concatenate(parts) for name, parts in kept.items() if parts}, peaks


def unpadded(array: F32, feed: Mapping[str, NDArray[np.generic]]) -> F32:
    """[..., K] -> [rows, K] without the positions an attention mask [batch, sequence] calls padding."""
    mask = feed.get("attention_mask")
    if mask is not None and array.shape[:2] == mask.shape:
        return np.asarray(array[mask.astype(bool)], np.float32)
    return np.asarray(array.reshape(-1, array.shape[-1]), np.float32)
