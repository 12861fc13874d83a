"""Two reports side by side: what differs in size, accuracy, latency and in what runs how, node by node (L0).

Sections of plain rows, like ``report.rows``, which text, JSON and the page show alike. Numbers that can't be held
against each other (other samples, another machine, another source) are told in ``notes``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from edgeq.report import rows
from edgeq.report.record import Check, Report


@dataclass(frozen=True)
class Comparison:
    """``sections``: heading -> rows, of which those about nodes and tensors hold only what differs."""

    names: tuple[str, str]
    notes: tuple[str, ...]
    sections: Mapping[str, tuple[dict[str, Any], ...]]

    def tree(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {"names": list(self.names), "notes": list(self.notes), **{k: list(v) for k, v in self.sections.items()}}


def compare(names: tuple[str, str], first: Report, second: Report) -> Comparison:
    """The comparison of two reports, called ``names``."""
    a, b = ("A", "B") if names[0] == names[1] else names
    sections = {
        "facts": [{"fact": k, a: x, b: y} for k, x, y in _facts(first, second)],
        "checks": [_check_row(a, b, *pair) for pair in _checks(first, second)],
        "latency": [*_latency(a, b, first, second)],
        "nodes": [{"node": k, a: x, b: y} for k, x, y in _differing(_nodes(first), _nodes(second), "integer")],
        "formats": [{"tensor": k, a: x, b: y} for k, x, y in _differing(_formats(first), _formats(second), "float")],
        "kernels": [{"kernel": k, a: x, b: y} for k, x, y in _differing(_kernels(first), _kernels(second), 0)],
    }
    return Comparison(names, tuple(_notes(first, second)), {k: tuple(found) for k, found in sections.items() if found})


def _notes(first: Report, second: Report) -> Iterator[str]:
    if first.source.get("digest") != second.source.get("digest"):
        yield "made from different models: accuracy is each against its own"
    digests = [report.samples.get("evaluation", {}) for report in (first, second)]
    if any(isinstance(found, dict) for found in digests) and digests[0] != digests[1]:
        yield "measured on different samples: accuracy can't be compared"
    keys = ("onnxruntime", "machine", "system", "cores", "vnni", "device")
    if any(first.environment.get(key) != second.environment.get(key) for key in keys):
        yield "measured on different machines or runtimes: latency can't be compared"


def _facts(first: Report, second: Report) -> Iterator[tuple[str, Any, Any]]:
    known = [_facts_of(report) for report in (first, second)]
    for name in known[0]:
        yield name, known[0][name], known[1][name]


def _facts_of(report: Report) -> dict[str, str]:
    artifact, coverage = report.artifact, report.coverage
    return {
        "source": str(report.source.get("origin", "")),
        "target": str(report.target.get("name", "")),
        "recipe": report.recipe,
        "size": rows.quantity(artifact.size_bytes, "bytes") if artifact else "",
        "digest": artifact.digest[:12] if artifact else "",
        "integer share": f"{coverage.integer_macs_share:.1%}" if coverage else "",
        "onnxruntime": str(report.environment.get("onnxruntime", "")),
    }


def _checks(first: Report, second: Report) -> Iterator[tuple[Check | None, Check | None]]:
    known = [{check.name: check for check in report.checks} for report in (first, second)]
    for name in {**known[0], **known[1]}:
        yield known[0].get(name), known[1].get(name)


def _check_row(a: str, b: str, one: Check | None, other: Check | None) -> dict[str, Any]:
    """Values beside each other; ``differs`` is empty where both intervals overlap or one is missing."""
    name, unit = next((check.name, check.unit) for check in (one, other) if check)
    row: dict[str, Any] = {"check": name, "unit": unit, a: one and one.value, b: other and other.value, "differs": ""}
    if one and other and one.value != other.value:
        bounds = [(c.value if c.low is None else c.low, c.value if c.high is None else c.high) for c in (one, other)]
        apart = bounds[0][1] < bounds[1][0] or bounds[1][1] < bounds[0][0]
        row["differs"] = f"{other.value - one.value:+.4g}" if apart else ""
    return row


def _latency(a: str, b: str, first: Report, second: Report) -> Iterator[dict[str, Any]]:
    known = [
        {(row.configuration, row.threads): row.median_ms for row in rows.latency_rows(report)}
        for report in (first, second)
    ]
    for configuration, threads in {**known[0], **known[1]}:
        one, other = (found.get((configuration, threads)) for found in known)
        ratio = other / one if one and other else None
        yield {"configuration": configuration, "threads": threads, f"{a} ms": one, f"{b} ms": other, "ratio": ratio}


def _nodes(report: Report) -> dict[str, Any]:
    islands = report.coverage.float_islands if report.coverage else ()
    return {island.node: f"float: {island.reason}" for island in islands}


def _formats(report: Report) -> dict[str, Any]:
    return {str(row["name"]): str(row.get("format", "")) for row in report.layers}


def _kernels(report: Report) -> dict[str, Any]:
    return dict(report.coverage.kernels) if report.coverage else {}


def _differing(one: Mapping[str, Any], other: Mapping[str, Any], absent: Any) -> Iterator[tuple[str, Any, Any]]:
    for name in {**one, **other}:
        pair = one.get(name, absent), other.get(name, absent)
        if pair[0] != pair[1]:
            yield name, *pair


def render_text(found: Comparison) -> list[Any]:
    """Renderables for a terminal: a table a section, then the notes."""
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    parts: list[Any] = []
    for heading, table in found.sections.items():
        parts.append(Text(heading, style="bold"))
        drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for name in table[0]:
            numeric = any(isinstance(row[name], int | float) for row in table)
            drawn.add_column(escape(name), justify="right" if numeric else "left", overflow="fold")
        for row in table:
            drawn.add_row(*(escape(_word(value)) for value in row.values()))
        parts.append(drawn)
    return [*parts, *(Text(note, style="yellow") for note in found.notes)]


def _word(value: Any) -> str:
    return rows.number(value) if isinstance(value, int | float) or value is None else str(value)
