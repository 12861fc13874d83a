"""Transformers in the target's kernels, beside ONNX Runtime's own optimizer and quantizer, interleaved in one run.

``python -m tests.bench.transformer OUT`` fuses MiniLM-L6 in float, lets ``onnxruntime.transformers.optimizer`` (model
type bert, levels 0, 1 and 99) and ``quantize_dynamic`` (per tensor and per channel) make theirs, exports edgeq's INT8
package into ``OUT/MINI6.edgeq`` unless it is there, counts nodes, and times and judges all of them.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console

from tests.bench.compare import export, measure, show

NAME, HEADS, HIDDEN = "MINI6", 12, 384
LEVELS = (0, 1, 99)


def fused(path: Path, out: Path) -> Path:
    """edgeq's float file: canonical, then in the kernels of this machine's target."""
    from edgeq.ir import io
    from edgeq.lower.fuse import fuse
    from edgeq.rewrite.canonicalize import canonicalize
    from edgeq.source import read_model
    from edgeq.target.load import load_target
    from tests.bench.peers import calibration_feeds

    target, feeds = load_target("local"), calibration_feeds(NAME, 2)
    model, _ = canonicalize(read_model(path, opset=target.opset)[0], feeds=feeds)
    io.write(fuse(model, target, feeds=feeds)[0], out)
    return out


def optimized(path: Path, out: Path, level: int) -> Path:
    """What ONNX Runtime's optimizer for transformers makes of the float file."""
    from onnxruntime.transformers.optimizer import optimize_model

    made = optimize_model(str(path), model_type="bert", num_heads=HEADS, hidden_size=HIDDEN, opt_level=level)
    made.save_model_to_file(str(out))
    return out


def dynamic(path: Path, out: Path, *, per_channel: bool) -> Path:
    """``quantize_dynamic`` of the float file, as it comes or a scale a channel."""
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(str(path), str(out), per_channel=per_channel)
    return out


def nodes(path: Path) -> Counter[str]:
    """Op types of a file."""
    from edgeq.ir import io

    return Counter(node.op_type for node in io.read(path).graph)


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--threads", multiple=True, type=int, default=(1, 2))
@click.option("--count", type=int, help="Evaluation samples; default: the loader's own.")
@click.option("--again", is_flag=True, help="Export anew.")
def main(out: Path, threads: tuple[int, ...], count: int | None, again: bool) -> None:
    """MiniLM-L6, fused and quantized, beside ONNX Runtime's own tools."""
    from tests.zoo.packages import float_model

    out.mkdir(parents=True, exist_ok=True)
    path = float_model(NAME)
    artefacts = {"edgeq float": fused(path, out / "fused.onnx")}
    artefacts |= {f"optimizer {level}": optimized(path, out / f"optimizer{level}.onnx", level) for level in LEVELS}
    artefacts |= {
        "dynamic": dynamic(path, out / "dynamic.onnx", per_channel=False),
        "dynamic channel": dynamic(path, out / "dynamic_channel.onnx", per_channel=True),
        "edgeq": export(NAME, out, again=again),
    }
    rows = measure(NAME, artefacts, threads, count)
    (out / "transformer.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    console = Console(width=160)
    for name, file in {"float": path, **artefacts}.items():
        console.print(name, nodes(file).total(), dict(nodes(file).most_common(12)))
    show(rows, threads, (), console)


if __name__ == "__main__":
    main()
