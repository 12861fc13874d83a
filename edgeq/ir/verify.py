"""The verifier between any two steps: a model must be valid ONNX with known shapes and types (L2)."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes

from edgeq.errors import ModelError


def infer_shapes(model: ir.Model) -> ir.Model:
    """A copy with shapes and types as far as ONNX's inference knows; wrong declared shapes of inner values are
    forgotten first, since inference would believe them."""
    clone = model.clone()
    for graph in clone.graphs():
        outputs = set(graph.outputs)
        for node in graph:
            for value in node.outputs:
                if value not in outputs and node.domain in ("", "ai.onnx"):  # of others inference knows nothing
                    value.shape = None
    passes.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(clone)
    return clone


def verify(model: ir.Model, after: str) -> None:
    """Raise ModelError naming the step ``after`` which the model stopped being valid ONNX."""
    seen: set[str] = set()
    for node in model.graph:
        for value in node.outputs:
            if value.name in seen:
                raise ModelError(f"after {after}: two nodes write {value.name!r}")
            seen.add(value.name or "")
    try:
        passes.CheckerPass(full_check=False)(_with_ranks(model))
    except (onnx.checker.ValidationError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"after {after}: the model is not valid ONNX: {first}") from error


def _with_ranks(model: ir.Model) -> ir.Model:
    """For the checker alone, which wants a shape on every input and output; the runtime takes unknown ranks."""
    if all(value.shape is not None for graph in model.graphs() for value in (*graph.inputs, *graph.outputs)):
        return model
    clone = model.clone()
    for graph in clone.graphs():
        for value in (*graph.inputs, *graph.outputs):
            if value.shape is None:
                value.shape = ir.Shape(())
    return clone
