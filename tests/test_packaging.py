"""Packages: written whole or not at all, read back, and refused when a byte, a result or the machine is wrong."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeq.errors import ModelError, OutputError, PackageError, RuntimeUnavailableError
from edgeq.packaging import (
    PACKAGES,
    Golden,
    Package,
    check_free,
    loader,
    read_directory,
    verify_package,
    write_directory,
)
from edgeq.packaging.golden import GoldenWriter, read_golden
from edgeq.report.codec import from_json
from edgeq.report.record import Artifact, Check, Report, Saturation
from edgeq.run.preprocess import Preprocessing
from tests.packaged import files, reseal

NET = """
<ir_version: 10, opset_import: ["" : 21]>
net (float[N, 3] x) => (float[N, 2] y, int64[N] best)
<float[3, 2] w = {1, 2, 3, 4, 5, 6}> {
    y = MatMul (x, w)
    best = ArgMax <axis = 1, keepdims = 0> (y)
}
"""
X = np.array([[1, 2, 3], [-1, 0, 1]], np.float32)
Y = X @ np.array([[1, 2], [3, 4], [5, 6]], np.float32)
GOLDEN = Golden(
    ({"x": X}, {"x": X[:1]}), ({"y": Y, "best": Y.argmax(1)}, {"y": Y[:1], "best": Y[:1].argmax(1)}), {"y": 1e-4}
)
SESSION = {"session.intra_op.allow_spinning": "0"}
PREPROCESSING = Preprocessing(resize=24, crop=(20, 20), mean=(0.5,), std=(0.25,)).to_dict()
REPORT = Report(
    source={"name": "net"},
    target={"name": "cpu", "provider": "CPUExecutionProvider", "isa": [], "session": SESSION},
    recipe="balanced",
    artifact=Artifact("somewhere/else.onnx", "cpu", {"x": "f32[N,3]"}, {"y": "f32[N,2]"}, 123, "ab"),
    checks=(Check("size_ratio", 0.5),),
)


def _model(folder: Path, *, external: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    model = onnx.parser.parse_model(NET)
    weight = model.graph.initializer[0]
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight), "w"))  # raw: else never external
    path = folder / "net.onnx"
    onnx.save(model, path, save_as_external_data=bool(external), location=external or None, size_threshold=0)
    return path


@pytest.fixture
def package(tmp_path: Path) -> Package:
    model = _model(tmp_path / "made")
    return Package(model, REPORT, GOLDEN, PREPROCESSING, ("cat", "dog"), {"licence": "MIT"})


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_package_is_read_back_as_it_was(package: Package, tmp_path: Path) -> None:
    out = PACKAGES["dir"](package, tmp_path / "net.edgeq")
    back = read_directory(out)
    assert back.model == out / "model.onnx"
    assert back.report.artifact == replace(REPORT.artifact, path=str(out / "model.onnx"))  # type: ignore[type-var]
    assert replace(back.report, artifact=None) == replace(REPORT, artifact=None)
    assert (back.preprocessing, back.labels, back.metadata) == (PREPROCESSING, ("cat", "dog"), {"licence": "MIT"})
    assert back.golden.tolerances == GOLDEN.tolerances
    np.testing.assert_array_equal(back.golden.inputs[1]["x"], X[:1])
    assert [set(results) for results in back.golden.outputs] == [{"y"}, {"y"}]  # best has no tolerance
    again = write_directory(back, tmp_path / "again")
    same, first = files(again), files(out)
    assert same == first  # the same package is the same bytes


def test_the_manifest_tells_what_an_app_needs(package: Package, tmp_path: Path) -> None:
    out = write_directory(package, tmp_path / "net.edgeq")
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["versions"]["onnxruntime"] == ort.__version__
    (variant,) = manifest["variants"]
    assert variant["requires"] == {"onnxruntime": "1.24", "provider": "CPUExecutionProvider", "isa": [], "opset": 21}
    assert manifest["inputs"] == [{"name": "x", "dtype": "FLOAT", "shape": ["N", 3]}]
    assert manifest["outputs"][1] == {"name": "best", "dtype": "INT64", "shape": ["N"]}
    assert (variant["recipe"], variant["target"], variant["checks"]) == ("balanced", "cpu", {"size_ratio": 0.5})
    assert {row["name"]: row["licence"] for row in manifest["components"]}["model"] == "MIT"
    found = files(out)
    assert set(manifest["files"]) == set(found) - {"manifest.json", "manifest.sha256"}
    for name, facts in manifest["files"].items():
        assert facts["sha256"] == hashlib.sha256(found[name]).hexdigest()
        assert facts["bytes"] == len(found[name])
    checked = subprocess.run(
        ["sha256sum", "-c", "manifest.sha256"], cwd=out, capture_output=True, text=True, check=False
    )
    assert checked.stdout == "manifest.json: OK\n"
    assert from_json((out / "report.json").read_text()).artifact.path == "model.onnx"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("saturation", "isa"),
    [
        (None, ["avx2", "avx512_vnni|avx_vnni"]),
        (Saturation(9, 2, 64770), ["avx2", "avx512_vnni|avx_vnni"]),
        (Saturation(9, 0, 32640), ["avx2"]),
        (Saturation(0, 0, 0), ["avx2"]),
    ],
)
def test_a_certified_model_does_not_need_vnni(
    saturation: Saturation | None, isa: list[str], package: Package, tmp_path: Path
) -> None:
    target = {**REPORT.target, "isa": ["avx2", "avx512_vnni|avx_vnni"]}
    report = replace(REPORT, target=target, saturation=saturation)
    out = write_directory(replace(package, report=report), tmp_path / "net.edgeq")
    assert json.loads((out / "manifest.json").read_text())["variants"][0]["requires"]["isa"] == isa
    assert read_directory(out).report.saturation == saturation


def test_the_loader_runs_alone(package: Package, tmp_path: Path) -> None:
    """With the package moved, read-only reports left out and edgeq not importable."""
    out = write_directory(package, tmp_path / "net.edgeq").rename(tmp_path / "moved")
    (out / "report.html").unlink()
    code = (
        "import sys, load, numpy as np; session = load.load(threads=1);"
        "assert 'edgeq' not in sys.modules;"
        "assert session.get_session_options().intra_op_num_threads == 1;"
        "assert session.get_session_options().get_session_config_entry('session.intra_op.allow_spinning') == '0';"
        "sys.stdout.write(str(session.run(['y'], {'x': np.ones((1, 3), np.float32)})[0].tolist()))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(out)!r}); {code}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("[[9.0, 12.0]]", 0), done.stderr


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_is_seen(package: Package, tmp_path: Path, data: st.DataObject) -> None:
    out = tmp_path / "net.edgeq"
    if not out.exists():
        write_directory(package, out)
    victim = data.draw(st.sampled_from(sorted(files(out))))
    whole = (out / victim).read_bytes()
    position = data.draw(st.integers(0, len(whole) - 1))
    altered = bytearray(whole)
    altered[position] ^= 1 << data.draw(st.integers(0, 7))
    (out / victim).write_bytes(altered)
    try:
        with pytest.raises(PackageError) as caught:
            verify_package(out)
        assert str(out) in caught.value.message
        assert caught.value.hint
        with pytest.raises(ValueError, match="altered"):
            loader.load(out)
    finally:
        (out / victim).write_bytes(whole)
    verify_package(str(out))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"isa": ["avx512_vnni_from_the_future|neither_this"]}, "lacks avx512_vnni_from_the_future|neither_this"),
        ({"onnxruntime": "99.1"}, f"lacks onnxruntime >= 99.1, found {ort.__version__}"),
        ({"provider": "QNNExecutionProvider"}, "lacks QNNExecutionProvider"),
    ],
)
def test_what_the_machine_lacks_is_named(
    package: Package, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    out = write_directory(package, tmp_path / "net.edgeq")
    reseal(out, lambda manifest: manifest["variants"][0]["requires"].update(change))
    with pytest.raises(RuntimeUnavailableError) as caught:
        verify_package(out)
    assert message in caught.value.message
    assert caught.value.exit_status == 3


def test_other_results_are_refused(package: Package, tmp_path: Path) -> None:
    golden = replace(GOLDEN, outputs=({"y": Y + np.float32(2e-3)}, {"y": Y[:1]}))
    out = write_directory(replace(package, golden=golden), tmp_path / "net.edgeq")
    with pytest.raises(PackageError, match=r"'y' differs from golden sample 0 by more than 0\.0001"):
        verify_package(out)
    wide = replace(golden, tolerances={"y": 3e-3})
    verify_package(write_directory(replace(package, golden=wide), out, force=True))


def test_external_data_travels(tmp_path: Path) -> None:
    model = _model(tmp_path / "made", external="weights.bin")
    out = write_directory(Package(model, REPORT, GOLDEN), tmp_path / "net.edgeq")
    assert verify_package(out)["files"]["weights.bin"]["needed"]
    (out / "weights.bin").unlink()
    with pytest.raises(PackageError, match=r"weights\.bin"):
        verify_package(out)


@pytest.mark.parametrize("name", ["manifest.json", "golden.bin", "model.onnx"])
def test_external_data_must_not_replace_the_packagesfiles(tmp_path: Path, name: str) -> None:
    model = _model(tmp_path / "made", external=name)
    with pytest.raises(PackageError, match="name of a package's own file"):
        write_directory(Package(model, REPORT, GOLDEN), tmp_path / "net.edgeq")
    assert _names(tmp_path) == ["made"]


def test_only_packages_are_replaced_and_only_with_force(package: Package, tmp_path: Path) -> None:
    out = tmp_path / "net.edgeq"
    out.mkdir()
    write_directory(package, out)  # an empty folder is free
    with pytest.raises(OutputError, match="holds a package already") as caught:
        write_directory(package, out)
    assert "--force" in caught.value.hint
    before = files(out)
    write_directory(replace(package, labels=("a",)), out, force=True)
    assert files(out) != before
    precious = tmp_path / "photos"
    precious.mkdir()
    (precious / "one.jpg").write_bytes(b"1")
    for place in (precious, precious / "one.jpg"):
        with pytest.raises(OutputError, match="is no edgeq package"):
            write_directory(package, place, force=True)
    assert files(precious) == {"one.jpg": b"1"}
    assert _names(tmp_path) == ["made", "net.edgeq", "photos"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ModelError("cut off"), OSError(28, "No space left on device")])
def test_a_failure_leaves_what_was_there(
    package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    out = write_directory(package, tmp_path / "net.edgeq")
    before = files(out)

    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr("edgeq.packaging.directory.html.render", fail)  # late: most files are written by then
    with pytest.raises((KeyboardInterrupt, ModelError, OutputError)) as caught:
        write_directory(package, out, force=True)
    if isinstance(failure, OSError):
        assert caught.match("No space left on device")
    assert files(out) == before
    assert _names(tmp_path) == ["made", "net.edgeq"]


def test_places_that_can_not_be_written(package: Package, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "net.edgeq", Path("/proc/net.edgeq")):
        with pytest.raises(OutputError, match=f"can't write '{place.resolve()}'") as caught:
            write_directory(package, place)
        assert "--out" in caught.value.hint


def test_no_package_and_a_newer_one(package: Package, tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="is no edgeq package") as caught:
        verify_package(tmp_path)
    assert "edgeq export" in caught.value.hint
    out = write_directory(package, tmp_path / "net.edgeq")
    reseal(out, lambda manifest: manifest.update(schema=3))
    for ask in (verify_package, read_directory):
        with pytest.raises(PackageError, match="has schema 3, expected 2"):
            ask(out)


def test_check_free_asks_before_the_work(package: Package, tmp_path: Path) -> None:
    out = write_directory(package, tmp_path / "net.edgeq")
    check_free(tmp_path / "new")
    check_free(out, force=True)
    with pytest.raises(OutputError):
        check_free(out)


def test_text_outputs_are_not_compared(tmp_path: Path) -> None:
    text = np.array(["a", "b"], object)
    golden = Golden(({"x": X, "words": text},), ({"y": Y, "best": text},), {"y": 1e-4, "best": 0.0})
    assert golden.compared == {"y": 1e-4}
    facts = GoldenWriter(tmp_path / "golden.bin").add(golden)
    back = read_golden(tmp_path / "golden.bin", facts)
    assert back.inputs[0]["words"].tolist() == ["a", "b"]
    assert set(back.outputs[0]) == {"y"}
