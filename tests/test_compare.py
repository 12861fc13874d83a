"""edgeq compare: what differs, and what can't be held against each other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgeq.cli import main
from edgeq.packaging import write_directory
from edgeq.report import codec, html
from edgeq.report.compare import compare
from edgeq.report.record import Check, Coverage, Island, Report
from tests.packaged import REPORT, classifier

TIMING = {"median_ms": 2.0, "p90_ms": 2.1, "p99_ms": 2.5}
A = replace(
    REPORT,
    checks=(Check("top1", 0.8, low=0.78, high=0.82), Check("size_ratio", 0.3), Check("snr_db", 40.0, "dB")),
    latency={"artifact": {"1": TIMING}},
    environment={"machine": "x86_64", "onnxruntime": "1.32.0"},
    samples={"evaluation": {"digest": "a"}},
)
B = replace(
    A,
    checks=(Check("top1", 0.81, low=0.79, high=0.83), Check("size_ratio", 0.25), Check("cosine", 0.99)),
    latency={"artifact": {"1": {**TIMING, "median_ms": 1.5}, "2": TIMING}},
    coverage=Coverage(0.8, 3, 1, 1, 2, (Island("h", "Softmax", "it pays not", 3),), (), {"QConv": 3, "QGemm": 1}),
    layers=({"name": "a", "op": "Conv", "format": "i8/channel", "snr_db": 39.0},),
)


def test_what_differs_stands_side_by_side() -> None:
    found = compare(("a", "b"), A, B)
    checks = {row["check"]: row for row in found.sections["checks"]}
    assert (checks["top1"]["a"], checks["top1"]["b"], checks["top1"]["differs"]) == (0.8, 0.81, "")  # within noise
    assert checks["size_ratio"]["differs"] == "-0.05"
    assert (checks["snr_db"]["b"], checks["cosine"]["a"]) == (None, None)
    assert found.sections["latency"] == (
        {"configuration": "artifact", "threads": "1", "a ms": 2.0, "b ms": 1.5, "ratio": 0.75},
        {"configuration": "artifact", "threads": "2", "a ms": None, "b ms": 2.0, "ratio": None},
    )
    assert found.sections["nodes"] == (
        {"node": "g", "a": "float: no integer kernel", "b": "integer"},
        {"node": "h", "a": "integer", "b": "float: it pays not"},
    )
    assert found.sections["formats"] == ({"tensor": "a", "a": "u8/tensor/asym", "b": "i8/channel"},)
    assert {row["kernel"]: (row["a"], row["b"]) for row in found.sections["kernels"]} == {
        "QConv": (4, 3), "QGemm": (0, 1),
    }  # fmt: skip
    assert found.notes == ()
    same = compare(("a", "a"), A, A)
    assert {"nodes", "formats", "kernels"}.isdisjoint(same.sections)
    assert all(row["differs"] == "" for row in same.sections["checks"])


@pytest.mark.parametrize(
    ("other", "note"),
    [
        (replace(A, source={"digest": "cd"}), "made from different models"),
        (replace(A, samples={"evaluation": {"digest": "b"}}), "accuracy can't be compared"),
        (replace(A, environment={**A.environment, "machine": "aarch64"}), "latency can't be compared"),
    ],
)
def test_what_can_not_be_compared_is_said(other: Report, note: str) -> None:
    (found,) = compare(("a", "b"), A, other).notes
    assert note in found


def test_packages_and_reports_compare_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = write_directory(replace(classifier(tmp_path / "made"), report=A), tmp_path / "net.edgeq")
    (tmp_path / "other.json").write_text(codec.to_json(B))
    words = ["compare", str(package), str(tmp_path / "other.json")]
    page = tmp_path / "page.html"
    assert main([*words, "--html", str(page)]) == 0
    text = capsys.readouterr().out
    assert "float: it pays not" in text
    assert "size_ratio" in text
    assert "float: it pays not" in page.read_text(encoding="utf-8")
    assert page.stat().st_size < 20_000
    assert main([*words, "--html", str(page)]) == 2
    assert "--force" in capsys.readouterr().err
    assert main([*words, "--html", str(page), "--force", "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["formats"][0]["tensor"] == "a"
    (tmp_path / "bad.json").write_text("{")
    assert main(["compare", str(package), str(tmp_path / "bad.json")]) == 2
    assert "not a report" in capsys.readouterr().err


@pytest.mark.slow
def test_the_page_fits_a_phone(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(html.render_comparison(compare(("a" * 90, "b" * 90), A, B)), encoding="utf-8")
    wrong: list[str] = []
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text))
    page.goto((tmp_path / "page.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.click("th button >> nth=0")
    assert page.locator("th[aria-sort=ascending]").count() == 1
    page.close()
    assert wrong == []
