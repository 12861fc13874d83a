"""Predicted against measured peak memory, on zoo models and on what was made of them.

``python -m tests.bench.footprint [NAME…] [--packages DIR]`` predicts the peak of each float model, and of the packages
``DIR/NAME.edgeq`` that ``tests.bench.compare`` left, and measures it in fresh processes. One sample, one thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from edgeq.analyse.peak import Peak, predict
from edgeq.ir import io
from edgeq.run.executed import executed
from edgeq.run.timing import TimedConfig, measure_memory
from tests.zoo import ZOO
from tests.zoo.packages import data, float_model


@dataclass(frozen=True)
class Compared:
    """A model file: predicted and measured bytes."""

    name: str
    peak: Peak
    measured: int

    @property
    def ratio(self) -> float:
        return self.peak.total / self.measured


def feed_of(name: str) -> dict[str, Any]:
    """The first evaluation sample of a zoo model, without its label."""
    sample = next(iter(data(ZOO[name].evaluation, 2)))
    return {key: array for key, array in sample.items() if key != "label"}


def compared(name: str, path: Path, feed: dict[str, Any]) -> Compared:
    """Predict and measure one file."""
    raw = io.read(path)
    taken = {key: array for key, array in feed.items() if key in {str(value.name) for value in raw.graph.inputs}}
    ran, optimised = executed(path, taken)
    peak = predict(raw, path.stat().st_size, optimised, ran)
    return Compared(name, peak, measure_memory(TimedConfig(name, path), taken).peak_bytes)


def _files(name: str, packages: Path | None) -> Iterator[tuple[str, Path]]:
    yield name, float_model(name)
    if packages is not None and (made := packages / f"{name}.edgeq" / "model.onnx").is_file():
        yield f"{name}.edgeq", made


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(ZOO)))
@click.option("--packages", type=click.Path(path_type=Path), help="Folder of NAME.edgeq to look at too.")
def main(names: tuple[str, ...], packages: Path | None) -> None:
    """Print predicted and measured peak memory."""
    rows = [compared(label, path, feed_of(name)) for name in names or ZOO for label, path in _files(name, packages)]
    table = Table("model", "predicted MB", "measured MB", "ratio", "of it loading", "activations", "pattern")
    for row in rows:
        figures = (row.peak.total, row.measured, row.peak.loading, row.peak.activations, row.peak.pattern)
        predicted, measured, *parts = (f"{value / 1e6:.1f}" for value in figures)
        table.add_row(row.name, predicted, measured, f"{row.ratio:.3f}", *parts)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
