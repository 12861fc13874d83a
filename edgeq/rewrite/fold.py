"""Compute what depends on constants alone, unless the file would grow (L6).

ONNX Runtime folds all constants when it loads a model; folding here serves the quantizer, which must see weights as
weights, and the size: a Transpose behind a weight goes, an Expand that makes megabytes of one number stays. All nodes
are computed by one session of ONNX Runtime, since its kernels define the result and a session a node is slow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes
from numpy.typing import NDArray

from edgeq.errors import ModelError
from edgeq.ir import edit as edits
from edgeq.ir import query
from edgeq.rewrite.match import Edit, nodes
from edgeq.rewrite.share import RANDOM
from edgeq.run.session import open_session, run_session

GROWTH_FACTOR = 2
"""A fold may double what it replaces: float16 weights behind a Cast are weights all the same."""

GROWTH_BYTES = 1 << 18
"""What a fold may add beyond that: masks and tables of positions of a short sequence."""

FILLS = frozenset({"ConstantOfShape", "Expand", "Tile", "Range", "EyeLike", "OneHot"})
FILL_BYTES = 1 << 13
"""What repeats a few numbers stays a node beyond this: BlazeFace's padding would be a quarter of its file."""

NEVER = RANDOM | {"QuantizeLinear", "DequantizeLinear", "Constant", "If", "Loop", "Scan", "SequenceConstruct"}
"""A DequantizeLinear on a weight is the weight's storage form; the rest has no fixed value or no tensor."""

INPUT_BYTES = 1024
"""Larger constants are fed to the folding session instead of being copied into its model."""

PLAIN = frozenset(map(ir.DataType.from_numpy, map(np.dtype, (*"?bBhHiIqQ", *"efd"))))
"""What numpy and ONNX Runtime both compute with."""

Value = ir.Value
Arrays = dict[Value, NDArray[Any]]


def lift_constants(model: ir.Model, _: frozenset[str]) -> list[str]:
    """Constant nodes become initializers (models from ``source`` have none left)."""
    names = [node.name or "" for node in nodes(model) if node.op_type == "Constant" and node.domain == ""]
    if not names:
        return []
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    left = {node.name for node in nodes(model) if node.op_type == "Constant"}
    return [name for name in names if name not in left]


def fold_constants(model: ir.Model, keep: frozenset[str]) -> list[str]:
    """Nodes whose inputs are all constant become initializers, within the growth allowed."""
    candidates = _candidates(model, keep)
    if not candidates:
        return []
    arrays = _evaluate(candidates, {}, model)
    edit, folded = Edit(model), []
    for node in candidates:
        outputs = [value for value in node.outputs if value.uses() or value.is_graph_output()]
        if any(value.is_graph_output() or value not in arrays for value in outputs):
            continue
        if _growth(node, sum(arrays[value].nbytes for value in outputs)) > _allowed(node):
            continue
        for value in outputs:
            edit.freeze(value, arrays.pop(value))
        folded.append(node.name or "")
    return folded


def _candidates(model: ir.Model, keep: frozenset[str]) -> list[ir.Node]:
    """Nodes that hang on constants alone, in an order in which they can be computed."""
    found: list[ir.Node] = []
    ready: set[Value] = set()
    for node in nodes(model):
        inputs = [value for value in node.inputs if value is not None]
        if not inputs or node.domain != "" or node.op_type in NEVER or node.name in keep:
            continue
        if not all(value in ready or (query.is_constant(value) and _plain(value)) for value in inputs):
            continue
        known = sum(_static_bytes(value) for value in node.outputs)
        if all(_plain(value) for value in node.outputs) and _growth(node, known) <= _allowed(node):
            found.append(node)
            ready.update(node.outputs)
    return found


def _plain(value: Value) -> bool:
    """Whether numpy and ONNX Runtime share the value's dtype; an unknown one is tried."""
    return value.dtype is None or value.dtype in PLAIN


def _static_bytes(value: Value) -> int:
    shape = query.dims(value)
    if shape is None or None in shape or value.dtype is None:
        return 0  # unknown: computed, then judged
    return int(np.prod(np.array(shape, np.int64)) * value.dtype.itemsize)


def _allowed(node: ir.Node) -> int:
    return FILL_BYTES if node.op_type in FILLS else GROWTH_BYTES


def _growth(node: ir.Node, size: int) -> int:
    """Bytes by which ``size`` bytes of results exceed what goes with the node, doubled."""
    if size <= _allowed(node):
        return 0
    freed = sum(
        value.const_value.nbytes
        for value in dict.fromkeys(node.inputs)
        if value is not None and value.const_value is not None and len(value.uses()) == 1
    )
    return size - GROWTH_FACTOR * freed


def _evaluate(todo: Sequence[ir.Node], known: Arrays, model: ir.Model) -> Arrays:
    """Outputs of ``todo`` (in order) by ONNX Runtime. Where a session is refused the halves are tried, so that one
    node without a kernel costs itself and its readers only."""
    todo = _computable(todo, known)
    if not todo:
        return {}
    try:
        return _run(todo, known, model)
    except ModelError:
        if len(todo) == 1:
            return {}
    half = len(todo) // 2
    first = _evaluate(todo[:half], known, model)
    return first | _evaluate(todo[half:], known | first, model)


def _computable(todo: Sequence[ir.Node], known: Arrays) -> list[ir.Node]:
    ready, left = set(known), []
    for node in todo:
        if all(value is None or value in ready or query.is_constant(value) for value in node.inputs):
            left.append(node)
            ready.update(node.outputs)
    return left


def _run(todo: Sequence[ir.Node], known: Arrays, model: ir.Model) -> Arrays:
    """One session with a copy of each node. Large constants are inputs, small ones initializers."""
    copies: dict[Value, Value] = {}
    feed: dict[str, NDArray[Any]] = {}
    graph = ir.Graph([], [], nodes=[], opset_imports=dict(model.opset_imports), name="constants")
    for value in dict.fromkeys(value for node in todo for value in node.inputs if value is not None):
        array = known.get(value, query.constant(value))
        if array is None:
            continue  # computed here
        copies[value] = _leaf(graph, f"c{len(copies)}", array, feed)
    for node in todo:
        outputs = [Value(name=f"v{len(copies) + index}", type=value.type) for index, value in enumerate(node.outputs)]
        inputs = [None if value is None else copies[value] for value in node.inputs]
        graph.append(ir.Node("", node.op_type, inputs, list(node.attributes.values()), outputs=outputs))
        copies.update(zip(node.outputs, outputs, strict=True))
    wanted = [value for node in todo for value in node.outputs if value.uses() or value.is_graph_output()]
    graph.outputs.extend(copies[value] for value in wanted)
    session = open_session(ir.Model(graph, ir_version=model.ir_version), level="none")
    results = run_session(session, feed)
    return {value: results[str(copies[value].name)] for value in wanted}


def _leaf(graph: ir.Graph, name: str, array: NDArray[Any], feed: dict[str, NDArray[Any]]) -> Value:
    if array.nbytes <= INPUT_BYTES:
        return edits.add_initializer(graph, name, array)
    feed[name] = np.ascontiguousarray(array)
    value = Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.from_numpy(array.dtype)))
    graph.inputs.append(value)
    return value
