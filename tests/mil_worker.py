"""Reads an ML program back as an ONNX file whose arithmetic is f32, operator by operator as Core ML's documents define
them: what a package computes where there is no Core ML.

``python mil_worker.py PACKAGE FILE`` runs in the environment of onnx2coreml, which has neither edgeq nor pytest.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from coremltools.converters.mil.frontend.milproto.load import load
from coremltools.converters.mil.mil import types
from coremltools.models import utils
from onnx import helper, numpy_helper


class Writer:
    """ONNX nodes and initializers so far."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def constant(self, array: Any) -> str:
        name = f"c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def read(self, value: Any) -> str:
        """The name of a value; a constant's numbers become an initializer, of floats in f32."""
        decoded = value.op is not None and value.op.op_type.startswith("constexpr")
        array = value.op.materialized_val_inference() if decoded else value.val
        if array is None:
            return str(value.name)
        array = np.asarray(array)
        return self.constant(array.astype(np.float32) if array.dtype.kind == "f" else array)

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> None:
        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))


def windows(op: Any) -> dict[str, Any]:
    """Strides and padding of a convolution or pool; MIL gives both ends of an axis side by side."""
    rank = op.x.rank - 2
    pads = list(op.pad.val) if op.pad_type.val == "custom" else [0] * 2 * rank
    assert op.pad_type.val in ("custom", "valid")
    return {"strides": list(op.strides.val), "pads": [int(p) for p in (*pads[::2], *pads[1::2])]}


def convert(op: Any, to: Writer) -> None:
    name, kind = op.outputs[0].name, op.op_type
    if kind == "cast":
        dtypes = {"fp16": "FLOAT", "fp32": "FLOAT", "int32": "INT32", "bool": "BOOL"}
        to.node("Cast", [to.read(op.x)], name, to=onnx.TensorProto.DataType.Value(dtypes[op.dtype.val]))
    elif kind in ("add", "mul", "sub"):
        to.node(kind.capitalize(), [to.read(op.x), to.read(op.y)], name)
    elif kind == "relu":
        to.node("Relu", [to.read(op.x)], name)
    elif kind == "clip":
        to.node("Clip", [to.read(one) for one in (op.x, op.alpha, op.beta)], name)
    elif kind == "sigmoid_hard":
        to.node("HardSigmoid", [to.read(op.x)], name, alpha=float(op.alpha.val), beta=float(op.beta.val))
    elif kind == "softmax":
        to.node("Softmax", [to.read(op.x)], name, axis=int(op.axis.val))
    elif kind == "conv":
        inputs = [to.read(one) for one in (op.x, op.weight, op.bias) if one is not None]
        shape = {"dilations": list(op.dilations.val), "group": int(op.groups.val)}
        to.node("Conv", inputs, name, **windows(op), **shape)
    elif kind == "max_pool":
        assert not op.ceil_mode.val
        to.node("MaxPool", [to.read(op.x)], name, kernel_shape=list(op.kernel_sizes.val), **windows(op))
    elif kind == "reduce_mean":
        axes = to.constant(np.asarray(op.axes.val, np.int64))
        to.node("ReduceMean", [to.read(op.x), axes], name, keepdims=int(op.keep_dims.val))
    elif kind == "reshape":
        to.node("Reshape", [to.read(op.x), to.constant(np.asarray(op.shape.val, np.int64))], name)
    elif kind == "linear":  # the weight is [out, in]
        inputs = [to.read(one) for one in (op.x, op.weight, op.bias) if one is not None]
        to.node("Gemm", inputs, name, transB=1)
    elif kind == "matmul":
        flags = {"transA": int(op.transpose_x.val), "transB": int(op.transpose_y.val)}
        to.node("Gemm", [to.read(op.x), to.read(op.y)], name, **flags)
    elif kind in ("quantize", "dequantize"):
        codes = types.builtin_to_string((op.outputs[0] if kind == "quantize" else op.input).dtype)
        zero = np.zeros(op.scale.val.shape) if op.zero_point is None else np.asarray(op.zero_point.val)
        axis = {} if op.axis is None else {"axis": int(op.axis.val)}
        inputs = [to.read(op.input), to.read(op.scale), to.constant(zero.astype(codes))]
        to.node("QuantizeLinear" if kind == "quantize" else "DequantizeLinear", inputs, name, **axis)
    elif kind != "const" and not kind.startswith("constexpr"):
        raise NotImplementedError(kind)


def main(package: Path, file: Path) -> None:
    spec = utils.load_spec(str(package))
    program = load(spec, spec.specificationVersion, str(package / "Data" / "com.apple.CoreML" / "weights"))
    function, to = program.functions["main"], Writer()
    for op in function.operations:
        convert(op, to)
    floats = onnx.TensorProto.FLOAT
    inputs = [helper.make_tensor_value_info(name, floats, one.shape) for name, one in function.inputs.items()]
    outputs = [helper.make_tensor_value_info(one.name, floats, one.shape) for one in function.outputs]
    graph = helper.make_graph(to.nodes, "mil", inputs, outputs, to.initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), str(file))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
