"""A report as one self-contained page: tables that sort, plots that hover, no request to any network (L0).

plotly ships one bundle of 4.8 MB in its wheel; gzipped into the page and unpacked by the browser it is 1.9 MB. Drawing
our own SVG would be smaller still, but zoom and hover over hundreds of layers are what the page is for.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from edgeq.report import rows
from edgeq.report.codec import encode
from edgeq.report.compare import Comparison
from edgeq.report.figures import figures
from edgeq.report.record import Check, Report

PAGE = Path(__file__).with_name("page.html")


def render(report: Report) -> str:
    """The page as text. Every name in it is escaped."""
    drawn = {name: figure for name, (_, figure) in figures(report).items()}
    return _page(rows.title(report), "\n".join(_body(report)), drawn)


def render_comparison(found: Comparison) -> str:
    """A page of two reports side by side; it needs no figures and weighs some kilobytes."""
    notes = "".join(f'<p class="warning">{escape(note)}</p>' for note in found.notes)
    sections = "".join(_section(heading.capitalize(), table) for heading, table in found.sections.items())
    return _page(" and ".join(found.names), notes + sections, {})


def _page(title: str, body: str, drawn: Mapping[str, Any]) -> str:
    parts = {
        "title": escape(title),
        "body": body,
        "figures": _script_json(drawn),
        "plotly": _plotly() if drawn else "",
    }
    page = PAGE.read_text(encoding="utf-8")
    return re.sub(r"@(title|body|figures|plotly)@", lambda match: parts[match[1]], page)


@cache
def _plotly() -> str:
    """plotly.js, gzipped, in base64; the same bytes each time."""
    from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()


def _script_json(tree: Any) -> str:
    """JSON that can stand inside a script element: no ``<`` is left to close or open one."""
    return json.dumps(encode(tree), ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _body(report: Report) -> Iterable[str]:
    for banner in rows.banners(report):
        yield f'<p class="banner">{escape(banner)}</p>'
    yield f'<p class="verdict{"" if report.passed else " failed"}">{escape(rows.verdict(report))}</p>'
    for line in rows.given_up(report):
        yield f'<p class="warning">given up: {escape(line)}</p>'
    for notice in sorted(report.notices, key=lambda notice: notice.level != "warning"):
        where = f" [{notice.node}]" if notice.node else ""
        yield f'<p class="{notice.level}">{escape(notice.message + where)}</p>'
    if report.checks:
        yield "<h2>Checks</h2>" + _checks(report.checks)
    yield _charts(report)
    yield from _tables(report)


def _charts(report: Report) -> str:
    sections = (
        f'<section class="{name}"><h2>{escape(heading)}</h2>{_menu(name, report)}'
        f'<div class="chart" id="{name}"></div>{_caption(name, report)}</section>'
        for name, (heading, _) in figures(report).items()
    )
    return f'<div class="charts">{"".join(sections)}</div>'


def _menu(name: str, report: Report) -> str:
    """Which of a figure's traces is shown, where it shows one at a time."""
    if name != "values":
        return ""
    options = "".join(f"<option>{escape(row['tensor'])}</option>" for row in report.advice)
    # Browsers would put back what was chosen before a reload, beside the first histogram.
    return f'<select data-chart="{name}" autocomplete="off" aria-label="tensor">{options}</select>'


def _caption(name: str, report: Report) -> str:
    return f"<p>{escape(rows.coverage_line(report))}</p>" if name == "coverage" else ""


def _tables(report: Report) -> Iterable[str]:
    """The detail: what is short is open, what is long is folded."""
    latency = [
        {"configuration": row.configuration, "threads": int(row.threads), "laps": len(row.laps_ms)}
        | {"median ms": row.median_ms, "p90 ms": row.p90_ms, "p99 ms": row.p99_ms}
        for row in rows.latency_rows(report)
    ]
    yield _section("Latency", latency)
    yield _section("Back to back", rows.sustained_rows(report))
    islands = [{"node": i.node, "op": i.op, "MACs": i.macs, "reason": i.reason} for i in rows.top_islands(report)]
    yield _section("Float islands", islands)
    if report.coverage:
        yield _section("Unexplained Q/DQ", [{"node": node} for node in report.coverage.unexplained])
        yield _section("Kernels", [{"kernel": name, "nodes": count} for name, count in report.coverage.kernels.items()])
    yield _section("Weights by format", rows.format_rows(report))
    yield _section("Memory", rows.memory_rows(report))
    yield _section("KV cache", rows.cache_rows(report))
    yield _section("Formats advised", rows.advice_rows(report))
    yield _section("Values", rows.value_rows(report))
    yield _section("Predicted signal to noise of weights, dB", rows.predicted_rows(report))
    yield _section("Drift", rows.drift_rows(report))
    yield _section("Divergence", rows.divergence_rows(report))
    yield _section("Sensitivity", rows.sensitivity_rows(report))
    yield _section("Quantized tensors", report.layers)
    yield _section("Candidates", report.candidates)
    steps = [{"step": s.name, "seconds": s.seconds, "facts": s.facts, "notes": list(s.notes)} for s in report.steps]
    yield _section("Steps", steps)
    for heading, facts in (
        ("Source", report.source),
        ("Target", report.target),
        ("Samples", report.samples),
        ("Environment", report.environment),
    ):
        yield _section(heading, [{"key": key, "value": value} for key, value in facts.items()])


def _section(heading: str, table: Sequence[Mapping[str, Any]]) -> str:
    if not table:
        return ""
    opened = " open" if len(table) <= 12 else ""
    headers = rows.columns([dict(row) for row in table])
    numeric = {name for name in headers if _numeric([row.get(name) for row in table])}
    body = "".join(f"<tr>{''.join(_cell(row.get(name), name in numeric) for name in headers)}</tr>" for row in table)
    head = "".join(_header(name, name in numeric) for name in headers)
    return f"<details{opened}><summary>{escape(heading)} ({len(table)})</summary>{_table(head, body)}</details>"


def _table(head: str, body: str) -> str:
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _header(name: str, numeric: bool) -> str:
    return f"<th{' class=number' if numeric else ''}><button>{escape(name)}</button></th>"


def _numeric(values: Sequence[Any]) -> bool:
    """Whether a column holds numbers, with gaps or without; yes and no are none."""
    given = [value for value in values if value is not None]
    return bool(given) and all(isinstance(value, int | float) and not isinstance(value, bool) for value in given)


def _cell(value: Any, numeric: bool) -> str:
    if isinstance(value, bool) or value is None:
        return f"<td>{'' if value is None else 'yes' if value else 'no'}</td>"
    if isinstance(value, int | float):
        return f"<td{' class=number' if numeric else ''}{_sorts_as(value)}>{rows.number(float(value))}</td>"
    text = _words(value)
    return f"<td{_width(text)}>{escape(text)}</td>"


def _sorts_as(value: float | None) -> str:
    """The attribute that a column is sorted by, as JavaScript reads numbers."""
    return "" if value is None else f' data-value="{json.dumps(float(value))}"'


def _width(text: str) -> str:
    """The class of a cell that needs more room than a word."""
    if text and not text.strip(rows.BLOCKS + " "):
        return " class=spark"
    return " class=sentence" if len(text) > 60 else " class=phrase" if len(text) > 16 else ""


def _words(value: Any) -> str:
    """A free-form value in a line: ``a: 1, b: 2`` for a mapping, commas for a list."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_words(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_words(item) for item in value)
    return rows.number(value) if isinstance(value, float) else str(value)


def _checks(checks: Sequence[Check]) -> str:
    body = "".join(
        f"<tr>{_mark(check)}<td{_width(check.name)}>{escape(check.name)}</td>"
        f"<td class=number{_sorts_as(check.value)}>{escape(rows.quantity(check.value, check.unit))}</td>"
        f"<td{_sorts_as(check.low)}>{rows.interval(check)}</td><td{_sorts_as(check.limit)}>{rows.limit(check)}</td>"
        f"<td{_width(check.note)}>{escape(check.note)}</td></tr>"
        for check in checks
    )
    head = "".join(_header(name, name == "value") for name in ("", "check", "value", "95 % interval", "limit", "note"))
    return _table(head, body)


def _mark(check: Check) -> str:
    if not check.passed:
        return '<td class="failed mark">✗ failed</td>'
    return '<td class="met mark">✓ met</td>' if check.limit is not None else '<td class="mark">·</td>'
