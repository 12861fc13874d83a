"""Put what exporters write into one form, so that no later stage meets the variants (L3).

Afterwards: no functions, no Constant nodes (but those that are graph outputs), weights are initializers and not inputs,
every node and value has a name of its own, node metadata is gone and the model's ``metadata_props`` are kept.
Declared shapes are believed for inputs alone; the rest is inferred, since real files declare wrong ones.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes

from edgeq.errors import ModelError, UsageError, did_you_mean
from edgeq.ir import edit, query, verify
from edgeq.source import opset as opsets


def inline_functions(model: ir.Model) -> tuple[str, ...]:
    """Replace calls of the model's own functions by their bodies, in place."""
    count = len(model.functions)
    if not count:
        return ()
    for function in model.functions.values():
        for domain, version in model.opset_imports.items():
            if function.opset_imports.get(domain, version) != version:
                raise ModelError(
                    f"function {function.name!r} uses opset {function.opset_imports[domain]} of domain {domain!r}, "
                    f"the model {version}",
                    hint="export it with one opset, or without functions",
                )
    try:
        passes.InlinePass()(model)
    except (ValueError, ir.passes.PassError, ir.passes.PreconditionError) as error:
        raise ModelError(
            f"the model's functions can't be inlined: {error}", hint="export it without functions"
        ) from error
    model.functions.clear()  # those nobody calls
    return (f"{count} function{'s' if count > 1 else ''} inlined",)


def lift_constants(model: ir.Model) -> tuple[str, ...]:
    """Make weights in Constant nodes initializers and take weights off the inputs, in place."""
    before = [value.name for value in model.graph.inputs]
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.RemoveInitializersFromInputsPass()(model)
    count = len(before) - len(model.graph.inputs)
    return (f"{count} weight{'s' if count > 1 else ''} taken off the inputs",) if count else ()


def drop_metadata(model: ir.Model) -> None:
    """Forget what exporters note on nodes and values (torch writes stack traces), in place; the model's own
    ``metadata_props`` stay: apps read charsets and labels from them."""
    for graph in model.graphs():
        graph.metadata_props.clear()
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
        for value in (*graph.inputs, *graph.initializers.values()):
            value.metadata_props.clear()


def name_all(model: ir.Model) -> None:
    """Give every node and value, bodies included, a name of its own, in place. The main graph's inputs and outputs
    keep theirs."""
    names, kept = edit.Names(model), {*model.graph.inputs, *model.graph.outputs}
    values = {value.name or "" for value in kept}
    nodes = set[str]()
    for graph in model.graphs():
        for value in (*graph.inputs, *graph.initializers.values()):
            if value not in kept:
                value.name = _own(value.name or "value", values, names)
        for node in graph:
            node.name = _own(node.name or f"{node.op_type}_node", nodes, names)
            for value in node.outputs:
                # An absent optional output keeps its empty name: a name would ask the kernel to compute it.
                if value not in kept and (value.name or value.uses() or value.is_graph_output()):
                    value.name = _own(value.name or f"{node.name}_output", values, names)


def _own(wanted: str, given: set[str], names: edit.Names) -> str:
    """``wanted`` for the first who asks, a name nobody has for those who follow."""
    name = names.fresh(wanted) if wanted in given else wanted
    given.add(name)
    names.taken.add(name)
    return name


def free_dims(model: ir.Model) -> None:
    """Make sizes of inputs that say nothing dynamic, in place: exporters write -1, 0 or ``?`` for a size they don't
    know, and two ``?`` would claim to be equal."""
    for value in model.graph.inputs:
        if value.shape is None:
            continue
        dims: list[int | str | None] = []
        for axis, dim in enumerate(value.shape):
            name = dim if isinstance(dim, int) else dim.value
            said = name > 0 if isinstance(name, int) else bool(name) and any(c.isalpha() for c in str(name))
            dims.append(name if said else f"{value.name}_axis{axis}")
        value.shape = ir.Shape(dims)


def pin(model: ir.Model, pins: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """Set the shapes of named inputs, in place. Raises UsageError for an unknown input, another rank or another
    static size."""
    inputs = {value.name or "": value for value in model.graph.inputs}
    for name, shape in pins.items():
        if name not in inputs:
            raise UsageError(f"the model has no input {name!r} to give a shape", hint=did_you_mean(name, list(inputs)))
        found = query.dims(inputs[name])
        if found is not None and len(found) != len(shape):
            raise UsageError(
                f"input {name!r} has {len(found)} axes {_text(inputs[name])}, the shape given has {len(shape)} {shape}"
            )
        for axis, (old, new) in enumerate(zip(found or shape, shape, strict=True)):
            if new < 1:
                raise UsageError(f"input {name!r} was given size {new} on axis {axis}", hint="give sizes of 1 and more")
            if old is not None and old != new:
                raise UsageError(
                    f"input {name!r} has size {old} on axis {axis}, the shape given says {new}",
                    hint=f"its shape is {_text(inputs[name])}",
                )
        inputs[name].shape = ir.Shape(shape)
    return tuple(f"input {name!r} pinned to {list(shape)}" for name, shape in pins.items())


def _text(value: ir.Value) -> str:
    return "[" + ", ".join("?" if dim is None else str(dim) for dim in query.dims(value) or ()) + "]"


def settle_shapes(model: ir.Model) -> tuple[ir.Model, tuple[str, ...]]:
    """A copy whose outputs' shapes are the inferred ones; declared ones stay where inference knows nothing."""
    declared = [(value.shape, value.type) for value in model.graph.outputs]
    clone = model.clone()
    for value in clone.graph.outputs:
        if value.producer() is not None:
            value.shape = None
    settled = verify.infer_shapes(clone)
    notes = []
    for value, (shape, kind) in zip(settled.graph.outputs, declared, strict=True):
        value.type = kind if value.type is None else value.type
        said, found = _dims(shape), query.dims(value)
        if found is None or said is None:
            value.shape = shape if found is None else value.shape
        elif len(found) != len(said) or any(a != b for a, b in zip(said, found, strict=True) if None not in (a, b)):
            notes.append(f"output {value.name!r} is declared {list(said)} and has {list(found)}")
        else:
            merged = [b if isinstance(b, int) else a for a, b in zip(shape or (), value.shape or (), strict=True)]
            value.shape = ir.Shape(merged)
    return settled, tuple(notes)


def _dims(shape: ir.Shape | None) -> tuple[int | None, ...] | None:
    return None if shape is None else tuple(dim if isinstance(dim, int) else None for dim in shape)


def settle_format(model: ir.Model) -> None:
    """Label the file format with the version of the model's opset, in place: onnx 1.23 writes version 14, which
    ONNX Runtime refuses even at opset 21."""
    if model.ir_version > onnx.IR_VERSION:
        raise ModelError(
            f"the model has IR version {model.ir_version}, the installed onnx reads up to {onnx.IR_VERSION}",
            hint="pip install -U onnx, or export with an older IR version",
        )
    model.ir_version = opsets.ir_version(opsets.declared(model))
