"""Boards for tests, one of each core that is asked for, shared by the tests of a module; a small model and feeds."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from edgeq.ir import io
from edgeq.run.device.runners import MACHINES
from edgeq.run.record import Feed
from edgeq.run.timing import TimedConfig
from edgeq.target.cache import cache_folder
from tests.devices import arm64
from tests.devices.adbd import Adbd, adbd
from tests.devices.arm64 import Board, left
from tests.devices.models import LAYERS
from tests.graphs import graph, normal

CACHE = cache_folder()  # told now: tests give clients homes of their own
COMPILER = MACHINES["aarch64"].gnu
Boards = Callable[[str], Board]


@pytest.fixture(scope="module")
def boards(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Boards]:
    """core -> a running board. Skips where none can run; in CI, where one must, fails."""
    if lacking := arm64.missing():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"no board: {lacking} (make devices)")
    home = tmp_path_factory.mktemp("home")
    running: dict[str, Board] = {}
    with ExitStack() as stack:

        def board(core: str) -> Board:
            if core not in running:
                running[core] = stack.enter_context(arm64.board(core, home))
            return running[core]

        yield board


@pytest.fixture
def at_home(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Makes a folder with .ssh in it the home of this user, as it is to every client; what was compiled stays."""
    monkeypatch.setenv("EDGEQ_CACHE", str(CACHE))
    return lambda home: monkeypatch.setenv("HOME", str(home))


@pytest.fixture
def cpp() -> str:
    """Options of an address that ask for the C++ runner, with the board's own ONNX Runtime."""
    if shutil.which(COMPILER) is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"no {COMPILER}: make browser")
    return f"?runner=cpp&library={arm64.library()}"


@pytest.fixture(scope="module")
def _adb_port() -> Iterator[str]:
    """Where an adb server of this module's own listens."""
    if shutil.which("adb") is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("no adb: make devices")
    port = str(arm64.free_port())
    yield port
    settings = {"ANDROID_ADB_SERVER_PORT": port}
    subprocess.run(["adb", "kill-server"], env=os.environ | settings, check=True, capture_output=True)


@pytest.fixture
def phone(
    boards: Boards, at_home: Callable[[Path], None], _adb_port: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Adbd]:
    """A board as an emulated phone that trusts this machine; whatever a test does, nothing is left on it."""
    board = boards("a76")
    at_home(board.home)
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", _adb_port)
    with adbd(board) as daemon:
        yield daemon
    assert left(board) == []


@pytest.fixture
def config(tmp_path: Path) -> TimedConfig:
    """A MatMul of a megabyte and a Tanh."""
    io.write(graph(LAYERS, {"W": normal(512, 512) / 16}), tmp_path / "net.onnx")
    return TimedConfig("net", tmp_path / "net.onnx")


@pytest.fixture
def feeds() -> list[Feed]:
    return [{"x": normal(2, 512)} for _ in range(3)]
