"""Commands on whatever has a name (L11); see ``models``."""

from __future__ import annotations

from pathlib import Path

import click

from edgeq.cli import options
from edgeq.cli.group import EPILOG, Answer, cli
from edgeq.cli.options import PATH, Command


@cli.command("list", cls=Command, epilog=EPILOG)
@click.argument("kind", required=False)
@options.as_json
def list_(kind: str | None) -> Answer:
    """List targets, recipes, steps, metrics, …

    Everything that has a name, or one KIND of it.

    \b
    edgeq list targets
    """
    from edgeq.cli import names

    found = names.everything(kind)
    lines = [line for title, rows in found.items() for line in (title, *names.aligned(rows), "")]
    return Answer(found, "\n".join(lines).rstrip())


@cli.command(cls=Command, epilog=EPILOG)
@click.argument("word")
@click.option("--report", type=PATH, metavar="FILE", help="A report.json or a package, to explain its nodes and codes.")
@options.as_json
def explain(word: str, report: Path | None) -> Answer:
    """Explain a name, error code or node.

    WORD is a listed name (of a target also what this machine's runtime makes of common patterns), or with --report a
    node, check, step or code of it.

    \b
    edgeq explain cpu-x64-vnni
    edgeq explain /features/0/Conv --report net.edgeq
    """
    from edgeq.cli import names

    found = names.explained(word, report)
    return Answer({word: found}, "\n".join(names.aligned(found)))
