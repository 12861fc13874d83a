"""The form cpp on ARM: cross-built with CMake, run by QEMU with ONNX Runtime's own ARM library."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeq.packaging import PACKAGES, loader
from tests.devices import arm64
from tests.packaged import classifier, picture

pytestmark = pytest.mark.slow

COMPILER = "aarch64-linux-gnu-g++"


def test_the_program_answers_on_arm_as_python_does_on_x86(tmp_path: Path) -> None:
    lacking = arm64.missing() or ("" if shutil.which(COMPILER) else f"no {COMPILER}")
    if lacking:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"{lacking} (make devices browser)")
    root = arm64.build()
    out = PACKAGES["cpp"](classifier(tmp_path / "made"), tmp_path / "net")
    cross = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={COMPILER}"]
    subprocess.run(["cmake", "-S", out, "-B", out / "build", *cross], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", out / "build"], check=True, capture_output=True)
    pixels = picture()
    Image.fromarray(pixels).save(tmp_path / "one.ppm", "PPM")
    done = subprocess.run(
        ["qemu-aarch64-static", "-L", root, out / "build" / "net-run", out / "package", tmp_path / "one.ppm"],
        env={**os.environ, "EDGEQ_ONNXRUNTIME": str(arm64.library())}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, *rows = done.stdout.splitlines()
    assert first == "running 'cpu'"
    (expected,) = loader.pipeline(out / "package")(pixels)
    assert [row.split("\t")[1] for row in rows] == [row["label"] for row in expected]
    np.testing.assert_allclose([float(row.split("\t")[2]) for row in rows], [row["score"] for row in expected], 1e-4)
