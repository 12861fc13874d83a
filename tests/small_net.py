"""A small classifier with its data, made from seeds: smooth filters and 10 classes, so that it behaves like a trained
one (activations with structure, scores that differ) where random weights would make every layer noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeq.ir import io
from tests.graphs import graph
from tests.placed import run

F32 = NDArray[np.float32]
SIZE = 32
TEXT = f"""(float[N,3,{SIZE},{SIZE}] image) => (float[N,10] logits) {{
    a0 = Conv<kernel_shape=[3,3], pads=[1,1,1,1], strides=[2,2]>(image, w0, b0)
    a = Relu(a0)
    d0 = Conv<kernel_shape=[3,3], pads=[1,1,1,1], group=32>(a, w1, b1)
    d = Clip(d0, zero, six)
    p = Conv<kernel_shape=[1,1]>(d, w2, b2)
    s = Add(p, a)
    e0 = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(s, w3, b3)
    e = Relu(e0)
    m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(e)
    g = GlobalAveragePool(m)
    f = Flatten(g)
    logits = Gemm<transB=1>(f, w4, b4)
}}"""


def _filters(random: np.random.Generator, out: int, inner: int, kernel: int) -> F32:
    """Filters [out, inner, kernel, kernel] that fall off from a random centre, of random sign and strength."""
    rows, columns = np.mgrid[:kernel, :kernel]
    centre = random.uniform(0, kernel - 1, (2, out, inner, 1, 1))
    bump = np.exp(-((rows - centre[0]) ** 2) - (columns - centre[1]) ** 2)
    strength = random.standard_normal((out, inner, 1, 1)) * np.sqrt(2 / (inner * kernel))
    return np.asarray(bump * strength, np.float32)


def model() -> ir.Model:
    """The classifier: 5 products of different kinds, batch size dynamic."""
    random = np.random.default_rng(3)
    weights: dict[str, NDArray[np.generic]] = {
        "w0": _filters(random, 32, 3, 3), "w1": _filters(random, 32, 1, 3), "w2": _filters(random, 32, 32, 1),
        "w3": _filters(random, 64, 32, 3), "w4": random.standard_normal((10, 64)).astype(np.float32),
        "zero": np.array(0, np.float32), "six": np.array(6, np.float32),
    }  # fmt: skip
    for index, size in enumerate((32, 32, 32, 64)):
        weights[f"b{index}"] = (random.standard_normal(size) * 0.1).astype(np.float32)
    raw = run(graph(TEXT, {**weights, "b4": np.zeros(10, np.float32)}), {"image": images(64, seed=0)})["logits"]
    weights["w4"] /= raw.std(0)[:, None]  # every class wins now and then
    return graph(TEXT, {**weights, "b4": -raw.mean(0) / raw.std(0)})


def images(count: int, seed: int) -> F32:
    """f32[count, 3, SIZE, SIZE]: coloured blobs on a gradient, in [0, 1]."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[:SIZE, :SIZE] / SIZE
    made = []
    for _ in range(count):
        x, y, width = random.uniform(0.2, 0.8), random.uniform(0.2, 0.8), random.uniform(0.01, 0.1)
        blob = np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / width)
        slope = random.uniform(-0.5, 0.5) * rows + random.uniform(-0.5, 0.5) * columns + 0.5
        made.append(random.uniform(0, 1, (3, 1, 1)) * blob + random.uniform(0, 1, (3, 1, 1)) * slope)
    return np.clip(np.stack(made), 0, 1).astype(np.float32)


def write(folder: Path, samples: int = 24) -> tuple[Path, Path, Path]:
    """``net.onnx``, ``calibration.npz`` and ``evaluation.npz`` in ``folder``; labels are what the float net says."""
    net = model()
    io.write(net, folder / "net.onnx")
    held_out = images(samples, seed=2)
    np.savez(folder / "calibration.npz", image=images(samples, seed=1))
    np.savez(folder / "evaluation.npz", image=held_out, label=run(net, {"image": held_out})["logits"].argmax(1))
    return folder / "net.onnx", folder / "calibration.npz", folder / "evaluation.npz"
