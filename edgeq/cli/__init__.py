"""The command line: words in, an exit status out; all work is done by the layers below (L11).

Results go to stdout, everything else to stderr. ``--json`` prints one object: the report, or ``{"error": {…}}``.
Commands *return* what they found and ``main`` prints it, so no command knows of formats or exit statuses.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

from edgeq.cli import models, naming, packages  # noqa: F401 - importing them adds their commands
from edgeq.cli.group import Answer, cli
from edgeq.errors import EdgeqError

FAILED, USAGE, BUG, INTERRUPTED = 1, 2, 70, 130  # 70 is EX_SOFTWARE: a crash must not read as a failed check


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``edgeq ARGUMENTS…`` (default: the process's) and return the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in words  # not from click: a usage error ends parsing before click has seen the flag
    try:
        result = cli.main(words, prog_name="edgeq", standalone_mode=False)
        return result if isinstance(result, int) else _show(result, as_json)
    except click.Abort as abort:
        if not isinstance(abort.__cause__, KeyboardInterrupt):
            raise
        click.echo("interrupted: nothing was written", err=True)
        return INTERRUPTED
    except click.ClickException as error:
        if as_json:
            return _fail_json("usage", error.format_message(), "see --help", USAGE)
        error.show(sys.stderr)
        return USAGE
    except EdgeqError as error:
        if as_json:
            return _fail_json(error.code, error.message, error.hint, error.exit_status)
        click.echo(click.style("error: ", fg="red", bold=True) + str(error), err=True)
        return error.exit_status
    except Exception as error:  # noqa: BLE001 - the last frame: a bug is shown whole and told apart from a failed check
        traceback.print_exc()
        click.echo("this is a bug in edgeq, not a fault of yours", err=True)
        return _fail_json("bug", repr(error), "report it with the traceback", BUG) if as_json else BUG


def _show(result: Any, as_json: bool) -> int:
    """Print what a command returned, a Report or an Answer; 1 when a check failed."""
    if isinstance(result, Answer) and (as_json or isinstance(result.text, str)):
        click.echo(json.dumps(result.tree, indent=2, ensure_ascii=False) if as_json else result.text)
        return 0
    if as_json:
        from edgeq.report.codec import to_json

        click.echo(to_json(result))
    else:
        from rich.console import Console

        from edgeq.report.text import render

        wide = None if sys.stdout.isatty() else 120  # rich's 80 for files would fold every node name
        console = Console(width=wide)
        if isinstance(result, Answer):
            console.print(*result.text, sep="\n")
            return 0
        console.print(render(result))
    return 0 if result.passed else FAILED


def _fail_json(code: str, message: str, hint: str, status: int) -> int:
    click.echo(json.dumps({"error": {"code": code, "message": message, "hint": hint}}, indent=2, ensure_ascii=False))
    return status
