"""A report for a terminal: rich tables, nothing that isn't in the record (L0).

Renderables instead of printing: the caller owns the console, its width and its stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from edgeq.report import rows
from edgeq.report.record import Report

TOP_ISLANDS = 10
TOP_SENSITIVE = 5
TOP_DIVERGENT = 5
TOP_DRIFTED = 10


def render(report: Report) -> Group:
    """The whole report, top to bottom; parts that hold nothing are left out."""
    parts: list[RenderableType | None] = [
        Text(rows.title(report), style="bold"),
        *(Text(f" {banner} ", style="bold white on red") for banner in rows.banners(report)),
        *map(Text, rows.source_lines(report)),
        _checks(report),
        _latency(report),
        *([Text(rows.sustained_line(report))] if report.sustained else []),
        _coverage(report),
        _forecast(report),
        *_footprint(report),
        *_advice(report),
        _sensitivity(report),
        _divergence(report),
        _drift(report),
        *_notices(report),
        *(Text(f"given up  {line}", style="yellow") for line in rows.given_up(report)),
        Text(rows.verdict(report), style="bold green" if report.passed else "bold red"),
    ]
    return Group(*(part for part in parts if part is not None))


def _table(*headers: str, right: tuple[str, ...] = ()) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for header in headers:
        table.add_column(header, justify="right" if header in right else "left", overflow="fold")
    return table


def _filled(found: Sequence[Mapping[str, Any]], numeric: Sequence[str]) -> Table:
    """A table of rows that all have the same keys."""
    table = _table(*found[0], right=tuple(numeric))
    for row in found:
        table.add_row(*(rows.number(row[name]) if name in numeric else escape(row[name]) for name in row))
    return table


def _first(found: Sequence[Mapping[str, Any]], numeric: Sequence[str], more: int) -> Group:
    """The first rows of a table, and how many ``more`` there are."""
    return Group(_filled(found, numeric), *([Text(f"… and {more} more", style="dim")] if more else []))


def _checks(report: Report) -> Table | None:
    if not report.checks:
        return None
    table = _table("", "check", "value", "95 % interval", "limit", "note", right=("value",))
    for check in report.checks:
        mark = "[red]✗[/]" if not check.passed else "[green]✓[/]" if check.limit is not None else "·"
        value = rows.quantity(check.value, check.unit)
        table.add_row(mark, check.name, value, rows.interval(check), rows.limit(check), escape(check.note))
    return table


def _latency(report: Report) -> Table | None:
    found = rows.latency_rows(report)
    if not found:
        return None
    numbers = ("threads", "median ms", "p90 ms", "p99 ms")
    table = _table("latency", *numbers, right=numbers)
    for row in found:
        milliseconds = (rows.number(value) for value in (row.median_ms, row.p90_ms, row.p99_ms))
        table.add_row(escape(row.configuration), row.threads, *milliseconds)
    return table


def _coverage(report: Report) -> Group | None:
    if report.coverage is None:
        return None
    line = Text(rows.coverage_line(report))
    islands = rows.top_islands(report, TOP_ISLANDS)
    if not islands:
        return Group(line)
    table = _table("float island", "op", "MACs", "reason", right=("MACs",))
    for island in islands:
        table.add_row(escape(island.node), escape(island.op), rows.number(island.macs), escape(island.reason))
    more = len(report.coverage.float_islands) - len(islands)
    return Group(line, table, *([Text(f"… and {more} more", style="dim")] if more else []))


def _forecast(report: Report) -> Table | None:
    found = rows.forecast_rows(report)
    if not found:
        return None
    table = _table(*found[0], right=("nodes",))
    for row in found:
        table.add_row(*(escape(str(value)) for value in row.values()))
    return table


def _footprint(report: Report) -> list[Table | Text]:
    parts: list[Table | Text] = []
    for found in (rows.format_rows(report), rows.memory_rows(report), rows.cache_rows(report)):
        if found:
            first, *others = found[0]
            table = _table(first, *others, right=tuple(name for name in others if name != "text form"))
            for row in found:
                table.add_row(*map(escape, row.values()))
            parts.append(table)
    formula = report.footprint.get("formula", "")
    return [*parts, *([Text(formula, style="dim")] if formula else [])]


def _advice(report: Report) -> list[Table | Text]:
    """How values are spread, then a line a tensor with the sentence on it below."""
    found = rows.value_rows(report)
    if not found:
        return []
    numeric = tuple(name for name in found[0] if any(isinstance(row[name], int | float) for row in found))
    return [_filled(found, numeric), *(text for row in rows.advice_rows(report) for text in _sentence(row))]


def _sentence(row: dict[str, Any]) -> tuple[Text, Text]:
    alone = "" if row.get("alone dB") is None else f", outputs {row['alone dB']:.1f} dB with its node alone in integers"
    predicted = "" if row["predicted dB"] is None else f"  predicted {row['predicted dB']:.1f} dB"
    return Text(f"{row['tensor']}  {row['format']}{predicted}{alone}", "bold"), Text(f"  {row['why']}")


def _sensitivity(report: Report) -> Group | None:
    found = rows.sensitivity_rows(report, TOP_SENSITIVE)
    if not found:
        return None
    numeric = tuple(name for name in found[0] if name not in ("sensitive", "op", "why"))
    return _first(found, numeric, len(report.sensitivity) - len(found))


def _divergence(report: Report) -> Group | None:
    found = rows.divergence_rows(report, TOP_DIVERGENT)
    if not found:
        return None
    numeric = ("largest", "share %")
    return _first(found, numeric, sum(row.cause != "rounding" for row in report.divergence) - len(found))


def _drift(report: Report) -> Group | None:
    found = rows.drift_rows(report, TOP_DRIFTED)
    if not found:
        return None
    numeric = ("outside %", "range used %")
    return _first(found, numeric, sum(row["drifted"] for row in report.drift) - len(found))


def _notices(report: Report) -> list[Text]:
    styles = {"warning": "yellow", "info": "dim"}
    return [
        Text(f"{notice.level}  {notice.message}" + (f" [{notice.node}]" if notice.node else ""), styles[notice.level])
        for notice in report.notices
    ]
