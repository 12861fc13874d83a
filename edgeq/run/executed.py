"""What a run really executes and how large each tensor is, from the runtime's own profiler (L4).

Asked instead of inferred: kernels of the runtime's own (fusions, blocked layouts) have no shape inference in ONNX.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime

from edgeq.ir import io
from edgeq.run.record import Feed
from edgeq.run.session import DTYPES, open_session, run_session
from edgeq.target.record import CPU, Provider

APART = "session.optimized_model_external_initializers_file_name"  # weights stay out of a file that ends at 2 GiB


@dataclass(frozen=True)
class Executed:
    """A node of the optimised graph that ran: shapes of its inputs and of its outputs, and bytes of the latter."""

    node: ir.Node
    inputs: tuple[tuple[int, ...], ...]
    shapes: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]


def executed(
    model: Path | ir.Model,
    feed: Feed,
    *,
    provider: Provider = CPU,
    config: Mapping[str, str] | None = None,
) -> tuple[list[Executed], ir.Model]:
    """The nodes of the optimised main graph that one run executed, in order, and that graph without its larger weights'
    data; nodes of bodies aren't among them."""
    with tempfile.TemporaryDirectory(prefix="edgeq-", ignore_cleanup_errors=True) as folder:
        optimised = Path(folder) / "optimised.onnx"
        session: onnxruntime.InferenceSession = open_session(
            model, provider=provider, isolated=False, config={**(config or {}), APART: "optimised.data"},
            optimized_path=optimised, profile_prefix=Path(folder) / "profile",
        )  # fmt: skip
        run_session(session, feed)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        graph = io.read(optimised)
    waiting: dict[tuple[str, str], deque[ir.Node]] = defaultdict(deque)
    for node in graph.graph:
        waiting[node.name or "", node.op_type].append(node)
    ran = []
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        op = event["args"]["op_name"]
        named = (event["name"].removesuffix("_kernel_time"), op)
        key = named if waiting[named] else ("", op)  # a node without a name is called by its op and index
        if waiting[key]:
            ran.append(_executed(waiting[key].popleft(), event["args"]))
    return ran, graph


def _executed(node: ir.Node, facts: Mapping[str, Any]) -> Executed:
    inputs = tuple(tuple(shape) for entry in facts["input_type_shape"] for shape in entry.values())
    outputs = [(kind, tuple(shape)) for entry in facts["output_type_shape"] for kind, shape in entry.items()]
    return Executed(
        node, inputs, tuple(shape for _, shape in outputs), tuple(_bytes(kind, shape) for kind, shape in outputs)
    )


def _bytes(kind: str, shape: tuple[int, ...]) -> int:
    """Of a tensor the profiler calls ``kind`` (``float``, ``int64``, …); one that numpy has no type for counts a byte
    an element."""
    dtype = DTYPES.get(f"tensor({kind})")
    return math.prod(shape) * (1 if dtype is None else dtype.itemsize)
