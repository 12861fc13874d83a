"""Commands on packages and on the devices they run on (L11); see ``models``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeq.cli import options
from edgeq.cli.group import EPILOG, Answer, cli, progress_of
from edgeq.cli.options import PATH, Command

if TYPE_CHECKING:
    from edgeq.report.record import Report


@cli.command(cls=Command, epilog=EPILOG)
@click.argument("package", type=PATH)
@click.option("-e", "-c", "--evaluation", metavar="DATA", help="Held-out samples, with labels where known.")
@click.option("--on", metavar="DEVICE", help="Measure on a device: its name, ssh://user@host or adb://SERIAL.")
@click.option(
    "--sustained",
    type=click.FloatRange(min=1),
    is_flag=False,
    flag_value=60,
    metavar="SECONDS",
    help="Also run it back to back this long: throttling, energy.  [60 where no number is given]",
)
@click.option("--divergence", is_flag=True, help="Find the first node that computes otherwise on the device.")
@click.option("--reference", metavar="MODEL", help="Float model to compare with.  [default: the one it was made from]")
@options.limits
@options.threads
@options.synthetic
@options.preprocessing
@options.seed
@options.quiet
@options.as_json
def validate(package: Path, quiet: bool, **settings: Any) -> Report:
    """Measure PACKAGE again on this machine, or on a device.

    Digests, golden runs, accuracy, latency. On a device also what its runtime made of the model.

    \b
    edgeq validate net.edgeq -e eval.npz --metric top1 --max-drop 0.005 --max-latency 8
    edgeq validate net.edgeq -c eval.npz --on ssh://pi@raspberrypi.local
    """
    from edgeq.examine import validate as run

    with progress_of(quiet) as progress:
        return run(package, progress=progress, **settings)


@cli.command(cls=Command, epilog=EPILOG)
@click.argument("packages", type=PATH, nargs=-1, required=True)
@click.option("-o", "--out", type=PATH, help="Write it again here, in another form; without it, only verify.")
@options.form
@options.answers
@click.option("--sign", "key", type=PATH, metavar="KEY", help="Sign it with this private key; see `edgeq key`.")
@options.trust
@options.force
@options.as_json
def package(packages: tuple[Path, ...], **settings: Any) -> Report:
    """Verify PACKAGES; with -o, write them again as one.

    Every digest is checked, then this machine, then the golden runs. Several packages of one model become variants of
    one package, the first preferred, which share the weights they have in common.

    \b
    edgeq package net.edgeq
    edgeq package net.edgeq --trust team.pem.pub
    edgeq package net.edgeq -o app/assets/net --force --sign team.pem
    edgeq package vnni.edgeq avx2.edgeq float.edgeq -o net.edgeq
    """
    from edgeq.packages import package as run

    return run(packages, **settings)


@cli.command(cls=Command, epilog=EPILOG)
@click.argument("file", type=PATH)
@options.as_json
def key(file: Path) -> Answer:
    """Make a key to sign packages with.

    The private half goes to FILE, which only its owner can read, the public one to FILE.pub.

    \b
    edgeq key team.pem
    """
    from edgeq.packaging import create_key

    public = create_key(file)
    text = f"private key {file}: keep it where only you can read it\npublic key {public}: for `--trust`"
    return Answer({"private": str(file), "public": str(public)}, text)


@cli.command(cls=Command, epilog=EPILOG)
@click.argument("words", nargs=-1, required=True, metavar="OLD NEW | apply DELTA PACKAGE")
@click.option("-o", "--out", type=PATH, help="Where the update goes.  [default: NEW's name + .delta]")
@options.trust
@options.as_json
def delta(words: tuple[str, ...], out: Path | None, trust: Path | None) -> Report:
    """Make an update from one package to the next, or apply one.

    An update holds what changed and nothing else. It is applied whole or not at all, after every digest and the golden
    runs; where edgeq isn't installed, `python DELTA PACKAGE` applies it.

    \b
    edgeq delta old.edgeq new.edgeq -o new.delta
    edgeq delta apply new.delta installed.edgeq
    """
    from edgeq.errors import UsageError
    from edgeq.packages import make_update, update

    if len(words) == 3 and words[0] == "apply":
        return update(words[1], words[2], trust=trust)
    if len(words) == 2:
        return make_update(words[0], words[1], out or Path(f"{Path(words[1]).stem}.delta"))
    raise UsageError(f"can't read {' '.join(words)!r}", hint="edgeq delta OLD NEW, or edgeq delta apply DELTA PACKAGE")


@cli.command(cls=Command, epilog=EPILOG)
@click.argument("first", type=PATH)
@click.argument("second", type=PATH)
@click.option("--html", type=PATH, metavar="FILE", help="Write a page of it here.")
@click.option("--force", is_flag=True, help="Replace the page that is there.")
@options.as_json
def compare(first: Path, second: Path, html: Path | None, force: bool) -> Answer:
    """Show two packages or reports side by side.

    Sizes, accuracy, latency, and every node and tensor that is decided differently. Differences whose intervals overlap
    aren't called differences.

    \b
    edgeq compare old.edgeq new.edgeq
    edgeq compare phone.json desk.json --html compared.html
    """
    from edgeq.packages import compare as run
    from edgeq.report.compare import render_text

    found = run(first, second, html=html, force=force)
    return Answer(found.tree(), render_text(found))


@cli.command(cls=Command, epilog=EPILOG)
@click.argument("first", type=PATH)
@click.argument("second", type=PATH, required=False)
@click.option("-c", "--calibration", metavar="DATA", help="Samples to run.")
@click.option("--on", metavar="DEVICE", help="Run the second model, or the only one, on this device.")
@click.option("--limit", type=click.IntRange(min=1), default=2, show_default=True, metavar="N", help="Samples used.")
@options.synthetic
@options.preprocessing
@options.quiet
@options.as_json
def divergence(first: Path, second: Path | None, quiet: bool, **settings: Any) -> Report:
    """Find the first node that computes otherwise elsewhere.

    Each node gets the same inputs on both sides, so that differences don't pile up; what differs by more than rounding
    is told with what it looks like: a wrong scale or zero point, saturation, a kernel in float. FIRST, a model or a
    package, runs here; SECOND, a changed copy, here or on the device. Without SECOND, FIRST runs on both.

    \b
    edgeq divergence net.edgeq -c photos/ --on pi
    edgeq divergence old.onnx new.onnx -c photos/
    """
    from edgeq.apart import divergence as run

    with progress_of(quiet) as progress:
        return run(first, second, progress=progress, **settings)


@cli.command(cls=Command, epilog=EPILOG)
@click.argument("words", nargs=-1, required=True, metavar="add NAME ADDRESS | list | doctor NAME | remove NAME")
@options.as_json
def device(words: tuple[str, ...]) -> Answer:
    """Keep devices by name, and look what is wrong with one.

    ADDRESS is ssh://user@host[:port], adb://SERIAL or local. Over SSH keys only, and only hosts that ~/.ssh/known_hosts
    knows. Nothing stays on the device. Without Python there, a C++ program is compiled for it: see docs/devices.md.

    \b
    edgeq device add pi ssh://pi@raspberrypi.local
    edgeq device doctor pi
    edgeq validate net.edgeq -c eval.npz --on pi
    """
    from edgeq.cli import names
    from edgeq.cli.device import ACTIONS
    from edgeq.errors import UsageError, did_you_mean

    action, *others = words
    if action not in ACTIONS:
        raise UsageError(f"nothing called {action!r} to do with devices", hint=did_you_mean(action, list(ACTIONS)))
    function, wanted = ACTIONS[action]
    if len(others) != len(wanted):
        raise UsageError(f"can't read {' '.join(words)!r}", hint=" ".join(["edgeq device", action, *wanted]))
    found = function(*others)
    return Answer(found, "\n".join(names.aligned({key: str(value) for key, value in found.items()})))
