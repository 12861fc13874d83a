"""The plots of a report as plotly figures in plain dicts: ``{"data": […], "layout": {…}}`` (L0).

Dicts instead of plotly's Python classes: they are what the page needs as JSON, and they cost no import. Names are
escaped here, since plotly reads some HTML in labels.
"""

from __future__ import annotations

import math
from html import escape
from typing import Any

from edgeq.report import rows
from edgeq.report.record import Report

Figure = dict[str, Any]
INTEGER, MOVER, FLOAT = "#2f81f7", "#9aa5b1", "#d2691e"
COLOURS = (FLOAT, "#3fa66b", "#a371f7", "#c4a000", MOVER)
SYMBOLS = ("circle", "diamond-open", "x-thin-open")  # for when the colours begin again
ABOVE = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "normal"}  # a legend, on phones too
NO_DISTORTION_DB = 100.0  # a tensor that loses nothing has an infinite ratio: drawn at the top of the scale


def figures(report: Report) -> dict[str, tuple[str, Figure]]:
    """Element id -> (heading, figure), in reading order; a figure without data is left out."""
    drawn = {
        "size": ("Size", size(report)),
        "coverage": ("Coverage", coverage(report)),
        "latency": ("Latency", latency(report)),
        "layers": ("Signal to noise of each quantized tensor", layers(report)),
        "values": ("Values of a tensor", values(report)),
        "predicted": ("Predicted signal to noise of each weight, by format", predicted(report)),
    }
    return {name: (heading, figure) for name, (heading, figure) in drawn.items() if figure is not None}


def _layout(height: int, x_title: str, **more: Any) -> Figure:
    margin = {"l": 8, "r": 16, "t": 8, "b": 8}
    return {"height": height, "margin": margin, "xaxis": {"title": {"text": x_title}}, "yaxis": {}} | more


def size(report: Report) -> Figure | None:
    """A bar for the source and one for what ships, MiB; a bar alone says nothing."""
    found = rows.sizes(report)
    if len(found) < 2:
        return None
    bars = {
        "type": "bar",
        "orientation": "h",
        "y": [name for name, _ in found],
        "x": [count / rows.MIB for _, count in found],
        "text": [rows.quantity(count, "bytes") for _, count in found],
        "textposition": "auto",
        "marker": {"color": [INTEGER if name == "artifact" else FLOAT for name, _ in found]},
        "hoverinfo": "y+text",
    }
    layout = _layout(90 + 45 * len(found), "MiB", yaxis={"autorange": "reversed"})
    return {"data": [bars], "layout": layout}


def latency(report: Report) -> Figure | None:
    """The distribution of all laps, a box a configuration and thread count; the median where laps are missing."""
    found = rows.latency_rows(report)
    if not found:
        return None
    others = (name for name in report.latency if name != "artifact")
    colours = {"artifact": INTEGER, **dict(zip(others, COLOURS * len(found), strict=False))}
    boxes = [
        {
            "type": "box",
            "orientation": "h",
            "name": f"{escape(row.configuration)}, {row.threads} thread{'' if row.threads == '1' else 's'}",
            "x": list(row.laps_ms) or [row.median_ms],
            "boxpoints": "outliers",
            "marker": {"color": colours[row.configuration], "size": 4},
        }
        for row in found
    ]
    layout = _layout(110 + 40 * len(found), "ms a run", showlegend=False, yaxis={"autorange": "reversed"})
    layout["xaxis"] |= {"rangemode": "tozero"}
    return {"data": boxes, "layout": layout}


def coverage(report: Report) -> Figure | None:
    """Shares of integer kernels, data movers and float nodes: by multiply-accumulates and by nodes, percent."""
    found = report.coverage
    if found is None:
        return None
    nodes = max(1, found.integer_nodes + found.mover_nodes + found.float_nodes)
    by_macs = (found.integer_macs_share, 0.0, 1.0 - found.integer_macs_share)
    by_nodes = (found.integer_nodes / nodes, found.mover_nodes / nodes, found.float_nodes / nodes)
    bars = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "y": ["MACs", "nodes"],
            "x": [100 * by_macs[index], 100 * by_nodes[index]],
            "marker": {"color": colour},
            "hovertemplate": f"{name}: %{{x:.1f}} %<extra></extra>",
        }
        for index, (name, colour) in enumerate((("integer", INTEGER), ("data mover", MOVER), ("float", FLOAT)))
    ]
    layout = _layout(210, "%", barmode="stack", legend=ABOVE, yaxis={"autorange": "reversed"})
    layout["xaxis"] |= {"range": [0, 100]}
    return {"data": bars, "layout": layout}


def layers(report: Report) -> Figure | None:
    """A bar a tensor in graph order, dB; the name, op and format on hover. Lossless tensors stand at 100 dB."""
    measured = (row for row in report.layers if isinstance(row.get("snr_db"), int | float))
    found = [row for row in measured if not math.isnan(row["snr_db"])]
    if not found:
        return None
    bars = {
        "type": "bar",
        "x": list(range(1, len(found) + 1)),
        "y": [max(-NO_DISTORTION_DB, min(row["snr_db"], NO_DISTORTION_DB)) for row in found],
        "hovertext": [_layer_words(row) for row in found],
        "hovertemplate": "%{hovertext}<extra></extra>",
        "marker": {"color": INTEGER, "line": {"width": 0}},
    }
    layout = _layout(320, "tensor, in graph order (drag to zoom)", yaxis={"title": {"text": "dB"}})
    return {"data": [bars], "layout": layout}


def _layer_words(row: dict[str, Any]) -> str:
    words = [str(row.get(key) or "") for key in ("name", "op", "format")]
    words.insert(2, f"{rows.number(row['snr_db'])} dB")
    return "<br>".join(escape(word) for word in words if word)


def values(report: Report) -> Figure | None:
    """The histogram of one tensor that advice is given on; the page's menu shows another (plotly's own is long for a
    phone, and its buttons grow with the square of the tensors). Counts on a logarithmic axis."""
    if not report.advice:
        return None
    bars = [
        {
            "type": "bar",
            "name": escape(row["tensor"]),
            "x": _middles(row["values"]),
            "y": list(row["values"]["bars"]),
            "visible": index == 0,
            "marker": {"color": INTEGER, "line": {"width": 0}},
            "hovertemplate": "%{x:.4g}: %{y}<extra></extra>",
        }
        for index, row in enumerate(report.advice)
    ]
    yaxis = {"type": "log", "title": {"text": "count"}}
    return {"data": bars, "layout": _layout(300, "value", yaxis=yaxis, bargap=0, showlegend=False)}


def _middles(found: dict[str, Any]) -> list[float]:
    """Where the bars of a histogram stand."""
    width = (found["max"] - found["min"]) / len(found["bars"])
    return [found["min"] + (index + 0.5) * width for index in range(len(found["bars"]))]


def predicted(report: Report) -> Figure | None:
    """A mark a weight and format, dB; weights in graph order, one on which nothing is lost at the top."""
    found = rows.predicted_rows(report)
    if not found:
        return None
    marks = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": name,
            "x": list(range(1, len(found) + 1)),
            "y": [None if row[name] is None else min(row[name], NO_DISTORTION_DB) for row in found],
            "hovertext": [escape(row["tensor"]) for row in found],
            "hovertemplate": f"{escape(name)}: %{{y:.1f}} dB<br>%{{hovertext}}<extra></extra>",
            "marker": {
                "color": (INTEGER, *COLOURS)[index % (len(COLOURS) + 1)],
                "symbol": SYMBOLS[index // (len(COLOURS) + 1) % len(SYMBOLS)],
            },
        }
        for index, name in enumerate(name for name in found[0] if name != "tensor")
    ]
    layout = _layout(480, "weight, in graph order", yaxis={"title": {"text": "dB"}}, legend=ABOVE)
    return {"data": marks, "layout": layout}
