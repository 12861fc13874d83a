"""What rounding is worth: real models with weights in few bits, each way of rounding beside nearest.

``python -m tests.bench.rounding [NAME…]`` stores the weights of a zoo model's MatMul, Gemm and Conv in each
``--format`` (activations stay float), rounded in each way, and prints the SNR of the outputs against float on
evaluation samples, the share of nearest's noise and of its drop in the metric that is won back, and the seconds.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from tests.zoo import ZOO
from tests.zoo.packages import data, float_model
from tests.zoo.score import metric_value, run

NAMES = ("EFL0", "MINI6")
FORMATS = ("i4/channel",)
CALIBRATION = 128  # samples; one in five of them judges
OPSET = 21  # the first with codes of 4 bits
NEAREST, FLOAT = "nearest", "float"
ROUNDINGS = (NEAREST, "hqq", "gptq", "adaround")


@dataclass(frozen=True)
class Row:
    """One way of rounding one model. ``noise``: error power over signal power of the outputs."""

    name: str
    format: str
    rounding: str
    clip: str
    stages: int
    noise: float
    metric: float
    seconds: float

    @property
    def snr_db(self) -> float:
        return -10 * math.log10(self.noise) if self.noise else math.inf


def measure(
    name: str, formats: Sequence[str], roundings: Sequence[str], clip: str, stages: int, samples: int, count: int | None
) -> list[Row]:
    """Float first, then each format by each way of rounding."""
    from edgeq.analyse.rounding import round_weights
    from edgeq.analyse.sensitivity import noise_to_signal
    from edgeq.analyse.weights import storable
    from edgeq.ir import io
    from edgeq.num.quant import parse_quant
    from edgeq.rewrite.canonicalize import canonicalize
    from edgeq.rewrite.weights import store_weights
    from edgeq.run.samples import load_samples
    from edgeq.source import read_model

    entry = ZOO[name]
    model, _ = read_model(float_model(name), opset=OPSET)
    calibration = load_samples(entry.calibration, model, limit=samples)
    model, _ = canonicalize(model, feeds=[calibration.read(0)])
    evaluation = list(data(entry.evaluation, count))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        io.write(model, path)
        exact, labels = run(path, evaluation)
        rows = [Row(name, "f32", FLOAT, "", 0, 0.0, metric_value(entry.metric, exact, labels), 0.0)]
        for text in formats:
            wanted = storable(model, parse_quant(text), ["MatMul", "Gemm", "Conv"])
            for rounding in roundings:
                start = time.perf_counter()
                coded = round_weights(model, wanted, calibration, rounding=rounding, clip=clip, stages=stages)
                seconds = time.perf_counter() - start
                io.write(store_weights(model, coded), path)
                found, _ = run(path, evaluation)
                noise, metric = noise_to_signal(exact, found), metric_value(entry.metric, found, labels)
                rows.append(Row(name, text, rounding, clip, stages, noise, metric, seconds))
    return rows


def won_back(rows: Sequence[Row], row: Row) -> tuple[float, float]:
    """Shares of nearest's noise, and of its drop in the metric, that ``row`` is rid of."""
    same = [other for other in rows if other.name == row.name and other.format == row.format]
    plain = next((other for other in same if other.rounding == NEAREST), None)
    exact = next(other for other in rows if other.name == row.name and other.rounding == FLOAT)
    if plain is None or not plain.noise or plain.metric >= exact.metric:
        return math.nan, math.nan
    return 1 - row.noise / plain.noise, (row.metric - plain.metric) / (exact.metric - plain.metric)


def show(rows: Sequence[Row], console: Console) -> None:
    table = Table("model", "format", "rounding", "SNR dB", "metric", "noise won back", "drop won back", "seconds")
    for row in rows:
        noise, drop = won_back(rows, row)
        figures = (f"{row.snr_db:.2f}", f"{row.metric:.4f}", f"{noise:.0%}", f"{drop:.0%}", f"{row.seconds:.0f}")
        plain = row.rounding in (NEAREST, FLOAT)
        cells = (*figures[:2], "", "", figures[4]) if plain else figures
        table.add_row(row.name, row.format, " ".join((row.rounding, row.clip)).strip(), *cells)
    console.print(table)


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(ZOO)))
@click.option("--format", "formats", multiple=True, default=FORMATS, show_default=True)
@click.option("--rounding", "roundings", multiple=True, default=ROUNDINGS, show_default=True)
@click.option("--clip", default="", help="Scales by octav or oscar.")
@click.option("--stages", type=int, default=4, show_default=True, help="How often inputs are observed anew.")
@click.option("--samples", type=int, default=CALIBRATION, show_default=True, help="Calibration samples.")
@click.option("--count", type=int, help="Evaluation samples; default: each loader's own.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the figures here as JSON.")
def main(
    names: tuple[str, ...],
    formats: tuple[str, ...],
    roundings: tuple[str, ...],
    clip: str,
    stages: int,
    samples: int,
    count: int | None,
    out: Path | None,
) -> None:
    """Measure roundings on zoo models."""
    rows: list[Row] = []
    for name in names or NAMES:
        rows += measure(name, formats, roundings, clip, stages, samples, count)
        if out:
            out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    show(rows, Console(width=120))


if __name__ == "__main__":
    main()
