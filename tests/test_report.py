"""The report's views: JSON and its schema, terminal text, the page."""

from __future__ import annotations

import base64
import gzip
import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from edgeq.errors import UsageError
from edgeq.report import codec, html, rows, text
from edgeq.report.figures import figures
from edgeq.report.record import Artifact, Check, Coverage, Island, Notice, Report, StepRecord

NASTY = '</script><img src=x onerror=alert(1)>&"'


def _timing(median: float) -> dict[str, Any]:
    laps = [median * factor for factor in (0.9, 1.0, 1.0, 1.1, 1.3)]
    return {"median_ms": median, "p90_ms": median * 1.2, "p99_ms": median * 1.3, "laps_ms": laps, "threads": 1}


ISLANDS = (Island(f"/small{NASTY}", "Gelu", "no kernel", 1), Island("/big", "Conv", "noisy", 9))
FULL = Report(
    source={"origin": "models/net.onnx", "weight_bytes": 4 << 20},
    target={"name": "cpu-x64-vnni", "provider": "CPUExecutionProvider", "isa": ["avx2"], "session": {}},
    recipe="balanced",
    artifact=Artifact("net.edgeq/model.onnx", "cpu-x64-vnni", {"x": "f32[1,3]"}, {"y": "f32[1,2]"}, 1 << 20, "ab"),
    steps=(StepRecord("observe", 1.5, {"samples": 8}, ("eight photos",)),),
    checks=(
        Check("top1_drop", 0.2, "points", -0.1, 0.5, 0.5, "max", True, 500),
        Check("latency_ms", 12.0, "ms", limit=8.0, passed=False),
        Check("size_ratio", 0.25),
    ),
    coverage=Coverage(0.997, 95, 4, 3, 6, ISLANDS),
    notices=(Notice("warning", "stem", f"the stem stays float {NASTY}", "/big"), Notice("info", "split", "held out")),
    samples={"calibration": {"origin": "random", "synthetic": True}},
    latency={"reference": {"2": _timing(14.0), "1": _timing(24.0)}, "artifact": {"1": _timing(12.0)}},
    layers=({"name": f"t{NASTY}", "op": "Conv", "snr_db": 31.5}, {"name": "u", "op": "Relu", "snr_db": math.inf}),
    candidates=(
        {"name": "all-integer", "why": "top1_drop 1.3 over 0.5", "ships": False, "integer_macs_share": 1.0},
        {"name": "float as given", "why": "the best float file", "ships": False, "integer_macs_share": 0.0},
    ),
)

words = st.text(max_size=12).filter(lambda word: word not in codec.NOT_FINITE)
free = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
mapping = st.dictionaries(words, free, max_size=3)
numbers = st.floats(allow_nan=False)  # NaN equals nothing, itself included: it has a test of its own
whole = st.integers(0, 2**60)
reports = st.builds(
    Report,
    source=mapping,
    target=mapping,
    recipe=words,
    artifact=st.none() | st.builds(Artifact, words, words, st.dictionaries(words, words), st.just({}), whole, words),
    steps=st.lists(st.builds(StepRecord, words, numbers, mapping, st.lists(words).map(tuple)), max_size=2).map(tuple),
    checks=st.lists(
        st.builds(Check, words, numbers, words, st.none() | numbers, st.none() | numbers, limit=st.none() | numbers),
        max_size=2,
    ).map(tuple),
    coverage=st.none()
    | st.builds(
        Coverage, numbers, whole, whole, whole, whole, st.lists(st.builds(Island, words, words, words)).map(tuple)
    ),
    notices=st.lists(st.builds(Notice, st.sampled_from(["info", "warning"]), words, words), max_size=2).map(tuple),
    latency=mapping,
    layers=st.lists(mapping, max_size=2).map(tuple),
)


@settings(max_examples=60)
@given(reports)
def test_json_is_inverted(report: Report) -> None:
    assert codec.from_json(codec.to_json(report)) == report


def test_json_is_standard_and_keeps_what_is_not_finite() -> None:
    checks = (Check("a", math.nan, low=-math.inf, high=math.inf),)
    text = codec.to_json(replace(FULL, checks=checks, environment={"load": math.inf}))
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    back = codec.from_json(text)
    assert math.isnan(back.checks[0].value)
    assert (back.checks[0].low, back.checks[0].high, back.environment["load"]) == (-math.inf, math.inf, math.inf)


def test_numpy_numbers_are_numbers_and_other_objects_are_refused() -> None:
    report = codec.from_json(codec.to_json(replace(FULL, environment={"a": np.float32(0.5), "b": np.int64(3)})))
    assert report.environment == {"a": 0.5, "b": 3}
    with pytest.raises(TypeError, match=r"array.*can't be in a report"):
        codec.to_json(replace(FULL, environment={"a": np.zeros(2)}))
    with pytest.raises(TypeError, match="1 can't be a key"):
        codec.to_json(replace(FULL, latency={"artifact": {1: {}}}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree.update(schema=99), "schema 99, expected 1"),
        (lambda tree: tree["checks"][0].update(value="x"), r"report\.checks\[0\]\.value is 'x', expected a number"),
        (lambda tree: tree["notices"][0].update(level="loud"), "'loud', expected 'info' or 'warning'"),
        (lambda tree: tree["coverage"].pop("integer_nodes"), r"report\.coverage\.integer_nodes is missing"),
        (lambda tree: tree.update(colour="red"), r"report\.colour is unknown"),
        (lambda tree: tree.update(recipe=None), r"report\.recipe is None, expected str"),
    ],
)
def test_wrong_reports_are_named(change: Any, message: str) -> None:
    tree = json.loads(codec.to_json(FULL))
    change(tree)
    with pytest.raises(UsageError, match=message):
        codec.from_json(json.dumps(tree))
    with pytest.raises(UsageError, match="not a report"):
        codec.from_json(codec.to_json(FULL)[:50])


def test_the_committed_schema_is_the_records() -> None:
    """After a change of the records: ``make golden``; and raise ``SCHEMA`` when a field went or changed its meaning."""
    assert json.loads(codec.SCHEMA_PATH.read_text(encoding="utf-8")) == codec.schema()


def test_the_schema_describes_what_is_written() -> None:
    _conforms(json.loads(codec.to_json(FULL)), codec.schema(), codec.schema()["$defs"])
    with pytest.raises(AssertionError):
        _conforms({"schema": 1}, codec.schema(), codec.schema()["$defs"])


def _conforms(value: Any, schema: dict[str, Any], definitions: dict[str, Any]) -> None:
    """The keywords of JSON Schema that the committed file uses, straight from the specification."""
    if "$ref" in schema:
        return _conforms(value, definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if "enum" in schema:
        assert value in schema["enum"]
    if "anyOf" in schema:
        assert any(_accepts(value, choice, definitions) for choice in schema["anyOf"]), (value, schema)
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float)}
    if "type" in schema:
        kind = schema["type"]
        assert value is None if kind == "null" else isinstance(value, kinds[kind]), (value, schema)
    if schema.get("type") == "array":
        for item in value:
            _conforms(item, schema["items"], definitions)
    if schema.get("type") == "object":
        assert set(schema.get("required", ())) <= set(value)
        for key, item in value.items():
            inner = schema.get("properties", {}).get(key, schema["additionalProperties"])
            assert inner is not False, key
            _conforms(item, inner, definitions)
    return None


def _accepts(value: Any, schema: dict[str, Any], definitions: dict[str, Any]) -> bool:
    try:
        _conforms(value, schema, definitions)
    except AssertionError:
        return False
    return True


def _terminal(report: Report) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(text.render(report))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_text_tells_it_all() -> None:
    shown = _terminal(FULL)
    for expected in (
        "net.onnx → cpu-x64-vnni · balanced",
        "SYNTHETIC DATA",
        "-0.1 … 0.5",
        "≤ 0.5",
        "99.7% of the multiply-accumulates",
        "given up  all-integer: top1_drop 1.3 over 0.5",
        "ships net.edgeq/model.onnx (1 MiB): FAILED latency_ms 12, limit ≤ 8",
    ):
        assert expected in shown
    assert "given up  float" not in shown
    assert shown.index("/big") < shown.index("/small")  # islands by work
    assert re.search(r"✗\s+latency_ms\s+12 ms", shown)
    assert re.search(r"✓\s+top1_drop\s+0.2 points", shown)
    assert re.search(r"·\s+size_ratio\s+0.25", shown)
    assert re.search(r"reference +1 +24 .*\n *reference +2 +14 ", shown)  # threads ascending


def test_text_of_an_empty_report_and_of_real_data() -> None:
    assert _terminal(Report({}, {}, "")).split("\n")[:2] == ["model", "nothing was packaged: nothing was checked"]
    real = replace(FULL, samples={"calibration": {"origin": "photos", "synthetic": False}})
    assert "SYNTHETIC" not in _terminal(real)
    assert "SYNTHETIC" not in html.render(replace(real, latency={}, layers=()))


def test_an_inspected_model_shows_what_it_is_made_of() -> None:
    source = {
        "origin": "net.onnx", "opset": 12, "nodes": 3, "ops": {"Conv": 2, "Relu": 1}, "weight_bytes": 4 << 20,
        "inputs": {"x": "x float32[n, 3]"}, "outputs": {"y": "y float32[n, 2]"},
    }  # fmt: skip
    seen = replace(FULL, source=source, artifact=None)
    assert rows.source_lines(seen) == [
        "input  x float32[n, 3]", "output  y float32[n, 2]", "nodes  3, opset 12: Conv 2, Relu 1", "weights  4 MiB",
    ]  # fmt: skip
    assert "99.7% of the multiply-accumulates could run on integers" in rows.coverage_line(seen)
    assert rows.source_lines(replace(FULL, source=source)) == []


def test_names_are_no_markup_in_a_terminal() -> None:
    check = Check("a", 1.0, note="[red]not colour[/red]")
    shown = _terminal(Report({"origin": ["a/[bold]x", "y"]}, {}, "", checks=(check,)))
    assert "[red]not colour[/red]" in shown
    assert shown.startswith("[bold]x, y\n")


def test_only_limits_that_were_set_are_claimed() -> None:
    met = replace(FULL, checks=FULL.checks[:1])
    assert rows.verdict(met).endswith("top1_drop ≤ 0.5 met")
    assert rows.verdict(replace(FULL, checks=FULL.checks[2:])).endswith("no limit was set")
    assert FULL.coverage is not None
    floating = replace(met, coverage=replace(FULL.coverage, integer_nodes=0))
    assert rows.verdict(floating).startswith("ships the float model, net.edgeq")


def test_numbers_are_short() -> None:
    values = (None, 0.123456, 12.0, 1234567.0, math.nan, math.inf)
    assert [rows.number(value) for value in values] == ["", "0.1235", "12", "1,234,567", "NaN", "∞"]
    assert [rows.quantity(count, "bytes") for count in (3 << 20, 1536)] == ["3 MiB", "1.5 KiB"]


class _Page(HTMLParser):
    """Tags, attribute values that load something, and the text of scripts by id."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.scripts: dict[str, str] = {}
        self.script = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for key, value in attributes if key in ("src", "href")]
        self.script = dict(attributes).get("id") or "own" if tag == "script" else ""

    def handle_data(self, data: str) -> None:
        if self.script:
            self.scripts[self.script] = self.scripts.get(self.script, "") + data


def test_the_page_stands_alone_and_escapes_every_name() -> None:
    page = _Page(html.render(FULL))
    assert page.loads == []
    assert "img" not in page.tags
    assert page.tags.count("script") == 3
    assert "http" not in page.scripts["own"]
    script = gzip.decompress(base64.b64decode(page.scripts["plotly"])).decode()
    assert "plotly.js v" in script[:200]
    assert list(json.loads(page.scripts["figures"])) == ["size", "coverage", "latency", "layers"]
    assert html.render(FULL) == html.render(FULL)


def test_the_figures_hold_the_numbers() -> None:
    drawn = {name: figure for name, (_, figure) in figures(FULL).items()}
    assert drawn["size"]["data"][0]["x"] == [4.0, 1.0]
    assert [box["name"] for box in drawn["latency"]["data"]] == [
        "reference, 1 thread",
        "reference, 2 threads",
        "artifact, 1 thread",
    ]
    assert len(drawn["latency"]["data"][0]["x"]) == 5
    by_nodes = [bar["x"][1] for bar in drawn["coverage"]["data"]]
    assert by_nodes == pytest.approx([100 * 95 / 102, 100 * 4 / 102, 100 * 3 / 102])
    assert drawn["layers"]["data"][0]["y"] == [31.5, 100.0]  # a lossless tensor stands at the top of the scale
    assert "<img" not in json.dumps(drawn)
    assert figures(Report({}, {}, "")) == {}


def test_a_page_without_figures_carries_no_plotly() -> None:
    assert len(html.render(Report({}, {}, "", checks=FULL.checks))) < 20_000
