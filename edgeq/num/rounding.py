"""Weights -> codes, rounded so that a layer's outputs keep their values instead of its weights theirs (L1).

A layer is a matrix W f32[out, in]; a convolution is one by im2col, a grouped one has out/g rows a group. Its mapping
is in matrix form: one scale, one a row (axis 0), or one per block of columns (axis 1). What it reads in calibration is
kept as second moments, ``Inputs``, instead of rows: the output error of codes is ``tr(E H E^T) / 2`` with ``E = W^ -
W``, so H says all that any number of rows would in the memory of in of them, and gives AdaRound its exact gradient,
which leaves no minibatches to draw and no few rows to overfit.

GPTQ: Frantar et al. 2023 (arXiv 2210.17323). AdaRound: Nagel et al. 2020 (arXiv 2004.10568). HQQ: Badri and Shaji 2023
(Half-Quadratic Quantization of Large Machine Learning Models).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.num.quant import MIN_SCALE, Coded, QParams, quantize, snap

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

DAMPINGS = (0.003, 0.01, 0.03, 0.1, 0.5)  # shares of H's mean diagonal, tried where held-out rows can judge
LAZY = 128  # columns whose errors are spread over the rest of the matrix at once

ITERATIONS = 400
WARM = 0.2  # share of the iterations without regularizer
RATE = 0.1  # Adam's
WEIGHT = 30.0  # of the regularizer, where nearest's error is 1 an element; with .1, weights end undecided between codes
BETAS = (8.0, 2.0)  # from flat to steep: few are pushed to 0 or 1 at first, all at last
ZETA, GAMMA = 1.1, -0.1  # the rectified sigmoid reaches 0 and 1
HARD = float(np.log((1 - GAMMA) / (ZETA - 1)))  # |V| from which h is 0 or 1
PLATEAU = 1e-3  # a relative fall of the error over CHECK iterations below which the warm start has done its work
CHECK = 20

NORM = 0.7  # HQQ's p
SHRINK, GROWTH, ROUNDS = 10.0, 1.01, 20


@dataclass(frozen=True)
class Inputs:
    """What a layer reads: ``H`` f32[g, in, in] = 2/n sum x x^T over ``rows`` = n rows of each of its g groups (1 but
    for grouped convolutions), and ``held`` the same over rows that H did not see, or None."""

    H: F32
    rows: int
    held: F32 | None = None

    @property
    def judge(self) -> F32:
        """The moments by which codes are chosen."""
        return self.H if self.held is None else self.held


def output_error(W: F32, coded: Coded, H: F32) -> float:
    """Mean squared error of a layer's outputs, summed over them, when W f32[out, in] is ``coded``."""
    return float(_row_errors(_grouped(dequantize_matrix(coded) - W, len(H)), H).sum())


def dequantize_matrix(coded: Coded) -> F32:
    """Codes [out, in] -> f32[out, in]."""
    scale, zero = _spread(coded.params, coded.codes.shape)
    return (coded.codes.astype(np.float32) - zero) * scale


def nearest(W: F32, params: QParams, inputs: Inputs | None = None) -> Coded:  # noqa: ARG001  one signature
    """Every weight by itself: half to even, as QuantizeLinear does."""
    return Coded(params, quantize(W, params))


def gptq(W: F32, params: QParams, inputs: Inputs | None = None) -> Coded:
    """Columns are rounded one after another, the one with the most power first; what is left of each is made up for by
    those that follow, as the inputs are correlated. Scales stay as they are (static groups).

    H is damped by the share of DAMPINGS that is best on held-out rows, or without them by how many rows H has. Nearest
    rounding stands where nothing is better."""
    known = _needed(inputs, "gptq")
    shares = DAMPINGS if known.held is not None else (_damping(known.rows, W.shape[1]),)
    tried = [nearest(W, params), *(Coded(params, _compensated(W, params, known.H, share)) for share in shares)]
    return min(tried, key=lambda coded: output_error(W, coded, known.judge))


def adaround(W: F32, params: QParams, inputs: Inputs | None = None, *, iterations: int = ITERATIONS) -> Coded:
    """Each weight goes up or down as a gradient search decides: Adam on V, rectified sigmoid ``h(V)`` between the two
    codes, a regularizer that hardens from WARM on. Nearest rounding stands where held-out rows see no gain."""
    known = _needed(inputs, "adaround")
    start = nearest(W, params)
    found = Coded(params, _learned(W, params, known.H, iterations))
    return min((start, found), key=lambda coded: output_error(W, coded, known.judge))


def hqq(W: F32, params: QParams, inputs: Inputs | None = None) -> Coded:  # noqa: ARG001  one signature
    """No data: scale and, where asymmetric, zero point that minimize ``sum |W - W^| ** NORM`` of the elements sharing
    them, by half-quadratic splitting; codes are then the nearest.

    HQQ's zero point is real. QDQ's is a code, so it is rounded each time and the scale is fitted again by least
    squares; of all mappings seen, the start included, each row keeps its best."""
    rows: F32 = rows_of(W, params)
    zero: F32 = params.zero_point.reshape(-1, 1).astype(np.float32)
    scale: F32 = params.scale.reshape(-1, 1).astype(np.float32)
    best_scale, best_zero, least = scale, zero, _norm_errors(rows, scale, zero, params)
    for turn in range(ROUNDS):
        codes = _clipped(rows / scale, zero, params)
        residual = rows / scale - (codes - zero)
        wanted = rows / scale - _shrink(residual, SHRINK * GROWTH**turn)  # in steps: the same for any scale
        if not params.quant.symmetric:
            zero = np.clip(np.rint((codes - wanted).mean(1, keepdims=True)), *params.code_range).astype(np.float32)
        scale = _refitted(scale, wanted, codes - zero, params)
        errors = _norm_errors(rows, scale, zero, params)
        better = errors < least
        best_scale, best_zero = np.where(better, scale, best_scale), np.where(better, zero, best_zero)
        least = np.minimum(errors, least)
    shape = params.scale.shape
    found = replace(params, scale=best_scale.reshape(shape), zero_point=best_zero.reshape(shape).astype(np.int32))
    return nearest(W, found)


Rounder = Callable[[F32, QParams, Inputs | None], Coded]

ROUNDERS: dict[str, Rounder] = {"nearest": nearest, "gptq": gptq, "adaround": adaround, "hqq": hqq}
DATA_FREE = frozenset({"nearest", "hqq"})


def _needed(inputs: Inputs | None, name: str) -> Inputs:
    if inputs is None:
        raise ValueError(f"{name} rounds by what a layer reads, which was not given")
    return inputs


# --- matrices --------------------------------------------------------------------------------------------------------


def _spread(params: QParams, shape: tuple[int, ...]) -> tuple[F32, F32]:
    """Scale and zero point f32 that broadcast against a matrix of ``shape``."""
    scale, zero = params.scale, params.zero_point.astype(np.float32)
    if params.quant.block > 0:
        scale, zero = (np.repeat(values, params.quant.block, 1)[:, : shape[1]] for values in (scale, zero))
    elif scale.ndim:
        scale, zero = scale[:, None], zero[:, None]
    return scale, zero


def _grouped(matrix: NDArray[np.float32], groups: int) -> F32:
    """[out, in] -> [g, out/g, in]."""
    return matrix.reshape(groups, -1, matrix.shape[-1])


def _row_errors(E: F32, H: F32) -> F64:
    """Mean squared output error f64[g, out/g] of weight errors E f32[g, out/g, in]."""
    return np.asarray(np.einsum("goi,goi->go", E @ H, E, dtype=np.float64) / 2)


def rows_of(W: NDArray[Any], params: QParams) -> NDArray[Any]:
    """The elements that share a scale, one row each; a short last block is filled with 0."""
    block = params.quant.block
    if block > 0:
        return np.pad(W, [(0, 0), (0, -W.shape[1] % block)]).reshape(-1, block)
    return W.reshape(1, -1) if params.scale.ndim == 0 else W


def _clipped(steps: F32, zero: F32, params: QParams) -> F32:
    """Real codes -> codes, as f32."""
    return np.asarray(np.clip(np.rint(steps) + zero, *params.code_range), np.float32)


# --- GPTQ ------------------------------------------------------------------------------------------------------------


def _damping(rows: int, columns: int) -> float:
    """Few rows leave H's small directions to chance; damping hides them."""
    if rows >= 2 * columns:
        return 0.01
    return 0.1 if 4 * rows >= columns else 0.5


def _compensated(W: F32, params: QParams, H: F32, damping: float) -> NDArray[np.int32]:
    """Codes i32[out, in] by GPTQ. What reads nothing but 0 is rounded to nearest: calibration may have missed it."""
    groups, order = len(H), np.argsort(-np.diagonal(H, axis1=1, axis2=2), axis=1, kind="stable")
    scale, zero = (np.broadcast_to(values, W.shape) for values in _spread(params, W.shape))
    columns = order[:, :, None]
    w, s, z = (
        np.take_along_axis(_grouped(values, groups).transpose(0, 2, 1), columns, 1) for values in (W, scale, zero)
    )  # [g, in, out/g]: a column of W is a row here, which lies in one piece
    ordered = np.take_along_axis(np.take_along_axis(H, columns, 1), order[:, None, :], 2)
    codes = _rounded_in_turn(w, s, z, _feedback(ordered, damping), params)
    back = np.take_along_axis(codes, np.argsort(order, axis=1)[:, :, None], 1)
    return back.transpose(0, 2, 1).reshape(W.shape).astype(np.int32)


def _feedback(H: F32, damping: float) -> F32:
    """Unit upper triangular U f32[g, in, in] of ``H + damping = U D U^T``: column i says how much of the errors of the
    columns before it column i takes over.

    This is GPTQ's inverse Hessian without an inverse (Chee et al. 2023, arXiv 2307.13304, theorem 6): with rows and
    columns reversed, ``J H J = L L^T``, so ``H = R R^T`` with the upper ``R = J L J``, and U is R over its diagonal."""
    damped = H.astype(np.float64)
    diagonal = np.einsum("gii->gi", damped)  # a view
    dead = diagonal <= 0
    mean = diagonal.mean(axis=1, keepdims=True)
    diagonal += damping * mean
    diagonal[dead] = np.broadcast_to(np.where(mean > 0, mean, 1.0), dead.shape)[dead]
    root = np.linalg.cholesky(damped[:, ::-1, ::-1])[:, ::-1, ::-1]
    return np.asarray(root / np.einsum("gii->gi", root)[:, None, :], np.float32)


def _rounded_in_turn(w: F32, s: F32, z: F32, U: F32, params: QParams) -> F32:
    """Codes f32[g, in, out/g] of columns rounded one by one; errors reach the columns beyond LAZY in one product."""
    original, w, codes, size = w, w.copy(), np.empty_like(w), w.shape[1]
    feedback = np.ascontiguousarray(U.transpose(0, 2, 1))
    for start in range(0, size, LAZY):
        stop = min(start + LAZY, size)
        errors = np.empty_like(w[:, start:stop])
        for i in range(start, stop):
            w[:, i] += (feedback[:, i, None, start:i] @ errors[:, : i - start])[:, 0]
            codes[:, i] = _clipped(w[:, i] / s[:, i], z[:, i], params)
            errors[:, i - start] = original[:, i] - (codes[:, i] - z[:, i]) * s[:, i]
        w[:, stop:] += feedback[:, stop:, start:stop] @ errors
    return codes


# --- AdaRound --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Softened:
    """A layer between two codes a weight: ``W^ = scale * clip(floor + h(V), lo, hi)``, all f32[g, out/g, in] or
    broadcast to it. ``unit`` f32[g, out/g, 1]: nearest's error of a row over its elements, by which errors count."""

    W: F32
    scale: F32
    floor: F32
    lo: F32
    hi: F32
    H: F32
    unit: F32

    def objective(self, V: F32, beta: float | None) -> tuple[float, F32]:
        """Error and gradient f32 of V's shape; the error is in units, without the regularizer, which ``beta`` turns
        on in the gradient: ``WEIGHT * sum(1 - |2h - 1| ** beta)``."""
        sigmoid = np.asarray(1 / (1 + np.exp(-V)), np.float32)
        h = np.clip(sigmoid * (ZETA - GAMMA) + GAMMA, 0, 1)
        code = self.floor + h
        E = self.scale * np.clip(code, self.lo, self.hi) - self.W
        slope = E @ self.H
        slope /= self.unit
        error = float(np.einsum("goi,goi->", slope, E)) / 2
        slope *= self.scale
        slope[(code < self.lo) | (code > self.hi)] = 0
        if beta is not None:
            middle = 2 * h - 1
            slope -= np.copysign(2 * WEIGHT * beta * np.abs(middle) ** np.float32(beta - 1), middle)
        slope *= (ZETA - GAMMA) * sigmoid * (1 - sigmoid)
        slope[(h <= 0) | (h >= 1)] = 0
        return error, slope


def _softened(W: F32, params: QParams, H: F32) -> tuple[_Softened, F32]:
    """The softened layer and V at which it is W, clipping aside."""
    groups = len(H)
    scale, zero = (_grouped(np.broadcast_to(values, W.shape), groups) for values in _spread(params, W.shape))
    w = _grouped(W, groups)
    floor = np.floor(w / scale)
    lo, hi = params.code_range
    error = _row_errors(_grouped(dequantize_matrix(nearest(W, params)) - W, groups), H)[..., None]
    unit = np.where(error > 0, error, 1.0) / W.shape[1]
    h = np.clip(w / scale - floor, 1e-4, 1 - 1e-4)
    V = -np.log((ZETA - GAMMA) / (h - GAMMA) - 1)
    layer = _Softened(w, scale, floor, lo - zero, hi - zero, H, unit.astype(np.float32))
    return layer, V.astype(np.float32)


def _learned(W: F32, params: QParams, H: F32, iterations: int) -> NDArray[np.int32]:
    """Codes i32[out, in] by AdaRound: full-batch Adam; the warm start ends early on a plateau, the rest when all of
    ``h`` is hard."""
    layer, V = _softened(W, params, H)
    first, second = np.zeros_like(V), np.zeros_like(V)
    warm, hardening = int(WARM * iterations), iterations - int(WARM * iterations)
    begun, errors = warm, list[float]()
    for turn in range(iterations):
        if turn < begun and turn % CHECK == 0 and turn and errors[-1] > errors[-CHECK] * (1 - PLATEAU):
            begun = turn
        share = (turn - begun) / hardening
        if share >= 1:
            break
        beta = BETAS[1] + (BETAS[0] - BETAS[1]) * (1 + np.cos(np.pi * share)) / 2 if share >= 0 else None
        error, slope = layer.objective(V, beta)
        errors.append(error)
        first += 0.1 * (slope - first)
        second += 0.001 * (slope * slope - second)
        rate = RATE * np.sqrt(1 - 0.999 ** (turn + 1)) / (1 - 0.9 ** (turn + 1))
        V -= np.float32(rate) * first / (np.sqrt(second) + np.float32(1e-8))
        if share > 0 and turn % CHECK == 0 and np.abs(V).min() >= HARD:
            break
    codes = np.clip(layer.floor + (V >= 0), layer.lo, layer.hi) + _grouped(
        np.broadcast_to(_spread(params, W.shape)[1], W.shape), len(H)
    )
    return codes.reshape(W.shape).astype(np.int32)


# --- HQQ -------------------------------------------------------------------------------------------------------------


def _shrink(x: F32, beta: float) -> F32:
    """The generalized soft threshold of |x| ** NORM: x f32 -> what the half-quadratic step takes for outliers."""
    size = np.abs(x)
    return np.copysign(np.maximum(size - np.maximum(size, 1e-8) ** (NORM - 1) / beta, 0), x).astype(np.float32)


def _refitted(scale: F32, wanted: F32, steps: F32, params: QParams) -> F32:
    """Scales f32[rows, 1] of the least squared error between ``wanted`` (in steps of ``scale``) and ``steps``."""
    power = np.square(steps).sum(1, keepdims=True, dtype=np.float64)
    factor = np.where(power > 0, (steps * wanted).sum(1, keepdims=True) / np.maximum(power, 1.0), 1.0)
    found = scale * factor
    found = np.copysign(np.maximum(np.abs(found), MIN_SCALE), found)
    return snap(found.astype(np.float64), params.quant.scale, params.tensor_scale)


def _norm_errors(rows: F32, scale: F32, zero: F32, params: QParams) -> F32:
    """f32[rows, 1]: HQQ's objective."""
    error = rows - (_clipped(rows / scale, zero, params) - zero) * scale
    errors: F32 = (np.abs(error) ** np.float32(NORM)).sum(1, keepdims=True)
    return errors
