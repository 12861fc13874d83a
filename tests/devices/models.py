"""Models for devices, and whether these compute what this machine does. Integers are made without asking whether they
pay: everything that fuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edgeq import recipe, steps
from edgeq.analyse.store import Store
from edgeq.context import Context
from edgeq.given import read_with_samples
from edgeq.ir import io
from edgeq.report.recorder import Recorder
from edgeq.run.device import Device, measure
from edgeq.run.record import Feed
from edgeq.run.session import open_session, run_session
from edgeq.run.timing import TimedConfig
from edgeq.target.load import load_target
from edgeq.target.oracle import Oracle
from tests.zoo import ZOO
from tests.zoo.packages import source

LAYERS = "(float[n, 512] x) => (float[n, 512] y) {\n h = MatMul(x, W)\n y = Tanh(h)\n}"


def same(device: Device, config: TimedConfig, feeds: list[Feed]) -> bool:
    """Whether a device computes what this machine does, as closely as two orders of 512 products in f32 allow."""
    here = open_session(config.path)
    pairs = list(measure.outputs(device, config, feeds))
    assert [feed is sent for (sent, _), feed in zip(pairs, feeds, strict=True)] == [True] * len(feeds)
    return all(np.allclose(run_session(here, feed)["y"], found["y"], atol=1e-5) for feed, found in pairs)


def zoo(name: str, target: str, folder: Path) -> tuple[TimedConfig, list[Feed], Path]:
    """``integer`` of a zoo model."""
    return integer(source(ZOO[name]), ZOO[name].calibration, target, folder)


def integer(model: str, data: str, target: str, folder: Path) -> tuple[TimedConfig, list[Feed], Path]:
    """A model in integers for ``target``, two samples, and its float model."""
    chosen, recorder = load_target(target), Recorder(None)
    read, _, samples = read_with_samples(model, data, chosen, recorder, limit=8)
    io.write(read, folder / "float.onnx")
    context = Context(chosen, Oracle(chosen), samples, recorder, Store(), max(chosen.threads), 0)
    quantizer = steps.apply(recipe.parse("canonicalize; smooth; quantize", steps.KNOWN), read, context).quantizer
    assert quantizer is not None
    plan, made, _ = quantizer.fused()
    assert plan.integer
    io.write(made, folder / "int8.onnx")
    feeds = [samples.read(index) for index in range(2)]
    return TimedConfig("int8", folder / "int8.onnx", provider=chosen.execution), feeds, folder / "float.onnx"


def noise(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    """Root of the mean square of the difference, over that of ``expected``."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
