"""Updates: what changed and nothing else, applied whole or not at all, whatever kills the process."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edgeq
from edgeq.cli import main
from edgeq.errors import OutputError, PackageError
from edgeq.ir import io
from edgeq.packaging import Package, apply_delta, combined, create_key, read_public, sign, verify_package, write_delta
from edgeq.packaging import write_directory as write
from edgeq.packaging.delta import _index, _parts
from tests.packaged import classifier, files
from tests.zoo import ZOO
from tests.zoo.packages import float_model


def _louder(model: ir.Model) -> None:
    """Another last layer."""
    weight = model.graph.initializers["w4"]
    weight.const_value = ir.tensor(weight.const_value.numpy() * np.float32(1.25), name="w4")  # type: ignore[union-attr]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Old and new package, and the delta between them."""
    old = write(classifier(tmp_path / "made"), tmp_path / "old.edgeq")
    new = write(classifier(tmp_path / "changed", change=_louder), tmp_path / "new.edgeq")
    write_delta(old, new, tmp_path / "new.delta")
    return old, new, tmp_path / "new.delta"


@settings(max_examples=200)
@given(data=st.data())
def test_parts_make_the_new_bytes_from_the_old(data: st.DataObject) -> None:
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    old = {name: random.integers(0, 4, data.draw(st.integers(0, 3000)), dtype=np.uint8) for name in "ab"}
    pieces = [np.zeros(0, np.uint8)]
    for _ in range(data.draw(st.integers(0, 6))):
        source = old[data.draw(st.sampled_from("ab"))]
        start, stop = sorted((data.draw(st.integers(0, source.size)), data.draw(st.integers(0, source.size))))
        fresh = random.integers(0, 256, data.draw(st.integers(0, 300)), dtype=np.uint8)
        pieces += [source[start:stop], fresh, np.zeros(data.draw(st.integers(0, 300)), np.uint8)]
    new = np.concatenate(pieces)
    parts = [*_parts(new, _index(old))]
    made = [new[part] if isinstance(part, slice) else old[part[0]][part[1] : part[1] + part[2]] for part in parts]
    np.testing.assert_array_equal(np.concatenate([np.zeros(0, np.uint8), *made]), new)


def test_what_is_equal_is_found_wherever_it_lies() -> None:
    random = np.random.default_rng(0)
    tensors = random.integers(0, 256, (8, 9000), dtype=np.uint8)
    changed = tensors.copy()
    changed[3] = random.integers(0, 256, 9000)
    old = {"model": np.concatenate([b for row in tensors for b in (np.arange(37, dtype=np.uint8), row)])}
    new = np.concatenate([b for row in changed[::-1] for b in (np.arange(53, dtype=np.uint8), row)])
    sent = sum(part.stop - part.start for part in _parts(new, _index(old)) if isinstance(part, slice))
    assert 9000 <= sent <= 9000 + 8 * 53


def test_an_update_makes_the_new_package(pair: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    old, new, delta = pair
    wanted = files(new)
    assert delta.stat().st_size < 0.2 * sum(map(len, wanted.values()))
    assert main(["delta", "apply", str(delta), str(old)]) == 0
    assert "updated" in capsys.readouterr().out
    assert files(old) == wanted
    assert not apply_delta(delta, old)  # it is there already
    assert sorted(path.name for path in old.parent.iterdir() if path.name.startswith(".")) == []


def test_an_update_is_applied_without_edgeq(pair: tuple[Path, Path, Path]) -> None:
    old, new, delta = pair
    done = subprocess.run([sys.executable, "-I", str(delta), str(old)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert files(old) == files(new)
    done = subprocess.run([sys.executable, "-I", str(delta)], capture_output=True, text=True, check=False)
    assert "usage: python" in done.stderr


def test_what_an_app_left_out_stays_out(pair: tuple[Path, Path, Path]) -> None:
    old, new, delta = pair
    (old / "report.html").unlink()
    apply_delta(delta, old)
    assert files(old) == {name: data for name, data in files(new).items() if name != "report.html"}
    verify_package(old)


def test_other_packages_and_damaged_deltas_are_refused(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    old, new, delta = pair
    third = write(classifier(tmp_path / "third", change=lambda model: _louder(model) or _louder(model)), tmp_path / "3")
    before = files(old)
    with pytest.raises(PackageError, match="updates the package"):
        apply_delta(delta, third)
    whole = (old / "model.onnx").read_bytes()
    (old / "model.onnx").write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    with pytest.raises(PackageError, match=r"model\.onnx comes out wrong"):
        apply_delta(delta, old)
    (old / "model.onnx").write_bytes(whole)
    _rewritten(delta, tmp_path / "forged", lambda plan: plan["files"]["load.py"].update(sha256="0" * 64))
    with pytest.raises(PackageError, match=r"load\.py comes out wrong"):
        apply_delta(tmp_path / "forged", old)
    _rewritten(delta, tmp_path / "forged", lambda plan: plan.update(new="0" * 64))
    with pytest.raises(PackageError, match="makes another manifest than it says"):
        apply_delta(tmp_path / "forged", old)
    (tmp_path / "cut").write_bytes(delta.read_bytes()[:-100])
    for path in (tmp_path / "cut", tmp_path / "none"):
        with pytest.raises((PackageError, OutputError), match="not updated"):
            apply_delta(path, old)
    assert files(old) == before
    with pytest.raises(PackageError, match="is no edgeq package"):
        write_delta(old, tmp_path / "made", tmp_path / "x.delta")
    with pytest.raises(OutputError, match="is no delta"):
        write_delta(old, new, old / "load.py")


def _rewritten(delta: Path, out: Path, change: Any) -> None:
    with zipfile.ZipFile(delta) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name == "delta.json":
                plan = json.loads(data)
                change(plan)
                data = json.dumps(plan).encode()
            target.writestr(name, data)


def test_a_forged_update_needs_the_trusted_key(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    old, new, delta = pair
    trusted = read_public(create_key(tmp_path / "team.pem"))
    before = files(old)
    with pytest.raises(PackageError, match="isn't signed"):
        apply_delta(delta, old, trust=trusted)
    assert files(old) == before
    sign(new, tmp_path / "team.pem")
    write_delta(old, new, delta)
    assert apply_delta(delta, old, trust=trusted)
    verify_package(old, trust=trusted)


def test_a_new_package_that_does_not_run_is_not_installed(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    old, _, _ = pair
    package: Package = classifier(tmp_path / "wrong", change=_louder)
    outputs = tuple({"logits": one["logits"] + np.float32(1)} for one in package.golden.outputs)
    wrong = write(
        Package(package.model, package.report, type(package.golden)(package.golden.inputs, outputs, {"logits": 1e-3})),
        tmp_path / "wrong.edgeq",
    )
    write_delta(old, wrong, tmp_path / "wrong.delta")
    before = files(old)
    with pytest.raises(PackageError, match="differs from golden sample 0"):
        apply_delta(tmp_path / "wrong.delta", old)
    assert files(old) == before


def test_variants_are_updated_together(tmp_path: Path) -> None:
    plain, changed = classifier(tmp_path / "made"), classifier(tmp_path / "changed", change=_louder)
    old = write(combined([plain, plain]), tmp_path / "old.edgeq")
    new = write(combined([changed, plain]), tmp_path / "new.edgeq")
    sizes = write_delta(old, new, tmp_path / "new.delta")
    assert sizes["delta"] < 0.2 * sizes["package"]
    apply_delta(tmp_path / "new.delta", old)
    assert files(old) == files(new)


@pytest.mark.slow
def test_kill_at_any_moment_leaves_a_package_that_works(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    old, new, delta = pair
    before, after = files(old), files(new)
    started = time.perf_counter()
    trial = shutil.copytree(old, tmp_path / "trial.edgeq")
    subprocess.run([sys.executable, str(delta), str(trial)], check=True)
    took = time.perf_counter() - started
    seen = []
    for step in range(12):
        place = shutil.copytree(old, tmp_path / f"{step}" / "net.edgeq")
        process = subprocess.Popen([sys.executable, str(delta), str(place)])
        time.sleep(took * (step + 1) / 10)
        process.kill()
        process.wait()
        found = files(place)
        assert found in (before, after), step
        verify_package(place)
        seen.append(found == after)
        apply_delta(delta, place)  # what the killed one left behind is in nobody's way
        assert files(place) == after
        assert [path.name for path in place.parent.iterdir()] == ["net.edgeq"]
    assert {True, False} == set(seen)


def test_what_an_update_killed_after_the_exchange_left_goes(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    old, new, delta = pair
    place = shutil.copytree(new, tmp_path / "net.edgeq")
    shutil.copytree(old, tmp_path / ".net.edgeq.update.abc")
    assert not apply_delta(delta, place)
    assert [path.name for path in tmp_path.iterdir() if "net.edgeq" in path.name] == ["net.edgeq"]


@pytest.mark.zoo
def test_two_exports_that_differ_in_a_few_layers_share_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MobileNetV2, and the same with three layers fine-tuned: what is sent is at most a fifth of the package."""
    for part in ("CALIBRATION", "EVALUATION"):
        monkeypatch.setenv(f"EDGEQ_ZOO_{part}", "16")
    entry = ZOO["MBV2"]
    model = io.read(float_model("MBV2"))
    io.write(model, tmp_path / "old.onnx")
    layers = [node for node in model.graph if node.op_type == "Conv"]
    random = np.random.default_rng(0)
    for node in layers[20:23]:
        weight = node.inputs[1]
        assert weight is not None and weight.const_value is not None
        values = weight.const_value.numpy()
        tuned = values + random.standard_normal(values.shape).astype(np.float32) * values.std() * np.float32(0.01)
        weight.const_value = ir.tensor(tuned, name=weight.name)
    io.write(model, tmp_path / "new.onnx")
    for name in ("old", "new"):
        edgeq.export(
            tmp_path / f"{name}.onnx", calibration=entry.calibration, evaluation=entry.evaluation, threads=[1],
            out=tmp_path / f"{name}.edgeq",
        )  # fmt: skip
    old, new = tmp_path / "old.edgeq", tmp_path / "new.edgeq"
    sizes = write_delta(old, new, tmp_path / "new.delta")
    assert sizes["delta"] <= 0.2 * sizes["package"], sizes
    wanted = files(new)
    apply_delta(tmp_path / "new.delta", old)
    assert files(old) == wanted
