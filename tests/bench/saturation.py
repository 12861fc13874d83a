"""What CPUs without VNNI make of a quantized model: ``python -m tests.bench.saturation [NAME…]``.

Three files of each zoo model, everything the runtime fuses in integers: for VNNI, with all weights cut to 7 bits (as
``reduce_range`` does), and for cpu-x64-avx2, whose rows are repaired one by one. Each runs here and, where QEMU is
installed, on an emulated Haswell; a line each gives the rows flagged, the SNR against float and the metric.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.analyse.place import Plan
from edgeq.analyse.saturation import certify
from edgeq.context import Context
from edgeq.ir import io
from edgeq.num.quant import QParams
from edgeq.quantizer import Quantizer
from edgeq.report.recorder import Recorder
from edgeq.run.samples import load_samples
from edgeq.source import read_model
from edgeq.steps import canonicalize
from edgeq.target.load import load_target
from edgeq.target.oracle import Oracle
from tests.emulated import QEMU, outputs
from tests.placed import all_integer
from tests.zoo import ZOO
from tests.zoo.packages import data, source
from tests.zoo.score import metric_value, run

NAMES = ("EFL0", "MBV2", "OCR4r", "OCR4d", "MAGIKA")
NO_VNNI = "Haswell"


def files(name: str, folder: Path, *, count: int = 24, ranges: str = "auto") -> dict[str, ir.Model]:
    """``float``, ``vnni``, ``seven`` (bits) and ``rows`` (repaired) -> the model, written to ``folder/KEY.onnx``."""
    model, _ = read_model(source(ZOO[name]), opset=21)
    samples = load_samples(ZOO[name].calibration, model, limit=count)
    vnni, avx2 = load_target("cpu-x64-vnni"), load_target("cpu-x64-avx2")
    context = Context(vnni, Oracle(vnni), samples, Recorder())
    quantizer = Quantizer(canonicalize(model, context), context, ranges)
    quantizer.costs = all_integer(quantizer.atoms)
    plan, plain, _ = quantizer.fused()
    made = {"float": quantizer.model, "vnni": plain, "seven": _seven_bits(quantizer, plan)}
    context.target = avx2
    made["rows"] = quantizer.build(plan)
    for key, each in made.items():
        io.write(each, folder / f"{key}.onnx")
    return made


def _seven_bits(quantizer: Quantizer, plan: Plan) -> ir.Model:
    def blanket(rows: NDArray[Any] | None, params: QParams, target: object) -> QParams:
        return replace(params, scale=params.scale * np.float32(127 / 64))

    with patch("edgeq.analyse.encode.unsaturated", blanket):
        return quantizer.build(plan)


def snr(exact: Sequence[NDArray[Any]], found: Sequence[NDArray[Any]]) -> float:
    """Of all samples together, in dB."""
    noise = sum(float(np.square(a.astype(np.float64) - b).sum()) for a, b in zip(exact, found, strict=True))
    return 10 * np.log10(sum(float(np.square(a.astype(np.float64)).sum()) for a in exact) / max(noise, 1e-30))


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(ZOO)))
@click.option("--count", type=int, help="Evaluation samples here; default: the loader's own.")
@click.option("--emulated", default=2, help="Evaluation samples under emulation, 10 to 50 times slower.")
def main(names: tuple[str, ...], count: int | None, emulated: int) -> None:
    """Compare files for VNNI, of 7 bits and repaired by row on zoo models."""
    for name in names or NAMES:
        with tempfile.TemporaryDirectory() as place:
            folder, samples = Path(place), list(data(ZOO[name].evaluation, count))
            made = files(name, folder)
            exact: list[NDArray[Any]] = []
            for key, model in made.items():
                results, labels = run(folder / f"{key}.onnx", samples)
                last = [[*result.values()][-1] for result in results]
                exact, proof = exact or last, certify(model)
                click.echo(
                    f"{name:7} {key:6} {proof.flagged:5} of {proof.rows:5} rows flagged, {snr(exact, last):6.2f} dB, "
                    f"{metric_value(ZOO[name].metric, results, labels):.4f} of {len(labels)}"
                )
            if shutil.which(QEMU):
                _emulate(name, folder, samples[:emulated], exact[:emulated])


def _emulate(name: str, folder: Path, samples: list[dict[str, Any]], exact: Sequence[NDArray[Any]]) -> None:
    models = {key: folder / f"{key}.onnx" for key in ("vnni", "seven", "rows")}
    inputs = {value.name for value in io.read(models["vnni"]).graph.inputs}
    feeds = [{key: array for key, array in sample.items() if key in inputs} for sample in samples]
    here, there = (outputs(cpu, models, dict.fromkeys(models, feeds)) for cpu in ("", NO_VNNI))
    for key in models:
        ours, theirs = ([results[-1] for results in side[key]] for side in (here, there))
        apart = max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))
        decibels = f"here {snr(exact, ours):6.2f} dB, on {NO_VNNI} {snr(exact, theirs):6.2f} dB"
        click.echo(f"{name:7} {key:6} {decibels}, outputs at most {apart:.2g} apart")


if __name__ == "__main__":
    main()
