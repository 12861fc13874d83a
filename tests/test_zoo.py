"""Real models through the whole pipeline, judged by ONNX Runtime and metrics that share no code with edgeq.

The bars are on what ships, so a model that falls back to float passes them: each test also asks that whatever is float
says why. Speed is never asserted here; ``tests.bench`` measures it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import edgeq
from edgeq.errors import ModelError
from edgeq.ir import io, verify
from edgeq.rewrite.halve import rounded
from tests.bench import halves
from tests.bench.peers import quantized
from tests.zoo import ENTRIES, LARGE, ZOO, filetypes, photos, prose, sentences, speech
from tests.zoo.packages import cache, data, fetch, float_model, load, source
from tests.zoo.score import Values, cosine, metric_value, only_output, run, session

pytestmark = pytest.mark.zoo

REPOSITORY = Path(__file__).parents[1]
COUNTS = {"CALIBRATION": 24, "EVALUATION": 80}  # samples: enough for the bars, few enough for two slow cores
OTHER_COUNTS = {
    "OCR4d": {"CALIBRATION": 8, "EVALUATION": 10},  # pages cost a hundred times what lines do
    # Windows cost little, and an AUC of few tells little.
    "VAD": {"CALIBRATION": 128, "EVALUATION": 500},
}


@dataclass(frozen=True)
class Bar:
    """What an exported model is held to: the metric's largest drop, the least agreement of classes or cosine."""

    drop: float
    agreement: float = 0.0
    cosine: float = 0.99


BARS = {
    "EFL0": Bar(0.005, agreement=0.97),
    "MBV2": Bar(0.005, agreement=0.97, cosine=0.98),  # its classes are what ships; 19 dB of SNR is a cosine of .994
    "OCR4r": Bar(0.005, agreement=0.97, cosine=0.98),  # classes, nearly one-hot: a step read otherwise costs its cosine
    "OCR4d": Bar(0.01),  # 10 pages, about 110 boxes: one box is 0.009
    "OCRcls": Bar(0.01, agreement=0.97),
    "MINI6": Bar(0.025),  # 40 questions: one rank is 0.025
    "MAGIKA": Bar(0.01, agreement=0.97),
    "VAD": Bar(0.005),
    "BFf": Bar(0.01),  # 80 pictures, about 120 faces: one face is 0.005
}


def agreement(a: list[Values], b: list[Values]) -> float:
    """Share of positions (a sample of classes, a step of a text line) with the same largest class."""
    same = [only_output(x).argmax(-1) == only_output(y).argmax(-1) for x, y in zip(a, b, strict=True)]
    return float(np.concatenate([part.ravel() for part in same]).mean())


def obtainable(name: str) -> bool:
    """Whether this machine can have the model at all: one comes from npm."""
    return (
        not ZOO[name].model.startswith("npm:") or (cache() / ZOO[name].model[4:]).is_file() or bool(shutil.which("npm"))
    )


NAMES = [name for name in ZOO if obtainable(name)]


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    for part, count in COUNTS.items():
        monkeypatch.setenv(f"EDGEQ_ZOO_{part}", str(count))
    for entry in (ZOO[name] for name in NAMES):
        if entry.model.startswith("npm:"):
            fetch(entry.model.removeprefix("npm:"))


@pytest.mark.parametrize("name", NAMES)
def test_exported_model_keeps_its_bar(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part, count in OTHER_COUNTS.get(name, {}).items():
        monkeypatch.setenv(f"EDGEQ_ZOO_{part}", str(count))
    entry, bar = ZOO[name], BARS[name]
    report = edgeq.export(
        source(entry), target="local", calibration=entry.calibration, evaluation=entry.evaluation,
        metric=entry.metric, threads=[1], out=tmp_path / "model.edgeq",
    )  # fmt: skip
    assert report.artifact is not None and report.coverage is not None
    samples = list(data(entry.evaluation))
    expected, labels = run(float_model(name), samples)
    found, _ = run(report.artifact.path, samples)
    drop = metric_value(entry.metric, expected, labels) - metric_value(entry.metric, found, labels)
    assert drop <= max(bar.drop, 1 / len(labels)) + 1e-9  # one sample, where fewer can't be told
    assert cosine(expected, found) >= bar.cosine
    assert bar.agreement == 0 or agreement(expected, found) >= bar.agreement
    assert {"latency_ratio", "size_ratio", "snr_db"} <= {check.name for check in report.checks}
    assert report.coverage.unexplained == ()
    assert report.coverage.integer_nodes > 0 or "float-ships" in {notice.code for notice in report.notices}
    edgeq.verify_package(tmp_path / "model.edgeq")
    _assert_signature_kept(name, Path(report.artifact.path))


def _assert_signature_kept(name: str, artifact: Path) -> None:
    """Inputs, outputs and metadata of the float file are those of the artefact."""
    before, after = session(float_model(name)), session(artifact)
    wanted = [(value.name, value.type) for value in before.get_inputs()]
    assert [(value.name, value.type) for value in after.get_inputs()] == wanted
    if ":" not in source(ZOO[name]):  # torch leaves outputs without names: each exporter makes up its own
        assert [value.name for value in after.get_outputs()] == [value.name for value in before.get_outputs()]
    metadata = before.get_modelmeta().custom_metadata_map
    assert metadata.items() <= after.get_modelmeta().custom_metadata_map.items()


@pytest.mark.parametrize("name", [*NAMES, *LARGE])
def test_calibration_and_evaluation_share_no_sample_and_repeat(name: str) -> None:
    entry = ENTRIES[name]

    def contents(spec: str) -> list[bytes]:
        return [b"".join(np.asarray(array).tobytes() for key, array in sample.items() if key != "label")
                for sample in data(spec, 20)]  # fmt: skip

    calibration, evaluation = contents(entry.calibration), contents(entry.evaluation)
    assert len(calibration) == len(evaluation) == 20
    assert not set(calibration) & set(evaluation)
    assert calibration == contents(entry.calibration)


@pytest.mark.parametrize("name", NAMES)
def test_float_model_understands_its_data(name: str) -> None:
    results, labels = run(float_model(name), data(ZOO[name].evaluation, 40))
    assert metric_value(ZOO[name].metric, results, labels) > 0.7 * ZOO[name].float_metric


def test_encoder_without_transformers_is_masked_as_bert_is() -> None:
    """Padding that the mask hides changes nothing: what plain BERT promises and a wrong mask would break."""
    network = session(float_model("MINI6"))
    sample = next(iter(sentences.evaluation(1)))
    feed = {key: value for key, value in sample.items() if key != "label"}
    padded = {key: np.pad(value, ((0, 0), (0, 7))) for key, value in feed.items()}
    (alone,), (with_padding,) = network.run(None, feed), network.run(None, padded)
    np.testing.assert_allclose(with_padding[:, : alone.shape[1]], alone, atol=1e-4)


def test_the_language_model_is_read_right() -> None:
    """Weights, positions and tokens: with any of them wrong nothing is predicted."""
    import torch

    network, samples = load(LARGE["SMOL"].model)(), list(prose.evaluation(6))
    with torch.no_grad():
        logits = [network(torch.from_numpy(sample["input_ids"])).numpy() for sample in samples]
    found = metric_value("perplexity", [{"logits": one} for one in logits], [sample["label"] for sample in samples])
    assert 5 < found < 40


def test_data_that_packages_ship_serves_without_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EDGEQ_IMAGENET500", "EDGEQ_MAGIKA_EVAL"):
        monkeypatch.delenv(name, raising=False)
    filetypes._labelled.cache_clear()
    try:
        results, labels = run(float_model("EFL0"), photos.lite_evaluation(20))
        assert metric_value(ZOO["EFL0"].metric, results, labels) >= 0.85
        assert len(list(photos.lite_calibration(8))) == 8
        results, labels = run(float_model("MAGIKA"), filetypes.evaluation(60))
        assert metric_value(ZOO["MAGIKA"].metric, results, labels) >= 0.8
    finally:
        filetypes._labelled.cache_clear()
    monkeypatch.setattr(speech, "PROMPTS", Path("/nonexistent"))
    monkeypatch.setattr(speech, "MUSIC", Path("/nonexistent"))
    results, labels = run(float_model("VAD"), speech.evaluation(200))
    assert metric_value(ZOO["VAD"].metric, results, labels) >= 0.9


def test_every_command_decides_the_branch_of_the_samples(tmp_path: Path) -> None:
    """Silero VAD is one ``If`` on the sample rate: the data decides it, and without data there is nothing to say."""
    path = float_model("VAD")
    given = {"calibration": ZOO["VAD"].calibration, "limit": 8}
    noises = edgeq.sensitivity(path, **given)
    assert {row.op for row in noises.sensitivity} >= {"Conv"}
    advised = edgeq.advise(path, **given)
    assert sum(row["op"] == "Conv" for row in advised.advice) >= 6
    for report in (noises, advised):
        assert report.source["fixed"] == {"sr": 16000}
        assert [n.code for n in report.notices if n.code.startswith("fixed")] == ["fixed-shapes", "fixed-input"]
    with pytest.raises(ModelError, match=r"inside branches, such as If 'If_0'\n.*give data with -c"):
        edgeq.advise(path)


def test_peer_that_dies_is_a_result(tmp_path: Path) -> None:
    """The runtime's quantizer asks a scale a channel of Magika's weights whether it is true."""
    (peer,) = quantized("MAGIKA", tmp_path, ["channel"], samples=2)
    assert not peer.path
    assert "ValueError" in peer.error
    assert list(tmp_path.iterdir()) == []


MAKES = {  # what a sample says and makes; those not here export one package and show its report
    "04_web_page": ("npm start", {"web"}),
    "05_cpp_program": ("it was up", {"net.edgeq", "cpp"}),
    "06_signed_update": ("% of the package", {"team.pem.pub", "new.delta", "installed.edgeq"}),
    "07_on_a_device": ("sustained_ratio", {"net.edgeq"}),
    "08_phone_projects": ("required_operators.config", {"net.edgeq", "android", "ios"}),
}


@pytest.mark.parametrize("sample", sorted((REPOSITORY / "samples").glob("[0-9]*.py")), ids=lambda path: path.stem)
def test_sample_runs(sample: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(sample), str(tmp_path / "out")], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = {path.name for path in (tmp_path / "out").iterdir()}
    packages = {name for name in made if name.endswith(".edgeq")}
    words, names = MAKES.get(sample.stem, ("ships", packages))
    assert words in done.stdout
    assert names <= made
    assert sample.stem in MAKES or len(packages) == 1


@pytest.mark.parametrize("name", halves.NAMES)
def test_half_loses_no_more_than_onnxruntimes_converter(name: str, tmp_path: Path) -> None:
    made = halves.files(name)
    samples = list(data(ENTRIES[name].evaluation, 4))
    values = {}
    for key, model in made.items():
        io.write(rounded(verify.infer_shapes(model)), tmp_path / f"{key}.onnx")
        values[key], labels = run(tmp_path / f"{key}.onnx", samples)
    snr = {key: halves.snr_db(values["float"], found) for key, found in values.items()}
    assert snr["edgeq"] > max(40, snr["onnxruntime"] - 1)
    assert halves.wide(verify.infer_shapes(made["edgeq"])) == 0
    assert halves.casts(made["edgeq"]) <= halves.casts(made["float"]) + 2
    assert metric_value(ENTRIES[name].metric, values["edgeq"], labels) == pytest.approx(
        metric_value(ENTRIES[name].metric, values["float"], labels), abs=0.01
    )
