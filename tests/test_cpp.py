"""The form cpp: configured with CMake, built without warnings and run against a real ONNX Runtime."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from edgeq.packaging import PACKAGES, combined, loader, verify_package
from edgeq.packaging.cpp import literal
from edgeq.run.preprocess import Preprocessing
from tests.packaged import classifier, picture
from tests.tabled import needs_library, packaged

RUNTIME = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))


def _build(out: Path) -> Path:
    """The program of a project."""
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"no {tool}: make browser")
    configure = ["cmake", "-S", str(out), "-B", str(out / "build"), "-DCMAKE_CXX_FLAGS=-Werror -O1"]
    for command in (configure, ["cmake", "--build", str(out / "build")]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return out / "build" / "net-run"


def _run(program: Path, *words: object, runtime: Path = RUNTIME, **environment: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [program, *map(str, words)], capture_output=True, text=True, check=False,
        env={**os.environ, "EDGEQ_ONNXRUNTIME": str(runtime), **environment},
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("cpp")
    out = PACKAGES["cpp"](classifier(folder / "made"), folder / "net")
    return out, _build(out)


def _ppm(path: Path, **how: Any) -> tuple[Path, Any]:
    pixels = picture(**how)
    Image.fromarray(pixels).save(path, "PPM")
    return path, pixels


@pytest.mark.slow
def test_the_program_answers_as_python_does(built: tuple[Path, Path], tmp_path: Path) -> None:
    out, program = built
    shown, pixels = _ppm(tmp_path / "one.ppm")
    status, text, told = _run(program, out / "package", shown)
    assert (status, told) == (0, "")
    first, *rows = text.splitlines()
    assert first == "running 'cpu'"
    (expected,) = loader.pipeline(out / "package")(pixels)
    assert [row.split("\t")[1] for row in rows] == [row["label"] for row in expected]
    np.testing.assert_allclose([float(row.split("\t")[2]) for row in rows], [row["score"] for row in expected], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["model.onnx", "golden.bin", "manifest.json", "load.py"])
def test_a_flipped_byte_is_refused(built: tuple[Path, Path], tmp_path: Path, victim: str) -> None:
    out, program = built
    copy = shutil.copytree(out / "package", tmp_path / "package")
    whole = (copy / victim).read_bytes()
    (copy / victim).write_bytes(whole[:400] + bytes([whole[400] ^ 1]) + whole[401:])
    status, _, told = _run(program, copy)
    assert status == 1
    assert told.startswith(f"refused: {copy / victim} is altered")


@pytest.mark.slow
def test_what_is_missing_is_named(built: tuple[Path, Path], tmp_path: Path) -> None:
    out, program = built
    copy = shutil.copytree(out / "package", tmp_path / "package")
    (copy / "report.html").unlink()  # is for people
    assert _run(program, copy)[0] == 0
    (copy / "golden.bin").unlink()
    assert f"{copy / 'golden.bin'} can't be read" in _run(program, copy)[2]
    assert "can't load ONNX Runtime" in _run(program, copy, runtime=tmp_path / "none.so")[2]
    assert "usage" in _run(program)[2]
    (tmp_path / "cut.ppm").write_bytes(b"P6 4 4 255 abc")
    assert "is cut off" in _run(program, out / "package", tmp_path / "cut.ppm")[2]


@pytest.mark.slow
def test_a_first_start_is_remembered(built: tuple[Path, Path], tmp_path: Path) -> None:
    out, program = built
    state = {"EDGEQ_STATE": str(tmp_path)}
    assert _run(program, out / "package", **state)[0] == 0
    (kept,) = (tmp_path / "edgeq-loaded").iterdir()
    before = kept.stat().st_mtime_ns
    assert _run(program, out / "package", **state)[0] == 0
    assert kept.stat().st_mtime_ns == before  # the second start checked nothing, so wrote nothing
    os.utime(out / "package" / "model.onnx")
    assert _run(program, out / "package", **state)[0] == 0
    assert kept.stat().st_mtime_ns > before


@pytest.mark.slow
def test_variants_fall_back_and_wrong_results_are_refused(tmp_path: Path) -> None:
    package = classifier(tmp_path / "made")
    rows = [
        replace(package, report=replace(package.report, target={**package.report.target, "name": name, "isa": isa}))
        for name, isa in (("future", ["no_such_flag|nor_this"]), ("any", []))
    ]
    outputs = tuple({"logits": one["logits"] + np.float32(1)} for one in package.golden.outputs)
    wrong = replace(package, golden=replace(package.golden, outputs=outputs))
    out = PACKAGES["cpp"](combined([*rows, wrong]), tmp_path / "net")
    program = _build(out)
    status, text, told = _run(program, out / "package")
    assert (status, text) == (0, "running 'any'\n")
    assert "'future' isn't used: this machine lacks no_such_flag" in told
    assert "'cpu' isn't used: 'logits' differs from golden sample 0 by more than 0.001" in told


PROBE = """
#include <cstring>
#include <fstream>
#include <iostream>
#include "edgeq.hpp"
int main(int, char** words) {  // height width pixels.bin -> values.bin; then the digest of pixels.bin
  std::ifstream file(words[3], std::ios::binary);
  edgeq::Picture picture{std::stoi(words[1]), std::stoi(words[2]), {std::istreambuf_iterator<char>(file), {}}};
  edgeq::Tensor made = edgeq::preprocess(picture);
  std::ofstream(words[4], std::ios::binary).write(reinterpret_cast<char*>(made.bytes.data()), made.bytes.size());
  std::cout << edgeq::sha256(picture.pixels.data(), picture.pixels.size());
}
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        Preprocessing(resize=13, interpolation="bicubic", mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.1)),
        Preprocessing(resize=40, crop=(12, 11), interpolation="lanczos", channels="BGR", layout="NHWC"),
        Preprocessing(resize=(17, 9), crop=(30, 31), interpolation="bilinear", channels="L"),
        Preprocessing(resize=11, interpolation="box", scale=1.0, channels="BGR", layout="NHWC", dtype="uint8"),
    ],
    ids=lambda how: how.interpolation,
)
def test_pictures_and_digests_are_the_same_to_the_bit(tmp_path: Path, how: Preprocessing) -> None:
    package = replace(classifier(tmp_path / "made"), preprocessing=how.to_dict())
    out = PACKAGES["cpp"](package, tmp_path / "net")
    (out / "probe.cpp").write_text(PROBE)
    sources = [str(out / name) for name in ("probe.cpp", "pictures.cpp", "sha256.cpp")]
    compiler = ["c++", "-std=c++17", "-O2", "-ffp-contract=off", f"-I{out}", "-o", str(tmp_path / "probe")]
    subprocess.run([*compiler, *sources], check=True)
    for height, width in ((23, 31), (40, 7), (1, 1)):
        pixels = picture(height, width, seed=height)
        (tmp_path / "pixels").write_bytes(pixels.tobytes())
        done = subprocess.run(
            [tmp_path / "probe", str(height), str(width), tmp_path / "pixels", tmp_path / "values"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout == hashlib.sha256(pixels.tobytes()).hexdigest()
        expected = loader.preprocess(pixels, how.to_dict())
        np.testing.assert_array_equal(
            np.frombuffer((tmp_path / "values").read_bytes(), how.dtype), expected.ravel(), str(how)
        )


def test_tables_are_literals() -> None:
    assert literal([True, 'a"\\', [1, -2], [0.1, 1e-300], []]) == r'{true, "a\"\\", {1, -2}, {0.1, 1e-300}, {}}'


def test_the_package_inside_is_whole(tmp_path: Path) -> None:
    out = PACKAGES["cpp"](classifier(tmp_path / "made"), tmp_path / "net")
    verify_package(out)
    assert "@" not in "".join(path.read_text() for path in out.glob("*") if path.suffix in (".cpp", ".hpp", ".txt"))


@pytest.mark.slow
def test_kernels_of_the_package_run(tmp_path: Path) -> None:
    """Its golden run is what the kernel gives, not the function that stands for it."""
    out = PACKAGES["cpp"](packaged(tmp_path / "made", needs_library()), tmp_path / "net")
    program = _build(out)
    assert _run(program, out / "package") == (0, "running 'cpu'\n", "")
    (library,) = (out / "package").glob("kernels-*.so")
    library.unlink()
    status, _, told = _run(program, out / "package", EDGEQ_STATE=str(tmp_path / "state"))
    assert status == 1
    assert "'o' differs from golden sample 0" in told
