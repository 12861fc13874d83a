"""How much each quantized tensor drifted from float, layer by layer (L5)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from edgeq.analyse.place import Plan
from edgeq.analyse.stats import Stats
from edgeq.run.record import Array, Feed
from edgeq.run.session import open_session, run_session
from edgeq.target.record import Target

LARGEST = 1 << 24  # elements of a tensor worth comparing: above, a sample alone would cost 64 MiB a tap


def layers(
    reference: ir.Model, quantized: ir.Model, plan: Plan, feeds: Iterable[Feed], target: Target,
    stats: Mapping[str, Stats],
) -> tuple[dict[str, Any], ...]:  # fmt: skip
    """A row a quantized tensor in graph order: ``name``, ``op``, ``snr_db`` of its dequantized value against the float
    model's (all noise from upstream included), ``format``, and the extremes that calibration saw, ``min`` and ``max``.
    SNR is over all feeds; None where nothing was comparable. Pixels that are codes as they come have no row."""
    twin = _dequantized(quantized, [name for name in plan.tensors if name not in plan.ties])
    names = [name for name in plan.tensors if name in twin]
    exact, noisy = _tapped(reference, names), _tapped(quantized, list(twin.values()))
    sessions = [open_session(m, threads=2, provider=target.simulation, level="basic") for m in (exact, noisy)]
    power, error = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    computed = [name for name in names if name not in {str(value.name) for value in reference.graph.inputs}]
    for feed in feeds:
        wanted = {**feed, **(run_session(sessions[0], feed, computed) if computed else {})}
        found = run_session(sessions[1], feed, list(twin.values()))
        for name in names:
            _add(wanted[name], found[twin[name]], name, power, error)
    writers = {str(value.name): node.op_type for node in reference.graph for value in node.outputs}
    return tuple(
        {"name": name, "op": writers.get(name, "input"), "snr_db": _db(power[name], error[name]),
         "format": str(plan.tensors[name]), **_extremes(stats.get(name))}
        for name in names
    )  # fmt: skip


def _extremes(stats: Stats | None) -> dict[str, float | None]:
    known = stats is not None and stats.count > 0
    return {"min": stats.min if known and stats else None, "max": stats.max if known and stats else None}


def _dequantized(model: ir.Model, names: list[str]) -> dict[str, str]:
    """Tensor -> the value that carries it dequantized (the tensor itself when it is a graph output)."""
    wanted = set(names)
    found = {}
    for node in model.graph:
        if node.op_type != "QuantizeLinear" or node.inputs[0] is None:
            continue
        reader = next(iter(node.outputs[0].uses()))[0]
        source = str(node.inputs[0].name)
        name = str(reader.outputs[0].name) if reader.outputs[0].is_graph_output() else source
        if name in wanted or source in wanted:
            found[name if name in wanted else source] = str(reader.outputs[0].name)
    return found


def _tapped(model: ir.Model, names: list[str]) -> ir.Model:
    clone = model.clone()
    shown = {str(value.name) for value in clone.graph.outputs}
    values = {str(value.name): value for value in clone.graph.inputs}
    values.update({str(value.name): value for node in clone.graph for value in node.outputs})
    clone.graph.outputs.extend(
        values[name] for name in names if name not in shown and not values[name].is_graph_input()
    )
    return clone


def _add(wanted: Array, found: Array, name: str, power: dict[str, float], error: dict[str, float]) -> None:
    if wanted.shape == found.shape and wanted.size <= LARGEST:
        exact = wanted.astype(np.float64)
        power[name] += float(np.square(exact).sum())
        error[name] += float(np.square(exact - found).sum())


def _db(power: float, error: float) -> float | None:
    if power == 0.0 or not np.isfinite(error):
        return None
    return float(10 * np.log10(power / error)) if error else 200.0


def worst(rows: Iterable[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """The ``count`` rows with the lowest SNR."""
    return sorted((row for row in rows if row["snr_db"] is not None), key=lambda row: row["snr_db"])[:count]
