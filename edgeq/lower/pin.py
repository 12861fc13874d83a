"""A model at fixed shapes: what an exporter computes of sizes becomes constants (L7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from edgeq.ir.verify import infer_shapes
from edgeq.rewrite.canonicalize import REWRITES
from edgeq.rewrite.checked import rewritten

SIZES = tuple(row for row in REWRITES if row[0] in ("fold-constants", "freeze-sizes"))


def pinned(model: ir.Model, shapes: Mapping[str, Sequence[int]]) -> ir.Model:
    """A copy whose inputs have these shapes. Weights, codes and scales stay as they are, to the bit."""
    clone = model.clone()
    for value in clone.graph.inputs:
        if (shape := shapes.get(str(value.name))) is not None:
            value.shape = ir.Shape(shape)
    for value in clone.graph.outputs:
        value.shape = None  # declared with the dynamic sizes
    return rewritten(infer_shapes(clone), SIZES)[0]
