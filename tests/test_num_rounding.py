"""Rounding against textbook loops, torch's gradient and brute force, and what must hold for any layer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgeq.num import rounding
from edgeq.num.clips import CLIPS, octav_clip, oscar_clip
from edgeq.num.fit import fit_weight
from edgeq.num.quant import CHANNEL, TENSOR, Coded, QParams, dequantize, parse_quant, quantize
from edgeq.num.rounding import ROUNDERS, Inputs, adaround, gptq, hqq, nearest, output_error

FORMATS = ["i4/channel", "i4/tensor", "u4/block8/asym", "i4/block8", "u4/channel/asym", "i8/channel", "i2/channel"]
F32 = NDArray[np.float32]


def layer(
    text: str, *, out: int = 12, columns: int = 20, groups: int = 1, rows: int = 64, seed: int = 0
) -> tuple[F32, QParams, F32]:
    """A matrix, its mapping and correlated inputs f32[g, n, in] with a column that is never fed."""
    rng = np.random.default_rng(seed)
    W = rng.standard_normal((out, columns)).astype(np.float32)
    quant = parse_quant(text)
    params = fit_weight(W, quant, {TENSOR: None, CHANNEL: 0}.get(quant.block, 1))
    mix = rng.standard_normal((groups, columns, columns)) * np.geomspace(3, 0.03, columns)[:, None]
    X = (rng.standard_normal((groups, rows, columns)) @ mix).astype(np.float32)
    X[:, :, 5] = 0
    return W, params, X


def moments(X: F32) -> F32:
    return np.asarray(2 / X.shape[1] * X.transpose(0, 2, 1) @ X, np.float32)


def inputs_of(X: F32, held: F32 | None = None) -> Inputs:
    return Inputs(moments(X), X.shape[1], None if held is None else moments(held))


def squared_output_error(W: F32, coded: Coded, X: F32) -> float:
    """As the definition says: mean over rows, summed over outputs."""
    E = (dequantize(coded.codes, coded.params) - W).astype(np.float64).reshape(len(X), -1, W.shape[1])
    return float(sum(np.square(x @ e.T).sum() / len(x) for x, e in zip(X, E, strict=True)))


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("name", ROUNDERS)
def test_codes_are_in_range_and_matrix_and_mapping_keep_their_shapes(name: str, text: str) -> None:
    W, params, X = layer(text)
    coded = ROUNDERS[name](W, params, inputs_of(X))
    lo, hi = params.code_range
    assert coded.codes.shape == W.shape
    assert lo <= coded.codes.min() <= coded.codes.max() <= hi
    assert coded.params.scale.shape == params.scale.shape
    assert coded.params.zero_point.shape == params.zero_point.shape
    assert coded.params.quant == params.quant


@pytest.mark.parametrize("groups", [1, 3])
def test_the_error_of_outputs_comes_from_moments(groups: int) -> None:
    W, params, X = layer("i4/channel", groups=groups)
    coded = nearest(W, params)
    assert output_error(W, coded, moments(X)) == pytest.approx(squared_output_error(W, coded, X), rel=1e-4)


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("groups", [1, 4])
@given(seed=st.integers(0, 1000), held=st.booleans())
@settings(max_examples=5)
def test_learnt_roundings_never_lose_to_nearest(text: str, groups: int, seed: int, held: bool) -> None:
    W, params, X = layer(text, groups=groups, seed=seed)
    known = inputs_of(X[:, :48], X[:, 48:] if held else None)
    plain = output_error(W, nearest(W, params), known.judge)
    assert output_error(W, gptq(W, params, known), known.judge) <= plain
    assert output_error(W, adaround(W, params, known, iterations=40), known.judge) <= plain


@pytest.mark.parametrize("text", FORMATS)
def test_without_correlation_gptq_is_nearest_in_any_order(text: str) -> None:
    W, params, _ = layer(text)
    plain = quantize(W, params)
    for diagonal in (np.ones(20), np.arange(20.0), np.arange(20.0)[::-1]):
        H = np.diag(diagonal).astype(np.float32)[None]
        np.testing.assert_array_equal(rounding._compensated(W, params, H, 0.01), plain)


@pytest.mark.parametrize("text", ["i4/channel", "i4/block8"])
def test_a_permutation_of_columns_permutes_the_codes(text: str) -> None:
    """Columns are taken by their power, not by their place; scales of blocks stay those of the columns."""
    W, params, X = layer(text, columns=24)
    turn = np.random.default_rng(1).permutation(24)
    scale, zero = (np.broadcast_to(v, W.shape) for v in rounding._spread(params, W.shape))
    every = QParams(parse_quant("i4/block1"), scale, zero.astype(np.int32), 1, params.code_range)
    turned = replace(every, scale=scale[:, turn], zero_point=every.zero_point[:, turn])
    codes = rounding._compensated(W, params, moments(X), 0.01)
    np.testing.assert_array_equal(
        rounding._compensated(W[:, turn], turned, moments(X[:, :, turn]), 0.01), codes[:, turn]
    )


def textbook_gptq(W: F32, params: QParams, H: NDArray[np.float64]) -> NDArray[np.int32]:
    """Optimal brain quantization in a fixed order: the inverse Hessian of what is left is downdated after each column
    (Frantar and Alistarh 2022, arXiv 2208.11580, equations 2 and 3), without Cholesky, blocks or groups."""
    W, inverse = W.astype(np.float64), np.linalg.inv(H)
    scale, zero = (np.broadcast_to(v, W.shape) for v in rounding._spread(params, W.shape))
    codes = np.zeros(W.shape, np.int32)
    for i in np.argsort(-np.diag(H), kind="stable"):
        codes[:, i] = np.clip(np.rint(W[:, i] / scale[:, i]) + zero[:, i], *params.code_range)
        error = W[:, i] - (codes[:, i] - zero[:, i]) * scale[:, i]
        W -= np.outer(error / inverse[i, i], inverse[i])
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        inverse[i, i] = 1.0  # done with; no later column reaches it
    return codes


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("columns", [20, 150])
def test_gptq_is_optimal_brain_quantization(text: str, columns: int) -> None:
    """150 columns are more than one lazy block; single codes may differ where a tie is broken by float32's rounding."""
    W, params, X = layer(text, columns=columns, rows=400)
    H = moments(X)
    damped = H[0].astype(np.float64) + 0.01 * np.diag(H[0]).mean() * np.eye(columns)
    codes = rounding._compensated(W, params, H, 0.01)
    assert (codes != textbook_gptq(W, params, damped)).mean() < 0.01


def test_groups_are_layers_of_their_own() -> None:
    W, params, X = layer("i4/channel", groups=3, out=12)
    codes = rounding._compensated(W, params, moments(X), 0.01)
    for group in range(3):
        part = slice(4 * group, 4 * group + 4)
        alone = replace(params, scale=params.scale[part], zero_point=params.zero_point[part])
        same = rounding._compensated(W[part], alone, moments(X[group : group + 1]), 0.01)
        np.testing.assert_array_equal(codes[part], same)


def test_columns_that_read_nothing_are_rounded_to_nearest() -> None:
    """GPTQ's own code zeroes them, which ruins a channel that calibration happened to miss."""
    W, params, X = layer("i4/channel")
    np.testing.assert_array_equal(gptq(W, params, inputs_of(X)).codes[:, 5], quantize(W, params)[:, 5])
    dark = inputs_of(np.zeros_like(X))
    np.testing.assert_array_equal(gptq(W, params, dark).codes, quantize(W, params))
    np.testing.assert_array_equal(adaround(W, params, dark, iterations=20).codes, quantize(W, params))


def test_few_rows_are_damped_more() -> None:
    assert [rounding._damping(rows, 64) for rows in (128, 127, 16, 15)] == [0.01, 0.1, 0.1, 0.5]


@pytest.mark.parametrize("beta", [None, 20.0, 2.0])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("text", ["i4/channel", "u4/block8/asym"])
def test_adarounds_gradient_is_torchs(text: str, groups: int, beta: float | None) -> None:
    torch = pytest.importorskip("torch")
    W, params, X = layer(text, groups=groups)
    soft, V = rounding._softened(W, params, moments(X))
    V += np.random.default_rng(3).standard_normal(V.shape).astype(np.float32)
    v = torch.tensor(V, dtype=torch.float64, requires_grad=True)
    h = torch.clamp(torch.sigmoid(v) * 1.2 - 0.1, 0, 1)
    of = {name: torch.tensor(np.array(value), dtype=torch.float64) for name, value in vars(soft).items()}
    real = of["scale"] * torch.clamp(of["floor"] + h, of["lo"], of["hi"])
    errors = torch.tensor(X, dtype=torch.float64) @ (real - of["W"]).transpose(1, 2)
    error = (errors.square().mean(1)[..., None] / of["unit"]).sum()
    penalty = 0.0 if beta is None else rounding.WEIGHT * (1 - (2 * h - 1).abs() ** beta).sum()
    (error + penalty).backward()
    found, slope = soft.objective(V, beta)
    assert found == pytest.approx(error.item(), rel=1e-3)
    np.testing.assert_allclose(slope, v.grad.numpy(), rtol=2e-3, atol=2e-3 * np.abs(slope).max())


def test_adaround_starts_at_the_weights() -> None:
    W, params, X = layer("i8/channel")
    soft, V = rounding._softened(W, params, moments(X))
    assert soft.objective(V, None)[0] < 1e-5 * W.size, "nearest's error is 1 an element"


@pytest.mark.parametrize("name", ["gptq", "adaround"])
def test_correlated_inputs_let_half_of_the_noise_go(name: str) -> None:
    W, params, X = layer("i4/channel", out=32, columns=64, rows=1024)
    known = inputs_of(X[:, :768], X[:, 768:])
    assert output_error(W, ROUNDERS[name](W, params, known), known.judge) < 0.5 * output_error(
        W, nearest(W, params), known.judge
    )


@pytest.mark.parametrize("text", [*FORMATS, "i4/block8/f16"])
@given(seed=st.integers(0, 1000))
@settings(max_examples=10)
def test_hqq_never_ends_above_its_start(text: str, seed: int) -> None:
    W, params, _ = layer(text, seed=seed)
    start, found = nearest(W, params), hqq(W, params)
    before, after = (
        np.abs(W - dequantize(coded.codes, coded.params)).astype(np.float64) ** rounding.NORM
        for coded in (start, found)
    )
    assert after.sum() <= before.sum() * (1 + 1e-5)
    np.testing.assert_array_equal(found.codes, quantize(W, found.params))


def test_what_needs_data_says_so() -> None:
    W, params, _ = layer("i4/channel")
    for name in set(ROUNDERS) - rounding.DATA_FREE:
        with pytest.raises(ValueError, match=f"{name} rounds by what a layer reads"):
            ROUNDERS[name](W, params, None)


def clip_error(sizes: np.ndarray, masses: np.ndarray, clip: float, levels: float) -> float:
    """What OSCAR minimizes: noise of a uniform step on all, and what is cut."""
    return float(clip**2 * masses.sum() / (12 * levels**2) + (masses * np.maximum(sizes - clip, 0) ** 2).sum())


@pytest.mark.parametrize("levels", [1.5, 7.0, 127.0])
def test_oscar_against_brute_force(levels: float) -> None:
    rng = np.random.default_rng(4)
    sizes, masses = np.abs(rng.standard_t(3, (6, 200))), rng.exponential(size=(6, 200))
    for row, mass, clip in zip(sizes, masses, oscar_clip(sizes, masses, levels), strict=True):
        tried = [clip_error(row, mass, c, levels) for c in np.linspace(0, row.max(), 20_001)]
        assert clip_error(row, mass, clip, levels) <= min(tried) * (1 + 1e-9)


@pytest.mark.parametrize("levels", [1.5, 7.0, 127.0])
def test_octav_against_brute_force(levels: float) -> None:
    """Its noise counts what is kept only, instead of all."""
    rng = np.random.default_rng(4)
    sizes = np.abs(rng.standard_normal((6, 2000)))

    def error(row: np.ndarray, clip: float) -> float:
        kept = row <= clip
        return float(clip**2 * kept.sum() / (12 * levels**2) + np.square(row[~kept] - clip).sum())

    for row, clip in zip(sizes, octav_clip(sizes, levels), strict=True):
        least = min(error(row, c) for c in np.linspace(1e-3, row.max(), 5001))
        assert (
            error(row, clip) <= least * 1.02
        )  # the iteration takes its border for fixed; at 3 bits and less that shows


@pytest.mark.parametrize("text", ["i4/channel", "i4/tensor", "i4/block8", "u4/channel/asym", "i8/channel"])
@pytest.mark.parametrize("name", CLIPS)
def test_clips_give_scales_within_the_weights(name: str, text: str) -> None:
    W, params, X = layer(text)
    found = CLIPS[name](W, params, inputs_of(X))
    assert found.scale.shape == params.scale.shape
    assert (found.scale > 0).all()
    reach = found.scale * (7 if found.quant.format.bits == 4 else 127)
    assert (found.quant.symmetric and reach.max() <= np.abs(W).max() * 1.001) or not found.quant.symmetric
    power = {"octav": np.ones(20), "oscar": np.diagonal(moments(X)[0])}[name]
    plain = replace(params, scale=np.full_like(params.scale, np.abs(W).max() / 7), codes=None)
    if text.startswith("i4"):
        errors = [float((np.square(W - dequantize(quantize(W, p), p)) * power).sum()) for p in (found, plain)]
        assert errors[0] < errors[1]
