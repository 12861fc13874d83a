"""What of a model really is quantized: ops in the file, and the share of multiply-accumulates that ran in integers.

The latter is from ONNX Runtime's own profile of one sample, the same judge for edgeq's files and the peers': it counts
Conv, ConvTranspose, MatMul, Gemm and Attention in all their kernels, inside the branches of an If too. A kernel that
multiplies weights in few bits with float activations counts as float. The profile leaves out weights that a kernel has
packed for itself, so their shapes are from the optimised graph.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Shape = Sequence[int]
CONVOLUTIONS = ("Conv", "FusedConv", "QLinearConv", "ConvInteger", "NhwcFusedConv")
PRODUCTS = (
    "MatMul", "FusedMatMul", "MatMulNBits", "Gemm", "FusedGemm", "QLinearMatMul", "QGemm", "MatMulInteger",
    "MatMulIntegerToFloat", "DynamicQuantizeMatMul",
)  # fmt: skip
BY_INPUT = ("ConvTranspose", "Attention", "QAttention")
INTEGER = (
    "QLinearConv", "ConvInteger", "QLinearMatMul", "QGemm", "MatMulInteger", "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul", "QAttention",
)  # fmt: skip
SECOND = {"QLinearConv": 3, "QLinearMatMul": 3, "QGemm": 3}  # place of the second factor among the inputs, else 1


def quantizes(path: Path) -> bool:
    """Whether anything is quantized in the model, branches and bodies included."""
    import onnx

    ops = (node.op_type for graph in _graphs(onnx.load(path, load_external_data=False).graph) for node in graph.node)
    return any(op in INTEGER or "quant" in op.lower() or "NBits" in op for op in ops)


def _graphs(graph: Any) -> Iterator[Any]:
    """An onnx graph and all those inside it, outer ones first."""
    yield graph
    for node in graph.node:
        for field in node.attribute:
            for inner in (*field.graphs, *([field.g] * field.HasField("g"))):
                yield from _graphs(inner)


def integer_macs_share(path: Path, sample: Mapping[str, Any]) -> float:
    """Of the model at ``path`` on one sample; 0 where nothing multiplies."""
    done: dict[bool, int] = {True: 0, False: 0}
    with tempfile.TemporaryDirectory() as folder:
        named, optimised = (Path(folder) / f"{what}.onnx" for what in ("named", "optimised"))
        _name_nodes(path, named)
        events = _events(named, optimised, sample)
        weights = _weight_shapes(optimised)
    for event in events:
        arguments, name = event["args"], event["name"].removesuffix("_kernel_time")
        kind, inputs, outputs = (arguments[key] for key in ("op_name", "input_type_shape", "output_type_shape"))
        done[kind in INTEGER] += _macs(kind, _shapes(inputs), _shapes(outputs), weights.get(name))
    return done[True] / max(1, sum(done.values()))


def _name_nodes(path: Path, out: Path) -> None:
    """Write the model with a name at each node: profile and optimised graph are matched by it."""
    import onnx

    model = onnx.load(path)
    for number, graph in enumerate(_graphs(model.graph)):
        for index, node in enumerate(graph.node):
            node.name = f"n{number}_{index}"
    onnx.save(model, out)


def _events(path: Path, optimised: Path, sample: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row a kernel that ran: its op, and the shapes it saw. The graph that ran is written to ``optimised``."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.enable_profiling = True
    options.profile_file_prefix = str(optimised.with_suffix(""))
    options.optimized_model_filepath = str(optimised)
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = {value.name for value in session.get_inputs()}
    session.run(None, {name: value for name, value in sample.items() if name in names})
    events = json.loads(Path(session.end_profiling()).read_text())
    return [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]


def _weight_shapes(path: Path) -> dict[str, Shape]:
    """Node -> shape of the stored tensor it multiplies by, where it is one."""
    import onnx

    graphs = list(_graphs(onnx.load(path).graph))
    stored = {tensor.name: tuple(tensor.dims) for graph in graphs for tensor in graph.initializer}
    nodes = ((node, SECOND.get(node.op_type, 1)) for graph in graphs for node in graph.node)
    return {
        node.name: stored[node.input[place]]
        for node, place in nodes
        if len(node.input) > place and node.input[place] in stored
    }


def _shapes(listed: Sequence[Mapping[str, Shape]]) -> list[Shape]:
    return [shape for entry in listed for shape in entry.values()]


def _macs(kind: str, inputs: Sequence[Shape], outputs: Sequence[Shape], weight: Shape | None) -> int:
    """``inputs``: shapes of those that aren't packed; ``weight``: of the second factor where it is stored."""
    if kind in PRODUCTS:
        return math.prod(outputs[0]) * inputs[0][-1]
    if kind not in (*CONVOLUTIONS, *BY_INPUT):
        return 0
    weight = inputs[1] if weight is None else weight
    if kind in CONVOLUTIONS:  # each output sums over a filter: weights are [out, in / groups, …]
        return math.prod(outputs[0]) * math.prod(weight[1:])
    return math.prod(inputs[0]) * math.prod(weight[1:])  # each input is spread: weights are [in, out / groups, …]
