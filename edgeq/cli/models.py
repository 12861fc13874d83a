"""Commands on models: what each takes, and which function of the package does it (L11).

Bodies import what they call, so that ``edgeq --help`` loads click and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeq.cli import options
from edgeq.cli.group import EPILOG, Answer, cli, progress_of
from edgeq.cli.options import PATH, Command

if TYPE_CHECKING:
    from edgeq.report.record import Report
    from edgeq.target.context import Compiled


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
@options.pixels
@options.answers
@options.inputs
@options.buckets
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Use at most N calibration samples.")
@click.option(
    "--statistics",
    type=PATH,
    multiple=True,
    metavar="FILE",
    help="Of edgeq observe: widens what calibration saw; repeat for several.",
)
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
    edgeq export lines.onnx -t npu-qnn-v75 --bucket x=1,3,48,160 --bucket x=1,3,48,320 -c lines/
    """
    from edgeq.pipeline import export as run

    place = out or Path(f"{Path(model.rpartition(':')[2]).stem}.edgeq")
    with progress_of(quiet) as progress:
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

    with progress_of(quiet) as progress:
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

    with progress_of(quiet) as progress:
        return run(model, inputs=list(inputs), progress=progress, **settings)


@cli.command(cls=Command, epilog=EPILOG)
@click.argument("model")
@click.option("-c", "--calibration", metavar="DATA", help="Samples: .npz, folder, text, or pkg.module:callable.")
@click.option("--on", metavar="DEVICE", help="Take them on a device, over data that lies there.")
@click.option(
    "--data", metavar="PATH", help="The data there: an .npz, or a folder of them. It doesn't leave the device."
)
@click.option("-o", "--out", type=PATH, metavar="FILE", help="Keep the statistics here, an .npz.")
@options.inputs
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Use at most N samples.")
@options.synthetic
@options.preprocessing
@click.option("--force", is_flag=True, help="Replace the file that is there.")
@options.quiet
@options.as_json
def observe(model: str, inputs: tuple[str, ...], quiet: bool, **settings: Any) -> Report:
    """Take statistics of the tensors of MODEL over samples.

    Of a package they are held against those of its calibration: tensors whose values leave the range they had then are
    told, and the status is 1.

    \b
    edgeq observe net.edgeq -c yesterday/
    edgeq observe net.onnx -c photos/ -o stats.npz
    edgeq observe net.edgeq --on pi --data /home/pi/seen/ -o pi.npz
    """
    from edgeq.observing import observe as run

    with progress_of(quiet) as progress:
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

    with progress_of(quiet) as progress:
        return run(list(models), inputs=list(inputs), progress=progress, **settings)


@cli.command("compile", cls=Command, epilog=EPILOG)
@click.argument("model")
@click.option("-t", "--target", "targets", multiple=True, required=True, help="Target; repeat for several devices.")
@click.option("-o", "--out", type=PATH, required=True, help="Folder of the compiled files.")
@options.inputs
@options.force
@options.as_json
def compile_(model: str, targets: tuple[str, ...], out: Path, inputs: tuple[str, ...], force: bool) -> Answer:
    """Compile MODEL ahead of time.

    MODEL is a file or package. Each target gets a file of its own: a context for Qualcomm's NPUs, which is refused on
    another device, .rknn for Rockchip's, compared with the CPU in its simulator, .mlpackage for Core ML, which isn't
    run, and .ort for ONNX Runtime's minimal builds on CPUs, with the list of kernels these need.

    \b
    edgeq compile net.edgeq -t npu-qnn-v75 -t npu-qnn-v79 -o contexts/
    edgeq compile net.edgeq -t local -o app/assets/
    """
    from dataclasses import asdict

    from edgeq.ahead import compile_for

    made = compile_for(model, targets, out, inputs=inputs, force=force)
    tree = [{**asdict(one), "path": str(one.path)} for one in made]
    lines = [line for one in made for line in _compiled(one)]
    return Answer({"compiled": tree}, "\n".join(lines))


def _compiled(one: Compiled) -> list[str]:
    """A compiled file, how near it is to the CPU, and of what it is made."""
    near = f"; beside the CPU: {_told(one.fidelity)}" if one.fidelity else ""
    nodes = ", ".join(f"{count} {op}" for op, count in one.nodes.items())
    return [
        f"{one.path}  {_told(one.made_for)}{near}" + ("; not run here" if one.fidelity is None else ""),
        *([f"  {nodes}"] if nodes else []),
    ]


def _told(facts: Mapping[str, str | float]) -> str:
    from edgeq.report.rows import number

    return ", ".join(f"{key} {value if isinstance(value, str) else number(value)}" for key, value in facts.items())
