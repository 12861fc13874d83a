"""Real models in integers on an ARM board: their kernels round as they may, and faults in copies are found there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest

from edgeq.analyse.divergence import Diverging, divergence, there
from edgeq.ir import io
from edgeq.run.device import open_device
from tests.devices.conftest import Boards
from tests.devices.models import zoo
from tests.faults import quantized, wrong_scale, wrong_weight, wrong_zero_point

pytestmark = [pytest.mark.slow, pytest.mark.zoo]


@pytest.mark.parametrize("name", ["OCRcls", "MAGIKA", "EFL0"])
def test_faults_of_real_models_are_found_on_a_board(
    name: str, tmp_path: Path, boards: Boards, at_home: Callable[[Path], None]
) -> None:
    config, feeds, _ = zoo(name, "cpu-arm64", tmp_path)
    model, board = io.read(config.path), boards("a76")
    at_home(board.home)
    tensors = quantized(model)
    with open_device(board.address) as device:

        def found(other: ir.Model) -> Diverging:
            return divergence(model, other, feeds[:1], there(device, config.provider), provider=config.provider)

        def first(node: str, broken: ir.Model) -> tuple[str, str]:
            """The cause of the first divergence, which must be on the node the fault is in, and what differs there."""
            row = found(broken).beyond[0]
            assert row.node == node, f"{row}"
            return row.cause, "; ".join(row.changed)

        own = found(model)
        assert own.compared > len(tensors) and own.beyond == (), f"{own.beyond[:1]}"
        early, late = tensors[len(tensors) // 5], tensors[len(tensors) * 3 // 5]
        cause, changed = first(*wrong_scale(model, late))
        assert cause == "scale" and "_scale" in changed
        cause, changed = first(*wrong_zero_point(model, early))
        assert cause == "zero point" and "_zero_point" in changed
        cause, changed = first(*wrong_weight(model, late, channel=1))
        assert cause in ("saturation", "constants") and "_quantized" in changed
