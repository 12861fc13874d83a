"""What a Report says of its surroundings: source, target, samples, timings, machine - as plain data (L9)."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime

from edgeq.ir import io
from edgeq.run.record import Samples, Timing
from edgeq.run.session import input_specs, output_specs
from edgeq.source import SourceInfo
from edgeq.target.detect import cpu_flags
from edgeq.target.record import Target
from edgeq.version import __version__


def source_facts(info: SourceInfo, model: ir.Model) -> dict[str, Any]:
    """``nodes``, ``ops`` and ``weight_bytes`` are those of ``model``, the rest of what was found."""
    ops = Counter(node.op_type for node in model.graph)
    return {
        "inputs": {spec.name: str(spec) for spec in input_specs(model)},
        "outputs": {spec.name: str(spec) for spec in output_specs(model)}, "ops": dict(ops.most_common()),
        "origin": info.origin, "kind": info.kind, "opset": info.opset, "digest": info.digest, "notes": list(info.notes),
        "fixed": dict(info.fixed), "nodes": model.graph.num_nodes(), "weight_bytes": io.weight_bytes(model),
    }  # fmt: skip


def target_facts(target: Target) -> dict[str, Any]:
    facts = asdict(target)
    return {
        **facts, "activations": str(target.activations), "weights": str(target.weights),
        "isa": list(target.isa), "threads": list(target.threads),
    }  # fmt: skip


def samples_facts(samples: Samples) -> dict[str, Any]:
    return {
        "origin": samples.origin, "count": len(samples), "digest": samples.digest, "synthetic": samples.synthetic,
        "labelled": samples.labels is not None,
    }  # fmt: skip


def timing_facts(timings: Mapping[str, Mapping[int, Timing]]) -> dict[str, Any]:
    return {name: {str(count): asdict(timing) for count, timing in runs.items()} for name, runs in timings.items()}


def environment() -> dict[str, Any]:
    return {
        "edgeq": __version__, "onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__,
        "python": platform.python_version(), "machine": platform.machine(), "system": platform.system(),
        "cores": os.cpu_count(), "vnni": bool({"avx512_vnni", "avx_vnni"} & cpu_flags()),
    }  # fmt: skip
