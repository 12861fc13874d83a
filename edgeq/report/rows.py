"""What every view of a report shows, as plain rows and sentences: the text and the page differ in looks only (L0).

``Report.latency`` maps a configuration ("reference", "artifact", …) to thread counts to a Timing as a dict:
``{"artifact": {"2": {"median_ms": 3.1, "p90_ms": 3.3, "p99_ms": 4.0, "laps_ms": […], …}}}``. A row of ``candidates``
has a ``name``, whether it ``ships``, ``why`` and its ``integer_macs_share``; one of ``layers`` a ``name``, ``op`` and
``snr_db``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeq.report.record import Check, Island, NodeForecast, Report, Saturation

MIB = 1024.0 * 1024.0
BLOCKS = "▁▂▃▄▅▆▇█"
SYNTHETIC = "SYNTHETIC DATA: the inputs are random numbers; accuracy on them says nothing about real use."

EMULATED = "NOT A DEVICE MEASUREMENT: {} did the work; the times say nothing about any device."


@dataclass(frozen=True)
class LatencyRow:
    """One configuration at one thread count. Milliseconds; ``laps_ms`` is empty when only the summary was kept."""

    configuration: str
    threads: str
    median_ms: float
    p90_ms: float
    p99_ms: float
    laps_ms: tuple[float, ...] = ()


def latency_rows(report: Report) -> list[LatencyRow]:
    """A row a configuration and thread count, threads ascending within a configuration."""
    return [
        LatencyRow(
            configuration,
            threads,
            float(timing.get("median_ms", math.nan)),
            float(timing.get("p90_ms", math.nan)),
            float(timing.get("p99_ms", math.nan)),
            tuple(timing.get("laps_ms", ())),
        )
        for configuration, timings in report.latency.items()
        for threads, timing in sorted(timings.items(), key=lambda item: int(item[0]))
    ]


def top_islands(report: Report, count: int | None = None) -> list[Island]:
    """Float islands by work, most first."""
    islands = report.coverage.float_islands if report.coverage else ()
    return sorted(islands, key=lambda island: -island.macs)[:count]


def banners(report: Report) -> list[str]:
    """What no reader may miss: inputs that aren't real, times that aren't a device's."""
    emulator = report.environment.get("device", {}).get("emulator", "")
    return [*([SYNTHETIC] if is_synthetic(report) else []), *([EMULATED.format(emulator)] if emulator else [])]


def is_synthetic(report: Report) -> bool:
    """True when any of the samples were random numbers."""
    return any(_marked_synthetic(report.samples))


def _marked_synthetic(tree: Any) -> Iterator[bool]:
    if isinstance(tree, dict):
        yield bool(tree.get("synthetic"))
        for branch in tree.values():
            yield from _marked_synthetic(branch)


def title(report: Report) -> str:
    """``model.onnx → cpu-x64-vnni on ssh://pi@board · balanced``, as far as it is known."""
    origin = report.source.get("origin", "model")
    source = ", ".join(Path(name).name for name in (origin if isinstance(origin, list | tuple) else [str(origin)]))
    device = report.environment.get("device", {}).get("address", "")
    target = " on ".join(filter(None, [str(report.target.get("name", "")), device]))
    return " → ".join(word for word in (source, target) if word) + (f" · {report.recipe}" if report.recipe else "")


def source_lines(report: Report) -> list[str]:
    """What a model is made of, where nothing was made of it: its signature, its nodes by op type, its weights."""
    source = report.source
    if report.artifact is not None or "ops" not in source:
        return []
    ops = ", ".join(f"{op} {count}" for op, count in source["ops"].items())
    return [
        *(f"{kind.removesuffix('s')}  {spec}" for kind in ("inputs", "outputs") for spec in source[kind].values()),
        f"nodes  {source['nodes']}, opset {source['opset']}: {ops}",
        f"weights  {quantity(source['weight_bytes'], 'bytes')}",
    ]


def number(value: float | None) -> str:
    """Four significant digits; thousands apart; empty for None."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "−∞"
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"


def quantity(value: float | None, unit: str) -> str:
    """A value with its unit; ``bytes`` as KiB or MiB, ``B`` in powers of ten."""
    if value is not None and unit == "B":
        return decimal(value)
    if value is not None and unit == "bytes":
        return f"{number(value / MIB)} MiB" if value >= 0.1 * MIB else f"{number(value / 1024)} KiB"
    return f"{number(value)} {unit}".strip()


def decimal(value: float) -> str:
    """Bytes in powers of ten, as disks and models are sold: ``40 GB``, ``5.781 GB``, ``14.2 MB``."""
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= factor:
            return f"{value / factor:.4g} {unit}"
    return f"{value:.0f} B"


def format_rows(report: Report) -> list[dict[str, str]]:
    """Weights by number format as text; columns nobody filled are left out."""
    found = [
        {
            "format": row["name"], "text form": row["format"], "bits a weight": f"{row['bits']:.4g}",
            "stored": decimal(row["bytes"]),
            "compressed": "" if row.get("compressed") is None else decimal(row["bytes"] * row["compressed"]),
            "fits": {None: "", True: "yes", False: "no"}[row.get("fits")],
        }
        for row in report.footprint.get("formats", ())
    ]  # fmt: skip
    return [{key: text for key, text in row.items() if any(other[key] for other in found)} for row in found]


def cache_rows(report: Report) -> list[dict[str, str]]:
    """Keys and values by context length, a column a format."""
    return [
        {"KV cache at context": f"{row['context']:,}"}
        | {name: decimal(value) for name, value in row.items() if name != "context"}
        for row in report.footprint.get("kv_cache", ())
    ]


def memory_rows(report: Report) -> list[dict[str, str]]:
    """What a predicted peak is made of."""
    memory = report.footprint.get("memory", {})
    return [{"memory": name.replace("_", " "), "predicted": decimal(value)} for name, value in memory.items()]


def spark(counts: Sequence[float], width: int = 16) -> str:
    """A histogram as ``width`` characters; heights are roots of counts, so that tails show."""
    step = max(1, len(counts) // width)
    sums = [sum(counts[start : start + step]) for start in range(0, len(counts), step)]
    top = max(sums, default=0.0) or 1.0
    return "".join(" " if not count else BLOCKS[min(int((count / top) ** 0.5 * len(BLOCKS)), 7)] for count in sums)


def value_rows(report: Report) -> list[dict[str, Any]]:
    """How the values of each tensor that advice is given on are spread."""
    return [
        {
            "tensor": row["tensor"], "op": row["op"], "values": spark(row["values"]["bars"]),
            **{name: row["values"][name] for name in ("min", "max", "crest", "kurtosis")},
            "zeros %": 100 * row["values"]["zeros"],
            "outliers": _of(row["values"]["outliers"], row["values"]["channels"]),
        }
        for row in report.advice
    ]  # fmt: skip


def _of(count: int, total: int) -> str:
    return f"{count} of {total}" if total else ""


def advice_rows(report: Report) -> list[dict[str, Any]]:
    """The format advised for each tensor; ``alone dB`` is measured, ``predicted dB`` is not."""
    found = [
        {"tensor": row["tensor"], "format": row["format"], "predicted dB": row["snr_db"], "alone dB": row["alone_db"],
         "why": row["why"]}
        for row in report.advice
    ]  # fmt: skip
    measured = any(row["alone dB"] is not None for row in found)
    return found if measured else [{k: v for k, v in row.items() if k != "alone dB"} for row in found]


def predicted_rows(report: Report) -> list[dict[str, Any]]:
    """Predicted dB of each weight in every format its target could have it in."""
    names = [candidate["format"] for row in report.advice if row["kind"] == "weight" for candidate in row["candidates"]]
    found = []
    for row in report.advice:
        if row["kind"] == "weight" and row["candidates"]:
            known = {candidate["format"]: candidate["snr_db"] for candidate in row["candidates"]}
            found.append({"tensor": row["tensor"]} | {name: known.get(name) for name in dict.fromkeys(names)})
    return found


def sensitivity_rows(report: Report, count: int | None = None) -> list[dict[str, Any]]:
    """What each atom's quantization does to the outputs, loudest first; columns nobody filled are left out."""
    found = [
        {"sensitive": row.atom, "op": row.op, "alone dB": row.noise_db, "restored +dB": row.gain_db, "KL nats": row.kl,
         "saves µs": None if row.gained_ns is None else row.gained_ns / 1e3, "why": row.why}
        for row in report.sensitivity[:count]
    ]  # fmt: skip
    return [{k: v for k, v in row.items() if any(other[k] is not None for other in found)} for row in found]


def drift_rows(report: Report, count: int | None = None) -> list[dict[str, Any]]:
    """Ranges of tensors now beside those of calibration, worst first; with a ``count``, that many that drifted."""
    return [
        {"drifts": row["tensor"], "op": row["op"], "calibrated": f"{number(row['min'])} … {number(row['max'])}",
         "now": f"{number(row['now_min'])} … {number(row['now_max'])}", "outside %": 100 * row["outside"],
         "range used %": 100 * row["used"]}
        for row in [row for row in report.drift if count is None or row["drifted"]][:count]
    ]  # fmt: skip


def sustained_rows(report: Report) -> list[dict[str, Any]]:
    """Windows of a sustained run; columns the device doesn't tell are left out."""
    return [
        {"until s": row["at_s"], "runs": row["laps"], "p50 ms": row["p50_ms"], "p90 ms": row["p90_ms"]}
        | ({"MHz": row["mhz"]} if "mhz" in row else {})
        | ({"hottest °C": row["celsius"]} if "celsius" in row else {})
        for row in report.sustained.get("windows", ())
    ]


def sustained_line(report: Report) -> str:
    """One sentence on a sustained run, "" without one: latency, clocks and heat from its first window to its last."""
    found = sustained_rows(report)
    if not found:
        return ""
    first, last = found[0], found[-1]
    words = [
        f"{name} {number(first[name])} → {number(last[name])}"
        for name in ("p50 ms", "MHz", "hottest °C")
        if name in last
    ]
    least = min(row["p50 ms"] for row in found)
    bars = spark([row["p50 ms"] - 0.9 * least for row in found])
    return f"back to back for {last['until s']:.0f} s  {bars}  {', '.join(words)}"


def divergence_rows(report: Report, count: int | None = None) -> list[dict[str, Any]]:
    """Nodes that compute otherwise elsewhere, in graph order; with a ``count``, that many of those that rounding
    doesn't explain. Columns nobody filled are left out."""
    shown = [row for row in report.divergence if count is None or row.cause != "rounding"][:count]
    found = [
        {"diverges": row.node, "op": row.op, "cause": row.cause, "largest": row.largest, "share %": 100 * row.share,
         "kernel": row.kernel, "kernel there": "" if row.kernel_there == row.kernel else row.kernel_there,
         "why": row.why, "changed": "; ".join(row.changed), "tensor": row.tensor}
        for row in shown
    ]  # fmt: skip
    return [{k: v for k, v in row.items() if any(other[k] != "" for other in found)} for row in found]


def parting(report: Report) -> str:
    """One sentence on the first node that computes otherwise, "" where it wasn't looked for or there is none."""
    first = next((row for row in report.divergence if row.cause != "rounding"), None)
    return "" if first is None else f"first divergence at {first.op} {first.node}: {first.cause}, {first.why}"


def interval(check: Check) -> str:
    """``0.58 … 0.66``, empty when the value wasn't sampled."""
    if check.low is None or check.high is None:
        return ""
    return f"{number(check.low)} … {number(check.high)}"


def limit(check: Check) -> str:
    """``≤ 0.5`` or ``≥ 1.3``, empty without a limit."""
    if check.limit is None:
        return ""
    shown = decimal(check.limit) if check.unit == "B" else number(check.limit)
    return f"{'≤' if check.limit_kind == 'max' else '≥'} {shown}"


def coverage_line(report: Report) -> str:
    """One sentence on what runs in which arithmetic, empty when it wasn't measured."""
    found = report.coverage
    if found is None:
        return ""
    nodes = f"{found.integer_nodes} integer kernels, {found.mover_nodes} data movers, {found.float_nodes} float nodes"
    share = f"{found.integer_macs_share:.1%} of the multiply-accumulates"
    if report.artifact is None:  # a forecast: nothing ran
        return f"{share} could run on integers: {nodes}"
    left = f" · {len(found.unexplained)} unexplained Q/DQ" if found.unexplained else ""
    return f"{share} run on integers: {nodes}, {found.boundary_qdq} Q/DQ at their borders{left}"


def forecast_rows(report: Report) -> list[dict[str, Any]]:
    """Nodes of one fate a row, those that stay float first, most nodes first."""
    groups: dict[tuple[str, ...], list[NodeForecast]] = {}
    for row in report.forecast:
        kernel = row.kernel or "none of its own"
        reason = (row.why, row.fix) if row.runs == "float" else ("", "")
        groups.setdefault((row.op, row.provider, row.runs, kernel, *reason), []).append(row)
    ordered = sorted(groups.items(), key=lambda group: (group[0][2] != "float", -len(group[1])))
    return [
        {"nodes": len(rows), "op": op, "runs on": provider.removesuffix("ExecutionProvider"), "as": runs,
         "kernel": kernel, "why": why, "instead": fix}
        for (op, provider, runs, kernel, why, fix), rows in ordered
    ]  # fmt: skip


def saturation_line(found: Saturation) -> str:
    """One sentence on whether x86 CPUs without VNNI compute the same."""
    if found.flagged:
        return f"{found.flagged} of {found.rows} rows can saturate on x86 CPUs without VNNI: this file is for VNNI only"
    return f"no pair of products leaves 16 bits in {found.rows} rows: the same integers on every x86-64 CPU"


def sizes(report: Report) -> list[tuple[str, int]]:
    """(name, bytes) of the source's weights and of what ships, where known."""
    shipped = report.artifact.size_bytes if report.artifact else None
    return [
        (name, size) for name, size in (("source", report.source.get("weight_bytes")), ("artifact", shipped)) if size
    ]


def given_up(report: Report) -> list[str]:
    """``name: why`` of each integer candidate that was measured and not shipped."""
    lost = [row for row in report.candidates if not row.get("ships") and row.get("integer_macs_share", 1.0) > 0]
    return [f"{row.get('name', 'candidate')}: {row.get('why', 'not the best')}" for row in lost]


def verdict(report: Report) -> str:
    """What ships and whether it meets its limits, in one sentence."""
    if report.advice:
        counted = Counter((row["kind"], row["format"]) for row in report.advice)
        return ", ".join(
            f"{count} {kind}{'s' * (count > 1)} in {form}" for (kind, form), count in counted.most_common()
        )
    if report.sensitivity and report.artifact is None:
        loudest = report.sensitivity[0]
        return f"{len(report.sensitivity)} atoms measured: {loudest.atom} alone leaves {loudest.noise_db:.1f} dB of SNR"
    if report.recipe == "divergence":
        return parting(report) or "no node computes otherwise by more than rounding"
    if report.recipe == "observe":
        tensors = next((step.facts["tensors"] for step in report.steps if step.name == "observe"), 0)
        drifted = sum(row["drifted"] for row in report.drift)
        return f"{tensors} tensors observed" + (f", {drifted} of {len(report.drift)} drifted" if report.drift else "")
    failed = [check for check in report.checks if not check.passed]
    limited = [check for check in report.checks if check.limit is not None]
    if failed:
        proof = "FAILED " + ", ".join(f"{check.name} {_short(check)}, limit {limit(check)}" for check in failed)
    elif limited:
        proof = f"all {len(limited)} limits met" if len(limited) > 1 else f"{limited[0].name} {limit(limited[0])} met"
    else:
        proof = "no limit was set" if report.checks else "nothing was checked"
    return proof if report.footprint else f"{_shipped(report)}: {proof}"


def _short(check: Check) -> str:
    return decimal(check.value) if check.unit == "B" else number(check.value)


def _shipped(report: Report) -> str:
    if report.artifact is None:
        return "nothing was packaged"
    integer = report.coverage is None or report.coverage.integer_nodes > 0
    what = "" if integer else "the float model, "
    return f"ships {what}{report.artifact.path} ({quantity(report.artifact.size_bytes, 'bytes')})"


def columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    """All keys of free-form rows, in order of first sight."""
    return list(dict.fromkeys(key for row in rows for key in row))
