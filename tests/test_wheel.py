"""The form python: a wheel that pip installs into an environment that has never seen edgeq."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from edgeq.cli import main
from edgeq.packaging import PACKAGES, loader, write_directory
from tests.packaged import classifier, files, picture


def test_a_wheel_holds_the_package(tmp_path: Path) -> None:
    folder = write_directory(classifier(tmp_path / "made"), tmp_path / "net.edgeq")
    out = PACKAGES["python"](classifier(tmp_path / "made"), tmp_path / "dist")
    (wheel,) = out.glob("net-*+*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = {name.removeprefix("net/package/"): archive.read(name) for name in archive.namelist()}
        assert {name: inside[name] for name in files(folder)} == files(folder)
        (record,) = (name for name in archive.namelist() if name.endswith("RECORD"))
        listed = [row.split(",")[0] for row in archive.read(record).decode().splitlines()]
    assert sorted(listed) == sorted(archive.namelist())
    assert main(["package", str(out), "-o", str(tmp_path / "back")]) == 0
    assert files(tmp_path / "back") == files(folder)
    again = PACKAGES["python"](classifier(tmp_path / "made"), out, force=True)
    assert [path.name for path in again.glob("*.whl")] == [wheel.name]


@pytest.mark.slow
def test_pip_installs_it_where_edgeq_is_not(tmp_path: Path) -> None:
    out = PACKAGES["python"](classifier(tmp_path / "made"), tmp_path / "dist")
    (wheel,) = out.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", str(wheel)], check=True)
    np.save(tmp_path / "picture.npy", picture())
    code = (
        "import json, sys, numpy as np, net; answer = net.pipeline()(np.load('picture.npy')); "
        "assert 'edgeq' not in sys.modules; print(json.dumps(answer))"
    )
    done = subprocess.run([python, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    folder = write_directory(classifier(tmp_path / "made"), tmp_path / "net.edgeq")
    assert json.loads(done.stdout) == loader.pipeline(folder)(picture())
    victim = next(tmp_path.glob("venv/lib/python*/site-packages/net/package/model.onnx"))
    whole = victim.read_bytes()
    victim.write_bytes(whole[:900] + bytes([whole[900] ^ 1]) + whole[901:])
    done = subprocess.run([python, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "model.onnx is altered" in done.stderr
