"""Models that take pictures as they are. Oracle: onnx's reference evaluator on what the preprocessing makes of them."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

import edgeq
from edgeq import pipeline
from edgeq.errors import ModelError, SampleError, UsageError
from edgeq.ir import io, verify
from edgeq.pixels import as_pixels, normalisation, taken
from edgeq.report.record import Report
from edgeq.report.recorder import Recorder
from edgeq.rewrite.pixels import from_pixels
from edgeq.run.pictures import preprocess
from edgeq.run.preprocess import Preprocessing
from edgeq.run.record import Feed, Samples
from edgeq.run.samples import load_samples
from edgeq.search import settle
from tests import small_net
from tests.graphs import Arrays, graph, normal, ops, reference
from tests.placed import placed, run, samples_of

IMAGENET = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
WHOLE = Preprocessing(mean=(127 / 255,) * 3, std=(0.5,) * 3)
NHWC = Preprocessing(mean=(0.4, 0.5, 0.6), layout="NHWC")
U8 = NDArray[np.uint8]
CONV = "(float[1,3,8,8] x) => (float[1,4,{0},{0}] y) {{ y = Conv<pads=[{1}]>(x, w, b) }}"
WEIGHTS = {"w": normal(4, 3, 3, 3), "b": normal(4)}


def pictures(count: int = 2, side: int = 8) -> U8:
    return np.random.default_rng(5).integers(0, 256, (count, 1, side, side, 3), dtype=np.uint8)


def made(pixels: U8, how: Preprocessing) -> Feed:
    """The model's input for u8[1, h, w, 3]."""
    return {"x": preprocess(pixels[0], how.to_dict())}


FORMS: dict[str, tuple[str, Arrays, Preprocessing, list[str]]] = {
    "pads": (CONV.format(8, "1,1,1,1"), WEIGHTS, IMAGENET, ["Transpose", "Cast", "Add", "Conv"]),
    "bare": (CONV.format(6, "0,0,0,0"), WEIGHTS, IMAGENET, ["Transpose", "Cast", "Conv"]),
    "no bias": (
        "(float[1,3,8,8] x) => (float[1,4,6,6] y) { y = Conv(x, w) }", WEIGHTS, IMAGENET, ["Transpose", "Cast", "Conv"]
    ),
    "no mean": (CONV.format(8, "1,1,1,1"), WEIGHTS, Preprocessing(std=(0.2,)), ["Transpose", "Cast", "Conv"]),
    "same": (
        '(float[1,3,8,8] x) => (float[1,4,8,8] y) { y = Conv<auto_pad="SAME_UPPER">(x, w, b) }',
        WEIGHTS, WHOLE, ["Transpose", "Cast", "Add", "Conv"],
    ),
    "two read": (
        "(float[1,3,8,8] x) => (float[1,4,6,6] y, float[1,4,6,6] z) { y = Conv(x, w, b) z = Conv(x, v) }",
        {**WEIGHTS, "v": normal(4, 3, 3, 3)}, IMAGENET, ["Transpose", "Cast", "Conv", "Conv"],
    ),
    "one pads": (
        "(float[1,3,8,8] x) => (float[1,4,6,6] y, float[1,4,8,8] z) { y = Conv(x, w) z = Conv<pads=[1,1,1,1]>(x, w) }",
        WEIGHTS, IMAGENET, ["Transpose", "Cast", "Add", "Conv", "Conv"],
    ),
    "no convolution": (
        "(float[1,3,8,8] x) => (float[1,3,8,8] y) { y = Relu(x) }", {}, IMAGENET,
        ["Transpose", "Cast", "Add", "Mul", "Relu"],
    ),
    "depthwise": (
        "(float[1,3,8,8] x) => (float[1,3,6,6] y) { y = Conv<group=3>(x, d) }", {"d": normal(3, 1, 3, 3)}, IMAGENET,
        ["Transpose", "Cast", "Add", "Mul", "Conv"],
    ),
    "channels last": (
        "(float[1,8,8,3] x) => (float[1,4,6,6] y) { t = Transpose<perm=[0,3,1,2]>(x) y = Conv(t, w, b) }", WEIGHTS,
        NHWC, ["Cast", "Add", "Mul", "Transpose", "Conv"],
    ),
    "put out": (
        "(float[1,3,8,8] x) => (float[1,3,8,8] y, float[1,4,6,6] z) { y = Identity(x) z = Conv(x, w) }", WEIGHTS,
        IMAGENET, ["Transpose", "Cast", "Add", "Mul", "Identity", "Conv"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_pixels_give_what_normalised_pictures_gave(name: str) -> None:
    text, weights, how, expected = FORMS[name]
    model = graph(text, weights)
    result = from_pixels(model, how)
    verify.verify(result, "taking pixels")
    (fed,) = result.graph.inputs
    assert (fed.name, str(fed.dtype), fed.shape) == ("x", "UINT8", (1, 8, 8, 3))
    assert ops(result) == expected
    for pixels in pictures():
        exact = reference(model, made(pixels, how))
        for one, other in zip(exact, reference(result, {"x": pixels}), strict=True):
            np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-4)
        for one, other in zip(exact, run(result, {"x": pixels}).values(), strict=True):
            np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-4)


@settings(max_examples=40)
@given(
    mean=st.lists(st.floats(0, 1), min_size=3, max_size=3), std=st.lists(st.floats(0.1, 2), min_size=3, max_size=3),
    scale=st.sampled_from([1.0, 1 / 255, 1 / 127.5]), pads=st.lists(st.integers(0, 2), min_size=4, max_size=4),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_borders_see_what_they_saw(
    mean: list[float], std: list[float], scale: float, pads: list[int], seed: int
) -> None:
    how = Preprocessing(mean=tuple(255 * scale * one for one in mean), std=tuple(std), scale=scale)
    random = np.random.default_rng(seed)
    words = ",".join(map(str, pads))
    text = f"(float[1,3,5,6] x) => (float[1,2,H,W] y) {{ y = Conv<pads=[{words}]>(x, w, b) }}"
    weights = {"w": random.standard_normal((2, 3, 3, 3)).astype(np.float32), "b": np.zeros(2, np.float32)}
    model, pixels = graph(text, weights), random.integers(0, 256, (1, 5, 6, 3), dtype=np.uint8)
    (exact,) = reference(model, made(pixels, how))
    (found,) = reference(from_pixels(model, how), {"x": pixels})
    # sums of 27 products of numbers up to 255 scale / std, in another order and with folded weights
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-5 * 255 * scale / min(std) * np.abs(weights["w"]).sum())


# --- samples ----------------------------------------------------------------------------------------------------------


@given(mean=st.floats(0, 1), std=st.floats(0.05, 4), layout=st.sampled_from(["NCHW", "NHWC"]), seed=st.integers(0, 99))
@settings(max_examples=40)
def test_samples_come_back_as_the_pixels_they_were(mean: float, std: float, layout: Any, seed: int) -> None:
    how = Preprocessing(mean=(mean,), std=(std,), layout=layout)
    pixels = np.random.default_rng(seed).integers(0, 256, (1, 7, 5, 3), dtype=np.uint8)
    found = as_pixels(samples_of([made(pixels, how)]), "x", how)
    np.testing.assert_array_equal(found.read(0)["x"], pixels, strict=True)
    assert Preprocessing.from_dict(found.preprocessing).apply(Image.fromarray(pixels[0])).tolist() == pixels.tolist()


def test_what_is_not_made_of_pixels_is_named() -> None:
    model = graph(CONV.format(8, "1,1,1,1"), WEIGHTS)
    samples = samples_of([{"x": normal(1, 3, 8, 8)}])
    with pytest.raises(SampleError, match=r"memory, sample 0: input 'x' isn't made of pixels by this preprocessing"):
        as_pixels(samples, "x", IMAGENET).read(0)
    with pytest.raises(UsageError, match="--pixels moves preprocessing into the model, and memory has none"):
        normalisation(samples, None, model)
    with pytest.raises(ModelError, match="0 inputs could be pictures"):
        from_pixels(graph("(float[2,3] x) => (float[2,3] y) { y = Relu(x) }"), IMAGENET)
    with pytest.raises(SampleError, match="'dtype' is 'uint8', which scale, mean or std would leave"):
        Preprocessing(dtype="uint8")


def test_a_model_that_is_not_the_same_is_refused() -> None:
    model = graph("(float[1,3,8,8] x) => (float[1,3,8,8] y) { f = Mul(x, k) y = Floor(f) }", {"k": np.float32(63.75)})
    how = Preprocessing(mean=(0.2,), std=(0.25,))  # whole numbers but for rounding, which Floor sees
    samples = samples_of([made(pixels, how) for pixels in pictures(side=8)])
    with pytest.raises(ModelError, match=r"outputs move by .* times what rounding explains"):
        taken(model, how, samples, Recorder())


# --- integers ---------------------------------------------------------------------------------------------------------


def test_pixels_are_codes_without_a_quantizelinear() -> None:
    model = from_pixels(graph(CONV.format(8, "1,1,1,1"), WEIGHTS), WHOLE)
    shift = next(str(node.name) for node in model.graph if node.op_type == "Add")
    feeds = [{"x": pixels} for pixels in pictures(4)]
    net = placed(model, feeds=feeds, keep_float={shift: "codes"})
    assert ops(net.model)[:2] == ["Transpose", "DequantizeLinear"]
    assert ops(net.model).count("QuantizeLinear") == 1  # of the output
    (params,) = [net.encodings.activations[name] for name in net.plan.tensors if name.endswith("_add")]
    assert (float(params.scale), int(params.zero_point)) == (1.0, 127)
    for feed in feeds:
        np.testing.assert_array_equal(net.unfused(feed)["y"], net.by_definition(feed)["y"])
        np.testing.assert_allclose(net.fused(feed)["y"], net.by_definition(feed)["y"], atol=_step(net.encodings, "y"))


def _step(encodings: Any, name: str) -> float:
    return 1.01 * float(encodings.activations[name].scale)


@pytest.mark.parametrize("mean", [(127.5 / 255,) * 3, (0.5, 0.4, 0.3)])
def test_other_middles_are_quantized(mean: tuple[float, ...]) -> None:
    how = Preprocessing(mean=mean)
    net = placed(from_pixels(graph(CONV.format(8, "1,1,1,1"), WEIGHTS), how), feeds=[{"x": p} for p in pictures(4)])
    assert ops(net.model).count("QuantizeLinear") >= 2


# --- packages ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Report]]:
    folder = tmp_path_factory.mktemp("pixels")
    io.write(small_net.model(), folder / "net.onnx")
    for part, seed in (("calibration", 1), ("evaluation", 2)):
        (folder / part).mkdir()
        for index, image in enumerate(small_net.images(16, seed)):
            Image.fromarray(np.uint8(255 * image).transpose(1, 2, 0)).save(folder / part / f"{index:02}.png")
    (folder / "preprocessing.json").write_text(json.dumps({"mean": [127 / 255] * 3, "std": [0.5] * 3}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settle, "DECIDE_SECONDS", 0.5)
        patch.setattr(pipeline, "VALIDATE_SECONDS", 0.5)
        yield folder, edgeq.export(
            folder / "net.onnx", out=folder / "net.edgeq", calibration=str(folder / "calibration"),
            evaluation=str(folder / "evaluation"), pixels=True,
        )  # fmt: skip


@pytest.mark.slow
def test_a_package_takes_pictures_as_they_are(exported: tuple[Path, Report]) -> None:
    folder, report = exported
    manifest = json.loads((folder / "net.edgeq" / "manifest.json").read_text())
    (fed,) = manifest["inputs"]
    assert (fed["dtype"], fed["shape"][1:]) == ("UINT8", [small_net.SIZE, small_net.SIZE, 3])
    assert {"dtype": "uint8", "layout": "NHWC", "scale": 1.0}.items() <= manifest["preprocessing"].items()
    assert report.source["pixels"]["mean"] == [127 / 255] * 3
    (step,) = [step for step in report.steps if step.name == "pixels"]
    assert step.facts["moved"] < 0.1  # of what rounding explains
    load = runpy.run_path(str(folder / "net.edgeq" / "load.py"))
    shown = np.asarray(Image.open(folder / "evaluation" / "03.png"))
    answer = load["pipeline"]()(shown)["logits"]
    how = Preprocessing(mean=(127 / 255,) * 3, std=(0.5,) * 3)
    exact = run(small_net.model(), {"image": how.apply(Image.fromarray(shown))})["logits"]
    assert answer.argmax() == exact.argmax()
    assert 10 * np.log10((exact**2).sum() / ((exact - answer) ** 2).sum()) > 20


@pytest.mark.slow
def test_it_is_measured_again_against_the_model_it_came_from(exported: tuple[Path, Report]) -> None:
    folder, report = exported
    again = edgeq.validate(folder / "net.edgeq", evaluation=str(folder / "evaluation"), threads=[1])
    assert again.check("snr_db").value == pytest.approx(report.check("snr_db").value, abs=0.01)
    assert again.source["pixels"] == report.source["pixels"]


@pytest.mark.slow
def test_arrays_need_to_be_told_how_they_were_made(exported: tuple[Path, Report], tmp_path: Path) -> None:
    folder, _ = exported
    how = Preprocessing.from_file(folder / "preprocessing.json")
    array = np.concatenate([how.apply(Image.open(path)) for path in sorted((folder / "calibration").iterdir())])
    np.savez(tmp_path / "data.npz", image=array)
    model = io.read(folder / "net.onnx")
    samples: Samples = load_samples(str(tmp_path / "data.npz"), model)
    found = normalisation(samples, folder / "preprocessing.json", model)
    result, pixels = taken(model, found, samples, Recorder())
    shown = np.asarray(Image.open(folder / "calibration" / "00.png"))
    np.testing.assert_array_equal(pixels.read(0)["image"], shown[None], strict=True)
    assert isinstance(result, ir.Model)
