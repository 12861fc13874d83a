"""Which tensors of a node may be of 16-bit floats instead of f32, by ONNX's own definition of its op (L2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
import onnx_ir as ir

from edgeq.ir import query

NAMES = {ir.DataType.FLOAT16: "tensor(float16)", ir.DataType.BFLOAT16: "tensor(bfloat16)"}
CODES = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
TYPED = frozenset({"Cast", "ConstantOfShape"})  # their attribute that says the type can be changed with it


def slots(node: ir.Node, dtype: ir.DataType, opset: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Indices of the f32 inputs and of the f32 outputs that can be of ``dtype``, all of them together; none where an
    output would stay f32."""
    if why_not(node, dtype, opset):
        return (), ()
    schema = _schema(node, opset)
    return _free(schema, schema.inputs, node.inputs, dtype), _free(schema, schema.outputs, node.outputs, dtype)


def why_not(node: ir.Node, dtype: ir.DataType, opset: int) -> str:
    """Why a node has to compute in f32; "" when ONNX lets its floats be ``dtype``, or it has none."""
    real = [value for value in node.outputs if is_f32(value)]
    if query.is_control_flow(node):
        return f"{node.op_type} holds a graph of its own"
    if any(value.name and value.dtype is None for value in node.outputs):
        return "the type of what it writes isn't known"
    if not real and not any(map(is_f32, node.inputs)):
        return ""
    if node.domain not in ("", "ai.onnx"):
        return f"{node.domain}.{node.op_type} isn't ONNX's"
    if node.op_type in CODES:
        return "codes are scaled in float32"
    if node.op_type not in TYPED and ir.DataType.FLOAT in (_type(node, name) for name in ("dtype", "output_dtype")):
        return "an attribute says that it makes float32"
    if "stash_type" in node.attributes and len(node.outputs) > 1:
        return "its statistics are float32"
    schema = _schema(node, opset)
    if len(_free(schema, schema.outputs, node.outputs, dtype)) < len(real):
        return f"ONNX has no {node.op_type} of {dtype.name.lower()}"
    return ""


def is_f32(value: ir.Value | None) -> bool:
    """Whether a value is a tensor of float32."""
    plain = value is not None and isinstance(value.type, ir.TensorType)
    return plain and value is not None and value.dtype == ir.DataType.FLOAT


def _schema(node: ir.Node, opset: int) -> Any:
    return onnx.defs.get_schema(node.op_type, opset, "")


def _free(
    schema: Any, parameters: Sequence[Any], values: Sequence[ir.Value | None], dtype: ir.DataType
) -> tuple[int, ...]:
    """Indices of f32 ``values`` whose type is a variable of the schema that may be ``dtype``."""
    variables = {one.type_param_str: one.allowed_type_strs for one in schema.type_constraints}
    return tuple(
        index
        for index, value in enumerate(values)
        if is_f32(value) and NAMES[dtype] in variables.get(parameters[min(index, len(parameters) - 1)].type_str, ())
    )


def _type(node: ir.Node, name: str) -> ir.DataType | None:
    found = query.attribute(node, name)
    return None if found is None else ir.DataType(int(found))
