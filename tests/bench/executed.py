"""What of a model really is quantized: ops in the file, and the share of multiply-accumulates that ran in integers.

The latter is from ONNX Runtime's own profile of one sample, the same judge for edgeq's files and the peers': it counts
Conv, ConvTranspose, MatMul, Gemm and Attention in all their kernels, inside the branches of an If too. A kernel that
multiplies weights in few bits with float activations counts as float.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Shape = Sequence[int]
CONVOLUTIONS = ("Conv", "FusedConv", "QLinearConv", "ConvInteger", "NhwcFusedConv")
PRODUCTS = (
    "MatMul", "FusedMatMul", "MatMulNBits", "Gemm", "FusedGemm", "QLinearMatMul", "QGemm", "MatMulInteger",
    "MatMulIntegerToFloat", "DynamicQuantizeMatMul",
)  # fmt: skip
INTEGER = (
    "QLinearConv", "ConvInteger", "QLinearMatMul", "QGemm", "MatMulInteger", "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul", "QAttention",
)  # fmt: skip
SECOND = {"QLinearConv": 3, "QLinearMatMul": 3, "QGemm": 3}  # place of the second factor among the inputs, else 1


def quantizes(path: Path) -> bool:
    """Whether anything is quantized in the model, branches and bodies included."""
    import onnx

    graphs = [onnx.load(path, load_external_data=False).graph]
    while graphs:
        graph = graphs.pop()
        for node in graph.node:
            if node.op_type in INTEGER or "quant" in node.op_type.lower() or "NBits" in node.op_type:
                return True
            graphs += [each for field in node.attribute for each in (*field.graphs, *([field.g] * field.HasField("g")))]
    return False


def integer_macs_share(path: Path, sample: Mapping[str, Any]) -> float:
    """Of the model at ``path`` on one sample; 0 where nothing multiplies."""
    done: dict[bool, int] = {True: 0, False: 0}
    for event in _events(path, sample):
        kind, inputs, outputs = (event[key] for key in ("op_name", "input_type_shape", "output_type_shape"))
        done[kind in INTEGER] += _macs(kind, _shapes(inputs), _shapes(outputs))
    return done[True] / max(1, sum(done.values()))


def _events(path: Path, sample: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row a kernel that ran: its op, and the shapes it saw."""
    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = {value.name for value in session.get_inputs()}
        session.run(None, {name: value for name, value in sample.items() if name in names})
        events = json.loads(Path(session.end_profiling()).read_text())
    return [event["args"] for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]


def _shapes(listed: Sequence[Mapping[str, Shape]]) -> list[Shape]:
    return [shape for entry in listed for shape in entry.values()]


def _macs(kind: str, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    if kind in CONVOLUTIONS:  # each output sums over a filter: weights are [out, in / groups, …]
        return math.prod(outputs[0]) * math.prod(inputs[SECOND.get(kind, 1)][1:])
    if kind == "ConvTranspose":  # each input is spread by its filters: weights are [in, out / groups, …]
        return math.prod(inputs[0]) * math.prod(inputs[1][1:])
    if kind in PRODUCTS:
        return math.prod(outputs[0]) * inputs[0][-1]
    if kind in ("Attention", "QAttention"):
        return math.prod(inputs[0]) * inputs[1][-1]
    return 0
