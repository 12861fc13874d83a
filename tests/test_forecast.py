"""What is forecast of a node is what the runtime then does with it, and a fix is only told where it has a kernel."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import edgeq
from edgeq.analyse.forecast import FIXES
from edgeq.cli import main
from edgeq.given import symbolic
from edgeq.ir import io
from edgeq.report.record import NodeForecast
from edgeq.target.load import load_target
from edgeq.target.oracle import Oracle
from edgeq.target.patterns import PATTERNS, build, carried
from tests.bench.forecast import compare
from tests.graphs import graph, normal
from tests.test_zoo import NAMES

VNNI = "cpu-x64-vnni"
TEXT = """(float[1,8,6,6] x) => (float[1,8,6,6] y, int64[4] s) {
    a = Conv<kernel_shape=[1,1]>(x, w)
    b = Relu(a)
    c = Tanh(b)
    d = Sub(c, x)
    e = SpaceToDepth<blocksize=2>(d)
    f = DepthToSpace<blocksize=2>(e)
    y = Conv<kernel_shape=[1,1]>(f, w)
    s = Shape(f)
}"""


def told(target: str) -> dict[str, NodeForecast]:
    report = edgeq.inspect(graph(TEXT, {"w": normal(8, 8, 1, 1)}), target=target)
    return {row.op: row for row in report.forecast}


def test_each_node_is_told_with_provider_kernel_reason_and_fix() -> None:
    rows = told(VNNI)
    assert (rows["Conv"].provider, rows["Conv"].runs, rows["Conv"].kernel) == (
        "CPUExecutionProvider", "integer", "QLinearConv",
    )  # fmt: skip
    assert (rows["Relu"].runs, rows["Relu"].kernel) == ("integer", "")
    assert rows["Relu"].why.startswith("part of the kernel of")
    assert (rows["Tanh"].runs, rows["Tanh"].why, rows["Tanh"].fix) == ("float", "no integer kernel on this target", "")
    assert (rows["Sub"].runs, rows["Sub"].fix) == ("float", "add the negated operand")
    assert (rows["SpaceToDepth"].runs, rows["SpaceToDepth"].fix) == ("float", "Reshape, Transpose, Reshape")
    assert rows["DepthToSpace"].runs == "mover"


def test_forecast_is_printed_and_part_of_the_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    io.write(graph(TEXT, {"w": normal(8, 8, 1, 1)}), tmp_path / "net.onnx")
    assert main(["inspect", str(tmp_path / "net.onnx"), "-t", VNNI]) == 0
    assert "add the negated operand" in " ".join(capsys.readouterr().out.split())
    assert main(["inspect", str(tmp_path / "net.onnx"), "-t", VNNI, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["forecast"]
    assert {row["op"] for row in rows} >= {"Conv", "Relu", "Tanh", "Sub"}


def test_every_fix_is_a_pattern_that_some_target_computes_in_integers() -> None:
    target = load_target(VNNI)
    oracle = Oracle(target)
    patterns = {pattern.name: pattern for pattern in PATTERNS}
    for op, (words, name) in FIXES.items():
        nodes = build(patterns[name])
        verdicts = oracle.ask_pattern(nodes, carried(patterns[name], nodes))
        assert all(verdict.kind != "float" for verdict in verdicts), (op, words)


@pytest.mark.zoo
def test_forecast_is_what_the_cpu_does_over_the_zoo() -> None:
    rows = {name: compare(name, VNNI) for name in NAMES}
    agreed, count = (sum(row[index] for row in rows.values()) for index in (0, 1))
    assert count > 900
    assert agreed >= 0.98 * count, {name: wrong for name, (_, _, wrong) in rows.items() if wrong}


def test_a_scalar_input_has_a_fixed_shape() -> None:
    scalar = graph("(float[1,4] x, int64 s) => (float[1,4] y) { f = Cast<to=1>(s) y = Mul(x, f) }")
    assert symbolic(scalar) == []
    assert symbolic(graph("(float[n,4] x, int64 s) => (float[n,4] y) { f = Cast<to=1>(s) y = Mul(x, f) }")) == ["x"]
