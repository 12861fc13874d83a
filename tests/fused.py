"""Small graphs taken into the kernels of a target, for tests of fusions."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgeq.lower.fuse import fuse
from edgeq.run.session import open_session, run_session
from edgeq.target.load import load_target
from tests.graphs import Arrays

TARGET = load_target("cpu-x64-vnni")
LOWEST = float(np.finfo(np.float32).min)


def fused(model: ir.Model, *feeds: Arrays) -> ir.Model:
    """The model in the target's kernels, compared here: without feeds, ``fuse`` rolls nothing back in silence."""
    result, changes = fuse(model, TARGET)
    assert not any(change.rolled_back for change in changes)
    exact, found = (open_session(one, level="none") for one in (model, result))
    for feed in feeds:
        for (name, a), b in zip(run_session(exact, feed).items(), run_session(found, feed).values(), strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5, err_msg=name)
    return result


def node_of(model: ir.Model, op: str) -> ir.Node:
    """The only node of a type."""
    (node,) = (node for node in model.graph if node.op_type == op)
    return node
