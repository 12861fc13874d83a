"""Functions of 8-bit codes as tables of 256 codes, which edgeq's own kernel looks up (L7).

Whatever lies between codes and other codes and reads nothing else but scalars is one table, however many kernels it
takes: HardSwish as Clip and QLinearMul, SiLU as QLinearSigmoid and QLinearMul, a float GELU between Q and DQ. The table
is that part of the model itself, run on every code there is, so it has the same bits as the nodes have one by one.

A table is a node ``edgeq.kernels.Table`` (X: codes [...], T: 256 codes in the order of X's bytes -> Y: codes [...]).
Its definition stands in the file as a function, an overload a table, which holds the nodes it replaces: a runtime
without the library of ``target/kernels.py`` inlines them and computes the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.ir import query
from edgeq.rewrite.match import Edit
from edgeq.run.session import open_session, run_session
from edgeq.target.kernels import DOMAIN

CODES = (ir.DataType.UINT8, ir.DataType.INT8)
COUNT = 256
IR_VERSION = 10  # of opset 21
QDQ = ("QuantizeLinear", "DequantizeLinear")
ELEMENTWISE = frozenset({
    "Abs", "Add", "Ceil", "Celu", "Clip", "Div", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish",
    "Identity", "LeakyRelu", "Log", "Max", "Min", "Mish", "Mul", "Neg", "PRelu", "Pow", "Reciprocal", "Relu", "Round",
    "Selu", "Sigmoid", "Sign", "Softplus", "Softsign", "Sqrt", "Sub", "Swish", "Tanh", "ThresholdedRelu",
})  # fmt: skip
TO_LAST, FROM_LAST = (0, 2, 3, 1), (0, 3, 1, 2)


def tabulate(model: ir.Model, keep: frozenset[str] = frozenset()) -> list[str]:
    """Make tables of the functions of codes, in place and without those that end at the nodes in ``keep``; returns the
    names of the nodes replaced."""
    edit, sources, matched = Edit(model), _sources(model.graph), []
    for index, value in enumerate(_needed(sources)):
        last = value.producer()
        assert last is not None
        if last.name not in keep:
            matched.append(str(last.name))
            _replace(value, sources[value], str(index), edit)
    return matched


def _sources(graph: ir.Graph) -> dict[ir.Value, ir.Value]:
    """Value -> the codes it is a function of, for all that depends on nothing else."""
    found: dict[ir.Value, ir.Value] = {}
    for node in graph:
        source = _source(node, found)
        if source is not None:
            found[node.outputs[0]] = source
    return found


def _source(node: ir.Node, sources: Mapping[ir.Value, ir.Value]) -> ir.Value | None:
    if node.domain or node.op_type not in (*ELEMENTWISE, *QDQ):
        return None
    reads = [value for value in node.inputs if value is not None]
    constants, others = (
        [value for value in reads if query.is_constant(value) is constant] for constant in (True, False)
    )
    roots = {sources.get(value, value if value.dtype in CODES else None) for value in others}
    root = roots.pop() if len(roots) == 1 else None
    rank = None if root is None or root.shape is None else len(root.shape)
    if root is None or not all(_is_scalar(value, rank) for value in constants):
        return None
    return root


def _is_scalar(value: ir.Value, rank: int | None) -> bool:
    """Whether a constant is one number that changes no shape."""
    shape = query.dims(value)
    return shape is not None and all(dim == 1 for dim in shape) and len(shape) <= (rank or 0)


def _needed(sources: Mapping[ir.Value, ir.Value]) -> list[ir.Value]:
    """The codes, in order, that something else than a function of the same codes reads; less what passes them on."""
    return [
        value
        for value, source in sources.items()
        if value.dtype in CODES and value.dtype == source.dtype and _is_read(value, sources)
    ]


def _is_read(value: ir.Value, sources: Mapping[ir.Value, ir.Value]) -> bool:
    """Whether codes, or the reals that they stand for, are read by what is no function of them alone."""
    if value.is_graph_output():
        return True
    for node in query.users(value):
        result = node.outputs[0]
        if result not in sources:
            return True
        if node.op_type == "DequantizeLinear" and (
            result.is_graph_output() or any(user.outputs[0] not in sources for user in query.users(result))
        ):
            return True
    return False


def _replace(value: ir.Value, source: ir.Value, overload: str, edit: Edit) -> None:
    """A Table of ``source`` in the place of the node that writes ``value``."""
    old = value.producer()
    assert old is not None and old.graph is not None and source.dtype is not None
    nodes = [*_between(source, value)]
    table = edit.constant(old.graph, f"{value.name}_table", _table(nodes, source, value))
    function = _function(nodes, source, value, overload, edit.opset)
    edit.model.functions[function.identifier()] = function
    before, after = _layouts(source)
    made = []
    codes = source
    if before:
        made.append(edit.node(old, "Transpose", [codes], {"perm": before}))
        codes = made[-1].outputs[0]
    look_up = edit.node(old, "Table", [codes, table], domain=DOMAIN)
    look_up.overload = overload
    made.append(look_up)
    if after:
        made.append(edit.node(old, "Transpose", [look_up.outputs[0]], {"perm": after}))
    for node in made:
        node.outputs[0].type = ir.TensorType(source.dtype)
    made[-1].outputs[0].shape = value.shape
    last = next((node for node in reversed(nodes) if node.op_type not in QDQ), old)
    edit.swap(old, made, name=None if last is not old or made[-1] is look_up else edit.names.fresh(f"{old.name}/back"))
    if not last.outputs[0].uses():
        look_up.name = last.name  # whose work this is now


def _layouts(source: ir.Value) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The permutations around a table: the runtime computes integer convolutions with their channels last, moves what
    it knows between them there, and takes two transpositions that undo each other out, but doesn't know our kernel."""
    writer = source.producer()
    read = writer.inputs[0] if writer is not None and writer.op_type == "QuantizeLinear" else None
    maker = read.producer() if read is not None else None
    if maker is not None and maker.op_type == "Conv" and source.shape is not None and len(source.shape) == 4:
        return TO_LAST, FROM_LAST
    return (), ()


def _between(source: ir.Value, value: ir.Value) -> Iterator[ir.Node]:
    """The nodes that compute ``value`` from ``source``, in order."""
    found: set[ir.Node] = set()
    pending = [value.producer()]
    while pending:
        node = pending.pop()
        if node is None or node in found:
            continue
        found.add(node)
        pending += [read.producer() for read in node.inputs if read is not None and read is not source]
    graph = value.graph
    assert isinstance(graph, ir.Graph)
    return (node for node in graph if node in found)


def _copied(nodes: list[ir.Node], source: ir.Value, value: ir.Value, opset: int) -> ir.Graph:
    """The nodes as a graph of their own, from codes of the shape of ``source``; its constants are nodes as well, as
    functions have no initializers."""
    start = ir.Value(name="X", shape=source.shape, type=source.type)
    copies: dict[ir.Value, ir.Value] = {source: start}
    body: list[ir.Node] = []
    for node in nodes:
        for read in node.inputs:
            if read is not None and read not in copies:
                held = query.constant(read)
                assert held is not None
                body.append(ir.node("Constant", [], {"value": ir.tensor(held)}))
                copies[read] = body[-1].outputs[0]
                copies[read].name = f"c{len(copies)}"
        inputs = [None if read is None else copies[read] for read in node.inputs]
        copy = ir.Node("", node.op_type, inputs, [*node.attributes.values()], num_outputs=1)
        copies[node.outputs[0]] = copy.outputs[0]
        copy.outputs[0].name = f"v{len(copies)}"
        body.append(copy)
    end = copies[value]
    end.name, end.type, end.shape = "Y", value.type, source.shape
    return ir.Graph([start], [end], nodes=body, opset_imports={"": opset}, name="table")


def _table(nodes: list[ir.Node], source: ir.Value, value: ir.Value) -> NDArray[np.uint8] | NDArray[np.int8]:
    """Y of every X, in the order of X's bytes."""
    assert source.dtype is not None and source.shape is not None
    dtype = source.dtype.numpy()
    codes = np.arange(COUNT, dtype=np.uint8).view(dtype).reshape(COUNT, *[1] * (len(source.shape) - 1))
    graph = _copied(nodes, source, value, value.graph.opset_imports[""] if value.graph is not None else 0)
    for end in (graph.inputs[0], graph.outputs[0]):
        end.shape = ir.Shape(codes.shape)
    session = open_session(ir.Model(graph, ir_version=IR_VERSION), level="none")
    found: NDArray[np.uint8] = run_session(session, {"X": codes})["Y"].reshape(COUNT)
    return found


def _function(nodes: list[ir.Node], source: ir.Value, value: ir.Value, overload: str, opset: int) -> ir.Function:
    graph = _copied(nodes, source, value, opset)
    graph.inputs.append(ir.Value(name="T", type=source.type))
    return ir.Function(DOMAIN, "Table", overload, graph=graph, attributes=[])
