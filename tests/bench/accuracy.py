"""Accuracy of edgeq's recipes and of every peer side by side: the same samples for all, in one run.

``python -m tests.bench.accuracy OUT [NAME…] [--recipe balanced --recipe accurate]`` makes the peers' files in
``OUT/peers`` and edgeq's packages in ``OUT/RECIPE`` (all kept: ``--again`` makes edgeq's anew, ``--peers-again`` the
peers'), measures all of them, prints a table and a verdict a model, and writes ``OUT/accuracy.json``. ``--no-edgeq``
stops at the peers. A drop is float's metric less the file's, with its 95 % interval over paired samples.

The bar: the first recipe drops no more than each peer in ``BAR``; the second closes at least half of what remains.
Kept files don't know which data they were calibrated on: after a change of data use another OUT or ``--peers-again``.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from edgeq.facts import environment
from edgeq.num.intervals import Interval
from edgeq.num.metrics import METRICS
from edgeq.recipe import DEFAULT
from edgeq.validator.score import Score, Scores, score_of
from tests.bench.apart import PINS, quantized_apart
from tests.bench.compare import FLOAT, OURS, export
from tests.bench.executed import integer_macs_share, quantizes
from tests.bench.peers import Peer, known_peers
from tests.bench.quantizers import ORT, OTHERS, first_line
from tests.zoo import ENTRIES, ZOO
from tests.zoo.packages import data, float_model, load
from tests.zoo.score import Values, cosine, only_output, run

# What edgeq is held to. Those left out quantize while running, or choose 16-bit floats and float activations.
BAR = (
    "static", "u8", "channel", "percentile", "percentile_channel", "entropy", "entropy_channel", "nncf",
    "nncf_transformer", "onnxsim", "onnxsim_full",
)  # fmt: skip
ATTENTION = {"nncf_transformer": ("MINI6", "OCR4r")}  # a variant for some models only
PREFERRED = ("EDGEQ_IMAGENET500", "EDGEQ_MAGIKA_EVAL")  # noted by name, not by place
HALF = 0.5
EPSILON = 1e-9  # of sums of the same scores in another order


@dataclass(frozen=True)
class Row:
    """One file of one model, or why there is none. ``low`` and ``high`` bound ``drop`` at 95 %.

    ``samples``, ``seconds``, ``peak_bytes``: of calibrating and quantizing, where a process of its own did it."""

    name: str
    variant: str
    tool: str = "peer"
    path: str = ""
    error: str = ""
    note: str = ""
    size_bytes: int = 0
    metric: float = math.nan
    drop: float = math.nan
    low: float | None = None
    high: float | None = None
    cosine: float = math.nan
    integer_macs: float = math.nan
    quantizes: bool = False
    samples: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0


@dataclass(frozen=True)
class Verdict:
    """Whether a recipe keeps to the bar on a model.

    ``worse_than``: peer -> how much more edgeq drops, and its bounds. ``idle``: peers that quantized nothing, who set
    no bar; ``ships_float``: so did edgeq. ``closed``: share of the first recipe's drop that this one is rid of;
    ``closed_noise``: of its 1 - cosine."""

    name: str
    recipe: str
    drop: float
    peers: int
    best_peer: str
    best_peer_drop: float
    worse_than: Mapping[str, Interval]
    idle: tuple[str, ...] = ()
    ships_float: bool = False
    closed: float | None = None
    closed_noise: float | None = None

    @property
    def passed(self) -> bool:
        return not self.worse_than


class Bench:
    """One model's evaluation samples, float's answers to them, and the scores of every file measured so far."""

    def __init__(self, name: str, count: int | None) -> None:
        self.name, self.metric = name, ENTRIES[name].metric
        self.samples = list(data(ENTRIES[name].evaluation, count))
        self.expected, self.labels = run(float_model(name), self.samples)
        self.scores: dict[str, Scores] = {FLOAT: self._scores(self.expected)}

    def float_row(self) -> Row:
        path = float_model(self.name)
        value = self.scores[FLOAT].value()
        size = path.stat().st_size
        return Row(
            self.name, FLOAT, FLOAT, str(path), size_bytes=size, metric=value.value, cosine=1.0, integer_macs=0.0
        )

    def measured(self, row: Row) -> Row:
        """``row`` with its figures, or with the error that the runtime gives on these samples."""
        try:
            found, _ = run(row.path, self.samples)
        except Exception as error:  # noqa: BLE001 - a file that dies on a sample is a result
            return replace(row, error=f"running it: {first_line(error)}"[:300])
        scores = self.scores[row.variant] = self._scores(found)
        drop, share = self.scores[FLOAT].drop_to(scores), integer_macs_share(Path(row.path), self.samples[0])
        return replace(
            row, size_bytes=Path(row.path).stat().st_size, metric=scores.value().value, drop=drop.value, low=drop.low,
            high=drop.high, cosine=cosine(self.expected, found), integer_macs=share,
            quantizes=quantizes(Path(row.path)),
        )  # fmt: skip

    def _scores(self, results: Sequence[Values]) -> Scores:
        scores = Scores(_score(self.metric))
        for result, label in zip(results, self.labels, strict=True):
            scores.add(result, label)
        return scores


def _score(metric: str) -> Score:
    """A metric of the zoo's or of edgeq's own."""
    if ":" in metric:
        return score_of(metric, load(metric))
    row = METRICS[metric]
    return Score(metric, lambda values, label: float(row.function(only_output(values), label[None])[0]), row=row)


def variants_of(name: str) -> list[str]:
    """The peers that a zoo model is given to."""
    return [variant for variant in (*ORT, *OTHERS) if name in ATTENTION.get(variant, (name,))]


def rows_of(
    name: str, out: Path, recipes: Sequence[str], limit: int | None, *, again: bool, peers_again: bool, blind: bool
) -> Iterator[Row]:
    """The files of one model, none of them measured yet."""
    folder = out / "peers"
    make = partial(quantized_apart, name, folder, samples=limit)
    yield from map(_row_of_peer, known_peers(name, folder, variants_of(name), make, again=peers_again))
    for recipe in recipes:
        try:
            path = export(
                name, out / re.sub(r"[^\w.]+", "_", recipe), again=again, recipe=recipe, blind=blind, limit=limit
            )
        except Exception as error:  # noqa: BLE001 - one model's failure must not hide the others' figures
            yield Row(name, recipe, OURS, error=first_line(error))
        else:
            yield Row(name, recipe, OURS, str(path), note=_shipped(path))


def _row_of_peer(peer: Peer) -> Row:
    return Row(**asdict(peer))


def _shipped(path: Path) -> str:
    """The candidate that an edgeq package ships, from its report."""
    report = json.loads((path.parent / "report.json").read_text(encoding="utf-8"))
    return next((f"ships {trial['name']}" for trial in report["candidates"] if trial["ships"]), "")


def verdicts(rows: Sequence[Row], bench: Bench, recipes: Sequence[str]) -> list[Verdict]:
    """One a recipe that has a file; the first one's drop is the gap that the others can close."""
    by_variant = {row.variant: row for row in rows if not row.error}
    given = [by_variant[variant] for variant in BAR if variant in by_variant]
    peers = [row for row in given if row.quantizes and not math.isnan(row.drop)]
    idle = tuple(row.variant for row in given if not row.quantizes)
    best = min(peers, key=lambda row: row.drop, default=None)
    found = []
    for recipe in recipes:
        if (ours := by_variant.get(recipe)) is None:
            continue
        worse = [peer.variant for peer in peers if ours.drop > peer.drop + EPSILON]
        difference = {variant: bench.scores[variant].drop_to(bench.scores[recipe]) for variant in worse}
        verdict = Verdict(
            bench.name, recipe, ours.drop, len(peers), best.variant if best else "", best.drop if best else math.nan,
            difference, idle, not ours.quantizes,
        )  # fmt: skip
        first = by_variant.get(recipes[0])
        if first is not None and recipe != recipes[0]:
            noise = _closed(1 - first.cosine, 1 - ours.cosine)
            verdict = replace(verdict, closed=_closed(first.drop, ours.drop), closed_noise=noise)
        found.append(verdict)
    return found


def _closed(before: float, after: float) -> float | None:
    """Share of ``before`` that ``after`` is rid of; None when there was nothing to close."""
    return (before - after) / before if before > EPSILON else None


def show(rows: Sequence[Row], console: Console) -> None:
    table = Table("model", "file", "metric", "drop [95 %]", "cosine", "MB", "integer MACs", "samples, s, GB", "note")
    for row in rows:
        if row.error:
            table.add_row(row.name, row.variant, "", "", "", "", "", "", row.error[:90])
            continue
        figures = (f"{row.metric:.4f}", _drop(row), f"{row.cosine:.4f}", f"{row.size_bytes / 1e6:.2f}")
        cost = f"{row.samples}, {row.seconds:.0f}, {row.peak_bytes / 1e9:.1f}" if row.seconds else ""
        style = {OURS: "bold", FLOAT: "italic"}.get(row.tool)
        share = f"{row.integer_macs:.0%}" if row.quantizes else "-"
        table.add_row(row.name, row.variant, *figures, share, cost, row.note[:90], style=style)
    console.print(table)


def _drop(row: Row) -> str:
    return "" if row.tool == FLOAT else _bounded(Interval(row.drop, row.low, row.high))


def _bounded(interval: Interval) -> str:
    """A difference with its sign and bounds."""
    value, low, high = interval
    return f"{value:+.4f}" + ("" if low is None or high is None else f" [{low:+.4f}, {high:+.4f}]")


def line(verdict: Verdict) -> str:
    """A verdict in words."""
    head = f"{verdict.name} {verdict.recipe}: drop {verdict.drop:+.4f}{' (ships float)' * verdict.ships_float}"
    best = f"best {verdict.best_peer} {verdict.best_peer_drop:+.4f}"
    if not verdict.peers:
        text = f"{head}, and no peer quantized anything"
    elif verdict.passed:
        text = f"{head} is no more than that of each of {verdict.peers} peers ({best})"
    else:
        missed = "; ".join(f"{peer} by {_bounded(more)}" for peer, more in verdict.worse_than.items())
        text = f"{head} is MORE than that of {len(verdict.worse_than)} of {verdict.peers} peers: {missed}"
    if verdict.idle:
        text += f" (those that quantized nothing left out: {', '.join(verdict.idle)})"
    if verdict.closed is not None:
        short = "" if verdict.closed >= HALF else " (LESS than half)"
        text += f"; closes {verdict.closed:.0%} of the gap that remained{short}"
    if verdict.closed_noise is not None:
        text += f", {verdict.closed_noise:.0%} of 1 - cosine"
    return text


def _written(out: Path, rows: Sequence[Row], judged: Sequence[Verdict], settings: Mapping[str, Any]) -> None:
    tree = {
        "environment": environment(),
        "peers": PINS,
        "bar": BAR,
        "settings": settings,
        "rows": [asdict(row) for row in rows],
        "verdicts": [{**asdict(verdict), "passed": verdict.passed} for verdict in judged],
    }
    (out / "accuracy.json").write_text(json.dumps(tree, indent=1) + "\n")


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("names", nargs=-1, type=click.Choice(list(ENTRIES)))
@click.option("--recipe", "recipes", multiple=True, default=(DEFAULT,), show_default=True, help="edgeq's, in order.")
@click.option("--no-edgeq", is_flag=True, help="Only the peers.")
@click.option("--limit", type=int, help="Calibration samples for all; default: each loader's own.")
@click.option("--count", type=int, help="Evaluation samples; default: each loader's own.")
@click.option("--again", is_flag=True, help="Export with edgeq anew.")
@click.option("--peers-again", is_flag=True, help="Make the peers' files anew.")
@click.option("--blind", is_flag=True, help="edgeq judges its drafts by held-out calibration samples.")
def main(
    out: Path,
    names: tuple[str, ...],
    recipes: tuple[str, ...],
    no_edgeq: bool,
    limit: int | None,
    count: int | None,
    again: bool,
    peers_again: bool,
    blind: bool,
) -> None:
    """Measure edgeq's and the peers' accuracy on zoo models."""
    out.mkdir(parents=True, exist_ok=True)
    wanted = () if no_edgeq else recipes
    given = [name for name in PREFERRED if os.environ.get(name)]  # else the loaders fall back to what packages ship
    settings = {"recipes": wanted, "limit": limit, "count": count, "blind": blind, "data": given}
    rows: list[Row] = []
    judged: list[Verdict] = []
    console = Console(width=200)
    for name in names or ZOO:
        unmeasured = list(rows_of(name, out, wanted, limit, again=again, peers_again=peers_again, blind=blind))
        bench = Bench(name, count)
        mine = [bench.float_row(), *(row if row.error else bench.measured(row) for row in unmeasured)]
        found = verdicts(mine, bench, wanted)
        rows, judged = rows + mine, judged + found
        _written(out, rows, judged, settings)
        show(mine, console)
        for verdict in found:
            console.print(line(verdict), style="green" if verdict.passed else "red")
    console.rule("verdicts")
    for verdict in judged:
        console.print(line(verdict), style="green" if verdict.passed else "red")


if __name__ == "__main__":
    main()
