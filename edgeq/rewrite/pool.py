"""A mean over all positions of an image is a GlobalAveragePool, for which targets have integer kernels (L6)."""

from __future__ import annotations

import onnx_ir as ir

from edgeq.ir import query
from edgeq.rewrite.match import Edit, axes, each, rank


def _mean_as_pool(node: ir.Node, edit: Edit) -> bool:
    """ReduceMean f32[n, c, h, w] over h and w -> GlobalAveragePool, and Flatten where the axes go."""
    over = axes(node)
    if rank(node.inputs[0]) != 4 or over is None or sorted(axis % 4 for axis in over) != [2, 3]:
        return False
    output = node.outputs[0]
    if query.attribute(node, "keepdims", 1):
        edit.swap(node, [edit.node(node, "GlobalAveragePool", [node.inputs[0]], like=output)])
        return True
    pool = edit.node(node, "GlobalAveragePool", [node.inputs[0]])
    pool.outputs[0].type = output.type
    flat = edit.node(node, "Flatten", [pool.outputs[0]], {"axis": 1}, like=output)
    pooled, name = pool, node.name
    edit.swap(node, [pool, flat])
    pooled.name, flat.name = name, pooled.name
    return True


means_as_pools = each(_mean_as_pool, "ReduceMean")
