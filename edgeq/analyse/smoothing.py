"""Which inputs of matrix products to smooth, by how much, and what it gains - before any edit (L5).

SmoothQuant (Xiao et al. 2023, arXiv 2211.10438): divide channel j of an activation by
``s_j = a_j^alpha / w_j^(1-alpha)`` and multiply row j of the weights behind it by the same, so that outlier channels no
longer set the scale of all others. Instead of one alpha for the model, alpha is searched for each tensor by the error
of the products themselves, on rows taken from calibration; what gains less than ``LEAST_GAIN_DB`` is left alone.

Outliers of a few rows (a language model's first tokens) are beyond any channel's scale. Dividing each row by its own
largest magnitude, and multiplying the products by it, is as exact and gives each row its range; it costs passes over
the tensor on every run, so it is done only where the noise of all products together asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.analyse.place import FLOAT_NS_MAC, INT_NS_MAC
from edgeq.analyse.saturation import unsaturated
from edgeq.ir import query
from edgeq.num import fit
from edgeq.num.quant import fake_quant
from edgeq.run.record import Samples
from edgeq.run.session import open_session, run_session
from edgeq.target.record import Target

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
LEAST_GAIN_DB = 1.0
HEARD = 0.01  # noise over signal, summed over all products, up to which rows are left alone
ROW_NS_ELEMENT = 0.35  # of each of five passes by rows; the product has to save twice as much as they take
EXACT = 1e-15  # noise over signal below which all are alike
ROWS, COLUMNS = 256, 256  # of each product that are computed; its error is settled well before
ROW_SAMPLES = 16

TINY = float(np.finfo(np.float32).tiny)
F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Smoothing:
    """Divide ``tensor`` by ``scale`` f32[K] before ``readers`` (MatMul nodes); with ``rows`` each row by its largest
    magnitude as well, to multiply the products by that. SNR of the products in dB."""

    tensor: str
    readers: tuple[str, ...]
    scale: F32
    alpha: float
    before_db: float
    after_db: float
    rows: bool = False


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
    rows, peaks = rows_read(model, list(found), samples, target, threads=threads)
    offers = []
    for tensor, readers in found.items():
        if tensor in rows:
            weights = [w for node in readers if (w := query.constant(node.inputs[1])) is not None]
            joined = np.concatenate([w.astype(np.float32) for w in weights], axis=1)  # [K, sum of N]
            plain = Smoothing(tensor, tuple(str(node.name) for node in readers), np.ones_like(peaks[tensor]), 0.0, 0, 0)
            offers.append(_offers(plain, rows[tensor], peaks[tensor], joined, target))
    return [best for best in _within_budget(offers) if best.alpha or best.rows]


def _within_budget(offers: Sequence[tuple[Smoothing, Smoothing | None]]) -> list[Smoothing]:
    """Of each pair the first, but the second where all together would else be heard: most noise for least time first.
    Errors of products add up, so that the more there are the less each may make."""
    chosen = [first for first, _ in offers]
    noise = [_noise(one) for one in chosen]
    gains = [(index, rows, noise[index] - _noise(rows)) for index, (_, rows) in enumerate(offers) if rows is not None]
    for index, rows, gain in sorted(gains, key=lambda row: -row[2] / len(row[1].scale)):
        if sum(noise) <= HEARD:
            break
        chosen[index], noise[index] = rows, noise[index] - gain
    return chosen


def _noise(smoothing: Smoothing) -> float:
    return float(10 ** (-smoothing.after_db / 10))


def _offers(plain: Smoothing, x: F32, peak: F32, w: F32, target: Target) -> tuple[Smoothing, Smoothing | None]:
    """The best by channels, or ``plain`` when none gains enough, and the best by rows too when that gains and pays. For
    ``x`` [rows, K] with peaks [K] and weights [K, N]."""
    some = w[:, :: -(-w.shape[1] // COLUMNS)]
    exact = x @ some
    before = _product_snr(x, peak, some, plain.scale, exact, target)
    best = [replace(plain, before_db=before, after_db=before)]
    for rows in (False, True) if _pays(*w.shape) else (False,):
        scales = {0.0: plain.scale, **_scales(x, peak, w, rows)}
        snr = {alpha: _product_snr(x, peak, some, scale, exact, target, rows) for alpha, scale in scales.items()}
        alpha = max(snr, key=snr.__getitem__)
        if snr[alpha] >= best[0].after_db + LEAST_GAIN_DB:
            better = replace(best[0], scale=scales[alpha], alpha=alpha, after_db=snr[alpha], rows=rows)
            best = [*best, better] if rows else [better]
    return best[0], best[1] if len(best) > 1 else None


def _scales(x: F32, peak: F32, w: F32, rows: bool) -> dict[float, F32]:
    """Alpha -> scale [K] from the sizes of channels. One range for all rows is set by peaks; where each row has its
    own, channels count by their fourth powers within rows: peaks let one row rule, squares leave outliers."""
    if rows:
        even = x / np.maximum(np.abs(x).max(axis=1, keepdims=True), TINY)
        size_x, size_w = (np.mean(np.square(np.square(a)), axis=axis) ** 0.25 for a, axis in ((even, 0), (w, 1)))
    else:
        size_x, size_w = peak, np.abs(w).max(axis=1)
    logs = [np.log(np.maximum(size, 1e-5 * max(size.max(), TINY))) for size in (size_x, size_w)]
    found = {}
    for alpha in ALPHAS:
        log = alpha * logs[0] - (1 - alpha) * logs[1]
        found[alpha] = np.clip(np.exp(log - log.mean()), 1e-3, 1e3).astype(np.float32)
    return found


def _pays(depth: int, width: int) -> bool:
    """Whether [rows, depth] @ [depth, width] in integers saves enough time to divide rows and multiply them back."""
    return depth * width * (FLOAT_NS_MAC - INT_NS_MAC) > 2 * ROW_NS_ELEMENT * (4 * depth + width)


def _product_snr(x: F32, peak: F32, w: F32, scale: F32, exact: F32, target: Target, rows: bool = False) -> float:
    """SNR in dB of ``x @ w`` when both are quantized as the target does, after dividing ``x`` by ``scale``, and each
    row by its largest magnitude where ``rows`` says so. It is that of the mean over rows of noise over signal, since
    a normalization further on makes all rows alike: the few that hold a transformer's massive activations would hide
    what becomes of the others."""
    small, largest = x / scale, np.float32(1.0)
    top = float((peak / scale).max())
    if rows:
        largest = np.maximum(np.abs(small).max(axis=1, keepdims=True), TINY)
        small, top = small / largest, 1.0
    lo, hi = max(float(small.min()), -top), top
    codes_x = fit.params_of_range(min(lo, 0.0), max(hi, 0.0), target.activations)
    scaled = w * scale[:, None]
    codes_w = unsaturated(scaled.T, fit.fit_weight(scaled, target.weights, 1), target)
    return rows_snr((fake_quant(small, codes_x) @ fake_quant(scaled, codes_w)) * largest, exact)


def rows_snr(found: F32, exact: F32) -> float:
    """SNR in dB of [rows, N], by the mean over rows of noise over signal."""
    noise, signal = np.square(found - exact).sum(axis=1), np.maximum(np.square(exact).sum(axis=1), TINY)
    return float(-10 * np.log10(max(np.mean(noise / signal), EXACT)))


def rows_read(
    model: ir.Model, tensors: list[str], samples: Samples, target: Target, *, threads: int
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
