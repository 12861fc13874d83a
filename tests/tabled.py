"""A model that tells which ran: edgeq's kernel or the function that stands for it in the file."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from edgeq.ir import io
from edgeq.lower.kernels import in_own_kernels
from edgeq.packaging import Golden, Package
from edgeq.target import kernels
from edgeq.target.load import load_target
from tests.graphs import graph, number
from tests.packaged import REPORT

OUT = {"t": number(0.04), "y": np.array(12, np.uint8)}
SCALE = number(0.03)


def needs_library() -> Path:
    """The library; skips a test where there is no compiler, and fails it in CI."""
    found = kernels.here()
    if isinstance(found, str):
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"{found}: make browser")
    return Path(found)


def telling(shape: str = "n") -> ir.Model:
    """u8 codes ``c`` -> ``o``: by the function a HardSwish, by the kernel 255 - c, as its table was exchanged."""
    text = f"""(uint8[{shape}] c) => (uint8[{shape}] o) {{
        d = DequantizeLinear(c, s, z) h = HardSwish(d) o = QuantizeLinear(h, t, y) }}"""
    weights = {"s": SCALE, "z": np.array(128, np.uint8), **OUT}
    model, counts = in_own_kernels(graph(text, weights), load_target("cpu-x64-vnni"))
    assert counts == {"Table": 1}
    for name, value in model.graph.initializers.items():
        if name.endswith("_table"):
            value.const_value = ir.tensor(np.arange(255, -1, -1, dtype=np.uint8), name=name)
    return model


def ran(codes: np.ndarray, found: np.ndarray) -> str:
    """Which of the two computed ``found`` of ``codes``."""
    if np.array_equal(found, 255 - codes):
        return "kernel"
    x = (codes.astype(np.float64) - 128) * float(SCALE)
    exact = np.clip(np.rint(x * np.clip(x / 6 + 0.5, 0, 1) / 0.04) + 12, 0, 255)
    assert np.abs(found - exact).max() <= 1, "neither"
    return "function"


def packaged(folder: Path, library: Path, *, golden: bool = True) -> Package:
    """A package of ``telling`` with its library; its golden run is the kernel's."""
    folder.mkdir(parents=True, exist_ok=True)
    io.write(telling("1,256"), folder / "net.onnx")
    codes = np.arange(256, dtype=np.uint8)[None]
    runs = Golden(({"c": codes},), ({"o": 255 - codes},), {"o": 0.0}) if golden else Golden((), (), {})
    return Package(folder / "net.onnx", REPORT, runs, kernels={kernels.system(): library})
