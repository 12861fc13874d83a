"""The form android: its structure, and its Kotlin compiled and run on a JVM with a real ONNX Runtime behind it.

What touches Android itself (AndroidModel.kt: assets, bitmaps, ONNX Runtime's Java classes) isn't compiled: no registry
has these. All else is the very code that ships.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgeq.packaging import PACKAGES, loader, verify_package
from edgeq.packaging.android import literal, required_operators
from tests.packaged import classifier, picture

SOURCES = "src/main/kotlin/edgeq"
STDLIB = Path("/usr/share/java/kotlin-stdlib.jar")

# Runs a model in Python for the JVM: MODEL FOLDER NAME TYPE SHAPE; outputs become files, their types are printed.
BRIDGE = """
import sys, numpy as np, onnxruntime as ort
model, folder, name, kind, shape = sys.argv[1:]
session = ort.InferenceSession(model)
given = np.fromfile(f"{folder}/{name}", kind).reshape([int(side) for side in shape.split(",")])
for item, made in zip(session.get_outputs(), session.run(None, {name: given})):
    made.tofile(f"{folder}/{item.name}")
    print(item.name, made.dtype, ",".join(map(str, made.shape)))
"""
PROBE = """
package edgeq

import java.io.File

class Bridge(private val python: String, private val script: String, private val folder: File) : Runtime {
    override val version = "a bridge"
    override fun open(model: File, provider: String, config: Map<String, String>) = object : Session {
        override fun run(inputs: Map<String, Tensor>): Map<String, Tensor> {
            val (name, tensor) = inputs.entries.single().toPair()
            File(folder, name).writeBytes(tensor.bytes)
            val process = ProcessBuilder(
                python, script, model.path, folder.path, name, tensor.type, tensor.shape.joinToString(",")
            ).redirectError(ProcessBuilder.Redirect.INHERIT).start()
            val lines = process.inputStream.bufferedReader().readLines()
            check(process.waitFor() == 0) { "the bridge failed" }
            return lines.map { it.split(" ") }.associate { (output, type, shape) ->
                output to Tensor(type, shape.split(",").map(String::toLong), File(folder, output).readBytes())
            }
        }
    }
}

fun main(words: Array<String>) {
    val (place, python, script, folder, state) = words
    try {
        val model = Model(File(place), Bridge(python, script, File(folder)), File(state))
        println("running ${model.variant}")
        if (words.size > 5) {
            val made = Picture(words[6].toInt(), words[7].toInt(), File(words[5]).readBytes())
            File(folder, "values").writeBytes(preprocess(made, Contents.preprocessing!!).bytes)
            for (row in model.answer(made)) println("${row.label}\\t${row.score}")
        }
    } catch (fault: Refused) {
        println("refused: ${fault.message}")
    }
}
"""


def test_the_module_is_a_gradle_library(tmp_path: Path) -> None:
    out = PACKAGES["android"](classifier(tmp_path / "made"), tmp_path / "net")
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    kotlin = {f"{SOURCES}/{name}.kt" for name in ("AndroidModel", "Contents", "Model", "Pictures", "Records")}
    assert {"build.gradle.kts", "src/main/AndroidManifest.xml", "required_operators.config", *kotlin} <= names
    assert {"src/main/assets/edgeq/net/model.onnx", "src/main/assets/edgeq/net/manifest.json"} <= names
    tables = (out / SOURCES / "Contents.kt").read_text()
    manifest = verify_package(out)
    for facts in manifest["files"].values():
        assert facts["sha256"] in tables
    assert (out / "required_operators.config").read_text().splitlines()[1:] == [
        "ai.onnx;21;Add,Clip,Conv,Flatten,Gemm,GlobalAveragePool,MaxPool,Relu"
    ]
    assert 'namespace = "edgeq.net"' in (out / "build.gradle.kts").read_text()
    assert "@" not in (out / "build.gradle.kts").read_text()


def test_operators_are_those_of_all_models(tmp_path: Path) -> None:
    one = classifier(tmp_path / "one").model
    assert required_operators([one, one]) == required_operators([one])


def test_tables_are_literals() -> None:
    assert literal({"a$b": [True, 1, 0.5, 'x"']}) == r'mapOf("a\$b" to listOf(true, 1, 0.5, "x\""))'


@pytest.mark.slow
@pytest.mark.parametrize("pixels", [False, True])
def test_the_kotlin_checks_and_answers_as_python_does(tmp_path: Path, pixels: bool) -> None:
    if shutil.which("kotlinc") is None or shutil.which("java") is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("no kotlinc: make browser")
    out = PACKAGES["android"](classifier(tmp_path / "made", pixels=pixels), tmp_path / "net")
    (tmp_path / "bridge.py").write_text(BRIDGE)
    (tmp_path / "Probe.kt").write_text(PROBE)
    sources = [str(out / SOURCES / f"{name}.kt") for name in ("Contents", "Model", "Pictures", "Records")]
    compiled = subprocess.run(
        ["kotlinc", "-Werror", *sources, str(tmp_path / "Probe.kt"), "-d", str(tmp_path / "probe.jar")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert compiled.returncode == 0, compiled.stdout + compiled.stderr
    place = out / json.loads((out / "edgeq-form.json").read_text())["package"]
    (tmp_path / "exchange").mkdir()
    shown = picture()
    (tmp_path / "pixels").write_bytes(shown.tobytes())

    def run(*words: object) -> list[str]:
        classes = f"{tmp_path / 'probe.jar'}:{STDLIB}"
        given = (place, sys.executable, tmp_path / "bridge.py", tmp_path / "exchange", tmp_path / "state", *words)
        done = subprocess.run(
            ["java", "-cp", classes, "edgeq.ProbeKt", *map(str, given)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    first, *rows = run(tmp_path / "pixels", *shown.shape[:2])
    assert first == "running cpu"
    (expected,) = loader.pipeline(place)(shown)
    assert [row.split("\t")[0] for row in rows] == [row["label"] for row in expected]
    np.testing.assert_allclose([float(row.split("\t")[1]) for row in rows], [row["score"] for row in expected], 1e-6)
    made = loader.preprocess(shown, dict(classifier(tmp_path / "x", pixels=pixels).preprocessing))
    assert made.dtype == (np.uint8 if pixels else np.float32)
    np.testing.assert_array_equal(np.fromfile(tmp_path / "exchange" / "values", made.dtype), made.ravel())
    assert len(list((tmp_path / "state").iterdir())) == 1
    whole = (place / "golden.bin").read_bytes()
    (place / "golden.bin").write_bytes(whole[:70] + bytes([whole[70] ^ 1]) + whole[71:])
    assert run() == ["refused: golden.bin is altered: its sha256 isn't the app's"]
