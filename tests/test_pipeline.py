"""The whole flow through the command line, on a small classifier: what ships, what is said of it, what it can do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import edgeq
from edgeq import pipeline
from edgeq.cli import main
from edgeq.ir import io
from edgeq.ir.text import to_text
from edgeq.report.codec import from_json
from edgeq.report.record import Report
from edgeq.run.session import open_session, run_session
from edgeq.search import settle
from tests import small_net

pytestmark = pytest.mark.slow
SHAPE = f"image=1,3,{small_net.SIZE},{small_net.SIZE}"


@pytest.fixture(scope="module")
def quick() -> pytest.MonkeyPatch:
    """Measuring times that are enough to have figures, not to trust them."""
    patch = pytest.MonkeyPatch()
    patch.setattr(settle, "DECIDE_SECONDS", 0.5)
    patch.setattr(pipeline, "VALIDATE_SECONDS", 0.5)
    yield patch  # type: ignore[misc]
    patch.undo()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("net")
    small_net.write(made)
    return made


def words(folder: Path, out: Path, *more: str) -> list[str]:
    data = ["-c", str(folder / "calibration.npz"), "-e", str(folder / "evaluation.npz")]
    return ["export", str(folder / "net.onnx"), *data, "-o", str(out), "--threads", "1", "--input", SHAPE, "-q", *more]


def told(capsys: pytest.CaptureFixture[str], status: int) -> Report:
    """The report on stdout, which must be exactly one JSON object that says what the exit status says."""
    out = capsys.readouterr().out
    json.loads(out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    report = from_json(out)
    assert status == (0 if report.passed else 1)
    return report


@pytest.fixture(scope="module")
def exported(quick: pytest.MonkeyPatch, folder: Path) -> tuple[Path, Report]:
    """A package, and the report that export returned."""
    out = folder / "net.edgeq"
    report = edgeq.export(
        folder / "net.onnx", out=out, calibration=str(folder / "calibration.npz"),
        evaluation=str(folder / "evaluation.npz"), threads=[1], inputs=[SHAPE], dump=folder / "dump",
    )  # fmt: skip
    return out, report


def test_export_says_all_that_is_promised(exported: tuple[Path, Report]) -> None:
    out, report = exported
    assert report.artifact is not None
    assert report.artifact.path == str(out / "model.onnx")
    assert report.artifact.size_bytes == (out / "model.onnx").stat().st_size
    assert report.artifact.inputs == {"image": f"image float32[1, 3, {small_net.SIZE}, {small_net.SIZE}]"}
    for name in ("latency_ratio", "size_ratio", "snr_db", "agreement_top1", "top1", "top1_drop", "latency_ms"):
        assert np.isfinite(report.check(name).value), name
    assert report.check("latency_ratio").low is not None
    assert report.check("top1_drop").limit is not None, "a promise is held to without being asked"
    assert report.check("size_ratio").value == pytest.approx(
        report.artifact.size_bytes / io.size_bytes(out.parent / "dump" / "00-source.onnx"), rel=0.02
    )
    assert report.coverage is not None
    assert isinstance(report.coverage.float_islands, tuple)
    assert [row["ships"] for row in report.candidates].count(True) == 1
    assert report.samples["calibration"]["count"] == report.samples["evaluation"]["count"] == 24
    assert {step.name for step in report.steps} >= {"read", "canonicalize", "quantize", "observe", "race", "validate"}
    assert not [notice for notice in report.notices if notice.code == "synthetic"]


def test_the_best_integer_draft_covers_the_net(exported: tuple[Path, Report]) -> None:
    """Whether it is the faster one is this machine's matter; that every product fuses and it stays right is not."""
    _, report = exported
    drafts = [row for row in report.candidates if row["integer_macs_share"]]
    assert max(row["integer_macs_share"] for row in drafts) == pytest.approx(1.0)
    assert all(row["checks"]["snr_db"] > 20 for row in drafts)
    if report.coverage is not None and report.coverage.integer_nodes:
        assert report.coverage.unexplained == ()
        assert report.check("size_ratio").value < 0.5
        assert all(row["snr_db"] > 15 for row in report.layers)


def test_the_package_holds_what_was_measured(exported: tuple[Path, Report]) -> None:
    out, report = exported
    edgeq.verify_package(out)
    stored = from_json((out / "report.json").read_text(encoding="utf-8"))
    assert stored.checks == report.checks
    assert (out / "report.html").stat().st_size > 10_000
    assert {"model.onnx", "manifest.json", "report.json", "report.html"} <= {path.name for path in out.iterdir()}
    feed = {"image": small_net.images(1, seed=5)}
    float_, shipped = (
        run_session(open_session(path), feed)["logits"] for path in (out.parent / "net.onnx", out / "model.onnx")
    )
    assert np.corrcoef(float_, shipped)[0, 1] > 0.99


def test_every_intermediate_model_is_dumped_and_runs(exported: tuple[Path, Report]) -> None:
    dumped = sorted((exported[0].parent / "dump").glob("*.onnx"))
    assert [path.name[:2] for path in dumped] == [f"{index:02d}" for index in range(len(dumped))]
    assert dumped[0].name == "00-source.onnx"
    assert dumped[1].name == "01-canonicalize.onnx"
    texts = [path.with_suffix(".txt").read_text(encoding="utf-8") for path in dumped]
    assert texts[1] == to_text(io.read(dumped[1])) + "\n"
    assert "QuantizeLinear(" in texts[-1] and "QuantizeLinear(" not in texts[0]
    feed = {"image": small_net.images(1, seed=5)}
    outputs = [run_session(open_session(path), feed)["logits"] for path in dumped]
    for output in outputs[1:]:
        assert np.corrcoef(outputs[0], output)[0, 1] > 0.99


def test_export_by_hand_and_again(
    exported: tuple[Path, Report], folder: Path, capsys: pytest.CaptureFixture[str], quick: pytest.MonkeyPatch
) -> None:
    """The command line says the same as the function; the second run observes nothing anew; --force replaces."""
    out = folder / "by_hand.edgeq"
    status = main(words(folder, out, "--json"))
    report = told(capsys, status)
    assert report.artifact is not None
    reused = [step.facts for step in report.steps if step.name == "observe"]
    assert all(facts["samples_run"] == 0 for facts in reused), "statistics come from the store"
    assert main(words(folder, out)) == 2
    assert "add --force" in capsys.readouterr().err
    assert main(words(folder, out, "--force", "-r", "float", "--json")) in (0, 1)
    again = from_json(capsys.readouterr().out)
    assert again.recipe == "canonicalize"
    assert again.coverage is not None
    assert again.coverage.integer_macs_share == 0
    assert sorted(path.name for path in folder.iterdir() if "by_hand" in path.name) == ["by_hand.edgeq"]


def test_validate_bench_inspect_and_package(
    exported: tuple[Path, Report], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, made = str(exported[0]), exported[1]
    data = ["-e", str(folder / "evaluation.npz")]
    report = told(capsys, main(["validate", out, *data, "--threads", "1", "--json", "-q"]))
    assert report.check("snr_db").value == pytest.approx(made.check("snr_db").value, abs=0.5)
    assert report.check("top1_drop").value == pytest.approx(made.check("top1_drop").value, abs=1e-6)
    zipped = str(folder / "net.zip")
    assert main(["package", out, "--form", "zip", "-o", zipped, "--json"]) == 0
    capsys.readouterr()
    report = told(capsys, main(["validate", zipped, *data, "--threads", "1", "--json", "-q"]))
    assert report.check("top1_drop").value == pytest.approx(made.check("top1_drop").value, abs=1e-6)
    models = [str(folder / "net.onnx"), out]
    words = ["--threads", "1", "--repeats", "5", "--input", SHAPE]
    report = told(capsys, main(["bench", *models, *words, "--json", "-q"]))
    assert set(report.latency) == set(models)
    report = told(capsys, main(["inspect", str(folder / "net.onnx"), "--input", SHAPE, "--json"]))
    assert report.coverage is not None
    assert report.coverage.integer_macs_share == 1
    assert sum(report.coverage.kernels.values()) >= 6
    report = told(capsys, main(["package", out, "--json"]))
    assert report.notices[-1].code == "verified"


def test_a_limit_that_is_missed_is_status_1(
    exported: tuple[Path, Report], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, limit = ["-e", str(folder / "evaluation.npz")], ["--max-size-ratio", "0.01"]
    status = main(["validate", str(exported[0]), *data, *limit, "--threads", "1", "--json", "-q"])
    assert status == 1
    failed = [check.name for check in told(capsys, status).checks if not check.passed]
    assert "size_ratio" in failed


def test_list_and_explain_speak_json(exported: tuple[Path, Report], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json"]) == 0
    assert "targets" in json.loads(capsys.readouterr().out)
    assert main(["explain", "balanced", "--json"]) == 0
    assert "balanced" in json.loads(capsys.readouterr().out)
    (word,) = {notice.code for notice in exported[1].notices if notice.code == "float-ships"} or {"top1"}
    assert main(["explain", word, "--report", str(exported[0]), "--json"]) == 0
    assert word in json.loads(capsys.readouterr().out)


def test_an_altered_package_is_refused(
    exported: tuple[Path, Report], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(exported[0], tmp_path / "copy.edgeq")
    with (copy / "model.onnx").open("ab") as file:
        file.write(b"\0")
    assert main(["validate", str(copy), "--synthetic"]) == 2
    assert "model.onnx" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["cpu-arm64", "cpu-x64-avx2"])
def test_other_targets_export_here_too(
    target: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], quick: pytest.MonkeyPatch
) -> None:
    """Whatever is faster here ships; every draft was legal for the target, or legalize would have raised."""
    status = main(
        words(folder, tmp_path / "out", "-t", target, "-r", "fast", "--json", "--dump", str(tmp_path / "dump"))
    )
    report = told(capsys, status)
    assert report.target["name"] == target
    assert any(row["integer_macs_share"] == pytest.approx(1) for row in report.candidates)
    assert (report.saturation is not None and report.saturation.flagged == 0) == (target == "cpu-x64-avx2")


def test_held_out_samples_are_taken_from_calibration_and_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], quick: pytest.MonkeyPatch
) -> None:
    given = ["export", str(folder / "net.onnx"), "-c", str(folder / "calibration.npz"), "-o", str(tmp_path / "out")]
    report = told(capsys, main([*given, "--threads", "1", "-q", "--json", "-r", "fast"]))
    assert "held-out" in {notice.code for notice in report.notices}
    counts = [report.samples[kind]["count"] for kind in ("calibration", "evaluation")]
    assert counts == [18, 6]
    assert report.artifact is not None
    assert report.artifact.inputs["image"].startswith("image float32[N, 3"), "the batch stays dynamic"


def test_random_data_is_marked_in_every_view(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], quick: pytest.MonkeyPatch
) -> None:
    given = ["export", str(folder / "net.onnx"), "--synthetic", "-o", str(tmp_path / "out"), "--threads", "1", "-q"]
    assert main([*given, "--input", SHAPE, "-r", "fast"]) in (0, 1)
    assert "SYNTHETIC" in capsys.readouterr().out.upper()
    report = from_json((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report.samples["calibration"]["synthetic"]
    assert "synthetic" in {notice.code for notice in report.notices}
    assert "SYNTHETIC" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
