"""Rewrite a finished graph into edgeq's own kernels, where a target names them (L7).

One literal table, a row a kernel. What a rewrite leaves has the bits of what was there, and runs without the library as
well: see ``target/kernels.py``.
"""

from __future__ import annotations

import onnx_ir as ir

from edgeq.ir import edit as edits
from edgeq.ir import verify
from edgeq.lower import convolutions, tables
from edgeq.rewrite.match import Rewrite
from edgeq.target.kernels import DOMAIN
from edgeq.target.record import Target

IR_VERSION = 10  # the first with overloads of functions
OWN: tuple[tuple[str, Rewrite], ...] = (
    ("Table", tables.tabulate),
    ("DepthwiseConv", convolutions.by_channel),
    ("StemConv", convolutions.of_few_channels),
)


def in_own_kernels(model: ir.Model, target: Target) -> tuple[ir.Model, dict[str, int]]:
    """(A copy in the kernels that ``target`` names, how many nodes each got); the model itself where none got any.
    Raises ModelError when the result isn't valid ONNX."""
    result = verify.infer_shapes(model)  # a copy
    counts = {name: len(rewrite(result, frozenset())) for name, rewrite in OWN if name in target.kernels}
    if not any(counts.values()):
        return model, {}
    edits.drop_dead(result)
    result.opset_imports[DOMAIN] = 1
    result.ir_version = max(result.ir_version, IR_VERSION)
    verify.verify(result, "lowering to edgeq's kernels")
    return result, {name: count for name, count in counts.items() if count}
