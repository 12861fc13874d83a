"""The metric of a model file on labelled samples, by ONNX Runtime alone: a judge that shares no code with edgeq."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.zoo.packages import load

Values = dict[str, NDArray[Any]]


def session(path: str | Path, threads: int = 2) -> Any:
    """An ONNX Runtime session on the CPU, silent but for errors."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def only_output(values: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """The output among the values of a model that has one, whatever its name: inputs come first."""
    return [*values.values()][-1]


def run(path: str | Path, samples: Iterable[dict[str, Any]]) -> tuple[list[Values], list[Any]]:
    """Inputs and outputs of each sample, and the labels. Inputs the model doesn't have (pinned) are left out."""
    runner = session(path)
    inputs, names = {value.name for value in runner.get_inputs()}, [value.name for value in runner.get_outputs()]
    results, labels = [], []
    for sample in samples:
        feed = {name: value for name, value in sample.items() if name in inputs}
        results.append({**feed, **dict(zip(names, runner.run(names, feed), strict=True))})
        labels.append(sample["label"])
    return results, labels


def metric_value(metric: str, results: list[Values], labels: list[Any]) -> float:
    """The metric over all samples: a corpus metric as it is, else the mean over samples."""
    measure: Callable[..., float] = OWN[metric] if metric in OWN else load(metric)
    if getattr(measure, "corpus", False):
        return float(measure(results, labels))
    return float(np.mean([measure(result, label) for result, label in zip(results, labels, strict=True)]))


def perplexity(results: list[Values], labels: list[Any]) -> float:
    """The exponential of the mean of -log p(label) over all positions of logits f32[1, s, vocabulary]."""
    losses = []
    for values, tokens in zip(results, labels, strict=True):
        logits = only_output(values)[0]
        logits = logits - logits.max(-1, keepdims=True)
        losses.append(np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(tokens)), tokens])
    return float(np.exp(np.concatenate(losses).mean()))


perplexity.corpus = True  # type: ignore[attr-defined]
OWN = {"perplexity": perplexity}


def cosine(a: list[Values], b: list[Values]) -> float:
    """Mean over samples of the cosine between the last outputs, flattened."""
    pairs = ((only_output(x).ravel(), only_output(y).ravel()) for x, y in zip(a, b, strict=True))
    return float(np.mean([x @ y / max(np.linalg.norm(x) * np.linalg.norm(y), 1e-12) for x, y in pairs]))
