"""Packages on this machine as a device, and the names of devices; tests/devices has other machines."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from edgeq import examine
from edgeq.cli import main
from edgeq.packaging import PACKAGES
from edgeq.report import html
from edgeq.report.codec import from_json
from edgeq.report.rows import banners, sustained_line, title
from edgeq.run.device import registry
from edgeq.validator import validate as measure
from tests import packaged, small_net


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with net.onnx, evaluation.npz and net.edgeq, whose model is the float one."""
    folder = tmp_path_factory.mktemp("net")
    small_net.write(folder)
    PACKAGES["dir"](packaged.classifier(folder / "made"), folder / "net.edgeq")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(examine, "measure", partial(measure, max_seconds=0.5))
        yield folder


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration of this test's own."""
    monkeypatch.setenv("EDGEQ_CONFIG", str(tmp_path / "config"))
    return tmp_path


def words(made: Path, package: Path, on: str) -> list[str]:
    data = ["-c", str(made / "evaluation.npz"), "--reference", str(made / "net.onnx")]
    return ["validate", str(package), *data, "--on", on, "--threads", "1", "-q"]


@pytest.mark.slow
def test_a_package_is_measured_on_a_device_by_its_name(
    made: Path, own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (own / "work").mkdir()
    assert main(["device", "add", "here", f"local?folder={own / 'work'}"]) == 0
    capsys.readouterr()
    main([*words(made, made / "net.edgeq", "here"), "--json", "--sustained", "1"])
    report = from_json(capsys.readouterr().out)
    assert report.check("sustained_ratio").samples == report.sustained["laps"] > 0
    assert "joules_per_run" in {check.name for check in report.checks} or "no-energy" in {
        notice.code for notice in report.notices
    }
    shown = html.render(report)
    assert "Back to back (12)" in shown and sustained_line(report).startswith("back to back for 1 s")
    assert (report.check("golden").value, report.check("golden").samples) == (0, 2)
    assert report.check("integer_kernels").value == 0
    assert report.check("top1_drop").value == 0 and report.check("max_abs").value == 0
    assert report.check("peak_memory_bytes").value > 0 and report.latency["artifact"]["1"]["p99_ms"] > 0
    before, after = report.environment["device"]["states"]
    assert before.keys() == after.keys() == {"governor", "mhz", "celsius"}
    assert title(report) == "net.onnx → cpu on local · balanced" and banners(report) == []
    assert list((own / "work").iterdir()) == []


@pytest.mark.slow
def test_golden_runs_that_are_not_repeated_fail(made: Path, own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(made / "net.edgeq", own / "copy.edgeq")
    packaged.reseal(copy, lambda manifest: manifest["variants"][0]["golden"]["tolerances"].update(logits=-1.0))
    assert main([*words(made, copy, "local"), "--json"]) == 1
    report = from_json(capsys.readouterr().out)
    found = report.check("golden")
    assert (found.value, found.passed) == (2, False)
    apart = report.check("diverging_nodes")
    assert (apart.value, apart.passed) == (0, True), "the same kernels: only what they are held to is wrong"


def test_divergence_needs_a_device(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["-c", str(made / "evaluation.npz"), "--reference", str(made / "net.onnx")]
    assert main(["validate", str(made / "net.edgeq"), *data, "--divergence", "-q"]) == 2
    assert "add --on DEVICE" in capsys.readouterr().err


def test_an_altered_package_never_reaches_a_device(made: Path, own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(made / "net.edgeq", own / "copy.edgeq")
    with (copy / "model.onnx").open("ab") as file:
        file.write(b"\0")
    assert main(words(made, copy, "local")) == 2
    assert "model.onnx is altered" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("needs", "lacks"),
    [
        ({"isa": ["asimd", "avx2|fma"]}, "needs asimd"),
        ({"onnxruntime": "9.1"}, "needs onnxruntime >= 9.1, found 1."),
        ({"provider": "QNNExecutionProvider"}, "needs QNNExecutionProvider"),
    ],
)
def test_what_a_device_lacks_is_told(
    made: Path, own: Path, needs: dict[str, object], lacks: str, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(made / "net.edgeq", own / "copy.edgeq")
    packaged.reseal(copy, lambda manifest: manifest["variants"][0]["requires"].update(needs))
    assert main(words(made, copy, "local")) == 3
    error = capsys.readouterr().err
    assert "can't run on local (x86_64)" in error and lacks in error


def test_devices_are_kept_by_name(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: str, status: int = 0) -> str:
        assert main(["device", *words]) == status
        captured = capsys.readouterr()
        return captured.out if status == 0 else captured.err

    assert said("list").strip() == ""
    assert "local" in said("add", "bench-1", "local")
    assert "bench-1 is local already" in said("add", "bench-1", "local", status=2).replace("'", "")
    assert "onnxruntime 1." in said("list")
    doctor = said("doctor", "bench-1")
    assert "CPUExecutionProvider" in doctor and "PROBLEM" not in doctor and "governor" in doctor
    assert "did you mean 'bench-1'" in said("doctor", "bench1", status=2)
    assert "no name for a device" in said("add", "ssh://x", "local", status=2)
    assert "did you mean 'remove'" in said("remvoe", "bench-1", status=2)
    assert "edgeq device remove NAME" in said("remove", status=2)
    said("remove", "bench-1")
    assert registry.known() == {}
    assert "none is known" in said("remove", "bench-1", status=2)


def test_a_broken_registry_is_told(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own / "config").mkdir()
    (own / "config/devices.json").write_text("{")
    assert main(["device", "list", "--json"]) == 2
    assert "devices.json" in json.loads(capsys.readouterr().out)["error"]["message"]


def test_an_emulator_is_told_in_every_view(made: Path) -> None:
    from dataclasses import replace
    from io import StringIO

    from rich.console import Console

    from edgeq.report.text import render

    report = from_json((made / "net.edgeq/report.json").read_text())
    report = replace(report, environment={"device": {"address": "ssh://board", "emulator": "qemu-aarch64"}})
    console = Console(file=StringIO(), width=200)
    console.print(render(report))
    for view in (console.file.getvalue(), html.render(report)):  # type: ignore[attr-defined]
        assert "NOT A DEVICE MEASUREMENT: qemu-aarch64" in view
