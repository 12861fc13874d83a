"""Every mistake of the table, made through the command line: the exit status, what the message names, what to try."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgeq.cli import main
from edgeq.ir import io
from tests import small_net
from tests.graphs import graph, normal

Place = Callable[[Path], list[str]]


@dataclass(frozen=True)
class Mistake:
    """``words`` makes it in a folder that holds net.onnx and calibration.npz. ``named``: parts of the message."""

    words: Place
    code: str
    named: tuple[str, ...]
    hint: str
    status: int = 2
    files: Callable[[Path], object] = lambda _: None


def export(*more: str, model: str = "net.onnx", data: str = "calibration.npz") -> Place:
    """``edgeq export MODEL -c DATA …`` with paths in the folder; a word that starts with ``./`` is one."""

    def words(folder: Path) -> list[str]:
        placed = [str(folder / word[2:]) if word.startswith("./") else word for word in more]
        out = [] if "-o" in more else ["-o", str(folder / "out.edgeq")]
        given = ["-c", str(folder / data)] if data else []
        return ["export", str(folder / model), *given, *out, "-q", *placed]

    return words


def _unknown_op(folder: Path) -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 21]> g (float[N,3] x) => (float[N,3] y) { y = Frobnicate(x) }'
    )
    onnx.save(proto, folder / "odd.onnx")


def _unknown_domain(folder: Path) -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 21, "acme" : 1]> g (float[N,3] x) => (float[N,3] y) { y = acme.Fuse(x) }'
    )
    onnx.save(proto, folder / "odd.onnx")


def _external(location: str) -> Callable[[Path], object]:
    def files(folder: Path) -> None:
        model = graph("(float[5,64] x) => (float[5,64] y) { y = MatMul(x, w) }", {"w": normal(64, 64)})
        proto = ir.to_proto(model)
        (tensor,) = proto.graph.initializer
        onnx.external_data_helper.set_external_data(tensor, location)
        tensor.ClearField("raw_data")
        (folder / "external.onnx").write_bytes(proto.SerializeToString())

    return files


def _truncated(folder: Path) -> None:
    whole = (folder / "net.onnx").read_bytes()
    (folder / "cut.onnx").write_bytes(whole[: len(whole) // 2])


def _samples(**arrays: np.ndarray) -> Callable[[Path], object]:
    return lambda folder: np.savez(folder / "bad.npz", **arrays)


def _precious(folder: Path) -> None:
    (folder / "precious").mkdir()
    (folder / "precious" / "thesis.txt").write_text("x")


def _text(name: str, text: str) -> Callable[[Path], object]:
    def files(folder: Path) -> None:
        (folder / name).write_text(text)

    return files


def _spoiled(value: float) -> np.ndarray:
    images = small_net.images(6, seed=4)
    images[3, 1, 2, 2] = value
    return images


TABLE: dict[str, Mistake] = {
    "missing model": Mistake(
        export(model="nte.onnx"),
        "model",
        ("no model file", "nte.onnx"),
        "check the path; for torch use pkg.module:callable",
    ),
    "a folder as model": Mistake(
        export(model="."), "model", ("is a folder, not a model",), "name the .onnx or .pt2 file in it"
    ),
    "no model at all": Mistake(
        export(model="notes.txt"),
        "model",
        ("notes.txt", "holds no graph"),
        "export or copy it again",
        files=_text("notes.txt", ""),
    ),
    "truncated model": Mistake(
        export(model="cut.onnx"),
        "model",
        ("cut.onnx", "is not a complete ONNX file"),
        "export or copy it again",
        files=_truncated,
    ),
    "unknown op": Mistake(export(model="odd.onnx"), "model", ("Frobnicate",), "", files=_unknown_op),
    "unknown domain": Mistake(export(model="odd.onnx"), "model", ("acme",), "", files=_unknown_domain),
    "external data missing": Mistake(
        export(model="external.onnx"),
        "model",
        ("external data 'weights.bin' of weight 'w' is missing beside",),
        "copy the data file together with the model",
        files=_external("weights.bin"),
    ),
    "external data outside": Mistake(
        export(model="external.onnx"),
        "model",
        ("weight 'w'", "points outside its folder: '../weights.bin'"),
        "keep external data beside the model",
        files=_external("../weights.bin"),
    ),
    "wrong shape": Mistake(
        export(data="bad.npz"),
        "samples",
        ("bad.npz", "image"),
        "",
        files=_samples(image=np.zeros((4, 3, 16, 16), np.float32)),
    ),
    "wrong rank": Mistake(
        export(data="bad.npz"), "samples", ("bad.npz", "image"), "", files=_samples(image=np.zeros((4, 3), np.float32))
    ),
    "wrong key": Mistake(
        export(data="bad.npz"),
        "samples",
        ("no key 'image'; it has 'imgae'", "the model's inputs are 'image'"),
        "did you mean 'imgae'?",
        files=_samples(imgae=small_net.images(4, seed=4)),
    ),
    "wrong dtype": Mistake(
        export(data="bad.npz"),
        "samples",
        ("bad.npz", "image"),
        "",
        files=_samples(image=np.full((4, 3, 32, 32), "a")),
    ),
    "NaN in calibration": Mistake(
        export(data="bad.npz"),
        "samples",
        ("bad.npz, sample 3, input 'image' holds nan at [0, 1, 2, 2]",),
        "",
        files=_samples(image=_spoiled(np.nan)),
    ),
    "infinity in calibration": Mistake(
        export(data="bad.npz"),
        "samples",
        ("bad.npz, sample 3, input 'image' holds inf at [0, 1, 2, 2]",),
        "",
        files=_samples(image=_spoiled(np.inf)),
    ),
    "empty folder": Mistake(
        export(data="empty"), "samples", ("empty",), "", files=lambda folder: (folder / "empty").mkdir()
    ),
    "no samples in the file": Mistake(
        export(data="bad.npz"), "samples", ("bad.npz",), "", files=_samples(image=np.zeros((0, 3, 32, 32), np.float32))
    ),
    "one sample": Mistake(
        export(data="bad.npz"),
        "samples",
        ("1 sample can't be split into calibration and evaluation",),
        "give more samples, or evaluation data of its own with -e",
        files=_samples(image=small_net.images(1, seed=4)),
    ),
    "no such samples": Mistake(
        export(data="calibratoin.npz"),
        "samples",
        ("no samples at", "no such file or folder"),
        "did you mean 'calibration.npz'?",
    ),
    "no calibration data": Mistake(
        export(data=""),
        "usage",
        ("no calibration data given",),
        "give real samples with -c, or --synthetic for random ones",
    ),
    "random data unasked": Mistake(
        lambda folder: ["export", str(folder / "net.onnx"), "-c", "synthetic:8", "-o", str(folder / "out.edgeq")],
        "usage",
        ("calibration data 'synthetic:8' is random",),
        "add --synthetic if random data is really meant",
    ),
    "random evaluation unasked": Mistake(
        export("-e", "synthetic:8"),
        "usage",
        ("evaluation data 'synthetic:8' is random",),
        "add --synthetic if random data is really meant",
    ),
    "unknown target": Mistake(
        export("-t", "cpu-x64-vini"), "target", ("cpu-x64-vini",), "did you mean 'cpu-x64-vnni'?"
    ),
    "unknown key of a target": Mistake(
        export("-t", "./own.toml"),
        "target",
        ("own.toml", "activatoins"),
        "did you mean 'activations'?",
        files=_text("own.toml", 'extends = "cpu-x64-vnni"\nactivatoins = "i8/tensor"\n'),
    ),
    "unknown recipe": Mistake(
        export("-r", "balancd"), "recipe", ("no step or preset 'balancd'",), "did you mean 'balanced'?"
    ),
    "unknown step": Mistake(
        export("-r", "canonicalise; quantize"),
        "recipe",
        ("no step or preset 'canonicalise'",),
        "did you mean 'canonicalize'?",
    ),
    "unknown option": Mistake(
        export("-r", "quantize(range=mse)"),
        "recipe",
        ("step 'quantize' has no option 'range'",),
        "did you mean 'ranges'?",
    ),
    "unknown method": Mistake(
        export("-r", "quantize(ranges=mes)"), "recipe", ("quantize(ranges=mes)", "not a method"), "mse"
    ),
    "a step behind quantize": Mistake(
        export("-r", "quantize; canonicalize"),
        "recipe",
        ("'canonicalize' stands behind quantize",),
        "put quantize last",
    ),
    "unknown metric": Mistake(export("--metric", "cosin"), "usage", ("cosin",), "did you mean 'cosine'?"),
    "metric without labels": Mistake(
        export("--metric", "top1"),
        "samples",
        ("metric 'top1' needs labels",),
        "choose agreement_top1, which needs none",
    ),
    "limit on what isn't measured": Mistake(
        export("--max-drop", "0.01"),
        "usage",
        ("limit on 'top1_drop', which isn't measured here",),
        "give labels with -e",
    ),
    "unknown form": Mistake(export("--form", "dri"), "usage", ("unknown package form 'dri'",), "did you mean 'dir'?"),
    "unknown input": Mistake(
        export("--input", "imgae=1,3,32,32"), "usage", ("the model has no input 'imgae'",), "did you mean 'image'?"
    ),
    "unreadable shape": Mistake(
        export("--input", "image=1x3"), "usage", ("can't read input shape 'image=1x3'",), "write NAME=1,3,224,224"
    ),
    "impossible shape": Mistake(
        export("--input", "image=1,4,32,32"), "usage", ("input 'image' has size 3 on axis 1",), "its shape is"
    ),
    "output inside a file": Mistake(
        export("-o", "./net.onnx/out"), "output", ("can't write", "net.onnx"), "choose another --out or free space"
    ),
    "output in a read-only place": Mistake(export("-o", "/proc/out.edgeq"), "output", ("/proc",), ""),
    "output in the way": Mistake(
        export("-o", "./precious"),
        "output",
        ("precious", "is no edgeq package"),
        "choose another --out",
        files=_precious,
    ),
    "dump inside a file": Mistake(export("--dump", "./net.onnx/d"), "output", ("net.onnx",), "free space"),
    "validate what is no package": Mistake(
        lambda folder: ["validate", str(folder), "--synthetic"], "package", ("is no edgeq package",), ""
    ),
    "bench what isn't there": Mistake(
        lambda folder: ["bench", str(folder / "nte.onnx"), "-q"], "model", ("nte.onnx",), ""
    ),
    "inspect what isn't there": Mistake(
        lambda folder: ["inspect", str(folder / "nte.onnx")], "model", ("no model file",), "check the path"
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    io.write(small_net.model(), tmp_path / "net.onnx")
    np.savez(tmp_path / "calibration.npz", image=small_net.images(6, seed=1))
    return tmp_path


@pytest.mark.parametrize("name", TABLE)
def test_mistakes_read_well(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mistake = TABLE[name]
    mistake.files(folder)
    before = sorted(path.name for path in folder.rglob("*"))
    status = main([*mistake.words(folder), "--json"])
    out, err = capsys.readouterr()
    assert status == mistake.status, err
    error = json.loads(out)["error"]
    assert error["code"] == mistake.code
    for part in mistake.named:
        assert part in error["message"]
    assert mistake.hint in error["hint"]
    assert "\n" not in error["message"]
    assert len(error["message"]) < 400, "a sentence, not a dump"
    assert error["hint"], "what to try next"
    assert "Traceback" not in err
    assert sorted(path.name for path in folder.rglob("*")) == before, "nothing is left behind"


def test_for_people_the_same_is_said_on_stderr(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(TABLE["unknown target"].words(folder)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert "  try: did you mean 'cpu-x64-vnni'?" in err


def test_a_missing_runtime_is_status_3(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "npu.toml").write_text(
        'extends = "cpu-x64-vnni"\nsummary = "x"\nverified = "documentation"\nprovider = "CUDAExecutionProvider"\n'
    )
    assert main([*export("-t", "./npu.toml")(folder), "--json"]) == 3
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["code"] == "runtime"
    assert "CUDAExecutionProvider" in error["message"]


@pytest.mark.slow
def test_ctrl_c_in_the_middle_of_an_export_leaves_nothing_half_written(folder: Path) -> None:
    """SIGINT while hundreds of samples are observed: status 130, no package, no temporary sibling beside it."""
    np.savez(folder / "many.npz", image=small_net.images(1500, seed=1))
    temporary = folder / "temporary"
    temporary.mkdir()
    before = sorted(path.name for path in folder.iterdir())
    words = export(data="many.npz")(folder)
    words.remove("-q")
    own = {"TMPDIR": str(temporary), "EDGEQ_CACHE": str(temporary / "cache")}
    environment = {**os.environ, **own, "PYTHONPATH": os.pathsep.join(sys.path)}
    for stage in ("judge", "quantize"):  # observing comes behind the first, profiling and racing behind the second
        process = subprocess.Popen(
            [sys.executable, "-m", "edgeq", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert process.stderr is not None
        while not process.stderr.readline().strip().startswith(stage):
            assert process.poll() is None
        time.sleep(0.4)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130, err
        assert "interrupted: nothing was written" in err
        assert "Traceback" not in err
        assert sorted(path.name for path in folder.iterdir()) == before
        left = [path.name for path in temporary.iterdir() if path.name.startswith("edgeq")]
        assert left == [], "temporary folders are gone too"
        assert not list((temporary / "cache").rglob("*.part*")), "kept statistics are whole or absent"
