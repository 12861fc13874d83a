"""How far an artefact's outputs are from the truth: one value a sample, arrays in, numbers out (L1).

A metric gives f64[n], one value for each sample along the first axis, instead of one number: intervals and paired
tests need them apart, and batches of any size can be concatenated. Outputs that aren't finite never look good:
where the reference doesn't hold the same infinity there, the sample is as bad as the metric can say, so that the mean
over all samples is infinitely bad too (snr_db, cosine, max_abs) or the sample counts as wrong (the others).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgeq.errors import ModelError, SampleError, UsageError, did_you_mean
from edgeq.num.intervals import Interval, interval_mean, interval_paired_difference

F64 = NDArray[np.float64]
Array = NDArray[Any]

SNR_CAP_DB = 150.0  # as good as equal: float32 rounds at 149 dB (6.02 * 24 bits + 4.8)


@dataclass(frozen=True)
class Metric:
    """``function(outputs, labels)`` where labels are needed, else ``function(reference, test)``: f64[n], in ``unit``.

    ``summary`` says what one number stands for all samples: their mean, the exponential of it, or their largest."""

    name: str
    higher_is_better: bool
    needs_labels: bool
    unit: str
    function: Callable[[Array, Array], F64]
    summary: Literal["mean", "exp", "max"] = "mean"


def snr_db(reference: Array, test: Array) -> F64:
    """Signal to noise, ``10 log10(sum r**2 / sum (r - t)**2)`` a sample, f64[n] within ±150 dB; -inf if not finite.

    A reference of zeros gives the best value when met and the worst otherwise."""
    r, t, broken = _samples(reference, test)
    if max(np.asarray(reference).dtype.itemsize, np.asarray(test).dtype.itemsize) > 4:
        # Scaled by each sample's largest value: squares of tiny outputs would underflow, those of huge ones overflow.
        size = np.maximum(np.abs(r).max(1, initial=0.0), np.abs(t).max(1, initial=0.0))[:, None]
        size[size == 0.0] = 1.0
        r, t = r / size, t / size
    signal, noise = _squares(r), _squares(r - t)
    with np.errstate(divide="ignore"):
        value = 10 * (np.log10(signal) - np.log10(np.where(noise > 0, noise, 1.0)))
    value = np.clip(np.where(noise > 0, value, SNR_CAP_DB), -SNR_CAP_DB, SNR_CAP_DB)
    return np.where(broken, -np.inf, value)


def cosine(reference: Array, test: Array) -> F64:
    """Cosine of the angle between the two, a sample, f64[n]; zeros against zeros give 1, against others 0."""
    r, t, broken = _samples(reference, test)
    r, t = _unit(r), _unit(t)
    value = np.where((r == 0).all(1) & (t == 0).all(1), 1.0, np.clip((r * t).sum(1), -1.0, 1.0))
    return np.where(broken, -np.inf, value)


def max_abs(reference: Array, test: Array) -> F64:
    """Largest absolute difference a sample, f64[n], in the output's own unit; inf if not finite."""
    r, t, broken = _samples(reference, test)
    return np.where(broken, np.inf, np.abs(r - t).max(1, initial=0.0))


def exact_match(reference: Array, test: Array) -> F64:
    """1 where every element of a sample is equal, else 0, f64[n]; any dtype, text too. NaN equals nothing."""
    r, t = _same_shape(reference, test)
    return np.asarray(np.asarray(r == t).reshape(len(r), -1).all(1), np.float64)


def agreement_top1(reference: Array, test: Array) -> F64:
    """Share of a sample's positions where both have their largest value in the same place of the last axis, f64[n]."""
    r, t = _same_shape(reference, test)
    return _share(_top(r) == _top(t), r, t)


def top1(outputs: Array, labels: ArrayLike) -> F64:
    """Share of a sample's positions where the largest of ``outputs`` [n, …, classes] is at ``labels`` [n, …], f64[n].

    Raises SampleError when labels aren't whole numbers, don't fit in shape or name a class the model doesn't have."""
    out, truth = _classes(outputs, labels, "top1")
    return _share(_top(out) == truth, out)


def log_loss(outputs: Array, labels: ArrayLike) -> F64:
    """Mean over a sample's positions of -log p(label), f64[n] in nats; inf where it isn't finite. ``outputs``
    [n, …, classes] are logits or distributions, ``labels`` [n, …] class indices, of a language model the next tokens;
    a position whose label is below 0 has none and doesn't count.

    Raises SampleError as ``top1`` does, and for a sample without a label."""
    out, truth = _classes(outputs, labels, "perplexity", without=True)
    rows, wanted = out.reshape(len(out), -1, out.shape[-1]), truth.reshape(len(out), -1).astype(np.intp)
    counted = wanted >= 0
    if not counted.any(1).all():
        raise SampleError("a sample has no label at or above 0", hint="leave out samples without a token to predict")
    given, losses = distributions(out), np.zeros(wanted.shape)
    for sample, (row, place) in enumerate(zip(rows, np.maximum(wanted, 0), strict=True)):
        losses[sample] = -np.take_along_axis(_log_classes(row.astype(np.float64), given), place[:, None], -1)[:, 0]
    losses = np.where(np.isfinite(losses), losses, np.inf)
    return np.asarray(np.where(counted, losses, 0.0).sum(1) / counted.sum(1), np.float64)


def _classes(outputs: Array, labels: ArrayLike, name: str, *, without: bool = False) -> tuple[Array, Array]:
    """Outputs [n, …, classes] and the labels [n, …] that belong to them; ``without``: those below 0 are none."""
    out, truth = _with_samples(np.asarray(outputs)), np.asarray(labels)
    if truth.ndim == out.ndim and truth.shape[-1] == 1:
        truth = truth[..., 0]
    if truth.shape != out.shape[:-1]:
        hint = "give one label a sample" if out.ndim == 2 else "give one label a position"
        raise SampleError(f"labels of shape {truth.shape} for outputs of shape {out.shape}", hint=hint)
    if truth.dtype.kind not in "iub" and not (truth.dtype.kind == "f" and (truth == np.rint(truth)).all()):
        raise SampleError(f"labels are {truth.dtype}, {name} needs class indices", hint="use whole numbers from 0")
    if truth.size and not ((without or truth.min() >= 0) and truth.max() < out.shape[-1]):
        raise SampleError(
            f"labels from {truth.min()} to {truth.max()} for {out.shape[-1]} classes",
            hint="check that labels count from 0 and belong to this model",
        )
    return out, truth


def class_like(name: str, array: Array, labels: Sequence[Any] = ()) -> bool:
    """Whether an output holds scores of classes on the last axis: distributions, or [n, classes] with ``labels`` that
    are classes, or called "logits". Anything else of two axes may as well be an embedding, whose largest element means
    nothing."""
    if array.dtype.kind not in "fV" or array.ndim < 2 or array.shape[-1] < 2:
        return False
    if distributions(array):
        return True
    classes = bool(labels) and all(isinstance(one, int) and 0 <= one < array.shape[-1] for one in labels)
    return array.ndim == 2 and (classes or "logit" in name.lower())


def distributions(array: Array) -> bool:
    """Whether each row of the last axis is a distribution."""
    values = array.astype(np.float64)
    return bool(values.min(initial=0.0) >= 0 and np.allclose(values.sum(-1), 1, atol=1e-3))


def kl_divergence(reference: Array, test: Array) -> F64:
    """Kullback-Leibler divergence of what ``test`` says of the classes from what ``reference`` says, f64[n] in nats:
    the mean over a sample's positions; inf if not finite. Both are distributions when the reference is, else logits."""
    r, t = _same_shape(reference, test)
    given = distributions(r)
    before, after = (_log_classes(x.astype(np.float64), given) for x in (r, t))
    with np.errstate(invalid="ignore"):
        apart = (np.exp(before) * (before - after)).sum(-1)
    value: F64 = np.where(np.isfinite(apart), np.maximum(apart, 0.0), np.inf).reshape(len(r), -1).mean(1)
    return value


def _log_classes(x: F64, given: bool) -> F64:
    """Log-probabilities along the last axis of distributions (``given``), held above 1e-12, or of logits."""
    if given:
        x = np.log(np.maximum(x, 1e-12))
    with np.errstate(invalid="ignore"):
        x = x - x.max(-1, keepdims=True)
        return np.asarray(x - np.log(np.exp(x).sum(-1, keepdims=True)), np.float64)


METRICS: dict[str, Metric] = {
    row.name: row
    for row in (
        Metric("snr_db", True, False, "dB", snr_db),
        Metric("cosine", True, False, "", cosine),
        Metric("max_abs", False, False, "", max_abs, "max"),
        Metric("exact_match", True, False, "", exact_match),
        Metric("agreement_top1", True, False, "", agreement_top1),
        Metric("top1", True, True, "", top1),
        Metric("perplexity", False, True, "", log_loss, "exp"),
    )
}


def metric(name: str) -> Metric:
    """The built-in metric called ``name``. Raises UsageError with the nearest name when there is none."""
    if name not in METRICS:
        raise UsageError(f"unknown metric {name!r}", hint=did_you_mean(name, list(METRICS)))
    return METRICS[name]


def measure(what: Metric, values: F64, level: float = 0.95) -> Interval:
    """The metric's f64[n] values as one number: their mean with its interval, or what ``summary`` says; the largest has
    no interval."""
    if what.summary == "max":
        return Interval(float(values.max()), None, None)
    mean = interval_mean(values, level)
    return mean if what.summary == "mean" else _mapped(mean, np.exp)


def drop(what: Metric, before: F64, after: F64, level: float = 0.95) -> Interval:
    """How much worse ``after`` is, paired by sample, both f64[n]: in the metric's unit, or as a share of ``before``
    where the number is the exponential of a mean. Below 0: better. Not for the largest of all samples."""
    better, worse = (before, after) if what.higher_is_better else (after, before)
    mean = interval_paired_difference(better, worse, level)
    return mean if what.summary == "mean" else _mapped(mean, np.expm1)


def _mapped(interval: Interval, function: Callable[[float], Any]) -> Interval:
    """An interval through an increasing function; what is too large is infinite."""
    with np.errstate(over="ignore"):
        value, low, high = (None if x is None else float(function(x)) for x in interval)
    assert value is not None
    return Interval(value, low, high)


def _with_samples(x: Array) -> Array:
    if x.ndim == 0 or len(x) == 0:
        raise SampleError(f"outputs of shape {x.shape} hold no sample", hint="the first axis has to be the samples'")
    return x


def _same_shape(reference: Array, test: Array) -> tuple[Array, Array]:
    r, t = np.asarray(reference), np.asarray(test)
    if r.shape != t.shape:
        raise ModelError(
            f"outputs differ in shape: reference {r.shape}, test {t.shape}",
            hint="compare the same output of both models on the same inputs",
        )
    return _with_samples(r), t


def _samples(reference: Array, test: Array) -> tuple[F64, F64, NDArray[np.bool_]]:
    """Both as f64[n, elements], and which samples are broken: hold a value that isn't finite and not the same in both.

    Equal infinities (a mask's -inf) say nothing about either side and are set to 0, as broken values are."""
    r, t = _same_shape(reference, test)
    _numeric(r, t)
    r, t = (x.reshape(len(x), -1).astype(np.float64) for x in (r, t))
    odd = ~(np.isfinite(r) & np.isfinite(t))
    broken: NDArray[np.bool_] = (odd & (r != t)).any(1)
    return (np.where(odd, 0.0, r), np.where(odd, 0.0, t), broken) if odd.any() else (r, t, broken)


def _squares(x: F64) -> F64:
    """Sum of squares of each row, without an array of them."""
    return np.asarray(np.einsum("ij,ij->i", x, x), np.float64)


def _numeric(*arrays: Array) -> None:
    for x in arrays:
        if x.dtype.kind in "OSUTMm":
            raise ModelError(f"an output of {x.dtype} has no numeric error", hint="use exact_match")


def _unit(x: F64) -> F64:
    """Rows scaled to length 1; rows of zeros stay. In two divisions, so that no square over- or underflows."""
    largest = np.abs(x).max(1, initial=0.0, keepdims=True)
    x = x / np.where(largest > 0, largest, 1.0)
    length = np.sqrt((x * x).sum(1, keepdims=True))
    unit: F64 = x / np.where(length > 0, length, 1.0)
    return unit


def _top(x: Array) -> NDArray[np.intp]:
    if x.ndim < 2 or x.shape[-1] < 2:
        raise ModelError(f"outputs of shape {x.shape} have no classes along the last axis", hint="use snr_db or cosine")
    _numeric(x)
    return np.asarray(np.argmax(x, axis=-1))


def _share(right: NDArray[np.bool_], *outputs: Array) -> F64:
    """Mean of ``right`` [n, …] a sample, positions with NaN in any of ``outputs`` [n, …, classes] being wrong.

    A sample without positions (a detector's with no box) has nothing wrong: 1."""
    for x in outputs:
        right = right & ~np.isnan(x.astype(np.float64)).any(-1)
    wrong: F64 = (~right).reshape(len(right), -1).sum(1) / max(1, right[0].size)
    return 1.0 - wrong
