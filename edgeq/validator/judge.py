"""Accuracy of an artefact against its reference on held-out samples -> Checks (L8).

The outputs are compared sample by sample and only the scores are kept, instead of collecting outputs: memory doesn't
grow with the samples. The reference's outputs are kept while they are small, since a repair loop asks again and again.

Which limits hold when the user sets none on accuracy: the metric drops by at most what ``MAX_DROPS`` says, else by
``MAX_DROP``, or where samples are right or wrong and fewer than 200 by one of them, since less can't be told (graded
scores, and metrics of all samples such as an AUC, can fall by less); a class-like output agrees in its largest class on
``MIN_AGREEMENT`` of the positions, any other has a cosine of ``MIN_COSINE``; integer outputs match in ``MIN_AGREEMENT``
of the samples.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime

from edgeq.errors import ModelError, SampleError, UsageError, did_you_mean
from edgeq.num import metrics
from edgeq.num.intervals import Interval
from edgeq.num.metrics import METRICS, Metric
from edgeq.report.record import Check
from edgeq.report.rows import number
from edgeq.run.record import Array, Feed, Samples
from edgeq.run.session import Session, open_session, output_specs, run_session
from edgeq.source.import_path import load
from edgeq.target.record import CPU, Provider
from edgeq.validator.limits import AT_LEAST, Limits, held
from edgeq.validator.score import Score, Scores, score_of

MAX_DROP, MIN_AGREEMENT, MIN_COSINE = 0.005, 0.97, 0.99
MAX_DROPS = {"perplexity": 0.02}  # a share of the reference's
ONE_SAMPLE = 1.001  # a sample and the rounding of the division
CACHE_BYTES = 64 << 20  # outputs of the reference kept between calls of one Judge
PERFECT = {"cosine": 1.0, "exact_match": 1.0, "agreement_top1": 1.0}
Values = dict[tuple[str, str], list[tuple[float, str]]]  # (metric, output) -> the value and kind of each sample
WORST = {"snr_db": -np.inf, "cosine": -np.inf, "max_abs": np.inf}  # of outputs that differ in shape; else 0


class Judge:
    """Compares artefacts with one reference on one set of samples; a call is one artefact -> its accuracy checks.

    The reference runs on the CPU, in its own float format, whatever ``provider`` the artefacts run on;
    ``opener`` opens these. Notes name the worst ``kind`` of samples, where they have kinds.

    A custom metric ``fn(values, label) -> float`` gets a sample's inputs and outputs by name and its label (None
    without labels); higher is better. With an attribute ``corpus = True`` it is called once as ``fn(list of values,
    list of labels)``; its interval is a jackknife in 20 parts, which unlike a bootstrap repeats no sample (repeats
    would break retrieval metrics). With ``group``, a function of a label, samples whose group is equal are left out
    together. Positions an input ``attention_mask`` [b, s] hides are left out of outputs
    [b, s, …] wherever outputs are compared. A sample is a row of the batch.
    """

    def __init__(
        self,
        reference: Path | onnx_ir.Model,
        samples: Samples,
        *,
        metric: str | None = None,
        limits: Limits | None = None,
        threads: int = 2,
        provider: Provider = CPU,
        opener: Callable[..., Session] = open_session,
        kind: Callable[[Feed], str] | None = None,
    ) -> None:
        self.samples, self._open, self._kind = samples, opener, kind
        self._metric = metric
        self._settings: dict[str, Any] = {"threads": threads, "provider": provider}
        self._session = open_session(
            reference, threads=threads, provider=provider if provider.name == CPU.name else CPU
        )
        self.outputs = [spec.name for spec in output_specs(self._session)]
        self._kept: dict[int, Feed] = {}
        self._kept_bytes = 0
        first = self._expected(0, samples.read(0))
        self._class_output = next((name for name in self.outputs if self._class_like(name, first[name])), None)
        self._comparisons = {name: self._compared_by(name, first[name]) for name in self.outputs}
        self._score = self._resolve(metric)
        self._given = self._on_accuracy(limits or {})
        self._limits = self._given or self._default_limits()

    def __call__(self, artifact: Path, provider: Provider | None = None) -> tuple[Check, ...]:
        """Accuracy checks of one file, on ``provider`` where one is given, else on the judge's. ModelError when it has
        not all outputs of the reference."""
        settings = self._settings if provider is None else {**self._settings, "provider": provider}
        session = self._open(artifact, **settings)
        _same_outputs(self.outputs, session, artifact)
        return self.judged((feed, run_session(session, feed, self.outputs)) for feed in self.samples)

    def judged(self, runs: Iterable[tuple[Feed, Feed]]) -> tuple[Check, ...]:
        """Accuracy checks of ``outputs`` computed anywhere: each sample with them, in order."""
        values: Values = defaultdict(list)
        expected, found = Scores(self._score), Scores(self._score)
        for index, (feed, test) in enumerate(runs):
            label = None if self.samples.labels is None else self.samples.labels[index]
            truth = self._expected(index, feed)
            for output in self.outputs:
                for name in self._comparisons[output]:
                    kind = self._kind(feed) if self._kind else ""
                    values[name, output] += [(v, kind) for v in _compare(name, truth[output], test[output], feed)]
            expected.add({**feed, **truth}, label)
            found.add({**feed, **test}, label)
        return (*self._score_checks(expected, found), *self._comparison_checks(values))

    def _expected(self, index: int, feed: Feed) -> Feed:
        """Outputs of the reference for sample ``index``, kept while ``CACHE_BYTES`` last."""
        if index in self._kept:
            return self._kept[index]
        outputs = run_session(self._session, feed, self.outputs)
        size = sum(array.nbytes for array in outputs.values())
        if self._kept_bytes + size <= CACHE_BYTES:
            self._kept[index] = outputs
            self._kept_bytes += size
        return outputs

    def _class_like(self, name: str, array: Array) -> bool:
        return metrics.class_like(name, array, self.samples.each_label)

    def _compared_by(self, name: str, array: Array) -> tuple[str, ...]:
        if array.dtype.kind not in "fV":
            return ("exact_match",)
        wanted = ["snr_db", "cosine", "max_abs"]
        rows = array.ndim >= 2 and array.shape[-1] >= 2
        if name == self._class_output or (self._metric == "agreement_top1" and rows):
            wanted.append("agreement_top1")
        if self._metric == "exact_match":
            wanted.append("exact_match")
        return tuple(wanted)

    def _resolve(self, metric: str | None) -> Score | None:
        """The metric that needs the truth, if any: asked for, or top1 where labels and output are of classes."""
        labels = self.samples.labels
        if metric is None:
            whole = bool(labels) and all(isinstance(one, int) for one in self.samples.each_label)
            return self._classified("top1") if whole and self._class_output else None
        if ":" in metric:
            score = score_of(metric.rpartition(":")[2], load(metric))  # as limits call it, whatever it calls itself
            if score.group is not None and labels is None:
                raise SampleError(
                    f"metric {metric!r} groups samples by their label, {self.samples.origin} has none",
                    hint="add a key 'label' or labels.csv, or give a metric without `group`",
                )
            return score
        if not metrics.metric(metric).needs_labels:
            return None
        if labels is None:
            raise SampleError(
                f"metric {metric!r} needs labels, {self.samples.origin} has none",
                hint="add a key 'label', labels.csv or a folder a class; or choose agreement_top1, which needs none",
            )
        return self._classified(metric)

    def _classified(self, metric: str) -> Score:
        """A built-in metric of class scores against labels."""
        row, output = METRICS[metric], self._class_output or self._labelled_output()
        if output is None:
            raise UsageError(
                f"metric {metric!r} needs an output of class scores, the model has {', '.join(self.outputs)}",
                hint="choose cosine or snr_db, or give pkg.module:function",
            )

        def sample(values: Feed, label: Any) -> float:
            outputs, truth = values[output], np.asarray(label)
            fits = truth.size == math.prod(outputs.shape[:-1])
            return float(row.function(outputs, truth.reshape(outputs.shape[:-1]) if fits else truth).mean())

        return Score(metric, sample, row=row)

    def _labelled_output(self) -> str | None:
        """The float output [n, …, classes] that has a position for each of the first sample's labels, if one alone
        does: the logits of a language model by whatever name."""
        assert self.samples.labels is not None
        count = np.size(self.samples.labels[0])
        first = self._expected(0, self.samples.read(0))
        found = [
            name
            for name, array in first.items()
            if array.dtype.kind in "fV" and array.ndim > 2 and math.prod(array.shape[:-1]) == count
        ]
        return found[0] if len(found) == 1 else None

    def _on_accuracy(self, limits: Limits) -> Limits:
        """Those of the user's limits that are on accuracy."""
        score = {self._score.name, f"{self._score.name}_drop"} if self._score else set()
        ours = {*AT_LEAST, "max_abs", *(f"{name}_drop" for name in PERFECT), *score}
        return {name: value for name, value in limits.items() if name in ours}

    def _default_limits(self) -> Limits:
        kinds = {name for names in self._comparisons.values() for name in names}
        if self._class_output:
            default = {"agreement_top1": MIN_AGREEMENT}
        else:
            default = {"cosine": MIN_COSINE} if "cosine" in kinds else {"exact_match": MIN_AGREEMENT}
        drop = {f"{self._score.name}_drop": MAX_DROPS.get(self._score.name, MAX_DROP)} if self._score else {}
        return default | drop

    def _score_checks(self, expected: Scores, found: Scores) -> list[Check]:
        if self._score is None:
            return []
        name, count, limits = self._score.name, len(self.samples), self._limits
        if not self._given:
            limits = {**limits, f"{name}_drop": max(limits[f"{name}_drop"], ONE_SAMPLE * expected.step)}
        before, after, drop = expected.value(), found.value(), expected.drop_to(found)
        note = ""
        if name == "top1" and before.high is not None and before.high < 0.1:
            note = f"the reference itself is right on {before.value:.1%}: are these labels this model's?"
        return [
            held(f"{name}_reference", before, {}, samples=count, note=note),
            held(name, after, limits, samples=count, at_least=self._score.higher_is_better),
            held(f"{name}_drop", drop, limits, samples=count),
        ]

    def _comparison_checks(self, values: Values) -> list[Check]:
        """Of every metric its worst output."""
        checks = []
        for name in dict.fromkeys(name for name, _ in values):
            row = METRICS[name]
            measured = {
                output: (metrics.measure(row, np.array([value for value, _ in found])), len(found))
                for (other, output), found in values.items()
                if other == name
            }
            pick = min if row.higher_is_better else max
            worst = pick(measured, key=lambda output: measured[output][0].value)
            interval, count = measured[worst]
            notes = [f"output {worst!r}, the worst of {len(measured)}"] if len(measured) > 1 else []
            notes += _worst_kind(row, values[name, worst])
            checks.append(held(name, interval, self._limits, unit=row.unit, samples=count, note="; ".join(notes)))
            if name in PERFECT and name == self._metric:
                checks.append(held(f"{name}_drop", _from(PERFECT[name], interval), self._limits, samples=count))
        return checks


def _worst_kind(row: Metric, values: Sequence[tuple[float, str]]) -> list[str]:
    """The kind of samples with the worst value, in words, where there are several."""
    kinds: dict[str, list[float]] = defaultdict(list)
    for value, kind in values:
        kinds[kind].append(value)
    if len(kinds) < 2:
        return []
    measured = {kind: metrics.measure(row, np.array(found)).value for kind, found in kinds.items()}
    worst = (min if row.higher_is_better else max)(measured, key=measured.__getitem__)
    return [f"worst in {worst}: {number(measured[worst])} on {len(kinds[worst])} samples"]


def accuracy(reference: Path | onnx_ir.Model, artifact: Path, samples: Samples, **settings: Any) -> tuple[Check, ...]:
    """Accuracy checks of one artefact; ``settings`` are those of ``Judge``."""
    return Judge(reference, samples, **settings)(artifact)


def _same_outputs(wanted: Sequence[str], session: onnxruntime.InferenceSession, path: Path) -> None:
    found = [spec.name for spec in output_specs(session)]
    for name in wanted:
        if name not in found:
            raise ModelError(f"{path} has no output {name!r}, the reference has", hint=did_you_mean(name, found))


def _compare(name: str, reference: Array, test: Array, feed: Feed) -> list[float]:
    """The metric's value of each sample in one feed's output."""
    if reference.shape != test.shape:
        return [float(WORST.get(name, 0.0))]
    function = METRICS[name].function
    rows = zip(_rows(reference, feed), _rows(test, feed), strict=True)
    return [float(function(one, other)[0]) for one, other in rows]


def _rows(output: Array, feed: Feed) -> list[Array]:
    """An output as arrays [1, …], one a sample, without padded positions."""
    batch = next((array.shape[0] for array in feed.values() if array.ndim), 1)
    if output.ndim == 0 or output.shape[0] != batch:
        return [output[None]]  # no batch axis in front, such as a recurrent state: the feed is one sample
    mask = feed.get("attention_mask")
    if mask is None or mask.ndim != 2 or output.shape[:2] != mask.shape:
        return [output[i : i + 1] for i in range(batch)]
    return [output[i : i + 1, mask[i] != 0] for i in range(batch)]


def _from(perfect: float, interval: Interval) -> Interval:
    value, low, high = interval
    return Interval(perfect - value, None if high is None else perfect - high, None if low is None else perfect - low)
