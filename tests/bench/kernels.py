"""edgeq's own kernels beside the runtime's: all that fuses in integers, of real models, with and without them.

``python -m tests.bench.kernels [NAME …]`` quantizes each zoo model (or ``MODEL.onnx=SAMPLES.npz``) with everything in
integers that can be, and times the file with and without edgeq's kernels beside the prepared float one, interleaved in
one run: accuracy isn't asked for here. Ratios are medians with their 95 % interval.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from edgeq import recipe as recipes
from edgeq import steps
from edgeq.context import Context
from edgeq.given import read_with_samples
from edgeq.ir import io
from edgeq.lower.kernels import in_own_kernels
from edgeq.report.recorder import Recorder
from edgeq.run.timing import TimedConfig, compare, ratio
from edgeq.target.load import load_target
from edgeq.target.oracle import Oracle
from tests.zoo import ZOO
from tests.zoo.packages import float_model

SAMPLES, THREADS, SECONDS = 4, (1, 2), 15.0


def main(names: list[str]) -> None:
    for name in names or ("OCRcls", "OCR4r", "OCR4d", "MAGIKA"):
        for line in measured(name):
            print(f"{name:10} {line}", flush=True)  # noqa: T201


def measured(name: str) -> Iterator[str]:
    path, _, data = name.partition("=")
    model, samples = (path, data) if data else (float_model(name), ZOO[name].calibration)
    target = load_target("local")
    source, _, given = read_with_samples(model, samples, target, Recorder(), limit=SAMPLES)
    context = Context(target, Oracle(target), given, Recorder())
    prepared = steps.apply(recipes.parse("canonicalize; quantize(ranges=minmax)", steps.KNOWN), source, context)
    assert prepared.quantizer is not None
    _, quantized, _ = prepared.quantizer.fused()
    plain = context.lower(quantized)
    own, counts = in_own_kernels(plain, target)
    word = " and ".join(f"{count} {name}" for name, count in counts.items()) or "none"
    feeds = [given.read(index) for index in range(SAMPLES)]
    with tempfile.TemporaryDirectory() as folder:
        files = {"float": context.lower(prepared.model), "integer": plain, word: own}
        configs = []
        for name, file in files.items():
            io.write(file, Path(folder) / f"{name}.onnx")
            configs.append(TimedConfig(name, Path(folder) / f"{name}.onnx", provider=target.execution))
        for threads in THREADS:
            found = compare(configs, feeds, threads=threads, max_seconds=SECONDS)
            to_float, to_plain = (ratio(found[word], found[one]) for one in ("float", "integer"))
            yield (
                f"{threads} threads: float {found['float'].median_ms:.3f} ms, integer {found['integer'].median_ms:.3f},"
                f" with {word} {found[word].median_ms:.3f}: {to_plain.value:.2f} of integer "
                f"({to_plain.low:.2f} to {to_plain.high:.2f}), {to_float.value:.2f} of float"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
