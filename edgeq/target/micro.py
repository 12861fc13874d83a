"""Micro-models: the question put to a runtime as a graph of its own (L3).

A pattern of nodes is copied out of its model with its attributes, its dtypes, its shapes (symbolic dimensions stay
symbolic) and its integer constants; Q/DQ stand on the edges under question, exactly as they would in the artefact:
``x -> Q -> DQ -> node -> Q -> DQ -> y``. Large float constants become ramps: a kernel is chosen by form, not by value.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.num.formats import Float, Format, Int
from edgeq.num.quant import CHANNEL, TENSOR, Quant, code_range
from edgeq.target.question import FLOATS, Question, block_axis, channel_axis, constant, facts, shape_of

IR_VERSION = 10  # the one of opset 21

CODE_TYPES: dict[Format, ir.DataType] = {
    Int(2, True): ir.DataType.INT2,
    Int(2, False): ir.DataType.UINT2,
    Int(4, True): ir.DataType.INT4,
    Int(4, False): ir.DataType.UINT4,
    Int(8, True): ir.DataType.INT8,
    Int(8, False): ir.DataType.UINT8,
    Int(16, True): ir.DataType.INT16,
    Int(16, False): ir.DataType.UINT16,
    Int(32, True): ir.DataType.INT32,
    Float(4, 3): ir.DataType.FLOAT8E4M3FN,
    Float(5, 2): ir.DataType.FLOAT8E5M2,
    Float(2, 1): ir.DataType.FLOAT4E2M1,
}

# Ops in which every dimension may be shrunk alike without changing what the pattern means.
_SHRINKABLE = frozenset({"MatMul", "Gemm", "Add", "Mul", "Sub", "Div", "Relu", "Clip", "Sigmoid", "Gelu", "Softmax"})
_SHRINK_ABOVE = 1 << 20  # weight elements
_SHRUNK_DIM = 256


def micro_model(asked: Question) -> ir.Model:
    """The question as a model. ``v0`` is a value of the pattern, ``v0_codes`` its Q, ``v0_out`` the DQ that leaves."""
    return _Builder(asked).model()


class _Builder:
    """Collects the nodes and initializers of one micro-model."""

    def __init__(self, asked: Question) -> None:
        self.asked = asked
        self.names = asked.names()
        self.made = {value for node in asked.nodes for value in node.outputs}
        self.shrink = _shrinks(asked)
        self.ranges: dict[ir.Value, tuple[float, float]] = {}
        self.scales: dict[ir.Value, NDArray[np.float32]] = {}
        self.real: dict[ir.Value, ir.Value] = {}  # value of the pattern -> its float copy
        self.codes: dict[ir.Value, tuple[ir.Value, list[ir.Value]]] = {}  # activation -> codes, (scale, zero point)
        self.nodes: list[ir.Node] = []
        self.inputs: list[ir.Value] = []
        self.initializers: list[ir.Value] = []

    def model(self) -> ir.Model:
        for index, node in enumerate(self.asked.nodes):
            inputs = [self._operand(node, position, value) for position, value in enumerate(node.inputs)]
            outputs = [self._fresh(value, self.names[value]) for value in node.outputs]
            attributes = node.attributes.values()
            self.nodes.append(ir.Node(node.domain, node.op_type, inputs, attributes, outputs=outputs, name=f"n{index}"))
            self.real.update(zip(node.outputs, outputs, strict=True))
            for value in node.outputs:
                self._range(value)
                if value in self.asked.quantized:
                    self._quantize(value)
        leaves = [self._leaf(value) for value in self.asked.leaves()]
        domains = {node.domain: 1 for node in self.asked.nodes}
        graph = ir.Graph(
            self.inputs,
            leaves,
            nodes=self.nodes,
            initializers=self.initializers,
            opset_imports={**domains, "com.microsoft": 1, "": self.asked.opset},
            name="probe",
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="edgeq")

    def _leaf(self, value: ir.Value) -> ir.Value:
        """The graph output of a value: it, or its codes dequantized."""
        return self._dequantize(value, "out") if value in self.codes else self.real[value]

    def _operand(self, node: ir.Node, position: int, value: ir.Value | None) -> ir.Value | None:
        """What the copied node reads in place of ``value``."""
        if value is None:
            return None
        if value not in self.real:
            self.real[value] = self._source(node, position, value)
        return self._dequantize(value, f"read{len(self.nodes)}") if value in self.codes else self.real[value]

    def _source(self, node: ir.Node, position: int, value: ir.Value) -> ir.Value:
        """A value that enters the pattern: a graph input, quantized when asked, or a constant."""
        tensor, op = constant(value), facts(node)
        if tensor is None:
            return self._entry(value)
        if value not in self.asked.quantized:
            return self._initializer(self.names[value], self._float_or_exact(value, tensor))
        if position == op.weight:
            return self._weight(node, value)
        if position == op.bias or self._is_late_bias(node, position):
            return self._bias(node, value)
        return self._constant_activation(value)

    def _entry(self, value: ir.Value) -> ir.Value:
        entered = self.real[value] = self._fresh(value, self.names[value])
        self.inputs.append(entered)
        self._range(value)
        if value in self.asked.quantized:
            self._quantize(value)
        return entered

    def _is_late_bias(self, node: ir.Node, position: int) -> bool:
        """Whether this constant is added to a product that has no Q/DQ of its own: the runtime makes it the bias."""
        other = node.inputs[1 - position] if node.op_type == "Add" else None
        producer = other.producer() if other is not None else None
        return other in self.made and other not in self.asked.quantized and getattr(producer, "op_type", "") == "MatMul"

    def _float_or_exact(self, value: ir.Value, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        """Integers and small floats as they are, large floats as a ramp of the same shape."""
        if tensor.dtype not in FLOATS or (tensor.size <= 1024 and not self.shrink):
            return tensor
        ramp = np.resize(np.arange(-60, 61), self._dims(value)) / 64
        return ir.tensor(ramp.astype(tensor.dtype.numpy()))

    def _dims(self, value: ir.Value) -> tuple[int, ...]:
        """Shape of a constant, shrunk where the pattern allows it."""
        shape = [dim for dim in shape_of(self.asked, value) or () if isinstance(dim, int)]
        return tuple(min(dim, _SHRUNK_DIM) for dim in shape) if self.shrink else tuple(shape)

    def _ramp_codes(self, shape: tuple[int, ...], format: Format) -> ir.TensorProtocol:
        dtype = CODE_TYPES[format]
        low, high = (format.lo, format.hi) if isinstance(format, Int) else (-1, 1)
        ramp = np.resize(np.arange(max(low, -60), min(high, 60) + 1), shape)
        return ir.tensor(ramp.astype(dtype.numpy()), dtype=dtype)

    def _weight(self, node: ir.Node, value: ir.Value) -> ir.Value:
        """DequantizeLinear of integer codes, a scale a tensor, channel or block as the weights' mapping says."""
        quant, shape = self.asked.weights, self._dims(value)
        scale, attributes = np.float32(0.02) * np.ones((), np.float32), {}
        if quant.block == CHANNEL and shape:
            axis = channel_axis(node, len(shape))
            scale, attributes = np.full(shape[axis], 0.02, np.float32), {"axis": axis}
        elif quant.block > TENSOR and len(shape) > 1:
            axis = block_axis(node, len(shape))
            blocks = tuple(-(-dim // quant.block) if index == axis else dim for index, dim in enumerate(shape))
            scale, attributes = np.full(blocks, 0.02, np.float32), {"axis": axis, "block_size": quant.block}
        self.scales[value] = scale
        return self._dequantized(value, self._ramp_codes(shape, quant.format), scale, quant, attributes)

    def _bias(self, node: ir.Node, value: ir.Value) -> ir.Value:
        """int32 codes with scale s_x * s_w of the product they are added to."""
        product = node if facts(node).bias is not None else _other_producer(node, value)
        data, weight = product.inputs[0], product.inputs[1]
        scale = self._scale_of(data) * self._scale_of(weight)
        shape = self._dims(value)
        if scale.size == 1 or not shape or scale.ndim != 1 or scale.size != shape[-1]:
            scale = scale.reshape(-1)[:1].reshape(())
        quant = Quant(Int(32, True), TENSOR, True)
        attributes = {"axis": len(shape) - 1} if scale.ndim else {}
        return self._dequantized(value, self._ramp_codes(shape, quant.format), scale, quant, attributes)

    def _scale_of(self, value: ir.Value | None) -> NDArray[np.float32]:
        if value is not None and value in self.asked.quantized:
            if value in self.scales:
                return self.scales[value]
            return np.asarray(self._affine(value)[0], np.float32)
        return np.ones((), np.float32)

    def _constant_activation(self, value: ir.Value) -> ir.Value:
        """A constant operand in the activations' format, one scale."""
        quant = self.asked.activations
        return self._dequantized(value, self._ramp_codes(self._dims(value), quant.format), np.float32(0.05), quant, {})

    def _dequantized(
        self,
        value: ir.Value,
        codes: ir.TensorProtocol,
        scale: NDArray[np.float32] | np.float32,
        quant: Quant,
        attributes: Mapping[str, int],
    ) -> ir.Value:
        name, dtype = self.names[value], CODE_TYPES[quant.format]
        zero = np.zeros(np.shape(scale), dtype.numpy())
        inputs = [
            self._initializer(f"{name}_codes", codes),
            self._initializer(f"{name}_scale", ir.tensor(np.asarray(scale, _numpy_type(value)))),
            self._initializer(f"{name}_zero", ir.tensor(zero, dtype=dtype)),
        ]
        return self._node("DequantizeLinear", inputs, f"{name}_real", value, attributes)

    def _quantize(self, value: ir.Value) -> None:
        """QuantizeLinear of an activation; each reader dequantizes the codes for itself."""
        name, dtype = self.names[value], CODE_TYPES[self.asked.activations.format]
        scale, zero = self._affine(value)
        params = [
            self._initializer(f"{name}_scale", ir.tensor(np.asarray(scale, _numpy_type(value)))),
            self._initializer(f"{name}_zero", ir.tensor(np.asarray(zero).astype(dtype.numpy()), dtype=dtype)),
        ]
        codes = self._node("QuantizeLinear", [self.real[value], *params], f"{name}_codes", value, dtype=dtype)
        self.codes[value] = codes, params

    def _dequantize(self, value: ir.Value, suffix: str) -> ir.Value:
        codes, params = self.codes[value]
        return self._node("DequantizeLinear", [codes, *params], f"{self.names[value]}_{suffix}", value)

    def _range(self, value: ir.Value) -> None:
        index = len(self.ranges)
        spread = (-3.0 - index / 8, 5.0 + index / 8)  # one no other value of the pattern has
        node = value.producer() if value in self.made else None
        self.ranges[value] = spread if node is None else _output_range(node, self.ranges) or spread

    def _affine(self, value: ir.Value) -> tuple[np.float32, int]:
        """Scale and zero point that spread the value's range over the codes, none of which lies beyond it."""
        quant = self.asked.activations
        if not isinstance(quant.format, Int):
            return np.float32(1.0), 0
        low, high = self.ranges.get(value, (-3.0, 5.0))
        first, last = code_range(quant)
        if quant.symmetric and quant.format.signed:
            return np.float32(max(-low, high) / last), 0
        scale = (high - low) / (last - first)
        zero = round(first - low / scale)
        ends = [end / (code - zero) for end, code in ((low, first), (high, last)) if code != zero]
        return np.float32(min(scale, *ends)), zero

    def _fresh(self, value: ir.Value, name: str) -> ir.Value:
        shape = shape_of(self.asked, value)
        if shape is not None and self.shrink:
            shape = [min(dim, _SHRUNK_DIM) if isinstance(dim, int) else dim for dim in shape]
        # Outputs are left to the runtime's own inference unless their dtype is known.
        known = value.dtype or (None if value in self.made and value.index() else ir.DataType.FLOAT)
        return ir.val(name, known, ir.Shape(shape) if shape is not None else None)

    def _node(
        self,
        op_type: str,
        inputs: list[ir.Value],
        name: str,
        like: ir.Value,
        attributes: Mapping[str, int] | None = None,
        dtype: ir.DataType | None = None,
    ) -> ir.Value:
        output = self._fresh(like, name)
        if dtype is not None:
            output.dtype = dtype
        self.nodes.append(ir.node(op_type, inputs, attributes, outputs=[output], name=name))
        return output

    def _initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.val(name, tensor.dtype, ir.Shape(tensor.shape.numpy()), const_value=tensor)
        self.initializers.append(value)
        return value


def _numpy_type(value: ir.Value) -> np.dtype[np.generic]:
    """Type of the scales of a value: its own."""
    dtype = value.dtype
    return (dtype if dtype is not None and dtype in FLOATS else ir.DataType.FLOAT).numpy()


def _other_producer(node: ir.Node, value: ir.Value) -> ir.Node:
    """The node whose product ``value`` is added to."""
    other = node.inputs[1] if node.inputs[0] is value else node.inputs[0]
    producer = other.producer() if other is not None else None
    if producer is None:
        raise ValueError(f"{node.op_type} adds {value.name} to a value without producer")
    return producer


def _shrinks(asked: Question) -> bool:
    """Whether the pattern's dimensions are to be cut: a large weight, in ops that don't mind."""
    large = any((tensor := constant(value)) is not None and tensor.size > _SHRINK_ABOVE for value in asked.values())
    return large and all(node.op_type in _SHRINKABLE for node in asked.nodes)


def _output_range(node: ir.Node, ranges: Mapping[ir.Value, tuple[float, float]]) -> tuple[float, float] | None:
    """The range an op itself gives its output: its input's for a data mover; None when data decides."""
    op = facts(node)
    first = node.inputs[0] if node.inputs else None
    if op.keeps_scale and first is not None:
        return ranges.get(first)
    if node.op_type == "Relu":
        return (0.0, 6.0)
    return _clip_range(node) if node.op_type == "Clip" else op.fixed


def _clip_range(node: ir.Node) -> tuple[float, float]:
    """Bounds of a Clip, widened to hold 0 as every mapping does; those of Relu6 where they aren't constant."""
    bounds = []
    for position, otherwise in ((1, 0.0), (2, 6.0)):
        value = node.inputs[position] if position < len(node.inputs) else None
        tensor = constant(value) if value is not None else None
        bound = float(tensor.numpy().item()) if tensor is not None and tensor.size == 1 else otherwise
        bounds.append(bound if abs(bound) < 1e4 else otherwise)
    low, high = min(bounds[0], 0.0), max(bounds[1], 0.0)
    return (low, high) if low < high else (0.0, 6.0)
