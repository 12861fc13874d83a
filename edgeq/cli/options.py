"""Options that several commands share, a row each (L11)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import click

Decorated = Callable[..., Any]


class Command(click.Command):
    """A command whose body can't write to stdout: what libraries print there (torch's exporter does) goes to stderr."""

    def invoke(self, ctx: click.Context) -> Any:
        with redirect_stdout(sys.stderr):
            return super().invoke(ctx)


def _threads(_context: click.Context, _parameter: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    """``1,2`` -> (1, 2)."""
    if text is None:
        return None
    words = text.split(",")
    if not all(word.strip().isdigit() and int(word) > 0 for word in words):
        raise click.BadParameter(f"{text!r} is no list of thread counts; write 1,2")
    return tuple(int(word) for word in words)


def _together(*options: Decorated) -> Callable[[Decorated], Decorated]:
    def decorate(function: Decorated) -> Decorated:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


PATH = click.Path(path_type=Path)

target = click.option("-t", "--target", default="local", show_default=True, help="Target name or TOML file.")
inputs = click.option(
    "--input", "inputs", multiple=True, metavar="NAME=1,3,224,224", help="Pin an input's shape; repeat for several."
)
buckets = _together(
    click.option(
        "--bucket", "buckets", multiple=True, metavar="NAME=1,3,48,320",
        help="A fixed shape that inputs are padded to, or DIMENSION=320; repeat for several.",
    ),
    click.option("--pad", multiple=True, metavar="NAME=0", help="What fills an input up to its bucket.  [default: 0]"),
)  # fmt: skip
threads = click.option("--threads", callback=_threads, metavar="1,2", help="Thread counts latency is measured at.")
seed = click.option("--seed", type=int, default=0, show_default=True, help="Seed of everything random.")
preprocessing = click.option("--preprocessing", metavar="FILE", help="JSON on how images become inputs.")
pixels = click.option("--pixels", is_flag=True, help="Take uint8 pictures: normalisation and layout go into the model.")
answers = _together(
    click.option("--labels", type=PATH, metavar="FILE", help="Names of the classes, a line each, for the app."),
    click.option("--postprocessing", type=PATH, metavar="FILE", help="JSON on how the output becomes an answer."),
)
synthetic = click.option("--synthetic", is_flag=True, help="Allow random data; marked in every view.")
force = click.option("--force", is_flag=True, help="Replace an edgeq package that is in the way.")
form = click.option("--form", default="dir", show_default=True, help="Package form; see `edgeq list packages`.")
trust = click.option(
    "--trust", type=PATH, metavar="FILE", help="Public key that must have signed the package, a .pub file."
)
as_json = click.option("--json", "_json", is_flag=True, expose_value=False, help="Print one JSON object on stdout.")
quiet = click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
evaluation = click.option("-e", "--evaluation", metavar="DATA", help="Held-out samples, with labels where known.")
limits = _together(
    click.option("--metric", help="Accuracy metric, or pkg.module:function; see `edgeq list metrics`."),
    click.option(
        "--max-drop", type=float, help="Most the metric may lose, in its own unit: 0.005 of top1 is half a point."
    ),
    click.option(
        "--max-latency",
        "max_latency_ms",
        type=float,
        metavar="MS",
        help="Most a run may take (median), at each thread count.",
    ),
    click.option(
        "--min-speedup",
        type=float,
        help="Least speedup over the fastest float file; 1.3 asks for a latency ratio of 1/1.3.",
    ),
    click.option("--max-size-ratio", type=float, help="Largest size, as a share of the float file's."),
)
