"""One file on ARM cores of three kinds: the same results, by the kernels each has.

Which kernel ran can't be asked, but it shows: emulation takes time by the instruction, SDOT does four products' work of
SMULL and SMLAL, SMMLA twice SDOT's. So quantized products must become much cheaper from core to core, and float ones,
which have the same kernel everywhere, must not.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgeq.run.device import measure, open_device
from edgeq.run.session import open_session, run_session
from edgeq.run.timing import TimedConfig
from edgeq.target.load import load_target
from edgeq.target.record import Provider
from tests.devices.conftest import Boards
from tests.devices.models import noise, zoo
from tests.graphs import normal

CORES = ("a72", "a76", "a715")
SIZE, BLOCK, STEP = 256, 32, 0.1
ARM = Provider(session=load_target("cpu-arm64").session)


def products(folder: Path) -> list[TimedConfig]:
    """Products [8, SIZE] x [SIZE, SIZE] in f32, with 4-bit weights multiplied as i8, and in i8 Q/DQ, each a model, and
    last a model with all of them."""
    weights = normal(SIZE, SIZE) / 16
    codes = np.clip(np.round(weights * 400), -127, 127).astype(np.int8)
    packed = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE // BLOCK, BLOCK // 2), np.uint8)
    scales = np.full(SIZE * SIZE // BLOCK, 0.01, np.float32)
    nodes = {
        "float": ([helper.make_node("MatMul", ["x", "W"], ["float"])], {"W": weights}),
        "nbits": (
            [helper.make_node("MatMulNBits", ["x", "B", "s"], ["nbits"], domain="com.microsoft", K=SIZE, N=SIZE,
                              bits=4, block_size=BLOCK, accuracy_level=4)],
            {"B": packed, "s": scales},
        ),
        "qdq": (
            [
                helper.make_node("QuantizeLinear", ["x", "sx", "zx"], ["q"]),
                helper.make_node("DequantizeLinear", ["q", "sx", "zx"], ["d"]),
                helper.make_node("DequantizeLinear", ["C", "sw", "zx"], ["w"]),
                helper.make_node("MatMul", ["d", "w"], ["p"]),
                helper.make_node("QuantizeLinear", ["p", "sy", "zx"], ["r"]),
                helper.make_node("DequantizeLinear", ["r", "sy", "zx"], ["qdq"]),
            ],
            {"C": codes, "sx": np.float32(0.03), "sw": np.float32(1 / 400), "sy": np.float32(STEP), "zx": np.int8(0)},
        ),
    }  # fmt: skip
    single = [_saved(folder, name, made, arrays) for name, (made, arrays) in nodes.items()]
    made = [node for nodes_of, _ in nodes.values() for node in nodes_of]
    return [*single, _saved(folder, "all", made, {k: v for _, arrays in nodes.values() for k, v in arrays.items()})]


def _saved(folder: Path, name: str, nodes: list[Any], arrays: dict[str, Any]) -> TimedConfig:
    outputs = [node.output[0] for node in nodes if node.output[0] in ("float", "nbits", "qdq")]
    graph = helper.make_graph(
        nodes, name, [helper.make_tensor_value_info("x", TensorProto.FLOAT, [8, SIZE])],
        [helper.make_tensor_value_info(key, TensorProto.FLOAT, [8, SIZE]) for key in outputs],
        [onnx.numpy_helper.from_array(np.asarray(array), key) for key, array in arrays.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), folder / f"{name}.onnx")
    return TimedConfig(name, folder / f"{name}.onnx", provider=ARM)


@pytest.mark.slow
def test_each_core_takes_the_kernels_it_has(boards: Boards, at_home: Callable[[Path], None], tmp_path: Path) -> None:
    (*timed, whole), feed = products(tmp_path), {"x": normal(8, SIZE)}
    here = run_session(open_session(whole.path, provider=ARM), feed)
    fastest: dict[str, dict[str, float]] = {}
    for core in CORES:
        board = boards(core)
        at_home(board.home)
        with open_device(board.address) as device:
            race = measure.compare(device, timed, [feed], max_seconds=1)
            fastest[core] = {name: min(timing.laps_ms) for name, timing in race.timings.items()}
            ((_, found),) = measure.outputs(device, whole, [feed])
        assert np.allclose(found["float"], here["float"], atol=1e-4), core
        assert noise(found["nbits"], here["nbits"]) < 0.02, core  # x as 8-bit codes, by each its own way
        assert np.abs(found["qdq"] - here["qdq"]).max() <= 1.01 * STEP, core  # the next code
    a72, a76, a715 = (fastest[core] for core in CORES)
    assert a72["nbits"] / a72["float"] > 2 * a76["nbits"] / a76["float"], fastest
    assert a72["qdq"] / a72["float"] > 1.3 * a76["qdq"] / a76["float"], fastest
    assert a76["qdq"] / a76["float"] > 1.1 * a715["qdq"] / a715["float"], fastest


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["MBV2", "OCRcls", "MAGIKA"])
def test_a_quantized_model_computes_the_same_on_every_core(
    name: str, boards: Boards, at_home: Callable[[Path], None], tmp_path: Path
) -> None:
    """Everything that fuses, in integers. x86-64 and ARM round sums of floats in another order, so that a code may be
    its neighbour: what differs must stay below what quantization itself does."""
    config, samples, reference = zoo(name, "cpu-arm64", tmp_path)
    here, exact = open_session(config.path, provider=ARM), open_session(reference)
    for core in CORES:
        board = boards(core)
        at_home(board.home)
        with open_device(board.address) as device:
            for feed, found in measure.outputs(device, config, samples):
                ours, truth = run_session(here, feed), run_session(exact, feed)
                for key, array in found.items():
                    assert noise(array, ours[key]) <= max(noise(ours[key], truth[key]), 1e-3), (core, key)
                    assert np.array_equal(array.argmax(-1), ours[key].argmax(-1)), core
