"""Metrics and their intervals: definitions, edge cases, and coverage by simulation."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import log_softmax, softmax

from edgeq.errors import ModelError, SampleError, UsageError
from edgeq.num.intervals import interval_mean, interval_paired_difference
from edgeq.num.metrics import (
    METRICS,
    SNR_CAP_DB,
    agreement_top1,
    cosine,
    drop,
    exact_match,
    log_loss,
    max_abs,
    measure,
    metric,
    snr_db,
    top1,
)

RNG = np.random.default_rng(11)
REFERENCE = RNG.normal(size=(6, 4, 5)).astype(np.float32)
NOISE = RNG.normal(size=REFERENCE.shape).astype(np.float32) * 0.01
COMPARING = [row for row in METRICS.values() if not row.needs_labels]


def test_values_are_those_of_the_definitions() -> None:
    r, t = REFERENCE.astype(np.float64), (REFERENCE + NOISE).astype(np.float64)
    signal, noise = (r**2).sum((1, 2)), ((r - t) ** 2).sum((1, 2))
    np.testing.assert_allclose(snr_db(r, t), 10 * np.log10(signal / noise))
    np.testing.assert_allclose(cosine(r, t), (r * t).sum((1, 2)) / np.sqrt(signal * (t**2).sum((1, 2))))
    np.testing.assert_allclose(max_abs(r, t), np.abs(r - t).max((1, 2)))
    np.testing.assert_allclose(agreement_top1(r, t), (r.argmax(-1) == t.argmax(-1)).mean(1))
    assert exact_match(np.array([[1, 2], [3, 4]]), np.array([[1, 2], [3, 5]])).tolist() == [1, 0]
    assert top1(np.eye(3), np.array([0, 1, 0])).tolist() == [1, 1, 0]
    assert top1(np.eye(3), np.array([[0.0], [1.0], [0.0]])).tolist() == [1, 1, 0]


@given(hnp.arrays(np.float32, (3, 4), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_equal_outputs_are_as_good_as_it_gets(x: np.ndarray) -> None:
    best = {"snr_db": SNR_CAP_DB, "max_abs": 0.0}
    for row in COMPARING:
        np.testing.assert_allclose(row.function(x, x.copy()), best.get(row.name, 1.0), rtol=1e-12)


@given(
    hnp.arrays(np.float32, (2, 6), elements=st.floats(-1000, 1000, width=32)),
    hnp.arrays(np.float32, (2, 6), elements=st.floats(-1000, 1000, width=32)),
    st.integers(-80, 80),
)
def test_snr_and_cosine_do_not_depend_on_the_unit(r: np.ndarray, t: np.ndarray, power: int) -> None:
    r, t = r.astype(np.float64), t.astype(np.float64)
    for function in (snr_db, cosine):
        np.testing.assert_allclose(function(r * 2.0**power, t * 2.0**power), function(r, t), atol=1e-9)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", COMPARING, ids=lambda row: row.name)
def test_a_broken_output_never_looks_good(row: object, bad: float) -> None:
    metric_row = METRICS[row.name]
    test = REFERENCE.copy()
    # Every position, so that an infinity can't be the reference's own largest value.
    test[2, :, :] = bad
    values = metric_row.function(REFERENCE, test)
    worst = {"snr_db": -np.inf, "cosine": -np.inf, "max_abs": np.inf, "exact_match": 0.0}.get(metric_row.name)
    if worst is not None:
        assert values[2] == worst
    elif np.isnan(bad):
        assert values[2] == 0.0
    good = metric_row.function(REFERENCE, REFERENCE)
    np.testing.assert_array_equal(np.delete(values, 2), np.delete(good, 2))
    summary, bound = measure(metric_row, values).value, measure(metric_row, good).value
    assert summary < bound if metric_row.higher_is_better else summary > bound


def test_a_nan_where_the_reference_has_one_is_not_agreement() -> None:
    both = np.array([[1.0, np.nan, 0.0]])
    assert snr_db(both, both)[0] == -np.inf
    assert exact_match(both, both)[0] == agreement_top1(both, both)[0] == 0.0
    assert top1(both, np.array([1]))[0] == 0.0


def test_the_same_infinity_on_both_sides_is_a_mask() -> None:
    r = np.array([[1.0, -np.inf, 3.0]])
    t = np.array([[1.0, -np.inf, 3.5]])
    assert max_abs(r, t)[0] == 0.5
    assert snr_db(r, t)[0] == pytest.approx(10 * math.log10(10 / 0.25))
    assert snr_db(r, -t)[0] == -np.inf


def test_a_silent_reference_is_met_or_missed() -> None:
    zero, loud = np.zeros((1, 3)), np.full((1, 3), 1e-9)
    assert snr_db(zero, zero)[0] == SNR_CAP_DB
    assert snr_db(zero, loud)[0] == -SNR_CAP_DB
    assert (cosine(zero, zero)[0], cosine(zero, loud)[0]) == (1.0, 0.0)


def test_small_types_text_and_flat_outputs_are_measured() -> None:
    half = REFERENCE.astype(ml_dtypes.bfloat16)
    assert 40 < snr_db(REFERENCE, half.astype(np.float32)).mean() < 60
    np.testing.assert_allclose(snr_db(half, half), SNR_CAP_DB)
    assert max_abs(np.array([0, 200], np.uint8), np.array([255, 200], np.uint8)).tolist() == [255, 0]
    assert exact_match(np.array(["a", "b"]), np.array(["a", "c"])).tolist() == [1, 0]
    assert agreement_top1(np.zeros((2, 0, 5)), np.zeros((2, 0, 5))).tolist() == [1, 1]
    assert snr_db(np.zeros((2, 0)), np.zeros((2, 0))).tolist() == [SNR_CAP_DB] * 2


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: snr_db(np.ones((2, 3)), np.ones((2, 4))), ModelError, r"reference \(2, 3\), test \(2, 4\)"),
        (lambda: cosine(np.array(["a"]), np.array(["b"])), ModelError, "no numeric error\n  try: use exact_match"),
        (lambda: agreement_top1(np.ones(4), np.ones(4)), ModelError, r"shape \(4,\) have no classes"),
        (lambda: agreement_top1(np.ones((4, 1)), np.ones((4, 1))), ModelError, "no classes along the last axis"),
        (lambda: max_abs(np.ones((0, 3)), np.ones((0, 3))), SampleError, "hold no sample"),
        (lambda: top1(np.ones((2, 3)), np.array([0, 1, 2])), SampleError, r"labels of shape \(3,\) for outputs of"),
        (lambda: top1(np.ones((2, 3)), np.array(["cat", "dog"])), SampleError, "needs class indices"),
        (lambda: top1(np.ones((2, 3)), np.array([0.5, 1])), SampleError, "needs class indices"),
        (lambda: top1(np.ones((2, 3)), np.array([1, 3])), SampleError, "labels from 1 to 3 for 3 classes"),
        (lambda: log_loss(np.ones((1, 4, 3)), np.ones((1, 3))), SampleError, "give one label a position"),
        (lambda: log_loss(np.ones((1, 4, 3)), np.full((1, 4), 0.5)), SampleError, "perplexity needs class indices"),
        (lambda: log_loss(np.ones((1, 2, 3)), np.array([[1, 3]])), SampleError, "labels from 1 to 3 for 3 classes"),
        (lambda: log_loss(np.ones((1, 2, 3)), np.array([[-1, -1]])), SampleError, "no label at or above 0"),
        (lambda: metric("top_1"), UsageError, "unknown metric 'top_1'\n  try: did you mean 'top1'?"),
    ],
)
def test_what_cannot_be_measured_is_told(call: object, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_the_table_says_how_to_read_a_metric() -> None:
    for name, row in METRICS.items():
        assert metric(name) is row
        assert row.name == name
    assert measure(METRICS["max_abs"], np.array([1.0, 3.0])) == (3.0, None, None)
    assert measure(METRICS["cosine"], np.array([0.5, 0.7, 0.9])).value == pytest.approx(0.7)


def test_perplexity_is_the_exponential_of_the_mean_loss() -> None:
    logits, labels = RNG.normal(size=(6, 4, 5)).astype(np.float32) * 3, RNG.integers(0, 5, (6, 4))
    losses = -np.take_along_axis(log_softmax(logits.astype(np.float64), -1), labels[..., None], -1)[..., 0]
    np.testing.assert_allclose(log_loss(logits, labels), losses.mean(1), rtol=1e-6)
    np.testing.assert_allclose(log_loss(softmax(logits, -1), labels), losses.mean(1), rtol=1e-5)
    found = measure(METRICS["perplexity"], log_loss(logits, labels))
    assert found.value == pytest.approx(np.exp(losses.mean()))
    assert found.low is not None and found.low < found.value < (found.high or 0)
    padded = np.where(np.arange(4) < 3, labels, -100)  # torch's word for "no label"
    np.testing.assert_allclose(log_loss(logits, padded), losses[:, :3].mean(1), rtol=1e-6)
    sure = np.where(np.eye(5)[labels] > 0, 100.0, -100.0)
    assert measure(METRICS["perplexity"], log_loss(sure, labels)).value == pytest.approx(1.0)
    assert measure(METRICS["perplexity"], log_loss(np.zeros((2, 3, 5)), labels[:2, :3])).value == pytest.approx(5.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_perplexity_of_a_broken_output_is_infinite(bad: float) -> None:
    logits = np.zeros((2, 3, 4))
    logits[1, 2] = bad
    assert log_loss(logits, np.zeros((2, 3), int)).tolist() == [pytest.approx(np.log(4)), np.inf]
    assert measure(METRICS["perplexity"], log_loss(logits, np.zeros((2, 3), int))).value == np.inf


def test_a_drop_is_what_is_worse_whichever_way_the_metric_counts() -> None:
    before, rise = RNG.normal(2.0, 0.5, 50), RNG.normal(0.02, 0.001, 50)
    found = drop(METRICS["perplexity"], before, before + rise)
    assert found.value == pytest.approx(np.exp(rise.mean()) - 1)
    ratio = np.exp((before + rise).mean()) / np.exp(before.mean())
    assert found.value == pytest.approx(ratio - 1), "a share of the reference's perplexity"
    assert 0.0195 < found.low < found.value < found.high < 0.0209, "paired: texts differ far more than models"
    assert drop(METRICS["perplexity"], before + rise, before).value < 0, "better is no drop"
    right = np.arange(50) < 40
    assert drop(METRICS["top1"], np.ones(50), right).value == pytest.approx(0.2)


def test_shares_take_wilsons_interval() -> None:
    """Newcombe 1998, table I: 81 of 263 gives 0.2553 to 0.3662, 0 of 20 gives 0 to 0.1611."""
    share = interval_mean(np.arange(263) < 81)
    assert (share.low, share.high) == (pytest.approx(0.2553, abs=5e-5), pytest.approx(0.3662, abs=5e-5))
    none = interval_mean(np.zeros(20))
    assert (none.value, none.low, none.high) == (0.0, 0.0, pytest.approx(0.1611, abs=5e-5))


def test_means_take_students_interval() -> None:
    """t quantiles of a printed table: 3.182 at 3, 2.262 at 9 degrees of freedom; the expansion is right to 0.2 %."""
    for n, t in ((4, 3.182), (10, 2.262)):
        x = RNG.normal(size=n)
        found = interval_mean(x)
        assert found.high - found.value == pytest.approx(t * x.std(ddof=1) / math.sqrt(n), rel=2e-3)
        assert found.value - found.low == pytest.approx(found.high - found.value)


def test_too_few_or_broken_values_have_no_interval() -> None:
    assert interval_mean([0.3, 0.4]) == (pytest.approx(0.35), None, None)
    assert interval_mean([0.3, -np.inf, 0.4]) == (-np.inf, None, None)


def test_a_drop_is_positive_and_no_change_is_no_proof() -> None:
    a, b = np.ones(100), np.r_[np.zeros(3), np.ones(97)]
    drop = interval_paired_difference(a, b)
    assert drop.value == pytest.approx(0.03)
    assert drop.low < drop.value < drop.high
    assert interval_paired_difference(b, a).value == pytest.approx(-0.03)
    same = interval_paired_difference(np.ones(20), np.ones(20))
    assert same.value == 0
    assert same.low < -0.05
    assert same.high > 0.05
    # Pairing: both change much from sample to sample, their difference hardly.
    x = RNG.normal(size=50)
    found = interval_paired_difference(x + 1e-3 * RNG.normal(size=50), x)
    assert found.high - found.low < 2e-3


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """600 trials at 95 % hold it 570 ± 5.3 times; skew costs a mean some, and 540 is 90 %."""
    rng = np.random.default_rng(3)
    held = dict.fromkeys(("share", "mean", "drop"), 0)
    for _ in range(600):
        share = interval_mean(rng.random(40) < 0.8)
        mean = interval_mean(rng.exponential(size=40))
        change = rng.random(80)
        drop = interval_paired_difference(change < 0.1, (change >= 0.1) & (change < 0.15))
        held["share"] += share.low <= 0.8 <= share.high
        held["mean"] += mean.low <= 1.0 <= mean.high
        held["drop"] += drop.low <= 0.05 <= drop.high
    assert min(held.values()) >= 540, held


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: interval_mean([]), "no values"),
        (lambda: interval_paired_difference([1, 0], [1]), "2 values can't be paired with 1"),
    ],
)
def test_misuse_of_an_interval_is_told(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
