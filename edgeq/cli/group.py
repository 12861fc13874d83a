"""The command group, and what its commands share (L11)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from edgeq.version import __version__

if TYPE_CHECKING:
    from edgeq.report.progress import Progress

EPILOG = (
    "Exit status: 0 all checks passed, 1 a check failed, 2 bad usage, model, data, recipe or target, "
    "3 device or runtime unavailable, 70 a bug in edgeq, 130 interrupted."
)


@dataclass(frozen=True)
class Answer:
    """What a command says that measures nothing: the same facts as JSON and as lines."""

    tree: dict[str, Any]
    text: str | list[Any]  # lines, or what rich can print


@contextmanager
def progress_of(quiet: bool) -> Iterator[Progress]:
    if quiet:
        from edgeq.report.progress import Silent

        yield Silent()
    else:
        from edgeq.cli.bars import Bars

        with Bars() as bars:
            yield bars


@click.group(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="edgeq")
def cli() -> None:
    """Take a model to the edge: quantize, lower to the target's kernels, prove accuracy and latency, package."""
