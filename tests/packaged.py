"""Packages for tests: a small image classifier with preprocessing, labels and golden runs, made from seeds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgeq.ir import io
from edgeq.packaging import Golden, Package
from edgeq.report.record import Artifact, Check, Coverage, Island, Report
from edgeq.rewrite.pixels import from_pixels
from edgeq.run.preprocess import Preprocessing
from edgeq.run.session import open_session, run_session
from tests import small_net

CLASSES = 10
PREPROCESSING = Preprocessing(
    resize=36, crop=(small_net.SIZE, small_net.SIZE), interpolation="bicubic",
    mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
)  # fmt: skip
REPORT = Report(
    source={"origin": "net.onnx", "kind": "onnx", "digest": "ab"},
    target={"name": "cpu", "provider": "CPUExecutionProvider", "isa": [], "session": {}},
    recipe="balanced",
    artifact=Artifact("somewhere/else.onnx", "cpu", {"image": "f32"}, {"logits": "f32"}, 123, "ab"),
    checks=(Check("latency_ratio", 0.5, low=0.4, high=0.6, limit=1.0),),
    coverage=Coverage(0.9, 4, 1, 1, 2, (Island("g", "GlobalAveragePool", "no integer kernel", 7),), (), {"QConv": 4}),
    layers=({"name": "a", "op": "Conv", "format": "u8/tensor/asym", "snr_db": 40.0},),
)


def classifier(folder: Path, *, change: Callable[[Any], None] | None = None, pixels: bool = False) -> Package:
    """A package of ``small_net``, whose model ``change`` may edit first: two golden runs, 10 labels, softmax, top 2.
    With ``pixels`` it takes uint8 pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    model, how = small_net.model(), PREPROCESSING
    feeds = tuple({"image": small_net.images(1, seed)} for seed in (5, 6))
    if pixels:
        model = from_pixels(model, how)
        how = replace(how, scale=1.0, mean=(0.0,), std=(1.0,), layout="NHWC", dtype="uint8")
        feeds = tuple({"image": np.uint8(255 * feed["image"]).transpose(0, 2, 3, 1)} for feed in feeds)
    if change is not None:
        change(model)
    io.write(model, folder / "net.onnx")
    session = open_session(folder / "net.onnx")
    golden = Golden(feeds, tuple(run_session(session, feed) for feed in feeds), {"logits": 1e-3})
    return Package(
        folder / "net.onnx", REPORT, golden, how.to_dict(), tuple(f"class {i}" for i in range(CLASSES)),
        {"licence": "MIT"}, {"output": "logits", "activation": "softmax", "top": 2, "threshold": 0.0},
    )  # fmt: skip


def picture(height: int = 40, width: int = 50, seed: int = 2) -> Any:
    """u8[height, width, 3], random."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def files(folder: Path) -> dict[str, bytes]:
    """Relative name -> contents of every file."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def reseal(out: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest and its digest, as another writer would have written them."""
    manifest = json.loads((out / "manifest.json").read_text())
    change(manifest)
    text = json.dumps(manifest).encode()
    (out / "manifest.json").write_bytes(text)
    (out / "manifest.sha256").write_bytes(f"{hashlib.sha256(text).hexdigest()}  manifest.json\n".encode())
