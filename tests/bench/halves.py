"""16-bit floats beside ONNX Runtime's own converter: ``python -m tests.bench.halves [NAME…]``.

Three files of each zoo model: the one it is, the recipe's ``half(format=f16)`` and
``onnxruntime.transformers.float16.convert_float_to_float16`` (a fork of onnxconverter-common's, with the same lists of
ops left out) that keeps the types of inputs and outputs. A line each: bytes, casts, nodes left in float32, SNR and
metric of the outputs as a device rounds (``rewrite.halve.rounded``) and as this CPU computes them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import onnx
import onnx_ir as ir
from onnxruntime.transformers.float16 import convert_float_to_float16

from edgeq import steps
from edgeq.context import Context
from edgeq.ir import io, verify
from edgeq.recipe import parse
from edgeq.report.recorder import Recorder
from edgeq.rewrite.halve import rounded
from edgeq.run.samples import load_samples
from edgeq.source import read_model
from edgeq.target.load import load_target
from edgeq.target.oracle import Oracle
from tests.zoo import ENTRIES, ZOO
from tests.zoo.packages import data, float_model, source
from tests.zoo.score import Values, metric_value, only_output, run

NAMES = ("EFL0", "MINI6", "OCR4d")
COUNTS = {"OCR4d": (4, 6)}  # pages: calibration, evaluation
USUAL = (24, 60)


def files(name: str) -> dict[str, ir.Model]:
    """``float``, ``edgeq`` and ``onnxruntime`` -> the model."""
    model, _ = read_model(source(ZOO[name]), opset=21)
    target = load_target("cpu-x64-vnni")
    samples = load_samples(ZOO[name].calibration, model, limit=COUNTS.get(name, USUAL)[0])
    context = Context(target, Oracle(target), samples, Recorder())
    ours = steps.apply(parse("canonicalize; half(format=f16)", steps.KNOWN), model, context).model
    theirs = ir.from_proto(convert_float_to_float16(onnx.load(float_model(name)), keep_io_types=True))
    theirs.graph.sort()  # the casts of its inputs come last
    return {"float": model, "edgeq": ours, "onnxruntime": theirs}


def casts(model: ir.Model) -> int:
    return sum(node.op_type == "Cast" for node in model.graph)


def wide(model: ir.Model) -> int:
    """Nodes other than casts that write float32."""
    return sum(
        node.op_type != "Cast" and any(value.dtype == ir.DataType.FLOAT for value in node.outputs)
        for node in model.graph
    )


def snr_db(exact: list[Values], found: list[Values]) -> float:
    """Of the last output, all samples together."""
    pairs = [(only_output(a).astype(np.float64), only_output(b)) for a, b in zip(exact, found, strict=True)]
    noise = sum(np.square(a - b).sum() for a, b in pairs)
    return float(10 * np.log10(sum(np.square(a).sum() for a, _ in pairs) / noise)) if noise else np.inf


def lines(name: str, folder: Path) -> Iterator[str]:
    samples = [*data(ENTRIES[name].evaluation, COUNTS.get(name, USUAL)[1])]
    exact: list[Values] = []
    for key, model in files(name).items():
        typed = verify.infer_shapes(model)
        told = []
        for way, one in (("here", model), ("device", rounded(typed))):
            path = folder / f"{name}-{key}-{way}.onnx"
            io.write(one, path)
            values, labels = run(path, samples)
            exact = exact or values
            told.append(
                f"{way} {snr_db(exact, values):.1f} dB {metric_value(ENTRIES[name].metric, values, labels):.4f}"
            )
        size = f"{io.weight_bytes(model) / 1e6:.2f} MB, {casts(model)} casts, {wide(typed)} nodes in f32"
        yield f"{name} {key}: {size}; {'; '.join(told)}"


@click.command()
@click.argument("names", nargs=-1)
def main(names: tuple[str, ...]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in names or NAMES:
            for line in lines(name, Path(folder)):
                click.echo(line)


if __name__ == "__main__":
    main()
