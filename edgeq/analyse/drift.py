"""Data that isn't what a package was calibrated on: tensors whose values leave the range calibration saw (L5)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from edgeq.analyse.stats import Stats

DRIFTED = 1e-2  # share of the values beyond all that calibration saw: other samples of the same kind stay far below


def drift(
    model: ir.Model, layers: Iterable[Mapping[str, Any]], seen: Mapping[str, Stats]
) -> tuple[dict[str, Any], ...]:
    """A row a quantized tensor of a package that was observed again, worst first. ``layers``: rows of its report, with
    the extremes of calibration.

    ``outside``: share of the values beyond them; ``beyond``: how far, in widths of the range; ``used``: width of the
    range now over that of calibration."""
    written = _written(model)
    rows = []
    for row in layers:
        stats = seen.get(written.get(row["name"], row["name"]))
        low, high = row.get("min"), row.get("max")
        if stats is None or not stats.count or low is None or high is None:
            continue
        width = max(high - low, 1e-30)
        outside, used = _outside(stats, low, high), (stats.max - stats.min) / width
        rows.append({
            "tensor": row["name"], "op": row["op"], "min": low, "max": high, "now_min": stats.min, "now_max": stats.max,
            "outside": outside, "beyond": max(low - stats.min, stats.max - high, 0.0) / width, "used": used,
            "drifted": outside > DRIFTED,
        })  # fmt: skip
    return tuple(sorted(rows, key=lambda row: (-row["outside"], -row["beyond"])))


def _written(model: ir.Model) -> dict[str, str]:
    """Name a report has for a quantized output of the graph -> the tensor in front of its QuantizeLinear."""
    found = {}
    for node in model.graph:
        producer = (
            node.inputs[0].producer() if node.op_type == "DequantizeLinear" and node.inputs[0] is not None else None
        )
        if producer is not None and producer.op_type == "QuantizeLinear" and node.outputs[0].is_graph_output():
            found[str(node.outputs[0].name)] = str(producer.inputs[0].name)  # type: ignore[union-attr]
    return found


def _outside(stats: Stats, low: float, high: float) -> float:
    """Share of the values below ``low`` or above ``high``, of bins that lie there as a whole."""
    edges, counts = stats.histogram.edges(), stats.histogram.counts
    apart = (edges[1:] <= low) | (edges[:-1] > high)
    return float(counts[apart].sum() / max(float(np.sum(counts)), 1.0))
