"""Faults put into copies of integer models are found on the node they are in, and rounding is called no fault."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

import edgeq
from edgeq.analyse.divergence import divergence, here
from edgeq.cli import main
from edgeq.errors import ModelError, UsageError
from edgeq.ir import io, query
from edgeq.report import html
from edgeq.report.codec import from_json, to_json
from edgeq.run.record import Feed
from edgeq.target.record import Provider
from tests import small_net
from tests.emulated import needs_qemu, outputs
from tests.faults import wrong_scale, wrong_weight, wrong_zero_point
from tests.graphs import graph, normal
from tests.placed import Placed, placed


@pytest.fixture(scope="module")
def made() -> Placed:
    return placed(small_net.model(), feeds=[{"image": small_net.images(1, seed)} for seed in range(4)])


def test_a_model_is_one_with_itself_however_it_is_cut_up(made: Placed) -> None:
    whole = divergence(made.model, made.model, made.feeds[:2], here())
    parts = divergence(made.model, made.model, made.feeds[:2], here(), chunk_bytes=1)
    assert whole.rows == parts.rows == () and whole.compared == parts.compared >= 9


def test_kernels_that_round_otherwise_are_no_fault(made: Placed) -> None:
    """Fused integer kernels against each node as ONNX defines it."""
    plain = Provider(session={"session.disable_quant_qdq": "1"})
    found = divergence(made.model, made.model, made.feeds, here(plain))
    assert found.beyond == () and found.compared >= 9
    assert all(row.largest <= 1 or row.op not in ("Conv", "Add") for row in found.rows)


@pytest.mark.parametrize("tensor", ["a", "d", "s", "e"])
def test_a_wrong_scale_is_found_where_it_is(made: Placed, tensor: str) -> None:
    node, broken = wrong_scale(made.model, tensor)
    found = divergence(made.model, broken, made.feeds[:2], here())
    first = found.beyond[0]
    assert (first.node, first.cause) == (node, "scale")
    assert any(words.startswith(f"{tensor}_scale ") for words in first.changed)
    assert first.node != found.beyond[-1].node or len(found.beyond) == 1


@pytest.mark.parametrize("tensor", ["a", "s"])
def test_a_wrong_zero_point_is_found_where_it_is(made: Placed, tensor: str) -> None:
    node, broken = wrong_zero_point(made.model, tensor)
    first = divergence(made.model, broken, made.feeds[:2], here()).beyond[0]
    assert (first.node, first.cause) == (node, "zero point")


def test_a_wild_weight_is_found_in_its_channel(made: Placed) -> None:
    node, broken = wrong_weight(made.model, "p", channel=5)
    (row,) = divergence(made.model, broken, made.feeds[:2], here()).beyond
    assert row.node == node and row.cause in ("saturation", "constants") and "at 5 of axis 1 alone" in row.why


def test_a_kernel_that_is_missing_is_a_fallback() -> None:
    """4-bit weights: a kernel that rounds activations to 8 bits here, a float product there."""
    text = "(float[4,64] x) => (float[4,64] y) { w = DequantizeLinear<axis=0, block_size=32>(c, s) y = MatMul(x, w) }"
    codes = np.random.default_rng(0).integers(-100, 100, (64, 64)).astype(np.int8)
    model = graph(text, {"c": codes, "s": np.abs(normal(2, 64)) + np.float32(0.1)})
    fused = Provider(session={"session.qdq_matmulnbits_accuracy_level": "4"})
    plain = Provider(session={"session.disable_quant_qdq": "1"})
    feeds = [{"x": normal(4, 64)}]
    (row,) = divergence(model, model, feeds, here(plain), provider=fused).rows
    assert (row.cause, row.kernel, row.kernel_there) == ("fallback", "MatMulNBits", "MatMul")


def test_values_that_are_no_numbers_are_told(made: Placed) -> None:
    broken = made.source.clone()
    weight = broken.graph.initializers["w3"]
    values = query.constant(weight).copy()  # type: ignore[union-attr]
    values[7, 0, 0, 0] = np.nan
    weight.const_value = ir.tensor(values, name="w3")
    (row,) = divergence(made.source, broken, made.feeds[:1], here()).beyond
    assert (row.op, row.cause, row.changed) == ("Conv", "not finite", ("w3: 1 of 18432",))


def test_sizes_that_differ_by_sample_and_integer_tensors_are_compared() -> None:
    model = graph(
        "(float[N,S,8] x) => (float[N,S,8] y, int64[3] n) { h = MatMul(x, w) t = Tanh(h) n = Shape(t) y = Add(t, x) }",
        {"w": normal(8, 8)},
    )
    feeds = [{"x": normal(1, size, 8)} for size in (3, 5)]
    found = divergence(model, model, feeds, here())
    assert found.rows == () and found.compared == 4


def test_models_without_a_tensor_in_common_are_refused(made: Placed) -> None:
    other = graph("(float[N,3,32,32] image) => (float[N,3,32,32] z) { z = Relu(image) }")
    with pytest.raises(ModelError, match="share no tensor by name"):
        divergence(made.model, other, made.feeds[:1], here())


@pytest.fixture
def files(made: Placed, tmp_path: Path) -> Path:
    """A folder with right.onnx, wrong.onnx, whose scale of ``d`` is wrong, and data.npz."""
    io.write(made.model, tmp_path / "right.onnx")
    io.write(wrong_scale(made.model, "d")[1], tmp_path / "wrong.onnx")
    np.savez(tmp_path / "data.npz", image=small_net.images(3, 9))
    return tmp_path


def test_the_command_tells_where_two_files_part(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    right, wrong, data = (str(files / name) for name in ("right.onnx", "wrong.onnx", "data.npz"))
    assert main(["divergence", right, wrong, "-c", data, "-q"]) == 1
    text = capsys.readouterr().out
    assert "first divergence at Conv" in text and "d_scale" in text
    assert main(["divergence", right, wrong, "-c", data, "-q", "--json"]) == 1
    report = from_json(capsys.readouterr().out)
    assert report.check("diverging_nodes").value == len(report.divergence) and report.divergence[0].cause == "scale"
    assert from_json(to_json(report)) == report
    page = html.render(report)
    assert "Divergence (" in page and report.divergence[0].node in page
    with pytest.raises(UsageError, match="can't differ"):
        edgeq.divergence(right, calibration=data)


@pytest.mark.slow
def test_a_fault_is_found_on_a_device(files: Path) -> None:
    data = str(files / "data.npz")
    report = edgeq.divergence(files / "right.onnx", files / "wrong.onnx", calibration=data, on="local")
    assert report.divergence[0].cause == "scale" and not report.passed
    assert report.environment["device"]["address"] == "local"
    assert edgeq.divergence(files / "right.onnx", calibration=data, on="local").divergence == ()


@pytest.mark.slow
def test_sums_that_saturate_without_vnni_are_found() -> None:
    """One file on this machine and on an emulated Haswell: the layer whose pairs of products leave 16 bits."""
    needs_qemu()

    def haswell(path: Path, feeds: Sequence[Feed], names: Sequence[str]) -> tuple[list[Feed], dict[str, str]]:
        found = outputs("Haswell", {"part": path}, {"part": feeds})["part"]
        return [dict(zip(names, arrays, strict=True)) for arrays in found], {}

    weights: dict[str, NDArray[np.generic]] = {name: np.abs(normal(32, 32)) for name in ("w", "v")}
    text = "(float[4,32] x) => (float[4,32] y) { a = MatMul(x, w) b = Relu(a) y = MatMul(b, v) }"
    made = placed(text, weights, target="cpu-x64-avx2", feeds=[{"x": np.abs(normal(4, 32))}])
    assert divergence(made.model, made.model, made.feeds, haswell).beyond == ()
    node, broken = wrong_weight(made.model, "b", channel=3)
    (row,) = divergence(broken, broken, made.feeds, haswell).beyond
    assert (row.node, row.cause) == (node, "saturation")
    assert "can leave 16 bits" in row.why and "at 3 of axis 1 alone" in row.why
