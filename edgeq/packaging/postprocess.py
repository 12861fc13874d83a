"""How a model's output becomes an answer, as data: activation, threshold, best classes with their labels (L8).

A record with a JSON form, like ``run.preprocess``: every loader applies the same steps, so that an app shows what was
validated. It fits classifiers; boxes and text stay the app's work.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from edgeq.errors import UsageError, did_you_mean
from edgeq.packaging.record import Golden
from edgeq.run.record import Array

ACTIVATIONS = ("none", "softmax", "sigmoid")
TOP = 5


@dataclass(frozen=True)
class Postprocessing:
    """Steps in order, over the last axis of ``output``: ``activation``, drop scores below ``threshold``, keep the
    ``top`` highest (0: all; of equal scores the first class comes first)."""

    output: str
    activation: str = "none"
    top: int = TOP
    threshold: float = 0.0

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            hint = did_you_mean(str(self.activation), list(ACTIVATIONS))
            raise UsageError(f"postprocessing key 'activation' is {self.activation!r}", hint=hint)
        if not isinstance(self.top, int) or self.top < 0:
            raise UsageError(f"postprocessing key 'top' is {self.top!r}, expected a whole number", hint="0 keeps all")

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Postprocessing:
        """JSON form -> Postprocessing. UsageError on an unknown, missing or bad key."""
        known = [field.name for field in fields(cls)]
        for key in record:
            if key not in known:
                raise UsageError(f"unknown postprocessing key {key!r}", hint=did_you_mean(key, known))
        if "output" not in record:
            raise UsageError("postprocessing has no key 'output'", hint="name the output that holds the scores")
        return cls(**record)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; ``from_dict`` reads them back."""
        return asdict(self)


def postprocessing_of(given: str | Path | None, labels: Sequence[str], golden: Golden) -> dict[str, Any]:
    """The file's steps; without one, but with labels, what the first output of as many classes asks for: softmax unless
    it holds probabilities already. UsageError when output or labels don't fit the model."""
    if given is not None:
        try:
            found = Postprocessing.from_dict(json.loads(Path(given).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise UsageError(f"can't read postprocessing {str(given)!r}: {error}", hint="give a JSON file") from error
    elif labels:
        found = _default(labels, golden)
    else:
        return {}
    outputs = golden.outputs[0]
    if found.output not in outputs:
        raise UsageError(
            f"postprocessing reads output {found.output!r}", hint=did_you_mean(found.output, list(outputs))
        )
    classes = outputs[found.output].shape[-1] if outputs[found.output].ndim else 0
    if labels and classes != len(labels):
        raise UsageError(
            f"{len(labels)} labels for output {found.output!r} of {classes} classes", hint="a line a class, in order"
        )
    return found.to_dict()


def _default(labels: Sequence[str], golden: Golden) -> Postprocessing:
    for name, array in golden.outputs[0].items():
        if array.dtype.kind == "f" and array.ndim and array.shape[-1] == len(labels):
            scores = [results[name] for results in golden.outputs]
            return Postprocessing(name, "none" if all(map(_distribution, scores)) else "softmax")
    shapes = {name: list(array.shape) for name, array in golden.outputs[0].items()}
    raise UsageError(f"{len(labels)} labels, but no output has as many classes: {shapes}", hint="a line a class")


def _distribution(scores: Array) -> bool:
    """Whether rows are probabilities: none negative, each row sums to 1 within what 8-bit codes can lose."""
    return bool(scores.min(initial=0.0) >= 0 and np.abs(scores.sum(-1) - 1).max(initial=0.0) < 0.05)


def labels_of(given: str | Path | None) -> tuple[str, ...]:
    """A text file, a line a class -> labels. UsageError when it can't be read."""
    if given is None:
        return ()
    try:
        return tuple(Path(given).read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"can't read labels {str(given)!r}: {error}", hint="a text file, a line a class") from error
