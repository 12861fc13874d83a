"""edgeq's artefacts against ONNX Runtime's quantizers and float: accuracy, size, and latency interleaved in one run.

``python -m tests.bench.compare OUT [NAME…]`` exports each zoo model for this machine into ``OUT/NAME.edgeq``, makes the
peers in ``OUT/peers`` (both kept: ``--again`` makes them anew), measures all of them together, prints a table and
writes ``OUT/compare.json``. Ratios are to the faster of two float configurations; a peer counts with its fastest file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from edgeq.recipe import DEFAULT
from tests.bench.peers import USUAL, known_peers, quantized
from tests.bench.quantizers import ORT
from tests.zoo import ENTRIES, ZOO
from tests.zoo.packages import data, float_model, source
from tests.zoo.score import cosine, metric_value, run

OURS = "edgeq"
FLOAT, FLOAT_EXTENDED = "float", "float extended"  # the runtime's optimisations with and without blocked layouts
FEEDS = 4  # timed samples a model, taken in turn


@dataclass(frozen=True)
class Measured:
    """One artefact of one model. ``ratio[threads]`` is its latency over the best float's: value, low, high at 95 %."""

    name: str
    variant: str
    path: str = ""
    error: str = ""
    size_bytes: int = 0
    metric: float = math.nan
    cosine: float = math.nan
    median_ms: Mapping[int, float] = field(default_factory=dict)
    ratio: Mapping[int, tuple[float, float, float]] = field(default_factory=dict)


def export(
    name: str,
    folder: Path,
    *,
    again: bool = False,
    recipe: str = DEFAULT,
    limit: int | None = None,
    blind: bool = False,
) -> Path:
    """edgeq's artefact of a zoo model for this machine, as a user's command would make it.

    ``blind``: it holds out calibration samples to judge its drafts by, and sees none of those for evaluation."""
    import edgeq

    package, entry = folder / f"{name}.edgeq", ENTRIES[name]
    if again or not (package / "model.onnx").is_file():
        edgeq.export(
            source(entry), target="local", recipe=recipe, calibration=entry.calibration,
            evaluation=None if blind else entry.evaluation, metric=entry.metric, limit=limit, out=package, force=True,
        )  # fmt: skip
    return package / "model.onnx"


def measure(name: str, artefacts: Mapping[str, Path], threads: Sequence[int], count: int | None) -> list[Measured]:
    """Every artefact of the zoo model ``name`` beside its float model."""
    entry, reference = ENTRIES[name], float_model(name)
    samples = list(data(entry.evaluation, count))
    expected, labels = run(reference, samples)
    paths = {FLOAT: reference, FLOAT_EXTENDED: reference, **artefacts}
    medians, ratios = _latency(paths, samples, threads)
    rows = []
    for variant, path in paths.items():
        found, _ = run(path, samples) if path != reference else (expected, labels)
        rows.append(
            Measured(
                name,
                variant,
                str(path),
                size_bytes=path.stat().st_size,
                metric=metric_value(entry.metric, found, labels),
                cosine=cosine(expected, found),
                median_ms=medians[variant],
                ratio=ratios[variant],
            )
        )
    return rows


def _latency(
    paths: Mapping[str, Path], samples: Sequence[Mapping[str, Any]], threads: Sequence[int]
) -> tuple[dict[str, dict[int, float]], dict[str, dict[int, tuple[float, float, float]]]]:
    """Median milliseconds, and ratios to the faster float configuration, by variant and threads."""
    from edgeq.run.timing import TimedConfig, compare, ratio

    feeds = [{key: value for key, value in sample.items() if key != "label"} for sample in islice(samples, FEEDS)]
    configs = [
        TimedConfig(variant, path, level="extended" if variant == FLOAT_EXTENDED else "all")
        for variant, path in paths.items()
    ]
    medians: dict[str, dict[int, float]] = {variant: {} for variant in paths}
    ratios: dict[str, dict[int, tuple[float, float, float]]] = {variant: {} for variant in paths}
    for number in threads:
        timings = compare(configs, feeds, threads=number)
        best = min((timings[FLOAT], timings[FLOAT_EXTENDED]), key=lambda timing: timing.median_ms)
        for variant, timing in timings.items():
            against = ratio(timing, best)
            medians[variant][number] = timing.median_ms
            ratios[variant][number] = (against.value, against.low, against.high)
    return medians, ratios


def compare_model(
    name: str, out: Path, variants: Sequence[str], threads: Sequence[int], count: int | None, *, again: bool
) -> list[Measured]:
    """One model: edgeq's artefact, the peers', their failures as rows without figures."""
    folder = out / "peers"
    peers = known_peers(name, folder, variants, partial(quantized, name, folder), again=again)
    artefacts = {OURS: export(name, out, again=again)}
    artefacts |= {peer.variant: Path(peer.path) for peer in peers if peer.path}
    failed = [Measured(name, peer.variant, error=peer.error) for peer in peers if peer.error]
    return measure(name, artefacts, threads, count) + failed


def geometric_mean(values: Iterable[float]) -> float:
    """Of positive values; NaN of none."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def against_peers(rows: Iterable[Measured], threads: int, variants: Sequence[str]) -> dict[str, float]:
    """Model -> latency of edgeq's artefact over the fastest of the peers' ``variants``; models without one stay out."""
    by_model: dict[str, dict[str, float]] = {}
    for row in rows:
        if threads in row.ratio:
            by_model.setdefault(row.name, {})[row.variant] = row.ratio[threads][0]
    return {
        name: found[OURS] / min(found[variant] for variant in variants if variant in found)
        for name, found in by_model.items()
        if OURS in found and any(variant in found for variant in variants)
    }


def show(rows: Sequence[Measured], threads: Sequence[int], variants: Sequence[str], console: Console) -> None:
    """The table and the geometric means."""
    table = Table("model", "artefact", "metric", "cosine", "MB", *(f"x float, {number} thr" for number in threads))
    for row in rows:
        if row.error:
            table.add_row(row.name, row.variant, row.error[:60])
            continue
        cells = [f"{value:.2f} [{low:.2f}, {high:.2f}]" for value, low, high in row.ratio.values()]
        figures = (f"{row.metric:.4f}", f"{row.cosine:.4f}", f"{row.size_bytes / 1e6:.2f}")
        table.add_row(row.name, row.variant, *figures, *cells, style="bold" if row.variant == OURS else None)
    console.print(table)
    static = [variant for variant in variants if variant != "dynamic"]
    for number in threads:
        mine = [row.ratio[number][0] for row in rows if row.variant == OURS and number in row.ratio]
        ratios = against_peers(rows, number, static)
        console.print(
            f"{number} threads, geometric mean: {geometric_mean(mine):.3f} x float over {len(mine)} models, "
            f"{geometric_mean(ratios.values()):.3f} x the fastest quantize_static over {len(ratios)}"
        )


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("names", nargs=-1, type=click.Choice(list(ENTRIES)))
@click.option("--variant", "variants", multiple=True, type=click.Choice(list(ORT)), default=("u8", *USUAL))
@click.option("--threads", multiple=True, type=int, default=(1, 2))
@click.option("--count", type=int, help="Evaluation samples; default: each loader's own.")
@click.option("--again", is_flag=True, help="Export and quantize anew.")
def main(
    out: Path,
    names: tuple[str, ...],
    variants: tuple[str, ...],
    threads: tuple[int, ...],
    count: int | None,
    again: bool,
) -> None:
    """Compare edgeq with ONNX Runtime's quantizers on zoo models."""
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in names or ZOO:
        rows += compare_model(name, out, variants, threads, count, again=again)
        (out / "compare.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    show(rows, threads, variants, Console(width=160))


if __name__ == "__main__":
    main()
