"""Scores against the truth: one value a sample, or one of all samples, with an interval either way (L8)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeq.errors import UsageError
from edgeq.num import metrics
from edgeq.num.intervals import Interval, interval_mean, interval_paired_difference
from edgeq.num.metrics import Metric
from edgeq.run.record import Feed

PARTS = 20  # of the jackknife; Student's t of 19 degrees of freedom at 95 %:
T_19 = 2.093


@dataclass(frozen=True)
class Score:
    """A metric that needs the truth. ``sample(values, label)`` or, of all samples together, ``corpus(values, labels)``.

    ``values`` are a sample's inputs and outputs by name. ``group(label)`` is what samples share that count together
    only (a question and its answer) or are no evidence apart (frames of one film); None: each stands alone. ``row``:
    the built-in metric whose values ``sample`` gives; without one higher is better.
    """

    name: str
    sample: Callable[[Feed, Any], float] | None = None
    corpus: Callable[[list[Feed], list[Any]], float] | None = None
    group: Callable[[Any], Hashable] | None = None
    row: Metric | None = None

    @property
    def higher_is_better(self) -> bool:
        return self.row is None or self.row.higher_is_better


def score_of(name: str, function: Callable[..., float]) -> Score:
    """A function of the user's as a Score, by its attributes ``corpus`` and ``group``."""
    group = getattr(function, "group", None)
    if getattr(function, "corpus", False):
        return Score(name, corpus=function, group=group)
    return Score(name, function, group=group)


class Scores:
    """Scores of one model over the samples: a value each, or the inputs of a metric over all of them."""

    def __init__(self, score: Score | None) -> None:
        self._score = score
        self._values: list[float] = []
        self._corpus: list[Feed] = []
        self._labels: list[Any] = []

    def add(self, values: Feed, label: Any) -> None:
        if self._score is None:
            return
        self._labels.append(label)
        if self._score.sample is not None:
            self._values.append(float(self._score.sample(values, label)))
        else:
            self._corpus.append(values)

    def value(self) -> Interval:
        if self._score is not None and self._score.row is not None:
            return metrics.measure(self._score.row, np.array(self._values))
        if self._apart:
            return interval_mean(self._values)
        return jackknife(self._of, self._units())

    @property
    def step(self) -> float:
        """What one sample changes that turns from right to wrong. 0 where there is no such step: scores are graded, or
        the metric is of all samples, and only it knows (an AUC moves by one pair of them)."""
        if self._score is None or self._score.corpus is not None or not self._values:
            return 0.0
        if self._score.row is not None and self._score.row.name == "top1":
            return 1 / sum(map(np.size, self._labels))  # a batch's score is the mean of its rows
        return 1 / len(self._values) if np.isin(self._values, (0.0, 1.0)).all() else 0.0

    def drop_to(self, other: Scores) -> Interval:
        """How much worse the other is, paired by sample: this score minus the other's, or as the metric says."""
        if self._score is not None and self._score.row is not None:
            return metrics.drop(self._score.row, np.array(self._values), np.array(other._values))
        if self._apart:
            return interval_paired_difference(self._values, other._values)
        return jackknife(lambda kept: self._of(kept) - other._of(kept), self._units())

    @property
    def _apart(self) -> bool:
        """Whether each sample has a value and is evidence of its own."""
        return self._score is not None and self._score.sample is not None and self._score.group is None

    def _of(self, kept: list[int]) -> float:
        assert self._score is not None
        if self._score.corpus is None:
            return float(np.mean([self._values[i] for i in kept]))
        return float(self._score.corpus([self._corpus[i] for i in kept], [self._labels[i] for i in kept]))

    def _units(self) -> list[list[int]]:
        """Indices of the samples that stay together, in the order of their first."""
        if self._score is None or self._score.group is None:
            return [[index] for index in range(len(self._labels))]
        units: dict[Hashable, list[int]] = defaultdict(list)
        for index, label in enumerate(self._labels):
            units[_hashable(self._score.group(label), label, self._score.name)].append(index)
        return list(units.values())


def _hashable(key: Any, label: Any, name: str) -> Hashable:
    try:
        hash(key)
    except TypeError as error:
        raise UsageError(
            f"{name}.group gave {type(key).__name__} for label {label}, expected what can be compared by hash",
            hint="return a number, a text or a tuple of these",
        ) from error
    return key  # type: ignore[no-any-return]


def jackknife(statistic: Callable[[list[int]], float], units: Sequence[Sequence[int]]) -> Interval:
    """Delete-a-group jackknife (Tukey 1958): a statistic of all samples and how it varies without each of ``PARTS``.

    ``units`` are the indices of samples that are left out together; too few of them have no interval."""

    def without(part: int | None) -> float:
        kept = [unit for number, unit in enumerate(units) if part is None or number % PARTS != part]
        return statistic(sorted(index for unit in kept for index in unit))

    value = without(None)
    if len(units) < 2 * PARTS:
        return Interval(value, None, None)
    half = T_19 * float(np.sqrt((PARTS - 1) * np.var([without(part) for part in range(PARTS)])))
    return Interval(value, value - half, value + half)
