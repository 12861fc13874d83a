"""Scores against the truth: one value a sample, or one of all samples, with an interval either way (L8)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeq.num.intervals import Interval, interval_mean, interval_paired_difference
from edgeq.run.record import Feed

GROUPS = 20  # of the jackknife; Student's t of 19 degrees of freedom at 95 %:
T_19 = 2.093


@dataclass(frozen=True)
class Score:
    """A metric that needs the truth. ``sample(values, label)`` or, of all samples together, ``corpus(values, labels)``.

    ``values`` are a sample's inputs and outputs by name.
    """

    name: str
    sample: Callable[[Feed, Any], float] | None = None
    corpus: Callable[[list[Feed], list[Any]], float] | None = None


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
        if self._score.sample is not None:
            self._values.append(float(self._score.sample(values, label)))
        else:
            self._corpus.append(values)
            self._labels.append(label)

    def value(self) -> Interval:
        if self._values:
            return interval_mean(self._values)
        return jackknife(self._of_all, len(self._corpus))

    def drop_to(self, other: Scores) -> Interval:
        """This score minus the other's, paired by sample."""
        if self._values:
            return interval_paired_difference(self._values, other._values)
        return jackknife(lambda kept: self._of_all(kept) - other._of_all(kept), len(self._corpus))

    def _of_all(self, kept: list[int]) -> float:
        assert self._score is not None and self._score.corpus is not None
        return float(self._score.corpus([self._corpus[i] for i in kept], [self._labels[i] for i in kept]))


def jackknife(statistic: Callable[[list[int]], float], count: int) -> Interval:
    """Delete-a-group jackknife (Tukey 1958): a statistic of ``count`` samples and how it varies without each group."""
    value = statistic(list(range(count)))
    if count < 2 * GROUPS:
        return Interval(value, None, None)
    parts = [statistic([i for i in range(count) if i % GROUPS != group]) for group in range(GROUPS)]
    half = T_19 * float(np.sqrt((GROUPS - 1) * np.var(parts)))
    return Interval(value, value - half, value + half)
