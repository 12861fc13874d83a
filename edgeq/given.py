"""What the user gave, read and checked: limits, shapes, data, target (L9)."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from edgeq.analyse.statistics import Statistics, merged
from edgeq.analyse.statistics import read as read_statistics
from edgeq.bucketing import suggested
from edgeq.errors import SampleError, UsageError, did_you_mean
from edgeq.ir import query
from edgeq.packaging import PACKAGES, read_directory
from edgeq.report.recorder import Recorder
from edgeq.run.preprocess import Preprocessing
from edgeq.run.record import Feed, Samples
from edgeq.run.samples import load_samples
from edgeq.source import SourceInfo, read_model
from edgeq.target.load import load_target
from edgeq.target.record import Target

SYNTHETIC_SAMPLES = 32


@dataclass(frozen=True)
class Wanted:
    """What the user holds the result to; None is left to edgeq. Ratios are to the best float configuration."""

    metric: str | None = None
    max_drop: float | None = None
    max_latency_ms: float | None = None
    min_speedup: float | None = None
    max_size_ratio: float | None = None

    def limits(self) -> dict[str, float]:
        """As limits on checks by name."""
        name = (self.metric or "top1").rpartition(":")[2]
        found = {
            f"{name}_drop": self.max_drop,
            "latency_ms": self.max_latency_ms,
            "latency_ratio": None if self.min_speedup is None else 1 / self.min_speedup,
            "size_ratio": self.max_size_ratio,
        }
        return {key: value for key, value in found.items() if value is not None}


def target_of(name: str, threads: Sequence[int] | None) -> Target:
    target = load_target(name)
    return target if threads is None else replace(target, threads=tuple(threads))


def check_form(form: str) -> None:
    if form not in PACKAGES:
        raise UsageError(f"unknown package form {form!r}", hint=did_you_mean(form, list(PACKAGES)))


def samples_spec(spec: str | None, synthetic: bool, what: str, flag: str) -> str:
    """The samples to use; random ones only when asked for."""
    if spec is None and synthetic:
        return f"synthetic:{SYNTHETIC_SAMPLES}"
    if spec is None:
        raise UsageError(f"no {what} data given", hint=f"give real samples with {flag}, or --synthetic for random ones")
    if spec.startswith("synthetic:") and not synthetic:
        raise UsageError(f"{what} data {spec!r} is random", hint="add --synthetic if random data is really meant")
    return spec


def statistics_of(paths: Sequence[str | Path], digest: str) -> Statistics | None:
    """Statistics in files of ``edgeq observe``, merged; None without any. SampleError for another model's."""
    if not paths:
        return None
    found = merged([read_statistics(Path(path)) for path in paths])
    if found.model != digest:
        raise SampleError(
            f"the statistics of {', '.join(found.origins)} are of another model",
            hint="observe the float model that is exported: edgeq observe NET.onnx -o FILE",
        )
    return found


def preprocessing_of(given: str | Path | None, shipped: Mapping[str, Any] | None = None) -> Preprocessing | Path | None:
    if given is not None:
        return Path(given)
    return Preprocessing.from_dict(shipped) if shipped else None


def samples_settings(model: str | Path | ir.Model, preprocessing: str | Path | None) -> dict[str, Any]:
    """What ``load_samples`` wants besides the samples: preprocessing as given, else it looks beside the model file."""
    place = Path(str(model)).parent if isinstance(model, str | Path) and Path(model).is_file() else None
    return {"preprocessing": preprocessing_of(preprocessing), "model_folder": place}


def pins_of(inputs: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """``x=1,3,224,224`` -> {"x": (1, 3, 224, 224)}."""
    pins = {}
    for text in inputs:
        name, equals, shape = text.partition("=")
        words = shape.split(",")
        if not equals or not name or not all(word.strip().isdigit() for word in words):
            raise UsageError(f"can't read input shape {text!r}", hint="write NAME=1,3,224,224")
        pins[name] = tuple(int(word) for word in words)
    return pins


def read_with_samples(
    model: str | Path | ir.Model,
    spec: str,
    target: Target,
    recorder: Recorder,
    *,
    inputs: Sequence[str] = (),
    limit: int | None = None,
    loose: bool = False,
    **settings: Any,
) -> tuple[ir.Model, SourceInfo, Samples]:
    """The model and its samples; ``If`` nodes are decided by what is the same in all samples: scalars, then shapes.
    ``loose`` leaves shapes open whatever the target takes."""
    pins = pins_of(inputs)
    with recorder.step("read") as facts:
        source, info = read_model(model, opset=target.opset, pins=pins)
        samples = load_samples(spec, source, limit=limit, **settings)
        if target.static and symbolic(source) and not loose:
            pins = {**_fixed_shapes(samples), **pins}
            source, info = read_model(model, opset=target.opset, pins=pins)
            if names := symbolic(source):
                words = " ".join(f"--bucket {shlex.quote(text)}" for text in suggested(source, samples))
                raise UsageError(
                    f"target {target.name!r} takes fixed shapes only, and those of input {names[0]!r} differ by sample",
                    hint=f"export pads them to a few shapes, here for example {words}; or give samples of one shape",
                )
        if branches(source):
            example = _fixed_scalars(samples)
            source, info = read_model(model, opset=target.opset, pins=pins, example=example)
            if branches(source):  # branches on shapes need the shapes
                pins = {**_fixed_shapes(samples), **pins}
                source, info = read_model(model, opset=target.opset, pins=pins, example=example)
                recorder.warn("fixed-shapes", f"shapes decide what runs and were fixed to those of the samples: {pins}")
        facts.update(nodes=source.graph.num_nodes(), opset_found=info.opset, notes=info.notes)
    for name, value in info.fixed.items():
        recorder.warn("fixed-input", f"input {name!r} is {value} in every sample and was fixed: other values are wrong")
    return source, info, samples


def symbolic(model: ir.Model) -> list[str]:
    """Inputs with a dimension that isn't fixed."""
    fed = (value for value in model.graph.inputs if value.name not in model.graph.initializers)
    return [str(value.name) for value in fed if (dims := query.dims(value)) is None or None in dims]


def branches(model: ir.Model) -> list[ir.Node]:
    """Nodes that decide what runs, whose bodies no analysis looks into."""
    return [node for node in model.graph if query.is_control_flow(node)]


def _fixed_scalars(samples: Samples) -> Feed:
    """Inputs of one element that are equal in every sample."""
    first = samples.read(0)
    scalars = {name: array for name, array in first.items() if array.size == 1}
    for feed in samples:
        scalars = {name: array for name, array in scalars.items() if np.array_equal(array, feed[name])}
        if not scalars:
            break
    return scalars


def _fixed_shapes(samples: Samples) -> dict[str, tuple[int, ...]]:
    """Shapes of the inputs whose shape is the same in every sample."""
    shapes = {name: array.shape for name, array in samples.read(0).items()}
    for feed in samples:
        shapes = {name: shape for name, shape in shapes.items() if feed[name].shape == shape}
    return shapes


def random_samples(model: ir.Model, count: int, seed: int) -> Samples:
    return load_samples(f"synthetic:{count}:{seed}", model)


def model_file(path: Path) -> Path:
    """A model file, or the only one inside a package."""
    return read_directory(path).variants[0].only if path.is_dir() else path
