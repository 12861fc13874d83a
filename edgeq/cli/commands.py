"""The commands: what each takes, and which function of the package does it (L11).

Bodies import what they call, so that ``edgeq --help`` loads click and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeq.cli import options
from edgeq.cli.options import PATH, Command
from edgeq.version import __version__

if TYPE_CHECKING:
    from edgeq.report.progress import Progress
    from edgeq.report.record import Report

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
def _progress(quiet: bool) -> Iterator[Progress]:
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


@cli.command(cls=Command, epilog=EPILOG)
@click.argument("model")
@options.target
@click.option(
    "-r", "--recipe", default="balanced", show_default=True, help="Preset or steps; see `edgeq list recipes`."
)
@click.option("-c", "--calibration", metavar="DATA", help="Samples: .npz, folder, text, or pkg.module:callable.")
@options.evaluation
@click.option("-o", "--out", type=PATH, help="Where the package goes.  [default: MODEL's name + .edgeq]")
@options.limits
@options.threads
@options.synthetic
@options.preprocessing
@options.answers
@options.inputs
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Use at most N calibration samples.")
@click.option("--dump", type=PATH, metavar="DIR", help="Keep the model after each step here, with its text.")
@options.form
@options.force
@options.seed
@options.quiet
@options.as_json
def export(model: str, out: Path | None, inputs: tuple[str, ...], quiet: bool, **settings: Any) -> Report:
    """Make MODEL small and fast, prove it, package it.

    MODEL is an .onnx file, a .pt2 exported program, or a torch module as pkg.module:callable.

    \b
    edgeq export net.onnx -c photos/ -o net.edgeq
    edgeq export net.onnx -c calib.npz -e eval.npz --metric top1 --max-drop 0.005
    edgeq export my.nets:make_net -t cpu-arm64 --input x=1,3,224,224 -c my.data:samples
    """
    from edgeq.pipeline import export as run

    place = out or Path(f"{Path(model.rpartition(':')[2]).stem}.edgeq")
    with _progress(quiet) as progress:
        return run(model, out=place, inputs=list(inputs), progress=progress, **settings)


@cli.command(cls=Command, epilog=EPILOG)
@click.argument("model")
@options.target
@options.inputs
@options.as_json
def inspect(model: str, target: str, inputs: tuple[str, ...]) -> Report:
    """Tell what MODEL is made of.

    Inputs, outputs, nodes, weights, and what the target has integer kernels for. Changes nothing.

    \b
    edgeq inspect net.onnx -t cpu-x64-vnni
    """
    from edgeq.examine import inspect as run

    return run(model, target=target, inputs=list(inputs))


@cli.command(cls=Command, epilog=EPILOG)
@click.argument("model")
@options.target
@click.option("-c", "--calibration", metavar="DATA", help="Samples, for advice on activations and what nodes harm.")
@click.option("--bits", type=int, default=8, show_default=True, help="Size of the formats to choose from: 8, 6 or 4.")
@click.option("--html", type=PATH, metavar="FILE", help="Write a page with histograms here.")
@options.inputs
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Use at most N calibration samples.")
@options.synthetic
@options.preprocessing
@options.force
@options.quiet
@options.as_json
def advise(model: str, inputs: tuple[str, ...], quiet: bool, **settings: Any) -> Report:
    """Tell which number format each tensor of MODEL should have.

    With the numbers that say so: how its values are spread, the noise each format would make, what the target runs.

    \b
    edgeq advise net.onnx -t cpu-x64-vnni
    edgeq advise net.onnx -c photos/ --html advice.html
    """
    from edgeq.advice import advise as run

    with _progress(quiet) as progress:
        return run(model, inputs=list(inputs), progress=progress, **settings)


@cli.command(cls=Command, epilog=EPILOG)
@click.argument("model")
@click.option("-c", "--calibration", metavar="DATA", help="Samples: .npz, folder, text, or pkg.module:callable.")
@options.target
@click.option(
    "-r", "--recipe", default="balanced", show_default=True, help="Preset or steps; see `edgeq list recipes`."
)
@options.synthetic
@options.preprocessing
@options.inputs
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Use at most N calibration samples.")
@options.seed
@options.quiet
@options.as_json
def sensitivity(model: str, inputs: tuple[str, ...], quiet: bool, **settings: Any) -> Report:
    """Tell which nodes of MODEL suffer from integers.

    Each is quantized alone, and left float alone; the noise on the outputs ranks them and says which tensor is to
    blame. Writes nothing. An interrupted run goes on where it stopped.

    \b
    edgeq sensitivity net.onnx -c photos/ -t cpu-x64-vnni
    """
    from edgeq.examine import sensitivity as run

    with _progress(quiet) as progress:
        return run(model, inputs=list(inputs), progress=progress, **settings)


@cli.command(cls=Command, epilog=EPILOG)
@click.argument("model", required=False)
@click.option("--params", metavar="10B", help="A number of parameters instead of MODEL.")
@options.target
@options.inputs
@click.option("-c", "--calibration", metavar="DATA", help="Samples; the first one is run.")
@click.option("--memory", metavar="4GB", help="Memory it must fit.  [default: the target's, where known]")
@click.option("--weights", metavar="FORMAT", help="Hold this format to the memory, not the smallest: INT4, mxfp4, …")
@click.option("--layers", type=click.IntRange(min=1), help="Layers of a decoder, for its KV cache.")
@click.option("--kv-heads", type=click.IntRange(min=1), help="Heads of its keys.")
@click.option("--head-dim", type=click.IntRange(min=1), help="Width of a head.")
@click.option("--context", multiple=True, type=click.IntRange(min=1), help="Positions kept; repeat for several.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Sequences kept at once.")
@options.as_json
def footprint(model: str | None, **settings: Any) -> Report:
    """Tell how much memory MODEL needs.

    In every number format, before anything is built. MODEL is what export takes, a package, or a Hugging Face folder.

    \b
    edgeq footprint --params 10B
    edgeq footprint net.onnx --input x=1,3,640,640 --memory 128MB
    edgeq footprint my-llama/config.json --context 32768 --memory 8GB --weights INT8
    """
    from edgeq.sizes import footprint as run

    return run(model, **settings)


@cli.command(cls=Command, epilog=EPILOG)
@click.argument("package", type=PATH)
@click.option("-e", "-c", "--evaluation", metavar="DATA", help="Held-out samples, with labels where known.")
@click.option("--on", metavar="DEVICE", help="Measure on a device: its name, or ssh://user@host.")
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

    with _progress(quiet) as progress:
        return run(package, progress=progress, **settings)


@cli.command(cls=Command, epilog=EPILOG)
@click.argument("models", nargs=-1, required=True)
@options.target
@options.threads
@click.option(
    "--repeats", type=click.IntRange(min=3), metavar="N", help="Turns of each model.  [default: until ratios are known]"
)
@options.inputs
@options.seed
@options.quiet
@options.as_json
def bench(models: tuple[str, ...], inputs: tuple[str, ...], quiet: bool, **settings: Any) -> Report:
    """Time MODELS against each other, interleaved.

    MODELS are files or packages; ratios are to the first.

    \b
    edgeq bench net.onnx net.edgeq --threads 1,2
    """
    from edgeq.examine import bench as run

    with _progress(quiet) as progress:
        return run(list(models), inputs=list(inputs), progress=progress, **settings)


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
@click.argument("words", nargs=-1, required=True, metavar="add NAME ADDRESS | list | doctor NAME | remove NAME")
@options.as_json
def device(words: tuple[str, ...]) -> Answer:
    """Keep devices by name, and look what is wrong with one.

    ADDRESS is ssh://user@host[:port] or local. Keys only, and only hosts that ~/.ssh/known_hosts knows. The device
    needs Python 3.8 or later with numpy and onnxruntime; nothing stays on it.

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


@cli.command("compile", cls=Command, epilog=EPILOG)
@click.argument("model")
@click.option("-t", "--target", "targets", multiple=True, required=True, help="Target; repeat for several devices.")
@click.option("-o", "--out", type=PATH, required=True, help="Folder of the compiled files.")
@options.force
@options.as_json
def compile_(model: str, targets: tuple[str, ...], out: Path, force: bool) -> Answer:
    """Compile MODEL ahead of time.

    MODEL is a file or package exported for such a target. Each device gets a file of its own, which says what it was
    compiled for; on another device it is refused.

    \b
    edgeq compile net.edgeq -t npu-qnn-v75 -t npu-qnn-v79 -o contexts/
    """
    from edgeq.ahead import compile_for

    made = compile_for(model, targets, out, force=force)
    tree = [{"path": str(one.path), "made_for": dict(one.made_for), "nodes": dict(one.nodes)} for one in made]
    lines = [f"{one.path}  {', '.join(f'{key} {value}' for key, value in one.made_for.items())}" for one in made]
    return Answer({"compiled": tree}, "\n".join(lines))


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
