"""The command line: streams, exit statuses, JSON, help and errors. Commands that need no pipeline run for real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest

from edgeq.cli import bars, main, names
from edgeq.cli.group import cli
from edgeq.errors import TargetError
from edgeq.packaging import Package, write_directory
from edgeq.report.codec import from_json
from edgeq.report.record import Check, Coverage, Island, Notice, Report
from edgeq.version import __version__
from tests.test_packaging import GOLDEN, REPORT, _model


@pytest.fixture
def package(tmp_path: Path) -> Path:
    coverage = Coverage(0.5, 1, 0, 1, 0, (Island("/conv", "Conv", "too noisy", 7),))
    notices = (Notice("warning", "kept-float", "the stem stays float", "/conv"),)
    report = Report(**{**vars(REPORT), "coverage": coverage, "notices": notices})
    return write_directory(Package(_model(tmp_path / "made"), report, GOLDEN), tmp_path / "net.edgeq")


def _run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = main(words)
    return status, *capsys.readouterr()


def test_help_of_every_command_shows_examples_and_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "advise bench compare compile delta device divergence explain export footprint inspect key list observe "
        "package sensitivity validate"
    )
    assert sorted(cli.commands) == words.split()
    for name in cli.commands:
        status, out, err = _run(capsys, name, "--help")
        assert (status, err) == (0, "")
        assert f"  edgeq {name} " in out
        assert "130 interrupted" in out
    assert _run(capsys, "--version") == (0, f"edgeq, version {__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["exprot"], "No such command 'exprot'. Did you mean 'export'?"),
        (["export", "a.onnx", "--recipi", "x"], "No such option '--recipi'. Did you mean '--recipe'?"),
        (["export"], "Missing argument 'MODEL'"),
        (["export", "a.onnx", "--threads", "1,x"], "'1,x' is no list of thread counts; write 1,2"),
        (["export", "a.onnx", "--limit", "0"], "0 is not in the range x>=1"),
        (["list", "target"], "did you mean 'targets'?"),
        (["explain", "cpu-x64-vni"], "did you mean 'cpu-x64-vnni'?"),
        (["explain", "zzzz"], "see `edgeq list`, or give --report"),
        (["explain", "/conv", "--report", "nowhere"], "can't read report 'nowhere'"),
        (["package", "nowhere"], "'nowhere' is no edgeq package"),
        (["package", "nowhere", "--form", "zap"], "unknown package form 'zap'"),
    ],
)
def test_bad_usage_is_status_2_and_says_what_to_do(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    status, out, err = _run(capsys, *words)
    assert (status, out) == (2, "")
    assert message in err
    status, out, err = _run(capsys, *words, "--json")
    assert (status, err) == (2, "")
    error = json.loads(out)["error"]
    assert set(error) == {"code", "message", "hint"}
    assert message in f"{error['message']} {error['hint']}"


def test_a_package_is_verified_and_written_again(
    package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = _run(capsys, "package", str(package))
    assert (status, err) == (0, "")
    assert "verified" in out
    assert "/conv" in out
    status, out, err = _run(capsys, "package", str(package), "-o", str(tmp_path / "again"), "--json")
    assert (status, err) == (0, "")
    assert from_json(out).notices[-1].message == f"written {tmp_path / 'again'}"
    assert main(["package", str(tmp_path / "again")]) == 0
    status, _, err = _run(capsys, "package", str(package), "-o", str(tmp_path / "again"))
    assert (status, "add --force" in err) == (2, True)


def test_an_altered_package_is_refused(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (package / "model.onnx").open("r+b") as file:
        file.seek(40)
        file.write(b"?")
    status, out, err = _run(capsys, "package", str(package))
    assert (status, out) == (2, "")
    assert "model.onnx is altered" in err
    assert "try: copy it again" in err


def test_a_failed_check_is_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failed = Report(**{**vars(REPORT), "checks": (Check("latency_ms", 9.0, limit=8.0, passed=False),)})
    out = write_directory(Package(_model(tmp_path / "made"), failed, GOLDEN), tmp_path / "net.edgeq")
    status, shown, _ = _run(capsys, "package", str(out))
    assert status == 1
    assert "FAILED latency_ms 9, limit ≤ 8" in " ".join(shown.split())


def test_list_and_explain(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = _run(capsys, "list", "--json")
    assert status == 0
    listed = json.loads(out)
    assert list(listed) == list(names.KINDS)
    assert listed["errors"]["target"] == TargetError.__doc__
    for kind, rows in listed.items():
        status, out, _ = _run(capsys, "list", kind)
        assert out.splitlines()[0] == kind
        assert len(out.splitlines()) == len(rows) + 1
        assert all(rows.values()), kind  # everything listed says what it is
        for word in rows:
            if not word.startswith("npu-qnn"):  # tests/test_qnn.py asks an emulator
                assert _run(capsys, "explain", word)[::2] == (0, "")
    told = json.loads(_run(capsys, "explain", "cpu-x64-avx2", "--json")[1])["cpu-x64-avx2"]
    assert told["weights"] == "i8/channel"
    assert "VPMADDUBSW" in told["source of limits.pair_sum_max"]
    assert told["kernel of MatMul+Add"] == "QGemm"  # as the runtime answers, for neighbours that run as one kernel
    assert told["kernel of MatMul+Add, Q/DQ between"] == "MatMul QLinearMatMul; Add QLinearAdd"
    assert told["kernel of LayerNormalization"].startswith("float: ")
    assert listed["steps"]["quantize"].endswith("bias=weights, relief=0, activations=target.")
    for word, told in (("/conv", "Conv, 7 multiply-accumulates: too noisy"), ("kept-float", "the stem stays float")):
        status, out, _ = _run(capsys, "explain", word, "--report", str(package))
        assert (status, told in out) == (0, True)
    assert main(["explain", "/other", "--report", str(package / "report.json")]) == 2


def test_chatter_of_libraries_does_not_reach_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    from edgeq.cli.options import Command

    @click.command(cls=Command)
    def chatty() -> int:
        sys.stdout.write("exporting…\n")
        return 5

    assert chatty.main([], standalone_mode=False) == 5
    out, err = capsys.readouterr()
    assert (out, err) == ("", "exporting…\n")


def test_a_bug_is_no_failed_check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(names.KINDS, "targets", lambda: {}["gone"])
    status, out, err = _run(capsys, "list", "targets", "--json")
    assert status == 70
    assert json.loads(out)["error"]["code"] == "bug"
    assert "Traceback" in err


def test_progress_is_a_line_a_stage_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    with bars.Bars() as shown:
        with shown.stage("observe", 4):
            shown.advance()
            with shown.stage("fit"):
                shown.advance(2)
        shown.advance()  # outside every stage: nothing to move
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split()[0] for line in err.splitlines()] == ["fit", "observe"]


def test_progress_moves_the_innermost_bar() -> None:
    shown = bars.Bars()
    with shown.stage("observe", 4):
        shown.advance(3)
        assert shown.bars.tasks[-1].completed == 3
        with pytest.raises(ValueError, match="broken"), shown.stage("fit", 2):
            raise ValueError("broken")
        assert len(shown.bars.tasks) == 1
    assert shown.bars.tasks == []


def test_ctrl_c_is_status_130_and_leaves_nothing(package: Path, tmp_path: Path) -> None:
    """A real SIGINT while a real package is being written."""
    code = (
        "import sys, time, edgeq.packaging.directory as directory\n"
        "from edgeq.cli import main\n"
        "def wait(report):\n"
        "    sys.stderr.write('writing\\n'); sys.stderr.flush(); time.sleep(60)\n"
        "directory.html.render = wait\n"
        f"sys.exit(main(['package', {str(package)!r}, '-o', {str(tmp_path / 'new')!r}]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    assert process.stderr.readline() == "writing\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted: nothing was written" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "net.edgeq"]


def _edgeq(*words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "edgeq", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
def test_export_prints_one_report_and_leaves_a_package(tmp_path: Path) -> None:
    model, out = _model(tmp_path / "made"), tmp_path / "net.edgeq"
    process = _edgeq("export", str(model), "--synthetic", "--input", "x=1,3", "-o", str(out), "--json")
    shown, err = process.communicate(timeout=300)
    report = from_json(shown)
    assert process.returncode == (0 if report.passed else 1), err
    assert "validate" in err
    assert report.artifact is not None
    assert report.artifact.path == str(out / "model.onnx")
    assert report.artifact.size_bytes == (out / "model.onnx").stat().st_size
    assert {"latency_ratio", "size_ratio", "snr_db"} <= {check.name for check in report.checks}
    assert report.coverage is not None
    assert main(["package", str(out)]) == process.returncode
    assert "SYNTHETIC" in (out / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_ctrl_c_during_export_leaves_nothing(tmp_path: Path) -> None:
    model, out = _model(tmp_path / "made"), tmp_path / "net.edgeq"
    process = _edgeq("export", str(model), "--synthetic", "--input", "x=1,3", "-o", str(out))
    assert process.stderr is not None
    while not process.stderr.readline().startswith("read"):  # the first stage is done: the next ones are at work
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
