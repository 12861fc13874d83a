"""Time and memory of calibrating and quantizing EfficientNet-Lite0: edgeq beside ``quantize_static`` with Percentile.

``python -m tests.bench.calibration`` gives both the same 256 photos, then edgeq 32, 128 and 512 of them; each run is a
process of its own. Clocks start when the libraries are imported and the float file is on disk, and stop when the
quantized file is: decoding photos counts for both, validation for neither. edgeq finds no statistics of earlier runs;
what it learnt of the runtime's kernels is kept, as on a user's second model, unless ``--cold``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from tests.bench.quantizers import peak_bytes
from tests.zoo import ZOO
from tests.zoo.packages import data, float_model

MODEL = "EFL0"
COMPARED = 256
GROWTH = (32, 128, 512)


@dataclass(frozen=True)
class Cost:
    """What one run took. ``peak_bytes`` is the process's resident high-water mark, imports included."""

    tool: str
    samples: int
    seconds: float
    peak_bytes: int
    size_bytes: int


def _ours(count: int, out: Path) -> Callable[[], None]:
    from edgeq import recipe, steps
    from edgeq.context import Context
    from edgeq.lower.emit import emit
    from edgeq.lower.legalize import legalize
    from edgeq.report.recorder import Recorder
    from edgeq.run.samples import load_samples
    from edgeq.source import read_model
    from edgeq.target.load import load_target
    from edgeq.target.oracle import Oracle

    float_file = float_model(MODEL)

    def run() -> None:
        target = load_target("local")
        model, _ = read_model(float_file, opset=target.opset)
        samples = load_samples(ZOO[MODEL].calibration, model, limit=count)
        context = Context(target, Oracle(target), samples, Recorder())
        wanted = recipe.parse(recipe.DEFAULT, steps.KNOWN)
        quantizer = steps.apply(wanted, model, context).quantizer
        assert quantizer is not None, "the default recipe quantizes"
        _, quantized, _ = quantizer.fused()
        emit(legalize(quantized, target), target, out)

    return run


def _peer(count: int, out: Path) -> Callable[[], None]:
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Photos(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        """Decodes one photo at a time."""

        def __init__(self) -> None:
            self.samples = data(ZOO[MODEL].calibration, count)

        def get_next(self) -> dict[str, object] | None:
            sample = next(self.samples, None)
            return None if sample is None else {"image": sample["image"]}

    float_file = float_model(MODEL)

    def run() -> None:
        prepared = out.with_suffix(".prepared.onnx")
        quant_pre_process(str(float_file), str(prepared))
        quantize_static(str(prepared), str(out), Photos(), calibrate_method=CalibrationMethod.Percentile)

    return run


TOOLS: dict[str, Callable[[int, Path], Callable[[], None]]] = {"edgeq": _ours, "percentile": _peer}


def measure(tool: str, count: int, *, cold: bool = False) -> Cost:
    """Run ``tool`` on ``count`` photos in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "EDGEQ_ZOO_CALIBRATION": str(count)}
        if cold:
            environment["EDGEQ_CACHE"] = folder
        command = [sys.executable, "-m", "tests.bench.calibration", "--run", tool, str(count)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


def _run(tool: str, count: int) -> Cost:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "quantized.onnx"
        work = TOOLS[tool](count, out)
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
        return Cost(tool, count, seconds, peak_bytes(), out.stat().st_size)


@click.command()
@click.option("--run", nargs=2, type=(str, int), hidden=True)
@click.option("--compared", type=int, default=COMPARED, show_default=True, help="Photos both get.")
@click.option("--cold", is_flag=True, help="edgeq asks the runtime about every kernel again.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the figures here as JSON.")
def main(run: tuple[str, int] | None, compared: int, cold: bool, out: Path | None) -> None:
    """Compare calibration with Percentile's, and see whether memory grows with the photos."""
    if run:
        click.echo(json.dumps(asdict(_run(*run))))
        return
    costs = [measure(tool, compared, cold=cold) for tool in TOOLS]
    costs += [measure("edgeq", count, cold=cold) for count in GROWTH]
    if out:
        out.write_text(json.dumps([asdict(cost) for cost in costs], indent=1) + "\n")
    _show(costs, Console())


def _show(costs: list[Cost], console: Console) -> None:
    table = Table("tool", "photos", "seconds", "peak MB", "file MB")
    for cost in costs:
        megabytes = (f"{size / 1e6:.1f}" for size in (cost.peak_bytes, cost.size_bytes))
        table.add_row(cost.tool, str(cost.samples), f"{cost.seconds:.1f}", *megabytes)
    console.print(table)
    ours, peer, *growth = costs
    peaks = [cost.peak_bytes for cost in growth]
    console.print(
        f"edgeq takes {ours.seconds / peer.seconds:.3f} of the time and {ours.peak_bytes / peer.peak_bytes:.3f} of the "
        f"memory; its memory grows by {max(peaks) / min(peaks) - 1:.1%} from {GROWTH[0]} to {GROWTH[-1]} photos"
    )


if __name__ == "__main__":
    main()
