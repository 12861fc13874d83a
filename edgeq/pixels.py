"""Models that take pictures as they are, and samples as pixels for them (L9)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from edgeq.errors import ModelError, SampleError, UsageError
from edgeq.ir.verify import verify
from edgeq.report.recorder import Recorder
from edgeq.rewrite.pixels import from_pixels, picture_of
from edgeq.rewrite.preserve import excess
from edgeq.run.arrays import sha256_of
from edgeq.run.preprocess import Preprocessing
from edgeq.run.record import Feed, Samples
from edgeq.run.samples import take
from edgeq.run.session import input_specs, open_session, run_session

CHECKED = 2  # samples both models are run on
BETWEEN = 0.05  # of a level: float32 pixels come back within 1e-4 of one


def normalisation(samples: Samples, given: Preprocessing | Path | None, model: ir.Model) -> Preprocessing:
    """How the samples were made of pixels: as their pictures were, or as given. Raises UsageError without either."""
    if samples.preprocessing:
        return Preprocessing.from_dict(samples.preprocessing)
    if given is None:
        raise UsageError(
            f"--pixels moves preprocessing into the model, and {samples.origin} has none",
            hint="give --preprocessing FILE, which says how its arrays were made of pixels",
        )
    found = given if isinstance(given, Preprocessing) else Preprocessing.from_file(given)
    name = picture_of(model).name
    return found.for_input(next(spec for spec in input_specs(model) if spec.name == name))


def as_pixels(samples: Samples, name: str, how: Preprocessing) -> Samples:
    """The same samples with input ``name`` as uint8[n, h, w, c], which ``how`` was applied to. Reading one raises
    SampleError where it wasn't."""

    def read(index: int) -> Feed:
        feed = samples.read(index)
        return {**feed, name: _pixels(feed[name], how, f"{samples.origin}, sample {index}: input {name!r}")}

    raw = replace(how, scale=1.0, mean=(0.0,), std=(1.0,), layout="NHWC", dtype="uint8")
    digest = sha256_of(samples.digest, "pixels", str(how))
    return replace(samples, read=read, digest=digest, preprocessing=raw.to_dict())


def _pixels(array: np.ndarray, how: Preprocessing, where: str) -> np.ndarray:
    last = np.moveaxis(array, 1, -1) if how.layout == "NCHW" else array
    levels = (last * np.asarray(how.std, np.float64) + how.mean) / how.scale
    pixels = np.rint(levels)
    off = float(np.abs(levels - pixels).max(initial=0.0))
    if off > BETWEEN or pixels.min(initial=0) < 0 or pixels.max(initial=0) > 255:
        raise SampleError(
            f"{where} isn't made of pixels by this preprocessing: taken back, values lie from {levels.min():.4g} to "
            f"{levels.max():.4g}, up to {off:.2g} between two levels",
            hint="give the preprocessing its pictures went through, or leave out --pixels",
        )
    return np.ascontiguousarray(pixels.astype(np.uint8))


def taken(model: ir.Model, how: Preprocessing, samples: Samples, recorder: Recorder) -> tuple[ir.Model, Samples]:
    """The model of pixels, proven on samples against ``model`` on what those were made into, and all samples so."""
    name = str(picture_of(model).name)
    with recorder.step("pixels") as facts:
        result, pixels = from_pixels(model, how), as_pixels(samples, name, how)
        verify(result, "taking pixels")
        before, after = open_session(model, level="none"), open_session(result, level="none")
        worst = 0.0
        for exact, raw in zip(take(samples, CHECKED), take(pixels, CHECKED), strict=True):
            pairs = zip(run_session(before, exact).values(), run_session(after, raw).values(), strict=True)
            worst = max([worst, *(excess(one, other) for one, other in pairs)])
        facts.update(samples=min(CHECKED, len(samples)), moved=worst, nodes_before=model.graph.num_nodes())
        facts.update(nodes_after=result.graph.num_nodes(), normalisation=how.to_dict())
    if worst > 1:
        raise ModelError(
            f"with normalisation inside, outputs move by {worst:.3g} times what rounding explains",
            hint="leave out --pixels; the model may round its input",
        )
    return result, pixels


def of_package(source: Mapping[str, Any]) -> Preprocessing | None:
    """What a package's report says of the normalisation its model holds."""
    found = source.get("pixels")
    return Preprocessing.from_dict(found) if found else None
