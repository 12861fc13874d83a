"""Bring a model to another opset: one table, a row for each change of an op's form (L3).

Our own rows instead of ``onnx.version_converter``, which serialises the whole model (2 GiB limit) and in onnx 1.23.2
silently changes what linear Upsample, Resize 10 and Hardmax compute and breaks GroupNormalization (measured);
onnxscript's starts at opset 18. Between opset 7 and 21 only the ops below changed inputs, attributes or defaults: a
test derives that list from ``onnx.defs`` and holds the table against it. Going down relabels the model when each of
its nodes means the same at the lower opset, which the op schemas say.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.errors import ModelError
from edgeq.ir import edit, query, verify

OLDEST = 7
"""Before opset 7 broadcasting was an attribute; no exporter of the last years writes it."""

NEWEST = 27
"""The newest opset ONNX Runtime 1.32 has kernels for; 28 is refused for Q/DQ (measured)."""

REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
"""The ``Reduce`` ops whose axes became an input at opset 18; ReduceSum was first, at 13."""


@dataclass(frozen=True)
class Change:
    """What an adapter works with: one node, and fresh names for what it adds."""

    node: ir.Node
    names: edit.Names

    def refuse(self, why: str) -> ModelError:
        return ModelError(
            f"node {self.node.name!r} ({self.node.op_type}) can't be brought to a newer opset: {why}",
            hint="export the model again with opset 13 or newer",
        )

    def pop(self, attribute: str) -> object:
        """Remove an attribute and return its value, None where it is absent."""
        found = self.node.attributes.pop(attribute, None)
        return None if found is None else found.value

    def constant(self, what: str, array: NDArray[np.generic]) -> ir.Value:
        """``array`` as an initializer of the node's own graph."""
        name = self.names.fresh(f"{self.node.outputs[0].name}_{what}")
        return edit.add_initializer(_graph_of(self.node), name, array)

    def set_input(self, index: int, value: ir.Value | None) -> None:
        if len(self.node.inputs) <= index:
            self.node.resize_inputs(index + 1)
        self.node.replace_input_with(index, value)

    def wrap(self, op: str, inputs: list[ir.Value | None], what: str) -> ir.Value:
        """A new node before this one; returns its output."""
        name = self.names.fresh(f"{self.node.name}_{what}")
        output = self.names.fresh(f"{self.node.outputs[0].name}_{what}")
        node = edit.make_node(op, inputs, name, output)
        _graph_of(self.node).insert_before(self.node, node)
        return node.outputs[0]


Adapter = Callable[[Change], None]


def _graph_of(node: ir.Node) -> ir.Graph:
    graph = node.graph
    if not isinstance(graph, ir.Graph):  # functions are inlined before
        raise TypeError(f"node {node.name!r} is in no graph")
    return graph


def _dtype(value: ir.Value | None) -> np.dtype[np.generic]:
    dtype = value.dtype if value is not None else None
    return np.dtype((dtype or ir.DataType.FLOAT).numpy())


def _ints_to_input(attribute: str, index: int) -> Adapter:
    """An attribute of int64s becomes an input; an absent or empty one stays absent (all axes, equal parts)."""

    def adapt(change: Change) -> None:
        ints = change.pop(attribute)
        if ints:
            change.set_input(index, change.constant(attribute, np.atleast_1d(np.asarray(ints, np.int64))))

    return adapt


def _upsample_scales(change: Change) -> None:
    scales = change.pop("scales")
    if scales is None:
        raise change.refuse("it has no scales")
    change.set_input(1, change.constant("scales", np.asarray(scales, np.float32)))


def _upsample_is_resize(change: Change) -> None:
    change.node.op_type = "Resize"


def _resize_10(change: Change) -> None:
    """Opset 10 had no coordinate mode. ONNX Runtime: asymmetric; nearest rounds up if it shrinks, else down."""
    node = change.node
    scales = node.inputs[1]
    known = query.constant(scales)
    shrinks = known is not None and bool((known < 1).any())
    if (
        known is not None
        and shrinks
        and bool((known > 1).any())
        and query.attribute(node, "mode", "nearest") == "nearest"
    ):
        raise change.refuse(f"it shrinks one axis and grows another by nearest (scales {known.tolist()})")
    node.attributes["coordinate_transformation_mode"] = ir.AttrString("coordinate_transformation_mode", "asymmetric")
    node.attributes["nearest_mode"] = ir.AttrString("nearest_mode", "ceil" if shrinks else "floor")
    change.set_input(2, scales)
    change.set_input(1, None)


def _resize_one_size(change: Change) -> None:
    """Opset 11 wanted an empty ``scales`` beside ``sizes``; since 13 only one of them may be there."""
    for index in (1, 2):
        value = change.node.inputs[index] if len(change.node.inputs) > index else None
        if value is not None and query.dims(value) == (0,):
            change.set_input(index, None)


def _slice_bounds(change: Change) -> None:
    for index, attribute in enumerate(("starts", "ends", "axes"), start=1):
        ints = change.pop(attribute)
        if ints is not None:
            change.set_input(index, change.constant(attribute, np.asarray(ints, np.int64)))


def _clip_bounds(change: Change) -> None:
    dtype = _dtype(change.node.inputs[0])
    for index, attribute in enumerate(("min", "max"), start=1):
        bound = change.pop(attribute)
        if bound is not None:
            change.set_input(index, change.constant(attribute, np.asarray(bound, dtype)))


def _pad_amounts(change: Change) -> None:
    pads, value = change.pop("pads"), change.pop("value")
    change.set_input(1, change.constant("pads", np.asarray(pads, np.int64)))
    if value:
        change.set_input(2, change.constant("value", np.asarray(value, _dtype(change.node.inputs[0]))))


def _dropout_in_inference(change: Change) -> None:
    """The ratio has no effect outside training; the old mask had another type."""
    change.pop("ratio")
    _one_output(change)


def _one_output(change: Change) -> None:
    if any(value.uses() or value.is_graph_output() for value in change.node.outputs[1:]):
        raise change.refuse("its training outputs are read")
    change.node.resize_outputs(1)


def _batch_norm_spatial(change: Change) -> None:
    if change.pop("spatial") == 0:
        raise change.refuse("spatial=0 (statistics for each position) no longer exists")


def _softmax_axis(change: Change) -> None:
    """Before 13 the input was seen as a matrix cut at ``axis``; only on the last axis do both mean the same."""
    node, names, data = change.node, change.names, change.node.inputs[0]
    axis = query.attribute(node, "axis", 1)
    shape = query.dims(data)
    if axis == -1 or (shape is not None and axis + 1 == len(shape)):
        node.attributes["axis"] = ir.AttrInt64("axis", -1)
        return
    name, output = str(node.name), str(node.outputs[0].name)

    def named(op: str, what: str, inputs: list[ir.Value | None], **attributes: int) -> ir.Node:
        return edit.make_node(op, inputs, names.fresh(f"{name}_{what}"), names.fresh(f"{output}_{what}"), attributes)

    flat = named("Flatten", "matrix", [data], axis=axis)
    size = named("Shape", "shape", [data])
    rows = named(node.op_type, "rows", [flat.outputs[0]], axis=-1)
    back = named("Reshape", "back", [rows.outputs[0], size.outputs[0]])
    edit.replace_node(_graph_of(node), node, [flat, size, rows, back])


def _split_parts(change: Change) -> None:
    if len(change.node.inputs) < 2 or change.node.inputs[1] is None:
        change.node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(change.node.outputs))


def _roi_align_mode(change: Change) -> None:
    name = "coordinate_transformation_mode"
    change.node.attributes.setdefault(name, ir.AttrString(name, "output_half_pixel"))


def _dft_axis(change: Change) -> None:
    axis = change.pop("axis")
    change.set_input(2, change.constant("axis", np.asarray(1 if axis is None else axis, np.int64)))


def _grid_sample_mode(change: Change) -> None:
    mode = query.attribute(change.node, "mode", "bilinear")
    renamed = {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode)
    change.node.attributes["mode"] = ir.AttrString("mode", renamed)


def _group_norm_channels(change: Change) -> None:
    """Scale and bias had a value a group; now a value a channel."""
    groups = query.attribute(change.node, "num_groups")
    shape = query.dims(change.node.inputs[0])
    channels = shape[1] if shape is not None else None
    if channels is None:
        raise change.refuse("its number of channels is unknown")
    for index, what in ((1, "scale"), (2, "bias")):
        column = change.wrap(
            "Reshape", [change.node.inputs[index], change.constant(f"{what}_column", np.array([-1, 1]))], f"{what}_rows"
        )
        repeat = change.constant(f"{what}_repeat", np.array([1, channels // groups]))
        rows = change.wrap("Expand", [column, repeat], f"{what}_repeated")
        flat = change.wrap("Reshape", [rows, change.constant(f"{what}_flat", np.array([-1]))], what)
        change.node.replace_input_with(index, flat)


def _scatter_is_elements(change: Change) -> None:
    change.node.op_type = "ScatterElements"


def _scan_batch(change: Change) -> None:
    raise change.refuse("Scan of opset 8 has a batch axis that opset 9 took away")


ADAPTERS: dict[tuple[str, int], Adapter] = {
    ("Upsample", 9): _upsample_scales,
    ("BatchNormalization", 9): _batch_norm_spatial,
    ("Scan", 9): _scan_batch,
    ("Upsample", 10): _upsample_is_resize,
    ("Slice", 10): _slice_bounds,
    ("TopK", 10): _ints_to_input("k", 1),
    ("Resize", 11): _resize_10,
    ("Clip", 11): _clip_bounds,
    ("Pad", 11): _pad_amounts,
    ("Scatter", 11): _scatter_is_elements,
    ("Dropout", 12): _dropout_in_inference,
    ("Resize", 13): _resize_one_size,
    ("Softmax", 13): _softmax_axis,
    ("LogSoftmax", 13): _softmax_axis,
    ("Hardmax", 13): _softmax_axis,
    ("Split", 13): _ints_to_input("split", 1),
    ("Squeeze", 13): _ints_to_input("axes", 1),
    ("Unsqueeze", 13): _ints_to_input("axes", 1),
    ("ReduceSum", 13): _ints_to_input("axes", 1),
    ("BatchNormalization", 14): _one_output,
    ("RoiAlign", 16): _roi_align_mode,
    ("Split", 18): _split_parts,
    **{(f"Reduce{what}", 18): _ints_to_input("axes", 1) for what in REDUCTIONS},
    ("DFT", 20): _dft_axis,
    ("GridSample", 20): _grid_sample_mode,
    ("GroupNormalization", 21): _group_norm_channels,
}
"""(op type, first opset of the new form) -> how a node of the old form becomes one of the new."""


def convert(model: ir.Model, opset: int) -> tuple[ir.Model, tuple[str, ...]]:
    """Model without functions -> the model at ``opset`` and what was done, in words. Raises ModelError naming the node
    and op that has no equal there. A model newer than ``opset`` that can't go down stays as it is up to ``NEWEST``."""
    found = declared(model)
    if found < OLDEST:
        raise ModelError(f"the model has opset {found}, edgeq reads {OLDEST} and newer", hint="export it again")
    check_ops(model, found)
    if found == opset:
        return model, ()
    if found > opset:
        return _lower(model, found, opset)
    clone = verify.infer_shapes(model)
    _raise_nodes(clone, found, opset)
    _label(clone, opset)
    return clone, (f"opset {found} brought to {opset}",)


def declared(model: ir.Model) -> int:
    """The opset of the default domain; 1 where none is written, as ONNX says."""
    return max((model.opset_imports.get(domain, 1) for domain in ("", "ai.onnx")), default=1)


def _raise_nodes(model: ir.Model, found: int, opset: int) -> None:
    names = edit.Names(model)
    changed = sorted({version for _, version in ADAPTERS if found < version <= opset})
    for node in list(query.nodes(model)):
        for version in changed:
            adapter = ADAPTERS.get((node.op_type, version)) if node.domain == "" else None
            if adapter is not None:
                adapter(Change(node, names))
        node.version = None


def _label(model: ir.Model, opset: int) -> None:
    model.opset_imports.pop("ai.onnx", None)
    model.opset_imports[""] = opset
    model.ir_version = ir_version(opset)
    for graph in model.graphs():
        if "" in graph.opset_imports:
            graph.opset_imports[""] = opset


def ir_version(opset: int) -> int:
    """The file format's version that came with an opset; at least 8, which every runtime of opset 15 reads."""
    known: dict[int, int] = {version: file_format for _, file_format, version, *_ in onnx.helper.VERSION_TABLE}
    return max(8, known.get(opset, 8))


def _lower(model: ir.Model, found: int, opset: int) -> tuple[ir.Model, tuple[str, ...]]:
    typed = verify.infer_shapes(model)
    for node in query.nodes(typed):
        why = _not_expressible(node, found, opset) if node.domain == "" else ""
        if why:
            break
    else:
        _label(typed, opset)
        for node in query.nodes(typed):
            node.version = None
        return typed, (f"opset {found} lowered to {opset}",)
    if found > NEWEST:
        raise ModelError(
            f"the model has opset {found}, the runtime reads up to {NEWEST}, and node {node.name!r} keeps it "
            f"from going down: {why}",
            hint=f"export it again with opset {opset}",
        )
    return model, (f"opset {found} kept, since node {node.name!r} can't go down to {opset}: {why}",)


def _not_expressible(node: ir.Node, found: int, opset: int) -> str:
    """Why ``node`` has no equal at the lower ``opset``; empty when it has. From 22 on ONNX changed types and added
    attributes whose defaults are the old behaviour, so form and types decide."""
    new = _schema(node.op_type, found)
    old = _schema(node.op_type, opset)
    if new is None or old is None:
        return f"{node.op_type} is new since opset {opset}"
    if new.since_version == old.since_version:
        return ""
    for name, attr in list(node.attributes.items()):
        if name not in old.attributes:
            default = onnx.helper.get_attribute_value(new.attributes[name].default_value)
            plain = default.decode() if isinstance(default, bytes) else default
            if attr.value != plain:
                return f"{node.op_type} has {name}={attr.value!r}, unknown there"
            del node.attributes[name]
    if len(node.inputs) > old.max_input:
        return f"{node.op_type} has {len(node.inputs)} inputs, at most {old.max_input} there"
    return _unknown_type(node, old)


def _unknown_type(node: ir.Node, schema: onnx.defs.OpSchema) -> str:
    allowed = {item.type_param_str: set(item.allowed_type_strs) for item in schema.type_constraints}
    for index, value in enumerate(node.inputs):
        if value is None or value.dtype is None or not schema.inputs:
            continue
        kind = schema.inputs[min(index, len(schema.inputs) - 1)].type_str
        text = f"tensor({value.dtype.name.lower()})"
        if isinstance(value.type, ir.TensorType) and text not in allowed.get(kind, {kind}):
            return f"{node.op_type} takes no {value.dtype.name} there"
    return ""


def _schema(op: str, opset: int) -> onnx.defs.OpSchema | None:
    if not onnx.defs.has(op, opset, ""):
        return None
    return onnx.defs.get_schema(op, opset, "")


DOMAINS = frozenset(
    ("", "ai.onnx.ml", "ai.onnx.preview.training", "com.microsoft", "com.microsoft.nchwc", "com.ms.internal.nhwc")
)
"""The domains ONNX Runtime's wheels bring kernels for."""


def check_ops(model: ir.Model, opset: int) -> None:
    """Raise ModelError for a node whose op or domain nobody here knows."""
    for node in query.nodes(model):
        if node.op_identifier() in model.functions:
            continue
        if node.domain not in DOMAINS:
            raise ModelError(
                f"node {node.name!r} ({node.op_type}) is of domain {node.domain!r}, which ONNX Runtime doesn't know",
                hint="export it as ONNX ops or with the op's function body",
            )
        if node.domain == "" and _schema(node.op_type, opset) is None:
            raise ModelError(
                f"node {node.name!r} has op {node.op_type!r}, which ONNX opset {opset} doesn't know",
                hint=_nearest_op(node.op_type, opset),
            )


def _nearest_op(op: str, opset: int) -> str:
    known = sorted({schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""})
    if op in known:
        return f"{op} exists since opset {first(op)}; declare it"
    near = difflib.get_close_matches(op, [name for name in known if _schema(name, opset)], n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else "export it as ONNX ops"


def first(op: str) -> int:
    """The opset an op came with."""
    history = onnx.defs.get_all_schemas_with_history()
    return min(int(schema.since_version) for schema in history if schema.name == op and not schema.domain)
