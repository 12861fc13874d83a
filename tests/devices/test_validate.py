"""Packages measured on ARM boards: what is told, what is refused, and that one file computes the same on every core."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import edgeq
from edgeq.analyse.statistics import read
from edgeq.cli import main
from edgeq.packaging import PACKAGES
from edgeq.report.codec import from_json
from edgeq.report.record import Report
from tests import packaged, small_net
from tests.devices.adbd import Adbd
from tests.devices.conftest import Boards

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with net.onnx, its data, arm.edgeq and x64.edgeq."""
    folder = tmp_path_factory.mktemp("net")
    net, calibration, evaluation = small_net.write(folder)
    data = {"calibration": str(calibration), "evaluation": str(evaluation), "threads": [1]}
    edgeq.export(net, out=folder / "arm.edgeq", target="cpu-arm64", **data)
    x64 = PACKAGES["dir"](packaged.classifier(folder / "made"), folder / "x64.edgeq")
    packaged.reseal(x64, lambda manifest: manifest["variants"][0]["requires"].update(isa=["avx2"]))
    return folder


def validated(made: Path, capsys: pytest.CaptureFixture[str], package: str, on: str, *more: str) -> str:
    words = ["validate", str(made / package), "-c", str(made / "evaluation.npz"), "--on", on, "--threads", "1"]
    main([*words, "--json", "-q", *more])
    return capsys.readouterr().out


@pytest.mark.parametrize("core", ["a72", "a76", "a715"])
def test_a_package_keeps_its_promise_on_every_core(
    core: str, made: Path, boards: Boards, at_home: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    board = boards(core)
    at_home(board.home)
    report: Report = from_json(validated(made, capsys, "arm.edgeq", board.address))
    shipped = from_json((made / "arm.edgeq/report.json").read_text())
    assert report.check("golden").passed, report.check("golden").note
    assert shipped.coverage is not None
    assert report.check("integer_kernels").value == shipped.coverage.integer_nodes, report.check("integer_kernels").note
    assert report.check("snr_db").value == pytest.approx(shipped.check("snr_db").value, abs=1.0)
    assert report.environment["device"]["emulator"] == "qemu-aarch64-static"
    latency = report.check("latency_ratio")
    assert latency.limit is None and "not a device measurement" in latency.note


def test_a_board_runs_it_back_to_back(
    made: Path, boards: Boards, at_home: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    board = boards("a76")
    at_home(board.home)
    zone = board.files / "sys/class/thermal/thermal_zone0"
    zone.mkdir(parents=True)
    (zone / "type").write_text("cpu\n")
    (zone / "temp").write_text("48250\n")
    report = from_json(validated(made, capsys, "arm.edgeq", board.address, "--sustained", "3"))
    check = report.check("sustained_ratio")
    assert check.low is not None and check.low <= check.value and "not a device measurement" in check.note
    assert {window["celsius"] for window in report.sustained["windows"]} == {48.25}
    assert "tells no energy: no energy counter is exposed" in "".join(notice.message for notice in report.notices)


def test_a_board_tells_how_its_own_data_drifts(
    made: Path, boards: Boards, at_home: Callable[[Path], None], tmp_path: Path
) -> None:
    board = boards("a76")
    at_home(board.home)
    np.savez(board.files / "root/seen.npz", image=3 * small_net.images(5, seed=7))
    found = edgeq.observe(made / "arm.edgeq", on=board.address, data="/root/seen.npz", out=tmp_path / "seen.npz")
    drifted = {row["tensor"] for row in found.drift if row["drifted"]}
    assert drifted and not found.passed, "which tensors are quantized is for profiles to say"
    assert read(tmp_path / "seen.npz").samples == 5
    assert found.environment["device"]["machine"] == "aarch64"


def test_a_phone_without_python_keeps_it_too(
    made: Path, phone: Adbd, cpp: str, capsys: pytest.CaptureFixture[str]
) -> None:
    report: Report = from_json(validated(made, capsys, "arm.edgeq", phone.address + cpp))
    shipped = from_json((made / "arm.edgeq/report.json").read_text())
    assert report.check("golden").passed, report.check("golden").note
    assert shipped.coverage is not None
    assert report.check("integer_kernels").value == shipped.coverage.integer_nodes, report.check("integer_kernels").note
    assert report.environment["device"]["runner"] == "cpp" and report.check("peak_memory_bytes").value > 0


def test_files_for_another_processor_are_refused(
    made: Path, boards: Boards, at_home: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    board = boards("a76")
    at_home(board.home)
    error = json.loads(validated(made, capsys, "x64.edgeq", board.address))["error"]
    assert error["code"] == "device" and "aarch64" in error["message"] and "needs avx2" in error["message"]
    assert "export -t cpu-arm64" in error["hint"]


def test_an_emulated_clock_is_held_to_nothing(
    made: Path, boards: Boards, at_home: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    board = boards("a76")
    at_home(board.home)
    error = json.loads(validated(made, capsys, "arm.edgeq", board.address, "--max-latency", "100"))["error"]
    assert error["code"] == "usage" and "latency_ms" in error["message"]
