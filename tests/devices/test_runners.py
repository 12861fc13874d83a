"""Real models on one emulated device, by both runners and over both links: what they compute, and what comes back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgeq.ir import io
from edgeq.run.device import measure, open_device
from edgeq.run.record import Feed
from edgeq.run.session import open_session, run_session
from edgeq.run.timing import TimedConfig
from edgeq.target.load import load_target
from edgeq.target.record import Provider
from tests.devices.adbd import Adbd
from tests.devices.models import noise, zoo
from tests.tabled import ran, telling

ARM = Provider(session=load_target("cpu-arm64").session)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[TimedConfig, list[Feed], Path]]:
    """Three small ones, made before a test moves to another home."""
    return {name: zoo(name, "cpu-arm64", tmp_path_factory.mktemp(name)) for name in ("OCRcls", "BFf", "MAGIKA")}


@pytest.mark.zoo
def test_both_runners_compute_the_same_over_ssh_and_adb(
    models: dict[str, tuple[TimedConfig, list[Feed], Path]], phone: Adbd, cpp: str
) -> None:
    """To the bit on the device, whose runtime is one; to x86-64 the difference must stay below what quantization
    itself does, as in test_cores."""
    found: dict[str, list[Feed]] = {}
    for address, runner in (
        (phone.board.address, "python"),
        (phone.board.address + cpp, "cpp"),
        (phone.address + cpp, "cpp"),
    ):
        with open_device(address) as device:
            assert device.facts.runner == runner
            for name, (config, samples, _) in models.items():
                made = [outputs for _, outputs in measure.outputs(device, config, samples[:1])]
                assert all(
                    np.array_equal(one[key], other[key], equal_nan=True)
                    for one, other in zip(made, found.setdefault(name, made), strict=True)
                    for key in one.keys() | other.keys()
                ), (name, address)
    for name, (config, samples, reference) in models.items():
        here, exact = open_session(config.path, provider=ARM), open_session(reference)
        ours, truth = run_session(here, samples[0]), run_session(exact, samples[0])
        for key, array in found[name][0].items():
            assert noise(array, ours[key]) <= max(noise(ours[key], truth[key]), 1e-3), (name, key)


@pytest.mark.slow
def test_both_runners_use_kernels_compiled_for_the_device(phone: Adbd, cpp: str, tmp_path: Path) -> None:
    io.write(telling(), tmp_path / "net.onnx")
    codes = np.tile(np.arange(256, dtype=np.uint8), 3)[:-7]
    for address in (phone.board.address, phone.board.address + cpp):
        with open_device(address) as device:
            ((_, found),) = measure.outputs(device, TimedConfig("net", tmp_path / "net.onnx"), [{"c": codes}])
            assert ran(codes, found["o"]) == "kernel", device.facts.runner
